"""Early hints (103) and trailers: offered where they can be sent, and sent as they must be."""

from __future__ import annotations

from typing import Any

import pytest

from tests.apps import respond
from tests.http.feeding import head
from tests.http.test_wire_framing import GET, LAST, OLD, answer, bare, wire

pytestmark = pytest.mark.modes("tls", "http2")

TRAILERS = head("GET / HTTP/1.1", "TE: trailers")


async def offered(request: bytes) -> set[str]:
    found: set[str] = set()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            found.update(scope["extensions"])
            await respond(send)

    await answer(app, request)
    return found


# -- early hints ---------------------------------------------------------------------------------------------


async def hinting(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.early_hint", "links": [b"</a.css>; rel=preload", b"</b.js>"]})
        await send({"type": "http.response.early_hint", "links": [b"</c>"]})
        await respond(send)


@pytest.mark.modes("tls", because="it reads HTTP/1 on the wire")
async def test_early_hints_go_out_before_the_response() -> None:
    assert await wire(hinting, GET + LAST) == b"".join(
        b"HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\nlink: </b.js>\r\n\r\n"
        b"HTTP/1.1 103 Early Hints\r\nlink: </c>\r\n\r\n"
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n" + close + b"\r\nhello"
        for close in (b"", b"connection: close\r\n")
    )


@pytest.mark.modes("tls", because="HTTP/1.0")
async def test_early_hints_are_not_sent_to_http_1_0() -> None:
    # RFC 9110 section 15.2
    assert b"103" not in await wire(hinting, OLD)
    assert "http.response.early_hint" not in await offered(OLD)
    assert "http.response.early_hint" in await offered(GET)


async def test_early_hints_are_on_the_wire_before_the_app_goes_on() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.early_hint", "links": [b"</a>"]})
            await receive()
            await respond(send)

    async with bare(app) as server, server.connect() as client:
        await client.send(head("POST / HTTP/1.1", "Content-Length: 1"))
        await client.receive_until(b"link: </a>\r\n\r\n")
        await client.send(b"x")
        assert (await client.read_response()).status == 200


@pytest.mark.modes("tls", because="it reads HTTP/1 on the wire")
@pytest.mark.parametrize("link", [b"</a>\r\nset-cookie: evil=1", b"\0", "text", None, 5])
async def test_links_that_may_not_be_sent_are_a_500(link: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.early_hint", "links": [link]})
            await respond(send)

    data = await wire(app)
    assert data.startswith(b"HTTP/1.1 500 ")
    assert b"evil" not in data


async def test_a_hint_after_the_start_is_an_error_of_the_app() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.early_hint", "links": []})

    assert (await answer(app)).status == 500


# -- trailers ------------------------------------------------------------------------------------------------


def trailing(
    *batches: list[tuple[bytes, bytes]], parts: tuple[bytes, ...] = (b"body",), headers: Any = ()
) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            start = {"type": "http.response.start", "status": 200, "headers": headers, "trailers": True}
            await send(start)
            for number, part in enumerate(parts, 1):
                await send({"type": "http.response.body", "body": part, "more_body": number < len(parts)})
            for number, batch in enumerate(batches, 1):
                more = number < len(batches)
                await send({"type": "http.response.trailers", "headers": batch, "more_trailers": more})

    return app


async def test_trailers_follow_the_last_chunk() -> None:
    app = trailing([(b"x-sum", b"1")], [(b"x-time", b"2"), (b"X-Sum", b"3")], parts=(b"bo", b"dy"))
    response = await answer(app, TRAILERS)
    assert (response.body, response.complete) == (b"body", True)
    assert response.trailers == [(b"x-sum", b"1"), (b"x-time", b"2"), (b"x-sum", b"3")]


async def test_the_connection_is_kept_behind_trailers() -> None:
    async with bare(trailing([(b"a", b"b")])) as server, server.connect() as client:
        await client.send(TRAILERS * 3)
        for _ in range(3):
            assert (await client.read_response()).trailers == [(b"a", b"b")]


@pytest.mark.modes("tls", because="HTTP/1.0")
async def test_trailers_are_offered_to_those_who_asked() -> None:
    assert "http.response.trailers" in await offered(TRAILERS)
    for request in (GET, OLD, head("GET / HTTP/1.0", "TE: trailers"), head("GET / HTTP/1.1", "TE: gzip")):
        assert "http.response.trailers" not in await offered(request)


@pytest.mark.modes("tls", because="HTTP/1.0")
@pytest.mark.parametrize("request_bytes", [GET, OLD])
async def test_trailers_for_others_are_left_out_and_the_body_is_whole(request_bytes: bytes) -> None:
    # RFC 9110 section 6.5.1
    response = await answer(trailing([(b"x-sum", b"1")]), request_bytes)
    assert (response.body, response.complete, response.trailers) == (b"body", True, [])


@pytest.mark.modes("tls", because="it reads HTTP/1 on the wire")
async def test_a_response_to_head_has_no_trailers() -> None:
    data = await wire(trailing([(b"a", b"b")]), head("HEAD / HTTP/1.1", "TE: trailers", "Connection: close"))
    assert data.endswith(b"\r\n\r\n")
    assert b"a: b" not in data
    assert b"body" not in data


@pytest.mark.modes("tls", because="HTTP/2 has trailers behind any body")
async def test_a_response_with_a_length_has_no_trailers() -> None:
    response = await answer(trailing([(b"a", b"b")], headers=[(b"content-length", b"4")]), TRAILERS)
    assert (response.body, response.complete, response.trailers) == (b"body", True, [])
    assert response.header("transfer-encoding") is None


@pytest.mark.parametrize(
    "trailer",
    [
        (b"content-length", b"4"),
        (b"transfer-encoding", b"chunked"),
        (b"x", b"a\r\nevil: 1"),
        (b"x y", b"evil"),
        ("x", "evil"),
    ],
)
async def test_trailers_that_may_not_be_sent_truncate_the_body(trailer: Any) -> None:
    async with bare(trailing([trailer])) as server, server.connect() as client:
        await client.send(TRAILERS)
        response = await client.read_response()
        assert (response.status, response.complete, response.trailers) == (200, False, [])
        assert server.worker.context.counters.faults == {"A5": 1}


async def test_trailers_that_never_come_truncate_the_body() -> None:
    response = await answer(trailing(), TRAILERS)
    assert (response.status, response.complete) == (200, False)
