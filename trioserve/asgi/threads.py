"""A thread's work on asyncio, waited for as trio waits for it; for the parts that run on either.

On trio there is nothing to add: a thread that is not abandoned is waited for, whoever is cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


async def finish_on_asyncio(
    future: asyncio.Future[Result], discard: Callable[[Result], object] | None = None
) -> Result:
    """The result of a thread's work; a cancellation is passed on only once that is done.

    Args:
        future: the work.
        discard: called with the result if the caller was cancelled meanwhile, since nobody else gets it then.
    """
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return future.result()
    # Nobody is left to be told of an error; asked for, asyncio does not report it as lost.
    if future.exception() is None and discard is not None:
        discard(future.result())
    raise cancelled
