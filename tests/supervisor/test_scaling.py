"""The setting `workers`, and the number of workers over a time in which it or the load changes; the time is virtual."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest
import trio
import trio.testing

from trioserve.supervisor import scaling
from trioserve.supervisor.scaling import Scaling, wanted_workers


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    """Nothing here is outside of trio, so no time is too short for a jump."""
    return trio.testing.MockClock(autojump_threshold=0)


class OneWorker:
    def __init__(self, pid: int) -> None:
        self.pid = pid


class Pool:
    """As many workers as are wanted, at once; each uses `use` of a CPU."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.most = 0
        self.stopping = False
        self.use = 0.0
        self.scaled: list[tuple[float, int]] = []

    def ready(self) -> list[OneWorker]:
        return [OneWorker(number) for number in range(self.wanted)]

    def scale(self, wanted: int) -> None:
        self.wanted = wanted
        self.scaled.append((trio.current_time(), wanted))


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    found = Pool(1)
    used: dict[int, tuple[float, float]] = {}

    def cpu_seconds(pid: int) -> float:
        now = trio.current_time()
        before, total = used.get(pid, (now, 0.0))
        used[pid] = now, total + (now - before) * found.use
        return used[pid][1]

    monkeypatch.setattr(scaling, "cpu_seconds", cpu_seconds)
    return found


def of(pool: Any) -> Scaling:
    return Scaling(pool, logging.getLogger(__name__))


@pytest.mark.parametrize("setting, expected", [(3, (3, 3)), (0, (0, 0)), ("2..8", (2, 8)), ("1..1", (1, 1))])
def test_what_a_setting_asks_for(setting: int | str, expected: tuple[int, int]) -> None:
    assert wanted_workers(setting) == expected


def test_auto_is_one_for_each_usable_cpu() -> None:
    low, high = wanted_workers("auto")
    assert 1 <= low == high <= (os.cpu_count() or 1)


@pytest.mark.parametrize("now, setting, nearest", [(1, "2..4", 2), (3, "2..4", 3), (9, "2..4", 4), (3, 2, 2)])
def test_a_new_setting_moves_the_number_no_further_than_it_must(
    pool: Pool, now: int, setting: int | str, nearest: int
) -> None:
    pool.wanted = now
    found = of(pool)
    assert found.set(setting) == nearest
    assert (pool.wanted, pool.most) == (now, found.high)


async def test_it_follows_the_load(pool: Pool, autojump_clock: trio.testing.MockClock) -> None:
    found = of(pool)
    found.set("1..3")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.run)
        pool.use = 1.0
        await trio.sleep(60)
        assert [wanted for _, wanted in pool.scaled] == [2, 3]
        pool.use = 0.0
        await trio.sleep(300)
        assert [wanted for _, wanted in pool.scaled] == [2, 3, 2, 1]
        nursery.cancel_scope.cancel()


async def test_who_stops_is_not_scaled(pool: Pool, autojump_clock: trio.testing.MockClock) -> None:
    found = of(pool)
    found.set("1..3")
    pool.use, pool.stopping = 1.0, True
    with trio.move_on_after(60):
        await found.run()
    assert pool.scaled == []


async def test_the_range_can_change_go_and_come_back(
    pool: Pool, autojump_clock: trio.testing.MockClock
) -> None:
    found = of(pool)
    found.set(1)
    pool.use = 1.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.run)
        await trio.sleep(100)
        assert pool.scaled == []
        found.set("1..2")
        await trio.sleep(100)
        assert [wanted for _, wanted in pool.scaled] == [2]
        found.set("1..3")
        await trio.sleep(100)
        assert [wanted for _, wanted in pool.scaled] == [2, 3]
        pool.scale(found.set(2))
        await trio.sleep(1000)
        assert [wanted for _, wanted in pool.scaled] == [2, 3, 2]
        nursery.cancel_scope.cancel()


async def test_it_wakes_as_often_as_there_is_something_to_see(
    pool: Pool, autojump_clock: trio.testing.MockClock
) -> None:
    found = of(pool)
    found.set(2)
    steps = 0

    class Watch(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            nonlocal steps
            steps += task.name == "scaling"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.run, name="scaling")
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.add_instrument(Watch())
        await trio.sleep(3600)
        assert steps == 0
        found.set("2..3")
        pool.use = 0.5
        await trio.sleep(10)
        assert 10 <= steps <= 12, "once a second while there is a load"
        pool.use = 0.01
        await trio.sleep(10)
        steps = 0
        await trio.sleep(1000)
        assert 199 <= steps <= 201, "and seldom while there is none"
        pool.use = 1.0
        await trio.sleep(25)
        assert pool.wanted == 3, "yet in time"
        nursery.cancel_scope.cancel()
