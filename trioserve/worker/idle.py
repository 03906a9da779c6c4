"""Scale to zero: a worker that nobody needs ends, and the next connection starts it again (socket activation).

A task of the worker's (`worker.py`), where `exit_when_idle` asks for it. It looks at what is counted anyway, and wakes
once in that time, busy or not: a request costs nothing. Cancelling it lets the worker serve on.

No connection is lost: one that is queued when the drain begins is accepted and served by it, as in any drain; one that
comes later stays in the queue of the socket, which is the service manager's, and starts the next process.
"""

from __future__ import annotations

import trio

from trioserve.structure.context import WorkerContext


async def drain_when_idle(worker: WorkerContext, seconds: float) -> None:
    """Begin the drain once nothing has happened for `seconds`, and before twice that time is over; then return.

    A connection on which nobody says anything does not count, be it new or kept alive: the drain closes it, and looks
    a last time whether a request has come.
    """
    before = _activity(worker)
    while True:
        await trio.sleep(seconds)
        now = _activity(worker)
        # Busy at either end, or anything new in between: then the quiet, if there is one, has begun later.
        if now is not None and now == before:
            break
        before = now
    # No delay: it is for load balancers, which are to go on sending here.
    worker.drain.begin(f"idle for {seconds:g} s (exit_when_idle)", grace=worker.drain.grace)


def _activity(worker: WorkerContext) -> tuple[int, int] | None:
    """What grows with everything that happens; None while something is going on."""
    if not all(connection.idle for connection in worker.connections):
        return None
    return worker.counters.connections, worker.requests_served
