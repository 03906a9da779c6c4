"""The hub of systems without epoll: each wait is a `trio.lowlevel.wait_readable` or `wait_writable`.

It has no notice of a peer that leaves while nobody reads, so `disconnect_grace` starts there only once the app waits in
`receive()`. Cancelling a wait leaves the descriptor watched.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import ClassVar

import trio
from trio.lowlevel import Task

from trioserve.net.watch import Pull, Watch


class PortableWatch(Watch):
    """A descriptor waited for through trio's own I/O manager, one registration a wait."""

    __slots__ = ("_hub", "_scopes", "_sock")

    def __init__(self, sock: socket.socket, hub: PortableHub) -> None:
        super().__init__(sock.fileno())
        self._hub = hub
        self._sock = sock
        self._scopes: dict[str, trio.CancelScope] = {}

    async def wait_readable(self, _task: Task | None = None, _pull: Pull | None = None) -> None:
        self._check_open(self.reader, "read")
        if not self.readable:
            # For room there may be a task waiting already, and trio lets only one.
            wait = _wait_a_moment if self.reads_when_writable else trio.lowlevel.wait_readable
            self.reads_when_writable = False
            await self._wait("reader", wait, "read")
            self.readable = True

    async def wait_writable(self, push: Callable[[], bool] | None = None) -> None:
        self._check_open(self.writer, "write")
        # For what has come there may be a task waiting already, and trio lets only one.
        wait = _wait_a_moment if self.writes_when_readable else trio.lowlevel.wait_writable
        self.writes_when_readable = False
        while True:
            await self._wait("writer", wait, "write")
            if push is None or push():
                return

    async def wait_hangup(self) -> None:
        self._check_open(self.hangup_waiter, "learn of the end of")
        while True:
            is_empty = self._peek_nothing()
            if self.hangup:
                return
            # Unread data hides the FIN behind it; then only the end of the exchange ends this wait.
            wait: Callable[[int], Awaitable[None]] = (
                trio.lowlevel.wait_readable if is_empty else _wait_for_ever
            )
            if self.reads_when_writable:
                wait = _wait_a_moment  # what has come may not be read yet
            if not await self._wait("hangup_waiter", wait, "learn of the end of"):
                return

    def _peek_nothing(self) -> bool:
        """Look at the socket without reading: True if nothing is there yet; notes FIN and RST."""
        if self.look_ahead is not None:
            return self.look_ahead()
        try:
            # Not the method of a socket that is wrapped for TLS, which knows no flags.
            if socket.socket.recv(self._sock, 1, socket.MSG_PEEK) == b"":
                self.note_hangup(reset=False)
        except BlockingIOError:
            return True
        except OSError:
            self.note_hangup(reset=True)
        return False

    async def _wait(self, role: str, wait: Callable[[int], Awaitable[None]], what: str) -> bool:
        """Wait in a scope that `wake_reader`, `release_hangup_waiter` and `close` can cancel; True if ready."""
        setattr(self, role, trio.lowlevel.current_task())
        with trio.CancelScope() as scope:
            self._scopes[role] = scope
            try:
                await wait(self.fd)
            except trio.ClosedResourceError:
                self.closed = True
            finally:
                if self._scopes.get(role) is scope:
                    setattr(self, role, None)
                    del self._scopes[role]
        self._check_open(None, what)
        return not scope.cancelled_caught

    def wake_reader(self) -> None:
        self._release("reader")

    def release_hangup_waiter(self) -> None:
        self._release("hangup_waiter")

    def _release(self, role: str) -> None:
        scope = self._scopes.pop(role, None)
        if scope is not None:
            setattr(self, role, None)  # at once: another task may wait before this one has had its turn
            scope.cancel(reason="woken by its owner")

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._hub.watched.discard(self)
            self.on_hangup = self.look_ahead = None
            trio.lowlevel.notify_closing(self.fd)
            self._release("hangup_waiter")


async def _wait_a_moment(_fd: int) -> None:
    await trio.sleep(0.01)


async def _wait_for_ever(_fd: int) -> None:
    await trio.sleep_forever()


class PortableHub:
    """Readiness through trio's own I/O manager, for systems without epoll."""

    calls_on_writable: ClassVar[bool] = PortableWatch.calls_on_writable

    def __init__(self) -> None:
        self.watched: set[PortableWatch] = set()

    def __repr__(self) -> str:
        return f"<PortableHub watching {len(self.watched)}>"

    def watch(self, sock: socket.socket) -> Watch:
        watch = PortableWatch(sock, self)
        self.watched.add(watch)
        return watch

    async def run(self) -> None:
        await trio.sleep_forever()

    def close(self) -> None:
        for watch in list(self.watched):
            watch.close()
