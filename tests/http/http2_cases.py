"""RFC 9113 section by section: frames, and what must come of them.

Where h2 does otherwise than our own engine, the case says so and why; both are allowed by the RFC unless the reason
says that h2 is wrong. (RFC 9113 section 5.4.2 lets an endpoint treat a stream's error as the connection's.)
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.http.http2_client import (
    GET,
    OPENING,
    POST,
    data_frame,
    frame,
    goaway,
    headers,
    headers_in_parts,
    number,
    ping,
    priority,
    priority_update,
    rst_stream,
    settings,
    window_update,
)
from trioserve.http.http2_codes import (
    CONTINUATION,
    DATA,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    LARGEST_WINDOW,
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

PROTOCOL = ErrorCode.PROTOCOL_ERROR
FLOW = ErrorCode.FLOW_CONTROL_ERROR
CLOSED = ErrorCode.STREAM_CLOSED
SIZE = ErrorCode.FRAME_SIZE_ERROR
REFUSED = ErrorCode.REFUSED_STREAM
COMPRESSION = ErrorCode.COMPRESSION_ERROR
CALM = ErrorCode.ENHANCE_YOUR_CALM


@dataclass(frozen=True)
class Result:
    """What must come of a case: the connection's fault, or RST_STREAM frames."""

    fault: ErrorCode | None = None
    resets: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Case:
    """Bytes behind `OPENING` (unless `bare`), and what comes of them; `h2`: the other engine's, with the reason."""

    name: str
    section: str
    data: bytes
    result: Result
    h2: Result | None = None
    why: str = ""
    bare: bool = False

    @property
    def all_data(self) -> bytes:
        return self.data if self.bare else OPENING + self.data

    def expected(self, kind: str) -> Result:
        return self.h2 if kind == "h2" and self.h2 is not None else self.result


def _fine(name: str, section: str, data: bytes, *, bare: bool = False) -> Case:
    return Case(name, section, data, Result(), bare=bare)


def _fault(name: str, section: str, data: bytes, code: ErrorCode, *, bare: bool = False) -> Case:
    return Case(name, section, data, Result(code), bare=bare)


def _reset(name: str, section: str, data: bytes, code: ErrorCode, stream_id: int = 1) -> Case:
    return Case(name, section, data, Result(None, ((stream_id, code),)))


def _differs(case: Case, code: ErrorCode | None, why: str) -> Case:
    return Case(case.name, case.section, case.data, case.result, Result(code), why, case.bare)


ESCALATED = "h2 ends the connection for a stream's error"

OPEN = headers(1, POST, end=False)
ENDED = headers(1)  # half closed (remote): the response is not sent
GONE = OPEN + rst_stream(1)  # closed by the peer

_PREFACE = [
    _fine(
        "settings may have values", "3.4", PREFACE + settings({1: 0, 3: 5, 4: 10, 5: 20000, 6: 99}), bare=True
    ),
    _fault("no preface", "3.4", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", PROTOCOL, bare=True),
    _fault("a preface with one wrong byte", "3.4", PREFACE[:-1] + b"X" + settings(), PROTOCOL, bare=True),
    _fault("the first frame is a request", "3.4", PREFACE + headers(1), PROTOCOL, bare=True),
    _fault("the first frame is a PING", "3.4", PREFACE + ping(), PROTOCOL, bare=True),
    _fault("the first frame acknowledges", "3.4", PREFACE + settings(ack=True), PROTOCOL, bare=True),
    _fault("a first frame too large", "3.4", PREFACE + frame(SETTINGS, length=16385), SIZE, bare=True),
]

_FRAMES = [
    _fine("unknown frame types", "5.5", frame(0xFA, 0xFF, 0, b"x") + frame(0xFA, 0, 1, b"y") + headers(1)),
    _fine("unknown flags", "4.1", frame(PING, 0x16, 0, b"x" * 8) + headers(1, flags=0x82)),
    _fine("the reserved bit is ignored", "4.1", headers(1)[:5] + b"\x80" + headers(1)[6:]),
    _fault("a frame over our limit", "4.2", frame(DATA, 0, 1, length=16385), SIZE),
    _fault("an unknown frame over our limit", "4.2", frame(0xFA, 0, 0, length=16385), SIZE),
    _fault("ALTSVC is for clients, and unknown here, but not within a head", "6.10",
           frame(HEADERS, 0, 1) + frame(0x0A, 0, 0, b"\0\0"), PROTOCOL),
]  # fmt: skip

_STREAMS = [
    _fault("DATA on an idle stream", "5.1", data_frame(1, b"x"), PROTOCOL),
    _fault("RST_STREAM on an idle stream", "5.1", rst_stream(1), PROTOCOL),
    _fault("WINDOW_UPDATE on an idle stream", "5.1", window_update(1, 1), PROTOCOL),
    _fine("PRIORITY on an idle stream", "5.1", priority(1)),
    _fault("DATA on an even stream", "5.1", headers(5) + data_frame(2, b"x"), PROTOCOL),
    _fault("RST_STREAM on an even stream", "5.1", headers(5) + rst_stream(2), PROTOCOL),
    _fault("WINDOW_UPDATE on an even stream", "5.1", headers(5) + window_update(2, 1), PROTOCOL),
    _reset("DATA on a half closed stream", "5.1", ENDED + data_frame(1, b"x"), CLOSED),
    _reset("HEADERS on a half closed stream", "5.1", ENDED + headers(1), CLOSED),
    _fine("WINDOW_UPDATE and PRIORITY on a half closed stream", "5.1", ENDED + window_update(1, 5) + priority(1)),
    _fine("RST_STREAM on a half closed stream", "5.1", ENDED + rst_stream(1)),
    _reset("DATA after RST_STREAM", "5.1", GONE + data_frame(1, b"x"), CLOSED),
    _reset("HEADERS after RST_STREAM", "5.1", GONE + headers(1), CLOSED),
    _fine("WINDOW_UPDATE, PRIORITY and RST_STREAM after RST_STREAM", "5.1",
          GONE + window_update(1, 5) + priority(1) + rst_stream(1)),
    _fault("an even stream", "5.1.1", headers(2), PROTOCOL),
    _fault("a stream lower than one before", "5.1.1", headers(5) + headers(3), PROTOCOL),
    _fine("streams that are skipped", "5.1.1", headers(1) + headers(5) + headers(101)),
    _reset("DATA on a stream that was skipped", "5.1.1", headers(5) + data_frame(3, b"x"), CLOSED, 3),
]  # fmt: skip

_DATA = [
    _fine("padding", "6.1", OPEN + data_frame(1, b"x", pad=7) + data_frame(1, pad=0, end=True)),
    _fine("nothing but padding", "6.1", OPEN + data_frame(1, pad=255, end=True)),
    _fault("DATA without a stream", "6.1", data_frame(0, b"x"), PROTOCOL),
    _fault("more padding than DATA", "6.1", OPEN + frame(DATA, PADDED, 1, b"\x02x"), PROTOCOL),
    _fault("padded DATA without a length of padding", "6.1", OPEN + frame(DATA, PADDED, 1), SIZE),
]

_HEADERS = [
    _fine("padding and priority", "6.2", frame(HEADERS, END_HEADERS | END_STREAM | PADDED | WITH_PRIORITY, 1,
          b"\x03" + number(0) + b"\x10" + headers(1)[9:] + b"\0\0\0")),
    _fine("a stream that depends on itself", "5.3", frame(HEADERS, END_HEADERS | END_STREAM | WITH_PRIORITY, 1,
          number(3) + b"\x10" + headers(1)[9:])),
    _differs(_fine("a head that depends on itself", "5.3", frame(HEADERS, END_HEADERS | END_STREAM | WITH_PRIORITY, 1,
          number(1) + b"\x10" + headers(1)[9:])), PROTOCOL, "h2 still follows RFC 7540's priorities"),
    _fault("HEADERS without a stream", "6.2", headers(0), PROTOCOL),
    _fault("more padding than HEADERS", "6.2", frame(HEADERS, END_HEADERS | PADDED, 1, b"\x09abc"), PROTOCOL),
    _fault("HEADERS too short for its priority", "6.2", frame(HEADERS, END_HEADERS | WITH_PRIORITY, 1, b"abc"), SIZE),
    _fault("padded HEADERS without a length of padding", "6.2", frame(HEADERS, END_HEADERS | PADDED, 1), SIZE),
]  # fmt: skip

_PRIORITY = [
    _fine("a stream that depends on itself, or on none", "6.3", OPEN + priority(1, 1) + priority(1, 9)),
    _fault("PRIORITY without a stream", "6.3", priority(0), PROTOCOL),
    _reset("PRIORITY of another size", "6.3", OPEN + frame(PRIORITY, 0, 1, b"abcd"), SIZE),
    _fault(
        "PRIORITY of another size on a stream that is not open", "6.3", frame(PRIORITY, 0, 1, b"abcd"), SIZE
    ),
]

_RST_STREAM = [
    _fine("RST_STREAM with an unknown code", "7", OPEN + rst_stream(1, 0xABCDEF)),
    _fault("RST_STREAM without a stream", "6.4", rst_stream(0), PROTOCOL),
    _fault("RST_STREAM of another size", "6.4", OPEN + frame(RST_STREAM, 0, 1, b"abc"), SIZE),
]

_SETTINGS = [
    _fine("unknown settings", "6.5.2", settings({0xABCD: 1, 7: 2})),
    _fine("push allowed or not", "6.5.2", settings({2: 0})),
    _fault("SETTINGS on a stream", "6.5", frame(SETTINGS, 0, 1), PROTOCOL),
    _fault("SETTINGS of another size", "6.5", frame(SETTINGS, 0, 0, b"abcde"), SIZE),
    _differs(_fault("an acknowledgement with content", "6.5", frame(SETTINGS, 1, 0, b"abcdef"), SIZE),
             PROTOCOL, "h2 has another code for it than the RFC"),
    _fault("ENABLE_PUSH of 2", "6.5.2", settings({2: 2}), PROTOCOL),
    _fault("INITIAL_WINDOW_SIZE of 2**31", "6.5.2", settings({4: 2**31}), FLOW),
    _fault("MAX_FRAME_SIZE too small", "6.5.2", settings({5: 16383}), PROTOCOL),
    _fault("MAX_FRAME_SIZE too large", "6.5.2", settings({5: 2**24}), PROTOCOL),
    _fault("ENABLE_CONNECT_PROTOCOL of 2", "8441 3", settings({8: 2}), PROTOCOL),
    _fault("a window pushed over 2**31 - 1 by SETTINGS", "6.9.2",
           ENDED + window_update(1, LARGEST_WINDOW - DEFAULT_WINDOW) + settings({4: DEFAULT_WINDOW + 1}), FLOW),
]  # fmt: skip

_OTHERS = [
    _fault("PUSH_PROMISE", "8.4", OPEN + frame(PUSH_PROMISE, END_HEADERS, 1, number(2) + headers(1)[9:]), PROTOCOL),
    _fault("PING on a stream", "6.7", frame(PING, 0, 1, b"x" * 8), PROTOCOL),
    _fault("PING of another size", "6.7", frame(PING, 0, 0, b"x" * 7), SIZE),
    _fine("GOAWAY, and streams that go on", "6.8", OPEN + goaway() + data_frame(1, b"x", end=True)),
    _fine("GOAWAY with a reason and an unknown code", "6.8", goaway(0, 0x1234, b"reason")),
    _fault("GOAWAY on a stream", "6.8", frame(GOAWAY, 0, 1, number(0) * 2), PROTOCOL),
    _fault("GOAWAY too short", "6.8", frame(GOAWAY, 0, 0, number(0)), SIZE),
    _fine("WINDOW_UPDATE up to 2**31 - 1", "6.9.1",
          ENDED + window_update(1, LARGEST_WINDOW - DEFAULT_WINDOW)
          + window_update(0, LARGEST_WINDOW - DEFAULT_WINDOW)),
    _fault("WINDOW_UPDATE of 0", "6.9", window_update(0, 0), PROTOCOL),
    _differs(_reset("WINDOW_UPDATE of 0 on a stream", "6.9", ENDED + window_update(1, 0), PROTOCOL),
             PROTOCOL, ESCALATED),
    _fault("WINDOW_UPDATE of another size", "6.9", frame(WINDOW_UPDATE, 0, 0, b"abc"), SIZE),
    _fault("the connection's window over 2**31 - 1", "6.9.1", window_update(0, LARGEST_WINDOW), FLOW),
    _reset("a stream's window over 2**31 - 1", "6.9.1", ENDED + window_update(1, LARGEST_WINDOW), FLOW),
    _fault("CONTINUATION without HEADERS", "6.10", frame(CONTINUATION, END_HEADERS, 1), PROTOCOL),
    _fault("CONTINUATION after a whole head", "6.10", OPEN + frame(CONTINUATION, END_HEADERS, 1), PROTOCOL),
    _fault("CONTINUATION of another stream", "6.10", frame(HEADERS, 0, 1) + frame(CONTINUATION, 4, 3), PROTOCOL),
    _fault("DATA within a head", "6.10", frame(HEADERS, 0, 1) + data_frame(1, b"x"), PROTOCOL),
    _fault("PING within a head", "6.10", frame(HEADERS, 0, 1) + ping(), PROTOCOL),
    _fault("an unknown frame within a head", "6.10", frame(HEADERS, 0, 1) + frame(0xFA, 0, 0), PROTOCOL),
    _fine("a head in parts, some of them empty", "6.10", headers_in_parts(1, GET, [0, 3, 0, 5])),
    _fine("PRIORITY_UPDATE of idle and open streams", "9218 7.1",
          priority_update(1, b"u=1") + ENDED + priority_update(1, b"u=2, i") + priority_update(99, b"")),
    _fault("PRIORITY_UPDATE on a stream", "9218 7.1", frame(PRIORITY_UPDATE, 0, 1, number(1)), PROTOCOL),
    _fault("PRIORITY_UPDATE too short", "9218 7.1", frame(PRIORITY_UPDATE, 0, 0, b"abc"), SIZE),
    _fault("PRIORITY_UPDATE of stream 0", "9218 7.1", priority_update(0, b"u=1"), PROTOCOL),
    _fault("PRIORITY_UPDATE of a pushed stream", "9218 7.1", priority_update(2, b"u=1"), PROTOCOL),
]  # fmt: skip

_FLOW = [
    _fine("a stream's window, filled", "6.9.1", OPEN + data_frame(1, b"x" * 16383) + data_frame(1, b"x" * 16384) * 3),
    _differs(_reset("more DATA than a stream's window", "6.9.1", OPEN + data_frame(1, b"x" * 16384) * 4, FLOW),
             FLOW, ESCALATED),
    _differs(_reset("padding counts", "6.9.1",
                    OPEN + data_frame(1, b"x" * 16384) * 3 + data_frame(1, b"x" * 16300, pad=83), FLOW),
             FLOW, ESCALATED),
]  # fmt: skip

_BODIES = [
    _fine("a body as long as announced", "8.1.1",
          headers(1, [*POST, (b"content-length", b"5")], end=False) + data_frame(1, b"he")
          + data_frame(1, b"llo", end=True)),
    _differs(_reset("a body longer than announced", "8.1.1",
             headers(1, [*POST, (b"content-length", b"5")], end=False) + data_frame(1, b"helloo"), PROTOCOL),
             PROTOCOL, ESCALATED),
    _differs(_reset("a body shorter than announced", "8.1.1",
             headers(1, [*POST, (b"content-length", b"5")], end=False) + data_frame(1, b"hell", end=True), PROTOCOL),
             PROTOCOL, ESCALATED),
    _reset("no body, but announced", "8.1.1", headers(1, [*POST, (b"content-length", b"5")]), PROTOCOL),
    _fine("trailers", "8.1", OPEN + data_frame(1, b"x") + headers(1, [(b"x", b"y")])),
    _differs(_reset("a second head that ends nothing", "8.1", OPEN + headers(1, [(b"x", b"y")], end=False), PROTOCOL),
             PROTOCOL, ESCALATED),
    _reset("a pseudo-field in trailers", "8.1", OPEN + headers(1, [(b":path", b"/")]), PROTOCOL),
    _reset("trailers with an upper case name", "8.2.1", OPEN + headers(1, [(b"X", b"y")]), PROTOCOL),
    _reset("trailers with a field of the connection", "8.2.2", OPEN + headers(1, [(b"upgrade", b"y")]), PROTOCOL),
    _reset("trailers after too short a body", "8.1.1",
           headers(1, [*POST, (b"content-length", b"5")], end=False) + headers(1, [(b"x", b"y")]), PROTOCOL),
]  # fmt: skip

_HPACK = [
    _fault("an index outside the tables", "4.3", frame(HEADERS, 5, 1, b"\xbe"), COMPRESSION),
    _fault("index 0", "4.3", frame(HEADERS, 5, 1, b"\x80"), COMPRESSION),
    _fault("a string that is cut short", "4.3", frame(HEADERS, 5, 1, b"\x00\x05ab"), COMPRESSION),
    _fault("a table larger than allowed", "4.3", frame(HEADERS, 5, 1, b"\x3f\xe2\x1f"), COMPRESSION),
    _fault("a table size behind a field", "4.3", frame(HEADERS, 5, 1, b"\x82\x20"), COMPRESSION),
    _fault("an integer without end", "4.3", frame(HEADERS, 5, 1, b"\xff" + b"\x80" * 20), COMPRESSION),
    _fault(
        "Huffman code of only ones", "4.3", frame(HEADERS, 5, 1, b"\x00\x84\xff\xff\xff\xff\x00"), COMPRESSION
    ),
    _reset("a head without a field", "8.3.1", frame(HEADERS, 5, 1), PROTOCOL),
]

FRAME_CASES = [
    *_PREFACE, *_FRAMES, *_STREAMS, *_DATA, *_HEADERS, *_PRIORITY, *_RST_STREAM, *_SETTINGS, *_OTHERS, *_FLOW, *_BODIES,
    *_HPACK,
]  # fmt: skip
