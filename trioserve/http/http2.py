"""HTTP/2 on one connection: the reader, the streams, and how the connection ends.

`worker/connection.py` calls `Http2.serve` in the connection's task. That task reads and gives the bytes to an engine
(`http2_engine.py`), which calls back with requests, body parts and resets (`Http2Sink`); each request is served by a
task of its own in this connection's nursery (`http2_stream.py`), and all of them write through one `Output`. A stream's
end is its own affair. The connection ends when the peer leaves or breaks the protocol, when it has been idle for too
long or had its share of requests, or in a drain: then by two GOAWAYs, so that no request is lost between them (RFC 9113
section 6.8). Cancelling it cancels the streams: who has no response yet gets a 503, the others a RST_STREAM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import trio
from trio.lowlevel import Abort, Task, reschedule, wait_task_rescheduled

from trioserve.errors import RequestRefused
from trioserve.http.http2_codes import LARGEST_STREAM_ID, ErrorCode, code_name
from trioserve.http.http2_engine import Fields, Http2Engine, Http2Fault, Http2Sink, RequestHead
from trioserve.http.http2_exchange import Http2Exchange
from trioserve.http.http2_fields import minimal_response
from trioserve.http.http2_output import Output
from trioserve.http.http2_pipe import connection_gone, reset_by_peer
from trioserve.http.http2_stream import Lane, log_request, refuse, serve_lane
from trioserve.http.quick import find_quick
from trioserve.net.transport import BODY_READ_SIZE, READ_SIZE
from trioserve.net.watch import WOKEN
from trioserve.static.request_fields import pick_fields
from trioserve.structure.boundary import is_scope_corruption
from trioserve.structure.context import LAST_REQUEST_PATIENCE, ConnectionContext, StreamContext
from trioserve.structure.deadlines import NEVER

# Lanes that stay when a connection has been idle for a moment: a browser's next page finds some.
_IDLE_LANES = 4
_IDLE_MOMENT = 1.0

# How many requests of one connection may be under way, in streams that may be open at once: an app may still be busy
# with those that the peer has reset, or that were answered already, and the engine does not count these.
_UNDER_WAY = 10

# What our PING says, to be known again.
_GOODBYE = b"goodbye\0"


class Http2:
    """One connection's HTTP/2 state.

    Attributes:
        connection, engine, output: what it serves, with which engine, and who writes.
        linger: the peer may still be sending, so closing must not destroy our last words.
        streams: those that are served, by number. exchanges: the same for their exchanges.
        gone: why the peer cannot be reached any more, or None.
        spare: lanes that wait for a request. is_plain: there is nothing to do for a request but to run the app.
        leaked: a lane cannot end, since the app has left a nursery open in it.
        deadline, armed_at: when idle lanes are to be ended (the reaper's).
    """

    __slots__ = (
        "_begun", "_closing", "_ending", "_most", "_now", "_nursery", "_parked", "_peer_leaving", "_pong",
        "_pump_wanted", "_quick", "_spawn", "_worker", "armed_at", "connection", "deadline", "engine",
        "exchanges", "gone", "is_plain", "leaked", "linger", "output", "spare", "streams",
    )  # fmt: skip

    def __init__(self, connection: ConnectionContext, new_engine: Callable[[Http2Sink], Http2Engine]) -> None:
        self.connection = connection
        self._worker = connection.worker
        self.engine = new_engine(self)
        self.output = Output(connection, self.engine, self._on_output_change)
        self.linger = False
        self.streams: dict[int, StreamContext] = {}
        self.exchanges: dict[int, Http2Exchange] = {}
        self.gone: OSError | None = None
        self.leaked = False
        worker = self._worker
        self._quick = find_quick(worker.app, worker.root_path) if worker.admission is None else None
        self.is_plain = worker.admission is None and worker.timeouts.request is NEVER
        self._most = _UNDER_WAY * worker.config.h2_max_concurrent_streams
        self.deadline = self.armed_at = NEVER
        self._now = 0.0
        self._nursery: trio.Nursery
        self._spawn: Callable[..., None]
        self.spare: list[Lane] = []
        self._begun: list[Http2Exchange] = []
        self._pump_wanted = False
        self._parked: Task | None = None
        self._ending = False  # the first GOAWAY of a graceful end is out
        self._closing = False  # the last one is
        self._peer_leaving = False
        self._pong = trio.Event()

    def __repr__(self) -> str:
        return f"<Http2 of {self.connection!r} streams={len(self.streams)} {self.output!r}>"

    # -- the reader ------------------------------------------------------------------------------------------

    async def serve(self, data: bytes | None = None) -> None:
        """See `Protocol.serve`."""
        self.connection.streams = self.streams
        # Lanes begin with the lifespan's context: start_soon copies the one it is called in.
        self._spawn = self._worker.base_context.copy().run
        self.engine.start()
        try:
            async with trio.open_nursery() as self._nursery:
                if not self._worker.hub.calls_on_writable:
                    self.output.use_tasks(self._nursery.start_soon)
                await self._read(data)
                await self._wait_streams()
                if self.leaked:
                    await self._part_from_lane()
                self._nursery.cancel_scope.cancel(reason="the connection has ended")
        except BaseExceptionGroup as group:
            # Row B1 was judged when it was found; trio repeats it when the lane's task ends.
            rest = group.split(is_scope_corruption)[1]
            if rest is not None:
                raise rest from None

    async def _read(self, data: bytes | None) -> None:
        """Read and answer until the connection is to end. Streams may still be served then."""
        connection, engine, output = self.connection, self.engine, self.output
        transport, worker = connection.transport, self._worker
        watch, task = transport.watch, connection.task
        clock = worker.clock
        size = READ_SIZE
        if data is None:
            data = transport.recv_nowait()
        while True:
            if data or engine.held:
                if data:
                    size = BODY_READ_SIZE if len(data) >= READ_SIZE else READ_SIZE
                self._now = clock()
                try:
                    engine.receive(data or b"", self._now)
                except Http2Fault as fault:
                    self._end_by_fault(fault)
                    return
                begun = self._begun
                if begun:
                    self._begun = []
                    for exchange in begun:
                        self._begin(exchange)
                if self._pump_wanted:
                    self._pump_wanted = False
                    output.pump()
                if engine.out:
                    output.request() if self.streams else output.write()
                self._note_phase()
                if self._ending and engine.last_pong == _GOODBYE:
                    self._pong.set()
            elif data is not None or output.closed:
                self._lose(transport.broken)
                return
            if not self._ending and (worker.draining or self._has_had_its_share()):
                self._say_goodbye()
            if (self._closing or self._peer_leaving) and not self.streams:
                self._finish_goodbye()
                return
            if output.is_choked:
                await output.wait_room()
            if engine.held:
                await trio.lowlevel.checkpoint()
                data = None
                continue
            if not watch.readable:
                await watch.wait_readable(task)
            elif data:
                # There may be more than one connection's share: the streams and the others have their turns.
                await trio.lowlevel.checkpoint()
            data = transport.recv_nowait(size) if watch.readable else None

    def _has_had_its_share(self) -> bool:
        return self.connection.requests >= max(self._worker.limits.keep_alive_requests, 1)

    def _note_phase(self) -> None:
        """What the connection itself is waiting for now."""
        connection = self.connection
        if self.output.blocked:
            return  # response_write, until that is over
        if self.engine.in_head:
            if connection.phase != "request_head":
                clock, timeouts = self._worker.clock, self._worker.timeouts
                connection.start_phase("request_head", clock() + timeouts.request_head)
        elif self.streams:
            connection.phase = "streams"
            connection.deadline = NEVER
        elif not connection.requests:
            if (
                connection.phase == "request_head"
            ):  # a head that was malformed: there is no request to go on from
                since = connection.accepted_at
                connection.start_phase("first_byte", since + self._worker.timeouts.first_byte)
        elif connection.phase != "keep_alive":
            now = self._worker.clock()
            connection.start_phase("keep_alive", now + self._worker.timeouts.keep_alive)
            if len(self.spare) > _IDLE_LANES:
                self.deadline = now + _IDLE_MOMENT
                self._worker.deadlines.arm(self)

    def _on_output_change(self) -> None:
        """By the output: the kernel takes bytes again, or the connection is broken."""
        if self.output.closed:
            self.connection.transport.watch.wake_reader()
        else:
            self._note_phase()
            self._unpark()

    def expire(self) -> None:
        """By the reaper: idle lanes are not worth their memory for longer than a moment."""
        if not self.streams:
            while len(self.spare) > _IDLE_LANES:
                reschedule(self.spare.pop().task, WOKEN)

    # -- what the engine has received (Http2Sink) ------------------------------------------------------------

    def request_begun(self, stream_id: int, head: RequestHead) -> None:
        connection = self.connection
        connection.requests += 1
        stream = StreamContext(connection, stream_id)
        exchange = Http2Exchange(stream, self.engine, self.output, head, self._now)
        stream.exchange = exchange
        self.streams[stream_id] = stream
        self.exchanges[stream_id] = exchange
        self._begun.append(exchange)

    def request_refused(self, stream_id: int, head: RequestHead, status: int, reason: str) -> None:
        self.request_begun(stream_id, head)
        self.exchanges[stream_id].refusal = RequestRefused(status, reason)

    def data_received(self, stream_id: int, data: bytes, flow_size: int) -> None:
        exchange = self.exchanges.get(stream_id)
        if exchange is None:
            self.engine.acknowledge(stream_id, flow_size)
        else:
            exchange.data_received(data, flow_size)

    def request_ended(self, stream_id: int, trailers: Fields) -> None:  # noqa: ARG002
        exchange = self.exchanges.get(stream_id)
        if exchange is not None:
            exchange.request_ended()

    def stream_reset(self, stream_id: int, code: int) -> None:
        exchange = self.exchanges.get(stream_id)
        if exchange is not None:
            exchange.lose(reset_by_peer(code))

    def window_opened(self, stream_id: int) -> None:  # noqa: ARG002
        if self.output.senders:
            self._pump_wanted = True

    def peer_going_away(self, last_stream_id: int, code: int) -> None:  # noqa: ARG002
        self._peer_leaving = True

    def priority_changed(self, stream_id: int, urgency: int, incremental: bool) -> None:
        exchange = self.exchanges.get(stream_id)
        if exchange is not None:
            exchange.urgency, exchange.incremental = urgency, incremental

    # -- streams ---------------------------------------------------------------------------------------------

    def _begin(self, exchange: Http2Exchange) -> None:
        """Have a request served, unless it need not, or cannot, be."""
        stream, head = exchange.stream, exchange.head
        if exchange.transport.broken is not None:
            # Reset in the same breath: it costs the peer as much as us.
            log_request(stream, exchange, "peer gone")
            self.end_stream(exchange)
            return
        limit = self._worker.limits.body_size
        if len(self.streams) > self._most:
            self.engine.reset(exchange.stream_id, ErrorCode.REFUSED_STREAM)  # safe to be tried again
            log_request(stream, exchange, "refused", "too many requests under way")
            self.end_stream(exchange)
        elif exchange.refusal is not None:
            self._refuse(exchange, exchange.refusal)
        elif head.method == "CONNECT" and head.protocol != b"websocket":
            what = "CONNECT" if head.protocol is None else f":protocol {head.protocol!r:.80}"
            self._refuse(exchange, RequestRefused(501, what))
        elif head.content_length is not None and head.content_length > limit:
            self._refuse(exchange, RequestRefused(413, f"Content-Length of {head.content_length}"))
        elif self._quick is not None and self._answer_now(exchange):
            self.end_stream(exchange)
        elif self.spare:
            lane = self.spare.pop()
            lane.next = exchange
            # A fresh copy of the lifespan's context per request; it takes effect as the task resumes.
            lane.task.context = self._worker.base_context.copy()
            reschedule(lane.task, WOKEN)
        else:
            self._spawn(self._start_lane, exchange)

    def _answer_now(self, exchange: Http2Exchange) -> bool:
        """Have the app answer without a task, if it has one ready and all of it can be sent now; False if not."""
        head = exchange.head
        if not head.ended:
            return False
        target = head.target.partition(b"?")[0]
        assert self._quick is not None
        quick_answer, root_path = self._quick
        answer = quick_answer(head.method, target, pick_fields(head.headers), root_path)
        # Nobody would be there to see to what is left.
        if answer is None or answer.file is not None or not exchange.fits(len(answer.body)):
            return False
        exchange.answer_at_once(answer)
        if self._worker.access_log is not None:
            log_request(exchange.stream, exchange, "complete")
        return True

    def _start_lane(self, exchange: Http2Exchange) -> None:
        self._nursery.start_soon(serve_lane, self, exchange, name="stream")

    def _refuse(self, exchange: Http2Exchange, refusal: RequestRefused) -> None:
        if exchange.transport.broken is None:
            refuse(self, exchange.stream, exchange, refusal)
        self.end_stream(exchange)

    @property
    def keeps_lanes(self) -> bool:
        """There may be more to serve."""
        return not self._closing and self.gone is None

    def end_stream(self, exchange: Http2Exchange) -> None:
        """Take a request off the books. Whatever the peer has not been told of its end, it is told now."""
        stream = exchange.stream
        if stream.closed:
            return
        stream.closed = True
        worker = self._worker
        stream_id = stream.stream_id
        del self.streams[stream_id]
        del self.exchanges[stream_id]
        stream.exchange = None
        # A task of the app that has outlived its request may still wait in here, or come again.
        exchange.told_gone = True
        if exchange.unsent or not exchange.response_complete:
            exchange.lose(connection_gone(self.gone))
            # Nothing, if it was answered in the app's stead. A session that has said its last asks for no more.
            self.engine.reset(stream_id, ErrorCode.NO_ERROR if exchange.said_all else ErrorCode.CANCEL)
        elif exchange.received or exchange.is_waited_for:
            exchange.drop()
        if stream.armed_at is not NEVER:
            worker.deadlines.disarm(stream)
        if exchange.admitted and worker.admission is not None:
            worker.admission.release()
        if not self.streams:
            self._note_phase()
            if self.engine.out:
                self.output.write()
            self._unpark()

    def answer(
        self, stream_id: int, method: str, status: int, extra: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        """Answer a request in the app's stead."""
        engine, worker = self.engine, self._worker
        defaults = worker.response_defaults.fields(worker.clock())
        fields, body = minimal_response(status, defaults, list(extra))
        if method != "HEAD" and engine.room(stream_id) < len(body):
            # A window that is closed from the start: the head says it all.
            fields = [field for field in fields if field[0] not in (b"content-length", b"content-type")]
            body = b""
        no_body = method == "HEAD" or not body
        engine.send_head(stream_id, status, fields, no_body)
        if not no_body:
            engine.send_data(stream_id, body, True)
        self.exchanges[stream_id].note_answered()
        self.output.request()

    # -- the end ---------------------------------------------------------------------------------------------

    def _say_goodbye(self) -> None:
        """Begin a graceful end: no request that is on its way is lost."""
        self._ending = True
        # The PING comes first: clients made of the library h2 want nothing but GOAWAY behind a GOAWAY.
        self.engine.ping(_GOODBYE)
        self.engine.go_away(last_stream_id=LARGEST_STREAM_ID)
        self.output.request()
        self._nursery.start_soon(self._complete_goodbye, name="goodbye")

    async def _complete_goodbye(self) -> None:
        """A round trip later the peer knows, and what it had sent before has arrived: now it can be held to it."""
        with trio.move_on_after(LAST_REQUEST_PATIENCE):
            await self._pong.wait()
        if self.gone is None:
            self._closing = True
            self.engine.go_away()
            self.output.write()
            self.connection.transport.watch.wake_reader()

    def _finish_goodbye(self) -> None:
        if not self._closing:
            self.engine.go_away()
        self.output.write()
        self._closing = True
        self.linger = True

    def _end_by_fault(self, fault: Http2Fault) -> None:
        """The peer broke the protocol: it alone loses its connection."""
        worker = self._worker
        worker.counters.refused[f"h2 {code_name(fault.code)}"] += 1
        worker.error_log.debug("connection %d refused: HTTP/2 %s", self.connection.id, fault)
        self.output.write()
        self.linger = not self.output.closed
        self._lose(None)
        self.connection.transport.shutdown_write()

    def _lose(self, broken: OSError | None) -> None:
        """The peer is gone, or as good as: its streams are told so."""
        self.gone = error = connection_gone(broken)
        self._begun.clear()
        for exchange in list(self.exchanges.values()):
            exchange.lose(error)
            if not hasattr(exchange.stream, "task"):
                self.end_stream(exchange)  # no lane has begun with it

    async def _wait_streams(self) -> None:
        """Return once no stream is served any more, and what they said is written."""
        while self.streams or not (self.output.is_empty or self.gone is not None):
            if self.streams:
                self._parked = trio.lowlevel.current_task()
                await wait_task_rescheduled(self._abort_park)
            else:
                self.output.write()
                await self.output.wait_room()
        while self.spare:
            reschedule(self.spare.pop().task, WOKEN)

    def _abort_park(self, _raise_cancel: Callable[[], Any]) -> Abort:
        self._parked = None
        return Abort.SUCCEEDED

    def _unpark(self) -> None:
        """Have the connection's task look again, wherever it waits."""
        task = self._parked
        if task is not None:
            self._parked = None
            reschedule(task, WOKEN)
        elif self._closing or self._peer_leaving:
            self.connection.transport.watch.wake_reader()

    async def _part_from_lane(self) -> None:
        """Close without waiting for the lane that cannot end: a drain has begun, and is waiting for the connection."""
        connection = self.connection
        self.end()
        self._worker.forget(connection)
        connection.requests = 0
        connection.transport.close()
        await trio.sleep_forever()

    # -- what connection.py asks (Protocol) ------------------------------------------------------------------

    def end_refused(self, refusal: RequestRefused) -> None:
        """See `Protocol`; refusals are the streams' here."""

    def end_late(self, phase: str) -> None:
        """See `Protocol`."""
        if phase == "response_write":
            self.connection.transport.abort()
        elif phase != "first_byte" or self.connection.transport.bytes_read:
            self._say_last(ErrorCode.NO_ERROR)

    def end_cut(self) -> None:
        """See `Protocol`; the streams have said theirs."""
        self._say_last(ErrorCode.NO_ERROR)

    def end_broken(self, error: BaseException) -> None:
        """See `Protocol`."""
        self._worker.boundary.judge_own(self.connection, error)
        self._say_last(ErrorCode.INTERNAL_ERROR)

    def _say_last(self, code: ErrorCode) -> None:
        if self.gone is None:
            self.engine.go_away(code)
            self.output.write()
            self.linger = not self.output.closed

    def break_off(self) -> None:
        """See `Protocol`."""
        self.connection.transport.abort()

    def end(self) -> None:
        """See `Protocol`."""
        for exchange in list(self.exchanges.values()):
            self.end_stream(exchange)
        self.output.close()
        self._worker.deadlines.disarm(self)

    def log(self, outcome: str, error: str | None = None, *, status: int | None = None) -> None:
        """See `Protocol`; each stream has its own line."""
