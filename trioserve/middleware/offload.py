"""Long work in threads, a few at a time, whichever event loop is running: trio, asyncio, uvloop.

Used by `compression.py`. What waits for a thread is counted, so that the caller can stop making more of it.

Cancellation: while it waits for its turn, nothing has happened. Once the thread runs, the wait goes on until the
thread is done, since whatever it works on is still in use.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar, TypeVarTuple

import trio

from trioserve.asgi.threads import finish_on_asyncio

T = TypeVar("T")
Args = TypeVarTuple("Args")


class Offload:
    """A limit on threads, and the queue before it.

    Attributes:
        threads: that run at once.
        waiting: how many calls may wait for their turn before `overloaded` says so.
        calls: that run or wait.
    """

    def __init__(self, threads: int, waiting: int) -> None:
        self.threads = threads
        self.waiting = waiting
        self.calls = 0
        # Of the loop that runs now: neither kind of limit outlives its loop, but an app may, in tests.
        self._loop: object = None
        self._limit: Any = None

    def __repr__(self) -> str:
        return f"<Offload {self.calls} calls, {self.threads} threads>"

    @property
    def overloaded(self) -> bool:
        """More than `waiting` calls wait for a thread."""
        return self.calls > self.threads + self.waiting

    async def run(self, function: Callable[[*Args], T], *args: *Args) -> T:
        """`function(*args)` in a thread."""
        self.calls += 1
        try:
            if trio.lowlevel.in_trio_task():
                limiter = self._limit_for(trio.lowlevel.current_trio_token(), trio.CapacityLimiter)
                return await trio.to_thread.run_sync(function, *args, limiter=limiter)
            semaphore = self._limit_for(asyncio.get_running_loop(), asyncio.Semaphore)
            async with semaphore:
                return await finish_on_asyncio(asyncio.ensure_future(asyncio.to_thread(function, *args)))
        finally:
            self.calls -= 1

    def _limit_for(self, loop: object, make: Callable[[int], Any]) -> Any:
        if self._loop is not loop:
            self._loop, self._limit = loop, make(self.threads)
        return self._limit
