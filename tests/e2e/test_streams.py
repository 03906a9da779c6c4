"""A process that is started without its standard streams: nothing else gets their descriptors."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from trioserve.testing import connect, encode_request

from .process import RUNNING_ON, start_process, trioserve_command, wait_in_file
from .test_supervisor import APP, children

pytestmark = pytest.mark.slow

CLOSED = {"all three": "<&- >&- 2>&-", "stdin": "<&-", "stderr": "2>&-", "stdin and stderr": "<&- 2>&-"}

# As `trioserve.run` is called by a script.
SCRIPT = """
import sys
import trioserve
from tests.e2e.apps import app

if __name__ == "__main__":
    config = trioserve.Config()
    config.bind = ["127.0.0.1:0"]
    config.lifespan = "off"
    config.errorlog = sys.argv[1]
    sys.exit(trioserve.run(app, config))
"""


def assert_has_streams(pid: int) -> None:
    for number in range(3):
        target = os.readlink(f"/proc/{pid}/fd/{number}")
        assert target == "/dev/null" or target.startswith("pipe:"), (number, target)
    (flags,) = (
        line.split()[1] for line in Path(f"/proc/{pid}/fdinfo/0").read_text().splitlines() if "flags" in line
    )
    assert int(flags, 8) & os.O_ACCMODE != os.O_WRONLY


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize("workers", ["0", "1", "run()"])
async def test_missing_streams_are_nothing_and_no_sockets(closed: str, workers: str, tmp_path: Path) -> None:
    log = tmp_path / "error.log"
    if workers == "run()":
        command = [sys.executable, "-c", SCRIPT, str(log)]
    else:
        command = trioserve_command(
            "--bind", "127.0.0.1:0", "--workers", workers, "--error-log", str(log), "--lifespan", "off", APP
        )
    async with start_process("sh", "-c", f'exec "$@" {CLOSED[closed]}', "sh", *command) as server:
        address = (await wait_in_file(log, RUNNING_ON.pattern)).group(1)
        pids = [server.pid, *children(server.pid)]
        assert len(pids) == 1 + (workers == "1")
        for pid in pids:
            assert_has_streams(pid)
        clients = [connect(address) for _ in range(4)]
        for client in clients:
            assert (await client.get("/")).status == 200
        async with connect(address) as client:
            await client.send(encode_request("GET", "/raise"))
            assert (await client.read_response()).status == 500
        server.send_signal(signal.SIGTERM)
        await server.wait()
        for client in clients:
            assert await client.receive() == b""  # no report
            client.close()
