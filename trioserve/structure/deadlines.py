"""Phase deadlines: a number on each connection, and one reaper per worker that acts on whoever is late.

A connection sets `deadline` with a plain attribute write and calls `Deadlines.arm` only if the new deadline comes
before the moment at which the reaper will look at it anyway. So a busy keep-alive connection costs one
registration every few seconds, not one timer per request, and a deadline that moves later costs nothing at all.

The reaper (`run`, a task of the worker) sleeps until the earliest bucket is due; with nothing armed it sleeps for
ever. It works on trio's clock, so virtual time works in tests. Cancelling it stops all time-outs.
"""

from __future__ import annotations

import heapq
import math
from typing import Protocol

import trio

# Deadlines are rounded up to the next 1/20 s: a time-out is at most 50 ms late, and thousands of connections that
# are due at about the same time share one wake-up.
_TICKS_PER_SECOND = 20
TICK = 1 / _TICKS_PER_SECOND

NEVER = math.inf


class Expiring(Protocol):
    """What can be armed: the reaper reads `deadline`, keeps `armed_at`, and calls `expire` when it is late."""

    deadline: float
    armed_at: float

    def expire(self) -> None:
        """Act on the deadline that has passed; called from the reaper's task, must not raise."""
        ...


class Deadlines:
    """The buckets of armed connections and the task that looks at them."""

    def __init__(self) -> None:
        self._buckets: dict[int, set[Expiring]] = {}
        self._due: list[int] = []  # heap of the keys of _buckets
        self._sleep: trio.CancelScope | None = None

    def __repr__(self) -> str:
        return f"<Deadlines armed={self.armed}>"

    @property
    def armed(self) -> int:
        """How many connections stand in a bucket; 0 once all are closed."""
        return sum(map(len, self._buckets.values()))

    def arm(self, entry: Expiring) -> None:
        """Make sure the reaper looks at `entry` by its `deadline`. Cheap to call when it will anyway."""
        deadline = entry.deadline
        if deadline >= entry.armed_at:
            return
        self.disarm(entry)
        tick = math.floor(deadline * _TICKS_PER_SECOND)
        # Looked at when the tick is over; any deadline from this tick's beginning on needs no earlier look.
        entry.armed_at = tick / _TICKS_PER_SECOND
        bucket = self._buckets.get(tick)
        if bucket is None:
            self._buckets[tick] = {entry}
            heapq.heappush(self._due, tick)
            if self._sleep is not None and self._due[0] == tick:
                self._sleep.deadline = (tick + 1) / _TICKS_PER_SECOND
        else:
            bucket.add(entry)

    def disarm(self, entry: Expiring) -> None:
        """Forget `entry`; to be called when its connection closes."""
        if entry.armed_at is not NEVER:
            tick = round(entry.armed_at * _TICKS_PER_SECOND)
            bucket = self._buckets.get(tick)
            if bucket is not None:
                bucket.discard(entry)
            entry.armed_at = NEVER

    async def run(self) -> None:
        """Sleep, look at the bucket that is due, expire the late; for ever."""
        while True:
            deadline = (self._due[0] + 1) / _TICKS_PER_SECOND if self._due else NEVER
            with trio.CancelScope(deadline=deadline) as self._sleep:
                await trio.sleep_forever()
            self._sleep = None
            self._reap(trio.current_time())

    def _reap(self, now: float) -> None:
        while self._due and (self._due[0] + 1) / _TICKS_PER_SECOND <= now:
            for entry in self._buckets.pop(heapq.heappop(self._due)):
                entry.armed_at = NEVER
                if entry.deadline <= now:
                    entry.expire()
                elif entry.deadline is not NEVER:
                    self.arm(entry)
