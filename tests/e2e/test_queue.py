"""Who serves what the kernel has queued when a worker drains: whoever goes on listening, and otherwise the worker."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from trioserve.testing import RawClient, encode_request

from .process import ServerProcess, held_request
from .test_supervisor import children, supervised

pytestmark = pytest.mark.slow

# The second connection of a worker stays in the queue.
ONE_EACH = ("--max-connections", "1", "--graceful-timeout", "60")


@contextlib.asynccontextmanager
async def asking_for_pid(server: ServerProcess) -> AsyncIterator[RawClient]:
    """A client whose request has been sent."""
    async with server.connect() as client:
        await client.send(encode_request("GET", "/pid"))
        yield client


async def pid_of(client: RawClient) -> int:
    return int((await client.read_response()).body)


async def finish(client: RawClient) -> None:
    """Have a held request answered, and leave."""
    await client.send(b"!")
    assert (await client.read_response("POST")).status == 200
    client.close()


@pytest.mark.parametrize("order", [signal.SIGHUP, signal.SIGUSR2], ids=lambda number: number.name)
async def test_a_worker_leaves_the_queue_to_its_successor(order: signal.Signals) -> None:
    """It may have no time for more than it has, and its successor is as full as it is."""
    async with supervised(*ONE_EACH, workers=1) as server:
        (worker,) = children(server.pid)
        async with (
            held_request(server) as held,
            server.connect() as next_held,
            asking_for_pid(server) as waiting,
        ):
            await next_held.send(encode_request("POST", "/hold", body=b"done!")[:-1])
            server.send_signal(order)
            if order is signal.SIGUSR2:
                successor = int((await server.stderr.wait_for(r"the new supervisor is pid (\d+)"))[1])
            await server.stderr.wait_for("draining: .*; 1 requests in flight")
            await server.stdout.wait_for("holding")
            await finish(next_held)
            assert await pid_of(waiting) != worker
            await finish(held)
        if order is signal.SIGUSR2:
            os.kill(successor, signal.SIGTERM)
            assert await server.wait() == 0


@pytest.mark.parametrize("order", [signal.SIGHUP, signal.SIGUSR2], ids=lambda number: number.name)
async def test_what_is_queued_where_nobody_listens_any_more_is_served(
    order: signal.Signals, tmp_path: Path
) -> None:
    config = tmp_path / "server.toml"
    config.write_text(f'bind = ["unix:{tmp_path / "old"}"]\n')
    async with supervised("-c", str(config), *ONE_EACH, workers=1, bind=None) as server:
        (worker,) = children(server.pid)
        async with held_request(server) as held, asking_for_pid(server) as waiting:
            config.write_text(f'bind = ["unix:{tmp_path / "new"}"]\n')
            server.send_signal(order)
            assert await pid_of(waiting) == worker
            await finish(held)
        if order is signal.SIGUSR2:
            successor = int((await server.stderr.wait_for(r"the new supervisor is pid (\d+)"))[1])
            os.kill(successor, signal.SIGTERM)
            assert await server.wait() == 0
        else:
            await server.stderr.wait_for("reloaded: generation 2")


async def test_what_is_queued_when_the_service_stops_is_served() -> None:
    async with supervised(*ONE_EACH, workers=1) as server:
        (worker,) = children(server.pid)
        async with held_request(server) as held, asking_for_pid(server) as waiting:
            server.send_signal(signal.SIGTERM)
            assert await pid_of(waiting) == worker
            await finish(held)
        assert await server.wait() == 0
