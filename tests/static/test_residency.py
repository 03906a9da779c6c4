"""What is in memory and what is not, asked of real files, and for how long the answer is believed."""

from __future__ import annotations

import gc
import itertools
import math
import os
import socket
import types
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from trioserve.static import residency
from trioserve.static.residency import BLOCK, FilePages, PageCache

from .cold_files import (
    MIB,
    Clock,
    Gate,
    OpenFile,
    any_resident,
    becomes_warm,
    filesystem_type_of,
    resident,
)

# -- cold, warm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5000, BLOCK, BLOCK + 1, 3 * MIB + 77])
async def test_a_cold_window_is_cold_until_it_was_warmed(
    asker: PageCache, make_file: Callable[[int], OpenFile], size: int
) -> None:
    file = make_file(size)
    pages = asker.pages(file.fd, file.stat)
    file.make_cold()
    count = min(size, MIB)
    assert not asker.is_warm(pages, 0, count, trio.current_time())
    await asker.warm(pages, 0, count)
    assert asker.is_warm(pages, 0, count, trio.current_time())
    assert (asker.cold_windows, asker.warm_windows, asker.surprises) == (1, 1, 0)
    pages.forget()
    assert becomes_warm(asker, pages, 0, count, trio.current_time()), "the kernel says so too, not only we"
    assert resident(file.fd, 0, count)


async def test_the_method_of_this_machine_tells_cold_from_warm(
    cold_disk: Path, make_file: Callable[[int], OpenFile]
) -> None:
    file, page_cache = make_file(2 * MIB), PageCache()
    pages = page_cache.pages(file.fd, file.stat)
    file.make_cold()
    assert not page_cache.is_warm(pages, MIB, MIB, trio.current_time())
    await page_cache.warm(pages, MIB, MIB)
    assert page_cache.is_warm(pages, MIB, MIB, trio.current_time())


def test_what_others_have_read_is_warm(
    asker: PageCache, make_file: Callable[[int], OpenFile], clock: Clock
) -> None:
    file = make_file(MIB)
    file.make_warm()
    assert becomes_warm(asker, asker.pages(file.fd, file.stat), 0, MIB, clock.now)


@pytest.mark.parametrize("missing", range(0, MIB, BLOCK))
def test_one_missing_block_makes_a_window_cold(
    asker: PageCache, make_file: Callable[[int], OpenFile], clock: Clock, missing: int
) -> None:
    file = make_file(MIB)
    file.make_cold_but(*((block, BLOCK) for block in range(0, MIB, BLOCK) if block != missing))
    assert not any_resident(file.fd, missing, BLOCK)
    assert not asker.is_warm(asker.pages(file.fd, file.stat), 0, MIB, clock.now)


def test_a_missing_last_page_makes_a_window_cold(
    asker: PageCache, make_file: Callable[[int], OpenFile], clock: Clock
) -> None:
    """The probe of each block sees its first page only: a file read from the start, but not to its end."""
    file = make_file(100 * 1024)
    file.make_cold_but((0, 64 * 1024))
    assert not any_resident(file.fd, 64 * 1024, 36 * 1024)
    assert not asker.is_warm(asker.pages(file.fd, file.stat), 0, 100 * 1024, clock.now)


async def test_windows_that_begin_and_end_anywhere_are_remembered(
    make_file: Callable[[int], OpenFile],
) -> None:
    """One after the other, as a range is sent: no window is read twice because it shares a block with its neighbour."""
    file, page_cache = make_file(3 * MIB), PageCache(method="blind")
    pages = page_cache.pages(file.fd, file.stat)
    for start in range(12345, 2 * MIB, 300_000):
        await page_cache.warm(pages, start, 300_000)
    for start in range(12345, 2 * MIB, 300_000):
        assert page_cache.is_warm(pages, start, 300_000, trio.current_time())
    assert not page_cache.is_warm(pages, 2 * MIB + 600_000, 300_000, trio.current_time())


async def test_pages_that_the_probe_itself_has_fetched_do_not_speak_for_their_neighbours(
    nowait: PageCache, make_file: Callable[[int], OpenFile]
) -> None:
    """However often it is asked: the first page comes because it was asked for, and then the last one."""
    file = make_file(100 * 1024)
    file.make_cold()
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_RANDOM)
    pages = nowait.pages(file.fd, file.stat)
    for _ in range(20):
        assert not nowait.is_warm(pages, 0, 100 * 1024, trio.current_time())
    assert not resident(file.fd, 0, 100 * 1024)
    await nowait.warm(pages, 0, 100 * 1024)
    assert nowait.is_warm(pages, 0, 100 * 1024, trio.current_time())
    assert pages.cold == set()


def test_a_slow_answer_is_none(
    make_file: Callable[[int], OpenFile], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a disk has brought the page before the call returned."""
    asked: list[int] = []

    def read(fd: int, buffers: list[bytearray], offset: int, flags: int) -> int:
        asked.append(offset)
        ticks[0] += residency.PROBE_SECONDS * (1.1 if offset == 2 * BLOCK else 0.9)
        return 1

    ticks = [5.0]
    monkeypatch.setattr(residency.os, "preadv", read)
    monkeypatch.setattr(residency, "time", types.SimpleNamespace(perf_counter=lambda: ticks[0]))
    file, page_cache = make_file(MIB), PageCache(method="nowait")
    pages = page_cache.pages(file.fd, file.stat)
    assert not page_cache.is_warm(pages, 0, MIB, clock.now)
    assert asked == [0, BLOCK, 2 * BLOCK]
    assert pages.cold == {2}
    assert page_cache.is_warm(pages, 3 * BLOCK, MIB - 3 * BLOCK, clock.now)
    assert asked[3:] == [*range(3 * BLOCK, MIB, BLOCK), MIB - 1]


def test_what_is_remembered_of_cold_blocks_is_bounded(make_file: Callable[[int], OpenFile]) -> None:
    file, page_cache = make_file(10), PageCache(method="nowait")
    pages = page_cache.pages(file.fd, file.stat)
    for block in range(5000):
        pages.found_cold(block)
        assert block in pages.cold
        assert len(pages.cold) <= residency.MOST_BLOCKS


def test_an_empty_file_is_warm(asker: PageCache, make_file: Callable[[int], OpenFile], clock: Clock) -> None:
    file = make_file(0)
    assert asker.is_warm(asker.pages(file.fd, file.stat), 0, 0, clock.now)


# -- for how long ----------------------------------------------------------------------------------------------


def test_a_probe_holds_for_a_second(
    asker: PageCache, make_file: Callable[[int], OpenFile], clock: Clock
) -> None:
    file = make_file(100 * 1024)
    file.make_warm()
    pages = asker.pages(file.fd, file.stat)
    assert becomes_warm(asker, pages, 0, 100 * 1024, clock.now)
    file.make_cold()
    assert asker.is_warm(pages, 0, 100 * 1024, clock.now + residency.PROBED_SECONDS - 0.001)
    assert not asker.is_warm(pages, 0, 100 * 1024, clock.now + residency.PROBED_SECONDS)


async def test_blind_is_cold_at_first_and_warm_for_a_while(
    make_file: Callable[[int], OpenFile], autojump_clock: trio.testing.MockClock
) -> None:
    file, page_cache = make_file(MIB), PageCache(method="blind")
    file.make_warm()
    pages = page_cache.pages(file.fd, file.stat)
    assert not page_cache.is_warm(pages, 0, MIB, trio.current_time())
    await page_cache.warm(pages, 0, MIB)
    await trio.sleep(residency.WARMED_SECONDS - 0.001)
    assert page_cache.is_warm(pages, 0, MIB, trio.current_time())
    await trio.sleep(0.002)
    assert not page_cache.is_warm(pages, 0, MIB, trio.current_time())


async def test_slow_is_never_warm(make_file: Callable[[int], OpenFile]) -> None:
    file, page_cache = make_file(MIB), PageCache(method="slow")
    file.make_warm()
    pages = page_cache.pages(file.fd, file.stat)
    assert pages.never_warm
    await page_cache.warm(pages, 0, MIB)
    assert not page_cache.is_warm(pages, 0, MIB, trio.current_time())


def test_memory_is_always_warm(clock: Clock, make_file: Callable[..., OpenFile]) -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm")
    if filesystem_type_of("/dev/shm") != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs")
    folder = Path("/dev/shm") / f"trioserve-test-{os.getpid()}"
    folder.mkdir()
    try:
        fd = os.open(folder / "file", os.O_RDWR | os.O_CREAT)
        try:
            os.ftruncate(fd, 3 * MIB)  # a hole: not even there
            page_cache = PageCache()
            pages = page_cache.pages(fd, os.fstat(fd))
            assert pages.device.method == "memory"
            assert not pages.never_warm
            assert page_cache.is_warm(pages, 0, MIB, clock.now)
            assert page_cache.is_warm(pages, 2 * MIB, MIB, clock.now + 3600)
            assert page_cache.cold_windows == 0
        finally:
            os.close(fd)
            (folder / "file").unlink()
    finally:
        folder.rmdir()


async def test_what_is_remembered_of_a_large_file_is_bounded(
    make_file: Callable[[int], OpenFile], clock: Clock
) -> None:
    file, page_cache = make_file(4096), PageCache(method="memory")
    pages = FilePages(file.fd, 10 * 1024 * MIB, page_cache.pages(file.fd, file.stat).device)
    for start in range(0, 10 * 1024 * MIB, MIB):
        assert page_cache.is_warm(pages, start, MIB, clock.now + start / (1024 * MIB))
        assert len(pages.blocks) <= residency.MOST_BLOCKS
    assert page_cache.is_warm(pages, 10 * 1024 * MIB - MIB, MIB, clock.now + 10)


# -- the guard -------------------------------------------------------------------------------------------------


def startled() -> PageCache:
    """One that is told that the disk was read from, however often it looks."""
    return PageCache(method="memory", disk_reads=itertools.count().__next__)


@pytest.mark.parametrize(
    ("count", "seconds"),
    [(MIB, 0.0005), (100, 0.002), (10 * MIB, 0.015), (MIB, 0.0020)],
)
def test_a_quick_send_is_no_surprise(
    make_file: Callable[[int], OpenFile], clock: Clock, count: int, seconds: float
) -> None:
    file, page_cache = make_file(10), startled()
    pages = page_cache.pages(file.fd, file.stat)
    page_cache.note_send(pages, count, seconds, clock.now)
    assert page_cache.surprises == 0
    assert page_cache.is_warm(pages, 0, 10, clock.now)


def test_a_send_that_was_slow_for_want_of_a_cpu_is_no_surprise(
    make_file: Callable[[int], OpenFile], clock: Clock
) -> None:
    file, page_cache = make_file(10), PageCache(method="memory", disk_reads=lambda: 7)
    page_cache.note_send(page_cache.pages(file.fd, file.stat), MIB, 0.5, clock.now)
    assert page_cache.surprises == 0


def test_a_send_that_waits_for_the_disk_is_known_by_what_was_read(
    cold_disk: Path, make_file: Callable[[int], OpenFile], clock: Clock
) -> None:
    file, page_cache = make_file(MIB), PageCache()
    pages = page_cache.pages(file.fd, file.stat)
    file.make_cold()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        os.sendfile(ours.fileno(), file.fd, 0, 4096)
        page_cache.note_send(pages, 4096, 0.5, clock.now)
        assert page_cache.surprises == 1
        os.sendfile(ours.fileno(), file.fd, 0, 4096)
        page_cache.note_send(pages, 4096, 0.5, clock.now)
        assert page_cache.surprises == 1


async def test_after_a_surprise_every_window_goes_to_a_thread_for_a_while(
    make_file: Callable[[int], OpenFile],
) -> None:
    file, other, page_cache = make_file(MIB), make_file(MIB), startled()
    pages, others = (page_cache.pages(one.fd, one.stat) for one in (file, other))
    now = trio.current_time()
    assert page_cache.is_warm(pages, 0, MIB, now)
    assert page_cache.is_warm(others, 0, MIB, now)
    page_cache.note_send(pages, MIB, 0.003, now)
    assert page_cache.surprises == 1
    answers = [page_cache.is_warm(pages if i % 2 else others, 0, MIB, now) for i in range(40)]
    assert answers == [False] * residency.DISTRUSTED_WINDOWS + [True] * (40 - residency.DISTRUSTED_WINDOWS)


async def test_after_a_surprise_a_thread_is_still_believed(make_file: Callable[[int], OpenFile]) -> None:
    file, page_cache = make_file(MIB), startled()
    pages = page_cache.pages(file.fd, file.stat)
    page_cache.note_send(pages, MIB, 0.5, trio.current_time())
    assert not page_cache.is_warm(pages, 0, MIB, trio.current_time())
    await page_cache.warm(pages, 0, MIB)
    assert page_cache.is_warm(pages, 0, MIB, trio.current_time())
    assert pages.device.distrusted == residency.DISTRUSTED_WINDOWS - 1


async def test_what_a_thread_read_while_a_surprise_came_is_all_that_is_believed(
    make_file: Callable[[int], OpenFile], gate: Gate
) -> None:
    file, page_cache = make_file(2 * MIB), startled()
    pages = page_cache.pages(file.fd, file.stat)
    assert page_cache.is_warm(pages, 0, MIB, trio.current_time())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(page_cache.warm, pages, MIB, MIB)
        await gate.wait_inside(1)
        page_cache.note_send(pages, MIB, 0.5, trio.current_time())
        gate.open()
    assert page_cache.is_warm(pages, MIB, MIB, trio.current_time())
    assert not page_cache.is_warm(pages, 0, MIB, trio.current_time())


def test_surprises_in_a_row_add_up(make_file: Callable[[int], OpenFile], clock: Clock) -> None:
    file, page_cache = make_file(10), startled()
    pages = page_cache.pages(file.fd, file.stat)
    seen = []
    for _ in range(8):
        page_cache.note_send(pages, 10, 1.0, clock.now)
        seen.append(pages.device.distrusted)
        clock.now += 1
    assert seen == [32, 64, 128, 256, 512, 1024, 1024, 1024]
    clock.now += residency.SURPRISES_ADD_UP_SECONDS
    page_cache.note_send(pages, 10, 1.0, clock.now)
    assert pages.device.distrusted == 32
    assert page_cache.surprises == 9


# -- the rest --------------------------------------------------------------------------------------------------


def test_file_pages_go_when_the_last_user_goes(make_file: Callable[[int], OpenFile]) -> None:
    """No cycle, nothing that the page cache keeps, no descriptor of its own."""

    class Watched(FilePages):
        __slots__ = ("__weakref__",)

    file, page_cache = make_file(10), PageCache()
    gc.disable()
    try:
        pages = Watched(file.fd, 10, page_cache.pages(file.fd, file.stat).device)
        page_cache.is_warm(pages, 0, 10, 1.0)
        gone = weakref.ref(pages)
        del pages
        assert gone() is None
    finally:
        gc.enable()
    os.fstat(file.fd)


def test_they_describe_themselves(make_file: Callable[[int], OpenFile], clock: Clock) -> None:
    file, page_cache = make_file(10), startled()
    pages = page_cache.pages(file.fd, file.stat)
    page_cache.is_warm(pages, 0, 10, clock.now)
    assert repr(page_cache) == "<PageCache 1 warm, 0 cold, 0 surprises, 0 of 8 threads>"
    assert repr(pages) == f"<FilePages fd={file.fd} 10 bytes, 0 blocks, <Device memory>>"
    page_cache.note_send(pages, 10, 1.0, clock.now)
    assert repr(pages.device) == "<Device memory distrusted for 32 windows>"


def test_the_proof_that_counts_is_the_oldest(make_file: Callable[[int], OpenFile], clock: Clock) -> None:
    """Two blocks that were proven at different times are as good as the older one."""
    file = make_file(10)
    pages = FilePages(file.fd, 10 * BLOCK, PageCache(method="memory").pages(file.fd, file.stat).device)
    assert pages.until == -math.inf
    pages.prove(0, 0, clock.now, 1.0)
    pages.prove(1, 1, clock.now + 0.5, 1.0)
    assert pages.is_proven(0, 1, clock.now + 0.9)
    assert pages.until == clock.now + 1.0
    assert not pages.is_proven(0, 1, clock.now + 1.0)
    assert not pages.is_proven(1, 2, clock.now + 0.9)


def test_windows_in_a_row_are_known_as_one_for_as_long_as_the_oldest_is(
    make_file: Callable[[int], OpenFile], clock: Clock
) -> None:
    file, page_cache = make_file(4096), PageCache(method="memory")
    pages = FilePages(file.fd, 64 * MIB, page_cache.pages(file.fd, file.stat).device)
    begun = clock.now
    for number in (1, 2, 3, 0):  # touching from either side
        assert page_cache.is_warm(pages, number * MIB, MIB, begun + number / 10)
    assert (pages.start, pages.stop, pages.until) == (0, 4 * MIB, begun + residency.PROBED_SECONDS)
    # With a gap it is a new part, and what is too old is added to nothing.
    assert page_cache.is_warm(pages, 8 * MIB, MIB, begun + 0.5)
    assert (pages.start, pages.stop) == (8 * MIB, 9 * MIB)
    assert page_cache.is_warm(pages, 9 * MIB, MIB, begun + 7)
    assert (pages.start, pages.stop) == (9 * MIB, 10 * MIB)
    # Nor does it outlast a surprise.
    pages.device.era += 1
    assert page_cache.is_warm(pages, 10 * MIB, MIB, begun + 7)
    assert (pages.start, pages.stop) == (10 * MIB, 11 * MIB)


def test_a_block_that_is_found_cold_is_warm_no_more(
    make_file: Callable[[int], OpenFile], clock: Clock
) -> None:
    file, page_cache = make_file(4096), PageCache(method="memory")
    pages = FilePages(file.fd, 64 * MIB, page_cache.pages(file.fd, file.stat).device)
    assert page_cache.is_warm(pages, 0, 4 * MIB, clock.now)
    pages.found_cold(20)
    assert page_cache.is_warm(pages, 0, 2 * MIB, clock.now)
    assert not page_cache.is_warm(pages, 2 * MIB, MIB, clock.now)
    assert not page_cache.is_warm(pages, 20 * BLOCK, 1, clock.now)
