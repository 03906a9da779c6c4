"""The watchdog of the event loop: what it takes for blocked, whom it tells and when, and that it costs nothing.

Real loops, real threads and real time, since the watchdog exists for what virtual time cannot show; all of it in
tenths of a second, and once more where the machine stood still for as long (`undisturbed`).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from types import FrameType
from typing import Any, ClassVar

import pytest
import trio

from trioserve.observe import blocking
from trioserve.observe.blocking import Block, LoopWatch, call_within, is_debugged
from trioserve.testing import no_leaks, serving

from ..apps import respond
from ..disturbances import undisturbed
from ..threads import no_more_threads

pytestmark = pytest.mark.alone

# A loop on a busy machine may stand still for some tens of milliseconds without anybody's doing.
WARN = 0.3


class Notes:
    """A reporter that writes down what it is told; a block as (seconds, functions from the outermost in)."""

    def __init__(self) -> None:
        self.blocked: list[tuple[float, list[str]]] = []
        self.resumed: list[float] = []
        self.last_words: list[tuple[float, list[str]]] = []
        self.exits: list[int] = []

    def explain(self, block: Block) -> tuple[float, list[str]]:
        functions = []
        frame: FrameType | None = block.frame
        while frame is not None:
            functions.append(frame.f_code.co_name)
            frame = frame.f_back
        return block.seconds, functions[::-1]

    def note_blocked(self, explained: Any) -> None:
        self.blocked.append(explained)

    def note_resumed(self, seconds: float) -> None:
        self.resumed.append(seconds)

    def say_last_words(self, explained: Any) -> None:
        self.last_words.append(explained)


class Clocks:
    """Real time and CPU time, which can be set forward; counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.offset = self.cpu_offset = 0.0

    def monotonic(self) -> float:
        self.asked += 1
        return time.monotonic() + self.offset

    def cpu(self) -> float:
        return time.process_time() + self.cpu_offset

    def set_forward(self, seconds: float, *, cpu: float = 0.0) -> None:
        self.cpu_offset += cpu
        self.offset += seconds


class OwnTime(Clocks):
    """All time is CPU time: on a busy machine, too, the process is never starved."""

    def monotonic(self) -> float:
        return self.cpu()


@asynccontextmanager
async def watching(
    notes: Notes, warn: float | None = WARN, kill: float | None = None, clocks: Clocks | None = None
) -> AsyncIterator[LoopWatch]:
    clocks = clocks or Clocks()
    watch = LoopWatch(
        warn, kill, notes, clocks=(clocks.monotonic, clocks.cpu), exit_process=notes.exits.append
    )
    async with no_leaks():
        watch.start()
        try:
            yield watch
        finally:
            watch.stop()


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(30):
        while not condition():
            await trio.sleep(0.01)


async def settle(clocks: Clocks) -> None:
    """Return once nobody has looked at the clock for a while. The loop waits meanwhile."""
    await trio.to_thread.run_sync(wait_unasked, clocks)


def wait_unasked(clocks: Clocks) -> None:
    for _ in range(20):
        asked = clocks.asked
        time.sleep(2 * WARN)
        if clocks.asked == asked:
            return
    raise AssertionError("the watchdog does not come to rest")


def block_loop(seconds: float, until_told: list[Any] | None = None) -> None:
    """For so long; and until there is something in the list, since time in which nobody gets a CPU does not count."""
    time.sleep(seconds)
    end = time.monotonic() + 30
    while until_told is not None and not until_told and time.monotonic() < end:
        time.sleep(0.01)


async def spin(seconds: float) -> int:
    """Keep the loop busy, as it should be; returns how often it got round."""
    end = time.monotonic() + seconds
    turns = 0
    while time.monotonic() < end:
        await trio.lowlevel.cancel_shielded_checkpoint()
        turns += 1
    return turns


# -- what it tells -------------------------------------------------------------------------------------------


@undisturbed
async def test_a_block_is_told_of_once_while_it_lasts_and_once_when_it_is_over() -> None:
    notes = Notes()
    async with watching(notes) as watch:
        await trio.sleep(0.05)
        block_loop(3 * WARN, notes.blocked)
        ((seconds, functions),) = notes.blocked
        assert WARN <= seconds < 2 * WARN
        assert functions[-1] == "block_loop"
        assert notes.resumed == []
        await until(lambda: notes.resumed)
        assert notes.resumed[0] == pytest.approx(3 * WARN, abs=0.1)
        statistics = watch.statistics()
    assert (statistics.episodes, statistics.longest, statistics.blocked_for) == (1, notes.resumed[0], 0)
    assert len(notes.blocked) == len(notes.resumed) == 1
    assert notes.last_words == notes.exits == []


@undisturbed
async def test_each_block_is_an_episode_of_its_own() -> None:
    notes = Notes()
    async with watching(notes) as watch:
        for _ in range(2):
            block_loop(1.5 * WARN)
            await trio.sleep(0)
        await until(lambda: len(notes.resumed) == 2)
        assert watch.statistics().episodes == len(notes.blocked) == 2


@undisturbed
async def test_turns_that_are_long_but_not_too_long_are_not_told_of() -> None:
    notes = Notes()
    async with watching(notes) as watch:
        for _ in range(8):
            block_loop(WARN / 3)
            await trio.lowlevel.cancel_shielded_checkpoint()
    assert watch.statistics().episodes == 0
    assert notes.blocked == notes.resumed == []


@undisturbed
async def test_a_loop_that_is_always_busy_is_not_blocked_and_still_watched() -> None:
    notes = Notes()
    async with watching(notes):
        await spin(3 * WARN)
        assert notes.blocked == []
        block_loop(2 * WARN)
        assert len(notes.blocked) == 1
        await until(lambda: notes.resumed)
        # Without the instrument, the turn's beginning is known to a look.
        assert 1.5 * WARN < notes.resumed[0] < 2.5 * WARN


@undisturbed
async def test_a_loop_that_has_waited_for_long_is_watched_from_its_first_turn_on() -> None:
    notes, clocks = Notes(), Clocks()
    async with watching(notes, clocks=clocks):
        await settle(clocks)
        block_loop(1.5 * WARN, notes.blocked)
        assert len(notes.blocked) == 1


def test_any_thread_may_have_the_loop() -> None:
    notes = Notes()

    async def main() -> None:
        async with watching(notes):
            block_loop(1.5 * WARN, notes.blocked)

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    thread.join(60)
    assert [functions[-1] for _, functions in notes.blocked] == ["block_loop"]
    assert len(notes.resumed) == 1, "the end of the watch is the end of the block at the latest"


@undisturbed
async def test_it_describes_itself() -> None:
    notes = Notes()
    async with watching(notes) as watch:
        assert repr(watch) == "<LoopWatch not blocked, 0 blocks so far, longest 0.0 s>"
        block_loop(1.2 * WARN)
        assert repr(watch).startswith("<LoopWatch blocked for 0.3 s, 1 blocks so far, longest 0.3 s")


# -- the end of the process ----------------------------------------------------------------------------------


@undisturbed
async def test_a_loop_that_stays_blocked_ends_the_process_after_the_last_words() -> None:
    notes = Notes()
    async with watching(notes, kill=2 * WARN):
        block_loop(4 * WARN, notes.exits)
    assert len(notes.blocked) == 1
    ((seconds, functions),) = notes.last_words
    assert 2 * WARN <= seconds < 3.5 * WARN
    assert functions[-1] == "block_loop"
    assert notes.exits == [80]


@undisturbed
async def test_it_may_end_the_process_without_a_warning() -> None:
    notes = Notes()
    async with watching(notes, warn=None, kill=WARN):
        block_loop(2 * WARN, notes.exits)
    assert notes.blocked == notes.resumed == []
    assert (len(notes.last_words), notes.exits) == (1, [80])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@undisturbed
async def test_last_words_that_fail_do_not_keep_the_process_alive() -> None:
    class Failing(Notes):
        def say_last_words(self, explained: Any) -> None:
            raise OSError("no words")

    notes = Failing()
    async with watching(notes, kill=2 * WARN):
        block_loop(4 * WARN, notes.exits)
    assert notes.exits == [80]


def cost_of_a_million() -> float:
    """In CPU time, which is what the watchdog counts: on a busy machine more goes by than that."""
    began = time.thread_time()
    sum(range(10**6))
    return time.thread_time() - began


@undisturbed
async def test_code_that_keeps_the_gil_is_told_of_afterwards_and_does_not_end_a_process_that_goes_on() -> (
    None
):
    notes = Notes()
    size = int(10**6 * 4 * WARN / min(cost_of_a_million() for _ in range(5)))

    def keep_gil() -> None:
        sum(range(size))
        for _ in range(1000):
            pass  # the interpreter gives way here

    async with watching(notes, kill=1.5 * WARN, clocks=OwnTime()):
        await trio.sleep(0.05)
        keep_gil()
        await until(lambda: notes.resumed)
    ((seconds, functions),) = notes.blocked
    assert seconds > 1.5 * WARN
    assert functions[-1] == "keep_gil"
    assert notes.exits == []


# -- what does not count -------------------------------------------------------------------------------------


@pytest.mark.parametrize("parked", [True, False])
@undisturbed
async def test_time_in_which_the_process_did_not_run_does_not_count(parked: bool) -> None:
    """As after SIGSTOP and SIGCONT: the watchdog is late itself, and no CPU time has gone by."""
    notes, clocks = Notes(), Clocks()
    async with watching(notes, kill=10, clocks=clocks):
        if parked:
            await settle(clocks)
        block_loop(WARN / 3)
        clocks.set_forward(100)
        block_loop(WARN / 3)
        await spin(WARN)
    assert notes.blocked == notes.exits == []


@undisturbed
async def test_time_in_which_only_the_watchdog_did_not_run_counts() -> None:
    """As with code that keeps the GIL: the watchdog is late, but the process has worked."""
    notes, clocks = Notes(), Clocks()
    async with watching(notes, clocks=clocks):
        block_loop(WARN / 3)
        clocks.set_forward(100, cpu=100)
        block_loop(WARN / 2)
        await until(lambda: notes.resumed)
    assert notes.blocked[0][0] > 100


@undisturbed
async def test_a_loop_that_somebody_debugs_is_left_alone() -> None:
    notes = Notes()
    async with watching(notes, kill=2 * WARN):
        exec("from time import sleep; sleep(1)", {"__name__": "pdb"})
    assert notes.blocked == notes.exits == []


class Tracer:
    def __call__(self, *_arguments: object) -> None:
        pass


def test_who_traces_is_a_debugger_unless_it_is_coverage(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = sys._getframe()
    before = frame.f_trace
    assert not is_debugged(frame)
    try:
        for module, expected in [("coverage.tracer", False), ("bdb", True), ("somebodys", True)]:
            monkeypatch.setattr(Tracer, "__module__", module)
            frame.f_trace = Tracer()
            assert is_debugged(frame) is expected, module
    finally:
        frame.f_trace = before


def test_a_debugger_of_newer_pythons_is_known_without_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Monitoring:
        DEBUGGER_ID = 0
        tools: ClassVar = {0: "pydevd"}

        def get_tool(self, number: int) -> str | None:
            return self.tools.get(number)

    monkeypatch.setattr(sys, "monitoring", Monitoring(), raising=False)
    assert is_debugged(sys._getframe())
    monkeypatch.setattr(Monitoring, "tools", {2: "coverage"})
    assert not is_debugged(sys._getframe())


# -- what it costs -------------------------------------------------------------------------------------------


@undisturbed
async def test_a_loop_that_waits_is_not_looked_at() -> None:
    notes, clocks = Notes(), Clocks()
    async with watching(notes, clocks=clocks):
        await settle(clocks)  # which asserts it


@undisturbed
async def test_a_lone_wake_up_of_the_loop_costs_two_of_the_thread_and_none_of_the_loop() -> None:
    notes, clocks = Notes(), Clocks()
    async with watching(notes, clocks=clocks):
        await settle(clocks)
        turns = _Turns()
        trio.lowlevel.add_instrument(turns)
        asked = clocks.asked
        await settle(clocks)  # the work of a thread is such a wake-up, at its beginning and at its end
        trio.lowlevel.remove_instrument(turns)
        assert turns.count < 6
        # Two stamps for each turn, and a few for each of the thread's wake-ups.
        assert clocks.asked - asked < 2 * turns.count + 15


class _Turns(trio.abc.Instrument):
    count = 0

    def after_io_wait(self, timeout: float) -> None:
        self.count += 1


@undisturbed
async def test_a_busy_loop_is_stamped_for_a_few_turns_only() -> None:
    notes, clocks = Notes(), Clocks()
    async with watching(notes, clocks=clocks):
        turns = await spin(4 * WARN)
    looks = 4 * blocking.LOOKS + 2
    assert turns > 4000
    assert clocks.asked < looks * (2 * blocking.TURNS + 10)


# -- its own end ---------------------------------------------------------------------------------------------


def watchdogs() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "trioserve-loop-watch"]


async def test_stopping_twice_is_stopping_once() -> None:
    async with watching(Notes()) as watch:
        watch.stop()
        assert watchdogs() == []


@pytest.mark.parametrize("busy", [True, False])
def test_a_run_that_ends_without_a_word_is_not_blocked(busy: bool) -> None:
    """As when trio has broken down."""
    notes = Notes()
    watch = LoopWatch(WARN, None, notes)

    async def main() -> None:
        watch.start()
        await (spin(WARN) if busy else trio.sleep(WARN))

    trio.run(main)
    for thread in watchdogs():
        thread.join(10)
    assert watchdogs() == []
    assert notes.blocked == notes.resumed == []


@undisturbed
async def test_a_sign_of_life_that_comes_after_the_end_leaves_nothing_behind() -> None:
    notes, clocks = Notes(), Clocks()
    async with watching(notes, clocks=clocks) as watch:
        await spin(WARN)
        block_loop(WARN / 2)  # the thread asks meanwhile
        watch.stop()
        asked = clocks.asked
        await spin(0.05)
        assert clocks.asked <= asked + 1  # the answer's own


# -- calling within a time -----------------------------------------------------------------------------------


def test_what_hangs_is_left_to_itself() -> None:
    hang = threading.Event()
    began = time.monotonic()
    call_within(0.05, hang.wait)
    assert 0.05 <= time.monotonic() - began < 30
    hang.set()


def test_what_returns_has_been_called() -> None:
    called: list[object] = []
    call_within(10, called.extend, (1, 2))
    assert called == [1, 2]


def test_without_room_for_a_thread_it_goes_on() -> None:
    with no_more_threads():
        call_within(10, lambda: pytest.fail("it was called"))


async def test_a_worker_that_gets_no_thread_for_its_watchdog_serves_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with ExitStack() as room:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "lifespan":
                await receive()
                room.enter_context(no_more_threads())
                await send({"type": "lifespan.startup.complete"})
                await receive()
                await send({"type": "lifespan.shutdown.complete"})
            else:
                await respond(send)

        async with serving(app, block_warn=1.0) as server:
            assert (await server.get()).status == 200
    assert "no thread can be started to watch the event loop" in caplog.text
