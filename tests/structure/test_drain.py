"""The end of a worker: what begins it, what it waits for, what it cuts, and that nothing can hold it up."""

from __future__ import annotations

import functools
import logging
import resource
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from trioserve.config import Config
from trioserve.structure.context import LAST_REQUEST_PATIENCE
from trioserve.structure.drain import DrainState
from trioserve.testing import RawClient, TestServer, encode_request, no_leaks, serving
from trioserve.worker.worker import Worker, serve_worker

from ..apps import read_body, respond


class App:
    """Holds requests to /hold until told to go on; notes what its lifespan is told, and when."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.holding, self.go_on = trio.Event(), trio.Event()
        self.shutdown_at = 0.0
        self.startup_takes = self.shutdown_takes = 0.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.lifespan(receive, send)
            return
        if scope["path"] == "/begun":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        if scope["path"] != "/":
            self.holding.set()
            await self.go_on.wait()
        if scope["path"] == "/begun":
            await send({"type": "http.response.body", "body": b"done"})
        else:
            await respond(send, await read_body(receive))

    async def lifespan(self, receive: Any, send: Any) -> None:
        await receive()
        self.events.append("startup")
        await trio.sleep(self.startup_takes)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.events.append("shutdown")
        self.shutdown_at = trio.current_time()
        await trio.sleep(self.shutdown_takes)
        self.events.append("complete")
        await send({"type": "lifespan.shutdown.complete"})


def configure(**settings: Any) -> Config:
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = logging.getLogger("trioserve.tests")
    for name, value in settings.items():
        setattr(config, name, value)
    return config


async def until(state: DrainState, server: TestServer) -> float:
    """How long it takes until the drain is in `state`."""
    began = trio.current_time()
    await server.worker.drain.wait(state)
    return trio.current_time() - began


# -- what begins it ------------------------------------------------------------------------------------------


async def run_worker(app: App, end: Callable[[Worker, trio.CancelScope], Any], **settings: Any) -> list[str]:
    """A worker that `end` ends as soon as it serves; its client's held request finishes."""
    workers: list[Worker] = []
    triggered = trio.Event()
    responses: list[Any] = []

    async def serve(task_status: Any) -> None:
        with trio.CancelScope() as scope:
            scopes.append(scope)
            await serve_worker(
                app, configure(**settings), task_status=task_status, on_worker=workers.append,
                shutdown_trigger=triggered.wait,
            )  # fmt: skip

    async def fetch(client: RawClient) -> None:
        responses.append(await client.get("/hold"))
        client.close()

    scopes: list[trio.CancelScope] = []
    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(serve)
        async with TestServer(workers[0], addresses).connect() as client:
            nursery.start_soon(fetch, client)
            await app.holding.wait()
            if end is trigger:
                triggered.set()
            else:
                end(workers[0], scopes[0])
            await workers[0].drain.wait(DrainState.DRAINING)
            await trio.testing.wait_all_tasks_blocked(0.01)
            app.go_on.set()
            await workers[0].drain.wait(DrainState.STOPPED)
    (response,) = responses
    assert (response.status, response.header("connection")) == (200, "close")
    return [workers[0].drain.reason, *app.events]


def trigger(_worker: Worker, _scope: trio.CancelScope) -> None:
    """Stands for the shutdown trigger."""


def call_begin(worker: Worker, _scope: trio.CancelScope) -> None:
    worker.drain.begin("asked for")


def cancel(_worker: Worker, scope: trio.CancelScope) -> None:
    scope.cancel()


@pytest.mark.parametrize(
    "end, reason",
    [(trigger, "the shutdown trigger"), (call_begin, "asked for"), (cancel, "cancelled by the caller")],
)
async def test_each_cause_lets_requests_finish_and_the_lifespan_shut_down(end: Any, reason: str) -> None:
    async with no_leaks():
        assert await run_worker(App(), end) == [reason, "startup", "shutdown", "complete"]


async def test_cancelled_in_startup_ends_at_once_without_a_shutdown(autojump_clock: Any) -> None:
    app = App()
    app.startup_takes = 50
    began = trio.current_time()
    async with no_leaks():
        with trio.move_on_after(10) as scope:
            await serve_worker(app, configure())
        assert scope.cancelled_caught
    assert trio.current_time() - began == pytest.approx(10, abs=0.1)
    assert app.events == ["startup"]


async def test_cancelled_before_it_has_begun() -> None:
    app = App()
    async with no_leaks():
        with trio.CancelScope() as scope:
            scope.cancel()
            await serve_worker(app, configure())
        assert scope.cancelled_caught


@pytest.mark.parametrize("steps", range(1, 25))
async def test_cancelled_at_any_step_it_still_ends_in_order(steps: int) -> None:
    """Whatever it is doing then: opening sockets, starting the app, beginning to listen."""
    app = App()
    async with no_leaks():
        with trio.fail_after(20), trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve_worker, app, configure())
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
    assert app.events in ([], ["startup"], ["startup", "shutdown", "complete"])


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
async def test_a_trigger_that_raises_drains_and_its_error_comes_out(kind: type[BaseException]) -> None:
    app = App()

    async def broken() -> None:
        await app.holding.wait()
        raise kind("no trigger")

    with pytest.RaisesGroup(pytest.RaisesExc(kind, match="no trigger")):
        async with trio.open_nursery() as nursery:
            serve = functools.partial(serve_worker, app, configure(), shutdown_trigger=broken)
            (address,) = await nursery.start(serve)
            async with await trio.open_tcp_stream("127.0.0.1", int(address.rpartition(":")[2])) as stream:
                await stream.send_all(encode_request("GET", "/hold"))
                await app.holding.wait()
                await trio.testing.wait_all_tasks_blocked(0.01)
                app.go_on.set()
                assert b" 200 " in await stream.receive_some()
    assert app.events == ["startup", "shutdown", "complete"]


# -- what it does to connections -----------------------------------------------------------------------------


async def test_connections_that_have_been_idle_are_closed_at_once(hub: str, autojump_clock: Any) -> None:
    app = App()
    async with no_leaks(), serving(app, hub=hub, graceful_timeout=30) as server:
        async with server.connect() as fresh, server.connect() as used:
            await used.get()
            await trio.sleep(LAST_REQUEST_PATIENCE)
            began = trio.current_time()
            server.worker.drain.begin("test")
            assert await fresh.receive() == b""
            assert await used.receive() == b""
            await until(DrainState.STOPPED, server)
            assert trio.current_time() - began < LAST_REQUEST_PATIENCE / 2


async def test_a_busy_client_gets_its_next_request_answered_in_a_drain(hub: str, autojump_clock: Any) -> None:
    """It sends again the moment it has its answer, and cannot know of the drain: closing now would lose a request."""
    app = App()
    async with no_leaks(), serving(app, hub=hub, graceful_timeout=30) as server:
        async with server.connect() as fresh, server.connect() as used, server.connect() as silent:
            await used.get()
            await trio.testing.wait_all_tasks_blocked(0.01)
            began = trio.current_time()
            server.worker.drain.begin("test")
            await server.worker.drain.wait(DrainState.DRAINING)
            await trio.testing.wait_all_tasks_blocked(0.01)
            for client in (fresh, used):
                response = await client.get()
                assert (response.status, response.header("connection")) == (200, "close")
                client.close()
            # And who has nothing more to say holds nothing up.
            assert await silent.receive() == b""
            await until(DrainState.STOPPED, server)
            assert trio.current_time() - began < 2 * LAST_REQUEST_PATIENCE


@pytest.mark.parametrize("idle", [0.5, 0.99], ids=str)
async def test_a_client_that_asks_every_second_gets_its_answer_in_a_drain(
    hub: str, autojump_clock: Any, idle: float
) -> None:
    """It is the most common interval there is, and with what the network takes it is a little more."""
    async with no_leaks(), serving(App(), hub=hub, graceful_timeout=30) as server, server.connect() as client:
        await client.get()
        await trio.sleep(idle)
        server.worker.drain.begin("test")
        await trio.sleep(1.1 - idle)
        response = await client.get()
        assert (response.status, response.header("connection")) == (200, "close")


async def test_who_cannot_wait_does_not_wait_for_a_last_request(hub: str, autojump_clock: Any) -> None:
    async with no_leaks(), serving(App(), hub=hub) as server, server.connect() as used:
        await used.get()
        began = trio.current_time()
        server.worker.drain.begin("test", grace=0)
        assert await used.receive() == b""
        assert trio.current_time() - began < LAST_REQUEST_PATIENCE / 2


async def test_a_request_that_is_in_the_socket_is_served_and_the_connection_closed(
    engine: str, hub: str
) -> None:
    """The client has sent it before it could know; nobody may say that it was lost."""
    app = App()
    async with serving(app, http_engine=engine, hub=hub) as server:
        async with server.connect() as used, server.connect() as queued:
            await used.get()
            await trio.testing.wait_all_tasks_blocked(0.01)
            await trio.lowlevel.checkpoint()
            # Without a checkpoint from here on: the server's tasks see all of it together.
            fresh = server.connect()
            for client in (used, queued, fresh):
                client.sock.send(encode_request("GET"))
            server.worker.drain.begin("test")
            async with fresh:
                for client in (used, queued, fresh):
                    response = await client.read_response()
                    assert (response.status, response.header("connection")) == (200, "close")
                    assert await client.receive() == b""


async def test_a_connection_that_has_begun_a_head_may_finish_it() -> None:
    async with serving(App(), graceful_timeout=30) as server, server.connect() as client:
        await client.send(b"GET / HTTP/1.1\r\n")
        await trio.testing.wait_all_tasks_blocked(0.01)
        server.worker.drain.begin("test")
        await trio.testing.wait_all_tasks_blocked(0.01)
        await client.send(b"host: x\r\n\r\n")
        assert (await client.read_response()).header("connection") == "close"


async def test_nobody_can_connect_any_more() -> None:
    app = App()
    async with serving(app, graceful_timeout=30) as server, server.connect() as client:
        await client.send(encode_request("GET", "/hold"))
        await app.holding.wait()
        server.worker.drain.begin("test")
        await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises(ConnectionRefusedError):
            server.connect()
        app.go_on.set()
        assert (await client.read_response()).status == 200


async def test_a_streamed_response_that_had_promised_keep_alive_is_finished_and_closed() -> None:
    app = App()
    async with serving(app, graceful_timeout=30) as server, server.connect() as client:
        await client.send(encode_request("GET", "/begun"))
        await client.receive_until(b"begun\r\n")
        server.worker.drain.begin("test")
        app.go_on.set()
        assert await client.receive_all() == b"4\r\ndone\r\n0\r\n\r\n"


async def test_a_pipelined_request_behind_the_last_response_is_left_for_the_client_to_repeat() -> None:
    app = App()
    async with serving(app) as server, server.connect() as client:
        await client.send(encode_request("GET", "/hold") + encode_request("GET", "/"))
        await app.holding.wait()
        server.worker.drain.begin("test")
        app.go_on.set()
        received = await client.receive_all()
        assert received.count(b"HTTP/1.1 200") == 1
        assert b"connection: close" in received


async def test_two_thousand_idle_connections_are_closed_in_a_moment(hub: str) -> None:
    count = 2000 if _may_open(4500) else 200
    async with no_leaks(), serving(App(), hub=hub, backlog=4096, graceful_timeout=30) as server:
        clients = []
        for _ in range(count):
            clients.append(server.connect())
            if len(clients) % 50 == 0:
                await trio.lowlevel.checkpoint()
        with trio.fail_after(60):
            while len(server.worker.context.connections) < count:
                await trio.lowlevel.checkpoint()
        server.worker.drain.begin("test")
        assert await until(DrainState.STOPPED, server) < 25  # not by the grace
        for client in clients:
            assert client.sock.recv(1) == b""
            client.close()


def _may_open(count: int) -> bool:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count <= hard or hard == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
        return True
    return soft >= count


# -- what it cuts --------------------------------------------------------------------------------------------


async def test_what_is_not_done_in_time_is_cancelled_answered_and_logged(
    autojump_clock: Any, caplog: Any
) -> None:
    app = App()
    app.shutdown_takes = 50
    began = trio.current_time()
    async with serving(app, graceful_timeout=20, shutdown_timeout=60) as server:
        async with server.connect() as held, server.connect() as begun:
            await held.send(encode_request("GET", "/hold?secret=1"))
            await begun.send(encode_request("GET", "/begun"))
            await begun.receive_until(b"begun\r\n")
            server.worker.drain.begin("test")
            response = await held.read_response()
            assert trio.current_time() - began == pytest.approx(20, abs=0.2)
            assert (response.status, response.header("connection")) == (503, "close")
            assert response.header("retry-after") == "1"
            assert await begun.receive_all() == b""  # no last chunk
    assert app.events == ["startup", "shutdown", "complete"]
    assert trio.current_time() - began == pytest.approx(70, abs=1)
    assert "2 requests were cut by the drain after 20 s" in caplog.text
    assert "cut: GET /hold after 20." in caplog.text
    assert "cut: GET /begun after 20." in caplog.text
    assert "secret" not in caplog.text
    assert server.failure is None


async def test_graceful_timeout_zero_waits_for_nobody(autojump_clock: Any) -> None:
    app = App()
    began = trio.current_time()
    async with serving(app, graceful_timeout=0, pre_drain_delay=100) as server, server.connect() as client:
        await client.send(encode_request("GET", "/hold"))
        await app.holding.wait()
        server.worker.drain.begin("test")
        assert (await client.read_response()).status == 503
    assert trio.current_time() - began < 3
    assert app.events == ["startup", "shutdown", "complete"]


async def test_hurry_cuts_the_grace_short(autojump_clock: Any) -> None:
    app = App()
    async with serving(app, graceful_timeout=1000) as server, server.connect() as client:
        await client.send(encode_request("GET", "/hold"))
        await app.holding.wait()
        server.worker.drain.begin("first signal")
        await trio.sleep(5)
        server.worker.drain.hurry("second signal")
        began = trio.current_time()
        assert (await client.read_response()).status == 503
        assert trio.current_time() - began < 0.2


async def test_a_handler_with_a_nursery_is_cut_like_any_other(autojump_clock: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(trio.sleep_forever)

    async with serving(app, lifespan="off", graceful_timeout=5) as server, server.connect() as client:
        await client.send(encode_request("GET"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        server.worker.drain.begin("test")
        assert (await client.read_response()).status == 503
    assert server.failure is None


# -- what cannot hold it up ----------------------------------------------------------------------------------


async def test_a_peer_that_never_reads_cannot(autojump_clock: Any, hub: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, bytes(50_000_000))

    async with (
        no_leaks(),
        serving(app, lifespan="off", hub=hub, graceful_timeout=10, response_write_timeout="off") as server,
        server.connect(receive_buffer=4096) as client,
    ):
        await client.send(encode_request("GET"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        server.worker.drain.begin("test")
        assert await until(DrainState.STOPPED, server) == pytest.approx(10, abs=0.2)


async def test_a_peer_that_never_writes_cannot(autojump_clock: Any, hub: str) -> None:
    settings = {"request_body_timeout": "off", "request_head_timeout": "off", "request_body_min_rate": 0}
    async with serving(App(), hub=hub, graceful_timeout=10, **settings) as server:
        async with server.connect() as in_head, server.connect() as in_body, server.connect() as lingering:
            await in_head.send(b"GET / HTT")
            await in_body.send(encode_request("POST", "/", [("content-length", "5")]))
            await lingering.send(b"NONSENSE\r\n\r\n")
            await trio.testing.wait_all_tasks_blocked(0.01)
            server.worker.drain.begin("test")
            assert await until(DrainState.STOPPED, server) == pytest.approx(10, abs=0.2)


@pytest.mark.parametrize("stubborn", ["a shield", "catching Cancelled"])
async def test_a_handler_that_does_not_end_cannot_take_the_lifespans_time(
    autojump_clock: Any, caplog: Any, stubborn: str
) -> None:
    """The process itself is ended by a thread; as a library one can only wait, but with the app shut down."""
    app = App()

    async def holds_out(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
            return
        app.holding.set()
        until_ = trio.current_time() + 500
        while trio.current_time() < until_:
            if stubborn == "a shield":
                with trio.CancelScope(shield=True):
                    await trio.sleep(500)
            else:
                try:
                    await trio.sleep(500)
                except trio.Cancelled:
                    with trio.CancelScope(shield=True):
                        await trio.sleep(50)

    began = trio.current_time()
    async with serving(holds_out, graceful_timeout=10, on_app_error="contain") as server:
        async with server.connect() as client:
            await client.send(encode_request("GET", "/hold"))
            await app.holding.wait()
            server.worker.drain.begin("test")
            await until(DrainState.STOPPED, server)
    assert app.events == ["startup", "shutdown", "complete"]
    assert app.shutdown_at - began == pytest.approx(12, abs=0.2)
    assert "1 cancelled requests do not end" in caplog.text


# -- before it -----------------------------------------------------------------------------------------------


async def test_in_the_delay_before_the_drain_everything_is_still_served(autojump_clock: Any) -> None:
    app = App()
    async with serving(app, pre_drain_delay=10, graceful_timeout=20) as server:
        async with server.connect() as old, server.connect() as held:
            await old.get()
            await held.send(encode_request("GET", "/hold"))
            await app.holding.wait()
            began = trio.current_time()
            server.worker.drain.begin("test")
            for _ in range(3):
                await trio.sleep(3)
                async with server.connect() as fresh:
                    await trio.sleep(0.1)  # it may take its time
                    assert (await fresh.get()).header("connection") is None
                assert (await old.get()).header("connection") is None
            assert await old.receive() == b""  # closed when the delay is over, and nothing more has come
            assert 10 <= trio.current_time() - began <= 10 + LAST_REQUEST_PATIENCE
            assert (await held.read_response()).status == 503
            assert trio.current_time() - began == pytest.approx(30, abs=0.2)


async def test_hurry_ends_the_delay_too(autojump_clock: Any) -> None:
    async with serving(App(), pre_drain_delay=1000) as server:
        server.worker.drain.begin("test")
        await trio.sleep(1)
        server.worker.drain.hurry("again")
        assert await until(DrainState.STOPPED, server) < 0.5
