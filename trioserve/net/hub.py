"""The readiness hub: tells tasks when a descriptor can be read or written, and that a peer has gone.

The worker makes one hub and runs it as a task; every socket it serves is `watch()`ed once, at accept, and from
then on waiting costs no system call of its own. Two hubs share one interface:

- `EpollHub` (Linux): all descriptors sit in one edge-triggered epoll with `EPOLLRDHUP`; that epoll is itself the
  only descriptor trio waits for. A ready descriptor wakes its task through `trio.lowlevel.reschedule`.
- `PortableHub` (elsewhere): each wait is a `trio.lowlevel.wait_readable`. It has no notice of a peer that leaves
  while nobody reads, so `disconnect_grace` starts there only once the app waits in `receive()`.

Cancelling a wait leaves the descriptor watched and the hub consistent; cancelling `run()` stops all wake-ups.

Edge-triggered means: an edge is reported once. The rules that keep it from being lost are in `Watch`:
`readable` starts True, is set by every edge, and is cleared only by a reader that has seen the socket empty
(EAGAIN, or a read shorter than it asked for: epoll(7)) while no FIN is pending, since a FIN that came together
with data gives no edge of its own.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, ClassVar, Literal, Protocol

import outcome
import trio
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

# Enough for a full turn of a busy worker; more would only lengthen the turn before tasks run.
_EVENTS_PER_POLL = 512

# How long the hub may write in the place of waiting tasks before those run that it has woken (seconds).
_PUSH_SECONDS = 0.002


class Watch:
    """One watched descriptor: what is known of its readiness, and who waits for more.

    Attributes:
        fd: the descriptor.
        readable: reading may yield something (data, FIN or an error); False only after it was seen empty.
        hangup: the peer has sent its FIN, or the connection is reset; nothing arrives after what is buffered.
        reset: both directions are dead (RST, or both sides shut down): writing is pointless.
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
        "readable", "reader", "reads_when_writable", "reset", "writes_when_readable", "writing",
    )  # fmt: skip

    calls_on_writable: ClassVar[bool] = False

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.readable = True
        self.hangup = False
        self.reset = False
        self.closed = False
        self.reader: Task | None = None
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

    def wait_readable(self, task: Task | None = None) -> Awaitable[None]:
        """Return once a read may yield something; at once if it may now.

        `task` is the calling task, if the caller happens to know it: that saves looking it up.

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


# -- epoll ---------------------------------------------------------------------------------------------------


if hasattr(select, "epoll"):
    _EPOLLOUT = select.EPOLLOUT
    # What a request's arrival looks like: readable, and writable as ever.
    _DATA = select.EPOLLIN | select.EPOLLOUT
    _RESET = select.EPOLLHUP | select.EPOLLERR
    _HANGUP = select.EPOLLRDHUP | _RESET
    _WRITING = select.EPOLLOUT | _RESET


class _Woken(outcome.Outcome[None]):
    """The result of every wait: nothing. One for all, where `outcome.Value(None)` would be made for each."""

    def unwrap(self) -> None:
        return None

    def send(self, gen: Any) -> Any:
        return gen.send(None)

    async def asend(self, agen: Any) -> Any:
        return await agen.asend(None)


WOKEN = _Woken()


class EpollWatch(Watch):
    """A descriptor in the edge-triggered epoll of an `EpollHub`."""

    __slots__ = ("_hub", "_push")

    calls_on_writable = True

    def __init__(self, fd: int, hub: EpollHub) -> None:
        super().__init__(fd)
        self._hub = hub
        self._push: Callable[[], bool] | None = None  # of the task that waits to write

    # These are plain functions that return an awaitable: one coroutine less to pass through on each wake-up.

    def wait_readable(self, task: Task | None = None) -> Awaitable[None]:
        if self.reader is not None or self.closed:
            self._check_open(self.reader, "read")
        if self.readable:
            return _at_once()
        self.reader = task or current_task()
        return wait_task_rescheduled(self._abort_read)  # noqa: ASYNC105 - the caller awaits it

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
        self.reader = None
        return Abort.SUCCEEDED

    def _abort_write(self, _raise_cancel: Callable[[], Any]) -> Abort:
        self.writer = self._push = None
        return Abort.SUCCEEDED

    def _abort_hangup(self, _raise_cancel: Callable[[], Any]) -> Abort:
        self.hangup_waiter = None
        return Abort.SUCCEEDED

    def note_rarer(self, mask: int) -> None:
        """What an event says besides "readable": room to write, FIN, RST."""
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
                return
            if self.writer is not task:
                return  # what it pushed has met the end of the connection
            self.writer = self._push = self.on_writable = None
            if task is not None:
                reschedule(task)
            elif callback is not None:
                callback()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._hub.forget(self.fd)
            self.on_hangup = self.on_readable = self.on_writable = self.look_ahead = self._push = None
            for name in ("reader", "writer", "hangup_waiter"):
                task = getattr(self, name)
                if task is not None:
                    setattr(self, name, None)
                    reschedule(
                        task, outcome.Error(trio.ClosedResourceError(f"descriptor {self.fd} was closed"))
                    )


class EpollHub:
    """One edge-triggered epoll for all of a worker's connections (epoll(7))."""

    calls_on_writable: ClassVar[bool] = EpollWatch.calls_on_writable

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, EpollWatch] = {}
        self._push_end = 0.0  # of this turn's time for pushing; 0.0 as long as nobody has asked

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
        """Whether bytes may still be written from the hub's task in this turn; else their tasks are woken for it."""
        now = time.monotonic()
        if not self._push_end:
            self._push_end = now + _PUSH_SECONDS
        return now < self._push_end

    async def run(self) -> None:
        """Dispatch readiness until cancelled."""
        poll = self._epoll.poll
        epoll_fd = self._epoll.fileno()
        dispatch = self._dispatch
        while True:
            # Waiting through trio each turn keeps the hub fair: one turn of wake-ups, then everyone else runs.
            await trio.lowlevel.wait_readable(epoll_fd)
            dispatch(poll(0, _EVENTS_PER_POLL))

    def _dispatch(self, events: list[tuple[int, int]]) -> None:
        watched = self._watched
        self._push_end = 0.0
        for fd, mask in events:
            watch = watched.get(fd)
            if watch is None:
                continue
            if mask != _EPOLLOUT:
                watch.readable = True
                task = watch.reader
                if task is not None:
                    watch.reader = None
                    reschedule(task, WOKEN)
                elif watch.on_readable is not None:
                    watch.on_readable()
                elif watch.look_ahead is not None:
                    watch.look_ahead()
            if mask != _DATA or watch.writing:
                watch.note_rarer(mask)

    def close(self) -> None:
        for watch in list(self._watched.values()):
            watch.close()
        self._epoll.close()


# -- anywhere ------------------------------------------------------------------------------------------------


class PortableWatch(Watch):
    """A descriptor waited for through trio's own I/O manager, one registration a wait."""

    __slots__ = ("_hub", "_scopes", "_sock")

    def __init__(self, sock: socket.socket, hub: PortableHub) -> None:
        super().__init__(sock.fileno())
        self._hub = hub
        self._sock = sock
        self._scopes: dict[str, trio.CancelScope] = {}

    async def wait_readable(self, _task: Task | None = None) -> None:
        self._check_open(self.reader, "read")
        if not self.readable:
            wait = trio.lowlevel.wait_writable if self.reads_when_writable else trio.lowlevel.wait_readable
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
                setattr(self, role, None)
                self._scopes.pop(role, None)
        self._check_open(None, what)
        return not scope.cancelled_caught

    def wake_reader(self) -> None:
        self._release("reader")

    def release_hangup_waiter(self) -> None:
        self._release("hangup_waiter")

    def _release(self, role: str) -> None:
        scope = self._scopes.get(role)
        if scope is not None:
            scope.cancel(reason="woken by its owner")

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._hub.watched.discard(self)
            self.on_hangup = self.look_ahead = None
            trio.lowlevel.notify_closing(self.fd)
            self._release("hangup_waiter")


async def _at_once() -> None:
    """Nothing to wait for."""


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
