"""The reference engine of HTTP/2: streams, HPACK and flow control by the library h2.

Used by `http2.py` where the setting `http2_engine` says so, and by the differential tests as the oracle of
`frame_engine.py`. The bytes are cut into frames here and given to h2 one by one: it gives up the events of a whole
read when its last frame is wrong, and it waits for the whole of a frame that is too large. What ends a connection's
usefulness in h2 (GOAWAY either way) never gets to it, and rules about fields are `http2_requests.py`'s, as h2 ends the
connection where the RFC wants a stream's end.
"""

from __future__ import annotations

from collections.abc import Sequence

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    DataReceived,
    Event,
    PingAckReceived,
    RemoteSettingsChanged,
    RequestReceived,
    SettingsAcknowledged,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes
from hpack import HeaderTuple, HPACKError, NeverIndexedHeaderTuple, OversizedHeaderListError

from trioserve.errors import RequestRefused
from trioserve.http.http2_base import FRAME_START, EngineBase, priority_update_target
from trioserve.http.http2_codes import (
    ACK,
    CONTINUATION,
    DATA,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    LARGEST_STREAM_ID,
    PING,
    PREFACE,
    PRIORITY,
    PRIORITY_UPDATE,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    ErrorCode,
)
from trioserve.http.http2_engine import Fields, Http2Limits, Http2Sink, RequestHead
from trioserve.http.http2_requests import (
    MalformedRequest,
    check_values,
    list_size,
    read_head,
    read_trailers,
)

# Kept out of the compression context (RFC 7541 section 7.1.3).
_SECRET = frozenset({b"set-cookie", b"authorization", b"proxy-authorization", b"cookie"})


class _Connection(H2Connection):
    """h2's, remembering as many closed streams as we do."""

    MAX_CLOSED_STREAMS = 256


class _Stream:
    """What is known of an open stream beside h2."""

    __slots__ = ("answered", "connect", "ended", "missing", "refused", "status")

    def __init__(self, *, ended: bool, connect: bool) -> None:
        self.ended = ended  # the request
        self.answered = False  # the response is complete
        self.connect = connect
        self.missing: int | None = (
            None  # bytes of body still to come by Content-Length; h2 forgets about trailers
        )
        self.refused = False
        self.status = 0  # of the response


class H2Engine(EngineBase):
    """h2 behind the engine interface."""

    __slots__ = (
        "_block_frames", "_block_size", "_block_stream", "_buffer", "_connection", "_preface", "_reset_here",
        "_settings_seen", "_streams",
    )  # fmt: skip

    def __init__(self, sink: Http2Sink, limits: Http2Limits) -> None:
        super().__init__(sink, limits)
        self._connection = _Connection(
            H2Configuration(
                client_side=False,
                validate_inbound_headers=False,
                normalize_inbound_headers=False,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self._streams: dict[int, _Stream] = {}
        # The last streams that were reset by us: what comes is in flight, and so much DATA may be.
        self._reset_here: dict[int, int] = {}
        self._buffer = bytearray()
        self._preface = PREFACE
        self._settings_seen = False
        self._block_stream = 0  # whose head is not complete
        self._block_size = 0
        self._block_frames = 0

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    @property
    def in_head(self) -> bool:
        buffer = self._buffer
        return bool(self._block_stream) or (len(buffer) > 3 and buffer[3] in (HEADERS, CONTINUATION))

    # -- sending ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        connection, limits = self._connection, self._limits
        connection.initiate_connection()
        connection.clear_outbound_data_buffer()
        # Streams are counted here: h2 would end the connection over one too many.
        connection.local_settings.update({SettingCodes.MAX_CONCURRENT_STREAMS: 2**31 - 1})
        connection.local_settings.acknowledge()
        connection.update_settings(dict(self.our_settings()))
        connection.local_settings[SettingCodes.MAX_CONCURRENT_STREAMS] = 2**31 - 1
        connection.decoder.max_header_list_size = limits.max_header_list_size * limits.block_factor
        if limits.connection_window > DEFAULT_WINDOW:
            connection.increment_flow_control_window(limits.connection_window - DEFAULT_WINDOW)
        self._flush()

    def send_interim(self, stream_id: int, status: int, fields: Sequence[tuple[bytes, bytes]]) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.status:
            self._connection.send_headers(stream_id, _secured(status, fields))
            self._flush()

    def send_head(
        self, stream_id: int, status: int, fields: Sequence[tuple[bytes, bytes]], end: bool
    ) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.answered:
            stream.status = status
            self._connection.send_headers(stream_id, _secured(status, fields), end_stream=end)
            self._flush()
            if end:
                self._end_response(stream_id, stream)

    def room(self, stream_id: int) -> int:
        stream = self._streams.get(stream_id)
        if stream is None or stream.answered:
            return 0
        return max(0, self._connection.local_flow_control_window(stream_id))

    def stream_room(self, stream_id: int) -> int:
        stream = self._streams.get(stream_id)
        if stream is None or stream.answered:
            return 0
        return max(0, self._connection.streams[stream_id].outbound_flow_control_window)

    def send_data(self, stream_id: int, data: bytes | memoryview, end: bool) -> None:
        stream = self._streams.get(stream_id)
        if stream is None or stream.answered:
            return
        connection = self._connection
        step = connection.max_outbound_frame_size
        for at in range(0, len(data), step) or (0,):
            part = bytes(data[at : at + step])
            connection.send_data(stream_id, part, end_stream=end and at + step >= len(data))
            if part:
                self.gain_data(
                    len(part), connection.local_flow_control_window(stream_id) if not end else len(part)
                )
        self._flush()
        if end:
            self._end_response(stream_id, stream)

    def send_trailers(self, stream_id: int, fields: Sequence[tuple[bytes, bytes]]) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.answered:
            self._connection.send_headers(stream_id, _secured(None, fields), end_stream=True)
            self._flush()
            self._end_response(stream_id, stream)

    def reset(self, stream_id: int, code: int) -> None:
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            self._send_reset(stream_id, code, stream.ended)

    def acknowledge(self, stream_id: int, flow_size: int) -> None:
        self._connection.acknowledge_received_data(flow_size, stream_id)
        self._flush()

    def _end_response(self, stream_id: int, stream: _Stream) -> None:
        self.gain_response()
        if stream.ended:
            del self._streams[stream_id]
        elif stream.connect and 200 <= stream.status < 300:
            stream.answered = True  # the other direction may go on
        else:
            del self._streams[stream_id]
            self._send_reset(stream_id, ErrorCode.NO_ERROR, False)

    def _remember_reset(self, stream_id: int, ended: bool) -> None:
        known = self._reset_here
        room = 0
        if not ended:
            room = self._connection.streams[stream_id].inbound_flow_control_window
            if not self.settings_acknowledged:
                room += max(0, self._limits.body_window - DEFAULT_WINDOW)
        known[stream_id] = room
        if len(known) > self._limits.closed_streams:
            del known[next(iter(known))]

    def _was_on_its_way(self, stream_id: int, size: int) -> bool:
        """Whether so much DATA has a place in the room that a stream had when we reset it; it is used up by them."""
        room = self._reset_here.get(stream_id, 0)
        if not 0 < size <= room:
            return False
        self._reset_here[stream_id] = room - size
        return True

    def _send_reset(self, stream_id: int, code: int, ended: bool) -> None:
        self._remember_reset(stream_id, ended)
        self._connection.reset_stream(stream_id, code)
        self._flush()

    def _flush(self) -> None:
        data = self._connection.data_to_send()
        if data:
            self.out.append(data)

    # -- receiving -------------------------------------------------------------------------------------------

    def receive(self, data: bytes, now: float) -> None:
        self._now = now
        buffer = self._buffer
        buffer += data
        self.gain_read()
        if self._preface:
            size = min(len(buffer), len(self._preface))
            if buffer[:size] != self._preface[:size]:
                self.fault(ErrorCode.PROTOCOL_ERROR, "no HTTP/2 connection preface")
            if size < len(self._preface):
                return
            self._connection.receive_data(self._preface)
            del buffer[:size]
            self._preface = b""
        while len(buffer) >= 9:
            start, flags, stream_id = FRAME_START.unpack_from(buffer)
            length = start >> 8
            if length > self._limits.max_frame_size:
                self.fault(ErrorCode.FRAME_SIZE_ERROR, f"frame of {length} bytes")
            if len(buffer) < 9 + length:
                break
            frame = bytes(buffer[: 9 + length])
            del buffer[: 9 + length]
            self._receive_frame(start & 0xFF, flags, stream_id & LARGEST_STREAM_ID, frame)

    def _receive_frame(self, kind: int, flags: int, stream_id: int, frame: bytes) -> None:
        length = len(frame) - 9
        if not self._settings_seen:
            if kind != SETTINGS or flags & ACK:
                self.fault(ErrorCode.PROTOCOL_ERROR, "the first frame is no SETTINGS")
            self._settings_seen = True
        if (kind == CONTINUATION or self._block_stream) and (
            kind != CONTINUATION or stream_id != self._block_stream
        ):
            self.fault(ErrorCode.PROTOCOL_ERROR, f"frame of type {kind} where no such may come")
        if kind in (HEADERS, CONTINUATION):
            self._count_block(flags, stream_id, length)
        elif kind == DATA:
            if length == 0 and not flags & END_STREAM:
                self.spend_control()
        elif kind == SETTINGS:
            self.spend_control(1 + length // 48)
        elif kind == GOAWAY:
            self.spend_control()
            self.receive_goaway(stream_id, frame[9:])
            return
        elif kind == PRIORITY:
            self.spend_control()
            self.receive_priority(stream_id, length, stream_id in self._streams)
            return
        elif kind == PRIORITY_UPDATE:
            self.spend_control()
            self.receive_priority_update(
                stream_id, frame[9:], priority_update_target(frame[9:]) in self._streams
            )
            return
        elif kind == RST_STREAM:
            if self.is_idle(stream_id):
                self.fault(ErrorCode.PROTOCOL_ERROR, "RST_STREAM on a stream that is not open yet")
            if stream_id not in self._streams:
                self.spend_control()
        elif kind == WINDOW_UPDATE:
            self.spend_window_update()
        elif kind == PING:
            self.spend_control()
        elif kind == PUSH_PROMISE:
            self.fault(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE from a client")
        else:
            self.spend_control()  # unknown: to be ignored (RFC 9113 section 5.5)
            return
        self._feed(kind, stream_id, frame)

    def _count_block(self, flags: int, stream_id: int, length: int) -> None:
        """The bounds of an encoded head: we must keep all of it before HPACK can look at it."""
        self._block_stream = 0 if flags & END_HEADERS else stream_id
        self._block_size += length
        self._block_frames += 1
        if (
            self._block_size > self._limits.max_header_list_size * self._limits.block_factor
            or self._block_frames > 1 + self._limits.continuation_frames
        ):
            self.fault(
                ErrorCode.ENHANCE_YOUR_CALM,
                f"a head of {self._block_frames} frames, {self._block_size} bytes",
            )
        if flags & END_HEADERS:
            self._block_size = self._block_frames = 0

    def _feed(self, kind: int, stream_id: int, frame: bytes) -> None:
        connection = self._connection
        closed = 0 < stream_id <= self.last_stream_id and stream_id not in self._streams
        try:
            events = connection.receive_data(frame)
        except ProtocolError as error:
            connection.clear_outbound_data_buffer()
            code = ErrorCode(error.error_code)
            if isinstance(error.__cause__, OversizedHeaderListError):
                code = ErrorCode.ENHANCE_YOUR_CALM
            elif isinstance(error.__cause__, HPACKError):
                code = ErrorCode.COMPRESSION_ERROR
            self.fault(code, str(error) or type(error).__name__)
        answer = connection.data_to_send()
        late = closed and kind in (DATA, HEADERS, CONTINUATION) and not self._block_stream
        in_flight = stream_id in self._reset_here
        if late and in_flight and answer[-10:-9] == b"\x03":
            # h2 resets a closed stream again and again. Not where the frame had been on its way (RFC 9113 section 5.1).
            answer = answer[:-13]
        if answer:
            self.out.append(answer)
        if late and not (kind == DATA and self._was_on_its_way(stream_id, len(frame) - 9)):
            self.spend_control()
            if not in_flight:
                self.spend_reset()
        for event in events:
            self._take(event)

    def _take(self, event: Event) -> None:
        match event:
            case RequestReceived(stream_id=stream_id, headers=headers):
                self._begin(stream_id, headers, event.stream_ended is not None)
            case DataReceived(stream_id=stream_id):
                self._take_data(stream_id, event)
            case TrailersReceived(stream_id=stream_id, headers=headers):
                self._take_trailers(stream_id, headers)
            case StreamReset(stream_id=stream_id):
                stream = self._streams.pop(stream_id, None)
                if not event.remote_reset:
                    self._remember_reset(stream_id, stream is None or stream.ended)
                if stream is not None:
                    self._sink.stream_reset(stream_id, int(event.error_code))
                    if not stream.status or not event.remote_reset:
                        self.spend_reset()
            case WindowUpdated(stream_id=stream_id):
                if not stream_id or stream_id in self._streams:
                    self._sink.window_opened(stream_id)
            case RemoteSettingsChanged():
                if SettingCodes.INITIAL_WINDOW_SIZE in event.changed_settings:
                    self._sink.window_opened(0)
            case SettingsAcknowledged():
                self.settings_acknowledged = True
                limits = self._limits
                self._connection.local_settings.acknowledge()  # of the streams, which are counted here
                self._connection.decoder.max_header_list_size = (
                    limits.max_header_list_size * limits.block_factor
                )
            case PingAckReceived():
                self.last_pong = event.ping_data

    def _begin(self, stream_id: int, fields: Sequence[tuple[bytes, bytes]], ended: bool) -> None:
        self.last_stream_id = stream_id
        if len(self._streams) >= self._limits.max_concurrent_streams or stream_id > self._goaway_last:
            self._send_reset(stream_id, ErrorCode.REFUSED_STREAM, ended)
            if stream_id <= self._goaway_last:
                self.spend_reset()
            return
        head = RequestHead(ended=ended)
        plain = [(bytes(name), bytes(value)) for name, value in fields]
        stream = _Stream(ended=ended, connect=(b":method", b"CONNECT") in plain)
        try:
            check_values(plain)
            read_head(head, plain, list_size(plain), self._limits)
        except MalformedRequest as error:
            self._send_reset(stream_id, error.code, ended)
            self.spend_reset()
            return
        except RequestRefused as error:
            stream.refused = True
            self._streams[stream_id] = stream
            self._sink.request_refused(stream_id, head, error.status, error.reason)
            return
        if self._idle_priorities and (known := self.take_idle_priority(stream_id)) is not None:
            head.urgency, head.incremental = known
        stream.missing = head.content_length
        self._streams[stream_id] = stream
        self._sink.request_begun(stream_id, head)

    def _take_data(self, stream_id: int, event: DataReceived) -> None:
        stream = self._streams.get(stream_id)
        data, size = event.data or b"", event.flow_controlled_length or 0
        if stream is None or stream.refused:
            spare = size
        else:
            spare = size - len(data)
            if stream.missing is not None:
                stream.missing -= len(data)
            if data:
                self._sink.data_received(stream_id, bytes(data), len(data))
        if spare:
            self.acknowledge(stream_id, spare)
        if event.stream_ended is not None and stream_id in self._streams and stream is not None:
            self._end_request(stream_id, stream, [])

    def _take_trailers(self, stream_id: int, fields: Sequence[tuple[bytes, bytes]]) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        plain = [(bytes(name), bytes(value)) for name, value in fields]
        try:
            if stream.missing:
                raise MalformedRequest("a body shorter than its Content-Length")
            check_values(plain)
            trailers = read_trailers(plain, list_size(plain), self._limits)
        except MalformedRequest as error:
            self.end_stream_by_error(stream_id, error.code)
        else:
            self._end_request(stream_id, stream, trailers)

    def _end_request(self, stream_id: int, stream: _Stream, trailers: Fields) -> None:
        stream.ended = True
        if stream.answered:
            del self._streams[stream_id]
        if not stream.refused:
            self._sink.request_ended(stream_id, trailers)

    def end_stream_by_error(self, stream_id: int, code: ErrorCode) -> None:
        stream = self._streams.pop(stream_id)
        self._send_reset(stream_id, code, stream.ended)
        self._sink.stream_reset(stream_id, code)
        self.spend_reset()


def _secured(status: int | None, fields: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Fields for h2, with those that compression must not remember marked."""
    marked: list[tuple[bytes, bytes]] = []
    if status is not None:
        marked.append(HeaderTuple(b":status", b"%d" % status))
    for name, value in fields:
        marked.append(NeverIndexedHeaderTuple(name, value) if name in _SECRET else HeaderTuple(name, value))
    return marked
