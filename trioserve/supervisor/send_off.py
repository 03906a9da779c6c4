"""A worker that is to end gets the time that it may need, and no more.

`pool.py` starts these as tasks of their own, beside a drain that it has ordered or that a worker has begun by itself.
Cancelling one leaves the worker to end by itself.
"""

from __future__ import annotations

import logging

import trio

from trioserve.structure.drain import CLEANUP_SECONDS
from trioserve.supervisor.conversation import SLACK
from trioserve.supervisor.worker_process import WorkerProcess

# Until a startup that does not hear that it is to end is cut. Its app may do so in a blocking call, for minutes.
_STARTUP_PATIENCE = 5.0


async def end_in_time(worker: WorkerProcess, log: logging.Logger) -> bool:
    """A drain ends by itself, or by the worker's own hard exit: True; past all that it is ended from here: False."""
    config = worker.config
    limit = config.pre_drain_delay + config.graceful_timeout
    limit += 2 * CLEANUP_SECONDS + config.shutdown_timeout + (config.hard_exit_after or 0.0) + SLACK
    with trio.move_on_after(limit):
        await worker.gone.wait()
        return True
    log.error("worker %d (pid %d) has not ended within %g s; ending it", worker.id, worker.pid, limit)
    worker.kill(f"the drain took longer than {limit:g} s")
    return False


async def cut_deaf_startup(worker: WorkerProcess, log: logging.Logger) -> None:
    """End a worker that is not ready yet unless it says soon that it drains."""
    with trio.move_on_after(_STARTUP_PATIENCE):
        await worker.heard.wait()
        return
    log.warning(
        "worker %d (pid %d): its startup blocks the event loop, so that it has not heard within %g s that it is to "
        "end (%s); it has served nothing: ending it",
        worker.id,
        worker.pid,
        _STARTUP_PATIENCE,
        worker.leaving,
    )
    worker.cut_startup(worker.leaving)
