"""The wire of one HTTP/1 exchange: the request's body from the engine, the response's bytes to the transport.

`http1.py` makes an `Http1Exchange` for each request and hands its `receive` and `send` to the app. Small body parts
are held back for the `Flusher`; everything else is written at once or waited for under the phase `response_write`.
What cancelling does is told in `asgi/exchange.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import trio

from trioserve.asgi.exchange import Exchange, ResponseState, check_body_length, listed
from trioserve.asgi.scope import http_scope
from trioserve.errors import RequestRefused, WrongContentLength
from trioserve.http.engine import Engine
from trioserve.http.response import (
    ASKS_CLOSE,
    BODILESS,
    CHUNKED,
    CLOSE,
    CONTINUE,
    KEEP_ALIVE,
    LAST_CHUNK,
    check_start,
    field_block,
)
from trioserve.net.transport import BODY_READ_SIZE
from trioserve.structure.context import ConnectionContext, Message

_NONE, _HELD, _STREAMING, _TRAILERS, _COMPLETE = ResponseState

# Body parts up to this are held back for the flusher; beyond it a write of their own costs little more.
_HOLD_SIZE = 16 * 1024

# What a part that is held back costs besides its bytes: its framing, and the objects. Parts of one byte add up, too.
_PART_COST = 64


class Http1Exchange(Exchange):
    """One request and response on an HTTP/1 connection.

    Attributes:
        keep_alive: whether the connection may serve another request after this one; decided with the head.
        completed_at: when a response that left in one piece was complete (trio's clock); 0 for others.
        fields: the app's response header fields, for the log.
        queue: bytes of the response that the kernel has not taken yet.
        refusal: why the request body could not be read on (malformed, too large), or None.
        admitted: it holds a place of `max_concurrent_requests`.
        told_gone: `receive()` has said `http.disconnect` although the response was not complete.
    """

    engine: Engine
    started_at: float
    keep_alive: bool
    queue: list[bytes | memoryview]
    completed_at = 0.0
    fields: Sequence[tuple[bytes, bytes]] = ()
    queued = 0
    refusal: RequestRefused | None = None
    told_gone = False
    admitted = False
    _block = b""
    _flags = 0
    _flush_asked = False
    _is_head: bool
    _chunked = False
    _expected: int | None = None
    _trailers: list[bytes] | None
    _body_waited = 0.0

    def __init__(
        self, connection: ConnectionContext, engine: Engine, started_at: float, keep_alive: bool
    ) -> None:
        self.connection = connection
        self.transport = connection.transport
        self.engine = engine
        self.started_at = started_at
        self.keep_alive = keep_alive
        self.state = _NONE
        self.queue = []
        self._sending = False
        self._is_head = engine.method == "HEAD"
        self._trailers = None

    def __repr__(self) -> str:
        return f"<exchange {self.engine.method} {self.state.name} status={self.status}>"

    def scope(self) -> Any:
        """The ASGI scope of this request."""
        engine = self.engine
        connection = self.connection
        version = engine.version
        extensions: dict[str, dict[object, object]]
        extensions = {"http.response.early_hint": {}} if version == "1.1" else {}
        if engine.wants_trailers:
            extensions["http.response.trailers"] = {}
        if connection.worker.debug_extension:
            extensions["http.response.debug"] = {}
        return http_scope(connection, engine.method, engine.target, version, engine.headers, extensions)

    @property
    def response_started(self) -> bool:
        """The head is on the wire, or at least handed over."""
        return self.state > _HELD

    @property
    def response_complete(self) -> bool:
        """All of the response was handed to the transport."""
        return self.state is _COMPLETE

    @property
    def ends_with_connection(self) -> bool:
        """The body has no framing of its own: only the end of the connection ends it."""
        return self.state is _STREAMING and not self._chunked and self._expected is None and not self._is_head

    @property
    def request_complete(self) -> bool:
        """Nothing more of the request will arrive: it is whole, or cut short."""
        return self.engine.body_complete or self.told_gone

    def describe(self) -> dict[str, Any]:
        """For logs and reports: no query, no values."""
        engine = self.engine
        return {
            "method": engine.method,
            "http_version": engine.version,
            "path": engine.target.partition(b"?")[0].decode("ascii", "replace"),
            "header_names": [name.decode("latin-1") for name, _ in engine.headers],
            "response": self.state.name.lower(),
            "status": self.status,
            "elapsed": self.connection.worker.clock() - self.started_at,
            "request_bytes": engine.body_bytes,
            "response_bytes": self.response_bytes,
        }

    # -- the request body ------------------------------------------------------------------------------------

    def wire_next_body(self) -> Message | None:
        engine = self.engine
        if not engine.body and not engine.body_complete:
            if self.transport.watch.readable and not self.told_gone:
                self._read_body()
            if self.told_gone:
                return {"type": "http.disconnect"}
            if not engine.body and not engine.body_complete:
                return None
        parts = engine.body
        if not parts:
            return {"type": "http.request", "body": b"", "more_body": False}
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        return {"type": "http.request", "body": body, "more_body": not engine.body_complete}

    def _read_body(self) -> bool:
        """Read once; False if nothing was there. A broken body or a FIN ends in `told_gone`."""
        data = self.transport.recv_nowait(BODY_READ_SIZE)
        if data is None:
            return False
        if not data:
            self.told_gone = True
            self.keep_alive = False
            self.connection.peer_gone()
            return True
        try:
            self.engine.receive_body(data)
        except RequestRefused as refusal:
            self.refusal = refusal
            self.told_gone = True
            self.keep_alive = False
        if self.engine.body_complete and self.transport.watch.hangup:
            self.connection.peer_gone()
        return True

    async def wire_wait_body(self) -> Message:
        connection = self.connection
        clock = connection.worker.clock
        if self.engine.expects_continue and self.state is _NONE and not await self._send_continue():
            return {"type": "http.disconnect"}
        began = clock()
        connection.start_phase("request_body", began + self._body_patience())
        try:
            while True:
                await self.transport.watch.wait_readable()
                if self.told_gone:
                    return {"type": "http.disconnect"}
                if self._read_body():
                    message = self.wire_next_body()
                    if message is not None:
                        return message
        except trio.ClosedResourceError:
            return {"type": "http.disconnect"}  # a task that has outlived its request
        finally:
            waited = clock() - began
            self._body_waited += waited
            # The time-out of the handler counts what the app takes, not what the client takes to send.
            connection.resume_handler(waited)

    async def _send_continue(self) -> bool:
        """Ask the peer for the body; False if it is gone, which is no error of an app that only wanted to read."""
        self.engine.expects_continue = False
        self.queue.append(CONTINUE)
        try:
            if self._write_queue():
                await self.wire_flush()
        except (OSError, trio.ClosedResourceError):
            self.queue.clear()
            self.told_gone = True
            self.keep_alive = False
        return not self.told_gone

    def _body_patience(self) -> float:
        """Seconds that the next part may take: the pause between parts, or what the minimum rate leaves."""
        timeouts = self.connection.worker.timeouts
        patience = timeouts.request_body
        if timeouts.request_body_min_rate:
            earned = self.engine.body_bytes / timeouts.request_body_min_rate
            allowed = max(timeouts.request_body_min_rate_grace, earned)
            patience = min(patience, max(0.0, allowed - self._body_waited))
        return patience

    # -- the peer --------------------------------------------------------------------------------------------

    def wire_is_peer_gone(self) -> bool:
        if not self.told_gone and not self.transport.is_peer_gone():
            return False
        self.told_gone = True
        return True

    async def wire_wait_disconnect(self) -> None:
        watch = self.transport.watch
        try:
            while self.state is not _COMPLETE and not watch.hangup and not self.told_gone:
                await watch.wait_hangup()
        except trio.ClosedResourceError:
            pass  # a task that has outlived its request: the connection is closed
        self.told_gone = self.state is not _COMPLETE

    # -- the response head -----------------------------------------------------------------------------------

    def wire_start(self, status: int, headers: Iterable[tuple[bytes, bytes]], trailers: bool) -> None:
        self.fields = fields = headers if type(headers) is list else listed(headers)
        self._block, self._expected, self._flags = check_start(status, fields)
        if self._flags & ASKS_CLOSE:
            self.keep_alive = False
        if trailers:
            self._trailers = []

    def wire_send_body(self, body: bytes, more: bool) -> bool:
        if self.state is _STREAMING:
            return self._send_next(body, more)
        if type(body) is not bytes:
            body = _as_bytes(body)
        status = self.status
        if more or self._is_head or status in BODILESS or self._trailers is not None:
            return self._send_first(body, more)
        size = len(body)
        if self._expected is not None and self._expected != size:
            check_body_length(size, self._expected, True)
        framing = b"content-length: %d\r\n" % size
        # Complete whatever the kernel takes of it now: nothing more may be sent, and what is left is in the queue.
        if size > _HOLD_SIZE:
            self.queue += (self._head(framing, b""), body)
            self._complete(size)
            return self._write_queue()
        data = self._head(framing, body)
        self._complete(size)
        sent = self.transport.send_nowait(data)
        if sent == len(data):
            self.completed_at = self.head_at or 0.0
            return False
        self.queue.append(memoryview(data)[sent:])
        return True

    def _head(self, framing: bytes, body: bytes, *, more: bool = False) -> bytes:
        """The whole head with the framing and the `Connection` field that it needs, and `body` behind it."""
        worker = self.connection.worker
        engine = self.engine
        if self.keep_alive:
            if worker.draining:
                self.keep_alive = False
            elif not engine.body_complete:
                # The rest of the body must be read before the next request: by a streaming app perhaps, but not
                # by one that has answered in full, nor if the peer still waits for our 100 to send it.
                self.keep_alive = more and not engine.expects_continue
        self.head_at = now = worker.clock()
        defaults = worker.response_defaults
        fields = (
            defaults.both
            if now < defaults.valid_until and not self._flags
            else defaults.block(now, self._flags)
        )
        if not self.keep_alive:
            return b"".join((self._block, fields, framing, CLOSE, b"\r\n", body))
        if engine.version == "1.0":
            return b"".join((self._block, fields, framing, KEEP_ALIVE, b"\r\n", body))
        return b"".join((self._block, fields, framing, b"\r\n", body))

    def _check_bodiless(self, size: int) -> None:
        if size and not self._is_head:
            raise WrongContentLength(f"a {self.status} response has no body, but the app sent {size} bytes")

    # -- the response body -----------------------------------------------------------------------------------

    def _send_first(self, body: bytes, more: bool) -> bool:
        """The head of a response that has several parts, no body, or trailers; with the first part."""
        size = len(body)
        framing = b""
        if self._expected is not None and self.status != 204:
            # RFC 9110 section 8.6: not in a 204, where frameworks set it out of habit.
            framing = b"content-length: %d\r\n" % self._expected
        if self._is_head or self.status in BODILESS:
            self._check_bodiless(size)
            if size and not more and self._expected is None and self.status not in BODILESS:
                # What a GET would be told. An app that sends no body to HEAD has not said (RFC 9110 section 8.6).
                framing = b"content-length: %d\r\n" % size
        elif self._expected is not None:
            check_body_length(size, self._expected, not more)
        elif self.engine.version == "1.1":
            framing = CHUNKED
            self._chunked = True
        else:
            self.keep_alive = False  # HTTP/1.0: the body ends where the connection does
        self.queue.append(self._head(framing, b"", more=more))
        self.queued = _HOLD_SIZE // 2  # a head alone is worth holding back, not much besides
        self.state = _STREAMING
        return self._send_next(body, more, checked=True)

    def _send_next(self, body: bytes, more: bool, *, checked: bool = False) -> bool:
        if type(body) is not bytes:
            body = _as_bytes(body)  # a copy: it may be held back, and the app may write to its own
        size = len(body)
        if size and not self._is_head:
            total = self.response_bytes + size
            if not checked:
                if self.status in BODILESS:
                    self._check_bodiless(size)
                check_body_length(total, self._expected, not more)
            self.response_bytes = total
            if self._chunked:
                self.queue += (b"%x\r\n" % size, body, b"\r\n")
            else:
                self.queue.append(body)
            self.queued += size + _PART_COST
        elif not more and not checked and not self._is_head and self.status not in BODILESS:
            check_body_length(self.response_bytes, self._expected, True)
        if not more:
            self._end_body()
            return self._write_queue()
        flusher = self.connection.worker.flusher
        if self.queued >= _HOLD_SIZE or flusher is None:
            return self._write_queue()
        if not self._flush_asked:
            self._flush_asked = True
            flusher.request(self.flush_in_background)
        return False

    def _end_body(self) -> None:
        if self._trailers is not None:
            self.state = _TRAILERS
            return
        if self._chunked:
            self.queue.append(LAST_CHUNK)
        self._complete(self.response_bytes)

    def _complete(self, size: int) -> None:
        self.state = _COMPLETE
        self.response_bytes = size
        if self._receiving:
            self.transport.watch.release_hangup_waiter()

    def wire_add_trailers(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        assert self._trailers is not None
        self._trailers.append(field_block(headers))

    def wire_end_trailers(self) -> bool:
        assert self._trailers is not None
        if self._chunked:
            # RFC 9110 section 6.5.1: trailers only for a peer that said it takes them.
            trailers = self._trailers if self.engine.wants_trailers else []
            self.queue += [b"0\r\n", *trailers, b"\r\n"]
        self._complete(self.response_bytes)
        return self._write_queue()

    def wire_interim(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        if self.engine.version == "1.0":
            return False  # RFC 9110 section 15.2: never to an HTTP/1.0 peer
        self.queue.append(b"HTTP/1.1 %d Early Hints\r\n%b\r\n" % (status, field_block(headers)))
        return self._write_queue()

    # -- writing ---------------------------------------------------------------------------------------------

    def _write_queue(self) -> bool:
        """Write what the kernel takes now; True if something is left."""
        self.queued = 0
        return bool(self.queue) and self.transport.send_parts_nowait(self.queue)

    def flush_last(self) -> bool:
        """Write what the kernel takes of an unfinished response; True if it cannot take all of it."""
        try:
            return self._write_queue()
        except OSError:
            return True

    async def wire_flush(self) -> None:
        connection = self.connection
        transport = self.transport
        transport.watch.on_writable = None
        try:
            while self.queue and self._write_queue():
                connection.start_write()
                await transport.watch.wait_writable()
        finally:
            connection.enter_handler()

    def flush_in_background(self) -> None:
        """Called by the flusher or the hub: write what was held back, and again once the peer has made room."""
        self._flush_asked = False
        if not self.queue or self._sending:
            return
        connection = self.connection
        try:
            blocked = self._write_queue()
        except OSError:
            self.queue.clear()
            self.queued = _HOLD_SIZE  # hold nothing more back: the app's next send is to meet the error
            return
        if blocked:
            self.queued = _HOLD_SIZE  # and the app's next send is to wait
            self.transport.watch.on_writable = self.flush_in_background
            if connection.phase != "request_body":
                connection.start_write()
        elif connection.phase == "response_write":
            connection.enter_handler()


def _as_bytes(body: Any) -> bytes:
    if isinstance(body, bytes):
        return body
    if not isinstance(body, bytearray | memoryview):
        raise TypeError(f"a bytes-like object is required, not {type(body).__name__}")
    return bytes(body)
