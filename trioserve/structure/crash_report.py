"""The crash report: all that is known at the moment a fault is seen, as one JSON line on stderr and one file.

The boundary calls `build_report()` and `emit_report()` for each fault that is the app's or ours; nothing here
decides anything. Both are synchronous (a report must not be cut by a cancellation), bounded in size, and
never raise: whatever cannot be had is missing from the report, and the report says so. A stderr that nobody
reads holds them up for `STDERR_PATIENCE` at most; one that is missing is /dev/null (`streams.py`).

What a report never holds: header values, bodies, the query of the target, environment variables, local
variables. What it does hold of messages is told in `error_tree.py`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import platform
import select
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import trio

from trioserve.observe.log_file import long_line
from trioserve.observe.task_tree import dump_tasks
from trioserve.structure.error_tree import cut, describe_error, read_stack, safe_message, signature, type_name

# Of one report, as JSON. Log shippers cut or split longer lines.
SIZE_LIMIT = 256 * 1024
# How long a stalled stderr may hold up the event loop.
STDERR_PATIENCE = 1.0
TASK_LINES = 300
MOST_THREADS = 40
MOST_HEADER_NAMES = 100
# Given back to the system when memory is short, so that the report about it can be built.
BALLAST_SIZE = 2 * 1024 * 1024
# Parts that go first when a report is too long, the bulkiest first.
_EXPENDABLE = ("tasks", "threads", "error", "request", "statistics", "process", "versions", "worker")
_LAST_RESORT = (
    b'{"report":"crash","cut":["everything: there was no memory, or the report could not be written"]}\n'
)


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """The request under way. A query in `path` is taken off; of headers only the names are asked for."""

    method: str
    path: str
    http_version: str
    header_names: Sequence[str]
    peer: str | None
    request_bytes: int
    response_bytes: int
    seconds: float
    # "none", "started" or "complete"
    response_state: str
    connection_id: int = 0
    request_number: int = 0


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """The worker at that moment. `drain` says what it is going to do about it, in words or numbers."""

    uptime: float
    requests_served: int | None
    in_flight: int
    connections: int | None = 0
    generation: int | None = None
    boot_id: str | None = None
    drain: str | None = None


def build_report(
    *,
    row: str,
    error: BaseException,
    request: RequestFacts | None,
    worker: WorkerFacts,
    nth: int,
    verdict: str | None = None,
    root: trio.lowlevel.Task | None = None,
) -> dict[str, Any]:
    """Everything worth knowing about `error`, as plain values. Never raises.

    Args:
        row: of the boundary's table, such as "A1".
        error: as it left the app, or our code.
        request: None when there was none, or none is to blame.
        worker: what the worker has done so far.
        nth: how often this signature has been seen, this time included.
        verdict: what the boundary decided: "contain", "replace", "fatal".
        root: whose tasks to show; needed from another thread than trio's, such as a watchdog's.
    """
    if isinstance(error, MemoryError):
        _drop_ballast()
    report = _build_core(row, error, nth, verdict)
    if report["signature"] is None:
        # There was no memory for it; now there is the ballast's.
        _drop_ballast()
        report = _build_core(row, error, nth, verdict)
    parts: dict[str, Callable[[], Any]] = {
        "worker": lambda: dataclasses.asdict(worker),
        "request": lambda: None if request is None else _describe_request(request),
        "error": lambda: describe_error(error),
        "statistics": _describe_trio,
        "process": _describe_process,
        "versions": describe_versions,
        "tasks": lambda: dump_tasks(root, most_lines=TASK_LINES).split("\n"),
        "threads": _describe_threads,
    }
    for name, build in parts.items():
        try:
            report[name] = build()
        except BaseException as problem:
            _note_missing(report, name, problem)
    return report


def begin_report(*, row: str | None, verdict: str | None, pid: int, nth: int = 1) -> dict[str, Any]:
    """What every report begins with: a new id, the time, and the process that it is about."""
    moment = datetime.now(UTC)
    return {
        "report": "crash",
        "id": f"{moment:%Y%m%dT%H%M%S}-{pid}-{os.urandom(4).hex()}",
        "row": row,
        "verdict": verdict,
        "signature": None,
        "nth": nth,
        "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "pid": pid,
    }


def emit_report(report: dict[str, Any], crash_dir: str | None, stderr_fd: int = 2) -> Path | None:
    """Write the report to a new file in `crash_dir` and as a line to stderr; the file's path if there is one.

    Never raises. The file comes first: stderr may stall.
    """
    try:
        line = serialise(report)
    except BaseException:
        _drop_ballast()
        try:
            line = serialise({name: report.get(name) for name in _CORE})
        except BaseException:
            line = _LAST_RESORT
    path = None
    if crash_dir is not None:
        try:
            path = _write_file(Path(crash_dir), report, line)
        except BaseException as problem:
            _write_stderr(stderr_fd, _explain(crash_dir, problem))
    _write_stderr(stderr_fd, line)
    _restore_ballast()
    return path


def complete_report(report: dict[str, Any], crash_dir: str | None) -> None:
    """Write a report again, whole, in the place of the file that its worker wrote; never raises.

    By the supervisor, once the worker is gone. stderr has its line already.
    """
    if crash_dir is not None:
        try:
            _write_file(Path(crash_dir), report, serialise(report), again=True)
        except BaseException as problem:
            _write_stderr(2, _explain(crash_dir, problem))


def serialise(report: dict[str, Any]) -> bytes:
    """One line of JSON, at most `SIZE_LIMIT` bytes; what had to go for that is listed under "cut"."""
    line = _encode(report)
    if len(line) <= SIZE_LIMIT:
        return line
    report = dict(report)
    # First the long lists lose their ends, then whole parts go, the bulkiest first.
    for name in ("tasks", "threads"):
        value = report.get(name)
        if isinstance(value, list) and len(value) > 20:
            report[name] = [*value[:20], f"... ({len(value) - 20} more)"]
            report["cut"] = [*report.get("cut", ()), f"{name}: too long"]
    others = sorted(set(report) - {*_CORE, *_EXPENDABLE, "cut"}, key=lambda name: (name == "exit", str(name)))
    for name in (*_EXPENDABLE, *others):
        line = _encode(report)
        if len(line) <= SIZE_LIMIT:
            return line
        if report.pop(name, None) is not None:
            report["cut"] = [*report.get("cut", ()), f"{name}: the report was too long"]
    line = _encode(report)
    if len(line) <= SIZE_LIMIT:
        return line
    core = {name: cut(str(report.get(name)), 2000) for name in _CORE}
    return _encode({**core, "cut": ["all but this: the report was too long"]})


# -- the parts ----------------------------------------------------------------------------------------------

_CORE = ("report", "id", "row", "verdict", "signature", "nth", "time", "pid")


def _build_core(row: str, error: BaseException, nth: int, verdict: str | None) -> dict[str, Any]:
    """What even the smallest report has."""
    report: dict[str, Any] = {
        "report": "crash",
        "id": None,
        "row": row,
        "verdict": verdict,
        "signature": None,
        "nth": nth,
    }
    try:
        report |= begin_report(row=row, verdict=verdict, pid=os.getpid(), nth=nth)
        report["signature"] = signature(error)
        report["summary"] = f"{type_name(error)}: {safe_message(error)}"
    except BaseException as problem:
        _note_missing(report, "summary", problem)
    return report


def _note_missing(report: dict[str, Any], name: str, problem: BaseException) -> None:
    if isinstance(problem, MemoryError):
        _drop_ballast()
    try:
        report["cut"] = [*report.get("cut", ()), f"{name}: {type(problem).__name__} while it was gathered"]
    except MemoryError:
        pass


def _describe_request(request: RequestFacts) -> dict[str, Any]:
    facts = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    facts["method"] = cut(request.method, 100)
    facts["path"] = cut(request.path.partition("?")[0].partition("#")[0], 2000)
    names = [cut(name, 100) for name in request.header_names[:MOST_HEADER_NAMES]]
    left_out = len(request.header_names) - len(names)
    facts["header_names"] = [*names, f"... ({left_out} more)"] if left_out else names
    return facts


def _describe_trio() -> dict[str, Any] | None:
    try:
        statistics = trio.lowlevel.current_statistics()
    except RuntimeError:
        return None  # not in a trio run: a watchdog's thread, or after it
    found: dict[str, Any] = {
        "tasks_living": statistics.tasks_living,
        "tasks_runnable": statistics.tasks_runnable,
        "seconds_to_next_deadline": statistics.seconds_to_next_deadline,
        "run_sync_soon_queue_size": statistics.run_sync_soon_queue_size,
    }
    io_statistics = statistics.io_statistics
    for name in ("backend", "tasks_waiting_read", "tasks_waiting_write"):
        found[name] = getattr(io_statistics, name, None)
    return found


def _describe_process() -> dict[str, Any]:
    return {
        "rss_bytes": _read_rss(),
        "open_fds": _count_fds(),
        "threads": threading.active_count(),
        "gc_counts": gc.get_count(),
        "gc_collections": [generation["collections"] for generation in gc.get_stats()],
    }


def _read_rss() -> int | None:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _count_fds() -> int | None:
    try:
        # One of them is the directory's own.
        return sum(1 for _ in Path("/dev/fd").iterdir()) - 1
    except OSError:
        return None  # EMFILE, for one


def describe_versions() -> dict[str, str | None]:
    """Of the interpreter and of what is imported."""
    # Asked of what is imported: reading package metadata needs files, which may be what is short.
    found = {name: getattr(sys.modules.get(name), "__version__", None) for name in _PACKAGES}
    return {
        "python": platform.python_version(),
        "implementation": sys.implementation.name,
        **found,
        "platform": _PLATFORM,
    }


_PACKAGES = ("trioserve", "trio", "h11", "httptools", "gunicorn_h1c", "hypercorn")
_PLATFORM = f"{platform.system()} {platform.release()} {platform.machine()}"


def _describe_threads() -> list[dict[str, Any]]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()  # the only way there is; documented, in spite of its name
    try:
        return [
            {
                "name": names.get(ident, "?"),
                "current": ident == threading.get_ident(),
                "frames": read_stack(frame),
            }
            for ident, frame in list(frames.items())[:MOST_THREADS]
        ]
    finally:
        # This frame is among them, and above it is the error's: all that the app has open in its own would wait for
        # the collector.
        frames.clear()


# -- writing ------------------------------------------------------------------------------------------------


def _encode(report: dict[str, Any]) -> bytes:
    text = json.dumps(
        _finite(report), ensure_ascii=True, allow_nan=False, default=_describe_odd, separators=(",", ":")
    )
    return text.encode("ascii") + b"\n"


def _finite(value: Any, depth: int = 60) -> Any:
    """`value` without what JSON has no word for: infinities, and keys that are no strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth <= 0:
        return "... (too deep)"
    if isinstance(value, dict):
        return {str(key): _finite(item, depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item, depth - 1) for item in value]
    return value


def _describe_odd(value: object) -> str:
    # Not its repr: nobody knows what it would show.
    return f"<{type(value).__name__}>"


def _write_file(folder: Path, report: dict[str, Any], line: bytes, *, again: bool = False) -> Path:
    """Under its final name only when it is whole: whoever watches the folder never reads half a report."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"crash-{report.get('id') or os.urandom(8).hex()}.json"
    unfinished = path.with_suffix(".tmp")
    if again:
        # What its author was writing when it was ended.
        unfinished.unlink(missing_ok=True)
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            _write_all(fd, line)
        finally:
            os.close(fd)
        unfinished.rename(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return path


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _write_stderr(fd: int, data: bytes) -> None:
    """To a file at once; elsewhere in pieces that poll() has promised room for, until patience ends."""
    held = False
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            _write_all(fd, data)
            return
        deadline = time.monotonic() + STDERR_PATIENCE
        held = long_line.acquire(timeout=STDERR_PATIENCE)
        poller = select.poll()
        poller.register(fd, select.POLLOUT)
        rest = memoryview(data)
        while rest:
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return
            try:
                rest = rest[os.write(fd, rest[: select.PIPE_BUF]) :]
            except BlockingIOError:
                continue
    except BaseException:  # noqa: S110 - there is nobody left to tell
        pass
    finally:
        if held:
            long_line.release()


def _explain(crash_dir: str, problem: BaseException) -> bytes:
    try:
        text = f"trioserve: cannot write a crash report to {crash_dir}: {problem}\n"
        return text.encode("utf-8", "backslashreplace")
    except BaseException:
        return b"trioserve: cannot write a crash report\n"


# -- memory -------------------------------------------------------------------------------------------------

_ballast: list[bytearray] = [bytearray(BALLAST_SIZE)]


def _drop_ballast() -> None:
    _ballast.clear()


def _restore_ballast() -> None:
    """For the next time, in a worker that goes on."""
    if not _ballast:
        try:
            _ballast.append(bytearray(BALLAST_SIZE))
        except MemoryError:
            pass
