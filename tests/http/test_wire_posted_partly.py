"""Responses that are posted, and of which the kernel takes only a part: whoever ends the connection sends the rest."""

from __future__ import annotations

import errno
import gc
import os
import socket
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.apps import respond
from tests.http.test_wire_framing import GET, App, bare
from tests.http.test_wire_posted import no_lanes, posting, unhurried  # noqa: F401  (fixtures)
from tests.http.test_wire_quick import Log, at_rest
from tests.waiting import until
from trioserve.http.http1_exchange import Http1Exchange
from trioserve.structure import context
from trioserve.structure.context import ConnectionContext
from trioserve.testing import RawClient, TestServer

pytestmark = [pytest.mark.modes("tls", because="HTTP/2 does not post"), pytest.mark.usefixtures("posting")]

# The most that is posted, and more than two buffers of the least size take.
BODY = bytes(range(256)) * 64


@pytest.fixture
def posted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the kernel has left of each post."""
    left: list[int] = []
    send = Http1Exchange.send_posted

    def send_and_note(self: Http1Exchange, data: bytes) -> None:
        send(self, data)
        left.append(sum(map(len, self.queue)))

    monkeypatch.setattr(Http1Exchange, "send_posted", send_and_note)
    return left


async def wait_posted(posted: list[int]) -> None:
    await until(lambda: posted)


async def read_all(client: RawClient, posted: list[int]) -> None:
    """Wait until it is posted, which must have left something, and read it to its end."""
    await wait_posted(posted)
    response = await client.read_response()
    assert (response.body == BODY, response.complete) == (True, True)
    assert posted[0]


async def giving(scope: Any, receive: Any, send: Any) -> None:
    await respond(send, BODY)


@asynccontextmanager
async def narrow(app: App, **settings: Any) -> AsyncIterator[tuple[TestServer, RawClient]]:
    """A server, a client that has read nothing, and its connection, on which little is under way at a time."""
    async with (
        bare(app, hub="epoll", lifespan="off", **settings) as server,
        server.connect(receive_buffer=4096) as client,
    ):
        await until(lambda: server.worker.context.connections and only(server).phase == "first_byte")
        only(server).transport.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await at_rest(only(server))
        yield server, client


def only(server: TestServer) -> ConnectionContext:
    (connection,) = server.worker.context.connections
    return connection


async def raising(scope: Any, receive: Any, send: Any) -> None:
    await respond(send, BODY)
    raise RuntimeError("after its response")


async def test_a_peer_that_has_sent_its_fin_gets_all_of_it(posted: list[int]) -> None:
    async with narrow(giving) as (server, client):
        await client.send(GET)
        client.send_eof()
        await read_all(client, posted)
        await server.wait_idle()


async def test_what_the_app_raises_then_takes_nothing_off_it(posted: list[int]) -> None:
    async with narrow(raising) as (server, client):
        await client.send(GET)
        await read_all(client, posted)
        client.close()
        await server.wait_idle()
        assert server.worker.context.counters.faults == {"A4": 1}


async def test_a_drain_that_closes_what_is_idle_at_once_sends_it_before(
    posted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, BODY)
        server.worker.context.drain.begin("test")

    # As for one that is idle for longer, since its app has held up the loop.
    monkeypatch.setattr(context, "LAST_REQUEST_PATIENCE", 0.0)
    async with narrow(app) as (server, client):
        await client.send(GET)
        await read_all(client, posted)


@pytest.mark.parametrize("end", ["reset", "late", "cut"])
async def test_what_is_not_read_to_its_end_is_on_the_books_once(
    posted: list[int], autojump_clock: Any, end: str
) -> None:
    settings: dict[str, Any] = {"response_write_timeout": 5, "max_concurrent_requests": 3}
    async with narrow(giving, graceful_timeout=2, **settings) as (server, client):
        worker = server.worker.context
        log = worker.access_log = Log()  # type: ignore[assignment]
        await client.send(GET)
        await wait_posted(posted)
        assert posted[0]
        await wait_all_tasks_blocked()
        assert worker.in_flight == 1
        if end == "reset":
            client.reset()
        elif end == "cut":
            worker.drain.begin("test")
        await server.wait_idle()
        assert [(entry.target, entry.status) for entry in log.entries] == [(b"/", 200)]
        assert worker.admission is not None
        assert worker.admission.admitted == 0


async def test_one_whose_app_raises_gives_its_place_back_once(posted: list[int]) -> None:
    async with narrow(raising, max_concurrent_requests=3) as (server, client):
        await client.send(GET)
        await wait_posted(posted)
        client.reset()
        await server.wait_idle()
        assert server.worker.context.admission is not None
        assert server.worker.context.admission.admitted == 0


async def test_the_time_until_the_next_request_begins_with_the_last_byte(
    posted: list[int], autojump_clock: Any
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, BODY)
        await wait_posted(posted)

    async with narrow(app, keep_alive_timeout=2) as (server, client):
        await trio.sleep(1)
        await client.send(GET)
        await wait_posted(posted)
        assert posted[0]
        await trio.sleep(5)
        response = await client.read_response()
        assert (response.body == BODY, response.complete) == (True, True)
        await trio.sleep(1)
        posted.clear()
        assert (await client.get()).body == BODY
        assert server.worker.context.counters.late == {}


async def test_a_connection_on_which_it_could_not_be_sent_is_over(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: Any
) -> None:
    """There may be nothing wrong with the connection but that a response is missing on it."""

    async with narrow(giving) as (server, client):
        transport = only(server).transport

        def send(_data: Any, _flags: int = 0) -> int:
            error = OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
            transport._note_broken(error)
            raise error

        monkeypatch.setattr(type(transport), "send_nowait", lambda _self, data, flags=0: send(data, flags))
        await client.send(GET)
        with suppress(ConnectionResetError):
            assert await client.receive() == b""
        await server.wait_idle()
        assert server.worker.context.counters.late == {}


async def test_one_that_is_cancelled_then_is_not_left_to_the_collector(posted: list[int]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, BODY)
        only(server).scope.cancel()

    async with narrow(app) as (server, client):
        gone = weakref.ref(only(server))
        await client.send(GET)
        gc.collect()
        gc.disable()
        try:
            await server.wait_idle()
            await wait_all_tasks_blocked()
            assert posted[0]
            assert gone() is None
        finally:
            gc.enable()
