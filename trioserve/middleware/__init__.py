"""ASGI middleware that works under any server, and uses what trioserve offers where it runs there."""
