"""What the machine and its container allow, and what a process uses: figures read from /proc and the cgroup files.

`supervisor.py` asks for them: at start (how many workers are `auto`), when a worker's figures are due, and when one
has died. Each call reads a few small files of the kernel's, which do not wait for any disk. Where there is no such
file (another system, another version of cgroups, a process that is gone) the answer says so; nothing here raises.

Every function takes the root of the file system, for tests.
"""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath

_ROOT = Path("/")

# cgroup v1 says "unlimited" with the largest multiple of a page; nothing near it is a limit.
_V1_UNLIMITED = 1 << 60


def cpu_count(root: Path = _ROOT) -> int:
    """How many CPUs this process may use: the least of affinity (or Python's own setting) and cgroup quotas.

    A quota of one and a half gives two: to be throttled now and then wastes less than half a CPU never used.
    """
    quota = min((_v2_cpus(group) for group in _groups(root, "")), default=math.inf)
    quota = min(quota, min((_v1_cpus(group) for group in _groups(root, "cpu")), default=math.inf))
    usable = _usable_cpus()
    return max(1, min(usable, math.ceil(quota))) if quota < usable else usable


def cgroup_memory_limit(root: Path = _ROOT) -> int | None:
    """Bytes beyond which the kernel kills in this process's cgroup, or in one that it is part of; None: no limit."""
    texts = [_read(group / "memory.max") for group in _groups(root, "")]
    texts += [_read(group / "memory.limit_in_bytes") for group in _groups(root, "memory")]
    limits = [int(text) for text in texts if text.isdecimal()]
    return min((limit for limit in limits if limit < _V1_UNLIMITED), default=None)


def read_memory_events(root: Path = _ROOT) -> dict[str, int]:
    """How often memory ran out here, as counted so far: `oom_kill` is how many processes were killed for it.

    To be compared with an earlier reading. From the process's own cgroup, where the kernel counts its processes
    whichever limit they met; failing that, from the whole machine; empty if nobody counts.
    """
    for group in _groups(root, "")[:1]:
        if events := _counters(_read(group / "memory.events")):
            return events
    for group in _groups(root, "memory")[:1]:
        if "oom_kill" in (events := _counters(_read(group / "memory.oom_control"))):
            return {"oom_kill": events["oom_kill"]}
    machine = _counters(_read(root / "proc/vmstat"))
    return {"oom_kill": machine["oom_kill"]} if "oom_kill" in machine else {}


def cpu_seconds(pid: int, root: Path = _ROOT) -> float:
    """CPU time that a process, all its threads included, has used so far; 0 if it is gone or cannot be seen."""
    # The second field is the program's name in parentheses, which may hold anything, parentheses too.
    fields = _read(root / f"proc/{pid}/stat").rpartition(")")[2].split()
    try:
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (IndexError, ValueError):
        return 0.0


def rss_bytes(pid: int, root: Path = _ROOT) -> int:
    """Resident memory of a process, what it shares with others included; 0 if it is gone or cannot be seen."""
    try:
        return int(_read(root / f"proc/{pid}/statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (IndexError, ValueError):
        return 0


# -- cgroups -------------------------------------------------------------------------------------------------


def _groups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's cgroup and of those around it, innermost first, as far as they can be seen.

    Args:
        root: of the file system.
        controller: of version 1 ("cpu", "memory"), or "" for version 2; machines may have both.
    """
    group = _group_of_process(root, controller)
    mount = _mount_of(root, controller)
    if group is None or mount is None:
        return []
    mount_root, mount_point = mount
    try:
        inside = PurePosixPath(group).relative_to(mount_root)
    except ValueError:
        # A container that sees its own cgroup as the root, but the name it has outside.
        inside = PurePosixPath()
    base = root / mount_point.lstrip("/")
    if ".." in inside.parts or not (base / inside).is_dir():
        inside = PurePosixPath()
    return [base / inside, *(base / parent for parent in inside.parents)] if inside.parts else [base]


def _group_of_process(root: Path, controller: str) -> str | None:
    """From lines like `0::/system.slice/web.service` and `4:cpu,cpuacct:/docker/1f`."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if controller in names.split(",") and (controller or number == "0"):
            return path
    return None


def _mount_of(root: Path, controller: str) -> tuple[str, str] | None:
    """Which cgroup is mounted, and where: from lines like `31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw`."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        place, _, kind = line.partition(" - ")
        places, kinds = place.split(), kind.split()
        if len(places) < 5 or len(kinds) < 3:
            continue
        if kinds[0] == ("cgroup" if controller else "cgroup2") and (
            not controller or controller in kinds[2].split(",")
        ):
            return places[3], places[4]
    return None


def _v2_cpus(group: Path) -> float:
    """`cpu.max` is `150000 100000`, or `max 100000`: microseconds of CPU in so many of time."""
    return _ratio(*_read(group / "cpu.max").split()[:2])


def _v1_cpus(group: Path) -> float:
    return _ratio(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))


def _ratio(quota: str = "", period: str = "") -> float:
    if not quota.isdecimal() or not period.isdecimal() or int(quota) == 0 or int(period) == 0:
        return math.inf  # "max", or -1 in version 1, or no file
    return int(quota) / int(period)


def _usable_cpus() -> int:
    # 3.13 has one that also heeds PYTHON_CPU_COUNT.
    if hasattr(os, "process_cpu_count"):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _counters(text: str) -> dict[str, int]:
    """From lines like `oom_kill 3`."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _read(path: Path) -> str:
    """A file's text, without blanks around it; "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
