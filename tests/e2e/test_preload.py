"""`--preload` with real processes: one imports the app, workers are forked from it, and all else is as without."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
import trio

from tests.e2e.load import Load
from tests.e2e.process import (
    ServerProcess,
    held_request,
    run_to_end,
    serve_command,
    start_process,
    trioserve_command,
)
from tests.e2e.test_supervisor import answering, children, descriptors, is_running, until
from trioserve.testing import connect, encode_request

APP = "tests.e2e.apps:app"

pytestmark = pytest.mark.slow

SMALL = """
import os, sys
print("imported by", os.getpid())

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({{"type": "lifespan.startup.complete"}})
        await receive()
        await send({{"type": "lifespan.shutdown.complete"}})
        return
    body = {body}
    await send({{"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]}})
    await send({{"type": "http.response.body", "body": body}})
"""


def small_app(folder: Path, *, body: str = 'b"hello"', before: str = "") -> str:
    """The path of an app that answers with what the expression `body` is, and does `before` on import."""
    module = folder / "small.py"
    module.write_text(before + "\n" + SMALL.format(body=body))
    return f"{module}:app"


def preloader_of(server: ServerProcess) -> int:
    """The last that has said that it is ready."""
    return int(re.findall(r"preloader \(pid (\d+)\) has imported", server.stderr.text)[-1])


def workers_of(server: ServerProcess) -> list[int]:
    return sorted(set(children(server.pid)) - {preloader_of(server)})


# -- workers -------------------------------------------------------------------------------------------------


async def test_the_app_is_imported_once_and_workers_are_children_of_the_supervisor(tmp_path: Path) -> None:
    app = small_app(tmp_path, body='b"%d" % os.getpid()')
    # Without a buffer the line would be out before the first fork; with one it must not be in every fork's.
    async with serve_command(app, "--preload", workers=3, env={"PYTHONUNBUFFERED": ""}) as server:
        preloader, workers = preloader_of(server), workers_of(server)
        assert len(workers) == 3
        async with server.connect() as client:
            assert int((await client.get("/")).body) in workers
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
    assert server.stdout.text == f"imported by {preloader}\n"
    assert not any(is_running(pid) for pid in [preloader, *workers])


async def test_each_worker_has_a_lifespan_of_its_own() -> None:
    async with serve_command(APP, "--preload", workers=2) as server:
        assert server.stdout.text.count("lifespan.startup") == 2
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
    assert server.stdout.text.count("lifespan.shutdown") == 2


@pytest.mark.usefixtures("unmeasured")
async def test_a_killed_worker_is_replaced_by_a_fork_and_costs_only_what_it_had_in_flight() -> None:
    async with serve_command(APP, "--preload", workers=2) as server:
        preloader = preloader_of(server)
        load = Load(server.address, 8)
        async with load.running():
            for turn in range(4):
                await load.wait_for(100)
                victim = workers_of(server)[0]
                before = time.perf_counter()
                os.kill(victim, signal.SIGKILL)
                ready = await server.stderr.wait_for(rf"worker {3 + turn} \(pid (\d+)\) is ready")
                taken = time.perf_counter() - before
                print(f"replaced in {1000 * taken:.0f} ms under load")
                # What makes it quick: a fork of the preloader has its command line; one by exec has another.
                assert b"\0preloader\0" in Path(f"/proc/{ready[1]}/cmdline").read_bytes()
        assert not [failure for failure in load.failures if failure.error.startswith("connect")], str(load)
        assert len(load.failures) <= 4 * 8, str(load)
        assert preloader_of(server) == preloader
        assert len(workers_of(server)) == 2


async def test_nothing_is_imported_after_the_fork(tmp_path: Path) -> None:
    before = """
import os, sys
def note():
    global known
    known = set(sys.modules)
os.register_at_fork(after_in_child=note)
"""
    app = small_app(tmp_path, before=before, body='" ".join(set(sys.modules) - known).encode()')
    async with serve_command(app, "--preload", workers=1) as server:
        assert (await server.get()).body == b""
        assert (await server.get()).body == b""


async def test_a_worker_has_the_signals_and_descriptors_that_it_would_have_by_exec(tmp_path: Path) -> None:
    app = small_app(tmp_path, body='open("/proc/self/status", "rb").read()')

    async def look(*flags: str) -> tuple[list[bytes], list[str]]:
        async with serve_command(app, *flags, workers=1) as server:
            status = (await server.get()).body
            (worker,) = workers_of(server) if flags else children(server.pid)
            files: list[str] = []
            # The connection of that request may take a moment to close.
            for _ in range(100):
                before, files = files, sorted(descriptors(worker).values())
                if before == files:
                    break
                await trio.sleep(0.1)
            kinds = sorted(re.sub(r"\[\d+\]|\d+ ", "", name) for name in files)
            return re.findall(rb"^Sig(?:Blk|Ign|Cgt):.*$", status, re.MULTILINE), kinds

    assert await look("--preload") == await look()


async def test_a_worker_that_crashes_leaves_its_stacks_and_its_requests(tmp_path: Path) -> None:
    async with serve_command(APP, "--preload", "--crash-dir", str(tmp_path), workers=1) as server:
        first = workers_of(server)
        async with server.connect() as client:
            await client.send(b"GET /segfault HTTP/1.1\r\nHost: x\r\n\r\n")
            await until(lambda: workers_of(server) not in ([], first), "a successor")
        assert await answering(server) in workers_of(server)
        await until(lambda: list(tmp_path.iterdir()), "a report")
        text = "".join(path.read_text() for path in tmp_path.iterdir())
        assert "/segfault" in text
        assert "string_at" in text or "_segfault" in text


# -- apps that cannot be forked ------------------------------------------------------------------------------


A_THREAD = """
import threading, time
threading.Thread(target=time.sleep, args=(3600,), name="collector", daemon=True).start()
"""

A_NATIVE_THREAD = """
import ctypes
libc = ctypes.CDLL(None)
libc.pthread_create(ctypes.byref(ctypes.c_ulong()), None, libc.pause, None)
"""


@pytest.mark.parametrize("before, name", [(A_THREAD, "collector"), (A_NATIVE_THREAD, "python")])
async def test_an_app_that_starts_threads_on_import_is_served_by_exec(
    before: str, name: str, tmp_path: Path
) -> None:
    app = small_app(tmp_path, before=before, body='b"%d" % os.getpid()')
    async with serve_command(app, "--preload", workers=2) as server:
        line = re.search(r"no preloading: .*", server.stderr.text)
        assert line
        assert f"1 thread ({name}" in line[0]
        assert "lifespan" in line[0]
        workers = children(server.pid)
        assert len(workers) == 2
        assert int((await server.get()).body) in workers


async def test_an_import_that_fails_ends_with_the_same_words_as_without() -> None:
    said = {}
    for flags in [(), ("--preload",)]:
        process = await run_to_end(
            *trioserve_command(
                "--bind", "127.0.0.1:0", "--workers", "1", *flags, "tests.e2e.nothing_there:app"
            )
        )
        assert process.returncode == 4
        assert "giving up: " in process.stderr.text
        said[flags] = [line for line in process.stderr.text.splitlines() if line.startswith("trioserve:")]
    assert said[()] == said[("--preload",)]
    assert "there is no module" in said[()][0]


async def test_an_import_that_ends_its_process_is_left_to_workers(tmp_path: Path) -> None:
    """What only the import in a worker would show (a report, a back-off) is shown."""
    app = small_app(tmp_path, before="import os\nos._exit(9)")
    process = await run_to_end(
        *trioserve_command("--bind", "127.0.0.1:0", "--workers", "1", "--preload", app)
    )
    assert process.returncode not in (0, None)
    assert (
        "no preloading: the process that was to import the app has ended (exit code 9)" in process.stderr.text
    )
    assert "giving up: " in process.stderr.text


async def test_it_can_be_stopped_while_the_app_is_imported(tmp_path: Path) -> None:
    app = small_app(tmp_path, before='import time\nprint("importing", flush=True)\ntime.sleep(3600)')
    command = trioserve_command("--bind", "127.0.0.1:0", "--workers", "1", "--preload", app)
    async with start_process(*command) as process:
        await process.stdout.wait_for("importing")
        (preloader,) = children(process.pid)
        process.send_signal(signal.SIGTTIN)
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    assert not is_running(preloader)
    assert "started, generation" not in process.stderr.text


# -- the preloader -------------------------------------------------------------------------------------------


async def test_a_preloader_that_is_killed_costs_no_worker() -> None:
    async with serve_command(APP, "--preload", workers=2) as server:
        first, workers = preloader_of(server), workers_of(server)
        os.kill(first, signal.SIGKILL)
        await server.stderr.wait_for("has ended")
        assert children(server.pid) == workers
        # The next worker does not wait for the next preloader, which comes with it.
        os.kill(workers[0], signal.SIGKILL)
        await until(lambda: preloader_of(server) != first, "another preloader")
        await until(lambda: len(set(workers_of(server)) - {workers[0]}) == 2, "a successor")
        kinds = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers_of(server)}
        assert b"\0worker\0" in kinds[max(kinds)]
        await server.stderr.wait_for(f"worker 3 .pid {max(kinds)}. is ready")
        os.kill(workers[1], signal.SIGKILL)
        await server.stderr.wait_for(r"worker 4 .pid \d+. is ready")
        assert b"\0preloader\0" in Path(f"/proc/{max(workers_of(server))}/cmdline").read_bytes()


async def test_a_preloader_that_hangs_is_ended_and_the_worker_started_by_exec() -> None:
    async with serve_command(APP, "--preload", workers=1) as server:
        preloader, (worker,) = preloader_of(server), workers_of(server)
        os.kill(preloader, signal.SIGSTOP)
        os.kill(worker, signal.SIGKILL)
        await server.stderr.wait_for("does not fork .*: ending it")
        await until(lambda: not is_running(preloader), "its end")
        await until(lambda: preloader_of(server) != preloader, "another preloader")
        await server.stderr.wait_for(r"worker 2 .pid \d+. is ready")
        assert await answering(server) not in (worker, preloader)


async def test_signals_that_are_meant_for_others_do_the_preloader_nothing() -> None:
    async with serve_command(APP, "--preload", workers=1) as server:
        preloader, (worker,) = preloader_of(server), workers_of(server)
        for name in ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "TTIN", "TSTP"):
            os.kill(preloader, signal.Signals[f"SIG{name}"])
        os.kill(worker, signal.SIGKILL)
        await until(lambda: workers_of(server) not in ([], [worker]), "a successor")
        assert preloader_of(server) == preloader
        assert is_running(preloader)


async def test_all_end_when_the_supervisor_is_killed() -> None:
    async with serve_command(APP, "--preload", workers=2) as server:
        others = children(server.pid)
        assert len(others) == 3
        os.kill(server.pid, signal.SIGKILL)
        await until(lambda: not any(is_running(pid) for pid in others), "their end")
        await server.wait()


# -- orders --------------------------------------------------------------------------------------------------


async def test_a_reload_imports_the_app_again_in_a_new_preloader(tmp_path: Path) -> None:
    app = small_app(tmp_path, body='b"old"')
    async with serve_command(app, "--preload", workers=2) as server:
        first = preloader_of(server)
        assert (await server.get()).body == b"old"
        small_app(tmp_path, body='b"newer"')
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reloaded: generation 2")
        assert (await server.get()).body == b"newer"
        assert preloader_of(server) != first
        await until(lambda: first not in children(server.pid), "the end of the old preloader")
        # A broken one leaves the old one serving, and its preloader forking.
        second, workers = preloader_of(server), workers_of(server)
        small_app(tmp_path, before="this is no Python")
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reload failed, serving on as before: .*could not be imported")
        assert "SyntaxError" in server.stderr.text
        assert workers_of(server) == workers
        os.kill(workers[0], signal.SIGKILL)
        await until(lambda: len(set(workers_of(server)) - {workers[0]}) == 2, "a successor")
        assert preloader_of(server) == second
        assert (await server.get()).body == b"newer"


@pytest.mark.usefixtures("unmeasured")
async def test_an_upgrade_brings_its_own_preloader_and_loses_nothing(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    async with serve_command(APP, "--preload", "--pid", str(pid_file), workers=2) as server:
        first = preloader_of(server)
        load = Load(server.address, 8)
        async with load.running():
            await load.wait_for(100)
            server.send_signal(signal.SIGUSR2)
            await until(lambda: not is_running(server.pid), "the end of the old supervisor")
            await load.wait_for(100)
        assert not load.failures, str(load)
        successor = int(pid_file.read_text())
        assert successor != server.pid
        assert not is_running(first)
        assert set(children(successor)) > {preloader_of(server)}
        os.kill(successor, signal.SIGTERM)
        await until(lambda: not is_running(successor), "the end of the new supervisor")


SLOW_TO_IMPORT = """
import os, time

folder = os.environ["FOLDER"]
number = len(os.listdir(folder)) + 1
open(f"{folder}/{number}", "w").close()
print("importing", number, flush=True)
while number > 1 and not os.path.exists(f"{folder}.may-import-{number}"):
    time.sleep(0.01)
if number == 3:
    raise RuntimeError("half a deployment")
"""


@pytest.mark.usefixtures("unmeasured")
async def test_a_reload_that_fails_across_an_upgrade_leaves_what_the_successor_has_bound(
    tmp_path: Path,
) -> None:
    """What it does not bind is served by the old worker, and then closed."""
    config, folder, removed = tmp_path / "server.toml", tmp_path / "imports", tmp_path / "removed.sock"
    folder.mkdir()
    flags = ("-c", str(config), "--preload", "--max-connections", "1", "--graceful-timeout", "60")
    both = f"bind = ['127.0.0.1:0', 'unix:{removed}']\n"
    config.write_text(both)
    module = tmp_path / "slow.py"
    module.write_text((Path(__file__).parent / "apps.py").read_text() + SLOW_TO_IMPORT)
    environment = {"FOLDER": str(folder)}
    async with serve_command(f"{module}:app", *flags, workers=1, bind=None, env=environment) as server:
        (worker,) = workers_of(server)
        async with held_request(server) as held, connect(f"unix:{removed}") as queued:
            await queued.send(encode_request("GET", "/pid"))
            config.write_text("bind = ['127.0.0.1:0']\n")
            server.send_signal(signal.SIGUSR2)
            successor = int((await server.stderr.wait_for(r"the new supervisor is pid (\d+)"))[1])
            await server.stdout.wait_for("importing 2")
            config.write_text(both)
            os.kill(successor, signal.SIGHUP)
            Path(f"{folder}.may-import-2").touch()
            await server.stderr.wait_for("reloading: SIGHUP")
            await server.stdout.wait_for("importing 3")
            await server.stderr.wait_for("draining 1 workers: replaced by pid")
            assert int((await queued.read_response()).body) == worker
            Path(f"{folder}.may-import-3").touch()
            await server.stderr.wait_for("reload failed, serving on as before: .*half a deployment")
            await until(lambda: not removed.exists(), "the end of what is not bound")
            await held.send(b"!")
            assert (await held.read_response("POST")).body == b"done!"
        assert (await server.get()).status == 200
        os.kill(successor, signal.SIGTERM)
        assert await server.wait() == 0


async def test_preloading_can_be_turned_on_by_a_reload(tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text("")
    async with serve_command(APP, "-c", str(config), workers=2) as server:
        before = children(server.pid)
        config.write_text("preload = true\n")
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reloaded: generation 2")
        assert not set(workers_of(server)) & set(before)
        assert len(workers_of(server)) == 2
        config.write_text("")
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reloaded: generation 3")
        await until(lambda: preloader_of(server) not in children(server.pid), "the end of the preloader")
        assert len(children(server.pid)) == 2


async def test_a_save_mends_what_could_not_be_imported(tmp_path: Path) -> None:
    pytest.importorskip("watchfiles")
    app = small_app(tmp_path, before="this is no Python")
    command = trioserve_command("--bind", "127.0.0.1:0", "--workers", "1", "--preload", "--reload", app)
    async with start_process(*command) as server:
        await server.stderr.wait_for("waiting for a file to change")
        small_app(tmp_path, body='b"mended"')
        await server.wait_running()
        assert (await server.get()).body == b"mended"
        assert len(workers_of(server)) == 1


async def test_an_orphan_of_the_app_is_reaped(tmp_path: Path) -> None:
    """The supervisor gets all orphans below it; its own workers' ends stay theirs to be told."""
    before = """
import os
def leave():
    if os.fork() == 0:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        print("orphan", pid, flush=True)
        os._exit(0)
    os.wait()
    return b"left"
"""
    async with serve_command(
        small_app(tmp_path, before=before, body="leave()"), "--preload", workers=1
    ) as server:
        for _ in range(3):
            assert (await server.get()).body == b"left"
            orphan = int((await server.stdout.wait_for(r"orphan (\d+)"))[1])
            await until(lambda pid=orphan: not Path(f"/proc/{pid}").exists(), "its burial")
