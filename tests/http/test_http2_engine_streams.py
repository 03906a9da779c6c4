"""What the engines send: responses, windows both ways, resets, GOAWAY, PING; on both, with h2's client as the judge."""

from __future__ import annotations

import pytest

from tests.http.http2_client import (
    GET,
    POST,
    Http2Peer,
    data_frame,
    frame,
    goaway,
    headers,
    ping,
    rst_stream,
    settings,
    window_update,
)  # fmt: skip
from tests.http.http2_feeding import HTTP2_ENGINES, Connection, answer_200, opened
from trioserve.http.http2_codes import (
    ACK,
    CONTINUATION,
    DATA,
    END_STREAM,
    GOAWAY,
    HEADERS,
    LARGEST_WINDOW,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    ErrorCode,
)  # fmt: skip
from trioserve.http.http2_engine import Http2Engine, Http2Limits

pytestmark = pytest.mark.parametrize("kind", HTTP2_ENGINES)

CONNECT = [(b":method", b"CONNECT"), (b":authority", b"b:443")]


def joined(kind: str, **options: object) -> tuple[Connection, Http2Peer]:
    """An engine and h2's client, past their SETTINGS."""
    connection, peer = Connection(kind, **options), Http2Peer()  # type: ignore[arg-type]
    peer.receive(connection.written[0])
    exchange(connection, peer)
    return connection, peer


def exchange(connection: Connection, peer: Http2Peer) -> None:
    """Carry bytes to and fro until both are silent."""
    for _ in range(1000):
        sent, written = peer.take(), b""
        if sent:
            connection.engine.receive(sent, 0)
        written = connection.take()
        if written:
            peer.receive(written)
        if not sent and not written:
            return
    raise AssertionError("they never stop")


def pump(connection: Connection, peer: Http2Peer, stream_id: int, data: bytes) -> None:
    """Send `data` as the windows allow, then the end."""
    engine = connection.engine
    while True:
        part, data = data[: engine.room(stream_id)], data[engine.room(stream_id) :]
        engine.send_data(stream_id, part, not data)
        if not data:
            break
        assert part or connection.engine.out, "no room, and nothing under way"
        exchange(connection, peer)
    exchange(connection, peer)


# -- responses -----------------------------------------------------------------------------------------------


def test_our_settings(kind: str) -> None:
    connection, peer = joined(kind, max_concurrent_streams=7, max_header_list_size=1000, body_window=70000,
                              max_frame_size=20000, connection_window=100_000)  # fmt: skip
    assert peer.settings == {3: 7, 4: 70000, 5: 20000, 6: 1000, 8: 1, 9: 1}
    assert peer.connection.outbound_flow_control_window == 100_000
    assert connection.engine.settings_acknowledged


@pytest.mark.parametrize("status", [200, 204, 206, 304, 400, 404, 500, 418, 999])
def test_heads_of_responses(kind: str, status: int) -> None:
    fields = [(b"content-type", b"text/plain"), (b"x-empty", b""), (b"x-long", b"y" * 300), (b"set-cookie", b"a=b"),
              (b"x" * 200, b"z"), (b"set-cookie", b"c=d"), (b"age", b""),
              (b"accept-encoding", b"gzip, deflate")]  # fmt: skip
    connection, peer = joined(kind)
    for _ in range(3):  # the last two from what is remembered
        stream_id = peer.request()
        exchange(connection, peer)
        connection.engine.send_head(stream_id, status, fields, True)
        exchange(connection, peer)
        response = peer.responses[stream_id]
        assert (response.status, response.fields, response.ended) == (status, fields, True)
    assert connection.engine.open_streams == 0


def test_interim_responses_come_before_the_head_only(kind: str) -> None:
    connection, peer = joined(kind)
    stream_id = peer.request()
    exchange(connection, peer)
    engine = connection.engine
    engine.send_interim(stream_id, 100, [])
    engine.send_interim(stream_id, 103, [(b"link", b"</a>")])
    answer_200(engine, stream_id)
    engine.send_interim(stream_id, 103, [])
    exchange(connection, peer)
    assert peer.responses[stream_id].interim == [(100, []), (103, [(b"link", b"</a>")])]
    assert peer.responses[stream_id].body == b"ok"


def test_trailers_of_responses(kind: str) -> None:
    connection, peer = joined(kind)
    stream_id = peer.request()
    exchange(connection, peer)
    connection.engine.send_head(stream_id, 200, [], False)
    connection.engine.send_data(stream_id, memoryview(b"body"), False)
    connection.engine.send_trailers(stream_id, [(b"x", b"y")])
    exchange(connection, peer)
    response = peer.responses[stream_id]
    assert (response.body, response.trailers, response.ended) == (b"body", [(b"x", b"y")], True)
    assert connection.engine.open_streams == 0


def test_a_large_head_is_cut_into_the_peers_frames(kind: str) -> None:
    connection = opened(kind, answer=lambda engine, stream_id: engine.send_head(stream_id, 200, fields, True))
    fields = [(b"x%d" % at, bytes([97 + at % 26, 34]) * 300) for at in range(80)]
    connection.feed(headers(1))
    frames = [each for each in connection.frames if each.stream_id == 1]
    assert [each.kind for each in frames] == [HEADERS] + [CONTINUATION] * (len(frames) - 1)
    assert len(frames) > 2
    assert all(len(each.payload) <= 16384 for each in frames)
    assert [each.flags for each in frames] == [END_STREAM] + [0] * (len(frames) - 2) + [4]


def test_data_are_cut_into_the_peers_frames(kind: str) -> None:
    connection = opened(kind)
    connection.feed(settings({5: 20000}), headers(1))
    engine = connection.engine
    engine.send_head(1, 200, [], False)
    engine.send_data(1, b"x" * 50000, True)
    frames = [each for each in connection.frames if each.kind == DATA]
    assert [(len(each.payload), each.flags) for each in frames] == [
        (20000, 0),
        (20000, 0),
        (10000, END_STREAM),
    ]


def test_an_empty_end(kind: str) -> None:
    connection = opened(kind)
    connection.feed(headers(1))
    connection.engine.send_head(1, 200, [], False)
    connection.engine.send_data(1, b"", False)
    connection.engine.send_data(1, b"", True)
    frames = [each for each in connection.frames if each.kind == DATA]
    assert [(each.payload, each.flags) for each in frames][-1] == (b"", END_STREAM)


@pytest.mark.parametrize("size", [1, 65535, 65536, 300_000])
def test_bodies_both_ways_through_small_windows(kind: str, size: int) -> None:
    connection, peer = joined(kind)
    stream_id = peer.request(POST, end=False)
    body = bytes(range(251)) * (size // 251 + 1)
    body = left = body[:size]
    while left:
        room = min(peer.connection.local_flow_control_window(stream_id), 16384)
        assert room, "the window was not given back"
        peer.connection.send_data(stream_id, left[:room], end_stream=room >= len(left))
        left = left[room:]
        exchange(connection, peer)
    assert connection.outcome.bodies[stream_id] == body
    assert connection.outcome.ended == {stream_id: []}
    connection.engine.send_head(stream_id, 200, [], False)
    pump(connection, peer, stream_id, body)
    assert peer.responses[stream_id].body == body
    assert peer.responses[stream_id].ended


# -- the end of a response before the end of its request -----------------------------------------------------


def test_a_response_before_its_request_has_ended_closes_the_stream(kind: str) -> None:
    connection = opened(kind, answer=answer_200)
    connection.feed(headers(1, POST, end=False))
    assert [each.kind for each in connection.frames if each.stream_id == 1] == [HEADERS, DATA, RST_STREAM]
    assert connection.outcome.sent_resets == [(1, ErrorCode.NO_ERROR)]
    assert connection.engine.open_streams == 0
    assert connection.outcome.told_resets == []
    connection.feed(
        data_frame(1, b"late"), data_frame(1, b"later", end=True), window_update(1, 5), headers(3)
    )
    assert connection.outcome.bodies == {}
    assert connection.outcome.sent_resets == [(1, ErrorCode.NO_ERROR)]


def test_a_tunnel_may_be_open_in_one_direction(kind: str) -> None:
    connection = opened(kind)
    connection.feed(headers(1, CONNECT, end=False), data_frame(1, b"a"))
    engine = connection.engine
    engine.send_head(1, 200, [], False)
    engine.send_data(1, b"b", True)
    engine.send_data(1, b"no more", True)
    engine.send_trailers(1, [])
    assert engine.room(1) == 0
    connection.feed(data_frame(1, b"c"))
    assert engine.open_streams == 1
    connection.feed(data_frame(1, b"d", end=True))
    assert connection.outcome.bodies == {1: b"acd"}
    assert connection.outcome.ended == {1: []}
    assert engine.open_streams == 0
    assert [each.kind for each in connection.frames if each.stream_id == 1] == [HEADERS, DATA]


@pytest.mark.parametrize("status", [300, 403, 501])
def test_a_tunnel_that_is_not_granted_is_a_response_like_any_other(kind: str, status: int) -> None:
    """Nobody need end what was never opened: its place is the next stream's."""
    connection = opened(kind, max_concurrent_streams=1)
    connection.feed(settings(ack=True), headers(1, CONNECT, end=False))
    connection.engine.send_head(1, status, [], False)
    connection.engine.send_data(1, b"no", True)
    assert connection.engine.open_streams == 0
    connection.feed(data_frame(1, b"on its way", end=True), headers(3))
    assert list(connection.outcome.requests) == [1, 3]
    assert connection.outcome.sent_resets == [(1, ErrorCode.NO_ERROR)]


def test_calls_for_closed_streams_do_nothing(kind: str) -> None:
    connection = opened(kind)
    engine = connection.engine
    connection.feed(headers(1), rst_stream(1))
    before = len(connection.frames)
    engine.send_interim(1, 100, [])
    engine.send_head(1, 200, [], False)
    engine.send_data(1, b"x", True)
    engine.send_trailers(1, [])
    engine.reset(1, ErrorCode.CANCEL)
    engine.acknowledge(1, 5)
    assert (engine.room(1), engine.room(99)) == (0, 0)
    assert len(connection.frames) == before
    assert connection.outcome.told_resets == [(1, ErrorCode.CANCEL)]


# -- windows -------------------------------------------------------------------------------------------------


def test_room_is_the_smaller_window_and_never_negative(kind: str) -> None:
    connection = opened(kind)
    connection.feed(headers(1), headers(3))
    engine = connection.engine
    assert engine.room(1) == 65535
    engine.send_head(1, 200, [], False)
    engine.send_data(1, b"x" * 60000, False)
    assert (engine.room(1), engine.room(3)) == (5535, 5535)
    connection.feed(settings({4: 1000}))
    assert (engine.room(1), engine.room(3)) == (0, 1000)
    connection.feed(window_update(1, 59000))
    assert engine.room(1) == 0, "the window was under 0"
    connection.feed(window_update(1, 10))
    assert engine.room(1) == 10
    connection.feed(settings({4: 65535}), window_update(0, 100_000))
    assert (engine.room(1), engine.room(3)) == (64545, 65535)
    assert connection.windows == [0, 1, 1, 0, 0]
    connection.feed(window_update(3, LARGEST_WINDOW - 65535))
    assert engine.room(3) == 65535 + 100_000 - 60000


def test_streams_begin_with_the_peers_latest_window(kind: str) -> None:
    connection = Connection(kind)
    connection.feed(
        PREFACE + settings({4: 10}), headers(1), settings({4: 20}), headers(3), settings({4: 0}), headers(5)
    )
    assert [connection.engine.room(stream_id) for stream_id in (1, 3, 5)] == [0, 0, 0]
    connection.feed(settings({4: 7}))
    assert [connection.engine.room(stream_id) for stream_id in (1, 3, 5)] == [7, 7, 7]


def test_windows_are_given_back_only_for_what_was_acknowledged_and_by_halves(kind: str) -> None:
    connection = opened(kind, acknowledge=False, body_window=65536, connection_window=131072)
    connection.feed(settings(ack=True), headers(1, POST, end=False), headers(3, POST, end=False))
    assert connection.feed(*[data_frame(1, b"x" * 16384)] * 4) == [], "nothing without the app"
    assert connection.feed(data_frame(3, b"x" * 16384)) == []
    engine = connection.engine
    engine.acknowledge(1, 32767)
    engine.acknowledge(1, 1)
    engine.acknowledge(1, 32768)
    updates = connection.window_updates
    if kind == "own":
        assert updates == [(1, 32768), (0, 65536), (1, 32768)]
    assert {stream_id for stream_id, _ in updates} == {0, 1}, "h2 has its own idea of how often"


def test_the_connections_window_is_given_back_for_closed_streams(kind: str) -> None:
    connection = opened(kind, acknowledge=False, connection_window=65536)
    connection.feed(
        headers(1, POST, end=False), data_frame(1, b"x" * 16000), data_frame(1, b"x" * 16000), rst_stream(1)
    )
    connection.engine.acknowledge(1, 32000)
    frames = connection.feed(data_frame(1, b"x" * 1000))
    updates = [
        (each.stream_id, each.payload) for each in [*connection.frames, *frames] if each.kind == WINDOW_UPDATE
    ]
    assert updates[0] == (0, (33000).to_bytes(4, "big"))


def test_what_unread_streams_leave_of_the_connections_window_goes_round(kind: str) -> None:
    connection = opened(kind, acknowledge=False, body_window=65536, connection_window=131072)
    connection.feed(settings(ack=True), *[headers(stream_id, POST, end=False) for stream_id in (1, 3, 5)])
    unread = [data_frame(1, b"x" * 16384)] * 4 + [data_frame(3, b"x" * 16384)] * 3
    connection.feed(*unread)
    for _ in range(10):
        connection.feed(data_frame(5, b"x" * 16384))
        before = len(connection.window_updates)
        connection.engine.acknowledge(5, 16384)
        assert (0, 16384) in connection.window_updates[before:]
    assert connection.outcome.fault is None


def test_what_is_owed_is_given_back_when_unread_streams_take_the_rest(kind: str) -> None:
    if kind == "h2":
        pytest.skip("h2 looks at what it owes only when the app has taken something")
    connection = opened(kind, acknowledge=False, body_window=65536, connection_window=131072)
    connection.feed(settings(ack=True), *[headers(stream_id, POST, end=False) for stream_id in (1, 3, 5)])
    connection.feed(*[data_frame(1, b"x" * 16384)] * 4, *[data_frame(3, b"x" * 16384)] * 2)
    connection.feed(data_frame(5, b"x" * 1000))
    connection.engine.acknowledge(5, 1000)
    rest = 131072 - 6 * 16384 - 1000
    connection.feed(data_frame(3, b"x" * 16384), data_frame(5, b"x" * 1000))
    assert connection.window_updates == []
    # Nobody reads these, and without room nothing would come of which the app could take anything.
    connection.feed(data_frame(5, b"x" * (rest - 17384)))
    assert connection.window_updates == [(0, 1000)]


def test_padding_is_given_back_at_once(kind: str) -> None:
    connection = opened(kind, acknowledge=False, body_window=65536)
    connection.feed(settings(ack=True), headers(1, POST, end=False))
    frames = connection.feed(*[data_frame(1, b"x", pad=255)] * 128)
    updates = [each for each in frames if each.kind == WINDOW_UPDATE]
    assert [(each.stream_id, each.payload) for each in updates] == [(1, (32768).to_bytes(4, "big"))]
    connection.engine.acknowledge(1, 128)
    assert connection.outcome.bodies == {1: b"x" * 128}


def test_our_smaller_window_holds_once_it_was_acknowledged(kind: str) -> None:
    connection = opened(kind, acknowledge=False, body_window=1000)
    connection.feed(headers(1, POST, end=False), data_frame(1, b"x" * 5000))
    assert connection.outcome.told_resets == [], "the peer cannot have known"
    connection.feed(settings(ack=True), headers(3, POST, end=False), data_frame(3, b"x" * 1000))
    assert connection.outcome.fault is None
    connection.feed(data_frame(3, b"x"))
    assert connection.outcome.told_resets == ([] if kind == "h2" else [(3, ErrorCode.FLOW_CONTROL_ERROR)])
    assert connection.outcome.fault == (ErrorCode.FLOW_CONTROL_ERROR if kind == "h2" else None)


def test_more_than_the_connections_window_ends_it(kind: str) -> None:
    connection = opened(kind, acknowledge=False, connection_window=65535)
    connection.feed(headers(1, POST, end=False), headers(3, POST, end=False))
    connection.feed(*[data_frame(1, b"x" * 16384)] * 3, data_frame(3, b"x" * 16383))
    assert connection.outcome.fault is None
    connection.feed(data_frame(3, b"x"))
    assert connection.outcome.fault == ErrorCode.FLOW_CONTROL_ERROR


# -- the connection --------------------------------------------------------------------------------------------


def test_ping_both_ways(kind: str) -> None:
    connection = opened(kind)
    frames = connection.feed(ping(b"12345678"))
    assert [(each.kind, each.flags, each.payload) for each in frames] == [(PING, ACK, b"12345678")]
    connection.engine.ping(b"abcdefgh")
    assert connection.frames[-1].payload == b"abcdefgh"
    assert connection.engine.last_pong is None
    connection.feed(ping(b"abcdefgh", ack=True))
    assert connection.engine.last_pong == b"abcdefgh"


def test_going_away_in_two_steps(kind: str) -> None:
    connection = opened(kind)
    connection.feed(headers(1, POST, end=False))
    engine = connection.engine
    engine.go_away(last_stream_id=2**31 - 1)
    assert not engine.closing
    connection.take()
    connection.feed(headers(3))
    engine.go_away()
    assert engine.closing
    connection.take()
    connection.feed(headers(5), data_frame(1, b"x", end=True))
    assert sorted(connection.outcome.requests) == [1, 3]
    assert connection.outcome.sent_resets == [(5, ErrorCode.REFUSED_STREAM)]
    assert connection.outcome.ended == {1: []}
    answer_200(engine, 1)
    answer_200(engine, 3)
    assert engine.open_streams == 0
    sent = [each for each in connection.frames if each.kind == GOAWAY]
    assert [(int.from_bytes(each.payload[:4], "big"), each.code) for each in sent] == [(2**31 - 1, 0), (3, 0)]


def test_going_away_with_a_code_and_a_reason(kind: str) -> None:
    connection = opened(kind)
    connection.engine.go_away(ErrorCode.INTERNAL_ERROR, reason=b"sorry")
    goodbye = connection.frames[-1]
    assert (goodbye.code, goodbye.payload[8:]) == (ErrorCode.INTERNAL_ERROR, b"sorry")


def test_the_peer_goes_away_and_its_streams_go_on(kind: str) -> None:
    connection = opened(kind)
    connection.feed(headers(1, POST, end=False), goaway(0, 3), data_frame(1, b"x", end=True))
    assert connection.outcome.going_away == [(0, 3)]
    answer_200(connection.engine, 1)
    assert connection.frames[-1].kind == DATA


@pytest.mark.parametrize("sizes", [[0], [100], [0, 4096], [100, 4096, 50]])
def test_the_peers_compression_table_is_respected(kind: str, sizes: list[int]) -> None:
    connection, peer = joined(kind, answer=answer_200)
    for size in sizes:
        peer.connection.update_settings({1: size})
        stream_id = peer.request()
        exchange(connection, peer)
        assert peer.responses[stream_id].body == b"ok"


def test_streams_over_the_limit_are_refused_to_be_tried_again(kind: str) -> None:
    connection = opened(kind, max_concurrent_streams=2)
    connection.feed(
        settings(ack=True),
        headers(1),
        headers(3),
        headers(5),
        headers(7, POST, end=False),
        data_frame(7, b"x"),
    )
    assert list(connection.outcome.requests) == [1, 3]
    refused = ErrorCode.REFUSED_STREAM
    assert connection.outcome.sent_resets == [(5, refused), (7, refused)]
    answer_200(connection.engine, 1)
    connection.feed(headers(9))
    assert list(connection.outcome.requests) == [1, 3, 9]


def test_a_sink_may_close_streams_from_within(kind: str) -> None:
    connection = opened(kind)

    def data_received(stream_id: int, data: bytes, flow_size: int) -> None:
        connection.engine.acknowledge(stream_id, flow_size)
        connection.engine.reset(stream_id, ErrorCode.CANCEL)

    connection.data_received = data_received  # type: ignore[method-assign]
    connection.feed(headers(1, POST, end=False) + data_frame(1, b"x", end=True) + headers(3))
    assert connection.outcome.ended == {}
    assert list(connection.outcome.requests) == [1, 3]
    assert connection.engine.open_streams == 1


def test_in_head_while_a_head_is_not_whole(kind: str) -> None:
    connection = opened(kind)
    for piece, expected in (
        (headers(1)[:20], True),
        (headers(1)[20:], False),
        (frame(HEADERS, 0, 3, b"\x82"), True),
        (frame(CONTINUATION, 0, 3, b"\x86"), True),
        (frame(CONTINUATION, 4, 3, b"\x84\x41\x01a"), False),
        (ping()[:12], False),
        (ping()[12:], False),
    ):
        connection.feed(piece)
        assert connection.engine.in_head is expected
    assert sorted(connection.outcome.requests) == [1, 3]


def test_both_engines_have_the_whole_interface(kind: str) -> None:
    engine: Http2Engine = Connection(kind).engine
    wanted = {name for name in vars(Http2Engine) | Http2Engine.__annotations__ if not name.startswith("_")}
    assert not {name for name in wanted if not hasattr(engine, name)}
    assert Http2Limits() == Http2Limits(max_concurrent_streams=100)
    assert frame(SETTINGS) == settings()
    assert GET[0] == (b":method", b"GET")
