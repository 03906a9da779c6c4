"""An upgrade in place: a new supervisor, from what is installed now, takes over the sockets of this one.

`supervisor.py` makes an `Upgrade` on SIGUSR2 and waits for it. The new process inherits the listening sockets and a
pipe; it writes to the pipe once its workers are ready. If it ends before, nothing has happened.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping

import trio

from trioserve.supervisor.child_process import FIRST_INHERITED, ChildProcess, spawn_ourselves
from trioserve.supervisor.restart_policy import describe_status
from trioserve.supervisor.sockets import UPGRADE_VARIABLE, SocketStore

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
        descriptors, numbers = store.describe_for_upgrade(FIRST_INHERITED)
        self._ready, theirs = os.pipe()
        try:
            orders = json.dumps({"sockets": numbers, "ready": FIRST_INHERITED + len(descriptors)})
            environment = {**environment, UPGRADE_VARIABLE: orders}
            pid = spawn_ourselves("trioserve", sys.argv[1:], environment, [*descriptors, theirs])
            self._process = ChildProcess(pid)
        except BaseException:
            os.close(self._ready)
            raise
        finally:
            os.close(theirs)
        self.pid = pid
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
            self._process.send_signal(signal.SIGKILL)
            await self._describe_end()
            return f"the new supervisor was not ready within {_PATIENCE:g} s"
        finally:
            os.close(self._ready)
            self._process.close()

    def call_off(self) -> None:
        """End it: by the signal that has it drain what it may already serve."""
        self._process.send_signal(signal.SIGTERM)

    async def _describe_end(self) -> str:
        status = await self._process.wait()
        return f"the new supervisor ended with {describe_status(status)}; its messages say why"
