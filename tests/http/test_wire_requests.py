"""Requests on the wire: what the app sees, what the peer is answered, and what becomes of the connection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from tests.apps import echo, hello, read_body, respond
from tests.http.feeding import head
from tests.waiting import until_blocked
from trioserve.testing import RawClient, connect, encode_request, serving

pytestmark = pytest.mark.modes("tls")

POST = "POST / HTTP/1.1"
CHUNKED = head(POST, "Transfer-Encoding: chunked")


async def show(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what the scope says of the request."""
    host = dict(scope["headers"]).get(b"host", b"-")
    text = f"{scope['method']} {scope['raw_path'].decode()} {scope['http_version']} {host.decode()}"
    await respond(send, text.encode() + b" " + await read_body(receive))


# -- several requests ----------------------------------------------------------------------------------------


async def test_a_connection_is_kept_for_further_requests(engine: str) -> None:
    async with serving(echo, http_engine=engine) as server, server.connect() as client:
        for number in range(5):
            response = await client.request("POST", "/", body=b"%d" % number)
            assert (response.status, response.body) == (200, b"%d" % number)
            assert response.header("connection") is None
        assert len(server.worker.context.connections) == 1


async def test_ten_requests_in_one_segment_are_answered_in_order(engine: str) -> None:
    async with serving(show, http_engine=engine) as server, server.connect() as client:
        await client.send(b"".join(encode_request("POST", f"/{n}", body=b"x" * n) for n in range(10)))
        for n in range(10):
            assert (await client.read_response()).body == b"POST /%d 1.1 testserver %b" % (n, b"x" * n)


async def test_a_pipeline_of_every_framing_arrives_byte_by_byte(engine: str) -> None:
    data = (
        head("GET /1 HTTP/1.1")
        + head("POST /2 HTTP/1.1", "Content-Length: 3") + b"abc\r\n"
        + head("POST /3 HTTP/1.1", "Transfer-Encoding: chunked") + b"2;x=y\r\nde\r\n1\r\nf\r\n0\r\nz: 1\r\n\r\n"
        + head("GET http://b/4 HTTP/1.1", "Connection: close")
    )  # fmt: skip
    async with serving(show, http_engine=engine) as server, server.connect() as client:
        for at in range(len(data)):
            await client.send(data[at : at + 1])
            await trio.lowlevel.checkpoint()
        bodies = [(await client.read_response()).body for _ in range(4)]
        assert bodies == [b"GET /1 1.1 a ", b"POST /2 1.1 a abc", b"POST /3 1.1 a def", b"GET /4 1.1 b "]
        assert await client.receive_all() == b""


async def test_a_pipelined_request_waits_for_the_response_before_it(engine: str) -> None:
    order: list[str] = []
    release = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            order.append("in " + scope["path"])
            if scope["path"] == "/1":
                await release.wait()
            await respond(send)
            order.append("out " + scope["path"])

    async with serving(app, http_engine=engine) as server, server.connect() as client:
        await client.send(head("GET /1 HTTP/1.1") + head("GET /2 HTTP/1.1"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert order == ["in /1"]
        release.set()
        await client.read_response()
        await client.read_response()
        assert order == ["in /1", "out /1", "in /2", "out /2"]


@pytest.mark.parametrize(
    ("line", "fields", "kept"),
    [
        ("GET / HTTP/1.1", (), True),
        ("GET / HTTP/1.1", ("Connection: close",), False),
        ("GET / HTTP/1.1", ("Connection: x, Close",), False),
        ("GET / HTTP/1.0", (), False),
        ("GET / HTTP/1.0", ("Connection: keep-alive",), True),
    ],
)
async def test_the_peer_decides_whether_the_connection_is_kept(
    engine: str, line: str, fields: tuple[str, ...], kept: bool
) -> None:
    async with serving(hello, http_engine=engine) as server, server.connect() as client:
        await client.send(head(line, *fields) * 2)
        response = await client.read_response()
        expected = None if kept and "1.1" in line else "keep-alive" if kept else "close"
        assert response.header("connection") == expected
        if kept:
            assert (await client.read_response()).status == 200
        else:
            assert await client.receive_all() == b""


@pytest.mark.parametrize(("setting", "served"), [(0, 1), (1, 1), (2, 2), (7, 7)])
async def test_keep_alive_max_requests_closes_after_the_last(engine: str, setting: int, served: int) -> None:
    async with serving(hello, http_engine=engine, keep_alive_max_requests=setting) as server:
        async with server.connect() as client:
            await client.send(head() * 10)
            for number in range(served):
                response = await client.read_response()
                assert response.header("connection") == ("close" if number == served - 1 else None)
            await client.send(head() * 10)
            assert await client.receive() == b"", "the end must be a FIN: a reset may destroy the answer"


async def test_keep_alive_timeout_0_closes_after_each_response(engine: str) -> None:
    async with serving(hello, http_engine=engine, keep_alive_timeout=0) as server, server.connect() as client:
        response = await client.get()
        assert response.header("connection") == "close"
        assert await client.receive_all() == b""


# -- forms of requests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_bytes", "seen"),
    [
        (head("GET http://b.example:81/x?y HTTP/1.1"), b"GET /x 1.1 b.example:81 "),
        (head("OPTIONS * HTTP/1.1"), b"OPTIONS * 1.1 a "),
        (head("GET /%41//..?q HTTP/1.0", host=None), b"GET /%41//.. 1.0 - "),
        (head("GET http://b HTTP/1.0", host=None), b"GET / 1.0 b "),
        (head("BREW /pot HTTP/1.1", "Content-Length: 3") + b"abc", b"BREW /pot 1.1 a abc"),
        (head("GET / HTTP/1.1", "Content-Length: 3") + b"abc", b"GET / 1.1 a abc"),
        (b"\r\n\r\n" + head("GET / HTTP/1.1", host=""), b"GET / 1.1  "),
    ],
)
async def test_the_app_sees_the_request_that_was_meant(
    engine: str, request_bytes: bytes, seen: bytes
) -> None:
    async with serving(show, http_engine=engine) as server, server.connect() as client:
        await client.send(request_bytes)
        assert (await client.read_response()).body == seen


@pytest.mark.parametrize("protocol", ["h2c", "TLS/1.0"])
async def test_an_offer_to_upgrade_is_left_alone(engine: str, protocol: str) -> None:
    fields = (f"Upgrade: {protocol}", "Connection: upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABk")
    data = head(POST, *fields, "Content-Length: 2") + b"hi" + head("GET / HTTP/1.1", *fields) + head()
    async with serving(show, http_engine=engine) as server, server.connect() as client:
        await client.send(data)
        responses = [await client.read_response() for _ in range(3)]
        assert [response.body for response in responses] == [
            b"POST / 1.1 a hi",
            b"GET / 1.1 a ",
            b"GET / 1.1 a ",
        ]
        assert all((r.status, r.header("upgrade")) == (200, None) for r in responses)


async def test_raw_names_reach_the_app_as_they_came(engine: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await respond(send, b",".join(name for name, _ in scope["headers"]))

    for raw, names in ((False, b"host,x-mixed"), (True, b"Host,X-Mixed")):
        async with serving(app, http_engine=engine, h11_pass_raw_headers=raw) as server:
            async with server.connect() as client:
                await client.send(head("GET / HTTP/1.1", "X-Mixed: 1"))
                assert (await client.read_response()).body == names


# -- bodies --------------------------------------------------------------------------------------------------


async def test_a_chunked_request_reaches_the_app_as_it_arrives(engine: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            more = True
            while more:
                message = await receive()
                more = message["more_body"]
                await send({"type": "http.response.body", "body": message["body"], "more_body": more})

    async with serving(app, http_engine=engine) as server, server.connect() as client:
        await client.send(CHUNKED)
        for part in (b"first", b"second"):
            await client.send(b"%x\r\n%b\r\n" % (len(part), part))
            await client.receive_until(part)
        await client.send(b"0\r\nChecksum: 1\r\n\r\n" + head("GET /next HTTP/1.1"))
        assert await client.receive_until(b"0\r\n\r\n") == b"\r\n0\r\n\r\n"
        assert (await client.read_response()).status == 200


async def test_a_large_body_comes_whole_and_in_bounded_parts(engine: str) -> None:
    sizes: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        more = scope["type"] == "http"
        while more:
            message = await receive()
            sizes.append(len(message["body"]))
            more = message["more_body"]
        await respond(send)

    async with serving(app, http_engine=engine) as server, server.connect() as client:
        assert (await client.request("POST", body=bytes(5_000_000))).status == 200
    assert sum(sizes) == 5_000_000
    assert max(sizes) <= 128 * 1024


async def test_an_app_that_does_not_read_a_small_body_keeps_the_connection(engine: str) -> None:
    async with serving(hello, http_engine=engine) as server, server.connect() as client:
        for body in (b"x" * 1000, b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"):
            response = await client.request("POST", body=body)
            assert (response.status, response.header("connection")) == (200, None)
        await client.send(CHUNKED + b"5\r\nhello\r\n0\r\n\r\n")
        assert (await client.read_response()).status == 200
        assert server.worker.context.connections


async def test_an_app_that_does_not_read_a_large_body_is_heard_and_the_connection_closed(engine: str) -> None:
    async with serving(hello, http_engine=engine) as server, server.connect() as client:
        await client.send(head(POST, "Content-Length: 1000000") + b"x" * 1_000_000)
        response = await client.read_response()
        assert (response.status, response.body, response.header("connection")) == (200, b"hello", "close")
        assert await client.receive() == b"", "the end must be a FIN: a reset may destroy the answer"


async def test_a_body_that_never_comes_does_not_hold_up_an_answer(engine: str) -> None:
    async with serving(hello, http_engine=engine) as server, server.connect() as client:
        await client.send(head(POST, "Content-Length: 10"))
        response = await client.read_response()
        assert (response.status, response.header("connection")) == (200, "close")
        # What comes late is the body, and no request.
        await client.send(head("GET /x HTTP/1.1"))
        assert await client.receive() == b""


async def test_a_streaming_app_may_leave_the_body_and_keep_the_connection(engine: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            if scope["path"] == "/ask":
                await receive()
            await send({"type": "http.response.body", "body": b"b"})

    async with serving(app, http_engine=engine) as server, server.connect() as client:
        await client.send(head("POST /ask HTTP/1.1", "Content-Length: 100000"))
        await client.receive_until(b"a\r\n")
        await client.send(b"x" * 100_000 + head("GET /2 HTTP/1.1"))
        await client.receive_until(b"0\r\n\r\n")
        assert (await client.read_response()).body == b"ab"


# -- Expect --------------------------------------------------------------------------------------------------


@pytest.mark.modes(because="it looks at the socket itself")
async def test_100_is_sent_when_the_app_first_reads(engine: str) -> None:
    asked, go_on = trio.Event(), trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            asked.set()
            await go_on.wait()
            await echo(scope, receive, send)

    async with serving(app, http_engine=engine) as server, server.connect() as client:
        await client.send(head(POST, "Expect: 100-continue", "Content-Length: 5"))
        await asked.wait()
        with pytest.raises(BlockingIOError):
            client.sock.recv(1)
        go_on.set()
        assert await client.receive_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b"hello")
        response = await client.read_response()
        assert (response.body, response.interim, response.header("connection")) == (b"hello", [], None)


async def test_100_is_sent_once_for_a_body_in_many_parts(engine: str) -> None:
    async with serving(echo, http_engine=engine) as server, server.connect() as client:
        await client.send(head(POST, "Expect: 100-continue", "Transfer-Encoding: chunked"))
        await client.receive_until(b"100 Continue\r\n\r\n")
        for _ in range(3):
            await client.send(b"1\r\nx\r\n")
            await trio.testing.wait_all_tasks_blocked(0.005)
        await client.send(b"0\r\n\r\n")
        response = await client.read_response()
        assert (response.body, response.interim) == (b"xxx", [])


async def test_a_client_that_is_gone_when_100_is_due_is_no_fault_of_the_app(engine: str, hub: str) -> None:
    asked, go_on, told = trio.Event(), trio.Event(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            asked.set()
            await go_on.wait()
            told.append((await receive())["type"])

    async with serving(app, http_engine=engine, hub=hub) as server, server.connect() as client:
        await client.send(head(POST, "Expect: 100-continue", "Content-Length: 5"))
        await asked.wait()
        client.reset()
        await trio.testing.wait_all_tasks_blocked(0.01)
        go_on.set()
        await server.wait_idle()
        assert told == ["http.disconnect"]
        assert server.failure is None


# More than the kernel takes for a peer that does not read.
LINKS = [b"x" * 8000] * 1500
HINT = {"type": "http.response.early_hint", "links": LINKS}


class HintReader(RawClient):
    """Reads a hint of that size, at last."""

    async def read_hint(self) -> None:
        await self.receive_until(b"HTTP/1.1 103 Early Hints\r\n")
        size = len(b"".join(b"link: %b\r\n" % link for link in LINKS)) + 2
        parts, left = [self.received], size - len(self.received)
        while left > 0:
            parts.append(await self.receive())
            assert parts[-1]
            left -= len(parts[-1])
        data = b"".join(parts)
        assert data[:size].endswith(b"xxx\r\n\r\n")
        self.received = data[size:]


@asynccontextmanager
async def connected(app: Any, **options: Any) -> AsyncIterator[HintReader]:
    async with serving(app, **options) as server:
        async with connect(server.addresses[0], client=HintReader) as client:
            assert isinstance(client, HintReader)
            with trio.fail_after(60):
                yield client
    assert server.failure is None


@pytest.mark.modes(because="TLS and HTTP/2 write what they have in other ways")
async def test_100_beside_a_send_that_waits(engine: str, hub: str) -> None:
    hinting, go_on = trio.Event(), trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, HINT)
                hinting.set()
                await go_on.wait()
                body = await read_body(receive)
            await respond(send, body)

    async with connected(app, http_engine=engine, hub=hub) as client:
        await client.send(head(POST, "Expect: 100-continue", "Content-Length: 5"))
        await hinting.wait()
        await trio.testing.wait_all_tasks_blocked(0.05)
        go_on.set()
        await trio.testing.wait_all_tasks_blocked(0.05)
        await client.read_hint()
        assert await client.receive_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b"hello")
        response = await client.read_response()
        assert (response.status, response.body, response.interim) == (200, b"hello", [])


@pytest.mark.modes(because="TLS and HTTP/2 write what they have in other ways")
@pytest.mark.parametrize("given_up", [False, True], ids=["both", "given up"])
async def test_a_send_beside_a_100_that_waits(engine: str, hub: str, given_up: bool) -> None:
    waiting = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        async with until_blocked(0.05):
            await send(HINT)
        reading = trio.CancelScope()

        async def read() -> None:
            with reading:
                await receive()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked(0.05)
            nursery.start_soon(respond, send, b"answer")
            await trio.testing.wait_all_tasks_blocked(0.05)
            if given_up:
                reading.cancel()
            waiting.set()

    async with connected(app, http_engine=engine, hub=hub) as client:
        await client.send(head(POST, "Expect: 100-continue", "Content-Length: 5"))
        await waiting.wait()
        await client.read_hint()
        response = await client.read_response()
        assert (response.status, response.body, response.interim) == (200, b"answer", [100])


@pytest.mark.modes(because="TLS and HTTP/2 write what they have in other ways")
@pytest.mark.parametrize("size", [6, 100_000])
async def test_a_response_behind_what_is_left_of_a_hint(engine: str, hub: str, size: int) -> None:
    """Its send() was given up half way; by now there is room again."""
    given_up, go_on = trio.Event(), trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            async with until_blocked(0.05):
                await send(HINT)
            given_up.set()
            await go_on.wait()
            await respond(send, b"x" * size)

    async with connected(app, http_engine=engine, hub=hub) as client:
        await client.send(head("GET / HTTP/1.1"))
        await given_up.wait()
        async with until_blocked(0.05):
            while True:
                client.received += await client.receive()
        go_on.set()
        await client.read_hint()
        response = await client.read_response()
        assert (response.status, response.body, response.interim) == (200, b"x" * size, [])


@pytest.mark.parametrize(
    "request_bytes",
    [
        head(POST, "Expect: 100-continue", "Content-Length: 5") + b"hello",
        head(POST, "Expect: 100-continue"),
        head(POST, "Expect: 100-continue", "Content-Length: 0"),
        head("POST / HTTP/1.0", "Expect: 100-continue", "Content-Length: 5") + b"hello",
        head("POST / HTTP/1.0", "Expect: 200-ok", "Content-Length: 5") + b"hello",
    ],
)
async def test_100_is_not_sent_where_nobody_waits_for_it(engine: str, request_bytes: bytes) -> None:
    async with serving(echo, http_engine=engine) as server, server.connect() as client:
        await client.send(request_bytes)
        response = await client.read_response()
        assert (response.status, response.interim) == (200, [])


async def test_100_is_not_sent_if_the_app_does_not_read(engine: str) -> None:
    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await respond(send, b"no", 403)

    async with serving(refuse, http_engine=engine) as server, server.connect() as client:
        await client.send(head(POST, "Expect: 100-continue", "Content-Length: 5"))
        response = await client.read_response()
        assert (response.status, response.interim, response.header("connection")) == (403, [], "close")
        assert await client.receive_all() == b""


async def test_100_is_not_sent_once_the_response_has_begun(engine: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            await send({"type": "http.response.body", "body": await read_body(receive)})

    async with serving(app, http_engine=engine) as server, server.connect() as client:
        await client.send(head(POST, "Expect: 100-continue", "Content-Length: 5"))
        first = await client.receive_until(b"a\r\n")
        assert b" 100 " not in first
        assert b"connection: close\r\n" in first
        await client.send(b"hello")
        assert await client.receive_until(b"0\r\n\r\n") == b"5\r\nhello\r\n0\r\n\r\n"


async def test_a_body_that_is_too_long_is_refused_without_100(engine: str) -> None:
    async with serving(echo, http_engine=engine, max_body_size=4) as server, server.connect() as client:
        await client.send(head(POST, "Expect: 100-continue", "Content-Length: 5"))
        response = await client.read_response()
        assert (response.status, response.interim) == (413, [])
