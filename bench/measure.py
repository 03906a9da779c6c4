"""Numbers: CPU time and memory of a process tree, wrk's result line, medians and ratios.

Called by `load.py`, `memory.py` and `report.py`. Linux only: everything is read from /proc and from the
processes' CPU clocks. CPU time comes from the clock of each process (nanoseconds, all threads, also those
that have ended) and is cross-checked with utime + stime, whose tick is 10 ms.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any


class TurnError(Exception):
    """A turn whose numbers must not be used: the message says what was wrong with it."""


# -- the process tree ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProcessStat:
    """The fields of /proc/PID/stat that the benchmark needs; times in clock ticks."""

    pid: int
    parent: int
    utime: int
    stime: int
    children_time: int
    start_time: int


def parse_stat(text: str) -> ProcessStat:
    """Parse one line of /proc/PID/stat; the command name may hold spaces and parentheses."""
    pid = int(text[: text.index(" ")])
    rest = text[text.rindex(")") + 2 :].split()
    return ProcessStat(
        pid=pid,
        parent=int(rest[1]),
        utime=int(rest[11]),
        stime=int(rest[12]),
        children_time=int(rest[13]) + int(rest[14]),
        start_time=int(rest[19]),
    )


def read_stat(pid: int) -> ProcessStat | None:
    """Return the stat of `pid`, or None when there is no such process."""
    try:
        return parse_stat(Path(f"/proc/{pid}/stat").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return None


def process_tree(root: int) -> list[ProcessStat]:
    """Return `root` and all its descendants, parents first."""
    every = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (stat := read_stat(int(name))) is not None:
            every[stat.pid] = stat
    if root not in every:
        return []
    tree = [every[root]]
    for member in tree:  # grows while it is read: breadth first
        tree += [stat for stat in every.values() if stat.parent == member.pid]
    return tree


def listening_inode(port: int) -> int:
    """The inode of the socket that listens on a TCP port of 127.0.0.1, or of any address (proc(5), /proc/net/tcp).

    Raises:
        ConnectionError: there is none.
    """
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
            return int(fields[9])
    raise ConnectionError(f"nobody listens on port {port}")


# -- CPU time -----------------------------------------------------------------------------------------------

_TICK_US = 1e6 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class CpuSnapshot:
    """CPU time used so far by each living process of a tree, and by children that were already reaped."""

    clocks_us: Mapping[tuple[int, int], float]
    ticks_us: Mapping[tuple[int, int], float]
    reaped_us: float


def snapshot_cpu(root: int) -> CpuSnapshot:
    """Read the CPU time of the whole process tree below `root`, itself included."""
    clocks, ticks, reaped = {}, {}, 0.0
    for stat in process_tree(root):
        key = (stat.pid, stat.start_time)
        ticks[key] = (stat.utime + stat.stime) * _TICK_US
        try:
            # The clock id of another process' CPU time, as clock_getcpuclockid(3) computes it.
            clocks[key] = time.clock_gettime_ns((~stat.pid << 3) | 2) / 1e3
        except OSError:
            clocks[key] = ticks[key]
        reaped += stat.children_time * _TICK_US
    return CpuSnapshot(clocks, ticks, reaped)


def cpu_used_us(before: CpuSnapshot, after: CpuSnapshot) -> tuple[float, float]:
    """Return the CPU time between two snapshots in microseconds: by the clocks, and by utime + stime."""
    if gone := [pid for pid, _ in before.clocks_us.keys() - after.clocks_us.keys()]:
        raise TurnError(f"process {gone[0]} of the server ended during the measurement")
    reaped = after.reaped_us - before.reaped_us
    clocks = sum(used - before.clocks_us.get(key, 0.0) for key, used in after.clocks_us.items()) + reaped
    ticks = sum(used - before.ticks_us.get(key, 0.0) for key, used in after.ticks_us.items()) + reaped
    return clocks, ticks


# -- memory -------------------------------------------------------------------------------------------------


def private_memory_kb(root: int) -> float:
    """Return the private memory (clean, dirty, swapped) of the process tree in kB: what it alone keeps."""
    return float(sum(_private_kb(stat.pid) for stat in process_tree(root)))


def _private_kb(pid: int) -> int:
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except FileNotFoundError:
        return 0
    return parse_private_kb(rollup)


def parse_private_kb(rollup: str) -> int:
    """Add up the private lines of a smaps_rollup."""
    wanted = ("Private_Clean:", "Private_Dirty:", "Private_Hugetlb:", "SwapPss:")
    return sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith(wanted))


# -- wrk's result -------------------------------------------------------------------------------------------

_RESULT_MARK = "bench-result "


@dataclass(frozen=True)
class WrkResult:
    """What wrk says of one run."""

    requests: int
    seconds: float
    bytes: int
    p50_us: float
    p99_us: float
    max_us: float
    connect_errors: int
    read_errors: int
    write_errors: int
    timeouts: int
    bad_statuses: int

    @property
    def errors(self) -> dict[str, int]:
        """The kinds of errors that occurred, with their numbers."""
        kinds = ("connect_errors", "read_errors", "write_errors", "timeouts", "bad_statuses")
        return {kind: getattr(self, kind) for kind in kinds if getattr(self, kind)}


def parse_wrk(output: str) -> WrkResult:
    """Find and parse the line that wrk.lua prints at the end of a run."""
    for line in output.splitlines():
        if line.startswith(_RESULT_MARK):
            return WrkResult(**json.loads(line.removeprefix(_RESULT_MARK)))
    raise TurnError(f"wrk printed no result line; its output was: {output.strip()[-400:]!r}")


# -- turns, medians and ratios ------------------------------------------------------------------------------


@dataclass
class Turn:
    """The figures of one server in one round of one workload, or the reason why there are none."""

    figures: dict[str, float] = field(default_factory=dict)
    failure: str | None = None
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The turn as it goes into the results file."""
        return {"figures": self.figures, "failure": self.failure, "notes": self.notes}


def values(turns: Sequence[Turn], figure: str) -> list[float]:
    """The figure's values over all turns that succeeded."""
    return [turn.figures[figure] for turn in turns if turn.failure is None and figure in turn.figures]


def median_of(turns: Sequence[Turn], figure: str) -> float | None:
    """The median of one figure over the turns, or None where there is no value."""
    found = values(turns, figure)
    return median(found) if found else None


def median_ratio(ours: Sequence[Turn], theirs: Sequence[Turn], figure: str) -> float | None:
    """The median of the per-round ratios: rounds in which either side failed do not count."""
    ratios = [
        a.figures[figure] / b.figures[figure]
        for a, b in zip(ours, theirs, strict=False)
        if a.failure is None
        and b.failure is None
        and figure in a.figures
        and b.figures.get(figure, 0.0) > 0.0
    ]
    return median(ratios) if ratios else None
