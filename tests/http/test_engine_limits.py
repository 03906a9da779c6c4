"""Limits are hard and exact at the boundary, whether the bytes arrive whole or one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.http.feeding import ENGINES, by_byte, head, run

pytestmark = pytest.mark.parametrize("kind", ENGINES)

POST = "POST / HTTP/1.1"
CHUNKED = head(POST, "Transfer-Encoding: chunked")


def refusals(kind: str, data: bytes, **limits: int) -> set[int | None]:
    """The outcomes of the same bytes whole, one by one, and cut near their end."""
    return {
        run(kind, pieces, **limits).refused
        for pieces in (data, by_byte(data), [data[:-1], data[-1:]], [data[:-3], data[-3:]], [data[:9], data[9:]])
    }  # fmt: skip


def padded_head(size: int) -> bytes:
    return head("GET / HTTP/1.1", "X: " + "x" * (size - len(head("GET / HTTP/1.1", "X: "))))


@pytest.mark.parametrize("limit", [256, 1000, 4096])
def test_head_size_is_exact(kind: str, limit: int) -> None:
    assert len(padded_head(limit)) == limit
    assert refusals(kind, padded_head(limit), head_size=limit) == {None}
    assert refusals(kind, padded_head(limit + 1), head_size=limit) == {431}
    assert refusals(kind, padded_head(limit + 2), head_size=limit) == {431}


def test_empty_lines_before_a_head_are_not_part_of_its_size(kind: str) -> None:
    assert refusals(kind, b"\r\n\r\n" + padded_head(300), head_size=300) == {None}
    assert refusals(kind, b"\r\n\r\n" + padded_head(301), head_size=300) == {431}


def test_pipelined_bytes_are_not_part_of_a_heads_size(kind: str) -> None:
    assert refusals(kind, padded_head(300) * 3, head_size=300) == {None}
    assert refusals(kind, padded_head(300) * 2 + padded_head(301), head_size=300) == {431}


def test_a_head_is_refused_at_the_byte_that_cannot_fit(kind: str) -> None:
    data = padded_head(2000)
    assert run(kind, data[:999], head_size=1000).refused is None
    assert run(kind, data[:1000], head_size=1000).refused == 431


@pytest.mark.parametrize("limit", [1, 2, 99])
def test_header_count_is_exact(kind: str, limit: int) -> None:
    def fields(count: int) -> bytes:
        return head("GET / HTTP/1.1", *["a:" for _ in range(count - 1)])  # one is Host

    assert refusals(kind, fields(limit), header_count=limit) == {None}
    assert refusals(kind, fields(limit + 1), header_count=limit) == {431}


def test_a_line_too_many_is_refused_at_its_end(kind: str) -> None:
    data = b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 101
    assert run(kind, data[:-1]).refused is None
    assert run(kind, data).refused == 431


def test_ten_thousand_header_lines_are_refused_by_the_101st(kind: str) -> None:
    data = head("GET / HTTP/1.1", *["a:" for _ in range(10_000)])
    assert refusals(kind, data, head_size=10**6) == {431}
    assert refusals(kind, data) == {431}


@pytest.mark.parametrize(
    "line",
    [
        lambda size: "GET /" + "x" * (size - 1) + " HTTP/1.1",
        lambda size: "GET /?" + '"' * (size - 2) + " HTTP/1.0",
        lambda size: "BREW /" + "x" * (size - 1) + " HTTP/1.1",
        lambda size: "GET http://b/" + "x" * (size - 9) + " HTTP/1.1",
        lambda size: "OPTIONS http://" + "b" * (size - 7) + " HTTP/1.1",
    ],
)
@pytest.mark.parametrize("limit", [16, 100, 1000])
def test_target_size_is_exact_for_the_target_as_it_was_sent(
    kind: str, line: Callable[[int], str], limit: int
) -> None:
    assert refusals(kind, head(line(limit)), target_size=limit) == {None}
    assert refusals(kind, head(line(limit + 1)), target_size=limit) == {414}


def test_a_long_target_is_refused_at_the_byte_over_the_limit(kind: str) -> None:
    assert run(kind, b"GET /" + b"x" * 99, target_size=100).refused is None
    assert run(kind, b"GET /" + b"x" * 100, target_size=100).refused == 414


def test_a_long_method_is_refused_whatever_the_target(kind: str) -> None:
    assert refusals(kind, head("m" * 64 + " /" + "x" * 999 + " HTTP/1.1"), target_size=1000) == {None}
    assert refusals(kind, head("m" * 65 + " /" + "x" * 9999 + " HTTP/1.1"), target_size=1000) == {501}


def test_the_first_fault_in_the_bytes_decides(kind: str) -> None:
    few = {"head_size": 600, "header_count": 5, "target_size": 50}
    long_value = "x" * 600
    many = ["a: b"] * 9
    for status, data in (
        (414, head("GET /" + "x" * 50 + "# HTTP/9.9", *many)),
        (400, head("GET /#" + "x" * 50 + " HTTP/9.9", *many)),
        (505, head("GET / HTTP/9.9", *many, "y: " + long_value)),
        (501, head("CONNECT a:1 HTTP/1.1", *many, "y: " + long_value)),
        (431, head("GET / HTTP/1.1", *many, "b : c", "y: " + long_value, host=None)),
        (431, head("GET / HTTP/1.1", "y: " + long_value, "x: a\nb")),
        (400, head("GET / HTTP/1.1", "x: a\nb", "y: " + long_value)),
        (400, head("GET / HTTP/1.1", "x: a\nb", *many)),
        (431, head("GET / HTTP/1.1", *many, "x: a\nb")),
        (400, head("GET / HTTP/1.1", "b : c", "a: b")),
        (400, head(POST, "Content-Length: x", "Expect: y")),
    ):
        assert refusals(kind, data, **few) == {status}, data


# -- bodies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1, 10])
def test_body_size_is_exact_with_a_content_length(kind: str, limit: int) -> None:
    def sized(size: int) -> bytes:
        return head(POST, f"Content-Length: {size}") + b"x" * size

    assert refusals(kind, sized(limit), body_size=limit) == {None}
    assert refusals(kind, sized(limit + 1), body_size=limit) == {413}


def test_a_content_length_over_the_limit_is_refused_before_the_body_comes(kind: str) -> None:
    assert run(kind, head(POST, "Content-Length: 11"), body_size=10).refused == 413
    assert run(kind, head(POST, "Content-Length: " + "9" * 18), body_size=10).refused == 413


@pytest.mark.parametrize("chunk", [1, 3, 10])
@pytest.mark.parametrize("limit", [1, 10, 100])
def test_body_size_is_exact_with_chunks(kind: str, limit: int, chunk: int) -> None:
    def chunked(size: int) -> bytes:
        sizes = [chunk] * (size // chunk) + [size % chunk] * (size % chunk > 0)
        return CHUNKED + b"".join(b"%x\r\n%b\r\n" % (n, b"x" * n) for n in sizes) + b"0\r\n\r\n"

    assert refusals(kind, chunked(limit), body_size=limit) == {None}
    assert refusals(kind, chunked(limit + 1), body_size=limit) == {413}


def test_a_chunk_over_the_limit_is_refused_before_its_data_come(kind: str) -> None:
    assert run(kind, CHUNKED + b"3\r\nabc\r\n8\r\n", body_size=10).refused == 413
    assert run(kind, CHUNKED + b"3\r\nabc\r\nfffffffffffffff\r\n", body_size=10).refused == 413
    assert run(kind, CHUNKED + b"6\r\nabcdef\r\n" * 2, body_size=10).refused == 413


# -- what comes with chunks ----------------------------------------------------------------------------------


def test_one_chunk_extension_is_bounded(kind: str) -> None:
    def extended(size: int) -> bytes:
        return CHUNKED + b"1;" + b"x" * (size - 1) + b"\r\ny\r\n0\r\n\r\n"

    assert refusals(kind, extended(4000)) == {None}
    assert refusals(kind, extended(4096)) == {431}
    assert refusals(kind, extended(256), head_size=256) == {None}
    assert refusals(kind, extended(300), head_size=256) == {431}


def test_chunk_extensions_are_bounded_over_a_whole_body_but_may_grow_with_its_data(kind: str) -> None:
    small = b"1;name=value\r\nx\r\n"
    large = b"%x;name=value\r\n%b\r\n" % (100, b"x" * 100)
    assert refusals(kind, CHUNKED + large * 200 + b"0\r\n\r\n", head_size=256) == {None}
    assert refusals(kind, CHUNKED + small * 10 + b"0\r\n\r\n", head_size=256) == {None}
    assert refusals(kind, CHUNKED + small * 100 + b"0\r\n\r\n", head_size=256) == {431}


def test_an_extension_that_never_ends_is_refused_at_the_limit(kind: str) -> None:
    assert run(kind, CHUNKED + b"1;" + b"x" * 4094).refused is None
    assert run(kind, CHUNKED + b"1;" + b"x" * 4095).refused == 431


def test_tiny_chunks_without_extensions_are_not_bounded(kind: str) -> None:
    outcome = run(kind, CHUNKED + b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n", head_size=256)
    assert outcome.messages[0].body == b"x" * 20_000


def test_trailer_bytes_are_bounded_like_a_head(kind: str) -> None:
    def trailers(size: int) -> bytes:
        return CHUNKED + b"0\r\na: b\r\nx: " + b"y" * (size - 11) + b"\r\n\r\n"

    for limit in (256, 1000):
        assert refusals(kind, trailers(limit), head_size=limit) == {None}
        assert refusals(kind, trailers(limit + 1), head_size=limit) == {431}


def test_trailer_count_is_bounded_like_a_heads(kind: str) -> None:
    data = CHUNKED + b"0\r\n" + b"a:\r\n" * 7
    assert refusals(kind, data + b"\r\n", header_count=7) == {None}
    assert refusals(kind, data + b"a:\r\n\r\n", header_count=7) == {431}
    assert run(kind, data + b"a:\r\n", header_count=7).refused == 431
