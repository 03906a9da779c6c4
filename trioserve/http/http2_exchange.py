"""One request and its response on an HTTP/2 stream: what the app's events become on the wire.

`http2.py` makes an `Http2Exchange` for each request, `http2_stream.py` hands its `receive` and `send` to the app. Heads
and small bodies go to the engine at once and leave with the connection's next write; what the windows or the kernel do
not take is waited for under the phase `response_write`, and the request body under `request_body`. What cancelling does
is told in `asgi/exchange.py`; a stream whose `send()` was cut is reset by whoever cut it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from trioserve.asgi.exchange import ResponseState, check_body_length, listed
from trioserve.asgi.file_body import FilePart
from trioserve.asgi.scope import http_scope
from trioserve.errors import RequestRefused
from trioserve.http.http2_engine import Fields, Http2Engine, RequestHead
from trioserve.http.http2_fields import check_fields, check_start
from trioserve.http.http2_output import Output
from trioserve.http.http2_pipe import StreamPipe
from trioserve.http.http_exchange import HttpExchange, RequestFacts, as_bytes
from trioserve.http.response import BODILESS
from trioserve.static.answers import Answer
from trioserve.static.sendfile import FileSender
from trioserve.structure.context import Message, StreamContext

_NONE, _HELD, _STREAMING, _TRAILERS, _COMPLETE = ResponseState


class Http2Exchange(StreamPipe, HttpExchange):
    """One request and response on a stream.

    Attributes:
        head: of the request.
        was_session: it has become a WebSocket session, which is over.
    """

    was_session = False
    _checked: Fields
    _flags = 0
    _expected: int | None = None
    _trailers: Fields | None = None
    _sent_before = 0  # of the whole connection, when this was last asked for

    def __init__(
        self, stream: StreamContext, engine: Http2Engine, output: Output, head: RequestHead, started_at: float
    ) -> None:
        self.connection = self.stream = stream
        self.stream_id = stream.stream_id
        self.engine = engine
        self.output = output
        self.head = head
        self.started_at = started_at
        self.state = _NONE
        self._sending = False
        self._is_head = head.method == "HEAD"
        self.received = []
        self.unsent = []
        if head.ended:
            self.ended = True
        if head.urgency != 3 or head.incremental:
            self.urgency = head.urgency
            self.incremental = head.incremental

    def __repr__(self) -> str:
        return f"<exchange {self.head.method} {self.state.name} status={self.status}>"

    @property
    def request_complete(self) -> bool:
        """Nothing more of the request will arrive."""
        return self.ended or self.told_gone

    def outlasts(self, phase: str) -> bool:
        """Waiting for its turn, or for the socket, is not the stream's lateness: that is the connection's phase."""
        engine, sent = self.engine, self.output.sent
        if phase != "response_write" or not self.unsent or not engine.stream_room(self.stream_id):
            return False
        if not engine.room(self.stream_id) and sent == self._sent_before:
            return False  # the connection's window is closed, and not because siblings use it up
        self._sent_before = sent
        self.stream.start_write()
        return True

    def request_facts(self) -> RequestFacts:
        head = self.head
        return head.method, head.target, "2", head.headers, self.received_bytes

    def scope(self) -> Any:
        """The ASGI scope of this request."""
        head = self.head
        return http_scope(self.stream, head.method, head.target, "2", head.headers, head.wants_trailers)

    # -- the request body ------------------------------------------------------------------------------------

    def data_received(self, data: bytes, flow_size: int) -> None:
        if self.state is _COMPLETE:
            self.engine.acknowledge(self.stream_id, flow_size)
            return
        super().data_received(data, flow_size)
        if self.received_bytes > self.stream.worker.limits.body_size and self.refusal is None:
            self.refusal = RequestRefused(413, f"a body of over {self.received_bytes} bytes")
            self.forget_received()

    def wire_next_body(self) -> Message | None:
        if self.transport.broken is not None or self.refusal is not None or self.told_gone:
            self.told_gone = True
            return {"type": "http.disconnect"}
        if not self.received:
            return {"type": "http.request", "body": b"", "more_body": False} if self.ended else None
        return {"type": "http.request", "body": self.take(), "more_body": not self.ended}

    async def wire_wait_body(self) -> Message:
        stream = self.stream
        clock = stream.worker.clock
        if self.head.expects_continue and not self.response_started:
            self.head.expects_continue = False
            self.engine.send_interim(self.stream_id, 100, ())
            self.output.request()
        began = clock()
        self._body_deadline = began + self.body_patience(self.received_bytes)
        stream.start_phase("request_body", self._body_deadline)
        try:
            while self.state is not _COMPLETE:
                message = self.wire_next_body()
                if message is not None:
                    return message
                await self.wait_received()
            return {"type": "http.disconnect"}
        finally:
            waited = clock() - began
            self._body_waited += waited
            self._body_deadline = 0.0
            # The time-out of the handler counts what the app takes, not what the client takes to send.
            stream.resume_handler(waited)

    # -- the peer --------------------------------------------------------------------------------------------

    def wire_is_peer_gone(self) -> bool:
        if self.transport.broken is None and not self.told_gone:
            return False
        self.told_gone = True
        return True

    async def wire_wait_disconnect(self) -> None:
        while self.state is not _COMPLETE and self.transport.broken is None and not self.told_gone:
            await self.wait_received()
        self.told_gone = self.state is not _COMPLETE

    # -- the response head -----------------------------------------------------------------------------------

    def wire_start(self, status: int, headers: Iterable[tuple[bytes, bytes]], trailers: bool) -> None:
        self.fields = fields = headers if type(headers) is list else listed(headers)
        self._checked, self._expected, self._flags = check_start(status, fields)
        if trailers:
            self._trailers = []

    def wire_send_body(self, body: bytes, more: bool) -> bool:
        if self.transport.broken is not None:
            raise self.transport.broken
        if type(body) is not bytes:
            body = as_bytes(body)  # a copy: it may have to wait, and the app may write to its own
        if self.state is not _HELD:
            return self._send_next(body, more)
        size = len(body)
        if more or self._is_head or self.status in BODILESS or self._trailers is not None:
            self._send_head(size, more)
            return self._send_next(body, more, checked=True)
        if self._expected is None:
            self._expected = size
        elif self._expected != size:
            check_body_length(size, self._expected, True)
        self._write_head(not size)
        self._complete(size)
        if size:
            return self.put(body, True)  # and the head with it: `fits` still holds if it did
        self.output.request()
        return False

    def _send_head(self, size: int, more: bool) -> None:
        """The head of a response that has several parts, no body, or trailers; the first part has `size` bytes."""
        no_body = self._is_head or self.status in BODILESS
        if no_body:
            self.check_bodiless(size)
            if size and not more and self._expected is None and self.status not in BODILESS:
                # What a GET would be told. An app that sends no body to HEAD has not said (RFC 9110 section 8.6).
                self._expected = size
        elif self._expected is not None:
            check_body_length(size, self._expected, not more)
        elif not more and self._trailers is None:
            self._expected = size
        self._write_head(no_body)
        self.output.request()
        self.state = _STREAMING

    def _write_head(self, end: bool) -> None:
        """Give the engine the head; to have it written is the caller's part."""
        stream = self.stream
        worker = stream.worker
        self.head_at = now = worker.clock()
        fields = self._checked + worker.response_defaults.fields(now, self._flags)
        if self._expected is not None and self.status != 204:
            # RFC 9110 section 8.6: not in a 204, where frameworks set it out of habit.
            fields.append((b"content-length", b"%d" % self._expected))
        self.engine.send_head(self.stream_id, self.status or 0, fields, end)

    def open_tunnel(self, fields: Fields) -> None:
        """Answer an extended CONNECT with 200: from here on, DATA are what the session makes of them."""
        self.head_at = self.stream.worker.clock()
        self.engine.send_head(self.stream_id, 200, fields, False)
        self.output.request()

    # -- the response body -----------------------------------------------------------------------------------

    def _send_next(self, body: bytes, more: bool, *, checked: bool = False) -> bool:
        if self.torn:
            self.raise_torn()
        size = len(body)
        if self._is_head or self.status in BODILESS:
            # The stream has ended with the head.
            self.check_bodiless(size)
            if not more:
                self._end_body()
            return False
        total = self.response_bytes + size
        if not checked:
            check_body_length(total, self._expected, not more)
        self.response_bytes = total
        end = False
        if not more:
            self._end_body()
            end = self.state is _COMPLETE
        return self.put(body, end)

    def _end_body(self) -> None:
        if self._trailers is not None:
            self.state = _TRAILERS
        else:
            self._complete(self.response_bytes)

    def _complete(self, size: int) -> None:
        self.state = _COMPLETE
        self.response_bytes = size
        if self.received:
            self.forget_received()  # `receive()` gives no body any more: its room is the other streams'
        if self._receiving:
            self.wake_reader()

    def wire_add_trailers(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        assert self._trailers is not None
        self._trailers += check_fields(headers)

    def wire_end_trailers(self) -> bool:
        if self.transport.broken is not None:
            raise self.transport.broken
        self._complete(self.response_bytes)
        if self._is_head or self.status in BODILESS:
            return False
        # RFC 9110 section 6.5.1: trailers only for a peer that said it takes them.
        if self._trailers and self.head.wants_trailers:
            return self.put_trailers(self._trailers)
        return self.put(b"", True)

    def wire_interim(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        self.engine.send_interim(self.stream_id, status, check_fields(headers))
        self.output.request()
        return False

    def answer_at_once(self, answer: Answer) -> None:
        """Send a whole small response that was prepared beforehand, and whose body `fits`."""
        self.wire_start(answer.status, answer.fields, False)
        self.status = answer.status
        self.state = _HELD
        # Errors that say something to GET, too: what HEAD is told of the length stands in the fields.
        self.wire_send_body(b"" if self._is_head else answer.body, False)

    # -- files -----------------------------------------------------------------------------------------------

    async def wire_send_file(self, part: FilePart, more: bool) -> None:
        files: FileSender = self.stream.worker.files
        size = part.count
        await files.prepare(part)  # now, while an error can still be answered with one
        if self.transport.broken is not None:
            raise self.transport.broken
        if self.state is _HELD:
            self._send_head(size, more)
        else:
            check_body_length(self.response_bytes + size, self._expected, not more)
        self._ends_with_file = not more and self._trailers is None
        if size:
            self.torn = True
            await files.send_by_reading(part, self)
            self.torn = False
        if not more:
            self._end_body()
            if self.state is _COMPLETE and self.put(b"", True):
                await self.wire_flush()

    async def write(self, data: bytes) -> None:
        """Bytes of a file that was read, since nothing else can put it on a stream."""
        if self.put(data, False):
            await self.wire_flush()
        self.response_bytes += len(data)

    # -- writing ---------------------------------------------------------------------------------------------

    def wire_resume(self) -> None:
        """Nothing is held back here."""

    async def wire_flush(self) -> None:
        stream = self.stream
        stream.writing = True
        stream.start_write()
        try:
            await self.wait_sent()
        finally:
            stream.writing = False
            self.end_write()
