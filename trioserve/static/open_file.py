"""An open file that several requests read from, and how its bytes are read without holding up the event loop.

`file_cache.py` opens files and holds one lease on each; a request takes another for as long as it sends (`sending.py`).
The descriptor is closed when the last lease is given back, so that its number is never another file's while somebody
still reads. A file that others know of has its leases taken and given back on the event loop only.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from trioserve.asgi.file_body import KnownFile

# The kernel has this for Linux 4.14 and later; Python where it was built with it.
_NOWAIT = getattr(os, "RWF_NOWAIT", None)

# preadv2(2): not in memory, or the file system cannot tell without waiting.
_NOT_RESIDENT = frozenset({errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})


class OpenFile(KnownFile):
    """A descriptor and its leases."""

    __slots__ = ("_leases",)

    def __init__(self, fd: int, stat: os.stat_result) -> None:
        """Takes the descriptor over; the caller holds the first lease."""
        super().__init__(fd, stat)
        self._leases = 1

    def __repr__(self) -> str:
        return f"<OpenFile {self.fd}, {self._leases} leases>"

    def acquire(self) -> None:
        """Take a lease."""
        assert self._leases > 0, "the file is closed"
        self._leases += 1

    def release(self) -> None:
        """Give a lease back; the last one closes the file."""
        self._leases -= 1
        if self._leases == 0:
            os.close(self.fd)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # Of a cache that nobody has closed: an app that is mounted in another hears nothing of the end.
        if self._leases > 0:
            close(self.fd)


def read_resident(fd: int, offset: int, count: int) -> bytes | None:
    """Read up to `count` bytes if the first of them is in memory; None if the disk would have to be waited for.

    Returns fewer bytes at the end of the file, or where the part in memory ends.

    Raises:
        OSError: the file cannot be read.
    """
    if _NOWAIT is None:
        return None
    buffer = bytearray(count)
    try:
        size = os.preadv(fd, [buffer], offset, _NOWAIT)
    except OSError as error:
        if error.errno in _NOT_RESIDENT:
            return None
        raise
    return bytes(buffer[:size]) if size < count else bytes(buffer)


def read_start(fd: int, count: int, *, nonblocking: bool) -> bytes | None:
    """The first bytes of a file; None where the disk would have to be waited for (`nonblocking`).

    Raises:
        OSError: the file cannot be read.
    """
    return read_resident(fd, 0, count) if nonblocking else os.pread(fd, count, 0)


def read_whole(fd: int, stat: os.stat_result, *, nonblocking: bool) -> bytes | None:
    """The contents of a small file, as it is described by `stat`.

    Returns None where they are not in memory (`nonblocking`), or where the file is being changed, so that what was read
    need not be what it ever contained.

    Raises:
        OSError: the file cannot be read.
    """
    size = stat.st_size
    if not size:
        return b""
    # One byte more than there should be, so that growth shows.
    data = read_start(fd, size + 1, nonblocking=nonblocking)
    if data is None or len(data) != size:
        return None
    return data if stamp(os.fstat(fd)) == stamp(stat) else None


def stamp(stat: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is changed or replaced."""
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
