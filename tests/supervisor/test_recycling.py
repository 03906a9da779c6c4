"""When a healthy worker has served enough, and how far chance moves that."""

from __future__ import annotations

import math
import random

import pytest

from trioserve.supervisor.recycling import RecyclingLimits, RecyclingPlan, rss_limit

MIB = 1024 * 1024
GIB = 1024 * MIB


def a_plan(limits: RecyclingLimits, *, luck: float = 0.0, started: float = 1000.0) -> RecyclingPlan:
    return RecyclingPlan(started, limits, random=lambda: luck)


REQUESTS = RecyclingLimits(max_requests=100)
LIFETIME = RecyclingLimits(max_lifetime=3600.0)
RSS = RecyclingLimits(max_rss=500 * MIB)
ALL = RecyclingLimits(max_requests=100, max_lifetime=3600.0, max_rss=500 * MIB)


@pytest.mark.parametrize(
    "limits, age, requests, rss, reason",
    [
        (RecyclingLimits(), 1e9, 10**12, 10**15, None),
        (REQUESTS, 1e9, 99, 10**15, None),
        (REQUESTS, 0.1, 100, 0, "it has served 100 requests, its limit is 100"),
        (REQUESTS, 0.1, 12_345, 0, "it has served 12,345 requests, its limit is 100"),
        (LIFETIME, 3599.9, 10**12, 10**15, None),
        (LIFETIME, 3600.0, 0, 0, "it has run for 3,600 s, its limit is 3,600 s"),
        (LIFETIME, 7200.4, 0, 0, "it has run for 7,200 s, its limit is 3,600 s"),
        (RSS, 1e9, 10**12, 500 * MIB, None),
        (RSS, 30.0, 0, 501 * MIB, "it uses 501 MiB of memory, its limit is 500 MiB"),
        (RSS, 1e9, 0, 0, None),
        # Too much from the start: not before it has settled.
        (RSS, 29.9, 0, 10 * GIB, None),
        (RSS, 30.0, 0, 10 * GIB, "it uses 10,240 MiB of memory, its limit is 500 MiB"),
        (ALL, 3599.0, 99, 500 * MIB, None),
        (ALL, 3600.0, 99, 0, "it has run for 3,600 s, its limit is 3,600 s"),
        (ALL, 3600.0, 100, GIB, "it has served 100 requests, its limit is 100"),
        (ALL, 100.0, 3, GIB, "it uses 1,024 MiB of memory, its limit is 500 MiB"),
    ],
)
def test_due(limits: RecyclingLimits, age: float, requests: int, rss: int, reason: str | None) -> None:
    assert a_plan(limits).due(1000.0 + age, requests, rss) == reason


@pytest.mark.parametrize(
    "luck, requests, lifetime, rss",
    [(0.0, 1000, 3600, 1000), (0.5, 1050, 3420, 950), (math.nextafter(1, 0), 1100, 3240, 900)],
)
def test_chance_adds_requests_and_takes_time_and_memory_off(
    luck: float, requests: int, lifetime: float, rss: float
) -> None:
    plan = a_plan(
        RecyclingLimits(max_requests=1000, max_requests_jitter=100, max_lifetime=3600.0, max_rss=1000),
        luck=luck,
    )
    assert plan.max_requests == requests
    assert (plan.max_lifetime, plan.max_rss) == pytest.approx((lifetime, rss))


def test_every_extra_of_the_jitter_occurs() -> None:
    chance = random.Random(4)
    limits = RecyclingLimits(max_requests=10, max_requests_jitter=3)
    drawn = {RecyclingPlan(0.0, limits, random=chance.random).max_requests for _ in range(200)}
    assert drawn == {10, 11, 12, 13}


def test_without_jitter_the_limit_is_exact() -> None:
    assert RecyclingPlan(0.0, REQUESTS).max_requests == 100


def test_workers_that_start_together_do_not_go_together() -> None:
    plans = [RecyclingPlan(0.0, LIFETIME) for _ in range(8)]
    times = sorted(plan.next_check(0.0) for plan in plans)
    assert len(set(times)) == 8
    assert times[0] >= 3240
    assert times[-1] <= 3600


def test_limits_are_drawn_once() -> None:
    plan = RecyclingPlan(0.0, LIFETIME)
    due_at = plan.next_check(0.0)
    assert {plan.next_check(now) for now in range(0, 3000, 100)} == {due_at}
    assert plan.due(math.nextafter(due_at, 0), 0, 0) is None
    assert plan.due(due_at, 0, 0) is not None


@pytest.mark.parametrize("limits, now, check", [
    (LIFETIME, 1000.0, 4600.0),
    (LIFETIME, 4599.0, 4600.0),
    (LIFETIME, 9999.0, 9999.0),
    (RecyclingLimits(), 1000.0, math.inf),
    (RecyclingLimits(max_requests=1, max_rss=1), 1000.0, math.inf),
])  # fmt: skip
def test_the_time_to_look_again(limits: RecyclingLimits, now: float, check: float) -> None:
    assert a_plan(limits).next_check(now) == check


@pytest.mark.parametrize("started", [0.1, 1000.3, 123456.789])
def test_who_sleeps_until_then_is_not_too_early(started: float) -> None:
    """Floats: the sum that says when, and the difference that says how old, must agree."""
    chance = random.Random(5)
    for _ in range(1000):
        plan = RecyclingPlan(started, LIFETIME, random=chance.random)
        assert plan.due(plan.next_check(started), 0, 0) is not None


def test_it_shows_its_limits() -> None:
    assert repr(a_plan(ALL)) == "<RecyclingPlan requests=100 lifetime=3600 s rss=500 MiB>"
    assert repr(a_plan(RecyclingLimits())) == "<RecyclingPlan requests=inf lifetime=inf s rss=inf MiB>"


# -- --max-rss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked, cgroup, workers, expected",
    [
        (None, None, 2, None),
        (None, GIB, 2, None),
        (500 * MIB, None, 2, 500 * MIB),
        (300 * MIB, GIB, 2, 300 * MIB),
        # A part: of two workers and the successor of one, each gets a third.
        (0.75, 4 * GIB, 2, GIB),
        (1.0, 4 * GIB, 3, GIB),
        (0.5, 2 * GIB, 1, 512 * MIB),
    ],
)
def test_the_limit_of_one_worker(
    asked: float | None, cgroup: int | None, workers: int, expected: int | None
) -> None:
    found = rss_limit(asked, cgroup, workers)
    assert (found.bytes, found.warning) == (expected, "")


def test_a_part_of_nothing_is_no_limit_and_says_so() -> None:
    found = rss_limit(0.8, None, 2)
    assert found.bytes is None
    assert found.warning.startswith("max_rss = 0.8 is a part of the cgroup's memory limit, and there is none")


def test_bytes_that_leave_no_room_for_the_overlap_are_kept_with_a_warning() -> None:
    found = rss_limit(500 * MIB, 1200 * MIB, 2)
    assert found.bytes == 500 * MIB
    assert found.warning == (
        "max_rss = 500 MiB, 2 workers and one that replaces another make 1,500 MiB, and the cgroup allows 1,200 MiB: "
        "the kernel may kill workers first. At most 400 MiB leaves room for that"
    )
    assert rss_limit(400 * MIB, 1200 * MIB, 2).warning == ""
