"""What `trioserve ctl` can ask of a supervisor: the handler behind the control socket.

`supervisor.py` hands an `Operations` to `control.py`, which calls it for each command. The answers are plain values,
as JSON has them. Commands that take a while return when they are done; one whose client has left goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import trio

import trioserve
from trioserve.config.tls_context import find_tls_problems
from trioserve.supervisor.control import ControlRefused
from trioserve.supervisor.machine import cpu_seconds, rss_bytes
from trioserve.supervisor.worker_process import WorkerProcess, WorkerState

if TYPE_CHECKING:
    from trioserve.supervisor.supervisor import Supervisor

# More workers than this is a slip of the finger.
_MOST_WORKERS = 1024


class Operations:
    """Implements `control.ControlHandler`."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    # -- questions -------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The whole in a few numbers."""
        supervisor = self._supervisor
        pool = supervisor.pool
        now = trio.current_time()
        workers = list(pool.workers.values())
        statistics = [worker.statistics for worker in workers]
        counts = {state: sum(worker.state is state for worker in workers) for state in WorkerState}
        return {
            "version": trioserve.__version__,
            "pid": supervisor.pid,
            "state": supervisor.state,
            "uptime": now - supervisor.started_at,
            "application": supervisor.application,
            "addresses": supervisor.store.addresses(supervisor.config),
            "workers": {
                "wanted": pool.wanted,
                "ready": counts[WorkerState.READY],
                "starting": counts[WorkerState.STARTING],
                "draining": counts[WorkerState.DRAINING],
            },
            "generation": pool.orders.generation,
            "degraded": supervisor.policy.degraded_reason(now),
            "restarts": dict(pool.restarts),
            "requests": pool.requests_gone + sum(int(found.get("requests", 0)) for found in statistics),
            "in_flight": sum(int(found.get("in_flight", 0)) for found in statistics),
            "connections": sum(int(found.get("connections", 0)) for found in statistics),
        }

    def workers(self) -> list[dict[str, Any]]:
        """Each worker, the oldest first."""
        return [self._describe(worker) for worker in self._supervisor.pool.workers.values()]

    def _describe(self, worker: WorkerProcess) -> dict[str, Any]:
        now = trio.current_time()
        statistics = worker.statistics
        age = now - worker.started_at
        used = cpu_seconds(worker.pid)
        state = "tainted" if worker.leaving.startswith("tainted") else worker.state.value
        return {
            "id": worker.id,
            "pid": worker.pid,
            "state": worker.state.value if worker.state is WorkerState.DRAINING else state,
            "generation": worker.generation,
            "age": age,
            "requests": int(statistics.get("requests", 0)),
            "in_flight": int(statistics.get("in_flight", 0)),
            "connections": int(statistics.get("connections", 0)),
            "rss": rss_bytes(worker.pid),
            "cpu": used / age if used and age else None,
            "last_heartbeat": None if worker.heartbeat_at is None else now - worker.heartbeat_at,
            "reason": worker.leaving,
        }

    def crashes(self, crash_id: str | None) -> Any:
        """The last crashes, or the whole report of one."""
        history = self._supervisor.desk.history
        if crash_id is None:
            return history.summaries()
        report = history.get(crash_id)
        if report is None:
            raise ControlRefused(f"no crash {crash_id!r} is known; without an ID the command lists them")
        return report

    # -- orders ----------------------------------------------------------------------------------------------

    async def scale(self, n: int) -> dict[str, Any]:
        """Have `n` workers; returns when they are ready and the others have gone."""
        if not 1 <= n <= _MOST_WORKERS:
            raise ControlRefused(f"{n} workers: give a number from 1 to {_MOST_WORKERS}")
        pool = self._supervisor.pool
        before = pool.wanted
        self._supervisor.scale_to(n, "ctl scale")
        await self._until_started(lambda: len(pool.ready()) == len(pool.workers) == n or pool.wanted != n)
        if pool.wanted != n:
            raise ControlRefused(f"the number was changed to {pool.wanted} meanwhile")
        return {"from": before, "to": n}

    async def recycle(self, worker_id: int | None) -> dict[str, Any]:
        """Replace one worker, or all of them one after another."""
        pool = self._supervisor.pool
        if worker_id is None:
            chosen = list(pool.workers.values())
        elif worker_id in pool.workers:
            chosen = [pool.workers[worker_id]]
        else:
            raise ControlRefused(
                f"there is no worker {worker_id}; there are {', '.join(map(str, pool.workers))}"
            )
        self._refuse_if_stopping()
        pool.replace(chosen, "recycled by hand")
        await self._until_started(lambda: not any(worker.id in pool.workers for worker in chosen))
        return {"recycled": [worker.id for worker in chosen]}

    async def reload(self) -> dict[str, Any]:
        """Read the configuration again, import the app again, worker by worker."""
        self._refuse_if_stopping()
        error = await self._supervisor.reload("ctl reload")
        self._refuse_if_stopping()
        if error:
            raise ControlRefused(f"reload failed, serving on as before: {error}")
        return {"generation": self._supervisor.pool.orders.generation}

    async def certificates(self) -> dict[str, Any]:
        """Have every worker read its certificates again; nothing else of the configuration is."""
        self._refuse_if_stopping()
        config = self._supervisor.config
        if not config.ssl_enabled:
            raise ControlRefused("there is no TLS here: certfile is not set")
        # Looked at here first, so that of many workers not some have the old ones and some the new.
        problems = list(find_tls_problems(config))
        if problems:
            raise ControlRefused("serving on with the old ones: " + "\n".join(problems))
        workers = list(self._supervisor.pool.workers.values())
        answers: dict[int, str | None] = {}

        async def ask(worker: WorkerProcess) -> None:
            answers[worker.id] = await worker.ask("certificates")

        async with trio.open_nursery() as nursery:
            for worker in workers:
                if worker.state is WorkerState.READY:
                    nursery.start_soon(ask, worker)
                elif worker.state is WorkerState.STARTING:
                    worker.tell("certificates")  # it may have read the old ones already, and not listen yet
        failed = {number: answer for number, answer in answers.items() if answer}
        if failed:
            said = "; ".join(f"worker {number}: {answer}" for number, answer in sorted(failed.items()))
            raise ControlRefused(f"some serve on with the old ones: {said}")
        return {"workers": sorted(number for number, answer in answers.items() if answer is not None)}

    async def drain(self) -> dict[str, Any]:
        """Stop accepting, finish what is under way, end."""
        return self._stop_with("ctl drain", self._supervisor.stop)

    async def stop(self) -> dict[str, Any]:
        """Cancel what is under way, end."""
        return self._stop_with("ctl stop", self._supervisor.quit)

    def _stop_with(self, reason: str, stop: Callable[[str], None]) -> dict[str, Any]:
        in_flight = self.status()["in_flight"]
        stop(reason)
        return {"state": self._supervisor.state, "in_flight": in_flight}

    def _refuse_if_stopping(self) -> None:
        if self._supervisor.pool.stopping:
            raise ControlRefused("the server is stopping")

    async def _until_started(self, condition: Callable[[], bool]) -> None:
        """Return once it holds, for which workers have to start; refuses when they do not, or the server stops."""
        supervisor = self._supervisor
        while not condition():
            self._refuse_if_stopping()
            if supervisor.policy.next_trial is not None:
                reason = supervisor.policy.degraded_reason(trio.current_time())
                raise ControlRefused(
                    f"not done yet: {reason}. Those that serve go on; the server's log has more"
                )
            await supervisor.pool.wait_change()
