"""Validators of a file, and the preconditions that compare them (RFC 9110 sections 8.8 and 13).

`variants.py` makes the validators of each form of a file when it has opened it; `answers.py` asks `evaluate` before
anything is sent, and `range_applies` where there is a `Range`. All of it is pure: nothing waits, and no field value of
a client makes it raise. What is malformed matches nothing; a date that is malformed is ignored.
"""

from __future__ import annotations

import datetime as dt
import enum
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

# Seconds that a file must have rested before its tag is strong. File systems stamp with a granularity of some
# milliseconds (the kernel's tick) to 2 s (FAT); within it, a second change keeps the first one's time.
STRONG_TAG_AGE = 2.0

# Seconds that a file must have rested before its date is strong. RFC 9110 section 8.8.2.2 asks for one second at least
# between Last-Modified and Date; a minute, as its predecessor asked, leaves room for clocks that differ.
STRONG_DATE_AGE = 60.0

# Times up to here mean "none": Nix stores and ostree give every file that they hold 1, or 0, whatever it contains.
NO_TIME = 1

_SECOND = 1_000_000_000


class Verdict(enum.Enum):
    """What the preconditions ask for."""

    #: Answer as if there were none.
    PROCEED = enum.auto()
    #: 304: the client's copy is current.
    NOT_MODIFIED = enum.auto()
    #: 412: the file is not what the client takes it for.
    FAILED = enum.auto()


# Bound once: reading a member off its class takes as long as a lookup and a comparison together.
_PROCEED, _NOT_MODIFIED, _FAILED = Verdict.PROCEED, Verdict.NOT_MODIFIED, Verdict.FAILED


@dataclass(frozen=True, slots=True)
class Validators:
    """What tells one state of a representation from another.

    Attributes:
        etag: as it is sent, with its quotes, and W/ before them if it is weak; b"" if there is none.
        modified: for Last-Modified, in seconds of the epoch; None if there is no such field.
        modified_strong: the date may serve `If-Range`: the file has rested for `STRONG_DATE_AGE`.
        modified_shared: it may not: another coding of the file has the same one (RFC 9110 section 8.8.1).

    A weak tag and a weak date are so for a while only: whoever keeps validators makes them anew (`make_validators`)
    until `settled`.
    """

    etag: bytes
    modified: int | None
    modified_strong: bool
    modified_shared: bool = False

    @property
    def settled(self) -> bool:
        """Whether the passing of time cannot change them any more."""
        return self.modified_strong or self.modified is None


def make_validators(stat: os.stat_result, *, coding: bytes = b"", now: float) -> Validators:
    """The validators of the file that `stat` is of; `now` is the time of day (`time.time`), as are file times.

    Last-Modified never lies after `now` (RFC 9110 section 8.8.2.1): a file from the future changes now.
    """
    etag = make_etag(stat, coding=coding, now=now)
    if not etag:
        return Validators(b"", None, modified_strong=False)
    modified = stat.st_mtime_ns // _SECOND
    return Validators(etag, min(modified, int(now)), modified_strong=now - modified >= STRONG_DATE_AGE)


def make_etag(stat: os.stat_result, *, coding: bytes = b"", now: float) -> bytes:
    """The entity tag: size and time in hexadecimal digits, and the coding, since a coded file has other bytes.

    It is weak while the file is fresh, by `STRONG_TAG_AGE`; b"" for a file without a time.
    """
    modified = stat.st_mtime_ns
    if modified // _SECOND <= NO_TIME:
        return b""
    weak = b"" if now - modified / _SECOND >= STRONG_TAG_AGE else b"W/"
    suffix = b"-" + coding if coding and coding != b"identity" else b""
    return b'%s"%x-%x%s"' % (weak, stat.st_size, modified, suffix)


# -- preconditions -------------------------------------------------------------------------------------------

# Methods that select no representation know no preconditions (RFC 9110 section 13.2.1).
_UNCONDITIONAL = frozenset({"CONNECT", "OPTIONS", "TRACE"})
_READING = frozenset({"GET", "HEAD"})

# RFC 9110 section 8.8.3. A backslash is a character like any other, a comma too; blanks are none.
_TAG = rb'(?:W/)?+"[\x21\x23-\x7e\x80-\xff]*+"'
# Section 5.6.1.2: a list, with empty elements. Possessive throughout: what does not match is known in linear time.
_TAG_LIST = re.compile(rb"[ \t,]*+(?:%b(?:[ \t]*+,[ \t,]*+%b)*+[ \t,]*+)?+" % (_TAG, _TAG))
_ONE_TAG = re.compile(_TAG)
# In what is known to be a list.
_QUOTED = re.compile(rb'"[^"]*+"')


def evaluate(method: str, fields: Mapping[bytes, bytes], validators: Validators) -> Verdict:
    """RFC 9110 section 13.2.2, steps 1 to 4; `fields` are the request's, at least those that `pick_fields` returns.

    For a representation that exists, and for requests that would be answered 2xx without preconditions: section 13.2.1
    has the others ignore them.
    """
    tags = fields.get(b"if-none-match")
    if (tags and tags == validators.etag and method == "GET"
            and b"if-match" not in fields and b"if-unmodified-since" not in fields):  # fmt: skip
        return _NOT_MODIFIED  # The usual case: a browser asks whether its copy is current, and it is.
    if method in _UNCONDITIONAL:
        return _PROCEED
    if not _guards_hold(fields, validators):
        return _FAILED
    if tags is not None:
        if not _is_listed(validators.etag, tags):
            return _PROCEED
        return _NOT_MODIFIED if method in _READING else _FAILED
    if method in _READING and not _modified_since(fields, validators):
        return _NOT_MODIFIED
    return _PROCEED


def range_applies(fields: Mapping[bytes, bytes], validators: Validators) -> bool:
    """`If-Range` (RFC 9110 section 13.1.5): whether `Range` is to be honoured; True without an `If-Range`."""
    given = fields.get(b"if-range")
    if given is None:
        return True
    given = given.strip(b" \t")
    # The first three characters tell a tag from a date.
    if b'"' in given[:3]:
        # A tag of ours is well-formed, and so is what equals it. A weak one matches nothing.
        return given == validators.etag and given.startswith(b'"')
    if not validators.modified_strong or validators.modified_shared or validators.modified is None:
        return False
    return parse_http_date(given) == validators.modified


def _guards_hold(fields: Mapping[bytes, bytes], validators: Validators) -> bool:
    """Steps 1 and 2: `If-Match`, or in its absence `If-Unmodified-Since`."""
    given = fields.get(b"if-match")
    if given is not None:
        return _is_listed_strongly(validators.etag, given)
    given = fields.get(b"if-unmodified-since")
    if given is None or validators.modified is None:
        return True
    date = parse_http_date(given)
    return date is None or validators.modified <= date


def _modified_since(fields: Mapping[bytes, bytes], validators: Validators) -> bool:
    """Step 4: `If-Modified-Since`; True if there is none, or none that counts."""
    given = fields.get(b"if-modified-since")
    if given is None or validators.modified is None:
        return True
    if given == http_date(validators.modified):
        return False  # Clients send back what they were given.
    date = parse_http_date(given)
    return date is None or validators.modified > date


def _is_listed(etag: bytes, given: bytes) -> bool:
    """Whether `If-None-Match` names the representation, by weak comparison (RFC 9110 section 8.8.3.2)."""
    given = given.strip(b" \t")
    if given == b"*":
        return True
    opaque = etag.removeprefix(b"W/")
    # Found as a substring it may still be a part of another tag; not found, the list need not be read.
    if not opaque or opaque not in given:
        return False
    return given == opaque or (_TAG_LIST.fullmatch(given) is not None and opaque in _QUOTED.findall(given))


def _is_listed_strongly(etag: bytes, given: bytes) -> bool:
    """Whether `If-Match` names the representation, by strong comparison: neither of the two tags is weak."""
    given = given.strip(b" \t")
    if given == b"*":
        return True
    if not etag.startswith(b'"') or etag not in given:
        return False
    return given == etag or (_TAG_LIST.fullmatch(given) is not None and etag in _ONE_TAG.findall(given))


# -- dates (RFC 9110 section 5.6.7) --------------------------------------------------------------------------

# strftime and strptime follow the locale, which an app may set.
_DAYS = (b"Mon", b"Tue", b"Wed", b"Thu", b"Fri", b"Sat", b"Sun")
_LONG_DAYS = (b"Monday", b"Tuesday", b"Wednesday", b"Thursday", b"Friday", b"Saturday", b"Sunday")
_MONTHS = (b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun", b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec")
_MONTH_NUMBERS = {name: number for number, name in enumerate(_MONTHS, 1)}

# The end of the year 9999: a date has four digits for it.
_LAST_DATE = 253_402_300_799
_EPOCH_DAY = dt.date(1970, 1, 1).toordinal()

_DAY, _LONG_DAY, _MONTH = b"|".join(_DAYS), b"|".join(_LONG_DAYS), b"|".join(_MONTHS)
_CLOCK = rb"(?P<hour>\d\d):(?P<minute>\d\d):(?P<second>\d\d)"
_FORMS = (
    # IMF-fixdate: Sun, 06 Nov 1994 08:49:37 GMT. The only one that is generated today.
    re.compile(rb"(?:%b), (?P<day>\d\d) (?P<month>%b) (?P<year>\d{4}) %b GMT" % (_DAY, _MONTH, _CLOCK)),
    # RFC 850: Sunday, 06-Nov-94 08:49:37 GMT.
    re.compile(rb"(?:%b), (?P<day>\d\d)-(?P<month>%b)-(?P<year>\d\d) %b GMT" % (_LONG_DAY, _MONTH, _CLOCK)),
    # asctime: Sun Nov  6 08:49:37 1994.
    re.compile(rb"(?:%b) (?P<month>%b) (?P<day>\d\d| \d) %b (?P<year>\d{4})" % (_DAY, _MONTH, _CLOCK)),
)
# No form is longer (an RFC 850 Wednesday), and no time is spent on what is.
_LONGEST_DATE = 33


@lru_cache(maxsize=1024)
def http_date(epoch: int) -> bytes:
    """That second as an IMF-fixdate; seconds outside of the years 1970 to 9999 are told as the nearest one inside."""
    moment = time.gmtime(min(max(epoch, 0), _LAST_DATE))
    return b"%s, %02d %s %04d %02d:%02d:%02d GMT" % (
        _DAYS[moment.tm_wday], moment.tm_mday, _MONTHS[moment.tm_mon - 1], moment.tm_year,
        moment.tm_hour, moment.tm_min, moment.tm_sec)  # fmt: skip


def parse_http_date(value: bytes, *, now: float | None = None) -> int | None:
    """The seconds of the epoch that a date names, in any of its three forms; None if it is none.

    The name of the day must be one, but is not compared with the date: others do not do that either, and to ignore an
    `If-Unmodified-Since` for it would take a protection away. `now` is for tests of two-digit years.
    """
    value = value.strip(b" \t")
    if len(value) > _LONGEST_DATE:
        return None
    for form in _FORMS:
        match = form.fullmatch(value)
        if match is not None:
            break
    else:
        return None
    day, hour, minute, second, year = map(int, match.group("day", "hour", "minute", "second", "year"))
    month = _MONTH_NUMBERS[match["month"]]
    # A leap second ends a day, and is counted as the first of the next one.
    if hour > 23 or minute > 59 or second > (60 if (hour, minute) == (23, 59) else 59):
        return None
    if len(match["year"]) == 2:
        year = _full_year(year, (month, day, hour, minute, second), time.time() if now is None else now)
    try:
        days = dt.date(year, month, day).toordinal() - _EPOCH_DAY
    except ValueError:  # There is no such day in that month, or no such year.
        return None
    return days * 86_400 + hour * 3600 + minute * 60 + second


def _full_year(two_digits: int, rest: tuple[int, int, int, int, int], now: float) -> int:
    """The latest year with these digits that puts the date, with its `rest`, no more than 50 years after `now`."""
    present = time.gmtime(now)
    latest = present.tm_year + 50
    year = latest - (latest - two_digits) % 100
    return year - 100 if year == latest and rest > tuple(present[1:6]) else year
