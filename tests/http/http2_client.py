"""An HTTP/2 client for tests: raw frames, a client without I/O made of h2, and the same over a trio stream.

Raw frames are for what no decent client sends. `Http2Peer` keeps the state of a connection for tests of engines;
`Http2Client` reads and writes for tests of the server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from struct import Struct
from typing import Any

import hpack
import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    InformationalResponseReceived,
    PingAckReceived,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)

from trioserve.http.http2_codes import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PRIORITY_UPDATE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
)

Fields = list[tuple[bytes, bytes]]

_START = Struct(">LBL")

GET: Fields = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"a")]
POST: Fields = [(b":method", b"POST"), *GET[1:]]


# -- raw frames ----------------------------------------------------------------------------------------------


def frame(
    kind: int, flags: int = 0, stream_id: int = 0, payload: bytes = b"", *, length: int | None = None
) -> bytes:
    """Any frame; `length` may lie."""
    return _START.pack((len(payload) if length is None else length) << 8 | kind, flags, stream_id) + payload


def block(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A header block that touches no dynamic table: literals without indexing, as they are."""
    parts = []
    for name, value in fields:
        parts += [b"\0", _length(name), name, _length(value), value]
    return b"".join(parts)


def _length(text: bytes) -> bytes:
    return bytes(hpack.hpack.encode_integer(len(text), 7))


def headers(
    stream_id: int, fields: Iterable[tuple[bytes, bytes]] = GET, *, end: bool = True, flags: int = 0
) -> bytes:
    return frame(HEADERS, END_HEADERS | flags | (END_STREAM if end else 0), stream_id, block(fields))


def headers_in_parts(
    stream_id: int, fields: Iterable[tuple[bytes, bytes]], sizes: Iterable[int], *, end: bool = True
) -> bytes:
    """HEADERS and CONTINUATION frames: fragments of these sizes, then one with the rest."""
    data = block(fields)
    frames, kind, flags = [], HEADERS, END_STREAM if end else 0
    for size in sizes:
        frames.append(frame(kind, flags, stream_id, data[:size]))
        data, kind, flags = data[size:], CONTINUATION, 0
    return b"".join(frames) + frame(kind, flags | END_HEADERS, stream_id, data)


def data_frame(stream_id: int, data: bytes = b"", *, end: bool = False, pad: int | None = None) -> bytes:
    flags = END_STREAM if end else 0
    if pad is None:
        return frame(DATA, flags, stream_id, data)
    return frame(DATA, flags | PADDED, stream_id, bytes([pad]) + data + b"\0" * pad)


def number(value: int) -> bytes:
    return value.to_bytes(4, "big")


def settings(values: dict[int, int] | None = None, *, ack: bool = False) -> bytes:
    payload = b"".join(key.to_bytes(2, "big") + number(value) for key, value in (values or {}).items())
    return frame(SETTINGS, ACK if ack else 0, 0, payload)


def window_update(stream_id: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream_id, number(increment))


def rst_stream(stream_id: int, code: int = 8) -> bytes:
    return frame(RST_STREAM, 0, stream_id, number(code))


def ping(payload: bytes = b"pingpong", *, ack: bool = False) -> bytes:
    return frame(PING, ACK if ack else 0, 0, payload)


def goaway(last_stream_id: int = 0, code: int = 0, reason: bytes = b"") -> bytes:
    return frame(GOAWAY, 0, 0, number(last_stream_id) + number(code) + reason)


def priority(stream_id: int, depends_on: int = 0, weight: int = 15) -> bytes:
    return frame(PRIORITY, 0, stream_id, number(depends_on) + bytes([weight]))


def priority_update(target: int, value: bytes) -> bytes:
    return frame(PRIORITY_UPDATE, 0, 0, number(target) + value)


# How a connection begins; most tests have no use for more.
OPENING = PREFACE + settings()


@dataclass(frozen=True)
class Frame:
    """A frame as it was read."""

    kind: int
    flags: int
    stream_id: int
    payload: bytes

    @property
    def code(self) -> int:
        """Of RST_STREAM or GOAWAY."""
        return int.from_bytes(self.payload[-4:] if self.kind == RST_STREAM else self.payload[4:8], "big")


def frames_of(data: bytes) -> list[Frame]:
    """Whole frames; anything else fails the test."""
    found, at = [], 0
    while at < len(data):
        start, flags, stream_id = _START.unpack_from(data, at)
        size = start >> 8
        payload = data[at + 9 : at + 9 + size]
        assert len(payload) == size, "a frame is cut short"
        found.append(Frame(start & 0xFF, flags, stream_id, payload))
        at += 9 + size
    return found


# -- a client without I/O -----------------------------------------------------------------------------------


@dataclass
class Response:
    """What came back on a stream so far."""

    status: int = 0
    fields: Fields = field(default_factory=list)
    body: bytes = b""
    trailers: Fields | None = None
    interim: list[tuple[int, Fields]] = field(default_factory=list)
    ended: bool = False
    reset: int | None = None

    @property
    def over(self) -> bool:
        return self.ended or self.reset is not None

    def field(self, name: bytes) -> bytes | None:
        return dict(self.fields).get(name)


class Http2Peer:
    """A client's side of a connection: calls put bytes into h2, `take()` gets them, `receive()` sorts what comes.

    Attributes:
        responses: by stream id. goaway: (last stream id, code) once it came. settings: the server's, once they came.
        pongs: payloads of acknowledged PINGs. acknowledge: give windows back at once; False lets them run dry.
    """

    def __init__(self, *, acknowledge: bool = True) -> None:
        self.connection = H2Connection(
            H2Configuration(
                client_side=True, validate_outbound_headers=False, normalize_outbound_headers=False
            )
        )
        self.acknowledge = acknowledge
        self.responses: dict[int, Response] = {}
        self.goaway: tuple[int, int] | None = None
        self.settings: dict[int, int] | None = None
        self.pongs: list[bytes] = []
        self.connection.initiate_connection()

    def take(self) -> bytes:
        return self.connection.data_to_send()

    def request(self, fields: Iterable[tuple[bytes, bytes]] = GET, *, end: bool = True) -> int:
        """Open a stream; its id."""
        stream_id = self.connection.get_next_available_stream_id()
        self.connection.send_headers(stream_id, list(fields), end_stream=end)
        self.responses[stream_id] = Response()
        return stream_id

    def receive(self, data: bytes) -> None:
        for event in self.connection.receive_data(data):
            self._take(event)

    def _take(self, event: Event) -> None:
        match event:
            case RemoteSettingsChanged():
                new = {int(key): change.new_value for key, change in event.changed_settings.items()}
                self.settings = (self.settings or {}) | new
            case InformationalResponseReceived(stream_id=stream_id, headers=fields):
                plain = [(bytes(n), bytes(v)) for n, v in fields]
                self.responses[stream_id].interim.append((int(plain[0][1]), plain[1:]))
            case ResponseReceived(stream_id=stream_id, headers=fields):
                plain = [(bytes(n), bytes(v)) for n, v in fields]
                assert plain[0][0] == b":status"
                self.responses[stream_id].status = int(plain[0][1])
                self.responses[stream_id].fields = plain[1:]
            case DataReceived(stream_id=stream_id):
                self.responses[stream_id].body += event.data or b""
                if self.acknowledge and event.flow_controlled_length:
                    self.connection.acknowledge_received_data(event.flow_controlled_length, stream_id)
            case TrailersReceived(stream_id=stream_id, headers=fields):
                self.responses[stream_id].trailers = [(bytes(n), bytes(v)) for n, v in fields]
            case StreamEnded(stream_id=stream_id):
                self.responses[stream_id].ended = True
            case StreamReset(stream_id=stream_id):
                self.responses[stream_id].reset = int(event.error_code)
            case ConnectionTerminated():
                self.goaway = (event.last_stream_id or 0, int(event.error_code))
            case PingAckReceived():
                self.pongs.append(event.ping_data)


# -- the same over a stream -----------------------------------------------------------------------------------


class Http2Client:
    """`Http2Peer` over a trio stream (TCP or TLS). One task at a time may wait in it.

    Attributes:
        peer: the state. closed: the server has closed the connection.
    """

    def __init__(self, stream: trio.abc.Stream, **options: Any) -> None:
        self.stream = stream
        self.peer = Http2Peer(**options)
        self.closed = False

    async def start(self) -> None:
        """Send the preface and wait for the server's SETTINGS."""
        await self.flush()
        await self.read_until(lambda peer: peer.settings is not None)

    async def flush(self) -> None:
        data = self.peer.take()
        if data:
            await self.stream.send_all(data)

    async def send_raw(self, data: bytes) -> None:
        """Bytes past h2, which does not know of them."""
        await self.flush()
        await self.stream.send_all(data)

    async def read_some(self) -> bool:
        """Read once and answer what is to be answered; False at the end."""
        try:
            data = await self.stream.receive_some(65536)
        except trio.BrokenResourceError:
            data = b""
        if not data:
            self.closed = True
            return False
        self.peer.receive(bytes(data))
        try:
            await self.flush()
        except trio.BrokenResourceError:
            pass  # it has closed; what it sent before is still to be read
        return True

    async def read_until(self, condition: Callable[[Http2Peer], bool], *, seconds: float = 10) -> None:
        """Read until `condition` holds; the end of the connection, or no end of waiting, fails the test."""
        with trio.fail_after(seconds):
            while not condition(self.peer):
                assert await self.read_some(), "the server has closed the connection"

    async def read_to_end(self, *, seconds: float = 10) -> None:
        with trio.fail_after(seconds):
            while await self.read_some():
                pass

    async def request(self, fields: Iterable[tuple[bytes, bytes]] = GET, body: bytes = b"") -> Response:
        """A whole exchange; the body must fit into the windows."""
        stream_id = self.peer.request(fields, end=not body)
        for at in range(0, len(body), 16384):
            part = body[at : at + 16384]
            self.peer.connection.send_data(stream_id, part, end_stream=at + len(part) == len(body))
        await self.flush()
        return await self.response(stream_id)

    async def response(self, stream_id: int) -> Response:
        """The response of a stream, once it is over."""
        await self.read_until(lambda peer: peer.responses[stream_id].over)
        return self.peer.responses[stream_id]

    async def aclose(self) -> None:
        await self.stream.aclose()
