"""Reaping orphans where they are ours: as process number 1, as in a container, or as a child subreaper (prctl(2)).

`supervisor.py` starts `reap_orphans` then; nobody else would reap them (wait(2), "NOTES"). It is a subreaper where it
preloads, so that workers are its children whoever has forked them. Our own children are left to who waits for them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import trio

# <linux/prctl.h>
_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """From now on descendants whose parent ends become our children.

    Raises:
        OSError: the kernel, or a sandbox, does not allow it.
    """
    import ctypes  # only who preloads needs it

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, *map(ctypes.c_ulong, (1, 0, 0, 0))) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(number)}")


async def reap_orphans(is_ours: Callable[[int], bool]) -> None:
    """Read the exit status of each process that was left to us, for ever."""
    with trio.open_signal_receiver(signal.SIGCHLD) as signals:
        reap_ended(is_ours)
        async for _ in signals:
            reap_ended(is_ours)


def reap_ended(is_ours: Callable[[int], bool]) -> list[int]:
    """Reap what has ended and is not ours; returns the process ids.

    The kernel shows one ended child at a time, and shows ours again until it is reaped by who waits for it; so the
    children are gone through by number.
    """
    reaped = []
    for pid in _children():
        if not is_ours(pid):
            try:
                found, _ = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                continue
            if found:
                reaped.append(pid)
    return reaped


def _children() -> list[int]:
    """The processes whose parent we are (proc(5))."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):
                found += map(int, (task / "children").read_text(encoding="ascii").split())
    return found
