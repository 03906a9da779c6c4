"""The tree of trio tasks as text: who waits where, with equal tasks shown once and counted.

Used by the crash report, by the watchdog and by whoever asks the worker for its state. Only public trio API;
synchronous, so the tree stands still while it is read. From another thread (a watchdog) pass `root`; the
picture may then be askew. No locals, no arguments: names of tasks, files, lines and functions.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import trio

# A worker with 4,000 connections must not be held up for long (about 20 µs a task), nor a report fill with
# them.
MOST_TASKS = 20_000
MOST_LINES = 400
# Frames of one task: the outermost say which part it is, the innermost what it waits for.
OUTER_FRAMES = 2
INNER_FRAMES = 10
# Nurseries within nurseries; deeper than any sane program, and far from the recursion limit.
DEEPEST = 40

# How a task gives way is the same for all of them.
_PLUMBING = trio.lowlevel.wait_task_rescheduled.__code__.co_filename

# (file, line, function), outermost first
Frame = tuple[str, int, str]


@dataclass(frozen=True, slots=True)
class TaskGroup:
    """Tasks of one nursery that have the same name, the same stack and the same children."""

    name: str
    stack: tuple[Frame, ...]
    # One tuple for each nursery that the tasks have open, with the groups in it and how many of each.
    nurseries: tuple[tuple[tuple[TaskGroup, int], ...], ...]


def dump_tasks(root: trio.lowlevel.Task | None = None, *, most_lines: int = MOST_LINES) -> str:
    """The tree below `root` (default: trio's root task), indented, at most `most_lines` lines.

    Outside of trio, and without `root`, it says so instead of raising.
    """
    group = group_tasks(root)
    if group is None:
        return "no trio run in this thread"
    lines = list(itertools.islice(_render(group, 1, ""), most_lines + 1))
    if len(lines) > most_lines:
        lines[most_lines:] = ["... (cut)"]
    return "\n".join(lines)


def group_tasks(root: trio.lowlevel.Task | None = None) -> TaskGroup | None:
    """The same tree as values, or None outside of trio."""
    if root is None:
        try:
            root = trio.lowlevel.current_root_task()
        except RuntimeError:
            return None
    if root is None:
        return None
    # All equal groups share one object, so comparing two subtrees is cheap.
    return _group(root, DEEPEST, itertools.count(), {})


def find_running_task(root: trio.lowlevel.Task) -> trio.lowlevel.Task | None:
    """The task below `root` that has its turn at this moment; for another thread than trio's to ask."""
    pending = [root]
    for _ in range(MOST_TASKS):
        if not pending:
            break
        task = pending.pop()
        if getattr(task.coro, "cr_running", False):
            return task
        for nursery in task.child_nurseries:
            pending += nursery.child_tasks
    return None


def _group(
    task: trio.lowlevel.Task, depth: int, visited: itertools.count[int], known: dict[TaskGroup, TaskGroup]
) -> TaskGroup:
    nurseries = []
    for nursery in task.child_nurseries if depth else ():
        groups: Counter[TaskGroup] = Counter()
        skipped = 0
        # A copy: from another thread, the set may change under us.
        for child in tuple(nursery.child_tasks):
            if next(visited) >= MOST_TASKS:
                skipped += 1
            else:
                groups[_group(child, depth - 1, visited, known)] += 1
        if skipped:
            groups[TaskGroup("... (not visited)", (), ())] = skipped
        # Sets have no order: sort, or equal nurseries would differ.
        ordered = sorted(groups.items(), key=lambda item: (item[0].name, item[0].stack, item[1]))
        nurseries.append(tuple(ordered))
    group = TaskGroup(task.name, tuple(_frames(task)), tuple(nurseries))
    return known.setdefault(group, group)


def _frames(task: trio.lowlevel.Task) -> Iterator[Frame]:
    """The task's stack, without the middle of a deep one."""
    try:
        frames = [item for item in task.iter_await_frames() if item[0].f_code.co_filename != _PLUMBING]
    except (TypeError, RuntimeError):
        return  # it awaits something that cannot be looked into, or runs in another thread
    if len(frames) > OUTER_FRAMES + INNER_FRAMES:
        yield from map(_describe, frames[:OUTER_FRAMES])
        yield "...", len(frames) - OUTER_FRAMES - INNER_FRAMES, "frames left out"
        frames = frames[-INNER_FRAMES:]
    yield from map(_describe, frames)


def _describe(frame: tuple[FrameType, int]) -> Frame:
    code = frame[0].f_code
    return code.co_filename, frame[1], code.co_qualname


def _render(group: TaskGroup, count: int, indent: str) -> Iterator[str]:
    yield f"{indent}{f'{count} x ' if count > 1 else ''}{group.name}"
    for file, line, function in group.stack:
        yield f"{indent}    {file}:{line} {function}"
    for number, nursery in enumerate(group.nurseries, 1):
        total = sum(children for _, children in nursery)
        yield f"{indent}  nursery {number}: {total} {'task' if total == 1 else 'tasks'}"
        for child, children in nursery:
            yield from _render(child, children, indent + "    ")
