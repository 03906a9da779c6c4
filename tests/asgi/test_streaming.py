"""Streamed responses on the wire: how many segments, how soon, how much is held, and who else gets a turn."""

from __future__ import annotations

import functools
import socket
import struct
import sys
from typing import Any

import pytest
import trio
import trio.testing

from trioserve import testing
from trioserve.testing import encode_request

from ..apps import respond

pytestmark = pytest.mark.modes("tls", "http2")

serving = functools.partial(testing.serving, lifespan="off")

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="TCP_INFO is Linux's")


def start(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": headers}


def part(data: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def segments_received(sock: socket.socket) -> int:
    """How many segments with data have come in (struct tcp_info, tcpi_data_segs_in)."""
    return int(struct.unpack_from("I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 152)[0])


# -- few segments, and no waiting ----------------------------------------------------------------------------


@pytest.mark.modes("tls", because="it reads HTTP/1 on the wire")
@on_linux
async def test_many_small_parts_without_a_wait_leave_in_few_segments(
    engine: str, autojump_clock: trio.testing.MockClock
) -> None:
    """Time stands still while the app sends: on no machine does it take so long that it must give way meanwhile."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        for n in range(300):
            await send(part(b"%03d," % n))
            if n % 100 == 99:
                await trio.sleep(0.01)
        await send(part(b"", False))

    async with serving(app, http_engine=engine) as server, server.connect() as client:
        response = await client.get()
        # One for each hundred, and the end; with TLS there are those of the handshake besides.
        assert segments_received(client.sock) <= 8
    assert response.body == b"".join(b"%03d," % n for n in range(300))


@pytest.mark.modes(because="records are no segments")
@on_linux
async def test_head_and_body_leave_in_one_segment(engine: str, hub: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        await trio.lowlevel.checkpoint()
        await send(part(b"x" * 10_000, False))

    async with serving(app, http_engine=engine, hub=hub) as server, server.connect() as client:
        await client.get()
        assert segments_received(client.sock) == 1


@on_linux
async def test_large_parts_are_not_held_back_for_one_another() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start((b"content-length", b"120000")))
        for _ in range(4):
            await send(part(b"x" * 30_000))

    async with serving(app) as server, server.connect() as client:
        assert len((await client.get()).body) == 120_000
        assert segments_received(client.sock) >= 4


@pytest.mark.modes("tls", because="chunks")
async def test_an_event_arrives_without_waiting_for_the_next(engine: str, hub: str) -> None:
    send_event, events = trio.open_memory_channel[bytes](0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start((b"content-type", b"text/event-stream")))
        async for event in events:
            await send(part(b"data: %b\n\n" % event))
        await send(part(b"", False))

    async with serving(app, http_engine=engine, hub=hub) as server, server.connect() as client:
        await client.send(encode_request("GET"))
        async with send_event:
            for n in range(20):
                await send_event.send(b"%d" % n)
                with trio.fail_after(30):
                    await client.receive_until(b"data: %d\n\n\r\n" % n)
        assert await client.receive_until(b"0\r\n\r\n") == b"0\r\n\r\n"


@pytest.mark.modes("tls", because="chunks")
async def test_the_head_of_a_stream_arrives_with_an_empty_first_part() -> None:
    go_on = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        await send(part(b""))
        await go_on.wait()
        await send(part(b"late", False))

    async with serving(app) as server, server.connect() as client:
        await client.send(encode_request("GET"))
        with trio.fail_after(30):
            assert b"transfer-encoding: chunked" in await client.receive_until(b"\r\n\r\n")
        go_on.set()
        assert await client.receive_until(b"0\r\n\r\n") == b"4\r\nlate\r\n0\r\n\r\n"


# -- bounded memory ------------------------------------------------------------------------------------------


@pytest.mark.modes("tls", because="it looks at HTTP/1's way to wait")
@pytest.mark.parametrize("size", [100, 4_000, 100_000])
@pytest.mark.parametrize("pausing", [False, True])
async def test_an_app_that_streams_to_a_client_that_does_not_read_is_made_to_wait(
    hub: str, size: int, pausing: bool
) -> None:
    """`pausing`: something else is awaited between the parts, so that the flusher does the writing."""
    sent = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await send(start())
        while sent < 50_000_000:
            await send(part(bytes(size)))
            sent += size
            if pausing:
                await trio.lowlevel.checkpoint()

    async with serving(app, hub=hub) as server:
        (listener,) = server.worker.listeners.sockets
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * 1024)  # accepted sockets inherit it
        async with server.connect(receive_buffer=4096) as client:
            await client.send(encode_request("GET"))
            await trio.testing.wait_all_tasks_blocked(0.1)
            (connection,) = server.worker.context.connections
            assert connection.phase == "response_write"
            held = sum(map(len, connection.exchange.queue))
            assert held <= 16 * 1024 + size + 100
            assert sent < 500_000
            await client.receive(1000)
            client.reset()
            await server.wait_idle()


@pytest.mark.modes("tls", because="it looks at HTTP/1's way to wait")
async def test_a_large_response_in_one_part_is_sent_as_the_client_takes_it(engine: str, hub: str) -> None:
    size = 30 * 1024 * 1024

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, bytes(size))

    async with serving(app, http_engine=engine, hub=hub) as server, server.connect() as client:
        await client.send(encode_request("GET"))
        await trio.testing.wait_all_tasks_blocked(0.05)
        (connection,) = server.worker.context.connections
        assert connection.phase == "response_write"
        head = await client.receive_until(b"\r\n\r\n")
        assert b"content-length: %d\r\n" % size in head
        total = len(client.received)
        while total < size:
            total += len(await client.receive(1024 * 1024))
        assert total == size
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert connection.phase == "keep_alive"


# -- fairness ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 50_000])
async def test_a_stream_without_end_to_a_fast_reader_does_not_starve_another_connection(
    hub: str, size: int
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] != "/endless":
            await respond(send)
            return
        await send(start())
        while True:
            await send(part(bytes(size)))

    async def read_for_ever(client: testing.RawClient) -> None:
        while await client.receive(1024 * 1024):
            pass

    async with serving(app, hub=hub) as server, server.connect() as client:
        async with trio.open_nursery() as nursery:
            await client.send(encode_request("GET", "/endless"))
            nursery.start_soon(read_for_ever, client)
            with trio.fail_after(20):
                for _ in range(20):
                    assert (await server.get()).status == 200
            nursery.cancel_scope.cancel()
        client.reset()
