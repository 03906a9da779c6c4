"""Scale to zero: when a worker ends because nobody needs it, and that no connection is lost when it does."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

import trioserve
from tests.apps import Scope, hello, respond
from trioserve.config import Config
from trioserve.net.bind import open_listeners
from trioserve.structure.drain import DrainState
from trioserve.testing import RawClient, TestServer, connect, encode_request, serving
from trioserve.worker.worker import Worker, serve_worker

IDLE = 60.0

SETTINGS: dict[str, Any] = {"exit_when_idle": IDLE, "workers": 0}


async def lasting(scope: Scope, receive: Any, send: Any) -> None:
    """Answers after as many seconds as the path says."""
    if scope["type"] == "http":
        await trio.sleep(float(scope["path"][1:]))
        await respond(send)


async def ended_at(server: TestServer) -> float:
    """When the drain began; the worker's own end is waited for by `serving`."""
    await server.worker.drain.wait(DrainState.DRAINING)
    assert server.worker.drain.reason == "idle for 60 s (exit_when_idle)"
    return trio.current_time()


# -- when ---------------------------------------------------------------------------------------------------------


async def test_a_worker_that_nobody_calls_ends_after_its_time(autojump_clock: MockClock) -> None:
    async with serving(hello, **SETTINGS) as server:
        began = trio.current_time()
        assert await ended_at(server) == pytest.approx(began + IDLE)
    assert server.failure is None


async def test_after_the_last_request_it_ends_within_once_and_twice_its_time(
    autojump_clock: MockClock,
) -> None:
    async with serving(hello, **SETTINGS) as server:
        for _ in range(5):
            assert (await server.get()).body == b"hello"
            await trio.sleep(IDLE * 0.9)
        assert server.worker.drain.state is DrainState.RUNNING
        last = trio.current_time() - IDLE * 0.9
        assert last + IDLE <= await ended_at(server) <= last + 2 * IDLE


async def test_a_request_in_flight_holds_it_for_as_long_as_it_lasts(autojump_clock: MockClock) -> None:
    async with serving(lasting, **SETTINGS) as server, server.connect() as client:
        assert (await client.get("/605")).body == b"hello"
        answered = trio.current_time()
        assert answered + IDLE <= await ended_at(server) <= answered + 2 * IDLE


async def test_a_request_that_ends_just_before_it_looks_has_its_whole_time_after_it(
    autojump_clock: MockClock,
) -> None:
    """It is in flight at 60 s and over at 119 s; nothing new has come when the worker looks at 120 s."""
    async with serving(lasting, **SETTINGS) as server:
        await trio.sleep(59)
        assert (await server.get("/60")).body == b"hello"
        answered = trio.current_time()
        assert answered + IDLE <= await ended_at(server) <= answered + 2 * IDLE


async def test_idle_connections_do_not_hold_it_and_are_closed(autojump_clock: MockClock) -> None:
    async with serving(hello, **SETTINGS, keep_alive_timeout=10_000, first_byte_timeout=None) as server:
        async with server.connect() as used, server.connect() as silent:
            await used.get()
            began = trio.current_time()
            assert await ended_at(server) <= began + 2 * IDLE
            assert await used.receive() == b""
            assert await silent.receive() == b""


async def test_a_request_that_arrives_slowly_holds_it(autojump_clock: MockClock) -> None:
    async with serving(hello, **SETTINGS, request_head_timeout=None) as server:
        async with server.connect() as client:
            await client.send(encode_request("GET")[:-2])
            await trio.sleep(10 * IDLE)
            assert server.worker.drain.state is DrainState.RUNNING
            await client.send(b"\r\n")
            assert (await client.read_response()).body == b"hello"
        await ended_at(server)


async def test_the_delay_for_load_balancers_is_not_waited_for(autojump_clock: MockClock) -> None:
    async with serving(hello, **SETTINGS, pre_drain_delay=500) as server:
        await ended_at(server)
        began = trio.current_time()
        await server.worker.drain.wait(DrainState.STOPPED)
        assert trio.current_time() < began + 5


async def test_it_is_off_by_default_and_in_library_use(autojump_clock: MockClock) -> None:
    config = Config()
    assert config.exit_when_idle is None
    config.bind = ["127.0.0.1:0"]
    config.exit_when_idle = IDLE
    async with trio.open_nursery() as nursery:
        (address,) = await nursery.start(trioserve.serve, hello, config)
        await trio.sleep(10 * IDLE)
        async with connect(address) as client:
            assert (await client.get()).body == b"hello"
        nursery.cancel_scope.cancel()


# -- at what cost -------------------------------------------------------------------------------------------------


class Sleeper(trio.abc.Instrument):
    """Counts the turns of one task."""

    def __init__(self) -> None:
        self.turns = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.turns += task.name == "exit when idle"


async def test_it_wakes_once_in_its_time_busy_or_not(autojump_clock: MockClock) -> None:
    async with serving(hello, **SETTINGS, keep_alive_timeout=100) as server:
        sleeper = Sleeper()
        trio.lowlevel.add_instrument(sleeper)
        async with server.connect() as client:
            for _ in range(30):
                await client.get()
                await trio.sleep(20)
        trio.lowlevel.remove_instrument(sleeper)
        assert 9 <= sleeper.turns <= 11


# -- nobody is lost -----------------------------------------------------------------------------------------------


async def test_who_calls_in_the_very_moment_is_served_and_who_calls_later_by_the_next_worker(
    hub: str, autojump_clock: MockClock
) -> None:
    """The listening socket is the test's, as it is systemd's: one descriptor of it stays open all the time."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        address = f"127.0.0.1:{held.getsockname()[1]}"
        waiting: list[RawClient] = []

        def call() -> None:
            client = connect(address)
            client.sock.sendall(encode_request("GET"))
            waiting.append(client)

        for _ in range(5):
            call()  # nothing runs
            worker = await serve_until_idle(held, hub, at_the_last_moment=call)
            assert worker.context.counters.connections == 2
            for client in waiting:
                async with client:
                    assert (await client.read_response()).body == b"hello"
            waiting.clear()


async def serve_until_idle(held: socket.socket, hub: str, at_the_last_moment: Callable[[], None]) -> Worker:
    config = Config.from_mapping(SETTINGS, hub=hub, errorlog=logging.getLogger("trioserve.tests"))
    with trio.fail_after(1000):
        return await serve_worker(
            hello,
            config,
            sockets=open_listeners([f"fd://{held.dup().detach()}"]),
            on_worker=lambda worker: worker.drain.on_begin(at_the_last_moment),
        )
