"""The workers, and how many of them there are to be: kept alive, replaced, recycled, scaled, reloaded.

`supervisor.py` makes one `WorkerPool` and runs it in its nursery: one task for each worker process, from its start to
its exit status. All that happens to a worker (it is ready, tainted, too old, gone) is written down on it, and then
`reconcile()` makes the numbers right: who is missing is started, who is leaving is drained as soon as there is one
more than is wanted. So a successor is ready before its predecessor stops accepting, whatever the reason to replace it.

Nothing polls: a task wakes when its worker speaks, stays silent for too long, or ends. Cancelling the pool leaves the
processes to notice that their link has closed; `supervisor.py` stops them first.
"""

from __future__ import annotations

import errno
import logging
import signal
import socket
from collections.abc import Callable, Collection, Iterable
from typing import Any

import trio

from trioserve.errors import EXIT_HARD_DRAIN, EXIT_OK
from trioserve.supervisor.abandoned import AbandonedSockets
from trioserve.supervisor.conversation import Conversation, announced_code, figures_of
from trioserve.supervisor.exit_report import MOST_OF_A_REASON, clean
from trioserve.supervisor.exits import ExitDesk
from trioserve.supervisor.generations import Generations, Rollout
from trioserve.supervisor.recycler import Recycler
from trioserve.supervisor.restart_policy import GiveUp, HoldOn, Replace, RestartPolicy, WorkerExit
from trioserve.supervisor.send_off import cut_deaf_startup, end_in_time
from trioserve.supervisor.worker_process import Orders, WorkerProcess, WorkerState, start_worker

_STARTING, _READY, _DRAINING, _GONE = WorkerState

# Until a start that the machine has refused is tried again, and what it refuses only for the moment.
_RETRY = 5.0
_SHORTAGES = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE})

# How long the last words of a process that has ended may take to be read, if something it started holds the link.
_LAST_MESSAGES = 0.5


class WorkerPool:
    """All workers of one supervisor.

    Attributes:
        generations: what workers are started with, and the change to another generation of them.
        wanted: how many are to accept connections.
        workers: those that have not ended, by id.
        failure: why the whole is to end, or None.
        stopping: no worker is started any more.
        handed_over: sockets on which another supervisor's workers accept.
        patient: somebody is about to mend the app: instead of a failure, wait for the next `roll_out`.
        killed: how many had to be ended, after `stop`, because they did not end in time.
        most: how many there may come to be, where that follows the load.
        busy_at: when a worker last had a request, as far as their heartbeats tell (trio's clock).
        changed: called after each change, for status texts.
    """

    def __init__(
        self, orders: Orders, wanted: int, policy: RestartPolicy, desk: ExitDesk, log: logging.Logger
    ) -> None:
        self.wanted = wanted
        self.workers: dict[int, WorkerProcess] = {}
        self.generations = Generations(orders, self.workers)
        self.failure: GiveUp | None = None
        self.stopping = False
        self.handed_over: Collection[socket.socket] = ()
        self.patient = False
        self.killed = 0
        self.most = 0
        self.started = 0
        self.restarts: dict[str, int] = {}
        self.requests_gone = 0
        self.busy_at = 0.0
        self.changed: Callable[[], None] = lambda: None
        self.on_failure: Callable[[], None] = lambda: None
        self._policy = policy
        self._desk = desk
        self._log = log
        self._recycler = Recycler(log)
        self._abandoned = AbandonedSockets()
        self._postponed: list[float] = []  # when successors that have to wait may be started (trio's clock)
        self._nursery: trio.Nursery
        self._running = False
        self._empty = trio.Event()
        self._was_ready = trio.Event()
        self._change = trio.Event()

    def __repr__(self) -> str:
        return f"<WorkerPool {len(self.ready())} of {self.wanted} ready, generation {self.orders.generation}>"

    @property
    def orders(self) -> Orders:
        """What the next worker is started with."""
        return self.generations.orders

    # -- the life --------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the workers alive until `stop` or a failure, and return when the last one has ended."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._running = True
            self.reconcile()
            await self._empty.wait()
            nursery.cancel_scope.cancel(reason="all workers have ended")

    async def wait_ready(self) -> None:
        """Return once as many workers as wanted accept connections, for the first time."""
        await self._was_ready.wait()

    async def wait_change(self) -> None:
        """Return once something has happened to a worker."""
        await self._change.wait()

    def ready(self) -> list[WorkerProcess]:
        """The workers that accept connections, those that are to be replaced included."""
        return [worker for worker in self.workers.values() if worker.state is _READY]

    @property
    def busy(self) -> bool:
        """A worker has requests in flight, or is starting or ending."""
        return any(w.state is not _READY or w.statistics.get("in_flight") for w in self.workers.values())

    def reconcile(self) -> None:
        """Start who is missing, drain who is leaving and no longer needed."""
        self._change.set()
        self._change = trio.Event()
        self._abandoned.review(self.workers.values())
        if self.stopping:
            if not self.workers:
                self._empty.set()
            return
        if not self._running:
            return  # what was asked for before is seen to when it runs
        self._mark_surplus()
        self._start_missing()
        excess = len(self.ready()) - self._count_on_trial() - self.wanted
        for worker in list(self.workers.values()):
            if worker.leaving and worker.state is _STARTING:
                self._drain(worker)
            elif worker.leaving and worker.state is _READY and excess > 0:
                excess -= 1
                self._drain(worker)
        if sum(worker.is_staying for worker in self.ready()) >= self.wanted:
            self._policy.none_missing()
        enough = len(self.ready()) >= self.wanted
        self.generations.finish_rollout(enough, failing=self._policy.is_failing)
        if enough:
            self._was_ready.set()
        self.changed()

    def _count_on_trial(self) -> int:
        """Workers that may yet fail as others have: no substitute for those that have lasted."""
        now = trio.current_time()
        if not self._policy.is_on_trial(now):
            return 0
        return sum(worker.lived(now) < self._policy.limits.min_uptime for worker in self.ready())

    def _mark_surplus(self) -> None:
        staying = [worker for worker in self.workers.values() if worker.is_staying]
        # Who is not ready yet goes first, then the oldest: what is fresh stays.
        staying.sort(key=lambda worker: (worker.state is _READY, worker.id))
        for worker in staying[: max(0, len(staying) - self.wanted)]:
            worker.leaving = "scaled down"

    def _start_missing(self) -> None:
        if self.generations.holding:
            return
        now = trio.current_time()
        self._postponed = [moment for moment in self._postponed if moment > now]
        next_trial = None if self.generations.is_unproven else self._policy.next_trial
        if next_trial is not None and now < next_trial and self.ready():
            return  # where none serves any more, it is not waited for
        on_trial = self._policy.is_on_trial(now) and not self.generations.is_unproven
        while True:
            staying = sum(worker.is_staying for worker in self.workers.values())
            missing = self.wanted - staying - len(self._postponed)
            if missing <= 0:
                return
            starting = sum(
                worker.is_staying and worker.state is _STARTING for worker in self.workers.values()
            )
            lost = self.wanted - starting - len(self.ready()) - len(self._postponed)
            # Capacity that is lost comes back all at once; those that still serve are replaced one by one, and where
            # starts keep failing one of them is to get ready first, and to last.
            if (lost <= 0 and (starting or on_trial)) or (starting and next_trial is not None):
                return
            if not self._start_worker():
                return

    def _start_worker(self) -> bool:
        self.started += 1
        try:
            place = self.orders.board.take_place({worker.place for worker in self.workers.values()})
            worker = start_worker(self.started, place, self.orders, trio.current_time())
        except OSError as error:
            if error.errno not in _SHORTAGES and self.generations.go_back(f"cannot start a worker: {error}"):
                return False
            # Mostly the machine is out of processes or descriptors: nothing that trying again at once would mend.
            self._log.error("cannot start a worker: %s; trying again in %g s", error, _RETRY)
            self._postpone(_RETRY)
            return False
        self.workers[worker.id] = worker
        self._recycler.plan(worker, workers=max(self.wanted, self.most))
        self._nursery.start_soon(
            self._supervise, worker, self.orders, name=f"worker {worker.id} (pid {worker.pid})"
        )
        return True

    def _postpone(self, delay: float) -> None:
        moment = trio.current_time() + delay
        self._postponed.append(moment)
        self._nursery.start_soon(self._reconcile_at, moment, name="postponed start")

    async def _reconcile_at(self, moment: float) -> None:
        await trio.sleep_until(moment)
        self.reconcile()

    # -- one worker ------------------------------------------------------------------------------------------

    async def _supervise(self, worker: WorkerProcess, orders: Orders) -> None:
        """From its start to its burial."""
        self._log.info("worker %d (pid %d) started, generation %d", worker.id, worker.pid, worker.generation)
        self._desk.note_start(worker)
        conversation = Conversation(worker, self._note, self._end_hung, self._log)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(conversation.run, orders, name=f"link to worker {worker.id}")
            await worker.wait()
            # What it said last is in the socket; but something that it has started may hold the other end.
            with trio.move_on_after(_LAST_MESSAGES):
                await conversation.over.wait()
            nursery.cancel_scope.cancel(reason="the worker has ended")
        self._bury(worker)

    async def _end_hung(self, worker: WorkerProcess) -> None:
        silent = trio.current_time() - (worker.heartbeat_at or worker.started_at)
        reason = f"no heartbeat for {silent:.0f} s"
        self._log.critical(
            "worker %d (pid %d): %s; having it report, then ending it", worker.id, worker.pid, reason
        )
        worker.leaving = worker.leaving or reason
        # It accepts nothing: its successor need not wait for its end.
        worker.state = _DRAINING
        self.reconcile()
        await worker.end_hung(reason)

    def _note(self, worker: WorkerProcess, message: dict[str, Any]) -> None:
        """Something that a worker has said."""
        now = trio.current_time()
        match message.pop("is", None):
            case "beat":
                worker.heartbeat_at = now
                figures = figures_of(message)
                if figures.get("in_flight") or figures.get("requests") != worker.statistics.get("requests"):
                    self.busy_at = now
                worker.statistics = figures
                self._recycle_if_due(worker, now)
            case "ready":
                worker.heartbeat_at = worker.ready_at = now
                worker.statistics = figures_of(message)
                if worker.state is _STARTING:
                    worker.state = _READY
                self.busy_at = max(self.busy_at, now)
                was_failing = self._policy.next_trial is not None
                self._policy.worker_ready(now)
                age = now - worker.started_at
                self._log.info(
                    "worker %d (pid %d) is ready, %.1f s after its start", worker.id, worker.pid, age
                )
                if was_failing:
                    self._log.warning("no longer degraded: workers can be started again")
                if self._policy.is_on_trial(now):
                    moment = now + self._policy.limits.min_uptime
                    self._nursery.start_soon(self._reconcile_at, moment, name="end of a trial")
                self.generations.note_ready(worker)
                self.reconcile()
            case "tainted":
                self._judge_taint(
                    worker, now, str(message.get("signature", "")), str(message.get("summary", ""))
                )
            case "draining" if worker.state is _STARTING:
                worker.heard.set()  # its startup has failed: what follows depends on how it ends
            case "draining":
                worker.heard.set()
                worker.has_closed = message.get("listening") is False
                worker.leaving = worker.leaving or str(message.get("reason", ""))
                if worker.state is _READY:  # by itself: a fatal error, or somebody's signal
                    worker.state = _DRAINING
                    self._nursery.start_soon(self._end_in_time, worker, name=f"end of worker {worker.id}")
                    worker.ends_with = announced_code(message)
                    if worker.ends_with and not self.generations.holding:
                        # It has failed now, however long its drain takes: a successor may fail as fast.
                        self._judge_end(worker, now, worker.ends_with)
                self.reconcile()
            case "failed":
                worker.failure = clean(message.get("reason", ""), MOST_OF_A_REASON)
            case "report":
                report = message.get("report")
                if isinstance(report, dict) and report.get("verdict") != "contain":
                    worker.own_report = report
            case other:
                self._log.error("worker %d sent a message that is not known: %r", worker.id, other)

    def _judge_taint(self, worker: WorkerProcess, now: float, signature: str, summary: str) -> None:
        if worker.state is not _READY or worker.leaving or worker.is_tainted:
            return  # it is being replaced anyway
        verdict = self._policy.judge_taint(now, signature)
        if isinstance(verdict, Replace):
            self._log.warning("worker %d is to be replaced after %s: %s", worker.id, summary, verdict.reason)
            worker.condemn(signature)
            self._nursery.start_soon(
                self._replace_tainted, worker, summary, verdict.delay, name="replacement"
            )
            return
        if verdict.first:
            self._log.critical("degraded: %s", verdict.reason)
        self._log.warning("worker %d goes on after %s: %s", worker.id, summary, verdict.reason)
        worker.spare(signature)
        self.changed()

    async def _replace_tainted(self, worker: WorkerProcess, summary: str, delay: float) -> None:
        await trio.sleep(delay)
        if worker.is_staying:
            self.replace([worker], f"tainted by {summary}")
        else:
            worker.is_tainted = False

    def _recycle_if_due(self, worker: WorkerProcess, now: float) -> None:
        if (
            not worker.is_staying
            or worker.state is not _READY
            or any(w.leaving for w in self.workers.values())
        ):
            return  # one at a time; its next heartbeat asks again
        reason = self._recycler.due(worker, now)
        if reason is not None:
            self._log.info("recycling worker %d: %s", worker.id, reason)
            worker.leaving = reason
            self.reconcile()

    def _drain(self, worker: WorkerProcess) -> None:
        worker.drain(worker.leaving, self._left_to_others(worker))
        self._nursery.start_soon(self._end_in_time, worker, name=f"end of worker {worker.id}")
        if worker.ready_at is None:
            self._nursery.start_soon(
                cut_deaf_startup, worker, self._log, name=f"startup of worker {worker.id}"
            )

    def _left_to_others(self, worker: WorkerProcess) -> list[int]:
        """The sockets of a worker, by their place, on which somebody accepts when it no longer does."""
        others = self.handed_over
        if not self.stopping:
            others = {sock for other in self.ready() if other is not worker for sock in other.sockets}
        return [place for place, sock in enumerate(worker.sockets) if sock in others]

    async def _end_in_time(self, worker: WorkerProcess) -> None:
        if not await end_in_time(worker, self._log):
            self.killed += self.stopping

    def _bury(self, worker: WorkerProcess) -> None:
        """It has ended: say why, and decide about its successor."""
        now = trio.current_time()
        assert worker.status is not None
        del self.workers[worker.id]
        self._recycler.forget(worker)
        self.requests_gone += int(worker.statistics.get("requests", 0))
        kind = self._desk.note_end(worker, now)
        self.restarts[kind] = self.restarts.get(kind, 0) + 1
        self.killed += self.stopping and worker.status == EXIT_HARD_DRAIN
        self.orders.board.clear(worker.place)
        worker.close()
        holding = self.generations.holding
        if not (self.stopping or holding or self.generations.note_end(worker) or worker.ends_with):
            planned = bool(worker.leaving and worker.asked.startswith(("drain", "hurry", "end")))
            for_cause = worker.asked.startswith("kill") or kind == "out of memory"
            # Who drains by itself, and not for an error, was sent a signal.
            status = -signal.SIGTERM if worker.ends_with == worker.status == EXIT_OK else worker.status
            self._judge_end(worker, now, status, planned, for_cause)
        self.reconcile()

    def _judge_end(
        self, worker: WorkerProcess, now: float, status: int, planned: bool = False, for_cause: bool = False
    ) -> None:
        ended = WorkerExit(status, worker.ready_at is not None, worker.lived(now), planned, for_cause)
        serving = max((other.lived(now) for other in self.ready()), default=0.0)
        decision = self._policy.worker_exited(now, ended, serving)
        if isinstance(decision, GiveUp):
            self.give_up(decision)
        elif isinstance(decision, HoldOn):
            self._hold_on(worker, decision)
        elif decision.delay > 0 and sum(w.is_staying for w in self.workers.values()) < self.wanted:
            self._log.warning("the next worker starts in %.1f s: %s", decision.delay, decision.reason)
            self._postpone(decision.delay)

    def _hold_on(self, worker: WorkerProcess, decision: HoldOn) -> None:
        """Those that serve do so whatever becomes of others; who is to be replaced just waits longer for that."""
        if decision.first:
            self._log.critical(
                "degraded: worker %d %s. Mend what makes new workers fail (the lines above say what it is); one is "
                "started every %g s, and at once by a reload (SIGHUP, trioserve ctl reload)",
                worker.id,
                decision.reason,
                self._policy.limits.max_delay,
            )
        else:
            self._log.error(
                "still degraded: worker %d %s; next attempt in %.0f s",
                worker.id,
                decision.reason,
                decision.delay,
            )
        moment = trio.current_time() + decision.delay
        self._nursery.start_soon(self._reconcile_at, moment, name="next trial")

    def give_up(self, decision: GiveUp) -> None:
        """Have all of it end; or, in development, start nothing more before a change."""
        if self.patient:
            self._log.error("waiting for a file to change: %s", decision.reason)
            self.generations.holding = True
            self.generations.end_rollout(decision.reason)
            return
        self._log.critical("giving up: %s", decision.reason)
        self.failure = decision
        self.on_failure()

    # -- from outside ----------------------------------------------------------------------------------------

    def scale(self, wanted: int) -> None:
        """Have `wanted` workers from now on."""
        self.wanted = wanted
        self.reconcile()

    def replace(self, workers: Iterable[WorkerProcess], reason: str) -> None:
        """Replace these, each once its successor is ready."""
        for worker in workers:
            worker.leaving = worker.leaving or reason
        self.reconcile()

    def roll_out(self, orders: Orders) -> Rollout:
        """Replace all workers by ones with new orders; if the first of them fails, everything stays as it was."""
        # It may be over by the return: who is told to start a worker at once may see that there can be none.
        rollout = self.generations.begin_rollout(orders)
        if self.patient:
            self._policy.start_afresh()
        self._postponed.clear()
        self.reconcile()
        return rollout

    def abandon(self, sockets: Iterable[socket.socket]) -> None:
        """Close these, on which nobody listens but workers of ours; none that is started from now on will."""
        self._abandoned.add(sockets)
        self._abandoned.review(self.workers.values())

    def supersede_rollout(self, reason: str) -> None:
        """Another generation is to follow the one under way: let that take no longer than it must."""
        if self.generations.go_back(reason):
            self.reconcile()
        else:
            self.generations.hurry_rollout(reason)

    # -- the end ---------------------------------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """Drain them all; `run` returns when the last one has ended."""
        self.stopping = True
        self.generations.end_rollout(reason)
        for worker in list(self.workers.values()):
            worker.leaving = worker.leaving or reason
            if worker.state is not _DRAINING:
                self._drain(worker)
                worker.asked = f"stop: {reason}"
        self.reconcile()

    def hurry(self, reason: str) -> None:
        """Have them cancel what still runs."""
        self.stop(reason)
        for worker in self.workers.values():
            worker.hurry(reason)

    def kill(self, reason: str) -> None:
        """End them at once."""
        self.stop(reason)
        for worker in self.workers.values():
            worker.kill(reason)

    def tell_all(self, order: str) -> None:
        """Send one order to every worker."""
        for worker in self.workers.values():
            worker.tell(order)

    @property
    def exit_code(self) -> int:
        """What the supervisor ends with."""
        if self.failure is not None:
            return self.failure.exit_code
        return EXIT_HARD_DRAIN if self.killed else EXIT_OK
