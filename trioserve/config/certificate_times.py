"""From when until when a certificate is valid, read out of its DER encoding (RFC 5280 section 4.1).

Called by `tls_context.py`. Python can tell it only of a certificate that a peer has shown and that was verified. Pure.
"""

from __future__ import annotations

from datetime import UTC, datetime

_SEQUENCE, _UTC_TIME, _VERSION = 0x30, 0x17, 0xA0


def validity(der: bytes) -> tuple[datetime, datetime]:
    """The first and the last moment; `ValueError` for what is no certificate."""
    try:
        _, certificate, _ = _element(der, 0)
        _, body, _ = _element(certificate, 0)
        position = 0
        tag, _, after = _element(body, 0)
        if tag == _VERSION:  # left out in version 1
            position = after
        for _ in ("serial number", "signature", "issuer"):
            _, _, position = _element(body, position)
        tag, times, _ = _element(body, position)
        if tag != _SEQUENCE:
            raise ValueError("no validity where it should be")
        begin_tag, begin, position = _element(times, 0)
        end_tag, end, _ = _element(times, position)
    except IndexError:
        raise ValueError("a certificate that ends too early") from None
    return _moment(begin_tag, begin), _moment(end_tag, end)


def _element(data: bytes, position: int) -> tuple[int, bytes, int]:
    """Tag, content and the position behind it."""
    tag, size = data[position], data[position + 1]
    position += 2
    if size & 0x80:
        count = size & 0x7F
        size = int.from_bytes(data[position : position + count], "big")
        position += count
    if position + size > len(data):
        raise IndexError
    return tag, data[position : position + size], position + size


def _moment(tag: int, content: bytes) -> datetime:
    text = content.decode("ascii")
    if tag == _UTC_TIME:  # with two digits of the year, from 1950 on
        text = ("19" if int(text[:2]) >= 50 else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
