"""The head of a response as content coding sees it, and what coding changes in it. Pure.

Read by `compression.py`. Fields are lists of pairs as in ASGI; what comes in is never changed, since the app may send
the same list again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Field = tuple[bytes, bytes]
Fields = list[Field]

# Digests of the content, or of the coded representation: right only for the bytes that the app has sent.
_DIGESTS = frozenset({b"content-digest", b"repr-digest", b"digest", b"content-md5"})

_READ = _DIGESTS | {
    b"content-type",
    b"content-length",
    b"content-encoding",
    b"content-range",
    b"cache-control",
    b"etag",
}

# What says something else, or something wrong, once the body is coded. Ranges of a coded body that is made anew for
# each request are no use to anyone.
_REPLACED = frozenset({b"content-length", b"content-encoding", b"accept-ranges", b"etag"})


@dataclass(slots=True)
class CodedHead:
    """What matters of a head.

    Attributes:
        fields: all of them.
        content_type: its value, or None.
        length: the declared Content-Length, or None.
        etag: its value, or None.
        partial: it has a Content-Range.
        opted_out: the app said `Content-Encoding: identity`, the middleware's sign for "not this one".
        untouchable: coded already, or sealed by `no-transform` or a digest of the bytes.
    """

    fields: Fields
    content_type: bytes | None = None
    length: int | None = None
    etag: bytes | None = None
    partial: bool = False
    opted_out: bool = False
    untouchable: bool = False


def read_head(fields: Iterable[Field]) -> CodedHead:
    """Look once through the fields of a response."""
    head = CodedHead(list(fields))
    for name, value in head.fields:
        name = name.lower()
        if name not in _READ:
            continue
        if name == b"content-type":
            head.content_type = value
        elif name == b"content-length":
            head.length = int(value) if value.isdigit() else None
        elif name == b"etag":
            head.etag = value
        elif name == b"content-encoding":
            if value.strip().lower() == b"identity":
                head.opted_out = True
            else:
                head.untouchable = True
        elif name == b"content-range":
            head.partial = True
        elif name == b"cache-control":
            head.untouchable = head.untouchable or _has_token(value, b"no-transform")
        else:
            head.untouchable = True
    return head


def without(fields: Iterable[Field], removed: bytes) -> Fields:
    """The fields but for those called `removed`."""
    return [field for field in fields if field[0].lower() != removed]


def add_vary(fields: Iterable[Field]) -> Fields:
    """The fields with `accept-encoding` among those that Vary names."""
    result = list(fields)
    last = None
    for index, (name, value) in enumerate(result):
        if name.lower() == b"vary":
            if _has_token(value, b"accept-encoding") or _has_token(value, b"*"):
                return result
            last = index
    if last is None:
        result.append((b"vary", b"accept-encoding"))
    else:
        name, value = result[last]
        result[last] = (name, value + b", accept-encoding" if value.strip() else b"accept-encoding")
    return result


def weaken(etag: bytes) -> bytes:
    """The weak form: the coded body means the same as the plain one, but has other bytes (RFC 9110, 8.8.1)."""
    return etag if etag.startswith(b"W/") else b"W/" + etag


def weaken_etag(fields: Iterable[Field]) -> Fields:
    """The fields with a weak ETag."""
    return [(name, weaken(value)) if name.lower() == b"etag" else (name, value) for name, value in fields]


def code_head(head: CodedHead, coding: bytes, length: int | None) -> Fields:
    """The fields of the coded response; `length` of the coded body, None if it is not known yet."""
    fields = [field for field in head.fields if field[0].lower() not in _REPLACED]
    fields.append((b"content-encoding", coding))
    if length is not None:
        fields.append((b"content-length", b"%d" % length))
    if head.etag is not None:
        fields.append((b"etag", weaken(head.etag)))
    return add_vary(fields)


def names_weak_form(if_none_match: bytes, etag: bytes) -> bool:
    """Whether the client's validators hold the weak form of `etag`, which only a coded response has had.

    An ETag that was weak from the beginning is no sign of coding, and needs no change either.
    """
    return not etag.startswith(b"W/") and weaken(etag) in if_none_match


def _has_token(value: bytes, token: bytes) -> bool:
    """Whether a list of tokens (with or without arguments) has this one."""
    value = value.lower()
    return token in value and any(part.strip() == token for part in value.split(b","))
