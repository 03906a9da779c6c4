"""What an HTTP/2 connection writes: one writer for all streams, and who of them is next.

`Http2` makes an `Output`; streams put their frames into the engine's `out` and ask for a write, which the worker's
flusher does once for all of them in a pass of the event loop. While the kernel takes nothing, nobody adds body: a
stream that has some left waits here as a `Sender`, and is served when there is room, by its urgency (RFC 9218) and in
turns. So a connection holds a bounded number of bytes that the peer does not read, and one greedy stream does not keep
its siblings from the window that they share. Nothing here waits but `wait_room`; cancelling that loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import trio
from trio.lowlevel import Abort, Task, reschedule, wait_task_rescheduled

from trioserve.http.http2_engine import Http2Engine
from trioserve.net.watch import WOKEN
from trioserve.structure.context import ConnectionContext

# So much body goes into one write; also the most that waits for the kernel, but for the frame that goes over it.
WRITE_SIZE = 64 * 1024

# What a stream may send before the next of the same urgency has its turn. One that is not incremental is to be sent
# whole before its siblings (RFC 9218 section 10), since half of it is of no use; but an endless one is not to starve
# them, and most responses are smaller than this.
_TURN = 256 * 1024
_INCREMENTAL_TURN = 16 * 1024

# A peer that reads as fast as we send gets this much before the other connections have their turn.
_PUMP_SIZE = 1024 * 1024

# Frames that the peer does not read (acknowledgements of what it sends, resets): beyond, nothing more is read from it.
_CHOKED = 256 * 1024


class Sender(Protocol):
    """A stream with body left to send.

    Attributes:
        urgency, incremental: RFC 9218. turn, credit: its place among those of the same urgency, and when it moves.
        unsent: what is left.
    """

    stream_id: int
    urgency: int
    incremental: bool
    turn: int
    credit: int
    unsent: list[memoryview]

    def send_some(self, most: int) -> int:
        """Hand up to `most` bytes to the engine; returns how many."""
        ...

    def all_sent(self) -> None:
        """Nothing is left."""
        ...


class Output:
    """The writer of one connection.

    Attributes:
        asked: the flusher will have us write.
        blocked: the kernel takes nothing at the moment.
        closed: nothing more can be written.
        pending: bytes of body handed to the engine since the last write. sent: all of them.
        senders: the streams that wait for room.
    """

    __slots__ = (
        "_connection", "_continues", "_engine", "_flusher", "_on_change", "_queue", "_spawn", "_transport", "_waiter",
        "asked", "blocked", "closed", "pending", "senders", "sent",
    )  # fmt: skip

    def __init__(
        self, connection: ConnectionContext, engine: Http2Engine, on_change: Callable[[], None]
    ) -> None:
        """`on_change` is called when the kernel takes bytes again, and when the connection turns out to be broken."""
        self._connection = connection
        self._transport = connection.transport
        self._flusher = connection.worker.flusher
        self._engine = engine
        self._on_change = on_change
        self._spawn: Callable[..., None] | None = None
        self._queue: list[bytes | memoryview] = []
        self.asked = False
        self._continues = False
        self._waiter: Task | None = None
        self.blocked = False
        self.closed = False
        self.pending = 0
        self.sent = 0
        self.senders: list[Sender] = []

    def __repr__(self) -> str:
        state = "closed" if self.closed else "blocked" if self.blocked else "open"
        return f"<Output {state} senders={len(self.senders)}>"

    def use_tasks(self, spawn: Callable[..., None]) -> None:
        """Where the hub does not call back: `spawn` starts the task that waits for the kernel."""
        self._spawn = spawn

    @property
    def is_choked(self) -> bool:
        """The peer does not read what we answer to what it sends."""
        return self.blocked and self._engine.out_size + sum(map(len, self._queue)) > _CHOKED

    @property
    def is_empty(self) -> bool:
        """All is with the kernel, or nothing ever will be."""
        return self.closed or not (self._queue or self._engine.out or self.senders)

    # -- writing ---------------------------------------------------------------------------------------------

    def request(self) -> None:
        """Have what is in the engine written soon."""
        if not self.asked:
            if self._flusher is None:
                self.write()
            else:
                self.asked = True
                self._flusher.request(self._write_asked)

    def _write_asked(self) -> None:
        self.asked = False
        if self._engine.out:
            self.write()

    def write(self) -> None:
        """Write what the kernel takes now."""
        engine = self._engine
        out = engine.out
        if out:
            if self.closed:
                out.clear()
                return
            engine.out = []
            if self._queue:
                self._queue += out
            else:
                self._queue = out  # type: ignore[assignment]  # it is ours now
        if self.blocked or not self._queue:
            return
        try:
            blocked = self._transport.send_parts_nowait(self._queue)
        except OSError:
            self.close()
            self._on_change()
            return
        self.pending = 0
        if blocked:
            self._wait_kernel()

    def _wait_kernel(self) -> None:
        self.blocked = True
        self._connection.start_write()
        if self._spawn is None:
            self._transport.watch.on_writable = self._go_on
        else:
            self._spawn(self._wait_writable, name="writer")

    async def _wait_writable(self) -> None:
        try:
            await self._transport.watch.wait_writable()
        except trio.ClosedResourceError:
            return
        self._go_on()

    def _go_on(self) -> None:
        """The kernel takes bytes again."""
        self.blocked = False
        self.write()
        if not self.blocked and not self.closed:
            self.pump()
        if not self.blocked:
            self._wake()
            self._on_change()

    def close(self) -> None:
        """Nothing more is to be written, or can be."""
        self.closed = True
        self.blocked = False
        self._queue = []
        self._engine.out.clear()
        self.senders.clear()
        self._wake()

    # -- whose turn it is ------------------------------------------------------------------------------------

    def add(self, sender: Sender) -> None:
        """A stream has body left; some of it may be sent at once."""
        if sender not in self.senders:
            self.senders.append(sender)
        self.pump()

    def remove(self, sender: Sender) -> None:
        """A stream has nothing more to send, whatever it had left."""
        if sender in self.senders:
            self.senders.remove(sender)

    def note_body(self, size: int) -> None:
        """A stream has given the engine a part of its body."""
        self.pending += size
        self.sent += size
        if self.pending >= WRITE_SIZE:
            self.write()
        elif not self.asked:
            self.request()

    def pump(self) -> None:
        """Have those who wait send, as far as the windows and the kernel allow."""
        left = _PUMP_SIZE
        while self.senders and not self.blocked and not self.closed:
            if left <= 0 and self._flusher is not None:
                if not self._continues:
                    self._continues = True
                    self._flusher.request(self._continue)
                break
            sender, room = self._choose()
            if sender is None:
                break
            sent = sender.send_some(min(room, _INCREMENTAL_TURN))
            sender.credit -= sent
            if sender.credit <= 0:
                sender.turn = 1 + max(other.turn for other in self.senders)
                sender.credit = turn_size(sender.incremental)
            if not sender.unsent:
                self.senders.remove(sender)
                sender.all_sent()
            self.pending += sent
            self.sent += sent
            left -= sent
            if self.pending >= WRITE_SIZE:
                self.write()
        if self._engine.out:
            self.request()

    def _continue(self) -> None:
        self._continues = False
        self.pump()

    def _choose(self) -> tuple[Sender | None, int]:
        """The first in turn of those whose windows are open, and how far."""
        best: Sender | None = None
        open_for = 0
        for sender in self.senders:
            if best is not None and (sender.urgency, sender.turn) >= (best.urgency, best.turn):
                continue
            room = self._engine.room(sender.stream_id)
            if room:
                best, open_for = sender, room
        return best, open_for

    # -- waiting ---------------------------------------------------------------------------------------------

    async def wait_room(self) -> None:
        """Return once the kernel has taken what waits, or the connection is broken; for the connection's own task."""
        while self.blocked:
            self._waiter = trio.lowlevel.current_task()
            await wait_task_rescheduled(self._abort)

    def _abort(self, _raise_cancel: Callable[[], Any]) -> Abort:
        self._waiter = None
        return Abort.SUCCEEDED

    def _wake(self) -> None:
        task = self._waiter
        if task is not None:
            self._waiter = None
            reschedule(task, WOKEN)


def turn_size(incremental: bool) -> int:
    """How much a stream may send in one turn."""
    return _INCREMENTAL_TURN if incremental else _TURN
