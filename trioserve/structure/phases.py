"""Named waits with deadlines: what a connection and an HTTP/2 stream have in common.

Whoever serves a `Phased` says by `start_phase` what it waits for and until when; the reaper (`deadlines.py`) calls
`expire` on who is late. What bounds the app itself while none of our own waits is going on is kept beside that: the
handler's phase, which is the request's time-out or the grace after the peer has gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import trio

from trioserve.structure.deadlines import NEVER

if TYPE_CHECKING:
    from trioserve.net.transport import Transport
    from trioserve.observe.in_flight import Slot
    from trioserve.structure.context import Address, WorkerContext


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

    def outlasts(self, phase: str) -> bool:
        """The deadline of `phase` has passed; True if that is no end: the exchange has entered another phase."""
        ...

    def note_drain(self) -> None:
        """A drain has begun: end what would not end by itself."""
        ...

    def describe(self) -> dict[str, Any]:
        """Method, path without query, and the response's state, for logs and reports; no values of headers."""
        ...


class Phased:
    """Something that the reaper may end: it is served in a cancel scope, one named wait after another.

    Attributes:
        id: the connection's number, for logs.
        phase: the name of the wait that `deadline` belongs to (design: "phases"), also shown in the task tree.
        deadline: trio's clock; `NEVER` while no phase is running.
        handler_phase, handler_deadline: what bounds the app while no other phase does: nothing, the request's own
            time-out, or the grace after the peer has gone.
        late: the phase that the reaper ended, or "".
        exchange: what is being answered, or None.
        slot: its place in the table of requests in flight, if there is one with room.
    """

    __slots__ = (
        "__weakref__", "armed_at", "client", "deadline", "exchange", "handler_deadline", "handler_phase", "id",
        "late", "phase", "scheme", "scope", "server", "slot", "transport", "worker",
    )  # fmt: skip

    def __init__(
        self, worker: WorkerContext, transport: Transport, client: Address | None, server: Address | None
    ) -> None:
        self.worker = worker
        self.transport = transport
        self.client = client
        self.server = server
        self.scheme = "http"
        self.id = 0
        self.scope: trio.CancelScope
        self.exchange: RunningExchange | None = None
        self.slot: Slot | None = None
        self.phase = ""
        self.deadline = NEVER
        self.handler_phase = "request"
        self.handler_deadline = NEVER
        self.armed_at = NEVER
        self.late = ""

    # -- entering phases -------------------------------------------------------------------------------------

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
        if self.has_hangup():
            self.peer_gone()

    def enter_handler(self) -> None:
        """Back in the app, after a wait of ours: what bounds it is what bounded it before."""
        self.phase = self.handler_phase
        self.deadline = self.handler_deadline
        # A task that the app has left running may come here when the connection is closed and forgotten.
        if self.handler_deadline < self.armed_at and not self.is_closed():
            self.worker.deadlines.arm(self)

    def resume_handler(self, waited: float) -> None:
        """Back in the app, after a wait for the peer that does not count against the app's own time-out."""
        if self.handler_phase == "request" and self.handler_deadline is not NEVER:
            self.handler_deadline += waited
        if self.is_writing() and not self.is_closed():
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
            self.has_progressed()  # from here on
            self.start_phase("response_write", deadline)

    # -- being late ------------------------------------------------------------------------------------------

    def expire(self) -> None:
        """Called by the reaper: the phase has lasted too long; cancel whatever is being done."""
        if self.phase == "response_write" and self.has_progressed():
            self.start_write()
            return
        exchange = self.exchange
        if exchange is not None:
            if exchange.outlasts(self.phase):
                return
            if self.phase == self.handler_phase and exchange.response_given:
                # Only the app's answer had to be in time; work after it is not cancelled.
                self.handler_deadline = self.deadline = NEVER
                return
        self.late = self.phase
        self.worker.counters.late[self.phase] += 1
        self.scope.cancel(reason=self.why_cancelled())

    def why_cancelled(self) -> str | None:
        """The reason of its cancellation, as far as it was ours."""
        if self.late:
            return f"late: {self.late}"
        return f"drain: {self.worker.drain.reason}" if self.worker.drain.reason else None

    def peer_gone(self) -> None:
        """Called on FIN or RST: begin the grace after which the handler is cancelled.

        A FIN behind a body that has not been read yet is no news for the app: the clock starts when the body ends. Nor
        is one behind a response that the app has given: a peer that goes on reading gets it whole, be it a file.
        """
        exchange = self.exchange
        if exchange is None or exchange.response_given or self.handler_phase == "disconnect_grace":
            return
        if exchange.request_complete or self.is_reset():
            deadline = self.worker.clock() + self.worker.timeouts.disconnect_grace
            if deadline < self.handler_deadline:
                in_handler = self.phase == self.handler_phase
                self.handler_phase, self.handler_deadline = "disconnect_grace", deadline
                if in_handler:
                    self.enter_handler()
                elif self.phase == "response_write":
                    self.start_write()  # now bounded by the grace as well

    # -- what carries the bytes ------------------------------------------------------------------------------

    def is_closed(self) -> bool:
        """It has ended; only a task that the app has left running may still ask."""
        return self.transport.watch.closed

    def has_hangup(self) -> bool:
        """The peer has said that it will send nothing more, or is gone."""
        return self.transport.watch.hangup

    def is_reset(self) -> bool:
        """Both directions are dead."""
        return self.transport.watch.reset

    def is_writing(self) -> bool:
        """Somebody waits for room to write."""
        return self.transport.watch.writing

    def has_progressed(self) -> bool:
        """The peer has taken bytes of ours since this was last asked."""
        return self.transport.has_progressed()
