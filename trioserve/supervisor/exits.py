"""What is written down when a worker ends: one line in the log, one crash report, and the supervisor's memory of it.

`pool.py` tells an `ExitDesk` of each start and each end. What a death was is decided in `exit_report.py`; this file
gathers what only the parent can know (the counters of the cgroup before and after, the table of requests in flight,
the stacks that a dying interpreter has left). Synchronous: a report must not be cut by a cancellation.
"""

from __future__ import annotations

import logging

from trioserve.structure.crash_report import complete_report, emit_report
from trioserve.supervisor.exit_report import (
    CrashHistory,
    ExitClass,
    WorkerDeath,
    build_exit_report,
    classify,
    completes_own_report,
    describe,
    split_last_words,
)
from trioserve.supervisor.machine import read_memory_events
from trioserve.supervisor.worker_process import WorkerProcess


class ExitDesk:
    """The ends of one supervisor's workers.

    Attributes:
        history: the last crash reports, for `trioserve ctl crashes`.
        crash_dir: where each report becomes a file, or None.
    """

    def __init__(self, crash_dir: str | None, log: logging.Logger) -> None:
        self.history = CrashHistory()
        self.crash_dir = crash_dir
        self._log = log
        self._events_before: dict[int, dict[str, int]] = {}

    def note_start(self, worker: WorkerProcess) -> None:
        """Remember what had been counted by then."""
        self._events_before[worker.id] = read_memory_events()

    def note_end(self, worker: WorkerProcess, now: float) -> str:
        """Log and report how it ended; returns the class of its end.

        A report that a broken worker wrote must not break its parent: never raises.
        """
        try:
            return self._describe(worker, now)
        except Exception:
            self._log.critical("the end of worker %d could not be described", worker.id, exc_info=True)
            return ExitClass.KILLED.value

    def _describe(self, worker: WorkerProcess, now: float) -> str:
        assert worker.status is not None
        unsent, stacks = split_last_words(worker.last_words())
        death = WorkerDeath(
            worker_id=worker.id,
            pid=worker.pid,
            generation=worker.generation,
            status=worker.status,
            was_ready=worker.ready_at is not None,
            asked=worker.asked,
            uptime=now - worker.started_at,
            last_heartbeat=None if worker.heartbeat_at is None else now - worker.heartbeat_at,
            last_statistics=worker.statistics,
            in_flight=worker.requests_in_flight(),
            memory_events_before=self._events_before.pop(worker.id, None),
            memory_events_after=read_memory_events(),
            stacks=stacks,
            # One that was killed had no time to write one about that.
            own_report=unsent or (worker.own_report if worker.status > 0 else None),
            failure=worker.failure,
        )
        kind = classify(death)
        if kind.planned:
            self._log.info("%s", describe(death))
        else:
            self._log.error("%s", describe(death))
            report = build_exit_report(death)
            if completes_own_report(death):
                complete_report(report, self.crash_dir)
            else:
                emit_report(report, self.crash_dir)
            self.history.add(report)
        return kind.value
