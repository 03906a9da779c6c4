"""Peers that leave, stall, flood, or break the protocol: what becomes of their streams, connection, and siblings."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.apps import echo, hello, read_body, respond
from tests.http.http2_client import (
    GET,
    OPENING,
    POST,
    frame,
    headers,
    headers_in_parts,
    ping,
    rst_stream,
    settings,
)
from tests.http.http2_serving import Client, code_of_goaway, connected, get, read_all, served
from tests.http.test_http2_exchanges import app_of, body, start
from trioserve.errors import ClientDisconnected
from trioserve.http.http2_codes import HEADERS, SETTINGS, ErrorCode
from trioserve.http.http2_pipe import reset_by_peer
from trioserve.testing import serving

CANCEL = 8


class Witness:
    """An app that waits for its client's end, and notes what it sees."""

    def __init__(self, *, patient: bool = True) -> None:
        self.seen: list[str] = []
        self.times: list[float] = []
        self.running = trio.Event()
        self._patient = patient

    def _note(self, what: str) -> None:
        self.seen.append(what)
        self.times.append(trio.current_time())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/quick":
            await respond(send)
            return
        try:
            while (await self._receive(receive))["type"] != "http.disconnect":
                self.running.set()
            self._note("disconnect")
            if not self._patient:
                return
            await trio.sleep_forever()
        except trio.Cancelled:
            self._note("cancelled")
            raise

    async def _receive(self, receive: Any) -> Any:
        message = await receive()
        if message["type"] == "http.request" and not message["more_body"]:
            self.running.set()
        return message


async def leave_by_reset(client: Client, stream_id: int) -> None:
    await client.reset(stream_id)


async def leave_by_close(client: Client, stream_id: int) -> None:
    await trio.aclose_forcefully(client.stream)


async def leave_by_abort(client: Client, stream_id: int) -> None:
    sock = client.stream.socket  # type: ignore[attr-defined]
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await trio.aclose_forcefully(client.stream)


async def leave_by_half_close(client: Client, stream_id: int) -> None:
    await client.stream.send_eof()  # type: ignore[attr-defined]


LEAVING = [leave_by_reset, leave_by_close, leave_by_abort, leave_by_half_close]


@pytest.mark.parametrize("leave", LEAVING)
@pytest.mark.parametrize("whole", [True, False])
async def test_a_peer_that_leaves_is_told_at_once_and_the_app_cancelled_after_the_grace(
    http2_engine: str, hub: str, leave: Any, whole: bool, autojump_clock: MockClock
) -> None:
    app = Witness()
    async with served(app, http2_engine=http2_engine, hub=hub, disconnect_grace=3) as (server, client):
        stream_id = await client.open(GET if whole else POST, end=whole)
        if whole:
            await app.running.wait()
        else:
            await client.send_body(stream_id, b"part")
            await app.running.wait()
        await wait_all_tasks_blocked(0.02)
        left_at = trio.current_time()
        await leave(client, stream_id)
        with trio.fail_after(10):
            while server.worker.context.in_flight:
                await trio.sleep(0.1)
        assert app.seen == ["disconnect", "cancelled"]
        assert app.times[0] - left_at < 0.5
        assert 2.9 < app.times[1] - left_at < 3.7
        assert server.worker.context.counters.peer_gone == 1
        assert server.failure is None
        if leave is leave_by_reset:
            assert (await client.request(get(b"/quick"))).status == 200
        else:
            await server.wait_idle()


async def test_end_stream_alone_is_no_disconnect(http2_engine: str, autojump_clock: MockClock) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await read_body(receive)
        with trio.move_on_after(60) as scope_:
            await receive()
        await respond(send, b"still here" if scope_.cancelled_caught else b"told")

    async with served(app_of(handler), http2_engine=http2_engine) as (_, client):
        stream_id = await client.open(POST, end=False)
        await client.send_body(stream_id, b"x", end=True)
        with trio.fail_after(100):
            while not client.peer.responses[stream_id].over:
                await client.read_some()
        assert client.peer.responses[stream_id].body == b"still here"


async def test_send_after_a_reset_raises_and_the_siblings_do_not_notice(http2_engine: str, hub: str) -> None:
    raised: list[Any] = []
    go_on = trio.Event()

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        await body(send, b"x", more=True)
        await go_on.wait()
        try:
            await body(send, b"y", more=True)
            await body(send, b"z")
        except OSError as error:
            raised.append(error)
            raise

    async with served(app_of(handler), http2_engine=http2_engine, hub=hub) as (server, client):
        doomed, sibling = await client.open(), await client.open()
        await client.read_until(lambda peer: peer.responses[sibling].body == b"x")
        await client.reset(doomed)
        await wait_all_tasks_blocked(0.02)
        go_on.set()
        assert (await client.response(sibling)).body == b"xyz"
        await wait_all_tasks_blocked(0.02)
        assert [type(error) for error in raised] == [ClientDisconnected]
        assert server.worker.context.counters.faults == {"C2": 1}
        assert server.failure is None


@asynccontextmanager
async def with_a_full_window(http2_engine: str) -> AsyncIterator[tuple[Any, Any, int]]:
    """A server, its client, and the stream whose app waits for room in the window."""

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        await body(send, b"x" * 1_000_000)

    async with served(app_of(handler), http2_engine=http2_engine, client={"acknowledge": False}) as (
        server,
        client,
    ):
        stream_id = await client.open()
        await client.read_until(lambda peer: len(peer.responses[stream_id].body) == 65535)
        yield server, client, stream_id


async def test_a_reset_frees_who_waits_for_the_window(http2_engine: str) -> None:
    async with with_a_full_window(http2_engine) as (server, client, stream_id):
        await client.reset(stream_id)
        await wait_all_tasks_blocked(0.02)
        assert server.worker.context.in_flight == 0
        assert server.worker.context.counters.faults == {"C2": 1}


async def test_what_is_dropped_was_not_said(http2_engine: str) -> None:
    """END_STREAM stood behind it: a reset that follows is not to say that all is well (NO_ERROR)."""
    async with with_a_full_window(http2_engine) as (server, _, stream_id):
        (connection,) = server.worker.context.connections
        exchange: Any = connection.streams[stream_id].exchange
        assert exchange.unsent
        exchange.lose(reset_by_peer(CANCEL))
        assert not exchange.unsent
        assert not exchange.said_all


async def test_a_request_that_is_reset_in_the_same_breath_never_reaches_the_app(http2_engine: str) -> None:
    called: list[str] = []

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        called.append(scope["path"])
        await respond(send)

    async with served(app_of(handler), http2_engine=http2_engine) as (server, client):
        await client.send_raw(headers(1, get(b"/reset")) + rst_stream(1) + headers(3, get(b"/asked")))
        await client.stream.receive_some(10)
        assert called == ["/asked"]
        await wait_all_tasks_blocked(0.02)
        assert server.worker.context.in_flight == 0


# -- time ----------------------------------------------------------------------------------------------------


async def test_a_body_that_does_not_come_is_a_408(
    http2_engine: str, hub: str, autojump_clock: MockClock
) -> None:
    async with served(echo, http2_engine=http2_engine, hub=hub, request_body_timeout=7) as (server, client):
        began = trio.current_time()
        stream_id = await client.open(POST, end=False)
        with trio.fail_after(60):
            await client.read_until(lambda peer: peer.responses[stream_id].over, seconds=60)
        assert client.peer.responses[stream_id].status == 408
        assert 7 <= trio.current_time() - began < 7.5
        assert server.worker.context.counters.late == {"request_body": 1}
        assert (await client.request()).status == 200


async def test_a_body_that_stalls_after_the_response_began_is_reset(
    http2_engine: str, autojump_clock: MockClock
) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        await body(send, b"x", more=True)
        await receive()

    async with served(app_of(handler), http2_engine=http2_engine) as (server, client):
        stream_id = await client.open(POST, end=False)
        await client.read_until(lambda peer: peer.responses[stream_id].reset is not None, seconds=60)
        assert client.peer.responses[stream_id].reset == CANCEL
        assert server.failure is None


async def test_a_slow_body_is_held_to_the_minimum_rate(http2_engine: str, autojump_clock: MockClock) -> None:
    async with served(
        echo, http2_engine=http2_engine, request_body_min_rate=100, request_body_min_rate_grace=10
    ) as (_, client):
        began = trio.current_time()
        stream_id = await client.open(POST, end=False)
        while not client.peer.responses[stream_id].status:
            await client.send_body(stream_id, b"xx")
            with trio.move_on_after(1):
                await client.read_some()
            assert trio.current_time() - began < 30
        assert client.peer.responses[stream_id].status == 408
        assert 9 < trio.current_time() - began < 13


@pytest.mark.parametrize("started", [False, True])
async def test_a_handler_that_takes_too_long(
    http2_engine: str, started: bool, autojump_clock: MockClock
) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/slow":
            if started:
                await start(send)
                await body(send, b"x", more=True)
            await trio.sleep(100)
        await respond(send)

    async with served(app_of(handler), http2_engine=http2_engine, request_timeout=5) as (server, client):
        stream_id = await client.open(get(b"/slow"))
        await client.read_until(lambda peer: peer.responses[stream_id].over, seconds=60)
        response = client.peer.responses[stream_id]
        assert (response.status, response.reset) == ((200, CANCEL) if started else (503, None))
        assert (await client.request()).status == 200
        assert server.worker.context.counters.late == {"request": 1}


async def test_a_stream_whose_window_stays_shut_is_reset_and_no_other(
    http2_engine: str, hub: str, autojump_clock: MockClock
) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        await body(send, b"x" * (100_000 if scope["path"] == "/large" else 10))

    async with served(
        app_of(handler), http2_engine=http2_engine, hub=hub, client={"acknowledge": False}
    ) as (server, client):  # fmt: skip
        client.peer.connection.increment_flow_control_window(1_000_000)
        large = await client.open(get(b"/large"))
        await client.read_until(lambda peer: len(peer.responses[large].body) == 65535)
        began = trio.current_time()
        assert (await client.request()).body == b"x" * 10
        await client.read_until(lambda peer: peer.responses[large].reset is not None, seconds=60)
        assert client.peer.responses[large].reset == CANCEL
        assert 29 < trio.current_time() - began < 31
        assert (await client.request()).body == b"x" * 10
        assert server.worker.context.counters.late == {"response_write": 1}


async def test_a_window_that_opens_now_and_then_is_progress(
    http2_engine: str, autojump_clock: MockClock
) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        await body(send, b"x" * 65_540)

    async with served(app_of(handler), http2_engine=http2_engine, client={"acknowledge": False}) as (
        _,
        client,
    ):
        client.peer.connection.increment_flow_control_window(1_000_000)
        stream_id = await client.open()
        await client.read_until(lambda peer: len(peer.responses[stream_id].body) == 65535)
        for _ in range(5):
            await trio.sleep(25)
            client.peer.connection.increment_flow_control_window(1, stream_id)
            await client.flush()
        assert len((await client.response(stream_id)).body) == 65_540


async def test_a_socket_that_takes_nothing_ends_the_connection(
    http2_engine: str, hub: str, autojump_clock: MockClock
) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        await body(send, b"x" * 30_000_000)

    async with serving(app_of(handler), h2c=True, http2_engine=http2_engine, hub=hub) as server:
        async with connected(server, acknowledge=False) as client:
            client.peer.connection.increment_flow_control_window(2**30)
            stream_id = await client.open()
            client.peer.connection.increment_flow_control_window(2**30, stream_id)
            await client.flush()
            # Twice the time-out: what the kernels pass on to each other is progress.
            with trio.fail_after(100):
                await server.wait_idle()
        assert server.worker.context.counters.late == {"response_write": 1}
        assert server.failure is None


async def test_an_idle_connection_is_closed_with_a_goaway(
    http2_engine: str, hub: str, autojump_clock: MockClock
) -> None:
    async with served(hello, http2_engine=http2_engine, hub=hub, keep_alive_timeout=5) as (server, client):
        await client.request()
        began = trio.current_time()
        await client.read_to_end(seconds=60)
        assert client.peer.goaway == (1, 0)
        assert 5 <= trio.current_time() - began < 5.5
        await trio.aclose_forcefully(client.stream)
        await server.wait_idle()


async def test_a_stream_keeps_the_connection_from_being_idle(
    http2_engine: str, autojump_clock: MockClock
) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/long":
            await trio.sleep(20)
        await respond(send)

    async with served(app_of(handler), http2_engine=http2_engine, keep_alive_timeout=5) as (_, client):
        await client.request()
        stream_id = await client.open(get(b"/long"))
        await client.read_until(lambda peer: peer.responses[stream_id].over, seconds=60)
        assert client.peer.responses[stream_id].body == b"hello"


@pytest.mark.parametrize("sent", [b"", OPENING[:10], OPENING])
async def test_a_connection_without_a_request_is_closed(
    http2_engine: str, sent: bytes, autojump_clock: MockClock
) -> None:
    async with serving(hello, h2c=True, http2_engine=http2_engine) as server:
        async with connected(server, start=False) as client:
            if sent:
                await client.stream.send_all(sent)
            began = trio.current_time()
            with trio.fail_after(60):
                while await client.stream.receive_some():
                    pass
            assert 9.5 < trio.current_time() - began < 11
        await server.wait_idle()


@pytest.mark.parametrize(
    "part",
    [
        headers_in_parts(1, get(), [3])[:-1],
        headers(1, get(b"/" + b"a" * 100))[:-20],
        headers_in_parts(1, get(), [3, 3])[: 9 + 3 + 9 + 3],
    ],
)
async def test_a_head_that_does_not_end_is_late(
    http2_engine: str, part: bytes, autojump_clock: MockClock
) -> None:
    async with served(hello, http2_engine=http2_engine, request_head_timeout=6) as (server, client):
        await client.send_raw(settings(ack=True))
        began = trio.current_time()
        await client.send_raw(part)
        await client.read_to_end(seconds=60)
        assert client.peer.goaway == (0, 0)
        assert 6 <= trio.current_time() - began < 6.5
        assert server.worker.context.counters.late == {"request_head": 1}


# -- hostile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(SETTINGS, 0, 1), ErrorCode.PROTOCOL_ERROR),
        (frame(SETTINGS, 0, 0, b"12345"), ErrorCode.FRAME_SIZE_ERROR),
        (frame(HEADERS, 4 | 1, 1, b"\xff\xff\xff\xff\xff\xff"), ErrorCode.COMPRESSION_ERROR),
        (ping() * 5000, ErrorCode.ENHANCE_YOUR_CALM),
        (b"".join(headers(n, GET) + rst_stream(n) for n in range(1, 2001, 2)), ErrorCode.ENHANCE_YOUR_CALM),
    ],
)
async def test_a_broken_connection_is_closed_with_its_code_and_others_are_served(
    http2_engine: str, hub: str, data: bytes, code: ErrorCode
) -> None:
    async with served(hello, http2_engine=http2_engine, hub=hub) as (server, other):
        async with connected(server, start=False) as client:
            await client.stream.send_all(OPENING)
            with trio.fail_after(30):
                try:
                    await client.stream.send_all(data)
                except trio.BrokenResourceError:
                    pass
                assert code_of_goaway(await read_all(client.stream)) == code
        assert server.worker.context.counters.refused == {f"h2 {code.name}": 1}
        assert (await other.request()).status == 200
        assert server.failure is None


async def test_requests_given_up_now_and_then_are_forgiven_in_time(
    http2_engine: str, autojump_clock: MockClock
) -> None:
    async with served(Witness(), http2_engine=http2_engine, h2_max_concurrent_streams=2) as (_, client):
        waiting = await client.open()
        for _ in range(20):
            await client.reset(await client.open())
            await trio.sleep(0.1)
        assert (await client.request(get(b"/quick"))).status == 200
        assert not client.peer.responses[waiting].over
        given_up = [headers(stream_id) + rst_stream(stream_id) for stream_id in range(1001, 1021, 2)]
        await client.send_raw(b"".join(given_up))
        await client.read_until(lambda peer: peer.goaway is not None)
        assert client.peer.goaway is not None
        assert client.peer.goaway[1] == ErrorCode.ENHANCE_YOUR_CALM


async def test_a_fault_ends_the_streams_in_flight(http2_engine: str, autojump_clock: MockClock) -> None:
    app = Witness()
    async with served(app, http2_engine=http2_engine) as (server, client):
        await client.open()
        await app.running.wait()
        await client.send_raw(frame(SETTINGS, 0, 1))
        await client.read_to_end(seconds=60)
        assert client.peer.goaway == (1, ErrorCode.PROTOCOL_ERROR)
        await trio.aclose_forcefully(client.stream)
        with trio.fail_after(10):
            await server.wait_idle()
        assert app.seen == ["disconnect", "cancelled"]


async def test_a_peer_that_reads_nothing_of_what_it_asks_for_is_not_read_from(
    http2_engine: str, hub: str, autojump_clock: MockClock
) -> None:
    """Heads are under no window: only the socket tells that nobody reads them."""

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, b"", headers=[(b"a", b"b" * 8000)])

    many = b"".join(headers(n, get(b"/", (b"a", b"b" * 8000))) for n in range(1, 2000, 2))
    async with serving(app_of(handler), h2c=True, http2_engine=http2_engine, hub=hub) as server:
        async with connected(server, start=False) as client:
            await client.stream.send_all(OPENING)
            await client.stream.receive_some()
            (connection,) = server.worker.context.connections
            for sock in (connection.transport.sock, client.stream.socket):  # type: ignore[attr-defined]
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            # It is ended for not reading before all of that was read; until then it has waited with little in memory.
            with trio.fail_after(200), pytest.raises(trio.BrokenResourceError):
                await client.stream.send_all(many)
        await server.wait_idle()
        assert server.worker.context.counters.late == {"response_write": 1}
        assert server.worker.context.counters.requests < 500
        assert server.failure is None


# -- whose turn it is ----------------------------------------------------------------------------------------


async def test_a_lower_urgency_is_served_first_and_its_peers_share(http2_engine: str) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        await body(send, scope["path"][1:2].encode() * 300_000)

    async with served(app_of(handler), http2_engine=http2_engine, client={"acknowledge": False}) as (
        _,
        client,
    ):
        filler = await client.open(get(b"/f"))
        await client.read_until(lambda peer: len(peer.responses[filler].body) == 65535)
        # The connection's window is empty: all that follow wait.
        low = await client.open(get(b"/l", (b"priority", b"u=5")))
        shared = [await client.open(get(b"/%d" % n, (b"priority", b"u=2, i"))) for n in range(2)]
        high = await client.open(get(b"/h", (b"priority", b"u=0")))
        for stream_id in (low, *shared, high, filler):
            client.peer.connection.increment_flow_control_window(1_000_000, stream_id)
        await client.flush()
        await wait_all_tasks_blocked(0.02)
        client.peer.connection.increment_flow_control_window(400_000)
        await client.flush()
        await client.read_until(lambda peer: sum(len(r.body) for r in peer.responses.values()) == 465_535)
        sizes = {n: len(response.body) for n, response in client.peer.responses.items()}
        assert sizes[high] == 300_000
        assert sizes[low] == 0
        assert abs(sizes[shared[0]] - sizes[shared[1]]) <= 16384
        client.peer.connection.increment_flow_control_window(2_000_000)
        await client.flush()
        for stream_id in (filler, low, *shared):
            assert len((await client.response(stream_id)).body) == 300_000


async def test_a_greedy_stream_does_not_starve_those_that_come_after_it(http2_engine: str, hub: str) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        if scope["path"] == "/greedy":
            while True:
                await body(send, b"x" * 100_000, more=True)
        await body(send, b"y" * 50_000)

    async with served(app_of(handler), http2_engine=http2_engine, hub=hub, disconnect_grace=0) as (
        _,
        client,
    ):
        greedy = await client.open(get(b"/greedy"))
        await client.read_until(lambda peer: len(peer.responses[greedy].body) > 200_000)
        response = await client.request()
        assert response.body == b"y" * 50_000
        await client.reset(greedy)


async def test_priority_update_moves_a_stream_ahead(http2_engine: str) -> None:
    from tests.http.http2_client import priority_update

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        await body(send, b"x" * 100_000)

    async with served(app_of(handler), http2_engine=http2_engine, client={"acknowledge": False}) as (
        _,
        client,
    ):
        first = await client.open()
        await client.read_until(lambda peer: len(peer.responses[first].body) == 65535)
        second, third = await client.open(), await client.open()
        await client.send_raw(priority_update(third, b"u=0"))
        for stream_id in (first, second, third):
            client.peer.connection.increment_flow_control_window(1_000_000, stream_id)
        await client.flush()
        await wait_all_tasks_blocked(0.02)
        client.peer.connection.increment_flow_control_window(100_000)
        await client.flush()
        await client.read_until(lambda peer: len(peer.responses[third].body) == 100_000)
        assert len(client.peer.responses[second].body) == 0
