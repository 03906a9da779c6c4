"""HTTP/1.1 and 1.0 on one connection: the keep-alive loop, and the exchange's wire.

`worker/connection.py` calls `Http1.serve` in the connection's task and cancel scope. The loop waits for a head, runs
the app on it in this very task, makes sure that the response is whole, and goes round; an engine parses, this file
does all the waiting. Cancelling it closes the connection: what of a response is on the wire stays truncated.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import trio

from trioserve.asgi.exchange import Exchange, ResponseState, check_body_length, listed
from trioserve.asgi.scope import http_scope
from trioserve.errors import IncompleteResponse, RequestRefused, TaskLeak, WrongContentLength
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
    minimal_response,
)
from trioserve.net.transport import BODY_READ_SIZE
from trioserve.observe.access_log import AccessEntry
from trioserve.structure.boundary import is_cancellation
from trioserve.structure.context import ConnectionContext, Message
from trioserve.structure.deadlines import NEVER

_NONE, _HELD, _STREAMING, _TRAILERS, _COMPLETE = ResponseState

# Body parts up to this are held back for the flusher; beyond it a write of their own costs little more.
_HOLD_SIZE = 16 * 1024

# What a part that is held back costs besides its bytes: its framing, and the objects. Parts of one byte add up, too.
_PART_COST = 64

# How much of an unread request body is read and thrown away to keep the connection; beyond it, closing is cheaper.
_DISCARD_SIZE = 256 * 1024


class Http1:
    """One connection's HTTP/1 state across its requests.

    Attributes:
        connection, engine: what it serves, and with which parser.
        linger: the peer may still be sending, so closing must not destroy our last words (RFC 9112 section 9.6).
    """

    __slots__ = ("connection", "engine", "linger")

    def __init__(self, connection: ConnectionContext, engine: Engine) -> None:
        self.connection = connection
        self.engine = engine
        self.linger = False

    @property
    def exchange(self) -> Http1Exchange | None:
        """The exchange under way, or None."""
        return self.connection.exchange  # type: ignore[return-value]  # only this class sets it

    # -- the loop --------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Serve requests until the connection may not be kept. Returning means: close it.

        Raises:
            RequestRefused: the peer's bytes cannot be served; nothing has been answered yet.
        """
        # Written flat: a helper that is awaited here is one more frame to pass through on every wake-up.
        connection = self.connection
        worker = connection.worker
        transport = connection.transport
        watch = transport.watch
        engine = self.engine
        task = connection.task
        app = worker.app
        clock = worker.clock
        keep_alive = worker.timeouts.keep_alive
        most_requests = worker.limits.keep_alive_requests if keep_alive else 0
        request_timeout = worker.timeouts.request
        new_context = worker.base_context.copy
        admission = worker.admission
        data = transport.recv_nowait()
        while True:
            # -- wait for a whole head
            while not data or not engine.receive_head(data):
                if data is None:
                    if worker.draining and connection.idle:
                        return
                    await watch.wait_readable(task)
                elif not data:
                    return
                elif connection.phase != "request_head" and engine.in_head:
                    connection.start_phase("request_head", clock() + worker.timeouts.request_head)
                data = transport.recv_nowait() if watch.readable or worker.draining else None

            # -- run the app on it
            connection.requests = number = connection.requests + 1
            connection.phase = "request"
            connection.deadline = NEVER
            connection.exchange = exchange = Http1Exchange(
                connection, engine, clock(), engine.keep_alive and number < most_requests
            )
            if request_timeout is not NEVER or watch.hangup:
                connection.begin_handler(exchange.started_at + request_timeout)
            if admission is not None:
                await admission.acquire()
                exchange.admitted = True
            error: BaseException | None = None
            try:
                await app(exchange.scope(), exchange.receive, exchange.send)
            except BaseException as raised:
                error = raised

            # -- see that it is over
            if error is not None or exchange.state is not _COMPLETE or task.child_nurseries or exchange.queue:
                keep = await self._settle(exchange, error)
                # Its traceback holds this frame: together they would wait for the collector, with all that the app
                # has open in its frames.
                error = exchange.gone = None
                if not keep:
                    return
            if worker.access_log is not None:
                self.log("complete" if not watch.reset else "peer gone")
            connection.exchange = None
            if admission is not None:
                admission.release()
            if not exchange.keep_alive:
                # It is we who end it, or the app has not read it all: the peer may be sending still.
                self.linger = engine.keep_alive or not engine.body_complete
                return
            if (not engine.body_complete or engine.body) and not self._discard_body():
                return
            connection.phase = "keep_alive"
            # A response that left in one piece was complete when its head was written: one look at the clock less.
            connection.deadline = deadline = (exchange.completed_at or clock()) + keep_alive
            if deadline < connection.armed_at:
                worker.deadlines.arm(connection)
            # A fresh copy of the lifespan's context per request; it takes effect when this task next resumes.
            task.context = new_context()
            data = engine.leftover
            if not data:
                data = transport.recv_nowait() if watch.readable or worker.draining else None
            if data:
                # Here already: there will be no wait, so give way, and let the new context take effect.
                await trio.lowlevel.checkpoint()

    def _discard_body(self) -> bool:
        """Throw away what is left of the request body; False if it is too much or not here yet."""
        engine = self.engine
        engine.forget_body()
        discarded = 0
        while not engine.body_complete:
            data = self.connection.transport.recv_nowait(BODY_READ_SIZE)
            if not data or discarded > _DISCARD_SIZE:
                self.linger = True
                return False
            discarded += len(data)
            try:
                engine.receive_body(data)
            except RequestRefused:
                self.linger = True
                return False
            engine.forget_body()
        return True

    # -- when an exchange does not end as it should ----------------------------------------------------------

    async def _settle(self, exchange: Http1Exchange, error: BaseException | None) -> bool:
        """The app has ended, but something is left to do or wrong; True if the connection may go on."""
        connection = self.connection
        if error is None:
            error = self._unfinished_business(exchange)
        elif is_cancellation(error):
            raise error
        if connection.task.child_nurseries:
            leak = TaskLeak("the app ended with a nursery still open in the connection's task")
            leak.__cause__ = error
            error = leak
        if error is None:
            await exchange.wire_flush()
            return True
        if exchange.refusal is not None and isinstance(error, Exception) and not exchange.response_started:
            raise exchange.refusal
        fault = connection.worker.boundary.judge_app(connection, exchange, error)
        if exchange.state is _COMPLETE:
            await exchange.wire_flush()
            self.linger = self.engine.keep_alive or not self.engine.body_complete
        elif fault.status is not None and not exchange.response_started:
            self.write_last_words(fault.status)
        else:
            self.truncate(exchange)
        outcome = "app error" if fault.status is not None else "peer gone"
        self.log(outcome, fault.summary, status=None if exchange.response_started else fault.status)
        self.end_exchange()
        return False

    def truncate(self, exchange: Http1Exchange) -> None:
        """End a response that will never be whole, so that the peer sees that it is not.

        A framed body ends short of its last chunk or its length; one that ends with the connection needs an RST.
        """
        if exchange.ends_with_connection or exchange.flush_last():
            self.connection.transport.abort()
        else:
            self.linger = True

    def _unfinished_business(self, exchange: Http1Exchange) -> BaseException | None:
        if exchange.state is _COMPLETE:
            return None
        if exchange.told_gone or self.connection.transport.broken is not None:
            return exchange.gone or IncompleteResponse("the app stopped because the client had gone")
        if exchange.state is _NONE:
            return IncompleteResponse("the app returned without sending a response")
        return IncompleteResponse(f"the app returned while its response was {exchange.state.name.lower()}")

    def end_exchange(self) -> None:
        """Take the exchange off the books."""
        exchange = self.exchange
        if exchange is not None:
            admission = self.connection.worker.admission
            if exchange.admitted and admission is not None:
                admission.release()
            self.connection.exchange = None
            # A task of the app that has outlived its request may still wait in receive().
            exchange.told_gone = True
            self.connection.transport.watch.release_hangup_waiter()
            self.connection.transport.watch.wake_reader()

    def break_off(self) -> None:
        """End the connection in the middle of a response; one that is whole and with the kernel is left alone."""
        exchange = self.exchange
        if exchange is None or not exchange.response_complete or exchange.queue:
            self.connection.transport.abort()

    def write_last_words(self, status: int, extra: bytes = b"") -> None:
        """Answer in the app's stead, if the response has not begun and the peer can still hear; then close."""
        exchange = self.exchange
        if exchange is not None and exchange.response_started:
            self.break_off()
            return
        self.linger = True
        data = minimal_response(
            status,
            self.connection.worker.response_defaults.block(self.connection.worker.clock()),
            extra=extra,
            head_only=self.engine.method == "HEAD" and exchange is not None,
        )
        try:
            # A fresh response fits into an empty send buffer; a peer that has left it full will not read this either.
            self.connection.transport.send_nowait(data)
        except OSError:
            self.linger = False

    # -- the access log --------------------------------------------------------------------------------------

    def log(self, outcome: str, error: str | None = None, *, status: int | None = None) -> None:
        """Write the access-log line of the exchange under way, or of a refusal that never became one.

        `status` is ours where we answer in the app's stead; otherwise it is the app's.
        """
        connection = self.connection
        access_log = connection.worker.access_log
        if access_log is None:
            return
        exchange = self.exchange
        if status is None and exchange is not None:
            status = exchange.status
        engine = self.engine
        now = connection.worker.clock()
        started = now if exchange is None else exchange.started_at
        head_at = None if exchange is None else exchange.head_at
        access_log.log(
            AccessEntry(
                time.time() - (now - started),
                connection.client,
                connection.server,
                connection.scheme,
                engine.method,
                engine.target,
                engine.version,
                engine.headers,
                status,
                () if exchange is None else exchange.fields,
                engine.body_bytes,
                0 if exchange is None else exchange.response_bytes,
                now - started,
                None if head_at is None else head_at - started,
                outcome,
                connection.id,
                connection.requests,
                error,
            )
        )


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
            self.queue += (self._head(framing, b""), _as_bytes(body))
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
