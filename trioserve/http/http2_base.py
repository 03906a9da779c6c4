"""What both HTTP/2 engines do alike: budgets against abuse, GOAWAY, PING, priorities, the frames that carry them.

`h2_engine.py` and `frame_engine.py` inherit from here.
"""

from __future__ import annotations

from struct import Struct
from typing import NoReturn

from trioserve.http.http2_codes import (
    DEFAULT_WINDOW,
    ENABLE_CONNECT_PROTOCOL,
    GOAWAY,
    INITIAL_WINDOW_SIZE,
    LARGEST_STREAM_ID,
    MAX_CONCURRENT_STREAMS,
    MAX_FRAME_SIZE,
    MAX_HEADER_LIST_SIZE,
    NO_RFC7540_PRIORITIES,
    PING,
    RST_STREAM,
    WINDOW_UPDATE,
    ErrorCode,
)
from trioserve.http.http2_engine import Http2Fault, Http2Limits, Http2Sink
from trioserve.http.http2_requests import read_priority

# How each frame begins: 24 bits of length and 8 of type as one number, flags, stream.
FRAME_START = Struct(">LBL")
# The same with one number, or two, as payload: RST_STREAM and WINDOW_UPDATE, GOAWAY.
NUMBER_FRAME = Struct(">LBLL")
_GOAWAY_FRAME = Struct(">LBLLL")
_PING_FRAME = Struct(">LBL8s")

RST_START = 4 << 8 | RST_STREAM
WINDOW_UPDATE_START = 4 << 8 | WINDOW_UPDATE
PING_START = 8 << 8 | PING


# So many bytes sent give one frame without content back (`Http2Limits.control_budget`).
_BYTES_FOR_ONE = 128


# As many WINDOW_UPDATEs may be owed to us: 8 MiB in frames of 1 KiB.
_MOST_ACKS_DUE = 16 * 1024


class EngineBase:
    """Common state of a connection; see `Http2Engine` for the public attributes."""

    __slots__ = (
        "_acks_due", "_control_left", "_goaway_last", "_idle_priorities", "_limits", "_now", "_resets_left",
        "_resets_since", "_sink", "_spent", "closing", "held", "last_pong", "last_stream_id", "out",
        "settings_acknowledged",
    )  # fmt: skip

    def __init__(self, sink: Http2Sink, limits: Http2Limits) -> None:
        self._sink = sink
        self._limits = limits
        self.out: list[bytes] = []
        self.last_stream_id = 0
        self.closing = False
        self.held = False
        self.settings_acknowledged = False
        self.last_pong: bytes | None = None
        self._goaway_last = LARGEST_STREAM_ID
        self._now = 0.0  # when the bytes came that are being looked at
        self._resets_left = limits.reset_budget
        self._resets_since = 0.0  # up to when time has given back
        self._control_left = limits.control_budget
        self._acks_due = 0  # WINDOW_UPDATEs that DATA of ours have called for
        self._spent = False  # something was taken from the budgets and is not back
        self._idle_priorities: dict[int, tuple[int, bool]] = {}

    @property
    def out_size(self) -> int:
        return sum(map(len, self.out))

    def our_settings(self) -> dict[int, int]:
        """What differs from HTTP/2's defaults, or that a client had better hear."""
        limits = self._limits
        settings = {
            MAX_CONCURRENT_STREAMS: limits.max_concurrent_streams,
            MAX_HEADER_LIST_SIZE: limits.max_header_list_size,
            ENABLE_CONNECT_PROTOCOL: 1,
            NO_RFC7540_PRIORITIES: 1,
        }
        if limits.body_window != DEFAULT_WINDOW:
            settings[INITIAL_WINDOW_SIZE] = limits.body_window
        if limits.max_frame_size != 16384:
            settings[MAX_FRAME_SIZE] = limits.max_frame_size
        return settings

    def go_away(self, code: int = 0, *, last_stream_id: int | None = None, reason: bytes = b"") -> None:
        """See `Http2Engine.go_away`."""
        last = self.last_stream_id if last_stream_id is None else last_stream_id
        # An id may only become lower (RFC 9113 section 6.8).
        self._goaway_last = last = min(last, self._goaway_last)
        self.closing = self.closing or last < LARGEST_STREAM_ID
        start = _GOAWAY_FRAME.pack(8 + len(reason) << 8 | GOAWAY, 0, 0, last, code)
        self.out.append(start + reason if reason else start)

    def ping(self, payload: bytes) -> None:
        """See `Http2Engine.ping`."""
        self.out.append(_PING_FRAME.pack(PING_START, 0, 0, payload))

    def is_idle(self, stream_id: int) -> bool:
        """Not opened by the peer, which can open odd ones only; 0 is no stream at all."""
        return stream_id > self.last_stream_id or not stream_id & 1

    @staticmethod
    def reset_frame(stream_id: int, code: int) -> bytes:
        """RST_STREAM."""
        return NUMBER_FRAME.pack(RST_START, 0, stream_id, code)

    def fault(self, code: ErrorCode, reason: str) -> NoReturn:
        """End the connection: GOAWAY, and the exception that tells the driver."""
        self.go_away(code, reason=reason.encode("ascii", "replace")[:128])
        raise Http2Fault(code, reason)

    # -- budgets ---------------------------------------------------------------------------------------------

    def spend_reset(self) -> None:
        """A stream came to nothing by the peer's doing."""
        if self._resets_left == self._limits.reset_budget:
            self._resets_since = self._now  # there was nothing that time could have given back
        self._spent = True
        self._resets_left -= 1
        if self._resets_left < 0:
            self.fault(ErrorCode.ENHANCE_YOUR_CALM, "too many streams that came to nothing")

    def spend_control(self, cost: int = 1) -> None:
        """A frame that carries nothing."""
        self._spent = True
        self._control_left -= cost
        if self._control_left < 0:
            self.fault(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that carry nothing")

    def gain_response(self) -> None:
        """A response is complete: that was useful."""
        self._gain(8, 1)

    def gain_data(self, size: int, room: int) -> None:
        """DATA was sent, in one frame or more; `room` is what the windows still allow.

        Peers acknowledge by the piece they have taken, which may be a kilobyte, on the stream and on the connection.
        """
        due = self._acks_due + size // _BYTES_FOR_ONE + (2 if room > 0 else 0)
        self._acks_due = min(due, _MOST_ACKS_DUE)

    def spend_window_update(self) -> None:
        """One that answers DATA is free, whenever it comes: a window's worth of them may be on its way."""
        if self._acks_due:
            self._acks_due -= 1
        else:
            self.spend_control()

    def gain_read(self) -> None:
        """Bytes have arrived: a flood comes many frames at a time, and in no time."""
        rate = self._limits.resets_per_second
        due = int((self._now - self._resets_since) * rate)
        self._resets_since += due / rate
        self._gain(2, due)

    def _gain(self, control: int, resets: int) -> None:
        limits = self._limits
        self._control_left = min(self._control_left + control, limits.control_budget)
        self._resets_left = min(self._resets_left + resets, limits.reset_budget)
        self._spent = self._control_left < limits.control_budget or self._resets_left < limits.reset_budget

    # -- frames that both read alike ---------------------------------------------------------------------------

    def receive_priority(self, stream_id: int, length: int, is_open: bool) -> None:
        """RFC 7540's PRIORITY, which RFC 9113 has deprecated: only its form is looked at."""
        if not stream_id:
            self.fault(ErrorCode.PROTOCOL_ERROR, "PRIORITY without a stream")
        if length != 5:
            if not is_open:
                self.fault(ErrorCode.FRAME_SIZE_ERROR, f"PRIORITY of {length} bytes")
            self.end_stream_by_error(stream_id, ErrorCode.FRAME_SIZE_ERROR)

    def end_stream_by_error(self, stream_id: int, code: ErrorCode) -> None:
        """Reset an open stream for what the peer did, tell the sink, take it from the peer's budget."""
        raise NotImplementedError

    def receive_goaway(self, stream_id: int, payload: bytes) -> None:
        """The peer opens no more streams; those that are open go on."""
        if stream_id:
            self.fault(ErrorCode.PROTOCOL_ERROR, "GOAWAY on a stream")
        if len(payload) < 8:
            self.fault(ErrorCode.FRAME_SIZE_ERROR, f"GOAWAY of {len(payload)} bytes")
        last = int.from_bytes(payload[:4], "big") & LARGEST_STREAM_ID
        self._sink.peer_going_away(last, int.from_bytes(payload[4:8], "big"))

    def receive_priority_update(self, stream_id: int, payload: bytes, is_open: bool) -> None:
        """RFC 9218 section 7.1. `is_open`: of the stream that it names."""
        if stream_id:
            self.fault(ErrorCode.PROTOCOL_ERROR, "PRIORITY_UPDATE on a stream")
        if len(payload) < 4:
            self.fault(ErrorCode.FRAME_SIZE_ERROR, f"PRIORITY_UPDATE of {len(payload)} bytes")
        target = int.from_bytes(payload[:4], "big") & LARGEST_STREAM_ID
        if not target & 1:
            self.fault(ErrorCode.PROTOCOL_ERROR, f"PRIORITY_UPDATE for stream {target}")
        urgency, incremental = read_priority(payload[4:])
        if is_open:
            self._sink.priority_changed(target, urgency, incremental)
        elif target > self.last_stream_id:
            known = self._idle_priorities
            if target in known or len(known) < self._limits.idle_priorities:
                known[target] = (urgency, incremental)

    def take_idle_priority(self, stream_id: int) -> tuple[int, bool] | None:
        """What was said of a stream before it opened. Call it where `_idle_priorities` is not empty."""
        known = self._idle_priorities
        found = known.get(stream_id)
        # Streams below it can no longer open.
        self._idle_priorities = {key: value for key, value in known.items() if key > stream_id}
        return found


def priority_update_target(payload: bytes) -> int:
    """The stream that a PRIORITY_UPDATE names."""
    return int.from_bytes(payload[:4], "big") & LARGEST_STREAM_ID
