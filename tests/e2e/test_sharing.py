"""Workers share connections fairly: by what is busy, so that those that rest keep no worker from taking new ones."""

from __future__ import annotations

import os
import signal
from collections import Counter
from contextlib import ExitStack

import pytest
import trio

from trioserve.testing import RawClient, encode_request

from .process import PATIENCE, ServerProcess
from .test_supervisor import children, supervised, until

WORKERS = 4
ASKERS = 12

CLOSING = encode_request("GET", "/pid", headers=[("connection", "close")])

pytestmark = pytest.mark.slow


async def ask(client: RawClient, request: bytes) -> int:
    """The worker that answers."""
    await client.send(request)
    return int((await client.read_response()).body)


async def keep_alive(server: ServerProcess, count: int, stack: ExitStack) -> Counter[int]:
    """Open so many connections at once, ask once on each, and leave them open; how many each worker has."""
    clients = [server.connect() for _ in range(count)]
    for client in clients:
        stack.callback(client.close)
    found: Counter[int] = Counter()

    async def ask_on(client: RawClient) -> None:
        found[await ask(client, encode_request("GET", "/pid"))] += 1

    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(ask_on, client)
    return found


async def load(server: ServerProcess, count: int) -> Counter[int]:
    """So many requests, each on a connection of its own, a dozen of them at a time; how many each worker answers."""
    found: Counter[int] = Counter()
    left = count

    async def ask_on() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            async with server.connect() as client:
                found[await ask(client, CLOSING)] += 1

    async with trio.open_nursery() as nursery:
        for _ in range(ASKERS):
            nursery.start_soon(ask_on)
    return found


async def test_connections_that_come_at_once_are_spread() -> None:
    async with supervised(workers=WORKERS) as server:
        for _ in range(3):
            with ExitStack() as stack:
                found = await keep_alive(server, 64, stack)
                assert set(found) == set(children(server.pid))
                assert min(found.values()) >= 64 / WORKERS / 2, found


async def test_idle_connections_keep_no_worker_from_its_share() -> None:
    """After a worker has died the others have all connections that are kept alive, and its successor has none."""
    async with supervised("--keep-alive", "60", workers=WORKERS) as server:
        with ExitStack() as stack:
            await keep_alive(server, 120, stack)
            before = set(children(server.pid))
            os.kill(min(before), signal.SIGKILL)
            await until(lambda: len(set(children(server.pid)) - before) == 1, "a successor")
            await server.stderr.wait_for(r"worker 5 \(pid \d+\) is ready")
            workers = set(children(server.pid))
            # For a second after their last request they are as busy as the new one.
            found: Counter[int] = Counter()
            with trio.move_on_after(PATIENCE):
                while min(found[worker] for worker in workers) < 400 / WORKERS / 3:
                    found = await load(server, 400)
            assert min(found[worker] for worker in workers) >= 400 / WORKERS / 3, found
