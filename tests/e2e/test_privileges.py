"""Root binds, and somebody else imports and serves the app."""

from __future__ import annotations

import os
import pwd
import site
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .process import (
    ServerProcess,
    clean_environment,
    run_to_end,
    start_process,
    trioserve_command,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else"),
]

NOBODY = pwd.getpwnam("nobody")

# What is imported later is imported as nobody, who may not be able to read this Python or this repository.
PRELOAD = (
    "import encodings.ascii, encodings.idna, importlib, pkgutil, sys, trioserve, httptools, h11\n"
    "for module in pkgutil.walk_packages(trioserve.__path__, 'trioserve.'):\n"
    "    if 'supervisor' not in module.name and not module.name.endswith('__main__'):\n"
    "        importlib.import_module(module.name)\n"
    "from trioserve.cli import main\n"
)

SOURCE = """
import os
print("imported by", os.getuid(), flush=True)

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"%d" % os.getuid()})
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where everybody can read the app; pytest's own folder is for root only."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        Path(name, "everybodys.py").write_text(SOURCE)
        yield Path(name)


def command(*arguments: str, before: str = "") -> list[str]:
    """trioserve, with all of its modules loaded while it is root."""
    arguments = ("--workers", "0", *arguments)
    return [sys.executable, "-W", "error", "-c", f"{PRELOAD}{before}\nsys.exit(main({list(arguments)!r}))"]


def environment(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([clean_environment()["PYTHONPATH"], str(folder)])}


def identity(server: ServerProcess) -> dict[str, list[int]]:
    """Real, effective, saved and file system's numbers, and the supplementary groups, by the kernel's word."""
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    pairs = [line.split(":", 1) for line in lines]
    return {
        name: [int(number) for number in text.split()]
        for name, text in pairs
        if name in ("Uid", "Gid", "Groups")
    }


async def test_root_binds_and_nobody_imports_and_serves(tmp_path: Path, folder: Path) -> None:
    """The socket's folder is root's alone (pytest's), as a port below 1024 would be."""
    path = tmp_path / "app.sock"
    arguments = command("--bind", f"unix:{path}", "--user", "nobody", "--group", "nogroup", "everybodys:app")
    async with start_process(*arguments, env=environment(folder)) as server:
        await server.wait_running()
        assert (await server.get()).body == b"%d" % NOBODY.pw_uid
        assert identity(server) == {
            "Uid": [NOBODY.pw_uid] * 4,
            "Gid": [NOBODY.pw_gid] * 4,
            "Groups": os.getgrouplist("nobody", NOBODY.pw_gid),
        }
        found = path.stat()
        assert stat.S_ISSOCK(found.st_mode)
        assert (found.st_uid, found.st_gid) == (NOBODY.pw_uid, NOBODY.pw_gid)
    assert server.stdout.text == f"imported by {NOBODY.pw_uid}\n"
    assert f"no longer root: running as user {NOBODY.pw_uid}, group {NOBODY.pw_gid}" in server.stderr.text


async def test_files_are_opened_as_the_new_user_so_that_they_can_be_opened_again(
    tmp_path: Path, folder: Path
) -> None:
    logs = folder / "logs"
    logs.mkdir()
    os.chown(logs, NOBODY.pw_uid, NOBODY.pw_gid)
    files = ["--access-logfile", str(logs / "access"), "--pid", str(logs / "pid")]
    arguments = command("--bind", "127.0.0.1:0", "--user", "nobody", *files, "everybodys:app")
    async with start_process(*arguments, env=environment(folder)) as server:
        await server.wait_running()
        assert {file.stat().st_uid for file in logs.iterdir()} == {NOBODY.pw_uid}
        assert (logs / "pid").read_text() == f"{server.pid}\n"
    assert [file.name for file in logs.iterdir()] == ["access"]


@pytest.mark.parametrize("flag", ["--access-logfile", "--pid", "--crash-dir"])
async def test_a_file_that_only_root_may_write_is_refused_at_once(
    tmp_path: Path, folder: Path, flag: str
) -> None:
    arguments = command(
        "--bind", "127.0.0.1:0", "--user", "nobody", flag, str(tmp_path / "x"), "everybodys:app"
    )
    process = await run_to_end(*arguments, env=environment(folder))
    assert process.returncode == 78, process.stderr.text
    assert f"{tmp_path / 'x'}" in process.stderr.text
    assert "Permission denied" in process.stderr.text


async def test_who_is_not_root_can_become_nobody_else(folder: Path) -> None:
    before = f"import os; os.setuid({NOBODY.pw_uid})"
    arguments = command("--bind", "127.0.0.1:0", "--user", "root", "everybodys:app", before=before)
    process = await run_to_end(*arguments, env=environment(folder))
    assert process.returncode == 78
    assert process.stderr.text.startswith(
        f"trioserve: user = 0: this process runs as user {NOBODY.pw_uid}, and only"
    )
    assert process.stdout.text == "", "the app was not imported"


async def test_workers_that_the_new_user_cannot_run_are_an_error_of_the_start(tmp_path: Path) -> None:
    """pytest's folder is root's alone, as a virtual environment below /root would be."""
    interpreter = tmp_path / "python"
    interpreter.symlink_to(sys.executable)
    flags = trioserve_command("--bind", "127.0.0.1:0", "--user", "nobody", "everybodys:app")[1:]
    # A link beside no pyvenv.cfg is not in the virtual environment, where the packages are.
    env = {"PYTHONPATH": os.pathsep.join([clean_environment()["PYTHONPATH"], *site.getsitepackages()])}
    process = await run_to_end(str(interpreter), *flags, env=env)
    assert process.returncode == 78, process.stderr.text
    assert f"user {NOBODY.pw_uid} cannot execute {interpreter}" in process.stderr.text


async def test_an_app_that_is_not_there_is_still_exit_code_4_and_leaves_no_socket_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "app.sock"
    process = await run_to_end(
        *trioserve_command("--workers", "0", "--bind", f"unix:{path}", "tests.nowhere:app")
    )
    assert process.returncode == 4
    assert not path.exists()


async def test_the_socket_comes_before_the_app(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        process = await run_to_end(
            *trioserve_command("--workers", "0", "--bind", bind, "everybodys:app"), env=environment(folder)
        )
    assert process.returncode == 71
    assert "the address is in use" in process.stderr.text
    assert process.stdout.text == "", "the app was not imported"
