"""A worker's death: one file and one line for each, with what only its parent can know."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import trio

from .apps import SECRET
from .process import PATIENCE, ServerProcess, held_request, serve_command

pytestmark = pytest.mark.slow

# An app that can also fall over in C.
DYING = """
import ctypes, resource
from tests.e2e.apps import app as others

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

async def app(scope, receive, send):
    if scope.get("path") == "/segfault":
        ctypes.string_at(0)
    await others(scope, receive, send)
"""


@pytest.fixture
def dying(tmp_path: Path) -> str:
    (tmp_path / "dying_app.py").write_text(DYING)
    return f"{tmp_path}/dying_app.py:app"


async def wait_reports(folder: Path, number: int = 1) -> list[dict[str, Any]]:
    """The reports in the folder, once there are so many that the parent has completed."""
    found: list[dict[str, Any]] = []
    with trio.move_on_after(PATIENCE):
        while len(found) < number:
            await trio.sleep(0.02)
            # Written under another name until it is whole.
            found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
            found = [report for report in found if "exit" in report]
    assert len(found) == number
    return found


async def worker_of(server: ServerProcess) -> int:
    return int((await server.get("/pid")).body)


def flags(folder: Path) -> tuple[str, ...]:
    return ("--crash-dir", str(folder), "--control", "off")


async def test_a_segmentation_fault_is_reported_with_the_line_and_the_requests(
    dying: str, tmp_path: Path
) -> None:
    folder = tmp_path / "crashes"
    async with serve_command(dying, *flags(folder), workers=1) as server:
        pid = await worker_of(server)
        async with held_request(server, f"/hold?token={SECRET}"), server.connect() as client:
            await client.send(f"GET /segfault?token={SECRET} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            line = (await server.stderr.wait_for(r"worker 1 \(pid \d+\) ended: [^\n]*")).group()
        (report,) = await wait_reports(folder)
        assert await worker_of(server) != pid
    assert "native crash, signal 11 (SIGSEGV)" in line
    assert "2 requests in flight: " in line
    ended = report["exit"]
    assert (ended["class"], ended["signal"], ended["was_ready"]) == ("native crash", "SIGSEGV", True)
    assert {(request["method"], request["path"]) for request in ended["in_flight"]} == {
        ("GET", "/segfault"),
        ("POST", "/hold"),
    }
    assert any("string_at" in frame for frame in ended["stacks"])
    assert report["pid"] == pid
    assert re.fullmatch(r"native crash: signal 11 \(SIGSEGV\) at .*/dying_app\.py:9", report["signature"])
    assert len(list(folder.iterdir())) == 1
    assert server.stderr.text.count("worker 1 (pid") - server.stderr.text.count("ended: ") <= 3
    assert server.stderr.text.count("ended: native crash") == 1 + 1  # in the log, and in the report on stderr
    assert SECRET not in json.dumps(report) + server.stderr.text


async def test_a_kill_is_reported_with_the_requests(tmp_path: Path) -> None:
    async with serve_command("tests.e2e.apps:app", *flags(tmp_path), workers=1) as server:
        pid = await worker_of(server)
        async with held_request(server):
            os.kill(pid, signal.SIGKILL)
            await server.stderr.wait_for(
                "ended: killed, signal 9 .SIGKILL.; .*1 request in flight: POST /hold"
            )
        (report,) = await wait_reports(tmp_path)
        assert await worker_of(server) != pid
    assert report["exit"]["class"] == "killed"
    assert [request["path"] for request in report["exit"]["in_flight"]] == ["/hold"]


async def test_a_report_of_the_workers_own_is_completed_in_its_place(tmp_path: Path) -> None:
    async with serve_command("tests.e2e.apps:app", *flags(tmp_path), workers=1) as server:
        assert (await server.get("/raise")).status == 500
        await server.stderr.wait_for("ended: app error, exit code 75; .*LookupError")
        (report,) = await wait_reports(tmp_path)
    (own,) = server.reports()
    assert "exit" not in own
    assert report["id"] == own["id"]
    assert {name: report[name] for name in own} == own
    assert report["exit"]["class"] == "app error"
    assert len(list(tmp_path.iterdir())) == 1


async def test_a_blocked_loop_that_the_worker_has_reported_is_one_report_too(tmp_path: Path) -> None:
    extra = ("--block-kill", "1", "--block-warn", "off")
    async with serve_command("tests.e2e.apps:app", *flags(tmp_path), *extra, workers=1) as server:
        async with held_request(server, "/block") as client:
            await client.send(b"!")
            await server.stderr.wait_for("ended: hang, exit code 80")
        (report,) = await wait_reports(tmp_path)
    assert report["row"] == "H1"
    assert report["exit"]["class"] == "hang"
    assert [request["path"] for request in report["exit"]["in_flight"]] == ["/block"]
    assert len(list(tmp_path.iterdir())) == 1
    assert len(server.reports()) == 1


async def test_a_planned_end_is_a_line_and_no_report(tmp_path: Path) -> None:
    async with serve_command("tests.e2e.apps:app", *flags(tmp_path), workers=1) as server:
        await worker_of(server)
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for(r"INFO\] worker 1 \(pid \d+\) ended: recycled, exit code 0")
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
    assert "ended: stopped, exit code 0" in server.stderr.text
    assert list(tmp_path.iterdir()) == []
    assert server.reports() == []
