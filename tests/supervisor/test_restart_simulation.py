"""The restart policy over the life of a whole supervisor, on a clock of its own: how often workers are started."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from trioserve.supervisor.restart_policy import GiveUp, HoldOn, RestartPolicy, WorkerExit


@dataclass(frozen=True)
class Life:
    """What becomes of one worker that is started."""

    boot: float = 0.3
    #: seconds that it serves; None: it never becomes ready, and ends after `boot`
    serves: float | None = None
    status: int = 75


@dataclass
class Simulation:
    """A supervisor that does what its policy says, with workers that live as `script(slot, attempt)` says.

    Attributes:
        starts: when each worker was started.
        gave_up: when and how the policy did, or None.
        held_on: how often the policy had those that serve go on.
        idle: the longest time for which a slot had no worker, not even a starting one.
    """

    workers: int
    script: Callable[[int, int], Life]
    policy: RestartPolicy = field(default_factory=lambda: RestartPolicy(random=random.Random(1).random))
    starts: list[float] = field(default_factory=list)
    gave_up: tuple[float, GiveUp] | None = None
    held_on: int = 0
    idle: float = 0.0

    def run(self, seconds: float) -> Simulation:
        events: list[tuple[float, int, str, int]] = []
        attempts = dict.fromkeys(range(self.workers), 0)
        order = iter(range(1_000_000))
        life: dict[int, Life] = {}
        ready_at: dict[int, float] = {}
        for slot in attempts:
            heapq.heappush(events, (0.0, next(order), "start", slot))
        while events:
            now, _, what, slot = heapq.heappop(events)
            if now > seconds:
                break
            if what == "start":
                life[slot] = self.script(slot, attempts[slot])
                attempts[slot] += 1
                self.starts.append(now)
                upcoming = "dies" if life[slot].serves is None else "ready"
                heapq.heappush(events, (now + life[slot].boot, next(order), upcoming, slot))
            elif what == "ready":
                self.policy.worker_ready(now)
                ready_at[slot] = now
                heapq.heappush(events, (now + (life[slot].serves or 0.0), next(order), "dies", slot))
            else:
                ready_at.pop(slot, None)
                serving = max((now - moment for moment in ready_at.values()), default=0.0)
                decision = self.policy.worker_exited(now, exit_of(life[slot]), serving)
                if isinstance(decision, GiveUp):
                    self.gave_up = now, decision
                    break
                self.held_on += isinstance(decision, HoldOn)
                self.idle = max(self.idle, decision.delay)
                heapq.heappush(events, (now + decision.delay, next(order), "start", slot))
        return self


def exit_of(life: Life) -> WorkerExit:
    if life.serves is None:
        return WorkerExit(life.status, False, life.boot, planned=False)
    return WorkerExit(life.status, True, life.serves, planned=False)


FOREVER = 1e9


@pytest.mark.parametrize("boot", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("status", [1, 75, -11, 0])
def test_two_workers_that_crash_as_they_start_are_started_at_most_ten_times(boot: float, status: int) -> None:
    """The issue's figure: 0.2 s after start, two workers, ten seconds."""
    simulation = Simulation(2, lambda slot, attempt: Life(boot, 0.2, status)).run(10)
    assert simulation.gave_up is not None
    assert simulation.gave_up[1].exit_code == {1: 75, 75: 75, -11: 139, 0: 75}[status]
    assert 2 <= len(simulation.starts) <= 10


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 8, 16])
def test_more_workers_do_not_evade_it(workers: int) -> None:
    simulation = Simulation(workers, lambda slot, attempt: Life(0.3, 0.2)).run(10)
    assert simulation.gave_up is not None
    assert len(simulation.starts) <= workers + 4


def test_workers_that_crash_in_turn_do_not_evade_it() -> None:
    """One always lives a little while the other has just failed."""
    lives = {0: Life(0.3, 3.0), 1: Life(0.5, 4.5)}
    simulation = Simulation(2, lambda slot, attempt: lives[slot]).run(60)
    assert simulation.gave_up is not None
    assert len(simulation.starts) <= 6


@pytest.mark.parametrize("healthy", [1, 7])
def test_nor_does_one_among_healthy_ones(healthy: int) -> None:
    simulation = Simulation(1 + healthy, lambda slot, attempt: Life(0.3, 0.2 if slot == 0 else FOREVER)).run(
        60
    )
    assert simulation.gave_up is not None
    assert len(simulation.starts) == healthy + 5


@pytest.mark.parametrize(
    "life", [Life(0.3), Life(0.3, 0.2)], ids=["before it is ready", "as soon as it is ready"]
)
@pytest.mark.parametrize("healthy", [1, 7])
def test_but_one_among_those_that_have_lasted_is_tried_from_time_to_time(healthy: int, life: Life) -> None:
    later = 1000.0
    simulation = Simulation(
        1 + healthy,
        lambda slot, attempt: life if slot == 0 and attempt else Life(0.3, FOREVER if slot else later),
    ).run(later + 3600)
    assert simulation.gave_up is None
    assert simulation.held_on
    # One that gets ready each time has the policy hope each time, but not often.
    most = 3600 / (30 * 0.75) if life.serves is None else 3600 / 60 * 5
    assert len([start for start in simulation.starts if start > later]) <= most + 10


def test_an_app_that_breaks_later_starts_from_a_clean_slate_and_then_gives_up() -> None:
    simulation = Simulation(2, lambda slot, attempt: Life(0.3, 1000.0 if attempt == 0 else 0.2)).run(2000)
    assert simulation.gave_up is not None
    assert 1000 < simulation.gave_up[0] < 1005
    assert len(simulation.starts) <= 10


def test_slow_failures_that_the_intensity_lets_pass_are_slowed_down() -> None:
    """A boot of 20 s that fails: never five in a minute, and yet no worker is started much more than every 50 s."""
    simulation = Simulation(2, lambda slot, attempt: Life(0.3, FOREVER) if slot else Life(20.0)).run(3600)
    assert simulation.gave_up is None
    late = [start for start in simulation.starts if start > 1800]
    assert len(late) <= 1800 / (20 + 30 * 0.75) + 1
    assert 22.5 <= simulation.idle <= 30


@pytest.mark.parametrize("workers, every", [(2, 2.0), (2, 1.0), (4, 1.0)])
def test_a_kill_every_few_seconds_leaves_no_slot_empty(workers: int, every: float) -> None:
    """The other figure: `kill -9` of a random worker every two seconds for a minute, most of them young."""
    policy = RestartPolicy()
    chance = random.Random(2)
    ready_at = [0.5] * workers
    policy.worker_ready(0.5)
    now = 1.0
    while now < 61:
        victim = chance.randrange(workers)
        was_ready = now >= ready_at[victim]
        lived = now - ready_at[victim] if was_ready else 0.2
        decision = policy.worker_exited(now, WorkerExit(-9, was_ready, lived, planned=False))
        assert not isinstance(decision, GiveUp)
        assert decision.delay == 0
        ready_at[victim] = now + 0.5
        policy.worker_ready(now + 0.5)
        now += every
    assert policy.statistics(now).failures == 0


def test_workers_that_something_kills_as_they_start_are_not_started_for_ever() -> None:
    simulation = Simulation(2, lambda slot, attempt: Life(0.3, 0.2, -9)).run(60)
    assert simulation.gave_up is not None
    assert simulation.gave_up[1].exit_code == 137
    assert len(simulation.starts) <= 17
