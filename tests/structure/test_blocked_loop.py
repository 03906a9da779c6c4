"""What a worker says of its blocked loop: the request, the line, the stack; and whose end it is not."""

from __future__ import annotations

import functools
import logging
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import trio

import trioserve
from trioserve.structure.blocked_loop import requests_in_flight
from trioserve.testing import TestServer, encode_request, no_leaks, serving

from ..apps import respond

WARN = 0.2


# Held until the block has been told of.
_told = threading.Lock()


class _Listener(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if "has been blocked" in record.msg and _told.locked():
            _told.release()


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    listener, log = _Listener(), logging.getLogger("trioserve.tests")
    log.addHandler(listener)
    yield
    log.removeHandler(listener)


def block_loop(*, until_told: bool = True) -> None:
    """For longer than it takes to be told of; and since not all time counts on a busy machine, until it is."""
    _told.acquire(blocking=False)
    time.sleep(1.5 * WARN), _told.acquire(timeout=30 if until_told else 0)  # one line: it is one place


async def blocking_task() -> None:
    block_loop()


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    if scope["path"] == "/child":
        async with trio.open_nursery() as nursery:
            nursery.start_soon(blocking_task)
    elif scope["path"] == "/hold":
        await trio.sleep_forever()
    else:
        block_loop()
    await respond(send)


async def log_of(caplog: pytest.LogCaptureFixture, server: TestServer, *targets: str) -> list[str]:
    """Make these requests, and wait until the end of the last one's block has been logged."""
    caplog.set_level(logging.WARNING, "trioserve.tests")
    for target in targets:
        assert (await server.get(target)).status == 200
    with trio.fail_after(30):
        while sum("the event loop goes on" in message for message in caplog.messages) < len(targets):
            await trio.sleep(0.01)
    return caplog.messages


async def test_the_line_names_request_place_and_time_and_the_stack_begins_with_the_task(caplog: Any) -> None:
    async with no_leaks(), serving(app, block_warn=WARN) as server:
        blocked, resumed = await log_of(caplog, server, "/block?token=hunter2")
    first = re.fullmatch(
        r"the event loop has been blocked for (\d+\.\d s) in GET /block on connection 1, at "
        r".*tests/structure/test_blocked_loop\.py:\d+ in block_loop; nobody is served until it goes on: .*",
        blocked,
    )
    assert first
    last = re.fullmatch(
        r"the event loop goes on; it had been blocked for (\d+\.\d) s in all in GET /block on connection 1",
        resumed,
    )
    assert last
    assert WARN <= float(first[1][:-2]) <= float(last[1])
    stack = caplog.records[0].exc_text or logging.Formatter().formatException(caplog.records[0].exc_info)
    assert re.findall(r", in (\w+)", stack)[0] == "serve_connection"
    assert stack.endswith(f"\ntrioserve.errors.LoopBlocked: for {first[1]} in GET /block on connection 1")
    assert "hunter2" not in caplog.text
    assert {record.levelname for record in caplog.records} == {"WARNING"}


async def test_the_task_of_a_request_counts_as_the_request(caplog: Any) -> None:
    async with serving(app, block_warn=WARN) as server:
        messages = await log_of(caplog, server, "/child")
    assert " in GET /child on connection 1, at " in messages[0]


async def test_the_same_place_gets_its_stack_once(caplog: Any) -> None:
    async with serving(app, block_warn=WARN) as server:
        await log_of(caplog, server, "/one", "/two")
        statistics = server.worker.context.loop_watch.statistics()
    first, _, second, _ = caplog.records
    assert (first.exc_info is not None, second.exc_info is not None) == (True, False)
    assert "in GET /two" in second.message
    assert "block_loop (its stack was logged before);" in second.message
    assert statistics.episodes == 2


async def test_a_task_that_is_no_request_is_named(caplog: Any) -> None:
    async def blocks_in_lifespan(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await trio.sleep(0.05)
            block_loop()
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await respond(send)

    caplog.set_level(logging.WARNING, "trioserve.tests")
    async with serving(blocks_in_lifespan, block_warn=WARN):
        with trio.fail_after(30):
            while not caplog.messages:
                await trio.sleep(0.01)
    assert "s in task 'lifespan', at " in caplog.messages[0]


async def test_what_is_blocked_by_startup_and_shutdown_is_not_told(caplog: Any) -> None:
    async def slow_to_come_and_go(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for event in ("startup", "shutdown"):
                await receive()
                block_loop(until_told=False)
                await send({"type": f"lifespan.{event}.complete"})

    caplog.set_level(logging.WARNING, "trioserve.tests")
    async with no_leaks(), serving(slow_to_come_and_go, block_warn=WARN):
        pass
    assert caplog.messages == []


async def test_a_block_of_the_very_end_is_still_told_of_in_full(caplog: Any) -> None:
    """The watch ends with the requests."""
    caplog.set_level(logging.WARNING, "trioserve.tests")
    async with serving(app, block_warn=WARN) as server, server.connect() as client:
        await client.send(encode_request("GET", "/block"))
        server.worker.drain.begin("test")
        assert (await client.read_response()).status == 200
    assert ["the event loop goes on" in message for message in caplog.messages] == [False, True]


async def test_in_library_use_it_only_warns(caplog: Any) -> None:
    config = trioserve.Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = logging.getLogger("trioserve.tests")
    config.block_warn, config.block_kill = WARN / 4, WARN / 2
    async with no_leaks(), trio.open_nursery() as nursery:
        (address,) = await nursery.start(functools.partial(trioserve.serve, app, config))
        async with trioserve.testing.connect(address) as client:
            for _ in range(2):  # the process still stands
                assert (await client.get("/block")).status == 200
        nursery.cancel_scope.cancel()
    assert "the event loop has been blocked" in caplog.text


@pytest.mark.parametrize("settings", [{"block_warn": None}, {"block_warn": None, "block_kill": None}])
async def test_switched_off_there_is_no_watch(settings: dict[str, Any]) -> None:
    async with serving(app, **settings) as server:
        assert server.worker.context.loop_watch is None


async def test_a_report_lists_who_is_in_flight_without_the_query() -> None:
    async with serving(app) as server, server.connect() as held, server.connect() as idle:
        assert (await idle.get("/")).status == 200
        await held.send(encode_request("GET", "/hold?token=hunter2"))
        with trio.fail_after(30):
            while not (found := requests_in_flight(server.worker.context)):
                await trio.sleep(0.01)
        (facts,) = found
        assert facts.pop("seconds") >= 0
        assert facts == {
            "method": "GET", "path": "/hold", "response_state": "none", "phase": "request", "connection_id": 1,
        }  # fmt: skip
        server.worker.drain.hurry("test")
