"""Tests of trioserve/asgi: what an app sees and may do, over real sockets and through both engines."""
