"""Where the control socket is: private from the start, never in another's way, and no fault where it cannot be."""

from __future__ import annotations

import logging
import os
import socket
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.supervisor.control_server import LOG, Client, FakeServer, assert_serves, serving
from trioserve.supervisor import control
from trioserve.supervisor.control import default_path, is_live, serve_control


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture(autouse=True)
def all_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, LOG.name)


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory in the place of /run; this user has no other."""
    directory = tmp_path / "run"
    directory.mkdir()
    monkeypatch.setattr(control, "SYSTEM_DIRECTORY", directory / "trioserve")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "no such directory"))
    return directory


# -- the file ------------------------------------------------------------------------------------------------


async def test_the_file_is_private_whatever_the_umask_and_gone_at_the_end(path):
    before = os.umask(0)
    try:
        async with serving(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert os.umask(0) == 0
        assert not path.exists()
    finally:
        os.umask(before)


async def test_a_successors_file_is_left_alone(path):
    async with serving(path):
        path.unlink()
        async with serving(path):
            pass
        assert not path.exists()
        path.write_text("somebody else's")
    assert path.read_text() == "somebody else's"


async def test_a_stale_file_is_replaced(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        assert not is_live(path)
    async with serving(path):
        assert is_live(path)
        await assert_serves(path)


async def start(path: Path | str) -> Any:
    """What is told of a control socket that ends by itself."""
    async with trio.open_nursery() as nursery:
        with trio.fail_after(30):
            return await nursery.start(serve_control, path, FakeServer(), LOG)


async def test_a_live_socket_is_left_alone_with_a_warning(path, caplog):
    async with serving(path) as server:
        server.wanted = 7
        assert await start(path) is None
        (record,) = [record for record in caplog.records if record.levelno > logging.INFO]
        assert record.levelno == logging.WARNING
        assert f"another server answers on {path}; give each its own --control PATH" in record.getMessage()
        with Client(path) as client:
            assert (await client.ask(command="status"))["result"]["workers"]["wanted"] == 7


def test_a_socket_with_a_full_queue_is_live(path):
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(path))
        listener.listen(0)
        waiting.connect(str(path))
        assert is_live(path)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("no/such/directory/x.sock", "No such file or directory"),
        ("file", "the file exists and is no socket"),
        ("file/x.sock", "Not a directory"),
        ("x" * 200, "has 107 bytes at most"),
    ],
)
async def test_a_path_that_was_asked_for_and_cannot_be_is_an_error_line(tmp_path, name, why, caplog):
    (tmp_path / "file").write_text("precious")
    assert await start(str(tmp_path / name)) is None
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith(f"the control socket is off: cannot bind unix:{tmp_path}")
    assert why in record.getMessage()
    assert record.getMessage().endswith("choose another path with --control PATH")
    assert (tmp_path / "file").read_text() == "precious"


# -- the default ---------------------------------------------------------------------------------------------


async def test_the_default_is_a_private_directory_with_a_socket_for_each_process(runtime):
    path = default_path(os.getpid())
    assert path == runtime / "trioserve" / f"{os.getpid()}.sock"
    async with serving(path):
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        await assert_serves(path)
        assert default_path(os.getpid()) == path
    assert list(path.parent.iterdir()) == []


async def test_no_place_for_the_default_is_no_fault(runtime, caplog):
    path = default_path(os.getpid())
    assert path is not None
    runtime.rmdir()
    assert default_path(os.getpid()) is None
    assert await start(path) is None
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert "No such file or directory" in record.getMessage()


@pytest.mark.parametrize("user", [0, 1000])
def test_root_prefers_the_systems_directory_and_others_their_own(runtime, tmp_path, monkeypatch, user):
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(own))
    places = [runtime / "trioserve", own / "trioserve"]
    assert default_path(5) == places[0 if user == 0 else 1] / "5.sock"
    (own if user else runtime).rmdir()
    assert default_path(5) == places[1 if user == 0 else 0] / "5.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert control.control_directories() == (
        [places[0]] if user == 0 else [Path("/run/user/1000/trioserve"), places[0]]
    )


async def test_what_killed_servers_left_is_swept_away_and_nothing_else(runtime):
    directory = runtime / "trioserve"
    directory.mkdir()
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = [f"{ended.pid}.sock", f"{'9' * 12}.sock", f"{os.getppid()}.sock", "site.sock"]
    for name in names:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(directory / name))
    path = default_path(os.getpid())
    assert path is not None
    async with serving(path):
        assert {entry.name for entry in directory.iterdir()} == {*names[2:], path.name}
