"""An upgrade in place: a new supervisor, from what is installed now, takes over the sockets of this one.

`supervisor.py` makes an `Upgrade` on SIGUSR2 and waits for it. The new process inherits the listening sockets and a
pipe; it writes to the pipe once its workers are ready. If it ends before, nothing has happened.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress

import trio

from trioserve.supervisor.restart_policy import describe_status
from trioserve.supervisor.sockets import UPGRADE_VARIABLE, SocketStore
from trioserve.supervisor.worker_process import interpreter_flags, read_status, watch_process

_PARKED = 200
_FIRST = 3

# A new supervisor that is not ready by then will not be.
_PATIENCE = 300.0

# What it gets to end by itself then.
_LAST_PATIENCE = 60.0


class Upgrade:
    """The process that is to take over.

    Attributes:
        pid: its number.
    """

    def __init__(self, store: SocketStore, environment: Mapping[str, str]) -> None:
        descriptors, numbers = store.describe_for_upgrade(_FIRST)
        self._ready, theirs = os.pipe()
        try:
            orders = {"sockets": numbers, "ready": _FIRST + len(descriptors)}
            self.pid = _spawn([*descriptors, theirs], {**environment, UPGRADE_VARIABLE: json.dumps(orders)})
        except BaseException:
            os.close(self._ready)
            raise
        finally:
            os.close(theirs)
        try:
            self._pidfd = watch_process(self.pid)
        except OSError:
            os.close(self._ready)
            raise
        os.set_blocking(self._ready, False)

    async def wait_ready(self) -> str:
        """Return "" once it is ready, or why it will not be; the latter once it has ended."""
        try:
            with trio.move_on_after(_PATIENCE):
                await trio.lowlevel.wait_readable(self._ready)
                if os.read(self._ready, 16):
                    return ""
                return await self._describe_end()
            self.call_off()
            with trio.move_on_after(_LAST_PATIENCE):
                await self._describe_end()
                return f"the new supervisor was not ready within {_PATIENCE:g} s"
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            await self._describe_end()
            return f"the new supervisor was not ready within {_PATIENCE:g} s"
        finally:
            os.close(self._ready)
            os.close(self._pidfd)

    def call_off(self) -> None:
        """End it: by the signal that has it drain what it may already serve."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    async def _describe_end(self) -> str:
        await trio.lowlevel.wait_readable(self._pidfd)
        return f"the new supervisor ended with {describe_status(read_status(self.pid))}; its messages say why"


def _spawn(inherited: list[int], environment: Mapping[str, str]) -> int:
    parked = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _PARKED) for fd in inherited]
    try:
        return os.posix_spawn(
            sys.executable,
            [sys.executable, *interpreter_flags(), "-m", "trioserve", *sys.argv[1:]],
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, _FIRST + index) for index, fd in enumerate(parked)],
            setsigmask=(),
        )
    finally:
        for fd in parked:
            os.close(fd)
