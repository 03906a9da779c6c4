"""A peer that leaves while the app runs: the app is cancelled after the grace, however the end came to be known."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trioserve.errors import ClientDisconnected
from trioserve.testing import RawClient, encode_request, serving

GRACE = 3.0
GET = encode_request("GET")
HALF_A_BODY = encode_request("POST", headers=[("content-length", "10")]) + b"abc"


Leave = Callable[[], None]


class StubbornApp:
    """Meets the end of its client in one way or another, and then runs for ever.

    Attributes:
        leave: makes the client leave; set by the test when the client has sent its request.
        told_at, ended_at: when the end was met, and when the app was stopped.
    """

    def __init__(self, meet_end: Callable[[Any, Any, Leave], Awaitable[None]]) -> None:
        self._meet_end = meet_end
        self._leave: Leave
        self._may_begin = trio.Event()
        self.told_at = 0.0
        self.ended_at = 0.0

    def begin(self, leave: Leave) -> None:
        self._leave = leave
        self._may_begin.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._may_begin.wait()
        try:
            await self._meet_end(receive, send, self._leave)
            self.told_at = trio.current_time()
            await trio.sleep_forever()
        finally:
            self.ended_at = trio.current_time()


async def waits_for_it(receive: Any, send: Any, leave: Leave) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_leave_later, leave)
        while (await receive())["type"] != "http.disconnect":
            pass


async def _leave_later(leave: Leave) -> None:
    await wait_all_tasks_blocked(0.005)
    leave()


async def asks_before_the_hub_has_looked(receive: Any, send: Any, leave: Leave) -> None:
    await receive()
    leave()
    assert (await receive())["type"] == "http.disconnect"


async def sends_before_the_hub_has_looked(receive: Any, send: Any, leave: Leave) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    leave()
    with pytest.raises(ClientDisconnected):
        await send({"type": "http.response.body", "body": b"x" * 20_000, "more_body": True})


@pytest.mark.parametrize(
    ("meet_end", "request_bytes", "how"),
    [
        (waits_for_it, GET, "send_eof"),
        (waits_for_it, GET, "reset"),
        (waits_for_it, HALF_A_BODY, "send_eof"),
        (waits_for_it, HALF_A_BODY, "reset"),
        (asks_before_the_hub_has_looked, GET, "send_eof"),
        (asks_before_the_hub_has_looked, GET, "reset"),
        (sends_before_the_hub_has_looked, GET, "reset"),
    ],
    ids=lambda value: "half a body" if value == HALF_A_BODY else "no body" if value == GET else None,
)
async def test_an_app_that_goes_on_regardless_is_cancelled_after_the_grace(
    hub: str, meet_end: Any, request_bytes: bytes, how: str, autojump_clock: MockClock
) -> None:
    app = StubbornApp(meet_end)
    async with serving(app, hub=hub, disconnect_grace=GRACE, lifespan="off") as server:
        async with server.connect() as client:
            await client.send(request_bytes)
            await wait_all_tasks_blocked()
            app.begin(getattr(client, how))
            with trio.fail_after(2 * GRACE):
                await server.wait_idle()
            assert GRACE - 0.1 < app.ended_at - app.told_at < GRACE + 0.2
        assert server.worker.context.counters.peer_gone == 1


async def test_a_task_that_waits_for_the_end_learns_of_it_from_a_failed_send(hub: str) -> None:
    """The error of a write is the kernel's only notice; the hub's own, that comes later, is no news any more."""
    may_begin = trio.Event()
    told = trio.Event()
    clients: list[RawClient] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()

        async def wait_for_end() -> None:
            assert (await receive())["type"] == "http.disconnect"
            told.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_end)
            await may_begin.wait()
            await sends_before_the_hub_has_looked(receive, send, clients[0].reset)

    async with serving(app, hub=hub, lifespan="off") as server:
        async with server.connect() as client:
            clients.append(client)
            await client.send(GET)
            await wait_all_tasks_blocked(0.01)
            may_begin.set()
            with trio.fail_after(30):
                await told.wait()
        await server.wait_idle()
