"""Open files, kept for the next request: descriptors, prepared heads, and the contents of small files.

One `FileCache` serves one mount, on one event loop. `known` answers from memory alone; `find` looks at the file system
where that is due, without waiting if the kernel has the answer, else in a thread. Cancelling it leaves the cache as it
was. While a thread looks at a file again, other requests are served what was known of it.

Bounded by number, by descriptors and by memory; the entry that was not used for longest leaves first (second chance: a
mark per entry, which costs a request less than an order). All caches of the process share a quarter of its descriptors:
connections need some, too. One that is made later has its share at once, and the others give back what they have beyond
theirs when they next look at a file. Where the process runs out of them half of the idle ones are closed, and the open
is tried once more; but not for a form that needs a dictionary, which nobody has to have.
"""

from __future__ import annotations

import errno
import functools
import time
from collections.abc import Callable
from weakref import WeakSet

from trioserve.static.confine import NeedsThread, RootClosed
from trioserve.static.threads import in_thread
from trioserve.static.variants import Absent, Entry, Looker, Place, WithDictionary

# Seconds for which it is remembered that there is nothing, or a directory; a scan for what is not there finds its way
# to the disk no more often.
_ABSENT_SECONDS = 1.0
_MOST_ABSENT = 1000

# How long an entry is served on while a thread looks at it; and a disk that hangs is asked again after that.
_LOOKING_SECONDS = 1.0

# How many spellings of a path lead straight to an entry, and how long they may be: ordinary ones are shorter, and a
# client can make any path three times as long, or longer by a query where the server leaves that in. And for how many
# values of root_path.
_MOST_PATHS = 8
_LONGEST_PATH = 512
_MOST_ROOTS = 16

# EMFILE: the process's limit, ENFILE: the machine's.
_OUT_OF_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE})


class OutOfDescriptors(Exception):
    """No more files can be opened, even after some were closed for it; it may be otherwise in a second."""


class FileCache:
    """The entries of one mount.

    Attributes:
        clock: for freshness; never that of the files.
        shortcuts: by root_path, entries by the path as clients send it.
    """

    def __init__(self, looker: Looker, *, clock: Callable[[], float] = time.monotonic) -> None:
        options = looker.options
        self._looker = looker
        self.clock = clock
        self.shortcuts: dict[str, dict[bytes, Entry]] = {}
        self._entries: dict[Place, Entry] = {}
        self._absent: dict[Place, tuple[Absent, float]] = {}
        self._no_forms: dict[Place, tuple[Absent, float]] = {}
        self._most = options.cache_files
        self._most_bytes = options.cache_bytes
        self._revalidate = options.revalidate
        self._frozen = options.frozen
        self._bytes = 0
        self._descriptors = 0
        self._limit: int | None = None
        self._closed = False
        _open_caches.add(self)

    def __repr__(self) -> str:
        return (
            f"<FileCache {len(self._entries)} files, {self._descriptors} descriptors, {self._bytes} bytes, "
            f"{len(self._absent) + len(self._no_forms)} absent>"
        )

    def __len__(self) -> int:
        return len(self._entries)

    async def find(self, relative: Place) -> Entry | Absent:
        """What lies at a path, no older than `revalidate`.

        Raises:
            OutOfDescriptors: as it says.
            RootClosed: the cache was closed meanwhile.
            OSError: the file system has failed.
        """
        while True:
            now = self.clock()
            known = self._entries.get(relative)
            if known is not None:
                known.used = True
                if now < known.valid_until:
                    return known
            else:
                absent = self._absent_like(relative).get(relative)
                if absent is not None and now < absent[1]:
                    return absent[0]
            found = await self._look(relative, known, now)
            if self._closed:
                if isinstance(found, Entry) and found is not known:
                    found.release()
                raise RootClosed("the cache has been closed")
            if found is not known or self._entries.get(relative) is known:
                return self._note(relative, found)
            # It was evicted meanwhile, and its files are closed.

    async def _look(self, relative: Place, known: Entry | None, now: float) -> Entry | Absent:
        try:
            return await self._look_once(relative, known, now)
        except OSError as error:
            if error.errno not in _OUT_OF_DESCRIPTORS:
                raise
            if isinstance(relative, WithDictionary):
                # Who asks has the file without a dictionary: for this no other is closed.
                raise OutOfDescriptors(str(error)) from error
        self.shrink()
        known = known if self._entries.get(relative) is known else None
        try:
            return await self._look_once(relative, known, now)
        except OSError as error:
            if error.errno not in _OUT_OF_DESCRIPTORS:
                raise
            raise OutOfDescriptors(str(error)) from error

    async def _look_once(self, relative: Place, known: Entry | None, now: float) -> Entry | Absent:
        try:
            return self._looker.look(relative, known, nonblocking=True)
        except NeedsThread:
            pass
        if known is not None:
            known.valid_until = now + _LOOKING_SECONDS
        look = functools.partial(self._looker.look, relative, known, nonblocking=False)
        return await in_thread(
            look,
            discard=lambda found: (
                found.release() if isinstance(found, Entry) and found is not known else None
            ),
        )

    def _note(self, relative: Place, found: Entry | Absent) -> Entry | Absent:
        """Put what was found in its place."""
        now = self.clock()
        current = self._entries.get(relative)
        if isinstance(found, Absent):
            if current is not None:
                self._evict(current)
            self._note_absent(relative, found, now)
            return found
        if current is not None and found is not current:
            if current.settled and current.stamp == found.stamp:
                # Another request was as fast.
                found.release()
                found = current
            else:
                self._evict(current)
        if found is not current:
            self._absent_like(relative).pop(relative, None)
            self._entries[relative] = found
            self._bytes += found.memory
            self._descriptors += found.descriptors
            self._limit = descriptor_limit()  # a system call: not for each look at a file that is known
        # Also for what was there: other caches may have come, and the share of this one is smaller.
        self._make_room(found)
        forever = self._frozen and found.settled
        found.valid_until = float("inf") if forever else now + self._revalidate
        return found

    def _absent_like(self, place: Place) -> dict[Place, tuple[Absent, float]]:
        """What is known to be absent; made-up dictionaries push no path out."""
        return self._no_forms if isinstance(place, WithDictionary) else self._absent

    def _note_absent(self, relative: Place, absent: Absent, now: float) -> None:
        known = self._absent_like(relative)
        if len(known) >= _MOST_ABSENT:
            # The oldest first; a dict keeps the order.
            del known[next(iter(known))]
        known.pop(relative, None)
        known[relative] = (absent, now + min(_ABSENT_SECONDS, self._revalidate))

    # -- shortcuts -------------------------------------------------------------------------------------------

    def remember(self, root_path: str, raw_path: bytes, entry: Entry) -> None:
        """Have `raw_path`, as clients send it, lead to `entry` for as long as that is in the cache."""
        if self._entries.get(entry.relative) is not entry or len(entry.paths) >= _MOST_PATHS:
            return
        if len(raw_path) > _LONGEST_PATH:
            return
        paths = self.shortcuts.get(root_path)
        if paths is None:
            if len(self.shortcuts) >= _MOST_ROOTS:
                return
            paths = self.shortcuts[root_path] = {}
        if raw_path not in paths:
            paths[raw_path] = entry
            entry.paths.append((paths, raw_path))

    # -- room ------------------------------------------------------------------------------------------------

    def _make_room(self, newest: Entry) -> None:
        entries = self._entries
        descriptors = most_descriptors(self._most, self._limit)
        while (
            len(entries) > self._most or self._bytes > self._most_bytes or self._descriptors > descriptors
        ) and len(entries) > 1:
            self._evict_oldest(newest)

    def _evict_oldest(self, spared: Entry) -> None:
        """Look at the entry that has been there for longest: out with it, unless it was used since the last look."""
        relative, entry = next(iter(self._entries.items()))
        if entry.used or entry is spared:
            entry.used = False
            del self._entries[relative]
            self._entries[relative] = entry
        else:
            self._evict(entry)

    def _evict(self, entry: Entry) -> None:
        del self._entries[entry.relative]
        for paths, raw_path in entry.paths:
            del paths[raw_path]
        entry.paths.clear()
        entry.valid_until = 0.0
        self._bytes -= entry.memory
        self._descriptors -= entry.descriptors
        entry.release()

    def shrink(self) -> None:
        """Close half of the files that are kept open, those that were not used lately first."""
        holding = [entry for entry in self._entries.values() if entry.descriptors]
        holding.sort(key=lambda entry: entry.used)
        for entry in holding[: (len(holding) + 1) // 2]:
            self._evict(entry)

    def close(self) -> None:
        """Forget everything, for good; files that are being sent are closed when that is done."""
        self._closed = True
        _open_caches.discard(self)
        for entry in list(self._entries.values()):
            self._evict(entry)
        self._absent.clear()
        self._no_forms.clear()
        self.shortcuts.clear()


_open_caches: WeakSet[FileCache] = WeakSet()


def descriptor_limit() -> int | None:
    """How many files the process may have open, or None if as many as it likes."""
    try:
        import resource
    except ImportError:  # Windows
        return 512
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def most_descriptors(wanted: int, limit: int | None) -> int:
    """How many files each open cache may keep open: one at least, and together a quarter of what the process may."""
    if limit is None:
        return wanted
    return max(1, min(wanted, limit // 4 // max(1, len(_open_caches))))
