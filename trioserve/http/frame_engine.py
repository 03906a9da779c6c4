"""Our own engine of HTTP/2: frames and streams over `hpack_decoder.py` and `hpack_encoder.py`, made for speed.

Used by `http2.py`. `receive` walks the frames of a read in one loop, without an object per frame; a whole HEADERS or
DATA frame without padding takes the short way. What is sent, and the windows, are `frame_streams.py`'s; the rules
about fields `http2_requests.py`'s, the budgets against abuse `http2_base.py`'s. The library h2, behind `h2_engine.py`,
is the oracle of the differential tests.
"""

from __future__ import annotations

from trioserve.errors import RequestRefused
from trioserve.http.frame_streams import (
    FINISHED,
    RESET_BY_PEER,
    RESET_BY_US,
    FrameStreams,
    Stream,
)
from trioserve.http.hpack_decoder import HeadTooLarge, HpackDecoder, HpackError
from trioserve.http.hpack_encoder import NO_TABLE
from trioserve.http.http2_base import FRAME_START, PING_START, priority_update_target
from trioserve.http.http2_codes import (
    ACK,
    CONTINUATION,
    DATA,
    DEFAULT_FRAME_SIZE,
    ENABLE_CONNECT_PROTOCOL,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADER_TABLE_SIZE,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    LARGEST_FRAME_SIZE,
    LARGEST_STREAM_ID,
    LARGEST_WINDOW,
    MAX_FRAME_SIZE,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PRIORITY_UPDATE,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    WITH_PRIORITY,
    ErrorCode,
)
from trioserve.http.http2_engine import Fields, Http2Limits, Http2Sink, RequestHead
from trioserve.http.http2_requests import MalformedRequest, check_values, read_head, read_trailers

_FRAME_START_SIZE = 9

# Frames in one turn: of the smallest a read has thousands, which would take 30 ms and more.
_FRAMES_PER_TURN = 512

# The flags of a HEADERS frame that decide its way.
_HEADERS_FORM = END_HEADERS | PADDED | WITH_PRIORITY


class FrameEngine(FrameStreams):
    """The receiving half; see `Http2Engine`."""

    __slots__ = (
        "_block", "_block_ends", "_block_limit", "_block_size", "_block_stream", "_decoder", "_held", "_missing",
        "_opened",
    )  # fmt: skip

    def __init__(self, sink: Http2Sink, limits: Http2Limits) -> None:
        super().__init__(sink, limits)
        self._block_limit = limits.max_header_list_size * limits.block_factor
        self._decoder = HpackDecoder(self._block_limit)
        self._held = bytearray()  # the beginning of what is not whole
        self._missing = 0  # how many bytes make it worth looking again; 0: nothing is held
        self._opened = False  # the preface and the start of a SETTINGS frame were seen
        self._block: list[bytes] = []  # fragments of a head that is not whole
        self._block_stream = 0  # its stream; 0: there is none
        self._block_ends = False  # it has END_STREAM
        self._block_size = 0

    @property
    def in_head(self) -> bool:
        if self._block_stream:
            return True
        return len(self._held) > 3 and self._opened and not self.held and self._held[3] == HEADERS

    def receive(self, data: bytes, now: float) -> None:
        self._now = now
        if self._spent and data:
            self.gain_read()
        if self._missing:
            self._held += data
            if len(self._held) < self._missing:
                return
            data = bytes(self._held)
            self._held.clear()
            self._missing = 0
            self.held = False
        at = 0 if self._opened else self._receive_opening(data)
        end = len(data)
        largest = self._limits.max_frame_size
        unpack = FRAME_START.unpack_from
        left = _FRAMES_PER_TURN
        while end - at >= _FRAME_START_SIZE:
            if not left:
                self.held = True
                break
            left -= 1
            start, flags, stream_id = unpack(data, at)
            length = start >> 8
            if length > largest:
                self.fault(ErrorCode.FRAME_SIZE_ERROR, f"frame of {length} bytes")
            stop = at + _FRAME_START_SIZE + length
            if stop > end:
                self._missing = stop - at
                break
            payload = data[at + _FRAME_START_SIZE : stop]
            at = stop
            kind = start & 0xFF
            stream_id &= LARGEST_STREAM_ID
            if self._block_stream:
                self._continue_block(kind, flags, stream_id, payload)
            elif kind == HEADERS:
                if flags & _HEADERS_FORM == END_HEADERS and stream_id:
                    self._receive_block(stream_id, payload, bool(flags & END_STREAM))
                else:
                    self._begin_block(flags, stream_id, payload)
            elif kind == DATA:
                self._receive_data(flags, stream_id, payload)
            else:
                self._receive_other(kind, flags, stream_id, payload)
        if at < end:
            self._held += data[at:]
            if not self._missing:
                self._missing = _FRAME_START_SIZE

    def _receive_opening(self, data: bytes) -> int:
        """The preface and, behind it, the start of a SETTINGS frame (RFC 9113 section 3.4); where to go on."""
        size = len(PREFACE)
        if data[:size] != PREFACE[: len(data)]:
            self.fault(ErrorCode.PROTOCOL_ERROR, "no HTTP/2 connection preface")
        if len(data) < size + _FRAME_START_SIZE:
            self._held += data
            self._missing = len(data) + 1
            return len(data)
        start, flags, _ = FRAME_START.unpack_from(data, size)
        if start >> 8 > self._limits.max_frame_size:
            self.fault(ErrorCode.FRAME_SIZE_ERROR, f"frame of {start >> 8} bytes")
        if start & 0xFF != SETTINGS or flags & ACK:
            self.fault(ErrorCode.PROTOCOL_ERROR, "the first frame is no SETTINGS")
        self._opened = True
        return size

    # -- heads -----------------------------------------------------------------------------------------------

    def _begin_block(self, flags: int, stream_id: int, payload: bytes) -> None:
        """A HEADERS frame that is padded, has RFC 7540's priority, or is not the whole head."""
        if not stream_id:
            self.fault(ErrorCode.PROTOCOL_ERROR, "HEADERS without a stream")
        begin, end = 0, len(payload)
        if flags & WITH_PRIORITY and end < (6 if flags & PADDED else 5):
            self.fault(ErrorCode.FRAME_SIZE_ERROR, f"HEADERS of {end} bytes with priority")
        if flags & PADDED:
            begin, end = self._find_padding(payload)
        if flags & WITH_PRIORITY:
            begin += 5
        if begin > end:
            self.fault(ErrorCode.PROTOCOL_ERROR, "more padding than frame")
        if flags & END_HEADERS:
            self._receive_block(stream_id, payload[begin:end], bool(flags & END_STREAM))
            return
        self._block_stream = stream_id
        self._block_ends = bool(flags & END_STREAM)
        self._block_size = 0
        self._add_to_block(payload[begin:end])

    def _continue_block(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        """Nothing but CONTINUATION may come now (RFC 9113 section 6.10)."""
        if kind != CONTINUATION or stream_id != self._block_stream:
            self.fault(ErrorCode.PROTOCOL_ERROR, f"frame of type {kind} within a head")
        self._add_to_block(payload)
        if flags & END_HEADERS:
            block = b"".join(self._block)
            self._block.clear()
            self._block_stream = 0
            self._receive_block(stream_id, block, self._block_ends)

    def _add_to_block(self, fragment: bytes) -> None:
        """All of it must be kept until HPACK can look at it: bounded in bytes and in frames."""
        self._block.append(fragment)
        self._block_size += len(fragment)
        if self._block_size > self._block_limit or len(self._block) > 1 + self._limits.continuation_frames:
            self.fault(
                ErrorCode.ENHANCE_YOUR_CALM, f"a head of {len(self._block)} frames, {self._block_size} bytes"
            )

    def _receive_block(self, stream_id: int, block: bytes, ended: bool) -> None:
        """A whole header block: a request, or trailers."""
        if len(block) > self._block_limit:
            self.fault(ErrorCode.ENHANCE_YOUR_CALM, f"a head of {len(block)} bytes")
        try:
            fields = self._decoder.decode(block)
        except HeadTooLarge as error:
            self.fault(ErrorCode.ENHANCE_YOUR_CALM, f"a header list {error}")
        except HpackError as error:
            self.fault(ErrorCode.COMPRESSION_ERROR, str(error))
        streams = self._streams
        stream = streams.get(stream_id)
        if stream is not None:
            self._receive_trailers(stream_id, stream, fields, ended)
            return
        if stream_id <= self.last_stream_id or not stream_id & 1:
            self._receive_misplaced(stream_id)
            return
        self.last_stream_id = stream_id
        limits = self._limits
        if len(streams) >= limits.max_concurrent_streams or stream_id > self._goaway_last:
            self._send_reset(stream_id, ErrorCode.REFUSED_STREAM, ended, self._stream_room)
            if stream_id <= self._goaway_last:
                self.spend_reset()
            return
        head = RequestHead(ended=ended)
        try:
            if self._decoder.suspicious:
                check_values(fields)
            read_head(head, fields, self._decoder.size, limits)
        except MalformedRequest as error:
            self._send_reset(stream_id, error.code, ended, self._stream_room)
            self.spend_reset()
            return
        except RequestRefused as error:
            streams[stream_id] = stream = Stream(self._peer_window, self._stream_room, ended)
            stream.refused = True
            self._sink.request_refused(stream_id, head, error.status, error.reason)
            return
        streams[stream_id] = stream = Stream(self._peer_window, self._stream_room, ended)
        if not ended:
            stream.expected = head.content_length
        if head.method == "CONNECT":
            stream.connect = True
        if self._idle_priorities and (known := self.take_idle_priority(stream_id)) is not None:
            head.urgency, head.incremental = known
        self._sink.request_begun(stream_id, head)

    def _receive_misplaced(self, stream_id: int) -> None:
        """A head on a stream that a client cannot open, or not any more."""
        how = self._how_closed(stream_id)
        if how == FINISHED:
            self.fault(ErrorCode.STREAM_CLOSED, f"HEADERS on stream {stream_id}, which is closed")
        if how == 0:
            self.fault(ErrorCode.PROTOCOL_ERROR, f"stream {stream_id} is even, or lower than one before it")
        self._receive_late(stream_id, how)

    def _receive_late(self, stream_id: int, how: int) -> None:
        """HEADERS, or DATA that nothing excuses, on a stream that is closed; the connection's state is up to date."""
        self.spend_control()
        if how != RESET_BY_US:
            self.out.append(self.reset_frame(stream_id, ErrorCode.STREAM_CLOSED))
            self.spend_reset()

    def _receive_trailers(self, stream_id: int, stream: Stream, fields: Fields, ended: bool) -> None:
        if stream.ended:
            self.end_stream_by_error(stream_id, ErrorCode.STREAM_CLOSED)
        elif not ended or stream.expected:
            # RFC 9113 section 8.1: a second head that is no end, or too short a body.
            self.end_stream_by_error(stream_id, ErrorCode.PROTOCOL_ERROR)
        else:
            try:
                check_values(fields)
                trailers = read_trailers(fields, self._decoder.size, self._limits)
            except MalformedRequest as error:
                self.end_stream_by_error(stream_id, error.code)
            else:
                self._end_request(stream_id, stream, trailers)

    def _end_request(self, stream_id: int, stream: Stream, trailers: Fields) -> None:
        stream.ended = True
        if stream.answered:
            del self._streams[stream_id]
            self._remember(stream_id, FINISHED)
        if not stream.refused:
            self._sink.request_ended(stream_id, trailers)

    # -- bodies ----------------------------------------------------------------------------------------------

    def _receive_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._room = room = self._room - size
        if room <= self._owed:
            if room < 0:
                self.fault(ErrorCode.FLOW_CONTROL_ERROR, "more DATA than the connection's window")
            self.give_credit()
        if not size and not flags & END_STREAM:
            self.spend_control()
        data = payload
        if flags & PADDED:
            begin, end = self._find_padding(payload)
            data = payload[begin:end]
        stream = self._streams.get(stream_id)
        if stream is None:
            if self.is_idle(stream_id):
                self.fault(ErrorCode.PROTOCOL_ERROR, f"DATA on stream {stream_id}, which is not open")
            self.acknowledge(0, size)
            if not size or not self._was_on_its_way(stream_id, size):
                self._receive_late(stream_id, self._how_closed(stream_id))
            return
        stream.room -= size
        taken = len(data)
        missing = stream.expected
        if missing is not None:
            stream.expected = missing = missing - taken
        code = None
        if stream.ended:
            code = ErrorCode.STREAM_CLOSED
        elif stream.room < 0:
            code = ErrorCode.FLOW_CONTROL_ERROR
        elif missing and (missing < 0 or flags & END_STREAM):
            code = ErrorCode.PROTOCOL_ERROR  # RFC 9113 section 8.1.1: not as long as Content-Length says
        if code is not None:
            self.acknowledge(0, size)
            self.end_stream_by_error(stream_id, code)
            return
        if stream.refused:
            self.acknowledge(0, size)
        else:
            if taken < size:
                self.acknowledge(stream_id, size - taken)
            if taken:
                self._sink.data_received(stream_id, data, taken)
        if flags & END_STREAM and stream_id in self._streams:
            self._end_request(stream_id, stream, [])

    def _find_padding(self, payload: bytes) -> tuple[int, int]:
        """Where the content of a padded frame begins and ends."""
        if not payload:
            self.fault(ErrorCode.FRAME_SIZE_ERROR, "a padded frame without its length of padding")
        end = len(payload) - payload[0]
        if end < 1:
            self.fault(ErrorCode.PROTOCOL_ERROR, "more padding than frame")
        return 1, end

    # -- the other frames ------------------------------------------------------------------------------------

    def _receive_other(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE:
            self.spend_window_update()
            self._receive_window_update(stream_id, payload)
        elif kind == RST_STREAM:
            self._receive_reset(stream_id, payload)
        elif kind == SETTINGS:
            self.spend_control(1 + len(payload) // 48)
            self._receive_settings(flags, stream_id, payload)
        elif kind == PING:
            self.spend_control()
            self._receive_ping(flags, stream_id, payload)
        elif kind == PRIORITY:
            self.spend_control()
            self.receive_priority(stream_id, len(payload), stream_id in self._streams)
        elif kind == PRIORITY_UPDATE:
            self.spend_control()
            self.receive_priority_update(stream_id, payload, priority_update_target(payload) in self._streams)
        elif kind == GOAWAY:
            self.spend_control()
            self.receive_goaway(stream_id, payload)
        elif kind in (PUSH_PROMISE, CONTINUATION):
            self.fault(ErrorCode.PROTOCOL_ERROR, f"frame of type {kind} where no such may come")
        else:
            self.spend_control()  # unknown: to be ignored (RFC 9113 section 5.5)

    def _receive_window_update(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            self.fault(ErrorCode.FRAME_SIZE_ERROR, f"WINDOW_UPDATE of {len(payload)} bytes")
        increment = int.from_bytes(payload, "big") & LARGEST_WINDOW
        if not stream_id:
            if not increment:
                self.fault(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
            self._window += increment
            if self._window > LARGEST_WINDOW:
                self.fault(ErrorCode.FLOW_CONTROL_ERROR, "a window of over 2**31 - 1")
            self._sink.window_opened(0)
            return
        stream = self._streams.get(stream_id)
        if stream is None:
            if self.is_idle(stream_id):
                self.fault(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE on a stream that is not open yet")
            return
        stream.window += increment
        if not increment:
            self.end_stream_by_error(stream_id, ErrorCode.PROTOCOL_ERROR)
        elif stream.window > LARGEST_WINDOW:
            self.end_stream_by_error(stream_id, ErrorCode.FLOW_CONTROL_ERROR)
        else:
            self._sink.window_opened(stream_id)

    def _receive_reset(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            self.fault(ErrorCode.FRAME_SIZE_ERROR, f"RST_STREAM of {len(payload)} bytes")
        if self.is_idle(stream_id):
            self.fault(ErrorCode.PROTOCOL_ERROR, "RST_STREAM on a stream that is not open yet")
        stream = self._streams.pop(stream_id, None)
        if stream is None:
            self.spend_control()
            return
        self._remember(stream_id, RESET_BY_PEER)
        self._sink.stream_reset(stream_id, int.from_bytes(payload, "big"))
        if not stream.status:
            self.spend_reset()

    def _receive_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            self.fault(ErrorCode.PROTOCOL_ERROR, "PING on a stream")
        if len(payload) != 8:
            self.fault(ErrorCode.FRAME_SIZE_ERROR, f"PING of {len(payload)} bytes")
        if flags & ACK:
            self.last_pong = payload
        else:
            self.out.append(FRAME_START.pack(PING_START, ACK, 0) + payload)

    def _receive_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            self.fault(ErrorCode.PROTOCOL_ERROR, "SETTINGS on a stream")
        if len(payload) % 6 or (flags & ACK and payload):
            self.fault(ErrorCode.FRAME_SIZE_ERROR, f"SETTINGS of {len(payload)} bytes")
        if flags & ACK:
            if not self.settings_acknowledged:
                self.settings_acknowledged = True
                self.apply_our_settings()
            return
        windows = False
        for at in range(0, len(payload), 6):
            key = int.from_bytes(payload[at : at + 2], "big")
            value = int.from_bytes(payload[at + 2 : at + 6], "big")
            if key == INITIAL_WINDOW_SIZE:
                windows = True
                self._change_windows(value)
            elif key == MAX_FRAME_SIZE:
                if not DEFAULT_FRAME_SIZE <= value <= LARGEST_FRAME_SIZE:
                    self.fault(ErrorCode.PROTOCOL_ERROR, f"MAX_FRAME_SIZE of {value}")
                self._peer_frame_size = value
            elif key in (ENABLE_PUSH, ENABLE_CONNECT_PROTOCOL):
                if value > 1:
                    self.fault(ErrorCode.PROTOCOL_ERROR, f"setting {key} of {value}")
            elif key == HEADER_TABLE_SIZE and value < self._peer_table_size:
                self._peer_table_size = 0
                self._table_update = NO_TABLE
        self.out.append(FRAME_START.pack(SETTINGS, ACK, 0))
        if windows:
            self._sink.window_opened(0)

    def _change_windows(self, value: int) -> None:
        """RFC 9113 section 6.9.2: what has been sent counts; a window may fall under 0."""
        if value > LARGEST_WINDOW:
            self.fault(ErrorCode.FLOW_CONTROL_ERROR, f"INITIAL_WINDOW_SIZE of {value}")
        change = value - self._peer_window
        self._peer_window = value
        if change:
            for stream in self._streams.values():
                stream.window += change
                if stream.window > LARGEST_WINDOW:
                    self.fault(ErrorCode.FLOW_CONTROL_ERROR, "a window of over 2**31 - 1")
