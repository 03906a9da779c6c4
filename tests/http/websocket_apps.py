"""Tiny WebSocket apps."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from ..apps import respond

Session = Callable[[Any, Any], Awaitable[None]]


class Handled:
    """An app that serves each WebSocket with `session(receive, send)`, and tells what came of it.

    Attributes:
        scopes: those that it was called with. outcomes: what its sessions have raised, or None, in order.
        accepted: set when a session was accepted. ended: set when one is over.
    """

    def __init__(self, session: Session, *, accept: bool = True) -> None:
        self.session = session
        self.accept = accept
        self.scopes: list[Any] = []
        self.outcomes: list[BaseException | None] = []
        self.accepted, self.ended = trio.Event(), trio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] == "http":
            await respond(send, b"plain")
            return
        outcome: BaseException | None = None
        try:
            if self.accept:
                assert (await receive())["type"] == "websocket.connect"
                await send({"type": "websocket.accept"})
                self.accepted.set()
            await self.session(receive, send)
        except BaseException as error:
            outcome = error
            raise
        finally:
            self.outcomes.append(outcome)
            self.ended.set()
            del outcome


async def echo(receive: Any, send: Any) -> None:
    """Sends messages back until the peer has gone."""
    while (message := await receive())["type"] == "websocket.receive":
        await send({**message, "type": "websocket.send"})


class Recorder:
    """Keeps what `receive()` says until the session is over."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.times: list[float] = []

    async def __call__(self, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            self.times.append(trio.current_time())
            if message["type"] == "websocket.disconnect":
                self.messages.append((message["code"], message["reason"]))
                return
            self.messages.append(message["text"] if message["text"] is not None else message["bytes"])


async def wait_for_ever(receive: Any, send: Any) -> None:
    """Neither receives nor sends."""
    await trio.sleep_forever()


def text(data: str) -> dict[str, Any]:
    """A `websocket.send` event."""
    return {"type": "websocket.send", "text": data}
