"""What follows a worker's death, and what follows its taint: the supervisor's rules, and their memory.

`supervisor.py` reports each worker that becomes ready and each that ends, and asks before it replaces a tainted one.
Nothing here waits, reads a clock or starts a process: time comes in with each call (any monotonic clock, never
backwards), so there is nothing to cancel, and the rules are tested as tables.

A death is one of:

    planned          the supervisor had asked for it                                    no failure
    boot failure     exit 2, 3, 4 or 78 before any worker of this supervisor was ready    the end, with that code
    served           it had been ready for `min_uptime` or longer                       no failure, replaced at once
    killed           a young one, by a signal that people send, not more than a few     no failure, replaced at once
    fast failure     all others                                                         back-off; too many: the end,
                                                                                        or degraded, if others serve

What there are too many of is no reason to end workers that serve and have lasted: what is on disk now may be broken
(half a deployment), they are not. They stay, and another start is tried from time to time, until one gets ready. That
one is on trial until it has lasted, too: so long none of them goes for its sake.
A worker that is younger than `min_uptime` is no such proof: it may be the next to fail.

Not to be reported: the end of a process that nobody would start again, as the trial worker of a reload whose new
app does not start. The old one serves on, and however often somebody tries must not end the supervisor.
"""

from __future__ import annotations

import random
import signal
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from trioserve import errors

# What a worker ends with that could not start; another attempt with the same program and config does not mend it.
BOOT_FAILURES = {
    errors.EXIT_USAGE: "Python could not open its file, or not understand its flags",
    errors.EXIT_STARTUP_FAILED: "the app could not start",
    errors.EXIT_APP_NOT_FOUND: "the app could not be imported",
    errors.EXIT_CONFIG: "the configuration is wrong",
}

# Signals that somebody sends; a fault in the program raises others (SIGSEGV, SIGBUS, SIGABRT ...).
SENT_SIGNALS = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP})

# Codes that say nothing (0, 1), that would say of the supervisor that it had been asked to end (129 to 131 and 143),
# or that mean "could not start": from a worker that has been ready they are numbers of the app's own choice, and a
# service manager that never restarts after 4 or 78 must not be misled by them.
_SAYS_NOTHING = frozenset({0, 1, 129, errors.EXIT_SIGINT, 131, errors.EXIT_SIGTERM, *BOOT_FAILURES})


@dataclass(frozen=True, slots=True)
class RestartLimits:
    """Every number of the policy. Times in seconds.

    Attributes:
        first_delay: the back-off after the second fast failure in a row (after the first there is none), doubled
            with each further one. 0.1: a hiccup costs nothing that anyone feels.
        max_delay: what it grows to. 30: a machine isn't kept busy by boots, and what mends itself is soon noticed.
        jitter: largest part of a delay that chance takes off, so that workers which failed together do not start
            together. Off, not on: `max_delay` stays the longest.
        min_uptime: a worker that dies sooner after being ready has failed fast. 10: start-up errors that show late
            (the first request, a first timer) come well within it.
        intensity, period: so many fast failures, of all workers together, within so many seconds end the supervisor.
            5 in 60: systemd's and OTP's way, escalation rather than looping; one bad worker in twelve seconds passes.
            While a worker serves that has done so for `min_uptime`, they only make `max_delay` the time between starts.
        kills, kills_period: so many young workers within so many seconds may be killed by signals that people send
            before further ones count as fast failures. 10 in 10: twice what a chaos test with a `kill -9` a second
            over a few workers does, while workers that something kills as they start get there at once. 0: each counts.
        signature_memory: a signature that has caused a replacement causes no other for so long. 600: restarts do not
            mend what is deterministic.
        replacement_interval: least time between two replacements of tainted workers. 30: the most that a request
            which makes the app fail can cost is a boot in 30 s.
        replacement_budget, replacement_period: most of them within a period. 6 in 300: more is not a poisoned worker
            here and there, but a broken app or an attack.
        cooldown: past the budget, workers are degraded until so long has gone by without an error that would ask for
            a replacement. 300: the budget's own period, after which it is whole again.
    """

    first_delay: float = 0.1
    max_delay: float = 30.0
    jitter: float = 0.25
    min_uptime: float = 10.0
    intensity: int = 5
    period: float = 60.0
    kills: int = 10
    kills_period: float = 10.0
    signature_memory: float = 600.0
    replacement_interval: float = 30.0
    replacement_budget: int = 6
    replacement_period: float = 300.0
    cooldown: float = 300.0


@dataclass(frozen=True, slots=True)
class WorkerExit:
    """How a worker ended.

    Attributes:
        status: its exit code, or minus the number of the signal that ended it.
        was_ready: whether it had ever been.
        lived: seconds since it became ready; since its start if it never did.
        planned: the supervisor had asked it to end (drain, recycle, scale down, reload).
        killed_for_cause: the signal was its own doing: the machine had run out of memory (`memory.events`), or the
            supervisor killed it because it hung. False: as far as one knows, somebody outside sent it.
    """

    status: int
    was_ready: bool
    lived: float
    planned: bool
    killed_for_cause: bool = False


@dataclass(frozen=True, slots=True)
class Restart:
    """Start a successor after `delay` seconds. For a planned exit: if one is wanted at all."""

    delay: float
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the supervisor, and what is left of its workers, with `exit_code`."""

    exit_code: int
    reason: str


@dataclass(frozen=True, slots=True)
class HoldOn:
    """Leave the workers that serve in service, also those to be replaced; try one start in `delay` seconds.

    Attributes:
        reason: for the log.
        first: this is the moment at which it became so, for the one CRITICAL line.
    """

    delay: float
    reason: str
    first: bool


Decision: TypeAlias = Restart | HoldOn | GiveUp


@dataclass(frozen=True, slots=True)
class Replace:
    """Replace the tainted worker: its successor may be started in `delay` seconds; 0 is now.

    The place is taken: who does not use it leaves the budget smaller, never larger.
    """

    delay: float
    reason: str


@dataclass(frozen=True, slots=True)
class Contain:
    """Leave the tainted worker in service.

    Attributes:
        reason: for the log.
        degraded: the budget is used up: this is to be said in health and status, and told to the workers.
        first: this is the moment at which it became so, for the one CRITICAL line.
    """

    reason: str
    degraded: bool = False
    first: bool = False


Verdict: TypeAlias = Replace | Contain


@dataclass(frozen=True, slots=True)
class RestartStatistics:
    """The policy's memory at a moment, for status and control.

    Attributes:
        failures: fast failures within the period.
        streak: fast failures in a row, on which the back-off depends.
        next_delay: the longest back-off that one more would bring, before jitter.
        replacements: of tainted workers, within the budget's period, those still to come included.
        next_replacement: seconds until there may be another one; 0 is now.
        degraded: seconds for which workers are degraded if nothing else happens; 0: they are not.
    """

    failures: int
    streak: int
    next_delay: float
    replacements: int
    next_replacement: float
    degraded: float


class RestartPolicy:
    """The rules for one supervisor, over all its workers: one failing in turn with another is no way around them."""

    def __init__(
        self, limits: RestartLimits = RestartLimits(), *, random: Callable[[], float] = random.random
    ) -> None:
        self.limits = limits
        self._random = random
        self._ever_ready = False
        # (when, telling code); longer than what gives up it need not be.
        self._failures: deque[tuple[float, int]] = deque(maxlen=max(1, limits.intensity))
        self._kills: deque[float] = deque()
        # Fast failures since a successor has last proved itself, and the first that became ready after the last one.
        self._streak = 0
        self._on_trial_since: float | None = None
        self._next_trial: float | None = None
        # Of tainted workers: when each signature was given its replacement, and all of them, some in the future.
        self._replaced: dict[str, float] = {}
        self._replacements: deque[float] = deque()
        self._degraded_until: float | None = None

    def __repr__(self) -> str:
        return (
            f"<RestartPolicy streak={self._streak} failures={len(self._failures)} "
            f"replacements={len(self._replacements)}>"
        )

    # -- deaths ----------------------------------------------------------------------------------------------

    def worker_ready(self, now: float) -> None:
        """A worker, whichever, has become ready."""
        self._forget(now)
        self._ever_ready = True
        self._next_trial = None
        if self._streak and self._on_trial_since is None:
            self._on_trial_since = now

    def start_afresh(self) -> None:
        """Workers run another program from now on: how often those of the last one died says nothing of it."""
        self._ever_ready = False
        self._failures.clear()
        self._kills.clear()
        self._streak = 0
        self._on_trial_since = None
        self._next_trial = None

    def none_missing(self) -> None:
        """As many workers serve as are wanted, and none of them is to be replaced: there is nothing to try."""
        self._next_trial = None

    @property
    def next_trial(self) -> float | None:
        """While starts keep failing beside workers that serve: when the next one is worth a try; None otherwise."""
        return self._next_trial

    def is_on_trial(self, now: float) -> bool:
        """After too many fast failures one has become ready again, and has to last before others go for its sake."""
        self._forget(now)
        return self._is_streak_long and self._on_trial_since is not None

    @property
    def is_failing(self) -> bool:
        """After too many fast failures none has become ready, or none that has not failed as well."""
        return self._next_trial is not None or (self._is_streak_long and self._on_trial_since is None)

    @property
    def _is_streak_long(self) -> bool:
        return self._streak >= self.limits.intensity

    def worker_exited(self, now: float, ended: WorkerExit, serving: float = 0.0) -> Decision:
        """A worker has ended: how its successor is to be started, or that there is to be none at all.

        `serving`: for how many seconds the one of the others has served that has done so for longest; 0 if none does.
        """
        self._forget(now)
        if ended.was_ready:
            self._ever_ready = True
            if ended.lived < self.limits.min_uptime:
                # It may be the one on trial; the next that becomes ready shall prove itself instead.
                self._on_trial_since = None
        what = _describe(ended)
        if ended.planned:
            return Restart(0.0, f"{what}, as planned")
        if not self._ever_ready and ended.status in BOOT_FAILURES:
            return GiveUp(
                ended.status,
                f"{what}: {BOOT_FAILURES[ended.status]}, and no worker has been ready yet; not trying again",
            )
        if ended.was_ready and ended.lived >= self.limits.min_uptime:
            return Restart(0.0, f"{what}; replaced at once")
        if self._was_killed(now, ended):
            return Restart(0.0, f"{what}, sent by somebody; replaced at once")
        return self._fast_failure(now, ended, what, serving)

    def _was_killed(self, now: float, ended: WorkerExit) -> bool:
        """By somebody outside, and not more often than people do."""
        if -ended.status not in SENT_SIGNALS or ended.killed_for_cause:
            return False
        if len(self._kills) >= self.limits.kills:
            return False
        self._kills.append(now)
        return True

    def _fast_failure(self, now: float, ended: WorkerExit, what: str, serving: float) -> Decision:
        limits = self.limits
        self._failures.append((now, _telling_code(ended)))
        self._on_trial_since = None
        count = f"fast failure {len(self._failures)} of {limits.intensity} in {limits.period:g} s"
        # Past the intensity it has been all along since: trials that are far apart are not to hide that.
        beyond = len(self._failures) >= limits.intensity or self._next_trial is not None
        if beyond and serving >= limits.min_uptime:
            first = self._next_trial is None
            self._streak += 1
            delay = limits.max_delay * (1 - limits.jitter * self._random())
            self._next_trial = now + delay
            return HoldOn(
                delay,
                f"{what}: {count}; workers fail as fast as they are started, but others have served for up to "
                f"{serving:.0f} s and go on",
                first,
            )
        if beyond:
            codes = {code for _, code in self._failures}
            code = codes.pop() if len(codes) == 1 else errors.EXIT_TAINTED
            return GiveUp(code, f"{what}: {count}; workers fail as fast as they are started")
        delay = self._back_off() * (1 - limits.jitter * self._random())
        self._streak += 1
        return Restart(delay, f"{what}: {count}; next attempt {f'in {delay:.2g} s' if delay else 'at once'}")

    def _back_off(self) -> float:
        """The delay after the next fast failure, without jitter."""
        if not self._streak:
            return 0.0
        doublings = min(self._streak - 1, 60)  # enough for any limits; a float ends at 1024
        return min(self.limits.first_delay * 2.0**doublings, self.limits.max_delay)

    # -- taint -----------------------------------------------------------------------------------------------

    def judge_taint(self, now: float, signature: str) -> Verdict:
        """May a worker be replaced in which an error of this signature was raised?

        To be asked for each error in a worker that is not about to be replaced anyway, also while degraded: that
        is how the cool-down learns that it is not over. That there is only one replacement at a time is up to the
        caller, for whom one takes as long as its app takes to start.
        """
        self._forget(now)
        limits = self.limits
        if signature in self._replaced:
            ago = max(0.0, now - self._replaced[signature])
            return Contain(
                f"{signature:.200} has had a worker replaced {ago:.0f} s ago, "
                f"which is once in {limits.signature_memory:g} s",
                degraded=self.is_degraded(now),
            )
        degraded = self.is_degraded(now)
        if degraded or len(self._replacements) >= limits.replacement_budget:
            self._degraded_until = now + limits.cooldown
            return Contain(
                f"{self._budget()} are used up; workers stay in service after errors until there has been no new one "
                f"for {limits.cooldown:g} s",
                degraded=True,
                first=not degraded,
            )
        start = now + self._until_next(now)
        self._replaced[signature] = start
        self._replacements.append(start)
        place = f"replacement {len(self._replacements)} of {limits.replacement_budget}"
        return Replace(start - now, f"{signature:.200}: {place} in {limits.replacement_period:g} s")

    def is_degraded(self, now: float) -> bool:
        """The budget for replacements was used up, and the cool-down is not over."""
        return self._degraded_until is not None and now < self._degraded_until

    def degraded_reason(self, now: float) -> str:
        """Why the server is degraded and for how long, for status; "" if it is not."""
        found = []
        if self._next_trial is not None:
            wait = max(0.0, self._next_trial - now)
            found.append(f"workers fail as fast as they are started; the next attempt is due in {wait:.0f} s")
        if self._degraded_until is not None and self.is_degraded(now):
            wait = self._degraded_until - now
            found.append(f"{self._budget()} were used up; for another {wait:.0f} s, if no new error comes")
        return ". ".join(found)

    @property
    def degraded_until(self) -> float | None:
        """When the cool-down is over or was, if nothing else happens; None if there never was one.

        To sleep until, for who wants to say that it is over; further errors move it.
        """
        return self._degraded_until

    def _budget(self) -> str:
        return f"{self.limits.replacement_budget} replacements in {self.limits.replacement_period:g} s"

    def _until_next(self, now: float) -> float:
        """Seconds until another replacement may start, as far as their distance goes."""
        if not self._replacements:
            return 0.0
        return max(0.0, self._replacements[-1] + self.limits.replacement_interval - now)

    # -- memory ----------------------------------------------------------------------------------------------

    def statistics(self, now: float) -> RestartStatistics:
        """What is remembered at this moment."""
        self._forget(now)
        limits = self.limits
        wait = self._until_next(now)
        if len(self._replacements) >= limits.replacement_budget:
            wait = max(wait, self._replacements[0] + limits.replacement_period - now)
        degraded = max(0.0, self._degraded_until - now) if self._degraded_until is not None else 0.0
        return RestartStatistics(
            failures=len(self._failures),
            streak=self._streak,
            next_delay=self._back_off(),
            replacements=len(self._replacements),
            next_replacement=max(wait, degraded),
            degraded=degraded,
        )

    def _forget(self, now: float) -> None:
        """Drop what no rule asks for any more.

        The memory is bounded: failures by `intensity`, kills by their limit, replacements and signatures by the
        budget, since only a signature that was given a replacement is remembered.
        """
        limits = self.limits
        while self._failures and now - self._failures[0][0] >= limits.period:
            self._failures.popleft()
        while self._kills and now - self._kills[0] >= limits.kills_period:
            self._kills.popleft()
        while self._replacements and now - self._replacements[0] >= limits.replacement_period:
            self._replacements.popleft()
        for signature in [
            known for known, start in self._replaced.items() if now - start >= limits.signature_memory
        ]:
            del self._replaced[signature]
        # The back-off starts anew when a worker that became ready after the last failure has lasted. A sibling that
        # was in service all the while proves nothing; nor does time, which slow boots would outlast.
        if self._on_trial_since is not None and now >= self._on_trial_since + limits.min_uptime:
            self._streak = 0
            self._on_trial_since = None


def describe_status(status: int) -> str:
    """`exit code 75`, or `signal 9 (SIGKILL)`."""
    if status >= 0:
        return f"exit code {status}"
    try:
        return f"signal {-status} ({signal.Signals(-status).name})"
    except ValueError:
        return f"signal {-status}"


def _describe(ended: WorkerExit) -> str:
    since = "after it was ready" if ended.was_ready else "after its start, before it was ready"
    return f"ended with {describe_status(ended.status)} {ended.lived:.1f} s {since}"


def _telling_code(ended: WorkerExit) -> int:
    """What the supervisor may end with so that its code says what the worker's did; 75 where that says nothing.

    A signal becomes 128 + n as in a shell: 139 and 134 are read as a native crash, 137 as a kill or out of memory.
    The supervisor does not end itself by the signal, since it goes on to stop the others and to report.
    """
    if not ended.was_ready and ended.status in BOOT_FAILURES:
        return ended.status
    code = ended.status if ended.status >= 0 else 128 - ended.status
    return errors.EXIT_TAINTED if code in _SAYS_NOTHING else code
