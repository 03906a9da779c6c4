"""What the tests of the HTTP/2 server have in common: a connected client that goes on after a GOAWAY, and few words."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
from h2.connection import ConnectionState

from tests.http.http2_client import GET, Fields, Http2Client, Http2Peer, frames_of
from trioserve.http.http2_codes import GOAWAY
from trioserve.testing import TestServer, serving


class LastingPeer(Http2Peer):
    """As the library h2, but a GOAWAY does not end the streams that are open (RFC 9113 section 6.8)."""

    def receive(self, data: bytes) -> None:
        self._pending = getattr(self, "_pending", b"") + data
        while len(self._pending) >= 9:
            size = 9 + int.from_bytes(self._pending[:3], "big")
            if len(self._pending) < size:
                break
            frame, self._pending = self._pending[:size], self._pending[size:]
            super().receive(frame)
            if self.connection.state_machine.state is ConnectionState.CLOSED:
                self.connection.state_machine.state = ConnectionState.CLIENT_OPEN


class Client(Http2Client):
    """One connection to the server of a test."""

    def __init__(self, stream: trio.abc.Stream, **options: Any) -> None:
        super().__init__(stream, **options)
        self.peer = LastingPeer(**options)

    async def open(self, fields: Fields = GET, *, end: bool = True) -> int:
        """Begin a request; its stream."""
        stream_id = self.peer.request(fields, end=end)
        await self.flush()
        return stream_id

    async def send_body(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        self.peer.connection.send_data(stream_id, data, end_stream=end)
        await self.flush()

    async def reset(self, stream_id: int, code: int = 8) -> None:
        self.peer.connection.reset_stream(stream_id, code)
        await self.flush()


def get(path: bytes = b"/", *fields: tuple[bytes, bytes], method: bytes = b"GET") -> Fields:
    """The fields of a request."""
    return [(b":method", method), (b":scheme", b"http"), (b":path", path), (b":authority", b"a"), *fields]


@asynccontextmanager
async def connected(server: TestServer, *, start: bool = True, **options: Any) -> AsyncIterator[Client]:
    """A connection on which both have said their SETTINGS."""
    stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    client = Client(stream, **options)
    try:
        if start:
            await client.start()
        yield client
    finally:
        await trio.aclose_forcefully(stream)


@asynccontextmanager
async def served(app: Any, *, client: dict[str, Any] | None = None, **settings: Any) -> AsyncIterator[Any]:
    """A server for `app` and one connection to it."""
    async with (
        serving(app, h2c=True, **settings) as server,
        connected(server, **(client or {})) as connection,
    ):
        yield server, connection


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    """Everything up to the end of the stream, or to a reset."""
    data = b""
    try:
        while part := await stream.receive_some():
            data += part
    except trio.BrokenResourceError:
        pass
    return data


def code_of_goaway(data: bytes) -> int:
    """Of the last GOAWAY among whole frames."""
    return next(frame.code for frame in reversed(frames_of(data)) if frame.kind == GOAWAY)
