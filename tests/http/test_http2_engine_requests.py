"""The rules about a request's fields (RFC 9113 section 8, RFC 9110), on both engines: served, refused, or malformed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.http.http2_client import (
    GET,
    POST,
    data_frame,
    frame,
    headers,
    headers_in_parts,
    priority_update,
    rst_stream,
)
from tests.http.http2_feeding import HTTP2_ENGINES, answer_200, opened
from trioserve.http.http2_codes import HEADERS, ErrorCode

pytestmark = pytest.mark.parametrize("kind", HTTP2_ENGINES)

Fields = list[tuple[bytes, bytes]]


def changed(**values: bytes | None) -> Fields:
    """GET with other pseudo-fields; None takes one out."""
    names = {name.encode().replace(b"_", b":"): value for name, value in values.items()}
    kept = [(name, names.pop(name, value)) for name, value in GET]
    return [(name, value) for name, value in [*kept, *names.items()] if value is not None]


def plus(*fields: tuple[bytes, bytes]) -> Fields:
    return [*GET, *fields]


SERVED: list[tuple[str, Fields, dict[str, Any]]] = [
    ("the least", GET, {"method": "GET", "target": b"/", "scheme": b"http", "authority": b"a", "content_length": 0}),
    ("another order", GET[::-1], {"target": b"/", "headers": [(b"host", b"a")]}),
    ("an unknown method", changed(_method=b"BREW"), {"method": "BREW"}),
    ("a lower case method", changed(_method=b"get"), {"method": "get"}),
    ("the longest method", changed(_method=b"M" * 64), {"method": "M" * 64}),
    ("a query", changed(_path=b"/a/../b?c=/d?e"), {"target": b"/a/../b?c=/d?e"}),
    ("what clients send raw in a target", changed(_path=b'/"<>[\\]^`{|}%zz'), {"target": b'/"<>[\\]^`{|}%zz'}),
    ("OPTIONS *", changed(_method=b"OPTIONS", _path=b"*"), {"target": b"*"}),
    ("https", changed(_scheme=b"https"), {"scheme": b"https"}),
    ("an upper case scheme", changed(_scheme=b"HTTP"), {"scheme": b"http"}),
    ("an authority with a port", changed(_authority=b"[::1]:80"), {"authority": b"[::1]:80"}),
    ("host instead of :authority", [*changed(_authority=None), (b"host", b"h")],
     {"authority": b"h", "headers": [(b"host", b"h")]}),
    ("host beside :authority", plus((b"x", b"y"), (b"host", b"A")),
     {"authority": b"a", "headers": [(b"host", b"a"), (b"x", b"y")]}),
    ("an empty :authority and a host", [*changed(_authority=b""), (b"host", b"h")], {"authority": b"h"}),
    ("an empty host, as in HTTP/1", [*changed(_authority=None), (b"host", b"")], {"authority": b""}),
    ("an empty value", plus((b"x", b"")), {"headers": [(b"host", b"a"), (b"x", b"")]}),
    ("white space and odd bytes within a value", plus((b"x", b"a \t\x01\x7f\xff b")),
     {"headers": [(b"host", b"a"), (b"x", b"a \t\x01\x7f\xff b")]}),
    ("every byte that a name may have", plus((b"!#$%&'*+-.^_`|~09az", b"")), {}),
    ("te: trailers", plus((b"te", b"Trailers")), {"wants_trailers": True}),
    ("expect", plus((b"expect", b"100-Continue")), {"expects_continue": True}),
    ("cookie crumbs", plus((b"cookie", b"a=1"), (b"x", b"y"), (b"cookie", b"b=2"), (b"cookie", b"c=3")),
     {"headers": [(b"host", b"a"), (b"cookie", b"a=1; b=2; c=3"), (b"x", b"y")]}),
    ("one cookie", plus((b"cookie", b"a=1")), {"headers": [(b"host", b"a"), (b"cookie", b"a=1")]}),
    ("equal names", plus((b"x", b"1"), (b"x", b"2")), {"headers": [(b"host", b"a"), (b"x", b"1"), (b"x", b"2")]}),
    ("a priority", plus((b"priority", b"u=0, i")), {"urgency": 0, "incremental": True}),
    ("a priority in two fields", plus((b"priority", b"u=6"), (b"priority", b"i")), {"urgency": 6, "incremental": True}),
    ("a priority with parameters", plus((b"priority", b"u=5;x=1,i=?1;y")), {"urgency": 5, "incremental": True}),
    ("a priority that is none", plus((b"priority", b"u=9, u=a, u=, i=?0, =, ;;")),
     {"urgency": 3, "incremental": False}),
    ("no priority", GET, {"urgency": 3, "incremental": False}),
    ("CONNECT", [(b":method", b"CONNECT"), (b":authority", b"b:443")],
     {"method": "CONNECT", "target": b"", "scheme": b"", "authority": b"b:443", "protocol": None}),
    ("extended CONNECT", [(b":method", b"CONNECT"), (b":protocol", b"websocket"), *GET[1:]],
     {"method": "CONNECT", "target": b"/", "protocol": b"websocket", "headers": [(b"host", b"a")]}),
    ("a Content-Length of 0", plus((b"content-length", b"0")), {"content_length": 0}),
]  # fmt: skip

REFUSED: list[tuple[str, Fields, int]] = [
    ("neither authority nor host", changed(_authority=None), 400),
    ("an empty authority", changed(_authority=b""), 400),
    ("an authority with a user", changed(_authority=b"u@a"), 400),
    ("an authority with a space", changed(_authority=b"a b"), 400),
    ("a host that is none", [*changed(_authority=None), (b"host", b"a/b")], 400),
    ("two hosts", plus((b"host", b"a"), (b"host", b"a")), 400),
    ("a target without a slash", changed(_path=b"x"), 400),
    ("an absolute target", changed(_path=b"http://a/"), 400),
    ("a target with a space", changed(_path=b"/a b"), 400),
    ("a target with a fragment", changed(_path=b"/#a"), 400),
    ("a target with raw UTF-8", changed(_path="/ü".encode()), 400),
    ("* with GET", changed(_path=b"*"), 400),
    ("another scheme", changed(_scheme=b"ftp"), 400),
    ("a Content-Length that is no number", plus((b"content-length", b"5, 5")), 400),
    ("two Content-Lengths", plus((b"content-length", b"0"), (b"content-length", b"0")), 400),
    ("a Content-Length of 19 digits", plus((b"content-length", b"0" * 19)), 400),
    ("another expectation", plus((b"expect", b"200-ok")), 417),
    ("a long method", changed(_method=b"M" * 65), 501),
    ("a long target", changed(_path=b"/" + b"x" * 8192), 414),
    ("many fields", plus(*[(b"x%d" % n, b"") for n in range(101)]), 431),
    ("a large head", plus((b"x", b"y" * 65536)), 431),
]

MALFORMED: list[tuple[str, Fields]] = [
    ("no :method", changed(_method=None)),
    ("no :scheme", changed(_scheme=None)),
    ("no :path", changed(_path=None)),
    ("an empty :path", changed(_path=b"")),
    ("an empty :method", changed(_method=b"")),
    ("a method that is no token", changed(_method=b"G T")),
    ("a scheme that is none", changed(_scheme=b"1http")),
    ("an unknown pseudo-field", [*GET, (b":x", b"y")]),
    ("only a colon", [*GET, (b":", b"y")]),
    ("a pseudo-field twice", [*GET, GET[0]]),
    ("a pseudo-field behind a field", [(b"x", b"y"), *GET]),
    ("a pseudo-field behind all", [*GET[1:], (b"x", b"y"), GET[0]]),
    ("an empty name", plus((b"", b"x"))),
    ("an upper case name", plus((b"X-y", b"x"))),
    ("a space in a name", plus((b"x y", b"x"))),
    ("a colon in a name", plus((b"x:y", b"x"))),
    ("NUL in a name", plus((b"x\0", b"x"))),
    ("a name of high bytes", plus((b"x\xff", b"x"))),
    ("NUL in a value", plus((b"x", b"a\0b"))),
    ("CR in a value", plus((b"x", b"a\rb"))),
    ("LF in a value", plus((b"x", b"a\nb"))),
    ("CRLF and a field in a value", plus((b"x", b"a\r\ny: z"))),
    ("LF in :path", changed(_path=b"/\n")),
    ("a space before a value", plus((b"x", b" a"))),
    ("a space behind a value", plus((b"x", b"a "))),
    ("a tab before a value", plus((b"x", b"\ta"))),
    ("a tab behind a value", plus((b"x", b"a\t"))),
    ("only a space", plus((b"x", b" "))),
    ("te with more", plus((b"te", b"trailers, gzip"))),
    ("te twice, once wrong", plus((b"te", b"trailers"), (b"te", b"gzip"))),
    ("host and :authority differ", plus((b"host", b"b"))),
    ("CONNECT with a path", [(b":method", b"CONNECT"), (b":authority", b"b:443"), (b":path", b"/")]),
    ("CONNECT with a scheme", [(b":method", b"CONNECT"), (b":authority", b"b:443"), (b":scheme", b"http")]),
    ("CONNECT without :authority", [(b":method", b"CONNECT")]),
    ("extended CONNECT without a path", [(b":method", b"CONNECT"), (b":protocol", b"x"), *GET[1:2], GET[3]]),
    ("extended CONNECT with an odd protocol", [(b":method", b"CONNECT"), (b":protocol", b"a b"), *GET[1:]]),
    (":protocol with GET", [*GET, (b":protocol", b"websocket")]),
    (":status in a request", [*GET, (b":status", b"200")]),
    ("a body announced, and none", plus((b"content-length", b"1"))),
    *[(f"{name.decode()} of the connection", plus((name, b"x")))
      for name in (b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade")],
]  # fmt: skip


def named(cases: list[Any]) -> list[Any]:
    assert len({case[0] for case in cases}) == len(cases)
    return [pytest.param(*case[1:], id=case[0]) for case in cases]


@pytest.mark.parametrize("fields, expected", named(SERVED))
def test_served(kind: str, fields: Fields, expected: dict[str, Any]) -> None:
    connection = opened(kind)
    connection.feed(headers(1, fields))
    assert connection.outcome.sent_resets == []
    head = connection.outcome.requests[1]
    assert {name: getattr(head, name) for name in expected} == expected
    assert head.ended
    assert f"method={head.method!r}" in repr(head)


# What h2 ends the connection for, before the rules are asked.
_H2_ENDS = {"a Content-Length that is no number"}


@pytest.mark.parametrize("name, fields, status", [pytest.param(*case, id=case[0]) for case in REFUSED])
def test_refused(kind: str, name: str, fields: Fields, status: int) -> None:
    connection = opened(kind)
    parts = headers_in_parts(1, fields, [16000] * 4) if name == "a large head" else headers(1, fields)
    connection.feed(parts)
    if kind == "h2" and name in _H2_ENDS:
        assert connection.outcome.fault == ErrorCode.PROTOCOL_ERROR
        return
    assert connection.outcome.refused == {1: status}
    assert (connection.outcome.requests, connection.outcome.sent_resets) == ({}, [])
    connection.engine.send_head(1, status, [], True)
    assert connection.engine.open_streams == 0
    connection.feed(headers(3))
    assert 3 in connection.outcome.requests


@pytest.mark.parametrize("fields", named(MALFORMED))
def test_malformed(kind: str, fields: Fields) -> None:
    connection = opened(kind)
    connection.feed(headers(1, fields), headers(3))
    assert connection.outcome.fault is None, "a stream's error has ended the connection"
    assert connection.outcome.sent_resets == [(1, ErrorCode.PROTOCOL_ERROR)]
    assert list(connection.outcome.requests) == [3]
    assert connection.outcome.told_resets == [], "the sink had not heard of the stream"
    assert connection.engine.open_streams == 1


def test_a_bad_value_stays_bad_in_the_compression_table(kind: str) -> None:
    connection = opened(kind)
    fields = b"\x82\x86\x84\x41\x01a"  # GET, http, /, :authority a
    bad = b"\x40\x01x\x03a\nb"  # kept in the table
    blocks = {1: fields + bad, 3: b"\x82\x86\x84\xbf\xbe", 5: b"\x82\x86\x84\xbf"}
    connection.feed(*[frame(HEADERS, 5, stream_id, coded) for stream_id, coded in blocks.items()])
    assert connection.outcome.sent_resets == [(1, ErrorCode.PROTOCOL_ERROR), (3, ErrorCode.PROTOCOL_ERROR)]
    assert list(connection.outcome.requests) == [5]


def test_the_body_of_a_refused_request_is_dropped_and_its_window_given_back(kind: str) -> None:
    connection = opened(kind, connection_window=65536)
    connection.feed(headers(1, changed(_path=b"x"), end=False))
    frames = connection.feed(*[data_frame(1, b"x" * 16000)] * 3, data_frame(1, end=True))
    assert (connection.outcome.refused, connection.outcome.bodies, connection.outcome.ended) == (
        {1: 400},
        {},
        {},
    )
    assert sum(int.from_bytes(each.payload, "big") for each in frames if each.stream_id == 0) >= 32000
    connection.engine.send_head(1, 400, [], False)
    connection.engine.send_data(1, b"no", True)
    assert connection.engine.open_streams == 0
    assert [each.kind for each in connection.frames if each.stream_id == 1][-2:] == [1, 0]


def test_a_refused_request_may_end_with_trailers_or_be_reset(kind: str) -> None:
    connection = opened(kind, answer=lambda engine, stream_id: None)
    bad = changed(_path=b"x")
    connection.feed(headers(1, bad, end=False), headers(1, [(b"a", b"b")]))
    connection.feed(headers(3, bad, end=False), rst_stream(3))
    assert connection.outcome.refused == {1: 400, 3: 400}
    assert (connection.outcome.ended, connection.outcome.told_resets) == ({}, [(3, 8)])
    assert connection.engine.open_streams == 1


@pytest.mark.parametrize("count", [1, 5])
def test_header_count_and_sizes_are_exact(kind: str, count: int) -> None:
    few = {"header_count": 1 + count, "target_size": 3, "max_header_list_size": 400}
    pairs = [(b"x%d" % at, b"") for at in range(count)]
    size = sum(32 + len(name) + len(value) for name, value in plus(*pairs))
    connection = opened(kind, **few)
    connection.feed(headers(1, plus(*pairs)))
    connection.feed(headers(3, plus(*pairs, (b"more", b""))))
    connection.feed(headers(5, plus(*pairs[1:], (b"x0", b"y" * (400 - size)))))
    connection.feed(headers(7, plus(*pairs[1:], (b"x0", b"y" * (401 - size)))))
    connection.feed(
        headers(9, [*changed(_path=b"/ab"), *pairs]), headers(11, [*changed(_path=b"/abc"), *pairs])
    )
    assert list(connection.outcome.requests) == [1, 5, 9]
    assert connection.outcome.refused == {3: 431, 7: 431, 11: 414}


def test_a_head_over_twice_the_limit_ends_the_connection(kind: str) -> None:
    connection = opened(kind, max_header_list_size=1000)
    connection.feed(headers(1, plus((b"x", b"y" * 1500))))
    assert connection.outcome.refused == {1: 431}
    connection.feed(headers(3, plus((b"x", b"y" * 2000))))
    assert connection.outcome.fault == ErrorCode.ENHANCE_YOUR_CALM


def test_trailers_reach_the_sink_and_are_bounded(kind: str) -> None:
    connection = opened(kind, max_header_list_size=300, header_count=3)
    connection.feed(headers(1, POST, end=False), headers(1, [(b"x", b"1"), (b"x", b"2")]))
    assert connection.outcome.ended == {1: [(b"x", b"1"), (b"x", b"2")]}
    connection.feed(headers(3, POST, end=False), headers(3, [(b"x", b"1")] * 4))
    connection.feed(headers(5, POST, end=False), headers(5, [(b"x", b"1" * 300)]))
    calm = ErrorCode.ENHANCE_YOUR_CALM
    assert connection.outcome.told_resets == connection.outcome.sent_resets == [(3, calm), (5, calm)]


def test_priority_update_before_and_after_a_request(kind: str) -> None:
    connection = opened(kind)
    connection.feed(priority_update(3, b"u=1"), priority_update(3, b"u=0, i"), priority_update(5, b"u=7"))
    connection.feed(headers(1), headers(3, plus((b"priority", b"u=5"))))
    assert (connection.outcome.requests[1].urgency, connection.outcome.requests[1].incremental) == (3, False)
    assert (connection.outcome.requests[3].urgency, connection.outcome.requests[3].incremental) == (0, True)
    connection.feed(priority_update(1, b"u=2"), headers(7), priority_update(5, b"u=1"))
    assert connection.outcome.priorities == [(1, 2, False)]


def test_priority_updates_of_idle_streams_are_bounded(kind: str) -> None:
    connection = opened(kind, idle_priorities=2)
    connection.feed(*[priority_update(stream_id, b"u=1") for stream_id in (1, 3, 5)])
    connection.feed(headers(1), headers(3), headers(5))
    assert [head.urgency for head in connection.outcome.requests.values()] == [1, 1, 3]


def test_a_whole_exchange_is_done_with(kind: str) -> None:
    connection = opened(kind, answer=answer_200)
    connection.feed(headers(1), headers(3))
    assert connection.engine.open_streams == 0
    assert connection.outcome.last_stream_id == 3
