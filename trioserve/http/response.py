"""Response heads of HTTP/1: checked, framed and written as bytes, the same for every engine.

`http1_exchange.py` calls `DefaultFields.start` when the app sends its start event, so that a bad header raises at the
call that sent it, and adds the framing lines when it knows how long the body is. Names and lines that come again are
looked up, not checked again, and so are whole starts, and the heads that they make.
"""

from __future__ import annotations

import http
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from email.utils import formatdate
from typing import Any

from trioserve.asgi.exchange import invalid_header, listed
from trioserve.errors import InvalidResponse
from trioserve.http.engine import TOKEN
from trioserve.static.answers import Answer

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

# What the head needs to know about a field, by name; HTTP/2's heads (`http2_fields.py`) need it, too.
PLAIN = 0
CONTENT_LENGTH = 1
CONNECTION = 2
TRANSFER_ENCODING = 3
DATE = 4
SERVER = 5
REFUSED = 6

_SPECIAL = {
    b"content-length": CONTENT_LENGTH,
    b"connection": CONNECTION,
    b"transfer-encoding": TRANSFER_ENCODING,
    b"date": DATE,
    b"server": SERVER,
    # Hop-by-hop fields are the server's to set (RFC 9110 section 7.6.1). Upgrade stays allowed: 426 needs it.
    b"keep-alive": REFUSED,
    b"proxy-connection": REFUSED,
    b"te": REFUSED,
}


# Kind of each field name seen, as the app spells it. Bounded: an app may make names up.
_kinds: dict[bytes, int] = {}

# Checked lines of fields that an app sends again and again, lengths among them as numbers; bounded, since values may be
# made up.
_lines: dict[tuple[bytes, bytes], bytes | int] = {}
_CACHE_MAX = 1024
_KEPT_VALUE = 64

# Start events that a worker keeps.
_STARTS_MAX = 256

# Status lines by code, where a phrase is registered.
_status_lines = {
    int(s): f"HTTP/1.1 {int(s)} {s.phrase}\r\n".encode("ascii") for s in http.HTTPStatus if s >= 200
}

# What `check_start` learns besides the length; bits of one int, so that the common case is one comparison with 0.
ASKS_CLOSE = 1
HAS_DATE = 2
HAS_SERVER = 4


class Start:
    """A start event, checked. One for all responses that begin with the same.

    Attributes:
        block: the status line and the fields that are to be written as they stand, without Content-Length.
        length: the value of Content-Length, or None. framing: its line, or nothing.
        flags: `ASKS_CLOSE`, `HAS_DATE`, `HAS_SERVER`.
        is_common: all of its lines were known before, so it is likely to come again.
        is_kept: it is one `DefaultFields`' own, which may leave in it `head`, a whole head with its own fields for a
            connection of HTTP/1.1 that stays open, good until `head_until` (trio's clock). Others are given none.
    """

    __slots__ = ("block", "flags", "framing", "head", "head_until", "is_common", "is_kept", "length")

    def __init__(self, block: bytes, length: int | None, flags: int, *, is_common: bool = False) -> None:
        self.block = block
        self.length = length
        self.framing = b"" if length is None else length_line(length)
        self.flags = flags
        self.is_common = is_common
        self.is_kept = False
        self.head = b""
        self.head_until = -math.inf

    def __repr__(self) -> str:
        return f"<Start {self.block[:40]!r} length={self.length} flags={self.flags}>"


NO_START = Start(b"", None, 0)  #: of a response that has not begun


def length_line(size: int) -> bytes:
    """The line of a Content-Length."""
    return b"content-length: %d\r\n" % size


def check_start(status: int, fields: Sequence[tuple[bytes, bytes]]) -> Start:
    """Check the status and fields of a start event.

    Raises:
        InvalidResponse: they may not be sent.
    """
    line: bytes | int | None
    length: int | None = None
    flags = 0
    is_common = True
    try:
        parts = [_status_lines[status]]
    except (KeyError, TypeError):
        parts = [_status_line(status)]
    for field in fields:
        try:
            line = _lines.get(field)
        except TypeError:
            line = None  # a list, or something unhashable in the pair
        if line is None:
            is_common = False
            name, value = field if type(field) is tuple and len(field) == 2 else check_pair(field)
            # Content-Length varies, so most responses come here: the common spelling without a call.
            kind = CONTENT_LENGTH if name == b"content-length" else kind_of(name)
            if kind == PLAIN:
                line = _check_line(name, value)
            elif kind == CONTENT_LENGTH:
                line = check_length(name, value)
                _keep_line(name, value, line)
            else:
                line, flag = _note_special(kind, name, value)
                flags |= flag
        if type(line) is bytes:
            parts.append(line)
        elif length is None:
            length = line  # type: ignore[assignment]  # written with the framing
        else:
            raise invalid_header(*field, "sent twice")
    return Start(b"".join(parts), length, flags, is_common=is_common)


def check_status(status: Any) -> None:
    """Refuse what is no final status.

    Raises:
        InvalidResponse: it is none.
    """
    if not isinstance(status, int) or isinstance(status, bool) or not 200 <= status <= 999:
        raise InvalidResponse(f"status must be an int from 200 to 999, not {status!r:.80}")


def _status_line(status: Any) -> bytes:
    check_status(status)
    # The space before an empty phrase is required (RFC 9112 section 4).
    return b"HTTP/1.1 %d \r\n" % status


def check_pair(field: Any) -> tuple[Any, Any]:
    """A field as name and value.

    Raises:
        InvalidResponse: it is no pair.
    """
    if not isinstance(field, tuple | list) or len(field) != 2:
        raise InvalidResponse(f"response headers must be pairs of bytes, not {type(field).__name__}")
    return field[0], field[1]


def check_value(name: bytes, value: Any) -> None:
    """Refuse a value that may not be sent.

    Raises:
        InvalidResponse: it is none of bytes, or would end its line.
    """
    if not isinstance(value, bytes):
        raise invalid_header(name, value, "values must be bytes")
    if _CR in value or _LF in value or _NUL in value:
        raise invalid_header(name, value, "a value cannot contain CR, LF or NUL")


def _check_line(name: bytes, value: Any, *, keep: bool = True) -> bytes:
    """The line of a field, checked; remembered if it is likely to come again."""
    check_value(name, value)
    line = b"".join((name, b": ", value, b"\r\n"))
    if keep and len(value) <= _KEPT_VALUE:
        _keep_line(name, value, line)
    return line


def check_length(name: bytes, value: Any) -> int:
    """The value of a Content-Length.

    Raises:
        InvalidResponse: it is no number of bytes.
    """
    if not isinstance(value, bytes) or not value.isdigit() or len(value) > 18:
        raise invalid_header(name, value, f"{value!r:.40} is no length")
    return int(value)


def _keep_line(name: bytes, value: bytes, line: bytes | int) -> None:
    if len(_lines) >= _CACHE_MAX:
        _lines.clear()
    _lines[name, value] = line


def kind_of(name: Any) -> int:
    """What a field of this name is to the head.

    Raises:
        InvalidResponse: it is no field name.
    """
    kind = _kinds.get(name) if isinstance(name, bytes) else None
    if kind is None:
        if not isinstance(name, bytes) or not TOKEN.fullmatch(name):
            raise invalid_header(name, b"", "not a field name (RFC 9110 section 5.1)")
        if len(_kinds) >= _CACHE_MAX:
            _kinds.clear()
        kind = _kinds[name] = _SPECIAL.get(name.lower(), PLAIN)
    return kind


def _note_special(kind: int, name: bytes, value: bytes) -> tuple[bytes, int]:
    """A field that is not the app's alone: its line, empty if it is not to be written, and the flag it sets."""
    line = _check_line(name, value, keep=False)  # what sets a flag must be looked at each time
    if kind == DATE:
        return line, HAS_DATE
    if kind == SERVER:
        return line, HAS_SERVER
    if kind == CONNECTION:
        options = connection_options(name, value)
        return line if b"upgrade" in options else b"", ASKS_CLOSE if b"close" in options else 0
    check_hop_by_hop(kind, name, value)
    return b"", 0


def connection_options(name: bytes, value: bytes) -> set[bytes]:
    """What an app asks of the connection.

    Raises:
        InvalidResponse: something that is not its to ask.
    """
    options = {option.strip() for option in value.lower().split(b",")}
    if not options <= {b"close", b"keep-alive", b"upgrade"}:
        raise invalid_header(name, value, "the server decides what concerns the connection")
    return options


def check_hop_by_hop(kind: int, name: bytes, value: bytes) -> None:
    """Pass over `Transfer-Encoding: chunked` and `Keep-Alive`, which the server sees to.

    Frameworks set them, and so do views that hand on what another server has answered.

    Raises:
        InvalidResponse: another transfer coding, or another field that is not the app's to set.
    """
    if kind == TRANSFER_ENCODING:
        if value.strip().lower() != b"chunked":
            raise invalid_header(name, value, "the server frames the body; leave it out")
    elif name.lower() != b"keep-alive":
        raise invalid_header(name, value, "hop-by-hop fields are the server's to set")


def pairs_beside_head(fields: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, Any]]:
    """Fields of an interim response or of trailers, whose values are still to be checked.

    Raises:
        InvalidResponse: a name that may not be sent, or one that only a head may carry.
    """
    for field in listed(fields):
        name, value = check_pair(field)
        if kind_of(name) in (CONTENT_LENGTH, CONNECTION, TRANSFER_ENCODING, REFUSED):
            raise invalid_header(name, value, "not allowed in trailers or interim responses")
        yield name, value


def field_block(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Interim-response fields or trailers as checked bytes.

    Raises:
        InvalidResponse: a name or value that may not be sent, or one that only a head may carry.
    """
    return b"".join([_check_line(name, value, keep=False) for name, value in pairs_beside_head(fields)])


def flags_of(fields: Iterable[tuple[bytes, bytes]]) -> int:
    """Which of the server's own fields are among checked ones (`HAS_DATE`, `HAS_SERVER`)."""
    names = {name.lower() for name, _ in fields}
    return (HAS_DATE if b"date" in names else 0) | (HAS_SERVER if b"server" in names else 0)


class DefaultFields:
    """The fields the server adds by itself: Date (made once a second), Server, Alt-Svc; and the heads they stand in.

    Attributes:
        both: all of them, ready to write; good until `valid_until` (trio's clock).
        pairs: the same as names and values, for HTTP/2.
    """

    __slots__ = (
        "_alt", "_date", "_fixed", "_include_date", "_server", "_starts", "both", "pairs", "valid_until",
    )  # fmt: skip

    def __init__(
        self, *, date: bool, server: bytes | None, others: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        self._include_date = date
        self._server = b"server: %b\r\n" % server if server else b""
        fixed = list(others)
        self._alt = b"".join(b"%b: %b\r\n" % field for field in fixed)
        self._fixed = [(b"server", server), *fixed] if server else fixed
        self._date = b""
        self.both = b""
        self.pairs: list[tuple[bytes, bytes]] = []
        self.valid_until = -1.0
        self._starts: dict[tuple[object, ...], Start] = {}

    def start(self, status: int, fields: Sequence[tuple[bytes, bytes]]) -> Start:
        """What `check_start` says of a start event, looked up if it came before.

        Raises:
            InvalidResponse: it may not be sent.
        """
        try:
            start = self._starts.get((status, *fields))
        except TypeError:
            return check_start(status, fields)  # a list, or something unhashable in a pair
        if start is None:
            start = check_start(status, fields)
            if start.is_common:
                if len(self._starts) >= _STARTS_MAX:
                    self._starts.clear()
                self._starts[status, *fields] = start
                start.is_kept = True
        return start

    def head(self, start: Start, now: float) -> bytes:
        """A whole head with the Content-Length of `start`, for a connection of HTTP/1.1 that stays open."""
        head = b"".join((start.block, self.block(now, start.flags), start.framing, b"\r\n"))
        if start.is_kept:
            start.head = head
            start.head_until = self.valid_until
        return head

    def refresh(self, now: float) -> bytes:
        """Make the Date of this second; `now` is trio's clock, by which it is renewed when the second is over."""
        wall = time.time()
        if self._include_date:
            date = formatdate(int(wall), usegmt=True).encode("ascii")
            self._date = b"date: %b\r\n" % date
            self.pairs = [(b"date", date), *self._fixed]
        else:
            self.pairs = self._fixed
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

    def fields(self, now: float, flags: int = 0) -> list[tuple[bytes, bytes]]:
        """As `block`, as names and values; not to be changed."""
        if now >= self.valid_until:
            self.refresh(now)
        if not flags & (HAS_DATE | HAS_SERVER):
            return self.pairs
        left_out = (b"date" if flags & HAS_DATE else b"", b"server" if flags & HAS_SERVER else b"")
        return [field for field in self.pairs if field[0] not in left_out]


def check_answer(answer: Answer) -> Start:
    """What `check_start` says of a prepared response; remembered in it."""
    answer.checked = start = check_start(answer.status, answer.fields)
    return start


def prepare_message(answer: Answer, defaults: DefaultFields, now: float) -> bytes | None:
    """A whole prepared response for a connection that is kept, good for this second; None for odd fields."""
    start = answer.checked or check_answer(answer)
    if start.flags:
        return None
    answer.message = message = defaults.head(start, now) + answer.body
    answer.message_until = defaults.valid_until
    answer.message_by = defaults
    return message


def minimal_response(
    status: int,
    defaults: bytes,
    *,
    extra: bytes = b"",
    head_only: bool = False,
    page: tuple[bytes, bytes] | None = None,
) -> bytes:
    """A whole response of ours, which closes the connection: for refusals and for errors before a response.

    Its body is the status in words, or `page`: a content type, and the body.
    """
    phrase = http.HTTPStatus(status).phrase
    kind, body = page or (b"text/plain; charset=utf-8", f"{status} {phrase}\n".encode("ascii"))
    head = b"%b%bcontent-type: %b\r\ncontent-length: %d\r\n%bconnection: close\r\n\r\n" % (
        _status_lines[status], defaults, kind, len(body), extra,
    )  # fmt: skip
    return head if head_only else head + body
