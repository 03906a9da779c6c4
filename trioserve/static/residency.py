"""Which parts of a file are in memory, and how the others get there without holding up the event loop.

`os.sendfile` to a non-blocking socket still waits for the disk, and with it waits every connection of the worker. So
the sender (`sendfile.py`) asks `PageCache.is_warm` before each window, has a cold one read by a thread (`warm`), and
then sends what is in memory. It tells `note_send` of a send that took long all the same: then the answers were wrong,
and for a while all windows of that device go by way of a thread.

How it is found out depends on the filesystem, and is settled once for each device:

    nowait    a read of one byte that may not wait (RWF_NOWAIT): ext4, xfs, btrfs, f2fs, and whatever else can do it
    memory    always warm: tmpfs, ramfs
    mincore   the pages of a mapping that is never touched: overlayfs, where the kernel tells us the truth
    blind     cold the first time, warm for a while after a thread has read it: what is left, and all but Linux
    slow      never warm: filesystems that ask somebody else (nfs, cifs, fuse, 9p), where even a cached read may wait

Only `warm` waits. It is not cancelled while its thread reads: the descriptor belongs to the caller, who closes it after
that, and a thread that was still reading would then read from whatever came to have the same number. Long reads look
between steps whether they were cancelled, and end early.
"""

from __future__ import annotations

import errno
import math
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import trio

from trioserve.static.kernel_pages import filesystem_type, may_override_owners, mincore, read_through

Method = Literal["nowait", "memory", "mincore", "blind", "slow"]

# getrusage(2): Linux counts for each thread.
_THREAD: Final[int | None] = getattr(resource, "RUSAGE_THREAD", None)

# What is known, is known for a block: the kernel's usual read-ahead, so that whoever has read a block's first page has
# very likely had the rest of it fetched as well. A multiple of every page size, which mmap asks for.
BLOCK: Final = 128 * 1024

# Seconds that a probe's answer holds. To ask again costs a microsecond or two (a tenth of sending even a small file),
# so there is no reason for more; one second makes it free for files that are asked for often. Pages that were seen a
# second ago only go if the machine has to turn over its whole inactive list within it, or if somebody drops them.
PROBED_SECONDS: Final = 1.0

# A probe that took longer (seconds) has started a read and seen it end, or was interrupted. What is in memory answers
# in 1 microsecond, or 15 when the page is touched for the first time; flash takes 60 and more, and what is quicker than
# this may as well be waited for.
PROBE_SECONDS: Final = 40e-6

# Seconds that a block counts as warm after a thread has read it, where nothing can be asked. To be wrong costs a wait
# for the disk, to ask again a hop through a thread (50 to 100 microseconds): once in 5 s for a file in demand.
WARMED_SECONDS: Final = 5.0

# A send that took longer than this, and was slower than any memory (bytes a second), has waited for the disk. Two
# milliseconds are a time slice: what is shorter is as likely the scheduler, and hurts nobody.
SURPRISE_SECONDS: Final = 0.002
SURPRISE_RATE: Final = 500e6

# Windows of a device for which probes are not believed after a surprise. Twice as many if the next one follows within
# a minute of the last.
DISTRUSTED_WINDOWS: Final = 32
MOST_DISTRUSTED_WINDOWS: Final = 1024
SURPRISES_ADD_UP_SECONDS: Final = 60.0

# Blocks of one file that are remembered: about 100 kB of memory, 128 MiB of the file. To forget one is to ask again.
MOST_BLOCKS: Final = 1024

# Filesystems by the names that the kernel gives them. `fuse.*` is slow too.
_MEMORY: Final = frozenset(("tmpfs", "ramfs", "rootfs", "devtmpfs"))
# fmt: off
_SLOW: Final = frozenset((
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse", "fuseblk", "virtiofs", "fakeowner", "vboxsf", "afs", "ceph",
    "coda", "orangefs", "lustre", "gpfs", "beegfs", "ocfs2", "gfs2",
))
# fmt: on
_MINCORE: Final = frozenset(("overlay",))

# The kernel does not know the question, or does not answer it for this file.
_UNSUPPORTED: Final = frozenset(
    (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.ENODEV)
)

_NOWAIT: Final[int | None] = getattr(os, "RWF_NOWAIT", None)

# The number by which a user namespace shows owners that it has no name for.
_NOBODY_KNOWN: Final = 65534


class Device:
    """A filesystem, by the `st_dev` of its files.

    Attributes:
        method: how residency is found out; falls down to "blind" when the question is refused.
        era: counts the surprises; what was known before the last one is not believed any more.
        distrusted: windows left for which probes are not believed.
        penalty: what `distrusted` began with last time.
        surprised_at: when that was.
        for_others: the device that files have about which the kernel does not tell us; None if it makes no difference.
    """

    __slots__ = ("distrusted", "era", "for_others", "method", "penalty", "surprised_at")

    def __init__(self, method: Method) -> None:
        self.method: Method = method
        self.era = 0
        self.distrusted = 0
        self.penalty = 0
        self.surprised_at = -math.inf
        self.for_others = Device("blind") if method == "mincore" else None

    def __repr__(self) -> str:
        return (
            f"<Device {self.method}{f' distrusted for {self.distrusted} windows' if self.distrusted else ''}>"
        )


class FilePages:
    """What is known of one open file; any number of tasks may use it at once.

    The descriptor is borrowed: who opened it closes it, and not before the last `warm` has returned.

    Attributes:
        fd: the open file.
        size: its length when it was opened.
        device: where it lies.
        era: the device's, at the time of what follows.
        start: this part of the file was proven last, window after window,
        stop: up to here,
        until: and this is when the oldest of these proofs is too old (`trio.current_time`).
        blocks: the same for single blocks: number -> until.
        cold: blocks that were missing, and that no thread has read since.
    """

    __slots__ = ("blocks", "cold", "device", "era", "fd", "size", "start", "stop", "until")

    def __init__(self, fd: int, size: int, device: Device) -> None:
        self.fd = fd
        self.size = size
        self.device = device
        self.blocks: dict[int, float] = {}
        self.cold: set[int] = set()
        self.forget()

    def __repr__(self) -> str:
        return f"<FilePages fd={self.fd} {self.size} bytes, {len(self.blocks)} blocks, {self.device!r}>"

    @property
    def never_warm(self) -> bool:
        """Whether even a read of what is in memory may have to wait: such a file is better copied by a thread."""
        return self.device.method == "slow"

    def forget(self) -> None:
        """Nothing is known any more."""
        self.era = self.device.era
        self.start, self.stop, self.until = 0, 0, -math.inf
        self.blocks.clear()
        self.cold.clear()

    def found_cold(self, block: int) -> None:
        """This block is missing, whatever was known of it."""
        if len(self.cold) >= MOST_BLOCKS:
            self.cold.clear()
        self.cold.add(block)
        self.blocks.pop(block, None)
        if self.start <= block * BLOCK < self.stop:
            self.until = -math.inf

    def is_proven(self, first: int, last: int, now: float) -> bool:
        """Whether all blocks from `first` to `last` are known to be warm; remembered for the next who asks."""
        get = self.blocks.get
        until = math.inf
        for block in range(first, last + 1):
            one = get(block, 0.0)
            if one <= now:
                return False
            until = min(until, one)
        self._extend(first, last, now, until)
        return True

    def _extend(self, first: int, last: int, now: float, until: float) -> None:
        """Add blocks to the part that was proven last, where they touch it; else they are the new one.

        So a file in demand, which is looked at window after window, is soon known as a whole.
        """
        start, stop = first * BLOCK, (last + 1) * BLOCK
        if now < self.until and start <= self.stop and self.start <= stop:
            start, stop, until = min(start, self.start), max(stop, self.stop), min(until, self.until)
        self.start, self.stop, self.until = start, stop, until

    def prove(self, first: int, last: int, now: float, seconds: float) -> None:
        """The blocks from `first` to `last` were found warm at `now`, which holds for `seconds`."""
        if self.era != self.device.era:
            self.forget()
        until = now + seconds
        if self.cold:
            self.cold.difference_update(range(first, last + 1))
        if first == 0 and (last + 1) * BLOCK >= self.size:
            # The whole of a small file: the part says it all.
            self.start, self.stop, self.until = 0, (last + 1) * BLOCK, until
            return
        self._extend(first, last, now, until)
        for block in range(first, last + 1):
            self.blocks[block] = until
        if len(self.blocks) > MOST_BLOCKS:
            self._forget_old(now)

    def _forget_old(self, now: float) -> None:
        kept = {block: until for block, until in self.blocks.items() if until > now}
        # A reader of a gigabyte a second; half of the room has to be free, or this would be done for every window.
        self.blocks = kept if len(kept) <= MOST_BLOCKS // 2 else {}


def _disk_reads() -> int:
    """Blocks that were read for this thread; a number that never stays the same where the system does not count."""
    if _THREAD is None:
        return time.monotonic_ns()
    return resource.getrusage(_THREAD).ru_inblock


class PageCache:
    """The worker's view of the kernel's page cache.

    Attributes:
        limiter: what bounds the threads that read; nothing else uses it.
        warm_windows: windows that could be sent at once.
        cold_windows: windows that had to go by way of a thread.
        surprises: sends that waited for the disk although they should not have.
    """

    def __init__(
        self,
        *,
        threads: int = 8,
        method: Method | Literal["auto"] = "auto",
        proc: str = "/proc/self",
        disk_reads: Callable[[], int] | None = None,
    ) -> None:
        """Begin with nothing known.

        Args:
            threads: how many may read at the same time. More do not make a disk faster, and each holds a stack.
            method: forces one for all devices, for tests.
            proc: where the kernel describes this process, for tests.
            disk_reads: how much this thread has had read from disks so far, for tests.
        """
        self.limiter = trio.CapacityLimiter(threads)
        self.warm_windows = 0
        self.cold_windows = 0
        self.surprises = 0
        self._disk_reads = disk_reads or _disk_reads
        self._reads_before = self._disk_reads()
        self._forced = method
        self._proc = Path(proc)
        self._devices: dict[int, Device] = {}
        self._overrides: dict[int, bool] = {}
        self._byte = [bytearray(1)]

    def __repr__(self) -> str:
        return (
            f"<PageCache {self.warm_windows} warm, {self.cold_windows} cold, {self.surprises} surprises, "
            f"{self.limiter.borrowed_tokens} of {self.limiter.total_tokens:g} threads>"
        )

    def close(self) -> None:
        """Forget the devices. Nothing is held open, and a `warm` under way ends in peace."""
        self._devices.clear()

    # -- which method -----------------------------------------------------------------------------------------

    def pages(self, fd: int, stat: os.stat_result) -> FilePages:
        """Begin to keep account of an open file; `stat` is its fstat. Never raises, whatever `fd` is."""
        device = self._devices.get(stat.st_dev)
        if device is None:
            device = self._classify(fd, stat.st_dev)
        if device.for_others is not None and self._forced == "auto" and not self._is_told(stat.st_uid):
            device = device.for_others
        return FilePages(fd, stat.st_size, device)

    def _classify(self, fd: int, number: int) -> Device:
        method = self._find_method(fd) if self._forced == "auto" else self._forced
        if method is None:
            # Something is wrong with this file, which says nothing about its neighbours.
            return Device("blind")
        device = self._devices[number] = Device(method)
        return device

    def _find_method(self, fd: int) -> Method | None:
        kind = filesystem_type(fd, self._proc)
        if kind in _MEMORY:
            return "memory"
        if kind in _SLOW or kind.startswith("fuse."):
            return "slow"
        if _NOWAIT is not None:
            try:
                os.preadv(fd, self._byte, 0, _NOWAIT)
                return "nowait"
            except BlockingIOError:
                return "nowait"
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    return None
        if kind in _MINCORE and mincore() is not None:
            return "mincore"
        return "blind"

    def _is_told(self, owner: int) -> bool:
        """Whether mincore(2) is honest about a file of this owner; to strangers it calls every page resident."""
        user = os.geteuid()
        if owner == user:
            return True
        overrides = self._overrides.get(user)
        if overrides is None:
            overrides = self._overrides[user] = may_override_owners(self._proc)
        # Who has the capability in a user namespace only, has it over the owners that exist there.
        return overrides and owner != _NOBODY_KNOWN

    # -- on the event loop ------------------------------------------------------------------------------------

    def is_warm(self, pages: FilePages, offset: int, count: int, now: float) -> bool:
        """Whether this window can be sent without a wait for the disk. Does not wait itself, and never raises.

        Args:
            pages: the file.
            offset: where the window begins.
            count: its length; meant for windows of up to a few MiB, the time it takes grows with it.
            now: `trio.current_time()`.
        """
        if (
            now < pages.until
            and pages.start <= offset
            and offset + count <= pages.stop
            and pages.era == pages.device.era
        ):
            self.warm_windows += 1
            return True
        if self._ask(pages, offset, count, now):
            self.warm_windows += 1
            return True
        self.cold_windows += 1
        return False

    def _ask(self, pages: FilePages, offset: int, count: int, now: float) -> bool:
        device = pages.device
        if pages.era != device.era:
            pages.forget()
        if device.method == "slow":
            return False
        if count <= 0:
            return True
        first, last = offset // BLOCK, (offset + count - 1) // BLOCK
        if pages.blocks and pages.is_proven(first, last, now):
            return True
        if pages.cold and not pages.cold.isdisjoint(range(first, last + 1)):
            return False
        if device.distrusted:
            device.distrusted -= 1
            return False
        # A file may have grown since it was opened; what is beyond its old end can be sent, so it counts.
        stop = min((last + 1) * BLOCK, max(pages.size, offset + count))
        if device.method == "memory" or (
            device.method != "blind" and self._probe(pages, first * BLOCK, stop)
        ):
            pages.prove(first, last, now, PROBED_SECONDS)
            return True
        return False

    def _probe(self, pages: FilePages, start: int, stop: int) -> bool:
        """Ask the kernel about a part of the file that begins with a block.

        nowait: the first page of each block, and the last page; a read that would have to wait raises BlockingIOError.
        The end of the file reads as nothing, at once. But a page that is missing is fetched because it was asked for,
        and few or none of its neighbours with it. Had a fast disk brought it within the call, or did the next task ask
        for it, it would speak for a block that is not there: so a slow answer counts as none, and a block that was
        found cold stays cold until a thread has read it.
        """
        position = start
        try:
            if pages.device.method == "mincore":
                is_resident = mincore()
                return is_resident is not None and is_resident(pages.fd, start, stop - start)
            if _NOWAIT is None:
                raise OSError(errno.EOPNOTSUPP, "no RWF_NOWAIT on this system")
            preadv, clock, fd, byte = os.preadv, time.perf_counter, pages.fd, self._byte
            began = clock()
            for position in (*range(start, stop, BLOCK), stop - 1):
                preadv(fd, byte, position, _NOWAIT)
                ended = clock()
                if ended - began > PROBE_SECONDS:
                    pages.found_cold(position // BLOCK)
                    return False
                began = ended
            return True
        except BlockingIOError:
            pages.found_cold(position // BLOCK)
            return False
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                pages.device.method = "blind"
            # Anything else is the file's own trouble, which `warm` will run into and raise.
            return False

    def note_send(self, pages: FilePages, count: int, seconds: float, now: float) -> None:
        """A send on the event loop has taken so long for so many bytes.

        Those that were quick say nothing, and those in which this thread had nothing read from a disk (getrusage(2),
        ru_inblock) were slow for another reason: the machine is busy.
        """
        if seconds <= SURPRISE_SECONDS or seconds * SURPRISE_RATE <= count:
            return
        before, self._reads_before = self._reads_before, self._disk_reads()
        if self._reads_before == before:
            return  # it had to wait for a CPU, not for a disk
        self.surprises += 1
        device = pages.device
        device.era += 1
        again = now - device.surprised_at < SURPRISES_ADD_UP_SECONDS
        device.penalty = min(2 * device.penalty, MOST_DISTRUSTED_WINDOWS) if again else DISTRUSTED_WINDOWS
        device.distrusted = device.penalty
        device.surprised_at = now

    # -- in a thread ------------------------------------------------------------------------------------------

    async def warm(self, pages: FilePages, offset: int, count: int) -> None:
        """Have a thread read this window into memory.

        A file that has become shorter is read as far as it goes; the send will find out.

        Raises:
            OSError: the file cannot be read there (EIO of a broken disk, ESTALE of a file server, EBADF).
        """
        if count <= 0:
            await trio.lowlevel.checkpoint()
            return
        first, last = offset // BLOCK, (offset + count - 1) // BLOCK
        # Whole blocks, or the one in which a window ends would never be known to be warm.
        start, stop = first * BLOCK, min((last + 1) * BLOCK, max(pages.size, offset + count))
        await trio.to_thread.run_sync(
            read_through, pages.fd, start, stop - start, limiter=self.limiter, abandon_on_cancel=False
        )
        method = pages.device.method
        if method != "slow":
            seconds = WARMED_SECONDS if method == "blind" else PROBED_SECONDS
            pages.prove(first, last, trio.current_time(), seconds)
