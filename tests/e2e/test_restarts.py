"""When workers keep failing, are signalled or reloaded faster than they start, or the machine has little to give."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio

from .process import PATIENCE, require_tool, serve_command, start_process, trioserve_command
from .test_preload import workers_of
from .test_supervisor import APP, answering, children, until

pytestmark = pytest.mark.slow


async def test_who_fails_at_once_and_takes_long_to_end_evades_no_rule() -> None:
    """Each of them announces its end; were they judged only when they are gone, there would be no end of them."""
    app = "tests.e2e.dying:fails_and_stays"
    async with serve_command(app, "--preload", "--shutdown-timeout", "60", workers=1) as server:

        async def ask_for_ever() -> None:
            while True:
                assert (await server.get()).status == 500

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask_for_ever)
                await server.stderr.wait_for("giving up: .*fast failure 5 of 5 in 60 s")
                nursery.cancel_scope.cancel()
        assert server.stderr.text.count("started, generation") == 5
        assert server.stderr.text.count("the next worker starts in") == 3  # there is no wait after the first
        for said in (
            "draining 5 workers: SIGTERM",
            "cancelling what still runs",
            "ending the workers at once",
        ):
            server.send_signal(signal.SIGTERM)
            await server.stderr.wait_for(said)
        assert await server.wait() == 75


async def test_a_worker_that_is_told_to_end_has_not_failed() -> None:
    async with serve_command(APP, "--preload", workers=1) as server:
        seen = {await answering(server)}
        for _ in range(6):  # the fifth would be the end
            (worker,) = workers_of(server)
            os.kill(worker, signal.SIGTERM)
            await until(lambda gone=worker: gone not in workers_of(server), "its end")
            seen.add(await answering(server))
        assert len(seen) == 7
        assert "fast failure" not in server.stderr.text


async def test_reloads_that_are_asked_for_during_one_are_one(tmp_path: Path) -> None:
    may_start = tmp_path / "may-start"
    may_start.touch()
    app = "tests.e2e.dying:waits_to_start"
    async with serve_command(app, workers=1, env={"MAY_START": str(may_start)}) as server:
        may_start.unlink()
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reloading: SIGHUP")
        server.send_signal(signal.SIGHUP)
        for _ in range(3):
            # What the kernel makes of several at once is its affair: each is to be seen.
            said = server.stderr.text.count("will do")
            while server.stderr.text.count("will do") == said:
                server.send_signal(signal.SIGHUP)
                await trio.sleep(0.01)
        may_start.touch()
        await server.stderr.wait_for("reloaded: generation 2")
        await server.stderr.wait_for("reloaded: generation 3")
    # A third would have begun with the end of the second.
    assert server.stderr.text.count("reloading: SIGHUP") == 2


async def test_few_descriptors_are_enough() -> None:
    flags = ("--bind", "127.0.0.1:0", "--workers", "2", "--control", "off", APP)
    few = [require_tool("bash"), "-c", 'ulimit -n 48; exec "$@"', "bash"]
    async with start_process(*few, *trioserve_command(*flags)) as server:
        await server.wait_running()
        before = set(children(server.pid))
        assert await answering(server) in before
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reloaded: generation 2")
        assert len(children(server.pid)) == 2
        assert not before & set(children(server.pid))


async def test_too_few_descriptors_are_named() -> None:
    flags = ("--bind", "127.0.0.1:0", "--workers", "2", "--control", "off", APP)
    few = [require_tool("bash"), "-c", 'ulimit -n 18; exec "$@"', "bash"]
    async with start_process(*few, *trioserve_command(*flags)) as server:
        await server.stderr.wait_for("cannot start a worker: .*Too many open files")
