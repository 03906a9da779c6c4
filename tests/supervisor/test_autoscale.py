"""How many workers: hysteresis, bounds, and the words of each decision."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioserve.supervisor.autoscale import AutoscaleLimits, Autoscaler, Decision


def first_decision(
    scaler: Autoscaler, workers: int, each: float, *, start: float = 0.0, seconds: int = 300
) -> tuple[float, Decision] | None:
    """Ask every second, with all workers equally busy; when something is decided, and what."""
    for second in range(seconds):
        decision = scaler.decide(start + second, workers, [each] * workers)
        if decision is not None:
            return second, decision
    return None


@pytest.mark.parametrize(
    "workers, each, expected",
    [
        # Busy for ten seconds: one more.
        (1, 0.81, (10, 2)),
        (2, 1.0, (10, 3)),
        (3, 0.9, (10, 4)),
        # Not busy enough, or there is no more to be had.
        (2, 0.8, None),
        (4, 1.0, None),
        # The rest would be idle enough for a minute: one fewer.
        (4, 0.37, (60, 3)),
        (3, 0.33, (60, 2)),
        (2, 0.24, (60, 1)),
        (4, 0.0, (60, 3)),
        # Not idle enough for one fewer, or there are no fewer to be had.
        (4, 0.375, None),
        (2, 0.25, None),
        (1, 0.0, None),
        # In between.
        (3, 0.5, None),
    ],
)
def test_steady_load(workers: int, each: float, expected: tuple[float, int] | None) -> None:
    found = first_decision(Autoscaler(1, 4), workers, each)
    assert (None if found is None else (found[0], found[1].workers)) == expected


def test_it_is_the_mean_that_counts() -> None:
    scaler = Autoscaler(2, 4)
    for second in range(100):  # one is overrun; the mean is between the two thresholds
        assert scaler.decide(second, 2, [1.0, 0.4]) is None


def test_a_moment_of_rest_begins_the_span_anew() -> None:
    scaler = Autoscaler(1, 4)
    for second in range(200):
        assert scaler.decide(second, 2, [1.0, 1.0] if second % 10 else [0.7, 0.7]) is None


def test_a_moment_of_work_begins_the_longer_span_anew() -> None:
    scaler = Autoscaler(1, 4)
    for second in range(600):
        assert scaler.decide(second, 2, [0.0, 0.0] if second % 59 else [0.6, 0.6]) is None


def test_figures_may_come_as_seldom_as_they_like() -> None:
    scaler = Autoscaler(1, 4)
    assert scaler.decide(0.0, 1, [0.9]) is None
    decision = scaler.decide(45.0, 1, [0.9])
    assert decision is not None
    assert decision.workers == 2


def test_decisions_are_apart() -> None:
    scaler = Autoscaler(1, 8)
    assert first_decision(scaler, 1, 1.0) is not None  # at 10
    found = first_decision(scaler, 2, 1.0, start=11.0)
    assert found is not None
    assert 11 + found[0] == 10 + 15


def test_the_span_is_counted_from_after_the_last_decision() -> None:
    scaler = Autoscaler(1, 4, AutoscaleLimits(cooldown=0.0))
    assert first_decision(scaler, 4, 0.0) is not None  # at 60
    found = first_decision(scaler, 3, 0.0, start=61.0)
    assert found is not None
    assert found[0] == 60


@pytest.mark.parametrize("ready", [0, 1])
def test_nothing_is_decided_while_workers_start(ready: int) -> None:
    scaler = Autoscaler(1, 4)
    for second in range(100):
        assert scaler.decide(second, 2, [1.0] * ready) is None


def test_a_time_without_any_worker_begins_the_spans_anew() -> None:
    scaler = Autoscaler(1, 4)
    assert scaler.decide(0.0, 1, [1.0]) is None
    assert scaler.decide(9.0, 1, []) is None
    for second in (20.0, 25.0, 29.0):
        assert scaler.decide(second, 1, [1.0]) is None
    assert scaler.decide(30.0, 1, [1.0]) is not None


def test_they_are_judged_when_they_are_there() -> None:
    scaler = Autoscaler(1, 4)
    for second in range(50):
        assert scaler.decide(second, 2, [1.0]) is None
    decision = scaler.decide(50.0, 2, [1.0, 0.9])
    assert decision is not None
    assert decision.workers == 3


@pytest.mark.parametrize("workers, nearest", [(0, 2), (1, 2), (5, 4), (40, 4)])
def test_what_is_outside_the_range_comes_back_at_once(workers: int, nearest: int) -> None:
    scaler = Autoscaler(2, 4)
    assert scaler.decide(0.0, workers, []) == Decision(
        nearest, f"{workers} workers, the range is 2..4: now {nearest} of 2..4"
    )


def test_a_range_of_one_number_never_changes() -> None:
    scaler = Autoscaler(2, 2)
    assert first_decision(scaler, 2, 1.0) is None
    assert first_decision(scaler, 2, 0.0) is None


def test_reasons_have_their_figures() -> None:
    up = first_decision(Autoscaler(1, 4), 2, 0.93)
    down = first_decision(Autoscaler(1, 4), 3, 0.2)
    one = first_decision(Autoscaler(1, 4), 1, 1.0)
    assert up is not None
    assert down is not None
    assert one is not None
    assert up[1].reason == "CPU utilisation of 2 ready workers 93%, above 80% for 10 s: now 3 of 1..4"
    assert down[1].reason == (
        "CPU utilisation of 3 ready workers 20%; with one fewer it would be 30%, below 50% for 60 s: now 2 of 1..4"
    )
    assert one[1].reason == "CPU utilisation of 1 ready worker 100%, above 80% for 10 s: now 2 of 1..4"


def test_a_figure_below_nothing_is_nothing() -> None:
    """A process that is gone has used no CPU: the difference to its last figure is negative."""
    scaler = Autoscaler(1, 4)
    for second in range(11):
        decision = scaler.decide(second, 2, [-50.0, 2.0])
    assert decision is not None
    assert decision.workers == 3


@pytest.mark.parametrize("low, high", [(0, 4), (-1, 4), (3, 2)])
def test_an_impossible_range_is_refused(low: int, high: int) -> None:
    with pytest.raises(ValueError, match=f"{low}..{high} workers: the first must be"):
        Autoscaler(low, high)


@pytest.mark.parametrize("spare, busy", [(0.8, 0.8), (0.9, 0.8), (0.0, 0.8)])
def test_thresholds_that_would_chase_each_other_are_refused(spare: float, busy: float) -> None:
    with pytest.raises(ValueError, match="below busy"):
        AutoscaleLimits(busy=busy, spare=spare)


def test_it_shows_its_range() -> None:
    assert repr(Autoscaler(2, 8)) == "<Autoscaler 2..8>"


# -- with a load that spreads over whatever workers there are -----------------------------------------------


def follow(load: Callable[[int], float], *, cores: float = 8, seconds: int = 1800) -> list[tuple[int, int]]:
    """The decisions under a load in cores, which the machine's cores and its workers bound."""
    scaler, workers, decisions = Autoscaler(1, 8), 1, []
    for second in range(0, seconds, 2):
        each = min(load(second), cores, workers) / workers
        decision = scaler.decide(second, workers, [each] * workers)
        if decision is not None:
            assert 1 <= decision.workers <= 8
            assert abs(decision.workers - workers) == 1
            workers = decision.workers
            decisions.append((second, workers))
    return decisions


@pytest.mark.parametrize("load", [0.1, 0.5, 0.79, 0.9, 1.5, 2.5, 3.3, 4.0, 6.0, 20.0])
def test_a_steady_load_finds_its_number_and_stays(load: float) -> None:
    numbers = [workers for _, workers in follow(lambda second: load)]
    assert numbers == sorted(numbers)
    final = numbers[-1] if numbers else 1
    assert final == 8 or load / final <= 0.8
    assert final == 1 or load / (final - 1) > 0.8  # and no more than are needed


def test_more_workers_than_cores_are_no_use_and_not_kept() -> None:
    """Two cores, fully used: three workers share them at 67 %, which neither threshold minds."""
    assert follow(lambda second: 20.0, cores=2)[-1][1] == 3


def test_a_wave_is_followed_without_flapping() -> None:
    decisions = follow(lambda second: 5.0 if second % 1200 < 600 else 0.3, seconds=2400)
    numbers = [workers for _, workers in decisions]
    assert max(numbers) == 7
    turns = sum((b > a) != (c > b) for a, b, c in zip(numbers, numbers[1:], numbers[2:], strict=False))
    assert turns == 3  # down after the first wave, up with the second, down again
    assert all(b[0] - a[0] >= 15 for a, b in itertools.pairwise(decisions))


def test_noise_does_not_move_it() -> None:
    chance = random.Random(3)
    assert follow(lambda second: 0.55 + 0.3 * chance.random()) == []


@given(st.lists(st.tuples(st.floats(0, 120), st.lists(st.floats(-1, 3), max_size=6)), max_size=60))
def test_whatever_the_figures_it_stays_in_its_range(samples: list[tuple[float, list[float]]]) -> None:
    scaler, now, workers = Autoscaler(2, 5), 0.0, 2
    last = -100.0
    for pause, utilisations in samples:
        now += pause
        decision = scaler.decide(now, workers, utilisations)
        if decision is not None:
            assert 2 <= decision.workers <= 5
            assert decision.workers != workers
            assert now - last >= 15
            workers, last = decision.workers, now
