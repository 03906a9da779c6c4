"""Responses that leave with others at the end of a turn of the hub: none is lost, late or overtaken."""

from __future__ import annotations

import gc
import socket
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import pytest
import trio
import trio.testing

from tests.apps import respond
from tests.http.feeding import head
from tests.http.test_wire_framing import App, bare
from tests.http.test_wire_quick import Log, at_rest, unhurried  # noqa: F401  (a fixture)
from tests.waiting import until
from trioserve.http import http1_turn
from trioserve.net import epoll_hub
from trioserve.observe.in_flight import InFlightTable
from trioserve.structure.context import ConnectionContext
from trioserve.testing import RawClient, TestServer

pytestmark = pytest.mark.modes("tls", because="HTTP/2 has a task for each stream")

GET = head("GET /first HTTP/1.1")
SECOND = head("GET /second HTTP/1.1")

# Fits into one write, but not into buffers that were made small.
BODY = b"0123456789abcdef" * 1000


@pytest.fixture(autouse=True)
def no_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """This is about responses of tasks."""
    monkeypatch.setattr(http1_turn, "_ENOUGH_FOR_LANE", 1000)


@pytest.fixture
def posting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single request in a turn is enough."""
    monkeypatch.setattr(epoll_hub, "_ENOUGH_TO_POST", 1)


def has_come(client: RawClient) -> bool:
    """Whether the kernel has something for the client."""
    try:
        return bool(socket.socket.recv(client.sock, 1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


class Served:
    """A server, clients that have had an answer each, and the connections of these."""

    def __init__(
        self, server: TestServer, clients: list[RawClient], connections: list[ConnectionContext]
    ) -> None:
        self.server = server
        self.clients = clients
        self.connections = connections

    @property
    def client(self) -> RawClient:
        return self.clients[0]

    @property
    def connection(self) -> ConnectionContext:
        return self.connections[0]

    def ask(self, request: bytes = GET) -> None:
        """All at once: the server does not run in between."""
        for client in self.clients:
            assert client.sock.send(request) == len(request)


@asynccontextmanager
async def serving_at_rest(
    app: App, count: int = 1, in_flight: InFlightTable | None = None, **settings: Any
) -> AsyncIterator[Served]:
    async def gated(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/warm":
            await respond(send, b"warm")
        else:
            await app(scope, receive, send)

    async with (
        bare(gated, hub="epoll", lifespan="off", **settings) as server,
        AsyncExitStack() as stack,
    ):
        if in_flight is not None:
            server.worker.context.in_flight_table = InFlightTable.attach(in_flight.fd)
        clients = []
        for _ in range(count):
            clients.append(await stack.enter_async_context(server.connect(receive_buffer=4096)))
            assert (await clients[-1].get("/warm")).body == b"warm"
        connections = sorted(server.worker.context.connections, key=lambda connection: connection.id)
        for connection in connections:
            await at_rest(connection)
        yield Served(server, clients, connections)


# -- together ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (3, [0, 1, 2]),
        (6, [0] * 6),
        (20, [0] * 16 + [16] * 4),
    ],
)
@pytest.mark.parametrize("seconds", [60.0, 0.0], ids=["read by the hub", "read by the tasks"])
async def test_the_responses_of_a_turn_leave_together(
    count: int, expected: list[int], seconds: float, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epoll_hub, "_BUSY_SECONDS", seconds)
    seen: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(sum(map(has_come, served.clients)))
        await respond(send, b"%d" % len(seen))

    async with serving_at_rest(app, count, http_engine=engine) as served:
        served.ask()
        bodies = {(await client.read_response()).body for client in served.clients}
        assert bodies == {b"%d" % number for number in range(1, count + 1)}
    assert seen == expected


async def test_who_answers_later_answers_at_once(engine: str) -> None:
    """The outbox is closed by then, and nobody would empty it."""
    go = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await go.wait()
        await respond(send, b"late")

    async with serving_at_rest(app, 8, http_engine=engine) as served:
        served.ask()
        await trio.testing.wait_all_tasks_blocked()
        go.set()
        for client in served.clients:
            assert (await client.read_response()).body == b"late"


@pytest.mark.parametrize("request_", [head("GET / HTTP/1.1", "Connection: close"), head("GET / HTTP/1.0")])
async def test_the_last_response_of_a_connection_is_not_left_to_wait(posting: None, request_: bytes) -> None:
    seen: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, b"last")
        seen.append(has_come(served.client))

    async with serving_at_rest(app) as served:
        served.ask(request_)
        assert (await served.client.read_response()).body == b"last"
        assert await served.client.receive() == b""
    assert seen == [True]


# -- in order ------------------------------------------------------------------------------------------------


async def streaming(scope: Any, receive: Any, send: Any) -> None:
    """What is not sent in one piece is written at once, past the outbox."""
    if scope["path"] == "/first":
        await respond(send, b"first")
    else:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"sec", "more_body": True})
        await send({"type": "http.response.body", "body": b"ond"})


async def test_pipelined_requests_are_answered_in_order(posting: None, engine: str) -> None:
    async with serving_at_rest(streaming, http_engine=engine) as served:
        served.ask((GET + SECOND) * 3 + GET)
        bodies = [(await served.client.read_response()).body for _ in range(7)]
    assert bodies == [b"first", b"second"] * 3 + [b"first"]


async def test_a_request_that_comes_with_a_drain_does_not_overtake(posting: None, engine: str) -> None:
    """In a drain the task looks by itself what has come, without the hub."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await streaming(scope, receive, send)
        if scope["path"] == "/first":
            served.ask(SECOND)
            served.server.worker.context.drain.begin("test")

    async with serving_at_rest(app, http_engine=engine) as served:
        served.ask()
        first = await served.client.read_response()
        assert (first.body, first.header("connection")) == (b"first", None)
        second = await served.client.read_response()
        assert (second.body, second.header("connection")) == (b"second", "close")
        assert await served.client.receive() == b""


@contextmanager
def held_open(served: Served) -> Iterator[None]:
    """A turn that takes its time: what is posted stays where it is."""
    outbox = served.connection.transport.outbox
    outbox.open()
    try:
        yield
    finally:
        outbox.close()


async def leave_posted(served: Served) -> None:
    """Ask, and return when the response is posted and the connection waits for the next request."""
    served.ask()
    await until(lambda: served.connection.transport.outbox.posted)
    await at_rest(served.connection)
    assert not has_come(served.client)


async def test_nor_does_one_that_comes_while_the_connection_is_at_rest() -> None:
    async with serving_at_rest(streaming) as served:
        with held_open(served):
            await leave_posted(served)
            served.ask(SECOND)
            served.server.worker.context.drain.begin("test")
            served.connection.wake_for_drain()  # the hub, which would have sent the first by now, hears of nothing
            assert (await served.client.read_response()).body == b"first"
            assert (await served.client.read_response()).body == b"second"


async def test_a_connection_that_is_closed_has_sent_its_response(autojump_clock: Any) -> None:
    async with serving_at_rest(streaming, keep_alive_timeout=5) as served:
        with held_open(served):
            await leave_posted(served)
            response = await served.client.read_response()
            assert (response.body, response.complete) == (b"first", True)
            assert await served.client.receive() == b""
            assert served.server.worker.context.counters.late == {"keep_alive": 1}


async def test_an_error_after_the_response_does_not_take_it_along(posting: None) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, b"whole")
        raise RuntimeError("a bug in what follows the response")

    async with serving_at_rest(app) as served:
        served.ask()
        response = await served.client.read_response()
        assert (response.body, response.complete) == (b"whole", True)
        assert await served.client.receive() == b""
        assert sum(served.server.worker.context.counters.faults.values()) == 1


async def check_answered_before(served: Served, go: trio.Event) -> None:
    """The app's response comes before the event that it then waits for; and the connection serves on after that."""
    served.ask()
    assert (await served.client.read_response()).body == b"whole"
    assert served.connection.exchange is not None
    go.set()
    assert (await served.client.get("/warm")).body == b"warm"


async def test_an_app_that_goes_on_after_its_response_holds_nothing_up(posting: None) -> None:
    go = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, b"whole")
        await go.wait()

    async with serving_at_rest(app) as served:
        await check_answered_before(served, go)


async def test_a_request_is_in_flight_until_its_response_is_with_the_kernel() -> None:
    """So that the supervisor names it if the process dies before."""
    table = InFlightTable.create()
    try:
        async with serving_at_rest(streaming, in_flight=table) as served:
            with held_open(served):
                await leave_posted(served)
                assert [request.path for request in table.read()] == ["/first"]
                served.connection.transport.outbox.flush()
                assert table.read() == []
                assert (await served.client.read_response()).body == b"first"
            assert (await served.client.get("/second")).body == b"second"
            await at_rest(served.connection)
            assert table.read() == []
    finally:
        table.close()


async def test_an_idle_connection_holds_nothing_of_its_last_request(posting: None) -> None:
    class Resource:
        pass

    gone: list[weakref.ref[Any]] = []
    fields: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["resource"] = resource = Resource()
        gone.append(weakref.ref(resource))
        gone.append(weakref.ref(served.connection.exchange))
        fields.append(scope["headers"])
        await respond(send, b"whole")

    async with serving_at_rest(app) as served:
        gc.collect()
        gc.disable()
        try:
            served.ask()
            assert (await served.client.read_response()).body == b"whole"
            await at_rest(served.connection)
            assert [ref() for ref in gone] == [None, None]
            holders = sys.getrefcount(fields.pop())
            assert holders == 1  # the call itself
        finally:
            gc.enable()


# -- when the kernel does not take it ------------------------------------------------------------------------


def large(lives_on: trio.Event | None = None) -> Callable[..., Any]:
    """More than the buffers hold that `narrow` leaves."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, BODY)
        if lives_on is not None:
            await lives_on.wait()

    return app


def narrow(served: Served) -> None:
    served.connection.transport.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)


async def stuck(connection: ConnectionContext) -> None:
    await until(lambda: connection.phase == "response_write")


async def test_what_the_kernel_does_not_take_follows(posting: None, engine: str) -> None:
    async with serving_at_rest(large(), http_engine=engine) as served:
        log = served.server.worker.context.access_log = Log()  # type: ignore[assignment]
        narrow(served)
        for _ in range(2):
            served.ask()
            await stuck(served.connection)
            assert served.connection.exchange is not None
            assert (await served.client.read_response()).body == BODY
            await at_rest(served.connection)
            assert served.connection.exchange is None
            assert served.connection.phase == "keep_alive"
        assert (await served.client.get("/warm")).body == b"warm"
        assert [entry.outcome for entry in log.entries] == ["complete"] * 3
        assert served.connection.requests == 4


async def test_a_request_behind_one_that_the_kernel_does_not_take(posting: None, engine: str) -> None:
    async with serving_at_rest(large(), http_engine=engine) as served:
        narrow(served)
        served.ask(GET * 2)
        await stuck(served.connection)
        served.ask()
        bodies = [(await served.client.read_response()).body for _ in range(3)]
        assert bodies == [BODY] * 3


async def test_it_follows_while_the_app_goes_on(posting: None) -> None:
    go = trio.Event()
    async with serving_at_rest(large(go)) as served:
        narrow(served)
        served.ask()
        assert (await served.client.read_response()).body == BODY
        assert served.connection.exchange is not None
        go.set()
        assert (await served.client.get("/warm")).body == b"warm"


async def test_who_does_not_take_the_rest_is_late(posting: None, autojump_clock: Any) -> None:
    async with serving_at_rest(large(), response_write_timeout=7) as served:
        narrow(served)
        served.ask()
        await stuck(served.connection)
        await served.server.wait_idle()
        assert served.server.worker.context.counters.late == {"response_write": 1}
        assert served.server.worker.context.counters.faults == {}


async def test_a_peer_that_leaves_before_the_rest_is_no_fault(posting: None) -> None:
    async with serving_at_rest(large()) as served:
        narrow(served)
        served.ask()
        await stuck(served.connection)
        served.client.reset()
        await served.server.wait_idle()
        assert served.server.worker.context.counters.faults == {}


@pytest.mark.parametrize("lives_on", [False, True])
async def test_a_peer_that_has_left_by_then_is_no_fault(posting: None, lives_on: bool) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, BODY)
        served.client.reset()
        if lives_on:
            assert (await receive())["type"] == "http.disconnect"

    async with serving_at_rest(app) as served:
        served.ask()
        await served.server.wait_idle()
        assert served.server.worker.context.counters.faults == {}
