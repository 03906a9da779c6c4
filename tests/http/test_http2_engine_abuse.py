"""What hostile peers send: each costs bounded work and memory, and ends its connection with the right code.

Sizes are counted, not timed: calls of the sink, frames written, bytes held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import hpack
import pytest

from tests.http.http2_client import (
    GET,
    OPENING,
    POST,
    data_frame,
    frame,
    goaway,
    headers,
    ping,
    priority,
    priority_update,
    rst_stream,
    settings,
    window_update,
)  # fmt: skip
from tests.http.http2_feeding import HTTP2_ENGINES, Connection, answer_200, opened
from trioserve.http.http2_codes import ACK, CONTINUATION, DATA, HEADERS, PADDED, PING, ErrorCode
from trioserve.http.http2_engine import Http2Engine

pytestmark = pytest.mark.parametrize("kind", HTTP2_ENGINES)

CALM = ErrorCode.ENHANCE_YOUR_CALM
BUDGETS = {"reset_budget": 20, "control_budget": 100}


def ids(first: int = 1) -> Iterator[int]:
    while True:
        yield first
        first += 2


def fed_until_calm(connection: Connection, make: Callable[[int], bytes], most: int = 400) -> int:
    """Feed it all in one read; how many of the pieces there would have been. The connection must have ended."""
    connection.feed(b"".join(make(stream_id) for stream_id, _ in zip(ids(), range(most), strict=False)))
    assert connection.outcome.fault == CALM
    return most


# -- streams that come to nothing --------------------------------------------------------------------------------


def test_rapid_reset(kind: str) -> None:
    connection = opened(kind, **BUDGETS)
    fed_until_calm(connection, lambda stream_id: headers(stream_id) + rst_stream(stream_id))
    assert len(connection.outcome.requests) == 21
    assert connection.engine.open_streams == 0


def test_rapid_reset_over_many_reads(kind: str) -> None:
    connection = opened(kind, **BUDGETS)
    for stream_id in range(1, 801, 2):
        connection.feed(headers(stream_id) + rst_stream(stream_id))
    assert connection.outcome.fault == CALM
    assert len(connection.outcome.requests) == 21


def test_resets_between_useful_responses_are_no_attack(kind: str) -> None:
    connection = opened(kind, **BUDGETS)
    for stream_id in range(1, 4001, 4):
        connection.feed(headers(stream_id) + rst_stream(stream_id), headers(stream_id + 2))
        answer_200(connection.engine, stream_id + 2)
        connection.feed(window_update(0, 2))
    assert connection.outcome.fault is None


def test_requests_that_are_given_up_one_by_one_over_hours_are_no_attack(kind: str) -> None:
    """A search box beside a stream of events: nothing is ever answered completely."""
    connection = opened(kind, **BUDGETS)
    connection.feed(headers(1))
    connection.engine.send_head(1, 200, [], False)
    for stream_id in range(3, 4001, 2):
        connection.now += 1 / 30
        connection.feed(headers(stream_id))
        connection.now += 1 / 1000
        connection.feed(rst_stream(stream_id))
    assert connection.outcome.fault is None
    assert len(connection.outcome.told_resets) == 1999


def test_time_gives_back_so_many_a_second_and_never_more_than_there_were(kind: str) -> None:
    connection = opened(kind, **BUDGETS, resets_per_second=4)
    streams = ids()

    def give_up(count: int) -> None:
        given_up = [
            headers(stream_id) + rst_stream(stream_id)
            for stream_id, _ in zip(streams, range(count), strict=False)
        ]
        connection.feed(b"".join(given_up))

    connection.now = 4096  # the budget was full all the time
    give_up(20)
    connection.now += 2.375
    give_up(9)
    connection.now += 0.125
    give_up(1)
    connection.now += 3600
    give_up(20)
    assert connection.outcome.fault is None
    connection.now += 0.125
    give_up(1)
    assert connection.outcome.fault == CALM


def test_a_rapid_reset_gains_nothing_by_the_time_it_takes(kind: str) -> None:
    connection = opened(kind, **BUDGETS)
    for stream_id in range(1, 20001, 2):
        connection.now += 1 / 1000
        connection.feed(headers(stream_id) + rst_stream(stream_id))
    assert connection.outcome.fault == CALM
    assert len(connection.outcome.requests) <= 22


def test_giving_up_a_response_that_has_begun_is_no_attack(kind: str) -> None:
    connection = opened(kind, **BUDGETS)
    for stream_id in range(1, 2001, 2):
        connection.feed(headers(stream_id))
        connection.engine.send_head(stream_id, 200, [], False)
        connection.feed(rst_stream(stream_id))
    assert connection.outcome.fault is None
    assert len(connection.outcome.told_resets) == 1000


def _provoke_by_malformed(stream_id: int) -> bytes:
    return headers(stream_id, [*GET, (b"X", b"y")])


def _provoke_by_data_on_half_closed(stream_id: int) -> bytes:
    return headers(stream_id) + data_frame(stream_id, b"x")


def _provoke_by_head_on_half_closed(stream_id: int) -> bytes:
    return headers(stream_id) + headers(stream_id)


def _provoke_by_window(stream_id: int) -> bytes:
    return headers(stream_id) + window_update(stream_id, 2**31 - 1)


def _provoke_by_priority(stream_id: int) -> bytes:
    return headers(stream_id) + frame(2, 0, stream_id, b"abc")


def _provoke_by_trailers(stream_id: int) -> bytes:
    return headers(stream_id, POST, end=False) + headers(stream_id, [(b":x", b"y")])


@pytest.mark.parametrize("make", [
    _provoke_by_malformed, _provoke_by_data_on_half_closed, _provoke_by_head_on_half_closed, _provoke_by_window,
    _provoke_by_priority, _provoke_by_trailers,
])  # fmt: skip
def test_resets_that_the_peer_provokes(kind: str, make: Callable[[int], bytes]) -> None:
    """CVE-2025-8671, "MadeYouReset": the same attack with our RST_STREAM instead of the peer's."""
    connection = opened(kind, **BUDGETS)
    fed_until_calm(connection, make)
    assert len(connection.outcome.requests) <= 21
    assert len(connection.outcome.sent_resets) <= 21
    assert connection.engine.open_streams == 0


def test_provoked_resets_are_counted_even_though_the_responses_were_complete(kind: str) -> None:
    connection = opened(kind, **BUDGETS, answer=answer_200)
    connection.feed(headers(1))
    connection.feed(data_frame(1, b"x") * 400)
    assert connection.outcome.fault == CALM
    assert len(connection.outcome.sent_resets) <= 22


def test_streams_over_the_limit_again_and_again(kind: str) -> None:
    connection = opened(kind, **BUDGETS, max_concurrent_streams=3)
    connection.feed(settings(ack=True))
    fed_until_calm(connection, headers)
    assert len(connection.outcome.requests) == 3
    assert len(connection.outcome.sent_resets) == 21


def test_streams_that_come_behind_our_goodbye_are_no_attack(kind: str) -> None:
    """They were on their way, however many: a drain is not to cost the client what is being answered."""
    connection = opened(kind, **BUDGETS)
    connection.feed(settings(ack=True), headers(1))
    connection.engine.go_away()
    connection.take()
    connection.feed(b"".join(headers(3 + 2 * at) for at in range(200)))
    assert connection.outcome.fault is None
    assert {code for _, code in connection.outcome.sent_resets} == {ErrorCode.REFUSED_STREAM}
    assert len(connection.outcome.sent_resets) == 200
    answer_200(connection.engine, 1)
    assert connection.frames[-1].stream_id == 1


def test_a_page_given_up_at_once_is_no_attack(kind: str) -> None:
    connection = opened(kind)
    for first in (1, 201):
        connection.feed(b"".join(headers(first + 2 * at) for at in range(100)))
        connection.feed(b"".join(rst_stream(first + 2 * at) for at in range(100)))
    assert connection.outcome.fault is None


# -- frames that carry nothing -------------------------------------------------------------------------------


FLOODS = {
    "PING": ping(),
    "PING acknowledgements": ping(ack=True),
    "SETTINGS": settings(),
    "SETTINGS with values": settings({3: 5}),
    "SETTINGS acknowledgements": settings(ack=True),
    "PRIORITY": priority(1),
    "PRIORITY of idle streams": priority(4001),
    "PRIORITY_UPDATE": priority_update(1, b"u=1"),
    "WINDOW_UPDATE": window_update(0, 1),
    "WINDOW_UPDATE of a stream": window_update(1, 1),
    "empty DATA": data_frame(1),
    "unknown frames": frame(0xFA),
    "GOAWAY": goaway(),
    "RST_STREAM of a closed stream": rst_stream(3),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_of(kind: str, name: str) -> None:
    connection = opened(kind, **BUDGETS)
    connection.feed(headers(1, POST, end=False), headers(3), rst_stream(3))
    connection.feed(FLOODS[name] * 400)
    assert connection.outcome.fault == CALM
    assert len(connection.frames) <= 103
    assert len(connection.outcome.going_away) <= 101
    assert len(connection.windows) <= 101


@pytest.mark.parametrize("name", FLOODS)
def test_now_and_then_it_is_no_flood(kind: str, name: str) -> None:
    connection = opened(kind, **BUDGETS)
    connection.feed(headers(1, POST, end=False), headers(3), rst_stream(3))
    for _ in range(1000):
        connection.feed(FLOODS[name])
        connection.feed(ping())
    assert connection.outcome.fault is None


def test_one_settings_frame_of_thousands_of_values_is_dear(kind: str) -> None:
    connection = opened(kind, **BUDGETS)
    payload = settings({4: 65535})[9:] * 2700
    connection.feed(headers(1), frame(4, 0, 0, payload))
    assert connection.outcome.fault == CALM


def test_padding_alone_is_given_back_without_a_frame_each(kind: str) -> None:
    connection = opened(kind, acknowledge=False)
    connection.feed(settings(ack=True), headers(1, POST, end=False))
    for _ in range(50):
        connection.feed(frame(DATA, PADDED, 1, b"\xff" + bytes(255)) * 20)
    assert connection.outcome.fault is None
    assert connection.outcome.bodies == {}
    assert len(connection.frames) < 20


def test_tiny_windows(kind: str) -> None:
    """A peer that lets us send a byte at a time."""
    connection = opened(kind, **BUDGETS)
    connection.feed(settings({4: 0}), headers(1))
    engine = connection.engine
    engine.send_head(1, 200, [], False)
    sent = 0
    for _ in range(100):  # reads of ten each
        connection.feed(window_update(1, 1) * 10)
        if connection.outcome.fault is not None:
            break
        room = engine.room(1)
        engine.send_data(1, b"x" * room, False)
        sent += 1
    assert connection.outcome.fault == CALM
    assert sent <= 15


def test_windows_of_a_slow_but_honest_reader(kind: str) -> None:
    connection = opened(kind, **BUDGETS)
    connection.feed(headers(1))
    engine = connection.engine
    engine.send_head(1, 200, [], False)
    for _ in range(2000):
        engine.send_data(1, b"x" * 50, False)
        connection.feed(window_update(0, 50), window_update(1, 50))
    assert connection.outcome.fault is None


@pytest.mark.parametrize("piece", [1023, 16384])
def test_many_acknowledgements_of_a_large_body_are_no_flood(kind: str, piece: int) -> None:
    """Proxies acknowledge each piece they have taken, on the stream and on the connection, many in one read."""
    connection = opened(kind)
    connection.feed(settings({4: 262144}), window_update(0, 262144 - 65535), headers(1))
    engine = connection.engine
    engine.send_head(1, 200, [], False)
    for _ in range(20):
        engine.send_data(1, b"x" * engine.room(1), False)
        taken = 262144 // piece
        connection.feed((window_update(0, piece) + window_update(1, piece)) * taken)
        rest = 262144 - taken * piece
        if rest:
            connection.feed(window_update(0, rest), window_update(1, rest))
    assert connection.outcome.fault is None


def test_acknowledgements_that_nobody_reads_are_bounded(kind: str) -> None:
    connection = Connection(kind)
    connection.engine.receive(OPENING, 0)
    size = connection.engine.out_size
    for _ in range(100):
        connection.engine.receive(ping() * 2, 0)
    assert connection.engine.out_size == size + 200 * 17, "the driver sees it, and stops reading"
    pongs = [each for each in connection.frames if each.kind == PING and each.flags & ACK]
    assert len(pongs) == 200


# -- heads ---------------------------------------------------------------------------------------------------


def test_continuation_flood_in_frames(kind: str) -> None:
    connection = opened(kind)
    connection.feed(frame(HEADERS, 0, 1, b"\x82") + frame(CONTINUATION, 0, 1) * 100)
    assert connection.outcome.fault == CALM


def test_continuation_flood_in_bytes(kind: str) -> None:
    connection = opened(kind, max_header_list_size=20000)
    parts = [frame(HEADERS, 0, 1, b"\x00\x01a\xff\x80\xff\xff\x03")] + [
        frame(CONTINUATION, 0, 1, b"x" * 10000)
    ] * 5
    for count, part in enumerate(parts):
        connection.feed(part)
        assert connection.outcome.fault == (CALM if count >= 4 else None)


def test_the_most_frames_of_a_head(kind: str) -> None:
    connection = opened(kind, continuation_frames=3)
    block = headers(1)[9:]
    connection.feed(frame(HEADERS, 1, 1, block) + frame(CONTINUATION, 0, 1) * 2 + frame(CONTINUATION, 4, 1))
    assert 1 in connection.outcome.requests
    connection.feed(frame(HEADERS, 1, 3, block) + frame(CONTINUATION, 0, 3) * 4)
    assert connection.outcome.fault == CALM


def test_a_compression_bomb(kind: str) -> None:
    connection = opened(kind)
    large = b"\x40\x01a" + bytes(hpack.hpack.encode_integer(3900, 7)) + b"x" * 3900
    connection.feed(frame(HEADERS, 5, 1, headers(1)[9:] + large))
    assert list(connection.outcome.requests) == [1]
    connection.feed(frame(HEADERS, 5, 3, headers(1)[9:] + b"\xbe" * 20))
    assert connection.outcome.refused == {3: 431}, "over the limit, but not by much"
    connection.feed(frame(HEADERS, 5, 5, b"\xbe" * 16000))
    assert connection.outcome.fault == CALM


def test_heads_of_closed_streams_are_not_free(kind: str) -> None:
    def reset(engine: Http2Engine, stream_id: int) -> None:
        engine.reset(stream_id, ErrorCode.CANCEL)

    connection = opened(kind, **BUDGETS, answer=reset)
    connection.feed(headers(1, POST, end=False))
    connection.feed(headers(1) * 400)
    assert connection.outcome.fault == CALM
    assert len(connection.outcome.sent_resets) == 1


def test_data_on_its_way_to_a_stream_that_we_have_reset_is_no_flood(kind: str) -> None:
    """An early response ends the stream, and a window of small frames may be under way: as many as fit, and no more."""
    connection = opened(kind, **BUDGETS, connection_window=65536, answer=answer_200)
    connection.feed(settings(ack=True))
    for stream_id in (1, 3, 5):
        connection.feed(headers(stream_id, POST, end=False))
        assert connection.outcome.sent_resets[-1] == (stream_id, ErrorCode.NO_ERROR)
        connection.feed(*[data_frame(stream_id, b"x" * 64) * 64] * 16)
        assert connection.outcome.fault is None, "neither a flood, nor more than the connection's window"
    connection.feed(data_frame(5, b"x") * 200)
    assert connection.outcome.fault == CALM


def test_data_on_its_way_to_a_stream_that_was_refused_is_no_flood(kind: str) -> None:
    connection = opened(kind, **BUDGETS, max_concurrent_streams=1)
    connection.feed(settings(ack=True), headers(1), headers(3, POST, end=False), data_frame(3, b"x") * 500)
    assert connection.outcome.sent_resets == [(3, ErrorCode.REFUSED_STREAM)]
    assert connection.outcome.fault is None


def test_a_peer_that_has_not_heard_of_our_window_keeps_to_the_one_it_will_find(kind: str) -> None:
    connection = opened(kind, **BUDGETS, body_window=100_000, answer=answer_200)
    connection.feed(headers(1, POST, end=False), settings(ack=True))
    connection.feed(data_frame(1, b"x" * 500) * 200)
    assert connection.outcome.fault is None
    connection.feed(data_frame(1, b"x") * 200)
    assert connection.outcome.fault == CALM


def test_data_behind_the_end_of_a_request_was_never_on_its_way(kind: str) -> None:
    def reset(engine: Http2Engine, stream_id: int) -> None:
        engine.reset(stream_id, ErrorCode.CANCEL)

    connection = opened(kind, **BUDGETS, answer=reset)
    connection.feed(headers(1))
    connection.feed(data_frame(1, b"x") * 200)
    assert connection.outcome.fault == CALM
    assert connection.outcome.sent_resets == [(1, ErrorCode.CANCEL)]


# -- memory --------------------------------------------------------------------------------------------------


def test_what_is_known_of_closed_streams_is_bounded(kind: str) -> None:
    connection = opened(kind, answer=answer_200, closed_streams=16)
    for first in range(1, 8001, 20):
        connection.feed(b"".join(headers(first + 2 * at) for at in range(10)))
        connection.feed(priority_update(first + 1000, b"u=1"))
    engine = connection.engine
    assert engine.open_streams == 0
    if kind == "own":
        assert len(engine._closed) == 16  # type: ignore[attr-defined]
        assert len(engine._streams) == 0  # type: ignore[attr-defined]
    assert len(engine._idle_priorities) <= 100  # type: ignore[attr-defined]
    # A stream that was forgotten: DATA cost one stream's error, a head is an id that is too low.
    connection.feed(data_frame(1, b"x"))
    assert connection.outcome.sent_resets == [(1, ErrorCode.STREAM_CLOSED)]


def test_a_large_frame_that_never_comes_is_not_waited_for(kind: str) -> None:
    connection = opened(kind)
    connection.feed(frame(DATA, 0, 1, b"", length=2**24 - 1)[:9])
    assert connection.outcome.fault == ErrorCode.FRAME_SIZE_ERROR


def test_a_frame_that_comes_byte_by_byte_is_cheap(kind: str) -> None:
    connection = opened(kind, acknowledge=False)
    connection.feed(headers(1, POST, end=False))
    data = data_frame(1, b"x" * 16000, end=True)
    connection.feed(*[data[at : at + 1] for at in range(len(data))])
    assert connection.outcome.bodies == {1: b"x" * 16000}
