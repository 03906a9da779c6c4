"""Answers: status, header fields and body, prepared when a file is opened, so that a request only has to choose.

`variants.py` makes a `Representation` of each form of a file; `handler.py` and its quick path ask it for the `Answer`
to a request (RFC 9110 sections 13 to 15), and `sending.py` sends that. All of it is pure.

The fields of an answer belong to the cache: whoever hands them to an app's middleware gives a copy.
"""

from __future__ import annotations

import http
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trioserve.static.conditional import Validators, Verdict, evaluate, http_date, range_applies
from trioserve.static.open_file import OpenFile
from trioserve.static.ranges import (
    Multipart,
    RangeKind,
    Span,
    content_range,
    parse_ranges,
    unsatisfied_range,
)

Fields = list[tuple[bytes, bytes]]

NOSNIFF = (b"x-content-type-options", b"nosniff")
VARY = (b"vary", b"accept-encoding")
VARY_DICTIONARY = (b"vary", b"accept-encoding, available-dictionary")
ALLOW = (b"allow", b"GET, HEAD, OPTIONS")

# RFC 9110 section 15.4.5: what a 304 repeats of the 200 that it stands for. Date is the server's.
_ON_NOT_MODIFIED = frozenset({b"etag", b"vary", b"cache-control", b"content-location", b"expires"})

# Without one of these a request gets the whole file.
CONDITIONAL = frozenset(
    {b"if-match", b"if-none-match", b"if-modified-since", b"if-unmodified-since", b"range"}
)

_PROCEED, _NOT_MODIFIED = Verdict.PROCEED, Verdict.NOT_MODIFIED


@dataclass(slots=True, eq=False)
class Answer:
    """One response.

    Attributes:
        status, fields: its head.
        body: all of it, where `file` is None.
        file: what `pieces` are read from; nobody holds a lease on it for this answer yet.
        pieces: the body in order: bytes as they are, and spans of the file.
        span: the part of `file` that is all of the body; None where the body has several pieces, or none.
        checked, message, message_until, message_by: what the protocol has made of it, so that it need not be made
            again, until when that holds, and whose fields it has; its own affair.
    """

    status: int
    fields: Fields
    body: bytes = b""
    file: OpenFile | None = None
    pieces: Sequence[bytes | Span] = ()
    span: Span | None = field(init=False, default=None)
    checked: Any = None
    message: bytes | None = None
    message_until: float = 0.0
    message_by: Any = None

    def __post_init__(self) -> None:
        if len(self.pieces) == 1 and isinstance(piece := self.pieces[0], Span):
            self.span = piece


class Representation:
    """One form of a file: as it is, or in a content coding.

    Attributes:
        coding: b"identity", or the content coding.
        size: bytes of it.
        file: open, or None where `content` is all of it.
        content: the bytes of a small file.
        whole: the answer to a GET without conditions. head: the same to HEAD.
        not_modified: the 304.
    """

    __slots__ = (
        "_kind", "_most_ranges", "_rest", "coding", "content", "file", "head", "not_modified", "size",
        "validators", "whole",
    )  # fmt: skip

    def __init__(
        self,
        coding: bytes,
        validators: Validators,
        form: OpenFile | bytes,
        fields: Fields,
        *,
        most_ranges: int = 16,
    ) -> None:
        """`form` is the open file, or its contents; `fields` are what it is sent with, its Content-Type first."""
        self.coding = coding
        self.validators = validators
        self.file: OpenFile | None
        if isinstance(form, bytes):
            self.file, self.content, self.size = None, form, len(form)
        else:
            self.file, self.content, self.size = form, b"", form.stat.st_size
        self._kind = fields[0]
        self._rest = [*fields[1:], (b"accept-ranges", b"bytes"), *_validator_fields(validators)]
        self._most_ranges = most_ranges
        whole = [self._kind, (b"content-length", b"%d" % self.size), *self._rest]
        self.whole = self._answer(200, whole, (Span(0, self.size),))
        self.head = Answer(200, whole)
        self.not_modified = Answer(304, [field for field in self._rest if field[0] in _ON_NOT_MODIFIED])

    def __repr__(self) -> str:
        return f"<Representation {self.coding.decode()}, {self.size} bytes, {self.validators.etag!r}>"

    def answer(self, method: str, fields: Mapping[bytes, bytes]) -> Answer:
        """The answer to GET or HEAD; `fields` are the request's, at least those that `pick_fields` returns."""
        if not CONDITIONAL.isdisjoint(fields):
            verdict = evaluate(method, fields, self.validators)
            if verdict is _NOT_MODIFIED:
                return self.not_modified
            if verdict is not _PROCEED:
                return self.failed()
            # Section 14.2: ranges are for GET alone.
            if b"range" in fields and method == "GET" and range_applies(fields, self.validators):
                ranged = self._ranged(fields[b"range"])
                if ranged is not None:
                    return ranged
        return self.whole if method == "GET" else self.head

    def failed(self) -> Answer:
        """The 412, which depends on what was chosen, and so varies as the 200 does."""
        return error_answer(412, *(field for field in self._rest if field[0] == b"vary"))

    def _ranged(self, value: bytes) -> Answer | None:
        """206 or 416; None for the whole file."""
        ranges = parse_ranges(value, self.size, most=self._most_ranges)
        if ranges.kind is RangeKind.WHOLE:
            return None
        if ranges.kind is RangeKind.UNSATISFIABLE:
            vary = (field for field in self._rest if field[0] == b"vary")
            return error_answer(416, (b"content-range", unsatisfied_range(self.size)), *vary)
        if len(ranges.spans) == 1:
            span = ranges.spans[0]
            head = [
                self._kind,
                (b"content-length", b"%d" % span.length),
                (b"content-range", content_range(span, self.size)),
            ]
            return self._answer(206, head + self._rest, ranges.spans)
        parts = Multipart(ranges.spans, self.size, self._kind[1])
        head = [(b"content-type", parts.content_type), (b"content-length", b"%d" % parts.length)]
        pieces = [piece for part in parts.parts for piece in part]
        return self._answer(206, head + self._rest, [*pieces, parts.end])

    def _answer(self, status: int, fields: Fields, pieces: Sequence[bytes | Span]) -> Answer:
        if self.file is not None:
            return Answer(status, fields, b"", self.file, pieces)
        content = self.content
        if len(pieces) == 1 and isinstance(piece := pieces[0], Span) and piece.length == len(content):
            return Answer(status, fields, content)
        body = b"".join(
            content[piece.start : piece.stop] if isinstance(piece, Span) else piece for piece in pieces
        )
        return Answer(status, fields, body)


def _validator_fields(validators: Validators) -> Fields:
    fields = [(b"etag", validators.etag)] if validators.etag else []
    if validators.modified is not None:
        fields.append((b"last-modified", http_date(validators.modified)))
    return fields


def error_answer(status: int, *fields: tuple[bytes, bytes]) -> Answer:
    """A status in words: nothing about files, paths or reasons."""
    # Before Python 3.13 this one was called by an older RFC's name.
    phrase = "Range Not Satisfiable" if status == 416 else http.HTTPStatus(status).phrase
    body = f"{status} {phrase}\n".encode("ascii")
    return text_answer(status, b"text/plain; charset=utf-8", body, *fields)


def text_answer(status: int, kind: bytes, body: bytes, *fields: tuple[bytes, bytes]) -> Answer:
    """An answer that was written for this request."""
    head = [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
    named = {name for name, _ in fields}
    if NOSNIFF[0] not in named:
        head.append(NOSNIFF)
    return Answer(status, [*head, *fields], body)
