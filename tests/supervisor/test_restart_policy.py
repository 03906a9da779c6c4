"""Deaths: what is a failure, how long the back-off is, and when and with which code the supervisor gives up."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioserve.supervisor.restart_policy import (
    Decision,
    GiveUp,
    HoldOn,
    Restart,
    RestartLimits,
    RestartPolicy,
    WorkerExit,
    describe_status,
)


def a_policy(
    *, luck: float = 0.0, ever_ready: bool = True, limits: RestartLimits | None = None
) -> RestartPolicy:
    """One without jitter, unless `luck` is more than 0; and beyond its first generation."""
    policy = RestartPolicy(limits or RestartLimits(), random=lambda: luck)
    if ever_ready:
        policy.worker_ready(-1000.0)
    return policy


def crash(status: int = 1, lived: float = 0.2, *, ready: bool = True, planned: bool = False) -> WorkerExit:
    return WorkerExit(status, ready, lived, planned)


def delay_of(decision: Decision) -> float:
    assert isinstance(decision, Restart), decision
    return decision.delay


def code_of(decision: Decision) -> int:
    assert isinstance(decision, GiveUp), decision
    return decision.exit_code


def test_another_program_starts_with_a_clean_record() -> None:
    policy = a_policy()
    for moment in range(4):
        policy.worker_exited(float(moment), crash())
    policy.start_afresh()
    assert delay_of(policy.worker_exited(5.0, crash())) == 0.0
    assert policy.statistics(5.0).failures == 1
    # And as at the very start, what cannot be imported is not tried again.
    policy.start_afresh()
    assert code_of(policy.worker_exited(6.0, crash(4, ready=False))) == 4


# -- what is a failure ---------------------------------------------------------------------------------------

NO_FAILURE = {
    "served long, app error": WorkerExit(75, True, 3600.0, planned=False),
    "served just long enough": WorkerExit(75, True, 10.0, planned=False),
    "served long, kill -9": WorkerExit(-9, True, 3600.0, planned=False),
    "served long, out of memory": WorkerExit(-9, True, 60.0, planned=False, killed_for_cause=True),
    "served long, native crash": WorkerExit(-11, True, 60.0, planned=False),
    "served long, ended by itself": WorkerExit(0, True, 60.0, planned=False),
    "young, kill -9": WorkerExit(-9, True, 0.5, planned=False),
    "starting, kill -9": WorkerExit(-9, False, 0.5, planned=False),
    "starting, SIGTERM": WorkerExit(-15, False, 0.1, planned=False),
    "planned, clean": WorkerExit(0, True, 1.0, planned=True),
    "planned, tainted": WorkerExit(75, True, 1.0, planned=True),
    "planned, did not start": WorkerExit(3, False, 1.0, planned=True),
    "planned, killed": WorkerExit(-9, False, 1.0, planned=True),
}

FAST_FAILURES = {
    "app error": WorkerExit(75, True, 0.2, planned=False),
    "app error, not quite long enough": WorkerExit(75, True, 9.99, planned=False),
    "ended by itself": WorkerExit(0, True, 0.2, planned=False),
    "ended by itself before it was ready": WorkerExit(0, False, 0.2, planned=False),
    "native crash": WorkerExit(-11, True, 0.2, planned=False),
    "aborted": WorkerExit(-6, False, 0.2, planned=False),
    "out of memory": WorkerExit(-9, True, 2.0, planned=False, killed_for_cause=True),
    "hung while starting": WorkerExit(-9, False, 120.0, planned=False, killed_for_cause=True),
    "slow to fail to start": WorkerExit(3, False, 60.0, planned=False),
    "could not import, in a later generation": WorkerExit(4, False, 0.2, planned=False),
    "wrong config, in a later generation": WorkerExit(78, False, 0.2, planned=False),
    "an exit code that looks like a boot failure": WorkerExit(4, True, 0.2, planned=False),
}


@pytest.mark.parametrize("ended", NO_FAILURE.values(), ids=NO_FAILURE.keys())
def test_no_failure_is_replaced_at_once_and_counts_for_nothing(ended: WorkerExit) -> None:
    policy = a_policy()
    for second in range(0, 60, 2):
        assert delay_of(policy.worker_exited(float(second), ended)) == 0
        assert (policy.statistics(second).failures, policy.statistics(second).streak) == (0, 0)


@pytest.mark.parametrize("ended", FAST_FAILURES.values(), ids=FAST_FAILURES.keys())
def test_fast_failures_back_off_and_the_fifth_in_a_minute_is_the_end(ended: WorkerExit) -> None:
    policy = a_policy()
    delays = [delay_of(policy.worker_exited(10.0 * nth, ended)) for nth in range(4)]
    assert delays == [0, 0.1, 0.2, 0.4]
    assert policy.statistics(30).failures == 4
    assert isinstance(policy.worker_exited(40.0, ended), GiveUp)


def test_kills_by_somebody_are_no_failure_until_no_person_could_be_so_busy() -> None:
    policy = a_policy()
    killed = crash(-signal.SIGKILL)
    for nth in range(10):
        assert delay_of(policy.worker_exited(1000 + nth * 0.1, killed)) == 0
    assert [delay_of(policy.worker_exited(1001.0, killed)) for _ in range(4)] == [0, 0.1, 0.2, 0.4]
    assert code_of(policy.worker_exited(1001.1, killed)) == 137


def test_kills_are_forgotten() -> None:
    policy = a_policy()
    for nth in range(100):
        assert delay_of(policy.worker_exited(float(nth), crash(-9))) == 0
    assert policy.statistics(100).failures == 0


def test_a_limit_of_no_kills_counts_each() -> None:
    policy = a_policy(limits=RestartLimits(kills=0))
    for _ in range(4):
        assert isinstance(policy.worker_exited(0.0, crash(-9)), Restart)
    assert code_of(policy.worker_exited(0.0, crash(-9))) == 137


# -- back-off ------------------------------------------------------------------------------------------------


def spread_out(policy: RestartPolicy, count: int, *, apart: float = 100.0) -> list[float]:
    """The delays of so many failures of slow boots, too far apart for the intensity."""
    failed = crash(3, 60.0, ready=False)
    return [delay_of(policy.worker_exited(nth * apart, failed)) for nth in range(count)]


def test_the_back_off_doubles_up_to_its_maximum() -> None:
    delays = spread_out(a_policy(), 12)
    assert delays == [0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30]


def test_it_stays_there_for_ever() -> None:
    assert spread_out(a_policy(), 3000)[-1] == 30


@pytest.mark.parametrize("luck, factor", [(0.0, 1.0), (0.5, 0.875), (1.0, 0.75)])
def test_jitter_takes_up_to_a_quarter_off(luck: float, factor: float) -> None:
    plain, jittered = spread_out(a_policy(), 12), spread_out(a_policy(luck=luck), 12)
    assert jittered == pytest.approx([delay * factor for delay in plain])


def test_a_successor_that_lasts_ends_the_back_off() -> None:
    policy = a_policy()
    for _ in range(3):
        policy.worker_exited(0.0, crash())
    policy.worker_ready(1.0)
    assert policy.statistics(10.9).streak == 3
    assert policy.statistics(11.0).streak == 0
    assert delay_of(policy.worker_exited(12.0, crash())) == 0


def test_others_that_become_ready_meanwhile_do_not_put_that_off() -> None:
    policy = a_policy()
    policy.worker_exited(0.0, crash())
    for second in range(1, 10):
        policy.worker_ready(float(second))
    assert policy.statistics(10.9).streak == 1
    assert policy.statistics(11.0).streak == 0


def test_the_intensity_is_not_forgotten_with_the_back_off() -> None:
    policy = a_policy()
    for second in (0.0, 12.0, 24.0, 36.0):
        assert delay_of(policy.worker_exited(second, crash())) == 0
        policy.worker_ready(second + 0.5)
    assert isinstance(policy.worker_exited(48.0, crash()), GiveUp)


def test_nor_does_it_remember_longer_than_its_period() -> None:
    policy = a_policy()
    for nth in range(50):  # four in any sixty seconds
        assert isinstance(policy.worker_exited(nth * 15.0, crash(lived=5.0)), Restart)
    assert policy.statistics(49 * 15.0).failures == 4
    assert policy.statistics(49 * 15.0 + 60).failures == 0


def test_a_healthy_sibling_does_not_end_the_back_off() -> None:
    """It has been ready all the while; and that it ends after long service is no news either."""
    policy = a_policy()
    delays = []
    for nth in range(8):
        now = nth * 100.0
        delays.append(delay_of(policy.worker_exited(now, crash(3, 60.0, ready=False))))
        assert delay_of(policy.worker_exited(now + 50, crash(0, 5000.0))) == 0
    assert delays == [0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4]


@pytest.mark.parametrize("ended", [crash(-9, 9.0), crash(0, 9.0, planned=True)], ids=["killed", "planned"])
def test_a_successor_that_was_not_let_live_has_proved_nothing(ended: WorkerExit) -> None:
    policy = a_policy()
    policy.worker_exited(0.0, crash())
    policy.worker_exited(0.0, crash())
    policy.worker_ready(1.0)
    policy.worker_exited(10.0, ended)
    assert policy.statistics(50.0).streak == 2
    policy.worker_ready(51.0)
    assert policy.statistics(61.0).streak == 0


def test_a_failure_after_the_successor_was_ready_puts_it_off() -> None:
    """Two in turn: the one that is ready for the moment is no proof while the other fails."""
    policy = a_policy()
    policy.worker_exited(0.0, crash())
    policy.worker_ready(1.0)
    assert delay_of(policy.worker_exited(9.0, crash())) == 0.1
    assert policy.statistics(30.0).streak == 2


# -- the end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [2, 3, 4, 78])
def test_a_boot_failure_of_the_first_generation_is_the_end(status: int) -> None:
    policy = a_policy(ever_ready=False)
    decision = policy.worker_exited(0.3, crash(status, 0.3, ready=False))
    assert code_of(decision) == status
    assert f"exit code {status} 0.3 s after its start" in decision.reason
    assert "not trying again" in decision.reason


@pytest.mark.parametrize("status", [0, 1, 70, 71, 75, 82, -6, -11])
def test_other_ends_before_any_was_ready_are_tried_again(status: int) -> None:
    policy = a_policy(ever_ready=False)
    assert delay_of(policy.worker_exited(0.3, crash(status, 0.3, ready=False))) == 0
    assert policy.statistics(0.3).streak == 1


def test_once_a_worker_was_ready_a_boot_failure_is_tried_again() -> None:
    policy = a_policy(ever_ready=False)
    policy.worker_ready(0.3)
    assert delay_of(policy.worker_exited(0.4, crash(3, 0.4, ready=False))) == 0
    assert delay_of(policy.worker_exited(0.5, crash(3, 0.4, ready=False))) == 0.1


def test_an_exit_that_says_it_was_ready_is_believed() -> None:
    policy = a_policy(ever_ready=False)
    assert delay_of(policy.worker_exited(0.4, crash(75, 0.1))) == 0
    assert delay_of(policy.worker_exited(0.5, crash(3, 0.4, ready=False))) == 0.1


READY, STARTING = True, False
CODES = [
    # What says why.
    ([(3, STARTING)] * 5, 3),
    ([(4, STARTING)] * 5, 4),
    ([(78, STARTING)] * 5, 78),
    ([(70, READY)] * 5, 70),
    ([(70, STARTING)] * 5, 70),
    ([(71, READY)] * 5, 71),
    ([(75, READY)] * 5, 75),
    ([(80, READY)] * 5, 80),
    ([(82, READY)] * 5, 82),
    ([(83, READY)] * 5, 83),
    ([(7, READY)] * 5, 7),
    ([(-signal.SIGSEGV, READY)] * 5, 139),
    ([(-signal.SIGABRT, STARTING)] * 5, 134),
    # What says nothing, or would mislead.
    ([(0, READY)] * 5, 75),
    ([(1, STARTING)] * 5, 75),
    ([(2, READY)] * 5, 75),
    ([(3, READY)] * 5, 75),
    ([(4, READY)] * 5, 75),
    ([(78, READY)] * 5, 75),
    ([(130, READY)] * 5, 75),
    ([(143, READY)] * 5, 75),
    # Workers that disagree.
    ([(70, READY)] * 4 + [(83, READY)], 75),
    ([(3, STARTING), (4, STARTING)] * 2 + [(3, STARTING)], 75),
    ([(-signal.SIGSEGV, READY)] + [(70, READY)] * 4, 75),
]


@pytest.mark.parametrize("ends, code", CODES)
def test_the_supervisors_code_says_what_its_workers_did(ends: list[tuple[int, bool]], code: int) -> None:
    policy = a_policy()
    *before, last = [
        policy.worker_exited(0.1 * nth, crash(status, ready=ready))
        for nth, (status, ready) in enumerate(ends)
    ]
    assert all(isinstance(decision, Restart) for decision in before)
    assert code_of(last) == code
    assert "fast failure 5 of 5 in 60 s" in last.reason


@pytest.mark.parametrize(
    "sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT]
)
def test_too_many_signals_never_end_it_as_if_it_had_been_asked_to(sent: signal.Signals) -> None:
    policy = a_policy(limits=RestartLimits(kills=0))
    last = [policy.worker_exited(0.0, crash(-sent)) for _ in range(5)][-1]
    assert code_of(last) == (137 if sent is signal.SIGKILL else 75)


def test_having_given_up_it_does_not_change_its_mind() -> None:
    policy = a_policy()
    decisions = [policy.worker_exited(0.0, crash(70)) for _ in range(20)]
    assert [code_of(decision) for decision in decisions[4:]] == [70] * 16


# -- beside workers that serve -------------------------------------------------------------------------------


def failing(policy: RestartPolicy, count: int, *, serving: float, start: float = 0.0) -> list[Decision]:
    """So many that cannot import the app, a second apart; the others have served for `serving` seconds at first."""
    ended = crash(4, 0.3, ready=False)
    return [policy.worker_exited(start + nth, ended, serving and serving + nth) for nth in range(count)]


@pytest.mark.parametrize(
    "serving, goes_on",
    [(0.0, False), (0.5, False), (5.9, False), (6.0, True), (3600.0, True)],
    ids=["nobody", "as young", "not quite long enough by then", "just long enough by then", "long"],
)
def test_who_has_lasted_is_not_ended_because_others_fail(serving: float, goes_on: bool) -> None:
    policy = a_policy()
    *before, last = failing(policy, 5, serving=serving)
    assert all(isinstance(decision, Restart) for decision in before)
    assert isinstance(last, HoldOn if goes_on else GiveUp)
    assert (policy.next_trial is not None) == goes_on
    if goes_on:
        assert last.reason == (
            "ended with exit code 4 0.3 s after its start, before it was ready: fast failure 5 of 5 in 60 s; workers "
            f"fail as fast as they are started, but others have served for up to {serving + 4:.0f} s and go on"
        )
        assert policy.degraded_reason(14.0) == (
            "workers fail as fast as they are started; the next attempt is due in 20 s"
        )


def test_further_attempts_come_at_the_longest_delay_and_only_the_first_line_is_critical() -> None:
    policy = a_policy()
    found = failing(policy, 5, serving=60.0)[4:]
    # So far apart the intensity would let them pass: it was surpassed, and nothing has become better.
    for nth in range(1, 20):
        found += failing(policy, 1, serving=60.0 + nth * 100, start=nth * 100.0)
    assert [(decision.delay, decision.first) for decision in found if isinstance(decision, HoldOn)] == [
        (30.0, True),
        *[(30.0, False)] * 19,
    ]
    assert policy.next_trial == 1900.0 + 30.0


def test_the_longest_delay_has_its_jitter() -> None:
    last = failing(a_policy(luck=1.0), 5, serving=60.0)[-1]
    assert isinstance(last, HoldOn)
    assert last.delay == 22.5


def test_a_successor_that_is_ready_ends_it() -> None:
    policy = a_policy()
    failing(policy, 5, serving=60.0)
    policy.worker_ready(30.0)
    assert policy.next_trial is None
    assert policy.degraded_reason(30.0) == ""
    # And it counts from there, with what it remembers: this is the sixth in a minute, and the first in the next one.
    assert isinstance(failing(policy, 1, serving=90.0, start=31.0)[0], HoldOn)
    policy.worker_ready(40.0)
    assert isinstance(failing(policy, 1, serving=200.0, start=140.0)[0], Restart)


def test_so_does_the_end_of_the_wish_for_one_or_another_program() -> None:
    for end_it in (RestartPolicy.none_missing, RestartPolicy.start_afresh):
        policy = a_policy()
        failing(policy, 5, serving=60.0)
        end_it(policy)
        assert policy.next_trial is None


def test_once_none_of_them_serves_any_more_the_next_failure_is_the_end() -> None:
    policy = a_policy()
    failing(policy, 5, serving=60.0)
    assert delay_of(policy.worker_exited(500.0, crash(-9, 600.0))) == 0
    assert code_of(policy.worker_exited(501.0, crash(4, 0.3, ready=False))) == 4


def test_both_reasons_to_be_degraded_are_told() -> None:
    policy = a_policy()
    for nth in range(7):
        policy.judge_taint(0.0, f"error {nth}")
    failing(policy, 5, serving=60.0)
    assert policy.degraded_reason(4.0) == (
        "workers fail as fast as they are started; the next attempt is due in 30 s. 6 replacements in 300 s were used "
        "up; for another 296 s, if no new error comes"
    )


# -- words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "status, words",
    [(0, "exit code 0"), (75, "exit code 75"), (-9, "signal 9 (SIGKILL)"), (-250, "signal 250")],
)
def test_a_status_in_words(status: int, words: str) -> None:
    assert describe_status(status) == words


def test_reasons_have_their_figures() -> None:
    policy = a_policy()
    reasons = [
        policy.worker_exited(0.0, crash(-9, 3600.0)).reason,
        policy.worker_exited(0.0, crash(0, 5.0, planned=True)).reason,
        policy.worker_exited(0.0, crash(-9, 1.0)).reason,
        policy.worker_exited(0.0, crash(75, 0.2)).reason,
        policy.worker_exited(0.0, crash(3, 0.5, ready=False)).reason,
    ]
    assert reasons == [
        "ended with signal 9 (SIGKILL) 3600.0 s after it was ready; replaced at once",
        "ended with exit code 0 5.0 s after it was ready, as planned",
        "ended with signal 9 (SIGKILL) 1.0 s after it was ready, sent by somebody; replaced at once",
        "ended with exit code 75 0.2 s after it was ready: fast failure 1 of 5 in 60 s; next attempt at once",
        (
            "ended with exit code 3 0.5 s after its start, before it was ready: fast failure 2 of 5 in 60 s; next "
            "attempt in 0.1 s"
        ),
    ]
    assert repr(policy) == "<RestartPolicy streak=2 failures=2 replacements=0>"


# -- whatever happens ----------------------------------------------------------------------------------------

EXITS = st.builds(
    WorkerExit,
    status=st.sampled_from([0, 1, 3, 75, 78, -9, -11, -15]),
    was_ready=st.booleans(),
    lived=st.floats(0, 20),
    planned=st.booleans(),
    killed_for_cause=st.booleans(),
)


@given(
    events=st.lists(st.tuples(st.floats(0, 30), st.booleans(), EXITS), max_size=60),
    luck=st.floats(0, 1, exclude_max=True),
)
def test_delays_are_bounded_and_nobody_fails_fast_five_times_a_minute_without_the_end(
    events: list[tuple[float, bool, WorkerExit]], luck: float
) -> None:
    policy = RestartPolicy(random=lambda: luck)
    policy.worker_ready(0.0)
    now, failures = 0.0, []
    for pause, becomes_ready, ended in events:
        now += pause
        if becomes_ready:
            policy.worker_ready(now)
            continue
        before = policy.statistics(now).failures
        decision = policy.worker_exited(now, ended)
        if isinstance(decision, GiveUp):
            assert before == 4
            assert 0 < decision.exit_code < 256
            assert decision.exit_code not in (1, 130, 143)
            break
        assert 0 <= decision.delay <= 30
        if policy.statistics(now).failures > before:
            failures.append(now)
        else:
            assert decision.delay == 0
    for first, fifth in zip(failures, failures[4:], strict=False):
        assert fifth - first >= 60
