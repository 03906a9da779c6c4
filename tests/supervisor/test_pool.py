"""The pool with workers that are no processes, in virtual time: who goes when others fail."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from trioserve.config import Config
from trioserve.net.share_board import ShareBoard
from trioserve.supervisor import pool
from trioserve.supervisor.pool import WorkerPool
from trioserve.supervisor.restart_policy import RestartPolicy
from trioserve.supervisor.worker_process import Orders, WorkerProcess, WorkerState

# What a boot takes.
BOOT = 1.0


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    """Nothing here is outside of trio, so no time is too short for a jump."""
    return trio.testing.MockClock(autojump_threshold=0)


class FakeWorker(WorkerProcess):
    """Gets ready after a while, and ends when it is told to, or so many seconds later."""

    pid = 0
    status: int | None = None  # type: ignore[assignment]

    def __init__(self, number: int, place: int, orders: Orders, now: float, serves: float) -> None:
        self.id, self.place, self.generation = number, place, orders.generation
        self.state, self.started_at, self.ready_at = WorkerState.STARTING, now, None
        self.leaving = self.asked = self.failure = ""
        self.is_tainted, self.ends_with, self.has_closed = False, None, False
        self.config, self.sockets = orders.config, ()
        self.heartbeat_at, self.statistics, self.own_report, self._spared = None, {}, None, {}
        self.heard, self.gone = trio.Event(), trio.Event()
        self._serves = serves
        self.told: list[str] = []
        self._told = trio.Event()
        self.says, heard = trio.open_memory_channel[dict[str, Any]](2)
        self.link: Any = heard

    async def send_orders(self, orders: Orders) -> None:
        await trio.sleep(BOOT)
        self.says.send_nowait({"is": "ready"})

    async def wait(self) -> int:
        with trio.move_on_after(BOOT + self._serves):
            await self._told.wait()
        self.status = 0 if self._told.is_set() else 1
        return self.status

    def tell(self, order: str, **details: Any) -> bool:
        self.told.append(order)
        return True

    def drain(self, reason: str, left_to_others: Any = ()) -> None:
        self.asked = f"drain: {reason}"
        self.state = WorkerState.DRAINING
        self._told.set()

    def close(self) -> None:
        self.state = WorkerState.GONE
        self.heard.set()
        self.gone.set()


class FakeDesk:
    def note_start(self, worker: WorkerProcess) -> None:
        """Nothing is to be remembered."""

    def note_end(self, worker: WorkerProcess, now: float) -> str:
        return "of no interest"


class Machine:
    """What becomes of the workers that are started.

    Attributes:
        serves: for how many seconds the next one does.
    """

    def __init__(self) -> None:
        self.serves = 1e9

    def start(self, number: int, place: int, orders: Orders, now: float) -> WorkerProcess:
        return FakeWorker(number, place, orders, now, self.serves)


@asynccontextmanager
async def running(monkeypatch: pytest.MonkeyPatch, workers: int) -> AsyncIterator[tuple[WorkerPool, Machine]]:
    machine = Machine()
    monkeypatch.setattr(pool, "start_worker", machine.start)
    board = ShareBoard.create()
    config = Config.from_mapping({"worker_timeout": None})
    orders = Orders("app:app", config, 1, [], board)
    desk: Any = FakeDesk()
    found = WorkerPool(orders, workers, RestartPolicy(), desk, logging.getLogger(__name__))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.run)
        await found.wait_ready()
        yield found, machine
        found.stop("the end of the test")
    board.close()


@pytest.mark.parametrize("serves", [0.1, 1.5, 9.0])
async def test_workers_that_have_lasted_do_not_go_for_those_that_get_ready_and_fail(
    serves: float, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(monkeypatch, 4) as (found, machine):
        await trio.sleep(1000)
        # Now each successor fails a little later.
        machine.serves = serves
        found.scale(5)
        while found._policy.next_trial is None:
            await found.wait_change()
        lasting = set(found.ready())
        assert len(lasting) == 4
        found.replace(found.workers.values(), "recycled by hand")
        await trio.sleep(600)
        assert lasting <= set(found.ready())
        assert found.failure is None
        machine.serves = 1e9
        await trio.sleep(300)
        assert not lasting & set(found.ready())
        assert len(found.ready()) == len(found.workers) == 5


async def test_an_error_that_costs_a_worker_later_than_at_first_has_its_report(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(monkeypatch, 2) as (found, _):
        first, second = found.ready()
        assert isinstance(first, FakeWorker)
        assert isinstance(second, FakeWorker)
        tainted = {"is": "tainted", "signature": "KeyError at a.py:1", "summary": "KeyError: 1"}
        # A worker tells of a kind in full only once.
        for worker in (first, second):
            worker.says.send_nowait({"is": "report", "report": {"verdict": "replace", "id": worker.id}})
            worker.says.send_nowait(tainted.copy())
            await trio.sleep(60)
        assert first.state is WorkerState.GONE
        assert (second.told, second.own_report) == (["contain"], None)
        await trio.sleep(1000)
        second.says.send_nowait(tainted.copy())
        await trio.sleep(60)
        assert second.state is WorkerState.GONE
        assert second.own_report == {"verdict": "replace", "id": second.id}
