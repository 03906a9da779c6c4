"""Our HPACK against the library's: the decoder by differential tests, the encoder by round trips."""

from __future__ import annotations

import hpack
import pytest
from hpack.hpack import encode_integer
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trioserve.http import hpack_decoder, hpack_encoder
from trioserve.http.hpack_decoder import HeadTooLarge, HpackDecoder, HpackError
from trioserve.http.hpack_encoder import NO_TABLE, encode_fields, encode_status

Fields = list[tuple[bytes, bytes]]

_HUFFMAN = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH)


def library_decodes(decoder: hpack.Decoder, block: bytes) -> tuple[Fields, hpack.HPACKError | None]:
    try:
        return [(bytes(name), bytes(value)) for name, value in decoder.decode(block, raw=True)], None
    except hpack.HPACKError as error:
        return [], error


def decode_both(blocks: list[bytes], limit: int = 65536) -> list[Fields] | None:
    """The same from both, block by block, or an error from both; the tables must agree, too."""
    ours, theirs = HpackDecoder(limit), hpack.Decoder(limit)
    lists: list[Fields] = []
    for block in blocks:
        expected, refusal = library_decodes(theirs, block)
        if refusal is not None:
            too_large = isinstance(refusal, hpack.OversizedHeaderListError)
            with pytest.raises(HeadTooLarge if too_large else HpackError) as caught:
                ours.decode(block)
            assert type(caught.value) is (HeadTooLarge if too_large else HpackError)
            return None
        found = ours.decode(block)
        assert found == expected
        assert ours.size == sum(32 + len(name) + len(value) for name, value in found)
        assert ours._entries == [tuple(entry) for entry in reversed(theirs.header_table.dynamic_entries)]
        assert ours._used == theirs.header_table._current_size <= ours._capacity
        assert ours._sizes == [32 + len(name) + len(value) for name, value in ours._entries]
        lists.append(found)
    return lists


names = st.sampled_from([b":method", b":path", b"x", b"cookie", b"user-agent", b"x-long-" + b"n" * 90, b""])
values = st.one_of(
    st.sampled_from([b"", b"GET", b"/", b"v" * 100, b"w" * 1500, b"\xff\0 "]), st.binary(max_size=40)
)
fields = st.lists(st.tuples(names, values), max_size=8)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    lists=st.lists(fields, max_size=8), sizes=st.lists(st.sampled_from([0, 40, 100, 1000, 4096]), max_size=8)
)
def test_what_the_library_encodes(lists: list[Fields], sizes: list[int]) -> None:
    encoder = hpack.Encoder()
    blocks = []
    for at, each in enumerate(lists):
        if at < len(sizes):
            encoder.header_table_size = sizes[at]
        blocks.append(encoder.encode(each, huffman=bool(at % 2)))
    assert decode_both(blocks) == lists


@st.composite
def representations(draw: st.DrawFn) -> bytes:
    """One field, or table size, as an encoder might write it, or nearly."""

    def integer(prefix: int, start: int, value: int) -> bytes:
        coded = encode_integer(value, prefix)
        coded[0] |= start
        return bytes(coded)

    def string() -> bytes:
        text = draw(st.one_of(st.sampled_from([b"a", b"GET", b"x" * 130]), st.binary(min_size=1, max_size=9)))
        if draw(st.booleans()):
            text = _HUFFMAN.encode(text)
            return integer(7, 0x80, len(text)) + text
        return integer(7, 0, len(text) + draw(st.sampled_from([0] * 20 + [1]))) + text

    index = draw(st.one_of(st.integers(1, 61), st.integers(0, 70), st.sampled_from([200, 2**28, 2**40])))
    match draw(st.integers(0, 9)):
        case 0:
            return integer(5, 0x20, draw(st.sampled_from([0, 31, 60, 100, 4096, 4097])))
        case 1 | 2 | 3:
            return integer(7, 0x80, index)
        case 4 | 5 | 6:
            return integer(6, 0x40, index) + (string() if index else string() + string())
        case _:
            start = draw(st.sampled_from([0, 0x10]))
            return integer(4, start, index) + (string() if index else string() + string())


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(blocks=st.lists(st.lists(representations(), max_size=6).map(b"".join), max_size=5))
def test_near_valid_blocks(blocks: list[bytes]) -> None:
    decode_both(blocks)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, derandomize=True)
@given(block=st.binary(max_size=60))
@example(b"\x3f\xe1\x1f\x20\x82")
@example(b"\xff\xff\xff\xff\xff\x7f")
@example(b"\xff\xff\xff\xff\xff\xff\x01")
def test_random_blocks(block: bytes) -> None:
    decode_both([block])


@pytest.mark.slow
@settings(max_examples=400, deadline=None, derandomize=True)
@given(coded=st.binary(min_size=1, max_size=20), text=st.binary(min_size=1, max_size=200))
def test_huffman(coded: bytes, text: bytes) -> None:
    decode_both([b"\x00\x01a" + bytes([0x80 | len(coded)]) + coded])
    valid = _HUFFMAN.encode(text)
    whole = bytes(encode_integer(len(valid), 7))
    block = b"\x00\x01a" + bytes([whole[0] | 0x80]) + whole[1:] + valid
    assert decode_both([block, block]) == [[(b"a", text)]] * 2


def test_every_byte_in_huffman_code() -> None:
    for byte in range(256):
        assert hpack_decoder._decode_huffman(_HUFFMAN.encode(bytes([byte]))) == bytes([byte])
    with pytest.raises(HpackError):
        hpack_decoder._decode_huffman(b"\xff\xff\xff\xff")


def test_whether_a_huffman_string_may_end_depends_on_the_state_alone() -> None:
    from hpack.huffman_table import HUFFMAN_COMPLETE, HUFFMAN_FAIL, HUFFMAN_TABLE

    for state, flags, _ in HUFFMAN_TABLE:
        if not flags & HUFFMAN_FAIL:
            assert hpack_decoder._ENDS[state] == bool(flags & HUFFMAN_COMPLETE)


def test_an_empty_huffman_string_is_empty() -> None:
    assert decode_both([b"\x00\x01a\x80"]) == [[(b"a", b"")]]


def test_an_entry_larger_than_the_table_empties_it() -> None:
    small = b"\x40\x01a\x01b"
    large = b"\x40\x01a" + bytes(encode_integer(5000, 7)) + b"x" * 5000
    decoder = HpackDecoder(65536)
    decoder.decode(small)
    decoder.decode(large)
    assert (decoder._entries, decoder._used) == ([], 0)
    decode_both([small, large, small, b"\xbe"])


def test_the_limit_is_exact() -> None:
    block = b"\x00\x01a\x01b" * 3
    assert len(HpackDecoder(3 * 34).decode(block)) == 3
    with pytest.raises(HeadTooLarge):
        HpackDecoder(3 * 34 - 1).decode(block)


def test_a_bomb_is_a_little_work() -> None:
    """One large entry, named again and again by one byte: decoding stops at the limit."""
    decoder = HpackDecoder(65536)
    decoder.decode(b"\x40\x01a" + bytes(encode_integer(3900, 7)) + b"x" * 3900)
    with pytest.raises(HeadTooLarge):
        decoder.decode(b"\xbe" * 100_000)


def test_memory_of_remembered_strings_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hpack_decoder, "_strings", strings := {})
    monkeypatch.setattr(hpack_encoder, "_known", known := {})
    decoder = HpackDecoder(65536)
    for number in range(5000):
        coded = _HUFFMAN.encode(b"%d" % number)
        assert decoder.decode(b"\x00\x01a" + bytes([0x80 | len(coded)]) + coded) == [(b"a", b"%d" % number)]
        assert encode_fields([(b"a", b"%d" % number)])
        assert len(strings) <= hpack_decoder._STRINGS_MAX
        assert len(known) <= hpack_encoder._KNOWN_MAX
    long = _HUFFMAN.encode(b"x" * 1000)
    before = len(strings)
    decoder.decode(b"\x00\x01a\xff" + bytes(encode_integer(len(long), 7))[1:] + long)
    encode_fields([(b"a", b"x" * 100)])
    assert len(strings) == before
    assert (b"a", b"x" * 100) not in known


def test_decoding_twice_uses_what_is_remembered() -> None:
    block = b"\x00\x01a\x83" + _HUFFMAN.encode(b"/abc")
    assert [HpackDecoder(100).decode(block) for _ in range(2)] == [[(b"a", b"/abc")]] * 2


def test_suspicion_comes_with_the_first_bad_value_and_stays() -> None:
    decoder = HpackDecoder(1000)
    decoder.decode(b"\x40\x01a\x01b")
    assert not decoder.suspicious
    decoder.decode(b"\x40\x01a\x02\nb")
    decoder.decode(b"\x82")
    assert decoder.suspicious


# -- encoding ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(listed=fields, status=st.integers(100, 999))
@example(listed=[(b"accept-encoding", b"gzip, deflate"), (b"content-type", b"text/html")], status=200)
@example(listed=[(b"set-cookie", b"a=b"), (b"set-cookie", b"a=b"), (b"authorization", b"x")], status=404)
def test_what_we_encode(listed: Fields, status: int) -> None:
    decoder = hpack.Decoder()
    for _ in range(2):
        found = decoder.decode(encode_status(status) + encode_fields(listed), raw=True)
        assert found == [(b":status", b"%d" % status), *listed]
        never = [name for name, _ in listed if name in hpack_encoder._SECRET]
        assert [bytes(field[0]) for field in found if not field.indexable] == never
    assert not decoder.header_table.dynamic_entries


def test_the_table_can_be_given_up() -> None:
    decoder = hpack.Decoder()
    decoder.max_allowed_table_size = 0
    with pytest.raises(hpack.HPACKError):
        decoder.decode(encode_status(200), raw=True)
    assert decoder.decode(NO_TABLE + encode_status(200), raw=True) == [(b":status", b"200")]


def test_common_statuses_are_one_byte() -> None:
    assert {len(encode_status(status)) for status in (200, 204, 206, 304, 400, 404, 500)} == {1}


def test_secrets_are_not_remembered() -> None:
    encode_fields([(b"set-cookie", b"session=secret")])
    assert (b"set-cookie", b"session=secret") not in hpack_encoder._known
