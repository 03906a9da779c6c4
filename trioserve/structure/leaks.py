"""Nurseries and cancel scopes that an app has left open in a task of ours (row B1 of the boundary).

Whoever runs the app in a task says so with `leak`, to be judged as the app's error, and ends the task in
`outlive_leak`, which waits until it is cancelled.
"""

from __future__ import annotations

import trio

from trioserve.errors import TaskLeak


def leak(place: str, cause: BaseException | None, what: str = "nursery") -> TaskLeak:
    """The error that it is; `cause` is what the app has raised besides.

    Args:
        place: whose task it was, in words that follow "in".
        cause: None if it has raised nothing.
        what: that was left open.
    """
    error = TaskLeak(f"the app ended with a {what} still open in {place} task")
    error.__cause__ = cause
    return error


async def outlive_leak(task: trio.lowlevel.Task) -> None:
    """Outlive, in that task, the grace of the drain that its nurseries have begun.

    trio ends a task that has left a nursery open with an error, which would cancel all its siblings at once.
    """
    for nursery in task.child_nurseries:
        nursery.cancel_scope.cancel(reason="the app has left this nursery open")
    await trio.sleep_forever()
