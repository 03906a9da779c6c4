"""The tasks in which HTTP/2's requests are served, and how each request ends.

`Http2` starts a lane for a request when no other is free; a lane is a task with a cancel scope of its own, which runs
the app, sees to it that the response is whole or visibly is not, and then waits to be given the next request: being
woken costs a fifth of being started. It is the same for HTTP/2 as the connection's task for HTTP/1: the scope is the
unit of cancellation, so a lane that was cancelled ends, and the request that it was serving with it. Nothing that
happens in here reaches the other streams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import trio
from trio.lowlevel import Abort

from trioserve.asgi.exchange import ResponseState
from trioserve.errors import ClientDisconnected, RequestRefused
from trioserve.http.http2_codes import ErrorCode
from trioserve.http.http2_exchange import Http2Exchange
from trioserve.http.http2_fields import minimal_response
from trioserve.http.http_exchange import LATE_STATUS, log_exchange
from trioserve.net.watch import wait_again, wait_request
from trioserve.observe.in_flight import NO_REQUEST, PATH_SIZE
from trioserve.structure.boundary import ROWS, Fault, is_cancellation, is_scope_corruption
from trioserve.structure.context import StreamContext
from trioserve.structure.leaks import leak, outlive_leak

if TYPE_CHECKING:
    from trioserve.http.http2 import Http2
    from trioserve.observe.in_flight import Slot
    from trioserve.structure.admission import Admission

_COMPLETE = ResponseState.COMPLETE

RETRY_AFTER = (b"retry-after", b"1")


class Lane:
    """A task that serves one request after another.

    Attributes:
        task, scope: itself, and what it is cancelled by.
        slot: its place in the table of requests in flight, if there is one with room.
        next: what it is to serve when it is woken, None to end.
    """

    __slots__ = ("_spare", "next", "scope", "slot", "task")

    def __init__(self, http2: Http2) -> None:
        table = http2.connection.worker.in_flight_table
        self.task = trio.lowlevel.current_task()
        self.scope = trio.CancelScope()
        self.slot = None if table is None else table.take()
        self.next: Http2Exchange | None = None
        self._spare = http2.spare

    def abort(self, _raise_cancel: Callable[[], Any]) -> Abort:
        """Cancelled while it was waiting."""
        self._spare.remove(self)
        return Abort.SUCCEEDED

    def note_request(self, slot: Slot, method: str, raw_path: bytes) -> None:
        """For the supervisor, should this be the end of the process."""
        if method is not slot.method:
            slot.write_method(method)
        slot.path.value = raw_path[:PATH_SIZE]


async def serve_lane(http2: Http2, exchange: Http2Exchange | None) -> None:
    """Serve the request of `exchange`, and then what else there is."""
    worker = http2.connection.worker
    lane = Lane(http2)
    task, slot, wait = lane.task, lane.slot, wait_request(lane.abort)
    try:
        with lane.scope:
            while exchange is not None:
                # The connection may have been lost since the lane was chosen.
                if not exchange.stream.closed and not await _serve(http2, lane, exchange):
                    break
                exchange = None  # an idle lane holds nothing of the app's
                if not http2.keeps_lanes:
                    break
                lane.next = None
                http2.spare.append(lane)
                await wait_again(wait)
                exchange = lane.next
    except BaseException as error:
        if is_cancellation(error):
            raise
        if not (task.child_nurseries and is_scope_corruption(error)):  # else judged when it was found
            worker.boundary.judge_own(http2.connection if exchange is None else exchange.stream, error)
    finally:
        if exchange is not None:
            http2.end_stream(exchange)
        if slot is not None and worker.in_flight_table is not None:
            worker.in_flight_table.release(slot)
    if task.child_nurseries:
        http2.leaked = True
        await outlive_leak(task)


async def _serve(http2: Http2, lane: Lane, exchange: Http2Exchange) -> bool:
    """Serve one request; False if the lane cannot serve another."""
    stream, slot = exchange.stream, lane.slot
    worker = stream.worker
    stream.task, stream.scope, stream.slot = lane.task, lane.scope, slot
    error: BaseException | None = None
    try:
        if http2.is_plain and not stream.reset and exchange.head.protocol is None:
            stream.phase = "request"
            scope = exchange.scope()
            if slot is not None:
                lane.note_request(slot, exchange.head.method, scope["raw_path"])
            await worker.app(scope, exchange.receive, exchange.send)
        else:
            await _call_app(lane, exchange)
    except BaseException as raised:
        error = raised
    if error is not None or exchange.state is not _COMPLETE or exchange.unsent or lane.task.child_nurseries:
        keep = await _settle(http2, stream, exchange, error)
        # Its traceback holds this frame, and so all that the app has open in its frames.
        error = exchange.gone = exchange.file_error = None
        if not keep:
            return False
    elif worker.access_log is not None:
        log_request(stream, exchange, "complete" if exchange.transport.broken is None else "peer gone")
    if slot is not None:
        slot.whole.value = NO_REQUEST
    http2.end_stream(exchange)
    return not stream.late  # else it was cancelled, though nobody has noticed


async def _call_app(lane: Lane, exchange: Http2Exchange) -> None:
    """Run the app on a request for which there is more to do than that."""
    stream, head = exchange.stream, exchange.head
    worker = stream.worker
    if worker.admission is not None:
        await _admit(worker.admission, exchange)
    stream.begin_handler(exchange.started_at + worker.timeouts.request)
    if lane.slot is not None:
        lane.note_request(lane.slot, head.method, head.target.partition(b"?")[0])
    if head.protocol is None:
        await worker.app(exchange.scope(), exchange.receive, exchange.send)
    else:
        from trioserve.http.http2_byte_stream import serve_connect

        await serve_connect(exchange)


async def _admit(admission: Admission, exchange: Http2Exchange) -> None:
    try:
        await admission.acquire()
    except RequestRefused as refusal:
        exchange.refusal = refusal  # ours, not one that an app has imported and raised
        raise
    exchange.admitted = True


# -- when a request does not end as it should ----------------------------------------------------------------


async def _settle(
    http2: Http2, stream: StreamContext, exchange: Http2Exchange, error: BaseException | None
) -> bool:
    """The app has ended, but something is left to do or wrong; True if the lane may go on.

    A WebSocket session that was open has settled itself.

    Raises:
        trio.Cancelled: the connection's, or the server's.
    """
    if exchange.was_session and error is None and not stream.task.child_nurseries:
        return True
    if error is None and exchange.state is _COMPLETE and not stream.task.child_nurseries:
        error = await _flush_rest(exchange)
    if error is not None and is_cancellation(error):
        _end_cancelled(http2, stream, exchange)
        if not stream.late:
            raise error
        return False
    if stream.late and not exchange.response_complete:
        _end_cancelled(http2, stream, exchange)  # an app that has caught it, or made something else of it
        return False
    if error is None:
        error = exchange.find_unfinished()
    if stream.task.child_nurseries:
        error = leak("the stream's", error)
    if error is None:
        log_request(stream, exchange, "complete")
        return True
    if exchange.refusal is not None and isinstance(error, Exception) and not exchange.response_started:
        refuse(http2, stream, exchange, exchange.refusal)
        return True
    await _end_faulty(http2, stream, exchange, error)
    return not stream.task.child_nurseries


async def _flush_rest(exchange: Http2Exchange) -> BaseException | None:
    """An app has given up waiting for its last part; it is sent all the same. Returns what came of it.

    Not raised: an exception that is kept by a frame of its own traceback would wait for the collector.
    """
    try:
        await exchange.wire_flush()
    except OSError as broken:
        return exchange.note_gone(broken)  # the peer's doing, as if the app had waited itself
    except BaseException as raised:
        return raised
    return None


async def _end_faulty(
    http2: Http2, stream: StreamContext, exchange: Http2Exchange, error: BaseException
) -> None:
    """Judge what left the app, or what it left undone; answer in its stead, or show that the response is cut."""
    fault = stream.worker.boundary.judge_app(stream, exchange, error)
    if exchange.state is _COMPLETE:
        try:
            await exchange.wire_flush()
        except OSError:
            pass  # the peer has gone meanwhile
        except trio.Cancelled:
            http2.engine.reset(stream.stream_id, ErrorCode.INTERNAL_ERROR)
            log_request(stream, exchange, "app error", fault.summary)
            raise
    elif fault.status is not None and not exchange.response_started:
        if stream.worker.development and fault.status == 500:
            await _write_traceback(http2, stream, exchange, fault)
        else:
            http2.answer(stream.stream_id, exchange.head.method, fault.status)
    else:
        http2.engine.reset(stream.stream_id, ErrorCode.INTERNAL_ERROR)
        http2.output.request()
    status = None if exchange.response_started else fault.status
    log_request(stream, exchange, fault.outcome, fault.summary, status=status)


def _end_cancelled(http2: Http2, stream: StreamContext, exchange: Http2Exchange) -> None:
    """The app was cancelled: by its own phase, with its connection, or by a drain. Answer if it has not begun."""
    phase = stream.late or http2.connection.late
    status: int | None = None
    if phase == "disconnect_grace":
        stream.worker.counters.peer_gone += 1
        outcome = "peer gone"
    elif phase:
        status = LATE_STATUS.get(phase)
        outcome = f"late: {phase}"
    elif http2.gone is not None:
        outcome = "peer gone"
    else:
        status = 503
        outcome = "drained"
    if status is not None and not exchange.response_started:
        log_request(stream, exchange, outcome, status=status)
        http2.answer(stream.stream_id, exchange.head.method, status, (RETRY_AFTER,) if status == 503 else ())
        return
    log_request(stream, exchange, outcome)
    http2.engine.reset(stream.stream_id, ErrorCode.CANCEL)
    http2.output.request()


def refuse(http2: Http2, stream: StreamContext, exchange: Http2Exchange, refusal: RequestRefused) -> None:
    """The peer's fault, on one stream: answered and counted."""
    worker = stream.worker
    worker.counters.refused[str(refusal.status)] += 1
    worker.error_log.debug("%r refused: %s", stream, refusal)
    log_request(stream, exchange, "refused", refusal.reason, status=refusal.status)
    extra = (RETRY_AFTER,) if refusal.status == 503 else ()
    http2.answer(stream.stream_id, exchange.head.method, refusal.status, extra)


async def _write_traceback(
    http2: Http2, stream: StreamContext, exchange: Http2Exchange, fault: Fault
) -> None:
    """Last words for the app's author, which may be more than the window takes at once."""
    from trioserve.http.traceback_page import FIELDS, traceback_page

    facts = exchange.describe()
    worker = stream.worker
    page = traceback_page(
        fault.error, ROWS[fault.row].meaning, f"{facts['method']} {facts['path']}", exchange.head.headers
    )
    extra = [(name, value) for name, _, value in (line.partition(b": ") for line in FIELDS.splitlines())]
    fields, body = minimal_response(500, worker.response_defaults.fields(worker.clock()), extra, page)
    no_body = exchange.head.method == "HEAD"
    http2.engine.send_head(stream.stream_id, 500, fields, no_body)
    http2.output.request()
    try:
        if not no_body and exchange.put(body, True):
            await exchange.wire_flush()
    except (OSError, ClientDisconnected):
        pass


# -- the access log ------------------------------------------------------------------------------------------


def log_request(
    stream: StreamContext,
    exchange: Http2Exchange,
    outcome: str,
    error: str | None = None,
    *,
    status: Any = None,
) -> None:
    """Write the access-log line of a request; `status` is ours where we answer in the app's stead."""
    if stream.worker.access_log is not None:
        log_exchange(stream, exchange.request_facts(), exchange, outcome, error, status=status)
