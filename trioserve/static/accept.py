"""`Accept`: how much a media type is wanted (RFC 9110 section 12.5.1).

The handler asks for two: whether a page may stand in for what is not there, and in which form a directory is listed.
Pure; what is malformed counts for nothing.
"""

from __future__ import annotations

import re
from functools import lru_cache

# Elements that are read, and parameters of each: browsers send ten elements.
_MOST_ELEMENTS = 64
_MOST_PARAMETERS = 8

_WEIGHT = re.compile(rb"0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?")


def media_quality(accept: bytes | None, media_type: bytes, *, named: bool = False) -> float:
    """The weight of a media type, from 0 (refused) to 1; the most specific range that covers it decides.

    Args:
        accept: the field value, several joined by `, `; None if the request has none, which accepts anything.
        media_type: such as b"text/html", in lower case.
        named: only a range that names the type itself counts. Everything accepts `*/*`, few mean a page by it.
    """
    if accept is None:
        return 0.0 if named else 1.0
    ranges = _parse(accept) if len(accept) > 500 else _parse_cached(accept)
    if media_type in ranges or named:
        return ranges.get(media_type, 0.0)
    any_subtype = media_type.partition(b"/")[0] + b"/*"
    return ranges.get(any_subtype, ranges.get(b"*/*", 0.0))


def _parse(accept: bytes) -> dict[bytes, float]:
    found: dict[bytes, float] = {}
    for element in accept.lower().split(b",", _MOST_ELEMENTS)[:_MOST_ELEMENTS]:
        parts = element.split(b";", _MOST_PARAMETERS + 1)[: _MOST_PARAMETERS + 1]
        media_range, *parameters = (part.strip(b" \t") for part in parts)
        weight = 1.0
        for parameter in parameters:
            if parameter.startswith(b"q="):
                weight = float(parameter[2:]) if _WEIGHT.fullmatch(parameter[2:]) else 0.0
        if media_range not in found or weight > found[media_range]:
            found[media_range] = weight
    return found


_parse_cached = lru_cache(maxsize=256)(_parse)
