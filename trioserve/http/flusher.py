"""Small body parts of a streaming response, written together.

An app that sends ten parts without waiting in between would cost ten system calls. Instead the exchange holds small
parts back and asks the `Flusher`, one task per worker, to write them; being a task, it runs as soon as the app
waits for anything at all, so an event of a live stream leaves at once, and a response that is completed without a
wait leaves in one write. What is held back is bounded (`http1_exchange.py`); cancelling `run` stops only the background
writing: whoever has held something back writes it himself at his next send.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio
from trio.lowlevel import Abort, Task, reschedule, wait_task_rescheduled


class Flusher:
    """The list of those who hold something back, and the task that lets them write it."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []
        self._parked: Task | None = None

    def request(self, flush: Callable[[], None]) -> None:
        """Have `flush` called in the next pass of the event loop. It must not raise."""
        self._waiting.append(flush)
        task = self._parked
        if task is not None:
            self._parked = None
            reschedule(task)

    async def run(self) -> None:
        """Call what was requested, for ever."""
        while True:
            if not self._waiting:
                self._parked = trio.lowlevel.current_task()
                await wait_task_rescheduled(self._abort)
            batch, self._waiting = self._waiting, []
            for flush in batch:
                flush()
            if self._waiting:
                await trio.lowlevel.checkpoint()  # who asks again while it is called has had its turn

    def _abort(self, _raise_cancel: Callable[[], Any]) -> Abort:
        self._parked = None
        return Abort.SUCCEEDED
