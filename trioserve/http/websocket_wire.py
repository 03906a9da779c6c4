"""A WebSocket session and its frames: opening, reading, writing, and all the ways in which it may end.

The base of `WebSocket` (`websocket.py`), which adds time and what follows the app. There is no task beside the app's.
What arrives is read in `receive()`, and while the app is elsewhere by a call from the hub (`read_ahead`): pings and
closes are answered at once, and messages queue up to `AHEAD`, beyond which the peer has to wait. What cancelling does
is told in `asgi/websocket_session.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import trio

from trioserve.asgi.websocket_session import SessionState, Turn, WebSocketSession
from trioserve.config import Config
from trioserve.http.byte_stream import ByteStream
from trioserve.http.websocket_frames import (
    ABNORMAL,
    CLOSE,
    PING,
    PONG,
    SERVICE_RESTART,
    Deflater,
    FrameReader,
    WebSocketFault,
    close_frame,
    frame,
    read_close,
)
from trioserve.http.websocket_handshake import Compression, WebSocketRequest, accept_fields
from trioserve.structure.context import Served, seconds_or_never
from trioserve.structure.deadlines import NEVER
from trioserve.structure.phases import RunningExchange

_OPEN, _CLOSED, _LOST = SessionState.OPEN, SessionState.CLOSED, SessionState.LOST

# How much is kept for an app that is not in `receive()`, before the peer has to wait: payload, what comes out of
# decompressing it, and the work of its frames. What a client that talks while it listens sends in a moment; also the
# most that may come before the app has accepted, when nothing should.
AHEAD = 64 * 1024

# How much is read, decompressed and otherwise done in a row before the other tasks get a turn: a few milliseconds.
TURN = 64 * 1024

# What a read counts for beside its bytes: many small ones in a row take their time, too.
_READ = 256


class SessionRules:
    """What a worker's sessions have in common; one of them, made with the first session."""

    __slots__ = ("close_timeout", "compression", "max_size", "ping_interval", "ping_timeout", "turn")

    def __init__(self, config: Config) -> None:
        self.max_size: int = config.websocket_max_message_size
        self.ping_interval = seconds_or_never(config.websocket_ping_interval)
        self.ping_timeout = seconds_or_never(config.websocket_ping_timeout)
        self.close_timeout = float(config.websocket_close_timeout)
        self.compression: str = config.websocket_compression
        self.turn = Turn()


class WebSocketWire(WebSocketSession):
    """One session on the wire.

    Attributes:
        context: the connection or stream whose phases bound it.
        started_at: when the head of its request was whole; head_at: when it was accepted (trio's clock).
        was_open: the app has accepted it.
        response_bytes: bytes of payload sent in messages.
        outcome, error: for the log.
    """

    status: int | None = None
    head_at: float | None = None
    fields: Sequence[tuple[bytes, bytes]] = ()
    was_open = False
    response_bytes = 0
    #: for the boundary, which asks exchanges: nothing of these can happen to a session
    refusal = None
    admitted = False
    is_logged = False
    #: for the boundary: an error of the app's is row W1
    is_websocket = True
    response_started = True
    response_complete = False
    request_complete = False
    outcome = "complete"
    error: str | None = None
    _close_sent = False
    _ended = False  # our side of the stream
    _fault: WebSocketFault | None = (
        None  # what the peer has done wrong behind messages that the app has not taken
    )
    _peer_done = False  # it has closed, has left, or is not listened to any more
    _ahead = 0
    _reads_on = False  # in the next pass of the event loop
    _busy = 0  # with what has been read, since the others had their turn
    _alive = False  # something has arrived since the last ping that is not answered
    _ping_at = NEVER
    _dead_at = NEVER
    _close_by = NEVER
    _pong: bytes | None = None
    _flushing = 0

    def __init__(
        self,
        context: Served,
        request: WebSocketRequest,
        exchange: Any,
        stream: ByteStream,
        compression: Compression | None,
    ) -> None:
        self.context = context
        self.request = request
        self.exchange = exchange
        self.stream = stream
        self.started_at: float = self.exchange.started_at
        self.messages = []
        self._rules: SessionRules = context.worker.websockets
        self._turn = self._rules.turn
        self._clock = context.worker.clock
        self._compression = compression
        self._deflater: Deflater | None = None
        self._reader: FrameReader

    def __repr__(self) -> str:
        return f"<WebSocket {self.state.value} on {self.context!r}>"

    # -- opening ---------------------------------------------------------------------------------------------

    async def wire_wait_leave(self) -> bool:
        try:
            await self.stream.wait_readable()
        except trio.ClosedResourceError:
            self.lose(ABNORMAL)  # a task that has outlived its request
        if self.state is not SessionState.CONNECTING:
            return self.state is _LOST
        data = self.stream.read_nowait()
        if data:
            self.request.early += data
            if len(self.request.early) > AHEAD:
                self.stream.abort()  # a client has nothing to say before it knows that it is heard
                data = b""
        if data == b"":
            self.exchange.told_gone = True
            self.lose(ABNORMAL)
        return data == b""

    def wire_accept(self, subprotocol: Any, headers: Any) -> bool:
        worker = self.context.worker
        fields = accept_fields(self.request, subprotocol, headers)
        compression = self._compression
        if compression is not None:
            fields.append((b"sec-websocket-extensions", compression.answer))
            self._deflater = compression.deflater
        self._reader = FrameReader(
            self._rules.max_size, None if compression is None else compression.inflater
        )
        full = self.stream.accept(fields)
        self.messages = self._reader.messages
        self.state = _OPEN
        self.was_open = True
        self.fields = fields
        self.status = 101 if self.request.http_version == "1.1" else 200
        self.head_at = now = self._clock()
        self.context.exchange = cast("RunningExchange", self)  # `WebSocket` is one
        if self.exchange.admitted and worker.admission is not None:
            worker.admission.release()  # places are for requests; a session may last for ever
            self.exchange.admitted = False
        self._ping_at = now + self._rules.ping_interval
        self._rest("websocket_ping", self._ping_at)
        self.stream.on_readable = self.read_ahead
        early, self.request.early = self.request.early, b""
        if early:
            self._take(early)
        self._read_for_reader()  # what has come meanwhile was announced when nobody listened
        if worker.draining:
            self.note_drain()
        return full

    # -- reading ---------------------------------------------------------------------------------------------

    async def wire_wait_message(self) -> None:
        stream = self.stream
        messages = self.messages
        while self.state is _OPEN and not messages:
            self._ahead = 0
            if self._fault is not None:
                self._fail(self._fault)
                return
            if self._busy >= TURN:
                self._busy = 0
                await self._give_way()
            elif not self._take_next():
                try:
                    await stream.wait_readable()
                except trio.ClosedResourceError:
                    self._note_end()
                self._busy = 0

    def read_ahead(self) -> None:
        """Called by the hub when something has arrived and the app is not in `receive()`."""
        if self._reads_on:
            return
        stop = self._busy + TURN
        while self._ahead < AHEAD and not self._peer_done and self._fault is None:
            if self._busy >= stop:
                # Of what leaves nothing behind there may be any amount, and of what is there now the hub says no more.
                flusher = self.context.worker.flusher
                if flusher is not None:
                    self._reads_on = True
                    flusher.request(self._read_on)
                return
            if not self._take_next():
                return
            if self.state is _CLOSED:
                self.messages.clear()
                self._ahead = 0

    def _read_on(self) -> None:
        """Called in the next pass of the event loop."""
        self._reads_on = False
        if self.stream.on_readable is not None:  # it is not over
            self._read_for_reader()

    def _read_for_reader(self) -> None:
        """Read ahead where the hub has not called: a task may be waiting for what is there."""
        self.read_ahead()
        if self.messages or self._reader.held:
            self.stream.wake_reader()

    def _take_next(self) -> bool:
        """Take what was read and is held, or else what is there; False if there is nothing."""
        if self._reader.held:
            self._take(b"")
            return True
        data = self.stream.read_nowait()
        if data is None:
            return False
        if data:
            self._alive = True
            self._take(data)
        else:
            self._note_end()
        return True

    def _take(self, data: bytes) -> None:
        reader = self._reader
        kept = len(self.messages), reader.buffered
        work, received = reader.work, reader.received
        try:
            reader.receive(data)
        except WebSocketFault as fault:
            self._take_controls()
            if self.messages and self.state is _OPEN:
                self._fault = fault  # when the app has had, and answered, what was right
            else:
                self._fail(fault)
        else:
            work = reader.work - work
            self._busy += len(data) + work + _READ
            if (len(self.messages), reader.buffered) != kept:  # pings and pongs leave nothing behind
                self._ahead += reader.received - received + work
            if reader.controls:
                self._take_controls()

    def _take_controls(self) -> None:
        controls = self._reader.controls
        pongs: list[bytes] = []
        for opcode, payload in controls:
            if opcode == PING:
                pongs.append(payload)
            elif opcode == CLOSE:
                self._send_pongs(pongs)
                pongs = []
                try:
                    self._note_close(payload)
                except WebSocketFault as fault:
                    self._fail(fault)
        controls.clear()
        if pongs:
            self._send_pongs(pongs)

    def _send_pongs(self, pongs: list[bytes]) -> None:
        """Answer pings in one write. A peer that pings but does not read hears of the last (RFC 6455 section 5.5.3)."""
        if self._close_sent or not pongs:
            return
        if self.stream.is_full:
            self._pong = pongs[-1]
        else:
            self._write_control(b"".join([frame(PONG, payload) for payload in pongs]))

    # -- the end, whoever brings it about --------------------------------------------------------------------

    def _note_close(self, payload: bytes) -> None:
        """The peer has sent a close frame: answer it, and end the connection, as is the server's part."""
        code, reason = read_close(payload)
        if not self._close_sent:
            self._write_close(frame(CLOSE, payload))
        self._lose(code, reason)

    def _note_end(self) -> None:
        """The peer's bytes have ended without a close frame."""
        if self.state is _OPEN:
            self.context.worker.counters.peer_gone += 1
            self.outcome = "peer gone"
        self._lose(ABNORMAL, "")

    def _fail(self, fault: WebSocketFault) -> None:
        """The peer breaks the protocol or a limit (RFC 6455 section 7.1.7): say so, and listen no more."""
        worker = self.context.worker
        worker.counters.refused[str(fault.code)] += 1
        worker.error_log.debug("connection %d: WebSocket failed: %s", self.context.id, fault)
        self.outcome, self.error = "refused", str(fault)
        self._reader.closed = True
        if not self._close_sent:
            self._write_close(close_frame(fault.code, fault.reason))
        self._lose(fault.code, fault.reason)

    def _lose(self, code: int, reason: str) -> None:
        """Nothing more will come from the peer: tell the app, and give it the grace to end."""
        was_open = self.state is _OPEN
        self._peer_done = True
        self.lose(code, reason)
        self._end_stream()
        if was_open:
            self._rest("disconnect_grace", self._clock() + self.context.worker.timeouts.disconnect_grace)
        elif self.context.handler_phase == "websocket_close":
            self._rest("websocket_close", NEVER)
        self.stream.wake_reader()

    def note_drain(self) -> None:
        """A drain has begun: the peer is to come back, to another worker; the app has the drain's grace."""
        if self.state is _OPEN:
            self.outcome = "drained"
            self._close(SERVICE_RESTART, "")
            self.lose(SERVICE_RESTART, "")
            self.stream.wake_reader()

    def wire_close(self, code: int, reason: str) -> bool:
        full = self._close(code, reason)
        self._reader.discard()
        self._ahead = 0
        self.stream.wake_reader()
        return full

    def _close(self, code: int, reason: str) -> bool:
        """Begin the closing handshake."""
        self._close_by = self._clock() + self._rules.close_timeout
        self._rest("websocket_close", self._close_by)
        return self._write_close(close_frame(code, reason))

    # -- writing ---------------------------------------------------------------------------------------------

    def wire_send(self, kind: int, payload: bytes) -> bool | None:
        stream = self.stream
        if stream.is_full:
            return None
        self.response_bytes += len(payload)
        deflater = self._deflater
        return stream.write_nowait(
            frame(kind, payload) if deflater is None else deflater.frame(kind, payload)
        )

    def _end_stream(self) -> None:
        if not self._ended:
            self._ended = True
            self.stream.end()

    def _write_close(self, data: bytes) -> bool:
        self._close_sent = True
        return self._write_control(data)

    def _write_control(self, data: bytes) -> bool:
        """Write what no task waits for; who is gone is met by reading."""
        try:
            return self.stream.write_nowait(data)
        except OSError:
            return False

    async def wire_flush(self) -> None:
        context = self.context
        self._flushing += 1
        if self._flushing == 1:
            if context.handler_phase == "websocket_ping":
                context.handler_deadline = NEVER  # who takes no bytes is bounded by that
            context.start_write()
        try:
            await self.stream.flush()
        finally:
            self._flushing -= 1
            if not self._flushing and not context.is_closed():
                if context.handler_phase == "websocket_ping":
                    context.handler_deadline = min(self._ping_at, self._dead_at)
                context.enter_handler()
        if self._pong is not None:
            pong, self._pong = self._pong, None
            self._send_pongs([pong])

    # -- phases ----------------------------------------------------------------------------------------------

    def _rest(self, phase: str, deadline: float) -> None:
        """What bounds the session from here on, while nobody waits for the peer to read."""
        context = self.context
        context.handler_phase, context.handler_deadline = phase, deadline
        if not self._flushing:
            context.enter_handler()
        elif phase != "websocket_ping":
            context.start_write()
