"""Half a minute in which workers are killed, reloaded, scaled, recycled and upgraded under load.

Every request is accounted for: what got no answer was on a connection of a worker that was killed, at that moment.
"""

from __future__ import annotations

import math
import os
import random
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.e2e.load import Load
from tests.e2e.process import ServerProcess, serve_command
from tests.e2e.test_supervisor import children, is_running, until
from trioserve.supervisor.restart_policy import RestartLimits

SECONDS = 30.0
CONNECTIONS = 32

# A kill is noticed by the clients of the killed at once; a machine that is busy takes its time.
AFTERMATH = 2.0

# Whoever sends signals to more young workers than this has the supervisor count them as failures of the app's, and
# give up. Two fewer: when it notices an end is up to the machine.
LIMITS = RestartLimits()
MOST_SIGNALS = LIMITS.kills - 2

pytestmark = pytest.mark.slow


class Chaos:
    """Does one thing after another to a server that is found by its pid file; what its policy bears, and no more."""

    def __init__(self, pid_file: Path, seed: int) -> None:
        self._pid_file = pid_file
        self._random = random.Random(seed)
        self._signals: deque[float] = deque([-math.inf] * MOST_SIGNALS, maxlen=MOST_SIGNALS)
        self.done: list[str] = []
        self.kills: dict[int, float] = {}

    @property
    def parent(self) -> int:
        return int(self._pid_file.read_text())

    async def do_something(self) -> None:
        actions: list[Callable[[], object]] = [self.reload, self.more, self.fewer, self.upgrade]
        if trio.current_time() - self._signals[0] > LIMITS.kills_period:
            actions += [self.kill_worker, self.kill_worker, self.terminate_worker]
        action = self._random.choice(actions)
        self.done.append(action.__name__)
        result = action()
        if hasattr(result, "__await__"):
            await result

    def kill_worker(self) -> None:
        workers = children(self.parent)
        if workers:
            victim = self._random.choice(workers)
            self.kills[victim] = trio.current_time()
            self._send(victim, signal.SIGKILL)

    def terminate_worker(self) -> None:
        """A drain, and not of the supervisor's doing."""
        workers = children(self.parent)
        if workers:
            self._send(self._random.choice(workers), signal.SIGTERM)

    def _send(self, worker: int, number: signal.Signals) -> None:
        self._signals.append(trio.current_time())
        os.kill(worker, number)

    def reload(self) -> None:
        os.kill(self.parent, signal.SIGHUP)

    def more(self) -> None:
        os.kill(self.parent, signal.SIGTTIN)

    def fewer(self) -> None:
        os.kill(self.parent, signal.SIGTTOU)

    async def upgrade(self) -> None:
        before = self.parent
        os.kill(before, signal.SIGUSR2)
        await until(lambda: not is_running(before), "the end of the old supervisor")


@asynccontextmanager
async def chaotic(pid_file: Path) -> AsyncIterator[ServerProcess]:
    async with serve_command("tests.e2e.apps:app", "--pid", str(pid_file), workers=3) as server:
        yield server
        final = int(pid_file.read_text())
        if final != server.pid:
            os.kill(final, signal.SIGTERM)
            await until(lambda: not is_running(final), "the end of the last supervisor")
            await until(lambda: not is_running(server.pid), "the end of the first supervisor")


async def test_half_a_minute_of_chaos_loses_only_what_was_with_the_killed(tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    print("seed", seed)
    chaos = Chaos(tmp_path / "pid", seed)
    pid_file = tmp_path / "pid"
    async with chaotic(pid_file) as server:
        load = Load(server.address, CONNECTIONS)
        async with load.running():
            end = trio.current_time() + SECONDS
            while trio.current_time() < end:
                await chaos.do_something()
                await load.wait_for(100)
            await load.wait_for(200)
        story = f"seed {seed}: {chaos.done}\n{load}\n"
        for failure in load.failures:
            near = [
                pid
                for pid, at in chaos.kills.items()
                if -0.1 <= failure.at - at <= AFTERMATH + load.longest_pause and failure.worker in (0, pid)
            ]
            assert near, f"{story}{failure} was not with a killed worker: {chaos.kills}"
        assert len(load.failures) <= CONNECTIONS * len(chaos.kills), story
        assert load.answered > 1000, story
    print(story)
