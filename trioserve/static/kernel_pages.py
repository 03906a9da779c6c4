"""The system calls behind `residency.py`: what the kernel says of a file's pages, and the read that fetches them.

Nothing here waits for a disk but `read_through`, which is for threads that `trio.to_thread.run_sync` has started.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

# Bytes that a thread reads before it looks whether the task has been cancelled: 10 ms of a slow disk.
STEP: Final = 1024 * 1024

# Bytes of memory that a thread needs where it has to read into memory of our own.
_BUFFER: Final = 128 * 1024

# A file that cannot be sent to /dev/null (macOS sends to sockets only).
_NOT_TO_DEVNULL: Final = frozenset(
    (errno.EINVAL, errno.ENOSYS, errno.ENOTSOCK, errno.EOPNOTSUPP, errno.ENOTSUP)
)

# linux/capability.h
_CAP_FOWNER: Final = 1 << 3


def read_through(fd: int, offset: int, count: int) -> None:
    """Have the kernel fetch a part of a file. Sent to /dev/null its pages are not even copied.

    /dev/null is opened each time (2 microseconds, in a thread): a descriptor that is kept would be one more that could
    be closed and reused too early, and then a file would be sent to whoever got its number.
    """
    stop = offset + count
    try:
        sink = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        sink = -1  # none in this chroot, or no descriptor left
    try:
        while offset < stop:
            size = min(stop - offset, STEP)
            try:
                got = os.sendfile(sink, fd, offset, size) if sink >= 0 else _read_away(fd, offset, size)
            except OSError as error:
                if sink < 0 or error.errno not in _NOT_TO_DEVNULL:
                    raise
                got = _read_away(fd, offset, size)
            if got == 0:
                return
            offset += got
            if offset < stop:
                trio.from_thread.check_cancelled()
    finally:
        if sink >= 0:
            os.close(sink)


def _read_away(fd: int, offset: int, size: int) -> int:
    """Read and throw away; at most a buffer full, so that it needs little memory."""
    return len(os.pread(fd, min(size, _BUFFER), offset))


def filesystem_type(fd: int, proc: Path) -> str:
    """The name of the filesystem that an open file lies on; empty if it cannot be found out.

    By the number of the mount, which leads to one line of the list of mounts. The device number would not: those of
    btrfs's subvolumes and some of overlayfs's are in no list. Nor fstatfs(2): it asks the file server, and waits.
    """
    try:
        about = (proc / "fdinfo" / str(fd)).read_bytes()
        mount = about.partition(b"mnt_id:")[2].split(maxsplit=1)[:1]
        with (proc / "mountinfo").open("rb") as lines:
            for line in lines:
                if line.split(b" ", 1)[:1] == mount:
                    return line.partition(b" - ")[2].split(maxsplit=1)[0].decode("ascii", "replace")
    except (OSError, IndexError):
        pass
    return ""


def may_override_owners(proc: Path) -> bool:
    """Whether this process has CAP_FOWNER."""
    try:
        status = (proc / "status").read_bytes()
        return bool(int(status.partition(b"CapEff:")[2].split(maxsplit=1)[0], 16) & _CAP_FOWNER)
    except (OSError, IndexError, ValueError):
        return False


@functools.cache
def mincore() -> Callable[[int, int, int], bool] | None:
    """The question `(fd, offset, count) -> all of it resident?`, or None where the C library has no such calls.

    The mapping is made for one question. Nothing in it is touched, so no page is read for it, and a file that has
    become shorter sends no SIGBUS: pages beyond its end are only said to be missing.
    """
    try:
        # PyDLL keeps the interpreter's lock, which costs more to give and get back than these calls take.
        library = ctypes.PyDLL(None, use_errno=True)
        try:
            map_file = library.mmap64
        except AttributeError:
            map_file = library.mmap
        unmap, ask = library.munmap, library.mincore
    except (OSError, AttributeError, TypeError):
        return None
    map_file.restype = ctypes.c_void_p
    map_file.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
    )  # fmt: skip
    unmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    ask.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    failed = ctypes.c_void_p(-1).value

    def is_resident(fd: int, offset: int, count: int) -> bool:
        address = map_file(None, count, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
        if address == failed:
            raise OSError(ctypes.get_errno(), "mmap")
        pages = -(-count // mmap.PAGESIZE)
        answer = ctypes.create_string_buffer(pages)
        try:
            if ask(address, count, answer) != 0:
                raise OSError(ctypes.get_errno(), "mincore")
        finally:
            unmap(address, count)
        return answer.raw.count(1) == pages

    return is_resident
