"""The two records handed down the tree: the worker's, and the connection's.

`WorkerContext` is made once by `worker.py` and read by every task below it. `ConnectionContext` is made by the
listener for each accepted socket; it is what the reaper expires, what a drain wakes, and what the logs and the
crash report describe. Both are plain state: what they mean is decided by the tiers that use them.
"""

from __future__ import annotations

import contextvars
import itertools
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import trio

from trioserve.net.transport import Transport
from trioserve.structure.deadlines import NEVER, TICK, Deadlines
from trioserve.structure.drain import Drain, DrainState

if TYPE_CHECKING:
    import logging

    from trioserve.net.hub import Hub
    from trioserve.net.share_board import Share
    from trioserve.observe.access_log import AccessLog
    from trioserve.observe.blocking import LoopWatch
    from trioserve.observe.in_flight import InFlightTable, Slot
    from trioserve.structure.admission import Admission
    from trioserve.structure.boundary import Boundary

# A client that is busy sends its next request within milliseconds; past a second it is as idle as it may be for ever.
LAST_REQUEST_PATIENCE = 1.0

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
    requests: int = 0
    accept_pauses: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    late: dict[str, int] = field(default_factory=dict)
    peer_gone: int = 0
    faults: dict[str, int] = field(default_factory=dict)


class WorkerContext:
    """Everything that a connection needs of its worker."""

    __slots__ = (
        "access_log", "admission", "app", "base_context", "boundary", "clock", "config", "connections",
        "counters", "deadlines", "debug_extension", "development", "drain", "draining", "error_log",
        "files", "flusher", "hub", "ids", "in_flight_table", "limits", "loop_watch", "new_engine",
        "response_defaults", "room", "root_path", "share", "started_at", "state", "timeouts",
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
        self.limits = Limits.from_config(config)
        self.timeouts = Timeouts.from_config(config)
        self.deadlines = Deadlines()
        self.drain = Drain(float(config.graceful_timeout), float(config.pre_drain_delay))
        self.draining = False
        self.drain.on_begin(self._note_draining)
        self.connections: set[ConnectionContext] = set()
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

    def _note_draining(self) -> None:
        self.draining = not self.drain.delay  # otherwise `worker.py` says when
        if self.share is not None:
            self.share.note(None)

    @property
    def in_flight(self) -> int:
        """How many requests are being answered; counted when asked for, so that it cannot drift."""
        return sum(connection.exchange is not None for connection in self.connections)

    @property
    def requests_served(self) -> int:
        """How many requests have come, on open and on closed connections."""
        return self.counters.requests + sum(connection.requests for connection in self.connections)

    def date_requests(self) -> None:
        """With each heartbeat: note in the supervisor's table since when the requests in flight are there."""
        ahead = time.monotonic() - self.clock()
        for connection in self.connections:
            if connection.slot is not None and connection.exchange is not None:
                connection.slot.write_time(connection.exchange.started_at + ahead)

    def forget(self, connection: ConnectionContext) -> None:
        """A connection is closed: drop what the worker holds of it."""
        self.connections.discard(connection)
        if connection.slot is not None and self.in_flight_table is not None:
            self.in_flight_table.release(connection.slot)
            connection.slot = None
        if self.share is not None and self.drain.state is DrainState.RUNNING:
            self.share.note(len(self.connections))
        self.counters.requests += connection.requests
        self.deadlines.disarm(connection)
        if self.room:
            self.room.unpark_all()


class RunningExchange(Protocol):
    """What the connection, the logs and the boundary may ask of the exchange that is under way.

    Attributes:
        started_at: when its head was whole (trio's clock).
    """

    started_at: float

    @property
    def response_started(self) -> bool:
        """The head is on the wire."""
        ...

    @property
    def response_complete(self) -> bool:
        """The last byte was handed to the transport."""
        ...

    @property
    def response_given(self) -> bool:
        """The app has said all: what is not with the transport yet is only a question of how fast the peer reads."""
        ...

    @property
    def request_complete(self) -> bool:
        """Nothing more of the request will arrive: it is whole, or cut short."""
        ...

    def describe(self) -> dict[str, Any]:
        """Method, path without query, and the response's state, for logs and reports; no values of headers."""
        ...


class ConnectionContext:
    """One accepted connection: its bytes, its place in time, and the exchange it is busy with.

    Attributes:
        phase: the name of the wait that `deadline` belongs to (design: "phases"), also shown in the task tree.
        deadline: trio's clock; `NEVER` while no phase is running.
        handler_phase, handler_deadline: what bounds the app while no other phase does: nothing, the request's own
            time-out, or the grace after the peer has gone.
        late: the phase that the reaper ended, or "".
        slot: its place in the table of requests in flight, if there is one with room.
    """

    __slots__ = (
        "__weakref__", "accepted_at", "armed_at", "client", "deadline", "exchange", "handler_deadline",
        "handler_phase", "id", "late", "phase", "requests", "scheme", "scope", "server", "slot",
        "task", "transport", "worker",
    )  # fmt: skip

    def __init__(
        self, worker: WorkerContext, transport: Transport, client: Address | None, server: Address | None
    ) -> None:
        self.worker = worker
        self.transport = transport
        self.client = client
        self.server = server
        self.scheme = "http"
        self.id = next(worker.ids)
        self.accepted_at = worker.clock()
        self.task: trio.lowlevel.Task
        self.scope: trio.CancelScope
        self.exchange: RunningExchange | None = None
        self.slot: Slot | None = None
        self.requests = 0
        self.phase = "accepted"
        self.deadline = NEVER
        self.handler_phase = "request"
        self.handler_deadline = NEVER
        self.armed_at = NEVER
        self.late = ""
        worker.connections.add(self)
        if worker.share is not None and worker.drain.state is DrainState.RUNNING:
            worker.share.note(len(worker.connections))
        transport.watch.on_hangup = self.peer_gone

    def __repr__(self) -> str:
        peer = "unix" if self.client is None else f"{self.client[0]}:{self.client[1]}"
        return f"<connection {self.id} {peer} {self.phase} requests={self.requests}>"

    @property
    def idle(self) -> bool:
        """Waiting for the first byte of a request, so that a drain may close it."""
        return self.phase in ("first_byte", "keep_alive", "last_request")

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

    def start_phase(self, phase: str, deadline: float) -> None:
        """Enter a named wait that must be over by `deadline` (trio's clock)."""
        self.phase = phase
        self.deadline = deadline
        if deadline < self.armed_at:
            self.worker.deadlines.arm(self)

    def begin_handler(self, deadline: float) -> None:
        """The app is about to run, with a time-out of its own or for a peer that has already gone."""
        self.handler_phase, self.handler_deadline = "request", deadline
        self.enter_handler()
        if self.transport.watch.hangup:
            self.peer_gone()

    def enter_handler(self) -> None:
        """Back in the app, after a wait of ours: what bounds it is what bounded it before."""
        self.phase = self.handler_phase
        self.deadline = self.handler_deadline
        # A task that the app has left running may come here when the connection is closed and forgotten.
        if self.handler_deadline < self.armed_at and not self.transport.watch.closed:
            self.worker.deadlines.arm(self)

    def resume_handler(self, waited: float) -> None:
        """Back in the app, after a wait for the peer that does not count against the app's own time-out."""
        if self.handler_phase == "request" and self.handler_deadline is not NEVER:
            self.handler_deadline += waited
        if self.transport.watch.writing and not self.transport.watch.closed:
            self.start_write()  # another task of the app still waits for the peer to read
        else:
            self.enter_handler()

    def start_write(self) -> None:
        """Enter a write that would block: bounded by its own phase, and by what bounds the handler anyway."""
        deadline = self.worker.clock() + self.worker.timeouts.response_write
        handler_is_bound = self.exchange is not None and not self.exchange.response_given
        if handler_is_bound and self.handler_deadline < deadline:
            self.enter_handler()
        else:
            self.transport.has_progressed()  # from here on
            self.start_phase("response_write", deadline)

    def expire(self) -> None:
        """Called by the reaper: the phase has lasted too long; cancel whatever the connection is doing."""
        if self.idle and self.transport.has_input():
            # The peer has spoken in time, but its task has not had its turn: look again when it must have had it.
            self.start_phase(self.phase, self.worker.clock() + 2 * TICK)
            return
        if self.phase == "response_write" and self.transport.has_progressed():
            self.start_write()
            return
        if self.phase == self.handler_phase and self.exchange is not None and self.exchange.response_given:
            # Only the app's answer had to be in time; work after it is not cancelled.
            self.handler_deadline = self.deadline = NEVER
            return
        self.late = self.phase
        late = self.worker.counters.late
        late[self.phase] = late.get(self.phase, 0) + 1
        self.scope.cancel(reason=f"late: {self.phase}")

    def peer_gone(self) -> None:
        """Called by the hub on FIN or RST: begin the grace after which the handler is cancelled.

        A FIN behind a body that has not been read yet is no news for the app: the clock starts when the body ends. Nor
        is one behind a response that the app has given: a peer that goes on reading gets it whole, be it a file.
        """
        exchange = self.exchange
        if exchange is None or exchange.response_given or self.handler_phase == "disconnect_grace":
            return
        if exchange.request_complete or self.transport.watch.reset:
            deadline = self.worker.clock() + self.worker.timeouts.disconnect_grace
            if deadline < self.handler_deadline:
                in_handler = self.phase == self.handler_phase
                self.handler_phase, self.handler_deadline = "disconnect_grace", deadline
                if in_handler:
                    self.enter_handler()

    def wake_for_drain(self) -> None:
        """A drain has begun: let an idle connection look at its socket a last time and close."""
        if self.idle:
            self.transport.watch.wake_reader()
