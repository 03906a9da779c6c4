"""The fastest engine: whole heads parsed by picohttpparser (C) through gunicorn_h1c.

Used by `http1.py` where gunicorn_h1c is installed. It finds the end of the head, its first line and all fields in one
call, where `httptools_engine.py` calls Python for each field. It has an opinion of its own about much that `Engine`
decides (methods, limits, framing); what it dislikes for whatever reason is read again in `Engine`'s way, with the field
lines under names that it has no opinion of. Bodies are none of its business.
"""

from __future__ import annotations

import sys

from gunicorn_h1c import HttpRequest, parse_request_fast

from trioserve.errors import RequestRefused
from trioserve.http.engine import METHODS, Engine, Headers, neutral_head, unmark
from trioserve.structure.context import Limits

# What picohttpparser by itself lets pass, and gunicorn_h1c 0.6.10 does not; another release, or a build with another
# picohttpparser, may: lines that end with LF alone or go on with a space, which proxies may read otherwise (RFC 9112
# section 11.2).
_LAX = (
    b"GET / HTTP/1.1\nA: b\r\n\r\n",
    b"GET / HTTP/1.1\r\nA: b\nC: d\r\n\r\n",
    b"GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n",
)


def _accepts(head: bytes) -> bool:
    try:
        parse_request_fast(head)
    except Exception:  # as in `begin_head`
        return False
    return True


if any(map(_accepts, _LAX)) or not hasattr(HttpRequest, "asgi_headers"):
    raise ImportError("this gunicorn_h1c is not strict enough, or too old; 0.6.10 would do")

_NO_LIMIT = sys.maxsize
_SLASH, _HASH, _H = b"/#H"


class H1cEngine(Engine):
    """picohttpparser behind the engine interface."""

    __slots__ = ("_short",)

    parses_at_once = True

    def __init__(self, limits: Limits, *, raw_names: bool = False) -> None:
        super().__init__(limits, raw_names=raw_names)
        self._short = min(limits.head_size, limits.target_size)  # nothing is too long in such a head

    def begin_head(self, data: bytes) -> bool:
        if self._pending:
            return self._begin_slowly(data)
        try:
            request = parse_request_fast(data)
            method = METHODS[request.method]
        except Exception:  # noqa: S110 - its IncompleteError has no public name; what is wrong is found out below
            pass
        else:
            target: bytes = request.path
            end: int = request.consumed
            at = len(method) + 1
            if (
                # It skips an empty line before the head, and takes several spaces for one.
                data[at] == _SLASH
                and data[at + len(target) + 1] == _H
                and _HASH not in target
                and target.isascii()
                and end <= self._short
            ):
                if end == len(data):
                    self._head = data
                    self.leftover = b""
                else:
                    self._head = data[:end]
                    self.leftover = data[end:]
                self.method = method
                self.target = target
                self.version = "1.1" if request.minor_version else "1.0"
                self.headers = list(request.headers) if self._raw_names else request.asgi_headers
                return True
        return self._begin_slowly(data)

    def _begin_slowly(self, data: bytes) -> bool:
        if not super().begin_head(data):
            return False
        super().parse_head()
        return True

    def parse_head(self) -> None:
        """Done already."""

    def parse_fields(self, head: bytes) -> Headers:
        # By its syntax alone: its own rules were what it disliked, perhaps.
        try:
            request = parse_request_fast(neutral_head(head), 0, _NO_LIMIT, _NO_LIMIT, _NO_LIMIT)
        except ValueError as error:
            raise RequestRefused(400, str(error)) from None
        return unmark(request.headers if self._raw_names else request.asgi_headers)
