"""HTTP/1.1 and 1.0 on one connection: the keep-alive loop, and how a connection ends.

`worker/connection.py` calls `Http1.serve` in the connection's task and cancel scope. The loop waits for a head, runs
the app on it in this very task, makes sure that the response is whole, and goes round; an engine parses, this file
does all the waiting. Cancelling it closes the connection: what of a response is on the wire stays truncated.
"""

from __future__ import annotations

from typing import Any

import trio

from trioserve.asgi.exchange import ResponseState
from trioserve.errors import IncompleteResponse, RequestRefused
from trioserve.http.engine import NO_FIELDS, Engine
from trioserve.http.http1_exchange import Http1Exchange
from trioserve.http.http1_reader import RequestReader
from trioserve.http.http1_websocket import serve_upgrade
from trioserve.http.http_exchange import LATE_STATUS, log_exchange
from trioserve.http.quick import find_quick
from trioserve.http.response import minimal_response
from trioserve.net.transport import BODY_READ_SIZE, READ_SIZE
from trioserve.observe.in_flight import NO_REQUEST, PATH_SIZE
from trioserve.structure.boundary import ROWS, Fault, is_cancellation
from trioserve.structure.context import ConnectionContext
from trioserve.structure.deadlines import NEVER
from trioserve.structure.leaks import leak

_NONE, _COMPLETE = ResponseState.NONE, ResponseState.COMPLETE

# How much of an unread request body is read and thrown away to keep the connection; beyond it, closing is cheaper.
_DISCARD_SIZE = 256 * 1024

_RETRY_AFTER = b"retry-after: 1\r\n"

# Fields that a refusal has besides those of any. 426: RFC 9110 section 15.5.22, RFC 6455 section 4.4.
_REFUSAL_FIELDS = {
    426: b"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n",
    503: _RETRY_AFTER,
}


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

    async def serve(self, data: bytes | None = None) -> None:
        """Serve requests until the connection may not be kept. Returning means: close it.

        Args:
            data: what was read already; None for nothing.

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
        admission = worker.admission
        quick = find_quick(app, worker.root_path)
        reader = RequestReader(connection, engine, quick)
        answer = None
        pull = reader.pull
        outbox = transport.outbox
        turn = 0  # of the outbox, when the last request was over
        clock = worker.clock
        keep_alive = worker.timeouts.keep_alive
        most_requests = worker.limits.keep_alive_requests if keep_alive else 0
        request_timeout = worker.timeouts.request
        timed = request_timeout is not NEVER
        new_context = worker.base_context.copy
        path_cell: Any = None
        whole_cell: Any = None
        slot = connection.slot = None if worker.in_flight_table is None else worker.in_flight_table.take()
        if slot is not None:
            path_cell, whole_cell = slot.path, slot.whole
        if data is None:
            data = transport.recv_nowait()
        while True:
            # -- wait for a whole head
            while not data or not engine.receive_head(data):
                if data is None:
                    if worker.draining and connection.idle and not connection.may_get_last_request():
                        await self._finish_posted()
                        return
                    await watch.wait_readable(task, pull)
                    if reader.has_head:
                        break
                    if connection.exchange is not None:
                        await self._finish_posted()
                    data = reader.take()
                    if data is not None:
                        continue
                    if transport.broken is not None:
                        return  # what was posted could not be sent: nothing may follow
                elif not data:
                    await self._finish_posted()  # the peer may have ended its side only, and read on
                    return
                elif connection.phase != "request_head" and engine.in_head:
                    connection.start_phase("request_head", clock() + worker.timeouts.request_head)
                elif watch.readable and len(data) < READ_SIZE:
                    # TLS in records of a byte or so: each a read, and thousands may be here already.
                    await trio.lowlevel.checkpoint()
                data = transport.recv_nowait() if watch.readable or worker.draining else None
                if data and outbox.is_open and outbox.turn == turn:
                    await self._finish_posted()

            # -- run the app on it
            if quick is None:
                if reader.has_head:
                    reader.has_head = False
                else:
                    connection.requests += 1
            elif reader.answer_now():
                data = engine.leftover
                if not data:
                    data = transport.recv_nowait() if watch.readable or worker.draining else None
                if data:
                    await trio.lowlevel.checkpoint()
                continue
            else:
                answer, reader.answer = reader.answer, None
            exchange: Http1Exchange | None = connection.exchange  # type: ignore[assignment]  # ours, or the reader's
            if not reader.was_run:
                connection.phase = "request"
                connection.deadline = NEVER
                if exchange is None:
                    connection.exchange = exchange = Http1Exchange(
                        connection, engine, clock(), engine.keep_alive and connection.requests < most_requests
                    )
                if timed or watch.hangup:
                    connection.begin_handler(exchange.started_at + request_timeout)
            else:
                reader.raise_error()
            assert exchange is not None
            if admission is not None:
                await admission.acquire()
                exchange.admitted = True
                if answer is not None:
                    # Nobody has held the file for it; if there was a wait, the cache may have closed it meanwhile.
                    answer = reader.ask()
            error: BaseException | None = None
            scope: Any = None
            try:
                if reader.was_run:
                    error = await reader.end_of_run()
                else:
                    if answer is not None:
                        raw_path = engine.target.partition(b"?")[0]
                    else:
                        scope, reader.scope = reader.scope, None
                        if scope is None:
                            scope = exchange.scope()
                        raw_path = scope["raw_path"]
                    if slot is not None:
                        # For the supervisor, should this be the end of the process.
                        if engine.method is not slot.method:
                            slot.write_method(engine.method)
                        try:
                            path_cell.value = raw_path
                        except ValueError:
                            path_cell.value = raw_path[:PATH_SIZE]
                    if answer is None:
                        if engine.upgrade is None:
                            await app(scope, exchange.receive, exchange.send)
                        elif not await serve_upgrade(self, exchange, scope):
                            return
                    elif exchange.state is not _NONE or not exchange.answer_at_once(answer):
                        await exchange.finish_answer(answer)
            except BaseException as raised:
                error = raised

            # -- see that it is over
            if error is not None or exchange.state is not _COMPLETE or task.child_nurseries or exchange.queue:
                keep = await self._settle(exchange, error)
                # Its traceback holds this frame: together they would wait for the collector, with all that the app
                # has open in its frames.
                error = exchange.gone = exchange.file_error = None
                if not keep:
                    return
            if worker.access_log is not None:
                self.log("complete" if not watch.reset else "peer gone")
            connection.exchange = None
            if slot is not None and not exchange.is_posted:
                whole_cell.value = NO_REQUEST
            # An idle connection holds nothing of the app's, nor of a request with many fields.
            scope = answer = None
            engine.headers, engine.fields = NO_FIELDS, None
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
                # The app may have gone on for long after its response.
                connection.deadline = clock() + keep_alive
                worker.deadlines.arm(connection)
            exchange = None
            # A fresh copy of the lifespan's context per request; it takes effect when this task next resumes.
            task.context = new_context()
            turn = outbox.turn
            data = engine.leftover
            if not data:
                data = transport.recv_nowait() if watch.readable or worker.draining else None
            if data:
                if outbox.is_open:
                    await self._finish_posted()
                # Here already: there will be no wait, so give way, and let the new context take effect.
                await trio.lowlevel.checkpoint()

    async def _finish_posted(self) -> None:
        """Before anything else is written: send what the outbox has for this connection, or the kernel did not take.

        Raises:
            OSError: the connection is broken.
        """
        connection = self.connection
        connection.transport.outbox.flush()
        exchange = self.exchange
        if exchange is not None:
            await exchange.wire_flush()
            connection.exchange = None
            worker = connection.worker
            connection.start_phase("keep_alive", worker.clock() + worker.timeouts.keep_alive)

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
        connection.transport.outbox.flush()  # what the kernel does not take is in the exchange's queue then
        if error is None:
            error = self._unfinished_business(exchange)
        elif is_cancellation(error):
            raise error
        if connection.task.child_nurseries:
            error = leak("the connection's", error)
        if error is None:
            await exchange.wire_flush()
            return True
        if exchange.refusal is not None and isinstance(error, Exception) and not exchange.response_started:
            raise exchange.refusal
        fault = connection.worker.boundary.judge_app(connection, exchange, error)
        if exchange.state is _COMPLETE and not exchange.is_sending:
            await exchange.wire_flush()
            self.linger = self.engine.keep_alive or not self.engine.body_complete
        elif fault.status is not None and not exchange.response_started:
            if connection.worker.development and fault.status == 500:
                await self._write_traceback(exchange, fault)
            else:
                self.write_last_words(fault.status)
        else:
            self.truncate(exchange)
        self.log(fault.outcome, fault.summary, status=None if exchange.response_started else fault.status)
        self.end()
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
        if exchange.state is _COMPLETE and exchange.queue and exchange.is_sending:
            return IncompleteResponse("the app returned while a task that it has left running was in send()")
        return exchange.find_unfinished()

    def end_refused(self, refusal: RequestRefused) -> None:
        """Answer a request that cannot be served."""
        self.log("refused", refusal.reason, status=refusal.status)
        self.write_last_words(refusal.status, _REFUSAL_FIELDS.get(refusal.status, b""))
        self.end()

    def end_late(self, phase: str) -> None:
        """The reaper has cancelled the connection: answer where the phase has an answer, otherwise just end it."""
        exchange = self.exchange
        if exchange is None:
            # Between requests only a head can be late; a handler's time-out that came too late for it is no news.
            if phase == "request_head":
                self.log(f"late: {phase}", status=408)
                self.write_last_words(408)
            return
        if phase == "disconnect_grace":
            self.connection.worker.counters.peer_gone += 1
            self.log("peer gone")
            if exchange.response_started:
                self.truncate(exchange)  # it may only have shut down its side, and read on
            return
        status = LATE_STATUS.get(phase)
        if status is not None and not exchange.response_started:
            self.log(f"late: {phase}", status=status)
            self.write_last_words(status, _RETRY_AFTER if status == 503 else b"")
        else:
            self.log(f"late: {phase}")
            self.break_off()

    def end_cut(self) -> None:
        """A drain, or the server's caller, has cancelled the connection: say so if the response has not begun."""
        exchange = self.exchange
        if exchange is None:
            return
        if exchange.response_started:
            self.log("drained")
            self.break_off()
        else:
            self.log("drained", status=503)
            self.write_last_words(503, _RETRY_AFTER)

    def end_broken(self, error: BaseException) -> None:
        """Something of ours, or the app's scopes, broke: one answer if possible, and the boundary's verdict."""
        fault = self.connection.worker.boundary.judge_own(self.connection, error)
        if self.exchange is not None and fault.status is not None:
            self.write_last_words(fault.status)
        else:
            self.connection.transport.abort()
        self.log("server error", fault.summary, status=fault.status)

    def end(self) -> None:
        """Take the exchange off the books."""
        self.connection.transport.outbox.flush()  # closing would: an exchange that is back then would stay
        exchange = self.exchange
        if exchange is not None:
            worker = self.connection.worker
            if self.connection.slot is not None:
                self.connection.slot.clear()
            if exchange.admitted and worker.admission is not None:
                worker.admission.release()
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

    async def _write_traceback(self, exchange: Http1Exchange, fault: Fault) -> None:
        """Last words for the app's author, which may be more than the kernel takes at once."""
        from trioserve.http.traceback_page import FIELDS, traceback_page

        facts = exchange.describe()
        worker = self.connection.worker
        self.linger = True
        exchange.queue.append(
            minimal_response(
                500,
                worker.response_defaults.block(worker.clock()),
                extra=FIELDS,
                head_only=self.engine.method == "HEAD",
                page=traceback_page(
                    fault.error,
                    ROWS[fault.row].meaning,
                    f"{facts['method']} {facts['path']}",
                    self.engine.headers,
                ),
            )
        )
        try:
            await exchange.wire_flush()
        except OSError:
            self.linger = False

    # -- the access log --------------------------------------------------------------------------------------

    def log(self, outcome: str, error: str | None = None, *, status: int | None = None) -> None:
        """Write the access-log line of the exchange under way, or of a refusal that never became one.

        `status` is ours where we answer in the app's stead; otherwise it is the app's.
        """
        exchange = self.exchange
        if self.connection.worker.access_log is not None and (exchange is None or not exchange.is_logged):
            request = self.engine.request_facts()
            log_exchange(self.connection, request, exchange, outcome, error, status=status)
