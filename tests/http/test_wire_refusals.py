"""Refusals on the wire: answered before the connection closes, whatever the peer still sends; never seen by the app."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from tests.apps import echo, hello, read_body, respond
from tests.http.cases import REFUSED
from tests.http.feeding import head
from trioserve.testing import Response, TestServer, no_leaks, serving

pytestmark = pytest.mark.modes("tls")

POST = "POST / HTTP/1.1"
CHUNKED = head(POST, "Transfer-Encoding: chunked")


async def untouched(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "lifespan", "a refused request has reached the app"


async def answer_to(server: TestServer, data: bytes) -> Response:
    """The one answer to `data`, after which the connection must end without a reset."""
    async with server.connect() as client:
        await client.send(data)
        response = await client.read_response()
        assert await client.receive() == b""
        return response


async def test_every_invalid_head_is_answered_with_its_status_and_the_connection_closed(engine: str) -> None:
    async with no_leaks(), serving(untouched, http_engine=engine) as server:
        for case in REFUSED:
            response = await answer_to(server, case.data)
            assert response.status == case.status, case
            assert response.complete
            assert response.header("connection") == "close"
            assert response.header("date")
        refused = server.worker.context.counters.refused
        assert sum(refused.values()) == len(REFUSED)
        assert set(refused) == {"400", "417", "501", "505"}


async def test_a_refusal_has_a_short_body_that_says_the_status(engine: str) -> None:
    async with serving(untouched, http_engine=engine) as server:
        response = await answer_to(server, b"G@T / HTTP/1.1\r\n\r\n")
        assert response.body == b"400 Bad Request\n"
        assert response.header("content-type") == "text/plain; charset=utf-8"


@pytest.mark.parametrize(
    ("settings", "data", "status"),
    [
        ({"max_head_size": 300}, head("GET / HTTP/1.1", "X: " + "x" * 300), 431),
        ({}, head("GET / HTTP/1.1", *["X: " + "x" * 600 for _ in range(99)], "X: " + "x" * 9000), 431),
        ({"max_header_count": 3}, head("GET / HTTP/1.1", "a:", "b:", "c:"), 431),
        ({}, head("GET / HTTP/1.1", *["a: b"] * 10_000), 431),
        ({"max_target_size": 20}, head("GET /" + "x" * 20 + " HTTP/1.1"), 414),
        ({}, head("GET /" + "x" * 8192 + " HTTP/1.1"), 414),
        ({"max_body_size": 9}, head(POST, "Content-Length: 10") + b"0123456789", 413),
        ({"max_body_size": 9}, CHUNKED + b"a\r\n0123456789\r\n0\r\n\r\n", 413),
        ({"h11_max_incomplete_size": 300}, head("GET / HTTP/1.1", "X: " + "x" * 300), 431),
    ],
)
async def test_limits_are_settings(engine: str, settings: dict[str, int], data: bytes, status: int) -> None:
    async with serving(untouched, http_engine=engine, **settings) as server:
        assert (await answer_to(server, data)).status == status


async def test_what_just_fits_is_served(engine: str) -> None:
    limits = {"max_head_size": 300, "max_header_count": 2, "max_target_size": 20, "max_body_size": 10}
    base = head("POST /" + "x" * 19 + " HTTP/1.1", "Content-Length: 10", host="")
    data = head("POST /" + "x" * 19 + " HTTP/1.1", "Content-Length: 10", host="h" * (300 - len(base)))
    assert len(data) == 300
    async with serving(echo, http_engine=engine, **limits) as server, server.connect() as client:
        await client.send((data + b"0123456789") * 3)
        for _ in range(3):
            assert (await client.read_response()).body == b"0123456789"


async def test_the_answer_arrives_although_the_peer_sends_a_megabyte_more(engine: str) -> None:
    async with no_leaks(), serving(untouched, http_engine=engine) as server:
        for start in (b"G@T / HTTP/1.1\r\n", head(POST, "Content-Length: x"), head("GET / HTTP/9.9")):
            async with server.connect() as client:
                await client.send(start + b"x" * (1 << 20))
                response = await client.read_response()
                assert response.complete
                assert response.status in (400, 505)
                assert await client.receive() == b"", "the end must be a FIN: a reset may destroy the answer"


async def test_the_answer_arrives_while_the_peer_goes_on_sending(engine: str) -> None:
    async with serving(untouched, http_engine=engine) as server, server.connect() as client:
        await client.send(head(POST, "Content-Length: 5", "Transfer-Encoding: chunked"))
        for _ in range(20):
            await client.send(b"x" * 1000)
            await trio.testing.wait_all_tasks_blocked(0.001)
        assert (await client.read_response()).status == 400
        assert await client.receive() == b""


async def test_good_requests_before_a_bad_one_are_answered_first(engine: str) -> None:
    async with serving(echo, http_engine=engine) as server, server.connect() as client:
        good = head(POST, "Content-Length: 2") + b"ok"
        await client.send(good * 3 + b"G@T / HTTP/1.1\r\n\r\n" + good)
        assert [(await client.read_response()).status for _ in range(4)] == [200, 200, 200, 400]
        assert await client.receive_all() == b""


async def test_a_head_is_refused_before_it_is_whole(engine: str) -> None:
    async with serving(untouched, http_engine=engine) as server, server.connect() as client:
        await client.send(b"GET / HTTP/1.1\r\nHost: a\n")
        assert (await client.read_response()).status == 400


async def test_a_head_request_is_refused_with_a_body_unless_its_method_is_known(engine: str) -> None:
    # A refusal of the head cannot know whether HEAD was meant; the length says what was sent.
    async with serving(untouched, http_engine=engine) as server:
        response = await answer_to(server, head("HEAD / HTTP/1.1", host=None))
        assert (response.status, response.body) == (400, b"400 Bad Request\n")


# -- bodies --------------------------------------------------------------------------------------------------


async def reading(scope: Any, receive: Any, send: Any) -> None:
    """Reads all, and lets the disconnect out as an exception, as frameworks do."""
    if scope["type"] == "http":
        await respond(send, await read_body(receive))


async def resigned(scope: Any, receive: Any, send: Any) -> None:
    """Reads all, and just returns at a disconnect."""
    if scope["type"] == "http":
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            if not message["more_body"]:
                await respond(send)


@pytest.mark.parametrize("app", [reading, resigned])
@pytest.mark.parametrize(
    ("part", "status"),
    [
        (b"5\r\nhelloX", 400),
        (b"zz", 400),
        (b"a\r\n", 413),
        (b"0\r\nA : b\r\n", 400),
        (b"1;" + b"x" * 5000, 431),
    ],
)
async def test_a_body_that_breaks_while_the_app_reads_is_refused_and_no_fault_of_the_app(
    engine: str, app: Any, part: bytes, status: int
) -> None:
    async with serving(app, http_engine=engine, max_body_size=9) as server, server.connect() as client:
        await client.send(CHUNKED)
        await trio.testing.wait_all_tasks_blocked(0.005)
        await client.send(part)
        response = await client.read_response()
        assert (response.status, response.header("connection")) == (status, "close")
        assert await client.receive() == b""
        assert server.worker.context.counters.refused == {str(status): 1}
        assert server.failure is None


async def test_a_body_that_breaks_after_the_response_has_begun_truncates_it(engine: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            await send({"type": "http.response.body", "body": await read_body(receive)})

    async with serving(app, http_engine=engine) as server, server.connect() as client:
        await client.send(CHUNKED)
        await client.receive_until(b"a\r\n")
        await client.send(b"zz\r\n")
        assert await client.receive_all() == b""
        assert server.failure is None


async def test_an_app_may_answer_by_itself_when_the_body_breaks(engine: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            while (await receive())["type"] != "http.disconnect":
                pass
            await respond(send, b"mine", 422)

    async with serving(app, http_engine=engine) as server, server.connect() as client:
        await client.send(CHUNKED)
        await trio.testing.wait_all_tasks_blocked(0.005)
        await client.send(b"zz\r\n" + b"x" * 100_000)
        response = await client.read_response()
        assert (response.status, response.body, response.header("connection")) == (422, b"mine", "close")
        assert await client.receive() == b""


async def test_a_body_that_nobody_reads_may_be_broken(engine: str) -> None:
    async with serving(hello, http_engine=engine) as server, server.connect() as client:
        await client.send(CHUNKED)
        response = await client.read_response()
        assert (response.status, response.header("connection")) == (200, "close")
        await client.send(b"zz\r\n")
        assert await client.receive_all() == b""
        assert (await server.get()).status == 200
