"""The smallest useful ASGI app: one response, no framework.

Run it with `trioserve examples.hello:app`.
"""

from __future__ import annotations

from typing import Any


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer every request with a greeting."""
    if scope["type"] == "lifespan":
        await answer_lifespan(receive, send)
        return
    body = b"Hello from trioserve\n"
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def answer_lifespan(receive: Any, send: Any) -> None:
    """Hear that the server starts, and in the end that it stops; there is nothing to open here and nothing to close."""
    for event in ("lifespan.startup", "lifespan.shutdown"):
        assert (await receive())["type"] == event
        await send({"type": f"{event}.complete"})
