"""receive(): the request body in parts, its end, back-pressure, misuse, and what a broken body looks like."""

from __future__ import annotations

import functools
import select
import time
from typing import Any

import pytest
import trio
import trio.testing

from trioserve import testing
from trioserve.errors import ConcurrentCall
from trioserve.testing import encode_request, no_leaks

from ..apps import read_body, respond

pytestmark = pytest.mark.modes("tls", "http2")

serving = functools.partial(testing.serving, lifespan="off")


def request_head(length: int | None, *fields: tuple[str, str]) -> bytes:
    framing = ("transfer-encoding", "chunked") if length is None else ("content-length", str(length))
    return encode_request("POST", headers=[framing, *fields])


# -- the body in parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
async def test_each_part_is_handed_over_as_it_arrives(engine: str, hub: str, chunked: bool) -> None:
    send_part, receive_part = trio.open_memory_channel[Any](10)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            await send_part.send(message)
            if not message["more_body"]:
                break
        await respond(send)

    def part(data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if chunked else data

    async with serving(app, http_engine=engine, hub=hub) as server, server.connect() as client:
        await client.send(request_head(None if chunked else 6) + part(b"ab"))
        assert await receive_part.receive() == {"type": "http.request", "body": b"ab", "more_body": True}
        await client.send(part(b"cd"))
        assert await receive_part.receive() == {"type": "http.request", "body": b"cd", "more_body": True}
        await client.send(part(b"ef") + (b"0\r\n\r\n" if chunked else b""))
        assert await receive_part.receive() == {"type": "http.request", "body": b"ef", "more_body": False}
        assert (await client.read_response()).status == 200


async def test_a_request_without_a_body_has_one_empty_part(engine: str) -> None:
    messages = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        messages.append(await receive())
        await respond(send)

    async with serving(app, http_engine=engine) as server:
        await server.get()
    assert messages == [{"type": "http.request", "body": b"", "more_body": False}]


async def test_after_the_response_receive_says_disconnect_though_the_client_is_there() -> None:
    messages = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send)
        messages.append(await receive())
        messages.append(await receive())

    async with serving(app) as server, server.connect() as client:
        for _ in range(2):
            assert (await client.request("POST", body=b"unread")).body == b"hello"
    assert messages == [{"type": "http.disconnect"}] * 4
    assert server.failure is None


@pytest.mark.parametrize("unread", [0, 5])
async def test_a_task_that_waits_in_receive_is_told_when_the_response_is_complete(
    hub: str, unread: int
) -> None:
    tell, told = trio.open_memory_channel[Any](1)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def watch() -> None:
            tell.send_nowait(await receive())

        if not unread:
            await receive()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await respond(send)

    async with serving(app, hub=hub) as server:
        for _ in range(2):
            async with server.connect() as client:
                await client.send(request_head(unread))
                with trio.fail_after(30):
                    assert (await client.read_response()).status == 200
                    assert await told.receive() == {"type": "http.disconnect"}


@pytest.mark.modes("tls", because="a stream is read by nobody else")
async def test_a_task_that_has_outlived_its_request_leaves_the_next_one_alone(engine: str, hub: str) -> None:
    """It waits for the body, which arrives unseen while the response is completed, and is thrown away."""
    tell, told = trio.open_memory_channel[Any](1)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def watch() -> None:
            tell.send_nowait(await receive())

        if scope["method"] == "GET":
            await respond(send)
            return
        background.start_soon(watch)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello", "more_body": True})
        (connection,) = server.worker.context.connections
        client.sock.send(b"0123456789")
        assert select.select([connection.transport.sock], [], [], 30)[0]
        await send({"type": "http.response.body", "body": b""})

    async with trio.open_nursery() as background:
        async with serving(app, http_engine=engine, hub=hub) as server, server.connect() as client:
            await client.send(request_head(10))
            with trio.fail_after(30):
                assert (await client.read_response()).body == b"hello"
                assert await told.receive() == {"type": "http.disconnect"}
                (connection,) = server.worker.context.connections
                assert connection.idle
                assert (await client.get()).body == b"hello"
        assert server.failure is None


@pytest.mark.parametrize("size", [10, 100_000])
async def test_what_the_app_left_unread_is_no_part_of_the_next_request(engine: str, size: int) -> None:
    paths = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        paths.append(scope["path"])
        if scope["path"] == "/read-one-part":
            await receive()
        await respond(send)

    async with serving(app, http_engine=engine) as server:
        for path in ("/read-none", "/read-one-part"):
            async with server.connect() as client:
                await client.send(encode_request("POST", path, body=b"GET /smuggled HTTP/1.1\r\n\r\n" * size))
                await client.send(encode_request("GET", "/next"))
                assert (await client.read_response()).status == 200
        # Over HTTP/2 the second request has a task of its own, which may not have begun.
        await server.wait_idle()
        await server.get("/last")
    assert "/smuggled" not in paths
    assert paths[-1] == "/last"


@pytest.mark.parametrize("kept", [True, False])
async def test_an_answer_before_the_body_reaches_a_client_that_is_still_sending(
    engine: str, kept: bool
) -> None:
    """RFC 9112 section 9.6: closing with unread bytes would send an RST that destroys the answer."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, b"no" * 10, 413)

    fields = () if kept else (("connection", "close"),)
    async with serving(app, http_engine=engine, linger_timeout=5) as server, server.connect() as client:
        await client.send(request_head(900_000, *fields) + b"x" * 450_000)
        # It has been answered; the client learns of it only when it has sent the rest.
        await trio.testing.wait_all_tasks_blocked(0.02)
        await client.send(b"x" * 450_000)
        response = await client.read_response()
    assert (response.status, response.body) == (413, b"no" * 10)


# -- Expect: 100-continue ------------------------------------------------------------------------------------


async def test_100_continue_is_sent_when_the_app_first_asks_for_the_body(engine: str) -> None:
    asked = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asked.wait()
        await respond(send, await read_body(receive))

    async with serving(app, http_engine=engine) as server, server.connect() as client:
        await client.send(request_head(2, ("expect", "100-continue")))
        with trio.move_on_after(0.05) as early:
            await client.receive()
        assert early.cancelled_caught
        asked.set()
        assert await client.receive_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b"ok")
        assert (await client.read_response()).body == b"ok"


async def test_100_continue_is_sent_while_the_head_of_the_response_is_held_back(engine: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": await read_body(receive)})

    async with serving(app, http_engine=engine) as server, server.connect() as client:
        await client.send(request_head(2, ("expect", "100-continue")))
        with trio.fail_after(30):
            assert await client.receive_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b"ok")
        assert (await client.read_response()).body == b"ok"


@pytest.mark.modes("tls", because="chunks")
async def test_no_100_continue_once_the_response_has_begun(engine: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        assert (await receive())["body"] == b"ok"
        await send({"type": "http.response.body", "body": b"2"})

    async with serving(app, http_engine=engine) as server, server.connect() as client:
        await client.send(request_head(2, ("expect", "100-continue")))
        await client.receive_until(b"1\r\n1\r\n")
        await client.send(b"ok")
        assert (await client.receive_all()) == b"1\r\n2\r\n0\r\n\r\n"
    assert server.failure is None


# -- a body that breaks off ----------------------------------------------------------------------------------


async def ask_twice(scope: Any, receive: Any, send: Any) -> None:
    """Reads the body; asks once more behind its end, as frameworks do."""
    while (message := await receive())["type"] != "http.disconnect":
        pass
    assert message == {"type": "http.disconnect"}
    assert await receive() == {"type": "http.disconnect"}


@pytest.mark.modes("tls", because="chunks")
async def test_a_malformed_body_ends_in_disconnect_and_is_answered_with_400(engine: str) -> None:
    async with serving(ask_twice, http_engine=engine) as server, server.connect() as client:
        await client.send(request_head(None) + b"2\r\nok\r\n")
        await trio.testing.wait_all_tasks_blocked(0.01)  # the app waits for more
        await client.send(b"no chunk\r\n")
        with trio.fail_after(30):
            response = await client.read_response()
        assert response.status == 400
        assert await client.receive() == b""
    assert server.failure is None


async def test_a_body_over_the_limit_ends_in_disconnect_and_is_answered_with_413(engine: str) -> None:
    async with serving(ask_twice, http_engine=engine, max_body_size=10) as server:
        async with server.connect() as client:
            await client.send(request_head(None) + b"8\r\n12345678\r\n")
            await trio.testing.wait_all_tasks_blocked(0.01)  # the app waits for more
            await client.send(b"8\r\n12345678\r\n")
            assert (await client.read_response()).status == 413
        async with server.connect() as client:  # the length says so: the app is not even called
            await client.send(request_head(11))
            assert (await client.read_response()).status == 413
        assert server.worker.context.counters.refused == {"413": 2}
    assert server.failure is None


@pytest.mark.modes("tls", because="chunks")
async def test_a_response_that_has_begun_is_cut_short_when_the_body_proves_malformed(engine: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
        await ask_twice(scope, receive, send)

    async with serving(app, http_engine=engine) as server, server.connect() as client:
        await client.send(request_head(None) + b"2\r\nok\r\n")
        await client.receive_until(b"part\r\n")
        await client.send(b"no chunk\r\n")
        assert await client.receive_all() == b""  # no last chunk
    assert server.failure is None


async def test_a_client_that_ends_in_mid_body_is_told_as_disconnect(engine: str, hub: str) -> None:
    send_event, events = trio.open_memory_channel[str](10)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send_event.send("called")
        await ask_twice(scope, receive, send)
        await send_event.send("told")

    async with no_leaks(), serving(app, http_engine=engine, hub=hub) as server:
        for end in ("send_eof", "reset"):
            async with server.connect() as client:
                await client.send(request_head(100) + b"half")
                assert await events.receive() == "called"
                getattr(client, end)()
                with trio.fail_after(30):
                    assert await events.receive() == "told"
    assert server.failure is None


@pytest.mark.modes("tls", because="chunks")
@pytest.mark.parametrize(
    "rest, kept",
    [(b"2\r\nok\r\n0\r\n\r\n", True), (b"no chunk\r\n", False), (b"ffff\r\nnot all of it", False)],
)
async def test_a_streaming_app_that_does_not_read_the_body_keeps_the_connection_if_the_body_is_sound(
    engine: str, rest: bytes, kept: bool
) -> None:
    go_on = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        await go_on.wait()
        await send({"type": "http.response.body"})

    async with serving(app, http_engine=engine) as server, server.connect() as client:
        await client.send(request_head(None) + b"2\r\nok\r\n")
        await client.receive_until(b"begun\r\n")
        await client.send(rest)
        await trio.testing.wait_all_tasks_blocked(0.01)
        go_on.set()
        assert await client.receive_until(b"0\r\n\r\n") == b"0\r\n\r\n"
        if kept:
            assert (await client.get()).status == 200
        else:
            assert await client.receive() == b""
    assert server.failure is None


# -- misuse --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_first", [False, True])
async def test_two_tasks_in_receive_is_concurrent_call(hub: str, read_first: bool) -> None:
    errors: list[Exception] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if read_first:
            await receive()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked(0.01)
            try:
                await receive()
            except ConcurrentCall as error:
                errors.append(error)
            nursery.cancel_scope.cancel()
        await respond(send)

    async with serving(app, hub=hub) as server, server.connect() as client:
        await client.send(request_head(2) + (b"ab" if read_first else b""))
        assert (await client.read_response()).status == 200
    assert "receive() was called while another task" in str(errors[0])


async def test_a_cancelled_receive_loses_nothing(engine: str, hub: str) -> None:
    waiting = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with trio.move_on_after(0) as scope:
            await receive()
        assert scope.cancelled_caught
        waiting.set()
        await respond(send, await read_body(receive))

    async with serving(app, http_engine=engine, hub=hub) as server, server.connect() as client:
        await client.send(request_head(4))
        await waiting.wait()
        await client.send(b"body")
        assert (await client.read_response()).body == b"body"


# -- back-pressure and fairness ------------------------------------------------------------------------------


@pytest.mark.modes("tls", because="windows do: test_http2_*.py")
async def test_an_app_that_does_not_read_stops_the_client(engine: str) -> None:
    """What the server takes of an upload is what the app has asked for, and one read of 16 KiB with the head."""
    go_on = trio.Event()
    size = 64 * 1024 * 1024

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await go_on.wait()
        total = 1
        while (message := await receive())["more_body"]:
            total += len(message["body"])
        await respond(send)

    async with serving(app, http_engine=engine) as server, server.connect() as client:
        await client.send(request_head(size))
        sent = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.read_response)

            async def upload() -> None:
                nonlocal sent
                while sent < size:
                    sent += 65536
                    await client.send(bytes(65536))

            nursery.start_soon(upload)
            await trio.testing.wait_all_tasks_blocked(0.05)
            (connection,) = server.worker.context.connections
            taken = connection.transport.bytes_read
            assert taken <= 16 * 1024 + 64 * 1024
            assert sent < size // 2  # the rest of what was sent is in the kernel's two buffers
            go_on.set()


@pytest.mark.modes("tls", because="it looks at the socket itself")
async def test_an_upload_that_never_pauses_does_not_starve_another_connection(engine: str) -> None:
    """The kernel holds so much of it that receive() never has to wait."""
    go_on = trio.Event()
    events: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "POST":
            await go_on.wait()
            while (await receive())["more_body"]:
                events.append("part")
                time.sleep(0.003)
        events.append(scope["path"])
        await respond(send)

    async with serving(app, http_engine=engine) as server, trio.open_nursery() as nursery:
        uploader, other = server.connect(), server.connect()
        async with uploader, other:
            nursery.start_soon(uploader.send, encode_request("POST", "/upload", body=bytes(2**21)))
            await trio.testing.wait_all_tasks_blocked(0.05)
            go_on.set()
            other.sock.send(encode_request("GET", "/other"))
            with trio.fail_after(30):
                assert (await other.read_response()).status == 200
                await uploader.receive_until(b"hello")
        first = events.index("/other")
        assert first <= 2, events[: first + 1]
