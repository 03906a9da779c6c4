"""Waiting until something is so, without a guess at how long that takes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio
import trio.testing


async def until(condition: Callable[[], object]) -> None:
    """Let others run until it holds. Virtual time stands still meanwhile."""
    with trio.fail_after(30):
        while not condition():
            await trio.lowlevel.checkpoint()


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
