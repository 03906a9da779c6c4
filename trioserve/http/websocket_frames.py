"""WebSocket's frames (RFC 6455 section 5) and their compression (RFC 7692): bytes to messages and back, no I/O.

`websocket.py` feeds a `FrameReader` with what arrives, and writes what `frame` and its like make. Why not a library:
echoing a message of 32 bytes costs 40 µs of CPU in wsproto 1.3, 13 in websockets 17 and 3 here (1 KiB: 50, 16 and 5;
compressed: 95, 35 and 17); the tests hold what is decided here against both. What is taken from websockets is its mask
in C (0.3 µs for 32 bytes, 3 in Python), and the negotiation of compression.

A fault is found at the byte that makes it one, UTF-8 included, so where the network split the bytes changes nothing.
What is kept of an unfinished message is at most the limit on messages, after decompression as well. And since a few
bytes may be many frames, or decompress to a thousand times as many, a reader stops now and then and is `held`: what it
has read is taken off, or others have their turn, before it goes on.
"""

from __future__ import annotations

import codecs
import struct
import zlib

try:
    from websockets.speedups import apply_mask
except ImportError:  # no C compiler where it was installed, or PyPy
    from websockets.utils import apply_mask

#: what a frame carries (RFC 6455 section 5.2)
CONTINUATION, TEXT, BINARY = 0x0, 0x1, 0x2
CLOSE, PING, PONG = 0x8, 0x9, 0xA

_FIN, _RSV1 = 0x80, 0x40
_MASKED = 0x80

# Longest payload of a control frame (RFC 6455 section 5.5), and of the reason in a close frame.
CONTROL_MAX = 125
REASON_MAX = CONTROL_MAX - 2

NORMAL, GOING_AWAY, PROTOCOL_ERROR, NO_STATUS, ABNORMAL = 1000, 1001, 1002, 1005, 1006
INVALID_DATA, TOO_BIG, INTERNAL_ERROR, SERVICE_RESTART = 1007, 1009, 1011, 1012

# Codes below 3000 that may stand in a close frame (IANA's registry; 1004, 1005, 1006 and 1015 may not).
_REGISTERED = frozenset({1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014})

# The end of a flushed deflate block, which is left out on the wire (RFC 7692 section 7.2.1).
_TAIL = b"\x00\x00\xff\xff"

# Below this a frame fits into one packet with or without compression, and compressing costs more than sending.
_COMPRESS_FROM = 64

# Above this compressing would hold up everyone else for longer than 10 ms (about 40 MB/s on one core).
_COMPRESS_TO = 256 * 1024

# Compressed payload is decompressed in pieces of this size: each takes up to 8 ms, and becomes 4 MiB at most.
_PIECE = 4 * 1024

# How much work is done before a reader is held; no more than a bounded queue has room for.
_STEP = 64 * 1024

# What a frame counts for as work, however small: it takes 1 to 3 µs, and a message is kept in more bytes than these.
_FRAME = 64

# What a call into zlib counts for beside what comes out: it takes as long, or longer where a block was the final one.
_CALL = 256

Message = tuple[int, "str | bytes"]


class WebSocketFault(Exception):
    """The peer's frames break the protocol or a limit: close with `code`. Never reaches an app."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


# -- out -----------------------------------------------------------------------------------------------------

# Heads of short frames: most messages and all control frames.
_SHORT = {
    first: [bytes((first, size)) for size in range(126)]
    for first in (_FIN | TEXT, _FIN | BINARY, _FIN | CLOSE, _FIN | PING, _FIN | PONG)
}
_PACK_MEDIUM = struct.Struct("!BBH").pack
_PACK_LONG = struct.Struct("!BBQ").pack


def frame(opcode: int, payload: bytes, flags: int = _FIN) -> bytes:
    """One unmasked frame, as a server sends it."""
    first = flags | opcode
    size = len(payload)
    if size < 126:
        return (_SHORT[first][size] if flags == _FIN else bytes((first, size))) + payload
    if size < 1 << 16:
        return _PACK_MEDIUM(first, 126, size) + payload
    return _PACK_LONG(first, 127, size) + payload


def close_frame(code: int, reason: str = "") -> bytes:
    """A close frame; an empty one for `NO_STATUS`. A reason that is too long is cut."""
    if code == NO_STATUS:
        return frame(CLOSE, b"")
    text = reason.encode("utf-8", "replace")
    if len(text) > REASON_MAX:
        text = text[:REASON_MAX].decode("utf-8", "ignore").encode()
    return frame(CLOSE, struct.pack("!H", code) + text)


def is_close_code(code: int) -> bool:
    """Whether `code` may stand in a close frame (RFC 6455 section 7.4)."""
    return 3000 <= code <= 4999 or code in _REGISTERED


def read_close(payload: bytes) -> tuple[int, str]:
    """Code and reason of a close frame's payload.

    Raises:
        WebSocketFault: it holds something else.
    """
    if not payload:
        return NO_STATUS, ""
    code = int.from_bytes(payload[:2], "big")
    if len(payload) < 2 or not is_close_code(code):
        raise WebSocketFault(PROTOCOL_ERROR, "invalid close code")
    try:
        return code, str(payload[2:], "utf-8")
    except UnicodeDecodeError:
        raise WebSocketFault(INVALID_DATA, "the reason in a close frame is no UTF-8") from None


class Deflater:
    """Compresses what we send; `keep` its context from message to message, or begin each anew.

    Made of nothing until a message is worth it: with its context it holds about 33 kB (window of 12 bits, memLevel 5).
    """

    __slots__ = ("_bits", "_keep", "_state")

    def __init__(self, bits: int, *, keep: bool) -> None:
        self._bits = bits
        self._keep = keep
        self._state: zlib._Compress | None = None

    def frame(self, opcode: int, payload: bytes) -> bytes:
        """A frame with `payload`, compressed if that is likely to pay."""
        if not _COMPRESS_FROM <= len(payload) <= _COMPRESS_TO:
            return frame(opcode, payload)
        state = self._state
        if state is None:
            state = zlib.compressobj(wbits=-self._bits, memLevel=5)
        data = (state.compress(payload) + state.flush(zlib.Z_SYNC_FLUSH))[:-4]
        if self._keep:
            self._state = state
        return frame(opcode, data, _FIN | _RSV1)


class Inflater:
    """Decompresses what arrives, never to more than it is allowed; `keep` as in `Deflater`.

    With its context it holds about 14 kB (window of 12 bits), 42 where the peer would not promise a smaller window.

    Attributes:
        work: what it has done so far, in bytes that came out or might have.
    """

    __slots__ = ("_bits", "_keep", "_state", "work")

    def __init__(self, bits: int, *, keep: bool) -> None:
        self._bits = bits
        self._keep = keep
        self._state: zlib._Decompress | None = None
        self.work = 0

    def inflate(self, data: bytes, room: int) -> bytes:
        """Decompress a piece of a message, which may come to `room` bytes.

        Raises:
            WebSocketFault: it is more, or no deflate data.
        """
        parts: list[bytes] = []
        while True:
            state = self._state
            if state is None:
                state = self._state = zlib.decompressobj(-self._bits)
            try:
                part = state.decompress(data, room + 1)
            except zlib.error:
                raise WebSocketFault(INVALID_DATA, "compressed data is damaged") from None
            size = len(part)
            self.work += size + _CALL
            room -= size
            if room < 0:
                raise WebSocketFault(TOO_BIG, "message too big when decompressed")
            parts.append(part)
            if not state.eof:
                return part if len(parts) == 1 else b"".join(parts)
            # A final block (RFC 7692 section 7.2.3.4): what follows it is a stream of its own. Copied each time, which
            # is nothing as long as `data` is a piece.
            self._state = None
            data = state.unused_data
            if not data:
                return b"".join(parts)

    def end(self, room: int, data: bytes = b"") -> bytes:
        """Decompress the last part of a message; raises as `inflate` does."""
        last = self.inflate(data + _TAIL, room)
        if not self._keep:
            self._state = None
        return last


class _Skipper(Inflater):
    """In the place of an inflater when nobody wants the messages any more."""

    __slots__ = ()

    def inflate(self, data: bytes, room: int) -> bytes:  # noqa: ARG002
        return b""


# -- in ------------------------------------------------------------------------------------------------------


class FrameReader:
    """One session's decoder, on the server's side.

    Attributes:
        messages: whole messages in their order, each with `TEXT` and a str or `BINARY` and bytes; to be taken off.
        controls: pings, pongs and the close frame, in their order; to be taken off. Nothing is read after a close.
        received: bytes of payload that have arrived in messages.
        held: not all that has arrived was read, since much is made of it; `receive(b"")` goes on.
    """

    __slots__ = (
        "_body", "_fin", "_frames", "_inflate", "_inflater", "_left", "_mask", "_max_size", "_opcode", "_pending",
        "_utf8", "closed", "controls", "held", "messages", "received",
    )  # fmt: skip

    def __init__(self, max_size: int, inflater: Inflater | None = None) -> None:
        self._max_size = max_size
        self._inflater = inflater
        self._pending = b""  # of a head or a control frame that is not whole
        self._opcode = CONTINUATION  # of the message under way, CONTINUATION if there is none
        self._body = bytearray()  # what of it has arrived
        self._inflate = False
        self._utf8: codecs.IncrementalDecoder | None = None
        self._fin = False
        self._frames = 0  # that have been begun
        self._left = 0  # bytes of the current frame's payload to come
        self._mask = b""
        self.messages: list[Message] = []
        self.controls: list[tuple[int, bytes]] = []
        self.received = 0
        self.held = False
        self.closed = False

    @property
    def buffered(self) -> int:
        """Bytes held of a message that is not whole."""
        return len(self._body)

    @property
    def work(self) -> int:
        """What reading has taken so far, in bytes: those that came out of decompressing, and some for each frame."""
        return self._frames * _FRAME + (0 if self._inflater is None else self._inflater.work)

    def discard(self) -> None:
        """Nobody wants the messages any more: those to come need not be decompressed, and may be wrong."""
        self.messages.clear()
        if self._inflater is not None:
            if self._inflate:
                self._body.clear()
                self._utf8 = None
            self._inflater = _Skipper(15, keep=False)

    def receive(self, data: bytes) -> None:
        """Take what has arrived, behind what is `held`: adds to `messages` and `controls`.

        Raises:
            WebSocketFault: the session must be failed; what was whole before the fault is in the two lists.
        """
        if self._pending:
            data, self._pending = self._pending + data, b""
            self.held = False
        at, end = 0, len(data)
        inflater = self._inflater
        most = 0 if inflater is None else inflater.work + _STEP
        most_frames = self._frames + _STEP // _FRAME
        while at < end and not self.closed:
            if self._frames >= most_frames or (inflater is not None and inflater.work >= most):
                self.held = True
                break
            if self._left:
                at = self._take_part(data, at)
                continue
            if end - at < 2:
                self._check_first(data[at])
                break
            first, second = data[at], data[at + 1]
            form = size = second & 0x7F
            start = at + 6
            if form >= 126:
                start = at + (8 if form == 126 else 14)
                if end >= start:
                    size = int.from_bytes(data[at + 2 : start - 4], "big")
            stop = start + size
            if (
                second >= _MASKED
                and end >= stop
                and not self._opcode
                and (form < 126 or size > (125 if form == 126 else 0xFFFF))
                and self._take_whole(first, data, start, stop)
            ):
                at = stop
                continue
            self._check_first(first)
            self._check_second(first, second)
            if end < start:
                break
            self._check_size(first, form, size)
            if first & 0x8:
                if end < stop:
                    break
                self._take_control(first & 0xF, apply_mask(data[start:stop], data[start - 4 : start]))
                at = stop
            else:
                self._begin(first, size, data[start - 4 : start])
                at = start
        if at < end and not self.closed:
            self._pending = data[at:]

    def _take_whole(self, first: int, data: bytes, start: int, stop: int) -> bool:
        """A whole message in a frame that is all here, as nearly all are; False for whatever else it is."""
        size = stop - start
        if (first == 0x81 or first == 0x82) and size <= self._max_size:
            payload = apply_mask(data[start:stop], data[start - 4 : start])
        elif (first == 0xC1 or first == 0xC2) and size <= _PIECE and self._inflater is not None:
            payload = self._inflater.end(
                self._max_size, apply_mask(data[start:stop], data[start - 4 : start])
            )
        else:
            return False
        self._frames += 1
        self.received += size
        self.messages.append((TEXT, _text(payload)) if first & TEXT else (BINARY, payload))
        return True

    def _check_first(self, first: int) -> None:
        """The opcode and the reserved bits of a frame, in the state the message is in."""
        opcode = first & 0xF
        if first & 0x30 or (first & _RSV1 and (self._inflater is None or opcode not in (TEXT, BINARY))):
            raise WebSocketFault(PROTOCOL_ERROR, "a reserved bit is set")
        if opcode & 0x8:
            if opcode > PONG:
                raise WebSocketFault(PROTOCOL_ERROR, f"unknown opcode {opcode}")
            if not first & _FIN:
                raise WebSocketFault(PROTOCOL_ERROR, "fragmented control frame")
        elif opcode > BINARY:
            raise WebSocketFault(PROTOCOL_ERROR, f"unknown opcode {opcode}")
        elif opcode and self._opcode:
            raise WebSocketFault(PROTOCOL_ERROR, "a new message before the last was whole")
        elif not opcode and not self._opcode:
            raise WebSocketFault(PROTOCOL_ERROR, "a continuation of nothing")

    def _check_second(self, first: int, second: int) -> None:
        if not second & _MASKED:
            raise WebSocketFault(PROTOCOL_ERROR, "unmasked frame")
        if first & 0x8 and second & 0x7F > CONTROL_MAX:
            raise WebSocketFault(PROTOCOL_ERROR, "control frame too long")

    def _check_size(self, first: int, form: int, size: int) -> None:
        """The length: in the shortest form that holds it (RFC 6455 section 5.2), and within the limit."""
        if (form == 126 and size < 126) or (form == 127 and (size <= 0xFFFF or size >> 63)):
            raise WebSocketFault(PROTOCOL_ERROR, "length not in its shortest form")
        # What is compressed is measured as it comes out.
        compressed = first & _RSV1 or (not first & 0xF and self._inflate)
        if not compressed and size + len(self._body) > self._max_size:
            raise WebSocketFault(TOO_BIG, f"message over {self._max_size} bytes")

    def _take_control(self, opcode: int, payload: bytes) -> None:
        self._frames += 1
        if opcode == CLOSE:
            self.closed = True
        self.controls.append((opcode, payload))

    def _begin(self, first: int, size: int, mask: bytes) -> None:
        """A data frame whose payload follows."""
        self._frames += 1
        opcode = first & 0xF
        if opcode:
            self._opcode = opcode
            self._inflate = bool(first & _RSV1)
            self._utf8 = _UTF8() if opcode == TEXT else None
        self._fin = bool(first & _FIN)
        self._left = size
        self._mask = mask
        if not size:
            self._end_frame()

    def _take_part(self, data: bytes, at: int) -> int:
        """What is here of the current frame's payload, or a piece of it; returns where it ends."""
        stop = min(len(data), at + self._left)
        inflater = self._inflater if self._inflate else None
        if inflater is not None:
            stop = min(stop, at + _PIECE)
        size = stop - at
        self._left -= size
        self.received += size
        mask = self._mask
        part = apply_mask(data[at:stop], mask)
        turn = size & 3
        self._mask = mask[turn:] + mask[:turn]
        if inflater is not None:
            part = inflater.inflate(part, self._max_size - len(self._body))
        self._add(part)
        if not self._left:
            self._end_frame()
        return stop

    def _add(self, part: bytes, *, final: bool = False) -> None:
        if self._utf8 is not None:
            try:
                self._utf8.decode(part, final)
            except UnicodeDecodeError:
                raise WebSocketFault(INVALID_DATA, "a text message is no UTF-8") from None
        self._body += part

    def _end_frame(self) -> None:
        if not self._fin:
            return
        last = b""
        if self._inflate and self._inflater is not None:
            last = self._inflater.end(self._max_size - len(self._body))
        self._add(last, final=True)
        body, self._body = self._body, bytearray()
        text = self._opcode == TEXT
        self._opcode = CONTINUATION
        self._utf8 = None
        self.messages.append((TEXT, str(body, "utf-8")) if text else (BINARY, bytes(body)))


_UTF8 = codecs.getincrementaldecoder("utf-8")


def _text(payload: bytes) -> str:
    try:
        return str(payload, "utf-8")
    except UnicodeDecodeError:
        raise WebSocketFault(INVALID_DATA, "a text message is no UTF-8") from None
