"""HPACK encoding (RFC 7541) for `frame_engine.py`, without any state: the same fields give the same bytes for everyone.

No dynamic table and no Huffman codes: a few bytes more on the wire, but an encoded field can be remembered for all
connections, and a response head is a join of what is remembered. Fields that are nobody else's business are marked
"never indexed", so that no proxy keeps them either, and are not remembered here.
"""

from __future__ import annotations

from collections.abc import Iterable

from hpack.table import HeaderTable

# Never to be indexed (RFC 7541 section 7.1.3).
_SECRET = frozenset({b"set-cookie", b"authorization", b"proxy-authorization", b"cookie"})

_NAMES: dict[bytes, int] = {}  # the first index of a name in the static table
_WHOLE: dict[tuple[bytes, bytes], int] = {}  # fields that are there with their value
for _index, _field in enumerate(HeaderTable.STATIC_TABLE, 1):
    _NAMES.setdefault(_field[0], _index)
    _WHOLE.setdefault(_field, _index)

# "The table is empty": to be sent after a peer has made its table smaller (RFC 7541 section 4.2). There it stays.
NO_TABLE = b"\x20"

# Encoded fields by name and value, bounded: values may be made up.
_known: dict[tuple[bytes, bytes], bytes] = {}
_KNOWN_MAX = 1024
_KNOWN_VALUE = 64
_statuses: dict[int, bytes] = {}


def encode_fields(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A header block, or a part of one."""
    known = _known
    return b"".join([known.get(field) or _encode_field(field) for field in fields])


def encode_status(status: int) -> bytes:
    """The pseudo-field of a response."""
    return _statuses.get(status) or _statuses.setdefault(
        status, _encode_field((b":status", b"%d" % status), keep=False)
    )


def _encode_field(field: tuple[bytes, bytes], *, keep: bool = True) -> bytes:
    name, value = field
    index = _WHOLE.get((name, value))
    if index is not None and value:
        return bytes((0x80 | index,))  # the static table has 61 entries: one byte
    secret = name in _SECRET
    start = 0x10 if secret else 0x00
    index = _NAMES.get(name)
    if index is None:
        coded = b"%c%b%b%b%b" % (start, _integer(len(name), 7), name, _integer(len(value), 7), value)
    else:
        first = _integer(index, 4)
        coded = b"%c%b%b%b" % (start | first[0], first[1:], _integer(len(value), 7), value)
    if keep and not secret and len(value) <= _KNOWN_VALUE:
        if len(_known) >= _KNOWN_MAX:
            _known.clear()
        _known[name, value] = coded
    return coded


def _integer(value: int, bits: int) -> bytes:
    """RFC 7541 section 5.1, with the bits before the prefix 0."""
    most = (1 << bits) - 1
    if value < most:
        return bytes((value,))
    value -= most
    coded = [most]
    while value >= 0x80:
        coded.append(value & 0x7F | 0x80)
        value >>= 7
    coded.append(value)
    return bytes(coded)
