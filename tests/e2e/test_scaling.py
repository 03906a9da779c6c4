"""The number of workers follows the load, and workers that have grown old or large are replaced: with real processes.

What takes the supervisor a minute takes it a second here (`hurried.py`), and workers are forked, which is quicker.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from trioserve.testing import encode_request

from .load import Load
from .process import ServerProcess, serve_command
from .test_preload import workers_of
from .test_supervisor import APP, answering, until

MIB = 1024 * 1024

pytestmark = pytest.mark.slow


@asynccontextmanager
async def hurried(*flags: str, workers: int | str | None) -> AsyncIterator[ServerProcess]:
    async with serve_command(APP, "--preload", *flags, workers=workers, module="tests.e2e.hurried") as server:
        yield server


@asynccontextmanager
async def burning(server: ServerProcess) -> AsyncIterator[None]:
    """One worker is as busy as it can be."""
    async with server.connect() as client:
        await client.send(encode_request("POST", "/burn", body=b"done!")[:-1])
        yield
        await client.send(b"!")
        assert (await client.read_response("POST")).status == 200


# -- MIN..MAX ------------------------------------------------------------------------------------------------


async def test_there_are_more_workers_under_load_and_fewer_after_it() -> None:
    async with hurried(workers="1..2") as server:
        assert len(workers_of(server)) == 1
        async with burning(server):
            grown = await server.stderr.wait_for(r"scaling from 1 to 2 workers: (.*)")
            await until(lambda: len(workers_of(server)) == 2, "a second worker")
        shrunk = await server.stderr.wait_for(r"scaling from 2 to 1 workers: (.*)")
        await until(lambda: len(workers_of(server)) == 1, "a single worker")
        assert [await answering(server)] == workers_of(server)
    used = re.match(
        r"CPU utilisation of 1 ready worker (\d+)%, above 15% for \d+ s: now 2 of 1\.\.2", grown.group(1)
    )
    assert used, grown.group()
    assert 15 < int(used.group(1)) <= 110  # its CPU time is counted in ticks
    assert re.match(
        r"CPU utilisation of 2 ready workers \d+%; with one fewer it would be \d%, below 10% for \d+ s: "
        r"now 1 of 1\.\.2",
        shrunk.group(1),
    ), shrunk.group()


async def test_a_reload_brings_a_range_and_takes_it_away(tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text("workers = 1\n")
    async with hurried("-c", str(config), workers=None) as server:
        config.write_text('workers = "1..2"\n')
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reloaded: generation 2")
        async with burning(server):
            await server.stderr.wait_for("scaling from 1 to 2 workers")
            await until(lambda: len(workers_of(server)) == 2, "a second worker")
        config.write_text('workers = "3..4"\n')
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reload: from [12] to 3 workers")
        await until(lambda: len(workers_of(server)) == 3, "three workers")
        config.write_text("workers = 1\n")
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reload: from [34] to 1 workers")
        await until(lambda: len(workers_of(server)) == 1, "a single worker")


async def test_what_was_changed_by_hand_stays_over_reloads_and_upgrades(tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text("workers = 2\n")
    async with hurried("-c", str(config), "--control", "off", workers=None) as server:
        server.send_signal(signal.SIGTTOU)
        await until(lambda: len(workers_of(server)) == 1, "one worker fewer")
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reloaded: generation 2")
        server.send_signal(signal.SIGUSR2)
        first = int((await server.stderr.wait_for(r"the new supervisor \(pid (\d+)\) is ready"))[1])
        assert server.stderr.text.count("started, generation") == 4
        config.write_text("workers = 3\n")
        os.kill(first, signal.SIGUSR2)
        second = int((await server.stderr.wait_for(r"the new supervisor \(pid (\d+)\) is ready"))[1])
        assert server.stderr.text.count("started, generation") == 7
        os.kill(second, signal.SIGTERM)
        assert await server.wait() == 0


# -- recycling -----------------------------------------------------------------------------------------------


async def test_a_worker_is_replaced_for_its_age_and_no_request_is_lost() -> None:
    async with hurried("--max-lifetime", "1.5", workers=2) as server:
        first = set(workers_of(server))
        load = Load(server.address, 8)
        async with load.running():
            await until(lambda: not first & set(workers_of(server)), "two new workers")
            await load.wait_for(50)
        assert not load.failures, str(load)
    assert re.search(r"recycling worker [12]: it has run for \d+ s, its limit is [12] s", server.stderr.text)
    assert_replaced_first(server.stderr.text, workers=2)


async def test_a_worker_that_has_grown_too_large_is_replaced_and_no_request_is_lost() -> None:
    async with hurried("--max-rss", str(160 * MIB), workers=1) as server:
        (first,) = workers_of(server)
        load = Load(server.address, 8)
        async with load.running():
            await load.wait_for(50)
            assert workers_of(server) == [first]
            assert (await server.get("/grow?160")).status == 200
            await until(lambda: first not in workers_of(server), "its end")
            await load.wait_for(50)
        assert not load.failures, str(load)
        assert [await answering(server)] == workers_of(server)
    found = re.findall(
        r"recycling worker (\d+): it uses (\d+) MiB of memory, its limit is (\d+) MiB", server.stderr.text
    )
    assert [worker for worker, _, _ in found] == ["1"]
    assert int(found[0][1]) > 160 >= int(found[0][2]) >= 144
    assert_replaced_first(server.stderr.text, workers=1)


def assert_replaced_first(log: str, workers: int) -> None:
    """Whoever was recycled began to drain only when a further worker was ready."""
    ready = 0
    draining: set[str] = set()
    for ready_one, recycled in re.findall(
        r"worker (\d+) \(pid \d+\) is ready|worker (\d+) \(pid \d+\) ended: recycled", log
    ):
        if ready_one:
            ready += 1
        else:
            draining.add(recycled)
            assert ready - len(draining) >= workers, log
    assert draining, log
