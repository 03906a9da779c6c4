"""Compression dictionaries in the fields of requests and responses (RFC 9842).

A client keeps a file that says `Use-As-Dictionary`, and names its hash in `Available-Dictionary` when it asks for
another one, which may then be sent compressed with it. `options.py` writes the one, `handler.py` asks about the other.
Pure; what is malformed is as good as not there. `Dictionary-ID` is not read: siblings are found by the hash, and only
that tells which dictionary the client really has (section 2.1.3).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping

#: Of the value of `id`, in characters.
LONGEST_ID = 1024

# RFC 9651 section 3.3.5: a byte sequence, here of the 32 bytes of a SHA-256. Padding may be missing (section 4.2.7).
_HASH = re.compile(rb"[ \t]*:([A-Za-z0-9+/]{43})=?:[ \t]*")

_TEXT = re.compile(r"[ -~]+")
# In a URL pattern; a backslash makes the next character one like others.
_GROUP = re.compile(r"(?:[^\\(]|\\.)*\(")

_RELATIONS = frozenset({b"origin", b"sec-fetch-mode", b"sec-fetch-site"})


def use_as_dictionary(match: object, name: object = "") -> bytes:
    """The value of Use-As-Dictionary: for which URLs, and the id that clients send along.

    Raises:
        ValueError: it would not be one that clients understand.
    """
    if not isinstance(match, str) or not _TEXT.fullmatch(match):
        raise ValueError(f'{match!r} is no URL pattern; expected one such as "/assets/app.*.js"')
    if _GROUP.match(match):
        raise ValueError(f"{match!r}: regular expressions are not allowed in this URL pattern (RFC 9842)")
    if not isinstance(name, str) or (name and not _TEXT.fullmatch(name)) or len(name) > LONGEST_ID:
        raise ValueError(f"an id has up to {LONGEST_ID:,} characters of ASCII, and {name!r:.100} has others")
    field = f"match={_quoted(match)}"
    return (f"{field}, id={_quoted(name)}" if name else field).encode("ascii")


def _quoted(text: str) -> str:
    """RFC 9651 section 4.1.6."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def available_dictionary(value: bytes) -> bytes | None:
    """The SHA-256 in the value of Available-Dictionary; None if there is none."""
    match = _HASH.fullmatch(value)
    return base64.b64decode(match[1] + b"=") if match is not None else None


def may_reveal(headers: Iterable[tuple[bytes, bytes]], fields: Mapping[bytes, bytes]) -> bool:
    """Whether who asks may also read the answer, so that its size tells nothing new (RFC 9842 section 9.3.3).

    Args:
        headers: the request's.
        fields: the response's, by name.
    """
    asked = {name: value for name, value in headers if name in _RELATIONS}
    if asked.get(b"sec-fetch-site", b"same-origin") == b"same-origin":
        return True
    mode = asked.get(b"sec-fetch-mode", b"same-origin")
    if mode != b"cors":
        return mode in (b"navigate", b"same-origin")
    allowed, origin = fields.get(b"access-control-allow-origin"), asked.get(b"origin")
    return allowed is not None and origin is not None and allowed in (b"*", origin)
