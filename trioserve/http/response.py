"""Response heads of HTTP/1: checked, framed and written as bytes, the same for both engines.

`http1.py` calls `check_start` when the app sends its start event, so that a bad header raises at the call that
sent it, and adds the framing lines when it knows how long the body is. Field names are checked once and then known;
values are checked all together, on the joined block.
"""

from __future__ import annotations

import http
import time
from collections.abc import Iterable, Sequence
from email.utils import formatdate
from typing import Any

from trioserve.asgi.exchange import invalid_header, listed
from trioserve.errors import InvalidResponse
from trioserve.http.engine import TOKEN

CHUNKED = b"transfer-encoding: chunked\r\n"
CLOSE = b"connection: close\r\n"
KEEP_ALIVE = b"connection: keep-alive\r\n"
LAST_CHUNK = b"0\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

# Status codes whose responses have no body (RFC 9110 section 6.4.1).
BODILESS = frozenset({204, 304})

# The bytes that end a line or a C string (RFC 9110 section 5.5). A joined block must hold exactly its own CRLFs.
# As numbers: looking for an int in bytes is a memchr, for a bytes object it is not.
_CR, _LF, _NUL = b"\r\n\0"

# What the head needs to know about a field, by name.
_PLAIN = 0
_CONTENT_LENGTH = 1
_CONNECTION = 2
_TRANSFER_ENCODING = 3
_DATE = 4
_SERVER = 5
_REFUSED = 6

_SPECIAL = {
    b"content-length": _CONTENT_LENGTH,
    b"connection": _CONNECTION,
    b"transfer-encoding": _TRANSFER_ENCODING,
    b"date": _DATE,
    b"server": _SERVER,
    # Hop-by-hop fields are the server's to set (RFC 9110 section 7.6.1). Upgrade stays allowed: 426 needs it.
    b"keep-alive": _REFUSED,
    b"proxy-connection": _REFUSED,
    b"te": _REFUSED,
}


# Kind of each field name seen, as the app spells it. Bounded: an app may make names up.
_kinds: dict[bytes, int] = {}
_KINDS_MAX = 1024

# Status lines by code; those without a registered phrase are added when they are used (at most 800).
_status_lines = {
    int(s): f"HTTP/1.1 {int(s)} {s.phrase}\r\n".encode("ascii") for s in http.HTTPStatus if s >= 200
}

# What `check_start` learns besides the length; bits of one int, so that the common case is one comparison with 0.
ASKS_CLOSE = 1
HAS_DATE = 2
HAS_SERVER = 4


def check_start(status: int, fields: Sequence[tuple[bytes, bytes]]) -> tuple[bytes, int | None, int]:
    """Check the status and fields of a start event.

    Returns:
        The status line and the fields that are to be written as they stand, as bytes without the empty line; the
        Content-Length or None; and flags: `ASKS_CLOSE`, `HAS_DATE`, `HAS_SERVER`.

    Raises:
        InvalidResponse: they may not be sent.
    """
    length: int | None = None
    flags = 0
    try:
        parts = [_status_lines[status]]
        for name, value in fields:
            kind = _kinds[name]
            if kind:
                if kind == _CONTENT_LENGTH:
                    if not value.isdigit() or length is not None:
                        raise invalid_header(name, value, f"{value!r:.40} is no length, or it is sent twice")
                    length = int(value)
                else:
                    written, flag = _note_special(kind, name, value)
                    flags |= flag
                    if not written:
                        continue
            parts += (name, b": ", value, b"\r\n")
        block = b"".join(parts)
    except KeyError:
        # A status or a name that is seen for the first time: check it, remember it, begin again.
        _learn(status, fields)
        return check_start(status, fields)
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidResponse(f"response headers must be pairs of bytes: {error}") from None
    lines = len(parts) // 4 + 1
    if block.count(_CR) != lines or block.count(_LF) != lines or _NUL in block:
        raise _find_injection(fields)
    if status == 204 and length is not None:
        # RFC 9110 section 8.6: not here. Frameworks set it out of habit, so it is dropped, not refused.
        kept = [(name, value) for name, value in fields if _kinds[name] != _CONTENT_LENGTH]
        return check_start(status, kept)
    return block, length, flags


def _learn(status: Any, fields: Sequence[Any]) -> None:
    if status not in _status_lines:
        if not isinstance(status, int) or isinstance(status, bool) or not 200 <= status <= 999:
            raise InvalidResponse(f"status must be an int from 200 to 999, not {status!r:.80}")
        # The space before an empty phrase is required (RFC 9112 section 4).
        _status_lines[status] = b"HTTP/1.1 %d \r\n" % status
    if len(_kinds) >= _KINDS_MAX:
        _kinds.clear()
    for field in fields:
        if not isinstance(field, tuple | list) or len(field) != 2:
            raise InvalidResponse(f"response headers must be pairs of bytes, not {type(field).__name__}")
        _kind_of(field[0])


def _kind_of(name: Any) -> int:
    kind = _kinds.get(name) if isinstance(name, bytes) else None
    if kind is None:
        if not isinstance(name, bytes) or not TOKEN.fullmatch(name):
            raise invalid_header(name, b"", "not a field name (RFC 9110 section 5.1)")
        kind = _kinds[name] = _SPECIAL.get(name.lower(), _PLAIN)
    return kind


def _note_special(kind: int, name: bytes, value: bytes) -> tuple[bool, int]:
    """A field that is not the app's alone: whether it is written as it stands, and the flag it sets."""
    if kind == _DATE:
        return True, HAS_DATE
    if kind == _SERVER:
        return True, HAS_SERVER
    if kind == _CONNECTION:
        options = {option.strip() for option in value.lower().split(b",")}
        if not options <= {b"close", b"keep-alive", b"upgrade"}:
            raise invalid_header(name, value, "the server decides what concerns the connection")
        return b"upgrade" in options, ASKS_CLOSE if b"close" in options else 0
    if kind == _TRANSFER_ENCODING:
        if value.strip().lower() != b"chunked":
            raise invalid_header(name, value, "the server frames the body; leave it out")
        return False, 0
    raise invalid_header(name, value, "hop-by-hop fields are the server's to set")


def _find_injection(fields: Iterable[tuple[bytes, bytes]]) -> InvalidResponse:
    for name, value in fields:
        if any(byte in value for byte in (b"\r", b"\n", b"\0")):
            return invalid_header(name, value, "a value cannot contain CR, LF or NUL")
    return InvalidResponse("response headers contain CR, LF or NUL")


def field_block(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Interim-response fields or trailers as checked bytes.

    Raises:
        InvalidResponse: a name or value that may not be sent, or one that only a head may carry.
    """
    fields = listed(fields)
    parts: list[bytes] = []
    for field in fields:
        if not isinstance(field, tuple | list) or len(field) != 2:
            raise InvalidResponse("response headers must be pairs of bytes")
        name, value = field
        if _kind_of(name) in (_CONTENT_LENGTH, _CONNECTION, _TRANSFER_ENCODING, _REFUSED):
            raise invalid_header(name, value, "not allowed in trailers or interim responses")
        if not isinstance(value, bytes):
            raise invalid_header(name, value, "values must be bytes")
        parts += (name, b": ", value, b"\r\n")
    block = b"".join(parts)
    if block.count(_CR) != len(fields) or block.count(_LF) != len(fields) or _NUL in block:
        raise _find_injection(fields)
    return block


class DefaultFields:
    """The fields the server adds by itself: Date (made once a second), Server, Alt-Svc.

    Attributes:
        both: all of them, ready to write; good until `valid_until` (trio's clock).
    """

    __slots__ = ("_alt", "_date", "_include_date", "_server", "both", "valid_until")

    def __init__(
        self, *, date: bool, server: bytes | None, others: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        self._include_date = date
        self._server = b"server: %b\r\n" % server if server else b""
        self._alt = b"".join(b"%b: %b\r\n" % field for field in others)
        self._date = b""
        self.both = b""
        self.valid_until = -1.0

    def refresh(self, now: float) -> bytes:
        """Make the Date of this second; `now` is trio's clock, by which it is renewed when the second is over."""
        wall = time.time()
        if self._include_date:
            self._date = f"date: {formatdate(int(wall), usegmt=True)}\r\n".encode("ascii")
        self.both = self._date + self._server + self._alt
        self.valid_until = now + 1.0 - wall % 1.0
        return self.both

    def block(self, now: float, flags: int = 0) -> bytes:
        """The lines to add, less those that `flags` say the app has set itself."""
        both = self.both if now < self.valid_until else self.refresh(now)
        if not flags:
            return both
        date = b"" if flags & HAS_DATE else self._date
        return date + (b"" if flags & HAS_SERVER else self._server) + self._alt


def minimal_response(status: int, defaults: bytes, *, extra: bytes = b"", head_only: bool = False) -> bytes:
    """A whole response of ours, which closes the connection: for refusals and for errors before a response."""
    phrase = http.HTTPStatus(status).phrase
    body = f"{status} {phrase}\n".encode("ascii")
    head = b"%b%bcontent-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\n%bconnection: close\r\n\r\n" % (
        _status_lines[status], defaults, len(body), extra,
    )  # fmt: skip
    return head if head_only else head + body
