"""A WebSocket client for tests, over HTTP/1.1 on a `RawClient`: wsproto makes and reads the frames.

    async with await open_websocket(server.address, "/rooms/lobby") as client:
        await client.send('{"hello": 1}')
        assert await client.receive() == "..."

It answers pings while it receives. While nobody calls `receive` nothing is read: that is a slow client.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import wsproto
from wsproto import events
from wsproto.connection import ConnectionState

from trioserve.testing import RawClient, connect


class Closed(Exception):
    """The peer has closed the session with a code and a reason, or the connection has ended (1006)."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(f"{code} {reason}")
        self.code = code
        self.reason = reason


class Refused(Exception):
    """The request was answered in HTTP."""

    def __init__(self, status: int) -> None:
        super().__init__(str(status))
        self.status = status


class WebSocketClient:
    """One open session."""

    def __init__(self, client: RawClient, connection: wsproto.WSConnection) -> None:
        self.raw = client
        self._connection = connection
        self._parts: list[str | bytes] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self.raw.close()

    async def send(self, message: str | bytes) -> None:
        event = events.TextMessage(message) if isinstance(message, str) else events.BytesMessage(message)
        await self.raw.send(self._connection.send(event))

    async def receive(self) -> str | bytes:
        """The next message, whole."""
        while True:
            event = await self._next_event()
            if isinstance(event, events.Message):
                self._parts.append(event.data)
                if event.message_finished:
                    parts, self._parts = self._parts, []
                    return parts[0][:0].join(parts)  # type: ignore[arg-type]
            elif isinstance(event, events.Ping):
                await self.raw.send(self._connection.send(event.response()))
            elif isinstance(event, events.CloseConnection):
                if self._connection.state is not ConnectionState.CLOSED:
                    await self.raw.send(self._connection.send(event.response()))
                raise Closed(event.code, event.reason or "")

    async def close(self, code: int = 1000) -> None:
        """Say that this is the end; `receive` raises `Closed` when the peer has answered."""
        await self.raw.send(self._connection.send(events.CloseConnection(code)))

    async def _next_event(self) -> events.Event:
        while True:
            for event in self._connection.events():
                return event
            try:
                data = await self.raw.receive()
            except ConnectionResetError:
                data = b""
            if not data:
                raise Closed(1006)
            self._connection.receive_data(data)


async def open_websocket(
    address: str,
    target: str = "/",
    headers: Sequence[tuple[bytes, bytes]] = (),
    *,
    receive_buffer: int | None = None,
) -> WebSocketClient:
    """Connect and ask for a session; `Refused` if there is none."""
    client = WebSocketClient(
        connect(address, receive_buffer=receive_buffer), wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
    )
    try:
        request = events.Request(host=address, target=target, extra_headers=list(headers))
        await client.raw.send(client._connection.send(request))
        event = await client._next_event()
        if isinstance(event, events.RejectConnection):
            raise Refused(event.status_code)
        assert isinstance(event, events.AcceptConnection), event
    except BaseException:
        client.raw.close()
        raise
    return client
