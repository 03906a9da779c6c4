"""What may wait for a disk, run in a thread, and what takes long, in turns; under trio and under asyncio alike.

Threads here hold descriptors, so they are never abandoned: cancelling waits until the thread is done, and what it would
have returned is given to `discard`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio

Args = TypeVarTuple("Args")
Result = TypeVar("Result")

# Disks answer better to several requests than to one, but not to fifty; as in `sendfile.py`.
_limiter = trio.CapacityLimiter(8)


async def in_thread(
    function: Callable[[*Args], Result], *args: *Args, discard: Callable[[Result], object] | None = None
) -> Result:
    """Call `function` in a thread and return what it returns; a checkpoint.

    Args:
        function: it may wait.
        args: for it.
        discard: called with the result if the caller is cancelled meanwhile, since nobody else gets it then.
    """
    if trio.lowlevel.in_trio_task():
        # Trio delivers the result of a thread that is not abandoned even to a cancelled task.
        return await trio.to_thread.run_sync(function, *args, limiter=_limiter)
    # asyncio is loaded by whoever has brought us here.
    import asyncio

    from trioserve.asgi.threads import finish_on_asyncio

    future = asyncio.get_running_loop().run_in_executor(None, functools.partial(function, *args))
    return await finish_on_asyncio(future, discard)


async def give_way() -> None:
    """Let the other tasks have their turn; a checkpoint."""
    if trio.lowlevel.in_trio_task():
        await trio.lowlevel.checkpoint()
    else:
        import asyncio

        await asyncio.sleep(0)
