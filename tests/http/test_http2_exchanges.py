"""Requests and responses over HTTP/2 as the app sees them, on real sockets: scope, bodies, framing, fields, misuse."""

from __future__ import annotations

import itertools
import logging
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.apps import echo, hello, read_body, respond
from tests.http.http2_client import POST, data_frame
from tests.http.http2_serving import connected, get, served
from trioserve.errors import ClientDisconnected
from trioserve.testing import serving

NO_ERROR, INTERNAL_ERROR, CANCEL = 0, 2, 8


def app_of(handler: Any) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await handler(scope, receive, send)

    return app


async def start(send: Any, status: int = 200, *fields: tuple[bytes, bytes], **more: Any) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(fields), **more})


async def body(send: Any, data: bytes = b"", *, more: bool = False) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


# -- requests ------------------------------------------------------------------------------------------------


async def test_the_scope_says_what_was_asked(http2_engine: str) -> None:
    seen: list[Any] = []

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)
        await respond(send)

    async with served(app_of(handler), http2_engine=http2_engine) as (server, client):
        await client.request(get(b"/a%20b?c=d", (b"x", b"1"), (b"te", b"trailers")))
        (scope,) = seen
        assert scope["http_version"] == "2"
        assert (scope["method"], scope["path"], scope["raw_path"], scope["query_string"]) == (
            "GET", "/a b", b"/a%20b", b"c=d",
        )  # fmt: skip
        assert scope["headers"] == [(b"host", b"a"), (b"x", b"1"), (b"te", b"trailers")]
        assert scope["scheme"] == "http"
        assert scope["server"] == ("127.0.0.1", server.port)
        assert scope["client"][0] == "127.0.0.1"
        assert set(scope["extensions"]) == {
            "http.response.zerocopysend", "http.response.pathsend", "http.response.early_hint",
            "http.response.trailers",
        }  # fmt: skip


@pytest.mark.parametrize("size", [0, 1, 1000, 65535])
async def test_a_body_comes_back(http2_engine: str, hub: str, size: int) -> None:
    data = random.Random(size).randbytes(size)
    async with served(echo, http2_engine=http2_engine, hub=hub) as (_, client):
        response = await client.request(POST, data)
        assert (response.status, response.body, response.ended) == (200, data, True)
        assert response.field(b"content-length") == b"%d" % size
        assert response.field(b"server") == b"trioserve"
        assert response.field(b"date")


async def test_many_streams_at_once_each_get_their_own(http2_engine: str, hub: str) -> None:
    async with served(echo, http2_engine=http2_engine, hub=hub) as (server, client):
        ids = [await client.open(get(b"/", method=b"POST"), end=False) for _ in range(40)]
        for number, stream_id in enumerate(ids):
            await client.send_body(stream_id, b"%d" % number, end=True)
        for number, stream_id in enumerate(ids):
            assert (await client.response(stream_id)).body == b"%d" % number
        await wait_all_tasks_blocked()
        assert server.worker.context.in_flight == 0
        assert server.worker.context.requests_served == 40


async def test_a_body_larger_than_the_windows_is_taken_as_the_app_reads(http2_engine: str, hub: str) -> None:
    data = random.Random(1).randbytes(3_000_000)
    async with served(echo, http2_engine=http2_engine, hub=hub) as (_, client):
        stream_id = await client.open(POST, end=False)
        sent = 0
        while sent < len(data):
            room = min(client.peer.connection.local_flow_control_window(stream_id), 16384)
            if not room:
                assert await client.read_some()
                continue
            await client.send_body(stream_id, data[sent : sent + room], end=sent + room >= len(data))
            sent += room
        assert (await client.response(stream_id)).body == data


async def test_no_more_than_a_window_of_body_is_kept_for_an_app_that_does_not_read(http2_engine: str) -> None:
    reading = trio.Event()

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await reading.wait()
        await respond(send, b"%d" % len(await read_body(receive)))

    async with served(app_of(handler), http2_engine=http2_engine) as (server, client):
        stream_id = await client.open(POST, end=False)
        sent = 0
        while room := min(client.peer.connection.local_flow_control_window(stream_id), 16384):
            await client.send_body(stream_id, b"x" * room)
            sent += room
        await wait_all_tasks_blocked(0.02)
        assert client.peer.connection.local_flow_control_window(stream_id) == 0
        assert sent == server.worker.context.config.h2_stream_window
        # A sibling is served meanwhile.
        reading.set()
        assert (await client.request(POST, b"abc")).body == b"3"
        await client.read_until(lambda peer: peer.connection.local_flow_control_window(stream_id) > 0)
        await client.send_body(stream_id, b"", end=True)
        assert (await client.response(stream_id)).body == b"%d" % sent


async def test_bodies_that_are_not_read_hold_up_no_other(http2_engine: str) -> None:
    """Whatever streams are open, each may send its window: apps take uploads in turn."""
    reading = trio.Event()

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/later":
            await reading.wait()
        await respond(send, b"%d" % len(await read_body(receive)))

    async with served(app_of(handler), http2_engine=http2_engine) as (server, client):
        config = server.worker.context.config
        window = config.h2_stream_window
        waiting = []
        for _ in range(config.h2_max_concurrent_streams - 1):
            waiting.append(await client.open(get(b"/later", method=b"POST"), end=False))
            for at in range(0, window, 16384):
                await client.send_body(waiting[-1], b"x" * 16384, end=at + 16384 == window)
        assert (await client.request(POST, b"x" * window)).body == b"%d" % window
        reading.set()
        for stream_id in waiting:
            assert (await client.response(stream_id)).body == b"%d" % window


async def test_a_body_in_tiny_frames_takes_no_more_memory_than_its_window(http2_engine: str) -> None:
    reading = trio.Event()

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await reading.wait()
        await respond(send, await read_body(receive))

    data = random.Random(1).randbytes(8000)
    async with served(app_of(handler), http2_engine=http2_engine) as (server, client):
        stream_id = await client.open(POST, end=False)
        await client.send_raw(b"".join(data_frame(stream_id, data[at : at + 2]) for at in range(0, 8000, 2)))
        (connection,) = server.worker.context.connections
        with trio.fail_after(10):
            while not connection.streams:
                await trio.sleep(0.001)
            exchange = connection.streams[stream_id].exchange
            while exchange.received_bytes < len(data):
                await trio.sleep(0.001)
        assert sum(map(sys.getsizeof, exchange.received)) < 1.1 * len(data)
        reading.set()
        await client.send_raw(data_frame(stream_id, end=True))
        assert (await client.response(stream_id)).body == data


async def test_tiny_frames_are_looked_at_in_turns() -> None:
    """Thousands arrive at once: between two turns of the others only some of them are looked at."""
    reading = trio.Event()

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await reading.wait()
        await respond(send, await read_body(receive))

    async with served(app_of(handler)) as (server, client), trio.open_nursery() as nursery:
        stream_id = await client.open(POST, end=False)
        (connection,) = server.worker.context.connections
        while not connection.streams:
            await trio.lowlevel.checkpoint()
        exchange = connection.streams[stream_id].exchange
        nursery.start_soon(
            client.send_raw, data_frame(stream_id, b"x") * 12_000 + data_frame(stream_id, end=True)
        )
        seen = [0]
        while not exchange.ended:
            await trio.lowlevel.checkpoint()
            seen.append(exchange.received_bytes)
        assert max(after - before for before, after in itertools.pairwise(seen)) <= 3 * 512
        reading.set()
        assert (await client.response(stream_id)).body == b"x" * 12_000


async def test_100_is_sent_when_the_app_first_reads(http2_engine: str) -> None:
    asked = trio.Event()

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await asked.wait()
        await respond(send, await read_body(receive))

    async with served(app_of(handler), http2_engine=http2_engine) as (_, client):
        stream_id = await client.open([*POST, (b"expect", b"100-continue")], end=False)
        await wait_all_tasks_blocked(0.02)
        response = client.peer.responses[stream_id]
        assert not response.interim
        asked.set()
        await client.read_until(lambda _: bool(response.interim))
        assert response.interim == [(100, [])]
        await client.send_body(stream_id, b"abc", end=True)
        assert (await client.response(stream_id)).body == b"abc"
        assert len(response.interim) == 1


async def test_a_fresh_context_for_each_request(http2_engine: str) -> None:
    import contextvars

    mark: contextvars.ContextVar[str] = contextvars.ContextVar("mark", default="none")
    found: list[str] = []

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        found.append(mark.get())
        mark.set(scope["path"])
        await respond(send)

    async with served(app_of(handler), http2_engine=http2_engine) as (_, client):
        for number in range(5):
            await client.request(get(b"/%d" % number))
    assert found == ["none"] * 5


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ([(b":method", b"CONNECT"), (b":authority", b"a:1")], 501),
        ([*get(method=b"CONNECT"), (b":protocol", b"connect-ip")], 501),
        ([*get(method=b"POST"), (b"content-length", b"11")], 413),
    ],
)
async def test_what_cannot_be_served_is_refused_on_its_stream(
    http2_engine: str, fields: Any, status: int
) -> None:
    async with served(hello, http2_engine=http2_engine, max_body_size=10) as (server, client):
        stream_id = await client.open(fields, end=False)
        await client.read_until(lambda peer: peer.responses[stream_id].ended)
        assert client.peer.responses[stream_id].status == status
        assert server.worker.context.counters.refused == {str(status): 1}
        assert (await client.request()).status == 200


async def test_a_body_that_grows_too_large_gets_413(http2_engine: str) -> None:
    async with served(echo, http2_engine=http2_engine, max_body_size=10) as (server, client):
        stream_id = await client.open(POST, end=False)
        await client.send_body(stream_id, b"x" * 11)
        await client.read_until(lambda peer: peer.responses[stream_id].reset is not None)
        response = client.peer.responses[stream_id]
        assert (response.status, response.reset) == (413, NO_ERROR)
        assert (await client.request()).status == 200
        assert server.failure is None


# -- responses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize("status", [200, 204, 304])
async def test_head_and_bodiless_statuses_have_no_body(http2_engine: str, method: bytes, status: int) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await start(send, status, (b"content-length", b"5"))
        await body(send, b"hello" if scope["method"] == "HEAD" or status == 200 else b"")

    async with served(app_of(handler), http2_engine=http2_engine) as (_, client):
        response = await client.request(get(method=method))
        assert (response.status, response.ended) == (status, True)
        assert response.body == (b"hello" if method == b"GET" and status == 200 else b"")
        assert response.field(b"content-length") == (None if status == 204 else b"5")


async def test_parts_leave_as_they_are_sent_and_fields_are_lower_case(http2_engine: str, hub: str) -> None:
    go_on = trio.Event()

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await start(
            send, 201, (b"X-Thing", b" a "), (b"connection", b"close"), (b"transfer-encoding", b"chunked")
        )
        await body(send, b"one", more=True)
        await go_on.wait()
        await body(send, b"two", more=True)
        await body(send, b"")

    async with served(app_of(handler), http2_engine=http2_engine, hub=hub) as (_, client):
        stream_id = await client.open()
        await client.read_until(lambda peer: peer.responses[stream_id].body == b"one")
        go_on.set()
        response = await client.response(stream_id)
        assert (response.status, response.body) == (201, b"onetwo")
        names = [name for name, _ in response.fields]
        assert names == [b"x-thing", b"date", b"server"]
        assert response.field(b"x-thing") == b"a"


async def test_trailers_and_early_hints(http2_engine: str) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.early_hint", "links": [b"</a.css>; rel=preload"]})
        await start(send, 200, trailers=True)
        await body(send, b"x", more=True)
        await body(send, b"y")
        await send({"type": "http.response.trailers", "headers": [(b"A", b"1")], "more_trailers": True})
        await send({"type": "http.response.trailers", "headers": [(b"b", b"2")]})

    async with served(app_of(handler), http2_engine=http2_engine) as (_, client):
        response = await client.request(get(b"/", (b"te", b"trailers")))
        assert response.interim == [(103, [(b"link", b"</a.css>; rel=preload")])]
        assert (response.body, response.trailers, response.ended) == (
            b"xy",
            [(b"a", b"1"), (b"b", b"2")],
            True,
        )
        response = await client.request()
        assert (response.body, response.trailers, response.ended) == (b"xy", None, True)


@pytest.mark.parametrize(
    "fields",
    [
        [(b"a", b"x\r\ny: z")], [(b"a", "text")], [(b"", b"")], [(b"keep-alive", b"1")], [(b"te", b"x")],
        [(b"connection", b"x-mine")], [(b"transfer-encoding", b"gzip")], [(b"content-length", b"x")],
        [(b"content-length", b"1"), (b"content-length", b"1")], [b"x"], [(b"a b", b"")], 5,
    ],
)  # fmt: skip
async def test_fields_that_may_not_be_sent_are_the_apps_error(http2_engine: str, fields: Any) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": fields})

    async with served(app_of(handler), http2_engine=http2_engine, on_app_error="contain") as (server, client):
        assert (await client.request()).status == 500
        assert server.worker.context.counters.faults == {"A5": 1}


@pytest.mark.parametrize("status", [100, 1000, "200", None, True])
async def test_a_status_that_is_none_is_the_apps_error(http2_engine: str, status: Any) -> None:
    async with served(
        app_of(lambda _s, _r, send: start(send, status)), http2_engine=http2_engine, on_app_error="contain"
    ) as (_, client):
        assert (await client.request()).status == 500


@pytest.mark.parametrize("parts", [[b"123456"], [b"123", b"456"], [b"1", b""], [b"1"], [b"12345", b"6"]])
async def test_a_wrong_content_length_is_reset_before_the_excess(
    http2_engine: str, parts: list[bytes]
) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await start(send, 200, (b"content-length", b"5"))
        for number, part in enumerate(parts):
            await body(send, part, more=number < len(parts) - 1)

    async with served(app_of(handler), http2_engine=http2_engine, on_app_error="contain") as (_, client):
        stream_id = await client.open()
        response = await client.response(stream_id)
        if response.status == 200:
            assert response.reset == INTERNAL_ERROR
            assert len(response.body) <= 5
        else:
            assert response.status == 500
        assert (await client.request()).status in (200, 500), "the connection lives"


async def test_an_early_response_asks_the_client_to_send_no_more(http2_engine: str) -> None:
    async with served(hello, http2_engine=http2_engine) as (_, client):
        stream_id = await client.open(POST, end=False)
        await client.read_until(lambda peer: peer.responses[stream_id].reset is not None)
        response = client.peer.responses[stream_id]
        assert (response.status, response.body, response.ended, response.reset) == (
            200,
            b"hello",
            True,
            NO_ERROR,
        )
        assert (await client.request()).status == 200


async def test_the_debug_extension_is_taken(http2_engine: str) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        assert "http.response.debug" in scope["extensions"]
        await send({"type": "http.response.debug", "info": {"template": "x"}})
        await respond(send)

    async with served(app_of(handler), http2_engine=http2_engine, debug_extension=True) as (_, client):
        assert (await client.request()).status == 200


async def test_misuse_is_named_and_contained(http2_engine: str) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/nothing":
            return
        if scope["path"] == "/half":
            await start(send)
            await body(send, b"x", more=True)
        elif scope["path"] == "/twice":
            await respond(send)
            await body(send, b"y")
        elif scope["path"] == "/text":
            await start(send)
            await send({"type": "http.response.body", "body": "text"})

    async with served(app_of(handler), http2_engine=http2_engine, on_app_error="contain") as (server, client):
        assert (await client.request(get(b"/nothing"))).status == 500
        assert (await client.request(get(b"/half"))).reset == INTERNAL_ERROR
        assert (await client.request(get(b"/twice"))).body == b"hello"
        assert (await client.request(get(b"/text"))).status == 500
        await wait_all_tasks_blocked()
        assert server.worker.context.counters.faults == {"A5": 4}


# -- files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(random.Random(7).randbytes(1_000_000))
    return path


@pytest.mark.parametrize("event", ["http.response.pathsend", "http.response.zerocopysend"])
async def test_files_are_sent_under_flow_control(http2_engine: str, hub: str, file: Path, event: str) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        assert event in scope["extensions"]
        await start(send, 200, (b"content-length", b"1000000"))
        if event.endswith("pathsend"):
            await send({"type": event, "path": str(file)})
        else:
            with file.open("rb") as opened:
                await send({"type": event, "file": opened, "count": 400_000, "more_body": True})
                await send({"type": event, "file": opened})

    async with served(app_of(handler), http2_engine=http2_engine, hub=hub) as (_, client):
        for _ in range(2):
            response = await client.request()
            assert response.body == file.read_bytes()
            assert response.ended


async def test_a_file_that_is_missing_is_a_500_and_one_that_shrinks_a_reset(
    http2_engine: str, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        if scope["path"] == "/missing":
            await send({"type": "http.response.pathsend", "path": str(file) + ".not"})
            return
        with file.open("rb") as opened:
            message = {"type": "http.response.zerocopysend", "file": opened, "offset": 0, "count": 1_000_000}
            await body(send, b"head", more=True)
            await wait_all_tasks_blocked()
            import os

            os.truncate(file, 500_000)
            from trioserve.static.open_file import OpenFile

            stat = os.fstat(opened.fileno())
            lies = OpenFile(os.dup(opened.fileno()), stat)
            try:
                await send(message | {"file": lies})
            finally:
                lies.release()

    with caplog.at_level(logging.CRITICAL, "trioserve.tests"):
        async with served(app_of(handler), http2_engine=http2_engine) as (server, client):
            assert (await client.request(get(b"/missing"))).status == 500
            response = await client.request(get(b"/shrinks"))
            assert response.reset == INTERNAL_ERROR
            assert len(response.body) == 500_004
            assert server.worker.context.counters.faults == {"C4": 2}
            assert server.failure is None


# -- errors of the app ---------------------------------------------------------------------------------------


async def test_an_app_that_dies_mid_stream_resets_its_stream_and_no_other(http2_engine: str) -> None:
    die = trio.Event()

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/other":
            await die.wait()
            await wait_all_tasks_blocked()
            await respond(send, b"alive")
            return
        if scope["path"] == "/late":
            await start(send)
            await body(send, b"part", more=True)
        await die.wait()
        raise ValueError("dead")

    async with served(app_of(handler), http2_engine=http2_engine, on_app_error="contain") as (server, client):
        early, late, other = [await client.open(get(path)) for path in (b"/early", b"/late", b"/other")]
        await wait_all_tasks_blocked(0.01)
        assert server.worker.context.in_flight == 3
        die.set()
        assert (await client.response(early)).status == 500
        response = await client.response(late)
        assert (response.body, response.reset, response.ended) == (b"part", INTERNAL_ERROR, False)
        assert (await client.response(other)).body == b"alive"
        assert server.worker.context.counters.faults == {"A1": 1, "A2": 1}


async def test_an_error_after_the_response_is_judged_and_the_response_stays(http2_engine: str) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await respond(send)
        raise ValueError("later")

    async with served(app_of(handler), http2_engine=http2_engine, on_app_error="contain") as (server, client):
        response = await client.request()
        assert (response.body, response.ended, response.reset) == (b"hello", True, None)
        await wait_all_tasks_blocked()
        assert server.worker.context.counters.faults == {"A4": 1}


async def test_an_author_sees_the_traceback(http2_engine: str) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("a message for the author")

    async with served(app_of(handler), http2_engine=http2_engine, on_app_error="contain") as (server, client):
        server.worker.context.development = True
        response = await client.request()
        assert response.status == 500
        assert b"a message for the author" in response.body
        assert b"default-src 'none'" in (response.field(b"content-security-policy") or b"")
        response = await client.request(get(method=b"HEAD"))
        assert (response.status, response.body) == (500, b"")


async def test_a_leaked_nursery_is_fatal_and_the_siblings_finish(http2_engine: str) -> None:
    leaked = trio.Event()

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/leak":
            await trio.open_nursery().__aenter__()
            leaked.set()
            return
        await leaked.wait()
        await wait_all_tasks_blocked()
        await respond(send, b"alive")

    async with serving(app_of(handler), h2c=True, http2_engine=http2_engine) as server:
        async with connected(server) as client:
            sibling = await client.open(get(b"/sibling"))
            assert (await client.request(get(b"/leak"))).status == 500
            assert (await client.response(sibling)).body == b"alive"
            await client.read_to_end()
            assert client.peer.goaway is not None
        assert server.failure is not None
        assert server.failure.row == "B1"
    assert server.worker.context.counters.faults == {"B1": 1}


async def test_system_exit_drains(http2_engine: str) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        raise SystemExit(3)

    async with serving(app_of(handler), h2c=True, http2_engine=http2_engine) as server:
        async with connected(server) as client:
            assert (await client.request()).status == 503
            await client.read_to_end()
        assert server.failure is not None
        assert (server.failure.row, server.failure.exit_code) == ("X1", 3)


# -- what outlives, what waits -------------------------------------------------------------------------------


async def test_a_task_that_outlives_its_request_is_told_that_it_is_over(http2_engine: str) -> None:
    told: list[Any] = []

    async def outliving(receive: Any, send: Any) -> None:
        told.append(await receive())
        told.append(await receive())
        with pytest.raises(ClientDisconnected):
            await body(send, b"x", more=True)
        told.append("end")

    async with trio.open_nursery() as nursery:

        async def handler(scope: Any, receive: Any, send: Any) -> None:
            nursery.start_soon(outliving, receive, send)
            await start(send)
            await body(send, b"x", more=True)
            await wait_all_tasks_blocked()

        async with served(app_of(handler), http2_engine=http2_engine, on_app_error="contain") as (_, client):
            await client.request(POST)
            await wait_all_tasks_blocked()
    assert [message if isinstance(message, str) else message["type"] for message in told] == [
        "http.request", "http.disconnect", "end",
    ]  # fmt: skip


async def test_admission_bounds_the_requests_of_all_streams(http2_engine: str) -> None:
    go_on = trio.Event()

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await go_on.wait()
        await respond(send)

    async with served(
        app_of(handler), http2_engine=http2_engine, max_concurrent_requests=2, request_queue_size=1,
        request_queue_timeout=10,
    ) as (server, client):  # fmt: skip
        ids = [await client.open() for _ in range(4)]
        await client.read_until(lambda peer: any(response.over for response in peer.responses.values()))
        refused = [response for response in client.peer.responses.values() if response.over]
        assert [response.status for response in refused] == [503]
        assert refused[0].field(b"retry-after") == b"1"
        go_on.set()
        statuses = [(await client.response(stream_id)).status for stream_id in ids]
        assert sorted(statuses) == [200, 200, 200, 503]
        await wait_all_tasks_blocked()
        assert server.worker.context.admission.admitted == 0
