"""How an HTTP/2 connection of ours ends: by a drain, by its share of requests, by the server; and what is counted."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import trioserve.http.http2 as http2_module
from tests.apps import hello, respond
from tests.http.http2_client import POST, goaway, headers, ping
from tests.http.http2_serving import connected, get, served
from tests.http.test_http2_exchanges import app_of, body, start
from tests.waiting import until_blocked
from trioserve.http.http2 import Http2
from trioserve.observe.in_flight import InFlightTable
from trioserve.structure.drain import DrainState
from trioserve.testing import no_leaks, serving

LAST = 2**31 - 1
CANCEL = 8


class Gate:
    """An app whose requests wait for `go`, the part before it in `/started`."""

    def __init__(self) -> None:
        self.go = trio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/quick":
            await respond(send)
            return
        if scope["path"] == "/started":
            await start(send)
            await body(send, b"part", more=True)
            await self.go.wait()
            await body(send, b" whole")
            return
        await self.go.wait()
        await respond(send, b"whole")


# -- drains --------------------------------------------------------------------------------------------------


async def test_a_drain_says_goodbye_twice_and_finishes_what_is_in_flight(http2_engine: str, hub: str) -> None:
    app = Gate()
    async with served(app, http2_engine=http2_engine, hub=hub, graceful_timeout=5) as (server, client):
        waiting, started = await client.open(), await client.open(get(b"/started"))
        await client.read_until(lambda peer: peer.responses[started].body == b"part")
        server.worker.drain.begin("a test")
        await client.read_until(lambda peer: peer.goaway == (LAST, 0))
        # What was on its way when the first GOAWAY left is served: the client has not answered the PING yet.
        await client.flush()
        await client.read_until(lambda peer: peer.goaway != (LAST, 0))
        assert client.peer.goaway == (started, 0)
        app.go.set()
        assert (await client.response(waiting)).body == b"whole"
        assert (await client.response(started)).body == b"part whole"
        await client.read_to_end()
        await trio.aclose_forcefully(client.stream)
        await server.wait_idle()
        assert server.worker.context.counters.requests == 2


async def test_a_request_between_the_goodbyes_is_served(http2_engine: str, autojump_clock: MockClock) -> None:
    app = Gate()
    async with served(app, http2_engine=http2_engine, graceful_timeout=30) as (server, client):
        await client.request(get(b"/quick"))
        server.worker.drain.begin("a test")
        # This client does not answer PINGs, so the second GOAWAY comes after a second.
        await trio.sleep(0.5)
        await client.stream.send_all(headers(3, get(b"/quick")))
        seen = b""
        with trio.fail_after(20):
            while part := await client.stream.receive_some():
                seen += part
        assert b"hello" in seen
        assert seen.count(b"\x07\0\0\0\0\0") == 2
        await trio.aclose_forcefully(client.stream)
        await server.wait_idle()
        assert server.worker.context.counters.requests == 2


async def test_streams_after_the_last_goodbye_are_refused(http2_engine: str) -> None:
    app = Gate()
    async with served(app, http2_engine=http2_engine, graceful_timeout=5) as (server, client):
        first = await client.open()
        await wait_all_tasks_blocked(0.01)
        server.worker.drain.begin("a test")
        await client.read_until(lambda peer: peer.goaway == (first, 0))
        await client.send_raw(headers(101))
        app.go.set()
        assert (await client.response(first)).body == b"whole"
        await client.read_to_end()
        await trio.aclose_forcefully(client.stream)
        await server.wait_idle()
        assert server.worker.context.counters.requests == 1


async def test_an_idle_connection_goes_at_once_in_a_drain(http2_engine: str, hub: str) -> None:
    async with served(hello, http2_engine=http2_engine, hub=hub, graceful_timeout=30) as (server, client):
        await client.request()
        with trio.fail_after(20):
            server.worker.drain.begin("a test")
            await client.read_to_end()
        assert client.peer.goaway == (1, 0)


async def test_a_cut_answers_503_or_resets(http2_engine: str, hub: str) -> None:
    app = Gate()
    async with served(app, http2_engine=http2_engine, hub=hub) as (server, client):
        waiting, started = await client.open(), await client.open(get(b"/started"))
        await client.read_until(lambda peer: peer.responses[started].body == b"part")
        server.worker.drain.hurry("a test")
        await client.read_to_end()
        response = client.peer.responses[waiting]
        assert (response.status, response.field(b"retry-after"), response.ended) == (503, b"1", True)
        assert client.peer.responses[started].reset == CANCEL
        assert client.peer.goaway is not None
        assert server.worker.drain.state in (DrainState.CANCELLING, DrainState.STOPPED)
        assert server.failure is None


async def test_a_connection_has_a_share_of_requests(http2_engine: str, hub: str) -> None:
    async with served(hello, http2_engine=http2_engine, hub=hub, keep_alive_max_requests=3) as (
        server,
        client,
    ):
        for _ in range(3):
            assert (await client.request()).status == 200
        await client.read_to_end()
        assert client.peer.goaway == (5, 0)
        await trio.aclose_forcefully(client.stream)
        await server.wait_idle()


async def test_keep_alive_0_closes_after_the_response(http2_engine: str) -> None:
    async with served(hello, http2_engine=http2_engine, keep_alive_timeout=0) as (_, client):
        assert (await client.request()).body == b"hello"
        await client.read_to_end()
        assert client.peer.goaway == (1, 0)


async def test_a_peer_that_says_goodbye_gets_what_it_asked_for(http2_engine: str, hub: str) -> None:
    app = Gate()
    async with served(app, http2_engine=http2_engine, hub=hub) as (server, client):
        stream_id = await client.open()
        await client.send_raw(goaway())
        await wait_all_tasks_blocked(0.02)
        app.go.set()
        assert (await client.response(stream_id)).body == b"whole"
        await client.read_to_end()
        await trio.aclose_forcefully(client.stream)
        await server.wait_idle()


async def test_the_servers_own_failure_ends_the_connection_with_internal_error(
    http2_engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, *_arguments: Any) -> None:
        raise ZeroDivisionError("ours")

    async with serving(hello, h2c=True, http2_engine=http2_engine) as server:
        async with connected(server) as client:
            monkeypatch.setattr(Http2, "_begin", broken)
            await client.open()
            await client.read_to_end()
            assert client.peer.goaway is not None
            assert client.peer.goaway[1] == 2
        assert server.failure is not None
        assert server.failure.row == "S1"


# -- what is counted and logged ------------------------------------------------------------------------------


async def test_the_access_log_has_a_line_for_each_stream(
    http2_engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/dies":
            raise ValueError
        await respond(send, b"x" * 10)

    async with served(
        app_of(handler), http2_engine=http2_engine, accesslog="-", access_log_format="%(r)s %(s)s %(b)s",
        on_app_error="contain", max_body_size=5,
    ) as (_, client):  # fmt: skip
        await client.request(get(b"/a?b=c"))
        await client.request(get(b"/dies"))
        await client.open([*POST, (b"content-length", b"6")], end=False)
        await client.read_until(lambda peer: peer.responses[5].ended)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "/" in line] == [
        "GET /a 2 200 10",
        "GET /dies 2 500 -",
        "POST / 2 413 -",
    ]


async def test_nothing_is_left_behind(http2_engine: str, hub: str) -> None:
    async with no_leaks(), served(hello, http2_engine=http2_engine, hub=hub) as (server, client):
        for _ in range(3):
            ids = [await client.open() for _ in range(30)]
            for stream_id in ids:
                await client.response(stream_id)
        stream_id = await client.open(POST, end=False)
        await client.reset(stream_id)
        await wait_all_tasks_blocked(0.02)
        assert server.worker.context.in_flight == 0


async def test_requests_in_flight_stand_in_the_supervisors_table(http2_engine: str) -> None:
    app = Gate()
    table = InFlightTable.create()
    try:
        async with served(app, http2_engine=http2_engine) as (server, client):
            context = server.worker.context
            context.in_flight_table = InFlightTable.attach(table.fd)
            await client.request(get(b"/quick"))
            ids = [await client.open(get(b"/slow/%d?a=b" % n, method=b"PUT")) for n in range(2)]
            await wait_all_tasks_blocked(0.02)
            context.date_requests()
            found = sorted(table.read(), key=lambda request: request.path)
            assert [(request.method, request.path) for request in found] == [
                ("PUT", "/slow/0"),
                ("PUT", "/slow/1"),
            ]
            assert all(request.started is not None for request in found)
            app.go.set()
            for stream_id in ids:
                await client.response(stream_id)
            await wait_all_tasks_blocked(0.02)
            assert table.read() == []
        assert context.in_flight_table.taken == 0
        context.in_flight_table.close()
    finally:
        table.close()


async def test_idle_lanes_are_ended_after_a_moment(http2_engine: str, autojump_clock: MockClock) -> None:
    app = Gate()
    async with served(app, http2_engine=http2_engine, keep_alive_timeout=60) as (server, client):
        ids = [await client.open() for _ in range(50)]
        await wait_all_tasks_blocked(0.02)
        app.go.set()
        for stream_id in ids:
            await client.response(stream_id)
        (connection,) = server.worker.context.connections
        (nursery,) = connection.task.child_nurseries
        assert len(nursery.child_tasks) == 50
        await trio.sleep(2)
        assert len(nursery.child_tasks) == http2_module._IDLE_LANES
        assert (await client.request(get(b"/quick"))).status == 200


async def test_http1_is_served_beside_it_and_without_h2c_alone(http2_engine: str) -> None:
    async with serving(hello, h2c=True, http2_engine=http2_engine) as server:
        assert (await server.get("/")).body == b"hello"
        async with server.connect() as client:
            await client.send(b"P")
            await wait_all_tasks_blocked(0.01)
            await client.send(b"OST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
            assert (await client.read_response()).status == 200
    async with serving(hello) as server, server.connect() as client:
        await client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert (await client.read_response()).status in (400, 505)


async def test_pings_are_answered_and_keep_no_idle_connection(
    http2_engine: str, autojump_clock: MockClock
) -> None:
    async with served(hello, http2_engine=http2_engine, keep_alive_timeout=5) as (_, client):
        await client.request()
        began = trio.current_time()
        while not client.closed and trio.current_time() - began < 20:
            try:
                await client.send_raw(ping())
                await client.read_some()
                await trio.sleep(1)
            except trio.BrokenResourceError:
                break
        assert client.peer.pongs in ([b"pingpong"] * 5, [b"pingpong"] * 6)
        assert 5 <= trio.current_time() - began < 9


# -- what is the peer's doing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["reset", "close"])
async def test_a_peer_that_leaves_while_the_rest_is_flushed_is_no_fault_of_the_app(
    http2_engine: str, how: str
) -> None:
    """The app has given up waiting for its last part and returned; we still send that part when the peer goes."""
    returned = trio.Event()

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        async with until_blocked():
            await body(send, b"x" * 300_000)
        returned.set()

    async with serving(app_of(handler), h2c=True, http2_engine=http2_engine) as server:
        context = server.worker.context
        async with connected(server) as client:
            stream = await client.open()
            with trio.fail_after(30):
                await returned.wait()
            if how == "reset":
                await client.reset(stream)
        with trio.fail_after(30):
            while context.connections:
                await trio.sleep(0.005)
        assert "A4" not in context.counters.faults
        assert server.worker.context.boundary.failure is None


async def test_handlers_that_outlast_their_streams_are_bounded(http2_engine: str) -> None:
    """A stream is open no more once it is reset, but what serves it may be, for as long as the grace lasts."""
    most = 0

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        await body(send, b"x", more=True)
        await trio.sleep_forever()

    async with serving(
        app_of(handler), h2c=True, http2_engine=http2_engine, h2_max_concurrent_streams=4
    ) as server:
        async with connected(server) as client:
            # Refusals cost, too: in the end the connection is closed.
            with suppress(trio.BrokenResourceError, EOFError):
                for _ in range(30):
                    streams = [await client.open() for _ in range(4)]
                    answers = [client.peer.responses[each] for each in streams]
                    await client.read_until(
                        lambda _, answers=answers: all(each.body or each.over for each in answers)
                    )
                    for stream in streams:
                        if not client.peer.responses[stream].over:
                            await client.reset(stream)
                    most = max(most, server.worker.context.in_flight)
        assert 20 < most <= 41
