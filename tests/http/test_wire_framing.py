"""Responses on the wire: where they end, and that a peer can tell a whole one from a truncated one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest
import trio

from tests.apps import respond
from tests.http.feeding import head
from trioserve.http import response as response_heads
from trioserve.testing import Response, TestServer, serving

pytestmark = pytest.mark.modes("tls")

App = Callable[[Any, Any, Any], Any]

GET = head("GET / HTTP/1.1")
LAST = head("GET / HTTP/1.1", "Connection: close")
OLD = head("GET / HTTP/1.0", host=None)


def answering(*parts: bytes, status: int = 200, headers: Any = (), ends: bool = True, **start: Any) -> App:
    """An app that sends `parts` as body events, the last one marked as the last unless `ends` is False."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": status, "headers": headers, **start})
            for number, part in enumerate(parts, 1):
                more = number < len(parts) or not ends
                await send({"type": "http.response.body", "body": part, "more_body": more})

    return app


@asynccontextmanager
async def bare(app: App, **settings: Any) -> AsyncIterator[TestServer]:
    """Without Date and Server, so that responses can be compared as bytes; app errors do not end the server."""
    settings = {
        "include_date_header": False,
        "include_server_header": False,
        "on_app_error": "contain",
    } | settings
    async with serving(app, **settings) as server:
        yield server


async def wire(app: App, request: bytes = LAST, **settings: Any) -> bytes:
    """All bytes of the answer to `request`, up to FIN; a reset raises."""
    async with bare(app, **settings) as server, server.connect() as client:
        await client.send(request)
        parts = []
        while part := await client.receive():
            parts.append(part)
        return b"".join(parts)


async def answer(app: App, request: bytes = GET, method: str = "GET", **settings: Any) -> Response:
    async with bare(app, **settings) as server, server.connect() as client:
        await client.send(request)
        return await client.read_response(method)


# -- framing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("app", "data"),
    [
        (answering(b"hello"), b"content-length: 5\r\nconnection: close\r\n\r\nhello"),
        (answering(b""), b"content-length: 0\r\nconnection: close\r\n\r\n"),
        (
            answering(b"hello", headers=[(b"Content-Length", b"5")]),
            b"content-length: 5\r\nconnection: close\r\n\r\nhello",
        ),
        (
            answering(b"hel", b"lo", headers=[(b"content-length", b"5")]),
            b"content-length: 5\r\nconnection: close\r\n\r\nhello",
        ),
        (
            answering(b"hel", b"lo"),
            b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n",
        ),
        (
            answering(b"", b"0123456789", b"", b"a", b""),
            b"transfer-encoding: chunked\r\nconnection: close\r\n\r\na\r\n0123456789\r\n1\r\na\r\n0\r\n\r\n",
        ),
        (answering(b"", b""), b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n0\r\n\r\n"),
        (
            answering(b"a", b"", headers=[(b"transfer-encoding", b"chunked")]),
            b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n1\r\na\r\n0\r\n\r\n",
        ),
        (
            answering(b"a", headers=[(b"transfer-encoding", b"chunked")]),
            b"content-length: 1\r\nconnection: close\r\n\r\na",
        ),
        (answering(bytearray(b"ab")), b"content-length: 2\r\nconnection: close\r\n\r\nab"),
        (answering(memoryview(b"ab")[1:]), b"content-length: 1\r\nconnection: close\r\n\r\nb"),
    ],
)  # fmt: skip
async def test_a_body_is_framed_by_its_length_if_that_is_known_and_by_chunks_if_not(
    app: App, data: bytes
) -> None:
    assert await wire(app) == b"HTTP/1.1 200 OK\r\n" + data


@pytest.mark.parametrize(
    ("app", "data"),
    [
        (answering(b"hello"), b"content-length: 5\r\nconnection: close\r\n\r\nhello"),
        (answering(b"hel", b"lo"), b"connection: close\r\n\r\nhello"),
        (
            answering(b"hel", b"lo", headers=[(b"content-length", b"5")]),
            b"content-length: 5\r\nconnection: close\r\n\r\nhello",
        ),
    ],
)
async def test_http_1_0_gets_no_chunks_but_a_length_or_the_end_of_the_connection(
    app: App, data: bytes
) -> None:
    assert await wire(app, OLD) == b"HTTP/1.1 200 OK\r\n" + data


async def test_http_1_0_may_keep_the_connection_only_if_the_length_is_known() -> None:
    keep = head("GET / HTTP/1.0", "Connection: keep-alive", host=None)
    known, unknown = answering(b"hello"), answering(b"hel", b"lo")
    once = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: keep-alive\r\n\r\nhello"
    assert await wire(known, keep * 2 + OLD) == once * 2 + once.replace(b"keep-alive", b"close")
    assert await wire(unknown, keep * 2) == b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhello"


async def test_a_head_that_comes_again_is_not_for_http_1_0_nor_for_the_last_response() -> None:
    keep = head("GET / HTTP/1.0", "Connection: keep-alive", host=None)
    app = answering(b"hello", headers=[(b"content-length", b"5")])
    once = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n%b\r\nhello"
    # Of the second it is kept, from the third on it is taken.
    assert await wire(app, GET * 3 + keep + GET + LAST) == b"".join(
        once % connection
        for connection in [b""] * 3 + [b"connection: keep-alive\r\n", b"", b"connection: close\r\n"]
    )


# -- without a body ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("app", "fields"),
    [
        (answering(b"hello"), b"content-length: 5\r\n"),
        (answering(b"hello", headers=[(b"content-length", b"5")]), b"content-length: 5\r\n"),
        (answering(b"", headers=[(b"content-length", b"5")]), b"content-length: 5\r\n"),
        (answering(b"hel", b"lo", headers=[(b"content-length", b"9")]), b"content-length: 9\r\n"),
        (answering(b"hel", b"lo"), b""),
        # RFC 9110 section 8.6: no length unless it is that of the GET, which this app has not told.
        (answering(b""), b""),
    ],
)
async def test_a_response_to_head_ends_with_its_head(app: App, fields: bytes) -> None:
    one = b"HTTP/1.1 200 OK\r\n" + fields
    data = head("HEAD / HTTP/1.1") + head("HEAD / HTTP/1.1", "Connection: close")
    assert await wire(app, data) == one + b"\r\n" + one + b"connection: close\r\n\r\n"


@pytest.mark.parametrize("line", ["GET / HTTP/1.1", "HEAD / HTTP/1.1"])
@pytest.mark.parametrize(
    ("app", "block"),
    [
        (answering(b"", status=204), b"204 No Content\r\n"),
        (answering(b"", status=204, headers=[(b"content-length", b"0")]), b"204 No Content\r\n"),
        (answering(b"", b"", status=204), b"204 No Content\r\n"),
        (answering(b"", status=304), b"304 Not Modified\r\n"),
        (answering(b"", b"", status=304), b"304 Not Modified\r\n"),
        (answering(b"", status=304, headers=[(b"content-length", b"5")]), b"304 Not Modified\r\ncontent-length: 5\r\n"),
        (
            answering(b"", b"", status=304, headers=[(b"content-length", b"5")]),
            b"304 Not Modified\r\ncontent-length: 5\r\n",
        ),
    ],
)  # fmt: skip
async def test_204_and_304_end_with_their_head(app: App, block: bytes, line: str) -> None:
    one = b"HTTP/1.1 " + block
    data = head(line) + head(line, "Connection: close")
    assert await wire(app, data) == one + b"\r\n" + one + b"connection: close\r\n\r\n"


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize("parts", [(b"x",), (b"x", b"")])
async def test_a_body_where_there_is_none_is_an_error_of_the_app(
    status: int, parts: tuple[bytes, ...]
) -> None:
    response = await answer(answering(*parts, status=status))
    assert (response.status, response.header("connection")) == (500, "close")


async def test_a_204_for_head_has_no_length_of_a_body_that_it_cannot_have() -> None:
    data = await wire(answering(b"x", status=204), head("HEAD / HTTP/1.1", "Connection: close"))
    assert data == b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n"


async def test_a_205_has_a_length_of_0() -> None:
    assert (await answer(answering(b"", status=205))).header("content-length") == "0"


# -- wrong lengths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "app",
    [
        answering(b"hello", headers=[(b"content-length", b"4")]),
        answering(b"hello", headers=[(b"content-length", b"6")]),
        answering(b"", headers=[(b"content-length", b"1")]),
        answering(b"x", headers=[(b"content-length", b"0")]),
        answering(b"hello", b"", headers=[(b"content-length", b"4")]),
    ],
)
@pytest.mark.parametrize("line", ["GET / HTTP/1.1", "GET / HTTP/1.0"])
async def test_a_wrong_length_is_a_500_while_nothing_is_on_the_wire(app: App, line: str) -> None:
    async with bare(app) as server, server.connect() as client:
        await client.send(head(line))
        response = await client.read_response()
        assert (response.status, response.header("connection")) == (500, "close")
        assert await client.receive_all() == b""
        assert server.worker.context.counters.faults == {"A5": 1}


@pytest.mark.parametrize(
    "app",
    [
        answering(b"hello", b"!", headers=[(b"content-length", b"5")]),
        answering(b"hello", b"!", b"!", headers=[(b"content-length", b"6")]),
    ],
)
async def test_a_body_over_its_length_is_cut_before_the_excess(app: App) -> None:
    async with bare(app) as server, server.connect() as client:
        await client.send(GET * 2)
        data = await client.receive_all()
        assert data.count(b"HTTP/1.1") == 1
        assert len(data.partition(b"\r\n\r\n")[2]) <= 6
        assert server.worker.context.counters.faults == {"A5": 1}


@pytest.mark.parametrize(
    "app",
    [
        answering(b"hello", b"!", headers=[(b"content-length", b"7")]),
        answering(b"hello", headers=[(b"content-length", b"7")], ends=False),
        answering(b"hello", ends=False),
        answering(b"hello", b"", ends=False),
        answering(b"", ends=False),
    ],
)
async def test_a_response_that_is_never_whole_is_seen_to_be_truncated(app: App) -> None:
    async with bare(app) as server, server.connect() as client:
        await client.send(GET * 2)
        response = await client.read_response()
        assert (response.status, response.complete) == (200, False)
        assert await client.receive_all() == b""
        assert server.worker.context.counters.faults == {"A5": 1}


@pytest.mark.parametrize(
    "app", [answering(b"hello", ends=False), answering(b"x" * 300_000, b"y", ends=False)]
)
async def test_a_truncated_response_that_ends_with_the_connection_ends_with_a_reset(app: App) -> None:
    async with bare(app) as server, server.connect() as client:
        await client.send(OLD)
        with pytest.raises(ConnectionResetError):
            while await client.receive():
                pass


async def test_an_app_that_never_answers_or_never_starts_is_a_500() -> None:
    async def silent(scope: Any, receive: Any, send: Any) -> None:
        pass

    async def only_start(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})

    for app in (silent, only_start):
        assert (await answer(app)).status == 500


# -- heads that may not be sent ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x", b"a\r\nset-cookie: evil=1")],
        [(b"x", b"a\r\n\r\n<script>")],
        [(b"x\r\nset-cookie", b"evil=1")],
        [(b"x", b"a\nset-cookie: evil=1")],
        [(b"location", b"/\0evil=1")],
        [(b"proxy-connection", b"keep-alive")],
        [(b"connection", b"evil=1")],
        [(b"transfer-encoding", b"evil=1")],
        [(b"content-length", b"5, evil=1")],
        [("x", "evil=1")],
    ],
)
async def test_a_head_that_may_not_be_sent_is_a_500_and_nothing_of_it_gets_out(headers: Any) -> None:
    data = await wire(answering(b"hello", headers=headers), GET * 2)
    assert data.startswith(b"HTTP/1.1 500 ")
    assert data.count(b"HTTP/1.1") == 1
    assert b"evil" not in data
    assert b"hello" not in data


async def test_an_app_may_mend_a_refused_head() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            with pytest.raises(Exception, match="x-bad"):
                await send({"type": "http.response.start", "status": 200, "headers": [(b"x-bad", b"\n")]})
            await respond(send, b"mended", 418)

    response = await answer(app)
    assert (response.status, response.body, response.header("connection")) == (418, b"mended", None)


@pytest.mark.parametrize("status", [101, 199, 1000, "200", None])
async def test_a_status_that_is_none_is_a_500(status: Any) -> None:
    assert (await answer(answering(b"", status=status))).status == 500


# -- the connection ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [(b"hello",), (b"hel", b"lo")])
async def test_the_app_may_close_the_connection(parts: tuple[bytes, ...]) -> None:
    data = await wire(answering(*parts, headers=[(b"connection", b"close")]), GET * 3)
    assert data.count(b"HTTP/1.1 200") == 1
    assert data.count(b"connection: close\r\n") == 1


async def test_the_app_cannot_keep_what_the_peer_closes() -> None:
    data = await wire(answering(b"", headers=[(b"connection", b"keep-alive")]), LAST)
    assert (data.count(b"connection: close"), data.count(b"keep-alive")) == (1, 0)


async def test_date_and_server_and_alt_svc_are_settings() -> None:
    on = {"include_date_header": True, "include_server_header": True, "alt_svc_headers": ['h3=":443"']}
    response = await answer(answering(b""), **on)
    assert (response.header("server"), response.header("alt-svc")) == ("trioserve", 'h3=":443"')
    assert response.header("date")
    names = [name for name, _ in (await answer(answering(b""))).headers]
    assert names == [b"content-length"]


@pytest.mark.parametrize("length", [[], [(b"content-length", b"0")]])
async def test_the_apps_own_date_and_server_stand_alone(length: list[tuple[bytes, bytes]]) -> None:
    mine = [(b"date", b"Thu, 01 Jan 1970 00:00:00 GMT"), (b"server", b"mine")]
    response = await answer(
        answering(b"", headers=mine + length), include_date_header=True, include_server_header=True
    )
    assert [field for field in response.headers if field[0] in (b"date", b"server")] == mine


async def test_a_head_that_comes_again_has_the_date_of_its_second(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: Any
) -> None:
    made = count()
    monkeypatch.setattr(response_heads, "formatdate", lambda *_, **__: f"{next(made)}")
    app = answering(b"hello", headers=[(b"content-length", b"5")])
    async with bare(app, include_date_header=True) as server, server.connect() as client:
        dates = []
        for _ in range(5):
            dates.append((await client.get("/")).header("date"))
            await trio.sleep(1)
    assert len(set(dates)) == 5


# -- size ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [(bytes(range(256)) * 20_000,), tuple([bytes(range(256)) * 1000] * 20)])
async def test_a_large_body_reaches_a_slow_reader_whole(hub: str, parts: tuple[bytes, ...]) -> None:
    async with bare(answering(*parts), hub=hub) as server, server.connect(receive_buffer=4096) as client:
        await client.send(LAST)
        await trio.testing.wait_all_tasks_blocked(0.01)
        response = await client.read_response()
        assert response.complete
        assert response.body == b"".join(parts)
