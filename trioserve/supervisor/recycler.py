"""Which workers of a pool have served enough: each one's plan, made of the configuration and what the machine allows.

`pool.py` makes one `Recycler`, tells it of each worker's start and end, and asks it whenever a worker's figures come
in; what it does about the answer is its own. The rules are in `recycling.py`. Nothing here waits.
"""

from __future__ import annotations

import logging

from trioserve.config import Config
from trioserve.supervisor.machine import cgroup_memory_limit
from trioserve.supervisor.recycling import RecyclingLimits, RecyclingPlan, rss_limit
from trioserve.supervisor.worker_process import WorkerProcess


class Recycler:
    """The plans of the workers that have not ended.

    Args:
        log: for limits that this machine cannot keep, each said once.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._plans: dict[int, RecyclingPlan] = {}
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"<Recycler {self._plans}>"

    def plan(self, worker: WorkerProcess, workers: int) -> None:
        """Draw the limits of a worker that has just been started; `workers` is the most there will be."""
        self._plans[worker.id] = RecyclingPlan(worker.started_at, self._limits(worker.config, workers))

    def due(self, worker: WorkerProcess, now: float) -> str | None:
        """Why it is to be recycled, going by what it has said last; None if it is not."""
        requests, rss = (int(worker.statistics.get(name, 0)) for name in ("requests", "rss"))
        return self._plans[worker.id].due(now, requests, rss)

    def forget(self, worker: WorkerProcess) -> None:
        """It has ended."""
        del self._plans[worker.id]

    def _limits(self, config: Config, workers: int) -> RecyclingLimits:
        memory = rss_limit(config.max_rss, cgroup_memory_limit(), workers)
        if memory.warning and memory.warning not in self._warned:
            self._warned.add(memory.warning)
            self._log.warning("%s", memory.warning)
        return RecyclingLimits(
            config.max_requests, config.max_requests_jitter, config.max_lifetime, memory.bytes
        )
