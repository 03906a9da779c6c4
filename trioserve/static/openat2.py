"""openat2(2): the system call that opens a path and, while it walks, holds to the limits that it was given.

Called by `confine.py`; Linux 5.6 has it, 5.12 the limit that makes it never wait for a disk. Python has no function for
it, so it goes through `syscall(2)` and ctypes. What is refused comes back as a negative errno, since a missing file is
ordinary and an exception costs more than the call. Both functions may run in any number of threads at once: what they
share is constant, and ctypes keeps an errno per thread.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

# Limits on the walk (linux/openat2.h).
NO_MAGICLINKS = 0x02  # links of procfs that jump to an object rather than to a path
NO_SYMLINKS = 0x04
BENEATH = 0x08  # neither links nor `..` nor an absolute path may leave the directory, not even to come back
CACHED = 0x20  # EAGAIN instead of anything that would have to be read from a disk or waited for

# The number on every architecture but alpha and MIPS, where it belongs to no call and openat2 counts as missing.
_NUMBER = 437

# How often a walk that a signal or a rename has disturbed is started again.
_ATTEMPTS = 16

# Opaque here: a pointer to a `struct open_how`, ready to be passed.
How = Any
Syscall = Callable[[Any, int, bytes, How, Any], int]


@dataclass(frozen=True, slots=True)
class Support:
    """What the kernel can do: `works` the call at all, `cached` also without ever waiting."""

    works: bool
    cached: bool


class Openat2:
    """The call, bound once for the process; see `load`."""

    def __init__(self) -> None:
        """Raises ImportError, OSError or AttributeError where there is no ctypes or no C library to be found."""
        # Here, since a Python may be built without it, and only Linux needs it.
        import ctypes

        class OpenHow(ctypes.Structure):
            _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))

        self._ctypes = ctypes
        self._struct = OpenHow
        self._number = ctypes.c_long(_NUMBER)
        self._size = ctypes.c_size_t(ctypes.sizeof(OpenHow))
        # Two handles of one function. Arguments are converted beforehand and no `argtypes` are set: that is 0.6 of
        # 2.1 us. The second handle keeps the interpreter lock: its call waits for nothing, and to get the lock back
        # from a busy thread can take 5 ms.
        self._call: Syscall = self._bind(ctypes.CDLL)
        self._call_with_lock: Syscall = self._bind(ctypes.PyDLL)

    def _bind(self, library: Any) -> Any:
        function = library(None, use_errno=True)["syscall"]
        function.restype = self._ctypes.c_long
        return function

    def how(self, flags: int, resolve: int) -> How:
        """The argument that tells the flags and limits; constant, so that all threads may share it."""
        return self._ctypes.byref(self._struct(flags, 0, resolve))

    def open(self, directory: int, path: bytes, how: How) -> int:
        """The descriptor, or a negative errno. May wait for the disk: for threads.

        `path` must hold no NUL: the kernel would stop reading there. -EAGAIN, after some attempts: somewhere in the
        system things are renamed all the time, so that the kernel cannot vouch for a `..` (or the file has a lease).
        """
        number = 0
        for _ in range(_ATTEMPTS):
            result = self._call(self._number, directory, path, how, self._size)
            if result >= 0:
                return result
            number = self._ctypes.get_errno()
            if number not in {errno.EAGAIN, errno.EINTR}:
                break
        return -number

    def open_cached(self, directory: int, path: bytes, how: How) -> int:
        """The same for a `how` with `CACHED`: -EAGAIN where the answer is not in memory. For the event loop.

        A link whose time of access is due counts as not in memory too. Only the walk is held to memory: the file
        system's own open of what was found may still ask a server (NFS, FUSE), so files of such file systems belong
        into a thread.
        """
        result = self._call_with_lock(self._number, directory, path, how, self._size)
        return result if result >= 0 else -self._ctypes.get_errno()


def find_support(call: Openat2) -> Support:
    """Ask the kernel (and whatever filters its calls, as containers do) by opening the root directory."""
    flags = getattr(os, "O_PATH", 0) | os.O_DIRECTORY | os.O_CLOEXEC
    answers = []
    for resolve in (NO_MAGICLINKS, NO_MAGICLINKS | CACHED):
        answer = call.open(-1, b"/", call.how(flags, resolve))
        if answer >= 0:
            os.close(answer)
        answers.append(answer)
    works = answers[0] >= 0
    # EINVAL: a limit that the kernel does not know. EAGAIN: it does.
    return Support(works, cached=works and (answers[1] >= 0 or answers[1] == -errno.EAGAIN))


@lru_cache(maxsize=1)
def load() -> tuple[Openat2 | None, Support]:
    """The call and what it can do; asked once for the process. None where it does not work."""
    if not sys.platform.startswith("linux"):
        return None, Support(works=False, cached=False)
    try:
        call = Openat2()
    except (ImportError, OSError, AttributeError):
        return None, Support(works=False, cached=False)
    support = find_support(call)
    return (call if support.works else None), support
