"""An upgrade in place: a new supervisor, from what is installed now, takes over the sockets of this one.

`supervisor.py` makes an `Upgrade` on SIGUSR2 and waits for it. The new process finds a `Predecessor` in its
environment, and inherits the listening sockets and a pipe; it writes to the pipe once its workers are ready. If it
ends before, nothing has happened. Either of the two may be of an older version, which leaves out what it does not know.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import trio

from trioserve.errors import BindError
from trioserve.supervisor.child_process import FIRST_INHERITED, ChildProcess, spawn_ourselves
from trioserve.supervisor.restart_policy import describe_status
from trioserve.supervisor.sockets import SocketStore

# What a supervisor finds in its environment that is to take over from another one: JSON, made by `Upgrade`.
_VARIABLE = "TRIOSERVE__UPGRADE"

# What it writes to the pipe, followed by the binds that it does not serve on any more, as JSON.
_READY = b"ready"

# A new supervisor that is not ready by then will not be.
_PATIENCE = 300.0

# What it gets to end by itself then.
_LAST_PATIENCE = 60.0


class Upgrade:
    """The process that is to take over.

    Args:
        store: the sockets that it inherits.
        limits, wanted: the least and the most workers that are configured, and how many there are at the moment.
        environment: the process's own.

    Attributes:
        pid: its number.
        dropped: once it is ready, the binds that it does not serve on.
        over: set when it is ready, or has ended.
    """

    def __init__(
        self, store: SocketStore, limits: tuple[int, int], wanted: int, environment: Mapping[str, str]
    ) -> None:
        descriptors, numbers = store.describe_for_upgrade(FIRST_INHERITED)
        self._ready, theirs = os.pipe()
        try:
            ready = FIRST_INHERITED + len(descriptors)
            orders = {"sockets": numbers, "ready": ready, "workers": [limits, wanted]}
            environment = {**environment, _VARIABLE: json.dumps(orders)}
            pid = spawn_ourselves("trioserve", sys.argv[1:], environment, [*descriptors, theirs])
            self._process = ChildProcess(pid)
        except BaseException:
            os.close(self._ready)
            raise
        finally:
            os.close(theirs)
        self.pid = pid
        self.dropped: list[str] = []
        self.over = trio.Event()
        os.set_blocking(self._ready, False)

    async def wait_ready(self) -> str:
        """Return "" once it is ready, or why it will not be; the latter once it has ended."""
        try:
            with trio.move_on_after(_PATIENCE):
                said = await self._read_all()
                if not said:
                    return await self._describe_end()
                with suppress(ValueError):
                    self.dropped = json.loads(said.removeprefix(_READY))
                return ""
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
            self.over.set()

    def call_off(self) -> None:
        """End it: by the signal that has it drain what it may already serve."""
        self._process.send_signal(signal.SIGTERM)

    async def _read_all(self) -> bytes:
        said = b""
        while True:
            await trio.lowlevel.wait_readable(self._ready)
            part = os.read(self._ready, 65536)
            if not part:
                return said
            said += part

    async def _describe_end(self) -> str:
        status = await self._process.wait()
        return f"the new supervisor ended with {describe_status(status)}; its messages say why"


@dataclass(frozen=True, slots=True)
class Predecessor:
    """The supervisor whose place this process is to take.

    Attributes:
        sockets: what it hands down, by bind.
        limits, wanted: the least and the most workers that are configured there, and how many there are; somebody may
            have changed that by hand.
    """

    sockets: Mapping[str, Sequence[int]]
    limits: tuple[int, int]
    wanted: int
    _ready: int

    def replace(self, dropped: Sequence[str]) -> None:
        """Tell it that we serve, but on what we have dropped: it drains. To be called once."""
        with suppress(OSError):
            os.write(self._ready, _READY + json.dumps(dropped).encode())
        os.close(self._ready)


def take_upgrade(environ: MutableMapping[str, str]) -> Predecessor | None:
    """Who has started this process to be replaced by it, or None; taken from `environ`."""
    text = environ.pop(_VARIABLE, "")
    if not text:
        return None
    try:
        found = json.loads(text)
        ready = int(found["ready"])
        sockets = {
            str(bind): [int(number) for number in numbers] for bind, numbers in found["sockets"].items()
        }
        (low, high), wanted = found.get("workers", ((0, 0), 0))
        os.fstat(ready)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise BindError(
            f"{_VARIABLE} = {text!r:.200} is not what a supervisor hands to its successor ({error}); unset it"
        ) from None
    os.set_inheritable(ready, False)
    return Predecessor(sockets, (low, high), int(wanted), ready)
