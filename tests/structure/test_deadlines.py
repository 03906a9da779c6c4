"""The reaper by itself: it acts on whoever is late, in time, and on nobody else."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from trioserve.structure.deadlines import NEVER, TICK, Deadlines


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    """Nothing here is in flight between sockets."""
    return trio.testing.MockClock(autojump_threshold=0)


class Entry:
    """Something with a deadline; notes when it was acted on."""

    def __init__(self, deadline: float = NEVER) -> None:
        self.deadline = deadline
        self.armed_at = NEVER
        self.expired: list[float] = []

    def expire(self) -> None:
        self.expired.append(trio.current_time())
        self.deadline = NEVER


@asynccontextmanager
async def reaping() -> AsyncIterator[Deadlines]:
    deadlines = Deadlines()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(deadlines.run)
        yield deadlines
        nursery.cancel_scope.cancel()


async def test_a_deadline_is_met_at_most_a_tick_late_and_never_early(autojump_clock: Any) -> None:
    now = trio.current_time()
    rng = random.Random(7)
    entries = {Entry(): now + rng.uniform(0, 100) for _ in range(200)}
    async with reaping() as deadlines:
        for entry, due in entries.items():
            entry.deadline = due
            deadlines.arm(entry)
        await trio.sleep(101)
    for entry, due in entries.items():
        (at,) = entry.expired
        assert due <= at <= due + TICK + 1e-6
    assert deadlines.armed == 0


async def test_a_deadline_that_has_moved_later_by_assignment_alone_is_honoured(autojump_clock: Any) -> None:
    entry = Entry(trio.current_time() + 5)
    async with reaping() as deadlines:
        deadlines.arm(entry)
        await trio.sleep(4)
        entry.deadline = due = trio.current_time() + 5
        await trio.sleep(4)
        assert not entry.expired
        await trio.sleep(2)
    assert entry.expired == [pytest.approx(due, abs=TICK + 1e-6)]


async def test_a_deadline_that_has_moved_earlier_needs_arming_and_gets_it(autojump_clock: Any) -> None:
    entry = Entry(trio.current_time() + 500)
    async with reaping() as deadlines:
        deadlines.arm(entry)
        await trio.sleep(1)
        entry.deadline = due = trio.current_time() + 1
        deadlines.arm(entry)
        assert deadlines.armed == 1
        await trio.sleep(2)
    assert entry.expired == [pytest.approx(due, abs=TICK + 1e-6)]


async def test_a_deadline_that_became_never_lets_go_of_the_entry(autojump_clock: Any) -> None:
    entry = Entry(trio.current_time() + 1)
    async with reaping() as deadlines:
        deadlines.arm(entry)
        entry.deadline = NEVER
        await trio.sleep(2)
        assert deadlines.armed == 0
        assert entry.armed_at == NEVER
        entry.deadline = trio.current_time() + 1  # and it can be armed anew
        deadlines.arm(entry)
        await trio.sleep(2)
    assert len(entry.expired) == 1


async def test_disarmed_is_never_acted_on(autojump_clock: Any) -> None:
    entries = [Entry(trio.current_time() + n / 7) for n in range(50)]
    async with reaping() as deadlines:
        for entry in entries:
            deadlines.arm(entry)
        assert deadlines.armed == 50
        for entry in entries[::2]:
            deadlines.disarm(entry)
        deadlines.disarm(Entry())  # that was never armed
        await trio.sleep(10)
    assert [len(entry.expired) for entry in entries] == [0, 1] * 25


async def test_one_in_the_past_is_acted_on_at_once(autojump_clock: Any) -> None:
    await trio.sleep(100)
    entry = Entry(trio.current_time() - 50)
    async with reaping() as deadlines:
        deadlines.arm(entry)
        await trio.sleep(TICK)
    assert len(entry.expired) == 1


async def test_an_entry_may_be_armed_again_while_it_is_acted_on(autojump_clock: Any) -> None:
    class Again(Entry):
        def expire(self) -> None:
            super().expire()
            if len(self.expired) < 3:
                self.deadline = trio.current_time() + 1
                deadlines.arm(self)

    async with reaping() as deadlines:
        entry = Again(trio.current_time() + 1)
        deadlines.arm(entry)
        await trio.sleep(10)
    assert len(entry.expired) == 3
    assert deadlines.armed == 0


async def test_with_nothing_armed_it_does_not_wake() -> None:
    async with reaping():
        await trio.testing.wait_all_tasks_blocked()
        assert trio.lowlevel.current_statistics().seconds_to_next_deadline == NEVER


async def test_thousands_that_are_due_together_share_one_wake_up(autojump_clock: Any) -> None:
    class Wakes(trio.abc.Instrument):
        count = 0

        def before_task_step(self, task: Any) -> None:
            self.count += task.name.endswith("Deadlines.run")

    wakes = Wakes()
    due = trio.current_time() + 10
    async with reaping() as deadlines:
        await trio.testing.wait_all_tasks_blocked(0.01)
        trio.lowlevel.add_instrument(wakes)
        for _ in range(5000):
            deadlines.arm(Entry(due))
        await trio.sleep(11)
        trio.lowlevel.remove_instrument(wakes)
    assert wakes.count <= 2
