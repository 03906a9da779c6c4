"""One connection from accept to close: choose the protocol, serve it, linger, close.

Started by the listener as a task in the connections' nursery. Its cancel scope is the unit of cancellation: the
reaper cancels it when a phase is late, a drain when its grace is over. Whatever happens in here ends here: the
boundary judges it, and no exception but `Cancelled` leaves.
"""

from __future__ import annotations

import trio

from trioserve.errors import RequestRefused
from trioserve.http.http1 import Http1
from trioserve.structure.boundary import is_cancellation
from trioserve.structure.context import ConnectionContext
from trioserve.structure.deadlines import NEVER

# Phases of a request whose lateness is answered, and with what, if the response has not begun.
_LATE_STATUS = {"request_body": 408, "request": 503}

# While lingering: how much the peer may still send, and how much is read at once. What comes is thrown away.
_LINGER_BYTES = 1024 * 1024
_LINGER_READ = 64 * 1024

_RETRY_AFTER = b"retry-after: 1\r\n"


async def serve_connection(connection: ConnectionContext) -> None:
    """Serve one accepted connection until it is closed."""
    worker = connection.worker
    connection.task = trio.lowlevel.current_task()
    try:
        http1 = Http1(connection, worker.new_engine())
    except Exception as error:
        worker.boundary.judge_own(connection, error)
        worker.forget(connection)
        connection.transport.abort()
        return
    try:
        with trio.CancelScope() as connection.scope:
            await _serve(http1)
        if connection.scope.cancelled_caught:
            _end_late(http1)
            http1.end_exchange()
        if http1.linger:
            await _linger(connection)
    except BaseException as error:
        cancelled = is_cancellation(error)
        try:
            if cancelled:
                _end_cut(http1)
            else:
                _end_broken(http1, error)
        except Exception as second:
            # Ours again, such as a log that cannot be written to: judged as well, and the connection ends all the same.
            worker.boundary.judge_own(connection, second)
            http1.break_off()
        if cancelled:
            raise
    finally:
        http1.end_exchange()
        worker.forget(connection)
        connection.transport.close()
        if connection.task.child_nurseries:
            await _stay(connection)


async def _stay(connection: ConnectionContext) -> None:
    """Outlive the grace of a drain that a leaked nursery has begun, although the connection is closed.

    trio ends a task that has left a nursery open with an error, which would cancel all other connections at once.
    """
    for nursery in connection.task.child_nurseries:
        nursery.cancel_scope.cancel(reason="the app has left this nursery open")
    await trio.sleep_forever()


async def _serve(http1: Http1) -> None:
    connection = http1.connection
    worker = connection.worker
    connection.start_phase("first_byte", connection.accepted_at + worker.timeouts.first_byte)
    try:
        await http1.serve()
    except RequestRefused as refusal:
        # The peer's fault: answered and counted; the answer is sent before the connection closes.
        refused = worker.counters.refused
        refused[str(refusal.status)] = refused.get(str(refusal.status), 0) + 1
        worker.error_log.debug("connection %d refused: %s", connection.id, refusal)
        http1.log("refused", refusal.reason, status=refusal.status)
        http1.write_last_words(refusal.status, _RETRY_AFTER if refusal.status == 503 else b"")
        http1.end_exchange()
    except OSError:
        if connection.transport.broken is None:
            raise
        worker.counters.peer_gone += 1
        http1.log("peer gone")


def _end_late(http1: Http1) -> None:
    """The reaper has cancelled the connection: answer where the phase has an answer, otherwise just end it."""
    connection = http1.connection
    phase = connection.late
    exchange = http1.exchange
    if exchange is None:
        # Between requests only a head can be late; a handler's time-out that came too late for it is no news.
        if phase == "request_head":
            http1.log(f"late: {phase}", status=408)
            http1.write_last_words(408)
        return
    if phase == "disconnect_grace":
        connection.worker.counters.peer_gone += 1
        http1.log("peer gone")
        if exchange.response_started:
            http1.truncate(exchange)  # it may only have shut down its side, and read on
        return
    status = _LATE_STATUS.get(phase)
    if status is not None and not exchange.response_started:
        http1.log(f"late: {phase}", status=status)
        http1.write_last_words(status, _RETRY_AFTER if status == 503 else b"")
    else:
        http1.log(f"late: {phase}")
        http1.break_off()


def _end_cut(http1: Http1) -> None:
    """A drain, or the server's caller, has cancelled the connection: say so if the response has not begun."""
    exchange = http1.exchange
    if exchange is None:
        return
    if exchange.response_started:
        http1.log("drained")
        http1.break_off()
    else:
        http1.log("drained", status=503)
        http1.write_last_words(503, _RETRY_AFTER)


def _end_broken(http1: Http1, error: BaseException) -> None:
    """Something of ours, or the app's scopes, broke: one answer if possible, and the boundary's verdict."""
    connection = http1.connection
    fault = connection.worker.boundary.judge_own(connection, error)
    if http1.exchange is not None and fault.status is not None:
        http1.write_last_words(fault.status)
    else:
        connection.transport.abort()
    http1.log("server error", fault.summary, status=fault.status)


async def _linger(connection: ConnectionContext) -> None:
    """Half-close, then read what the peer still sends, for a bounded time (RFC 9112 section 9.6).

    Closing a socket with unread bytes makes the kernel send RST, which may destroy our answer before it is read.
    """
    transport = connection.transport
    transport.shutdown_write()
    received = 0
    with trio.move_on_after(connection.worker.timeouts.linger):
        connection.start_phase("linger", NEVER)
        while received < _LINGER_BYTES:
            data = transport.recv_nowait(_LINGER_READ)
            if data is None:
                try:
                    await transport.watch.wait_readable()
                except trio.BusyResourceError:
                    return  # a task that the app has left running reads, too: its request is over
            elif data:
                received += len(data)
            else:
                return
            if received:
                await trio.lowlevel.checkpoint()
