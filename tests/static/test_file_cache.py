"""The cache of open files: what is kept, for how long, within which bounds, and who closes what."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import trio

from trioserve.static.confine import ConfinedRoot, NeedsThread, RootClosed
from trioserve.static.field_rules import FieldRules
from trioserve.static.file_cache import FileCache, OutOfDescriptors, descriptor_limit, most_descriptors
from trioserve.static.open_file import OpenFile
from trioserve.static.options import StaticOptions
from trioserve.static.variants import Absent, Entry, Looker
from trioserve.testing import no_leaks

from .asking import LARGE, OLD, put


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Fixture:
    """Caches of one site, with a clock of their own and a count of what was opened."""

    def __init__(self, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.site = site
        self.clock = Clock()
        self.wall = OLD + 1000.0
        self.opened: list[bytes] = []
        self.needs_thread = False
        self.gate: trio.Event | None = None
        self.waiting = trio.Event()
        self.exhausted = 0
        self.caches: list[FileCache] = []
        real = ConfinedRoot.open

        def count(root: ConfinedRoot, relative: bytes, *, nonblocking: bool = False) -> Any:
            if nonblocking and self.needs_thread:
                raise NeedsThread
            if self.exhausted:
                self.exhausted -= 1
                raise OSError(24, "Too many open files")
            try:
                return real(root, relative, nonblocking=nonblocking)
            except NeedsThread:
                relative = b""  # asked for again, in a thread
                raise
            finally:
                if relative:
                    self.opened.append(relative)
                if self.gate is not None:
                    trio.from_thread.run_sync(self.waiting.set)
                    # Where the task is cancelled this ends at once, with an error that no thread of ours meets.
                    with contextlib.suppress(trio.Cancelled):
                        trio.from_thread.run(self.gate.wait)

        monkeypatch.setattr(ConfinedRoot, "open", count)

    def cache(self, **given: Any) -> FileCache:
        options = StaticOptions.checked({"codings": [], **given})
        looker = Looker(ConfinedRoot(self.site), options, FieldRules(options), lambda: self.wall)
        self.caches.append(FileCache(looker, clock=self.clock))
        return self.caches[-1]


@pytest.fixture
def at(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fixture]:
    for number in range(6):
        put(site / f"large{number}", LARGE)
        put(site / f"small{number}", b"x" * 1000)
    fixture = Fixture(site, monkeypatch)
    yield fixture
    for cache in fixture.caches:
        cache.close()


async def found(cache: FileCache, relative: bytes) -> Entry:
    entry = await cache.find(relative)
    assert isinstance(entry, Entry)
    return entry


def file_of(entry: Entry) -> OpenFile:
    file = entry.forms[b"identity"].file
    assert file is not None
    return file


def is_open(file: OpenFile) -> bool:
    try:
        return os.fstat(file.fd).st_ino == file.stat.st_ino
    except OSError:
        return False


# -- freshness -----------------------------------------------------------------------------------------------


async def test_a_file_is_looked_at_once_a_second(at: Fixture) -> None:
    cache = at.cache()
    first = await found(cache, b"large0")
    at.clock.now += 0.9
    assert await found(cache, b"large0") is first
    assert at.opened == [b"large0"]
    at.clock.now += 0.2
    assert await found(cache, b"large0") is first
    assert at.opened == [b"large0"] * 2
    at.clock.now += 0.9
    assert await found(cache, b"large0") is first
    assert len(at.opened) == 2


async def test_a_file_that_was_replaced_gets_a_new_entry(at: Fixture) -> None:
    cache = at.cache()
    first = await found(cache, b"large0")
    file = file_of(first)
    file.acquire()
    put(at.site / "new", LARGE[::-1]).rename(at.site / "large0")
    at.clock.now += 2
    second = await found(cache, b"large0")
    assert second is not first
    assert file_of(second).stat.st_ino != file.stat.st_ino
    # Who sends the old one goes on sending it.
    assert os.pread(file.fd, 5, 0) == LARGE[:5]
    file.release()
    assert not is_open(file)
    assert cache._descriptors == len(cache) == 1


@pytest.mark.parametrize("change", ["content", "removed", "directory", "touched"])
async def test_a_change_is_seen_after_a_second(at: Fixture, change: str) -> None:
    cache = at.cache()
    path = at.site / "small0"
    first = await found(cache, b"small0")
    if change == "content":
        put(path, b"y" * 1000)  # of the same size and time: the time of change betrays it
    elif change == "touched":
        os.utime(path, (OLD + 1, OLD + 1))
    else:
        path.unlink()
        if change == "directory":
            path.mkdir()
    assert await found(cache, b"small0") is first
    at.clock.now += 1
    after = await cache.find(b"small0")
    assert after is not first
    if change == "content":
        assert isinstance(after, Entry)
        assert after.forms[b"identity"].content == b"y" * 1000
    elif change != "touched":
        assert after is (Absent.MISSING if change == "removed" else Absent.DIRECTORY)
        assert len(cache) == 0


async def test_a_frozen_file_is_never_looked_at_again(at: Fixture) -> None:
    cache = at.cache(frozen=True)
    first = await found(cache, b"large0")
    (at.site / "large0").unlink()
    at.clock.now += 1e9
    assert await found(cache, b"large0") is first
    assert len(at.opened) == 1


async def test_an_unsettled_file_is_looked_at_until_its_validators_are_strong(at: Fixture) -> None:
    cache = at.cache(frozen=True)
    at.wall = OLD + 1.0
    weak = await found(cache, b"small0")
    assert weak.forms[b"identity"].validators.etag.startswith(b"W/")
    at.clock.now += 2
    at.wall = OLD + 100.0
    strong = await found(cache, b"small0")
    assert strong is not weak
    assert strong.settled
    at.clock.now += 2
    assert await found(cache, b"small0") is strong


async def test_what_is_absent_is_remembered_for_a_second(at: Fixture) -> None:
    cache = at.cache(revalidate=60)
    assert await cache.find(b"nothing") is Absent.MISSING
    assert await cache.find(b"docs") is Absent.DIRECTORY
    put(at.site / "nothing", b"something")
    assert await cache.find(b"nothing") is Absent.MISSING
    assert await cache.find(b"docs") is Absent.DIRECTORY
    assert at.opened == [b"nothing", b"docs"]
    at.clock.now += 1
    assert isinstance(await cache.find(b"nothing"), Entry)
    assert repr(cache) == "<FileCache 1 files, 0 descriptors, 9 bytes, 1 absent>"


async def test_a_scan_for_what_is_absent_takes_bounded_memory(at: Fixture) -> None:
    cache = at.cache()
    for number in range(1200):
        assert await cache.find(b"%d" % number) is Absent.MISSING
    assert len(cache._absent) == 1000
    assert await cache.find(b"1199") is Absent.MISSING
    assert len(at.opened) == 1200


# -- bounds --------------------------------------------------------------------------------------------------


async def test_the_number_of_files_is_bounded_and_the_unused_leave_first(at: Fixture) -> None:
    cache = at.cache(cache_files=3)
    files = [file_of(await found(cache, b"large%d" % number)) for number in range(3)]
    await found(cache, b"large0")  # used since it came
    files.append(file_of(await found(cache, b"large3")))
    assert [is_open(file) for file in files] == [True, False, True, True]
    assert cache._descriptors == len(cache) == 3
    at.opened.clear()
    await found(cache, b"large0")
    assert at.opened == []
    await found(cache, b"large1")
    assert at.opened == [b"large1"]


async def test_the_newest_file_is_never_the_one_to_go(at: Fixture) -> None:
    cache = at.cache(cache_files=1)
    for number in (0, 1, 2, 1):
        file = file_of(await found(cache, b"large%d" % number))
        assert is_open(file)
        assert len(cache) == 1


async def test_the_memory_for_contents_is_bounded(at: Fixture) -> None:
    cache = at.cache(cache_bytes=2500, small_file=2500)
    for number in range(6):
        entry = await found(cache, b"small%d" % number)
        assert entry.forms[b"identity"].file is None
        assert cache._bytes <= 2500
    assert len(cache) == 2


async def test_small_files_need_no_descriptor(at: Fixture) -> None:
    cache = at.cache(small_file=1000)
    assert (await found(cache, b"small0")).descriptors == 0
    strict = at.cache(small_file=999)
    assert (await found(strict, b"small0")).descriptors == 1


async def test_no_more_than_a_quarter_of_the_descriptors_for_all_caches_together(
    at: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr("trioserve.static.file_cache._open_caches", WeakSet[FileCache]())
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
        assert most_descriptors(1000, descriptor_limit()) == 100
        assert most_descriptors(10, descriptor_limit()) == 10
        assert most_descriptors(1000, None) == 1000
        caches = [at.cache() for _ in range(25)]
        assert most_descriptors(1000, 400) == 4
        for number in range(6):
            for cache in caches[:2]:
                await found(cache, b"large%d" % number)
        assert [cache._descriptors for cache in caches[:2]] == [4, 4]
        for cache in caches[1:]:
            cache.close()
        await found(caches[0], b"large4")
        await found(caches[0], b"large0")
        assert caches[0]._descriptors == 5
        # More come: a look at a file that has not changed is enough.
        caches += [at.cache() for _ in range(49)]
        at.clock.now += 2
        await found(caches[0], b"large0")
        assert caches[0]._descriptors == 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_the_limit_on_descriptors_is_asked_for_when_a_file_is_opened_and_not_at_each_look(
    at: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def getrlimit(which: int) -> tuple[int, int]:
        asked.append(which)
        return soft, hard

    monkeypatch.setattr(resource, "getrlimit", getrlimit)
    monkeypatch.setattr("trioserve.static.file_cache._open_caches", WeakSet[FileCache]())
    cache = at.cache()
    for number in range(4):
        await found(cache, b"large%d" % number)
    assert cache._descriptors == len(asked) == 4
    for number in range(4):
        at.clock.now += 2
        await found(cache, b"large%d" % number)
    assert len(asked) == 4
    soft = 8
    await found(cache, b"large4")
    assert cache._descriptors == 2


async def test_descriptors_are_bounded_beside_files(at: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trioserve.static.file_cache.most_descriptors", lambda *_: 2)
    cache = at.cache()
    for number in range(6):
        await found(cache, b"large%d" % number)
        await found(cache, b"small%d" % number)
        assert cache._descriptors <= 2


async def test_out_of_descriptors_half_of_them_are_given_back_and_it_is_tried_again(at: Fixture) -> None:
    cache = at.cache()
    files = [file_of(await found(cache, b"large%d" % number)) for number in range(4)]
    at.exhausted = 1
    files.append(file_of(await found(cache, b"large4")))
    assert sum(map(is_open, files)) == 3
    at.exhausted = 1
    at.needs_thread = True
    await found(cache, b"large5")
    at.exhausted = 2
    with pytest.raises(OutOfDescriptors):
        await cache.find(b"index.html")
    assert isinstance(await cache.find(b"index.html"), Entry)


async def test_a_known_file_is_opened_anew_when_its_descriptor_was_given_back(at: Fixture) -> None:
    cache = at.cache(revalidate=0)
    first = await found(cache, b"large0")
    at.exhausted = 1
    second = await found(cache, b"large0")
    assert second is not first
    assert is_open(file_of(second))


# -- shortcuts -----------------------------------------------------------------------------------------------


async def test_shortcuts_end_with_their_entry(at: Fixture) -> None:
    cache = at.cache(cache_files=1)
    entry = await found(cache, b"large0")
    for number in range(20):
        cache.remember("", b"/%d" % number, entry)
    for number in range(20):
        cache.remember(f"/{number}", b"/large0", entry)
    assert len(entry.paths) == 8
    assert cache.shortcuts[""][b"/0"] is entry
    await found(cache, b"large1")
    assert cache.shortcuts == {"": {}}
    cache.remember("", b"/0", entry)  # which has left
    assert cache.shortcuts == {"": {}}


async def test_a_path_that_a_client_has_made_long_is_no_shortcut(at: Fixture) -> None:
    cache = at.cache()
    entry = await found(cache, b"small0")
    cache.remember("", b"/small0?" + b"x" * 8000, entry)
    assert not entry.paths
    assert not cache.shortcuts


async def test_root_paths_are_bounded(at: Fixture) -> None:
    cache = at.cache()
    for number in range(30):
        name = b"small%d" % (number % 6)
        cache.remember(f"/{number}", b"/x", await found(cache, name))
    assert len(cache.shortcuts) == 16


# -- threads -------------------------------------------------------------------------------------------------


async def test_requests_at_the_same_time_share_what_the_first_has_opened(at: Fixture) -> None:
    at.needs_thread = True
    cache = at.cache()
    entries = []

    async def one() -> None:
        entries.append(await found(cache, b"large0"))

    async with no_leaks():
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(one)
        assert len(set(map(id, entries))) == 1
        assert len(cache) == cache._descriptors == 1
        cache.close()


async def test_while_a_thread_looks_again_others_get_what_is_known(at: Fixture) -> None:
    cache = at.cache()
    known = await found(cache, b"large0")
    at.clock.now += 5
    at.needs_thread = True
    at.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.find, b"large0")
        await at.waiting.wait()
        assert await found(cache, b"large0") is known
        assert len(at.opened) == 2
        at.gate.set()
    assert known.valid_until == at.clock.now + 1


async def test_what_was_evicted_while_a_thread_looked_at_it_is_opened_again(at: Fixture) -> None:
    cache = at.cache()
    known = await found(cache, b"large0")
    at.clock.now += 5
    at.needs_thread = True
    at.gate = trio.Event()
    entries = []

    async def look() -> None:
        entries.append(await found(cache, b"large0"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await at.waiting.wait()
        cache.shrink()
        at.gate.set()
    assert entries[0] is not known
    assert is_open(file_of(entries[0]))


@pytest.mark.parametrize("again", [False, True])
async def test_a_cache_that_is_closed_while_a_thread_looks_keeps_nothing(at: Fixture, again: bool) -> None:
    async with no_leaks():
        cache = at.cache()
        if again:
            await found(cache, b"large0")
            at.clock.now += 5
        at.needs_thread = True
        at.gate = trio.Event()

        async def look() -> None:
            with pytest.raises(RootClosed):
                await cache.find(b"large0")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await at.waiting.wait()
            cache.close()
            at.gate.set()
        assert len(cache) == 0
        at.caches.remove(cache)
        cache._looker.root.close()


async def test_cancelling_leaves_nothing_open(at: Fixture) -> None:
    at.needs_thread = True
    at.gate = trio.Event()
    cache = at.cache()
    async with no_leaks():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.find, b"large0")
            await at.waiting.wait()
            nursery.cancel_scope.cancel()
            at.gate.set()
        cache.close()
