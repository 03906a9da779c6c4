"""Figures of the machine: from trees of files as kernels and containers show them, and from this very process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trioserve.supervisor import machine

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "24 22 0:6 / /dev rw - devtmpfs devtmpfs rw\n"
    "broken line\n"
    "31 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
    "32 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "33 30 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
V1_LINES = "5:name=systemd:/\n4:memory:{0}\n3:cpu,cpuacct:{0}\n"


def a_machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    return root


def in_v2(root: Path, group: str, files: dict[str, str], *, mounts: str = V2) -> Path:
    proc = {"proc/self/cgroup": f"0::{group}\n", "proc/self/mountinfo": mounts}
    return a_machine(root, proc | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})


def in_v1(root: Path, group: str, files: dict[str, str], *, mounts: str = V1) -> Path:
    proc = {"proc/self/cgroup": V1_LINES.format(group), "proc/self/mountinfo": mounts}
    return a_machine(root, proc | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})


@pytest.fixture
def sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(os, "process_cpu_count", lambda: 16, raising=False)


# -- CPUs ----------------------------------------------------------------------------------------------------

V2_CPUS = [
    ("/", {"cpu.max": "max 100000"}, 16),
    ("/", {"cpu.max": "400000 100000"}, 4),
    ("/", {"cpu.max": "150000 100000"}, 2),
    ("/", {"cpu.max": "50000 100000"}, 1),
    ("/", {"cpu.max": "99999900000 100000"}, 16),
    ("/", {"cpu.max": "rubbish"}, 16),
    ("/", {"cpu.max": ""}, 16),
    ("/", {"cpu.max": "100000"}, 16),
    ("/", {"cpu.max": "100000 0"}, 16),
    ("/", {}, 16),
    # The tightest from the process up to the root; siblings don't count.
    ("/system.slice/web.service", {"system.slice/web.service/cpu.max": "300000 100000"}, 3),
    ("/system.slice/web.service", {
        "system.slice/web.service/cpu.max": "max 100000", "system.slice/cpu.max": "200000 100000"}, 2),
    ("/system.slice/web.service", {
        "system.slice/web.service/cpu.max": "500000 100000", "system.slice/other/cpu.max": "100000 100000"}, 5),
    # A container that shows its own cgroup as the root, under names from outside.
    ("/docker/1f", {"cpu.max": "200000 100000"}, 2),
    ("/../../docker/1f", {"cpu.max": "200000 100000"}, 2),
]  # fmt: skip


@pytest.mark.parametrize("group, files, expected", V2_CPUS)
def test_cpus_under_version_2(
    tmp_path: Path, sixteen_cpus: None, group: str, files: dict[str, str], expected: int
) -> None:
    assert machine.cpu_count(in_v2(tmp_path, group, files)) == expected


V1_CPUS = [
    ("/", {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 16),
    ("/", {"cpu,cpuacct/cpu.cfs_quota_us": "250000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 3),
    ("/docker/1f", {
        "cpu,cpuacct/docker/1f/cpu.cfs_quota_us": "200000", "cpu,cpuacct/docker/1f/cpu.cfs_period_us": "100000",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 2),
    ("/", {}, 16),
]  # fmt: skip


@pytest.mark.parametrize("group, files, expected", V1_CPUS)
def test_cpus_under_version_1(
    tmp_path: Path, sixteen_cpus: None, group: str, files: dict[str, str], expected: int
) -> None:
    assert machine.cpu_count(in_v1(tmp_path, group, files)) == expected


def test_a_mount_that_shows_a_part_of_the_tree(tmp_path: Path, sixteen_cpus: None) -> None:
    """Version 1 in a container without a namespace of its own: the mount begins where the group is."""
    mounts = "32 30 0:29 /docker/1f /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu,cpuacct\n"
    files = {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}
    assert machine.cpu_count(in_v1(tmp_path, "/docker/1f", files, mounts=mounts)) == 2


def test_a_mount_that_shows_another_part_of_the_tree(tmp_path: Path) -> None:
    mounts = "33 30 0:30 /kubepods/7 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    root = in_v1(tmp_path, "/docker/1f", {"memory/memory.limit_in_bytes": "4096"}, mounts=mounts)
    assert machine.cgroup_memory_limit(root) == 4096


def test_affinity_is_heeded_where_the_quota_is_wider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert machine.cpu_count(in_v2(tmp_path, "/", {"cpu.max": "400000 100000"})) == 2
    assert machine.cpu_count(tmp_path / "nothing") == 2


def test_a_system_without_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert machine.cpu_count(tmp_path) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.cpu_count(tmp_path) == 1


def test_pythons_own_count_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "process_cpu_count", lambda: 3, raising=False)
    assert machine.cpu_count(tmp_path) == 3


# -- memory --------------------------------------------------------------------------------------------------

V2_MEMORY = [
    ("/", {"memory.max": "max"}, None),
    ("/", {"memory.max": "536870912"}, 536870912),
    ("/", {}, None),
    ("/a/b", {"a/b/memory.max": "2000", "a/memory.max": "1000"}, 1000),
    ("/a/b", {"a/b/memory.max": "2000", "a/memory.max": "max"}, 2000),
    ("/a/b", {"memory.max": "3000"}, 3000),
]


@pytest.mark.parametrize("group, files, expected", V2_MEMORY)
def test_the_memory_limit_under_version_2(
    tmp_path: Path, group: str, files: dict[str, str], expected: int | None
) -> None:
    assert machine.cgroup_memory_limit(in_v2(tmp_path, group, files)) == expected


@pytest.mark.parametrize("text, expected", [("9223372036854771712", None), ("536870912", 536870912)])
def test_the_memory_limit_under_version_1(tmp_path: Path, text: str, expected: int | None) -> None:
    root = in_v1(tmp_path, "/docker/1f", {"memory/docker/1f/memory.limit_in_bytes": text})
    assert machine.cgroup_memory_limit(root) == expected


EVENTS = "low 0\nhigh 4\nmax 17\noom 3\noom_kill 2\noom_group_kill 0\n"


def test_memory_events_under_version_2_are_the_processs_own(tmp_path: Path) -> None:
    root = in_v2(tmp_path, "/a/b", {"a/b/memory.events": EVENTS, "a/memory.events": "oom_kill 99\n"})
    assert machine.read_memory_events(root) == {
        "low": 0, "high": 4, "max": 17, "oom": 3, "oom_kill": 2, "oom_group_kill": 0,
    }  # fmt: skip


def test_memory_events_under_version_1(tmp_path: Path) -> None:
    text = "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"
    assert machine.read_memory_events(in_v1(tmp_path, "/", {"memory/memory.oom_control": text})) == {
        "oom_kill": 7
    }


def test_where_the_cgroup_does_not_count_the_machine_does(tmp_path: Path) -> None:
    root = in_v2(tmp_path, "/", {"cgroup.procs": "1\n"})
    assert machine.read_memory_events(root) == {}
    a_machine(root, {"proc/vmstat": "nr_free_pages 12\noom_kill 5\n"})
    assert machine.read_memory_events(root) == {"oom_kill": 5}
    # A kernel before 4.13 has a version 1 that does not count either.
    old = in_v1(tmp_path / "old", "/", {"memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"})
    assert machine.read_memory_events(a_machine(old, {"proc/vmstat": "nr_free_pages 12\n"})) == {}


def test_both_versions_side_by_side(tmp_path: Path, sixteen_cpus: None) -> None:
    """As on older systemd: version 2 without controllers beside version 1 with them."""
    mounts = V1 + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    root = in_v1(tmp_path, "/", {
        "unified/cgroup.procs": "1\n",
        "memory/memory.limit_in_bytes": "4096",
        "memory/memory.oom_control": "oom_kill 1\n",
        "cpu,cpuacct/cpu.cfs_quota_us": "200000",
        "cpu,cpuacct/cpu.cfs_period_us": "100000",
    }, mounts=mounts)  # fmt: skip
    a_machine(root, {"proc/self/cgroup": V1_LINES.format("/") + "0::/\n"})
    assert machine.cgroup_memory_limit(root) == 4096
    assert machine.read_memory_events(root) == {"oom_kill": 1}
    assert machine.cpu_count(root) == 2


def test_a_machine_without_any_of_it(tmp_path: Path) -> None:
    assert machine.cgroup_memory_limit(tmp_path) is None
    assert machine.read_memory_events(tmp_path) == {}
    assert machine.cpu_seconds(1, tmp_path) == 0
    assert machine.rss_bytes(1, tmp_path) == 0


# -- processes -----------------------------------------------------------------------------------------------

TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("name", ["python3", "a) R 1 2", "((()", ""])
def test_cpu_time_whatever_the_program_is_called(tmp_path: Path, name: str) -> None:
    stat = f"77 ({name}) S 1 77 77 0 -1 4194304 100 0 0 0 {3 * TICK} {2 * TICK} 9 9 20 0 1 0"
    assert machine.cpu_seconds(77, a_machine(tmp_path, {"proc/77/stat": stat})) == 5.0


@pytest.mark.parametrize("stat", ["", "77 (x", "77 (x) S 1 2", "77 (x) S 1 2 3 4 5 6 7 8 9 10 many more"])
def test_a_stat_that_cannot_be_read_is_nothing(tmp_path: Path, stat: str) -> None:
    assert machine.cpu_seconds(77, a_machine(tmp_path, {"proc/77/stat": stat})) == 0


@pytest.mark.parametrize("statm, pages", [("900 250 100 1 0 80 0", 250), ("", 0), ("900", 0), ("900 x", 0)])
def test_resident_memory(tmp_path: Path, statm: str, pages: int) -> None:
    assert machine.rss_bytes(77, a_machine(tmp_path, {"proc/77/statm": statm})) == pages * PAGE


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_real_process() -> None:
    """A child that has used some CPU and holds 64 MiB; and once it is gone."""
    code = "b = bytearray(b'x' * 2**26); print(sum(range(2_000_000)), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            assert 0 < machine.cpu_seconds(child.pid) < 60
            assert 2**26 < machine.rss_bytes(child.pid) < 2**30
        finally:
            child.kill()
        child.wait(10)
        assert machine.cpu_seconds(child.pid) == 0
        assert machine.rss_bytes(child.pid) == 0


def test_this_very_machine() -> None:
    assert 1 <= machine.cpu_count() <= (os.cpu_count() or 1)
    limit = machine.cgroup_memory_limit()
    assert limit is None or limit > 2**20
    assert all(count >= 0 for count in machine.read_memory_events().values())
