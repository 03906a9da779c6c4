"""Files that are in memory or not, as a test wants them, and a gate before the threads that read them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from trioserve.static import kernel_pages
from trioserve.static.kernel_pages import filesystem_type, mincore
from trioserve.static.residency import FilePages, Method, PageCache

MIB = 1024 * 1024

# How the filesystem under the temporary files can be asked; where it lies in memory, no file is ever cold.
ASKING: tuple[Method, ...] = ("nowait", "mincore")


def resident(fd: int, offset: int, count: int) -> bool:
    """What mincore says, which starts no read: the judge of all others. We own the files of these tests."""
    ask = mincore()
    assert ask is not None
    return ask(fd, offset, count)


def any_resident(fd: int, offset: int, count: int) -> bool:
    return any(resident(fd, at, 1) for at in range(offset, offset + count, 4096 * 4))


def becomes_warm(page_cache: PageCache, pages: FilePages, offset: int, count: int, now: float) -> bool:
    """Whether the kernel says that this is in memory; asked again if the process was interrupted meanwhile."""
    deadline = time.monotonic() + 60
    while not page_cache.is_warm(pages, offset, count, now):
        if time.monotonic() > deadline:
            return False
        pages.forget()
    return True


class Clock:
    """A time that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


class OpenFile:
    """A file of the test with its descriptor."""

    def __init__(self, path: Path, size: int) -> None:
        path.write_bytes(os.urandom(min(size, MIB)) * max(1, size // MIB))
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.stat = os.fstat(self.fd)

    def make_cold(self) -> None:
        """Put its pages out of memory. What is still on its way to the disk stays, so ask until they are gone."""
        os.fsync(self.fd)
        deadline = time.monotonic() + 60
        while any_resident(self.fd, 0, self.stat.st_size):
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert time.monotonic() < deadline, "the file does not leave the page cache"

    def make_cold_but(self, *parts: tuple[int, int]) -> None:
        """Leave only these parts, (offset, count), in memory."""
        self.make_cold()
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
        for offset, count in parts:
            os.pread(self.fd, count, offset)
            assert resident(self.fd, offset, count)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_NORMAL)

    def make_warm(self) -> None:
        assert len(os.pread(self.fd, self.stat.st_size, 0)) == self.stat.st_size


@pytest.fixture
def make_file(tmp_path: Path) -> Iterator[Callable[[int], OpenFile]]:
    opened: list[OpenFile] = []

    def make(size: int, folder: Path = tmp_path) -> OpenFile:
        opened.append(OpenFile(folder / f"file{len(opened)}", size))
        return opened[-1]

    yield make
    for file in opened:
        os.close(file.fd)
        file.path.unlink()


def method_of(folder: Path) -> Method:
    """How files of this directory are asked."""
    path = folder / "probe"
    path.write_bytes(b"x")
    fd = os.open(path, os.O_RDONLY)
    try:
        return PageCache().pages(fd, os.fstat(fd)).device.method
    finally:
        os.close(fd)
        path.unlink()


@pytest.fixture
def cold_disk(tmp_path: Path) -> Path:
    """A directory whose files can be cold."""
    if method_of(tmp_path) not in ASKING:
        pytest.skip(f"the filesystem of {tmp_path} does not tell what is in memory")
    return tmp_path


@pytest.fixture(params=ASKING)
def asker(request: pytest.FixtureRequest, cold_disk: Path) -> PageCache:
    """A page cache that asks in one of the two ways, if the filesystem has it."""
    method: Method = request.param
    if method == "nowait" and method_of(cold_disk) != "nowait":
        pytest.skip("the filesystem of the temporary files does not know RWF_NOWAIT")
    return PageCache(method=method)


class Gate:
    """Stands before the real `os.sendfile` and lets nobody through until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inside = 0
        self.most = 0
        self.calls = 0
        self._lock = threading.Lock()
        self._open = threading.Event()
        self._real = os.sendfile
        monkeypatch.setattr(kernel_pages.os, "sendfile", self._sendfile)

    def _sendfile(self, sink: int, fd: int, offset: int, count: int) -> int:
        with self._lock:
            self.calls += 1
            self.inside += 1
            self.most = max(self.most, self.inside)
        assert self._open.wait(20)
        with self._lock:
            self.inside -= 1
        return self._real(sink, fd, offset, count)

    def open(self) -> None:
        self._open.set()

    async def wait_inside(self, number: int) -> None:
        with trio.fail_after(30):
            while self.inside < number:
                await trio.sleep(0.001)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


def filesystem_type_of(path: str) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        return filesystem_type(fd, Path("/proc/self"))
    finally:
        os.close(fd)


@pytest.fixture
def nowait(cold_disk: Path) -> PageCache:
    if method_of(cold_disk) != "nowait":
        pytest.skip("the filesystem of the temporary files does not know RWF_NOWAIT")
    return PageCache(method="nowait")
