"""The client goes away: what receive() and send() say, when the handler is cancelled, who is not to blame."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from trioserve import testing
from trioserve.errors import ClientDisconnected, UnexpectedMessage
from trioserve.testing import TestServer, encode_request, no_leaks

from ..apps import read_body, respond

pytestmark = pytest.mark.modes("tls", "http2")

serving = functools.partial(testing.serving, lifespan="off")

Handler = Callable[[Any, Any, Any], Awaitable[None]]


class Handled:
    """An app that says when it is in its handler, and how it has ended."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.entered, self.ended = trio.Event(), trio.Event()
        self.outcome: BaseException | None = None
        self.began = self.lasted = 0.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/ok":
            await respond(send)
            return
        self.began = trio.current_time()
        self.entered.set()
        try:
            await self.handler(scope, receive, send)
        except BaseException as error:
            self.outcome = error
            raise
        finally:
            self.lasted = trio.current_time() - self.began
            self.ended.set()


async def leave(
    server: TestServer, app: Handled, how: str, request: bytes = b"", patience: float = 30
) -> None:
    """Send a request, leave while it is handled, and wait until its handler has ended."""
    async with server.connect() as client:
        await client.send(request or encode_request("GET"))
        await app.entered.wait()
        if how == "reset":
            client.reset()
        elif how == "close":
            client.close()
        else:
            client.send_eof()
        with trio.fail_after(patience):
            await app.ended.wait()


async def check_unharmed(server: TestServer) -> None:
    """The next request is served, and nothing was held against the app."""
    assert (await server.get("/ok")).status == 200
    assert server.failure is None
    assert set(server.worker.context.counters.faults) <= {"C2"}


WAYS = ("eof", "close", "reset")


# -- receive() -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", WAYS)
async def test_receive_says_disconnect_while_the_app_waits_in_it(hub: str, how: str) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        assert await receive() == {"type": "http.request", "body": b"", "more_body": False}
        assert await receive() == {"type": "http.disconnect"}

    app = Handled(handler)
    async with no_leaks(), serving(app, hub=hub) as server:
        await leave(server, app, how)
        await check_unharmed(server)
    assert app.outcome is None


@pytest.mark.parametrize("how", WAYS)
async def test_receive_says_disconnect_at_once_without_a_checkpoint(hub: str, how: str) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await trio.testing.wait_all_tasks_blocked(0.02)  # the client leaves
        with trio.CancelScope() as cancelled:
            cancelled.cancel()
            assert await receive() == {"type": "http.disconnect"}
            assert await receive() == {"type": "http.disconnect"}
        assert not cancelled.cancelled_caught

    app = Handled(handler)
    async with serving(app, hub=hub) as server:
        await leave(server, app, how)
        await check_unharmed(server)
    assert app.outcome is None


async def test_a_pipelined_request_does_not_hide_that_the_client_has_gone() -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        assert await receive() == {"type": "http.disconnect"}

    app = Handled(handler)
    async with serving(app, hub="epoll") as server:
        await leave(server, app, "close", encode_request("GET") + encode_request("GET", "/next"))
    assert app.outcome is None


# -- with Starlette ------------------------------------------------------------------------------------------


class StarletteApp(Handled):
    def __init__(self, endpoint: Any) -> None:
        async def ok(request: Request) -> PlainTextResponse:
            return PlainTextResponse("ok")

        routes = [Route("/ok", ok), Route("/", endpoint, methods=["GET", "POST"])]
        super().__init__(Starlette(routes=routes))


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("body", [None, b"body"])
async def test_is_disconnected_in_a_loop_ends_promptly(hub: str, how: str, body: bytes | None) -> None:
    async def endpoint(request: Request) -> PlainTextResponse:
        await request.body()
        while not await request.is_disconnected():
            await trio.sleep(0.001)
        return PlainTextResponse("for nobody")

    app = StarletteApp(endpoint)
    async with no_leaks(), serving(app, hub=hub, disconnect_grace=None) as server:
        await leave(server, app, how, encode_request("POST", body=body))
        await check_unharmed(server)


async def test_is_disconnected_is_false_for_a_client_that_waits(hub: str) -> None:
    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str([await request.is_disconnected() for _ in range(3)]))

    async with serving(StarletteApp(endpoint), hub=hub) as server:
        assert (await server.get()).body == b"[False, False, False]"


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("pause", [0, 0.001])
async def test_a_streaming_response_ends_promptly(hub: str, how: str, pause: float) -> None:
    async def endless() -> Any:
        while True:
            yield b"x" * 100
            await trio.sleep(pause)

    async def endpoint(request: Request) -> StreamingResponse:
        return StreamingResponse(endless())

    app = StarletteApp(endpoint)
    async with serving(app, hub=hub, disconnect_grace=None) as server:
        await leave(server, app, how)
        await check_unharmed(server)


@pytest.mark.parametrize("how", WAYS)
async def test_an_aborted_upload_is_not_held_against_starlette(hub: str, how: str) -> None:
    """It turns the message into an exception of its own, `starlette.requests.ClientDisconnect`."""

    async def endpoint(request: Request) -> PlainTextResponse:
        await request.body()
        return PlainTextResponse("never")

    app = StarletteApp(endpoint)
    async with no_leaks(), serving(app, hub=hub) as server:
        await leave(
            server, app, how, encode_request("POST", headers=[("content-length", "100")], body=b"half")
        )
        await check_unharmed(server)
    assert type(app.outcome).__name__ in ("ClientDisconnect", "ClientDisconnected")  # the latter from its 500


# -- the grace -----------------------------------------------------------------------------------------------


async def sleep_long(scope: Any, receive: Any, send: Any) -> None:
    await trio.sleep(3600)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("grace", [0.0, 3.0, 20.0])
async def test_the_handler_is_cancelled_after_the_grace_with_that_reason(
    autojump_clock: Any, how: str, grace: float
) -> None:
    app = Handled(sleep_long)
    async with serving(app, disconnect_grace=grace) as server:
        await leave(server, app, how, patience=3601)
        await server.wait_idle()
        assert server.worker.context.counters.peer_gone == 1
        await check_unharmed(server)
    assert app.lasted == pytest.approx(grace, abs=0.1)
    assert isinstance(app.outcome, trio.Cancelled)
    assert "disconnect_grace" in str(app.outcome)


@pytest.mark.parametrize("how", WAYS)
async def test_an_app_with_a_nursery_is_cancelled_like_any_other(autojump_clock: Any, how: str) -> None:
    """It ends with a group of `Cancelled`, which is no fault of its own."""

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, 3600)
            nursery.start_soon(trio.sleep, 3600)

    app = Handled(handler)
    async with serving(app) as server:
        await leave(server, app, how, patience=3601)
        await server.wait_idle()
        await check_unharmed(server)
    assert isinstance(app.outcome, BaseExceptionGroup)


@pytest.mark.parametrize("how", WAYS)
async def test_off_never_cancels(autojump_clock: Any, how: str) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await trio.sleep(3600)
        await respond(send)

    app = Handled(handler)
    async with serving(app, disconnect_grace="off") as server:
        await leave(server, app, how, patience=3601)
        await check_unharmed(server)
    assert app.lasted == pytest.approx(3600, abs=1)
    assert not isinstance(app.outcome, trio.Cancelled)


async def test_on_the_portable_hub_the_grace_begins_when_the_app_waits_in_receive(
    autojump_clock: Any,
) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await read_body(receive)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await trio.sleep(3600)

    app = Handled(handler)
    async with serving(app, hub="portable") as server:
        await leave(server, app, "close", patience=3601)
        await check_unharmed(server)
    assert app.lasted == pytest.approx(3, abs=0.1)


@pytest.mark.modes("tls", because="HTTP/2 has no half-closed connections")
async def test_a_client_that_was_gone_before_the_app_was_called(autojump_clock: Any) -> None:
    app = Handled(sleep_long)
    async with serving(app) as server:
        async with server.connect() as client:
            await client.send(encode_request("GET"))
            client.send_eof()
            with trio.fail_after(3601):
                await app.ended.wait()
    assert app.lasted == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("how", WAYS)
async def test_work_after_a_complete_response_is_not_cancelled(autojump_clock: Any, how: str) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await respond(send)
        await trio.sleep(60)

    app = Handled(handler)
    async with serving(app) as server:
        await leave(server, app, how, patience=100)
        await check_unharmed(server)
    assert app.outcome is None
    assert app.lasted == pytest.approx(60, abs=0.1)


@pytest.mark.modes("tls", because="HTTP/2 has no half-closed connections")
async def test_nor_when_the_client_had_gone_before_the_response(autojump_clock: Any) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await trio.sleep(1)
        await respond(send)
        await trio.sleep(60)

    app = Handled(handler)
    async with serving(app) as server:
        await leave(server, app, "eof", patience=100)
        await check_unharmed(server)
    assert app.outcome is None
    assert app.lasted == pytest.approx(61, abs=0.1)


@pytest.mark.modes("tls", because="HTTP/2 has no half-closed connections")
async def test_a_fin_behind_a_body_that_the_app_has_not_read_starts_no_clock(autojump_clock: Any) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await trio.sleep(60)
        await respond(send, await read_body(receive))

    app = Handled(handler)
    body = bytes(200_000)  # more than comes with the head
    async with serving(app) as server, server.connect() as client:
        await client.send(encode_request("POST", body=body))
        client.send_eof()
        assert (await client.read_response()).body == body
    assert app.outcome is None


# -- send() --------------------------------------------------------------------------------------------------


@pytest.mark.modes("tls", because="HTTP/2 has no half-closed connections")
async def test_a_client_that_has_only_half_closed_gets_its_response(engine: str, hub: str) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await trio.testing.wait_all_tasks_blocked(0.02)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for n in range(3):
            await send({"type": "http.response.body", "body": b"%d" % n, "more_body": True})
            await trio.testing.wait_all_tasks_blocked(0.01)
        await send({"type": "http.response.body"})

    app = Handled(handler)
    async with serving(app, http_engine=engine, hub=hub) as server, server.connect() as client:
        await client.send(encode_request("GET"))
        client.send_eof()
        assert (await client.read_response()).body == b"012"
        assert await client.receive() == b""
    assert app.outcome is None


STYLES: dict[str, tuple[int, bool]] = {
    "small parts": (10, True),
    "large parts": (100_000, True),
    "busy": (10, False),
}


@pytest.mark.parametrize("style", STYLES)
async def test_after_a_reset_send_raises_client_disconnected(hub: str, style: str) -> None:
    size, pausing = STYLES[style]

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": bytes(size), "more_body": True})
            if pausing:
                await trio.sleep(0.001)

    app = Handled(handler)
    async with no_leaks(), serving(app, hub=hub, disconnect_grace=None) as server:
        await leave(server, app, "reset")
        await check_unharmed(server)  # although the app has let it pass
        assert server.worker.context.counters.faults == {"C2": 1}
    assert isinstance(app.outcome, ClientDisconnected)
    assert isinstance(app.outcome, OSError)
    assert app.outcome.errno


async def test_a_response_that_is_sent_in_one_piece_after_a_reset(hub: str) -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await trio.testing.wait_all_tasks_blocked(0.02)
        await respond(send)

    app = Handled(handler)
    async with serving(app, hub=hub) as server:
        await leave(server, app, "reset")
        await check_unharmed(server)
    assert isinstance(app.outcome, ClientDisconnected)


async def test_every_send_after_the_first_error_raises_too(hub: str) -> None:
    errors: list[Any] = []

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await trio.testing.wait_all_tasks_blocked(0.02)
        for event in ("start", "body", "body", "start"):
            message = {"type": f"http.response.{event}", "status": 200, "body": b"x", "more_body": False}
            try:
                await send(message)
            except OSError as error:
                errors.append(type(error))

    app = Handled(handler)
    async with serving(app, hub=hub) as server:
        await leave(server, app, "reset")
        await check_unharmed(server)
    assert errors
    assert set(errors) == {ClientDisconnected}


async def test_an_error_that_comes_from_the_disconnect_is_not_held_against_the_app() -> None:
    """Wrapped, in a group, or merely raised while it was handled."""

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                while True:
                    await send({"type": "http.response.body", "body": bytes(9999), "more_body": True})
                    await trio.sleep(0.001)
            except OSError as error:
                raise RuntimeError("could not finish") from error

    app = Handled(handler)
    async with serving(app, disconnect_grace=None) as server:
        await leave(server, app, "reset")
        await check_unharmed(server)
    assert isinstance(app.outcome, ExceptionGroup)


async def test_an_error_of_its_own_is_held_against_the_app_whether_the_client_is_there_or_not() -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await trio.testing.wait_all_tasks_blocked(0.02)
        raise ConnectionResetError("from the database")

    app = Handled(handler)
    async with serving(app, on_app_error="contain") as server:
        await leave(server, app, "reset")
        await server.wait_idle()
        assert server.worker.context.counters.faults == {"A1": 1}


# -- a task that outlives its request ------------------------------------------------------------------------


@pytest.mark.parametrize("reading", ["the end", "the body"])
@pytest.mark.parametrize("complete", [False, True])
async def test_a_task_left_in_the_lifespans_nursery_is_told_and_not_broken(
    hub: str, reading: str, complete: bool
) -> None:
    results: list[Any] = []
    ended = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            async with trio.open_nursery() as nursery:
                await receive()
                scope["state"]["nursery"] = nursery
                await send({"type": "lifespan.startup.complete"})
                await receive()
                nursery.cancel_scope.cancel()
            await send({"type": "lifespan.shutdown.complete"})
            return
        if reading == "the end":
            await read_body(receive)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        scope["state"]["nursery"].start_soon(outlive, receive, send)
        await trio.testing.wait_all_tasks_blocked(0.01)
        if complete:
            await send({"type": "http.response.body"})

    async def outlive(receive: Any, send: Any) -> None:
        results.append(await receive())
        try:
            await send({"type": "http.response.body", "body": b"more" * 9999, "more_body": True})
        except Exception as error:
            results.append(type(error))
        ended.set()

    async with testing.serving(app, hub=hub, on_app_error="contain") as server:
        async with server.connect() as client:
            await client.send(encode_request("POST", headers=[("content-length", "1")]))
            if reading == "the end":
                await client.send(b"x")
            await client.read_response()
            with trio.fail_after(30):
                await ended.wait()
        await server.wait_idle()
    assert results[0] == {"type": "http.disconnect"}
    assert results[1] is (UnexpectedMessage if complete else ClientDisconnected)
    assert server.failure is None
