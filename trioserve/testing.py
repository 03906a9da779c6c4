"""Test tools for apps and for trioserve itself: serve inside a test, talk raw bytes to it, prove that nothing leaks.

    async with serving(app, keep_alive_timeout=1) as server:
        async with server.connect() as client:
            response = await client.get("/")

With `serving(app, tls=True)` the same over TLS, with a certificate of its own (by trustme, which must be installed).

Real sockets on loopback, the real server, no mocks. With `trio.testing.MockClock` use an `autojump_threshold` of
some 10 ms: bytes in flight between two sockets are no reason for trio to wait, so a threshold of 0 jumps over them.
"""

from __future__ import annotations

import atexit
import functools
import gc
import logging
import shutil
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import h11
import trio

from trioserve.asgi.load import detect_mode, wrap_app
from trioserve.config import Config
from trioserve.net.tls import is_reset
from trioserve.structure.boundary import Fault
from trioserve.worker.worker import Worker, serve_worker

__all__ = [
    "DevelopmentCertificate",
    "Mode",
    "RawClient",
    "Response",
    "TestServer",
    "connect",
    "development_certificate",
    "mode",
    "no_leaks",
    "serving",
    "tls_client",
]

Headers = Sequence[tuple[bytes | str, bytes | str]]


@dataclass(slots=True)
class Response:
    """What a client received.

    Attributes:
        status: status code. headers: lower-case names, in order. body: all of it.
        interim: status codes of interim (1xx) responses that came before.
        complete: the framing was whole; False if the connection ended first.
        trailers: trailer fields of a chunked body.
    """

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""
    interim: list[int] = field(default_factory=list)
    complete: bool = True
    trailers: list[tuple[bytes, bytes]] = field(default_factory=list)

    def header(self, name: str) -> str | None:
        """The value of the first field of that name, or None."""
        wanted = name.lower().encode("ascii")
        return next((value.decode("latin-1") for key, value in self.headers if key == wanted), None)


class RawClient:
    """One connection to the server, byte by byte or request by request; over TLS if the socket is wrapped for it.

    Entering it completes the handshake; without that, the first bytes do.

    Attributes:
        ragged: the stream has ended without close_notify.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = b""
        self.ragged = False
        self._methods: list[str] = []

    async def __aenter__(self) -> Self:
        try:
            await self.handshake()
        except BaseException:
            self.close()
            raise
        return self

    async def handshake(self) -> None:
        """Agree on keys, if that is still to be done."""
        while isinstance(self.sock, ssl.SSLSocket):
            try:
                self.sock.do_handshake()
                return
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                await _wait_for(self.sock, error)

    async def __aexit__(self, *_exc: object) -> None:
        self.close()

    async def send(self, data: bytes) -> None:
        """Send all of `data`."""
        view = memoryview(data)
        while view:
            try:
                # A record at a time: of a longer write that blocks nobody could tell how much has gone.
                view = view[self.sock.send(view[:16384]) :]
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                await _wait_for(self.sock, error, trio.lowlevel.wait_writable)

    async def receive(self, size: int = 65536) -> bytes:
        """Receive some bytes; `b""` at the end of the stream. A reset raises `ConnectionResetError`."""
        while True:
            try:
                return self.sock.recv(size)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                await _wait_for(self.sock, error)
            except ssl.SSLEOFError as error:
                # At a FIN OpenSSL sends an alert, to which the answer may be an RST by now.
                if error.reason != "UNEXPECTED_EOF_WHILE_READING" and is_reset(self.sock):
                    raise ConnectionResetError from None
                self.ragged = True
                return b""

    async def receive_all(self) -> bytes:
        """Everything up to the end of the stream, or to a reset."""
        parts = [self.received]
        self.received = b""
        try:
            while part := await self.receive():
                parts.append(part)
        except ConnectionResetError:
            pass
        return b"".join(parts)

    async def receive_until(self, marker: bytes) -> bytes:
        """Everything up to and with `marker`; what follows is kept for the next call."""
        while marker not in self.received:
            part = await self.receive()
            if not part:
                raise EOFError(f"the stream ended before {marker!r}: {self.received[-200:]!r}")
            self.received += part
        end = self.received.index(marker) + len(marker)
        found, self.received = self.received[:end], self.received[end:]
        return found

    async def get(self, target: str = "/", headers: Headers = (), *, method: str = "GET") -> Response:
        """Send a request without a body and return the response."""
        return await self.request(method, target, headers)

    async def request(
        self, method: str, target: str = "/", headers: Headers = (), body: bytes | None = None
    ) -> Response:
        """Send one HTTP/1.1 request, with Host and (for a body) Content-Length added, and return the response."""
        await self.send(encode_request(method, target, headers, body))
        return await self.read_response(method)

    async def read_response(self, method: str = "GET") -> Response:
        """Read one response to a request with `method`; incomplete if the connection ends in it."""
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        parser.send(h11.EndOfMessage())
        parser.receive_data(self.received) if self.received else None
        self.received = b""
        response: Response | None = None
        interim: list[int] = []
        while True:
            try:
                event = parser.next_event()
            except h11.RemoteProtocolError:
                # h11's way to say that the stream ended inside a body.
                if response is None:
                    raise
                response.complete = False
                return response
            if event is h11.NEED_DATA:
                try:
                    data = await self.receive()
                except ConnectionResetError:
                    if response is None:
                        raise
                    response.complete = False
                    return response
                if not data and response is None:
                    raise EOFError("the connection was closed without a response")
                parser.receive_data(data)
            elif isinstance(event, h11.InformationalResponse):
                interim.append(event.status_code)
            elif isinstance(event, h11.Response):
                response = Response(event.status_code, list(event.headers), interim=interim)
            elif isinstance(event, h11.Data):
                assert response is not None
                response.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                assert response is not None
                response.trailers = list(event.headers)
                self.received = parser.trailing_data[0]
                return response

    def send_eof(self) -> None:
        """Half-close: FIN, while we go on reading."""
        # Not the wrapped socket's own method, which would forget its TLS.
        socket.socket.shutdown(self.sock, socket.SHUT_WR)

    def reset(self) -> None:
        """Close with RST."""
        if self.sock.fileno() >= 0:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            trio.lowlevel.notify_closing(self.sock)
            self.sock.close()

    def close(self) -> None:
        """Close as a client that is done does; a task that waits in here gets `ClosedResourceError`."""
        if self.sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self.sock)
            if isinstance(self.sock, ssl.SSLSocket):
                # close_notify; and what has come unread is read, since closing would answer it with a reset.
                with suppress(OSError, ValueError):
                    self.sock.unwrap()
            self.sock.close()


async def _wait_for(
    sock: socket.socket,
    error: Exception,
    otherwise: Callable[[socket.socket], Awaitable[None]] = trio.lowlevel.wait_readable,
) -> None:
    """Wait for what an operation that would have blocked needs."""
    if isinstance(error, ssl.SSLWantReadError):
        await trio.lowlevel.wait_readable(sock)
    elif isinstance(error, ssl.SSLWantWriteError):
        await trio.lowlevel.wait_writable(sock)
    else:
        await otherwise(sock)


@dataclass(frozen=True)
class Mode:
    """What carries the requests of a test: how its server is set up, and how its clients speak.

    Attributes:
        settings: for the Config, unless the test says otherwise. client: what to make of a connected socket.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    client: Callable[[socket.socket], RawClient] = RawClient


#: The mode of every `serving`. A fixture that sets another one runs the same tests over TLS, or over HTTP/2.
mode: ContextVar[Mode] = ContextVar("mode", default=Mode())  # noqa: B039  (it is frozen)


def encode_request(
    method: str, target: str = "/", headers: Headers = (), body: bytes | None = None, *, version: str = "1.1"
) -> bytes:
    """One request as bytes; Host and Content-Length are added where they are missing."""
    fields = [(_as_bytes(name), _as_bytes(value)) for name, value in headers]
    names = {name.lower() for name, _ in fields}
    if b"host" not in names:
        fields.insert(0, (b"host", b"testserver"))
    if body is not None and not names & {b"content-length", b"transfer-encoding"}:
        fields.append((b"content-length", str(len(body)).encode()))
    head = f"{method} {target} HTTP/{version}\r\n".encode("latin-1")
    return head + b"".join(b"%b: %b\r\n" % pair for pair in fields) + b"\r\n" + (body or b"")


def connect(
    address: str,
    *,
    receive_buffer: int | None = None,
    client: Callable[[socket.socket], RawClient] = RawClient,
) -> RawClient:
    """A connection to `http://host:port`, `https://host:port`, `host:port` or `unix:path`; `client` speaks on it."""
    if address.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        place: Any = address.removeprefix("unix:")
    else:
        host, _, port = address.rpartition("//")[2].rpartition(":")
        host = host.strip("[]")
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        place = (host, int(port))
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    # Loopback connects at once: the kernel's queue answers, not the server.
    try:
        sock.connect(place)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return client(sock)


@dataclass(frozen=True, slots=True)
class DevelopmentCertificate:
    """A certificate for localhost and the loopback addresses, and who believes it. All are paths of PEM files.

    Attributes:
        certfile, keyfile: for the settings of these names.
        authority: the certificate of who signed it, for clients.
        client: certificate and key of a client, in one file; `authority` is the `ca_certs` for it.
    """

    certfile: str
    keyfile: str
    authority: str
    client: str

    def client_context(self, *, with_certificate: bool = False) -> ssl.SSLContext:
        """A context for clients, which believes this authority and nobody else."""
        context = ssl.create_default_context(cafile=self.authority)
        if with_certificate:
            context.load_cert_chain(self.client)
        return context


@functools.cache
def development_certificate() -> DevelopmentCertificate:
    """The certificate of this process, made by trustme when it is first asked for; gone with the process."""
    import trustme  # only who tests TLS needs it

    directory = Path(tempfile.mkdtemp(prefix="trioserve-certificate-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    made = DevelopmentCertificate(
        *(str(directory / name) for name in ("cert.pem", "key.pem", "authority.pem", "client.pem"))
    )
    authority = trustme.CA()
    server = authority.issue_cert("localhost", "127.0.0.1", "::1")
    client = authority.issue_cert("client@example.org", common_name="client")
    for pem in server.cert_chain_pems:
        pem.write_to_path(made.certfile, append=True)
    server.private_key_pem.write_to_path(made.keyfile)
    authority.cert_pem.write_to_path(made.authority)
    client.private_key_and_cert_chain_pem.write_to_path(made.client)
    return made


def tls_client(
    context: ssl.SSLContext,
    server_name: str = "localhost",
    client: Callable[[socket.socket], RawClient] = RawClient,
) -> Callable[[socket.socket], RawClient]:
    """What to make of a connected socket to speak TLS on it, for `connect` and `Mode`."""

    def wrap(sock: socket.socket) -> RawClient:
        return client(
            context.wrap_socket(
                sock, server_hostname=server_name, do_handshake_on_connect=False, suppress_ragged_eofs=False
            )
        )

    return wrap


class TestServer:
    """A running server, seen from a test.

    Attributes:
        worker: the real worker, for its drain, counters and boundary.
        addresses: as given to `task_status.started()`.
        client: what `connect` makes of a connected socket.
    """

    __test__ = False  # pytest: this is no test class

    def __init__(
        self, worker: Worker, addresses: list[str], client: Callable[[socket.socket], RawClient] = RawClient
    ) -> None:
        self.worker = worker
        self.addresses = addresses
        self.client = client

    @property
    def port(self) -> int:
        """The port of the first TCP address."""
        return int(self.addresses[0].rpartition(":")[2])

    @property
    def failure(self) -> Fault | None:
        """What ended the worker, if something did."""
        return self.worker.context.boundary.failure

    def connect(self, *, receive_buffer: int | None = None) -> RawClient:
        """A new connection; `receive_buffer` bytes make a client that is slow to take data."""
        return connect(self.addresses[0], receive_buffer=receive_buffer, client=self.client)

    def connect_plainly(self, *, receive_buffer: int | None = None) -> RawClient:
        """A new connection without TLS, whatever the server expects."""
        return connect(self.addresses[0], receive_buffer=receive_buffer)

    async def get(self, target: str = "/", headers: Headers = ()) -> Response:
        """One request on a connection of its own."""
        async with self.connect() as client:
            return await client.get(target, headers)

    async def wait_idle(self) -> None:
        """Return once no connection is open."""
        context = self.worker.context
        while context.connections:
            await context.room.park()


@asynccontextmanager
async def serving(
    app: Any, config: Config | None = None, *, tls: bool | ssl.SSLContext = False, **settings: Any
) -> AsyncIterator[TestServer]:
    """Serve `app` on a free port of 127.0.0.1 while the block runs, then drain; `settings` go to the Config.

    With `tls` the server has `development_certificate()`, unless the settings name another one, and `server.connect()`
    speaks TLS, by a context of one's own if that is what is given.

    A worker that the app's faults have ended does not raise here: look at `server.failure`. Leaving the block asserts
    that the worker has kept no connection, no deadline and no request in flight.
    """
    if config is None:
        config = Config()
        config.bind = ["127.0.0.1:0"]
        config.errorlog = logging.getLogger("trioserve.tests")
        config.graceful_timeout = 1.0
        config.startup_timeout = config.shutdown_timeout = 5.0
    for name, value in {**mode.get().settings, **settings}.items():
        setattr(config, name, value)
    client = mode.get().client
    if tls:
        made = development_certificate()
        if config.certfile is None:
            config.certfile, config.keyfile = made.certfile, made.keyfile
        client = tls_client(tls if isinstance(tls, ssl.SSLContext) else made.client_context(), client=client)
    config.validate()
    workers: list[Worker] = []

    async def serve(task_status: trio.TaskStatus[list[str]]) -> None:
        asgi = wrap_app(app, detect_mode(app), config)
        await serve_worker(asgi, config, task_status=task_status, on_worker=workers.append)

    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(serve)
        yield TestServer(workers[0], addresses, client)
        workers[0].drain.begin("the test is over")
    context = workers[0].context
    assert not context.connections, f"connections left: {context.connections}"
    assert context.deadlines.armed == 0, f"deadlines left: {context.deadlines}"


# How long a thread may hold what it has worked on when it has delivered its result already (seconds).
_LAST_REFERENCES = 2.0


@asynccontextmanager
async def no_leaks() -> AsyncIterator[None]:
    """Assert that the block leaves no task, descriptor or thread behind that was not there before."""
    before = _inventory()
    yield
    after = _inventory_in_the_end(before)
    for name, count in before.items():
        assert after[name] <= count, f"{name} leaked: {count} before, {after[name]} after"


def _inventory_in_the_end(before: dict[str, int]) -> dict[str, int]:
    """What is there when threads have let go of what they have worked on, or after a while."""
    until = time.monotonic() + _LAST_REFERENCES
    while True:
        gc.collect()
        after = _inventory()
        if all(after[name] <= count for name, count in before.items()) or time.monotonic() >= until:
            return after
        time.sleep(0.01)  # of other threads; nothing of this one is waited for


def _inventory() -> dict[str, int]:
    descriptors = Path("/proc/self/fd")
    return {
        "tasks": trio.lowlevel.current_statistics().tasks_living,
        "descriptors": len(list(descriptors.iterdir())) if descriptors.exists() else 0,
        # trio keeps idle worker threads for 10 s by design.
        "threads": sum(not thread.name.startswith("Trio thread") for thread in threading.enumerate()),
    }


def _as_bytes(value: bytes | str) -> bytes:
    return value if isinstance(value, bytes) else value.encode("latin-1")
