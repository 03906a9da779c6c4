"""A WebSocket client for tests: raw frames out, wsproto's reading of what comes in.

Neither is what the server is made of: the frames that are sent may be as wrong as a test wants them, and what is
received has passed the checks of another implementation.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Message, Ping, Pong, TextMessage
from wsproto.extensions import PerMessageDeflate

from trioserve.testing import RawClient, Response, TestServer

KEY = base64.b64encode(b"sixteen bytes of")
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
ACCEPT = base64.b64encode(hashlib.sha1(KEY + _GUID).digest())

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10

Fields = Sequence[tuple[bytes, bytes]]

#: what a handshake says besides the request line and Host
FIELDS: list[tuple[bytes, bytes]] = [
    (b"upgrade", b"websocket"),
    (b"connection", b"Upgrade"),
    (b"sec-websocket-key", KEY),
    (b"sec-websocket-version", b"13"),
]


def without(*names: bytes) -> list[tuple[bytes, bytes]]:
    """The handshake's fields less some."""
    return [(name, value) for name, value in FIELDS if name not in names]


def handshake(
    target: str = "/", extra: Fields = (), *, fields: Fields = (), method: str = "GET", version: str = "1.1"
) -> bytes:
    """A request that opens a session; `fields` take the place of the usual ones."""
    lines = [b"host: testserver", *(b": ".join(field) for field in (*(fields or FIELDS), *extra))]
    return f"{method} {target} HTTP/{version}\r\n".encode() + b"\r\n".join(lines) + b"\r\n\r\n"


def masked(payload: bytes, mask: bytes) -> bytes:
    """Each byte with its byte of the mask (RFC 6455 section 5.3)."""
    key = (mask * (len(payload) // 4 + 1))[: len(payload)]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(len(payload), "big")


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    mask: bytes | None = b"\x37\xfa\x21\x3d",
    form: int | None = None,
) -> bytes:
    """One frame as a client sends it; `form` makes the length 7, 16 or 64 bits long whether it fits or not."""
    size = len(payload)
    form = form or (7 if size < 126 else 16 if size < 1 << 16 else 64)
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    bit = 0x80 if mask is not None else 0
    if form == 7:
        head = bytes((first, bit | size))
    elif form == 16:
        head = struct.pack("!BBH", first, bit | 126, size)
    else:
        head = struct.pack("!BBQ", first, bit | 127, size)
    return head + (payload if mask is None else mask + masked(payload, mask))


def close_payload(code: int | None, reason: str = "") -> bytes:
    """What a close frame says."""
    return b"" if code is None else struct.pack("!H", code) + reason.encode()


@dataclass(slots=True)
class Closed:
    """A close frame from the server."""

    code: int
    reason: str


class WebSocketClient:
    """One session, seen by its client.

    Attributes:
        raw: the connection. response: what the handshake was answered with.
        pings, pongs: payloads received so far.
    """

    def __init__(self, raw: RawClient) -> None:
        self.raw = raw
        self.response: Response
        self.pings: list[bytes] = []
        self.pongs: list[bytes] = []
        self.answers_pings = False
        self._connection: Connection
        self._events: list[Any] = []
        self._parts: list[Any] = []

    async def open(
        self, target: str = "/", extra: Fields = (), *, deflate: str = "", early: bytes = b""
    ) -> None:
        """Send a handshake, with `early` right behind it, and expect a 101."""
        if deflate:
            extra = [*extra, (b"sec-websocket-extensions", deflate.encode())]
        await self.raw.send(handshake(target, extra) + early)
        head = await self.raw.receive_until(b"\r\n\r\n")
        line, *fields = head[:-4].split(b"\r\n")
        pairs = [(name.lower(), value) for name, _, value in (field.partition(b": ") for field in fields)]
        self.response = Response(int(line.split()[1]), pairs)
        assert self.response.status == 101, head + self.raw.received
        assert self.response.header("sec-websocket-accept") == ACCEPT.decode()
        extensions = []
        answer = self.response.header("sec-websocket-extensions")
        if answer is not None:
            extension = PerMessageDeflate()
            extension.finalize(answer)
            extensions.append(extension)
        self._connection = Connection(ConnectionType.CLIENT, extensions, trailing_data=self.raw.received)
        self.raw.received = b""
        self._take()

    # -- out -------------------------------------------------------------------------------------------------

    async def send(self, data: str | bytes) -> None:
        """A whole message in one frame, compressed if that was agreed on."""
        event = TextMessage(data=data) if isinstance(data, str) else BytesMessage(data=data)
        await self.raw.send(self._connection.send(event))

    async def send_frame(self, opcode: int, payload: bytes = b"", **how: Any) -> None:
        """Any frame."""
        await self.raw.send(frame(opcode, payload, **how))

    async def close(self, code: int | None = 1000, reason: str = "") -> None:
        """A close frame."""
        await self.raw.send(frame(CLOSE, close_payload(code, reason)))

    # -- in --------------------------------------------------------------------------------------------------

    def _take(self) -> None:
        for event in self._connection.events():
            if isinstance(event, Message):
                self._parts.append(event.data)
                if event.message_finished:
                    text = isinstance(event, TextMessage)
                    self._events.append("".join(self._parts) if text else b"".join(map(bytes, self._parts)))
                    self._parts.clear()
            elif isinstance(event, Ping):
                self.pings.append(bytes(event.payload))
                self._events.append(event)
            elif isinstance(event, Pong):
                self.pongs.append(bytes(event.payload))
                self._events.append(event)
            elif isinstance(event, CloseConnection):
                self._events.append(Closed(event.code, event.reason or ""))

    async def next_event(self) -> Any:
        """The next message (str or bytes), wsproto's Ping or Pong, `Closed`, or None at the end of the stream."""
        while not self._events:
            try:
                data = await self.raw.receive()
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self._connection.receive_data(data)
            self._take()
        return self._events.pop(0)

    async def receive(self) -> Any:
        """The next message or `Closed`, or None at the end of the stream; pings are answered if `answers_pings`."""
        while True:
            event = await self.next_event()
            if isinstance(event, Ping):
                if self.answers_pings:
                    await self.send_frame(PONG, bytes(event.payload))
            elif not isinstance(event, Pong):
                return event

    async def receive_pong(self) -> bytes:
        """The payload of the next frame, which must be a pong."""
        event = await self.next_event()
        assert isinstance(event, Pong), event
        return bytes(event.payload)

    async def expect_close(self, code: int, reason: str | None = None) -> None:
        """The next message is a close frame with this code, and after ours comes the end of the stream."""
        event = await self.receive()
        assert isinstance(event, Closed), event
        assert event.code == code, event
        assert reason is None or event.reason == reason
        await self.finish()

    async def finish(self) -> None:
        """Answer a close frame; the server then ends the connection."""
        try:
            await self.close()
        except OSError:
            return  # it does not listen any more
        await self.expect_end()

    async def expect_end(self) -> None:
        """Nothing more comes, and it is an orderly end."""
        assert await self.raw.receive() == b""


@asynccontextmanager
async def session(
    server: TestServer, target: str = "/", extra: Fields = (), **how: Any
) -> AsyncIterator[WebSocketClient]:
    """An open session with a server."""
    async with server.connect() as raw:
        client = WebSocketClient(raw)
        await client.open(target, extra, **how)
        yield client
