"""A change of generation: what a reload has begun, and how it ended.

Made by `WorkerPool.roll_out`; whoever has asked for the reload waits for `done`. Nothing here waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from trioserve.supervisor.worker_process import Orders


@dataclass(slots=True)
class Rollout:
    """A change of generation under way: every worker of an older one is to be replaced.

    Attributes:
        previous: the orders to go back to if the first new worker does not become ready.
        held: no worker was to be started before.
        proven: one has become ready, so there is no going back.
        error: why it failed, or "".
        done: set when it is over, either way.
    """

    previous: Orders
    held: bool
    proven: bool = False
    error: str = ""
    done: trio.Event = field(default_factory=trio.Event)

    def end(self, error: str = "") -> None:
        """It is over; with an error it has failed."""
        self.error = error
        self.done.set()
