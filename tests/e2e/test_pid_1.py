"""As process number 1 of a container: orphans are reaped, and SIGTERM ends it, which that number does not by itself.

`unshare` makes a process namespace without a container around it.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from .process import ServerProcess, require_tool, start_process, trioserve_command
from .test_supervisor import APP, children, until

pytestmark = pytest.mark.slow

# A process that outlives its parent, which is a child of the worker: it ends when somebody opens the pipe.
ORPHAN = """\
import subprocess

from tests.e2e.apps import app as others
from tests.apps import respond

SCRIPT = 'sh -c \\'exec 0< "$1"; exit 3\\' sh "$0" & exit 0'


async def app(scope, receive, send):
    if scope["type"] == "lifespan" or scope["path"] != "/orphan":
        await others(scope, receive, send)
        return
    subprocess.run(["sh", "-c", SCRIPT, {pipe!r}], check=True, stdin=subprocess.DEVNULL)
    await respond(send)
"""


@pytest.fixture
def namespace() -> list[str]:
    """What makes a command process number 1."""
    command = [require_tool("unshare"), "--pid", "--fork", "--mount-proc"]
    tried = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"the kernel allows no process namespace here: {tried.stderr.strip()}")
    return command


@asynccontextmanager
async def as_number_1(
    namespace: list[str], app: str, workers: int
) -> AsyncIterator[tuple[ServerProcess, int]]:
    """The server, and its number out here."""
    flags = ("--bind", "127.0.0.1:0", "--workers", str(workers), "--control", "off")
    async with start_process(*namespace, *trioserve_command(*flags, app)) as outer:
        await outer.wait_running()
        (server,) = children(outer.pid)
        yield outer, server
        os.kill(server, signal.SIGTERM)
        assert await outer.wait() == 0


@pytest.mark.parametrize("workers", [1, 0])
async def test_a_signal_ends_it_with_0(namespace: list[str], workers: int) -> None:
    async with as_number_1(namespace, APP, workers) as (outer, server):
        status = Path(f"/proc/{server}/status").read_text()
        assert "\t1\n" in next(line + "\n" for line in status.splitlines() if line.startswith("NSpid:"))
        assert (await outer.get()).body == b"hello"
    assert outer.stdout.text.count("lifespan.shutdown") == 1
    assert "Traceback" not in outer.stderr.text


async def test_it_does_not_upgrade_since_the_container_would_end_with_it(namespace: list[str]) -> None:
    async with as_number_1(namespace, APP, 1) as (outer, server):
        workers = children(server)
        os.kill(server, signal.SIGUSR2)
        await outer.stderr.wait_for("ERROR. SIGUSR2 ignored: this is process 1 .* SIGHUP reloads")
        assert children(server) == workers
        assert (await outer.get()).body == b"hello"


@pytest.mark.parametrize("workers", [1, 0])
async def test_it_can_be_ended_while_the_app_is_imported(
    namespace: list[str], workers: int, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(3600)\n")
    flags = ("--bind", "127.0.0.1:0", "--workers", str(workers), "--control", "off")
    async with start_process(*namespace, *trioserve_command(*flags, f"{tmp_path}/slow.py:app")) as outer:
        await outer.stdout.wait_for("importing")
        (server,) = children(outer.pid)
        os.kill(server, signal.SIGTERM)
        # unshare ends as its child has.
        assert await outer.wait() == (0 if workers else 143)


async def test_it_reaps_what_others_leave_behind(namespace: list[str], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "leaving.py").write_text(ORPHAN.format(pipe=str(pipe)))
    async with as_number_1(namespace, f"{tmp_path}/leaving.py:app", 1) as (outer, server):
        workers = children(server)
        for _ in range(3):
            assert (await outer.get("/orphan")).status == 200
            await until(lambda: len(children(server)) == 2, "an orphan")
            pipe.open("w").close()
            # A zombie would still be among them.
            await until(lambda: children(server) == workers, "its end")
        assert (await outer.get()).body == b"hello"
