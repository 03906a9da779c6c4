"""A process whose event loop is blocked: the warning, the report, the end with 80; and the idle one, at rest."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import trio

from trioserve.testing import encode_request

from .process import PATIENCE, ServerProcess, held_request, run_to_end, serve_command, trioserve_command

APP = "tests.e2e.apps:app"

WARN = ("--block-warn", "0.3")
KILL = (*WARN, "--block-kill", "0.8")

pytestmark = pytest.mark.slow


async def test_a_block_that_ends_is_only_warned_of():
    async with serve_command(APP, *WARN) as server:
        assert (await server.get("/sleep?0.6")).status == 200
        await server.stderr.wait_for(
            r"WARNING\] the event loop has been blocked for \d+\.\d s in GET /sleep on connection 1, "
            r"at .*tests/e2e/apps\.py:\d+ in _sleep"
        )
        await server.stderr.wait_for(r"trioserve\.errors\.LoopBlocked: for \d+\.\d s in GET /sleep")
        over = await server.stderr.wait_for(
            r"WARNING\] the event loop goes on; it had been blocked for (\d+\.\d) s"
        )
        assert float(over[1]) >= 0.6
        assert (await server.get()).body == b"hello"
    assert server.reports() == []


async def test_a_loop_that_stays_blocked_ends_the_process_with_80_and_a_report(tmp_path):
    async with serve_command(APP, *KILL, "--crash-dir", str(tmp_path)) as server:
        async with held_request(server), server.connect() as client:
            await client.send(encode_request("GET", "/sleep?3600"))
            assert await server.wait() == 80
    (report,) = server.reports()
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text()) == report
    assert (report["row"], report["verdict"]) == ("H1", "fatal")
    assert "apps.py:" in report["signature"]
    assert report["request"]["path"] == "/sleep"
    assert report["worker"]["in_flight"] == 2
    assert {facts["path"] for facts in report["requests_in_flight"]} == {"/hold", "/sleep"}
    (main_thread,) = (thread for thread in report["threads"] if thread["name"] == "MainThread")
    assert main_thread["frames"][-1]["function"] == "_sleep"
    assert report["error"]["frames"][-1]["function"] == "_sleep"
    assert any("_hold" in line for line in report["tasks"])
    assert "3600" not in report["summary"] + json.dumps(report["requests_in_flight"])
    assert "CRITICAL] the event loop was blocked for too long" in server.stderr.text
    assert server.stderr.text.count("the event loop has been blocked") == 1


async def test_a_lock_of_the_logs_that_the_loop_holds_does_not_save_it(tmp_path):
    """A handler of the operator's that blocks: whoever logs after it waits for its lock."""
    (tmp_path / "blocks.py").write_text(
        "import logging, time\n"
        "class Handler(logging.StreamHandler):\n"
        "    def emit(self, record):\n"
        "        if record.msg == 'block':\n"
        "            time.sleep(3600)\n"
        "        super().emit(record)\n"
        "log = logging.getLogger('operators')\n"
        "log.addHandler(Handler())\n"
        "log.setLevel('INFO')\n"
        "async def app(scope, receive, send):\n"
        "    log.info('block')\n"
    )
    (tmp_path / "config.py").write_text("from blocks import log as errorlog\n")
    flags = ("--config", "file:config.py", "--lifespan", "off", *KILL)
    async with serve_command("blocks:app", *flags, cwd=tmp_path) as server:
        async with server.connect() as client:
            await client.send(encode_request("GET"))
            assert await server.wait() == 80
    assert [report["row"] for report in server.reports()] == ["H1"]


async def test_a_blocked_drain_is_reported_once():
    hard_exit = ("--graceful-timeout", "0.1", "--shutdown-timeout", "0.1", "--hard-exit-after", "0.1")
    async with serve_command(APP, *WARN, "--block-kill", "2.3", *hard_exit) as server:
        async with held_request(server, "/block") as client:
            server.send_signal(signal.SIGTERM)
            await server.stderr.wait_for("draining")
            await client.send(b"!")
            # Both watchdogs are due at about the same time; either may come first.
            assert await server.wait() in (80, 82)
    assert len(server.reports()) == 1


async def test_a_process_that_was_stopped_has_not_been_blocked():
    patient = ("--block-warn", "1", "--block-kill", "2")
    async with serve_command(APP, *patient) as server, server.connect() as client:
        await client.send(encode_request("GET", "/sleep?0.2"))
        await server.stdout.wait_for("sleeping")
        server.send_signal(signal.SIGSTOP)
        await trio.sleep(3)  # what is tested is that this time does not count
        server.send_signal(signal.SIGCONT)
        assert (await client.read_response()).status == 200
        assert (await client.get()).status == 200
    assert "blocked" not in server.stderr.text


async def test_an_idle_worker_sleeps():
    """Open connections and all; a worker without a watchdog is the measure."""
    slept: dict[str, int] = {}

    async def measure(name: str, *flags: str) -> None:
        async with serve_command(APP, *flags, "--keep-alive", "60") as server, server.connect() as client:
            assert (await client.get()).status == 200
            # What is done late on a busy machine is done once; what does not rest shows in every window.
            for _ in range(5):
                await wait_at_rest(server)
                before = wake_ups(server)
                await trio.sleep(3)
                slept[name] = wake_ups(server) - before
                if slept[name] <= 1:
                    break

    async with trio.open_nursery() as nursery:
        nursery.start_soon(measure, "watched")
        nursery.start_soon(measure, "not watched", "--block-warn", "off", "--block-kill", "off")
    assert slept["watched"] <= 1, slept
    assert slept["watched"] - slept["not watched"] <= 1, slept


async def wait_at_rest(server: ServerProcess) -> None:
    with trio.fail_after(PATIENCE):
        before = -1
        while before != (before := wake_ups(server)):
            await trio.sleep(1)


def wake_ups(server: ServerProcess) -> int:
    """How often the process's threads have gone to sleep."""
    count = 0
    for status in Path(f"/proc/{server.pid}/task").glob("*/status"):
        (line,) = (
            line for line in status.read_text().splitlines() if line.startswith("voluntary_ctxt_switches")
        )
        count += int(line.split()[1])
    return count


async def test_switched_off_it_says_and_does_nothing():
    async with serve_command(APP, "--block-warn", "off", "--block-kill", "off") as server:
        assert (await server.get("/sleep?1.5")).status == 200
    assert "blocked" not in server.stderr.text


async def test_a_limit_below_the_warning_is_a_configuration_error():
    process = await run_to_end(*trioserve_command("--block-kill", "0.5", APP))
    assert process.returncode == 78
    assert (
        "command line: --block-kill = 0.5 (float): a blocked loop is warned of before" in process.stderr.text
    )
    assert "longer than block_warn = 1 (default)" in process.stderr.text
