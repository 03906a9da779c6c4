"""The supervisor's side of preloading, against preloaders that behave badly; good ones are in tests/e2e."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager

import pytest
import trio

from trioserve.config import Config
from trioserve.errors import EXIT_APP_NOT_FOUND, EXIT_CONFIG
from trioserve.net.share_board import ShareBoard
from trioserve.supervisor import preload
from trioserve.supervisor.preload import Preloads
from trioserve.supervisor.restart_policy import GiveUp
from trioserve.supervisor.worker_process import ForkRefused, Orders

# A process that has its socket as descriptor 3, reads its orders and then does as the test says.
PLAY = """
import os, socket, time
sock = socket.socket(fileno=3)
sock.recv(65536)
def say(line):
    sock.sendall(line + b"\\n")
"""


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    logger = logging.getLogger("tests.preload")
    logger.setLevel(logging.INFO)
    lines = Lines()
    logger.addHandler(lines)
    yield logger
    logger.removeHandler(lines)


def said(log: logging.Logger) -> str:
    (handler,) = log.handlers
    assert isinstance(handler, Lines)
    return "\n".join(handler.lines)


@pytest.fixture
def orders() -> Iterator[Orders]:
    board = ShareBoard.create()
    config = Config.from_mapping(worker_timeout=20.0, startup_timeout=20.0, preload=True)
    yield Orders("app:app", config, 1, [], board)
    board.close()


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """The next preloaders play these scripts, the last one over and over; all have been waited for at the end."""
    started: list[int] = []

    def set_scripts(*scripts: str) -> None:
        waiting = list(scripts)

        def spawn(role: str, environment: Mapping[str, str], inherited: Sequence[int], link: int) -> int:
            script = waiting.pop(0) if len(waiting) > 1 else waiting[0]
            command = [sys.executable, "-I", "-S", "-c", PLAY + script]
            move = (os.POSIX_SPAWN_DUP2, inherited[0], 3)
            started.append(os.posix_spawn(command[0], command, dict(os.environ), file_actions=[move]))
            return started[-1]

        monkeypatch.setattr(preload, "spawn_worker", spawn)

    yield set_scripts
    for pid in started:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


@asynccontextmanager
async def preloads(log: logging.Logger) -> AsyncIterator[Preloads]:
    with trio.fail_after(90):
        async with trio.open_nursery() as nursery:
            yield Preloads(nursery, log)
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(30):
        while not condition():
            await trio.sleep(0.01)


LOADED = 'say(b\'{"is":"loaded"}\')\n'


@pytest.mark.parametrize(
    "script, reason",
    [
        ("say(b'nonsense')\ntime.sleep(600)", "understood ({'is': 'not JSON"),
        ("""say(b'{"is":"happy"}')\ntime.sleep(600)""", "cannot be understood ({'is': 'happy'})"),
        ("""say(b'{"is":"threads","names":["a","b"]}')""", "has started 2 threads (a, b)"),
        ("os._exit(1)", "has ended (exit code 1)"),
        ("os.kill(os.getpid(), 11)", "has ended (signal 11)"),
    ],
)
async def test_what_is_not_loaded_is_started_by_exec(
    script: str, reason: str, play: Callable[..., None], orders: Orders, log: logging.Logger
) -> None:
    play(script)
    async with preloads(log) as found:
        assert await found.prepare(orders) is orders
        assert found.pids() == set()
    assert reason in said(log)
    assert "workers of generation 1 are started by exec" in said(log)


async def test_an_import_gets_as_long_as_a_worker_would(
    play: Callable[..., None], orders: Orders, log: logging.Logger
) -> None:
    play("time.sleep(600)")
    orders.config.worker_timeout = orders.config.startup_timeout = 0.25
    async with preloads(log) as found:
        assert await found.prepare(orders) is orders
    assert "taken longer than 0.5 s" in said(log)


@pytest.mark.parametrize("code", [EXIT_APP_NOT_FOUND, EXIT_CONFIG])
async def test_an_app_that_is_to_blame_gives_its_exit_code(
    code: int, play: Callable[..., None], orders: Orders, log: logging.Logger
) -> None:
    play(f"os._exit({code})")
    async with preloads(log) as found:
        failure = await found.prepare(orders)
        assert isinstance(failure, GiveUp)
        assert failure.exit_code == code


async def test_a_configuration_that_cannot_be_handed_over_is_told(
    orders: Orders, log: logging.Logger
) -> None:
    class Local(Exception):
        """Nobody else can import it."""

    orders.config.contain_errors = [Local]
    async with preloads(log) as found:
        failure = await found.prepare(orders)
        assert isinstance(failure, GiveUp)
        assert failure.exit_code == EXIT_CONFIG
        assert "contain_errors" in failure.reason


async def test_no_process_is_no_reason_to_stop(
    orders: Orders, log: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(11, "no more processes")

    monkeypatch.setattr(preload, "spawn_worker", fail)
    async with preloads(log) as found:
        assert await found.prepare(orders) is orders
    assert "no more processes" in said(log)


async def test_a_machine_that_is_full_leaves_the_preloader_alone(
    play: Callable[..., None], orders: Orders, log: logging.Logger
) -> None:
    failed = """say(b'{"is":"failed","error":"no more processes"}')\n"""
    forked = """say(b'{"is":"forked","pid":4711}')\n"""
    play(f"{LOADED}sock.recv(99)\n{failed}sock.recv(99)\n{forked}sock.recv(99)")
    async with preloads(log) as found:
        prepared = await found.prepare(orders)
        assert isinstance(prepared, Orders)
        assert prepared.fork is not None
        with pytest.raises(ForkRefused, match="no more processes"):
            prepared.fork([0])
        assert prepared.fork([0]) == 4711
        assert "could not fork: no more processes" in said(log)
        assert "has ended" not in said(log)


@pytest.mark.parametrize(
    "script",
    ["time.sleep(600)", "say(b'nonsense')\ntime.sleep(600)", "sock.close()\ntime.sleep(600)", "os._exit(1)"],
)
async def test_a_preloader_that_does_not_fork_is_ended_and_followed_by_another(
    script: str,
    play: Callable[..., None],
    orders: Orders,
    log: logging.Logger,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preload, "_FORK_PATIENCE", 0.2)
    play(
        f"{LOADED}sock.recv(99)\n{script}",
        f'{LOADED}sock.recv(99)\nsay(b\'{{"is":"forked","pid":1}}\')\nsock.recv(9)',
    )
    async with preloads(log) as found:
        prepared = await found.prepare(orders)
        assert isinstance(prepared, Orders)
        assert prepared.fork is not None
        (first,) = found.pids()
        with pytest.raises(ForkRefused):
            prepared.fork([0])
        with pytest.raises(ForkRefused, match="there is no preloader"):
            prepared.fork([0])
        await until(lambda: said(log).count("has imported the app") == 2)
        assert first not in found.pids()
        monkeypatch.setattr(preload, "_FORK_PATIENCE", 30.0)  # this one does answer, when it gets its turn
        assert prepared.fork([0]) == 1


async def test_one_that_cannot_load_the_app_any_more_has_no_successor(
    play: Callable[..., None], orders: Orders, log: logging.Logger
) -> None:
    play(f"{LOADED}sock.recv(99)", f"os._exit({EXIT_APP_NOT_FOUND})")
    async with preloads(log) as found:
        prepared = await found.prepare(orders)
        assert isinstance(prepared, Orders)
        assert prepared.fork is not None
        (first,) = found.pids()
        os.kill(first, signal.SIGKILL)
        await until(lambda: "has ended (signal 9)" in said(log))
        # Nothing happens until a worker is wanted.
        assert said(log).count("has imported the app") == 1
        with pytest.raises(ForkRefused):
            prepared.fork([0])
        await until(lambda: "no preloading: " in said(log))
        assert "could not be imported" in said(log)
        with pytest.raises(ForkRefused):
            prepared.fork([0])
        await until(lambda: not found.pids())


async def test_only_the_generation_that_serves_keeps_its_preloader(
    play: Callable[..., None], orders: Orders, log: logging.Logger
) -> None:
    # One that does not end by itself is ended.
    play(f"{LOADED}sock.recv(99)", f"{LOADED}sock.recv(99)\ntime.sleep(600)")
    async with preloads(log) as found:
        first = await found.prepare(orders)
        assert isinstance(first, Orders)
        (kept,) = found.pids()
        second = Orders(first.application, first.config, 2, [], first.board)
        assert isinstance(await found.prepare(second), Orders)
        assert len(found.pids()) == 2
        found.keep(first)
        await until(lambda: found.pids() == {kept})
        assert "generation=1" in repr(found)
