"""What --reload watches, what is news to it, and what it does then."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from trioserve.asgi.load import code_directories
from trioserve.config import Config
from trioserve.errors import AppNotFound
from trioserve.supervisor.reload import CannotWatch, FileWatch, Reloader

pytest.importorskip("watchfiles")

# A step of the watching thread is 50 ms; a busy machine takes longer.
PATIENCE = 30.0


@asynccontextmanager
async def watching(*directories: Path, files: tuple[Path, ...] = ()) -> AsyncIterator[FileWatch]:
    watch = FileWatch(directories, files)
    async with trio.open_nursery() as nursery:
        with trio.fail_after(PATIENCE):
            await nursery.start(watch.run)
        yield watch
        # The thread ends by being told, not by a time-out of its own: it has none.
        with trio.fail_after(PATIENCE):
            nursery.cancel_scope.cancel()


async def news(watch: FileWatch) -> set[str]:
    with trio.fail_after(PATIENCE):
        await watch.wait_changed()
    return set(watch.take())


async def changes_until(watch: FileWatch, last: Path) -> set[str]:
    """All that is told up to the change of `last`, which is made here."""
    last.write_text("last = 1\n")
    found: set[str] = set()
    while str(last) not in found:
        found |= await news(watch)
    return found - {str(last)}


# -- which files ---------------------------------------------------------------------------------------------


async def test_python_files_of_the_tree_are_news_and_others_are_not(tmp_path: Path) -> None:
    package = tmp_path / "package"
    for directory in (package, package / "__pycache__", tmp_path / ".git", tmp_path / ".venv"):
        directory.mkdir()
    async with watching(tmp_path) as watch:
        for name in (
            "data.json",
            "package/x.pyc",
            "package/__pycache__/y.py",
            ".git/z.py",
            ".venv/a.py",
            "b.py~",
        ):
            (tmp_path / name).write_text("x")
        (package / "module.py").write_text("x = 1\n")
        assert await changes_until(watch, tmp_path / "last.py") == {str(package / "module.py")}


async def test_each_kind_of_change_is_news(tmp_path: Path) -> None:
    file, other = tmp_path / "a.py", tmp_path / "b.py"
    async with watching(tmp_path) as watch:
        file.write_text("x = 1\n")
        assert await news(watch) == {str(file)}
        file.write_text("x = 2\n")
        assert await news(watch) == {str(file)}
        # How editors save: write beside it, then replace it.
        (tmp_path / "a.tmp").write_text("x = 3\n")
        (tmp_path / "a.tmp").rename(file)
        assert await news(watch) == {str(file)}
        file.rename(other)
        assert await news(watch) == {str(file), str(other)}
        other.unlink()
        assert await news(watch) == {str(other)}


async def test_code_in_a_new_directory_is_news(tmp_path: Path) -> None:
    """Also where it was written before the directory could be watched; told as the one or the other, or both."""
    async with watching(tmp_path) as watch:
        for name in ("empty", "data", ".git"):
            (tmp_path / name).mkdir()
        (tmp_path / "data" / "x.json").write_text("{}")
        (tmp_path / ".git" / "hook.py").write_text("x = 1\n")
        package = tmp_path / "new" / "deeper"
        package.mkdir(parents=True)
        (package / "module.py").write_text("x = 1\n")
        found = await changes_until(watch, tmp_path / "last.py")
        assert found
        assert found <= {str(path) for path in (package.parent, package, package / "module.py")}


async def test_where_the_project_lies_is_no_reason_to_leave_it_out(tmp_path: Path) -> None:
    project = tmp_path / "node_modules" / "project"
    project.mkdir(parents=True)
    async with watching(project) as watch:
        (project / "a.py").write_text("x = 1\n")
        assert await news(watch) == {str(project / "a.py")}


async def test_the_configuration_file_is_watched_whatever_it_is_called(tmp_path: Path) -> None:
    code, etc = tmp_path / "code", tmp_path / "etc"
    (etc / "deeper").mkdir(parents=True)
    code.mkdir()
    inside, outside = code / "server.toml", etc / "server.conf"
    for file in (inside, outside):
        file.write_text("")
    async with watching(code, files=(inside, outside)) as watch:
        for name in ("other.conf", "other.py", "deeper/module.py"):
            (etc / name).write_text("x")
        outside.write_text("backlog = 1\n")
        assert await news(watch) == {str(outside)}
        # Replaced: another inode under the same name.
        (etc / "new").write_text("backlog = 2\n")
        (etc / "new").rename(outside)
        assert await news(watch) == {str(outside)}
        inside.write_text("backlog = 3\n")
        assert await news(watch) == {str(inside)}


async def test_a_directory_inside_another_is_watched_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    watch = FileWatch([tmp_path / "a" / "b", tmp_path / "a", tmp_path / "a"])
    assert str(watch) == f"{tmp_path / 'a'}/**/*.py"


async def test_a_directory_that_is_not_there_cannot_be_watched(tmp_path: Path) -> None:
    with pytest.RaisesGroup(
        pytest.RaisesExc(CannotWatch, match=f"cannot watch {tmp_path}/none: "), flatten_subgroups=True
    ):
        async with watching(tmp_path / "none"):
            raise AssertionError("it said that it watches")


# -- when ----------------------------------------------------------------------------------------------------


async def test_what_is_saved_in_a_row_comes_together(tmp_path: Path) -> None:
    names = [tmp_path / f"{number}.py" for number in range(50)]
    async with watching(tmp_path) as watch:
        for name in names:
            name.write_text("x = 1\n")
        assert await changes_until(watch, tmp_path / "last.py") == set(map(str, names))


async def test_what_changes_while_nobody_looks_is_kept(tmp_path: Path) -> None:
    async with watching(tmp_path) as watch:
        (tmp_path / "a.py").write_text("x = 1\n")
        with trio.fail_after(PATIENCE):
            await watch.wait_changed()
        (tmp_path / "b.py").write_text("x = 1\n")
        with trio.fail_after(PATIENCE):
            while len(watch._changed) < 2:
                await trio.sleep(0.01)
        assert watch.take() == [str(tmp_path / "a.py"), str(tmp_path / "b.py")]
        assert watch.take() == []
        with trio.move_on_after(0) as scope:
            await watch.wait_changed()
        assert scope.cancelled_caught


# -- which directories ---------------------------------------------------------------------------------------


@contextmanager
def working_in(directory: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.mark.parametrize("path", ["app", "app:make()", "package.module:app", "asgi:app:app", "nowhere:app"])
def test_modules_are_expected_in_the_working_directory(path: str, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "app.py").write_text("raise AssertionError('imported')")
    with working_in(tmp_path):
        assert code_directories(path) == [tmp_path]


def test_a_file_is_expected_where_it_is(tmp_path: Path) -> None:
    assert code_directories(f"{tmp_path}/sub/app.py:app") == [tmp_path / "sub"]


def test_a_package_installed_from_elsewhere_is_watched_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "src" / "installed_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "src")])
    (tmp_path / "work").mkdir()
    with working_in(tmp_path / "work"):
        assert code_directories("installed_package.main:app") == [tmp_path / "work", package]
    with working_in(tmp_path):
        assert code_directories("installed_package.main:app") == [tmp_path]


# -- what follows --------------------------------------------------------------------------------------------


class FakePool:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.patient = False
        self.superseded: list[str] = []
        self._change = trio.Event()

    def supersede_rollout(self, reason: str) -> None:
        self.superseded.append(reason)

    async def wait_change(self) -> None:
        await self._change.wait()

    def change(self) -> None:
        self._change.set()
        self._change = trio.Event()


class FakeSupervisor:
    """As far as a `Reloader` knows one; its reloads last until the test says otherwise."""

    def __init__(self, application: str, config: Config) -> None:
        self.application = application
        self.config = config
        self.log = logging.getLogger("trioserve.tests.reload")
        self.pool = FakePool()
        self.reasons: list[str] = []
        self._send, self.started = trio.open_memory_channel[str](100)
        self.finish = trio.Event()

    async def reload(self, reason: str) -> str:
        self.reasons.append(reason)
        self._send.send_nowait(reason)
        await self.finish.wait()
        return ""


@asynccontextmanager
async def reloading(directory: Path, **settings: Any) -> AsyncIterator[FakeSupervisor]:
    config = Config.from_mapping({"use_reloader": True, **settings})
    supervisor: Any = FakeSupervisor(f"{directory}/app.py:app", config)
    async with trio.open_nursery() as nursery:
        with trio.fail_after(PATIENCE):
            await nursery.start(Reloader(supervisor).run)
        yield supervisor
        nursery.cancel_scope.cancel()


async def next_reload(supervisor: FakeSupervisor) -> str:
    with trio.fail_after(PATIENCE):
        return await supervisor.started.receive()


async def test_a_reload_says_what_has_changed(tmp_path: Path) -> None:
    with working_in(tmp_path):
        async with reloading(tmp_path) as supervisor:
            supervisor.finish.set()
            assert supervisor.pool.patient
            (tmp_path / "app.py").write_text("x = 1\n")
            assert await next_reload(supervisor) == "changed: app.py"


def test_a_long_list_of_changes_is_cut() -> None:
    from trioserve.supervisor.reload import _listed

    assert _listed([f"/{n}.py" for n in range(7)]) == "/0.py, /1.py, /2.py, /3.py, /4.py and 2 more"


async def test_a_change_during_a_reload_overtakes_it_and_is_the_next(tmp_path: Path) -> None:
    async with reloading(tmp_path) as supervisor:
        (tmp_path / "a.py").write_text("x = 1\n")
        assert "a.py" in await next_reload(supervisor)
        assert supervisor.pool.superseded == []
        (tmp_path / "b.py").write_text("x = 1\n")
        with trio.fail_after(PATIENCE):
            while not supervisor.pool.superseded:
                await trio.sleep(0.01)
        # Again after each change of the pool: a worker may begin to drain only then.
        supervisor.pool.change()
        await trio.testing.wait_all_tasks_blocked()
        assert len(supervisor.pool.superseded) == 2
        supervisor.finish.set()
        reason = await next_reload(supervisor)
        assert "b.py" in reason
        assert "a.py" not in reason


async def test_it_ends_when_the_reloaded_configuration_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with reloading(tmp_path) as supervisor:
        supervisor.config = Config()
        supervisor.finish.set()
        (tmp_path / "app.py").write_text("x = 1\n")
        await next_reload(supervisor)
        with trio.fail_after(PATIENCE):
            while supervisor.pool.patient:
                await trio.sleep(0.01)
    assert "no longer watching" in caplog.text


async def test_what_cannot_be_watched_is_said_and_served_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with reloading(tmp_path / "none") as supervisor:
        assert not supervisor.pool.patient
    assert "cannot watch" in caplog.text
    assert "reload with SIGHUP" in caplog.text


def test_a_path_that_no_change_can_mend_is_an_error_at_once() -> None:
    supervisor: Any = FakeSupervisor("a:b:c:d", Config.from_mapping(use_reloader=True))
    with pytest.raises(AppNotFound):
        Reloader(supervisor)
