"""The readiness hub: tells tasks when a descriptor can be read or written, and that a peer has gone.

The worker makes one hub and runs it as a task; every socket it serves is `watch()`ed once, at accept, and from
then on waiting costs no system call of its own (`epoll_hub.py`, on Linux), or goes through trio (`portable_hub.py`).
"""

from __future__ import annotations

import select
import socket
from typing import ClassVar, Literal, Protocol

from trioserve.net.epoll_hub import EpollHub
from trioserve.net.portable_hub import PortableHub
from trioserve.net.watch import Watch


class Hub(Protocol):
    """What the worker, the listener and the connections ask of a hub."""

    #: its watches call `on_writable`, so that bytes can be written while no task waits for that
    calls_on_writable: ClassVar[bool]

    def watch(self, sock: socket.socket) -> Watch:
        """Begin watching a non-blocking socket."""
        ...

    async def run(self) -> None:
        """Dispatch readiness until cancelled."""
        ...

    def close(self) -> None:
        """Release the hub's own descriptor, after `run` has ended."""
        ...


def open_hub(kind: Literal["auto", "epoll", "portable"] = "auto") -> Hub:
    """Make the hub that `kind` asks for; `auto` takes epoll where the system has it.

    Raises:
        RuntimeError: `epoll` was asked for where there is none.
    """
    if kind == "portable" or (kind == "auto" and not hasattr(select, "epoll")):
        return PortableHub()
    if not hasattr(select, "epoll"):
        raise RuntimeError('hub = "epoll" needs Linux; use "auto" or "portable" here')
    return EpollHub()
