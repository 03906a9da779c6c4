"""When a worker that is well has served enough: `--max-requests`, `--max-lifetime`, `--max-rss`.

`recycler.py` makes one `RecyclingPlan` for each worker, and asks it when the worker's figures come in; the successor
is started first, and one worker at a time is replaced, which is the pool's to see to. Nothing here waits, reads a
clock or a process.

Workers that started together share their load, and so would reach the same limit together: chance gives each its
own, drawn once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class RecyclingLimits:
    """What is asked for; None is no limit.

    Attributes:
        max_requests: requests that a worker serves.
        max_requests_jitter: most that chance adds to it, as in hypercorn.
        max_lifetime: seconds.
        max_rss: bytes of resident memory; see `rss_limit`.
        jitter: largest part that chance takes off a lifetime or off the memory; they stay the most that is had.
            0.1: two hours of a day, and only 5 % more recycling on average.
        settling: seconds for which memory is not looked at. 30: if an app needs more than its limit from the start,
            replacing it does not help; it shall not be done without pause.
    """

    max_requests: int | None = None
    max_requests_jitter: int = 0
    max_lifetime: float | None = None
    max_rss: int | None = None
    jitter: float = 0.1
    settling: float = 30.0


class RecyclingPlan:
    """One worker's own limits.

    Attributes:
        max_requests, max_lifetime, max_rss: as drawn; infinite where there is no limit.
    """

    def __init__(
        self, started: float, limits: RecyclingLimits, *, random: Callable[[], float] = random.random
    ) -> None:
        self._started = started
        self._settled_at = started + limits.settling
        self.max_requests = self.max_lifetime = self.max_rss = math.inf
        if limits.max_requests is not None:
            extra = math.floor(random() * (limits.max_requests_jitter + 1))
            self.max_requests = limits.max_requests + extra
        if limits.max_lifetime is not None:
            self.max_lifetime = limits.max_lifetime * (1 - limits.jitter * random())
        if limits.max_rss is not None:
            self.max_rss = limits.max_rss * (1 - limits.jitter * random())
        # A sum that is kept, not a difference taken anew each time: who sleeps until then must find it due.
        self._ends_at = started + self.max_lifetime

    def __repr__(self) -> str:
        return (
            f"<RecyclingPlan requests={self.max_requests} lifetime={self.max_lifetime:.0f} s "
            f"rss={self.max_rss / _MIB:.0f} MiB>"
        )

    def due(self, now: float, requests: int, rss: int) -> str | None:
        """Why the worker is to be recycled, in words that follow "recycling:"; None if it is not.

        Args:
            now: seconds, on the clock of `started`.
            requests: how many it has served.
            rss: its resident memory in bytes; 0 if that is not known.
        """
        if requests >= self.max_requests:
            return f"it has served {requests:,} requests, its limit is {self.max_requests:,}"
        if now >= self._ends_at:
            return f"it has run for {now - self._started:,.0f} s, its limit is {self.max_lifetime:,.0f} s"
        if rss > self.max_rss and now >= self._settled_at:
            return f"it uses {rss / _MIB:,.0f} MiB of memory, its limit is {self.max_rss / _MIB:,.0f} MiB"
        return None

    def next_check(self, now: float) -> float:
        """When its lifetime will be over, or `now` if it is; infinite if it has none. To sleep until."""
        return max(now, self._ends_at)


@dataclass(frozen=True, slots=True)
class RssLimit:
    """What `--max-rss` comes to on this machine: bytes, or None for no limit; and a warning for the log, or ""."""

    bytes: int | None
    warning: str = ""


def rss_limit(asked: float | None, cgroup_limit: int | None, workers: int) -> RssLimit:
    """The memory one worker may grow to before it is recycled.

    Args:
        asked: more than 1: bytes, which are taken as they are; up to 1: the part of the cgroup's limit that all
            workers together may use; the supervisor, and what else runs there, need the rest.
        cgroup_limit: bytes, or None if there is no such limit.
        workers: the most there will be, not counting successors.

    While a worker is replaced it and its successor are both there, so the cgroup must hold one more than `workers`.
    """
    if asked is None:
        return RssLimit(None)
    if asked <= 1:
        if cgroup_limit is None:
            return RssLimit(
                None,
                f"max_rss = {asked:g} is a part of the cgroup's memory limit, and there is none: workers are not "
                f"recycled for their memory. Set a limit (systemd: MemoryMax=), or max_rss in bytes",
            )
        return RssLimit(max(1, int(asked * cgroup_limit / (workers + 1))))
    needed = int(asked) * (workers + 1)
    if cgroup_limit is not None and needed > cgroup_limit:
        return RssLimit(
            int(asked),
            f"max_rss = {asked / _MIB:,.0f} MiB, {workers} workers and one that replaces another make "
            f"{needed / _MIB:,.0f} MiB, and the cgroup allows {cgroup_limit / _MIB:,.0f} MiB: the kernel may kill "
            f"workers first. At most {cgroup_limit // (workers + 1) / _MIB:,.0f} MiB leaves room for that",
        )
    return RssLimit(int(asked))
