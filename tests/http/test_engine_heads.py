"""Request heads: what RFC 9112 and RFC 9110 ask for, with every engine. The cases are in `cases.py`."""

from __future__ import annotations

import pytest

from tests.http.cases import GET, REFUSED, VALID, Refused, Valid, as_params
from tests.http.feeding import ENGINES, feed, head, make_engine, refusal_of, run
from trioserve.errors import RequestRefused

pytestmark = pytest.mark.parametrize("kind", ENGINES)


@pytest.mark.parametrize("case", as_params(VALID))
def test_a_valid_head_is_accepted_and_read(kind: str, case: Valid) -> None:
    engine = make_engine(kind)
    assert engine.receive_head(case.data)
    assert {name: getattr(engine, name) for name in case.expected} == case.expected
    assert not engine.in_head
    assert engine.leftover == b""


@pytest.mark.parametrize("case", as_params(REFUSED))
def test_an_invalid_head_is_refused(kind: str, case: Refused) -> None:
    assert refusal_of(kind, case.data) == case.status


# -- refusing early ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "status"),
    [
        (b"\x16", 400),
        (b"{", 400),
        (b"GET  ", 400),
        (b"GET /a#", 400),
        (b"GET /\n", 400),
        (b"GET / I", 400),
        (b"GET / HTTP/1.1 ", 400),
        (b"GET / HTTP/2.0\r\n", 505),
        (b"CONNECT a:80 HTTP/1.1\r\n", 501),
        (b"m" * 65, 501),
        (b"GET x HTTP/1.1\r\n", 400),
        (b"GET / HTTP/1.1\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\n", 400),
        (b"\r\n\r\n\r\n", 400),
        (b"\rx", 400),
    ],
)
def test_a_head_that_cannot_become_valid_is_refused_before_it_is_whole(
    kind: str, start: bytes, status: int
) -> None:
    assert run(kind, start[:-1]).refused is None
    assert run(kind, start).refused == status


@pytest.mark.parametrize("start", [b"", b"\r", b"\r\n", b"\r\n\r", b"\r\n\r\n", b"\r\n\r\n\r"])
def test_empty_lines_before_a_head_do_not_begin_one(kind: str, start: bytes) -> None:
    # Otherwise the line end that old clients send behind a body would start the clock of the next head.
    engine = make_engine(kind)
    assert start == b"" or not engine.receive_head(start)
    assert not engine.in_head


def test_the_first_byte_of_the_request_line_begins_a_head(kind: str) -> None:
    engine = make_engine(kind)
    assert not engine.receive_head(b"\r\nG")
    assert engine.in_head
    assert engine.receive_head(head()[1:])
    assert not engine.in_head


# -- several heads with one engine ---------------------------------------------------------------------------


def test_nothing_of_a_request_is_left_in_the_next(kind: str) -> None:
    loaded = head(
        "OPTIONS http://b/ HTTP/1.1",
        "TE: trailers",
        "Expect: 100-continue",
        "Content-Length: 2",
        "Connection: keep-alive",
    )
    plain = head("GET /2 HTTP/1.0", "Connection: keep-alive", host=None)
    last = head("HEAD /3 HTTP/1.1")
    first, second, third = run(kind, loaded + b"ab" + plain + last).messages
    assert (first.method, first.body, first.expects_continue, first.wants_trailers) == (
        "OPTIONS", b"ab", True, True,
    )  # fmt: skip
    assert (second.method, second.target, second.version, second.body) == ("GET", b"/2", "1.0", b"")
    assert (second.expects_continue, second.wants_trailers, second.keep_alive) == (False, False, True)
    assert second.headers == [(b"connection", b"keep-alive")]
    assert (third.method, third.content_length, third.version) == ("HEAD", 0, "1.1")
    assert third.headers == [(b"host", b"a")]


@pytest.mark.parametrize(
    "odd",
    [
        head(GET, "Upgrade: h2c", "Connection: upgrade"),
        head("POST / HTTP/1.1", "Upgrade: h2c", "Connection: upgrade", "Content-Length: 3") + b"abc",
        head("BREW / HTTP/1.1"),
        head("BREW / HTTP/1.1", "Content-Length: 3") + b"abc",
        head("POST / HTTP/1.1", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        head("HEAD / HTTP/1.1", "Content-Length: 3") + b"abc",
        head(GET, "Connection: close"),
        head("GET / HTTP/1.0"),
    ],
)
def test_an_engine_reads_on_after_requests_that_parsers_treat_specially(kind: str, odd: bytes) -> None:
    outcome = run(kind, odd + head("GET /next HTTP/1.1", "X: 1"))
    assert [message.complete for message in outcome.messages] == [True, True]
    assert outcome.messages[1].target == b"/next"
    assert outcome.messages[1].headers == [(b"host", b"a"), (b"x", b"1")]
    assert outcome.messages[1].keep_alive


def test_an_upgrade_is_asked_for_by_one_request_alone(kind: str) -> None:
    engine = make_engine(kind)
    for _ in range(2):
        assert engine.receive_head(head(GET, "Upgrade: h2c", "Connection: upgrade"))
        assert (engine.upgrade, engine.is_odd) == (b"h2c", True)
        assert engine.receive_head(head())
        assert (engine.upgrade, engine.is_odd) == (None, False)


@pytest.mark.parametrize("keeps", [False, True])
def test_fields_by_name_are_kept_for_who_asks_for_them(kind: str, *, keeps: bool) -> None:
    engine = make_engine(kind)
    engine.keeps_fields = keeps
    for request in (head(GET, "X: 1"), head(GET, "X: 1", "Content-Length: 0")):
        assert engine.receive_head(request)
        assert engine.fields == (dict(engine.headers) if keeps else None)


def test_two_pipelined_empty_lines_are_allowed_between_requests_each_time(kind: str) -> None:
    data = (b"\r\n\r\n" + head()) * 5
    assert len(run(kind, data).messages) == 5
    assert run(kind, data + b"\r\n\r\n\r\n").refused == 400


def test_a_refused_head_leaves_no_facts_of_the_request_before_it(kind: str) -> None:
    # The access log of the refusal would blame the wrong target.
    engine = make_engine(kind)
    assert engine.receive_head(head("POST /first HTTP/1.1", "X: 1"))
    with pytest.raises(RequestRefused):
        engine.receive_head(b"G@T / HTTP/1.1\r\n\r\n")
    assert (engine.method, engine.target, engine.headers) == ("", b"", [])


def test_a_refused_head_tells_its_own_request_line_if_that_was_valid(kind: str) -> None:
    engine = make_engine(kind)
    with pytest.raises(RequestRefused):
        engine.receive_head(head("PUT /second HTTP/1.0", "A b: c"))
    assert (engine.method, engine.target, engine.version) == ("PUT", b"/second", "1.0")


# -- names as they came --------------------------------------------------------------------------------------


def test_raw_names_keep_their_case_and_still_count(kind: str) -> None:
    engine = make_engine(kind, raw_names=True)
    data = head(
        "POST / HTTP/1.1", "HOST: a", "X-Mixed: 1", "CONTENT-Length: 2", "ConnectioN: close", host=None
    )
    assert engine.receive_head(data + b"hi")
    assert engine.headers == [
        (b"HOST", b"a"),
        (b"X-Mixed", b"1"),
        (b"CONTENT-Length", b"2"),
        (b"ConnectioN", b"close"),
    ]
    assert (engine.content_length, engine.keep_alive, engine.body) == (2, False, [b"hi"])


def test_raw_names_change_no_refusal(kind: str) -> None:
    for case in REFUSED:
        assert feed(make_engine(kind, raw_names=True), [case.data]).refused == case.status, case


def test_an_absolute_form_replaces_a_raw_host(kind: str) -> None:
    engine = make_engine(kind, raw_names=True)
    assert engine.receive_head(head("GET http://b/ HTTP/1.1", "HOST: a", host=None))
    assert engine.headers == [(b"HOST", b"b")]


# -- the memory of hosts -------------------------------------------------------------------------------------


def test_hosts_are_remembered_within_bounds(kind: str) -> None:
    from trioserve.http import host as module

    parser = make_engine(kind)
    for number in range(3000):
        assert parser.receive_head(head(host=f"h{number}.example"))
    assert parser.receive_head(head(host="x" * 300))
    assert len(module.good_hosts) <= module._GOOD_HOSTS_MAX
    assert max(map(len, module.good_hosts)) <= 255
