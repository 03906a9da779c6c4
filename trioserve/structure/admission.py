"""The limit on requests in flight, with a short, bounded queue in front of it.

`http1.py` acquires a place before it calls the app, and releases it when the exchange is over. Only made where
`max_concurrent_requests` is set. Cancelling a waiter takes it out of the queue.
"""

from __future__ import annotations

import trio

from trioserve.errors import RequestRefused


class Admission:
    """Places for `limit` requests; up to `queue_size` more wait for at most `patience` seconds."""

    def __init__(self, limit: int, queue_size: int, patience: float) -> None:
        self.limit = limit
        self.queue_size = queue_size
        self.patience = patience
        self.admitted = 0
        self._queue = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        return f"<Admission {self.admitted}/{self.limit} queued={len(self._queue)}>"

    @property
    def queued(self) -> int:
        """How many requests wait for a place."""
        return len(self._queue)

    async def acquire(self) -> None:
        """Take a place, waiting in turn for one.

        Raises:
            RequestRefused: 503; the queue is full, or no place came free in time.
        """
        if self.admitted < self.limit:  # never while somebody waits: his place is handed on, still counted
            self.admitted += 1
            return
        if len(self._queue) >= self.queue_size:
            raise RequestRefused(503, f"{self.admitted} requests in flight and {len(self._queue)} waiting")
        with trio.move_on_after(self.patience):
            await self._queue.park()
            return
        raise RequestRefused(503, f"no place among {self.limit} requests within {self.patience:g} s")

    def release(self) -> None:
        """Give a place back, or on to the first in the queue."""
        if self._queue:
            self._queue.unpark()
        else:
            self.admitted -= 1
