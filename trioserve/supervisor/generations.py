"""What workers are started with, and the change from one generation of them to the next: a rollout.

`pool.py` makes one `Generations`, tells it of each worker that becomes ready or ends, and starts and drains workers as
it then says. A rollout can be taken back until the first worker of the new generation is ready: that one proves that
the new can serve. Whoever has asked for it waits for `Rollout.done`. Nothing here waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import trio

from trioserve.supervisor.worker_process import Orders, WorkerProcess, WorkerState

_RELOAD = "reload"

#: the error of a rollout that was given up for the next one: nothing is wrong
SUPERSEDED = "overtaken by another change"


@dataclass(slots=True)
class Rollout:
    """A change of generation under way: every worker of an older one is to be replaced.

    Attributes:
        previous: the orders to go back to if the first new worker does not become ready.
        held: no worker was to be started before.
        proven: one has become ready, so there is no going back.
        error: why it failed, or "".
        decided: set once it has proven itself, or is over.
        done: set when it is over, either way.
    """

    previous: Orders
    held: bool
    proven: bool = False
    error: str = ""
    decided: trio.Event = field(default_factory=trio.Event)
    done: trio.Event = field(default_factory=trio.Event)


class Generations:
    """The generation that workers are started in, and how far they have all got to it.

    Args:
        orders: of the first generation.
        workers: those that have not ended, by id; looked at, and marked as leaving or not.

    Attributes:
        orders: what the next worker is started with.
        holding: no worker is started: the app is being imported once for all of them, or has failed and is to change.
    """

    def __init__(self, orders: Orders, workers: Mapping[int, WorkerProcess]) -> None:
        self.orders = orders
        self.holding = False
        self._workers = workers
        self._rollout: Rollout | None = None

    def __repr__(self) -> str:
        return f"<Generations at {self.orders.generation}{', unproven' if self.is_unproven else ''}>"

    @property
    def is_unproven(self) -> bool:
        """A rollout is under way, and none of the new generation has been ready yet."""
        return self._rollout is not None and not self._rollout.proven

    # -- a rollout -------------------------------------------------------------------------------------------

    def begin_rollout(self, orders: Orders) -> Rollout:
        """Have all workers replaced by ones with these orders."""
        self._rollout = rollout = Rollout(self.orders, self.holding)
        self.holding = False
        self.orders = orders
        for worker in self._workers.values():
            worker.leaving = worker.leaving or _RELOAD
        return rollout

    def go_back(self, error: str) -> bool:
        """Return to the generation before, unless the new one has proven itself: False then, or if there is none."""
        rollout = self._rollout
        if rollout is None or rollout.proven:
            return False
        self.orders = rollout.previous
        self.holding = rollout.held
        for worker in self._workers.values():
            if worker.generation > self.orders.generation:
                worker.leaving = worker.leaving or "its generation was abandoned"
            elif (
                worker.generation == self.orders.generation
                and worker.leaving == _RELOAD
                and worker.state is not WorkerState.DRAINING
            ):
                worker.stay()
        self.end_rollout(error)
        return True

    def hurry_rollout(self, reason: str) -> None:
        """Have the workers that it has replaced cancel what still runs."""
        if self._rollout is None:
            return
        for worker in self._workers.values():
            if worker.state is WorkerState.DRAINING and not worker.asked.startswith(("hurry", "end")):
                worker.hurry(reason)

    def finish_rollout(self, enough: bool, failing: bool) -> None:
        """It is over once `enough` workers are ready and the old ones have gone.

        Where starts keep `failing`, what is left of the old generation serves until they no longer do. It may be the
        next reload that mends that, and it waits for the end of this one.
        """
        if self._rollout is None or not self._rollout.proven:
            return
        old = any(worker.generation < self.orders.generation for worker in self._workers.values())
        if failing or (enough and not old):
            self.end_rollout()

    def end_rollout(self, error: str = "") -> None:
        """It is over, if there is one; with an error it has failed."""
        rollout, self._rollout = self._rollout, None
        if rollout is not None:
            rollout.error = error
            rollout.decided.set()
            rollout.done.set()

    # -- what happens to a worker ----------------------------------------------------------------------------

    def note_ready(self, worker: WorkerProcess) -> None:
        """The first of a new generation proves it; one that is to end already does not."""
        is_new = worker.generation == self.orders.generation and worker.state is WorkerState.READY
        if self._rollout is not None and is_new:
            self._rollout.proven = True
            self._rollout.decided.set()

    def note_end(self, worker: WorkerProcess) -> bool:
        """Go back if it was the first of the new generation that has died; True if so."""
        if worker.generation != self.orders.generation:
            return False
        if worker.asked.startswith(("drain", "end")):
            return False  # scaled down or recycled by hand, and another one follows
        ended = (
            f"worker {worker.id} of the new generation ended with status {worker.status} before it was ready"
        )
        return self.go_back(f"{ended}: {worker.failure}" if worker.failure else ended)
