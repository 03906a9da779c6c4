"""Frames in and out, held against two other implementations; what breaks the rules, at the byte that breaks them."""

from __future__ import annotations

import itertools
import random
import struct
import zlib
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Frame
from websockets.protocol import SERVER, Protocol
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, TextMessage
from wsproto.events import Message as WsprotoMessage
from wsproto.utilities import RemoteProtocolError

from trioserve.http.websocket_frames import (
    Deflater,
    FrameReader,
    Inflater,
    WebSocketFault,
    close_frame,
    is_close_code,
    read_close,
)
from trioserve.http.websocket_frames import frame as server_frame

from .websocket_client import BINARY, CLOSE, CONT, PING, PONG, TEXT, close_payload, frame

LIMIT = 1 << 20
MASKS = (b"\x00\x00\x00\x00", b"\x37\xfa\x21\x3d", b"\xff\x01\x80\x7f")


def read(
    data: bytes, *, limit: int = LIMIT, deflate: bool = False, cuts: Any = ()
) -> tuple[list[Any], int | None]:
    """What a reader makes of bytes that arrive in parts: messages and controls, and the code of the fault."""
    reader = FrameReader(limit, Inflater(15, keep=True) if deflate else None)
    events: list[Any] = []
    code = None
    edges = [0, *cuts, len(data)]
    for start, stop in itertools.pairwise(edges):
        try:
            reader.receive(data[start:stop])
            while reader.held:
                reader.receive(b"")
        except WebSocketFault as fault:
            code = fault.code
        events += reader.controls
        events += reader.messages
        reader.controls.clear()
        reader.messages.clear()
        if code is not None:
            break
    return events, code


def compress(data: bytes, *, final: bool = False) -> bytes:
    state = zlib.compressobj(wbits=-15)
    if final:
        return state.compress(data) + state.flush(zlib.Z_FINISH)
    return (state.compress(data) + state.flush(zlib.Z_SYNC_FLUSH))[:-4]


# -- in ------------------------------------------------------------------------------------------------------

SIZES = (0, 1, 2, 3, 4, 5, 125, 126, 127, 128, 65535, 65536, 70000)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mask", MASKS)
def test_messages_of_all_forms_of_length(size: int, mask: bytes) -> None:
    data = random.Random(size).randbytes(size)
    assert read(frame(BINARY, data, mask=mask)) == ([(2, data)], None)
    text = ("aä€😀" * size)[: size // 10]
    assert read(frame(TEXT, text.encode(), mask=mask)) == ([(1, text)], None)


def test_every_split_of_a_conversation_is_the_same() -> None:
    data = b"".join(
        (
            frame(TEXT, "grün".encode()),
            frame(PING, b"p"),
            frame(TEXT, b"a", fin=False),
            frame(PING),
            frame(CONT, "ä".encode()[:1], fin=False),
            frame(CONT, "ä".encode()[1:]),
            frame(BINARY, b"x" * 130),
            frame(CONT + 2, b"", fin=False),
            frame(CONT, b""),
            frame(CLOSE, close_payload(1001, "weg")),
        )
    )
    whole = [(1, "grün"), (1, "aä"), (2, b"x" * 130), (2, b"")]
    controls = [(PING, b"p"), (PING, b""), (CLOSE, close_payload(1001, "weg"))]
    for cut in range(len(data) + 1):
        events, code = read(data, cuts=[cut])
        assert code is None
        assert [event for event in events if event[0] in (1, 2)] == whole
        assert [event for event in events if event[0] > 2] == controls
    byte_by_byte, code = read(data, cuts=range(1, len(data)))
    assert (sorted(map(repr, byte_by_byte)), code) == (sorted(map(repr, whole + controls)), None)


def test_nothing_is_read_behind_a_close() -> None:
    assert read(frame(CLOSE) + frame(TEXT, b"late") + b"\xff\xff") == ([(CLOSE, b"")], None)


FAULTS = {
    "reserved bit 2": (frame(TEXT, b"x", rsv=2), 1002),
    "reserved bit 3": (frame(TEXT, b"x", rsv=1), 1002),
    "compressed without agreement": (frame(TEXT, b"x", rsv=4), 1002),
    "opcode 3": (frame(3, b"x"), 1002),
    "opcode 7": (frame(7, b"x"), 1002),
    "opcode 11": (frame(11, b"x"), 1002),
    "opcode 15": (frame(15, b"x"), 1002),
    "unmasked": (frame(TEXT, b"x", mask=None), 1002),
    "unmasked ping": (frame(PING, b"x", mask=None), 1002),
    "ping of 126": (frame(PING, b"x" * 126), 1002),
    "close of 126": (frame(CLOSE, b"\x03\xe8" + b"x" * 124), 1002),
    "fragmented ping": (frame(PING, b"x", fin=False), 1002),
    "fragmented close": (frame(CLOSE, fin=False), 1002),
    "continuation of nothing": (frame(CONT, b"x"), 1002),
    "continuation after the end": (
        frame(TEXT, b"x", fin=False) + frame(CONT, b"y") + frame(CONT, b"z"),
        1002,
    ),
    "new message in a message": (frame(TEXT, b"x", fin=False) + frame(TEXT, b"y"), 1002),
    "16 bits for 125": (frame(TEXT, b"x" * 125, form=16), 1002),
    "64 bits for 126": (frame(TEXT, b"x" * 126, form=64), 1002),
    "64 bits for 65535": (frame(BINARY, b"x" * 65535, form=64), 1002),
    "highest bit of 64": (struct.pack("!BBQ", 0x82, 0xFF, 1 << 63) + b"mask", 1002),
    "over the limit": (frame(BINARY, b"x" * (LIMIT + 1)), 1009),
    "over the limit by its head": (struct.pack("!BBQ", 0x82, 0xFF, LIMIT + 1) + b"mask", 1009),
    "over the limit in parts": (frame(BINARY, b"x" * LIMIT, fin=False) + frame(CONT, b"x"), 1009),
    "no UTF-8": (frame(TEXT, b"\xff"), 1007),
    "no UTF-8 in a part": (frame(TEXT, b"ok", fin=False) + frame(CONT, b"\xed\xa0\x80", fin=False), 1007),
    "UTF-8 cut off": (frame(TEXT, "ä".encode()[:1]), 1007),
    "UTF-8 cut off in parts": (frame(TEXT, b"x", fin=False) + frame(CONT, "€".encode()[:2]), 1007),
    "overlong": (frame(TEXT, b"\xc0\xaf"), 1007),
    "beyond unicode": (frame(TEXT, b"\xf4\x90\x80\x80"), 1007),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_have_their_code_however_they_arrive(name: str) -> None:
    data, code = FAULTS[name]
    before = frame(BINARY, b"before")
    for cuts in ((), range(1, min(len(before + data), 300))):
        events, found = read(before + data, cuts=cuts)
        assert found == code
        assert events[0] == (2, b"before")


@pytest.mark.parametrize(
    ("data", "early"),
    [
        (frame(TEXT, b"\xff" + b"x" * 100), 7),  # the first byte of the payload
        (frame(TEXT, b"ab\xffcd" * 20, fin=False), 9),
        (frame(11, b"x"), 1),
        (frame(TEXT, b"x", rsv=2), 1),
        (frame(PING, b"x" * 126), 2),
        (frame(TEXT, b"x" * 70000, mask=None), 2),
        (struct.pack("!BBQ", 0x82, 0xFF, LIMIT + 1) + b"mask", 14),
    ],
)
def test_a_fault_is_found_at_its_byte(data: bytes, early: int) -> None:
    assert read(data[: early - 1])[1] is None
    assert read(data[:early])[1] is not None


def test_tiny_fragments_cost_no_more_than_their_bytes() -> None:
    reader = FrameReader(LIMIT)
    reader.receive(frame(TEXT, b"", fin=False))
    for _ in range(5000):
        reader.receive(frame(CONT, b"", fin=False) + frame(CONT, b"x", fin=False))
    assert reader.buffered == 5000
    assert reader.messages == []
    reader.receive(frame(CONT))
    assert reader.messages == [(1, "x" * 5000)]
    assert reader.buffered == 0


# -- compression ---------------------------------------------------------------------------------------------


def test_compressed_messages() -> None:
    text = "lorem ipsum " * 1000
    data = compress(text.encode())
    for wire in (
        frame(TEXT, data, rsv=4),
        frame(TEXT, data[:5], rsv=4, fin=False) + frame(PING) + frame(CONT, data[5:]),
    ):
        for cuts in ((), range(1, len(wire))):
            events, code = read(wire, deflate=True, cuts=cuts)
            assert code is None
            assert (1, text) in events
    # Not every message has to be, also where it was agreed on (RFC 7692 section 6).
    assert read(frame(TEXT, b"plain"), deflate=True) == ([(1, "plain")], None)
    assert read(frame(TEXT, data, rsv=4) * 2, deflate=True)[1] is None


def test_compressed_empty_and_final_blocks() -> None:
    assert read(frame(TEXT, b"\x00", rsv=4), deflate=True) == ([(1, "")], None)
    final = compress(b"Hello", final=True)
    # RFC 7692 section 7.2.3.4: a final block, and what is appended for the tail to make sense.
    assert read(frame(TEXT, final + b"\x00", rsv=4), deflate=True) == ([(1, "Hello")], None)
    two = frame(TEXT, final + b"\x00", rsv=4) + frame(TEXT, compress(b"more"), rsv=4)
    assert read(two, deflate=True) == ([(1, "Hello"), (1, "more")], None)


@pytest.mark.parametrize("parts", [1, 2, 50])
def test_a_bomb_ends_at_the_limit(parts: int) -> None:
    bomb = compress(bytes(64 * LIMIT))
    assert len(bomb) < LIMIT // 10
    size = len(bomb) // parts + 1
    pieces = [bomb[at : at + size] for at in range(0, len(bomb), size)]
    wire = b"".join(
        frame(CONT if at else BINARY, piece, rsv=0 if at else 4, fin=at == len(pieces) - 1)
        for at, piece in enumerate(pieces)
    )
    assert read(wire, deflate=True) == ([], 1009)
    exact = compress(bytes(LIMIT))
    assert read(frame(BINARY, exact, rsv=4), deflate=True) == ([(2, bytes(LIMIT))], None)
    assert read(frame(BINARY, compress(bytes(LIMIT + 1)), rsv=4), deflate=True)[1] == 1009


def small_bombs(count: int, size: int = LIMIT) -> bytes:
    """Whole messages of about a thousandth of the `size` that they become."""
    return frame(BINARY, compress(bytes(size)), rsv=4) * count


def test_a_reader_is_held_when_it_has_made_much_of_little() -> None:
    wire = small_bombs(60)
    assert len(wire) < LIMIT // 10
    reader = FrameReader(LIMIT, Inflater(15, keep=True))
    reader.receive(wire)
    for _ in range(59):
        assert reader.messages == [(2, bytes(LIMIT))]
        assert reader.held
        reader.messages.clear()
        reader.receive(b"")
    assert reader.messages == [(2, bytes(LIMIT))]
    assert not reader.held
    # What arrives meanwhile stands behind it.
    reader.receive(wire + frame(PING, b"last"))
    while reader.held:
        assert not reader.controls
        reader.receive(b"")
    assert reader.controls == [(PING, b"last")]


def test_one_large_message_is_read_in_steps() -> None:
    limit = 32 * LIMIT
    wire = small_bombs(1, limit)
    reader = FrameReader(limit, Inflater(15, keep=True))
    reader.receive(wire)
    sizes = [0]
    while reader.held:
        sizes.append(reader.buffered)
        reader.receive(b"")
    assert max(after - before for before, after in itertools.pairwise(sizes)) <= 5 * LIMIT
    assert reader.messages == [(2, bytes(limit))]


@pytest.mark.parametrize("fin", [True, False])
def test_empty_final_blocks_are_read_in_steps(fin: bool) -> None:
    """Each is allowed (RFC 7692 section 7.2.3.4), and each takes longer than any other two bytes."""
    blocks = b"\x03\x00" * 20_000
    wire = frame(TEXT, blocks + compress(b"at last"), rsv=4, fin=fin) + (b"" if fin else frame(CONT))
    reader = FrameReader(LIMIT, Inflater(15, keep=True))
    reader.receive(wire)
    steps = 1
    while reader.held:
        steps += 1
        reader.receive(b"")
    assert steps >= 10
    assert reader.messages == [(1, "at last")]


@pytest.mark.parametrize("deflate", [True, False])
def test_tiny_messages_are_read_in_steps(deflate: bool) -> None:
    reader = FrameReader(LIMIT, Inflater(15, keep=True) if deflate else None)
    reader.receive((frame(BINARY, b"\x03\x00\x00", rsv=4) if deflate else frame(BINARY)) * 5000)
    most, count = len(reader.messages), 0
    while reader.held:
        count += len(reader.messages)
        reader.messages.clear()
        reader.receive(b"")
        most = max(most, len(reader.messages))
    assert count + len(reader.messages) == 5000
    assert most <= (500 if deflate else 1100)


def test_a_compressed_message_larger_than_a_piece_is_the_same_however_it_arrives() -> None:
    text = "".join(random.Random(9).choices("abcdefghäöü€", k=20_000))
    data = compress(text.encode())
    assert len(data) > 8192
    wire = frame(TEXT, data, rsv=4) + frame(TEXT, compress(b"more"), rsv=4)
    for cuts in ((), (5000,), range(1, len(wire)), range(1, len(wire), 4096)):
        assert read(wire, deflate=True, cuts=cuts) == ([(1, text), (1, "more")], None)


@pytest.mark.parametrize("deflate", [True, False])
def test_what_nobody_wants_is_skipped_and_controls_are_read(deflate: bool) -> None:
    reader = FrameReader(LIMIT, Inflater(15, keep=True) if deflate else None)
    rsv = 4 if deflate else 0
    cut = compress("ä".encode()) if deflate else "ä".encode()
    reader.receive(frame(TEXT, b"before") + frame(TEXT, cut[:1], rsv=rsv, fin=False))
    reader.discard()
    assert reader.messages == []
    rest = frame(CONT, cut[1:])
    if deflate:
        rest += small_bombs(60) + frame(TEXT, b"\xff\xff\xff", rsv=4)
    reader.receive(rest + frame(TEXT, b"after") + frame(CLOSE))
    assert not reader.held
    assert sum(len(data) for _, data in reader.messages) < 10
    assert reader.controls == [(CLOSE, b"")]


COMPRESSED_FAULTS = {
    "damaged": (frame(TEXT, b"\xff\xff\xff\xff", rsv=4), 1007),
    "no UTF-8 inside": (frame(TEXT, compress(b"\xff"), rsv=4), 1007),
    "bit on a continuation": (frame(TEXT, b"", rsv=4, fin=False) + frame(CONT, b"\x00", rsv=4), 1002),
    "bit on a ping": (frame(PING, b"", rsv=4), 1002),
    "bit on a close": (frame(CLOSE, b"", rsv=4), 1002),
}


@pytest.mark.parametrize("name", COMPRESSED_FAULTS)
def test_faults_of_compression(name: str) -> None:
    data, code = COMPRESSED_FAULTS[name]
    assert read(data, deflate=True) == ([], code)


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_compressed_here_is_decompressed_elsewhere(keep: bool) -> None:
    deflater = Deflater(12, keep=keep)
    peer = PerMessageDeflate(not keep, False, 12, 12)
    sizes = []
    for number in range(20):
        text = f"message {number}, much like those before it; " * 8
        wire = deflater.frame(TEXT, text.encode())
        sizes.append(len(wire))
        assert wire[0] == 0xC1
        decoded = peer.decode(Frame(1, wire[2 if wire[1] < 126 else 4 :], True, True))  # type: ignore[arg-type]
        assert decoded.data == text.encode()
    assert (sizes[-1] < sizes[0] // 2) is keep  # what went before is the dictionary of what follows
    assert (deflater._state is not None) is keep


def test_what_is_not_worth_compressing_is_not() -> None:
    deflater = Deflater(12, keep=True)
    assert deflater.frame(TEXT, b"short") == server_frame(TEXT, b"short")
    assert deflater.frame(BINARY, bytes(1 << 20))[0] == 0x82
    assert deflater._state is None


# -- out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_frames_are_those_of_websockets(size: int) -> None:
    data = random.Random(size).randbytes(size)
    for opcode in (TEXT, BINARY):
        assert server_frame(opcode, data) == Frame(opcode, data).serialize(mask=False)  # type: ignore[arg-type]
    if size <= 125:
        for opcode in (PING, PONG, CLOSE):
            assert server_frame(opcode, data) == Frame(opcode, data).serialize(mask=False)  # type: ignore[arg-type]


def test_close_frames() -> None:
    assert close_frame(1005) == b"\x88\x00"
    assert close_frame(1000) == b"\x88\x02\x03\xe8"
    assert close_frame(4000, "grün") == b"\x88\x07\x0f\xa0gr\xc3\xbcn"
    cut = close_frame(1011, "ä" * 100)
    assert len(cut) == 2 + 2 + 122  # not in the middle of a character
    assert cut[4:].decode() == "ä" * 61


def test_close_codes_that_may_be_on_the_wire() -> None:
    valid = {code for code in range(70000) if is_close_code(code)}
    assert valid == {1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)}
    for code in (*valid, 0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535):
        if code in valid:
            assert read_close(close_payload(code, "so")) == (code, "so")
        else:
            with pytest.raises(WebSocketFault) as caught:
                read_close(close_payload(code))
            assert caught.value.code == 1002
    assert read_close(b"") == (1005, "")
    with pytest.raises(WebSocketFault):
        read_close(b"\x03")
    with pytest.raises(WebSocketFault) as caught:
        read_close(close_payload(1000) + b"\xff")
    assert caught.value.code == 1007


# -- beside the others ---------------------------------------------------------------------------------------


def by_websockets(data: bytes) -> tuple[list[Any], int | None]:
    """The same bytes as websockets reads them."""
    protocol = Protocol(SERVER, max_size=LIMIT)
    protocol.receive_data(data)
    events: list[Any] = []
    parts: list[bytes] = []
    kind = 0
    for event in protocol.events_received():
        assert isinstance(event, Frame)
        if event.opcode > 2:
            events.append((int(event.opcode), bytes(event.data)))
            continue
        kind = int(event.opcode) or kind
        parts.append(bytes(event.data))
        if event.fin:
            body, parts = b"".join(parts), []
            if kind == TEXT:  # left to the user of the library
                try:
                    events.append((TEXT, body.decode()))
                except UnicodeDecodeError:
                    return events, 1007
            else:
                events.append((BINARY, body))
    failed = protocol.parser_exc is not None and protocol.close_sent is not None
    return events, int(protocol.close_sent.code) if failed and protocol.close_sent else None


def by_wsproto(data: bytes) -> tuple[list[Any], int | None]:
    """The same bytes as wsproto reads them."""
    connection = Connection(ConnectionType.SERVER)
    events: list[Any] = []
    parts: list[Any] = []
    try:
        connection.receive_data(data)
        for event in connection.events():
            if isinstance(event, WsprotoMessage):
                parts.append(event.data)
                if event.message_finished:
                    text = isinstance(event, TextMessage)
                    whole = "".join(parts) if text else b"".join(map(bytes, parts))
                    events.append((TEXT if text else BINARY, whole))
                    parts.clear()
                assert isinstance(event, TextMessage | BytesMessage)
            elif isinstance(event, CloseConnection):
                return events, int(event.code)
    except RemoteProtocolError:
        return events, 1002
    return events, None


FRAMES = st.builds(
    frame,
    st.sampled_from([TEXT, BINARY, CONT, PING, PONG, TEXT, BINARY, CONT, 3, 11]),
    st.one_of(
        st.binary(max_size=20),
        st.text(max_size=20).map(str.encode),
        st.sampled_from([b"x" * 126, b"x" * 300]),
    ),
    fin=st.sampled_from([True, True, True, False]),
    rsv=st.sampled_from([0, 0, 0, 0, 0, 0, 1]),
    mask=st.sampled_from([*MASKS, *MASKS, None]),
)


@given(st.lists(FRAMES, max_size=8).map(b"".join), st.lists(st.integers(0, 400), max_size=6))
@example(frame(TEXT, b"a", fin=False) + frame(PING, b"b") + frame(CONT, b"c"), [3])
@settings(deadline=None, max_examples=400)
def test_any_frames_are_read_as_others_read_them(data: bytes, cuts: list[int]) -> None:
    cuts = sorted({cut for cut in cuts if cut < len(data)})
    events, code = read(data, cuts=cuts)
    theirs, their_code = by_websockets(data)
    messages = [event for event in events if event[0] <= 2]
    found = [event for event in theirs if event[0] <= 2]
    if code == 1007:
        assert messages == found[: len(messages)]  # decoding is left to the user of that library
    else:
        assert (messages, code) == (found, their_code)
    others, other_code = by_wsproto(data)
    assert code == other_code
    assert messages == others


@given(st.binary(max_size=200), st.booleans())
@settings(deadline=None, max_examples=400)
def test_any_bytes_end_in_messages_or_one_fault(data: bytes, deflate: bool) -> None:
    whole = read(data, deflate=deflate, limit=1000)
    single = read(data, deflate=deflate, limit=1000, cuts=range(1, len(data)))
    assert whole[1] == single[1]
    assert sorted(map(repr, whole[0])) == sorted(map(repr, single[0]))
