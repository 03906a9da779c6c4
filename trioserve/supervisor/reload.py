"""`--reload`: new workers whenever a file of the app changes, for whoever is writing it.

`supervisor.py` makes one `Reloader` and runs it beside the pool, before the first worker starts, so that no change is
missed. A change is a reload like any other (SIGHUP): what cannot be imported leaves the old workers serving, and the
next save is the next attempt. Where there is no old worker, the pool waits for that save, too.

watchfiles asks the kernel, in a thread that looks for its news at each `_STEP`. Cancelling ends the threads within one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from trioserve.structure.error_tree import find_leaf
from trioserve.supervisor.generations import SUPERSEDED

if TYPE_CHECKING:
    from trioserve.supervisor.supervisor import Supervisor

# Milliseconds. Changes are news once nothing has followed them for a step, so that an editor which writes, renames and
# removes is done, and after the limit in any case. 50: nobody feels it, and 20 looks a second cost next to nothing.
_STEP = 50
_LONGEST_GATHERING = 1000

# How many changed files one line of the log names.
_MOST_NAMES = 5


class Reloader:
    """Reloads its supervisor for as long as `use_reloader` is on.

    Attributes:
        watch: the files it watches.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        """Raises `AppNotFound` for a path that no change of a file can mend."""
        from trioserve.asgi.load import code_directories  # pulls in what only workers need

        config = supervisor.config
        files = [] if config.file_path is None else [Path(config.file_path)]
        self.watch = FileWatch(code_directories(supervisor.application), files)
        self._supervisor = supervisor

    def __repr__(self) -> str:
        return f"<Reloader {self.watch}>"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Reload at each change; started once no change can be missed any more."""
        log = self._supervisor.log
        pool = self._supervisor.pool
        watching = False
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.watch.run)
                watching = pool.patient = True
                log.info("watching for changes: %s", self.watch)
                task_status.started()
                while self._supervisor.config.use_reloader:
                    await self.watch.wait_changed()
                    await self._reload()
                log.info("no longer watching for changes: use_reloader is off now")
                nursery.cancel_scope.cancel(reason="use_reloader is off")
        except* CannotWatch as failures:
            log.error("%s; reload with SIGHUP (trioserve ctl reload)", find_leaf(failures))
            if not watching:
                task_status.started()
        pool.patient = False

    async def _reload(self) -> None:
        changed = self.watch.take()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._supersede, name="further changes")
            await self._supervisor.reload(f"changed: {_listed(changed)}")
            nursery.cancel_scope.cancel(reason="reloaded")

    async def _supersede(self) -> None:
        """A change during a reload is the next one: have it wait for neither a startup nor a drain of the last."""
        await self.watch.wait_changed()
        pool = self._supervisor.pool
        while True:
            pool.supersede_rollout(SUPERSEDED)
            await pool.wait_change()


def _listed(paths: Sequence[str]) -> str:
    here = f"{Path.cwd()}{os.sep}"
    names = [path.removeprefix(here) for path in paths[:_MOST_NAMES]]
    more = len(paths) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


class CannotWatch(Exception):
    """The kernel, or a directory that is not there, does not let us watch."""


class FileWatch:
    """Changed files, gathered until somebody takes them.

    Args:
        directories: of Python code, watched with all that is in them but what `watchfiles.PythonFilter` leaves out.
        files: watched whatever they are called. Not they but their directories are: editors replace files.
    """

    def __init__(self, directories: Iterable[Path], files: Iterable[Path] = ()) -> None:
        self._directories = _outermost(path.resolve() for path in directories)
        self._files = [path.resolve() for path in files]
        self._changed: set[str] = set()
        self._news = trio.Event()

    def __str__(self) -> str:
        return ", ".join([*(f"{path}/**/*.py" for path in self._directories), *map(str, self._files)])

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch until cancelled.

        Raises:
            CannotWatch: in a group.
        """
        beside = [path.parent for path in self._files if not _is_in(path, self._directories)]
        async with trio.open_nursery() as nursery:
            await nursery.start(self._follow, self._directories, True)
            if beside:
                await nursery.start(self._follow, beside, False)
            task_status.started()

    async def wait_changed(self) -> None:
        """Return once there is something to take."""
        await self._news.wait()

    def take(self) -> list[str]:
        """What has changed since the last time, in order."""
        changed = sorted(self._changed)
        self._changed.clear()
        self._news = trio.Event()
        return changed

    async def _follow(
        self, paths: Sequence[Path], recursive: bool, *, task_status: trio.TaskStatus[None]
    ) -> None:
        import watchfiles

        for path in paths:
            if not path.is_dir():  # watchfiles would count that among what it is told to ignore
                raise CannotWatch(f"cannot watch {path}: there is no such directory")
        watching = trio.Event()
        stop = _Stop(watching.set)
        changes = watchfiles.watch(
            *paths,
            watch_filter=self._make_filter(watchfiles.PythonFilter()),
            debounce=_LONGEST_GATHERING,
            step=_STEP,
            stop_event=stop,
            rust_timeout=0,
            recursive=recursive,
            ignore_permission_denied=True,
        )
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stop.set_when_cancelled)
                nursery.start_soon(self._gather, changes)
                await watching.wait()
                task_status.started()
        except* (OSError, RuntimeError) as failures:
            reason = failures.exceptions[0]
            raise CannotWatch(f"cannot watch {', '.join(map(str, paths))}: {reason}") from reason
        finally:
            changes.close()

    async def _gather(self, changes: Iterator[set[tuple[Any, str]]]) -> None:
        while (found := await trio.to_thread.run_sync(next, changes, None)) is not None:
            self._changed.update(path for _, path in found)
            self._news.set()

    def _make_filter(self, is_code: Callable[[Any, str], bool]) -> Callable[[Any, str], bool]:
        def has_code(path: str) -> bool:
            # A directory is new before it is watched: what was put into it meanwhile is not told.
            return any(name.endswith(".py") for _, _, names in os.walk(path) for name in names)

        files = set(map(str, self._files))
        directories = [f"{path}{os.sep}" for path in self._directories]

        def is_wanted(change: Any, path: str) -> bool:
            if path in files:
                return True
            for home in directories:
                if path.startswith(home):
                    # From the directory on: where the project itself lies is no reason to leave it out.
                    inside = path[len(home) :]
                    return is_code(change, inside) or (
                        is_code(change, f"{inside}{os.sep}_.py") and has_code(path)
                    )
            return False

        return is_wanted


class _Stop:
    """What a watching thread asks at each step whether it is to end: that it asks means that it watches."""

    def __init__(self, on_first: Callable[[], Any]) -> None:
        self._on_first = on_first
        self._asked = self._cancelled = False
        self._token = trio.lowlevel.current_trio_token()

    def is_set(self) -> bool:
        """Called in the thread."""
        if not self._asked:
            self._asked = True
            self._token.run_sync_soon(self._on_first)
        return self._cancelled

    async def set_when_cancelled(self) -> None:
        """Trio waits for a thread that it has started, and only this ends it."""
        try:
            await trio.sleep_forever()
        finally:
            self._cancelled = True


def _outermost(paths: Iterable[Path]) -> list[Path]:
    found: list[Path] = []
    for path in sorted(set(paths), key=lambda path: len(path.parts)):
        if not _is_in(path, found):
            found.append(path)
    return found


def _is_in(path: Path, directories: Iterable[Path]) -> bool:
    return any(path.is_relative_to(directory) for directory in directories)
