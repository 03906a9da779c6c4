"""The streams of `frame_engine.py`: what is known of each, flow control both ways, and all that is sent on them.

A stream is in the table while it is open or half closed. Of closed ones only how they ended is kept, for the last so
many, because frames may still be on their way to them (RFC 9113 section 5.1); of those that we have reset, also how
much DATA that may be. Nothing here waits or reads.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from trioserve.http.hpack_encoder import encode_fields, encode_status
from trioserve.http.http2_base import (
    FRAME_START,
    NUMBER_FRAME,
    WINDOW_UPDATE_START,
    EngineBase,
)
from trioserve.http.http2_codes import (
    CONTINUATION,
    DEFAULT_FRAME_SIZE,
    DEFAULT_TABLE_SIZE,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    LARGEST_STREAM_ID,
    SETTINGS,
    ErrorCode,
)
from trioserve.http.http2_engine import Http2Limits, Http2Sink

# How a stream was closed; 0 is for those of which nothing is known any more.
FINISHED = 1  # both sides have ended it
RESET_BY_PEER = 2
RESET_BY_US = 3  # what still comes was on its way


class Stream:
    """One stream that is open or half closed.

    Attributes:
        window: what the peer lets us send; under 0 after it has made windows smaller.
        room: what we let the peer send. owed: bytes that the app has taken and the peer was not told of.
        expected: bytes of body still to come by Content-Length; None where nothing was said.
        ended: the request is complete. status: of the response, 0 before it. answered: it is complete.
        refused: the request is nothing for the app. connect: its method, which asks for a tunnel.
    """

    # Of the class until something else is true: making a stream is a part of every request.
    owed = 0
    expected: int | None = None
    status = 0
    answered = False
    refused = False
    connect = False

    def __init__(self, window: int, room: int, ended: bool) -> None:
        self.window = window
        self.room = room
        self.ended = ended


class FrameStreams(EngineBase):
    """The sending half of the engine, and what both halves know."""

    __slots__ = (
        "_closed", "_credit_at", "_owed", "_peer_frame_size", "_peer_table_size", "_peer_window", "_room",
        "_stream_credit_at", "_stream_room", "_streams", "_table_update", "_window",
    )  # fmt: skip

    def __init__(self, sink: Http2Sink, limits: Http2Limits) -> None:
        super().__init__(sink, limits)
        self._streams: dict[int, Stream] = {}
        self._closed = array(
            "Q", bytes(8 * limits.closed_streams)
        )  # by id: room << 33 | stream id << 2 | how
        self._window = DEFAULT_WINDOW  # the connection's: what the peer lets us send
        self._room = max(limits.connection_window, DEFAULT_WINDOW)  # and what we let it send
        self._owed = 0
        self._credit_at = self._room // 2
        self._stream_room = DEFAULT_WINDOW  # of a new stream; ours holds once the peer has acknowledged it
        self._stream_credit_at = max(1, limits.body_window // 2)
        self._peer_window = DEFAULT_WINDOW
        self._peer_frame_size = DEFAULT_FRAME_SIZE
        self._peer_table_size = DEFAULT_TABLE_SIZE
        self._table_update = b""  # what the next header block begins with

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    # -- sending ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        payload = b"".join(
            [key.to_bytes(2, "big") + value.to_bytes(4, "big") for key, value in self.our_settings().items()]
        )
        self.out.append(FRAME_START.pack(len(payload) << 8 | SETTINGS, 0, 0) + payload)
        if self._room > DEFAULT_WINDOW:
            self.out.append(NUMBER_FRAME.pack(WINDOW_UPDATE_START, 0, 0, self._room - DEFAULT_WINDOW))

    def send_interim(self, stream_id: int, status: int, fields: Sequence[tuple[bytes, bytes]]) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.status:
            self._send_block(stream_id, encode_status(status) + encode_fields(fields), 0)

    def send_head(
        self, stream_id: int, status: int, fields: Sequence[tuple[bytes, bytes]], end: bool
    ) -> None:
        stream = self._streams.get(stream_id)
        if stream is None or stream.answered:
            return
        stream.status = status
        self._send_block(stream_id, encode_status(status) + encode_fields(fields), END_STREAM if end else 0)
        if end:
            self._end_response(stream_id, stream)

    def room(self, stream_id: int) -> int:
        stream = self._streams.get(stream_id)
        if stream is None or stream.answered:
            return 0
        return max(0, min(stream.window, self._window))

    def stream_room(self, stream_id: int) -> int:
        stream = self._streams.get(stream_id)
        return 0 if stream is None or stream.answered else max(0, stream.window)

    def send_data(self, stream_id: int, data: bytes | memoryview, end: bool) -> None:
        stream = self._streams.get(stream_id)
        if stream is None or stream.answered:
            return
        size = len(data)
        assert size <= max(0, min(stream.window, self._window)), (
            f"{size} bytes are more than the windows allow"
        )
        self._window -= size
        stream.window -= size
        out = self.out
        step = self._peer_frame_size
        if size <= step:
            # DATA is 0: only the length stands in the first number.
            out.append(FRAME_START.pack(size << 8, END_STREAM if end else 0, stream_id))
            if size:
                out.append(bytes(data))
        else:
            for at in range(0, size, step):
                part = bytes(data[at : at + step])
                flags = END_STREAM if end and at + step >= size else 0
                out.append(FRAME_START.pack(len(part) << 8, flags, stream_id))
                out.append(part)
        if end:
            self._end_response(stream_id, stream)
        else:
            self.gain_data(size, min(stream.window, self._window))

    def send_trailers(self, stream_id: int, fields: Sequence[tuple[bytes, bytes]]) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.answered:
            self._send_block(stream_id, encode_fields(fields), END_STREAM)
            self._end_response(stream_id, stream)

    def reset(self, stream_id: int, code: int) -> None:
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            self._send_reset(stream_id, code, stream.ended, stream.room)

    def _send_block(self, stream_id: int, block: bytes, flags: int) -> None:
        """A header block as HEADERS and, where it is larger than the peer's frames, CONTINUATION."""
        if self._table_update:
            block = self._table_update + block
            self._table_update = b""
        step = self._peer_frame_size
        if len(block) <= step:
            self.out.append(
                FRAME_START.pack(len(block) << 8 | HEADERS, flags | END_HEADERS, stream_id) + block
            )
            return
        kind = HEADERS
        for at in range(0, len(block), step):
            part = block[at : at + step]
            if at + step >= len(block):
                flags |= END_HEADERS
            self.out.append(FRAME_START.pack(len(part) << 8 | kind, flags, stream_id) + part)
            kind, flags = CONTINUATION, 0

    def _send_reset(self, stream_id: int, code: int, ended: bool, room: int) -> None:
        """RST_STREAM; the stream is out of the table already, or was never in it.

        Unless the request has ended, as much may be on its way as there was room for. A peer that acknowledges our
        SETTINGS only now may have found more.
        """
        room += max(0, self._limits.body_window - self._stream_room)
        self._remember(stream_id, RESET_BY_US, 0 if ended else max(0, room))
        self.out.append(self.reset_frame(stream_id, code))

    def _end_response(self, stream_id: int, stream: Stream) -> None:
        if self._spent:
            self.gain_response()
        if stream.ended:
            del self._streams[stream_id]
            self._remember(stream_id, FINISHED)
        elif stream.connect and 200 <= stream.status < 300:
            stream.answered = True  # the other direction may go on
        else:
            del self._streams[stream_id]
            self._send_reset(stream_id, ErrorCode.NO_ERROR, False, stream.room)

    def end_stream_by_error(self, stream_id: int, code: ErrorCode) -> None:
        stream = self._streams.pop(stream_id)
        self._send_reset(stream_id, code, stream.ended, stream.room)
        self._sink.stream_reset(stream_id, code)
        self.spend_reset()

    # -- flow control ----------------------------------------------------------------------------------------

    def acknowledge(self, stream_id: int, flow_size: int) -> None:
        self._owed = owed = self._owed + flow_size
        if owed >= self._credit_at or owed >= self._room:
            self.give_credit()
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.ended:
            stream.owed = owed = stream.owed + flow_size
            if owed >= self._stream_credit_at:
                stream.owed = 0
                stream.room += owed
                self.out.append(NUMBER_FRAME.pack(WINDOW_UPDATE_START, 0, stream_id, owed))

    def give_credit(self) -> None:
        """Give back to the connection's window what is owed to it: half of the window, or of what is left of it.

        The rest may have been sent on streams that are not read, and half of the whole would never be owed.
        """
        owed, self._owed = self._owed, 0
        if owed:
            self._room += owed
            self.out.append(NUMBER_FRAME.pack(WINDOW_UPDATE_START, 0, 0, owed))

    def apply_our_settings(self) -> None:
        """The peer has acknowledged our SETTINGS: from now on it keeps to our window (RFC 9113 section 6.9.2)."""
        change = self._limits.body_window - self._stream_room
        self._stream_room += change
        for stream in self._streams.values():
            stream.room += change

    # -- closed streams --------------------------------------------------------------------------------------

    def _remember(self, stream_id: int, how: int, room: int = 0) -> None:
        self._closed[(stream_id >> 1) % len(self._closed)] = room << 33 | stream_id << 2 | how

    def _how_closed(self, stream_id: int) -> int:
        known = self._closed[(stream_id >> 1) % len(self._closed)]
        return known & 3 if known >> 2 & LARGEST_STREAM_ID == stream_id else 0

    def _was_on_its_way(self, stream_id: int, size: int) -> bool:
        """Whether so much DATA has a place in the room that a stream had when we reset it; it is used up by them."""
        at = (stream_id >> 1) % len(self._closed)
        known = self._closed[at]
        if known >> 2 & LARGEST_STREAM_ID != stream_id or known >> 33 < size:
            return False
        self._closed[at] = known - (size << 33)
        return True
