"""Validators of real files, how they grow strong, and dates in all their forms."""

from __future__ import annotations

import calendar
import datetime as dt
import email.utils
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trioserve.static.conditional import (
    STRONG_DATE_AGE,
    STRONG_TAG_AGE,
    Validators,
    Verdict,
    evaluate,
    http_date,
    make_etag,
    make_validators,
    parse_http_date,
)

# The date of RFC 9110's examples.
MODIFIED = 784111777
THEN = b"Sun, 06 Nov 1994 08:49:37 GMT"
THEN_RFC850 = b"Sunday, 06-Nov-94 08:49:37 GMT"
THEN_ASCTIME = b"Sun Nov  6 08:49:37 1994"

INM, IMS, IUS = b"if-none-match", b"if-modified-since", b"if-unmodified-since"
PROCEED, NOT_MODIFIED = Verdict.PROCEED, Verdict.NOT_MODIFIED

NONE = Validators(b"", None, modified_strong=False)

# -- validators ----------------------------------------------------------------------------------------------

SECOND = 1_000_000_000
NOW = 1_700_000_000.0


def a_stat(path: Path, size: int, modified_ns: int) -> os.stat_result:
    """That of a real file."""
    path.write_bytes(b"")
    os.truncate(path, size)
    os.utime(path, ns=(0, modified_ns))
    found = path.stat()
    assert found.st_mtime_ns == modified_ns
    return found


def test_a_tag_is_size_time_and_coding(tmp_path: Path) -> None:
    stat = a_stat(tmp_path / "file", 255, 0x1700000000000001)
    assert make_etag(stat, now=NOW) == b'"ff-1700000000000001"'
    assert make_etag(stat, coding=b"br", now=NOW) == b'"ff-1700000000000001-br"'
    assert make_etag(stat, coding=b"identity", now=NOW) == make_etag(stat, now=NOW)


def test_each_coding_has_a_strong_tag_of_its_own(tmp_path: Path) -> None:
    """RFC 9110 section 8.8.3.3."""
    stat = a_stat(tmp_path / "file", 10, 10**18)
    tags = {make_etag(stat, coding=coding, now=NOW) for coding in (b"", b"br", b"gzip", b"zstd", b"dcb")}
    assert len(tags) == 5
    assert all(tag.startswith(b'"') for tag in tags)


def test_another_size_or_another_nanosecond_is_another_tag(tmp_path: Path) -> None:
    times = [10**18, 10**18 + 1, 10**18 + SECOND]
    stats = [a_stat(tmp_path / "file", size, at) for size in (0, 1, 16) for at in times]
    assert len({make_etag(stat, now=NOW) for stat in stats}) == len(stats)


@pytest.mark.parametrize(
    "age, weak", [(-100.0, True), (0.0, True), (1.5, True), (2.0, False), (1000.0, False)]
)
def test_a_fresh_file_has_a_weak_tag(tmp_path: Path, age: float, weak: bool) -> None:
    stat = a_stat(tmp_path / "file", 1, int((NOW - age) * SECOND))
    tag = make_etag(stat, now=NOW)
    assert tag.startswith(b"W/") is weak
    # It is the same one by weak comparison when it has become strong.
    later = make_validators(stat, now=NOW + 200)
    assert later.etag == tag.removeprefix(b"W/")
    assert evaluate("GET", {INM: tag}, later) is NOT_MODIFIED


@pytest.mark.parametrize("modified_ns", [-5 * SECOND, 0, 1, SECOND, SECOND + 1, 2 * SECOND - 1])
def test_a_file_without_a_time_has_no_validators(tmp_path: Path, modified_ns: int) -> None:
    stat = a_stat(tmp_path / "file", 1, modified_ns)
    assert make_etag(stat, coding=b"br", now=NOW) == b""
    assert make_validators(stat, coding=b"br", now=NOW) == NONE
    assert NONE.settled


def test_the_second_second_is_a_time(tmp_path: Path) -> None:
    stat = a_stat(tmp_path / "file", 1, 2 * SECOND)
    assert make_validators(stat, now=NOW) == Validators(b'"1-77359400"', 2, modified_strong=True)


@pytest.mark.parametrize(
    "age, tag_is_weak, date_is_strong",
    [(0.0, True, False), (2.0, False, False), (59.0, False, False), (60.0, False, True), (1e6, False, True)],
)
def test_validators_grow_strong(tmp_path: Path, age: float, tag_is_weak: bool, date_is_strong: bool) -> None:
    assert (STRONG_TAG_AGE, STRONG_DATE_AGE) == (2.0, 60.0)
    stat = a_stat(tmp_path / "file", 1, int((NOW - age) * SECOND))
    made = make_validators(stat, coding=b"gzip", now=NOW)
    assert made.etag == make_etag(stat, coding=b"gzip", now=NOW)
    assert made.etag.startswith(b"W/") is tag_is_weak
    assert made.modified == int(NOW - age)
    assert made.modified_strong is date_is_strong
    assert made.settled is date_is_strong


def test_a_file_from_the_future_was_modified_now(tmp_path: Path) -> None:
    stat = a_stat(tmp_path / "file", 1, int((NOW + 1000) * SECOND))
    made = make_validators(stat, now=NOW + 0.9)
    assert made.modified == int(NOW)
    assert not made.modified_strong
    assert not made.settled
    assert made.etag.startswith(b"W/")
    # A client that was given this date is told that there may be another state since.
    assert evaluate("GET", {IMS: http_date(int(NOW))}, make_validators(stat, now=NOW + 5)) is PROCEED


def test_fractions_of_the_second_are_cut_off(tmp_path: Path) -> None:
    stat = a_stat(tmp_path / "file", 1, MODIFIED * SECOND + 999_999_999)
    made = make_validators(stat, now=NOW)
    assert made.modified == MODIFIED
    assert evaluate("GET", {IMS: THEN}, made) is NOT_MODIFIED
    assert evaluate("GET", {IUS: THEN}, made) is PROCEED


@given(
    size=st.integers(0, 2**63 - 1),
    modified_ns=st.integers(-(2**62), 2**62),
    coding=st.sampled_from([b"", b"br"]),
)
def test_every_tag_that_is_made_is_well_formed(size: int, modified_ns: int, coding: bytes) -> None:
    """Whatever a file system claims."""
    seconds = modified_ns // SECOND
    stat = os.stat_result(
        (0o100644, 1, 1, 1, 0, 0, size, 0, seconds, 0),
        {"st_mtime_ns": modified_ns, "st_atime_ns": 0, "st_ctime_ns": 0},
    )
    made = make_validators(stat, coding=coding, now=NOW)
    if made.etag:
        assert re.fullmatch(rb'(?:W/)?"[0-9a-f]+-[0-9a-f]+(?:-br)?"', made.etag)
        assert made.modified is not None
        assert 1 < made.modified <= NOW
    else:
        assert made == NONE


# -- dates ---------------------------------------------------------------------------------------------------

LAST = calendar.timegm((9999, 12, 31, 23, 59, 59))


def test_a_date_is_written_as_rfc_9110_writes_it() -> None:
    assert http_date(MODIFIED) == THEN
    assert http_date(0) == b"Thu, 01 Jan 1970 00:00:00 GMT"
    assert http_date(LAST) == b"Fri, 31 Dec 9999 23:59:59 GMT"


def test_a_date_out_of_range_is_the_nearest_one() -> None:
    assert http_date(-1) == http_date(0)
    assert http_date(10**30) == http_date(LAST)


def test_dates_are_remembered_within_bounds() -> None:
    assert http_date(MODIFIED) is http_date(MODIFIED)
    for epoch in range(5000):
        http_date(epoch)
    kept = http_date.cache_info()
    assert kept.maxsize is not None
    assert kept.currsize <= kept.maxsize <= 10_000


@given(st.integers(0, LAST))
def test_dates_are_as_the_standard_library_has_them(epoch: int) -> None:
    written = http_date.__wrapped__(epoch)
    moment = dt.datetime.fromtimestamp(epoch, dt.UTC)
    assert written.decode() == email.utils.format_datetime(moment, usegmt=True)
    assert parse_http_date(written) == epoch


@given(st.datetimes(min_value=dt.datetime(1, 1, 1), max_value=dt.datetime(9999, 12, 31)))
def test_all_three_forms_are_read(moment: dt.datetime) -> None:
    expected = calendar.timegm(moment.timetuple())
    clock = f"{moment:%H:%M:%S}"
    imf = f"{moment:%a}, {moment.day:02} {moment:%b} {moment.year:04} {clock} GMT"
    asctime = f"{moment:%a} {moment:%b} {moment.day:2} {clock} {moment.year:04}"
    padded = f"{moment:%a} {moment:%b} {moment.day:02} {clock} {moment.year:04}"
    for text in (imf, asctime, padded):
        assert parse_http_date(text.encode()) == expected
        assert parse_http_date(b"\t " + text.encode() + b" ") == expected


@given(
    moment=st.datetimes(min_value=dt.datetime(1920, 1, 1), max_value=dt.datetime(2200, 1, 1)),
    year=st.integers(1970, 2149),
)
@example(moment=dt.datetime(2075, 1, 1), year=2025)
@example(moment=dt.datetime(2075, 1, 1, 0, 0, 1), year=2025)
@example(moment=dt.datetime(1976, 1, 1), year=2025)
def test_two_digits_name_a_year_no_more_than_50_years_ahead(moment: dt.datetime, year: int) -> None:
    """Read at the first moment of `year`, all dates of the hundred years that end 50 years later come back."""
    now = dt.datetime(year, 1, 1)
    text = f"{moment:%A}, {moment.day:02}-{moment:%b}-{moment.year % 100:02} {moment:%H:%M:%S} GMT"
    read = parse_http_date(text.encode(), now=calendar.timegm(now.timetuple()))
    is_near = now.replace(year=year - 50) < moment <= now.replace(year=year + 50)
    if is_near:
        assert read == calendar.timegm(moment.timetuple())
    else:
        assert read != calendar.timegm(moment.timetuple())


def test_two_digits_are_read_by_todays_calendar() -> None:
    soon = time.gmtime().tm_year + 49
    passed = time.gmtime().tm_year - 49
    for year in (soon, passed):
        assert parse_http_date(b"Monday, 15-Jun-%02d 00:00:00 GMT" % (year % 100)) == calendar.timegm(
            (year, 6, 15, 0, 0, 0)
        )


def test_a_leap_second_is_the_first_of_the_next_day() -> None:
    assert parse_http_date(b"Sat, 31 Dec 2016 23:59:60 GMT") == calendar.timegm((2017, 1, 1, 0, 0, 0))


def test_the_name_of_the_day_is_not_compared_with_the_date() -> None:
    assert parse_http_date(THEN.replace(b"Sun", b"Mon")) == MODIFIED


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"yesterday",
        b"784111777",
        b'"a"',
        b"Sun, 06 Nov 1994 08:49:37",
        THEN + b", " + THEN,
        THEN.lower(),
        b"Sun, 6 Nov 1994 08:49:37 GMT",
        b"Sun, 06 Nov 94 08:49:37 GMT",
        b"Sun, 06 Nov 01994 08:49:37 GMT",
        b"Sun 06 Nov 1994 08:49:37 GMT",
        b"Sun,06 Nov 1994 08:49:37 GMT",
        b"Sun, 06  Nov 1994 08:49:37 GMT",
        b"06 Nov 1994 08:49:37 GMT",
        b"Sunday, 06 Nov 1994 08:49:37 GMT",
        b"Sun, 06-Nov-94 08:49:37 GMT",
        b"Sunday, 06-Nov-1994 08:49:37 GMT",
        b"Sunday, 6-Nov-94 08:49:37 GMT",
        b"Sxn, 06 Nov 1994 08:49:37 GMT",
        b"Sun, 06 Nob 1994 08:49:37 GMT",
        b"Sun, 06 NOV 1994 08:49:37 GMT",
        b"Sun, 06 Nov 1994 08:49:37 UTC",
        b"Sun, 06 Nov 1994 08:49:37 gmt",
        b"Sun, 06 Nov 1994 08:49:37 +0000",
        b"Sun, 06 Nov 1994 8:49:37 GMT",
        b"Sun, 06 Nov 1994 08:49 GMT",
        b"Sun, 06 Nov 1994 24:00:00 GMT",
        b"Sun, 06 Nov 1994 08:60:00 GMT",
        b"Sun, 06 Nov 1994 08:49:60 GMT",
        b"Sun, 06 Nov 1994 22:59:60 GMT",
        b"Sun, 06 Nov 1994 23:58:60 GMT",
        b"Sun, 06 Nov 1994 23:59:61 GMT",
        b"Sun, 00 Nov 1994 08:49:37 GMT",
        b"Sun, 31 Nov 1994 08:49:37 GMT",
        b"Wed, 29 Feb 1995 08:49:37 GMT",
        b"Sun, 06 Nov 0000 08:49:37 GMT",
        b"Wednesday, 29-Feb-95 08:49:37 GMT",
        b"Sun Nov 6 08:49:37 1994",
        b"Sun Nov  0 08:49:37 1994",
        b"Sun Nov  6 08:49:37 1994 GMT",
        b"Sun Nov  6 08:49:37 94",
        b"Sunday Nov  6 08:49:37 1994",
        b"Sun, 06 Nov 1994 08:49:37 GMT\n",
        b"Sun, 06 Nov 1994 08:49:37 GMT; length=5",
        "Sun, 06 Nov 1994 08:49:3\N{FULLWIDTH DIGIT SEVEN} GMT".encode(),
        b"Sun, -6 Nov 1994 08:49:37 GMT",
        b"*",
    ],
)
def test_what_is_no_date(value: bytes) -> None:
    assert parse_http_date(value) is None


LETTERS = st.sampled_from(list(b"Sunday, 06 Nov-94 08:49:37 GMT "))


@settings(max_examples=300)
@given(
    value=st.one_of(
        st.binary(max_size=40),
        st.tuples(st.sampled_from([THEN, THEN_RFC850, THEN_ASCTIME]), st.integers(0, 30), LETTERS).map(
            lambda x: x[0][: x[1]] + bytes([x[2]]) + x[0][x[1] + 1 :]
        ),
    )
)
def test_no_date_raises_and_one_that_is_read_is_one(value: bytes) -> None:
    read = parse_http_date(value)
    if read is not None:
        # The standard library takes more for a date than we do, but nothing for another one.
        parsed = email.utils.parsedate(value.decode("ascii"))
        assert parsed is not None
        if len(value.strip()) == 29:
            assert calendar.timegm(parsed) == read
