"""The bytes of one HTTP/2 stream, both ways: what has arrived for the app, and what is left to send.

The base of `Http2Exchange`, and what a WebSocket session on a stream reads and writes (`http2_byte_stream.py`).
`Http2` tells it what the engine has received; `Output` has it send when it is its turn. Both ways are bounded: the
peer may send one window ahead of the app, and who sends waits until all of it is with the engine. Cancelling a wait
loses nothing: what has arrived stays, and what was to be sent is sent in the background.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

from trioserve.http.http2_codes import code_name
from trioserve.http.http2_engine import Fields, Http2Engine
from trioserve.http.http2_output import WRITE_SIZE, Output, turn_size
from trioserve.net.watch import WOKEN
from trioserve.structure.context import StreamContext

# Parts that are smaller together are kept as one: an object for each frame of two bytes would cost twenty times what
# the windows allow for them.
_JOINED = 1024


class Wire:
    """What an exchange asks of its transport, for a stream.

    Attributes:
        broken: why nothing can be sent any more, or None.
    """

    __slots__ = ("broken",)

    def __init__(self, broken: OSError | None = None) -> None:
        self.broken = broken


# All streams that are alive share one: most never have another.
_SOUND = Wire()


class StreamPipe:
    """One stream's two directions.

    Attributes:
        stream: whose bytes these are.
        transport: a `Wire`, broken once the stream is reset or its connection gone.
        received: parts of the body that have arrived and were not taken. received_bytes: of all that have.
        ended: the peer has sent all of it.
        unsent: what the engine has not been given yet. urgency, incremental, turn, credit: see `Sender`.
        on_received: called when something has arrived, or the peer is gone, and no task waits for that.
    """

    stream: StreamContext
    engine: Http2Engine
    output: Output
    stream_id: int
    transport: Any = _SOUND  # a `Transport` to who is not a stream
    received: list[bytes]
    received_bytes = 0
    ended = False
    unsent: list[memoryview]
    urgency = 3
    incremental = False
    turn = 0
    credit = 0
    on_received: Callable[[], None] | None = None
    _flow = 0  # of `received`, to be given back
    _ends = False  # the stream ends with `unsent`
    _last_fields: Fields | None = None  # trailers behind it
    _reader: Task | None = None
    _writers: tuple[Task, ...] = ()

    @property
    def said_all(self) -> bool:
        """END_STREAM is with the engine."""
        return self._ends and not self.unsent

    def fits(self, size: int) -> bool:
        """So much can go to the engine at once: it is nobody else's turn, and the kernel and the windows have room."""
        output = self.output
        return (
            size <= WRITE_SIZE
            and not output.senders
            and not output.blocked
            and self.engine.room(self.stream_id) >= size
        )

    @property
    def is_waited_for(self) -> bool:
        """A task waits for something to arrive, or to be sent."""
        return self._reader is not None or bool(self._writers)

    def note_answered(self) -> None:
        """The stream was ended in the app's stead."""
        self._ends = True

    # -- what has arrived ------------------------------------------------------------------------------------

    def data_received(self, data: bytes, flow_size: int) -> None:
        """By the engine: a part of the body."""
        parts = self.received
        if parts and len(parts[-1]) + len(data) <= _JOINED:
            parts[-1] += data
        else:
            parts.append(data)
        self.received_bytes += len(data)
        self._flow += flow_size
        self._note_arrival()

    def request_ended(self) -> None:
        """By the engine: that was all of it."""
        self.ended = True
        self._note_arrival()

    def lose(self, error: OSError) -> None:
        """The stream is reset, or the connection is gone: nobody need wait any longer."""
        if self.transport is _SOUND:
            self.transport = Wire(error)
        stream = self.stream
        stream.reset = True
        self.drop()
        self._note_arrival()
        stream.peer_gone()

    def drop(self) -> None:
        """Forget what has arrived and what was to be sent; whoever waits for it goes on."""
        if self.unsent:
            self.unsent = []
            self._ends = False  # END_STREAM stood behind that
            self.output.remove(self)
        self.forget_received()
        self.wake_reader()
        if self._writers:
            self.all_sent()

    def take(self) -> bytes:
        """What has arrived, off the peer's window."""
        parts = self.received
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self.received = []
        self._give_back()
        return data

    def forget_received(self) -> None:
        """Nobody will take what has arrived: its room in the connection's window is the others'."""
        if self.received:
            self.received = []
            self._give_back()

    def _give_back(self) -> None:
        flow, self._flow = self._flow, 0
        engine = self.engine
        engine.acknowledge(self.stream_id, flow)
        if engine.out:
            self.output.request()

    async def wait_received(self) -> None:
        """Return when something has arrived, or when somebody calls `wake_reader`."""
        self._reader = current_task()
        await wait_task_rescheduled(self._abort_read)

    def _abort_read(self, _raise_cancel: Callable[[], Any]) -> Abort:
        self._reader = None
        return Abort.SUCCEEDED

    def wake_reader(self) -> None:
        """Let the task in `wait_received` go on."""
        task = self._reader
        if task is not None:
            self._reader = None
            reschedule(task, WOKEN)

    def _note_arrival(self) -> None:
        if self._reader is not None:
            self.wake_reader()
        elif self.on_received is not None:
            self.on_received()

    # -- what is to be sent ----------------------------------------------------------------------------------

    def put(self, data: bytes | memoryview, end: bool) -> bool:
        """Send a part of the body after what is left; True if something is left now: wait with `wait_sent`.

        Raises:
            OSError: the stream is reset, or the connection gone.
        """
        output = self.output
        size = len(data)
        if not self.unsent:
            engine = self.engine
            if not size:
                if end:
                    self._ends = True
                    engine.send_data(self.stream_id, b"", True)
                    output.note_body(0)
                return False
            if self.fits(size):
                engine.send_data(self.stream_id, data, end)
                self.stream.bytes_taken += size
                output.note_body(size)
                return False
        if self.transport.broken is not None:
            raise self.transport.broken
        if size:
            self.unsent.append(memoryview(data))
        self._ends = self._ends or end
        if not self.turn:
            self.turn = self.stream_id
            self.credit = turn_size(self.incremental)
        output.add(self)
        return bool(self.unsent)

    def put_trailers(self, fields: Fields) -> bool:
        """End the response with these, after what is left; as `put`."""
        if self.unsent:
            self._last_fields = fields
            return True
        self.engine.send_trailers(self.stream_id, fields)
        self.output.request()
        return False

    def send_some(self, most: int) -> int:
        """By the output: it is this stream's turn."""
        part = self.unsent[0]
        size = len(part)
        if size > most:
            self.unsent[0] = part[most:]
            self.engine.send_data(self.stream_id, part[:most], False)
            size = most
        else:
            del self.unsent[0]
            last = not self.unsent
            self.engine.send_data(self.stream_id, part, last and self._ends)
            if last and self._last_fields is not None:
                self.engine.send_trailers(self.stream_id, self._last_fields)
        self.stream.bytes_taken += size
        return size

    def all_sent(self) -> None:
        """By the output: nothing is left."""
        writers, self._writers = self._writers, ()
        for task in writers:
            reschedule(task, WOKEN)

    async def wait_sent(self) -> None:
        """Return once the engine has all of it; phases are the caller's business.

        Raises:
            OSError: the stream is reset, or the connection gone.
        """
        while self.unsent:
            task = current_task()
            self._writers += (task,)

            def abort(_raise_cancel: Callable[[], Any], task: Task = task) -> Abort:
                self._writers = tuple(other for other in self._writers if other is not task)
                return Abort.SUCCEEDED

            await wait_task_rescheduled(abort)
        if self.transport.broken is not None:
            raise self.transport.broken


def reset_by_peer(code: int) -> OSError:
    """What a stream that was reset has for a transport's error."""
    return OSError(errno.ECONNRESET, f"{os.strerror(errno.ECONNRESET)} (RST_STREAM, {code_name(code)})")


def connection_gone(broken: OSError | None) -> OSError:
    """What the streams of a connection that has ended have for a transport's error."""
    return broken or OSError(errno.ECONNRESET, "the connection has ended")
