"""The request fields that decide how a file is answered, picked out of all of them in one pass.

`handler.py` calls `pick_fields` once for each request that comes with a scope; what the server has by name already, as
for HTTP/1, is used as it is. `conditional.py`, `ranges.py` and the choice of a coding read either. It is pure: it never
waits and never raises.
"""

from __future__ import annotations

from collections.abc import Iterable

PICKED = frozenset(
    {
        b"accept",
        b"accept-encoding",
        b"available-dictionary",
        b"if-match",
        b"if-modified-since",
        b"if-none-match",
        b"if-range",
        b"if-unmodified-since",
        b"range",
    }
)


def pick_fields(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """The fields named in `PICKED` by name; `headers` are as in an ASGI scope, with names in lower case.

    Repeated fields become one list (RFC 9110 section 5.2). For those that are no lists (a date, `Range`) that makes a
    value that is malformed, and so ignored, as sections 13.1.3, 13.1.4 and 14.2 ask or allow.
    """
    picked: dict[bytes, bytes] = {}
    repeated: list[tuple[bytes, bytes]] = []
    wanted = PICKED
    for name, value in headers:
        if name in wanted:
            if name in picked:
                repeated.append((name, value))
            else:
                picked[name] = value
    if repeated:
        _join(picked, repeated)
    return picked


def _join(picked: dict[bytes, bytes], repeated: list[tuple[bytes, bytes]]) -> None:
    """Append the repeated values; once for each name, since to do it value by value takes quadratic time."""
    values: dict[bytes, list[bytes]] = {}
    for name, value in repeated:
        values.setdefault(name, [picked[name]]).append(value)
    for name, several in values.items():
        picked[name] = b", ".join(several)
