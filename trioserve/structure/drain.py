"""How a worker ends: RUNNING -> DRAINING -> CANCELLING -> STOPPED, each step taken once, by anyone, in any order.

The worker makes one `Drain`; signals, the shutdown trigger, the caller's cancellation and the boundary call
`begin()` or `hurry()`; `worker.py` waits for the steps and carries them out. Nothing here blocks or raises.

Why it cannot be delayed: each step has a deadline of its own. `grace` bounds DRAINING, `CLEANUP_SECONDS` bounds
CANCELLING, the lifespan's shutdown has its reserved time, and where the process is ours to end, a watchdog thread
ends it `hard_exit_after` seconds past all of these, even if an app blocks the loop or eats `Cancelled` for ever.
"""

from __future__ import annotations

import enum
import math
import os
import threading
from collections.abc import Callable

import trio

from trioserve.observe.blocking import LAST_WORDS, call_within

# Time for handlers to unwind after they were cancelled; async cleanup beyond it is cut by the next step.
CLEANUP_SECONDS = 2.0


class DrainState(enum.Enum):
    """Where the worker is between serving and gone."""

    #: accepting and serving
    RUNNING = "running"
    #: no new connections; idle ones closed; requests in flight finish, with `Connection: close`
    DRAINING = "draining"
    #: the grace is over: what still runs is cancelled
    CANCELLING = "cancelling"
    #: no connection is left
    STOPPED = "stopped"


_ORDER = list(DrainState)


class Drain:
    """The state of the worker's end, why it ends, and how long it may take.

    Attributes:
        state: the current `DrainState`.
        reason: what began the drain, for logs; empty while running.
        grace: seconds that requests in flight get.
        delay: seconds after `begin()` in which everything is still accepted and served; 0 once something has gone
            wrong, or for who cannot wait at all.
        serve_until, deadline: when `delay` is over, and when `delay` and `grace` are; trio's clock.
        cut_lifespan: True where the app's lifespan may not be trusted to shut down (a fatal verdict).
    """

    def __init__(self, grace: float, delay: float = 0.0) -> None:
        self.state = DrainState.RUNNING
        self.reason = ""
        self.grace = grace
        self.delay = delay if grace else 0.0
        self.serve_until = self.deadline = math.inf
        self.cut_lifespan = False
        self._changed = {state: trio.Event() for state in DrainState}
        self._shortened = trio.Event()
        self._observers: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return f"<Drain {self.state.value}{': ' + self.reason if self.reason else ''}>"

    def on_begin(self, observer: Callable[[], None]) -> None:
        """Call `observer` synchronously when the drain begins (readiness turns false first of all)."""
        self._observers.append(observer)

    def begin(self, reason: str, *, grace: float | None = None, fatal: bool = False) -> None:
        """Start draining; once begun, a further call can only shorten the grace, never lengthen it.

        Args:
            reason: for logs, in words that follow "draining:".
            grace: of this cause, which also suffers no delay; None for the configured ones.
            fatal: the app's lifespan is not to be shut down.
        """
        if grace is not None:
            self.grace, self.delay = min(self.grace, grace), 0.0
        now = trio.current_time()
        self.serve_until = min(self.serve_until, now + self.delay)
        self.deadline = min(self.deadline, now + self.delay + self.grace)
        self._shortened.set()
        self._shortened = trio.Event()
        self.cut_lifespan = self.cut_lifespan or fatal
        if self.state is DrainState.RUNNING:
            self.reason = reason
            self.advance(DrainState.DRAINING)
            for observer in self._observers:
                observer()

    def hurry(self, reason: str) -> None:
        """Skip what is left of the grace (a second signal)."""
        self.begin(reason, grace=0)
        self.advance(DrainState.CANCELLING)

    def advance(self, state: DrainState) -> None:
        """Move to `state`; going back or standing still is no error and does nothing."""
        if _ORDER.index(state) > _ORDER.index(self.state):
            for passed in _ORDER[: _ORDER.index(state) + 1]:
                self._changed[passed].set()
            self.state = state

    async def wait(self, state: DrainState) -> None:
        """Return once `state` has been reached or passed."""
        await self._changed[state].wait()

    async def wait_delay(self) -> None:
        """Return at `serve_until`, also if that is brought forward meanwhile."""
        await self._wait_until(lambda: self.serve_until)

    async def wait_grace(self) -> None:
        """Return at `deadline`, also if that is brought forward meanwhile."""
        await self._wait_until(lambda: self.deadline)

    async def _wait_until(self, moment: Callable[[], float]) -> None:
        while (until := moment()) > trio.current_time():
            with trio.move_on_at(until):
                await self._shortened.wait()


class HardExit:
    """A thread that ends the process if the drain has not, whatever the event loop is doing.

    Only for a process that is ours (the command, `trioserve.run`), never in library use.
    """

    def __init__(self, on_exit: Callable[[], None], exit_code: int) -> None:
        self._on_exit = on_exit
        self._exit_code = exit_code
        self._disarmed = threading.Event()
        self._thread: threading.Thread | None = None

    def arm(self, seconds: float) -> bool:
        """Start counting; later calls are ignored, so that nobody can push the exit further away.

        False if no thread can be started (pids.max, TasksMax): the drain must end without one behind it.
        """
        if self._thread is None:
            thread = threading.Thread(
                target=self._watch, args=(seconds,), name="trioserve-hard-exit", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:
                return False
            self._thread = thread
        return True

    def disarm(self) -> None:
        """The process ends by itself; stop the thread."""
        self._disarmed.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, seconds: float) -> None:
        if not self._disarmed.wait(seconds):
            call_within(LAST_WORDS, self._on_exit)
            os._exit(self._exit_code)
