"""Errors of async generators that nobody finishes: row B2 of the boundary.

A generator that the app abandons is finalised by trio in a system task, where an exception of its `finally` has no
caller to go to: trio only logs it, to a logger of its own. The worker of a process listens there; one that serves
inside somebody's program does not, since the generator may be that program's. Nothing here waits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

_LOGGER = logging.getLogger("trio.async_generator_errors")


@contextmanager
def watch_async_generators(on_error: Callable[[BaseException], object]) -> Iterator[None]:
    """Call `on_error` for each error in a finaliser of this trio run, while the block runs."""
    handler = _Handler(on_error)
    _LOGGER.addHandler(handler)
    try:
        yield
    finally:
        _LOGGER.removeHandler(handler)


class _Handler(logging.Handler):
    def __init__(self, on_error: Callable[[BaseException], object]) -> None:
        super().__init__(logging.ERROR)
        self._on_error = on_error
        self._run = trio.lowlevel.current_trio_token()

    def emit(self, record: logging.LogRecord) -> None:
        if not trio.lowlevel.in_trio_run() or trio.lowlevel.current_trio_token() is not self._run:
            return  # another thread's
        error = record.exc_info[1] if record.exc_info else None
        self._on_error(error or RuntimeError(record.getMessage()))
