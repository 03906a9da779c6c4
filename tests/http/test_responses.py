"""Response heads: what an app may put into one, what is taken out, and what can never get onto the wire."""

from __future__ import annotations

import email.utils
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioserve.errors import AppMisuse, InvalidResponse
from trioserve.http import http2_fields, response
from trioserve.http.response import (
    ASKS_CLOSE,
    HAS_DATE,
    HAS_SERVER,
    DefaultFields,
    Start,
    check_start,
    field_block,
    minimal_response,
)

OK = b"HTTP/1.1 200 OK\r\n"


def facts(start: Start) -> tuple[bytes, int | None, int]:
    return start.block, start.length, start.flags


# -- the status line -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (200, b"HTTP/1.1 200 OK\r\n"),
        (204, b"HTTP/1.1 204 No Content\r\n"),
        (404, b"HTTP/1.1 404 Not Found\r\n"),
        (299, b"HTTP/1.1 299 \r\n"),
        (599, b"HTTP/1.1 599 \r\n"),
        (999, b"HTTP/1.1 999 \r\n"),
    ],
)
def test_a_status_line_has_the_registered_phrase_or_none(status: int, line: bytes) -> None:
    # RFC 9112 section 4: the space before the phrase stays.
    for _ in range(2):
        assert check_start(status, []).block == line


@pytest.mark.parametrize(
    "status", [-1, 0, 1, 99, 100, 101, 103, 199, 1000, True, False, None, "200", 200.5, b"200", ()]
)
def test_a_status_that_ends_no_response_is_refused(status: Any) -> None:
    with pytest.raises(InvalidResponse, match="status must be an int from 200 to 999"):
        check_start(status, [])


@pytest.mark.parametrize("status", [[], {}, bytearray(b"200")])
def test_a_status_of_an_unhashable_type_is_refused_too(status: Any) -> None:
    with pytest.raises(InvalidResponse):
        check_start(status, [])


# -- fields --------------------------------------------------------------------------------------------------


def test_fields_are_written_in_order_as_they_stand() -> None:
    fields = [
        (b"X-One", b"1"),
        (b"set-cookie", b"a=b"),
        (b"Set-Cookie", b"c=d"),
        (b"empty", b""),
        (b"x", b" \xe9 "),
    ]
    block, length, flags = facts(check_start(200, fields))
    assert block == OK + b"X-One: 1\r\nset-cookie: a=b\r\nSet-Cookie: c=d\r\nempty: \r\nx:  \xe9 \r\n"
    assert (length, flags) == (None, 0)


def test_tuples_and_lists_of_fields_are_both_fine() -> None:
    assert check_start(200, ((b"a", b"b"), [b"c", b"d"])).block == OK + b"a: b\r\nc: d\r\n"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "evil", [b"a\r\nset-cookie: x", b"\r", b"\n", b"a\nb", b"a\r", b"\0", b"a\0b", b"\r\n\r\n<html>", b"\r\n"]
)
def test_a_value_cannot_end_its_line(evil: bytes) -> None:
    for fields in ([(b"x", evil)], [(b"a", b"b"), (b"x", evil)], [(b"x", evil), (b"a", b"b")]):
        with pytest.raises(InvalidResponse, match="cannot contain CR, LF or NUL"):
            check_start(200, fields)
        with pytest.raises(InvalidResponse, match="cannot contain CR, LF or NUL"):
            field_block(fields)


@pytest.mark.parametrize(
    "evil",
    [
        b"",
        b" ",
        b"a b",
        b"a:",
        b":a",
        b"a\r\nb",
        b"a\n",
        b"\r",
        b"a\0",
        b"a\x7f",
        b"\xe9",
        b"a(b)",
        b'"a"',
        b"a/b",
    ],
)
def test_a_name_must_be_a_token(evil: bytes) -> None:
    for _ in range(2):  # it must not be remembered as good
        with pytest.raises(InvalidResponse, match="not a field name"):
            check_start(200, [(evil, b"x")])
        with pytest.raises(InvalidResponse, match="not a field name"):
            field_block([(evil, b"x")])


@pytest.mark.parametrize(
    "fields",
    [
        [("x", b"1")],
        [(b"x", "1")],
        [(b"x", 1)],
        [(b"x", None)],
        [(None, b"1")],
        [(bytearray(b"x"), b"1")],
        [(b"x",)],
        [(b"x", b"1", b"2")],
        [b"x: 1"],
        [None],
        [1],
        [(b"content-length", "5")],
        [(b"content-length", 5)],
        [(b"connection", "close")],
        [(b"transfer-encoding", None)],
        [(b"never-seen-before-1", b"x"), (b"x",)],
        [(b"never-seen-before-2", b"x"), None],
        [[], []],
    ],
)
def test_fields_of_another_shape_are_a_named_error(fields: Any) -> None:
    for check in (lambda: check_start(200, fields), lambda: field_block(fields)):
        with pytest.raises(InvalidResponse):
            check()


def test_errors_show_the_name_and_no_value() -> None:
    with pytest.raises(InvalidResponse) as caught:
        check_start(200, [(b"x-token", b"secret\r\n")])
    assert "x-token" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_app_that_makes_up_names_fills_no_memory() -> None:
    for number in range(3 * response._CACHE_MAX):
        check_start(200, [(b"x-%d" % number, b"1"), (b"content-length", b"%d" % number)])
    assert len(response._kinds) <= response._CACHE_MAX
    assert len(response._lines) <= response._CACHE_MAX
    many = [(b"y-%d" % number, b"1") for number in range(2 * response._CACHE_MAX)]
    assert check_start(200, many).block.count(b"\r\n") == len(many) + 1


@given(fields=st.lists(st.tuples(st.binary(max_size=6), st.binary(max_size=8)), max_size=4))
def test_whatever_passes_has_one_line_for_each_field(fields: list[tuple[bytes, bytes]]) -> None:
    try:
        block = check_start(200, fields).block
    except AppMisuse:
        return
    lines = block.split(b"\r\n")
    assert lines[-1] == b""
    assert len(lines) - 2 <= len(fields)
    assert not any(byte in line for line in lines for byte in (b"\r", b"\n", b"\0"))


# -- fields that are not the app's alone ---------------------------------------------------------------------


@pytest.mark.parametrize("value", [b"0", b"5", b"0005", b"9" * 18])
def test_a_content_length_is_read_and_left_to_the_framing(value: bytes) -> None:
    for _ in range(2):  # the second time from memory
        start = check_start(200, [(b"Content-Length", value)])
        assert facts(start) == (OK, int(value), 0)
        assert start.framing == b"content-length: %d\r\n" % int(value)


@pytest.mark.parametrize(
    "value", [b"", b"-1", b"+5", b"5 ", b" 5", b"5,5", b"0x5", b"five", b"\xb2", b"9" * 5000]
)
def test_a_content_length_that_is_none_is_refused(value: bytes) -> None:
    with pytest.raises(InvalidResponse):
        check_start(200, [(b"content-length", value)])


@pytest.mark.parametrize("second", [b"5", b"6"])
def test_a_second_content_length_is_refused(second: bytes) -> None:
    with pytest.raises(InvalidResponse):
        check_start(200, [(b"content-length", b"5"), (b"Content-Length", second)])


def test_a_204_may_declare_a_length_that_is_not_written() -> None:
    # RFC 9110 section 8.6. Frameworks set it out of habit; test_wire_framing.py sees that it does not get out.
    assert facts(check_start(204, [(b"a", b"b"), (b"content-length", b"0")])) == (
        b"HTTP/1.1 204 No Content\r\na: b\r\n",
        0,
        0,
    )


def test_a_304_may_have_the_content_length_of_the_200() -> None:
    assert check_start(304, [(b"content-length", b"5")]).length == 5


@pytest.mark.parametrize("name", [b"keep-alive", b"Keep-Alive"])
def test_a_keep_alive_field_is_passed_over(name: bytes) -> None:
    # It comes along where an app hands on what another server has answered.
    fields = [(b"connection", b"keep-alive"), (name, b"timeout=5, max=100")]
    assert facts(check_start(200, fields)) == (OK, None, 0)
    assert http2_fields.check_start(200, fields) == ([], None, 0)
    with pytest.raises(InvalidResponse, match="not allowed in trailers"):
        field_block(fields[1:])


@pytest.mark.parametrize("name", [b"proxy-connection", b"te", b"TE"])
def test_hop_by_hop_fields_are_refused(name: bytes) -> None:
    with pytest.raises(InvalidResponse, match="hop-by-hop"):
        check_start(200, [(name, b"x")])


@pytest.mark.parametrize(
    ("value", "written", "flags"),
    [
        (b"close", False, ASKS_CLOSE),
        (b"Close", False, ASKS_CLOSE),
        (b"keep-alive", False, 0),
        (b"Keep-Alive, close", False, ASKS_CLOSE),
        (b"upgrade", True, 0),
    ],
)
def test_the_app_may_ask_to_close_but_the_server_writes_it(value: bytes, written: bool, flags: int) -> None:
    block, _, found = facts(check_start(426, [(b"connection", value), (b"upgrade", b"h2c")]))
    assert (b"connection: " + value in block) == written
    assert found == flags
    assert block.endswith(b"upgrade: h2c\r\n")


@pytest.mark.parametrize("value", [b"x-secret", b"close, te", b"transfer-encoding", b"", b"upgrade\r\nx: y"])
def test_other_connection_options_are_refused(value: bytes) -> None:
    with pytest.raises(InvalidResponse):
        check_start(200, [(b"connection", value)])


def test_transfer_encoding_is_the_servers() -> None:
    assert check_start(200, [(b"Transfer-Encoding", b"Chunked"), (b"a", b"b")]).block == OK + b"a: b\r\n"
    for value in (b"gzip", b"gzip, chunked", b"identity", b"", b"chunked\r\nx: y"):
        with pytest.raises(InvalidResponse):
            check_start(200, [(b"transfer-encoding", value)])


def test_dates_and_servers_of_the_app_are_noted() -> None:
    assert check_start(200, [(b"Date", b"x")]).flags == HAS_DATE
    assert check_start(200, [(b"SERVER", b"x")]).flags == HAS_SERVER
    assert check_start(200, [(b"date", b"x"), (b"server", b"y"), (b"connection", b"close")]).flags == (
        HAS_DATE | HAS_SERVER | ASKS_CLOSE
    )


@pytest.mark.parametrize(
    "name",
    [b"content-length", b"Transfer-Encoding", b"connection", b"keep-alive", b"te", b"proxy-connection"],
)
def test_trailers_and_interim_responses_may_not_frame(name: bytes) -> None:
    with pytest.raises(InvalidResponse, match="not allowed in trailers"):
        field_block([(name, b"5")])


def test_trailers_are_a_block_of_lines() -> None:
    assert field_block([(b"a", b"b"), (b"C", b"")]) == b"a: b\r\nC: \r\n"
    assert field_block([]) == b""


# -- the server's own fields ---------------------------------------------------------------------------------


def test_date_and_server_are_added_unless_the_app_has_set_them() -> None:
    defaults = DefaultFields(date=True, server=b"trioserve", others=[(b"alt-svc", b"h3")])
    both = defaults.block(0.0)
    date, server, alt = both.splitlines(keepends=True)
    assert email.utils.parsedate_to_datetime(date.decode()[6:].strip()).timestamp() == pytest.approx(
        time.time(), abs=2
    )
    assert (server, alt) == (b"server: trioserve\r\n", b"alt-svc: h3\r\n")
    assert defaults.block(0.0, HAS_DATE) == server + alt
    assert defaults.block(0.0, HAS_SERVER) == date + alt
    assert defaults.block(0.0, HAS_DATE | HAS_SERVER) == alt
    assert defaults.block(0.0, ASKS_CLOSE) == both


def test_the_servers_fields_can_be_switched_off() -> None:
    assert DefaultFields(date=False, server=None).block(0.0) == b""
    assert DefaultFields(date=False, server=b"x").block(0.0) == b"server: x\r\n"


def test_the_date_is_made_again_when_its_second_is_over() -> None:
    defaults = DefaultFields(date=True, server=None)
    defaults.block(100.0)
    assert 100.0 < defaults.valid_until <= 101.0
    defaults.both = b"stale"
    assert defaults.block(defaults.valid_until - 0.001) == b"stale"
    assert defaults.block(defaults.valid_until).startswith(b"date: ")


# -- starts that come again ----------------------------------------------------------------------------------


def new_fields(text: bytes = b"text/plain") -> list[tuple[bytes, bytes]]:
    """Equal ones, none of them the same object."""
    return [(bytes(bytearray(b"content-type")), text), (b"content-length", bytes(bytearray(b"14")))]


def test_a_start_that_comes_again_is_looked_up() -> None:
    defaults = DefaultFields(date=True, server=b"x")
    starts = [defaults.start(200, new_fields()) for _ in range(4)]
    assert {facts(start) for start in starts} == {(OK + b"content-type: text/plain\r\n", 14, 0)}
    assert starts[-1] is starts[-2]
    # Whatever differs makes another one.
    for status, fields in (
        (201, new_fields()),
        (200, new_fields(b"text/html")),
        (200, new_fields()[:1]),
        (200, new_fields()[::-1]),
    ):
        for _ in range(3):
            other = defaults.start(status, fields)
            assert other is not starts[-1]
            assert facts(other) == facts(check_start(status, fields))
    # A list that the app changes later is none of the cache's.
    mine = new_fields()
    defaults.start(200, mine)
    mine.append((b"a", b"b"))
    assert defaults.start(200, mine).block.endswith(b"a: b\r\n")


@pytest.mark.parametrize(
    ("status", "fields"),
    [
        (200, [(b"x", b"a\r\nb")]),
        (200, [(b"x y", b"a")]),
        (200, [(b"content-length", b"5"), (b"content-length", b"5")]),
        (199, []),
        ([], []),
        (200, [[]]),
        (200, None),
    ],
)
def test_a_start_that_is_refused_is_refused_again(status: Any, fields: Any) -> None:
    defaults = DefaultFields(date=True, server=b"x")
    for _ in range(3):
        with pytest.raises((AppMisuse, TypeError)):
            defaults.start(status, fields)


def test_fields_that_cannot_be_looked_up_are_checked_each_time() -> None:
    defaults = DefaultFields(date=True, server=b"x")
    for _ in range(3):
        assert defaults.start(200, [[b"a", b"b"]]).block == OK + b"a: b\r\n"  # type: ignore[list-item]
        assert defaults.start(200, [(b"connection", b"close")]).flags == ASKS_CLOSE


def test_an_app_that_makes_up_values_fills_no_memory_with_starts() -> None:
    defaults = DefaultFields(date=True, server=b"x")
    for number in range(3 * response._STARTS_MAX):
        defaults.start(200, [(b"x-request-id", b"%d" % number)])
    assert not defaults._starts  # nothing has come twice
    common = [(b"x", b"y")]
    check_start(200, common)
    for status in range(200, 200 + 3 * response._STARTS_MAX):
        defaults.start(status, common)
        assert len(defaults._starts) <= response._STARTS_MAX


def test_a_whole_head_is_made_again_when_the_date_is_and_is_one_servers_own() -> None:
    check_start(200, new_fields())
    one, other = DefaultFields(date=True, server=b"one"), DefaultFields(date=True, server=b"other")
    start = one.start(200, new_fields())
    head = one.head(start, 100.0)
    assert head.startswith(OK + b"content-type: text/plain\r\ndate: ")
    assert head.endswith(b"server: one\r\ncontent-length: 14\r\n\r\n")
    assert (start.head, start.head_until) == (head, one.valid_until)
    elsewhere = other.start(200, new_fields())
    assert b"server: other\r\n" in other.head(elsewhere, 100.0)
    assert start.head == head
    loose = check_start(200, new_fields())  # of a prepared answer, which may be for several servers
    one.head(loose, 100.0)
    assert loose.head_until < 0


# -- our own responses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 408, 413, 414, 417, 431, 500, 501, 503, 505])
def test_our_own_responses_are_whole_and_close(status: int) -> None:
    head, _, body = minimal_response(status, b"server: x\r\n", extra=b"retry-after: 1\r\n").partition(
        b"\r\n\r\n"
    )
    lines = head.split(b"\r\n")
    assert lines[0].startswith(b"HTTP/1.1 %d " % status)
    assert body == lines[0].removeprefix(b"HTTP/1.1 ") + b"\n"
    assert set(lines[1:]) == {
        b"server: x",
        b"retry-after: 1",
        b"content-type: text/plain; charset=utf-8",
        b"content-length: %d" % len(body),
        b"connection: close",
    }
    assert (
        minimal_response(status, b"server: x\r\n", extra=b"retry-after: 1\r\n", head_only=True)
        == head + b"\r\n\r\n"
    )
