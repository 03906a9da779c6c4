"""Where the network cut the bytes changes nothing: every split of every case, and random splits of pipelines."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.http.cases import HUGE, REFUSED, VALID
from tests.http.feeding import ENGINES, Outcome, by_byte, head, in_two, run
from tests.http.test_engine_bodies import BAD_CHUNKS, CHUNKED, VALID_CHUNKS

pytestmark = pytest.mark.parametrize("kind", ENGINES)

_TAIL = b"PATCH /tail HTTP/1.1\r\nHost: t\r\nContent-Length: 4\r\n\r\nlast"


def cut(data: bytes, at: set[int]) -> list[bytes]:
    places = sorted({0, len(data)} | {place for place in at if place < len(data)})
    return [data[start:stop] for start, stop in pairwise(places)]


_MESSAGES = [case for case in VALID if case.name != HUGE]


def test_a_valid_message_means_the_same_in_every_two_pieces(kind: str) -> None:
    for case in _MESSAGES:
        data = case.message + _TAIL
        whole = run(kind, data)
        assert [message.complete for message in whole.messages] == [True, True], f"{case} is no whole message"
        assert whole.messages[1].body == b"last"
        assert run(kind, by_byte(data)) == whole, case
        for pieces in in_two(data):
            assert run(kind, pieces) == whole, pieces


def test_an_invalid_message_is_refused_alike_in_every_two_pieces(kind: str) -> None:
    for case in REFUSED:
        refusal = Outcome(refused=case.status)
        assert run(kind, by_byte(case.data)) == refusal, case
        for pieces in in_two(case.data[:300]):
            assert run(kind, pieces) == refusal, pieces


def test_an_invalid_message_behind_a_valid_one_is_refused_alike(kind: str) -> None:
    for case in REFUSED:
        data = head("POST / HTTP/1.1", "Content-Length: 2") + b"ok" + case.data
        whole = run(kind, data)
        assert (whole.refused, len(whole.messages), whole.messages[0].body) == (case.status, 1, b"ok"), case
        assert run(kind, by_byte(data)) == whole, case
        for at in range(len(data) - len(case.data) - 3, len(data) - len(case.data) + 10):
            assert run(kind, cut(data, {at})) == whole, (case, at)


_PIPELINE_PARTS = [case.message for case in _MESSAGES] + [CHUNKED + chunks for chunks, _ in VALID_CHUNKS]
_BAD_PARTS = [case.data for case in REFUSED] + [CHUNKED + chunks for chunks in BAD_CHUNKS]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.sampled_from(_PIPELINE_PARTS), min_size=1, max_size=4),
    bad=st.one_of(st.none(), st.sampled_from(_BAD_PARTS)),
    seed=st.integers(0, 2**32),
    pieces=st.integers(2, 40),
)
def test_a_pipeline_means_the_same_in_random_pieces(
    kind: str, parts: list[bytes], bad: bytes | None, seed: int, pieces: int
) -> None:
    data = b"".join(parts) + (bad or b"")
    whole = run(kind, data)
    assert (whole.refused is None) == (bad is None)
    numbers = random.Random(seed)
    assert run(kind, cut(data, {numbers.randrange(len(data)) for _ in range(pieces)})) == whole
    assert run(kind, by_byte(data)) == whole
