"""Who serves what the kernel has queued when a worker drains: whoever goes on listening, and otherwise the worker.

And where nobody listens any more, nobody is queued: who connects is refused.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from trioserve.testing import RawClient, connect, encode_request

from .process import (
    RUNNING_ON,
    ServerProcess,
    held_request,
    serve_command,
    wait_refused,
)
from .test_supervisor import children, is_running, supervised

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


# -- where nobody listens any more -----------------------------------------------------------------------------

BLOCKS_LATER = """
import os, time

serves = app


async def app(scope, receive, send):
    if scope["type"] == "lifespan" and os.path.exists(os.environ["BLOCKS"]):
        print("blocking", flush=True)
        time.sleep(600)
    await serves(scope, receive, send)
"""


@pytest.mark.parametrize("upgraded", [False, True], ids=["reload", "then an upgrade"])
async def test_what_a_reload_drops_refuses_once_the_old_workers_drain(upgraded: bool, tmp_path: Path) -> None:
    """Not only when the last of them has ended, which may take an hour."""
    config, dropped = tmp_path / "server.toml", tmp_path / "dropped.sock"
    config.write_text(f"bind = ['127.0.0.1:0', '127.0.0.2:0', 'unix:{dropped}']\n")
    async with supervised("-c", str(config), "--graceful-timeout", "60", workers=1, bind=None) as server:
        too = (await server.stderr.wait_for(RUNNING_ON))[1]
        async with held_request(server) as held:
            config.write_text("bind = ['127.0.0.1:0']\n")
            server.send_signal(signal.SIGHUP)
            await server.stderr.wait_for("draining: reload; 1 requests in flight")
            await wait_refused(too)
            await wait_refused(f"unix:{dropped}")
            assert (await server.get()).status == 200
            if upgraded:
                listed = len(server.stderr.text)
                server.send_signal(signal.SIGUSR2)
                found = await server.stderr.wait_for(r"the new supervisor \(pid (\d+)\) is ready")
                assert RUNNING_ON.findall(server.stderr.text[listed:]) == [server.address]
            await finish(held)
        if upgraded:
            await server.stderr.wait_for(r"\] stopped")
            assert (await server.get()).status == 200
            os.kill(int(found[1]), signal.SIGTERM)
            assert await server.wait() == 0
        else:
            await server.stderr.wait_for("reloaded: generation 2")
        assert not dropped.exists()


async def test_what_a_reload_drops_is_served_until_the_old_workers_drain(tmp_path: Path) -> None:
    """One at a time is replaced, and none of them but the last takes the address along."""
    may_import, config, module = tmp_path / "may-import", tmp_path / "server.toml", tmp_path / "app.py"
    module.write_text((Path(__file__).parent / "apps.py").read_text())
    config.write_text("bind = ['127.0.0.1:0', '127.0.0.2:0']\n")
    async with serve_command(f"{module}:app", "-c", str(config), workers=2, bind=None) as server:
        too = (await server.stderr.wait_for(RUNNING_ON))[1]
        old = set(children(server.pid))
        config.write_text("bind = ['127.0.0.1:0']\n")
        # The first of the new workers starts, the second one waits.
        module.write_text(
            module.read_text()
            + "import time\nfrom pathlib import Path\n"
            + f"mark, gate = Path({str(tmp_path / 'mark')!r}), Path({str(may_import)!r})\n"
            + "if mark.exists():\n    while not gate.exists(): time.sleep(0.01)\n"
            + "mark.touch()\n"
        )
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("draining: reload")
        async with connect(too) as client:
            assert int((await client.get("/pid")).body) in old
        may_import.touch()
        await server.stderr.wait_for("reloaded: generation 2")
        await wait_refused(too)


async def test_a_startup_that_blocks_queues_nobody_when_the_service_stops(tmp_path: Path) -> None:
    module, blocks = tmp_path / "app.py", tmp_path / "blocks"
    module.write_text((Path(__file__).parent / "apps.py").read_text() + BLOCKS_LATER)
    async with serve_command(f"{module}:app", workers=1, env={"BLOCKS": str(blocks)}) as server:
        (worker,) = children(server.pid)
        blocks.touch()
        os.kill(worker, signal.SIGKILL)
        await server.stdout.wait_for("blocking")
        (deaf,) = children(server.pid)
        server.connect().close()
        server.send_signal(signal.SIGTERM)
        await wait_refused(server.address)
        assert is_running(deaf)
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0


async def test_a_startup_that_blocks_queues_nobody_once_the_others_drain(tmp_path: Path) -> None:
    module, blocks = tmp_path / "app.py", tmp_path / "blocks"
    module.write_text((Path(__file__).parent / "apps.py").read_text() + BLOCKS_LATER)
    flags = ("--graceful-timeout", "60")
    async with serve_command(f"{module}:app", *flags, workers=1, env={"BLOCKS": str(blocks)}) as server:
        async with held_request(server) as held:
            (worker,) = children(server.pid)
            blocks.touch()
            server.send_signal(signal.SIGTTIN)
            await server.stdout.wait_for("blocking")
            (deaf,) = set(children(server.pid)) - {worker}
            server.send_signal(signal.SIGTERM)
            await server.stderr.wait_for("draining: SIGTERM; 1 requests in flight")
            await wait_refused(server.address)
            assert is_running(deaf)
            await finish(held)
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
