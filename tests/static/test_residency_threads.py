"""Threads that read what is not in memory: how many, cancelled, and when the file cannot be read."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from trioserve.static import kernel_pages, residency
from trioserve.static.kernel_pages import STEP
from trioserve.static.residency import BLOCK, Method, PageCache

from .cold_files import ASKING, MIB, Clock, Gate, OpenFile, method_of, resident

# -- threads ---------------------------------------------------------------------------------------------------


async def test_fifty_cold_windows_take_eight_threads(
    make_file: Callable[[int], OpenFile], gate: Gate
) -> None:
    file, page_cache = make_file(MIB), PageCache()
    pages = page_cache.pages(file.fd, file.stat)
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(page_cache.warm, pages, 0, MIB)
        await gate.wait_inside(8)
        await trio.testing.wait_all_tasks_blocked()
        used = page_cache.limiter.statistics()
        assert (used.borrowed_tokens, used.tasks_waiting) == (8, 42)
        gate.open()
    assert (gate.most, gate.calls) == (8, 50)


async def test_a_cancelled_warm_waits_for_its_thread(
    make_file: Callable[[int], OpenFile], gate: Gate
) -> None:
    """The descriptor may be closed as soon as it has returned, so nobody may be reading from it then."""
    file, page_cache = make_file(MIB), PageCache()
    pages = page_cache.pages(file.fd, file.stat)
    over = trio.Event()

    async def warm_and_cancel(scope: trio.CancelScope) -> None:
        with scope:
            await page_cache.warm(pages, 0, MIB)
        over.set()

    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        nursery.start_soon(warm_and_cancel, scope)
        await gate.wait_inside(1)
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert gate.inside == 1
        assert not over.is_set()
        gate.open()
        with trio.fail_after(30):
            await over.wait()
    assert gate.inside == 0


async def test_a_long_warm_ends_early_when_cancelled(
    make_file: Callable[[int], OpenFile], gate: Gate
) -> None:
    file, page_cache = make_file(5 * STEP), PageCache(method="blind")
    pages = page_cache.pages(file.fd, file.stat)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(page_cache.warm, pages, 0, 5 * STEP)
        await gate.wait_inside(1)
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.testing.wait_all_tasks_blocked()
        gate.open()
    assert gate.calls == 1
    assert nursery.cancel_scope.cancelled_caught
    assert not page_cache.is_warm(pages, 0, BLOCK, trio.current_time()), "nothing is claimed for it"


async def test_a_warm_that_waits_for_a_thread_is_cancelled_at_once(
    make_file: Callable[[int], OpenFile], gate: Gate
) -> None:
    file, page_cache = make_file(10), PageCache(threads=1)
    pages = page_cache.pages(file.fd, file.stat)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(page_cache.warm, pages, 0, 10)
        await gate.wait_inside(1)
        with trio.fail_after(30), trio.CancelScope() as scope:
            scope.cancel()
            await page_cache.warm(pages, 0, 10)
        assert scope.cancelled_caught
        gate.open()
    assert gate.calls == 1


async def test_a_file_that_became_shorter_is_read_as_far_as_it_goes(
    make_file: Callable[[int], OpenFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, page_cache = make_file(4 * MIB), PageCache()
    pages = page_cache.pages(file.fd, file.stat)
    os.ftruncate(file.fd, MIB + 5)
    with trio.fail_after(30):
        await page_cache.warm(pages, 0, 4 * MIB)
        await page_cache.warm(pages, 3 * MIB, MIB)
        monkeypatch.setattr(os, "devnull", "/nonexistent/null")
        await page_cache.warm(pages, 0, 4 * MIB)


@pytest.mark.parametrize("method", ASKING)
def test_beyond_the_end_there_is_nothing_to_wait_for_or_it_is_cold(
    make_file: Callable[..., OpenFile], method: Method, clock: Clock
) -> None:
    """No SIGBUS and no exception, whatever the answer: the send will see the end."""
    file, page_cache = make_file(2 * MIB), PageCache(method=method)
    pages = page_cache.pages(file.fd, file.stat)
    os.ftruncate(file.fd, 5)
    assert isinstance(page_cache.is_warm(pages, MIB, MIB, clock.now), bool)
    assert isinstance(page_cache.is_warm(pages, 100 * MIB, MIB, clock.now), bool)


async def test_a_file_that_has_grown_is_warmed_where_it_is_new(
    cold_disk: Path, make_file: Callable[[int], OpenFile]
) -> None:
    file, page_cache = make_file(4096), PageCache()
    pages = page_cache.pages(file.fd, file.stat)
    os.pwrite(file.fd, os.urandom(MIB), 4096)
    file.stat = os.fstat(file.fd)
    file.make_cold()
    assert not page_cache.is_warm(pages, 512 * 1024, 4096, trio.current_time())
    await page_cache.warm(pages, 512 * 1024, 4096)
    assert resident(file.fd, 512 * 1024, 4096)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSOCK, errno.ENOSYS])
async def test_what_cannot_go_to_dev_null_is_read(
    cold_disk: Path, make_file: Callable[[int], OpenFile], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: int) -> int:
        raise OSError(number, "not to this")

    file, page_cache = make_file(MIB + 7), PageCache()
    pages = page_cache.pages(file.fd, file.stat)
    file.make_cold()
    monkeypatch.setattr(kernel_pages.os, "sendfile", refuse)
    await page_cache.warm(pages, 0, MIB + 7)
    assert resident(file.fd, 0, MIB + 7)


async def test_without_dev_null_the_file_is_read(
    cold_disk: Path, make_file: Callable[[int], OpenFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, page_cache = make_file(MIB), PageCache()
    pages = page_cache.pages(file.fd, file.stat)
    file.make_cold()
    monkeypatch.setattr(os, "devnull", "/nonexistent/null")
    await page_cache.warm(pages, 0, MIB)
    assert resident(file.fd, 0, MIB)


async def test_warm_leaves_no_descriptor(make_file: Callable[[int], OpenFile]) -> None:
    file, page_cache = make_file(MIB), PageCache()
    pages = page_cache.pages(file.fd, file.stat)
    await page_cache.warm(pages, 0, MIB)  # trio's own machinery for threads
    before = len(os.listdir("/dev/fd"))
    for _ in range(20):
        await page_cache.warm(pages, 0, MIB)
    assert len(os.listdir("/dev/fd")) == before


async def test_warm_of_nothing_is_a_checkpoint(make_file: Callable[[int], OpenFile]) -> None:
    file, page_cache = make_file(10), PageCache()
    with trio.testing.assert_checkpoints():
        await page_cache.warm(page_cache.pages(file.fd, file.stat), 10, 0)


# -- what cannot be read ---------------------------------------------------------------------------------------


@pytest.fixture(params=["closed", "pipe", "write only", "directory"])
def unreadable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[int, os.stat_result, int]]:
    """A descriptor that cannot be read at an offset, and the error for it."""
    opened: list[int] = []
    number = {
        "closed": errno.EBADF,
        "pipe": errno.ESPIPE,
        "write only": errno.EBADF,
        "directory": errno.EISDIR,
    }
    if request.param == "pipe":
        opened += os.pipe()
    elif request.param == "directory":
        opened.append(os.open(tmp_path, os.O_RDONLY))
    else:
        opened.append(os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT))
    stat = os.fstat(opened[0])
    fd = opened[0]
    if request.param == "closed":
        # A number that nothing else in this process will come to have.
        fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 700)
        os.close(fd)
    yield fd, stat, number[request.param]
    for one in opened:
        os.close(one)


async def test_what_cannot_be_read_is_cold_and_raises_when_warmed(
    unreadable: tuple[int, os.stat_result, int],
) -> None:
    fd, stat, number = unreadable
    page_cache = PageCache(method="nowait")  # which asks; memory has nothing to ask for
    pages = page_cache.pages(fd, stat)
    assert not page_cache.is_warm(pages, 0, MIB, trio.current_time())
    with pytest.raises(OSError) as raised:
        await page_cache.warm(pages, 0, MIB)
    # The kernel may call what cannot be sent EINVAL, but then it was read, and that says what is wrong.
    assert raised.value.errno == number
    assert not page_cache.is_warm(pages, 0, MIB, trio.current_time())


async def test_a_bad_descriptor_says_nothing_about_its_device(
    cold_disk: Path, make_file: Callable[[int], OpenFile]
) -> None:
    file, page_cache = make_file(10), PageCache()
    bad = os.dup(file.fd)
    os.close(bad)
    page_cache.pages(bad, file.stat)
    assert page_cache.pages(file.fd, file.stat).device.method == method_of(cold_disk)


async def test_an_error_while_asking_leaves_the_method_alone(
    cold_disk: Path, make_file: Callable[[int], OpenFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, page_cache = make_file(10), PageCache(method="nowait")
    pages = page_cache.pages(file.fd, file.stat)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "a bad sector")

    monkeypatch.setattr(residency.os, "preadv", broken)
    assert not page_cache.is_warm(pages, 0, 10, trio.current_time())
    assert pages.device.method == "nowait"
