"""How a filesystem is asked what is in memory: by its name, by trying, and by who owns the file."""

from __future__ import annotations

import errno
import os
import stat as stat_bits
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from trioserve.static import kernel_pages, residency
from trioserve.static.kernel_pages import may_override_owners, mincore
from trioserve.static.residency import Method, PageCache

from .cold_files import ASKING, Clock, OpenFile, method_of

# -- which method ----------------------------------------------------------------------------------------------


class FakeProc:
    """A /proc/self in which every descriptor lies on a filesystem of the test's choice."""

    def __init__(self, folder: Path, kind: str, capabilities: int = 0) -> None:
        folder.mkdir()
        (folder / "fdinfo").mkdir()
        (folder / "mountinfo").write_text(
            "7 1 0:7 / /other rw,relatime shared:1 - ext4 /dev/a rw\n"
            f"77 7 0:40 / /srv/with\\040space rw,nosuid shared:2 master:3 - {kind} server:/share rw,vers=4.2\n"
        )
        (folder / "status").write_text(f"Name:\tpython\nCapEff:\t{capabilities:016x}\nSeccomp:\t0\n")
        self.folder = folder

    def claim(self, fd: int) -> None:
        (self.folder / "fdinfo" / str(fd)).write_text("pos:\t0\nflags:\t02100000\nmnt_id:\t77\nino:\t5\n")


SLOW = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse", "fuse.sshfs", "fuseblk", "virtiofs", "ceph")


@pytest.mark.parametrize("kind", SLOW)
def test_filesystems_that_ask_somebody_else_are_slow(
    make_file: Callable[[int], OpenFile], tmp_path: Path, kind: str
) -> None:
    file, proc = make_file(10), FakeProc(tmp_path / "proc", kind)
    proc.claim(file.fd)
    pages = PageCache(proc=str(proc.folder)).pages(file.fd, file.stat)
    assert pages.device.method == "slow"


@pytest.mark.parametrize("kind", ["tmpfs", "ramfs"])
def test_filesystems_in_memory(make_file: Callable[[int], OpenFile], tmp_path: Path, kind: str) -> None:
    file, proc = make_file(10), FakeProc(tmp_path / "proc", kind)
    proc.claim(file.fd)
    assert PageCache(proc=str(proc.folder)).pages(file.fd, file.stat).device.method == "memory"


def test_without_proc_the_file_itself_is_asked(cold_disk: Path, make_file: Callable[[int], OpenFile]) -> None:
    file = make_file(10)
    found = PageCache(proc=str(cold_disk / "none")).pages(file.fd, file.stat).device.method
    assert found == ("nowait" if method_of(cold_disk) == "nowait" else "blind")


def test_a_system_without_the_question_is_blind(
    make_file: Callable[[int], OpenFile], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(residency, "_NOWAIT", None)
    file = make_file(10)
    assert PageCache(proc=str(tmp_path / "none")).pages(file.fd, file.stat).device.method == "blind"


@pytest.mark.parametrize(
    ("owner", "capabilities", "method"),
    [
        ("me", 0, "mincore"),
        ("somebody", 0, "blind"),
        ("somebody", 1 << 3, "mincore"),
        ("somebody", ~(1 << 3) & 0xFFFF, "blind"),
        ("unknown", 1 << 3, "blind"),
    ],
)
def test_mincore_is_asked_only_where_it_does_not_lie(
    make_file: Callable[[int], OpenFile],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    owner: str,
    capabilities: int,
    method: Method,
) -> None:
    """Overlayfs, as far as we can tell, knows no RWF_NOWAIT; and a stranger is told that all is resident."""
    monkeypatch.setattr(residency, "_NOWAIT", None)
    file, proc = make_file(10), FakeProc(tmp_path / "proc", "overlay", capabilities)
    proc.claim(file.fd)
    owners = {"me": os.geteuid(), "somebody": os.geteuid() + 4711, "unknown": 65534}
    fields = list(file.stat)
    fields[stat_bits.ST_UID] = owners[owner]
    page_cache = PageCache(proc=str(proc.folder))
    stranger = os.stat_result(fields)
    assert page_cache.pages(file.fd, stranger).device.method == method
    mine = page_cache.pages(file.fd, file.stat)
    assert mine.device.method == "mincore", "one device, files of several owners"


def test_a_device_is_classified_once(make_file: Callable[[int], OpenFile], tmp_path: Path) -> None:
    page_cache = PageCache()
    one, two = make_file(10), make_file(10)
    first = page_cache.pages(one.fd, one.stat)
    assert page_cache.pages(two.fd, two.stat).device is first.device
    page_cache.close()
    assert page_cache.pages(two.fd, two.stat).device is not first.device


@pytest.mark.parametrize("method", ASKING)
def test_a_method_that_fails_later_falls_down_to_blind(
    method: Method, make_file: Callable[..., OpenFile], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(residency.os, "preadv", refused)
    monkeypatch.setattr(residency, "mincore", lambda: refused)
    file, page_cache = make_file(10), PageCache(method=method)
    pages = page_cache.pages(file.fd, file.stat)
    assert not page_cache.is_warm(pages, 0, 10, clock.now)
    assert pages.device.method == "blind"


def test_nowait_forced_where_it_does_not_exist(
    make_file: Callable[[int], OpenFile], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "_NOWAIT", None)
    file, page_cache = make_file(10), PageCache(method="nowait")
    pages = page_cache.pages(file.fd, file.stat)
    assert not page_cache.is_warm(pages, 0, 10, clock.now)
    assert pages.device.method == "blind"


OVERLAY = """
    import os, sys
    from trioserve.static.kernel_pages import filesystem_type
    from trioserve.static.residency import PageCache
    from pathlib import Path
    fd = os.open("merged/file", os.O_RDONLY)
    mine = PageCache().pages(fd, os.fstat(fd))
    cold, warm = PageCache(), PageCache()
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    answers = [cold.is_warm(mine, 0, 300000, 1.0)]
    os.pread(fd, 300000, 0)
    answers.append(warm.is_warm(mine, 0, 300000, 1.0))
    os.seteuid(65534)
    print(filesystem_type(fd, Path("/proc/self")), mine.device.method, *answers,
          PageCache().pages(fd, os.fstat(fd)).device.method)
"""


def test_a_real_overlayfs(tmp_path: Path) -> None:
    """Mounted in a namespace of its own, which ends with the process."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower" / "file").write_bytes(os.urandom(300_000))
    os.sync()
    mount = "mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged || exit 77"
    try:
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", f'{mount}; exec "$@"', "sh", sys.executable, "-c",
             textwrap.dedent(OVERLAY)],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("no unshare(1)")
    if "True True" in done.stdout and method_of(tmp_path) == "memory":
        pytest.skip("nothing below this overlayfs can be cold")
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"overlayfs cannot be mounted here: {done.stderr.strip()}")
    assert done.stdout.split() == ["overlay", "mincore", "False", "True", "blind"], done.stderr


# -- what the kernel says ----------------------------------------------------------------------------------


def test_capabilities_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    assert not may_override_owners(tmp_path)
    (tmp_path / "status").write_text("Name:\tpython\nCapEff:\tmany\n")
    assert not may_override_owners(tmp_path)


@pytest.mark.parametrize("missing", ["mincore", "everything"])
def test_a_c_library_without_the_calls(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    def load(*_: object, **__: object) -> object:
        if missing == "everything":
            raise OSError("no such library")
        return types.SimpleNamespace(mmap=len, munmap=len)

    monkeypatch.setattr(kernel_pages.ctypes, "PyDLL", load)
    assert mincore.__wrapped__() is None


def test_mincore_of_what_cannot_be_mapped_raises(tmp_path: Path) -> None:
    ask = mincore()
    assert ask is not None
    read, write = os.pipe()
    try:
        with pytest.raises(OSError) as raised:
            ask(read, 0, 10)
        assert raised.value.errno in (errno.ENODEV, errno.EACCES)
    finally:
        os.close(read)
        os.close(write)
