"""WebSocket over HTTP/1.1: the upgrade, and the connection as a `ByteStream` after it.

`http1.py` calls `serve_upgrade` for each request with an Upgrade field, in place of the app. Cancelling it ends the
session (`websocket.py`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from trioserve.errors import ClientDisconnected, RequestRefused
from trioserve.http.byte_stream import Fields
from trioserve.http.response import field_block, flags_of
from trioserve.http.websocket import run_websocket
from trioserve.http.websocket_handshake import WebSocketRequest, accept_value, names_websocket

if TYPE_CHECKING:
    from trioserve.http.http1 import Http1
    from trioserve.http.http1_exchange import Http1Exchange
    from trioserve.structure.context import ConnectionContext, Scope

_SWITCHING = b"".join(
    (
        b"HTTP/1.1 101 Switching Protocols\r\n",
        b"upgrade: websocket\r\nconnection: Upgrade\r\nsec-websocket-accept: %b\r\n",
    )
)


async def serve_upgrade(http1: Http1, exchange: Http1Exchange, scope: Scope) -> bool:
    """Serve a request that would change the protocol: to WebSocket if that is what it names, else as it stands.

    Returns:
        True: it was answered in HTTP. False: it was a session, which is over, and so is the connection.

    Raises:
        RequestRefused: it cannot become a session; also noted in `exchange.refusal`.
    """
    engine = http1.engine
    connection = http1.connection
    if engine.upgrade is None or not names_websocket(engine.upgrade):
        # RFC 9110 section 7.8: what we do not speak may be ignored.
        await connection.worker.app(scope, exchange.receive, exchange.send)
        return True
    exchange.keep_alive = False  # what follows the request are frames, not requests
    request = WebSocketRequest(engine.target, engine.version, engine.headers, engine.leftover, scope)
    try:
        if engine.method != "GET":
            raise RequestRefused(400, f"a WebSocket cannot be opened with {engine.method:.20}")
        if engine.content_length != 0:
            raise RequestRefused(400, "a request to open a WebSocket has no body")
        engine.leftover = b""
        if await run_websocket(connection, request, exchange, Http1ByteStream(connection, request)):
            return True
    except RequestRefused as refusal:
        exchange.refusal = refusal
        raise
    if connection.slot is not None:
        connection.slot.clear()
    http1.linger = True
    return False


class Http1ByteStream:
    """The connection below a session.

    What the kernel does not take is kept in order and written when it does: by the tasks in `flush`, of which one
    waits for the socket and the others for that one, or by the hub.
    """

    __slots__ = (
        "_ending",
        "_parts",
        "_request",
        "_task",
        "_waiters",
        "_writing",
        "connection",
        "transport",
        "watch",
    )

    def __init__(self, connection: ConnectionContext, request: WebSocketRequest) -> None:
        self.connection = connection
        self.transport = connection.transport
        self.watch = connection.transport.watch
        self._request = request
        self._parts: list[bytes | memoryview] = []
        self._writing = False  # a task waits for the socket
        self._waiters: trio.lowlevel.ParkingLot | None = None
        self._ending = False

    @property
    def broken(self) -> OSError | None:
        """What ended reading or writing, or None."""
        return self.transport.broken

    @property
    def on_readable(self) -> Callable[[], None] | None:
        """Called by the hub."""
        return self.watch.on_readable

    @on_readable.setter
    def on_readable(self, callback: Callable[[], None] | None) -> None:
        self.watch.on_readable = callback

    def accept(self, fields: Fields) -> bool:
        """Write the 101."""
        worker = self.connection.worker
        block = field_block(fields)
        defaults = worker.response_defaults.block(worker.clock(), flags_of(fields))
        head = _SWITCHING % accept_value(self._request)
        return self.write_nowait(b"".join((head, defaults, block, b"\r\n")))

    # -- reading ---------------------------------------------------------------------------------------------

    def read_nowait(self) -> bytes | None:
        """What is there."""
        watch = self.watch
        # Where the hub does not call, `readable` is only what the last reader has seen.
        if watch.readable or not watch.calls_on_writable:
            return self.transport.recv_nowait()
        return None

    def wait_readable(self) -> Awaitable[None]:
        """Wait for more; not a coroutine, so that a wake-up passes through one less."""
        return self.watch.wait_readable()

    def wake_reader(self) -> None:
        """Let the reading task go on."""
        self.watch.wake_reader()

    # -- writing ---------------------------------------------------------------------------------------------

    @property
    def is_full(self) -> bool:
        """Something is kept."""
        return bool(self._parts)

    def write_nowait(self, data: bytes) -> bool:
        """Write, or keep."""
        if self._parts:
            self._parts.append(data)
            return True
        sent = self.transport.send_nowait(data)
        if sent == len(data):
            return False
        self._parts.append(memoryview(data)[sent:])
        self._await_room()
        return True

    def _await_room(self) -> None:
        if self.watch.calls_on_writable and not self.watch.closed:
            self.watch.on_writable = self._write_more

    def _write_more(self) -> None:
        """Called by the hub, or by the task that has waited: write what is kept."""
        try:
            if self.transport.send_parts_nowait(self._parts):
                self._await_room()
                return
        except OSError:
            self._parts.clear()  # who is in `flush` meets `broken`
        if self._ending:
            self.transport.shutdown_write()
        if self._waiters is not None:
            self._waiters.unpark_all()

    async def flush(self) -> None:
        """Wait until nothing is kept."""
        while self._parts:
            if self._writing:
                if self._waiters is None:
                    self._waiters = trio.lowlevel.ParkingLot()
                await self._waiters.park()
                continue
            self._writing = True
            try:
                await self.watch.wait_writable()
                self._write_more()
            except trio.ClosedResourceError:
                self._parts.clear()
                raise ClientDisconnected(errno.EPIPE, os.strerror(errno.EPIPE)) from None
            finally:
                self._writing = False
                if self._waiters is not None:
                    self._waiters.unpark_all()
                if self._parts:
                    self._await_room()
        if self.transport.broken is not None:
            raise self.transport.broken

    def end(self) -> None:
        """Send our FIN behind what is kept."""
        if not self._ending:
            self._ending = True
            if not self._parts:
                self.transport.shutdown_write()

    def abort(self) -> None:
        """Reset the connection."""
        self._parts.clear()
        self.transport.abort()
        if self._waiters is not None:
            self._waiters.unpark_all()
