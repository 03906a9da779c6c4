"""`Range`: which bytes of a file are sent, and what stands between them if they are several (RFC 9110 section 14).

`handler.py` calls `parse_ranges` for GET requests whose `If-Range` holds, and sends each span of the result by
sendfile: one span as a 206 of its own, several as the parts of a `Multipart`. All of it is pure: nothing waits, and no
value of a client makes it raise.

    kind             the answer
    WHOLE            200 and the whole file: `Range` is ignored, as RFC 9110 has it for what is malformed or abusive
    PARTIAL          206; never more bytes than the file has, and as many parts as were asked for at most
    UNSATISFIABLE    416 with `unsatisfied_range`
"""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

# Ranges in one request; a player seeks with one, a PDF viewer asks for some. Others allow 100 to 200, of which only
# attacks make use.
MOST_RANGES = 16

# Ranges that overlap with an earlier one of the file. RFC 9110 section 14.2 names more than two as a sign of an attack.
MOST_OVERLAPS = 2

# Bytes between two ranges that are rather sent than left out: about what another part costs (section 15.3.7.2).
SMALLEST_GAP = 80

# No file has so many bytes; digits beyond are not read, since int() takes quadratic time and refuses over 4300.
_MOST_DIGITS = 19
_BEYOND: int = 10**_MOST_DIGITS

_SPEC = re.compile(rb"(\d*+)-(\d*+)")


class RangeKind(enum.Enum):
    """How a `Range` is answered; see above."""

    WHOLE = enum.auto()
    PARTIAL = enum.auto()
    UNSATISFIABLE = enum.auto()


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes from `start` up to, and without, `stop`; never empty."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """How many they are."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Ranges:
    """What to send.

    Attributes:
        kind: how to answer.
        spans: what to send if `kind` is PARTIAL, in the order it was asked for; apart by `SMALLEST_GAP` at least.
    """

    kind: RangeKind
    spans: tuple[Span, ...] = ()


_WHOLE = Ranges(RangeKind.WHOLE)
_UNSATISFIABLE = Ranges(RangeKind.UNSATISFIABLE)


class _Malformed(Exception):
    """Not a range-spec."""


def parse_ranges(value: bytes, size: int, *, most: int = MOST_RANGES) -> Ranges:
    """Read the value of `Range` for a representation of `size` bytes; O(n log n) for `most` = n.

    An empty file is sent whole: there is nothing in it that could be asked for or missed.
    """
    value = value.strip(b" \t")
    # Counted before anything is split or read; what is empty between two commas counts as well.
    if value[:6].lower() != b"bytes=" or not size or value.count(b",") >= most:
        return _WHOLE
    specs = _split(value[6:])
    if not specs:
        return _WHOLE
    spans: list[Span] = []
    try:
        for spec in specs:
            span = _read_spec(spec, size)
            if span is not None:
                spans.append(span)
    except _Malformed:
        return _WHOLE
    if not spans:
        return _UNSATISFIABLE
    if len(spans) == 1:
        return Ranges(RangeKind.PARTIAL, (spans[0],))
    if sum(span.length for span in spans) > size:
        return _WHOLE
    return _merge(spans)


def content_range(span: Span, size: int) -> bytes:
    """The value of Content-Range in a 206 with one span, and in each part of several."""
    return b"bytes %d-%d/%d" % (span.start, span.stop - 1, size)


def unsatisfied_range(size: int) -> bytes:
    """The value of Content-Range in a 416."""
    return b"bytes */%d" % size


def _split(range_set: bytes) -> list[bytes]:
    """The elements of the list that are not empty; blanks may stand around commas, but not before a first element."""
    if b"," not in range_set:
        return [range_set] if range_set else []
    first, *others = range_set.split(b",")
    specs = [first.rstrip(b" \t"), *(other.strip(b" \t") for other in others)]
    return [spec for spec in specs if spec]


def _read_spec(spec: bytes, size: int) -> Span | None:
    """The span that a range-spec asks for, cut at the end of the file; None if nothing of it is there.

    Raises:
        _Malformed: no int-range and no suffix-range, or one that ends before it starts.
    """
    match = _SPEC.fullmatch(spec)
    if match is None or spec == b"-":
        raise _Malformed
    first, last = match.groups()
    if not first:
        # The last so many bytes; all of them if there are fewer.
        length = _read_number(last)
        return Span(max(size - length, 0), size) if length else None
    start = _read_number(first)
    if not last:
        return Span(start, size) if start < size else None
    stop = _read_number(last) + 1
    if stop <= start:
        raise _Malformed
    return Span(start, min(stop, size)) if start < size else None


def _read_number(digits: bytes) -> int:
    if len(digits) > _MOST_DIGITS:
        digits = digits.lstrip(b"0")
        if len(digits) > _MOST_DIGITS:
            return _BEYOND
    return int(digits or b"0")


def _merge(spans: list[Span]) -> Ranges:
    """Join what overlaps or is nearly adjacent; WHOLE if too much of it overlaps.

    What was joined stands where the first of its members stood in the request (RFC 9110 section 15.3.7.2).
    """
    order = sorted((span.start, span.stop, place) for place, span in enumerate(spans))
    joined: list[tuple[int, Span]] = []
    overlaps = 0
    start, stop, place = order[0]
    for next_start, next_stop, next_place in order[1:]:
        overlaps += next_start < stop
        if next_start - stop < SMALLEST_GAP:
            stop = max(stop, next_stop)
            place = min(place, next_place)
        else:
            joined.append((place, Span(start, stop)))
            start, stop, place = next_start, next_stop, next_place
    if overlaps > MOST_OVERLAPS:
        return _WHOLE
    joined.append((place, Span(start, stop)))
    joined.sort(key=lambda item: item[0])
    return Ranges(RangeKind.PARTIAL, tuple(span for _, span in joined))


class Multipart:
    """The body of a 206 with several spans: each part's head, then its bytes, and `end` after the last.

    The delimiters are as RFC 2046 section 5.1.1 has them: the CRLF before each belongs to it, and the first goes
    without, there being nothing to end before it. (nginx and httpd send one there as well; Go, whose layout this is,
    does not, nor do the examples of RFC 9110.) A CRLF follows the last one, as all of them do it.

    Attributes:
        boundary: 128 random bits, so that no file contains it, by chance or on purpose: it is made for each response.
        content_type: of the response; the boundary unquoted, since some clients take the quotes for a part of it.
        length: bytes of the whole body, for Content-Length.
        parts: each part's head, with the delimiter before it and the empty line after it; and what to send then.
        end: the last delimiter.
    """

    __slots__ = ("boundary", "content_type", "end", "length", "parts")

    def __init__(self, spans: Sequence[Span], size: int, content_type: bytes) -> None:
        boundary = os.urandom(16).hex().encode("ascii")
        typed = b"Content-Type: %b\r\n" % content_type if content_type else b""
        delimiter = b"\r\n--%b\r\n%bContent-Range: " % (boundary, typed)
        self.boundary = boundary
        self.content_type = b"multipart/byteranges; boundary=" + boundary
        self.parts: list[tuple[bytes, Span]] = []
        self.end = b"\r\n--%b--\r\n" % boundary
        self.length = len(self.end)
        for span in spans:
            head = b"%b%b\r\n\r\n" % (delimiter if self.parts else delimiter[2:], content_range(span, size))
            self.parts.append((head, span))
            self.length += len(head) + span.length

    def __repr__(self) -> str:
        return f"<Multipart {len(self.parts)} parts, {self.length} bytes>"
