"""The interface of the HTTP/2 engines, server side: who calls what, and the limits that hold in both.

An engine turns bytes into calls of an `Http2Sink` and calls into bytes (`out`); it does no I/O, asks no clock and
never waits. `http2.py` reads, writes, owns the streams' tasks, and is the sink. The two engines are `h2_engine.py`
(the library h2, the reference) and `frame_engine.py` (our own); one conformance suite runs on both.

What is whose: framing, HPACK, stream states, flow control, the rules about fields, and the guards against abuse are
the engine's. Deadlines (a peer that reads or sends too slowly), limits on bodies, and every answer, the one to a
refused request included, are the driver's. SETTINGS that nobody acknowledges have none, though RFC 9113 section 6.5.3
would allow it: they cost nothing, since all limits but the streams' windows hold at once, and clients that read only
when they have sent all of a slow upload (httpx) acknowledge as late as that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from trioserve.errors import TrioserveError
from trioserve.http.http2_codes import ErrorCode, code_name

Fields = list[tuple[bytes, bytes]]


class Http2Fault(TrioserveError):
    """The peer broke the connection: a GOAWAY with `code` is in `out`; write it and close. `reason` is for our log."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(f"{code_name(code)}: {reason}")
        self.code = code
        self.reason = reason


class RequestHead:
    """A request's head, checked. `host` leads `headers` where the request has an authority.

    Attributes:
        method: as text. target: path and query, or `*`; empty for a plain CONNECT.
        scheme: as sent, lower case. authority: of :authority, else of Host; may be empty.
        headers: fields in order without pseudo-fields, names in lower case, cookie crumbs joined into one.
        protocol: of an extended CONNECT (RFC 8441), such as b"websocket"; None otherwise.
        content_length: as announced; 0 where the request ended with its head, None where it did not say.
        ended: nothing follows the head; `request_ended` is not called for such a request.
        urgency, incremental: the `priority` field (RFC 9218), or its defaults.
        wants_trailers: `te: trailers` was sent. expects_continue: it waits for a 100.
    """

    # Of the class until a request says otherwise: most of it holds for nearly every request, and setting a dozen
    # attributes would cost as much as parsing.
    method = ""
    target = b""
    scheme = b""
    authority = b""
    protocol: bytes | None = None
    content_length: int | None = None
    urgency = 3
    incremental = False
    wants_trailers = False
    expects_continue = False

    def __init__(self, *, ended: bool = False) -> None:
        self.ended = ended
        self.headers: Fields = []

    def __repr__(self) -> str:
        names = (
            "method", "target", "scheme", "authority", "protocol", "content_length", "ended", "urgency", "incremental",
            "wants_trailers", "expects_continue", "headers",
        )  # fmt: skip
        return f"<RequestHead {' '.join(f'{name}={getattr(self, name)!r}' for name in names)}>"


@dataclass(frozen=True, slots=True)
class Http2Limits:
    """What one connection may do. Sizes are bytes.

    The guards are budgets: what costs us and is of no use to anybody takes from a budget, useful work gives back, up to
    where it began. An empty one ends the connection with ENHANCE_YOUR_CALM.

    Attributes:
        max_concurrent_streams: open at once; what is over is refused, to be tried again. 100 is the RFC's least.
        max_header_list_size: of a head or trailers as RFC 9113 counts (name + value + 32 a field). Over it: 431.
        max_frame_size: largest frame we take. header_count, target_size: as in HTTP/1; over them: 431, 414.
        body_window: what a stream may have sent that the app has not taken. connection_window: all streams together.
            With less than a body_window for each stream, those that are not read can hold up those that are.
        block_factor: a head may be this many times too large and still get its 431, because HPACK obliges us to read
            it; beyond, the connection ends. Go allows twice, too.
        continuation_frames: CONTINUATION frames in one head. A head within bounds needs 8 at 16 KiB each; nghttp2
            takes 8, h2 63.
        reset_budget: streams that cost work and came to nothing: reset by the peer before a response had begun,
            reset by us for the peer's errors, or refused. Streams above our last GOAWAY are free: the peer may not
            have read it yet, and their refusal costs less than the answers it could ask for before. A complete
            response gives one back. Twice the streams that may be open, so that a browser may give up a whole page at
            once.
        resets_per_second: so many of them time gives back. nghttp2's figure, beside bursts of 1000: a key that is held
            down repeats 30 times a second, and a search may be given up for each. A peer may have many more requests
            than that answered, so this adds nothing to what it can cost.
        control_budget: frames that carry nothing: PING, SETTINGS, PRIORITY, WINDOW_UPDATE, empty DATA, unknown types,
            frames on closed streams. nghttp2 allows bursts of 1000, too. Each read gives 2 back (one frame a packet is
            no flood), each complete response 8. DATA on streams that we have reset may have been on their way: they are
            free as far as the streams had room for them. WINDOW_UPDATEs that answer DATA are free: 2 for a piece that
            the window did not cut short, and 1 for 128 bytes of any; a window of some bytes at a time is as much of a
            flood.
        idle_priorities: PRIORITY_UPDATE frames remembered for streams that are not open yet.
        closed_streams: how many closed streams are remembered by how they ended.
    """

    max_concurrent_streams: int = 100
    max_header_list_size: int = 65536
    max_frame_size: int = 16384
    header_count: int = 100
    target_size: int = 8192
    body_window: int = 65536
    connection_window: int = 100 * 65536
    block_factor: int = 2
    continuation_frames: int = 16
    reset_budget: int = 200
    resets_per_second: int = 33
    control_budget: int = 1000
    idle_priorities: int = 100
    closed_streams: int = 256


class Http2Sink(Protocol):
    """Who the engine calls, synchronously, from `receive()`. These must not raise.

    What the driver itself brings about by `reset()` or by ending a response is not told back to it. A stream is over
    with `stream_reset`, or when its request and its response have both ended; nothing about it is told afterwards.
    """

    def request_begun(self, stream_id: int, head: RequestHead) -> None:
        """A new request. If `head.ended`, nothing more comes of it."""

    def request_refused(self, stream_id: int, head: RequestHead, status: int, reason: str) -> None:
        """Instead of `request_begun`: well-formed, but not to be served. Answer `status` with `send_head`.

        `head` holds what was understood, for the log. Data that come are dropped; only `stream_reset` may follow.
        """

    def data_received(self, stream_id: int, data: bytes, flow_size: int) -> None:
        """A part of the body, never empty. Give `flow_size` back by `acknowledge()` when the app has taken it."""

    def request_ended(self, stream_id: int, trailers: Fields) -> None:
        """The request that had not `head.ended` is complete."""

    def stream_reset(self, stream_id: int, code: int) -> None:
        """By the peer, or by the engine for an error of the stream (RST_STREAM is in `out`). The stream is closed."""

    def window_opened(self, stream_id: int) -> None:
        """More may be sent on a stream; 0: on any, the connection's window or the setting has changed."""

    def peer_going_away(self, last_stream_id: int, code: int) -> None:
        """The peer will open no more streams."""

    def priority_changed(self, stream_id: int, urgency: int, incremental: bool) -> None:
        """Of a stream that is open (PRIORITY_UPDATE, RFC 9218)."""


class Http2Engine(Protocol):
    """One connection's engine. Calls for a stream that is closed do nothing: the sink has been told of its end.

    Attributes:
        out: what to write; the driver takes it all (`out, engine.out = engine.out, []`).
        last_stream_id: the highest that the peer has opened. open_streams: how many are open.
        held: not all that has come was looked at, since there are so many frames; `receive(b"", now)` goes on.
        closing: a GOAWAY that ends the connection was sent; streams above its last id are refused.
        settings_acknowledged: the peer has acknowledged our SETTINGS, and keeps to our windows.
        last_pong: the payload of the last acknowledgement of a PING, or None.
    """

    out: list[bytes]
    last_stream_id: int
    held: bool
    closing: bool
    settings_acknowledged: bool
    last_pong: bytes | None

    @property
    def open_streams(self) -> int: ...

    @property
    def in_head(self) -> bool:
        """Bytes of a head have come, but not all of them: the driver's deadline for heads is running."""

    @property
    def out_size(self) -> int:
        """Bytes in `out`. A driver that cannot write stops reading when they become many."""

    def start(self) -> None:
        """Put our SETTINGS, and the connection's window, into `out`."""

    def receive(self, data: bytes, now: float) -> None:
        """Take bytes as they came from the peer, cut anywhere, beginning with the connection preface.

        `now` is the time in seconds, of any clock that goes forward.

        Raises:
            Http2Fault: after its GOAWAY is in `out`. Nothing may be received afterwards.
        """

    def send_interim(self, stream_id: int, status: int, fields: Sequence[tuple[bytes, bytes]]) -> None:
        """A 1xx response; fields are lower case and checked."""

    def send_head(
        self, stream_id: int, status: int, fields: Sequence[tuple[bytes, bytes]], end: bool
    ) -> None:
        """The head of the response; fields are lower case and checked.

        With `end`, and whenever a response ends before its request has: the stream is closed, and the peer is asked
        to send no more by RST_STREAM(NO_ERROR) (RFC 9113 section 8.1, as Go does). A CONNECT that was granted (2xx) is
        exempt: a tunnel may be open in one direction.
        """

    def room(self, stream_id: int) -> int:
        """Bytes of DATA that may be sent now: what both windows allow, never under 0."""

    def stream_room(self, stream_id: int) -> int:
        """What the stream's own window allows, whatever the connection's does."""

    def send_data(self, stream_id: int, data: bytes | memoryview, end: bool) -> None:
        """A part of the body, at most `room()`; it is split into frames."""

    def send_trailers(self, stream_id: int, fields: Sequence[tuple[bytes, bytes]]) -> None:
        """End the response with these fields, lower case and checked."""

    def reset(self, stream_id: int, code: int) -> None:
        """Close a stream by RST_STREAM."""

    def acknowledge(self, stream_id: int, flow_size: int) -> None:
        """The app has taken so much: give it back to the windows, in WINDOW_UPDATEs of half a window.

        The connection's window may be in use by streams that are not read. What is left of it goes round in halves.
        Also right for closed streams: the connection's window needs it.
        """

    def go_away(self, code: int = 0, *, last_stream_id: int | None = None, reason: bytes = b"") -> None:
        """Say goodbye. Graceful: first with 2**31-1, and a round trip later with the default, the real last id."""

    def ping(self, payload: bytes) -> None:
        """Send a PING with 8 bytes; `last_pong` tells when it came back."""
