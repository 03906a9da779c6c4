"""Apps that run in a lane, on all requests of a turn: nobody can tell, but by what it costs."""

from __future__ import annotations

import contextvars
import gc
import logging
import socket
import time
import weakref
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
import trio
import trio.testing

from tests.apps import read_body, respond
from tests.http.feeding import head
from tests.http.test_wire_framing import bare
from tests.http.test_wire_posted import (
    BODY,
    GET,
    SECOND,
    Served,
    check_answered_before,
    narrow,
    serving_at_rest,
)
from tests.http.test_wire_quick import Log, at_rest, closing_files, steps_of, unhurried  # noqa: F401  (a fixture)
from tests.modes import force_lanes
from tests.waiting import until
from trioserve import StaticFiles
from trioserve.http import http1_lane, http1_turn
from trioserve.observe.in_flight import InFlightTable
from trioserve.observe.task_tree import dump_tasks
from trioserve.structure import blocked_loop

pytestmark = pytest.mark.modes("tls", because="HTTP/2 has lanes of its own")


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    force_lanes(monkeypatch)


def in_lane() -> bool:
    return trio.lowlevel.current_task().name == "lane"


def lanes(served: Served) -> list[Any]:
    return list(served.server.worker.context.lanes)


async def all_at_rest(served: Served) -> None:
    for connection in served.connections:
        await at_rest(connection)


# -- an app that waits for nothing ---------------------------------------------------------------------------


async def test_no_connections_task_is_woken(engine: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, b"lane" if in_lane() else b"task")

    async with serving_at_rest(app, 5, http_engine=engine) as served:
        log = served.server.worker.context.access_log = Log()  # type: ignore[assignment]
        for turn in range(1, 4):
            with steps_of(served.connection) as steps:
                served.ask()
                for client in served.clients:
                    assert (await client.read_response()).body == b"lane"
                await all_at_rest(served)
            assert steps.count == 0
            assert [connection.requests for connection in served.connections] == [1 + turn] * 5
            assert {connection.phase for connection in served.connections} == {"keep_alive"}
        assert [(entry.target, entry.status, entry.outcome) for entry in log.entries] == [
            (b"/first", 200, "complete")
        ] * 15
        assert served.server.worker.context.in_flight == 0


async def test_each_request_has_a_fresh_context() -> None:
    seen = contextvars.ContextVar("seen", default="nothing")
    found: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert in_lane()
        found.append(seen.get())
        seen.set("something")
        if scope["path"] == "/second":
            await trio.lowlevel.checkpoint()
            found.append(seen.get())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child)
        await respond(send)

    async def child() -> None:
        found.append(seen.get())

    async with serving_at_rest(app, 3) as served:
        served.ask()
        for client in served.clients:
            await client.read_response()
        assert found == ["nothing"] * 3
        found.clear()
        for _ in range(2):
            await all_at_rest(served)
            assert (await served.client.get("/second")).status == 200
        assert found == ["nothing", "something", "something"] * 2
        found.clear()
        await at_rest(served.connection)
        assert (await served.client.get("/first")).status == 200
        assert found == ["nothing"]


class AsObject:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await respond(send, b"object" if in_lane() else b"")


_of_call: contextvars.ContextVar[bool] = contextvars.ContextVar("of_call", default=False)


def as_function(scope: Any, receive: Any, send: Any) -> Any:
    """What it does before there is anything to await is done in the request's context, too."""
    assert not _of_call.get()
    _of_call.set(True)
    return respond(send, b"function" if in_lane() else b"")


@pytest.mark.parametrize(("app", "body"), [(AsObject(), b"object"), (as_function, b"function")])
async def test_apps_come_in_many_forms(app: Any, body: bytes) -> None:
    # Not behind a function of the test's.
    async with bare(app, hub="epoll", lifespan="off") as server, server.connect() as client:
        for _ in range(3):
            await trio.testing.wait_all_tasks_blocked()
            assert (await client.get("/")).body == body


@pytest.mark.parametrize("read", [False, True])
async def test_a_body_that_came_with_the_head(engine: str, *, read: bool) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert in_lane()
        await respond(send, await read_body(receive) if read else b"unread")

    request = head("POST /first HTTP/1.1", "Content-Length: 4") + b"body"
    async with serving_at_rest(app, http_engine=engine) as served:
        for _ in range(3):
            served.ask(request)
            assert (await served.client.read_response()).body == (b"body" if read else b"unread")
            await at_rest(served.connection)


async def test_a_body_that_is_still_to_come_is_the_tasks(engine: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert not in_lane()
        await respond(send, await read_body(receive))

    async with serving_at_rest(app, http_engine=engine) as served:
        served.ask(head("POST /first HTTP/1.1", "Content-Length: 4") + b"bo")
        await until(lambda: served.connection.phase == "request_body")
        served.ask(b"dy")
        assert (await served.client.read_response()).body == b"body"


async def test_pipelined_requests_are_answered_in_order(engine: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, scope["raw_path"])

    async with serving_at_rest(app, http_engine=engine) as served:
        served.ask((GET + SECOND) * 3)
        bodies = [(await served.client.read_response()).body for _ in range(6)]
    assert bodies == [b"/first", b"/second"] * 3


@pytest.mark.parametrize("last", [head("GET / HTTP/1.1", "Connection: close"), head("GET / HTTP/1.0")])
async def test_the_last_request_of_a_connection(last: bytes) -> None:
    async with serving_at_rest(lambda scope, receive, send: respond(send, b"last")) as served:
        served.ask(last)
        assert (await served.client.read_response()).body == b"last"
        assert await served.client.receive() == b""


async def test_the_last_request_that_a_connection_may_send() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.append(in_lane())
        await respond(send)

    found: list[bool] = []
    async with serving_at_rest(app, keep_alive_max_requests=3) as served:
        for last in (False, True):  # there was one before
            served.ask()
            assert ((await served.client.read_response()).header("connection") == "close") == last
            if not last:
                await at_rest(served.connection)
        assert await served.client.receive() == b""
        assert found == [True, False]


async def test_a_websocket_is_the_tasks() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.append((scope["type"], in_lane()))
        await receive()
        await send({"type": "websocket.close"})

    found: list[Any] = []
    async with serving_at_rest(app) as served:
        served.ask(
            head(
                "GET /first HTTP/1.1",
                "Connection: Upgrade",
                "Upgrade: websocket",
                "Sec-WebSocket-Version: 13",
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            )
        )
        assert (await served.client.read_response()).status == 403
        assert found == [("websocket", False)]


async def test_a_request_is_in_flight_while_it_runs() -> None:
    found: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.append([request.path for request in table.read()])
        await respond(send)

    table = InFlightTable.create()
    try:
        async with serving_at_rest(app, in_flight=table) as served:
            for _ in range(2):
                served.ask()
                await served.client.read_response()
                await at_rest(served.connection)
                assert table.read() == []
        assert found == [["/first"]] * 2
    finally:
        table.close()


async def test_a_peer_that_does_not_read_is_its_tasks_affair() -> None:
    async with serving_at_rest(lambda scope, receive, send: respond(send, BODY)) as served:
        narrow(served)
        log = served.server.worker.context.access_log = Log()  # type: ignore[assignment]
        served.ask()
        await until(lambda: served.connection.phase == "response_write")
        response = await served.client.read_response()
        assert (response.body, response.complete) == (BODY, True)
        await at_rest(served.connection)
        assert [entry.outcome for entry in log.entries] == ["complete"]
        assert (await served.client.get("/warm")).body == b"warm"


async def test_a_peer_that_is_gone_when_the_response_leaves() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        served.client.reset()
        await respond(send)

    async with serving_at_rest(app) as served:
        log = served.server.worker.context.access_log = Log()  # type: ignore[assignment]
        served.ask()
        await served.server.wait_idle()
        assert len(log.entries) == 1
        assert served.server.worker.context.counters.faults == {}


async def test_neither_lane_nor_connection_holds_anything_of_a_request() -> None:
    class Resource:
        pass

    gone: list[weakref.ref[Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["resource"] = resource = Resource()
        gone.append(weakref.ref(resource))
        gone.append(weakref.ref(served.connection.exchange))
        if scope["path"] == "/second":
            await trio.lowlevel.checkpoint()
        await respond(send)
        if scope["path"] == "/third":
            raise RuntimeError("a bug in what follows")

    async with serving_at_rest(app) as served:
        gc.collect()
        gc.disable()
        logging.disable(logging.CRITICAL)  # pytest would keep the error
        try:
            for path in ("/first", "/second", "/third"):
                assert (await served.client.get(path)).status == 200
                if path != "/third":
                    await at_rest(served.connection)
                else:
                    await served.server.wait_idle()
                await until(lambda: len(http_turn(served).spare) == 1)
                assert [ref() for ref in gone] == [None] * len(gone), path
        finally:
            logging.disable(logging.NOTSET)
            gc.enable()


def http_turn(served: Served) -> Any:
    return served.server.worker._turn


# -- an app that waits ---------------------------------------------------------------------------------------


async def test_who_waits_has_the_lane_and_the_others_of_the_turn_their_tasks() -> None:
    go = trio.Event()
    found: list[tuple[int, bool]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        number = len(found)
        found.append((number, in_lane()))
        if number == 2:
            await go.wait()
        await respond(send, b"%d" % number)

    async with serving_at_rest(app, 5) as served:
        served.ask()
        await until(lambda: len(found) == 5)
        await trio.testing.wait_all_tasks_blocked()
        assert found == [(0, True), (1, True), (2, True), (3, False), (4, False)]
        assert served.server.worker.context.in_flight == 1
        tree = dump_tasks()
        assert "test_who_waits_has_the_lane_and_the_others_of_the_turn_their_tasks.<locals>.app" in tree
        assert len(lanes(served)) == 1
        # There is no lane for these: a second is started.
        [waiting] = [number for number, found in enumerate(served.connections) if found.exchange is not None]
        idle = [client for number, client in enumerate(served.clients) if number != waiting]
        for client in idle:
            assert (await client.read_response()).body != b"2"
        for expected in (False, True):
            found.clear()
            found.extend([(9, False)] * 3)
            assert (await idle[0].get("/")).body == b"3"
            assert found[-1] == (3, expected)
            await at_rest(served.connections[served.clients.index(idle[0])])
        go.set()
        assert (await served.clients[waiting].read_response()).body == b"2"
        await all_at_rest(served)
        await until(lambda: len(http_turn(served).spare) == 2)


async def test_an_app_that_goes_on_after_its_response_holds_nothing_up() -> None:
    go = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, b"whole")
        await go.wait()
        assert in_lane()

    async with serving_at_rest(app) as served:
        await check_answered_before(served, go)


async def test_a_client_that_leaves_cancels_the_app(autojump_clock: Any) -> None:
    ended: list[float] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert in_lane()
        try:
            await trio.sleep(60)
        finally:
            ended.append(trio.current_time())

    async with serving_at_rest(app, 2, disconnect_grace=3) as served:
        context = served.server.worker.context
        log = context.access_log = Log()  # type: ignore[assignment]
        served.clients[0].sock.send(GET)
        await until(lambda: served.connection.exchange is not None)
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        served.client.reset()
        await trio.sleep(4)
        assert len(context.connections) == 1
        assert [round(at - began, 1) for at in ended] == [3.0]
        assert context.counters.faults == {}
        assert [entry.outcome for entry in log.entries] == ["peer gone"]
        # The lane is as good as new.
        assert (await served.clients[1].get("/warm")).body == b"warm"
        await until(lambda: len(http_turn(served).spare) == 1)


async def test_receive_tells_of_a_client_that_leaves() -> None:
    told: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert in_lane()
        told.append((await receive())["type"])
        told.append((await receive())["type"])

    async with serving_at_rest(app) as served:
        served.ask()
        await until(lambda: told)
        served.client.close()
        await served.server.wait_idle()
        assert told == ["http.request", "http.disconnect"]
        assert served.server.worker.context.counters.faults == {"C2": 1}


@pytest.mark.parametrize("swallow", [False, True])
async def test_a_request_that_takes_too_long(autojump_clock: Any, *, swallow: bool) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert in_lane()
        try:
            await trio.sleep(60)
        except trio.Cancelled:
            if not swallow:
                raise

    async with serving_at_rest(app, request_timeout=7) as served:
        began = trio.current_time()
        response = await served.client.get("/first")
        assert trio.current_time() - began == pytest.approx(7, abs=0.2)
        assert response.status == (500 if swallow else 503)
        assert served.server.worker.context.counters.late == {"request": 1}


async def test_a_drain_cancels_what_is_still_there_in_the_end(autojump_clock: Any) -> None:
    cancelled: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.append(in_lane())

    async with serving_at_rest(app, 3, graceful_timeout=5) as served:
        served.ask()
        await until(lambda: served.server.worker.context.in_flight == 3)
        served.server.worker.context.drain.begin("test")
        assert (await served.client.read_response()).status == 503
    assert sorted(cancelled) == [False, False, True]


async def test_the_callers_cancellation_is_not_lost(autojump_clock: Any) -> None:
    cleaned: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.move_on_after(1, shield=True):
                await trio.sleep(0.5)
                cleaned.append(in_lane())

    with trio.fail_after(30), trio.CancelScope() as scope:
        async with serving_at_rest(app) as served:
            served.ask()
            await until(lambda: served.connection.exchange is not None)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert cleaned == [True]


async def test_a_connection_that_is_cancelled_before_the_lane_has_its_turn() -> None:
    called: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append(scope["path"])
        await respond(send)

    async with serving_at_rest(app, 2) as served:
        hub: Any = served.server.worker.context.hub
        go_on = hub.on_pulled

        def go_on_and_cancel(pulled: list[Any]) -> int:
            hub.on_pulled = go_on
            woken: int = go_on(pulled)
            served.connection.late = "request"
            served.connection.scope.cancel()
            return woken

        hub.on_pulled = go_on_and_cancel
        served.ask()
        assert (await served.client.read_response()).status == 503
        assert (await served.clients[1].read_response()).status == 200
        assert called == ["/first"]
        assert served.server.worker.context.counters.faults == {}


async def test_time_outs_in_a_loop_that_is_held_up() -> None:
    """A connection is cancelled in the very batch in which the lane has its turn."""

    async def blocker() -> None:
        while True:
            await trio.lowlevel.checkpoint()
            time.sleep(0.06)

    async def ask(client: Any) -> None:
        with suppress(OSError, EOFError):
            for _ in range(3):
                await client.get("/x")

    async with serving_at_rest(lambda scope, receive, send: respond(send), 6, request_timeout=0.02) as served:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(blocker)
            async with trio.open_nursery() as asking:
                for client in served.clients:
                    asking.start_soon(ask, client)
            nursery.cancel_scope.cancel()
        assert served.server.worker.context.counters.faults == {}


@pytest.mark.modes(because="it counts the bytes that the kernel takes")
@pytest.mark.parametrize("second", ["/a.txt", "/large"])
async def test_a_lane_that_waits_holds_no_response_up(tmp_path: Any, second: str) -> None:
    """The hub reads on before whoever finishes a lane's turn has his, and responses stay in order."""
    (tmp_path / "a.txt").write_bytes(b"static")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/one":
            first.sock.send(head(f"GET {second} HTTP/1.1"))
            await respond(send, b"one" if second == "/a.txt" else BODY)
        elif scope["path"] == "/wait":
            await trio.sleep(0.005)
            await respond(send)
        else:
            await respond(send, b"large")

    async with (
        closing_files(StaticFiles(tmp_path, fallthrough=app)) as files,
        bare(files, hub="epoll", lifespan="off") as server,
    ):
        for _ in range(10):
            async with (
                server.connect(receive_buffer=4096) as first,
                server.connect() as other,
                server.connect() as third,
            ):
                for client in (first, other, third):
                    assert (await client.get("/a.txt")).status == 200
                connections = sorted(server.worker.context.connections, key=lambda found: found.id)[-3:]
                if second == "/large":
                    connections[0].transport.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                # Two spare lanes, then.
                for client in (other, third):
                    await client.send(head("GET /wait HTTP/1.1"))
                    await trio.testing.wait_all_tasks_blocked()
                for client in (other, third):
                    assert (await client.read_response()).status == 200
                for connection in connections:
                    await at_rest(connection)
                first.sock.send(b"\r\n" + head("GET /one HTTP/1.1"))  # the empty line makes it the task's
                other.sock.send(head("GET /wait HTTP/1.1"))
                with trio.fail_after(10):
                    bodies = [(await first.read_response()).body for _ in range(2)]
                assert bodies == ([b"one", b"static"] if second == "/a.txt" else [BODY, b"large"])


async def test_a_drain_that_begins_meanwhile_closes_who_has_ended(autojump_clock: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append(scope)
        if len(called) == 2:
            context.drain.begin("test")
            await trio.lowlevel.checkpoint()
        await respond(send)

    for _ in range(4):
        called: list[Any] = []
        async with serving_at_rest(app, 2, keep_alive_timeout=60, graceful_timeout=50) as served:
            context = served.server.worker.context
            began = trio.current_time()
            served.ask()
            for client in served.clients:
                assert (await client.read_response()).status == 200
            while context.connections:
                await trio.sleep(1)
            assert trio.current_time() - began < 5


# -- an app that is wrong ------------------------------------------------------------------------------------


class Quits(BaseException):
    pass


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    ("error", "row"),
    [
        (RuntimeError("a bug"), "A1"),
        (StopAsyncIteration(), "A1"),
        (SystemExit(7), "X1"),
        (Quits(), "X3"),
        (ExceptionGroup("two", [ValueError(), TypeError()]), "A1"),
        (None, "A5"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
async def test_its_error_is_judged_as_anywhere(
    error: BaseException | None, row: str, *, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append(in_lane())
        if len(called) != 2:
            await respond(send)
            return
        if waits:
            await trio.lowlevel.checkpoint()
        if error is not None:
            raise error

    called: list[bool] = []
    async with serving_at_rest(app, 3) as served:
        served.ask()
        statuses = Counter([(await client.read_response()).status for client in served.clients])
        assert statuses in ({200: 2, 500: 1}, {200: 2, 503: 1})
        assert served.server.worker.context.counters.faults == {row: 1}
        assert called[:2] == [True, True]


@pytest.mark.parametrize("status", ["_cancel_status", "_of_another_trio"])
async def test_a_nursery_that_is_left_open(status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1_lane, "_STATUS", status)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append(in_lane())
        if len(called) == 2:
            await trio.open_nursery().__aenter__()
        await respond(send)

    called: list[bool] = []
    async with serving_at_rest(app, 4, graceful_timeout=1) as served:
        served.ask()
        for client in served.clients:
            assert (await client.read_response()).status == 200
        await until(lambda: served.server.worker.context.counters.faults)
        assert served.server.worker.context.counters.faults == {"B1": 1}
        assert called == [True, True, False, False]
        assert served.server.failure is not None


async def test_a_cancel_scope_that_is_left_open_is_none_of_the_others(autojump_clock: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append(in_lane())
        if len(called) == 2:
            trio.move_on_after(0.2).__enter__()
        else:
            await trio.sleep(len(called) > 2)
        await respond(send)

    called: list[bool] = []
    async with serving_at_rest(app, 4, graceful_timeout=5) as served:
        log = served.server.worker.context.access_log = Log()  # type: ignore[assignment]
        # One that is not waited for, since a wait would give the others of the turn to their tasks.
        called.append(False)
        served.ask()
        for client in served.clients:
            assert (await client.read_response()).status == 200
        assert served.server.worker.context.counters.faults == {"B1": 1}
        assert called[1:] == [True, False, False, False]
        assert len(log.entries) == 4


@pytest.mark.parametrize("error", [SystemExit(7), RuntimeError("a bug"), None])
async def test_its_error_is_not_lost_with_its_connection(error: BaseException | None) -> None:
    """Which is cancelled before anybody has looked at it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append(scope)
        if len(called) == 1:
            if error is not None:
                raise error
            return
        for connection in served.connections:
            if connection.exchange is not send.__self__:
                connection.scope.cancel()
        await trio.sleep(0)
        await respond(send)

    called: list[Any] = []
    async with serving_at_rest(app, 2) as served:
        served.ask()
        await until(lambda: sum(served.server.worker.context.counters.faults.values()) == 1)


@pytest.mark.parametrize("scope_or_nursery", [trio.CancelScope, trio.open_nursery])
async def test_nor_is_one_that_is_left_open_after_a_wait(scope_or_nursery: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await trio.lowlevel.checkpoint()
        left_open = scope_or_nursery()
        if hasattr(left_open, "__aenter__"):
            await left_open.__aenter__()
        else:
            left_open.__enter__()
        await respond(send)

    async with serving_at_rest(app, graceful_timeout=1) as served:
        served.ask()
        assert (await served.client.read_response()).status == 200
        await until(lambda: served.server.worker.context.counters.faults)
        assert served.server.worker.context.counters.faults == {"B1": 1}


class BadLog(Log):
    def log(self, entry: Any) -> None:
        super().log(entry)
        if len(self.entries) == 2:
            raise OSError(28, "no space")


@pytest.mark.parametrize("waits", [False, True])
async def test_a_log_that_fails_costs_nobody_else(autojump_clock: Any, *, waits: bool) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append(scope)
        if waits and len(called) == 5:
            await trio.sleep(0.3)
        await respond(send)

    called: list[Any] = []
    async with serving_at_rest(app, 5) as served:
        log = served.server.worker.context.access_log = BadLog()  # type: ignore[assignment]
        served.ask()
        for client in served.clients:
            assert (await client.read_response()).status == 200
        await until(lambda: len(log.entries) == 6)
        assert served.server.worker.context.counters.faults == {"S1": 1}
        outcomes = Counter(entry.outcome for entry in log.entries)
        assert outcomes == {"complete": 5, "server error": 1}


async def test_what_is_raised_between_two_requests_strands_nobody() -> None:
    async with serving_at_rest(lambda scope, receive, send: respond(send), 6) as served:
        context = served.server.worker.context
        base, calls = context.base_context, []

        class Interrupted:
            def copy(self) -> Any:
                calls.append(1)
                if len(calls) == 2:
                    raise KeyboardInterrupt
                return base.copy()

        context.base_context = Interrupted()  # type: ignore[assignment]
        served.ask()
        for client in served.clients:
            assert (await client.read_response()).status == 200


async def test_a_log_may_wake_the_app_that_waits(autojump_clock: Any) -> None:
    """Before trio knows that it waits, to wake it would be the end of the worker, should it be cancelled as well."""
    event = trio.Event()

    class Waking(Log):
        def log(self, entry: Any) -> None:
            super().log(entry)
            event.set()
            for connection in served.connections:
                if connection.exchange is not None and connection.exchange is not entry:
                    connection.scope.cancel()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append(scope)
        if len(called) == 2:
            await event.wait()
        await respond(send)

    called: list[Any] = []
    async with serving_at_rest(app, 2) as served:
        served.server.worker.context.access_log = Waking()  # type: ignore[assignment]
        served.ask()
        for client in served.clients:
            with suppress(OSError):
                await client.read_response()
        assert served.server.worker.context.counters.faults == {}


async def test_the_app_is_told_why_it_is_cancelled(autojump_clock: Any) -> None:
    reasons: list[str | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled as cancelled:
            reasons.append(cancelled.reason)
            raise

    async with serving_at_rest(app, 1, request_timeout=2) as served:
        assert (await served.client.get("/")).status == 503
    async with serving_at_rest(app, 1, graceful_timeout=2) as served:
        served.ask()
        await until(lambda: served.connection.exchange is not None)
        served.server.worker.context.drain.begin("a test")
        assert (await served.client.read_response()).status == 503
    assert reasons == ["late: request", "drain: a test"]


async def test_the_method_in_the_table_is_right_whoever_runs_the_app() -> None:
    found: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.append((scope["method"], [request.method for request in table.read()]))
        await respond(send)

    table = InFlightTable.create()
    try:
        async with serving_at_rest(app, in_flight=table) as served:
            client = served.server.connect()
            async with client:
                await client.get("/warm")
                for request in (
                    GET * 2,
                    head("POST /x HTTP/1.1", "Content-Length: 0"),
                    head("GET /x HTTP/1.1", "Connection: close"),
                ):
                    await trio.testing.wait_all_tasks_blocked()
                    await client.send(request)
                    for _ in range(request.count(b"\r\n\r\n")):
                        await client.read_response()
        assert [method for method, _ in found] == ["GET", "GET", "POST", "GET"]
        assert all(listed == [method] for method, listed in found)
    finally:
        table.close()


async def test_who_blocks_the_loop_in_a_lane_is_found() -> None:
    found: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert in_lane()
        worker = served.server.worker.context
        found.append(blocked_loop._find_connection(worker, trio.lowlevel.current_task()))
        await respond(send)

    async with serving_at_rest(app, 3) as served:
        served.ask()
        for client in served.clients:
            await client.read_response()
        assert sorted(found, key=lambda connection: connection.id) == served.connections


# -- how many, and when --------------------------------------------------------------------------------------


async def test_an_app_that_waits_goes_to_the_tasks_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1_turn, "_REQUESTS_APART", 4)
    monkeypatch.setattr(http1_turn, "_MOST_APART", 8)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.append(in_lane())
        if waits:
            await trio.lowlevel.checkpoint()
        await respond(send)

    async def ask(times: int) -> str:
        found.clear()
        for _ in range(times):
            assert (await served.client.get("/")).status == 200
            await at_rest(served.connection)
        return "".join("-L"[lane] for lane in found)

    found: list[bool] = []
    waits = True
    async with serving_at_rest(app) as served:
        assert await ask(25) == "L----" + "L--------" * 2 + "L-"
        waits = False
        assert await ask(10) == "-------LLL"
        waits = True
        assert await ask(6) == "L----L"


async def test_lanes_that_are_not_needed_any_more_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1_lane, "_MOST_SPARE", 2)
    go = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await go.wait()
        await respond(send)

    async with serving_at_rest(app, 6) as served:
        for client in served.clients:
            client.sock.send(GET)
            await trio.testing.wait_all_tasks_blocked()
            await trio.testing.wait_all_tasks_blocked()
        tasks = [weakref.ref(lane.task) for lane in lanes(served)]
        assert len(tasks) > 3
        gc.collect()
        gc.disable()  # those that end do not wait for it, nor does what they have served
        try:
            go.set()
            for client in served.clients:
                assert (await client.read_response()).status == 200
            await until(lambda: len(lanes(served)) == 2)
            assert len(http_turn(served).spare) == 2
            # trio remembers the task that it has run last.
            await until(lambda: sum(task() is not None for task in tasks) <= 3)
        finally:
            gc.enable()
