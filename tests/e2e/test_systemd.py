"""Under systemd's tools and rules: units that it takes, notifications, socket activation, scale to zero.

systemd itself does not run here. `systemd-socket-activate` waits for the first connection and then becomes the
server, as a socket unit would start it; the tests hold the listening socket, as systemd does.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest
import trio

from trioserve.config import Config
from trioserve.testing import RawClient, connect, encode_request

from .process import (
    PATIENCE,
    REPOSITORY,
    ServerProcess,
    clean_environment,
    held_request,
    require_tool,
    run_to_end,
    serve_command,
    start_process,
    trioserve_command,
)

APP = "tests.e2e.apps:app"

UNITS = REPOSITORY / "examples" / "deploy" / "systemd"

ALONE = ("--workers", "0")

pytestmark = pytest.mark.slow


# -- the units ----------------------------------------------------------------------------------------------------


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units with a trioserve that is installed here."""
    for unit in UNITS.iterdir():
        if unit.suffix in (".service", ".socket"):
            text = unit.read_text().replace("/srv/app/venv/bin/trioserve", f"{sys.executable} -m trioserve")
            (tmp_path / unit.name).write_text(text)
    return tmp_path


async def test_systemd_takes_the_units(units: Path) -> None:
    names = sorted(unit.name for unit in units.iterdir())
    assert names == [
        "trioserve-on-demand.service",
        "trioserve-on-demand.socket",
        "trioserve.service",
        "trioserve.socket",
    ]
    analyze = require_tool("systemd-analyze")
    verified = await run_to_end(analyze, "verify", "--man=no", *(str(units / name) for name in names))
    # Complaints about units of this machine that ours only depend on are not about ours.
    complaints = [line for line in verified.stderr.text.splitlines() if "trioserve" in line]
    assert complaints == []
    assert verified.returncode == 0, verified.stderr.text


@pytest.mark.parametrize("name", ["trioserve.service", "trioserve-on-demand.service"])
async def test_the_services_are_confined(units: Path, name: str) -> None:
    """Exposure by systemd's own measure: 0 is none, 9.6 a unit that says nothing."""
    analyze = require_tool("systemd-analyze")
    judged = await run_to_end(
        analyze, "security", "--offline=true", "--threshold=25", "--no-pager", str(units / name)
    )
    assert judged.returncode == 0, judged.stdout.text


@pytest.mark.parametrize("name", ["trioserve.service", "trioserve-on-demand.service"])
async def test_their_command_lines_and_times_fit_the_defaults(name: str) -> None:
    text = (UNITS / name).read_text()
    (command,) = re.findall(r"^ExecStart=\S+ (.*)$", text, re.MULTILINE)
    checked = await run_to_end(*trioserve_command("--check-config", *command.split()))
    assert checked.returncode == 0, checked.stderr.text
    config = Config()
    assert config.hard_exit_after is not None
    assert config.block_kill is not None
    last_moment = config.graceful_timeout + config.shutdown_timeout + config.hard_exit_after + 4
    assert _seconds(text, "TimeoutStopSec") > last_moment
    assert _seconds(text, "TimeoutStartSec") > config.startup_timeout
    assert _seconds(text, "WatchdogSec") > config.block_kill


def _seconds(unit: str, name: str) -> float:
    (value,) = re.findall(rf"^{name}=(\d+)$", unit, re.MULTILINE)
    return float(value)


# -- notifications ------------------------------------------------------------------------------------------------


class Manager:
    """What listens at `NOTIFY_SOCKET`."""

    def __init__(self, path: Path) -> None:
        self.sock = trio.socket.from_stdlib_socket(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.path = path

    async def wait_for(self, pattern: str) -> str:
        """The next message that holds it; those before it are passed over."""
        with trio.fail_after(PATIENCE):
            while True:
                message = (await self.sock.recv(4097)).decode()
                if re.search(pattern, message):
                    return message


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[Manager]:
    manager = Manager(tmp_path / "notify")
    with manager.sock:
        await manager.sock.bind(str(manager.path))
        yield manager


async def test_a_process_on_its_own_says_ready_alive_and_stopping(manager: Manager) -> None:
    env = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "200000"}
    async with serve_command(APP, env=env) as server:
        ready = await manager.wait_for("^READY=1$|^READY=1\n")
        assert ready == f"READY=1\nSTATUS=serving on http://{server.address}"
        for _ in range(3):
            assert await manager.wait_for("WATCHDOG") == "WATCHDOG=1"
        server.send_signal(signal.SIGTERM)
        assert await manager.wait_for("STOPPING") == "STOPPING=1\nSTATUS=draining: SIGTERM"
        assert await server.wait() == 0


async def test_a_loop_that_is_blocked_feeds_no_watchdog(manager: Manager) -> None:
    env = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "100000"}
    async with serve_command(APP, "--block-warn", "off", env=env) as server:
        async with server.connect() as client:
            await client.send(encode_request("GET", "/sleep?4"))
            await server.stdout.wait_for("sleeping")
            with trio.move_on_after(0.2):  # what was on its way
                await manager.wait_for("never")
            began = trio.current_time()
            await manager.wait_for("WATCHDOG")
            assert trio.current_time() - began > 0.5, "systemd would have ended it meanwhile"
            assert (await client.read_response()).status == 200


async def test_not_started_by_systemd_it_says_nothing() -> None:
    async with serve_command(APP) as server:
        assert (await server.get()).status == 200
    assert "service manager" not in server.stderr.text


async def test_a_reload_is_told_only_while_it_serves(manager: Manager, tmp_path: Path) -> None:
    config, may_start = tmp_path / "server.toml", tmp_path / "may-start"
    config.write_text("")
    env = {"NOTIFY_SOCKET": str(manager.path), "MAY_START": str(may_start)}
    flags = ("-c", str(config), "--bind", "127.0.0.1:0", "--workers", "1")
    async with start_process(*trioserve_command(*flags, "tests.e2e.dying:waits_to_start"), env=env) as server:
        await server.stderr.wait_for("started, generation 1")
        config.write_text("no_such_setting = 1\n")
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reload failed")
        may_start.touch()
        first = await manager.wait_for("READY|RELOADING")
        assert first == "READY=1\nSTATUS=1 of 1 workers ready, generation 1"

        server.send_signal(signal.SIGHUP)
        assert (await manager.wait_for("READY|RELOADING")).startswith("RELOADING=1")
        assert (await manager.wait_for("READY|RELOADING")).startswith("READY=1")

        config.write_text("")
        may_start.unlink()
        server.send_signal(signal.SIGHUP)
        await manager.wait_for("RELOADING")
        server.send_signal(signal.SIGTERM)
        await manager.wait_for("STOPPING")
        assert await server.wait() == 0
    with trio.move_on_after(0.2) as silence:
        await manager.wait_for("READY")
    assert silence.cancelled_caught
    assert server.stderr.text.count("reload failed") == 2
    assert "the reload ends with the server" in server.stderr.text


async def test_a_failed_start_does_not_say_ready(manager: Manager) -> None:
    env = {"NOTIFY_SOCKET": str(manager.path)}
    process = await run_to_end(*trioserve_command(*ALONE, "tests.e2e.nowhere:app"), env=env)
    assert process.returncode == 4
    with trio.move_on_after(0.2) as silence:
        await manager.wait_for("")
    assert silence.cancelled_caught


# -- socket activation --------------------------------------------------------------------------------------------


@pytest.fixture
def held() -> Iterator[socket.socket]:
    """The listening socket, as systemd holds it: nothing that we do closes it."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as sock:
        yield sock


def call(held: socket.socket, path: str = "/") -> RawClient:
    """A connection with one request on it, whether or not anybody is there to accept it."""
    client = connect(f"127.0.0.1:{held.getsockname()[1]}")
    client.sock.sendall(encode_request("GET", path))
    return client


async def assert_answered(client: RawClient) -> bytes:
    with trio.fail_after(PATIENCE):
        async with client:
            response = await client.read_response()
    assert response.status == 200
    return response.body


@contextlib.asynccontextmanager
async def with_descriptor_3(
    held: socket.socket, *command: str, env: dict[str, str] | None = None
) -> AsyncIterator[ServerProcess]:
    """Run a command that finds `held` as descriptor 3, announced as systemd does it."""
    # The shell knows the number of the process before it becomes the command; and it has only one digit for a number.
    script = 'exec 3<&"$HELD"; export LISTEN_PID=$$; exec "$@"'
    shell = [require_tool("bash"), "-c", script, "bash"]
    variables = {"HELD": str(held.fileno()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "web", **(env or {})}
    async with start_process(*shell, *command, env=variables, pass_fds=[held.fileno()]) as server:
        yield server


@pytest.mark.parametrize("workers", ["0", "1"])
async def test_the_passed_socket_replaces_the_default_bind(held: socket.socket, workers: str) -> None:
    async with with_descriptor_3(held, *trioserve_command("--workers", workers, APP)) as server:
        await server.wait_running()
        assert server.port == held.getsockname()[1]
        await assert_answered(call(held))
    assert f"socket activation: web (http://{server.address})" in server.stderr.text
    assert "is not used" not in server.stderr.text


@pytest.mark.parametrize("workers", ["0", "1"])
async def test_the_passed_socket_replaces_a_bind_that_was_set_and_says_so(
    held: socket.socket, workers: str
) -> None:
    command = trioserve_command("--workers", workers, "--bind", "127.0.0.1:1", APP)
    async with with_descriptor_3(held, *command) as server:
        await server.wait_running()
        await assert_answered(call(held))
    remark = "command line: --bind = 127.0.0.1:1 is not used: the sockets above replace it"
    assert server.stderr.text.count(remark) == 1


async def test_a_bind_by_number_is_taken_at_its_word(held: socket.socket) -> None:
    command = trioserve_command(*ALONE, "--bind", "fd://3", "--bind", "127.0.0.1:0", APP)
    async with with_descriptor_3(held, *command) as server:
        await server.wait_running()
        assert server.port == held.getsockname()[1]
        await server.wait_running()
        assert (await server.get()).status == 200
        await assert_answered(call(held))


@pytest.mark.parametrize(
    "flags", [ALONE, [*ALONE, "--bind", "fd://3"], ["--workers", "1"], ["--workers", "1", "--preload"]]
)
async def test_the_app_and_its_children_see_none_of_the_variables(
    held: socket.socket, manager: Manager, tmp_path: Path, flags: Sequence[str]
) -> None:
    """They would speak for the server, or take its sockets."""
    (tmp_path / "curious.py").write_text(
        "import os\nprint(*sorted(os.environ), flush=True)\nfrom tests.apps import hello\n"
    )
    env = {
        "NOTIFY_SOCKET": str(manager.path),
        "WATCHDOG_USEC": "90000000",
        "PYTHONPATH": f"{clean_environment()['PYTHONPATH']}:{tmp_path}",
    }
    command = trioserve_command(*flags, "curious:hello")
    async with with_descriptor_3(held, *command, env=env) as server:
        await server.wait_running()
    seen = server.stdout.text.split()
    assert "HELD" in seen
    assert [name for name in seen if name.startswith(("LISTEN_", "NOTIFY_", "WATCHDOG_"))] == []


async def test_a_variable_that_cannot_be_is_named(held: socket.socket) -> None:
    command = trioserve_command(*ALONE, APP)
    async with with_descriptor_3(held, *command, env={"LISTEN_FDS": "two"}) as server:
        assert await server.wait() == 71
    assert server.stderr.text == (
        "trioserve: LISTEN_FDS='two' in the environment: expected how many sockets were passed; see sd_listen_fds(3)\n"
    )


async def test_what_is_queued_while_it_restarts_is_answered_by_the_next(held: socket.socket) -> None:
    command = trioserve_command(*ALONE, APP)
    for _ in range(2):
        early = call(held)  # nothing runs
        async with with_descriptor_3(held, *command) as server:
            await assert_answered(early)
            async with held_request(_at(server, held)) as client:
                server.send_signal(signal.SIGTERM)
                await server.stderr.wait_for("draining: SIGTERM; 1 requests in flight")
                await client.send(b"!")
                assert (await client.read_response("POST")).body == b"done!"
            assert await server.wait() == 0


def _at(server: ServerProcess, held: socket.socket) -> ServerProcess:
    server.address = f"127.0.0.1:{held.getsockname()[1]}"
    return server


# -- scale to zero ------------------------------------------------------------------------------------------------


async def test_the_first_connection_starts_it_it_ends_when_idle_and_the_next_starts_it_again(
    held: socket.socket,
) -> None:
    activate = require_tool("systemd-socket-activate")
    env = clean_environment()
    kept = [f"--setenv=PYTHONPATH={env['PYTHONPATH']}", f"--setenv=PATH={env['PATH']}"]
    command = trioserve_command(*ALONE, "--exit-when-idle", "0.5", APP)
    for number in range(3):
        async with with_descriptor_3(held, activate, *kept, *command) as server:
            if number == 0:  # otherwise the call below is there already
                await server.stderr.wait_for("Listening on")
                assert _program(server.pid) == "systemd-socket-activate", "nothing of ours runs"
                first = call(held, "/pid")
            assert int(await assert_answered(first)) == server.pid, "it has become the server"
            assert await server.wait() == 0
        assert "draining: idle for 0.5 s (exit_when_idle)" in server.stderr.text
        # Nothing runs at all, and yet nobody is refused.
        first = call(held, "/pid")
    first.close()


def _program(pid: int) -> str:
    return Path(os.readlink(f"/proc/{pid}/exe")).name


async def test_callers_at_any_time_are_answered_while_it_comes_and_goes(held: socket.socket) -> None:
    """A service manager that starts it whenever somebody waits, and clients that call when they like."""
    command = trioserve_command(*ALONE, "--exit-when-idle", "0.05", APP)
    starts = calls = 0

    async def manage() -> None:
        nonlocal starts
        while True:
            await trio.lowlevel.wait_readable(held)
            starts += 1
            async with with_descriptor_3(held, *command) as server:
                assert await server.wait() == 0

    with trio.fail_after(90):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(manage)
            while starts < 4:
                await assert_answered(call(held))
                # Of 0 to 180 ms: before, in, and after the moment in which it leaves.
                await trio.sleep(0.02 * (calls * 7 % 10))
                calls += 1
            nursery.cancel_scope.cancel()
