"""What thread stacks do not tell of a test that hangs: where its tasks are. Hooks of pytest-timeout.

pytest-timeout ends the process, and xdist then tells only which test that was; the stacks that faulthandler shows after
a minute are those of threads, and of a loop that waits there is nothing to see but that.
"""

from __future__ import annotations

import gc
import os
import threading
from typing import Any

import pytest
import trio

from trioserve.observe.task_tree import dump_tasks

# How long before the end; what has no tasks is left alone.
_BEFORE = 5.0

_timer = pytest.StashKey[threading.Timer]()
_stderr = pytest.StashKey[int]()


def keep_stderr(config: pytest.Config) -> None:
    """To be called while pytest is configured: later on the descriptor is that of what it captures."""
    config.stash[_stderr] = os.dup(2)


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> None:
    seconds = max(settings.timeout - _BEFORE, settings.timeout / 2)
    timer = threading.Timer(seconds, _show_tasks, (item.nodeid, seconds, item.config.stash[_stderr]))
    timer.daemon = True
    item.stash[_timer] = timer
    timer.start()


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> None:
    timer = item.stash.get(_timer, None)
    if timer is not None:
        timer.cancel()


def _show_tasks(test: str, seconds: float, stderr: int) -> None:
    for thing in gc.get_objects():
        # The root of a run that goes on: trio has no word for it that another thread may ask.
        if (
            isinstance(thing, trio.lowlevel.Task)
            and thing.parent_nursery is None
            and getattr(thing.coro, "cr_frame", None)
        ):
            text = f"\n{test} has not ended after {seconds:g} s; its tasks:\n{dump_tasks(thing)}\n"
            os.write(stderr, text.encode())
