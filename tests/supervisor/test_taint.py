"""Tainted workers: one replacement a signature, a distance between them, a budget, and what comes after it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioserve.supervisor.restart_policy import Contain, Replace, RestartLimits, RestartPolicy, Verdict


def delays(policy: RestartPolicy, now: float, *signatures: str) -> list[float | None]:
    """What each is told: seconds until its replacement, None for none."""
    verdicts = [policy.judge_taint(now, signature) for signature in signatures]
    return [verdict.delay if isinstance(verdict, Replace) else None for verdict in verdicts]


def contained(verdict: Verdict) -> Contain:
    assert isinstance(verdict, Contain), verdict
    return verdict


def exhausted(now: float = 0.0) -> RestartPolicy:
    """Its budget is used up, and it has not been asked since."""
    policy = RestartPolicy()
    assert delays(policy, now, *"abcdef") == [0, 30, 60, 90, 120, 150]
    assert not policy.is_degraded(now)
    return policy


def test_the_first_is_replaced_now() -> None:
    verdict = RestartPolicy().judge_taint(5.0, "ValueError at app.py:3")
    assert verdict == Replace(0.0, "ValueError at app.py:3: replacement 1 of 6 in 300 s")


def test_a_second_one_thirty_seconds_later() -> None:
    policy = RestartPolicy()
    assert delays(policy, 0.0, "a") == [0]
    assert delays(policy, 12.0, "b") == [18]
    assert delays(policy, 59.0, "c") == [1]
    assert delays(policy, 200.0, "d") == [0]


# (when it comes again, whether it causes a replacement): counted from when the first replacement could start.
SAME_SIGNATURE = [(0.0, False), (1.0, False), (599.9, False), (600.0, True), (5000.0, True)]


@pytest.mark.parametrize("again, replaced", SAME_SIGNATURE)
def test_a_signature_causes_one_replacement_in_ten_minutes(again: float, replaced: bool) -> None:
    policy = RestartPolicy()
    assert delays(policy, 0.0, "a") == [0]
    assert delays(policy, again, "a") == [0 if replaced else None]


def test_its_memory_is_not_refreshed_by_coming_again() -> None:
    policy = RestartPolicy()
    assert delays(policy, 5000.0, "a") == [0]
    for minute in range(1, 10):
        verdict = contained(policy.judge_taint(5000 + minute * 60.0, "a"))
        assert verdict.reason == f"a has had a worker replaced {minute * 60} s ago, which is once in 600 s"
        assert not verdict.degraded
    assert delays(policy, 5600.0, "a") == [0]


def test_it_counts_from_when_its_replacement_could_start() -> None:
    policy = RestartPolicy()
    assert delays(policy, 0.0, "a", "b") == [0, 30]
    assert contained(policy.judge_taint(10.0, "b")).reason.startswith("b has had a worker replaced 0 s ago")
    assert delays(policy, 629.0, "b") == [None]
    assert delays(policy, 630.0, "b") == [0]


def test_past_the_budget_workers_are_degraded_and_that_is_said_once() -> None:
    policy = exhausted()
    verdict = contained(policy.judge_taint(1.0, "g"))
    assert (verdict.degraded, verdict.first) == (True, True)
    assert "6 replacements in 300 s are used up" in verdict.reason
    assert policy.is_degraded(1.0)
    for second in (1.0, 2.0, 290.0):
        verdict = contained(policy.judge_taint(second, f"another at {second}"))
        assert (verdict.degraded, verdict.first) == (True, False)


def test_a_known_signature_past_the_budget_does_not_make_it_degraded() -> None:
    policy = exhausted()
    assert not contained(policy.judge_taint(1.0, "a")).degraded
    assert not policy.is_degraded(1.0)


def test_it_ends_after_five_clean_minutes() -> None:
    policy = exhausted()
    policy.judge_taint(1.0, "g")
    policy.judge_taint(200.0, "h")
    assert policy.degraded_until == 500.0
    assert policy.is_degraded(499.9)
    assert not policy.is_degraded(500.0)
    assert delays(policy, 500.0, "g") == [0]


def test_status_says_why_and_how_long_while_it_lasts() -> None:
    policy = exhausted()
    assert policy.degraded_reason(0.0) == ""
    policy.judge_taint(1.0, "g")
    assert policy.degraded_reason(101.0) == (
        "6 replacements in 300 s were used up; for another 200 s, if no new error comes"
    )
    assert policy.degraded_reason(301.0) == ""


def test_an_error_every_few_minutes_keeps_it_degraded_though_the_budget_has_room() -> None:
    policy = exhausted()
    for nth in range(20):
        verdict = contained(policy.judge_taint(1.0 + nth * 250, f"error {nth}"))
        assert (verdict.degraded, verdict.first) == (True, nth == 0)
    assert policy.statistics(1.0 + 19 * 250).replacements == 0


def test_a_known_signature_does_not_prolong_it() -> None:
    """Were each repeat of one bug to count, nothing else would ever cause a replacement again."""
    policy = exhausted()
    policy.judge_taint(1.0, "g")
    for second in range(2, 301):
        verdict = contained(policy.judge_taint(float(second), "f"))
        assert (verdict.degraded, verdict.first) == (second < 301, False)
    assert not policy.is_degraded(301.0)


def test_it_is_said_again_when_it_begins_again() -> None:
    policy = RestartPolicy(RestartLimits(replacement_budget=1, replacement_period=1000.0, cooldown=10.0))
    assert delays(policy, 0.0, "a") == [0]
    firsts = [contained(policy.judge_taint(when, "b")).first for when in (1.0, 5.0, 14.9, 25.0)]
    assert firsts == [True, False, False, True]


def test_a_spell_of_bad_luck_is_within_the_budget() -> None:
    """One new bug a minute is replaced each time, for ever."""
    policy = RestartPolicy()
    for minute in range(100):
        assert delays(policy, minute * 60.0, f"bug {minute}") == [0]
    assert not policy.is_degraded(6000.0)


def test_statistics_at_each_step() -> None:
    policy = RestartPolicy()
    found = policy.statistics(0.0)
    assert (found.replacements, found.next_replacement, found.degraded) == (0, 0, 0)
    assert policy.degraded_until is None
    delays(policy, 0.0, "a")
    assert (policy.statistics(10.0).replacements, policy.statistics(10.0).next_replacement) == (1, 20)
    delays(policy, 0.0, *"bcdef")
    found = policy.statistics(100.0)
    assert (found.replacements, found.next_replacement, found.degraded) == (6, 200, 0)
    policy.judge_taint(150.0, "g")
    found = policy.statistics(200.0)
    assert (found.next_replacement, found.degraded) == (250, 250)
    found = policy.statistics(460.0)
    assert (found.replacements, found.next_replacement, found.degraded) == (0, 0, 0)


def test_next_replacement_is_when_there_is_one() -> None:
    policy = exhausted()
    wait = policy.statistics(10.0).next_replacement
    assert wait == 290
    assert delays(policy, 10.0 + wait, "g") == [0]


def test_hostile_signatures_fill_no_memory() -> None:
    policy = RestartPolicy()
    for nth in range(20_000):
        policy.judge_taint(nth * 1.0, f"{nth}: " + "x" * 1000)
    remembered = [value for value in vars(policy).values() if isinstance(value, (dict, list, set)) or
                  hasattr(value, "popleft")]  # fmt: skip
    assert len(remembered) >= 4
    assert all(len(value) <= 18 for value in remembered)


def test_a_reason_shows_a_signature_within_bounds() -> None:
    policy = RestartPolicy()
    for _ in range(2):
        assert len(policy.judge_taint(0.0, "x" * 100_000).reason) < 300


@given(st.lists(st.tuples(st.floats(0, 400), st.integers(0, 12)), max_size=80))
def test_whatever_happens_replacements_are_apart_within_budget_and_of_different_signatures(
    events: list[tuple[float, int]],
) -> None:
    policy = RestartPolicy()
    now, granted = 0.0, []
    critical = 0
    for pause, signature in events:
        now += pause
        was_degraded = policy.is_degraded(now)
        verdict = policy.judge_taint(now, str(signature))
        if isinstance(verdict, Replace):
            assert not was_degraded
            granted.append((now + verdict.delay, signature))
        else:
            assert verdict.degraded == policy.is_degraded(now)
            assert verdict.first == (verdict.degraded and not was_degraded)
            critical += verdict.first
    starts = [start for start, _ in granted]
    slack = 1e-6  # sums of floats
    for first, second in itertools.pairwise(starts):
        assert second - first >= 30 - slack
    for first, seventh in zip(starts, starts[6:], strict=False):
        assert seventh - first >= 300 - slack
    for number in {signature for _, signature in granted}:
        own = [start for start, signature in granted if signature == number]
        assert all(later - earlier >= 600 - slack for earlier, later in itertools.pairwise(own))
    assert critical <= now / 300 + 1
