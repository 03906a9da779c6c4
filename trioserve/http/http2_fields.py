"""Response fields of HTTP/2, checked: the same rules as for HTTP/1 (`response.py`), another shape.

Used by `http2_exchange.py` and `http2_stream.py`. Names leave in lower case and values without white space around
them (RFC 9113 section 8.2.1); what belongs to one HTTP/1 connection is refused where HTTP/1 refuses it, and otherwise
left out (section 8.2.2), so that an app need not know which of the two it is speaking. Nothing here waits.
"""

from __future__ import annotations

import http
from collections.abc import Iterable, Sequence
from typing import Any

from trioserve.asgi.exchange import invalid_header
from trioserve.http.response import (
    CONNECTION,
    CONTENT_LENGTH,
    DATE,
    HAS_DATE,
    HAS_SERVER,
    PLAIN,
    SERVER,
    check_hop_by_hop,
    check_length,
    check_pair,
    check_status,
    check_value,
    connection_options,
    kind_of,
    pairs_beside_head,
)

Fields = list[tuple[bytes, bytes]]

_SPACE = b" \t"
_UPGRADE = b"upgrade"

# Checked fields that an app sends again and again, as they are to be sent. Bounded, since values may be made up.
_kept: dict[tuple[bytes, bytes], tuple[bytes, bytes]] = {}
_KEPT_MAX = 1024
_KEPT_VALUE = 64


def check_start(status: int, fields: Sequence[tuple[bytes, bytes]]) -> tuple[Fields, int | None, int]:
    """Check the status and fields of a start event.

    Returns:
        The fields to send, without Content-Length; that length or None; and flags (`HAS_DATE`, `HAS_SERVER`).

    Raises:
        InvalidResponse: they may not be sent.
    """
    if type(status) is not int or not 200 <= status <= 999:
        check_status(status)
    length: int | None = None
    flags = 0
    checked: Fields = []
    for field in fields:
        try:
            known = _kept.get(field)
        except TypeError:
            known = None  # a list, or something unhashable in the pair
        if known is None:
            name, value = field if type(field) is tuple and len(field) == 2 else check_pair(field)
            kind = CONTENT_LENGTH if name == b"content-length" else kind_of(name)
            if kind == CONTENT_LENGTH:
                if length is not None:
                    raise invalid_header(name, value, "sent twice")
                length = check_length(name, value)
                continue
            if kind == PLAIN:
                known = _check_field(name, value)
                if known is None:
                    continue
            else:
                known, flag = _note_special(kind, name, value)
                flags |= flag
                if known is None:
                    continue
        checked.append(known)
    return checked, length, flags


def _check_field(name: bytes, value: Any, *, keep: bool = True) -> tuple[bytes, bytes] | None:
    """The field as it is to be sent; remembered if it is likely to come again. None for `upgrade`."""
    check_value(name, value)
    sent = name.lower(), value.strip(_SPACE)
    if sent[0] == _UPGRADE:
        return None
    if keep and len(value) <= _KEPT_VALUE:
        if len(_kept) >= _KEPT_MAX:
            _kept.clear()
        _kept[name, value] = sent
    return sent


def _note_special(kind: int, name: bytes, value: Any) -> tuple[tuple[bytes, bytes] | None, int]:
    """A field that is not the app's alone: as it is to be sent, None if it is not, and the flag it sets."""
    field = _check_field(name, value, keep=False)
    if kind == DATE:
        return field, HAS_DATE
    if kind == SERVER:
        return field, HAS_SERVER
    if kind == CONNECTION:
        connection_options(name, value)
        return None, 0
    check_hop_by_hop(kind, name, value)
    return None, 0


def check_fields(fields: Iterable[tuple[bytes, bytes]]) -> Fields:
    """Interim-response fields or trailers, checked.

    Raises:
        InvalidResponse: a name or value that may not be sent, or one that only a head may carry.
    """
    checked = [_check_field(name, value, keep=False) for name, value in pairs_beside_head(fields)]
    return [field for field in checked if field is not None]


def minimal_response(
    status: int, defaults: Fields, extra: Fields, page: tuple[bytes, bytes] | None = None
) -> tuple[Fields, bytes]:
    """Fields and body of a response of ours: the status in words, or `page`, a content type and a body."""
    phrase = http.HTTPStatus(status).phrase
    kind, body = page or (b"text/plain; charset=utf-8", f"{status} {phrase}\n".encode("ascii"))
    return [*defaults, (b"content-type", kind), (b"content-length", b"%d" % len(body)), *extra], body
