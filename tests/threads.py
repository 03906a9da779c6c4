"""A process that can start no thread, as under pids.max (`docker --pids-limit`), TasksMax or `ulimit -u`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

# The kernel has no address space for such a stack, so it is the thread itself that cannot be had.
IMPOSSIBLE_STACK = 1 << 46


@contextmanager
def no_more_threads() -> Iterator[None]:
    """None can be started in the block."""
    before = threading.stack_size(IMPOSSIBLE_STACK)
    try:
        yield
    finally:
        threading.stack_size(before)
