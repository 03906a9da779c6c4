r"""One response on its way through the compression middleware: what each message of the app becomes.

Made by `Compression` for each request; `send()` stands where the server's stood.

    NEW -start-> HELD -body, coded in several parts-> CODING -last body-> PASSING
      \              \-body, coded whole or plain; files-----------------/
       \-start of what is never coded-----------------------------------/

NEW, PASSING: messages pass as they are. HELD keeps the start; CODING has an encoder and codes bodies.

Cancellation and errors: see `compression.py`; once something of a coded body is lost, nothing more is sent.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import trio

from trioserve.asgi.exchange import check_body_length
from trioserve.errors import ConcurrentCall, UnexpectedMessage
from trioserve.middleware.coded_head import (
    CodedHead,
    Fields,
    add_vary,
    code_head,
    names_weak_form,
    read_head,
    weaken_etag,
    without,
)
from trioserve.middleware.encoders import Codec, Encoder, Ending

if TYPE_CHECKING:
    from trioserve.middleware.compression import Compression

# A body in one message is coded in one go up to this size, which keeps its Content-Length; beyond it is sent while it
# is coded, so that the client need not wait and both forms are not in memory at once.
_LARGEST_WHOLE = 1024 * 1024

# What a thread is given at once: 10 to 20 ms of work, which is what a cancellation may have to wait.
_SLICE = 512 * 1024

_FILE_EVENTS = frozenset({"http.response.pathsend", "http.response.zerocopysend"})

# What may be sent between start and body without being either.
_BESIDE = frozenset({"http.response.debug", "http.response.early_hint", "http.response.push"})


class State(enum.Enum):
    """How far the response is."""

    #: the app has sent no start
    NEW = "new"
    #: the start is kept until the body shows what to do
    HELD = "held"
    #: parts of the body go through the encoder
    CODING = "coding"
    #: all is decided: messages pass
    PASSING = "passing"


class CodedResponse:
    """The state of one response."""

    __slots__ = (
        "_busy",
        "_codec",
        "_coded_bytes",
        "_encoder",
        "_failure",
        "_head",
        "_middleware",
        "_pending",
        "_scope",
        "_send",
        "_start",
        "_state",
    )

    def __init__(self, middleware: Compression, scope: Any, send: Any) -> None:
        self._middleware = middleware
        self._scope = scope
        self._send = send
        self._state = State.NEW
        self._start: Any = None
        self._head: CodedHead | None = None
        self._codec: Codec | None = None
        self._encoder: Encoder | None = None
        self._coded_bytes = 0  # of the plain body, handed to the encoder
        self._pending = 0  # of these, how many it may still hold
        self._busy = False
        self._failure: Exception | None = None

    @property
    def inner_send(self) -> Any:
        """The next `send`; files pass to it as they are (`static/sending.py`)."""
        return self._send

    async def send(self, message: Any) -> None:
        """Take the app's next message."""
        if self._failure is not None:
            raise self._failure
        state = self._state
        if state is State.PASSING:
            await self._send(message)
            return
        try:
            event = message["type"]
        except (KeyError, TypeError):
            event = None
        if state is State.NEW:
            if event == "http.response.start":
                await self._take_start(message)
            else:
                await self._send(message)
        elif event == "http.response.body":
            await self._take_body(message)
        elif event in _BESIDE:
            await self._send(message)
        elif state is State.CODING and event in _FILE_EVENTS:
            raise UnexpectedMessage(
                f"{event!r} cannot follow a body part that was compressed; "
                "send 'content-encoding: identity' with a response that mixes both"
            )
        else:
            if state is State.HELD:
                # A file; its HEAD and its parts vary, since the server might not have taken it as one. Or something
                # that the server will refuse.
                fields = self._start["headers"]
                await self._release(add_vary(fields) if event in _FILE_EVENTS else fields)
            await self._send(message)

    def close(self) -> None:
        """The app has returned: nothing more will come."""
        if self._encoder is not None:
            self._encoder = None
            self._middleware.open_streams -= 1

    # -- the start -------------------------------------------------------------------------------------------

    async def _take_start(self, start: Any) -> None:
        try:
            head = read_head(start.get("headers", ()))
        except (AttributeError, TypeError, ValueError):
            head = None
        status = start.get("status")
        if head is None or not isinstance(status, int):
            self._state = State.PASSING
            await self._send(start)  # for the server to refuse, which has the words for it
            return
        self._start = {**start, "headers": head.fields}
        self._head = head
        if head.opted_out:
            await self._release(without(head.fields, b"content-encoding"))
        elif head.untouchable or status < 200 or status in (204, 205):
            await self._release(head.fields)
        elif status == 304:
            await self._release(self._not_modified(head))
        elif status == 206 or head.partial:
            negotiable = self._is_negotiable(head, b"multipart/byteranges")
            await self._release(add_vary(head.fields) if negotiable else head.fields)
        elif self._is_negotiable(head):
            self._state = State.HELD
        else:
            await self._release(head.fields)

    def _is_negotiable(self, head: CodedHead, *also: bytes) -> bool:
        kind = head.content_type
        if kind is None:
            return False
        return self._middleware.is_coded_type(kind) or kind.partition(b";")[0].strip().lower() in also

    def _not_modified(self, head: CodedHead) -> Fields:
        if head.content_type is not None and not self._is_negotiable(head):
            return head.fields
        fields = add_vary(head.fields)
        if head.etag is not None and names_weak_form(self._request_field(b"if-none-match") or b"", head.etag):
            fields = weaken_etag(fields)
        return fields

    async def _release(self, fields: Fields) -> None:
        """Send the start with these fields; from now on messages pass."""
        before, self._state = self._state, State.PASSING
        try:
            await self._send({**self._start, "headers": fields})
        except Exception as error:
            if before is State.NEW:
                self._state = State.NEW  # the app hears of it at its start, and may try another one
            else:
                self._failure = error  # it is at its body already: it must not hear that a start is missing
            raise

    # -- the body --------------------------------------------------------------------------------------------

    async def _take_body(self, message: Any) -> None:
        if self._busy:
            await self._refuse()
        self._busy = True
        try:
            if self._state is State.HELD:
                await self._take_first(message)
            else:
                await self._code_part(_body_of(message), message.get("more_body", False))
        except Exception as error:
            # Something of the coded body is lost: what would follow could not be decoded.
            self._failure = error
            raise
        self._busy = False  # but not after a cancellation, for the same reason

    async def _refuse(self) -> NoReturn:
        if trio.lowlevel.in_trio_task():
            # Where the cancellation goes on, it is the better answer.
            await trio.lowlevel.checkpoint_if_cancelled()
        raise ConcurrentCall(
            "send() was called while another task of the app is waiting in it, or after it was cancelled there: "
            "what was being compressed is lost, and the response cannot go on"
        )

    async def _take_first(self, message: Any) -> None:
        """Decide what becomes of the response, now that it is known how its body comes."""
        middleware, head = self._middleware, self._head
        assert head is not None
        body, more = _body_of(message), message.get("more_body", False)
        codec, plain_ok = middleware.choose(self._request_field(b"accept-encoding"))
        size = head.length if more or not body else len(body)
        small = size is not None and size < middleware.minimum_size and plain_ok
        if codec is None or small:
            await self._pass_plain(message)
        elif self._scope["method"] == "HEAD":
            await self._answer_head(codec, body, more)
        elif not more and not body:
            await self._pass_plain(message)
        else:
            stream = more or len(body) > _LARGEST_WHOLE
            if plain_ok and not middleware.try_admit(stream=stream):
                await self._pass_plain(message)
            elif stream:
                await self._begin_stream(codec, body, more)
            else:
                await self._code_whole(codec, message, plain_ok)

    async def _pass_plain(self, message: Any) -> None:
        await self._release(add_vary(self._start["headers"]))
        await self._send(message)

    async def _answer_head(self, codec: Codec, body: bytes, more: bool) -> None:
        assert self._head is not None
        by_file = not _FILE_EVENTS.isdisjoint(self._scope.get("extensions") or ())
        if body or more or (self._head.length is not None and not by_file):
            fields = code_head(self._head, codec.coding, None)
        else:
            # GET may be sent as a file, which stays plain, or be too small: only what holds for all of these.
            fields = add_vary(without(self._start["headers"], b"content-length"))
        await self._release(fields)
        # Given the plain body, servers would say its length.
        await self._send({"type": "http.response.body", "body": b"", "more_body": more})

    async def _code_whole(self, codec: Codec, message: Any, plain_ok: bool) -> None:
        assert self._head is not None
        body = _body_of(message)
        check_body_length(len(body), self._head.length, True)
        coded = await self._middleware.encode(codec, len(body), codec.encode_whole, body)
        if len(coded) >= len(body) and plain_ok:
            await self._pass_plain(message)
            return
        length = None if self._start.get("trailers") else len(coded)
        await self._release(code_head(self._head, codec.coding, length))
        await self._send({**message, "body": coded})

    # -- a body in parts -------------------------------------------------------------------------------------

    async def _begin_stream(self, codec: Codec, body: bytes, more: bool) -> None:
        assert self._head is not None
        self._codec = codec
        self._encoder = codec.open()
        self._middleware.open_streams += 1
        self._state = State.CODING
        self._start["headers"] = code_head(self._head, codec.coding, None)
        await self._code_part(body, more)

    async def _code_part(self, body: bytes, more: bool) -> None:
        """Code what one message brought, and send it in one or more."""
        middleware, head, codec, encoder = self._middleware, self._head, self._codec, self._encoder
        assert head is not None
        assert codec is not None
        assert encoder is not None
        self._coded_bytes += len(body)
        check_body_length(self._coded_bytes, head.length, not more)
        for part, last in _slices(body):
            ending = self._ending(head, more) if last else Ending.KEEP
            self._pending += len(part)
            coded = await middleware.encode(codec, self._pending, encoder.encode, part, ending)
            # An encoder that was given much has worked it off but for a block of 64 KiB or so.
            if ending is not Ending.KEEP or middleware.is_threaded(codec, self._pending):
                self._pending = 0
            if coded or last:
                await self._send_coded(coded, more or not last)
        if not more:
            self.close()
            self._state = State.PASSING

    def _ending(self, head: CodedHead, more: bool) -> Ending:
        if not more:
            return Ending.FINISH
        events = (head.content_type or b"").lower().startswith(b"text/event-stream")
        return Ending.FLUSH if events or self._middleware.flush else Ending.KEEP

    async def _send_coded(self, coded: bytes, more: bool) -> None:
        start, self._start = self._start, None
        if start is not None:
            await self._send(start)
        await self._send({"type": "http.response.body", "body": coded, "more_body": more})

    def _request_field(self, wanted: bytes) -> bytes | None:
        size = len(wanted)
        headers = self._scope["headers"]
        values = [value for name, value in headers if len(name) == size and name.lower() == wanted]
        return b", ".join(values) if values else None


def _body_of(message: Any) -> bytes:
    body = message.get("body", b"")
    if type(body) is bytes:
        return body
    if isinstance(body, (bytes, bytearray, memoryview)):
        return bytes(body)  # a copy: a thread may read it while the app writes to its own
    raise UnexpectedMessage(f"'body' must be bytes, not {type(body).__name__}")


def _slices(body: bytes) -> Iterator[tuple[bytes, bool]]:
    """The body in pieces of at most `_SLICE`, each with whether it is the last; at least one."""
    if len(body) <= _SLICE:
        yield body, True
        return
    view = memoryview(body)
    for begin in range(0, len(body), _SLICE):
        yield bytes(view[begin : begin + _SLICE]), begin + _SLICE >= len(body)
