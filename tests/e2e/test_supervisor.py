"""The supervisor with real processes: workers come and go, and nobody who asks notices."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

import trioserve
from tests.e2e.load import Load
from tests.e2e.process import (
    PATIENCE,
    RUNNING_ON,
    ServerProcess,
    clean_environment,
    held_request,
    run_to_end,
    serve_command,
    start_process,
    trioserve_command,
    wait_in_file,
)
from trioserve.supervisor.control import default_path
from trioserve.testing import connect

APP = "tests.e2e.apps:app"

pytestmark = pytest.mark.slow


@asynccontextmanager
async def supervised(
    *flags: str, workers: int | str = 2, app: str = APP, **options: Any
) -> AsyncIterator[ServerProcess]:
    async with serve_command(app, *flags, workers=workers, **options) as server:
        yield server


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in os.listdir(f"/proc/{pid}/task"):
        found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return sorted(found)


def descriptors(pid: int) -> dict[int, str]:
    found = {}
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            found[int(path.name)] = os.readlink(path)
    return found


async def until(condition: Any, what: str) -> None:
    with trio.move_on_after(PATIENCE):
        while not condition():
            await trio.sleep(0.01)
        return
    raise AssertionError(f"not within {PATIENCE:g} s: {what}")


async def answering(server: ServerProcess) -> int:
    return int((await server.get("/pid")).body)


# -- the parent ----------------------------------------------------------------------------------------------


async def test_it_starts_as_many_workers_as_asked_and_stops_them_with_0() -> None:
    async with supervised(workers=3) as server:
        workers = children(server.pid)
        assert len(workers) == 3
        assert await answering(server) in workers
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
        assert server.stdout.text.count("lifespan.shutdown") == 3
    for pid in workers:
        assert not Path(f"/proc/{pid}").exists()


async def test_one_worker_is_supervised_and_0_serves_in_this_process() -> None:
    async with supervised(workers=1) as server:
        assert [await answering(server)] == children(server.pid)
    async with supervised(workers=0) as server:
        assert await answering(server) == server.pid
        assert children(server.pid) == []


async def test_an_idle_supervisor_sleeps() -> None:
    def switches(pid: int) -> int:
        found = 0
        for task in Path(f"/proc/{pid}/task").iterdir():
            status = (task / "status").read_text()
            match = re.search(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.MULTILINE)
            assert match
            found += int(match[1])
        return found

    async with supervised("--worker-timeout", "off") as server:
        await answering(server)
        # The first heartbeats still see that request; then there is one in ten seconds. A machine that is busy takes
        # its time, but what polls does so in every window.
        seen = []
        for _ in range(5):
            before = switches(server.pid)
            await trio.sleep(5)
            seen.append(switches(server.pid) - before)
            if seen[-1] <= 2 * 2:  # two workers, each with two beats at the very most
                break
        assert seen[-1] <= 2 * 2, seen


async def test_a_worker_finds_this_trioserve_and_its_app_no_trace_of_that(tmp_path: Path) -> None:
    """One that is not on the path of the interpreter, from a directory in which others have what they like."""
    home = tmp_path / "site"
    shutil.copytree(Path(trioserve.__file__).parent, home / "trioserve")
    (home / "colorsys.py").write_text("raise RuntimeError('this is not the standard library')\n")
    (home / "typing.py").write_text("raise RuntimeError('this is not the standard library')\n")
    (tmp_path / "app.py").write_text(
        "import colorsys, json, os, sys, trioserve\n"
        "from tests.apps import respond\n"
        "async def app(scope, receive, send):\n"
        "    if scope['type'] == 'http':\n"
        "        found = [trioserve.__file__, os.environ.get('PYTHONPATH'), sys.argv, sys.path]\n"
        "        await respond(send, json.dumps(found).encode())\n"
    )
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(home)!r})\nimport trioserve\n"
        "del sys.path[0]\nfrom trioserve.__main__ import main\nsys.exit(main())\n"
    )
    path = clean_environment()["PYTHONPATH"]
    for more in ([], ["--preload"]):
        command = (sys.executable, str(script), "--bind", "127.0.0.1:0", *more, f"{tmp_path}/app.py:app")
        async with start_process(*command) as server:
            await server.wait_running()
            file, variable, arguments, entries = json.loads((await server.get()).body)
        assert file == str(home / "trioserve" / "__init__.py")
        assert variable == path
        assert arguments == [str(home / "trioserve" / "worker" / "__main__.py")]
        assert entries.index(str(home)) == len(entries) - 1


async def test_workers_inherit_the_sockets_from_3_on_and_nothing_else() -> None:
    async with supervised(workers=1) as server:
        (worker,) = children(server.pid)
        kinds = descriptors(worker)
        assert kinds[3].startswith("socket:")
        listening = set(descriptors(server.pid).values()) & set(kinds.values())
        # Shared with the parent: the listening socket, standard streams, the table and the file for stacks.
        assert kinds[3] in listening
        assert sum(kind.startswith("socket:") for kind in listening) == 1


# -- deaths --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unmeasured")
async def test_a_killed_worker_is_replaced_and_costs_only_what_it_had_in_flight() -> None:
    async with supervised() as server:
        load = Load(server.address, 16)
        async with load.running():
            for _ in range(4):
                await load.wait_for(200)
                victim = children(server.pid)[0]
                os.kill(victim, signal.SIGKILL)
                await until(
                    lambda gone=victim: gone not in children(server.pid) and len(children(server.pid)) == 2,
                    "a successor",
                )
        assert load.answered > 800
        blameless = [failure for failure in load.failures if not failure.worker]
        assert not [f for f in blameless if f.error.startswith("connect")], str(load)
        # 16 connections, of which each kill can cost those that were with the victim.
        assert len(load.failures) <= 4 * 16, str(load)
        assert "killed" in server.stderr.text


async def test_a_crash_loop_ends_the_supervisor_with_the_reason() -> None:
    process = await run_to_end(
        *trioserve_command("--bind", "127.0.0.1:0", "--workers", "2", "tests.e2e.dying:app")
    )
    assert process.returncode not in (0, None)
    assert process.stdout.text.count("born") <= 10
    assert "giving up" in process.stderr.text


@pytest.mark.parametrize(
    "app, code, text",
    [
        ("tests.e2e.nothing_there:app", 4, "there is no module"),
        ("tests.e2e.dying:refuses_to_start", 3, "startup"),
    ],
)
async def test_what_cannot_start_ends_at_once(app: str, code: int, text: str) -> None:
    process = await run_to_end(*trioserve_command("--bind", "127.0.0.1:0", "--workers", "2", app))
    assert process.returncode == code
    assert text in process.stderr.text
    assert process.stderr.text.count("started, generation") <= 2


async def test_a_hung_worker_is_reported_ended_and_replaced(tmp_path: Path) -> None:
    async with supervised(
        "--worker-timeout", "5", "--block-kill", "off", "--crash-dir", str(tmp_path)
    ) as server:
        before = set(children(server.pid))
        async with server.connect() as client:
            await client.send(b"GET /block?60 HTTP/1.1\r\nHost: x\r\n\r\n")
            await server.stderr.wait_for("no heartbeat for")
            await until(lambda: len(set(children(server.pid)) - before) == 1, "a successor")
            assert await answering(server)
        await until(lambda: len(children(server.pid)) == 2, "the end of the hung one")
        text = "".join(path.read_text() for path in tmp_path.iterdir())
        assert "time.sleep" in text or "_block" in text
        assert "/block" in text


async def test_workers_drain_when_their_supervisor_is_killed() -> None:
    async with supervised() as server:
        workers = children(server.pid)
        os.kill(server.pid, signal.SIGKILL)
        await until(lambda: not any(is_running(pid) for pid in workers), "their end")
        await server.wait()
    assert server.stderr.text.count("the supervisor is gone") == 2


def is_running(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


# -- an app that fails ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unmeasured")
async def test_a_tainted_worker_serves_until_its_successor_is_ready() -> None:
    async with supervised(workers=1) as server:
        first = await answering(server)
        load = Load(server.address, 8)
        async with load.running():
            await load.wait_for(50)
            assert (await server.get("/raise")).status == 500
            await server.stderr.wait_for("to be replaced after")
            await until(lambda: children(server.pid) and first not in children(server.pid), "its end")
            await load.wait_for(50)
        assert not load.failures, str(load)
        # The same error again costs no worker.
        second = await answering(server)
        await trio.sleep(1.1)  # a worker asks once a second
        assert (await server.get("/raise")).status == 500
        await server.stderr.wait_for("goes on after")
        assert await answering(server) == second


# -- orders --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("order", ["HUP", "USR2", "scale", "recycle"])
async def test_reloading_upgrading_recycling_and_scaling_lose_no_request(order: str, tmp_path: Path) -> None:
    pid_file, control = tmp_path / "pid", str(tmp_path / "control")
    async with serve_command(APP, "--pid", str(pid_file), "--control", control, workers=2) as server:
        load = Load(server.address, 32)
        async with load.running():
            for turn in range(3):
                await load.wait_for(300)
                parent = int(pid_file.read_text())
                before = set(children(parent))
                if order == "scale":
                    os.kill(parent, signal.SIGTTIN if turn % 2 == 0 else signal.SIGTTOU)
                    await until(lambda b=before, p=parent: set(children(p)) != b, "another number")
                else:
                    if order == "recycle":
                        done = await run_to_end(*trioserve_command("ctl", "recycle", "--control", control))
                        assert done.returncode == 0, done.stderr.text
                    else:
                        os.kill(parent, signal.Signals[f"SIG{order}"])
                    await until(
                        lambda b=before: (
                            (now := int(pid_file.read_text() or 0))
                            and len(set(children(now)) - b) >= 2
                            and not set(children(now)) & b
                        ),
                        "a new generation",
                    )
                    if order == "USR2":
                        await until(lambda p=parent: not is_running(p), "the end of the old supervisor")
            await load.wait_for(300)
        assert not load.failures, str(load)
        final = int(pid_file.read_text())
        if final != server.pid:
            os.kill(final, signal.SIGTERM)
            await until(lambda: not is_running(final), "the end of the last supervisor")


@pytest.mark.parametrize("flags", [(), ("--preload",)], ids=["exec", "preload"])
async def test_a_reload_with_a_broken_app_leaves_the_old_one_serving(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    module, control = tmp_path / "changing.py", str(tmp_path / "control")
    module.write_text((Path(__file__).parent / "apps.py").read_text())
    async with serve_command(f"{module}:app", "--control", control, *flags, workers=2) as server:
        before = children(server.pid)
        module.write_text("import os\nimport no_such_module\n")
        refused = await run_to_end(*trioserve_command("ctl", "reload", "--control", control))
        assert refused.returncode == 1
        what = "changing.py:2: ModuleNotFoundError: No module named 'no_such_module'"
        assert what in refused.stderr.text
        await server.stderr.wait_for(f"reload failed, serving on as before: .*{what}")
        await until(lambda: children(server.pid) == before, "only the old workers")
        assert await answering(server) in before


async def test_a_reload_goes_where_the_name_of_the_working_directory_leads_by_then(tmp_path: Path) -> None:
    def make(name: str, text: str = "") -> Path:
        release = tmp_path / name
        release.mkdir()
        (release / "releasing.py").write_text(
            text
            or "from tests.apps import respond\n"
            "async def app(scope, receive, send):\n"
            f"    if scope['type'] == 'http':\n        await respond(send, {name.encode()!r})\n"
        )
        (release / "settings.py").write_text("workers = 1\n")
        return release

    current = tmp_path / "current"
    current.symlink_to(make("one"))

    def lead_to(place: Path) -> None:
        current.unlink()
        current.symlink_to(place)

    async def kill_worker() -> None:
        (worker,) = children(server.pid)
        os.kill(worker, signal.SIGKILL)
        await server.stderr.wait_for("ended: killed")
        await server.stderr.wait_for("is ready")

    flags = ("--pid", "pid", "-c", "python:settings")
    env = {"PWD": str(current), "PYTHONDONTWRITEBYTECODE": "1"}
    async with serve_command("releasing:app", *flags, workers=None, env=env, cwd=current) as server:
        assert (await server.get()).body == b"one"
        lead_to(make("two"))
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reloaded")
        assert (await server.get()).body == b"two"

        # A release that fails, and one that is gone: the other one serves on, in new workers, too.
        lead_to(make("three", "this is no Python\n"))
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reload failed, serving on as before")
        await kill_worker()
        assert (await server.get()).body == b"two"
        lead_to(tmp_path / "nowhere")
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for(f"reload failed, .*{current} cannot be entered")
        server.send_signal(signal.SIGUSR2)
        await server.stderr.wait_for(f"upgrade failed, .*{current} cannot be entered")
        await kill_worker()
        assert (await server.get()).body == b"two"

        # And back again, to what has been changed meanwhile.
        lead_to(tmp_path / "one")
        (tmp_path / "one" / "settings.py").write_text("workers = 2\n")
        shutil.rmtree(tmp_path / "two")
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("from 1 to 2 workers")
        assert (await server.get()).body == b"one"
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
        assert not (tmp_path / "one" / "pid").exists()


async def test_a_reload_is_followed_by_the_supervisor_too_and_what_is_not_is_named(tmp_path: Path) -> None:
    config, log = tmp_path / "server.toml", tmp_path / "error.log"
    config.write_text(f'crash_dir = "{tmp_path}/first"\n')
    async with supervised("-c", str(config), workers=1) as server:
        config.write_text(
            f'crash_dir = "{tmp_path}/second"\nerrorlog = "{log}"\npid_path = "{tmp_path}/pid"\nuse_reloader = true\n'
        )
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for(f"the error log is {log} from here on")
        await wait_in_file(log, "not applied by a reload, .*: pid_path, use_reloader\n")
        await wait_in_file(log, "reloaded: generation 2")
        os.kill(children(server.pid)[0], signal.SIGKILL)
        await wait_in_file(log, "ended: killed")
        await until(lambda: list((tmp_path / "second").glob("*.json")), "the supervisor's report")
        assert not (tmp_path / "first").exists()
        await wait_in_file(log, r"worker 3 .pid \d+. is ready")
        config.write_text(f'errorlog = "{log}"\nloglevel = "WARNING"\n')
        server.send_signal(signal.SIGHUP)
        await until(lambda: len(children(server.pid)) == 2, "a successor")
        await until(lambda: len(children(server.pid)) == 1, "the end of its predecessor")
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
    assert "stopped" not in server.stderr.text
    assert "stopped\n" not in log.read_text()


async def test_what_a_reload_has_opened_is_served_to_the_end_of_the_server(tmp_path: Path) -> None:
    config, control, added = tmp_path / "server.toml", str(tmp_path / "control"), tmp_path / "added.sock"
    config.write_text("bind = ['127.0.0.1:0']\npre_drain_delay = 60\n")
    flags = ("-c", str(config), "--control", control)
    async with supervised(*flags, workers=1, bind=None) as server:
        config.write_text(f"bind = ['127.0.0.1:0', 'unix:{added}']\npre_drain_delay = 60\n")
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("draining: reload")
        server.send_signal(signal.SIGTERM)
        await server.stderr.wait_for("the reload ends with the server")
        async with connect(f"unix:{added}") as client:
            assert (await client.get("/")).status == 200
        status = await run_to_end(*trioserve_command("ctl", "status", "--json", "--control", control))
        assert json.loads(status.stdout.text)["addresses"] == [f"http://{server.address}", f"unix:{added}"]
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
    assert not added.exists()


async def test_a_reload_reads_a_python_module_again(tmp_path: Path) -> None:
    (tmp_path / "settings.py").write_text(
        "class Local(Exception): ...\ncontain_errors = [Local]\nworkers = 1\n"
    )
    app = tmp_path / "changing.py"
    good = (Path(__file__).parent / "apps.py").read_text()
    app.write_text(good)
    path = os.pathsep.join([clean_environment()["PYTHONPATH"], str(tmp_path)])
    env = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": path}
    flags = ("-c", "python:settings")
    async with serve_command("changing:app", *flags, workers=None, env=env, cwd=tmp_path) as server:
        # The class of the settings in force is not that of the module any more, and workers are still told of it.
        app.write_text("this is no Python\n")
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reload failed, serving on as before")
        app.write_text(good)
        (worker,) = children(server.pid)
        os.kill(worker, signal.SIGKILL)
        await server.stderr.wait_for("ended: killed")
        await server.stderr.wait_for("is ready")
        (tmp_path / "settings.py").write_text("workers = 2\n")
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("from 1 to 2 workers")


async def test_a_reload_with_a_broken_configuration_leaves_everything(tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text("keep_alive_timeout = 3\n")
    async with supervised("-c", str(config)) as server:
        before = children(server.pid)
        config.write_text("keep_alive_tmeout = 3\n")
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reload failed, serving on as before.*keep_alive_tmeout")
        assert children(server.pid) == before
        config.write_text("keep_alive_timeout = 4\n")
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reloaded: generation")
        assert not set(children(server.pid)) & set(before)


async def test_an_upgrade_that_fails_leaves_the_old_program(tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text("")
    async with supervised("-c", str(config)) as server:
        before = children(server.pid)
        config.write_text("no_such_setting = 1\n")
        server.send_signal(signal.SIGUSR2)
        await server.stderr.wait_for("upgrade failed, serving on as before")
        assert children(server.pid) == before
        assert await answering(server) in before


async def test_an_upgrade_closes_what_is_no_longer_bound_once_it_has_succeeded(tmp_path: Path) -> None:
    config, module, removed = tmp_path / "server.toml", tmp_path / "app.py", tmp_path / "removed.sock"
    whole = (Path(__file__).parent / "apps.py").read_text()
    module.write_text(whole)
    config.write_text(f"bind = ['127.0.0.1:0', 'unix:{removed}']\n")
    async with supervised("-c", str(config), app=f"{module}:app", workers=1, bind=None) as server:
        before = children(server.pid)
        config.write_text("bind = ['127.0.0.1:0']\n")
        module.write_text("raise ImportError('half a deployment')\n")
        server.send_signal(signal.SIGUSR2)
        await server.stderr.wait_for("upgrade failed, serving on as before")
        assert children(server.pid) == before
        async with connect(f"unix:{removed}") as client:
            assert (await client.get("/")).status == 200
        module.write_text(whole)
        server.send_signal(signal.SIGUSR2)
        listed = len(server.stderr.text)
        found = await server.stderr.wait_for(r"the new supervisor \(pid (\d+)\) is ready")
        await server.stderr.wait_for(r"\] stopped")
        assert not removed.exists()
        assert RUNNING_ON.findall(server.stderr.text[listed:]) == [server.address]
        assert (await server.get()).status == 200
        os.kill(int(found.group(1)), signal.SIGTERM)
        assert await server.wait() == 0


@pytest.mark.usefixtures("unmeasured")
async def test_a_script_is_upgraded_without_importing_from_the_working_directory(tmp_path: Path) -> None:
    script = tmp_path / "bin" / "trioserve"
    script.parent.mkdir()
    script.write_text("import sys\nfrom trioserve.__main__ import main\nsys.exit(main())\n")
    served = tmp_path / "served"
    served.mkdir()
    (served / "trio.py").write_text("raise SystemExit('a file to be served runs')\n")
    command = (sys.executable, str(script), "static", "--bind", "127.0.0.1:0")
    async with start_process(*command, cwd=served) as server:
        await server.wait_running()
        server.send_signal(signal.SIGUSR2)
        pid = int((await server.stderr.wait_for(r"new supervisor .pid (\d+). is ready")).group(1))
        await until(lambda: server.returncode is not None, "the end of the old supervisor")
        assert (await server.get("/trio.py")).status == 200
        os.kill(pid, signal.SIGTERM)
        await until(lambda: not is_running(pid), "the end of the new supervisor")


@pytest.mark.usefixtures("unmeasured")
async def test_max_requests_recycles_one_worker_at_a_time_and_loses_nothing() -> None:
    async with supervised("--max-requests", "200", "--max-requests-jitter", "50") as server:
        first = children(server.pid)
        load = Load(server.address, 8)
        async with load.running():
            await until(lambda: not set(children(server.pid)) & set(first), "two new workers")
        assert not load.failures, str(load)
        assert "it has served" in server.stderr.text


# -- the end -------------------------------------------------------------------------------------------------


async def test_signals_that_are_meant_for_others_do_a_worker_nothing(tmp_path: Path) -> None:
    """As sent by `systemctl kill -s USR2`, `pkill -HUP -f` and the like; from its first moment on."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    app = tmp_path / "slow.py"
    app.write_text(
        f"print('importing', flush=True)\nopen({str(pipe)!r}).read()\nfrom tests.e2e.apps import app\n"
    )

    def send_all(worker: int) -> None:
        for name in ("INT", "HUP", "USR1", "USR2", "TTIN", "TTOU"):
            os.kill(worker, signal.Signals[f"SIG{name}"])

    async with start_process(*trioserve_command("--bind", "127.0.0.1:0", f"{app}:app")) as server:
        worker = int((await server.stderr.wait_for(r"worker 1 .pid (\d+). started")).group(1))
        send_all(worker)
        await server.stdout.wait_for("importing")
        send_all(worker)
        pipe.open("w").close()
        await server.wait_running()
        send_all(worker)
        assert await answering(server) == worker


async def test_signals_in_a_row_end_it_sooner() -> None:
    async with supervised("--graceful-timeout", "60", workers=1) as server:
        async with server.connect() as client:
            await client.send(b"POST /hold HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\ndone")
            await server.stdout.wait_for("holding")
            server.send_signal(signal.SIGTERM)
            await server.stderr.wait_for("draining 1 workers")
            server.send_signal(signal.SIGTERM)
            assert await server.wait() == 0
        assert "held request ended by Cancelled" in server.stdout.text


async def test_the_first_signal_after_an_upgrade_cuts_nothing() -> None:
    async with supervised("--graceful-timeout", "60", workers=1) as server, held_request(server) as client:
        server.send_signal(signal.SIGUSR2)
        found = await server.stderr.wait_for(r"draining 1 workers: replaced by pid (\d+)")
        server.send_signal(signal.SIGTERM)
        await server.stderr.wait_for("draining 1 workers: SIGTERM")
        await client.send(b"!")
        assert (await client.read_response("POST")).body == b"done!"
        os.kill(int(found.group(1)), signal.SIGTERM)
        assert await server.wait() == 0
    assert "cancelling what still runs" not in server.stderr.text


async def test_who_has_yet_to_take_over_is_not_upgraded(tmp_path: Path) -> None:
    """Its predecessor would wait for it in vain, and there would be two servers."""
    may_start = tmp_path / "may-start"
    may_start.touch()
    app = "tests.e2e.dying:waits_to_start"
    async with supervised(workers=1, app=app, env={"MAY_START": str(may_start)}) as server:
        may_start.unlink()
        server.send_signal(signal.SIGUSR2)
        successor = int((await server.stderr.wait_for(r"the new supervisor is pid (\d+)"))[1])
        await server.stderr.wait_for(rf"\[{successor}\] .*started, generation 1")
        os.kill(successor, signal.SIGUSR2)
        await server.stderr.wait_for("SIGUSR2 ignored: an upgrade is under way")
        may_start.touch()
        await server.stderr.wait_for(r"draining 1 workers: replaced by pid")
        os.kill(successor, signal.SIGTERM)
        assert await server.wait() == 0


@asynccontextmanager
async def rebindable(directory: Path) -> AsyncIterator[tuple[ServerProcess, Path, Path, Path]]:
    """A server whose next workers start once the first of these files is there; the second has what it binds.

    The third is a socket that it does not bind yet.
    """
    may_start, config, added = directory / "may-start", directory / "server.toml", directory / "added.sock"
    may_start.touch()
    config.write_text("bind = ['127.0.0.1:0']\n")
    env, app = {"MAY_START": str(may_start)}, "tests.e2e.dying:waits_to_start"
    async with supervised("-c", str(config), workers=1, app=app, bind=None, env=env) as server:
        may_start.unlink()
        yield server, may_start, config, added


@pytest.mark.parametrize("succeeds", [False, True], ids=["failing", "succeeding"])
async def test_a_reload_waits_for_the_end_of_an_upgrade(succeeds: bool, tmp_path: Path) -> None:
    """The successor would not know of what it opens."""
    async with rebindable(tmp_path) as (server, may_start, config, added):
        server.send_signal(signal.SIGUSR2)
        successor = int((await server.stderr.wait_for(r"the new supervisor is pid (\d+)"))[1])
        await server.stderr.wait_for(rf"\[{successor}\] .*started, generation 1")
        config.write_text(f"bind = ['127.0.0.1:0', 'unix:{added}']\n")
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("SIGHUP: the reload waits for the upgrade under way")
        assert not added.exists()
        if succeeds:
            may_start.touch()
            await server.stderr.wait_for(r"no reload \(SIGHUP\): the server is stopping")
        os.kill(successor, signal.SIGTERM)
        if not succeeds:
            await server.stderr.wait_for("upgrade failed, serving on as before")
            may_start.touch()
            await server.stderr.wait_for("reloaded: generation 2")
            assert added.exists()
            server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0


@pytest.mark.parametrize("outcome", ["failing", "succeeding", "stopping"])
async def test_an_upgrade_waits_until_a_reload_is_decided(outcome: str, tmp_path: Path) -> None:
    """Of what is bound meanwhile it is not known whether it stays."""
    async with rebindable(tmp_path) as (server, may_start, config, added):
        config.write_text(f"bind = ['127.0.0.1:0', 'unix:{added}']\n")
        server.send_signal(signal.SIGHUP)
        worker = int((await server.stderr.wait_for(r"worker 2 \(pid (\d+)\) started, generation 2"))[1])
        server.send_signal(signal.SIGUSR2)
        await server.stderr.wait_for("SIGUSR2: the upgrade waits until the reload under way")
        server.send_signal(signal.SIGUSR2)
        await server.stderr.wait_for("SIGUSR2 ignored: an upgrade is under way")
        if outcome == "stopping":
            server.send_signal(signal.SIGTERM)
            await server.stderr.wait_for(r"no upgrade \(SIGUSR2\): the server is stopping")
            assert await server.wait() == 0
            return
        if outcome == "failing":
            config.write_text("bind = ['127.0.0.1:0']\n")
            os.kill(worker, signal.SIGKILL)
            await server.stderr.wait_for("reload failed, serving on as before")
        may_start.touch()
        found = await server.stderr.wait_for(r"the new supervisor \(pid (\d+)\) is ready")
        assert server.stderr.text.count("upgrading: SIGUSR2") == 1
        assert added.exists() is (outcome == "succeeding")
        os.kill(int(found[1]), signal.SIGTERM)
        assert await server.wait() == 0
    assert not added.exists()


async def test_who_has_handed_over_is_still_told_to_stop_by_ctl() -> None:
    async with supervised("--graceful-timeout", "60", workers=1) as server, held_request(server) as client:
        server.send_signal(signal.SIGUSR2)
        found = await server.stderr.wait_for(r"draining 1 workers: replaced by pid (\d+)")
        control = default_path(server.pid)
        assert control is not None
        for command in ("status", "stop"):
            done = await run_to_end(*trioserve_command("ctl", command, "--control", str(control)))
            assert done.returncode == 0, done.stderr.text
        assert (await client.read_response("POST")).status == 503
        os.kill(int(found.group(1)), signal.SIGTERM)
        assert await server.wait() == 0


@pytest.mark.parametrize("hurried", [False, True], ids=["one signal", "two signals"])
async def test_a_startup_that_blocks_does_not_hold_up_the_end(hurried: bool) -> None:
    app = "tests.e2e.dying:blocks_to_start"
    async with start_process(*trioserve_command("--bind", "127.0.0.1:0", "--workers", "1", app)) as server:
        await server.stdout.wait_for("blocking")
        server.send_signal(signal.SIGTERM)
        await server.stderr.wait_for("draining 1 workers: SIGTERM")
        if hurried:
            server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
    said = "worker 1 .*: its startup blocks the event loop, .*; it has served nothing: ending it"
    assert bool(re.search(said, server.stderr.text)) is not hurried
    assert "ended: stopped, signal 9 (SIGKILL)" in server.stderr.text
    assert server.reports() == []


async def test_a_startup_that_hears_of_the_end_has_its_time(tmp_path: Path) -> None:
    app = "tests.e2e.dying:waits_to_start"
    flags = ("--bind", "127.0.0.1:0", "--workers", "1", app)
    async with start_process(
        *trioserve_command(*flags), env={"MAY_START": str(tmp_path / "never")}
    ) as server:
        await server.stderr.wait_for("started, generation 1")
        await server.stdout.wait_for("waiting")
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
    assert "ended: stopped, exit code 0" in server.stderr.text


async def test_a_setting_that_no_worker_can_be_told_is_an_error_of_the_start(tmp_path: Path) -> None:
    config = tmp_path / "settings.py"
    config.write_text("class Local(Exception):\n    pass\n\n\ncontain_errors = [Local]\n")
    process = await run_to_end(*trioserve_command("-c", f"file:{config}", "--bind", "127.0.0.1:0", APP))
    assert process.returncode == 78
    assert "contain_errors" in process.stderr.text
    assert "cannot be handed to worker processes" in process.stderr.text
