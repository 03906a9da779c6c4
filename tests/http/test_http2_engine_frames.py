"""RFC 9113 section by section, on both engines: what breaks the connection, a stream, or nothing."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.http.cases import as_params
from tests.http.feeding import by_byte
from tests.http.http2_cases import FRAME_CASES, Case, Result
from tests.http.http2_client import data_frame, headers
from tests.http.http2_feeding import HTTP2_ENGINES, Connection, Outcome, answer_200, opened, run
from trioserve.http.http2_codes import ErrorCode

pytestmark = pytest.mark.parametrize("kind", HTTP2_ENGINES)


def result_of(outcome: Outcome) -> Result:
    return Result(None if outcome.fault is None else ErrorCode(outcome.fault), tuple(outcome.sent_resets))


@pytest.mark.parametrize("case", as_params(FRAME_CASES))
def test_what_comes_of_it(kind: str, case: Case) -> None:
    outcome = run(kind, case.all_data, acknowledge=False)
    assert result_of(outcome) == case.expected(kind)


@pytest.mark.parametrize("case", as_params(FRAME_CASES))
def test_the_same_comes_of_it_byte_by_byte(kind: str, case: Case) -> None:
    whole = run(kind, case.all_data, acknowledge=False)
    assert run(kind, by_byte(case.all_data), acknowledge=False).comparable() == whole.comparable()


@pytest.mark.parametrize("case", as_params([case for case in FRAME_CASES if case.result.resets]))
def test_a_streams_error_does_not_touch_its_siblings(kind: str, case: Case) -> None:
    if case.expected(kind).fault is not None:
        return  # declared in the table
    connection = Connection(kind, acknowledge=False)
    connection.feed(case.all_data)
    before = connection.engine.open_streams
    connection.feed(headers(101), headers(103, end=False), data_frame(103, b"still", end=True))
    assert connection.outcome.fault is None
    assert connection.outcome.requests[101].target == b"/"
    assert connection.outcome.bodies[103] == b"still"
    assert connection.engine.open_streams == before + 2


def test_the_table_has_every_section(kind: str) -> None:
    sections = Counter(case.section for case in FRAME_CASES)
    wanted = (
        "3.4 4.1 4.2 4.3 5.1 5.1.1 5.5 6.1 6.2 6.3 6.4 6.5 6.5.2 6.7 6.8 6.9 6.9.1 6.9.2 6.10 8.1 8.1.1 8.4"
    )
    assert not set(wanted.split()) - set(sections)
    assert all(case.why for case in FRAME_CASES if case.h2 is not None)


def test_data_and_heads_on_a_stream_that_both_sides_have_ended(kind: str) -> None:
    connection = opened(kind, answer=answer_200)
    connection.feed(headers(1), data_frame(1, b"x"))
    assert result_of(connection.outcome) == Result(None, ((1, ErrorCode.STREAM_CLOSED),))
    connection.feed(headers(1))
    assert connection.outcome.fault == ErrorCode.STREAM_CLOSED


def test_what_is_on_its_way_to_a_stream_that_was_reset_here_is_ignored(kind: str) -> None:
    connection = opened(kind, answer=lambda engine, stream_id: engine.reset(stream_id, ErrorCode.CANCEL))
    connection.feed(headers(1, end=False))
    connection.feed(data_frame(1, b"x"), data_frame(1, b"y"), headers(1, [(b"a", b"b")]), headers(3))
    assert result_of(connection.outcome) == Result(None, ((1, ErrorCode.CANCEL), (3, ErrorCode.CANCEL)))
    assert connection.outcome.bodies == {}
    assert connection.engine.open_streams == 0
