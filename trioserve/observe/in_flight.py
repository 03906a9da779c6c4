"""The requests in flight, in memory that outlives the worker: what it was doing when it died of SIGKILL or SIGSEGV.

The supervisor makes one table for each worker (`create`) and hands it down as a descriptor. The worker maps it
(`attach`) and gives each connection a slot (`take`, `release`). `http/http1.py` writes the path there when a request
begins and wipes it when the request ends: two stores into plain memory for each request, and no system call. When a
request began is written later, with the heartbeat, so that the many that are shorter do not pay for it. When the worker
is gone, the supervisor reads what is left. Nothing here waits.

No header, body or query is ever stored. The supervisor does not trust what it reads: a worker that is about to crash
may have written anything there. It reads with pread(2), since to look into the mapping of a file that somebody has cut
off would end the supervisor, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import re
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

# Connections beyond these are served all the same, but not listed. Only slots that are used take memory.
SLOTS = 4096

# When the request began (time.monotonic; 0: not written yet), its path, cut, and its method: the longest that is
# registered has 17 letters. The path is not empty while there is a request.
_LAYOUT = struct.Struct("=d101s19s")
SLOT_SIZE = _LAYOUT.size
PATH_SIZE = 101
_METHOD_SIZE = 19
SIZE = SLOTS * SLOT_SIZE

# Wipes a slot: the time, and the first byte of the path right behind it.
NO_REQUEST = bytes(9)

# RFC 9110 section 5.6.2: token.
_METHOD = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
# A path in origin-form consists of these, less "?" and "#"; everything else is shown as U+FFFD.
_NOT_IN_PATH = re.compile(r"[^!-~]")

_PathCell = ctypes.c_char * PATH_SIZE
_WholeCell = ctypes.c_char * SLOT_SIZE


@dataclass(frozen=True, slots=True)
class InFlight:
    """A request that had begun and not ended.

    Attributes:
        method: as the client wrote it, cut.
        path: without the query; ends in "..." if it was cut.
        started: by `time.monotonic`, which is one clock for all processes; None: not before the last heartbeat.
    """

    method: str
    path: str
    started: float | None


class Slot:
    """The place of one connection in the worker's table.

    Attributes:
        method: that was written last; `write_method` if it is to be another one.
        path, whole: memory whose `value` is to be set by who writes a line for each request: `path.value = raw_path`
            (a `ValueError` if it has more than `PATH_SIZE` bytes), in the end `whole.value = NO_REQUEST`. ctypes does
            that in one step, where each call of a method here would cost as much as both stores.
    """

    __slots__ = ("_at", "_memory", "method", "path", "whole")

    def __init__(self, memory: mmap.mmap, at: int) -> None:
        self._memory = memory
        self._at = at
        self.method = ""
        self.path = _PathCell.from_buffer(memory, at + 8)
        self.whole = _WholeCell.from_buffer(memory, at)

    def write_method(self, method: str) -> None:
        """Note the method of this request and of all that follow, until it is another."""
        self.method = method
        end = self._at + SLOT_SIZE
        cut = method.encode("latin-1", "replace")[:_METHOD_SIZE]
        self._memory[end - _METHOD_SIZE : end] = cut.ljust(_METHOD_SIZE, b"\0")

    def write_time(self, started: float) -> None:
        """Note when the request began, by time.monotonic."""
        struct.pack_into("=d", self._memory, self._at, started)

    def clear(self) -> None:
        """The request is over."""
        self.whole.value = NO_REQUEST


class InFlightTable:
    """The table, at either end.

    Attributes:
        fd: the shared memory, to be passed to the worker; -1 in the worker. To close it, close the table.
    """

    __slots__ = ("_free", "_memory", "_taken", "_unused", "fd")

    def __init__(self, fd: int, memory: mmap.mmap | None) -> None:
        self.fd = fd
        self._memory = memory
        self._free: list[Slot] = []
        self._unused = 0  # where the slots begin that nobody has had yet
        self._taken = 0

    def __repr__(self) -> str:
        if self._memory is None:
            return f"<InFlightTable fd={self.fd}>"
        return f"<InFlightTable attached, {self._taken} of {SLOTS} slots taken>"

    @classmethod
    def create(cls) -> Self:
        """In the supervisor: an empty table, in nobody's file system.

        Raises:
            OSError: no memory, no descriptor, or no place for a temporary file is to be had.
        """
        return cls(_create_memory(), None)

    @classmethod
    def attach(cls, fd: int) -> Self:
        """In the worker: map the table behind an inherited descriptor, which the caller may then close.

        Raises:
            OSError, ValueError: there is no table behind it.
        """
        return cls(-1, mmap.mmap(fd, SIZE))

    def close(self) -> None:
        """Give back the descriptor and the memory; in a worker, this comes after the last connection."""
        self._free.clear()
        if self._memory is not None:
            memory, self._memory = self._memory, None
            with contextlib.suppress(BufferError):  # a slot is out: what it holds goes with it
                memory.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # -- in the worker ---------------------------------------------------------------------------------------

    @property
    def taken(self) -> int:
        """How many connections have a slot."""
        return self._taken

    def take(self) -> Slot | None:
        """A slot for a connection, or None if there are too many connections."""
        if self._free:
            slot = self._free.pop()
        elif self._unused < SIZE and self._memory is not None:
            slot = Slot(self._memory, self._unused)
            self._unused += SLOT_SIZE
        else:
            return None
        self._taken += 1
        return slot

    def release(self, slot: Slot) -> None:
        """Give a slot back; the next connection gets it first, so that few pages are ever touched."""
        slot.clear()
        self._taken -= 1
        if self._memory is not None:
            self._free.append(slot)

    # -- in the supervisor -----------------------------------------------------------------------------------

    def read(self, now: float | None = None) -> list[InFlight]:
        """What is in flight, the oldest first; what cannot be a request is left out.

        Args:
            now: by time.monotonic; asked for if not given.
        """
        if now is None:
            now = time.monotonic()
        data = os.pread(self.fd, SIZE, 0)
        found = []
        for at in range(0, len(data) - SLOT_SIZE + 1, SLOT_SIZE):
            if data[at + 8]:
                request = _read_slot(data, at, now)
                if request is not None:
                    found.append(request)
        found.sort(key=lambda request: now if request.started is None else request.started)
        return found


def _read_slot(data: bytes, at: int, now: float) -> InFlight | None:
    started, path, method = _LAYOUT.unpack_from(data, at)
    name = method.partition(b"\0")[0].decode("latin-1")
    text = path.partition(b"\0")[0].decode("latin-1")
    if not _METHOD.fullmatch(name) or not (text == "*" or text.startswith("/")):
        return None
    shown = _NOT_IN_PATH.sub("\ufffd", text.partition("?")[0].partition("#")[0])
    if len(shown) == PATH_SIZE:
        shown += "..."
    # The two clocks are compared within some microseconds. A NaN is in no range.
    return InFlight(name, shown, min(started, now) if 0 < started <= now + 1 else None)


def _create_memory() -> int:
    if hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):  # a kernel or a sandbox that does not know it
            fd = os.memfd_create("trioserve-in-flight", os.MFD_CLOEXEC)
            with _closed_on_failure(fd):
                os.ftruncate(fd, SIZE)
            return fd
    fd, name = tempfile.mkstemp(prefix="trioserve-in-flight-")
    with _closed_on_failure(fd):
        Path(name).unlink()
        # Written and not only sized: a full disk is to be noticed here, and not as SIGBUS in the worker.
        if os.pwrite(fd, bytes(SIZE), 0) < SIZE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    return fd


@contextlib.contextmanager
def _closed_on_failure(fd: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(fd)
        raise
