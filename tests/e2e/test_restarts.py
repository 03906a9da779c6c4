"""When workers keep failing, are signalled or reloaded faster than they start, or the machine has little to give."""

from __future__ import annotations

import json
import os
import signal
import site
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from .process import (
    PATIENCE,
    clean_environment,
    require_tool,
    run_to_end,
    serve_command,
    start_process,
    trioserve_command,
)
from .test_preload import workers_of
from .test_supervisor import APP, answering, children, until

pytestmark = pytest.mark.slow


async def test_who_fails_at_once_and_takes_long_to_end_evades_no_rule() -> None:
    """Each of them announces its end; were they judged only when they are gone, there would be no end of them."""
    app = "tests.e2e.dying:fails_and_stays"
    async with serve_command(app, "--preload", "--shutdown-timeout", "60", workers=1) as server:

        async def ask_until_it_ends() -> None:
            with suppress(OSError):  # nobody listens any more
                while True:
                    assert (await server.get()).status == 500

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask_until_it_ends)
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


@pytest.mark.parametrize("occasion", ["recycle", "taint", "scale", "death"])
async def test_workers_that_have_lasted_go_on_while_the_app_on_disk_is_broken(
    tmp_path: Path, occasion: str
) -> None:
    module, control = tmp_path / "changing.py", tmp_path / "control"
    whole = (Path(__file__).parent / "apps.py").read_text()
    module.write_text(whole)
    flags = (f"{module}:app", "--control", str(control))
    async with serve_command(*flags, workers=2, module="tests.e2e.hurried") as server:
        before = set(children(server.pid))
        module.write_text("raise ImportError('half a deployment')\n")
        match occasion:
            case "recycle":
                refused = await run_to_end(*ctl(control, "recycle", "1"))
                assert (refused.returncode, "not done yet: workers fail" in refused.stderr.text) == (1, True)
            case "taint":
                assert (await server.get("/raise")).status == 500
            case "scale":
                server.send_signal(signal.SIGTTIN)
            case "death":
                os.kill(min(before), signal.SIGKILL)
        await server.stderr.wait_for(
            "CRITICAL. degraded: worker 7 ended with exit code 4 .*fast failure 5 of 5 .*and at once by a reload"
        )
        await server.stderr.wait_for("still degraded: worker 8 ended with exit code 4")
        assert len(before & set(children(server.pid))) == (1 if occasion == "death" else 2)
        assert await answering(server) in before
        status = await run_to_end(*ctl(control, "status", "--json"))
        assert "workers fail as fast as they are started" in json.loads(status.stdout.text)["degraded"]
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reload failed, serving on as before")
        module.write_text(whole)
        await server.stderr.wait_for("no longer degraded")
        wanted = 3 if occasion == "scale" else 2
        kept = 2 if occasion == "scale" else 1
        await until(
            lambda: len(now := set(children(server.pid))) == wanted and len(now & before) == kept,
            "as many as wanted, and a new one among them",
        )
        status = await run_to_end(*ctl(control, "status", "--json"))
        assert json.loads(status.stdout.text)["degraded"] == ""
    assert "giving up" not in server.stderr.text


async def test_a_reload_that_fails_half_way_is_finished_later_and_holds_up_no_other(tmp_path: Path) -> None:
    module, once = tmp_path / "changing.py", tmp_path / "once"
    whole = (Path(__file__).parent / "apps.py").read_text()
    module.write_text(whole)
    async with serve_command(f"{module}:app", workers=2, module="tests.e2e.hurried") as server:
        before = set(children(server.pid))
        # The first of the new generation starts, and those after it do not.
        module.write_text(f"{whole}\nos.mkdir({str(once)!r})\n")
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("CRITICAL. degraded")
        await server.stderr.wait_for("reloaded: generation 2")
        assert len(before & set(children(server.pid))) == 1
        module.write_text(whole)
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reloaded: generation 3")
        await until(lambda: not before & set(children(server.pid)), "the end of the first generation")
    assert "giving up" not in server.stderr.text


async def test_when_the_last_that_has_lasted_is_gone_it_ends_with_what_the_others_ended_with(
    tmp_path: Path,
) -> None:
    module = tmp_path / "changing.py"
    module.write_text((Path(__file__).parent / "apps.py").read_text())
    async with serve_command(f"{module}:app", workers=1, module="tests.e2e.hurried") as server:
        (worker,) = children(server.pid)
        module.write_text("raise ImportError('half a deployment')\n")
        server.send_signal(signal.SIGTTIN)
        await server.stderr.wait_for("CRITICAL. degraded")
        os.kill(worker, signal.SIGKILL)
        await server.stderr.wait_for("giving up: ended with exit code 4")
        assert await server.wait() == 4


def ctl(control: Path, *command: str) -> list[str]:
    return [sys.executable, "-m", "trioserve", "ctl", "--control", str(control), *command]


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


async def test_a_reload_for_which_no_worker_can_be_started_ends_and_says_so(tmp_path: Path) -> None:
    """Of this interpreter one can only be sure while it runs: an update may have taken it away."""
    interpreter = tmp_path / "python"
    interpreter.symlink_to(sys.executable)
    flags = trioserve_command("--bind", "127.0.0.1:0", "--workers", "1", APP)[1:]
    # A link beside no pyvenv.cfg is not in the virtual environment, where the packages are.
    env = {"PYTHONPATH": os.pathsep.join([clean_environment()["PYTHONPATH"], *site.getsitepackages()])}
    async with start_process(str(interpreter), *flags, env=env) as server:
        await server.wait_running()
        before = children(server.pid)
        interpreter.unlink()
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for(
            "reload failed, serving on as before: cannot start a worker: .*No such file"
        )
        assert children(server.pid) == before
        assert await answering(server) in before
        interpreter.symlink_to(sys.executable)
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reloaded: generation 3")
    assert "ResourceWarning" not in server.stderr.text


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
