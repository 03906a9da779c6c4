"""Tiny ASGI apps, one for each behaviour that a test needs."""

from __future__ import annotations

from typing import Any

Scope = dict[str, Any]


async def respond(send: Any, body: bytes = b"hello", status: int = 200, headers: Any = ()) -> None:
    """One response in two events."""
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})


async def read_body(receive: Any) -> bytes:
    """The whole request body."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("disconnected")
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


async def hello(scope: Scope, receive: Any, send: Any) -> None:
    """Answers at once."""
    if scope["type"] == "http":
        await respond(send)


async def echo(scope: Scope, receive: Any, send: Any) -> None:
    """Sends the request body back."""
    if scope["type"] == "http":
        await respond(send, await read_body(receive))
