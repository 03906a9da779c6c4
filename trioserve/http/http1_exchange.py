"""The response side of one HTTP/1 exchange: heads, framing, and the bytes to the transport.

The request side is in `http1_request.py`. `http1.py` makes an `Http1Exchange` for each request and hands its `receive`
and `send` to the app. Small body parts are held back for the `Flusher`; everything else is written at once or waited
for under the phase `response_write`. What cancelling does is told in `asgi/exchange.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from trio.lowlevel import ParkingLot

from trioserve.asgi.exchange import ResponseState, check_body_length, listed
from trioserve.asgi.file_body import FilePart
from trioserve.http.engine import Engine
from trioserve.http.http1_request import Http1Request
from trioserve.http.http_exchange import as_bytes
from trioserve.http.response import (
    ASKS_CLOSE,
    BODILESS,
    CHUNKED,
    CLOSE,
    KEEP_ALIVE,
    LAST_CHUNK,
    NO_START,
    check_answer,
    field_block,
    length_line,
)
from trioserve.net.transport import MSG_MORE
from trioserve.static.answers import Answer
from trioserve.static.open_file import OpenFile
from trioserve.static.sendfile import FileSender
from trioserve.static.sending import send_pieces
from trioserve.structure.context import ConnectionContext

_NONE, _HELD, _STREAMING, _TRAILERS, _COMPLETE = ResponseState

# Body parts up to this are held back for the flusher; beyond it a write of their own costs little more.
_HOLD_SIZE = 16 * 1024

# What a part that is held back costs besides its bytes: its framing, and the objects. Parts of one byte add up, too.
_PART_COST = 64


class Http1Exchange(Http1Request):
    """One request and response on an HTTP/1 connection.

    Attributes:
        completed_at: when a response that left in one piece was complete (trio's clock); 0 for others, and where it has
            not left after all.
        is_posted: the response waits in the outbox; until then the request stays in the table of those in flight.
    """

    completed_at = 0.0
    is_posted = False
    queued = 0
    _start = NO_START
    _flush_asked = False
    _chunked = False
    _turns: ParkingLot | None = None  # of those who are to write once another task of the app has
    _trailers: list[bytes] | None

    def __init__(
        self, connection: ConnectionContext, engine: Engine, started_at: float, keep_alive: bool
    ) -> None:
        self.connection = connection
        self.transport = connection.transport
        self.engine = engine
        self.started_at = started_at
        self.keep_alive = keep_alive
        self.state = _NONE
        self.queue = []
        self._sending = False
        self._is_head = engine.method == "HEAD"
        self._trailers = None

    def __repr__(self) -> str:
        return f"<exchange {self.engine.method} {self.state.name} status={self.status}>"

    @property
    def ends_with_connection(self) -> bool:
        """The body has no framing of its own: only the end of the connection ends it."""
        return (
            self.state is _STREAMING
            and not self._chunked
            and self._start.length is None
            and not self._is_head
        )

    # -- the response head -----------------------------------------------------------------------------------

    def wire_start(self, status: int, headers: Iterable[tuple[bytes, bytes]], trailers: bool) -> None:
        self.fields = fields = headers if type(headers) is list else listed(headers)
        self._start = start = self.connection.worker.response_defaults.start(status, fields)
        if start.flags & ASKS_CLOSE:
            self.keep_alive = False
        if trailers:
            self._trailers = []

    def wire_send_body(self, body: bytes, more: bool) -> bool:
        if self.state is _STREAMING:
            return self._send_next(body, more)
        if type(body) is not bytes:
            body = as_bytes(body)
        status = self.status
        if more or self._is_head or status in BODILESS or self._trailers is not None:
            return self._send_first(body, more)
        size = len(body)
        expected = self._start.length
        framing = None
        if expected is None:
            framing = length_line(size)
        elif expected != size:
            check_body_length(size, expected, True)
        # Complete whatever the kernel takes of it now: nothing more may be sent, and what is left is in the queue.
        if size > _HOLD_SIZE or self.queue:
            self.queue += (self._head(framing), body)
            self._complete(size)
            return self.wire_write_queue()
        data = self._head(framing) + body
        self._complete(size)
        outbox = self.transport.outbox
        if outbox.is_open and self.keep_alive:
            self.completed_at = self.head_at or 0.0
            self.is_posted = True
            outbox.post(self, data)
            return False
        sent = self.transport.send_nowait(data)
        if sent == len(data):
            self.completed_at = self.head_at or 0.0
            return False
        self.queue.append(memoryview(data)[sent:])
        return True

    def send_posted(self, data: bytes) -> None:
        """Called by the outbox: the response is complete, and the app may have ended, but its peer may not read."""
        connection = self.connection
        watch = self.transport.watch
        self.is_posted = False
        if connection.slot is not None and connection.exchange is not self:
            connection.slot.clear()
        try:
            sent = self.transport.send_nowait(data)
        except OSError:  # of which `broken` tells
            self.completed_at = 0.0
            watch.wake_reader()
            return
        if sent == len(data):
            return
        self.queue.append(memoryview(data)[sent:])
        self.completed_at = 0.0
        if connection.exchange is None:
            # Again, until its task has sent the rest. All else is done.
            connection.exchange = self
            self.admitted = False
            self.is_logged = True
            watch.wake_reader()
        else:
            self.wire_resume()

    def _head(self, framing: bytes | None, *, more: bool = False) -> bytes:
        """The whole head with `framing`, or that of the start event, and the `Connection` field that it needs."""
        worker = self.connection.worker
        engine = self.engine
        start = self._start
        self.head_at = now = worker.clock()
        if self.keep_alive:
            if worker.draining:
                self.keep_alive = False
            elif not engine.body_complete:
                # The rest of the body must be read before the next request: by a streaming app perhaps, but not
                # by one that has answered in full, nor if the peer still waits for our 100 to send it.
                self.keep_alive = more and not engine.expects_continue
        if framing is None:
            if self.keep_alive and engine.version == "1.1":
                head: bytes = (
                    start.head if now < start.head_until else worker.response_defaults.head(start, now)
                )
                return head
            framing = start.framing
        fields = worker.response_defaults.block(now, start.flags)
        connection = CLOSE if not self.keep_alive else KEEP_ALIVE if engine.version == "1.0" else b""
        return b"".join((start.block, fields, framing, connection, b"\r\n"))

    # -- the response body -----------------------------------------------------------------------------------

    def _send_first(self, body: bytes, more: bool) -> bool:
        """The head of a response that has several parts, no body, or trailers; with the first part."""
        self._hold_head(len(body), more)
        return self._send_next(body, more, checked=True)

    def _hold_head(self, size: int, more: bool) -> None:
        """Frame the response and queue its head; the first part has `size` bytes."""
        expected = self._start.length
        # RFC 9110 section 8.6: no Content-Length in a 204, where frameworks set it out of habit.
        framing = b"" if self.status == 204 else None
        if self._is_head or self.status in BODILESS:
            self.check_bodiless(size)
            if size and not more and expected is None and self.status not in BODILESS:
                # What a GET would be told. An app that sends no body to HEAD has not said (RFC 9110 section 8.6).
                framing = length_line(size)
        elif expected is not None:
            check_body_length(size, expected, not more)
        elif not more and self._trailers is None:
            framing = length_line(size)
        elif self.engine.version == "1.1":
            framing = CHUNKED
            self._chunked = True
        else:
            self.keep_alive = False  # HTTP/1.0: the body ends where the connection does
        self.queue.append(self._head(framing, more=more))
        self.queued = _HOLD_SIZE // 2  # a head alone is worth holding back, not much besides
        self.state = _STREAMING

    def _send_next(self, body: bytes, more: bool, *, checked: bool = False) -> bool:
        if type(body) is not bytes:
            body = as_bytes(body)  # a copy: it may be held back, and the app may write to its own
        if self.torn:
            self.raise_torn()
        size = len(body)
        if size and not self._is_head:
            total = self.response_bytes + size
            if not checked:
                if self.status in BODILESS:
                    self.check_bodiless(size)
                check_body_length(total, self._start.length, not more)
            self.response_bytes = total
            if self._chunked:
                self.queue += (b"%x\r\n" % size, body, b"\r\n")
            else:
                self.queue.append(body)
            self.queued += size + _PART_COST
        elif not more and not checked and not self._is_head and self.status not in BODILESS:
            check_body_length(self.response_bytes, self._start.length, True)
        if not more:
            self._end_body()
            return self.wire_write_queue()
        flusher = self.connection.worker.flusher
        if self.queued >= _HOLD_SIZE or flusher is None:
            return self.wire_write_queue()
        if not self._flush_asked:
            self.wire_resume()
        return False

    def _end_body(self) -> None:
        if self._trailers is not None:
            self.state = _TRAILERS
            return
        if self._chunked:
            self.queue.append(LAST_CHUNK)
        self._complete(self.response_bytes)

    def _complete(self, size: int) -> None:
        self.state = _COMPLETE
        self.response_bytes = size
        if self._receiving:
            self.transport.watch.release_hangup_waiter()
            self.transport.watch.wake_reader()

    def wire_add_trailers(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        assert self._trailers is not None
        self._trailers.append(field_block(headers))

    def wire_end_trailers(self) -> bool:
        assert self._trailers is not None
        if self._chunked:
            # RFC 9110 section 6.5.1: trailers only for a peer that said it takes them.
            trailers = self._trailers if self.engine.wants_trailers else []
            self.queue += [b"0\r\n", *trailers, b"\r\n"]
        self._complete(self.response_bytes)
        return self.wire_write_queue()

    def wire_interim(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        if self.engine.version == "1.0":
            return False  # RFC 9110 section 15.2: never to an HTTP/1.0 peer
        self.queue.append(b"HTTP/1.1 %d Early Hints\r\n%b\r\n" % (status, field_block(headers)))
        return self.wire_write_queue()

    # -- prepared answers ------------------------------------------------------------------------------------

    def answer_at_once(self, answer: Answer) -> bool:
        """Write a whole response that was prepared beforehand; False if `finish_answer` has to be awaited.

        Raises:
            ClientDisconnected: as `send`.
        """
        self._start = start = answer.checked or check_answer(answer)
        if start.flags & ASKS_CLOSE:
            self.keep_alive = False
        self.fields = answer.fields
        self.status = answer.status
        try:
            if answer.file is not None and not self._is_head:
                return self._begin_file(answer, answer.file)
            body = b"" if self._is_head else answer.body
            data = self._head(None) + body
            self._complete(len(body))
            if self.queue:
                self.queue.append(data)
                return False
            sent = self.transport.send_nowait(data)
        except OSError as error:
            self.raise_disconnected(error)
        if sent == len(data):
            self.completed_at = self.head_at or 0.0
            return True
        self.queue.append(memoryview(data)[sent:])
        return False

    def take_rest(self, answer: Answer, message: bytes, sent: int) -> None:
        """A prepared response was begun: its `message`, and a file behind it if it has one.

        `sent` bytes of these are with the kernel, and not all. `finish_answer` is to be awaited, be it later: until
        then the file is kept.
        """
        self.status = answer.status
        self.fields = answer.fields
        self.head_at = self.head_at or self.started_at
        if answer.file is None:
            self._complete(len(answer.body))
        else:
            answer.file.acquire()
            self._start = answer.checked
            self.state = _STREAMING
            self.response_bytes = max(0, sent - len(message))
        if sent < len(message):
            self.queue.append(memoryview(message)[sent:])

    def _begin_file(self, answer: Answer, file: OpenFile) -> bool:
        """Head and file in two calls, where the file is in memory and the socket has room; True if that was all."""
        worker = self.connection.worker
        span = answer.span
        if span is None or self.queue:
            return False
        head = self._head(None)
        now = self.head_at or 0.0
        length = span.length
        sent = worker.files.begin(self.transport, head, file, span.start, length, now)
        if sent is None:
            return False
        if sent < len(head) + length:
            self.take_rest(answer, head, sent)
            return False
        self.completed_at = now
        self._complete(length)
        return True

    async def finish_answer(self, answer: Answer) -> None:
        """Send what of a prepared response is left.

        Raises:
            ClientDisconnected, FileSendFailed: as `send`.
        """
        file = answer.file
        if file is None or self._is_head:
            await self._flush()
            return
        if self.state is not _STREAMING:
            # Nothing has run since the answer was given: the file is still the cache's.
            file.acquire()
        try:
            if self.state is _STREAMING:
                span = answer.span
                assert span is not None
                start = span.start + self.response_bytes
                await self.send_last_part(file.part(start, span.stop - start))
            else:
                self.wire_start(answer.status, answer.fields, False)
                self.state = _HELD
                await send_pieces(answer, file, self.send)
        finally:
            file.release()

    # -- files -----------------------------------------------------------------------------------------------

    async def wire_send_file(self, part: FilePart, more: bool) -> None:
        connection = self.connection
        files: FileSender = connection.worker.files
        size = part.count
        await files.prepare(part)  # now, while an error can still be answered with one
        self.transport.watch.on_writable = None  # what is held back goes with the file
        if connection.phase == "response_write":
            self.end_write()
        if self.state is _HELD:
            self._hold_head(size, more)
        else:
            check_body_length(self.response_bytes + size, self._start.length, not more)
        self._ends_with_file = not more and self._trailers is None
        if size:
            self.torn = True
            if self._chunked:
                self.queue.append(b"%x\r\n" % size)
            if self.queue and self.transport.send_parts_nowait(self.queue, MSG_MORE):
                await self.wire_flush()
            await files.send(part, self)
            if self._chunked:
                self.queue.append(b"\r\n")
            self.torn = False
        if not more:
            self._end_body()
        if self.wire_write_queue():
            await self.wire_flush()

    def note_sent(self, count: int) -> None:
        """Bytes of a file are with the kernel."""
        self.response_bytes += count

    async def write(self, data: bytes) -> None:
        """Bytes of a file that could not be sent without reading it."""
        self.queue.append(data)
        if self.wire_write_queue():
            await self.wire_flush()
        self.response_bytes += len(data)

    async def wait_room(self, push: Callable[[], bool] | None = None) -> None:
        """The kernel takes no more: wait until it may, in the phase `response_write`."""
        self.connection.start_write()
        watch = self.transport.watch
        try:
            if watch.writer is not None:  # a send(), or the 100 that a receive() has asked for: in turn
                if self._turns is None:
                    self._turns = ParkingLot()
                await self._turns.park()
                return
            try:
                await watch.wait_writable(push)
            finally:
                if self._turns is not None:
                    self._turns.unpark_all()
        finally:
            self.end_write()

    def end_write(self) -> None:
        if self.transport.watch.writer is None:  # else another task of the app still waits
            super().end_write()

    # -- writing ---------------------------------------------------------------------------------------------

    def wire_write_queue(self) -> bool:
        """Write what the kernel takes now; True if something is left."""
        self.queued = 0
        return bool(self.queue) and self.transport.send_parts_nowait(self.queue)

    def flush_last(self) -> bool:
        """Write what the kernel takes of an unfinished response; True if it cannot take all of it."""
        try:
            return self.wire_write_queue()
        except OSError:
            return True

    def wire_resume(self) -> None:
        flusher = self.connection.worker.flusher
        if self.queue and flusher is not None and not self._flush_asked:
            self._flush_asked = True
            flusher.request(self.flush_in_background)

    async def wire_flush(self) -> None:
        self.transport.watch.on_writable = None
        try:
            while self.queue and self.wire_write_queue():
                await self.wait_room()
        finally:
            self.end_write()

    def flush_in_background(self) -> None:
        """Called by the flusher or the hub: write what was held back, and again once the peer has made room."""
        self._flush_asked = False
        connection = self.connection
        if self._sending or connection.exchange is not self:
            return
        try:
            blocked = self.wire_write_queue()
        except OSError:
            self.queue.clear()
            self.queued = _HOLD_SIZE  # hold nothing more back: the app's next send is to meet the error
            return
        if blocked:
            self.queued = _HOLD_SIZE  # and the app's next send is to wait
            self.transport.watch.on_writable = self.flush_in_background
            if connection.phase != "request_body":
                connection.start_write()
        elif connection.phase == "response_write":
            self.end_write()
