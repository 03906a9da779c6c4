"""Waiting until something is so, without a guess at how long that takes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
import trio.testing


@asynccontextmanager
async def until_blocked(cushion: float = 0.1) -> AsyncIterator[trio.CancelScope]:
    """Cancel the block once no task has had anything to do for so long: a write waits for a peer that does not read."""
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:

            async def cancel() -> None:
                await trio.testing.wait_all_tasks_blocked(cushion)
                scope.cancel()

            nursery.start_soon(cancel)
            yield scope
        nursery.cancel_scope.cancel()
