"""The life of one WebSocket session, whatever carries it: an upgraded HTTP/1 connection, or an HTTP/2 stream.

Called by `http1_websocket.py` and by `http2.py` in the task and cancel scope of the connection or stream, with the
request's ordinary `Exchange`. Until the app accepts, the request is that exchange's like any other: refusals, denials,
the app's errors and time-outs are answered in HTTP by whoever serves it. From `websocket.accept` on, everything is
decided here.

There is no task beside the app's. Pings, and the end of a closing handshake that the peer does not finish, are phases
of the reaper, which asks `outlasts`. The frames and the closing are in `websocket_wire.py`.

Cancelling it ends the session: the peer is told so in a close frame, if there is room for one.
"""

from __future__ import annotations

from typing import Any

import trio

from trioserve.asgi.scope import websocket_scope
from trioserve.asgi.websocket_session import SessionState
from trioserve.http.byte_stream import ByteStream
from trioserve.http.http_exchange import intact, log_exchange
from trioserve.http.websocket_frames import (
    ABNORMAL,
    INTERNAL_ERROR,
    NORMAL,
    PING,
    SERVICE_RESTART,
    close_frame,
    frame,
)
from trioserve.http.websocket_handshake import WebSocketRequest, agree_compression, check_request
from trioserve.http.websocket_wire import AHEAD, TURN, SessionRules, WebSocketWire
from trioserve.structure.boundary import is_cancellation
from trioserve.structure.context import Served
from trioserve.structure.deadlines import NEVER
from trioserve.structure.leaks import leak

__all__ = ["ByteStream", "WebSocketRequest", "run_websocket"]

_OPEN, _CLOSED = SessionState.OPEN, SessionState.CLOSED


async def run_websocket(
    context: Served, request: WebSocketRequest, exchange: Any, stream: ByteStream
) -> bool:
    """Check the opening request, run the app on it, and serve the session to its end.

    `exchange` is the protocol's own `Exchange`, whose response has not begun; `context` has it as the one under way.
    While a session is open it has the session instead, and afterwards None. `exchange.receive` and `send` are called
    for what becomes of a request that is not accepted.

    Returns:
        True: no session; the app has responded through `exchange`, or left undone what it had to: settle it like
        any exchange whose app has returned. False: there was a session, it is over and logged; close the stream
        (HTTP/1: linger).

    Raises:
        RequestRefused: the request cannot open a session (400, 426); nothing has been written.
        BaseException: what left the app before it accepted: settle `exchange` with it, as after `await app(...)`.
        trio.Cancelled: the scope was cancelled. If a session was open, it is over and logged.
    """
    worker = context.worker
    if worker.websockets is None:
        worker.websockets = SessionRules(worker.config)
    check_request(request)
    compression = agree_compression(request, worker.websockets.compression)
    session = WebSocket(context, request, exchange, stream, compression)
    scope = websocket_scope(request.scope or exchange.scope(), request.subprotocols)
    error: BaseException | None = None
    try:
        try:
            await worker.app(scope, session.receive, session.send)
        except BaseException as raised:
            if not session.was_open:
                raise
            error = raised
        if not session.was_open:
            return True
        await session.finish(error)
    finally:
        error = None  # its traceback holds this frame
        stream.on_readable = None
        if not session.was_open and exchange.gone is None:
            exchange.gone = session.gone  # by which the boundary knows that it was the peer's doing
        session.gone = None  # its traceback holds the session
        if session.was_open:
            context.exchange = None
    return False


class WebSocket(WebSocketWire):
    """One session, its time, and its end."""

    # -- time ------------------------------------------------------------------------------------------------

    def outlasts(self, phase: str) -> bool:
        """Called by the reaper when `phase` is late.

        A ping is due or was not answered; a close was not answered; or a write waits, for what may be another's doing.
        """
        if phase == "websocket_ping":
            self._ping(self._clock())
            return True
        if phase == "websocket_close":
            self.context.worker.counters.late[phase] += 1
            self._peer_done = True
            self._end_stream()
            self._rest(phase, NEVER)
            self.stream.wake_reader()
            return True
        # What carries the session knows who it is that keeps it from writing.
        return phase == "response_write" and bool(self.exchange.outlasts(phase))

    def _ping(self, now: float) -> None:
        if self._fault is not None:
            self._fail(self._fault)  # the app has had its time
            return
        if self._ahead < AHEAD:
            self._read_for_reader()  # for hubs that do not call
            if self.state is not _OPEN:
                return
        else:
            self._alive = True  # it is we who do not listen
        if self._alive:
            self._dead_at = NEVER
        if now >= self._dead_at:
            self.context.worker.counters.late["websocket_ping"] += 1
            self.outcome = "late: websocket_ping"
            if not self.stream.is_full:
                self._write_close(close_frame(INTERNAL_ERROR, "keepalive ping timeout"))
            self._lose(ABNORMAL, "keepalive ping timeout")
            return
        if now >= self._ping_at:
            self._ping_at = now + self._rules.ping_interval
            if self._dead_at is NEVER:
                self._dead_at = now + self._rules.ping_timeout
                self._alive = False
            if not self.stream.is_full:
                self._write_control(frame(PING, b""))
        self._rest("websocket_ping", min(self._ping_at, self._dead_at))

    # -- after the app ---------------------------------------------------------------------------------------

    async def finish(self, error: BaseException | None) -> None:
        """The app has ended, with `error` perhaps: judge it, close what is open, and write the log's line.

        Raises:
            trio.Cancelled: `error` itself, or one that came while closing.
        """
        try:
            if error is not None and is_cancellation(error):
                raise error
            self._judge(error)
            await self._finish_closing()
        except BaseException as raised:
            if is_cancellation(raised):
                self._note_cancelled()
            raise
        finally:
            error = None
            self._log()

    def _judge(self, error: BaseException | None) -> None:
        context = self.context
        if context.task.child_nurseries:
            error = leak("the connection's", error)
        code = NORMAL
        if error is not None:
            fault = context.worker.boundary.judge_app(context, self, error)
            self.outcome, self.error = fault.outcome, fault.summary
            code = SERVICE_RESTART if fault.status == 503 else INTERNAL_ERROR
        if self.state is _OPEN:
            self.state = _CLOSED
            self.wire_close(code, "")

    async def _finish_closing(self) -> None:
        """Write what is left, and wait for the peer's close frame, or its end, in the phase `websocket_close`."""
        stream = self.stream
        try:
            while stream.is_full:
                await self.wire_flush()
        except OSError:
            return
        if self._fault is not None and not self._peer_done:
            self._fail(self._fault)
        if not self._peer_done:
            self.context.start_phase(
                "websocket_close", min(self._close_by, self._clock() + self._rules.close_timeout)
            )
        if self._receiving:
            stream.wake_reader()  # a task that outlives the app
            await trio.lowlevel.checkpoint()
        self._reader.discard()
        while not self._peer_done:
            if self._busy >= TURN:
                self._busy = 0
                await self._give_way()
            elif self._take_next():
                self.messages.clear()
            else:
                await stream.wait_readable()
                self._busy = 0
        self._end_stream()

    def _note_cancelled(self) -> None:
        """The reaper, a drain, or the end of what carries the session has cancelled it."""
        late = self.context.late
        if late == "disconnect_grace":
            return  # the app was too slow to go, which is all that is to say: the peer knows
        self.read_ahead()  # closing a socket with something unread in it resets the connection
        self.outcome = f"late: {late}" if late else "peer gone" if self.stream.broken else "drained"
        if late:
            self.stream.abort()
        elif not self._close_sent:
            self._write_close(close_frame(SERVICE_RESTART))
            self._end_stream()

    # -- for logs and reports --------------------------------------------------------------------------------

    @property
    def response_given(self) -> bool:
        """The app has closed the session: what it does now may take its time."""
        return self.state is _CLOSED

    def describe(self) -> dict[str, Any]:
        """For logs and reports: no query, no values."""
        request = self.request
        return {
            "method": "WEBSOCKET",
            "http_version": request.http_version,
            "path": request.target.partition(b"?")[0].decode("ascii", "replace"),
            "header_names": [name.decode("latin-1") for name, _ in intact(request.headers)],
            "response": self.state.value,
            "status": self.status,
            "elapsed": self._clock() - self.started_at,
            "request_bytes": self._reader.received,
            "response_bytes": self.response_bytes,
        }

    def _log(self) -> None:
        if self.context.worker.access_log is None:
            return
        request = self.request
        method = "GET" if request.http_version == "1.1" else "CONNECT"
        facts = method, request.target, request.http_version, request.headers, self._reader.received
        log_exchange(self.context, facts, self, self.outcome, self.error)
