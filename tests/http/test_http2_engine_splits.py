"""Where the network cut the bytes changes nothing: every split of every case, and random splits of longer talks."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.http.feeding import by_byte, in_two
from tests.http.http2_cases import FRAME_CASES
from tests.http.http2_client import GET, OPENING, POST, Http2Peer, data_frame, headers, headers_in_parts
from tests.http.http2_client import settings as settings_frame
from tests.http.http2_feeding import HTTP2_ENGINES, answer_200, run
from tests.http.test_engine_splits import cut

pytestmark = pytest.mark.parametrize("kind", HTTP2_ENGINES)

TALK = (
    OPENING
    + settings_frame(ack=True)
    + headers(1)
    + headers_in_parts(3, POST, [4, 0, 9], end=False)
    + data_frame(3, b"one", pad=2)
    + headers(5, [*GET, (b"cookie", b"a"), (b"cookie", b"b")])
    + data_frame(3, b"two")
    + headers(3, [(b"x", b"y")])
)


@pytest.mark.slow
def test_every_split_of_a_talk(kind: str) -> None:
    whole = run(kind, TALK).comparable()
    assert "'y'" in whole["ended"]
    assert run(kind, by_byte(TALK)).comparable() == whole
    for pieces in in_two(TALK):
        assert run(kind, pieces).comparable() == whole, len(pieces[0])


@pytest.mark.slow
def test_every_split_of_every_case(kind: str) -> None:
    for case in FRAME_CASES:
        data = case.all_data
        if len(data) > 1000:
            continue  # by byte they are fed in test_http2_engine_frames
        whole = run(kind, data, acknowledge=False).comparable()
        for pieces in in_two(data):
            assert run(kind, pieces, acknowledge=False).comparable() == whole, (case.name, len(pieces[0]))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), pieces=st.integers(1, 40))
def test_a_real_clients_bytes_in_random_pieces(kind: str, seed: int, pieces: int) -> None:
    numbers = random.Random(seed)
    peer = Http2Peer()
    for at in range(numbers.randrange(1, 8)):
        fields = [
            *POST,
            (b"x-%d" % at, b"value %d" % numbers.randrange(3)),
            (b"cookie", b"c" * numbers.randrange(1, 90)),
        ]
        stream_id = peer.request(fields, end=False)
        peer.connection.send_data(stream_id, b"d" * numbers.randrange(5000), end_stream=True)
    data = peer.take()
    whole = run(kind, data, answer=answer_200).comparable()
    assert (
        run(
            kind, cut(data, {numbers.randrange(len(data)) for _ in range(pieces)}), answer=answer_200
        ).comparable()
        == whole
    )
