"""As many workers as `workers` asks for, and with a range of them, as many as the load needs.

`supervisor.py` makes one `Scaling`, runs it beside the pool, and tells it when a reload has changed the setting. What
is to be done about the load is decided in `autoscale.py`. Without a range nothing runs here but a task that sleeps;
cancelling `run` leaves the number of workers as it is.
"""

from __future__ import annotations

import logging

import trio

from trioserve.supervisor.autoscale import Autoscaler
from trioserve.supervisor.machine import cpu_count, cpu_seconds
from trioserve.supervisor.pool import WorkerPool

# Between two looks at the workers' CPU time, while the number of workers follows the load (seconds); and while there
# are as few as may be and none of them does more than this share of a CPU, which is what a machine at rest should pay.
_INTERVAL = 1.0
_IDLE_INTERVAL = 5.0
_IDLE_SHARE = 0.05


def wanted_workers(workers: int | str) -> tuple[int, int]:
    """The least and the most workers that a setting asks for."""
    if workers == "auto":
        return cpu_count(), cpu_count()
    if isinstance(workers, int):
        return workers, workers
    low, _, high = workers.partition("..")
    return int(low), int(high)


class Scaling:
    """Keeps a pool's number of workers within the setting.

    Attributes:
        low, high: what the setting asks for, as it was last `set`.
    """

    def __init__(self, pool: WorkerPool, log: logging.Logger) -> None:
        self.low = self.high = 0
        self._pool = pool
        self._log = log
        self._autoscaler: Autoscaler | None = None
        self._following = trio.CancelScope()

    def __repr__(self) -> str:
        return f"<Scaling {self.low}..{self.high}>"

    def set(self, workers: int | str) -> int:
        """The setting is this from now on; returns how many workers there should be, as near as can be to what is."""
        self.low, self.high = wanted_workers(workers)
        self._pool.most = self.high
        self._autoscaler = Autoscaler(self.low, self.high) if self.high > self.low else None
        self._following.cancel(reason="the range of workers has changed")
        return min(max(self._pool.wanted, self.low), self.high)

    async def run(self) -> None:
        """Follow the load for as long as there is a range, until cancelled."""
        while True:
            with trio.CancelScope() as self._following:
                if self._autoscaler is None:
                    await trio.sleep_forever()
                else:
                    await self._follow_load(self._autoscaler)

    async def _follow_load(self, autoscaler: Autoscaler) -> None:
        """Scale with the workers' use of their CPUs."""
        seconds: dict[int, float] = {}
        looked_at = trio.current_time()
        pause = _INTERVAL
        while True:
            await trio.sleep(pause)
            now = trio.current_time()
            pool = self._pool
            used = {worker.pid: cpu_seconds(worker.pid) for worker in pool.ready()}
            shares = [(used[pid] - seconds[pid]) / (now - looked_at) for pid in used if pid in seconds]
            seconds, looked_at = used, now
            at_rest = bool(shares) and pool.wanted <= self.low and max(shares) < _IDLE_SHARE
            pause = _IDLE_INTERVAL if at_rest else _INTERVAL
            decision = autoscaler.decide(now, pool.wanted, shares)
            if decision is not None and not pool.stopping:
                self._log.info(
                    "scaling from %d to %d workers: %s", pool.wanted, decision.workers, decision.reason
                )
                pool.scale(decision.workers)
