"""What is known of one watched descriptor, and who waits for more.

A hub (`hub.py`) makes a `Watch` for each socket; `transport.py` and the protocols wait through it. Waiting is safe to
cancel, and one task at a time may wait for each kind of readiness.

Edges are reported once. The rules that keep them from being lost: `readable` starts True, is set by every edge, and is
cleared only by a reader that has seen the socket empty (EAGAIN, or a read shorter than it asked for: epoll(7)) while
no FIN is pending, since a FIN that came together with data gives no edge of its own.
"""

from __future__ import annotations

import types
from collections.abc import Awaitable, Callable, Generator
from typing import Any, ClassVar

import outcome
import trio
from trio.lowlevel import Abort, Task, reschedule, wait_task_rescheduled

from trioserve.net.outbox import NO_OUTBOX, Outbox

#: what `wait_readable` may be given
Pull = Callable[[], Any]


class _Woken(outcome.Outcome[None]):
    """The result of every wait: nothing. One for all, where `outcome.Value(None)` would be made for each."""

    def unwrap(self) -> None:
        return None

    def send(self, gen: Any) -> Any:
        return gen.send(None)

    async def asend(self, agen: Any) -> Any:
        return await agen.asend(None)


WOKEN = _Woken()


def wait_request(abort: Callable[..., Abort]) -> Any:
    """What `wait_task_rescheduled(abort)` yields to trio's loop, to be yielded again and again: see `wait_again`."""
    wait = wait_task_rescheduled(abort)  # noqa: ASYNC105 - stopped where it waits
    try:
        return wait.send(None)
    finally:
        wait.close()


@types.coroutine
def wait_again(request: Any) -> Generator[Any, Any, None]:
    """Wait as `wait_task_rescheduled(abort)` does, with what `wait_request(abort)` has returned.

    For what waits again and again: one frame and no new object, where trio's function takes two, and three objects.
    """
    (yield request).unwrap()


class Watch:
    """One watched descriptor: what is known of its readiness, and who waits for more.

    Attributes:
        fd: the descriptor.
        readable: reading may yield something (data, FIN or an error); False only after it was seen empty.
        hangup: the peer has sent its FIN, or the connection is reset; nothing arrives after what is buffered.
        reset: both directions are dead (RST, or both sides shut down): writing is pointless.
        taken: the task that waits to read, while somebody else does in its place what it waits for: no event ends its
            wait, only who has put it here from `reader`, its cancellation, and `close`.
        on_hangup: called when `hangup` or `reset` turns True: by the hub, or by whoever meets it first while reading
            or writing. It must not raise.
        on_readable: called from the hub's task when something has arrived and no task waits to read: for a protocol
            whose peer must be heard while the app is elsewhere. It must not raise. Only where `calls_on_writable` is
            True.
        writing: somebody waits for room to write.
        look_ahead: where the descriptor does not show by itself what has come (TLS): looks, and notes a hangup; True if
            nothing is there yet. Called when something has arrived and nobody waits to read. It must not raise.
        reads_when_writable, writes_when_readable: what one direction waits for is in the other's way (TLS): the next
            wait of this kind, and only that, ends with the other kind of readiness.
    """

    __slots__ = (
        "_on_writable", "_writer", "closed", "fd", "hangup", "hangup_waiter", "look_ahead", "on_hangup", "on_readable",
        "readable", "reader", "reads_when_writable", "reset", "taken", "writes_when_readable", "writing",
    )  # fmt: skip

    calls_on_writable: ClassVar[bool] = False

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.readable = True
        self.hangup = False
        self.reset = False
        self.closed = False
        self.reader: Task | None = None
        self.taken: Task | None = None
        self.writing = False
        self._writer: Task | None = None
        self.hangup_waiter: Task | None = None
        self.on_hangup: Callable[[], None] | None = None
        self.on_readable: Callable[[], None] | None = None
        self._on_writable: Callable[[], None] | None = None
        self.look_ahead: Callable[[], bool] | None = None
        self.reads_when_writable = False
        self.writes_when_readable = False

    @property
    def outbox(self) -> Outbox:
        """The hub's."""
        return NO_OUTBOX

    @property
    def writer(self) -> Task | None:
        """The task that waits to write."""
        return self._writer

    @writer.setter
    def writer(self, task: Task | None) -> None:
        self._writer = task
        self.writing = task is not None or self._on_writable is not None

    @property
    def on_writable(self) -> Callable[[], None] | None:
        """Called once, from the hub's task, when a write that had blocked may go on, if no task waits for that.

        It must not raise. Only where `calls_on_writable` is True.
        """
        return self._on_writable

    @on_writable.setter
    def on_writable(self, callback: Callable[[], None] | None) -> None:
        self._on_writable = callback
        self.writing = callback is not None or self._writer is not None

    def __repr__(self) -> str:
        state = "closed" if self.closed else "reset" if self.reset else "hangup" if self.hangup else "open"
        waits = [name for name in ("reader", "writer", "hangup_waiter") if getattr(self, name) is not None]
        return f"<{type(self).__name__} fd={self.fd} {state}{' awaited by ' + ', '.join(waits) if waits else ''}>"

    def wait_readable(self, task: Task | None = None, pull: Pull | None = None) -> Awaitable[None]:
        """Return once a read may yield something; at once if it may now.

        `task` is the calling task, if the caller happens to know it: that saves looking it up. `pull` reads by itself
        whenever something has come, and returns False if that was all there was to do: then the wait goes on; True if
        it is over; or anything else to be gone on with, together with what others have read (`EpollHub.on_pulled`):
        then the wait goes on, too. It may be called from the hub's task, or not at all, and must not raise.

        Raises:
            trio.ClosedResourceError: the watch was closed, before or during the wait.
            trio.BusyResourceError: another task is already waiting to read.
        """
        raise NotImplementedError

    def wait_writable(self, push: Callable[[], bool] | None = None) -> Awaitable[None]:
        """Return once a write that would have blocked may go on. Raises as `wait_readable` does.

        `push` writes on by itself whenever there is room, and returns False if the kernel takes no more (EAGAIN); then
        the wait goes on. It may be called from the hub's task, and must not raise.
        """
        raise NotImplementedError

    def wait_hangup(self) -> Awaitable[None]:
        """Return once `hangup` is True, or when `release_hangup_waiter` is called. Raises as `wait_readable` does."""
        raise NotImplementedError

    def wake_reader(self) -> None:
        """Let a task that waits to read go on, whether or not there is anything to read."""
        task = self.reader
        if task is not None:
            self.reader = None
            reschedule(task)

    def release_hangup_waiter(self) -> None:
        """Let the task in `wait_hangup` go on although the peer is still there."""
        task = self.hangup_waiter
        if task is not None:
            self.hangup_waiter = None
            reschedule(task)

    def note_hangup(self, *, reset: bool) -> None:
        """Record a FIN, or (`reset`) the death of both directions, and tell whoever wants to know."""
        if self.hangup and (self.reset or not reset):
            return
        self.hangup = True
        self.reset = self.reset or reset
        self.release_hangup_waiter()
        if self.on_hangup is not None:
            self.on_hangup()

    def close(self) -> None:
        """Stop watching; every waiter gets `ClosedResourceError`. To be called before the descriptor is closed."""
        raise NotImplementedError

    def _check_open(self, waiter: Task | None, what: str) -> None:
        if self.closed:
            raise trio.ClosedResourceError(f"descriptor {self.fd} was closed")
        if waiter is not None:
            raise trio.BusyResourceError(f"another task is already waiting to {what} descriptor {self.fd}")
