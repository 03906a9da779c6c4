"""Preconditions: row by row, and against a model that takes RFC 9110's steps one by one."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trioserve.static.conditional import Validators, Verdict, evaluate, range_applies

PROCEED, NOT_MODIFIED, FAILED = Verdict.PROCEED, Verdict.NOT_MODIFIED, Verdict.FAILED

# The date of RFC 9110's examples, and its neighbours.
MODIFIED = 784111777
THEN = b"Sun, 06 Nov 1994 08:49:37 GMT"
BEFORE = b"Sun, 06 Nov 1994 08:49:36 GMT"
AFTER = b"Sun, 06 Nov 1994 08:49:38 GMT"
THEN_RFC850 = b"Sunday, 06-Nov-94 08:49:37 GMT"
THEN_ASCTIME = b"Sun Nov  6 08:49:37 1994"

STRONG = Validators(b'"a"', MODIFIED, modified_strong=True)
WEAK = Validators(b'W/"a"', MODIFIED, modified_strong=False)
NONE = Validators(b"", None, modified_strong=False)

IM, INM, IMS, IUS = b"if-match", b"if-none-match", b"if-modified-since", b"if-unmodified-since"


# -- lists of tags -------------------------------------------------------------------------------------------

# Lists in which there is "a", not W/"a".
WITH_STRONG = [
    b'"a"',
    b' "a"\t',
    b'"a", "b"',
    b'"b","a"',
    b'"b"\t, \t"a"',
    b',, "b", ,"a",',
    b'W/"a", "a"',
    b'"b,", "a", ","',
    b'"\\", "a"',
    b'"", "a"',
    b'"\xff\x80", "a"',
    b'"a", "a"',
]
# In which there is W/"a" only.
WITH_WEAK = [b'W/"a"', b'W/"a", "b"', b'"b",W/"a"', b' , W/"a" ,']
# Without it.
WITHOUT = [
    b"",
    b" ",
    b",",
    b" , ,\t",
    b'"b"',
    b'""',
    b'W/""',
    b'"A"',
    b'"aa"',
    b'"a,b"',
    b'",a,"',
    b'"W/a"',
    b'"b", "c", W/"d"',
]
# Such as contain "a", and are no lists.
MALFORMED = [
    b'w/"a"',
    b'W"a"',
    b'W/ "a"',
    b'/"a"',
    b'"a',
    b'a"',
    b"a",
    b"'a'",
    b'"a" "b"',
    b'"a""b"',
    b'"b" "a"',
    b'"a";q=1',
    b'"a", b',
    b'"a", "b',
    b'"a", W/',
    b'"a", "b c"',
    b'"a", "\t"',
    b'"a", "\x00"',
    b'"a", "\x7f"',
    b'"a"\n',
    b'"a"\x0b',
    b'*, "a"',
    b'"a", *',
    b"**",
    b"*,",
    b'"*"',
    b"W/*",
]


@pytest.mark.parametrize("given_tags", WITH_STRONG + WITH_WEAK)
@pytest.mark.parametrize("validators", [STRONG, WEAK], ids=["strong", "weak"])
def test_if_none_match_compares_weakly(given_tags: bytes, validators: Validators) -> None:
    assert evaluate("GET", {INM: given_tags}, validators) is NOT_MODIFIED
    assert evaluate("HEAD", {INM: given_tags}, validators) is NOT_MODIFIED
    assert evaluate("POST", {INM: given_tags}, validators) is FAILED


@pytest.mark.parametrize("given_tags", WITHOUT + MALFORMED)
@pytest.mark.parametrize("validators", [STRONG, WEAK, NONE], ids=["strong", "weak", "none"])
def test_what_is_not_in_the_list_of_if_none_match_is_sent(given_tags: bytes, validators: Validators) -> None:
    for method in ("GET", "HEAD", "POST"):
        assert evaluate(method, {INM: given_tags}, validators) is PROCEED


@pytest.mark.parametrize("given_tags", WITH_STRONG)
def test_if_match_holds_for_a_strong_tag(given_tags: bytes) -> None:
    assert evaluate("GET", {IM: given_tags}, STRONG) is PROCEED


@pytest.mark.parametrize("given_tags", WITH_WEAK + WITHOUT + MALFORMED)
def test_if_match_fails_for_all_others(given_tags: bytes) -> None:
    for method in ("GET", "HEAD", "PUT"):
        assert evaluate(method, {IM: given_tags}, STRONG) is FAILED


@pytest.mark.parametrize("given_tags", WITH_STRONG + WITH_WEAK)
@pytest.mark.parametrize("validators", [WEAK, NONE], ids=["weak", "none"])
def test_if_match_never_holds_for_a_weak_tag_or_none(given_tags: bytes, validators: Validators) -> None:
    assert evaluate("GET", {IM: given_tags}, validators) is FAILED


@pytest.mark.parametrize("validators", [STRONG, WEAK, NONE], ids=["strong", "weak", "none"])
@pytest.mark.parametrize("star", [b"*", b" *\t"])
def test_a_star_names_what_exists_with_or_without_a_tag(star: bytes, validators: Validators) -> None:
    assert evaluate("GET", {IM: star}, validators) is PROCEED
    assert evaluate("GET", {INM: star}, validators) is NOT_MODIFIED
    assert evaluate("HEAD", {INM: star}, validators) is NOT_MODIFIED
    assert evaluate("PUT", {INM: star}, validators) is FAILED


@pytest.mark.parametrize("tag", [b'"\xe4\xff"', b'"a,b"', b'"\\"', b'"x-br"', b'""'])
def test_tags_of_any_allowed_bytes_are_found(tag: bytes) -> None:
    validators = Validators(tag, None, modified_strong=False)
    for value in (tag, b'"x", %b' % tag, b'%b,"x"' % tag):
        assert evaluate("GET", {INM: value}, validators) is NOT_MODIFIED
        assert evaluate("GET", {IM: value}, validators) is PROCEED
    assert evaluate("GET", {INM: b'"x"'}, validators) is PROCEED
    assert evaluate("GET", {IM: b'"x"'}, validators) is FAILED


# -- dates, and which field counts ---------------------------------------------------------------------------

NO_DATES = [
    b"",
    b"yesterday",
    b"Sun, 06 Nov 1994 08:49:37",
    THEN + b", " + THEN,
    THEN.lower(),
    b"784111777",
    b'"a"',
]

ROWS: dict[str, tuple[str, dict[bytes, bytes], Verdict]] = {
    "nothing asked": ("GET", {}, PROCEED),
    "unmodified since then": ("GET", {IUS: THEN}, PROCEED),
    "unmodified since later": ("GET", {IUS: AFTER}, PROCEED),
    "modified since": ("GET", {IUS: BEFORE}, FAILED),
    "modified since, another method": ("DELETE", {IUS: BEFORE}, FAILED),
    "modified since, RFC 850": ("GET", {IUS: b"Sunday, 06-Nov-94 08:49:36 GMT"}, FAILED),
    "not modified since then": ("GET", {IMS: THEN}, NOT_MODIFIED),
    "not modified since later": ("HEAD", {IMS: AFTER}, NOT_MODIFIED),
    "not modified since far in the future": ("GET", {IMS: b"Fri, 31 Dec 9999 23:59:59 GMT"}, NOT_MODIFIED),
    "not modified since, RFC 850": ("GET", {IMS: THEN_RFC850}, NOT_MODIFIED),
    "not modified since, asctime": ("GET", {IMS: THEN_ASCTIME}, NOT_MODIFIED),
    "blanks": ("GET", {IMS: b" \t" + THEN + b" "}, NOT_MODIFIED),
    "modified": ("GET", {IMS: BEFORE}, PROCEED),
    "If-Modified-Since is for reading": ("POST", {IMS: THEN}, PROCEED),
    "If-Match goes before If-Unmodified-Since": ("GET", {IM: b'"a"', IUS: BEFORE}, PROCEED),
    "If-Match fails, If-Unmodified-Since holds": ("GET", {IM: b'"b"', IUS: AFTER}, FAILED),
    "If-Match malformed, If-Unmodified-Since holds": ("GET", {IM: b"a", IUS: AFTER}, FAILED),
    "If-None-Match goes before If-Modified-Since": ("GET", {INM: b'"b"', IMS: THEN}, PROCEED),
    "If-None-Match malformed, If-Modified-Since holds": ("GET", {INM: b"a", IMS: THEN}, PROCEED),
    "If-None-Match empty, If-Modified-Since holds": ("GET", {INM: b"", IMS: THEN}, PROCEED),
    "If-None-Match matches, modified since": ("GET", {INM: b'"a"', IMS: BEFORE}, NOT_MODIFIED),
    "412 goes before 304": ("GET", {IM: b'"b"', INM: b'"a"'}, FAILED),
    "412 goes before 304, by date": ("GET", {IUS: BEFORE, INM: b'"a"'}, FAILED),
    "412 goes before 304, all by date": ("GET", {IUS: BEFORE, IMS: THEN}, FAILED),
    "both hold": ("GET", {IM: b'"a"', INM: b'"b"'}, PROCEED),
    "If-Match holds, then 304": ("GET", {IM: b'"a"', INM: b'"a"'}, NOT_MODIFIED),
    "If-Unmodified-Since holds, then 304": ("GET", {IUS: THEN, INM: b'"a"'}, NOT_MODIFIED),
    "If-Unmodified-Since holds, then 304 by date": ("HEAD", {IUS: THEN, IMS: THEN}, NOT_MODIFIED),
    "If-Range is not asked here": ("GET", {b"if-range": b'"b"', b"range": b"bytes=0-1"}, PROCEED),
    "methods are case-sensitive": ("get", {INM: b'"a"'}, FAILED),
}


@pytest.mark.parametrize("name", ROWS)
def test_preconditions(name: str) -> None:
    method, fields, verdict = ROWS[name]
    assert evaluate(method, fields, STRONG) is verdict


@pytest.mark.parametrize("value", NO_DATES)
def test_what_is_no_date_is_ignored(value: bytes) -> None:
    for field in (IMS, IUS):
        assert evaluate("GET", {field: value}, STRONG) is PROCEED


@pytest.mark.parametrize("value", [BEFORE, THEN, AFTER])
def test_dates_are_ignored_for_what_has_none(value: bytes) -> None:
    dateless = Validators(b'"a"', None, modified_strong=False)
    for field in (IMS, IUS):
        for validators in (NONE, dateless):
            assert evaluate("GET", {field: value}, validators) is PROCEED


@pytest.mark.parametrize("method", ["OPTIONS", "TRACE", "CONNECT"])
@pytest.mark.parametrize("fields", [{IM: b'"b"'}, {IUS: BEFORE}, {INM: b'"a"'}, {INM: b"*"}, {IMS: THEN}])
def test_methods_that_select_nothing_know_no_preconditions(method: str, fields: dict[bytes, bytes]) -> None:
    assert evaluate(method, fields, STRONG) is PROCEED


# -- If-Range ------------------------------------------------------------------------------------------------

APPLIES: list[tuple[bytes, Validators, bool]] = [
    (b'"a"', STRONG, True),
    (b' "a"\t', STRONG, True),
    (b'"b"', STRONG, False),
    (b'W/"a"', STRONG, False),
    (b'"a"', WEAK, False),
    (b'W/"a"', WEAK, False),
    (b'"a"', NONE, False),
    (b'"a", "b"', STRONG, False),
    (b'"a", "a"', STRONG, False),
    (b'"a', STRONG, False),
    (b"a", STRONG, False),
    (b'""', NONE, False),
    (b"*", STRONG, False),
    (b"", STRONG, False),
    (b"", NONE, False),
    (THEN, STRONG, True),
    (THEN_RFC850, STRONG, True),
    (THEN_ASCTIME, STRONG, True),
    (BEFORE, STRONG, False),
    (AFTER, STRONG, False),
    (THEN, WEAK, False),
    (THEN, NONE, False),
    (THEN + b", " + THEN, STRONG, False),
    (b"never", STRONG, False),
    (THEN, Validators(b'W/"a"', MODIFIED, modified_strong=True), True),
    # What cannot be made here, but could be by hand.
    (THEN, Validators(b'"a"', None, modified_strong=True), False),
    (b"never", Validators(b'"a"', None, modified_strong=True), False),
]


@pytest.mark.parametrize("value, validators, applies", APPLIES)
def test_if_range(value: bytes, validators: Validators, applies: bool) -> None:
    assert range_applies({b"range": b"bytes=0-1", b"if-range": value}, validators) is applies


@pytest.mark.parametrize("validators", [STRONG, WEAK, NONE], ids=["strong", "weak", "none"])
def test_without_if_range_ranges_apply(validators: Validators) -> None:
    assert range_applies({b"range": b"bytes=0-1", INM: b'"b"', IM: b'"b"'}, validators)


# -- the model -----------------------------------------------------------------------------------------------

DATES = {
    THEN: MODIFIED,
    THEN_RFC850: MODIFIED,
    THEN_ASCTIME: MODIFIED,
    BEFORE: MODIFIED - 1,
    AFTER: MODIFIED + 1,
    b"Sun, 06 Nov 1994 08:49:37": None,
    THEN + b", " + AFTER: None,
    b"": None,
}


def model(method: str, fields: Mapping[bytes, bytes], validators: Validators) -> Verdict:
    """RFC 9110 section 13.2.2, with its own numbers; what a section says is to be ignored is taken out first."""
    present = dict(fields)
    if method in ("CONNECT", "OPTIONS", "TRACE"):  # 13.2.1
        present.clear()
    if IM in present:  # 13.1.4
        present.pop(IUS, None)
    if INM in present or method not in ("GET", "HEAD"):  # 13.1.3
        present.pop(IMS, None)
    for field in (IUS, IMS):  # 13.1.3, 13.1.4
        if field in present and (DATES[present[field]] is None or validators.modified is None):
            del present[field]

    step = 1
    while True:
        if step == 1:
            if IM in present:
                if not names(present[IM], validators.etag, equal_strongly):
                    return FAILED
                step = 3
            else:
                step = 2
        elif step == 2:
            if IUS in present and not until(validators.modified, present[IUS]):
                return FAILED
            step = 3
        elif step == 3:
            if INM in present:
                if names(present[INM], validators.etag, equal_weakly):
                    return NOT_MODIFIED if method in ("GET", "HEAD") else FAILED
                step = 5
            else:
                step = 4
        elif step == 4:
            if IMS in present and until(validators.modified, present[IMS]):
                return NOT_MODIFIED
            step = 5
        else:
            return PROCEED


def until(modified: int | None, field: bytes) -> bool:
    date = DATES[field]
    assert modified is not None
    assert date is not None
    return modified <= date


def names(field: bytes, etag: bytes, equal: object) -> bool:
    """Whether a field names the representation; nothing is named by what is no list."""
    text = field.decode("latin-1").strip(" \t")
    if text == "*":
        return True
    tags = read_list(text)
    assert callable(equal)
    return bool(etag) and tags is not None and any(equal(tag, etag.decode("latin-1")) for tag in tags)


def equal_strongly(one: str, other: str) -> bool:
    return not one.startswith("W/") and not other.startswith("W/") and one == other


def equal_weakly(one: str, other: str) -> bool:
    return one[one.index('"') :] == other[other.index('"') :]


def read_list(text: str) -> list[str] | None:
    """Character by character; None if it is no list of tags."""
    elements = [""]
    quoted = False
    for character in text:
        if character == '"':
            quoted = not quoted
        if character == "," and not quoted:
            elements.append("")
        else:
            elements[-1] += character
    tags = [element.strip(" \t") for element in elements]
    tags = [tag for tag in tags if tag]
    return None if quoted or not all(map(is_tag, tags)) else tags


def is_tag(text: str) -> bool:
    opaque = text[2:] if text[:2] == "W/" else text
    if len(opaque) < 2 or opaque[0] != '"' or opaque[-1] != '"':
        return False
    return all(c == "!" or "#" <= c <= "~" or "\x80" <= c <= "\xff" for c in opaque[1:-1])


TAGS = st.sampled_from(
    [b'"a"', b'W/"a"', b'"b"', b'"a,b"', b'W/"a,b"', b'","', b'"\xe4"', b'""', b'W/""', b""]
)
NEARLY = st.text(alphabet='"W/a,*b \t\x7f\xe4\\\n', max_size=9).map(lambda text: text.encode("latin-1"))
TAG_LISTS = st.one_of(
    st.just(b"*"),
    TAGS,
    st.tuples(st.sampled_from([b",", b", ", b" ,\t"]), st.lists(TAGS, max_size=4)).map(
        lambda x: x[0].join(x[1])
    ),
    st.tuples(TAGS, st.sampled_from([b",", b", ", b" ", b""]), NEARLY).map(b"".join),
    NEARLY,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        IM: TAG_LISTS,
        INM: TAG_LISTS,
        IMS: st.sampled_from(list(DATES)),
        IUS: st.sampled_from(list(DATES)),
        b"if-range": st.just(b'"b"'),
        b"range": st.just(b"bytes=0-0"),
    },
)
VALIDATORS = st.builds(
    Validators,
    TAGS,
    st.sampled_from([None, MODIFIED, MODIFIED]),
    modified_strong=st.booleans(),
)
METHODS = st.sampled_from(["GET", "GET", "HEAD", "POST", "PUT", "OPTIONS"])


@settings(max_examples=500)
@given(method=METHODS, fields=FIELDS, validators=VALIDATORS)
@example(method="GET", fields={INM: b'"a,b"', IM: b'"a"'}, validators=STRONG)
@example(method="GET", fields={INM: b""}, validators=NONE)
def test_preconditions_are_as_the_model_has_them(
    method: str, fields: dict[bytes, bytes], validators: Validators
) -> None:
    assert evaluate(method, fields, validators) is model(method, fields, validators)


@given(
    fields=st.dictionaries(st.sampled_from([IM, INM, IMS, IUS, b"if-range"]), st.binary()),
    validators=VALIDATORS,
    method=METHODS,
)
def test_no_value_raises(fields: dict[bytes, bytes], validators: Validators, method: str) -> None:
    assert evaluate(method, fields, validators) in Verdict
    assert range_applies(fields, validators) in (True, False)


# With the tag that is looked for, so that the list has to be read.
LONG = 300_000
HOSTILE = {
    "tags": b'"b",' * 100_000 + b'"a"',
    "weak tags": b'W/"b" , ' * 100_000 + b'"a"',
    "malformed at the end": b'"a",' * 100_000 + b"x",
    "an open quote": b'"a","' + b"b" * LONG,
    "quotes": b'"' * LONG + b'"a"',
    "blanks": b'"a"' + b" \t" * LONG + b"x",
    "blanks and commas": b'"a"' + b" ,\t" * LONG + b"x",
    "blanks between tags": (b'"a"' + b" " * 1000) * 300,
    "commas": b"," * LONG + b'"a"' + b"," * LONG + b"x",
    "weak, and no more": b'"a",' + b"W/" * LONG,
    "stars": b"*" * LONG + b'"a"',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_lists_take_linear_time(name: str) -> None:
    """Some hundredths of a second, where n² would take minutes."""
    value = HOSTILE[name]
    began = time.thread_time()
    for field in (IM, INM, IMS, IUS):
        evaluate("GET", {field: value}, STRONG)
    range_applies({b"if-range": value}, STRONG)
    assert time.thread_time() - began < 5
