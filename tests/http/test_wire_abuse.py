"""Bad input that must be survived: after each, a new connection is served and nothing is left behind."""

from __future__ import annotations

import random
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from tests.apps import echo, hello, read_body, respond
from tests.http.feeding import head
from trioserve.testing import RawClient, TestServer, no_leaks, serving

pytestmark = pytest.mark.modes("tls")

GET = head("GET / HTTP/1.1")
POST = head("POST / HTTP/1.1", "Content-Length: 1000")
CHUNKED = head("POST / HTTP/1.1", "Transfer-Encoding: chunked")


@asynccontextmanager
async def surviving(app: Any, **settings: Any) -> AsyncIterator[TestServer]:
    """A server that, after the block, must have closed what it met, serve a new connection, and leave nothing."""
    async with no_leaks(), serving(app, **settings) as server:
        yield server
        with trio.fail_after(30):
            await server.wait_idle()
        context = server.worker.context
        assert context.in_flight == 0
        assert context.deadlines.armed == 0
        assert server.failure is None
        assert (await server.get()).status == 200


async def until(condition: Any) -> None:
    """Bounded polling."""
    with trio.fail_after(30):
        while not condition():
            await trio.sleep(0.001)


# -- bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.modes(because="what is no TLS ends in its handshake")
async def test_random_bytes(engine: str, hub: str) -> None:
    numbers = random.Random(4711)
    async with surviving(hello, http_engine=engine, hub=hub) as server:
        for size in (1, 2, 3, 10, 100, 1000, 10_000, 100_000):
            for start in (b"", GET, GET + b"GET / HTTP/1.1\r\n", CHUNKED, b"\r\n"):
                async with server.connect() as client:
                    await client.send(start + numbers.randbytes(size))
                    client.send_eof()
                    assert (await client.receive_all())[:9] in (b"HTTP/1.1 ", b"")


@pytest.mark.modes(because="it is about the plain port")
async def test_a_tls_client_on_the_plain_port_is_answered_and_closed(engine: str) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="a.example")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    async with surviving(hello, http_engine=engine) as server, server.connect() as client:
        await client.send(outgoing.read())
        incoming.write(await client.receive_all())
        with pytest.raises(ssl.SSLError, match=r"(?i)wrong version|http request|record layer"):
            tls.do_handshake()


@pytest.mark.modes(because="it is about the plain port")
async def test_an_http_2_client_with_prior_knowledge_is_told_505(engine: str) -> None:
    async with surviving(hello, http_engine=engine) as server, server.connect() as client:
        await client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
        assert (await client.read_response()).status == 505


async def test_ten_thousand_header_lines(engine: str) -> None:
    async with surviving(hello, http_engine=engine) as server:
        for start in (b"GET / HTTP/1.1\r\n", GET + b"GET / HTTP/1.1\r\n"):
            async with server.connect() as client:
                await client.send(start + b"a: b\r\n" * 10_000 + b"\r\n")
                if start.startswith(GET):
                    assert (await client.read_response()).status == 200
                assert (await client.read_response()).status == 431


async def test_a_thousand_pipelined_requests(engine: str) -> None:
    async with surviving(hello, http_engine=engine) as server, server.connect() as client:
        await client.send(GET * 1000)
        client.send_eof()
        assert (await client.receive_all()).count(b"HTTP/1.1 200 OK") == 1000


async def test_a_connection_of_empty_lines(engine: str) -> None:
    async with surviving(hello, http_engine=engine) as server, server.connect() as client:
        for _ in range(3):
            await client.send(b"\r\n")
            await trio.testing.wait_all_tasks_blocked(0.001)
        assert (await client.read_response()).status == 400


@pytest.mark.parametrize(
    ("chunk", "status"), [(b"1;" + b"x" * 100 + b"\r\ny\r\n", 431), (b"1\r\ny\r\n", 413)]
)
async def test_chunks_that_never_end_are_refused(engine: str, chunk: bytes, status: int) -> None:
    async def swallow(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] == "http.request":
            pass

    async with surviving(respond_first(swallow), http_engine=engine, max_body_size=200_000) as server:
        async with server.connect() as client:
            try:
                await client.send(CHUNKED + chunk * 300_000)
            except OSError:
                pass  # the server has read enough of it and closed
            assert (await client.read_response()).status == status


def respond_first(app: Any) -> Any:
    """GET is answered, anything else goes to `app`."""

    async def wrapper(scope: Any, receive: Any, send: Any) -> None:
        await (hello if scope.get("method") == "GET" else app)(scope, receive, send)

    return wrapper


# -- slow peers ----------------------------------------------------------------------------------------------


async def test_a_head_that_trickles_is_ended_in_time(
    engine: str, hub: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with surviving(hello, http_engine=engine, hub=hub) as server, server.connect() as client:
        began = trio.current_time()
        with pytest.raises(OSError):
            for byte in head("GET / HTTP/1.1", "X: " + "y" * 1000):
                await client.send(bytes([byte]))
                await trio.sleep(1)
        assert 9 < trio.current_time() - began < 16
        response = await client.read_response()
        assert response.status == 408


async def test_a_body_that_stops_is_ended_in_time(
    engine: str, hub: str, autojump_clock: trio.testing.MockClock
) -> None:
    for data in (POST + b"x" * 10, CHUNKED + b"5\r\nhel", CHUNKED + b"5;x", CHUNKED + b"0\r\nX: y\r\n"):
        async with surviving(respond_first(echo), http_engine=engine, hub=hub) as server:
            async with server.connect() as client:
                await client.send(data)
                response = await client.read_response()
                assert response.status == 408
                assert await client.receive_all() == b""


async def test_a_client_that_never_reads_a_large_response_is_aborted(hub: str) -> None:
    raised: list[BaseException] = []

    async def flood(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            try:
                await respond(send, bytes(100_000_000) if scope["path"] == "/flood" else b"")
            except BaseException as error:
                raised.append(error)
                raise

    async with surviving(flood, hub=hub, response_write_timeout=0.2) as server:
        async with server.connect(receive_buffer=4096) as client:
            await client.send(head("GET /flood HTTP/1.1"))
            await until(lambda: raised)
            await server.wait_idle()
            with pytest.raises(ConnectionResetError):
                while await client.receive(1 << 20):
                    pass
        assert isinstance(raised[0], trio.Cancelled)
        assert server.worker.context.counters.late == {"response_write": 1}


async def test_a_client_that_never_reads_a_stream_is_aborted(hub: str) -> None:
    sent = 0

    async def flood(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(1000 if scope["path"] == "/flood" else 1):
                await send({"type": "http.response.body", "body": bytes(100_000), "more_body": True})
                sent += 1
            await send({"type": "http.response.body", "body": b""})

    async with surviving(flood, hub=hub, response_write_timeout=0.2) as server:
        async with server.connect(receive_buffer=4096) as client:
            await client.send(head("GET /flood HTTP/1.1"))
            await until(lambda: sent)
            await server.wait_idle()
            assert server.worker.context.counters.late == {"response_write": 1}
        assert sent < 200  # what the kernel took, and no more


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere progress is what makes the socket writable again"
)
async def test_a_client_that_reads_slowly_but_steadily_is_served(hub: str) -> None:
    # The kernel only says that it takes more when a third of its megabytes is free: no measure of progress.
    body = bytes(3_000_000)

    async def large(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await respond(send, body)

    async with surviving(large, hub=hub, response_write_timeout=0.5) as server:
        async with server.connect(receive_buffer=4096) as client:
            await client.send(head("GET / HTTP/1.1", "Connection: close"))
            received = 0
            while part := await client.receive(65536):
                received += len(part)
                await trio.sleep(0.003)
            assert received > len(body)


# -- resets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\r\n",
        b"GET",
        GET[:-2],
        POST,
        POST + b"x" * 10,
        CHUNKED,
        CHUNKED + b"5",
        CHUNKED + b"5\r\nhe",
        CHUNKED + b"5\r\nhello\r\n0\r\nX: ",
        GET * 3 + b"GET",
        b"G@T / HTTP/1.1\r\n",
        head("POST / HTTP/1.1", "Content-Length: 5", "Expect: 100-continue"),
    ],
)
@pytest.mark.parametrize("ending", ["reset", "close", "send_eof"])
async def test_a_client_that_leaves_while_it_sends(engine: str, hub: str, sent: bytes, ending: str) -> None:
    async with surviving(respond_first(echo), http_engine=engine, hub=hub, disconnect_grace=0.05) as server:
        counters = server.worker.context.counters
        for settled in (False, True):
            async with server.connect() as client:
                await client.send(sent)
                if settled:
                    await until(lambda: counters.connections == 2)
                    await trio.testing.wait_all_tasks_blocked(0.002)
                getattr(client, ending)()
                if ending == "send_eof":
                    await client.receive_all()


@pytest.mark.parametrize("ending", ["reset", "close"])
@pytest.mark.parametrize(
    "moment", ["before", "while reading", "while waiting", "while streaming", "while blocked"]
)
async def test_a_client_that_leaves_while_the_app_runs(hub: str, moment: str, ending: str) -> None:
    reached = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return None
        if scope["path"] == "/":
            return await respond(send)
        if moment == "before":
            reached.set()
            await trio.sleep(0.01)
            return await respond(send)
        if moment == "while reading":
            reached.set()
            return await respond(send, await read_body(receive))
        if moment == "while waiting":
            reached.set()
            while (await receive())["type"] != "http.disconnect":
                pass
            return None
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            part = bytes(1_000_000) if moment == "while blocked" else b"tick"
            reached.set()
            await send({"type": "http.response.body", "body": part, "more_body": True})
            await trio.sleep(0.002)

    async with surviving(app, hub=hub, disconnect_grace=0.05) as server:
        async with server.connect(receive_buffer=4096) as client:
            length = 10 if moment == "while reading" else 0
            await client.send(head("POST /x HTTP/1.1", f"Content-Length: {length}"))
            await reached.wait()
            await trio.testing.wait_all_tasks_blocked(0.001)
            getattr(client, ending)()
        await server.wait_idle()
        assert not server.worker.context.counters.faults.keys() - {"C2"}


async def test_a_hundred_clients_that_leave_at_random_moments(engine: str, hub: str) -> None:
    numbers = random.Random(815)
    data = GET + POST + b"x" * 1000 + CHUNKED + b"5\r\nhello\r\n0\r\n\r\n"

    async def visit(server: TestServer, size: int, ending: str) -> None:
        client: RawClient
        async with server.connect() as client:
            await client.send(data[:size])
            if numbers.random() < 0.5:
                await trio.sleep(numbers.random() / 100)
            getattr(client, ending)()

    async with surviving(echo, http_engine=engine, hub=hub, disconnect_grace=0.05) as server:
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                ending = numbers.choice(["reset", "close"])
                nursery.start_soon(visit, server, numbers.randrange(len(data)), ending)
