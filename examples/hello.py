"""The smallest useful ASGI app: one response, no framework.

Run it with `trioserve examples.hello:app`.
"""

from __future__ import annotations

from typing import Any


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer every request with a greeting."""
    if scope["type"] != "http":
        return
    body = b"Hello from trioserve\n"
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
