"""The hub of Linux: all descriptors in one edge-triggered epoll with `EPOLLRDHUP` (epoll(7)).

That epoll is itself the only descriptor trio waits for. A ready descriptor wakes its task through
`trio.lowlevel.reschedule`; where what a task waits for can be done without it (`wait_writable(push)`,
`wait_readable(pull=...)`), the hub does it in its place. Where it has woken several tasks it sends their responses
together (`outbox.py`).
Cancelling a wait leaves the descriptor watched and the hub consistent; cancelling `run()` stops all wake-ups.
"""

from __future__ import annotations

import select
import socket
import time
import types
from collections.abc import Awaitable, Callable, Generator
from contextlib import suppress
from typing import Any, ClassVar

import outcome
import trio
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

from trioserve.net.outbox import Outbox
from trioserve.net.watch import WOKEN, Pull, Watch, wait_request

# Enough to gain by doing the same for many, and few enough for all that is read ahead of the tasks to stay in the
# processor's caches: at 512 busy connections a turn of them all costs a quarter more for each request.
_EVENTS_PER_POLL = 64

# How long the hub may read and write in the place of waiting tasks before those run that it has woken (seconds).
_BUSY_SECONDS = 0.002

# From so many requests in a turn on it is worth two turns of trio's loop to send their responses together.
_ENOUGH_TO_POST = 6

if hasattr(select, "epoll"):
    _EPOLLOUT = select.EPOLLOUT
    # What a request's arrival looks like: readable, and writable as ever.
    _DATA = select.EPOLLIN | select.EPOLLOUT
    _RESET = select.EPOLLHUP | select.EPOLLERR
    _HANGUP = select.EPOLLRDHUP | _RESET
    _WRITING = select.EPOLLOUT | _RESET


class EpollWatch(Watch):
    """A descriptor in the edge-triggered epoll of an `EpollHub`."""

    __slots__ = ("_hub", "_push", "_read_request", "pull")

    calls_on_writable = True

    def __init__(self, fd: int, hub: EpollHub) -> None:
        super().__init__(fd)
        self._hub = hub
        self._read_request: Any = None
        self._push: Callable[[], bool] | None = None  # of the task that waits to write
        self.pull: Pull | None = None  # of the reader

    @property
    def outbox(self) -> Outbox:
        return self._hub.outbox

    @types.coroutine
    def wait_readable(self, task: Task | None = None, pull: Pull | None = None) -> Generator[Any, Any, None]:
        if self.reader is not None or self.closed:
            self._check_open(self.reader, "read")
        if not self.readable:
            self.reader = task or current_task()
            self.pull = pull
            request = self._read_request
            if request is None:
                request = self._read_request = wait_request(self._abort_read)
            (yield request).unwrap()  # as `wait_again`, without its frame

    # The other two are plain functions that return an awaitable: one coroutine less to pass through.

    def wait_writable(self, push: Callable[[], bool] | None = None) -> Awaitable[None]:
        self._check_open(self.writer, "write")
        if self.reset:
            return _at_once()
        self.writer = current_task()
        self._push = push
        return wait_task_rescheduled(self._abort_write)  # noqa: ASYNC105 - the caller awaits it

    def wait_hangup(self) -> Awaitable[None]:
        self._check_open(self.hangup_waiter, "learn of the end of")
        if self.hangup:
            return _at_once()
        self.hangup_waiter = current_task()
        return wait_task_rescheduled(self._abort_hangup)  # noqa: ASYNC105 - the caller awaits it

    def _abort_read(self, _raise_cancel: Callable[[], Any]) -> Abort:
        self.reader = self.taken = None
        return Abort.SUCCEEDED

    def _abort_write(self, _raise_cancel: Callable[[], Any]) -> Abort:
        self.writer = self._push = None
        return Abort.SUCCEEDED

    def _abort_hangup(self, _raise_cancel: Callable[[], Any]) -> Abort:
        self.hangup_waiter = None
        return Abort.SUCCEEDED

    def note_rarer(self, mask: int) -> bool:
        """What an event says besides "readable": room to write, FIN, RST. False if that was room, and it is used up."""
        if mask & _HANGUP:
            self.note_hangup(reset=bool(mask & _RESET))
        if mask & _WRITING:
            if self.reads_when_writable:
                self.reads_when_writable = False
                self.readable = True
                if self.reader is None and self.on_readable is not None:
                    self.on_readable()
                self.wake_reader()
            # What `writes_when_readable` asks for comes with every arrival: the descriptor is writable then as well.
            task, push, callback = self.writer, self._push, self.on_writable
            if push is not None and self._hub.has_time() and not push():
                return bool(mask & _HANGUP)
            if self.writer is not task:
                return True  # what it pushed has met the end of the connection
            self.writer = self._push = self.on_writable = None
            if task is not None:
                reschedule(task)
            elif callback is not None:
                callback()
        return True

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._read_request = None
            self._hub.forget(self.fd)
            self.on_hangup = self.on_readable = self.on_writable = self.look_ahead = None
            self._push = self.pull = None
            for name in ("reader", "taken", "writer", "hangup_waiter"):
                task = getattr(self, name)
                if task is not None:
                    setattr(self, name, None)
                    reschedule(
                        task, outcome.Error(trio.ClosedResourceError(f"descriptor {self.fd} was closed"))
                    )


class EpollHub:
    """One edge-triggered epoll for all of a worker's connections (epoll(7)).

    Attributes:
        outbox: what is sent once the tasks have run that this turn has woken.
        on_pulled: called with what the readers' `pull` have returned besides True and False, all of a poll together and
            in the same turn; says how many tasks it has woken that may post. Set by who gives such a `pull`. It must
            not raise.
    """

    calls_on_writable: ClassVar[bool] = EpollWatch.calls_on_writable

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, EpollWatch] = {}
        self._busy_until = 0.0  # the end of this turn's time for reading and writing
        self.outbox = Outbox()
        self._woken = 0  # tasks in this turn that have waited for a request
        self.on_pulled: Callable[[list[Any]], int] = len

    def __repr__(self) -> str:
        return f"<EpollHub watching {len(self._watched)}>"

    def watch(self, sock: socket.socket) -> Watch:
        fd = sock.fileno()
        watch = EpollWatch(fd, self)
        # One epoll_ctl for the connection's whole life. EPOLLOUT costs nothing extra: the kernel reports it only
        # when a write had blocked, or along with an edge that is reported anyway.
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET)
        self._watched[fd] = watch
        return watch

    def forget(self, fd: int) -> None:
        """Stop watching a descriptor that is still open."""
        del self._watched[fd]
        # Closing it would do, were it not for a child that was forked meanwhile: its copy keeps the old connection
        # in the epoll, whose events would then pass for those of the next one with this number (epoll(7), Q6).
        with suppress(OSError):
            self._epoll.unregister(fd)

    def has_time(self) -> bool:
        """Whether this turn may go on reading and writing in the place of tasks; else they are woken for it."""
        return time.monotonic() < self._busy_until

    async def run(self) -> None:
        """Dispatch readiness until cancelled."""
        poll = self._epoll.poll
        epoll_fd = self._epoll.fileno()
        dispatch = self._dispatch
        while True:
            # Waiting through trio each turn keeps the hub fair: one turn of wake-ups, then everyone else runs.
            await trio.lowlevel.wait_readable(epoll_fd)
            self._busy_until = time.monotonic() + _BUSY_SECONDS
            # A peer that reads fast has often made room again meanwhile: a turn of trio's loop costs more than a look.
            self._woken = 0
            while dispatch(poll(0, _EVENTS_PER_POLL)):
                pass
            if self._woken >= _ENOUGH_TO_POST:
                await self._let_post()

    async def _let_post(self) -> None:
        """Have those run who were woken, and send what they post."""
        outbox = self.outbox
        outbox.open()
        try:
            # All of them run in the next turn of trio's loop, before or after this task; it follows in the one after.
            await trio.lowlevel.checkpoint()
            if outbox.posted < self._woken:
                await trio.lowlevel.checkpoint()
        finally:
            outbox.close()

    def _dispatch(self, events: list[tuple[int, int]]) -> bool:
        """Deal with what has come; True if that was room to write, used up already, and nothing else."""
        watched = self._watched
        pulls = self.has_time()  # once for all: what is read of so few takes little of it
        other = not events
        pulled: list[Any] = []
        for fd, mask in events:
            watch = watched.get(fd)
            if watch is None:
                continue
            if mask != _EPOLLOUT:
                other = True
                watch.readable = True
                task, pull = watch.reader, watch.pull
                if task is not None:
                    # A FIN behind the data is the task's to see: only it is told of a hangup before it reads.
                    found = pull() if pull is not None and mask == _DATA and pulls else True
                    if found is True:
                        if watch.reader is task:  # what was pulled may have ended the wait
                            watch.reader = None
                            self._woken += pull is not None  # others have nothing to post
                            reschedule(task, WOKEN)
                    elif found is not False:
                        pulled.append(found)
                elif watch.on_readable is not None:
                    watch.on_readable()
                elif watch.look_ahead is not None:
                    watch.look_ahead()
            if (mask != _DATA or watch.writing) and watch.note_rarer(mask):
                other = True
        if pulled:
            self._woken += self.on_pulled(pulled)
        return not other

    def close(self) -> None:
        for watch in list(self._watched.values()):
            watch.close()
        self._epoll.close()


async def _at_once() -> None:
    """Nothing to wait for."""
