"""Signals, in any order and number, and at any time; each does what `worker/command.py` says, once."""

from __future__ import annotations

import json
import os
import signal

import pytest
import trio

from trioserve.testing import encode_request

from .process import (
    held_request,
    serve_command,
    start_process,
    trioserve_command,
    wait_in_file,
    wait_refused,
)

APP = "tests.e2e.apps:app"

STOPS = [signal.SIGTERM, signal.SIGINT]


# -- one signal ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stop", STOPS, ids=lambda number: number.name)
async def test_a_request_in_flight_finishes_then_lifespan_shuts_down_then_exit_0(stop, workers):
    """Whoever connects meanwhile is refused at once: nobody would accept what is queued."""
    async with serve_command(APP, workers=workers) as server:
        async with held_request(server) as client:
            server.send_signal(stop)
            await server.stderr.wait_for(f"draining: {stop.name}; 1 requests in flight")
            await wait_refused(server.address)
            await client.send(b"!")
            response = await client.read_response("POST")
        assert (response.status, response.body, response.header("connection")) == (200, b"done!", "close")
        assert await server.wait() == 0
    assert server.stdout.text.split("\n")[:-1] == ["lifespan.startup", "holding", "lifespan.shutdown"]


@pytest.mark.parametrize("workers", [0, 1])
async def test_a_drain_that_no_thread_can_be_started_for_is_one_like_any_other(workers):
    async with serve_command(APP, workers=workers) as server:
        async with held_request(server) as client:
            assert (await server.get("/no-threads")).status == 200
            server.send_signal(signal.SIGTERM)
            await server.stderr.wait_for("no thread can be started to end the process should the drain hang")
            await client.send(b"!")
            assert (await client.read_response("POST")).status == 200
        assert await server.wait() == 0
    assert server.stdout.text.split("\n")[:-1] == ["lifespan.startup", "holding", "lifespan.shutdown"]
    assert server.reports() == []


async def test_idle_connections_are_closed_at_once_and_delay_nothing():
    async with serve_command(APP, "--keep-alive", "3600") as server:
        async with server.connect() as used, server.connect() as fresh:
            assert (await used.get()).status == 200
            server.send_signal(signal.SIGTERM)
            assert await used.receive() == b""
            assert await fresh.receive() == b""
            assert await server.wait() == 0


async def test_a_client_that_never_reads_cannot_delay_the_end():
    async with serve_command(APP, "--graceful-timeout", "0.2") as server:
        async with server.connect(receive_buffer=4096) as client:
            await client.send(encode_request("GET", "/large?100"))
            await client.receive(100)
            server.send_signal(signal.SIGTERM)
            assert await server.wait() == 0
    assert "1 requests were cut by the drain after 0.2 s" in server.stderr.text
    assert "cut: GET /large" in server.stderr.text


async def test_a_request_beyond_the_grace_is_cancelled_answered_503_and_named_in_the_log():
    async with serve_command(APP, "--graceful-timeout", "0.2") as server, held_request(server) as client:
        server.send_signal(signal.SIGTERM)
        response = await client.read_response("POST")
        assert (response.status, response.header("retry-after")) == (503, "1")
        assert await server.wait() == 0
    assert "held request ended by Cancelled" in server.stdout.text
    assert "cut: POST /hold" in server.stderr.text
    assert server.stdout.text.endswith("lifespan.shutdown\n")


async def test_sigquit_cancels_at_once_but_lifespan_still_shuts_down():
    async with serve_command(APP) as server, held_request(server) as client:
        server.send_signal(signal.SIGQUIT)
        assert (await client.read_response("POST")).status == 503
        assert await server.wait() == 0
    assert server.stdout.text.endswith("lifespan.shutdown\n")


async def test_sighup_is_logged_and_ignored():
    async with serve_command(APP) as server:
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("SIGHUP ignored")
        assert (await server.get()).status == 200


@pytest.mark.parametrize(
    "number", [signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU], ids=lambda number: number.name
)
async def test_what_only_a_supervisor_can_do_is_logged_and_ignored(number):
    async with serve_command(APP) as server, held_request(server) as client:
        server.send_signal(number)
        await server.stderr.wait_for(f"{number.name} ignored: .* needs the supervisor")
        await client.send(b"!")
        assert (await client.read_response("POST")).status == 200


async def test_signals_about_logs_and_workers_do_not_disturb_an_import(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "slow.py").write_text(
        f"print('importing', flush=True)\nopen({str(pipe)!r}).read()\nfrom {APP[:-4]} import app\n"
    )
    async with start_process(
        *trioserve_command("--bind", "127.0.0.1:0", "--workers", "0", f"{tmp_path}/slow.py:app")
    ) as server:
        await server.stdout.wait_for("importing")
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU):
            server.send_signal(number)
        pipe.open("w").close()
        await server.wait_running()
        assert (await server.get()).status == 200


async def test_sigusr1_reopens_the_access_log_and_the_error_log(tmp_path):
    """What logrotate does: move the file away, signal, and expect nothing more in the old one."""
    access, errors = tmp_path / "access.log", tmp_path / "error.log"
    flags = ("--access-logfile", str(access), "--access-logformat", "%(U)s", "--error-logfile", str(errors))
    async with start_process(
        *trioserve_command("--bind", "127.0.0.1:0", "--workers", "0", *flags, APP)
    ) as server:
        server.address = (await wait_in_file(errors, r"Running on http://(\S+) ")).group(1)
        await server.get("/before")
        await wait_in_file(access, "/before")
        access.rename(tmp_path / "access.log.1")
        errors.rename(tmp_path / "error.log.1")
        server.send_signal(signal.SIGUSR1)
        # Both files are there again, empty, before anything is written to them.
        await wait_in_file(access, "^$")
        await wait_in_file(errors, "^$")
        await server.get("/after")
        await wait_in_file(access, "/after")
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
    assert (tmp_path / "access.log.1").read_text() == "/before\n"
    assert access.read_text() == "/after\n"
    assert "Running on" in (tmp_path / "error.log.1").read_text()
    assert errors.read_text().endswith("draining: SIGTERM; 0 requests in flight\n")
    assert "Running on" not in errors.read_text()


# -- more than one ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first, second", [STOPS, STOPS[::-1]], ids=["TERM-INT", "INT-TERM"])
async def test_a_second_signal_cancels_what_still_runs(first, second):
    async with serve_command(APP, "--graceful-timeout", "3600") as server, held_request(server) as client:
        server.send_signal(first)
        await server.stderr.wait_for("draining")
        server.send_signal(second)
        assert (await client.read_response("POST")).status == 503
        assert await server.wait() == 0
    assert f"{second.name} again: cancelling what still runs" in server.stderr.text
    assert server.stdout.text.endswith("lifespan.shutdown\n")


@pytest.mark.parametrize("third, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
async def test_a_third_signal_exits_at_once(third, code):
    async with serve_command(APP) as server, held_request(server, "/stubborn") as client:
        server.send_signal(signal.SIGTERM)
        await server.stderr.wait_for("draining")
        server.send_signal(signal.SIGTERM)
        await server.stderr.wait_for("again")
        server.send_signal(third)
        assert await server.wait() == code
        assert await client.receive_all() == b""
    assert f"{third.name} for the third time: exiting at once" in server.stderr.text
    assert "lifespan.shutdown" not in server.stdout.text


async def test_sigquit_counts_as_the_second_signal():
    async with serve_command(APP) as server, held_request(server, "/stubborn"):
        server.send_signal(signal.SIGQUIT)
        await server.stderr.wait_for("draining: SIGQUIT")
        server.send_signal(signal.SIGINT)
        assert await server.wait() == 130


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.usefixtures("unmeasured")
async def test_signals_while_it_cleans_up_change_nothing(workers, tmp_path):
    path, pid = tmp_path / "socket", tmp_path / "pid"
    async with serve_command(APP, "--pid", str(pid), bind=f"unix:{path}", workers=workers) as server:
        server.send_signal(signal.SIGTERM)
        await server.stderr.wait_for("draining")
        while server.returncode is None:
            server.send_signal(signal.SIGHUP)
            if "stopped\n" in server.stderr.text:
                server.send_signal(signal.SIGTERM)
            await trio.sleep(0.001)
        assert await server.wait() == 0
    assert not path.exists()
    assert not pid.exists()


async def test_signals_about_logs_and_reloading_do_not_count_as_stops():
    async with serve_command(APP) as server:
        async with held_request(server) as client:
            server.send_signal(signal.SIGHUP)
            await server.stderr.wait_for("SIGHUP ignored")
            server.send_signal(signal.SIGTERM)
            await server.stderr.wait_for("draining")
            server.send_signal(signal.SIGUSR1)
            server.send_signal(signal.SIGHUP)
            await server.stderr.wait_for("SIGHUP ignored")
            await client.send(b"!")
            assert (await client.read_response("POST")).status == 200
        assert await server.wait() == 0


async def test_a_storm_of_signals_ends_in_one_of_the_promised_ways():
    async with serve_command(APP) as server, held_request(server):
        for number in [signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT, signal.SIGINT] * 20:
            if server.returncode is None:
                server.send_signal(number)
        # The same signal sent twice before it is heard is one signal; how many are heard is the kernel's choice.
        assert await server.wait() in (0, 130, 143)
    assert server.reports() == []


# -- before it serves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [*STOPS, signal.SIGQUIT], ids=lambda number: number.name)
async def test_a_signal_during_startup_ends_it_without_serving(stop):
    command = trioserve_command("--bind", "127.0.0.1:0", "--workers", "0", "tests.e2e.apps:startup_hangs")
    async with start_process(*command) as process:
        await process.stdout.wait_for("starting")
        process.send_signal(stop)
        assert await process.wait() == 0
    assert f"ending before the app's startup was complete: {stop.name}" in process.stderr.text
    assert "Running on" not in process.stderr.text


async def test_sighup_and_sigusr1_during_startup_do_not_disturb_it():
    command = trioserve_command("--bind", "127.0.0.1:0", "--workers", "0", "tests.e2e.apps:startup_hangs")
    async with start_process(*command) as process:
        await process.stdout.wait_for("starting")
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGHUP)
        await process.stderr.wait_for("SIGHUP ignored")
        assert process.returncode is None


async def test_ctrl_c_while_the_app_is_imported_ends_with_130_and_no_traceback(tmp_path):
    (tmp_path / "slow.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(3600)\n")
    async with start_process(*trioserve_command("--workers", "0", f"{tmp_path}/slow.py:app")) as process:
        await process.stdout.wait_for("importing")
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
    assert "Traceback" not in process.stderr.text


async def test_during_shutdown_a_third_signal_ends_a_lifespan_that_hangs():
    async with serve_command("tests.e2e.apps:shutdown_hangs") as server:
        server.send_signal(signal.SIGTERM)
        await server.stdout.wait_for("stopping")
        server.send_signal(signal.SIGTERM)
        await server.stderr.wait_for("again")
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 143


async def test_the_json_access_log_is_complete_after_a_signal(tmp_path):
    """Lines are written by a thread in the background; what was served before the end must be in the file."""
    log = tmp_path / "access.json"
    async with serve_command(APP, "--access-logfile", str(log), "--access-logformat", "json") as server:
        async with server.connect() as client:
            for n in range(50):
                await client.get(f"/{n}")
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
    assert [json.loads(line)["path"] for line in log.read_text().splitlines()] == [f"/{n}" for n in range(50)]
