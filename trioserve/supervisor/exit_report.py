"""What a worker's death was, and the report of it: completed by the parent, who is the only one left to tell.

`exits.py` gathers a `WorkerDeath`; here it is classified by a table, put into words, and made into a crash report. A
worker that could still write one of its own gets that one completed, under its id, so that a death has one file. What
a report may not hold is told in `structure/crash_report.py`. Pure, but for the time and the random part of an id.

What a worker has said is not believed: it may have been out of its mind. Its texts are cut and cleaned before they
get into a line of the log, and its id must be one that names a file of this very process.
"""

from __future__ import annotations

import contextlib
import enum
import json
import re
import signal
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trioserve import errors
from trioserve.observe.in_flight import InFlight
from trioserve.structure.crash_report import WorkerFacts, begin_report, describe_versions, serialise
from trioserve.structure.error_tree import cut, rank_of_file, redact
from trioserve.supervisor.restart_policy import BOOT_FAILURES, describe_status

# Requests that a report and a log line name, and characters of each in the line.
_MOST_REQUESTS = 200
_MOST_IN_LINE = 3
_REQUEST_IN_LINE = 80
# Of faulthandler's output, and of the figures that a worker has sent.
_STACK_LINES = 400
_STACK_LINE = 300
_MOST_FIGURES = 40
# Of any text of the worker's in a line of the log.
_WORDS = 200
# Of why it could not start: room for a path twice, and for what was raised there.
MOST_OF_A_REASON = 1000


class ExitClass(enum.Enum):
    """The kinds of end."""

    #: it never became ready
    BOOT = "boot"
    #: an exception of the app's, or the app has ended its process
    APP_ERROR = "app error"
    #: trioserve's own code, or its sockets
    OURS = "ours"
    #: its event loop was blocked, or its drain did not end
    HANG = "hang"
    #: MemoryError, or the kernel has killed it for its memory
    OUT_OF_MEMORY = "out of memory"
    #: a fault in code that is not Python
    NATIVE_CRASH = "native crash"
    #: by a signal that somebody sent
    KILLED = "killed"
    #: it has been replaced, as planned
    RECYCLED = "recycled"
    #: it has been told to end
    STOPPED = "stopped"

    @property
    def planned(self) -> bool:
        """It was wanted: a line in the log will do."""
        return self in (ExitClass.RECYCLED, ExitClass.STOPPED)


# What an exit code means (`errors.py`) once the worker was ready, and before; one that is not here is the app's own.
_BY_CODE = {
    errors.EXIT_SERVER_BUG: (ExitClass.OURS, ExitClass.OURS),
    errors.EXIT_OS: (ExitClass.OURS, ExitClass.BOOT),
    errors.EXIT_TAINTED: (ExitClass.APP_ERROR, ExitClass.BOOT),
    errors.EXIT_LOOP_BLOCKED: (ExitClass.HANG, ExitClass.HANG),
    errors.EXIT_HARD_DRAIN: (ExitClass.HANG, ExitClass.HANG),
    errors.EXIT_MEMORY: (ExitClass.OUT_OF_MEMORY, ExitClass.OUT_OF_MEMORY),
}
_OTHER_CODE = (ExitClass.APP_ERROR, ExitClass.BOOT)

# The row of the boundary's table that a worker would have named.
_ROWS = {errors.EXIT_LOOP_BLOCKED: "H1", errors.EXIT_HARD_DRAIN: "H2", errors.EXIT_MEMORY: "M1"}

# What a fault in native code raises. The others are sent by somebody.
_NATIVE = frozenset({"SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT", "SIGSYS", "SIGTRAP"})

# Why the supervisor has killed it: by these words, it was stuck. For other reasons it was just killed.
_STUCK = ("heartbeat", "drain")

# What `begin_report` makes; the second number is the process's.
_REPORT_ID = re.compile(r"[0-9]{8}T[0-9]{6}-([0-9]{1,10})-[0-9a-f]{8}")

# One that a worker has decided to end for. After a fault that it has contained it has gone on.
_ENDING_VERDICTS = frozenset({"replace", "fatal", "exit"})

_FRAME = re.compile(r'\s+File "(.+)", line ([0-9]+)')


@dataclass(frozen=True, slots=True)
class WorkerDeath:
    """All that is known of one worker's end.

    Attributes:
        status: exit code, or minus the number of a signal.
        failure: why it could not start, as it has said itself, or "".
        asked: what the supervisor had asked of it last, such as "drain: reload", "stop: SIGTERM",
            "end: SIGTERM" (in a startup that blocks) or "kill: no heartbeat"; or "".
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
    failure: str = ""


# -- the kind of end -----------------------------------------------------------------------------------------


def classify(death: WorkerDeath) -> ExitClass:
    """The kind of end, by the first rule that fits."""
    status = _status_of(death)
    if status < 0:
        return _classify_signal(death, signal_name(status))
    asked = death.asked.partition(":")[0]
    if status == 0 and asked != "kill":
        if asked in ("drain", "recycle"):
            return ExitClass.RECYCLED
        # Nobody has asked it to end, and it has not even begun: an app that calls sys.exit() when it is imported.
        return ExitClass.STOPPED if death.was_ready or asked else ExitClass.BOOT
    when_ready, before = _BY_CODE.get(status, _OTHER_CODE)
    if _was_stuck(death):
        return ExitClass.HANG
    return when_ready if death.was_ready else before


def _classify_signal(death: WorkerDeath, name: str) -> ExitClass:
    if _was_stuck(death) and name in ("SIGKILL", "SIGABRT"):
        return ExitClass.HANG
    if name in _NATIVE:
        return ExitClass.NATIVE_CRASH
    asked = death.asked.partition(":")[0]
    if name == "SIGKILL" and asked not in ("kill", "end"):
        # The kernel counts the processes of a cgroup, not which they were: it may have been another one.
        return ExitClass.OUT_OF_MEMORY if _oom_kills(death) > 0 else ExitClass.KILLED
    if name == "SIGKILL" and asked == "end":
        return ExitClass.STOPPED
    if name in ("SIGTERM", "SIGINT", "SIGQUIT") and asked not in ("", "kill"):
        return (
            ExitClass.STOPPED
        )  # it had not come so far that it could have done more, or was told three times
    return ExitClass.KILLED


def _was_stuck(death: WorkerDeath) -> bool:
    order, _, reason = death.asked.partition(":")
    return order == "kill" and any(word in reason for word in _STUCK)


def _status_of(death: WorkerDeath) -> int:
    """Exit code, or minus the number of the signal, also where a shell or we ourselves have said 128 + n for it."""
    if death.status > 128 and _signal(death.status - 128) is not None:
        return 128 - death.status
    return death.status


def _oom_kills(death: WorkerDeath) -> int:
    before, after = death.memory_events_before or {}, death.memory_events_after or {}
    return after.get("oom_kill", 0) - before.get("oom_kill", 0)


def signal_name(status: int) -> str:
    """The name of the signal in a negative status; "" for an exit code."""
    found = _signal(-status) if status < 0 else None
    return "" if found is None else found.name


def _signal(number: int) -> signal.Signals | None:
    try:
        return signal.Signals(number)
    except ValueError:
        return None


# -- in words ------------------------------------------------------------------------------------------------


def describe(death: WorkerDeath) -> str:
    """One line: the kind of end, how, after how long, and what was lost with it."""
    kind = classify(death)
    parts = [
        f"worker {death.worker_id} (pid {death.pid}) ended: {kind.value}, {describe_status(death.status)}"
    ]
    if death.status in BOOT_FAILURES and not death.was_ready:
        parts.append(BOOT_FAILURES[death.status])
    if death.failure:
        parts.append(death.failure)
    if kind is ExitClass.OUT_OF_MEMORY and _oom_kills(death) > 0:
        parts.append("the kernel has killed for memory in this cgroup")
    parts.append(f"after {death.uptime:.1f} s")
    own = _own_report(death)
    if own is not None and own.get("summary"):
        parts.append(clean(own["summary"]))
    if kind is ExitClass.HANG and death.last_heartbeat is not None:
        parts.append(f"last heartbeat {death.last_heartbeat:.1f} s before")
    if death.asked:
        parts.append(f"asked to {clean(death.asked)}")
    if death.in_flight:
        parts.append(_describe_requests(death.in_flight))
    return "; ".join(parts)


def _describe_requests(lost: Sequence[InFlight]) -> str:
    shown = ", ".join(
        f"{request.method} {cut(request.path, _REQUEST_IN_LINE)}" for request in lost[:_MOST_IN_LINE]
    )
    more = f" and {len(lost) - _MOST_IN_LINE} more" if len(lost) > _MOST_IN_LINE else ""
    return f"{len(lost)} request{'s' if len(lost) > 1 else ''} in flight: {shown}{more}"


def clean(text: object, most: int = _WORDS) -> str:
    """A text of the worker's as part of a line, and no more than so many characters of it."""
    shown = cut(" ".join(redact(str(text)[: 4 * most]).split()), most)
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in shown)


# -- the report ----------------------------------------------------------------------------------------------


def build_exit_report(death: WorkerDeath, now: float | None = None) -> dict[str, Any]:
    """The worker's own report, or a new one, with what the parent knows under "exit". `now`: time.monotonic."""
    own = _own_report(death)
    report = _new_report(death) if own is None else own
    report["exit"] = {
        "class": classify(death).value,
        "status": death.status,
        "signal": signal_name(_status_of(death)) or None,
        "worker": death.worker_id,
        "pid": death.pid,
        "generation": death.generation,
        "was_ready": death.was_ready,
        "asked": clean(death.asked) or None,
        "uptime": round(death.uptime, 3),
        "last_heartbeat": None if death.last_heartbeat is None else round(death.last_heartbeat, 3),
        "statistics": _figures(death.last_statistics),
        "memory_events": {"before": death.memory_events_before, "after": death.memory_events_after},
        "in_flight": _list_requests(death.in_flight, time.monotonic() if now is None else now),
        "stacks": _stack_lines(death.stacks),
    }
    return report


def split_last_words(text: str) -> tuple[dict[str, Any] | None, str]:
    """A report that the worker could not send any more, if there is one, and what faulthandler wrote besides."""
    report: dict[str, Any] | None = None
    stacks = []
    for line in text.splitlines(keepends=True):
        if not line.startswith('{"report":'):
            stacks.append(line)
            continue
        with contextlib.suppress(ValueError, RecursionError):
            report = json.loads(line)
    return report, "".join(stacks)


def completes_own_report(death: WorkerDeath) -> bool:
    """The report of this death is one that the worker has already emitted, now with its "exit"."""
    return _own_report(death) is not None


def _own_report(death: WorkerDeath) -> dict[str, Any] | None:
    """What the worker wrote about its end, as far as it did; with an id that may name a file."""
    own = death.own_report
    if not isinstance(own, Mapping) or str(own.get("verdict")) not in _ENDING_VERDICTS:
        return None
    identity = own.get("id")
    named = _REPORT_ID.fullmatch(identity) if isinstance(identity, str) else None
    if named is None or int(named[1]) != death.pid:
        return None
    told = {str(name): value for name, value in own.items()}
    if not isinstance(told.get("cut", []), list):
        del told["cut"]  # it is added to when the report is too long
    return told


def _new_report(death: WorkerDeath) -> dict[str, Any]:
    report = begin_report(row=_ROWS.get(death.status), verdict="fatal", pid=death.pid)
    report["signature"] = _signature(death)
    report["summary"] = describe(death)
    figures = _figures(death.last_statistics)
    facts = WorkerFacts(
        uptime=round(death.uptime, 3),
        requests_served=figures.get("requests"),
        in_flight=len(death.in_flight),
        connections=figures.get("connections"),
        generation=death.generation,
    )
    report["worker"] = asdict(facts)
    report["request"] = None
    report["error"] = None
    report["versions"] = describe_versions()
    return report


def _signature(death: WorkerDeath) -> str:
    """Equal for what is probably the same bug: the kind of end, and where it was if faulthandler has told."""
    what = f"{classify(death).value}: {describe_status(death.status)}"
    place = _innermost_place(death.stacks)
    return f"{what} at {place}" if place else what


def _innermost_place(stacks: str) -> str:
    """Of the thread that was running, or the first that is shown, the innermost frame that is the app's."""
    _, found, rest = stacks.partition("Current thread")
    best, best_rank = "", -1
    for line in (rest if found else stacks).splitlines()[:_STACK_LINES]:
        frame = _FRAME.match(line)
        if frame is None:
            if best_rank >= 0:
                break  # the next thread
            continue
        rank = rank_of_file(frame[1])
        if rank > best_rank:  # faulthandler begins with the innermost
            best, best_rank = f"{clean(frame[1])}:{frame[2]}", rank
    return best


def _list_requests(lost: Sequence[InFlight], now: float) -> list[Any]:
    listed: list[Any] = [
        {
            "method": request.method,
            "path": request.path,
            "seconds": None if request.started is None else round(max(0.0, now - request.started), 3),
        }
        for request in lost[:_MOST_REQUESTS]
    ]
    if len(lost) > _MOST_REQUESTS:
        listed.append(f"... ({len(lost) - _MOST_REQUESTS} more)")
    return listed


def _figures(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers only: nothing else is worth a place among them."""
    known = [(name, value) for name, value in statistics.items() if isinstance(value, int | float)]
    return {cut(str(name), 50): value for name, value in known[:_MOST_FIGURES]}


def _stack_lines(stacks: str) -> list[str]:
    lines = stacks.splitlines()
    shown = [redact(line[:_STACK_LINE]) for line in lines[:_STACK_LINES]]
    if len(lines) > _STACK_LINES:
        shown.append(f"... ({len(lines) - _STACK_LINES} more)")
    return shown


# -- the memory of it ----------------------------------------------------------------------------------------


class CrashHistory:
    """The last reports, for `trioserve ctl crashes`; kept as text, since objects take many times as much."""

    def __init__(self, most: int = 50) -> None:
        self._most = most
        self._reports: OrderedDict[str, tuple[dict[str, Any], bytes]] = OrderedDict()

    def __repr__(self) -> str:
        return f"<CrashHistory {len(self._reports)} reports>"

    def add(self, report: Mapping[str, Any]) -> None:
        """Keep a report; the oldest goes when there are too many, and one of the same id is replaced."""
        identity = str(report.get("id"))
        self._reports.pop(identity, None)
        self._reports[identity] = (_summarise(identity, report), serialise(dict(report)))
        while len(self._reports) > self._most:
            self._reports.popitem(last=False)

    def summaries(self) -> list[dict[str, Any]]:
        """A line's worth of each, the newest first."""
        return [dict(summary) for summary, _ in reversed(self._reports.values())]

    def get(self, identity: str) -> dict[str, Any] | None:
        """The whole report."""
        found = self._reports.get(identity)
        if found is None:
            return None
        report: dict[str, Any] = json.loads(found[1])
        return report


def _summarise(identity: str, report: Mapping[str, Any]) -> dict[str, Any]:
    ended = report.get("exit") or {}
    status = ended.get("status")
    return {
        "id": identity,
        "time": report.get("time"),
        "worker": ended.get("worker"),
        "pid": report.get("pid"),
        "class": ended.get("class"),
        "exit": None if status is None else describe_status(status),
        "summary": clean(report.get("summary")),
    }
