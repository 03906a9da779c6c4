"""Modes: what carries a test's requests besides plain HTTP/1.1.

    pytestmark = pytest.mark.modes("tls", "http2")

runs the tests of a file, or one test, in these modes as well; of several marks the nearest counts, and the keyword
`because` says why it leaves a mode out. In another mode a test runs on one hub and one HTTP/1 engine only.

`tls`: HTTP/1.1 over TLS. `http2`: HTTP/2 in the clear, with a client that takes HTTP/1.1 as its notation. What a test
says of chunks, of `Connection`, or of versions has no meaning there; what it says of requests and responses does.

With `--lanes` apps run in a lane (`http1_lane.py`) also where a single request has come.
"""

from __future__ import annotations

import functools
import re
import socket
import ssl
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import h11
import pytest
import trio

from tests.certificates import Certificates, make_certificates
from tests.http.feeding import ENGINES
from tests.http.http2_client import Response as StreamResponse
from tests.http.http2_serving import LastingPeer
from tests.net.sockets import HUBS
from trioserve import testing
from trioserve.http import http1_turn
from trioserve.testing import RawClient, Response

#: Fields that speak of a connection, and what HTTP/2 says otherwise.
CONNECTION_FIELDS = frozenset(
    (
        b"connection",
        b"host",
        b"http2-settings",
        b"keep-alive",
        b"proxy-connection",
        b"transfer-encoding",
        b"upgrade",
    )
)


# -- TLS -----------------------------------------------------------------------------------------------------


@functools.cache
def certificates() -> Certificates:
    """For all tests of this run."""
    folder = tempfile.TemporaryDirectory(prefix="trioserve-tests-")
    made = make_certificates(Path(folder.name))
    _kept.append(folder)
    return made


_kept: list[Any] = []


@functools.cache
def client_context() -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(certificates().ca))
    context.set_alpn_protocols(["http/1.1"])
    return context


class TlsClient(RawClient):
    """`RawClient` over TLS. It shakes hands with its first bytes, and takes an end without close_notify for a reset."""

    sock: ssl.SSLSocket

    def __init__(self, sock: socket.socket) -> None:
        secure = client_context().wrap_socket(
            sock, server_hostname="localhost", do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        super().__init__(secure)

    async def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[await self._retry(self.sock.send, view) :]

    async def receive(self, size: int = 65536) -> bytes:
        try:
            return bytes(await self._retry(self.sock.recv, size))
        except ssl.SSLEOFError:
            raise ConnectionResetError("the end came without close_notify") from None

    async def _retry(self, call: Any, argument: Any) -> Any:
        """A write may have to wait until something can be read, and the other way round."""
        while True:
            try:
                return call(argument)
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self.sock)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(self.sock)

    def send_eof(self) -> None:
        # Not SSLSocket's own: it forgets that there is TLS.
        socket.socket.shutdown(self.sock, socket.SHUT_WR)


# -- HTTP/2 --------------------------------------------------------------------------------------------------


@dataclass
class _Exchange:
    """A request that was sent, and how much of its response was read as bytes."""

    stream_id: int
    closes: bool
    shown_interim: int = 0
    shown_head: bool = False
    shown_body: int = 0


class Http2Client(RawClient):
    """`RawClient` over HTTP/2: a request written as HTTP/1.1 goes out as a stream, and its response comes back so.

    Responses come in the order of their requests; a stream's reset is what the connection's reset is in HTTP/1.1.
    One that asked for `Connection: close` is followed by the end.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.peer = LastingPeer()
        self._parser = h11.Connection(h11.SERVER)
        self._stream_id = 0  # of the request that is being sent
        self._exchanges: deque[_Exchange] = deque()
        self._out = b""
        self._ended = False  # the server's end, or ours after a response that was to be the last
        self._reads = 0
        self._reading, self._writing = trio.Lock(), trio.Lock()

    # -- requests

    async def send(self, data: bytes) -> None:
        self._parser.receive_data(data)
        head: h11.Request | None = None
        while (event := self._parser.next_event()) is not h11.NEED_DATA:
            if isinstance(event, h11.Request):
                head = event
                continue
            ends = isinstance(event, h11.EndOfMessage)
            if head is not None:
                self._open(head, ends and not event.headers)
            if isinstance(event, h11.Data):
                await self._send_body(bytes(event.data))
            elif ends and (head is None or event.headers):
                self._end(list(event.headers))
            head = None
            if ends:
                rest, _ = self._parser.trailing_data
                self._parser = h11.Connection(h11.SERVER)
                if rest:
                    self._parser.receive_data(rest)
        if head is not None:
            self._open(head, False)
        await self._flush()

    def _open(self, head: h11.Request, ends: bool) -> None:
        assert head.http_version == b"1.1", "HTTP/2 has no way to say so"
        fields = [(name, value) for name, value in head.headers if name not in CONNECTION_FIELDS]
        named = dict(head.headers)
        target, authority = head.target, named.get(b"host", b"")
        if absolute := re.fullmatch(rb"http://([^/?]*)(.*)", target):
            authority, target = absolute.groups()
            target = target if target.startswith(b"/") else b"/" + target
        pseudo = [
            (b":method", head.method),
            (b":scheme", b"http"),
            (b":path", target),
            (b":authority", authority),
        ]
        self._stream_id = self.peer.request([*pseudo, *fields], end=ends)
        closes = b"close" in named.get(b"connection", b"").lower()
        self._exchanges.append(_Exchange(self._stream_id, closes))

    async def _send_body(self, data: bytes) -> None:
        connection = self.peer.connection
        while data and not self._is_over():
            room = connection.local_flow_control_window(self._stream_id)
            size = min(len(data), room, connection.max_outbound_frame_size)
            if size:
                connection.send_data(self._stream_id, data[:size])
                data = data[size:]
                await self._flush()
            elif not await self._read_some():
                raise ConnectionResetError("the server has closed the connection")

    def _end(self, trailers: list[tuple[bytes, bytes]]) -> None:
        if self._is_over():
            return
        if trailers:
            self.peer.connection.send_headers(self._stream_id, trailers, end_stream=True)
        else:
            self.peer.connection.end_stream(self._stream_id)

    def _is_over(self) -> bool:
        """The server wants no more of this request: it has reset the stream, perhaps behind a whole response."""
        response = self.peer.responses[self._stream_id]
        return response.reset is not None

    # -- responses

    async def read_response(self, method: str = "GET") -> Response:
        exchange = self._exchanges[0]
        found = self.peer.responses[exchange.stream_id]
        try:
            while not found.over and await self._read_some():
                pass
        except ConnectionResetError:
            if not found.status:
                raise
        self._exchanges.popleft()
        self._ended = self._ended or exchange.closes
        self.received = b""
        if not found.status:
            error = EOFError if found.reset is None else ConnectionResetError
            raise error("the stream ended without a response")
        interim = [status for status, _ in found.interim[exchange.shown_interim :]]
        return Response(
            found.status, found.fields, found.body, interim, found.ended, list(found.trailers or ())
        )

    async def receive(self, size: int = 65536) -> bytes:
        """Some of a response, as HTTP/1.1 would have it: status line, fields, and the body without chunks."""
        while True:
            if self._exchanges:
                exchange = self._exchanges[0]
                found = self.peer.responses[exchange.stream_id]
                if text := _show(exchange, found, size):
                    return text
                if found.over:
                    self._exchanges.popleft()
                    self._ended = self._ended or exchange.closes
                    if not found.ended:
                        raise ConnectionResetError(f"the stream was reset with {found.reset}")
                    continue
            if self._ended or not await self._read_some():
                return b""

    async def _read_some(self) -> bool:
        """Read, unless another task does; False at the end of the connection."""
        before = self._reads
        async with self._reading:
            if self._reads != before:
                return not self._ended
            data = await RawClient.receive(self)
            self._reads += 1
            if not data:
                self._ended = True
                return False
            self.peer.receive(data)
            try:
                await self._flush()
            except OSError:
                pass  # it has gone; what it sent before is still to be read
            return True

    async def _flush(self) -> None:
        async with self._writing:
            while data := self.peer.take():
                await RawClient.send(self, data)


def _show(exchange: _Exchange, found: StreamResponse, size: int) -> bytes:
    """What has not been shown yet."""
    if exchange.shown_interim < len(found.interim) and not exchange.shown_head:
        status, fields = found.interim[exchange.shown_interim]
        exchange.shown_interim += 1
        return _show_head(status, fields)
    if found.status and not exchange.shown_head:
        exchange.shown_head = True
        return _show_head(found.status, found.fields)
    part = found.body[exchange.shown_body : exchange.shown_body + size]
    exchange.shown_body += len(part)
    return part


def _show_head(status: int, fields: list[tuple[bytes, bytes]]) -> bytes:
    phrases = {known.value: known.phrase for known in HTTPStatus}
    line = f"HTTP/1.1 {status} {phrases.get(status, '')}\r\n".encode()
    return line + b"".join(b"%b: %b\r\n" % pair for pair in fields) + b"\r\n"


# -- the modes themselves ------------------------------------------------------------------------------------


def make_mode(name: str) -> testing.Mode:
    if name == "tls":
        files = certificates()
        return testing.Mode({"certfile": str(files.certfile), "keyfile": str(files.keyfile)}, TlsClient)
    if name == "http2":
        # Who reads up to the end of a connection that nobody closes has not to wait for long.
        return testing.Mode({"h2c": True, "keep_alive_timeout": 1}, Http2Client)
    return testing.Mode()


def force_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single request is enough for a lane, however often its app waits."""
    for constant, value in (("_ENOUGH_FOR_LANE", 1), ("_REQUESTS_APART", 0), ("_MOST_APART", 0)):
        monkeypatch.setattr(http1_turn, constant, value)


@pytest.fixture(autouse=True)
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The mode that this test runs in: "plain", "tls" or "http2"."""
    name = getattr(request, "param", "plain")
    if request.config.getoption("--lanes"):
        force_lanes(monkeypatch)
    if name == "plain":
        yield name
        return
    token = testing.mode.set(make_mode(name))
    yield name
    testing.mode.reset(token)


def add_modes(metafunc: pytest.Metafunc) -> None:
    """Hook: a marked test once more for each of its modes."""
    marker = metafunc.definition.get_closest_marker("modes")
    if marker is not None and marker.args:
        others = () if metafunc.config.getoption("--plain") else marker.args
        metafunc.parametrize("mode", ["plain", *others], indirect=True)


def drop_repetitions(items: list[pytest.Item]) -> None:
    """Hook: hubs and HTTP/1 engines are all tested in plain mode, and one of each elsewhere."""
    items[:] = [item for item in items if not _is_repetition(item)]


def _is_repetition(item: pytest.Item) -> bool:
    parameters = (
        item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    )
    if parameters.get("mode", "plain") == "plain":
        return False
    return parameters.get("engine", ENGINES[0]) != ENGINES[0] or parameters.get("hub", HUBS[0]) != HUBS[0]
