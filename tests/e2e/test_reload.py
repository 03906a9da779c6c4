"""--reload with real processes: a save is served, a broken one is not, and nobody who asks meanwhile notices."""

from __future__ import annotations

import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.e2e.load import Load
from tests.e2e.process import (
    PATIENCE,
    ServerProcess,
    run_to_end,
    serve_command,
    start_process,
    trioserve_command,
)
from trioserve.testing import connect

pytest.importorskip("watchfiles")

pytestmark = pytest.mark.slow

# What every version of the app under test has.
SOURCE = """\
import os
import trio

VERSION = {version!r}


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({{"type": "lifespan.startup.complete"}})
        await receive()
        await send({{"type": "lifespan.shutdown.complete"}})
        return
    if scope["path"] == "/raise":
        raise LookupError("<b>version</b> " + VERSION)
    if scope["path"] == "/stream":
        await send({{"type": "http.response.start", "status": 200, "headers": []}})
        while True:
            await send({{"type": "http.response.body", "body": b"tick", "more_body": True}})
            await trio.sleep(0.05)
    body = str(os.getpid()) if scope["path"] == "/pid" else VERSION
    await send({{"type": "http.response.start", "status": 200, "headers": []}})
    await send({{"type": "http.response.body", "body": body.encode()}})
"""


class Project:
    """A directory with an app in it, and somebody who saves."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = f"{directory}/myapp.py:app"

    def save(self, version: str) -> None:
        self.save_text(SOURCE.format(version=version))

    def save_text(self, text: str) -> None:
        """As editors do: never a half-written file."""
        new = self.directory / "myapp.py.new"
        new.write_text(text)
        new.rename(self.directory / "myapp.py")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    found = Project(tmp_path)
    found.save("one")
    return found


@asynccontextmanager
async def developing(project: Project, *flags: str, **options: Any) -> AsyncIterator[ServerProcess]:
    options.setdefault("workers", 1)
    async with serve_command(project.path, "--reload", "--control", "off", *flags, **options) as server:
        yield server


async def served(server: ServerProcess, version: str) -> None:
    """Return once this version answers."""
    answer = b""
    with trio.move_on_after(PATIENCE):
        while answer != version.encode():
            answer = (await server.get("/")).body
            await trio.sleep(0.02)
        return
    raise AssertionError(f"{answer!r} is served, not {version!r}:\n{server.stderr.text}")


# -- a change ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("workers", [1, 2])
async def test_a_save_is_served_and_no_request_is_lost(project: Project, workers: int) -> None:
    async with developing(project, workers=workers) as server:
        assert f"watching for changes: {project.directory}" in server.stderr.text
        await served(server, "one")
        load = Load(server.address, 8)
        async with load.running():
            # In quick succession, too: of the same size, and within one second of a .pyc's clock.
            for version in ("two", "six", "ten"):
                await load.wait_for(50)
                project.save(version)
                await served(server, version)
                await server.stderr.wait_for("reloaded: generation")
            await load.wait_for(50)
        assert not load.failures, str(load)
        assert re.search(r"reloading: changed: \S*myapp\.py", server.stderr.text)
        assert not list(project.directory.glob("__pycache__/*"))


async def test_a_module_that_the_app_imports_counts(project: Project) -> None:
    package = project.directory / "package"
    package.mkdir()
    (package / "__init__.py").write_text("VERSION = 'one'\n")
    project.save_text(SOURCE.replace("VERSION = {version!r}", "from package import VERSION").format())
    async with developing(project) as server:
        (package / "__init__.py").write_text("VERSION = 'two'\n")
        await served(server, "two")


async def test_the_configuration_file_counts(
    project: Project, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = tmp_path_factory.mktemp("etc") / "server.toml"
    config.write_text("include_server_header = false\n")
    async with developing(project, "-c", str(config)) as server:
        assert b"server" not in dict((await server.get()).headers)
        config.write_text("include_server_header = nonsense\n")
        await server.stderr.wait_for("reload failed, serving on as before")
        config.write_text("include_server_header = true\n")
        await server.stderr.wait_for("reloaded: generation")
        assert dict((await server.get()).headers)[b"server"] == b"trioserve"


async def test_a_stream_without_an_end_holds_up_only_one_change(project: Project) -> None:
    async with developing(project, "--graceful-timeout", "100") as server:
        async with server.connect() as client:
            await client.send(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await client.receive()
            project.save("two")
            await served(server, "two")
            await server.stderr.wait_for("draining: reload; 1 request")
            assert await client.receive()
            project.save("three")
            await served(server, "three")
            with pytest.raises(ConnectionResetError):  # cut where it was: it must not look whole
                while await client.receive():
                    pass


async def test_a_startup_that_hangs_does_not_hold_up_the_next_change(project: Project) -> None:
    async with developing(project) as server:
        project.save_text("print('hanging', flush=True)\nwhile True:\n    pass\n")
        await server.stdout.wait_for("hanging")
        project.save("two")
        await served(server, "two")
        assert "[INFO] this reload is given up: overtaken by another change" in server.stderr.text
        assert "[ERROR]" not in server.stderr.text


# -- a broken app --------------------------------------------------------------------------------------------


async def test_a_syntax_error_waits_for_the_next_save(project: Project) -> None:
    async with developing(project) as server:
        load = Load(server.address, 4)
        async with load.running():
            await load.wait_for(20)
            project.save_text(SOURCE.format(version="two") + "\ndef broken(:\n")
            await server.stderr.wait_for(r"SyntaxError")
            await server.stderr.wait_for("reload failed, serving on as before")
            await load.wait_for(20)
            await served(server, "one")
            generations = server.stderr.text.count("started, generation")
            await load.wait_for(200)
            assert (
                server.stderr.text.count("started, generation") == generations == 2
            )  # it is not tried again
            project.save("three")
            await served(server, "three")
        assert not load.failures, str(load)


@pytest.mark.parametrize(
    "broken, workers",
    [
        ("def broken(:\n", 1),
        ("def broken(:\n", 2),
        ("import no_such_module_anywhere\n", 1),
        ("app = 7\n", 1),
        ("import os\nos._exit(1)\n", 1),
    ],
)
async def test_an_app_that_is_broken_from_the_start_is_waited_for(
    project: Project, broken: str, workers: int
) -> None:
    project.save_text(broken)
    command = trioserve_command(
        "--bind", "127.0.0.1:0", "--reload", "--control", "off", "--workers", str(workers), project.path
    )
    async with start_process(*command) as server:
        await server.stderr.wait_for("waiting for a file to change")
        project.save_text("also = broken(\n")
        await server.stderr.wait_for("reload failed, waiting for the next change")
        project.save("two")
        await server.wait_running()
        await served(server, "two")
        if broken.startswith("def"):
            # Once at the start, and once for each save; of the first attempt all workers are there.
            assert server.stderr.text.count("started, generation") == 3 * workers


async def test_one_that_waits_can_be_told_to_go(project: Project) -> None:
    project.save_text("def broken(:\n")
    command = trioserve_command("--bind", "127.0.0.1:0", "--reload", "--control", "off", project.path)
    async with start_process(*command) as server:
        await server.stderr.wait_for("waiting for a file to change")
        server.send_signal(signal.SIGINT)
        assert await server.wait() == 0


async def test_one_that_waits_can_be_told_to_try_again(project: Project) -> None:
    """What is missing may be no file of its own: a database, a package."""
    marker = project.directory / "database"
    project.save_text(f"import os\nassert os.path.exists({str(marker)!r})\n" + SOURCE.format(version="one"))
    command = trioserve_command("--bind", "127.0.0.1:0", "--reload", "--control", "off", project.path)
    async with start_process(*command) as server:
        await server.stderr.wait_for("waiting for a file to change")
        marker.write_text("")
        server.send_signal(signal.SIGHUP)
        await server.wait_running()
        await served(server, "one")


async def test_what_a_save_binds_stays_bound_where_only_some_of_its_workers_start(project: Project) -> None:
    """One of them serves, so there is no way back: it has what the others lack."""
    config, added, marks = project.directory / "server.toml", project.directory / "a.sock", project.directory
    config.write_text("bind = ['127.0.0.1:0', '127.0.0.2:0']\n")
    async with developing(project, "-c", str(config), workers=2, bind=None) as server:
        project.save_text(
            SOURCE.format(version="two")
            + f"try:\n    open({str(marks / 'mark')!r}, 'x').close()\n"
            + "except FileExistsError:\n    raise RuntimeError('only once') from None\n"
        )
        config.write_text(f"bind = ['127.0.0.1:0', 'unix:{added}']\n")
        # Failed, unless the machine is so slow that by the fifth that does not start others have served for long.
        await server.stderr.wait_for("reload failed, serving on as before|reloaded: generation 2")
        async with connect(f"unix:{added}") as client:
            assert (await client.get("/")).body == b"two"
        project.save("three")
        await server.stderr.wait_for("reloaded: generation")
        async with connect(f"unix:{added}") as client:
            assert (await client.get("/")).body == b"three"


# -- errors --------------------------------------------------------------------------------------------------


async def test_an_error_is_shown_and_costs_no_worker(project: Project) -> None:
    async with developing(project) as server:
        before = (await server.get("/pid")).body
        page = await server.get("/raise", [("accept", "text/html")])
        assert page.status == 500
        assert dict(page.headers)[b"content-type"] == b"text/html; charset=utf-8"
        assert b"&lt;b&gt;version&lt;/b&gt; one" in page.body
        assert b"<b>version" not in page.body
        assert f"{project.directory}/myapp.py".encode() in page.body
        plain = await server.get("/raise")
        assert b"LookupError: <b>version</b> one\n" in plain.body
        assert (await server.get("/pid")).body == before
        assert "on_app_error is contain, taken from use_reloader (flag --reload)" in server.stderr.text


async def test_without_reload_nothing_is_shown(project: Project) -> None:
    async with serve_command(project.path, "--control", "off", workers=1) as server:
        page = await server.get("/raise", [("accept", "text/html")])
        assert page.body == b"500 Internal Server Error\n"


# -- the command ---------------------------------------------------------------------------------------------


async def test_reload_needs_a_supervisor_and_says_so(project: Project) -> None:
    process = await run_to_end(*trioserve_command("--reload", "--workers", "0", project.path))
    assert process.returncode == 78
    assert "serve with --workers 1" in process.stderr.text


async def test_reload_without_its_package_says_how_to_get_it(project: Project) -> None:
    hidden = "import sys; sys.modules['watchfiles'] = None; from trioserve.cli import main; sys.exit(main())"
    command = trioserve_command("--reload", project.path)
    process = await run_to_end(command[0], "-c", hidden, *command[-2:])
    assert process.returncode == 78
    assert "pip install 'trioserve[reload]'" in process.stderr.text
