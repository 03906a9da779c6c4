"""The watchdog of the event loop: a thread that notices when the loop no longer gets round (row H1).

`worker.py` makes one `LoopWatch` once connections are accepted and stops it before the lifespan's shutdown: a startup
may block to load a model, nobody being served yet, and the shutdown has the hard exit behind it. What is said about a
blocked loop, and to whom, is the business of a `Reporter` (`structure/blocked_loop.py`). Nothing here awaits, so there
is nothing to cancel.

**How it knows, and what that costs.** An instrument of trio that stays in place costs 1.5 to 3 µs a turn of the loop,
which is a turn or two per request. So this one comes and goes:

- In place, it stamps the ends of each wait for I/O. The thread reads from it when the current turn began, or that the
  loop waits. It takes itself out after `TURNS` turns: a loop that is busy pays for it no more than that.
- While it is out, the thread asks for a sign of life every quarter of `block_warn` (`run_sync_soon`); the answer puts
  it back. Measured: 0.3 to 0.5 ms each, both threads and all stamps included; 0.1 to 0.2 % of a core that is busy.
  From asking on, a loop that does not answer counts as blocked.
- When the loop waits, the thread parks, without a time-out. The end of the wait wakes it, once. So a worker without
  work causes no wake-up at all; one that is woken now and then (a heartbeat, a request) causes two each time.

Only public API of trio, and the loop's own word for it that it waits; guest mode is no exception. A block that is
longer than 1.25 `block_warn` is always seen, a shorter one than `block_warn` never.

**What does not count.** Time in which the process did not run at all: stopped (SIGSTOP, a debugger from outside),
suspended, or starved of CPU. It shows in the thread's own lateness together with the CPU time that went by
meanwhile. And a loop whose thread is under a Python debugger: nothing is said and nothing done.

**What it cannot see in time.** C code that keeps the GIL (a regular expression gone wrong, a huge `sorted`) stops this
thread as well. It is told of when the GIL is free again, usually with the right stack, but it is not ended by
`block_kill`, for which two looks must find the loop in the same turn; only another process could. C code that keeps
the GIL and sleeps looks like a stopped process and is not told of at all.

**Why nothing here waits for ever.** What holds up the loop may hold locks, of a log handler for one. So whatever
writes runs in a thread of its own, for which this one waits a bounded time: `call_within`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import trio

from trioserve.errors import EXIT_LOOP_BLOCKED

# Looks at the loop per `block_warn` while it works: by a quarter of it at most, a block is told of late.
LOOKS = 4
# Turns of the loop that are stamped before the instrument takes itself out; a lone request takes two or three.
TURNS = 16
# Closer looks than this would be spoilt by the interpreter's switch interval (5 ms); rarer ones would save nothing.
SHORTEST_LOOK = 0.005
LONGEST_LOOK = 1.0
# How late the thread may be before it asks why.
LATENESS = 0.05
# How long a watchdog waits for a line to be logged, and for the last words of the process: 1 s for a stderr that
# nobody reads, 0.75 s for the logs, and time for a report of a large process on a slow disk.
LINE_PATIENCE = 1.0
LAST_WORDS = 5.0

# Top-level modules whose frames on the loop's thread mean that a person holds it.
_DEBUGGERS = frozenset(
    {"bdb", "debugpy", "pdb", "pudb", "pydevd", "_pydevd_bundle", "_pydevd_sys_monitoring"}
)


@dataclass(frozen=True, slots=True)
class Block:
    """A loop that is blocked at this moment: for how long, and where its thread is."""

    seconds: float
    frame: FrameType


@dataclass(frozen=True, slots=True)
class BlockStatistics:
    """What a `LoopWatch` has seen: how many blocks longer than `block_warn`, the longest, and a current one."""

    episodes: int
    longest: float
    blocked_for: float


class Reporter(Protocol):
    """Who is told. Called in the watchdog's thread, which it must hold up for a bounded time only (`call_within`)."""

    def explain(self, block: Block) -> Any:
        """What is to be known of a block, taken down while it lasts: without input or output, locks, or sleep.

        The result is handed to the next two. With a Python function of the loop's thread between two C calls, the
        loop would go on as soon as this thread gives up the GIL.
        """
        ...

    def note_blocked(self, explained: Any) -> None:
        """The loop has been blocked for `block_warn`; once a block."""
        ...

    def say_last_words(self, explained: Any) -> None:
        """The loop has been blocked for `block_kill`: the process ends when this returns."""
        ...

    def note_resumed(self, seconds: float) -> None:
        """The loop goes on, after `seconds` in all."""
        ...


class LoopWatch:
    """The thread and what it has seen.

    Args:
        warn_after, kill_after: seconds, or None for never; not both None.
        reporter: who is told.
        clocks: monotonic time, and the CPU time of the process.
        exit_process: how the process ends.
    """

    def __init__(
        self,
        warn_after: float | None,
        kill_after: float | None,
        reporter: Reporter,
        *,
        clocks: tuple[Callable[[], float], Callable[[], float]] = (time.monotonic, time.process_time),
        exit_process: Callable[[int], object] = os._exit,
    ) -> None:
        self._warn_after, self._kill_after = warn_after, kill_after
        self._reporter = reporter
        self._clock, self._cpu_clock = clocks
        self._exit_process = exit_process
        first = kill_after if warn_after is None else warn_after
        assert first is not None, "there is nothing to watch for"
        self._interval = min(max(first / LOOKS, SHORTEST_LOOK), LONGEST_LOOK)
        self._wake = threading.Event()
        self._pulse = _Pulse(self._wake, *clocks)
        self._turn = _TurnTimer()
        self._thread = threading.Thread(target=self._run, name="trioserve-loop-watch", daemon=True)
        self._token: trio.lowlevel.TrioToken
        self._loop_thread = 0
        self._stopping = False
        # When the loop was last asked for a sign of life, and how many it had given by then.
        self._asked: tuple[float, int] | None = None
        # When the turn began that has been told of, as long as it lasts.
        self._episode: float | None = None
        # When the turn began that was found to last for `kill_after`.
        self._condemned: float | None = None
        self._episodes = 0
        self._longest = 0.0
        self._seconds = 0.0

    def __repr__(self) -> str:
        now = self.statistics()
        state = f"blocked for {now.blocked_for:.1f} s" if now.blocked_for else "not blocked"
        return f"<LoopWatch {state}, {now.episodes} blocks so far, longest {now.longest:.1f} s>"

    def statistics(self) -> BlockStatistics:
        """A frozen picture; from any thread."""
        current = self._seconds if self._episode is not None else 0.0
        return BlockStatistics(self._episodes, max(self._longest, current), current)

    def start(self) -> None:
        """Begin watching the trio run, and the thread, in which this is called.

        Raises:
            RuntimeError: no thread can be started. There is nothing to stop.
        """
        self._token = trio.lowlevel.current_trio_token()
        self._loop_thread = threading.get_ident()
        self._pulse.beat()
        try:
            self._thread.start()
        except RuntimeError:
            self._pulse.take_out(for_good=True)
            raise

    def stop(self) -> None:
        """End the thread and leave nothing in trio. Idempotent; to be called where `start` was."""
        self._stopping = True
        self._pulse.take_out(for_good=True)
        self._wake.set()
        # It may be about to log a line, which is bounded; it is a daemon, so nothing depends on its end.
        self._thread.join(LINE_PATIENCE)

    # -- in the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        with suppress(trio.RunFinishedError):
            while not self._stopping:
                if self._episode is None and self._pulse.is_waiting():
                    self._park()
                self._sleep(self._seconds_to_next_look())
                if not self._stopping:
                    self._look()
            if self._episode is not None:
                self._reporter.note_resumed(self._end_episode())

    def _park(self) -> None:
        """Until the loop's wait is over. Its first turn afterwards is timed from there."""
        pulse = self._pulse
        self._wake.clear()
        pulse.park()
        if pulse.waiting and not self._stopping:
            self._wake.wait()
            self._turn.note_pause(self._clock() - pulse.at, self._cpu_clock() - pulse.cpu_at_wake)
        pulse.parked = False

    def _seconds_to_next_look(self) -> float:
        """A quarter of the first threshold, or less where one is about to be reached."""
        thresholds = (self._warn_after, self._kill_after)
        left = [seconds - self._seconds for seconds in thresholds if seconds and seconds > self._seconds]
        return max(SHORTEST_LOOK, min([self._interval, *left]))

    def _sleep(self, seconds: float) -> None:
        self._wake.clear()
        if self._stopping:
            return
        began, cpu = self._clock(), self._cpu_clock()
        self._wake.wait(seconds)
        self._turn.note_pause(self._clock() - began - seconds, self._cpu_clock() - cpu)

    def _look(self) -> None:
        now = self._clock()
        began = self._current_turn(now)
        resumed_after = None
        if self._episode is not None and began != self._episode:
            resumed_after = self._end_episode()
        if self._episode is None:
            self._pulse.resumed_at = None
        self._seconds = self._turn.read(began, now)
        # First of all: whatever else is done here may let the loop go on.
        explained = None if began is None else self._explain(now)
        if resumed_after is not None:
            self._reporter.note_resumed(resumed_after)
        if explained is None:
            return
        # A run that has ended without a word to us is not blocked: this raises then.
        self._ask()
        if self._is_news():
            self._episode = began
            self._episodes += 1
            self._reporter.note_blocked(explained)
        elif self._condemned == began:
            self._end_process(explained)
        if self._is_fatal():
            self._condemned = began

    def _explain(self, now: float) -> Any:
        """The block in the reporter's terms, if there is one to be told of."""
        if not self._is_news() and not self._is_fatal():
            return None
        frame = sys._current_frames().get(self._loop_thread)  # documented, in spite of its name
        if frame is None or is_debugged(frame):
            self._turn.forgive(now)
            self._seconds = 0.0
            return None
        return self._reporter.explain(Block(self._seconds, frame))

    def _is_news(self) -> bool:
        return self._episode is None and self._warn_after is not None and self._seconds >= self._warn_after

    def _is_fatal(self) -> bool:
        return self._kill_after is not None and self._seconds >= self._kill_after

    def _current_turn(self, now: float) -> float | None:
        """When the turn of the loop began that is still going on, as far as is known; None while it waits."""
        pulse = self._pulse
        if pulse.in_place:
            return None if pulse.waiting else pulse.at
        if self._asked is None or pulse.beats != self._asked[1]:
            self._asked = (now, pulse.beats)
            self._ask()
        return self._asked[0]

    def _ask(self) -> None:
        self._token.run_sync_soon(self._pulse.beat, idempotent=True)

    def _end_episode(self) -> float:
        """The length of the block that is over, by the first stamp behind it."""
        assert self._episode is not None
        pulse = self._pulse
        resumed_at = pulse.at if pulse.resumed_at is None else pulse.resumed_at
        seconds = self._turn.length_until(resumed_at)
        self._episode = None
        self._longest = max(self._longest, seconds)
        return seconds

    def _end_process(self, explained: Any) -> None:
        self._stopping, self._episode = True, None
        try:
            self._reporter.say_last_words(explained)
        finally:
            self._exit_process(EXIT_LOOP_BLOCKED)


class _Pulse(trio.abc.Instrument):
    """What the loop leaves for the thread to read: stamps of its turns, for as long as the instrument is in place.

    Attributes are written in the order in which the thread may rely on them: a stamp before what it belongs to.

    Attributes:
        at: the last stamp: the end of a wait while a turn goes on, its beginning while the loop waits.
        waiting: the loop waits for I/O or a deadline; not for a mere look at what is ready.
        in_place: trio calls us.
        beats: signs of life that were asked for.
        parked: the thread is to be woken when the wait ends.
        resumed_at: the first stamp since the thread has set it to None.
        cpu_at_wake: CPU time of the process when the thread was woken.
    """

    def __init__(
        self, wake: threading.Event, clock: Callable[[], float], cpu_clock: Callable[[], float]
    ) -> None:
        self._wake = wake
        self._clock, self._cpu_clock = clock, cpu_clock
        self._turns_left = TURNS
        self._ended = False
        self.at = 0.0
        self.waiting = False
        self.in_place = False
        self.beats = 0
        self.parked = False
        self.resumed_at: float | None = None
        self.cpu_at_wake = 0.0

    # -- in the loop -----------------------------------------------------------------------------------------

    def before_io_wait(self, timeout: float) -> None:
        self._stamp()
        self.waiting = timeout > 0

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - trio's signature
        self._stamp()
        self.waiting = False
        if self.parked:
            self.parked = False
            self.cpu_at_wake = self._cpu_clock()
            self._wake.set()
        self._turns_left -= 1
        if self._turns_left <= 0:
            self.take_out()

    def beat(self) -> None:
        """Give a sign of life, and be in place from here on."""
        self._stamp()
        self.waiting = False
        self.beats += 1
        if not self.in_place and not self._ended:
            self._turns_left = TURNS
            trio.lowlevel.add_instrument(self)
            self.in_place = True

    def take_out(self, *, for_good: bool = False) -> None:
        """Have trio call us no more until the next `beat`, or ever."""
        if for_good:
            self._ended = True
            self._stamp()
        if self.in_place:
            self.in_place = False
            # KeyError: trio has thrown us out; RuntimeError: its run has broken down, and we are called on its way.
            with suppress(KeyError, RuntimeError):
                trio.lowlevel.remove_instrument(self)

    def _stamp(self) -> None:
        self.at = now = self._clock()
        if self.resumed_at is None:
            self.resumed_at = now

    # -- in the thread ---------------------------------------------------------------------------------------

    def is_waiting(self) -> bool:
        """The loop waits, and will say so when it no longer does."""
        return self.in_place and self.waiting

    def park(self) -> None:
        """Ask to be woken when the wait ends; to be followed by a look at `waiting`, which may be over by now."""
        self._turns_left = TURNS
        self.parked = True


class _TurnTimer:
    """How long a turn of the loop has lasted, less the time in which the process did not run. Pure."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._lost = 0.0
        self._pauses = 0.0

    def note_pause(self, late: float, ran: float) -> None:
        """The thread came `late` seconds late, in which the process had `ran` seconds of CPU.

        A late thread in a process that worked was kept from the GIL, and the loop's time is real. In one that did
        not, everybody stood still.
        """
        if late > LATENESS and ran < late / 2:
            self._pauses += late

    def read(self, began: float | None, now: float) -> float:
        """Seconds of the turn that began then. Pauses since the last reading are taken off, the turn's or not."""
        if began != self._began:
            self._began, self._lost = began, 0.0
        self._lost += self._pauses
        self._pauses = 0.0
        return 0.0 if began is None else max(0.0, now - began - self._lost)

    def length_until(self, end: float) -> float:
        """Seconds of the turn that was read last, from its beginning to `end`."""
        return 0.0 if self._began is None else max(0.0, end - self._began - self._lost)

    def forgive(self, now: float) -> None:
        """Start the current turn anew."""
        if self._began is not None:
            self._lost = now - self._began


# -- what else it asks and does ------------------------------------------------------------------------------


def is_debugged(frame: FrameType) -> bool:
    """The thread whose innermost frame this is stands in a debugger, or is traced by one."""
    monitoring: Any = getattr(sys, "monitoring", None)  # Python 3.12 and later
    if monitoring is not None and monitoring.get_tool(monitoring.DEBUGGER_ID) is not None:
        return True
    current: FrameType | None = frame
    while current is not None:
        if _top_level(current.f_globals.get("__name__")) in _DEBUGGERS:
            return True
        trace = current.f_trace
        # Coverage traces in the same way, and nobody sits in front of it.
        if trace is not None and _top_level(_module_of(trace)) != "coverage":
            return True
        current = current.f_back
    return False


def _module_of(function: object) -> object:
    return getattr(function, "__module__", None) or type(function).__module__


def _top_level(module: object) -> str:
    return str(module).partition(".")[0]


def call_within(seconds: float, function: Callable[..., None], *arguments: object) -> None:
    """Call it in a thread of its own, and wait that long for it to return; what it raises goes to stderr.

    For watchdogs, which must go on even if whoever they watch holds a lock that is needed here.
    """
    thread = threading.Thread(target=function, args=arguments, name="trioserve-watchdog-report", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return  # no room for another thread; the watchdog must do what it is for without words
    thread.join(seconds)
