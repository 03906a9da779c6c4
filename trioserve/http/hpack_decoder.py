"""HPACK decoding (RFC 7541) for `frame_engine.py`: what `hpack.Decoder` does, at a tenth of its cost.

The tables are hpack's own, and hpack is the oracle of the differential tests; here they are walked without an object,
a log call or a copy per field. Huffman strings are decoded a byte at a time, by rows made on first use, and short ones
are remembered, since clients say the same things again and again.
"""

from __future__ import annotations

from hpack.huffman_table import HUFFMAN_COMPLETE, HUFFMAN_EMIT_SYMBOL, HUFFMAN_FAIL, HUFFMAN_TABLE
from hpack.table import HeaderTable

from trioserve.http.http2_codes import DEFAULT_TABLE_SIZE
from trioserve.http.http2_requests import are_values_valid

Field = tuple[bytes, bytes]

# The static table; indices begin with 1.
_STATIC: list[Field] = [(b"", b""), *HeaderTable.STATIC_TABLE]
_STATIC_SIZES = [32 + len(name) + len(value) for name, value in _STATIC]
_DYNAMIC = len(_STATIC)  # the first index of the dynamic table

# An integer of more bytes than these (RFC 7541 section 5.1 lets us choose) has no honest use; hpack's bound.
_INTEGER_BYTES = 5

# Decoded Huffman strings; bounded in number and length, since the peer chooses them.
_strings: dict[bytes, bytes] = {}
_STRINGS_MAX = 2048
_STRING_LENGTH = 64

# The machine that reads Huffman codes a byte at a time, made of hpack's, which reads half bytes. A row says for each
# byte where it leads and what text it completes; it is made when the state is first seen (all 257 are some MB).
_FAILED = 256  # the state after what cannot be valid
_Row = list[tuple[int, bytes]]
_rows: list[_Row | None] = [None] * _FAILED + [[(_FAILED, b"")] * 256]
_steps: dict[tuple[int, bytes], tuple[int, bytes]] = {}  # one object for equal steps, of which there are many


def _find_ends() -> list[bool]:
    """Whether a string may end in a state: at its start, or within a code's first seven ones."""
    ends = [True] + [False] * _FAILED
    for state, flags, _ in HUFFMAN_TABLE:
        if not flags & HUFFMAN_FAIL:
            ends[state] = bool(flags & HUFFMAN_COMPLETE)
    return ends


_ENDS = _find_ends()


class HpackError(Exception):
    """The block is no valid HPACK, and the connection's state is lost with it."""


class HeadTooLarge(HpackError):
    """The list is larger than what we would decode."""


class HpackDecoder:
    """The decoding side of one connection.

    Attributes:
        limit: largest list, as RFC 9113 counts it, that is decoded.
        size: of the list that was decoded last.
        suspicious: a value was seen, perhaps in the table now, that no request may have. Until then there is no need
            to look at what comes out of the table, which is most.
    """

    __slots__ = ("_capacity", "_entries", "_fresh", "_sizes", "_used", "limit", "size", "suspicious")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self.suspicious = False
        self._fresh: list[bytes] = []  # values that stood in the block
        self._capacity = DEFAULT_TABLE_SIZE
        self._used = 0
        self._entries: list[Field] = []  # the newest last
        self._sizes: list[int] = []  # of the entries

    def decode(self, block: bytes) -> list[Field]:
        """The fields of a whole header block.

        Raises:
            HpackError: nothing more can be decoded on this connection.
        """
        fields: list[Field] = []
        at = size = 0
        end = len(block)
        limit = self.limit
        entries = self._entries
        try:
            while at < end:
                first = block[at]
                at += 1
                if first >= 0x80:
                    index = first & 0x7F
                    if index == 0x7F:
                        index, at = _integer(block, at, 0x7F)
                    if index < _DYNAMIC:
                        if not index:
                            raise HpackError("index 0")
                        fields.append(_STATIC[index])
                        size += _STATIC_SIZES[index]
                    else:
                        # An index past the oldest entry raises IndexError, like a block that is cut short.
                        fields.append(entries[_DYNAMIC - 1 - index])
                        size += self._sizes[_DYNAMIC - 1 - index]
                elif first & 0xE0 == 0x20:
                    if fields:
                        raise HpackError("a table size that does not come first")
                    at = self._resize(block, at, first & 0x1F)
                    continue
                else:
                    field, at = self._literal(block, at, first)
                    fields.append(field)
                    size += 32 + len(field[0]) + len(field[1])
                if size > limit:
                    raise HeadTooLarge(f"over {limit} bytes")
        except IndexError:
            raise HpackError("a block that is cut short, or an index outside the table") from None
        self.size = size
        if self._fresh:
            if not are_values_valid(self._fresh):
                self.suspicious = True
            self._fresh.clear()
        return fields

    def _literal(self, block: bytes, at: int, first: int) -> tuple[Field, int]:
        """A field whose value, and perhaps name, stands in the block; `at` is behind its first byte."""
        keep = first & 0x40
        mask = 0x3F if keep else 0x0F
        index = first & mask
        if index:
            if index == mask:
                index, at = _integer(block, at, mask)
            name = _STATIC[index][0] if index < _DYNAMIC else self._entries[_DYNAMIC - 1 - index][0]
        else:
            name, at = _string(block, at)
        value, at = _string(block, at)
        self._fresh.append(value)
        field = (name, value)
        if keep:
            size = 32 + len(name) + len(value)
            self._used += size
            self._entries.append(field)
            self._sizes.append(size)
            if self._used > self._capacity:
                self._evict()
        return field, at

    def _resize(self, block: bytes, at: int, capacity: int) -> int:
        if capacity == 0x1F:
            capacity, at = _integer(block, at, 0x1F)
        # We never announce another size than the default.
        if capacity > DEFAULT_TABLE_SIZE:
            raise HpackError(f"a table of {capacity} bytes")
        self._capacity = capacity
        self._evict()
        return at

    def _evict(self) -> None:
        """Drop the oldest until the rest fits; an entry larger than the table empties it (RFC 7541 section 4.4)."""
        used, count = self._used, 0
        sizes = self._sizes
        while used > self._capacity:
            used -= sizes[count]
            count += 1
        self._used = used
        del sizes[:count]
        del self._entries[:count]


def _integer(block: bytes, at: int, value: int) -> tuple[int, int]:
    """The rest of an integer whose prefix is full; IndexError if the block ends before."""
    shift = 0
    for _ in range(_INTEGER_BYTES):
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise HpackError("an integer too long")


def _string(block: bytes, at: int) -> tuple[bytes, int]:
    first = block[at]
    at += 1
    length = first & 0x7F
    if length == 0x7F:
        length, at = _integer(block, at, 0x7F)
    stop = at + length
    if stop > len(block):
        raise HpackError("a string that is cut short")
    text = block[at:stop]
    if first >= 0x80:
        text = _strings.get(text) or _decode_huffman(text)
    return text, stop


def _decode_huffman(coded: bytes) -> bytes:
    state = 0
    parts = []
    for byte in coded:
        row = _rows[state]
        if row is None:
            row = _make_row(state)
        state, text = row[byte]
        parts.append(text)
    if not _ENDS[state]:
        raise HpackError("invalid Huffman code")
    decoded = b"".join(parts)
    if len(coded) <= _STRING_LENGTH:
        if len(_strings) >= _STRINGS_MAX:
            _strings.clear()
        _strings[coded] = decoded
    return decoded


def _make_row(state: int) -> _Row:
    """Two steps of hpack's machine for each byte."""
    row = []
    for byte in range(256):
        reached, text = state, b""
        for half in (byte >> 4, byte & 0x0F):
            reached, flags, symbol = HUFFMAN_TABLE[16 * reached + half]
            if flags & HUFFMAN_FAIL:
                reached, text = _FAILED, b""
                break
            if flags & HUFFMAN_EMIT_SYMBOL:
                text += bytes((symbol,))
        step = (reached, text)
        row.append(_steps.setdefault(step, step))
    _rows[state] = row
    return row
