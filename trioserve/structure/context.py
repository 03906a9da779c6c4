"""The records handed down the tree: the worker's, the connection's, and that of an HTTP/2 stream.

`WorkerContext` is made once by `worker.py` and read by every task below it. `ConnectionContext` is made by the
listener for each accepted socket, `StreamContext` by HTTP/2 for each stream on one; they are what the reaper expires,
what a drain wakes, and what the logs and the crash report describe. All are plain state: what they mean is decided by
the tiers that use them.
"""

from __future__ import annotations

import contextvars
import itertools
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import trio

from trioserve.net.transport import Transport
from trioserve.structure.deadlines import TICK, Deadlines
from trioserve.structure.drain import Drain, DrainState
from trioserve.structure.phases import Phased, RunningExchange

if TYPE_CHECKING:
    import logging

    from trioserve.net.hub import Hub
    from trioserve.net.share_board import Share
    from trioserve.net.tls_info import TlsInfo
    from trioserve.observe.access_log import AccessLog
    from trioserve.observe.blocking import LoopWatch
    from trioserve.observe.in_flight import InFlightTable
    from trioserve.structure.admission import Admission
    from trioserve.structure.boundary import Boundary

# A client that is busy sends its next request within milliseconds, one that polls most often after a second: closing at
# just that moment would meet it again and again. Past this it is as idle as it may be for ever.
LAST_REQUEST_PATIENCE = 1.5

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Address = tuple[str, int | None]


def seconds_or_never(value: float | None) -> float:
    """A time-out setting as a number: None (`off`) and 0 never expire."""
    return float(value) if value else math.inf


@dataclass(frozen=True, slots=True)
class Timeouts:
    """The phases of a connection, in seconds; `inf` where a phase is off. See `Config` for defaults and reasons."""

    tls_handshake: float
    first_byte: float
    request_head: float
    request_body: float
    request_body_min_rate: float
    request_body_min_rate_grace: float
    keep_alive: float
    response_write: float
    request: float
    disconnect_grace: float
    linger: float

    @classmethod
    def from_config(cls, config: Any) -> Timeouts:
        """Take the phases from a validated `Config`; hypercorn's `read_timeout` caps the reading ones."""
        read_cap = seconds_or_never(config.read_timeout)
        grace = config.disconnect_grace
        return cls(
            tls_handshake=seconds_or_never(config.ssl_handshake_timeout),
            first_byte=seconds_or_never(config.first_byte_timeout),
            request_head=min(seconds_or_never(config.request_head_timeout), read_cap),
            request_body=min(seconds_or_never(config.request_body_timeout), read_cap),
            request_body_min_rate=float(config.request_body_min_rate or 0),
            request_body_min_rate_grace=seconds_or_never(config.request_body_min_rate_grace),
            # 0 is a real value here: close after each response.
            keep_alive=math.inf if config.keep_alive_timeout is None else float(config.keep_alive_timeout),
            response_write=seconds_or_never(config.response_write_timeout),
            request=seconds_or_never(config.request_timeout),
            # 0 is a real value here: cancel the handler at once.
            disconnect_grace=math.inf if grace is None else float(grace),
            linger=float(config.linger_timeout or 0),
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may be, in bytes and counts; see `Config` for defaults and reasons."""

    head_size: int
    header_count: int
    target_size: int
    body_size: float
    keep_alive_requests: int

    @classmethod
    def from_config(cls, config: Any) -> Limits:
        """Take the limits from a validated `Config`."""
        return cls(
            head_size=config.max_head_size,
            header_count=config.max_header_count,
            target_size=config.max_target_size,
            body_size=math.inf if config.max_body_size is None else config.max_body_size,
            keep_alive_requests=config.keep_alive_max_requests,
        )


@dataclass(slots=True)
class Counters:
    """What the worker has done so far; read by reports, logs and tests.

    `requests` are those of closed connections; `WorkerContext.requests_served` has all.
    """

    connections: int = 0
    handshakes: int = 0
    handshakes_failed: int = 0
    requests: int = 0
    accept_pauses: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    late: Counter[str] = field(default_factory=Counter)
    peer_gone: int = 0
    faults: Counter[str] = field(default_factory=Counter)


class RunsRequests(Protocol):
    """Who runs the app on requests of many connections in a task of its own (`http/http1_lane.py`).

    Attributes:
        task: that task.
        connection: whose request it is at, or was at last.
    """

    task: trio.lowlevel.Task
    connection: ConnectionContext | None


class WorkerContext:
    """Everything that a connection needs of its worker."""

    __slots__ = (
        "access_log", "admission", "app", "base_context", "boundary", "clock", "config", "connections",
        "counters", "deadlines", "debug_extension", "development", "drain", "draining", "error_log",
        "files", "flusher", "h2c", "handshake_turns", "hub", "ids", "in_flight_table", "lanes", "limits", "loop_watch",
        "new_engine", "new_http2_engine", "response_defaults", "room", "root_path", "share", "started_at", "state",
        "timeouts", "websockets",
    )  # fmt: skip

    def __init__(self, app: ASGIApp, config: Any, hub: Hub, error_log: logging.Logger) -> None:
        self.app = app
        self.config = config
        self.hub = hub
        self.error_log = error_log
        self.access_log: AccessLog | None = None
        self.boundary: Boundary
        self.admission: Admission | None = None
        self.flusher: Any = None
        self.files: Any = None
        self.loop_watch: LoopWatch | None = None
        self.in_flight_table: InFlightTable | None = None
        self.share: Share | None = None
        self.new_engine: Callable[[], Any]
        self.new_http2_engine: Callable[[Any], Any]  # for a connection's `Http2`
        self.handshake_turns: Any = None  # where TLS is spoken
        self.h2c = False  # HTTP/2 without TLS, for who begins with its preface
        self.limits = Limits.from_config(config)
        self.timeouts = Timeouts.from_config(config)
        self.deadlines = Deadlines()
        self.drain = Drain(float(config.graceful_timeout), float(config.pre_drain_delay))
        self.draining = False
        self.drain.on_begin(self._note_draining)
        self.connections: set[ConnectionContext] = set()
        self.lanes: set[RunsRequests] = set()
        self.room = trio.lowlevel.ParkingLot()  # listeners wait here for a connection to close
        self.counters = Counters()
        self.ids = itertools.count(1)
        self.clock: Callable[[], float] = trio.lowlevel.current_clock().current_time
        self.started_at = self.clock()
        self.base_context = contextvars.copy_context()
        self.state: dict[str, Any] = {}
        self.root_path: str = config.root_path
        self.debug_extension = bool(config.debug_extension)
        self.development = False  # the client is the app's author, who may see tracebacks
        self.response_defaults: Any = None
        self.websockets: Any = None  # what all sessions have in common, once there has been one

    def _note_draining(self) -> None:
        self.draining = not self.drain.delay  # otherwise `worker.py` says when
        if self.share is not None:
            self.share.withdraw()

    # -- what the other workers are told ---------------------------------------------------------------------

    def note_share(self, taken: int = 0) -> None:
        """A connection has come (`taken` is 1) or gone, or there is room for one again."""
        if self.share is not None and self.drain.state is DrainState.RUNNING:
            self.share.note(len(self.connections), taken)

    def count_share(self) -> None:
        """Find out how many connections are busy now: before they are compared, and with each heartbeat."""
        if self.share is not None:
            self.share.count(len(self.connections), self._count_resting)

    def _count_resting(self) -> int:
        now = self.clock()
        return sum([connection.rests(now) for connection in self.connections])

    def stand_aside(self) -> None:
        """There is no room for another connection: they shall not wait for us to take it."""
        self.counters.accept_pauses += 1
        if self.share is not None:
            self.share.withdraw()

    # -- what it is doing ------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """How many requests are being answered; counted when asked for, so that it cannot drift."""
        return sum(
            (connection.exchange is not None) + len(connection.streams) for connection in self.connections
        )

    @property
    def requests_served(self) -> int:
        """How many requests have come, on open and on closed connections."""
        return self.counters.requests + sum(connection.requests for connection in self.connections)

    def date_requests(self) -> None:
        """With each heartbeat: note in the supervisor's table since when the requests in flight are there."""
        ahead = time.monotonic() - self.clock()
        for connection in self.connections:
            for served, exchange in connection.in_flight():
                if served.slot is not None:
                    served.slot.write_time(exchange.started_at + ahead)

    def forget(self, connection: ConnectionContext) -> None:
        """A connection is closed: drop what the worker holds of it."""
        self.connections.discard(connection)
        if connection.slot is not None and self.in_flight_table is not None:
            self.in_flight_table.release(connection.slot)
            connection.slot = None
        self.note_share()
        self.counters.requests += connection.requests
        self.deadlines.disarm(connection)
        if self.room:
            self.room.unpark_all()


class ConnectionContext(Phased):
    """One accepted connection: its bytes, its place in time, and what it is busy with.

    Attributes:
        exchange: HTTP/1's exchange or WebSocket session; None while there is none, and with HTTP/2.
        streams: HTTP/2's, by their number; empty with HTTP/1.
        requests: how many have come.
        tls: what its handshake has agreed on (`net/tls_info.py`), None on a plain one.
    """

    __slots__ = ("_moved", "_moved_at", "accepted_at", "requests", "streams", "task", "tls")

    def __init__(
        self, worker: WorkerContext, transport: Transport, client: Address | None, server: Address | None
    ) -> None:
        super().__init__(worker, transport, client, server)
        self.id = next(worker.ids)
        self.accepted_at = self._moved_at = worker.clock()
        self._moved = 0
        self.task: trio.lowlevel.Task
        self.streams: Mapping[int, StreamContext] = _NO_STREAMS
        self.tls: TlsInfo | None = None
        self.requests = 0
        self.phase = "accepted"
        worker.connections.add(self)
        worker.note_share(1)
        transport.watch.on_hangup = self.peer_gone

    def __repr__(self) -> str:
        peer = "unix" if self.client is None else f"{self.client[0]}:{self.client[1]}"
        return f"<connection {self.id} {peer} {self.phase} requests={self.requests}>"

    @property
    def idle(self) -> bool:
        """Waiting for the first byte of a request, so that a drain may close it."""
        return self.phase in ("first_byte", "keep_alive", "last_request")

    def in_flight(self) -> Iterator[tuple[Phased, RunningExchange]]:
        """The exchanges under way, each with what times it. From any thread."""
        if self.exchange is not None:
            yield self, self.exchange
        for stream in list(self.streams.values()):
            if stream.exchange is not None:
                yield stream, stream.exchange

    def rests(self, now: float) -> bool:
        """Nothing has happened here for `LAST_REQUEST_PATIENCE`: neither a byte, nor is there an answer to be given.

        A WebSocket session or a stream of events is open for ever, and at rest while nobody says anything. To be asked
        every now and then: it goes by what has changed since it was last asked.
        """
        transport = self.transport
        moved = transport.bytes_read + transport.bytes_written
        if moved != self._moved:
            self._moved = moved
            self._moved_at = now
            return False
        if now - self._moved_at < LAST_REQUEST_PATIENCE:
            return False
        if self.exchange is None and not self.streams:
            return True
        return all(exchange.response_started for _, exchange in self.in_flight())

    def may_get_last_request(self) -> bool:
        """In a drain: whether a request is likely to be on its way, so that closing now would lose it.

        One that was opened or answered a moment ago is given `LAST_REQUEST_PATIENCE` from then, as a phase.
        """
        if self.phase == "last_request":
            return True
        keep_alive = self.worker.timeouts.keep_alive
        if self.phase == "first_byte":
            since = self.accepted_at
        elif keep_alive != math.inf:
            since = self.deadline - keep_alive
        else:
            return False  # nobody has noted when it became idle
        if self.worker.clock() - since >= LAST_REQUEST_PATIENCE:
            return False
        self.start_phase("last_request", since + LAST_REQUEST_PATIENCE)
        return True

    def expire(self) -> None:
        if self.idle and (self.transport.watch.reader is None or self.transport.has_input()):
            # The peer has spoken in time, but its task has not had its turn: look again when it must have had it. What
            # it was woken for may have been read already.
            self.start_phase(self.phase, self.worker.clock() + 2 * TICK)
            return
        super().expire()

    def wake_for_drain(self) -> None:
        """A drain has begun: let an idle connection look at its socket a last time and close."""
        for _, exchange in list(self.in_flight()):
            exchange.note_drain()
        if self.idle or self.streams is not _NO_STREAMS:
            self.transport.watch.wake_reader()
        elif self.phase == "tls_handshake":
            # A request is about to follow, unless the client takes its time.
            latest = self.worker.clock() + LAST_REQUEST_PATIENCE
            self.start_phase(self.phase, min(self.deadline, latest))


class StreamContext(Phased):
    """One HTTP/2 stream: a request of its own, with its own task, scope and phases.

    Attributes:
        connection: whose stream it is.
        stream_id: its number there.
        task: the one that serves it.
        reset: the stream, or the connection below it, is dead.
        closed: nobody serves it any more.
        writing: somebody waits for the window or the connection to take more.
        bytes_taken: what of it the connection has taken to send.
    """

    __slots__ = (
        "_taken", "bytes_taken", "closed", "connection", "reset", "stream_id", "task", "writing"
    )  # fmt: skip

    def __init__(self, connection: ConnectionContext, stream_id: int) -> None:
        super().__init__(connection.worker, connection.transport, connection.client, connection.server)
        self.scheme = connection.scheme
        self.id = connection.id
        self.connection = connection
        self.stream_id = stream_id
        self.task: trio.lowlevel.Task
        self.reset = self.closed = self.writing = False
        self.bytes_taken = self._taken = 0

    def __repr__(self) -> str:
        return f"<stream {self.stream_id} of connection {self.id} {self.phase}>"

    @property
    def requests(self) -> int:
        """How many requests the connection has had."""
        return self.connection.requests

    @property
    def tls(self) -> TlsInfo | None:
        """As the connection's."""
        return self.connection.tls

    def is_closed(self) -> bool:
        return self.closed

    def has_hangup(self) -> bool:
        return self.reset  # that it has sent all of its request does not mean that it leaves

    def is_reset(self) -> bool:
        return self.reset

    def is_writing(self) -> bool:
        return self.writing

    def has_progressed(self) -> bool:
        before, self._taken = self._taken, self.bytes_taken
        return self._taken > before


_NO_STREAMS: Mapping[int, StreamContext] = {}

# What the boundary and the reports may be given: whatever runs an app of its own.
Served = ConnectionContext | StreamContext
