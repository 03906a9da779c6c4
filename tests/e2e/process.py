"""Real processes for the tests: `python -m trioserve`, its peers, and what they write.

    async with serve_command("tests.e2e.apps:app", "--graceful-timeout", "1") as server:
        async with server.connect() as client:
            ...
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0

The server binds port 0 and the address is read from its error log, so that tests can run side by side. Nothing
here sleeps to wait for something that says so itself; what does not (a peer's listening socket) is polled, with
an end. A process that a test leaves running is asked to stop and must do so with exit code 0; when the test has
failed it is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from trioserve.testing import RawClient, connect, encode_request

REPOSITORY = Path(__file__).resolve().parents[2]

# Generous: a busy machine with coverage on starts a process in several seconds. Nobody waits this long on purpose.
PATIENCE = 60.0

# No test needs a process for longer; less than the time that pytest gives a test (pyproject.toml), so that what the
# process has said is shown.
LIFETIME = 240.0

# What the error log says of a bound address, here and in hypercorn.
RUNNING_ON = re.compile(r"Running on (?:https?://)?(\S+) \(CTRL \+ C to quit\)")


# Debian's packages of programs that are called otherwise.
PACKAGES = {
    "h2load": "nghttp2-client",
    "nghttp": "nghttp2-client",
    "nginx": "nginx-light",
    "systemd-analyze": "systemd",
    "systemd-socket-activate": "systemd",
}


def require_tool(name: str) -> str:
    """The path of a program; without it the test is skipped, or fails where REQUIRE_TOOLS=1 (`.ci/run`) says so."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if path is not None:
        return path
    message = f"{name} is not installed: apt-get install {PACKAGES.get(name, name)}"
    if os.environ.get("REQUIRE_TOOLS") == "1":
        pytest.fail(message)
    pytest.skip(message)


class Output:
    """What a process has written to one stream; `text` is all of it."""

    def __init__(self) -> None:
        self.text = ""
        self._ended = False
        self._searched = 0
        self._news = trio.Event()

    async def collect(self, stream: trio.abc.ReceiveStream) -> None:
        async with stream:
            async for part in stream:
                self.text += part.decode("utf-8", "replace")
                self._wake()
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def wait_for(self, pattern: str | re.Pattern[str]) -> re.Match[str]:
        """The next match behind the last one that was waited for."""
        with trio.move_on_after(PATIENCE):
            while True:
                found = re.compile(pattern).search(self.text, self._searched)
                if found:
                    self._searched = found.end()
                    return found
                if self._ended:
                    break
                await self._news.wait()
        state = "ended" if self._ended else f"has said nothing of the kind for {PATIENCE:g} s"
        raise AssertionError(f"{pattern!r} was not written; the stream {state}:\n{self.text}")


class ServerProcess:
    """A running process and its output.

    Attributes:
        address: as the error log gave it: `host:port` or `unix:path`; "" for processes that say none.
        stdout, stderr: what it has written.
    """

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self.address = ""
        self.stdout = Output()
        self.stderr = Output()
        self._collected = trio.Event()

    async def collect(self) -> None:
        async with trio.open_nursery() as nursery:
            for output, stream in ((self.stdout, self._process.stdout), (self.stderr, self._process.stderr)):
                if stream is not None:
                    nursery.start_soon(output.collect, stream)
        self._collected.set()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """The process and all that it has started; no error if they are gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    async def wait_running(self) -> None:
        """Return once its error log, on stderr, says where it listens."""
        self.address = (await self.stderr.wait_for(RUNNING_ON)).group(1)

    async def wait(self, patience: float = PATIENCE) -> int:
        """The exit code, once all output has been read."""
        with trio.move_on_after(patience):
            code = await self._process.wait()
            await self._collected.wait()
            return code
        self.kill()
        raise AssertionError(f"the process has not ended within {patience:g} s:\n{self.stderr.text}")

    def connect(self, *, receive_buffer: int | None = None) -> RawClient:
        return connect(self.address, receive_buffer=receive_buffer)

    async def get(self, target: str = "/", headers: Sequence[tuple[str, str]] = ()) -> Any:
        """One request on a connection of its own."""
        async with self.connect() as client:
            return await client.get(target, headers)

    def reports(self) -> list[dict[str, Any]]:
        """The crash reports on stderr."""
        lines = [line for line in self.stderr.text.splitlines() if line.startswith('{"report":"crash"')]
        return [json.loads(line) for line in lines]


@contextlib.asynccontextmanager
async def start_process(
    *command: str,
    env: Mapping[str, str] | None = None,
    cwd: Path = REPOSITORY,
    pass_fds: Sequence[int] = (),
    stderr: int = subprocess.PIPE,
) -> AsyncIterator[ServerProcess]:
    """Run a command while the block runs; see the module's docstring for how it ends."""
    process = await trio.lowlevel.open_process(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**clean_environment(), **(env or {})},
        cwd=cwd,
        pass_fds=pass_fds,
        # A group of its own: what it has started itself can be killed with it.
        start_new_session=True,
    )
    running = ServerProcess(process)
    failure: Exception | None = None
    with trio.fail_after(LIFETIME):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.collect)
            try:
                yield running
                if running.returncode is None:
                    running.send_signal(signal.SIGTERM)
                    code = await running.wait()
                    assert code == 0, f"exit code {code} after SIGTERM:\n{running.stderr.text}"
            except Exception as error:
                failure = error  # out of the nursery it would come in a group, which pytest shows less well
            finally:
                with trio.CancelScope(shield=True):
                    if running.returncode is None or failure is not None or sys.exc_info()[0] is not None:
                        running.kill()  # and what has outlived it: a successor after an upgrade, workers
                    await process.wait()
    if failure is not None:
        raise failure


@contextlib.asynccontextmanager
async def serve_command(
    application: str,
    *flags: str,
    bind: str | None = "127.0.0.1:0",
    workers: int | str | None = 0,
    env: Mapping[str, str] | None = None,
    cwd: Path = REPOSITORY,
    pass_fds: Sequence[int] = (),
    module: str = "trioserve",
) -> AsyncIterator[ServerProcess]:
    """`python -m trioserve`, ready to serve; its error log must go to stderr. `None` leaves it to a configuration.

    Without a supervisor unless `workers` says otherwise: the process is then the worker.
    """
    binds = [] if bind is None else ["--bind", bind]
    count = [] if workers is None else ["--workers", str(workers)]
    command = trioserve_command(*binds, *count, *flags, application, module=module)
    async with start_process(*command, env=env, cwd=cwd, pass_fds=pass_fds) as server:
        await server.wait_running()
        yield server


@contextlib.asynccontextmanager
async def held_request(server: ServerProcess, path: str = "/hold") -> AsyncIterator[RawClient]:
    """A client whose request is in the app of `apps.py`, which goes on once the client sends its last byte, `b"!"`."""
    async with server.connect() as client:
        await client.send(encode_request("POST", path, body=b"done!")[:-1])
        await server.stdout.wait_for("holding")
        yield client


def trioserve_command(*arguments: str, module: str = "trioserve") -> list[str]:
    """The command line; a warning is an error, as in the tests' own process."""
    return [sys.executable, "-W", "error", "-m", module, *arguments]


async def run_to_end(
    *command: str, env: Mapping[str, str] | None = None, cwd: Path = REPOSITORY, patience: float = PATIENCE
) -> ServerProcess:
    """Run a command that ends by itself; its `returncode` and output are complete."""
    async with start_process(*command, env=env, cwd=cwd) as process:
        await process.wait(patience)
    return process


def clean_environment() -> dict[str, str]:
    """Ours, without settings of somebody's shell, and with the repository to import from."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRIOSERVE_")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    env["PYTHONUNBUFFERED"] = "1"
    return env


async def wait_listening(address: str) -> None:
    """Return once something accepts connections there: for peers that do not say so."""
    with trio.fail_after(PATIENCE):
        while True:
            try:
                connect(address).close()
                return
            except OSError:
                await trio.sleep(0.02)


async def wait_refused(address: str) -> None:
    """Return once connections are turned away there."""
    with trio.fail_after(PATIENCE):
        while True:
            try:
                connect(address).close()
            except OSError:
                return
            await trio.sleep(0.02)


async def wait_in_file(path: Path, pattern: str) -> re.Match[str]:
    """The first match in a file that another process writes."""
    found = None
    with trio.move_on_after(PATIENCE):
        while not (found := re.search(pattern, path.read_text() if path.exists() else "")):
            await trio.sleep(0.02)
    assert found, f"{pattern!r} is not in {path}:\n{path.read_text() if path.exists() else 'no such file'}"
    return found
