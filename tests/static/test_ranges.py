"""Range: what is sent, row by row, against a model that works on sets of positions; and the body of several parts."""

from __future__ import annotations

import email
import email.policy
import itertools
import re
import time
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trioserve.static.ranges import (
    MOST_RANGES,
    Multipart,
    RangeKind,
    Ranges,
    Span,
    content_range,
    parse_ranges,
    unsatisfied_range,
)

WHOLE, PARTIAL, UNSATISFIABLE = RangeKind.WHOLE, RangeKind.PARTIAL, RangeKind.UNSATISFIABLE

HUGE = b"9" * 30


def spans_of(ranges: Ranges) -> list[tuple[int, int]]:
    return [(span.start, span.stop) for span in ranges.spans]


# -- one range -----------------------------------------------------------------------------------------------

# Of 1000 bytes: what is asked for, and the bytes that are sent.
ONE = {
    b"bytes=0-0": (0, 1),
    b"bytes=0-499": (0, 500),
    b"bytes=500-999": (500, 1000),
    b"bytes=999-999": (999, 1000),
    b"bytes=0-": (0, 1000),
    b"bytes=999-": (999, 1000),
    b"bytes=500-1000": (500, 1000),
    b"bytes=500-" + HUGE: (500, 1000),
    b"bytes=-1": (999, 1000),
    b"bytes=-500": (500, 1000),
    b"bytes=-1000": (0, 1000),
    b"bytes=-1001": (0, 1000),
    b"bytes=-" + HUGE: (0, 1000),
    b"BYTES=0-1": (0, 2),
    b"ByTeS=-1": (999, 1000),
    # Blanks and empty elements as RFC 9110 section 5.6.1 has them.
    b" \tbytes=0-1\t ": (0, 2),
    b"bytes=,0-1": (0, 2),
    b"bytes=0-1,": (0, 2),
    b"bytes= ,\t,0-1 , ": (0, 2),
    # Zeros in front are no digits that count.
    b"bytes=" + b"0" * 40 + b"1-" + b"0" * 40 + b"2": (1, 3),
    b"bytes=-" + b"0" * 40 + b"7": (993, 1000),
}


@pytest.mark.parametrize("value", ONE)
def test_one_range_is_one_span(value: bytes) -> None:
    ranges = parse_ranges(value, 1000)
    assert ranges.kind is PARTIAL
    assert spans_of(ranges) == [ONE[value]]


NOT_THERE = [
    b"bytes=-0",
    b"bytes=-" + b"0" * 50,
    b"bytes=1000-",
    b"bytes=1000-1000",
    b"bytes=1000-2000",
    b"bytes=" + HUGE + b"-",
    b"bytes=" + HUGE + b"-" + HUGE,
    b"bytes=1000-1001,5000-,-0",
    b"bytes=-0,-0,-0",
]


@pytest.mark.parametrize("value", NOT_THERE)
def test_what_is_not_there_is_unsatisfiable(value: bytes) -> None:
    assert parse_ranges(value, 1000) == Ranges(UNSATISFIABLE, ())


IGNORED = [
    # No range-specifier, or of another unit.
    b"",
    b" ",
    b"=",
    b"bytes",
    b"bytes=",
    b"bytes= ",
    b"bytes=,",
    b"bytes= , ,",
    b"0-1",
    b"lines=0-1",
    b"byte=0-1",
    b"bytess=0-1",
    b"xbytes=0-1",
    b"none",
    b"bytes:0-1",
    b"bytes 0-1/1000",
    b"bytes==0-1",
    # Two fields made one.
    b"bytes=0-1, bytes=5-6",
    # Blanks where there are none.
    b"bytes =0-1",
    b"bytes= 0-1",
    b"bytes=0 -1",
    b"bytes=0- 1",
    b"bytes=- 1",
    b"bytes=0-1 5-6",
    b"bytes=0-1\n",
    b"bytes=0-1,\r5-6",
    b"bytes=0-1,\x0b5-6",
    # No ranges.
    b"bytes=-",
    b"bytes=1",
    b"bytes=--1",
    b"bytes=-1-",
    b"bytes=0-1-2",
    b"bytes=0--1",
    b"bytes=+1-2",
    b"bytes=1_0-20",
    b"bytes=0x1-2",
    b"bytes=a-b",
    b"bytes=1.0-2",
    b"bytes=\xd9\xa1-\xd9\xa2",
    b"bytes=\xb2-",
    b"bytes=*",
    # It ends before it starts; whether it is there or not.
    b"bytes=2-1",
    b"bytes=500-0",
    b"bytes=2000-1000",
    b"bytes=" + HUGE + b"-0",
    # One that is malformed spoils the others.
    b"bytes=0-1,x",
    b"bytes=0-1,5-2",
    b"bytes=5-2,0-1",
    b"bytes=1000-,x",
]


@pytest.mark.parametrize("value", IGNORED)
def test_what_is_malformed_or_of_another_unit_is_ignored(value: bytes) -> None:
    assert parse_ranges(value, 1000) == Ranges(WHOLE, ())


@pytest.mark.parametrize("value", [*ONE, *NOT_THERE, *IGNORED])
def test_an_empty_file_is_sent_whole(value: bytes) -> None:
    assert parse_ranges(value, 0) == Ranges(WHOLE, ())


def test_beyond_all_files_is_still_a_number() -> None:
    """The largest file has 2**63 - 1 bytes: 19 digits."""
    size = 2**63 - 1
    assert spans_of(parse_ranges(b"bytes=9223372036854775806-", size)) == [(size - 1, size)]
    assert parse_ranges(b"bytes=9223372036854775807-", size).kind is UNSATISFIABLE
    assert parse_ranges(b"bytes=9999999999999999999-", size).kind is UNSATISFIABLE
    assert spans_of(parse_ranges(b"bytes=0-10000000000000000000", size)) == [(0, size)]


# -- several ranges ------------------------------------------------------------------------------------------

SEVERAL: dict[str, tuple[bytes, list[tuple[int, int]]]] = {
    "in order": (b"bytes=0-9,200-209", [(0, 10), (200, 210)]),
    "blanks": (b"bytes=0-9 ,\t200-209,, ", [(0, 10), (200, 210)]),
    "the order asked for is kept": (b"bytes=900-,0-9,500-509", [(900, 1000), (0, 10), (500, 510)]),
    "a suffix and a start": (b"bytes=-10,0-9", [(990, 1000), (0, 10)]),
    "what is not there is left out": (b"bytes=0-9,5000-,200-209,-0", [(0, 10), (200, 210)]),
    "one left": (b"bytes=5000-,0-9", [(0, 10)]),
    "a gap of 80 stays": (b"bytes=0-9,90-99", [(0, 10), (90, 100)]),
    "a gap of 79 goes": (b"bytes=0-9,89-99", [(0, 100)]),
    "a gap of 79 goes, asked for backwards": (b"bytes=89-99,0-9", [(0, 100)]),
    "adjacent": (b"bytes=0-9,10-19", [(0, 20)]),
    "overlapping": (b"bytes=0-9,5-19", [(0, 20)]),
    "twice": (b"bytes=0-9,0-9", [(0, 10)]),
    "one within the other": (b"bytes=0-299,100-109", [(0, 300)]),
    "a long one spans the gap of those within": (b"bytes=0-299,10-19,350-359", [(0, 360)]),
    "joined ones stand where their first stood": (
        b"bytes=500-509,0-9,900-909,520-529,20-29",
        [(500, 530), (0, 30), (900, 910)],
    ),
    "two overlaps": (b"bytes=0-9,5-14,10-19", [(0, 20)]),
    "all of it, in halves": (b"bytes=0-499,500-999", [(0, 1000)]),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_ranges(name: str) -> None:
    value, expected = SEVERAL[name]
    ranges = parse_ranges(value, 1000)
    assert ranges.kind is PARTIAL
    assert spans_of(ranges) == expected


ABUSE = {
    "three overlaps": b"bytes=0-9,5-14,10-19,15-24",
    "four times the same": b"bytes=0-9,0-9,0-9,0-9",
    "three within one": b"bytes=0-299,10-19,100-109,200-209",
    "more than there is": b"bytes=0-,0-0",
    "more than there is, in two": b"bytes=0-599,500-999",
    "more than there is, by suffixes": b"bytes=-501,-500",
    "17 ranges": b"bytes=" + b",".join(b"%d-%d" % (n, n) for n in range(0, 170, 10)),
    "16 commas": b"bytes=0-0" + b"," * 16,
}


@pytest.mark.parametrize("name", ABUSE)
def test_what_is_abusive_is_ignored(name: str) -> None:
    assert parse_ranges(ABUSE[name], 1000) == Ranges(WHOLE, ())


def test_the_most_ranges_are_still_served() -> None:
    wanted = [(n, n + 1) for n in range(0, 1600, 100)]
    value = b"bytes=" + b",".join(b"%d-%d" % (start, stop - 1) for start, stop in wanted)
    assert len(wanted) == MOST_RANGES
    assert spans_of(parse_ranges(value, 2000)) == wanted
    assert parse_ranges(value, 2000, most=15).kind is WHOLE
    assert parse_ranges(value + b",", 2000).kind is WHOLE


def test_how_many_there_may_be_is_a_setting() -> None:
    assert parse_ranges(b"bytes=0-0", 1000, most=0).kind is WHOLE
    assert parse_ranges(b"bytes=0-0", 1000, most=1).kind is PARTIAL
    assert parse_ranges(b"bytes=0-0,500-500", 1000, most=1).kind is WHOLE


# -- the model -----------------------------------------------------------------------------------------------


def model(value: bytes, size: int, most: int) -> tuple[RangeKind, list[tuple[int, int]]]:
    """The same by sets of positions: slow, and nothing in it is clever."""
    text = value.decode("latin-1").strip(" \t")
    unit, equals, range_set = text.partition("=")
    if not equals or unit.lower() != "bytes" or size == 0 or len(range_set.split(",")) > most:
        return WHOLE, []
    # RFC 9110 section 5.6.1.2: [ element ] *( OWS "," OWS [ element ] )
    if re.match(r"[ \t]+[^ \t,]", range_set):
        return WHOLE, []
    specs = [spec.strip(" \t") for spec in range_set.split(",")]
    specs = [spec for spec in specs if spec]
    if not specs:
        return WHOLE, []
    asked = [positions(spec, size) for spec in specs]
    if None in asked:
        return WHOLE, []
    there = [found for found in asked if found]
    if not there:
        return UNSATISFIABLE, []
    if len(there) > 1 and too_much(there, size):
        return WHOLE, []
    runs = runs_of(filled(set().union(*there)))
    runs.sort(
        key=lambda run: min(place for place, found in enumerate(there) if run[0] <= min(found) < run[1])
    )
    return PARTIAL, runs


def positions(spec: str, size: int) -> set[int] | None:
    """What of the file a range-spec names; None if it is none."""
    if re.fullmatch("[0-9]+-[0-9]+", spec):
        first, last = map(int, spec.split("-"))
        return {n for n in range(size) if first <= n <= last} if first <= last else None
    if re.fullmatch("[0-9]+-", spec):
        return {n for n in range(size) if n >= int(spec[:-1])}
    if re.fullmatch("-[0-9]+", spec):
        return {n for n in range(size) if n >= size - int(spec[1:])}
    return None


def too_much(there: Sequence[set[int]], size: int) -> bool:
    """More bytes than there are, or more than two that share bytes with those that start before them."""
    seen: set[int] = set()
    overlaps = 0
    for found in sorted(there, key=min):
        overlaps += bool(found & seen)
        seen |= found
    return sum(map(len, there)) > size or overlaps > 2


def filled(wanted: set[int]) -> set[int]:
    """With all gaps of less than 80 positions."""
    ordered = sorted(wanted)
    for before, after in itertools.pairwise(ordered):
        if after - before - 1 < 80:
            wanted = wanted | set(range(before, after))
    return wanted


def runs_of(wanted: set[int]) -> list[tuple[int, int]]:
    starts = sorted(n for n in wanted if n - 1 not in wanted)
    stops = sorted(n + 1 for n in wanted if n + 1 not in wanted)
    return list(zip(starts, stops, strict=True))


NUMBERS = st.one_of(
    st.integers(0, 450).map(lambda n: b"%d" % n),
    st.sampled_from([b"", b"0", b"00", b"007", b"9" * 19, b"1" + b"0" * 19]),
)
SPECS = st.one_of(
    st.tuples(st.integers(0, 400), st.integers(0, 60)).map(lambda pair: b"%d-%d" % (pair[0], sum(pair))),
    st.tuples(NUMBERS, NUMBERS).map(lambda pair: b"%b-%b" % pair),
    st.sampled_from([b"", b"-", b"-5", b"300-", b"1", b"x", b"1-2-3", b"5-4"]),
)
BLANKS = st.sampled_from([b"", b"", b"", b" ", b"\t", b" \t"])
LISTS = st.lists(st.tuples(BLANKS, SPECS, BLANKS).map(b"".join), max_size=8).map(b",".join)
VALUES = st.one_of(
    LISTS.map(lambda found: b"bytes=" + found),
    st.tuples(BLANKS, st.sampled_from([b"Bytes=", b"bytes =", b"bits=", b"bytes", b"="]), LISTS).map(
        b"".join
    ),
    st.text(alphabet="bytes=0123-, \t", max_size=20).map(lambda text: b"bytes=" + text.encode()),
)


@settings(max_examples=400)
@given(value=VALUES, size=st.integers(0, 400), most=st.integers(0, 9))
@example(value=b"bytes=0-9,90-99", size=100, most=9)
@example(value=b"bytes=0-9,89-99", size=100, most=9)
@example(value=b"bytes=300-309,0-9,320-329", size=400, most=9)
def test_ranges_are_as_the_model_has_them(value: bytes, size: int, most: int) -> None:
    ranges = parse_ranges(value, size, most=most)
    kind, runs = model(value, size, most)
    assert ranges.kind is kind
    assert spans_of(ranges) == runs


# Mostly such as are served: without this the model would compare little more than refusals.
APART = st.lists(st.tuples(st.integers(0, 150), st.integers(1, 20)), min_size=2, max_size=6)


@settings(max_examples=200)
@given(steps=APART, data=st.data())
def test_ranges_that_are_served_are_as_the_model_has_them(
    steps: list[tuple[int, int]], data: st.DataObject
) -> None:
    specs, position = [], 0
    for gap, length in steps:
        specs.append(b"%d-%d" % (position + gap, position + gap + length - 1))
        position += gap + length
    value = b"bytes=" + b", ".join(data.draw(st.permutations(specs)))
    ranges = parse_ranges(value, position)
    assert ranges.kind is PARTIAL
    assert spans_of(ranges) == model(value, position, MOST_RANGES)[1]


@settings(max_examples=300)
@given(
    value=st.one_of(st.binary(), st.binary().map(lambda rest: b"bytes=" + rest)), size=st.integers(0, 2**64)
)
def test_no_value_raises_and_no_span_is_empty_or_outside(value: bytes, size: int) -> None:
    ranges = parse_ranges(value, size)
    assert bool(ranges.spans) == (ranges.kind is PARTIAL)
    assert all(0 <= span.start < span.stop <= size for span in ranges.spans)
    assert sum(span.length for span in ranges.spans) <= size


# -- hostile values ------------------------------------------------------------------------------------------

COUNT = 30_000
LONG = 300_000
HOSTILE = {
    "apart": b",".join(b"%d-%d" % (n * 100, n * 100) for n in range(COUNT)),
    "apart, backwards": b",".join(b"%d-%d" % (n * 100, n * 100) for n in reversed(range(COUNT))),
    "adjacent": b",".join(b"%d-%d" % (n, n) for n in range(COUNT)),
    "the same": b",".join([b"0-0"] * COUNT),
    "nested": b",".join(b"%d-%d" % (n, 2 * COUNT - n) for n in range(COUNT)),
    "open": b",".join([b"0-"] * COUNT),
    "empty": b"," * LONG,
    "malformed at the end": b",".join([b"0-0"] * COUNT) + b",x",
    "digits": b"1" * LONG + b"-",
    "zeros": b"0" * LONG + b"x",
    "blanks": b"0-0," + b" \t" * LONG + b"x",
    "blanks, one range": b"0" + b" " * LONG + b"-",
    "dashes": b"-" * LONG,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values_take_no_more_than_n_log_n(name: str) -> None:
    """Some tenths of a second, where n² would take minutes; also without the limit that usually forbids them."""
    value = b"bytes=" + HOSTILE[name]
    began = time.thread_time()
    parse_ranges(value, 10**12, most=10**9)
    assert time.thread_time() - began < 5
    began = time.thread_time()
    parse_ranges(value, 10**12)
    assert time.thread_time() - began < 5


def test_ranges_beyond_the_limit_are_not_read() -> None:
    """The malformed one would not matter, and neither would a valid one: counting commas is all that is done."""
    value = b"bytes=" + b"0-0," * 5_000_000
    began = time.thread_time()
    assert parse_ranges(value, 10).kind is WHOLE
    assert time.thread_time() - began < 5


# -- what is sent --------------------------------------------------------------------------------------------


def test_content_range_names_the_last_byte_and_the_size() -> None:
    assert content_range(Span(0, 1), 1) == b"bytes 0-0/1"
    assert content_range(Span(500, 1000), 1000) == b"bytes 500-999/1000"
    assert unsatisfied_range(1000) == b"bytes */1000"


def body_of(multipart: Multipart, content: bytes) -> bytes:
    return b"".join(head + content[span.start : span.stop] for head, span in multipart.parts) + multipart.end


def test_a_multipart_body_byte_by_byte() -> None:
    content = bytes(range(65, 91))
    multipart = Multipart((Span(0, 3), Span(23, 26)), 26, b"text/plain; charset=utf-8")
    mark = b"--" + multipart.boundary
    assert multipart.content_type == b"multipart/byteranges; boundary=" + multipart.boundary
    assert body_of(multipart, content) == (
        mark + b"\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Range: bytes 0-2/26\r\n\r\nABC\r\n"
        + mark + b"\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Range: bytes 23-25/26\r\n\r\nXYZ\r\n"
        + mark + b"--\r\n"
    )  # fmt: skip
    assert multipart.length == len(body_of(multipart, content))
    assert repr(multipart) == f"<Multipart 2 parts, {multipart.length} bytes>"


def test_parts_of_a_file_without_a_type_have_none() -> None:
    multipart = Multipart((Span(0, 1), Span(1, 2)), 2, b"")
    assert b"Content-Type" not in body_of(multipart, b"ab")
    assert multipart.length == len(body_of(multipart, b"ab"))


def test_a_boundary_cannot_be_foreseen() -> None:
    """Whoever can write a file must not be able to end a part from inside it."""
    boundaries = {Multipart((Span(0, 1), Span(2, 3)), 3, b"a/b").boundary for _ in range(100)}
    assert len(boundaries) == 100
    # 128 bits, in characters that need no quotes; RFC 2046 allows 70 of them.
    assert all(re.fullmatch(b"[0-9a-f]{32}", boundary) for boundary in boundaries)


@given(
    content=st.binary(min_size=3, max_size=400),
    cuts=st.lists(st.tuples(st.integers(0, 399), st.integers(1, 400)), min_size=2, max_size=6),
    content_type=st.sampled_from([b"", b"text/plain", b"application/octet-stream"]),
)
def test_another_parser_finds_every_part(
    content: bytes, cuts: list[tuple[int, int]], content_type: bytes
) -> None:
    size = len(content)
    spans = [Span(start % size, min(start % size + length, size)) for start, length in cuts]
    multipart = Multipart(spans, size, content_type)
    body = body_of(multipart, content)
    assert multipart.length == len(body)

    mark = b"--" + multipart.boundary
    first, *middle, last = body.split(mark)
    assert first == b""
    assert last == b"--\r\n"
    assert len(middle) == len(spans)
    message = email.message_from_bytes(
        b"Content-Type: " + multipart.content_type + b"\r\n\r\n" + body, policy=email.policy.HTTP
    )
    assert message.is_multipart()
    assert not message.defects
    for raw, parsed, span in zip(middle, message.iter_parts(), spans, strict=True):
        head, _, data = raw.partition(b"\r\n\r\n")
        assert data == content[span.start : span.stop] + b"\r\n"
        assert head.startswith(b"\r\n")
        assert parsed["content-range"] == f"bytes {span.start}-{span.stop - 1}/{size}"
        assert parsed["content-type"] == (content_type.decode() or None)
        assert not parsed.defects
