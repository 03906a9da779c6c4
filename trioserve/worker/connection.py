"""One connection from accept to close: choose the protocol, serve it, linger, close.

Started by the listener as a task in the connections' nursery. Its cancel scope is the unit of cancellation: the
reaper cancels it when a phase is late, a drain when its grace is over. Whatever happens in here ends here: the
boundary judges it, and no exception but `Cancelled` leaves.
"""

from __future__ import annotations

import trio

from trioserve.errors import RequestRefused
from trioserve.http.http1 import Http1
from trioserve.http.protocol import HTTP2_PREFACE, Protocol
from trioserve.net.tls import HandshakeFailed, TlsFault, TlsTransport
from trioserve.structure.boundary import is_cancellation
from trioserve.structure.context import ConnectionContext
from trioserve.structure.deadlines import NEVER
from trioserve.structure.leaks import outlive_leak
from trioserve.worker.handshake import open_tls, refuse_handshake

# While lingering: how much the peer may still send, and how much is read at once. What comes is thrown away. More than
# both kernels hold between them (tcp_wmem, tcp_rmem: 4 and 6 MiB at most, tcp(7)), or one who has begun to send would
# be reset before he sees our answer.
_LINGER_BYTES = 16 * 1024 * 1024
_LINGER_READ = 64 * 1024


async def serve_connection(connection: ConnectionContext) -> None:
    """Serve one accepted connection until it is closed."""
    worker = connection.worker
    connection.task = trio.lowlevel.current_task()
    protocol: Protocol | None = None
    try:
        with trio.CancelScope() as connection.scope:
            data = await _open(connection)
            protocol = _choose_protocol(connection, data)
            # In here, not in a function of its own: that would be a frame more to pass through at every wake-up.
            try:
                await protocol.serve(data)
            except RequestRefused as refusal:
                _end_refused(protocol, refusal)
            except OSError:
                if connection.transport.broken is None:
                    raise
                worker.counters.peer_gone += 1
                protocol.log("peer gone")
        if connection.scope.cancelled_caught and protocol is not None:
            protocol.end_late(connection.late)
            protocol.end()
        if protocol is not None and protocol.linger:
            await _linger(connection)
    except HandshakeFailed as failure:
        if refuse_handshake(connection, failure):
            await _linger(connection)
    except BaseException as error:
        cancelled = is_cancellation(error)
        try:
            if protocol is None:
                _end_unopened(connection, None if cancelled else error)
            elif cancelled:
                protocol.end_cut()
            else:
                protocol.end_broken(error)
        except Exception as second:
            # Ours again, such as a log that cannot be written to: judged as well, and the connection ends all the same.
            worker.boundary.judge_own(connection, second)
            if protocol is not None:
                protocol.break_off()
        if cancelled:
            raise
    finally:
        if protocol is not None:
            protocol.end()
        if isinstance(connection.transport.broken, TlsFault) and connection.tls is not None:
            _note_fault(connection, connection.transport.broken)
        worker.forget(connection)
        connection.transport.close()
        if connection.task.child_nurseries:
            await outlive_leak(connection.task)  # although the connection is closed


async def _open(connection: ConnectionContext) -> bytes | None:
    """All that comes before the protocol is known; returns what was read to find out."""
    worker = connection.worker
    if isinstance(connection.transport, TlsTransport):
        await open_tls(connection, connection.transport, worker.handshake_turns)
    connection.start_phase("first_byte", connection.accepted_at + worker.timeouts.first_byte)
    if worker.h2c and connection.tls is None:
        return await _read_preface(connection)
    return None


async def _read_preface(connection: ConnectionContext) -> bytes | None:
    """Read until it is clear whether the peer begins with HTTP/2's preface (RFC 9113 section 3.4)."""
    worker = connection.worker
    transport = connection.transport
    data = b""
    while HTTP2_PREFACE.startswith(data) and len(data) < len(HTTP2_PREFACE):
        part = transport.recv_nowait()
        if part is None:
            if worker.draining and not data:
                return None
            await transport.watch.wait_readable()
        elif part:
            if not data:
                connection.start_phase("request_head", worker.clock() + worker.timeouts.request_head)
            data += part
        else:
            break
    return data


def _choose_protocol(connection: ConnectionContext, data: bytes | None) -> Protocol:
    worker = connection.worker
    by_alpn = connection.tls is not None and connection.tls.alpn == "h2"
    if by_alpn or (data is not None and data.startswith(HTTP2_PREFACE)):
        from trioserve.http.http2 import Http2

        return Http2(connection, worker.new_http2_engine)
    return Http1(connection, worker.new_engine())


def _end_refused(protocol: Protocol, refusal: RequestRefused) -> None:
    """The peer's fault: answered and counted; the answer is sent before the connection closes."""
    connection = protocol.connection
    worker = connection.worker
    worker.counters.refused[str(refusal.status)] += 1
    worker.error_log.debug("connection %d refused: %s", connection.id, refusal)
    protocol.end_refused(refusal)


def _note_fault(connection: ConnectionContext, fault: TlsFault) -> None:
    """The peer's fault below HTTP: there was nobody left to be answered. Counted beside what else it is the end of."""
    worker = connection.worker
    worker.counters.refused["tls"] += 1
    worker.error_log.debug("connection %d refused: %s", connection.id, fault.strerror)


def _end_unopened(connection: ConnectionContext, error: BaseException | None) -> None:
    """The connection ends before it has a protocol, by `error` or because it was cancelled."""
    if error is not None:
        connection.worker.boundary.judge_own(connection, error)
    connection.transport.abort()


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
