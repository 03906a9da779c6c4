"""What a worker's death was, and the report of it: completed by the parent, who is the only one left to tell.

`exits.py` gathers a `WorkerDeath`; here it is classified by a table, put into words, and made into a crash report. A
worker that could still write one of its own gets that one completed, under its id, so that a death has one file. What
a report may not hold is told in `structure/crash_report.py`. Pure, but for the time and the random part of an id.
"""

from __future__ import annotations

import enum
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from trioserve import errors
from trioserve.observe.in_flight import InFlight
from trioserve.supervisor.restart_policy import BOOT_FAILURES, describe_status

# Requests that a report and a log line name.
_MOST_REQUESTS = 200
_MOST_IN_LINE = 3
_STACK_LINES = 400


class ExitClass(enum.Enum):
    """The kinds of end."""

    BOOT = "boot"
    APP_ERROR = "app error"
    OURS = "ours"
    HANG = "hang"
    OUT_OF_MEMORY = "out of memory"
    NATIVE_CRASH = "native crash"
    KILLED = "killed"
    RECYCLED = "recycled"
    STOPPED = "stopped"


# What an exit code of a worker means (`errors.py`); a code that is not here is the app's own.
_BY_CODE = {
    errors.EXIT_SERVER_BUG: ExitClass.OURS,
    errors.EXIT_OS: ExitClass.OURS,
    errors.EXIT_TAINTED: ExitClass.APP_ERROR,
    errors.EXIT_LOOP_BLOCKED: ExitClass.HANG,
    errors.EXIT_HARD_DRAIN: ExitClass.HANG,
    errors.EXIT_MEMORY: ExitClass.OUT_OF_MEMORY,
}

# What a fault in native code raises; the names differ from system to system, the numbers do not matter.
_NATIVE = frozenset({"SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT", "SIGSYS", "SIGTRAP"})


@dataclass(frozen=True, slots=True)
class WorkerDeath:
    """All that is known of one worker's end.

    Attributes:
        status: exit code, or minus the number of a signal.
        asked: what the supervisor had asked of it last, such as "drain: reload", "stop: SIGTERM" or
            "kill: no heartbeat"; or "".
        uptime, last_heartbeat: seconds since its start, and since its last sign of life (None: it gave none).
        memory_events_before, memory_events_after: the cgroup's counters at its start and now.
        stacks: what faulthandler wrote.
        own_report: the crash report it wrote itself.
    """

    worker_id: int
    pid: int
    generation: int
    status: int
    was_ready: bool
    asked: str
    uptime: float
    last_heartbeat: float | None = None
    last_statistics: Mapping[str, Any] = field(default_factory=dict)
    in_flight: Sequence[InFlight] = ()
    memory_events_before: Mapping[str, int] | None = None
    memory_events_after: Mapping[str, int] | None = None
    stacks: str = ""
    own_report: Mapping[str, Any] | None = None


def classify(death: WorkerDeath) -> ExitClass:
    """The kind of end, by the first rule that fits."""
    killed = death.asked.startswith("kill")
    if killed and "heartbeat" in death.asked:
        return ExitClass.HANG
    if death.status == 0 and not killed:
        return ExitClass.RECYCLED if death.asked.startswith("drain") else ExitClass.STOPPED
    if death.status < 0:
        return _classify_signal(death)
    if not death.was_ready:
        return ExitClass.BOOT
    return _BY_CODE.get(death.status, ExitClass.APP_ERROR)


def _classify_signal(death: WorkerDeath) -> ExitClass:
    name = signal_name(death.status)
    if name in _NATIVE:
        return ExitClass.NATIVE_CRASH
    if name == "SIGTERM" and death.asked:
        return ExitClass.STOPPED  # it had not come so far that it could have done more
    if name == "SIGKILL" and not death.asked.startswith("kill") and _oom_kills(death) > 0:
        return ExitClass.OUT_OF_MEMORY
    return ExitClass.KILLED


def _oom_kills(death: WorkerDeath) -> int:
    before, after = death.memory_events_before or {}, death.memory_events_after or {}
    return after.get("oom_kill", 0) - before.get("oom_kill", 0)


def signal_name(status: int) -> str:
    """The name of the signal in a negative status; "" for an exit code."""
    return describe_status(status).rpartition("(")[2].rstrip(")") if status < 0 else ""


def describe(death: WorkerDeath) -> str:
    """One line: the kind of end, how, after how long, and what was lost with it."""
    kind = classify(death)
    parts = [
        f"worker {death.worker_id} (pid {death.pid}) ended: {kind.value}, {describe_status(death.status)}"
    ]
    if death.status in BOOT_FAILURES and not death.was_ready:
        parts.append(BOOT_FAILURES[death.status])
    parts.append(f"after {death.uptime:.1f} s")
    if death.asked:
        parts.append(f"asked to {death.asked}")
    lost = list(death.in_flight)
    if lost:
        shown = ", ".join(f"{request.method} {request.path}" for request in lost[:_MOST_IN_LINE])
        more = f" and {len(lost) - _MOST_IN_LINE} more" if len(lost) > _MOST_IN_LINE else ""
        parts.append(f"{len(lost)} requests in flight: {shown}{more}")
    return "; ".join(parts)


def build_exit_report(death: WorkerDeath) -> dict[str, Any]:
    """The worker's own report, or a new one, with what the parent knows under "exit"."""
    report = dict(death.own_report) if death.own_report else _new_report(death)
    report["exit"] = {
        "class": classify(death).value,
        "status": death.status,
        "signal": signal_name(death.status) or None,
        "asked": death.asked or None,
        "was_ready": death.was_ready,
        "uptime": round(death.uptime, 3),
        "last_heartbeat": None if death.last_heartbeat is None else round(death.last_heartbeat, 3),
        "statistics": dict(death.last_statistics),
        "memory_events": {"before": death.memory_events_before, "after": death.memory_events_after},
        "in_flight": [
            {"method": request.method, "path": request.path} for request in death.in_flight[:_MOST_REQUESTS]
        ],
        "stacks": death.stacks.splitlines()[:_STACK_LINES],
        "worker": death.worker_id,
        "generation": death.generation,
    }
    return report


def _new_report(death: WorkerDeath) -> dict[str, Any]:
    moment = datetime.now(UTC)
    kind = classify(death)
    return {
        "report": "crash",
        "id": f"{moment:%Y%m%dT%H%M%S}-{death.pid}-{os.urandom(4).hex()}",
        "row": None,
        "verdict": None,
        "signature": f"{kind.value}: {describe_status(death.status)}",
        "nth": 1,
        "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "pid": death.pid,
        "summary": describe(death),
    }


class CrashHistory:
    """The last reports, for `trioserve ctl crashes`."""

    def __init__(self, most: int = 50) -> None:
        self._most = most
        self._reports: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def __repr__(self) -> str:
        return f"<CrashHistory {len(self._reports)} reports>"

    def add(self, report: dict[str, Any]) -> None:
        """Keep a report; the oldest goes when there are too many."""
        self._reports[str(report["id"])] = report
        while len(self._reports) > self._most:
            self._reports.popitem(last=False)

    def summaries(self) -> list[dict[str, Any]]:
        """A line's worth of each, the newest first."""
        return [
            {
                "id": identity,
                "time": report.get("time"),
                "worker": report["exit"]["worker"],
                "pid": report.get("pid"),
                "class": report["exit"]["class"],
                "exit": describe_status(report["exit"]["status"]),
                "summary": report.get("summary"),
            }
            for identity, report in reversed(self._reports.items())
        ]

    def get(self, identity: str) -> dict[str, Any] | None:
        """The whole report."""
        return self._reports.get(identity)
