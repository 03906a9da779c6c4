"""When it is known what a reload leaves bound."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from trioserve.config import Config
from trioserve.supervisor.generations import Rollout
from trioserve.supervisor.renewal import Renewals


class FakeStore:
    """Notes what is closed."""

    is_activated = False

    def __init__(self) -> None:
        self.done: list[str] = []

    def open(self, config: Config) -> dict[str, Any]:
        self.done.append("opened")
        return {}

    def drop(self, binds: Any) -> list[Any]:
        self.done.append("dropped")
        return []

    def retire_others(self, config: Config) -> list[Any]:
        self.done.append("retired")
        return []

    def drop_others(self, config: Config) -> list[Any]:
        return []


class FakeSupervisor:
    """A pool that is told what becomes of a rollout; what is beside a reload does nothing."""

    state = "starting"
    upgrade_under_way = predecessor = reloader = None

    def __init__(self) -> None:
        self.config = Config()
        self.store = FakeStore()
        self.log = logging.getLogger(__name__)
        self.desk = self.notifier = SimpleNamespace()
        self.directory = SimpleNamespace(entered=self._entered)
        self.preloads = SimpleNamespace(keep=lambda orders: None)
        self.pool = SimpleNamespace(
            orders=self.orders(1),
            stopping=False,
            generations=SimpleNamespace(),
            roll_out=self._roll_out,
            abandon=lambda sockets: None,
            ready=list,
        )
        self.rollout: Rollout
        self.rolling = trio.Event()

    @contextmanager
    def _entered(self) -> Any:
        yield lambda: None

    def orders(self, generation: int) -> Any:
        return SimpleNamespace(generation=generation, config=self.config)

    async def prepared(self, orders: Any) -> Any:
        return orders

    def _roll_out(self, orders: Any) -> Rollout:
        self.rollout = Rollout(self.pool.orders, held=False)
        self.pool.orders = orders
        self.rolling.set()
        return self.rollout

    def end(self, error: str) -> None:
        if error:
            self.pool.orders = self.rollout.previous
        self.rollout.error = error
        self.rollout.proven = not error
        self.rollout.decided.set()
        self.rollout.done.set()


async def done_when_decided(error: str) -> list[str]:
    supervisor: Any = FakeSupervisor()
    found: list[str] = []
    async with trio.open_nursery() as nursery:
        renewals = Renewals(supervisor, nursery, Config)
        renewals.begin()
        renewal = renewals.request("a test")
        await supervisor.rolling.wait()
        assert renewals.is_undecided

        async def wait() -> None:
            await renewals.wait_decided()
            found.extend(supervisor.store.done)

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        supervisor.end(error)
        await renewal.done.wait()
        assert renewal.error == error
    return found


@pytest.mark.parametrize(("error", "done"), [("", ["opened", "retired"]), ("none", ["opened", "dropped"])])
async def test_who_waits_for_a_decision_finds_bound_what_stays(error: str, done: list[str]) -> None:
    for _ in range(20):  # which of the tasks that wake together runs first is up to chance
        assert await done_when_decided(error) == done
