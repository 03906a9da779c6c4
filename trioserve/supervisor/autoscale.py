"""How many workers there should be: `--workers MIN..MAX`, decided from how busy their CPUs are.

`supervisor.py` makes one `Autoscaler` where a range is given, and asks it whenever the workers' figures have come
in; it also carries the decision out and logs its reason. Nothing here waits, reads a clock or starts a process.

One worker more when they have been busy for a while; one fewer when the rest would have been idle enough for a
longer while. One at a time, since only the next figures show what the last step has done; and the two thresholds
are so far apart that no step calls for its opposite (`AutoscaleLimits` checks it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AutoscaleLimits:
    """The numbers of the decision. Utilisation is of one worker: 1.0 is one core, kept busy all the time.

    Attributes:
        busy: mean utilisation above which there are too few. 0.8: from there on waiting grows far
            faster than the load.
        busy_for: seconds for which it must have been so. 10: a burst is over before a worker has started for it.
        spare: mean utilisation of the others, had they to do the work of the one that goes, below which there are
            too many. 0.5: the load can rise by half before it comes back.
        spare_for: seconds of that. 60: a worker too many costs memory, one too few costs waiting.
        cooldown: seconds after a decision during which there is no other. 15: the new worker is ready and its share
            of the connections shows.
    """

    busy: float = 0.8
    busy_for: float = 10.0
    spare: float = 0.5
    spare_for: float = 60.0
    cooldown: float = 15.0

    def __post_init__(self) -> None:
        if not 0 < self.spare < self.busy:
            raise ValueError(
                f"spare = {self.spare:g} must be above 0 and below busy = {self.busy:g}: otherwise the worker that "
                f"one figure adds is taken away by the other, for ever"
            )


@dataclass(frozen=True, slots=True)
class Decision:
    """There shall be so many workers, and why, in words with the figures."""

    workers: int
    reason: str


class Autoscaler:
    """Remembers since when the workers have been too busy, or too idle.

    Attributes:
        low, high: the bounds that no decision leaves.
    """

    def __init__(self, low: int, high: int, limits: AutoscaleLimits | None = None) -> None:
        if not 1 <= low <= high:
            raise ValueError(
                f"{low}..{high} workers: the first must be at least 1, the second not less than it"
            )
        self.low = low
        self.high = high
        self.limits = limits or AutoscaleLimits()
        self._busy_since: float | None = None
        self._spare_since: float | None = None
        self._rests_until = -math.inf

    def __repr__(self) -> str:
        return f"<Autoscaler {self.low}..{self.high}>"

    def decide(self, now: float, workers: int, utilisations: Sequence[float]) -> Decision | None:
        """What is to be changed, if anything.

        Args:
            now: seconds on any monotonic clock.
            workers: how many there are meant to be at the moment.
            utilisations: of each worker that is ready and not draining, over the time since the last call.

        Returns:
            The new number; None to leave it. While workers are starting (there are fewer figures than workers)
            nothing is decided: what they will take over cannot be known.
        """
        if not self.low <= workers <= self.high:
            # Somebody has set it by hand, or the range has changed.
            nearest = min(max(workers, self.low), self.high)
            return self._decided(now, nearest, f"{workers} workers, the range is {self.low}..{self.high}")
        if not utilisations:
            self._busy_since = self._spare_since = None
            return None
        self._watch(now, utilisations)
        if now < self._rests_until or len(utilisations) < workers:
            return None
        return self._step(now, workers, utilisations)

    def _watch(self, now: float, utilisations: Sequence[float]) -> None:
        """Begin, go on with, or end the spans of being too busy and too idle."""
        busy = _mean(utilisations) > self.limits.busy
        self._busy_since = (now if self._busy_since is None else self._busy_since) if busy else None
        others = len(utilisations) - 1
        spare = others > 0 and _total(utilisations) / others < self.limits.spare
        self._spare_since = (now if self._spare_since is None else self._spare_since) if spare else None

    def _step(self, now: float, workers: int, utilisations: Sequence[float]) -> Decision | None:
        limits = self.limits
        mean = f"CPU utilisation of {len(utilisations)} ready {_workers(len(utilisations))} {_mean(utilisations):.0%}"
        if self._busy_since is not None and workers < self.high and now - self._busy_since >= limits.busy_for:
            span = f"above {limits.busy:.0%} for {now - self._busy_since:.0f} s"
            return self._decided(now, workers + 1, f"{mean}, {span}")
        if (
            self._spare_since is not None
            and workers > self.low
            and now - self._spare_since >= limits.spare_for
        ):
            fewer = _total(utilisations) / (len(utilisations) - 1)
            span = f"below {limits.spare:.0%} for {now - self._spare_since:.0f} s"
            return self._decided(now, workers - 1, f"{mean}; with one fewer it would be {fewer:.0%}, {span}")
        return None

    def _decided(self, now: float, workers: int, reason: str) -> Decision:
        self._busy_since = self._spare_since = None
        self._rests_until = now + self.limits.cooldown
        return Decision(workers, f"{reason}: now {workers} of {self.low}..{self.high}")


def _total(utilisations: Sequence[float]) -> float:
    # A figure below 0 is that of a process whose times could no longer be read.
    return sum(max(0.0, utilisation) for utilisation in utilisations)


def _mean(utilisations: Sequence[float]) -> float:
    return _total(utilisations) / len(utilisations)


def _workers(count: int) -> str:
    return "worker" if count == 1 else "workers"
