"""Limits: connections at once, requests at once, and the short queue in front of them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import trio
import trio.testing

from trioserve import testing
from trioserve.errors import RequestRefused
from trioserve.structure.admission import Admission
from trioserve.structure.drain import DrainState
from trioserve.testing import RawClient, Response, TestServer, encode_request

from ..apps import respond

serving = functools.partial(testing.serving, lifespan="off")


class Gate:
    """An app whose requests stay until the gate opens; counts those inside."""

    def __init__(self) -> None:
        self.open = trio.Event()
        self.inside = self.most = self.called = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.called += 1
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            if scope["path"] != "/fail":
                await self.open.wait()
            else:
                raise ValueError("boom")
        finally:
            self.inside -= 1
        await respond(send)


async def blocked() -> None:
    await trio.testing.wait_all_tasks_blocked(0.01)


# -- the places by themselves --------------------------------------------------------------------------------


async def test_places_are_handed_on_in_turn(autojump_clock: Any) -> None:
    admission = Admission(1, 10, 5)
    order: list[int] = []

    async def take(n: int) -> None:
        await admission.acquire()
        order.append(n)

    async with trio.open_nursery() as nursery:
        for n in range(4):
            nursery.start_soon(take, n)
            await blocked()
        assert (admission.admitted, admission.queued) == (1, 3)
        for _ in range(3):
            admission.release()
            await blocked()
    assert order == [0, 1, 2, 3]
    admission.release()
    assert (admission.admitted, admission.queued) == (0, 0)


async def test_a_newcomer_does_not_overtake_the_queue(autojump_clock: Any) -> None:
    admission = Admission(1, 10, 5)
    await admission.acquire()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(admission.acquire)
        await blocked()
        admission.release()  # the place is the waiter's, although he has not had his turn
        with pytest.raises(RequestRefused), trio.fail_after(10):
            await admission.acquire()


async def test_a_waiter_that_is_cancelled_leaves_the_queue(autojump_clock: Any) -> None:
    admission = Admission(1, 10, 100)
    await admission.acquire()
    with trio.move_on_after(1):
        await admission.acquire()
    assert (admission.admitted, admission.queued) == (1, 0)
    admission.release()
    assert admission.admitted == 0


# -- max_concurrent_requests ---------------------------------------------------------------------------------


async def test_no_more_than_the_limit_are_in_the_app_at_once() -> None:
    app = Gate()
    async with serving(app, max_concurrent_requests=3, request_queue_timeout=60) as server:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(server.get)
            await blocked()
            assert app.inside == 3
            app.open.set()
        assert (app.called, app.most) == (10, 3)
        assert server.worker.context.admission is not None
        assert server.worker.context.admission.admitted == 0


async def fetch(server: TestServer, responses: list[Response]) -> None:
    responses.append(await server.get())


async def test_beyond_the_queue_is_503_with_retry_after_at_once() -> None:
    app = Gate()
    settings = {"max_concurrent_requests": 1, "request_queue_size": 1, "request_queue_timeout": 60}
    async with serving(app, **settings) as server, trio.open_nursery() as nursery:
        responses: list[Response] = []
        for _ in range(2):
            nursery.start_soon(fetch, server, responses)
            await blocked()
        refused = await server.get()
        assert (refused.status, refused.header("retry-after")) == (503, "1")
        assert refused.header("connection") == "close"
        assert server.worker.context.counters.refused == {"503": 1}
        app.open.set()
        while len(responses) < 2:
            await blocked()
        assert [response.status for response in responses] == [200, 200]
    assert app.called == 2


async def test_too_long_in_the_queue_is_503(autojump_clock: Any) -> None:
    app = Gate()
    settings = {"max_concurrent_requests": 1, "request_queue_timeout": 3}
    async with serving(app, **settings) as server, server.connect() as first:
        await first.send(encode_request("GET"))
        await blocked()
        began = trio.current_time()
        assert (await server.get()).status == 503
        assert trio.current_time() - began == pytest.approx(3, abs=0.1)
        app.open.set()
        assert (await first.read_response()).status == 200
        assert (await first.get()).status == 200


@pytest.mark.parametrize("how", ["fails", "is cancelled", "is refused"])
async def test_a_place_is_given_back_whatever_ends_the_request(autojump_clock: Any, how: str) -> None:
    app = Gate()
    settings = {"max_concurrent_requests": 1, "request_queue_timeout": 1, "on_app_error": "contain"}
    async with serving(app, request_timeout=5, **settings) as server:
        for _ in range(3):
            if how == "fails":
                assert (await server.get("/fail")).status == 500
            elif how == "is cancelled":
                assert (await server.get()).status == 503
            else:
                async with server.connect() as client:
                    await client.send(
                        encode_request("POST", headers=[("transfer-encoding", "chunked")], body=b"")
                    )
                    await client.send(b"nonsense\r\n")
                    await client.receive_all()
        assert server.worker.context.admission is not None
        assert server.worker.context.admission.admitted == 0
        app.open.set()
        assert (await server.get()).status == 200


async def test_a_drain_lets_the_queue_in(autojump_clock: Any) -> None:
    app = Gate()
    settings = {"max_concurrent_requests": 1, "request_queue_timeout": 60, "graceful_timeout": 30}
    async with serving(app, **settings) as server, trio.open_nursery() as nursery:
        responses: list[Response] = []
        for _ in range(3):
            nursery.start_soon(fetch, server, responses)
        await blocked()
        server.worker.drain.begin("test")
        await blocked()
        app.open.set()
        await server.worker.drain.wait(DrainState.STOPPED)
        await blocked()
        assert [response.status for response in responses] == [200, 200, 200]


# -- max_connections -----------------------------------------------------------------------------------------


async def test_at_the_limit_accepting_pauses_and_a_closed_connection_lets_the_next_in(hub: str) -> None:
    app = Gate()
    app.open.set()
    async with serving(app, max_connections=2, hub=hub) as server:
        clients = [server.connect() for _ in range(4)]
        for client in clients:
            await client.send(encode_request("GET"))
        await blocked()
        assert len(server.worker.context.connections) == 2
        assert server.worker.context.counters.accept_pauses >= 1
        first, second, third, fourth = clients
        assert (await first.read_response()).status == 200
        assert (await second.read_response()).status == 200
        for leaving, entering in ((first, third), (second, fourth)):
            leaving.close()
            with trio.fail_after(30):
                assert (await entering.read_response()).status == 200
        assert len(server.worker.context.connections) == 2
        third.close()
        fourth.close()


async def test_those_who_wait_in_the_kernels_queue_are_served_by_a_drain(autojump_clock: Any) -> None:
    app = Gate()
    async with serving(app, max_connections=1, graceful_timeout=30) as server:
        clients: list[RawClient] = [server.connect() for _ in range(3)]
        for client in clients:
            await client.send(encode_request("GET"))
        await blocked()
        server.worker.drain.begin("test")
        app.open.set()
        for client in clients:
            assert (await client.read_response()).header("connection") == "close"
            client.close()
