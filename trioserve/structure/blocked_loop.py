"""What is said of an event loop that is blocked: which request does it, in which line, and for how long.

`worker.py` hands a `BlockedLoop` to the watchdog (`observe/blocking.py`), which calls it in its thread: what is read
here of the worker moves on if the loop does, and the picture may then be askew. A blocked loop is not judged by the
boundary, since nothing was raised and the loop can do nothing about it; what it costs is in the boundary's table as
row H1. Nothing here awaits. What writes may meet a lock that the blocked loop holds, so it is given a bounded time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from trioserve.errors import LoopBlocked
from trioserve.observe.blocking import LAST_WORDS, LINE_PATIENCE, Block, call_within
from trioserve.observe.task_tree import find_running_task
from trioserve.structure.context import Served, WorkerContext
from trioserve.structure.error_tree import innermost_app_frame, stack_as_traceback

# Places whose stack has been logged; from then on a line will do. The bound is for code that is made as it runs.
MOST_PLACES = 200
# Requests that a report lists.
MOST_REQUESTS = 100

# The command's: a report, the last lines of the logs. The process ends when it returns.
LastWords = Callable[[LoopBlocked, Served | None], None]


@dataclass(frozen=True, slots=True)
class Explained:
    """A block in our terms: as an exception with the stack of who blocks, his connection, and where that is."""

    error: LoopBlocked
    connection: Served | None
    where: str
    seconds: float


class BlockedLoop:
    """The watchdog's `Reporter` of one worker.

    Args:
        worker: whose loop it is; made in that loop.
        last_words: None in library use, where the process is somebody else's to end.
    """

    def __init__(self, worker: WorkerContext, last_words: LastWords | None) -> None:
        self._worker = worker
        self._root = trio.lowlevel.current_root_task()
        self._last_words = last_words
        self._where = ""
        self._places: set[tuple[str, int, str] | None] = set()

    def explain(self, block: Block) -> Explained:
        """Take down who blocks, and where."""
        task = None if self._root is None else find_running_task(self._root)
        connection = None if task is None else _find_connection(self._worker, task)
        where = _describe_where(connection, task)
        error = LoopBlocked(f"for {block.seconds:.1f} s{where}")
        # What lies outside the task is trio's own way to it.
        outermost = None if task is None else getattr(task.coro, "cr_frame", None)
        error.__traceback__ = stack_as_traceback(block.frame, outermost)
        return Explained(error, connection, where, block.seconds)

    def note_blocked(self, explained: Explained) -> None:
        """Log the first news of a block; with the stack, if it is the first in this place."""
        self._where = explained.where
        place = innermost_app_frame(explained.error.__traceback__)
        known = place in self._places
        if len(self._places) < MOST_PLACES:
            self._places.add(place)
        self._warn(
            "the event loop has been blocked for %.1f s%s, at %s%s; nobody is served until it goes on: let blocking "
            "work run in trio.to_thread.run_sync",
            explained.seconds,
            explained.where,
            f"{place[0]}:{place[1]} in {place[2]}" if place else "a place unknown",
            " (its stack was logged before)" if known else "",
            error=None if known else explained.error,
        )

    def note_resumed(self, seconds: float) -> None:
        """Log the end of a block."""
        self._warn("the event loop goes on; it had been blocked for %.1f s in all%s", seconds, self._where)

    def _warn(self, message: str, *arguments: object, error: LoopBlocked | None = None) -> None:
        log = functools.partial(self._worker.error_log.warning, exc_info=error)
        call_within(LINE_PATIENCE, log, message, *arguments)

    def say_last_words(self, explained: Explained) -> None:
        """Have the command report the block as the end of the process."""
        if self._last_words is not None:
            call_within(LAST_WORDS, self._last_words, explained.error, explained.connection)


def requests_in_flight(worker: WorkerContext) -> list[dict[str, Any]]:
    """Who is lost when the process ends at once; for reports, so without queries and values. From any thread."""
    found: list[dict[str, Any]] = []
    for connection in list(worker.connections):
        for served, exchange in connection.in_flight():
            if len(found) == MOST_REQUESTS:
                return found
            facts = exchange.describe()
            found.append(
                {
                    "method": facts["method"],
                    "path": facts["path"],
                    "seconds": facts["elapsed"],
                    "response_state": facts["response"],
                    "phase": served.phase,
                    "connection_id": served.id,
                }
            )
    return found


def _find_connection(worker: WorkerContext, task: trio.lowlevel.Task) -> Served | None:
    """The connection or stream in whose task, or in a task below it, this one runs."""
    # A connection has no task before its first turn.
    owners: dict[trio.lowlevel.Task | None, Served | None] = {}
    for lane in list(worker.lanes):
        owners[lane.task] = lane.connection
    for connection in list(worker.connections):
        owners[getattr(connection, "task", None)] = connection
        for stream in list(connection.streams.values()):
            owners[getattr(stream, "task", None)] = stream
    current: trio.lowlevel.Task | None = task
    while current is not None:
        if current in owners:
            return owners[current]
        current = None if current.parent_nursery is None else current.parent_nursery.parent_task
    return None


def _describe_where(connection: Served | None, task: trio.lowlevel.Task | None) -> str:
    if connection is None:
        return "" if task is None else f" in task {task.name!r}"
    exchange = connection.exchange
    if exchange is None:
        return f" on connection {connection.id}"
    facts = exchange.describe()
    return f" in {facts['method']} {facts['path']} on connection {connection.id}"
