"""Each phase of a connection: when its clock starts, what moves it, what is answered when it is late, and off."""

from __future__ import annotations

import functools
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from trioserve import testing
from trioserve.testing import RawClient, TestServer, encode_request

from ..apps import echo, hello, read_body, respond
from ..waiting import until_blocked

serving = functools.partial(testing.serving, lifespan="off")


@asynccontextmanager
async def talking(app: Any, **settings: Any) -> AsyncIterator[tuple[TestServer, RawClient]]:
    async with serving(app, **settings) as server, server.connect() as client:
        await trio.testing.wait_all_tasks_blocked(0.01)  # it is accepted: clocks run from here
        yield server, client


async def ends_after(client: RawClient, seconds: float) -> bytes:
    """Wait for the end of the connection, which must come in `seconds`; what was received until then."""
    began = trio.current_time()
    received = await client.receive_all()
    assert trio.current_time() - began == pytest.approx(seconds, abs=0.2)
    return received


async def stays_open(client: RawClient, seconds: float = 10_000) -> None:
    with trio.move_on_after(seconds) as scope:
        assert await client.receive() == b"not closed"
    assert scope.cancelled_caught


def late(server: TestServer) -> dict[str, int]:
    return server.worker.context.counters.late


def head_of(method: str, length: int) -> bytes:
    return encode_request(method, headers=[("content-length", str(length))])


# -- first_byte ----------------------------------------------------------------------------------------------


async def test_first_byte_is_closed_silently(autojump_clock: Any, engine: str) -> None:
    async with talking(hello, first_byte_timeout=10, http_engine=engine) as (server, client):
        assert await ends_after(client, 10) == b""
        assert late(server) == {"first_byte": 1}


async def test_first_byte_off(autojump_clock: Any) -> None:
    async with talking(hello, first_byte_timeout="off") as (_, client):
        await stays_open(client)
        assert (await client.get()).status == 200


async def test_first_byte_in_time_is_enough_for_the_first_byte(autojump_clock: Any) -> None:
    async with talking(hello, first_byte_timeout=10, request_head_timeout=20) as (server, client):
        await trio.sleep(9)
        await client.send(b"G")
        assert (await ends_after(client, 20)).startswith(b"HTTP/1.1 408 ")
        assert late(server) == {"request_head": 1}


# -- request_head --------------------------------------------------------------------------------------------


async def test_request_head_is_answered_with_408_and_bytes_do_not_extend_it(
    autojump_clock: Any, engine: str
) -> None:
    async with talking(hello, request_head_timeout=10, http_engine=engine) as (server, client):
        async with trio.open_nursery() as nursery:

            async def trickle() -> None:
                for byte in encode_request("GET", "/" + "x" * 100):
                    await client.send(bytes([byte]))
                    await trio.sleep(1)

            nursery.start_soon(trickle)
            response = await ends_after(client, 10)
            nursery.cancel_scope.cancel()
        assert response.startswith(b"HTTP/1.1 408 ")
        assert b"\r\nconnection: close\r\n" in response
        assert late(server) == {"request_head": 1}


async def test_request_head_off(autojump_clock: Any) -> None:
    async with talking(hello, request_head_timeout="off") as (_, client):
        await client.send(b"GET / HTTP/1.1\r\n")
        await stays_open(client)
        await client.send(b"host: x\r\n\r\n")
        assert (await client.read_response()).status == 200


async def test_empty_lines_are_no_byte_of_a_head_and_extend_nothing(autojump_clock: Any) -> None:
    async with talking(hello, first_byte_timeout=10) as (server, client):
        await trio.sleep(5)
        await client.send(b"\r\n")
        assert await ends_after(client, 5) == b""
        assert late(server) == {"first_byte": 1}


async def test_read_timeout_caps_the_reading_phases(autojump_clock: Any) -> None:
    async with talking(echo, read_timeout=3) as (server, client):
        await client.send(b"GET")
        assert (await ends_after(client, 3)).startswith(b"HTTP/1.1 408 ")
        async with server.connect() as other:
            await other.send(head_of("POST", 10))
            assert (await ends_after(other, 3)).startswith(b"HTTP/1.1 408 ")


# -- request_body --------------------------------------------------------------------------------------------


async def test_request_body_is_the_pause_between_parts(autojump_clock: Any, engine: str, hub: str) -> None:
    settings = {"request_body_timeout": 30, "request_body_min_rate": 0, "http_engine": engine, "hub": hub}
    async with talking(echo, **settings) as (server, client):
        await client.send(head_of("POST", 6))
        for _ in range(5):  # each part has 30 s of its own
            await trio.sleep(29)
            await client.send(b"x")
        response = await ends_after(client, 30)
        assert response.startswith(b"HTTP/1.1 408 ")
        assert b"\r\nconnection: close\r\n" in response
        assert late(server) == {"request_body": 1}
        assert server.failure is None


async def test_request_body_counts_only_while_the_app_waits_for_it(autojump_clock: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        with trio.move_on_after(20):
            await receive()  # nothing yet
        await trio.sleep(1000)
        await respond(send, await read_body(receive))

    async with talking(app, request_body_timeout=30) as (_, client):
        await client.send(head_of("POST", 2))
        await trio.sleep(900)
        await client.send(b"ok")
        assert (await client.read_response()).body == b"ok"


async def test_request_body_that_is_late_for_a_response_that_has_begun_cuts_it_short(
    autojump_clock: Any,
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        await read_body(receive)

    async with talking(app, request_body_timeout=30) as (_, client):
        await client.send(head_of("POST", 2))
        response = await ends_after(client, 30)
        assert b"5\r\nbegun\r\n" in response
        assert not response.endswith(b"0\r\n\r\n")


async def test_request_body_off(autojump_clock: Any) -> None:
    async with talking(echo, request_body_timeout="off", request_body_min_rate=0) as (_, client):
        await client.send(head_of("POST", 2))
        await stays_open(client)
        await client.send(b"ok")
        assert (await client.read_response()).body == b"ok"


async def test_a_body_that_is_slower_than_the_minimum_rate_is_late(autojump_clock: Any) -> None:
    """240 B/s: after 30 s of grace and a minute in all, 100 bytes a second have not earned their time."""
    async with talking(echo, request_body_min_rate=240, request_body_min_rate_grace=30) as (server, client):
        await client.send(head_of("POST", 100_000))
        began = trio.current_time()
        async with trio.open_nursery() as nursery:

            async def trickle() -> None:
                while True:
                    await client.send(bytes(100))
                    await trio.sleep(1)

            nursery.start_soon(trickle)
            response = await client.receive_all()
            nursery.cancel_scope.cancel()
        assert 30 <= trio.current_time() - began <= 33.5
        assert response.startswith(b"HTTP/1.1 408 ")
        assert late(server) == {"request_body": 1}


async def test_a_body_at_the_minimum_rate_takes_as_long_as_it_takes(autojump_clock: Any) -> None:
    async with talking(echo, request_body_min_rate=240) as (_, client):
        await client.send(head_of("POST", 2500 * 30))
        async with trio.open_nursery() as nursery:

            async def trickle() -> None:
                for _ in range(30):
                    await client.send(bytes(2500))
                    await trio.sleep(10)

            nursery.start_soon(trickle)
            assert (await client.read_response()).status == 200


# -- keep_alive ----------------------------------------------------------------------------------------------


async def test_keep_alive_is_closed_silently(autojump_clock: Any, engine: str, hub: str) -> None:
    async with talking(hello, keep_alive_timeout=5, http_engine=engine, hub=hub) as (server, client):
        for _ in range(3):
            await client.get()
            await trio.sleep(4.9)
        await client.get()
        assert await ends_after(client, 5) == b""
        assert late(server) == {"keep_alive": 1}


async def test_a_byte_moves_keep_alive_to_request_head(autojump_clock: Any) -> None:
    async with talking(hello, keep_alive_timeout=5, request_head_timeout=10) as (server, client):
        await client.get()
        await trio.sleep(4)
        await client.send(b"G")
        assert (await ends_after(client, 10)).startswith(b"HTTP/1.1 408 ")
        assert late(server) == {"request_head": 1}


async def test_keep_alive_begins_when_the_response_is_complete(autojump_clock: Any) -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(5):
            await trio.sleep(20)
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body"})

    async with talking(slow, keep_alive_timeout=5) as (_, client):
        assert (await client.get()).body == b"xxxxx"
        assert await ends_after(client, 5) == b""


async def test_an_app_that_goes_on_after_its_response_takes_nothing_off_keep_alive(
    autojump_clock: Any,
) -> None:
    async def diligent(scope: Any, receive: Any, send: Any) -> None:
        await respond(send)
        await trio.sleep(20)

    async with talking(diligent, keep_alive_timeout=5) as (server, client):
        assert (await client.get()).status == 200
        await trio.sleep(24)
        assert (await client.get()).status == 200
        assert late(server) == {}
        assert await ends_after(client, 25) == b""


async def test_keep_alive_zero_closes_after_each_response(autojump_clock: Any) -> None:
    async with talking(hello, keep_alive_timeout=0) as (_, client):
        response = await client.get()
        assert response.header("connection") == "close"
        assert await ends_after(client, 0) == b""


async def test_a_request_that_arrives_as_keep_alive_ends_is_served_or_not_begun(autojump_clock: Any) -> None:
    """Never cancelled half-way: the bytes were there before the reaper came."""
    called: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append(1)
        await trio.sleep(1)
        await respond(send)

    async with talking(app, keep_alive_timeout=5) as (server, client):
        await client.get()
        (connection,) = server.worker.context.connections
        await client.send(encode_request("GET"))
        connection.expire()  # what the reaper does if its turn comes before the connection's
        assert (await client.read_response()).status == 200
        assert await ends_after(client, 5) == b""
    assert len(called) == 2


# -- response_write ------------------------------------------------------------------------------------------


def receive_what_is_there(client: RawClient) -> bytes:
    try:
        return client.sock.recv(65536)
    except BlockingIOError:
        return b""


def small_buffers(server: TestServer) -> None:
    (listener,) = server.worker.listeners.sockets
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)  # accepted sockets inherit it


async def send_at_once(scope: Any, receive: Any, send: Any) -> None:
    await respond(send, bytes(1_000_000))


async def send_in_parts(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(1000):
        await send({"type": "http.response.body", "body": bytes(1000), "more_body": True})
    await send({"type": "http.response.body"})


async def send_events(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while True:
        await send({"type": "http.response.body", "body": bytes(1000), "more_body": True})
        await trio.sleep(1)


async def send_one_event(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(1000):
        await send({"type": "http.response.body", "body": bytes(15_000), "more_body": True})
        await trio.lowlevel.checkpoint()


WRITERS = [send_at_once, send_in_parts, send_events, send_one_event]


@pytest.mark.parametrize("app", WRITERS)
async def test_response_write_without_progress_aborts(autojump_clock: Any, hub: str, app: Any) -> None:
    async with serving(app, response_write_timeout=30, hub=hub, keep_alive_timeout=1000) as server:
        small_buffers(server)
        async with server.connect(receive_buffer=4096) as client:
            await client.send(encode_request("GET"))
            began = trio.current_time()
            await trio.testing.wait_all_tasks_blocked(0.01)
            with trio.fail_after(1000):
                await server.wait_idle()
            # What the kernel has still brought to the client after the write had blocked counts as progress.
            assert 30 <= trio.current_time() - began <= (200 if app is send_events else 62)
            assert late(server) == {"response_write": 1}
            with pytest.raises(ConnectionResetError):
                while await client.receive():
                    pass
        assert server.failure is None


@pytest.mark.parametrize("app", [send_at_once, send_in_parts])
async def test_progress_extends_response_write(autojump_clock: Any, hub: str, app: Any) -> None:
    async with serving(app, response_write_timeout=30, hub=hub, keep_alive_timeout=1000) as server:
        small_buffers(server)
        async with server.connect(receive_buffer=4096) as client:
            await client.send(encode_request("GET"))
            began = trio.current_time()
            total = 0
            while total < 1_000_000:
                await trio.sleep(25)
                for _ in range(20):
                    total += len(receive_what_is_there(client))
            assert trio.current_time() - began > 60
            assert late(server) == {}


async def test_a_100_that_is_given_up_leaves_a_write_its_time_out(autojump_clock: Any, hub: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        hint = {"type": "http.response.early_hint", "links": [b"x" * 8000] * 200}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, hint)
            await trio.testing.wait_all_tasks_blocked(0.01)
            async with until_blocked(0.01):
                await receive()

    async with serving(app, response_write_timeout=30, hub=hub, lifespan="off") as server:
        small_buffers(server)
        async with server.connect(receive_buffer=4096) as client:
            await client.send(
                b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
            )
            await trio.testing.wait_all_tasks_blocked(0.05)
            with trio.fail_after(1000):
                await server.wait_idle()
            assert late(server) == {"response_write": 1}


async def test_response_write_off(autojump_clock: Any) -> None:
    async with serving(send_at_once, response_write_timeout="off") as server:
        small_buffers(server)
        async with server.connect(receive_buffer=4096) as client:
            await client.send(encode_request("GET"))
            await trio.sleep(10_000)
            assert len((await client.read_response()).body) == 1_000_000


# -- request -------------------------------------------------------------------------------------------------


async def sleep_then_respond(scope: Any, receive: Any, send: Any) -> None:
    await trio.sleep(100)
    await respond(send)


async def test_request_off_is_the_default(autojump_clock: Any) -> None:
    async with talking(sleep_then_respond) as (_, client):
        assert (await client.get()).status == 200


async def test_request_is_answered_with_503(autojump_clock: Any, engine: str) -> None:
    async with talking(sleep_then_respond, request_timeout=20, http_engine=engine) as (server, client):
        began = trio.current_time()
        response = await client.get()
        assert trio.current_time() - began == pytest.approx(20, abs=0.1)
        assert (response.status, response.header("connection")) == (503, "close")
        assert response.header("retry-after") == "1"
        assert late(server) == {"request": 1}
        assert server.failure is None


@pytest.mark.parametrize("app", [send_events, send_in_parts])
async def test_request_aborts_a_response_that_has_begun(autojump_clock: Any, app: Any) -> None:
    """Also while a write of it blocks, which has 30 s of its own."""
    async with serving(app, request_timeout=5) as server:
        small_buffers(server)
        async with server.connect(receive_buffer=4096) as client:
            await client.send(encode_request("GET"))
            began = trio.current_time()
            await trio.testing.wait_all_tasks_blocked(0.01)
            await server.wait_idle()
            assert trio.current_time() - began == pytest.approx(5, abs=0.1)
            assert late(server) == {"request": 1}
            assert not (await client.receive_all()).endswith(b"0\r\n\r\n")


async def test_request_does_not_count_the_time_that_the_client_takes(autojump_clock: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await trio.sleep(8)
        body = await read_body(receive)
        await trio.sleep(9 if body == b"quick" else 100)
        await respond(send, body)

    settings = {"request_body_timeout": 60, "request_body_min_rate": 0}
    async with talking(app, request_timeout=20, **settings) as (_, client):
        for body, status in ((b"quick", 200), (b"slow!", 503)):
            await client.send(head_of("POST", 5))
            await trio.sleep(50)
            await client.send(body)
            began = trio.current_time()
            assert (await client.read_response()).status == status
            assert trio.current_time() - began == pytest.approx(9 if status == 200 else 12, abs=0.2)


async def test_work_after_the_response_is_not_what_request_means(autojump_clock: Any) -> None:
    done: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send)
        await trio.sleep(100)
        done.append(True)

    async with talking(app, request_timeout=5) as (server, client):
        assert (await client.get()).status == 200
        assert (await client.get()).status == 200
        await trio.sleep(101)
        assert "request" not in late(server)
    assert done == [True, True]


async def test_a_time_out_that_strikes_when_the_response_is_out_adds_no_second_response(
    autojump_clock: Any,
) -> None:
    """The reaper cancels a handler that has been woken already; the cancellation lands behind the response."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await trio.lowlevel.cancel_shielded_checkpoint()
        scope["state"]["connection"]().expire()
        await respond(send)

    async with serving(app, request_timeout=5) as server, server.connect() as client:
        context = server.worker.context
        context.state["connection"] = lambda: next(iter(context.connections))
        await client.send(encode_request("GET"))
        received = await client.receive_all()
    assert received.count(b"HTTP/1.1") == 1
    assert received.endswith(b"hello")


# -- linger, and the log -------------------------------------------------------------------------------------


async def test_linger_reads_on_for_a_bounded_time_after_a_refusal(autojump_clock: Any) -> None:
    async with talking(hello, linger_timeout=2) as (server, client):
        await client.send(b"NONSENSE\r\n\r\n")
        assert (await client.read_response()).status == 400
        assert await client.receive() == b""
        began = trio.current_time()
        await server.wait_idle()  # the client does not close: the server has had enough at some point
        assert trio.current_time() - began == pytest.approx(2, abs=0.1)


async def test_linger_ends_when_the_client_closes(autojump_clock: Any) -> None:
    async with talking(hello, linger_timeout=100) as (server, client):
        began = trio.current_time()
        await client.send(b"NONSENSE\r\n\r\n")
        assert (await client.read_response()).status == 400
        client.close()
        await server.wait_idle()
        assert trio.current_time() - began < 1


async def test_linger_is_bounded_in_bytes(autojump_clock: Any) -> None:
    async with talking(hello, linger_timeout=10_000) as (server, client):
        await client.send(b"NONSENSE\r\n\r\n")
        assert (await client.read_response()).status == 400
        with trio.fail_after(1000), pytest.raises(OSError):
            while True:
                await client.send(bytes(100_000))
        await server.wait_idle()


async def test_the_access_log_says_which_phase_was_late(autojump_clock: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    settings = {"accesslog": logging.getLogger("access"), "access_log_format": "json", "request_timeout": 5}
    async with talking(sleep_then_respond, **settings) as (server, client):
        await client.get()
        async with server.connect() as other:
            await other.send(b"GET / ")
            await other.receive_all()
    lines = [record.getMessage() for record in caplog.records if record.name == "access"]
    assert "late: request_head" in lines[1]
    assert "late: request" in lines[0]
    assert "408" in lines[1]
    assert "503" in lines[0]
