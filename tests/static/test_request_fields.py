"""Picking the fields that a file's answer depends on."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioserve.static.request_fields import PICKED, pick_fields

NAMES = sorted(PICKED)
OTHERS = [b"host", b"user-agent", b"cookie", b"ranges", b"rang", b"if-ranges", b"", b"accept-language"]


def test_fields_are_picked_by_name() -> None:
    headers = [(b"host", b"a"), (b"range", b"bytes=0-1"), (b"cookie", b"c=1"), (b"if-none-match", b'"x"')]
    assert pick_fields(headers) == {b"range": b"bytes=0-1", b"if-none-match": b'"x"'}


def test_without_any_of_them_there_is_nothing() -> None:
    assert pick_fields([]) == {}
    assert pick_fields([(b"host", b"a"), (b"accept-language", b"de")]) == {}


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_picked_and_repeated_ones_become_a_list(name: bytes) -> None:
    assert pick_fields([(name, b"one")]) == {name: b"one"}
    headers = [(name, b"one"), (b"host", b"a"), (name, b"two, three"), (name, b"")]
    assert pick_fields(headers) == {name: b"one, two, three, "}


def test_headers_are_read_once() -> None:
    def once() -> Iterator[tuple[bytes, bytes]]:
        yield b"accept", b"text/html"
        yield b"range", b"bytes=0-"
        yield b"accept", b"*/*"

    assert pick_fields(once()) == {b"accept": b"text/html, */*", b"range": b"bytes=0-"}


@given(st.lists(st.tuples(st.sampled_from(NAMES + OTHERS), st.binary(max_size=5))))
def test_picking_is_grouping_by_name(headers: list[tuple[bytes, bytes]]) -> None:
    expected = {}
    for name in NAMES:
        values = [value for given_name, value in headers if given_name == name]
        if values:
            expected[name] = b", ".join(values)
    assert pick_fields(headers) == expected


def test_many_repeated_fields_take_linear_time() -> None:
    """Value by value, 200,000 of them would copy 100 GB."""
    value = b'"%s"' % (b"x" * 8)
    began = time.thread_time()
    picked = pick_fields([(b"if-match", value)] * 200_000)
    assert time.thread_time() - began < 5
    assert len(picked[b"if-match"]) == 200_000 * 12 - 2
