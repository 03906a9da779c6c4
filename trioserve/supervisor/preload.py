"""`--preload`: the app is imported once for each generation, and its workers are forked from the process that has it.

A fork takes milliseconds where an import takes a second, and what nobody writes to is in memory once. But only a
process with one thread and no event loop may fork, so it is neither this one nor a worker: `worker/preloader.py` is a
process of its own, started by exec, that does nothing else. `supervisor.py` makes one `Preloads` and asks it to
`prepare` the orders of each generation; workers are then started through `Orders.fork`.

Whatever fails here costs speed and memory and nothing else: the worker is started by exec, as without `--preload`.

Cancelling `prepare` or the task behind a `Preloader` ends the process; workers that it has forked are not concerned.
"""

from __future__ import annotations

import json
import logging
import signal
import socket
from collections.abc import Sequence
from dataclasses import replace

import trio

from trioserve.errors import ConfigError
from trioserve.net.json_lines import BadMessage, JsonLines
from trioserve.supervisor.child_process import FIRST_INHERITED, ChildProcess, spawn_worker
from trioserve.supervisor.exit_report import MOST_OF_A_REASON, clean
from trioserve.supervisor.restart_policy import BOOT_FAILURES, GiveUp
from trioserve.supervisor.worker_process import ForkRefused, Orders, boot_patience, packed
from trioserve.worker.parent_link import MESSAGE_LIMIT

# A fork takes milliseconds, and the supervisor stands still meanwhile: too short for a worker to notice.
_FORK_PATIENCE = 2.0

# One that is idle ends as soon as it sees that its socket is closed.
_END_PATIENCE = 1.0


class Preloads:
    """The preloaders of one supervisor: that of the generation that serves, and that of one that is to follow."""

    def __init__(self, nursery: trio.Nursery, log: logging.Logger) -> None:
        self._nursery = nursery
        self._log = log
        self._preloaders: list[Preloader] = []

    def __repr__(self) -> str:
        return f"<Preloads {self._preloaders}>"

    def pids(self) -> set[int]:
        """The preloading processes: children of ours, and no workers."""
        return {preloader.pid for preloader in self._preloaders if preloader.pid}

    async def prepare(self, orders: Orders) -> Orders | GiveUp:
        """Import the app; returns orders by which workers are forked, or exec'd if the app does not allow that.

        `GiveUp`: the app cannot be imported, of which its author has been told on stderr, as by a worker; or the
        configuration cannot be handed to another process.
        """
        try:
            packed(orders.config)
        except ConfigError as error:
            return GiveUp(error.exit_code, str(error))
        preloader = Preloader(orders, self._log)
        self._preloaders.append(preloader)
        failure = await self._nursery.start(self._run, preloader, name=f"preloader {orders.generation}")
        if failure is None:
            return replace(orders, fork=preloader.fork)
        return failure if isinstance(failure, GiveUp) else orders

    async def _run(self, preloader: Preloader, *, task_status: trio.TaskStatus[GiveUp | str | None]) -> None:
        try:
            await preloader.run(task_status)
        finally:
            self._preloaders.remove(preloader)  # not before its process has been waited for: see `pids`

    def keep(self, orders: Orders) -> None:
        """Workers are started with these orders from now on, and with no others."""
        for preloader in self._preloaders:
            if preloader.generation != orders.generation:
                preloader.close()


class Preloader:
    """The preloading process of one generation; if it dies, the next one.

    Attributes:
        generation: its own.
        pid: of the process there is, or None.
    """

    def __init__(self, orders: Orders, log: logging.Logger) -> None:
        self.generation = orders.generation
        self.pid: int | None = None
        self._orders = orders
        self._log = log
        self._scope = trio.CancelScope()
        self._process: _Process | None = None
        self._wanted = trio.Event()

    def __repr__(self) -> str:
        return f"<Preloader generation={self.generation} pid={self.pid}>"

    async def run(self, task_status: trio.TaskStatus[GiveUp | str | None]) -> None:
        """Have a process with the app loaded, until `close`; another one when it has died and a worker is wanted.

        Reports, once the first has loaded the app, None; else why there is none: a `GiveUp` if the app is to blame.
        """
        told = False
        with self._scope:
            while True:
                self._wanted = trio.Event()
                failure = await self._run_one(task_status, told)
                if failure is not None:
                    if not told:
                        task_status.started(failure)
                    elif isinstance(failure, GiveUp):
                        # The app has changed meanwhile; the workers that serve go on, others will say it again.
                        self._fall_back(failure.reason)
                    return
                told = True
                await self._wanted.wait()

    async def _run_one(
        self, task_status: trio.TaskStatus[GiveUp | str | None], told: bool
    ) -> GiveUp | str | None:
        """The life of one process; returns why it could not load the app, or None after it has forked and ended."""
        try:
            process = _Process(self._orders)
        except OSError as error:
            return self._fall_back(f"no process to import the app in could be started ({error})")
        self.pid = process.pid
        started_at = trio.current_time()
        try:
            failure = await self._load(process)
            if failure is not None:
                return failure
            self._log.info(
                "preloader (pid %d) has imported the app in %.1f s: workers of generation %d are forked from it",
                process.pid,
                trio.current_time() - started_at,
                self.generation,
            )
            self._process = process
            if not told:
                task_status.started(None)
            status = await process.wait()
            self._log.warning(
                "preloader (pid %d) has ended (%s): the next worker is started by exec, and a new preloader with it",
                process.pid,
                _describe(status),
            )
            return None
        finally:
            self._process = None
            await process.end()
            self.pid = None

    async def _load(self, process: _Process) -> GiveUp | str | None:
        patience = boot_patience(self._orders.config)  # as a worker would get that imports the app itself
        with trio.move_on_after(patience) as scope:
            message = await process.load(self._orders)
            if message is None or message.get("is") == "failed":
                status = await process.wait()
        if scope.cancelled_caught:
            return self._fall_back(f"importing the app has taken longer than {patience:g} s")
        match message:
            case {"is": "loaded"}:
                return None
            case {"is": "threads", "names": list(names)}:
                return self._fall_back(
                    f"importing the app has started {_count(names)} ({', '.join(map(str, names))}), which a fork "
                    "would not take along; start them in the app's lifespan instead, or serve without --preload"
                )
            case None | {"is": "failed"} if status in BOOT_FAILURES:
                ended = f"preloader (pid {process.pid}) ended with {status}: {BOOT_FAILURES[status]}"
                said = f": {clean(message['error'], MOST_OF_A_REASON)}" if message else ""
                return GiveUp(status, ended + said)
            case None | {"is": "failed"}:
                return self._fall_back(
                    f"the process that was to import the app has ended ({_describe(status)})"
                )
            case other:
                return self._fall_back(f"the preloader has said what cannot be understood ({other})")

    def _fall_back(self, reason: str) -> str:
        self._log.warning(
            "no preloading: %s; workers of generation %d are started by exec", reason, self.generation
        )
        return reason

    def fork(self, inherited: Sequence[int]) -> int:
        """Have a worker forked that has these descriptors; returns its process id, which is a child of ours.

        This blocks for as long as a fork takes, some milliseconds, and never longer than `_FORK_PATIENCE`: what starts
        a worker is synchronous, so that nobody can see a worker that is neither there nor missing.

        Raises:
            ForkRefused: there is no process, or it has failed; this has been logged.
        """
        process = self._process
        if process is None:
            self._wanted.set()
            raise ForkRefused("there is no preloader")
        try:
            return process.fork(inherited)
        except (OSError, EOFError, ValueError) as error:
            self._log.warning("preloader (pid %d) does not fork (%r): ending it", process.pid, error)
            self._process = None
            self._wanted.set()
            process.kill()
            raise ForkRefused(str(error)) from error
        except ForkRefused as error:
            self._log.warning("preloader (pid %d) could not fork: %s", process.pid, error)
            raise

    def close(self) -> None:
        """No more workers of this generation: end the process."""
        self._scope.cancel(reason="its generation is over")


class _Process:
    """One preloading process: its socket and its end."""

    def __init__(self, orders: Orders) -> None:
        ours, theirs = socket.socketpair()
        try:
            pid = spawn_worker("preloader", orders.environment, [theirs.fileno()], FIRST_INHERITED)
            self._process = ChildProcess(pid)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.pid = pid
        self._sock = ours
        # For what may take long. In between the socket is read directly, which is safe as each message is an answer.
        self._link = JsonLines(ours, limit=MESSAGE_LIMIT)
        self._idle = False

    async def load(self, orders: Orders) -> dict[str, object] | None:
        """Have it import the app; returns what it says then, or None if it has ended instead."""
        try:
            await self._link.send({"application": orders.application, "settings": packed(orders.config)})
            message = await self._link.receive()
        except OSError:
            return None
        except BadMessage as error:
            return {"is": str(error)}
        self._idle = True
        return message

    def fork(self, inherited: Sequence[int]) -> int:
        self._sock.settimeout(_FORK_PATIENCE)
        socket.send_fds(self._sock, [b'{"do":"fork"}\n'], list(inherited))
        answer = b""
        while not answer.endswith(b"\n"):
            part = self._sock.recv(4096)
            if not part:
                raise EOFError("it has ended")
            answer += part
        found = json.loads(answer)
        if found.get("is") != "forked":
            raise ForkRefused(found.get("error"))
        return int(found["pid"])

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)

    async def wait(self) -> int:
        return await self._process.wait()

    async def end(self) -> None:
        """It ends by itself when it is idle, and at once otherwise: it holds nothing that could be lost."""
        self._link.close()
        if not self._idle:
            self.kill()
        with trio.CancelScope(shield=True):
            with trio.move_on_after(_END_PATIENCE):
                await self.wait()
            if self._process.status is None:
                self.kill()
                await self.wait()
        self._process.close()


def _count(names: list[object]) -> str:
    return "1 thread" if len(names) == 1 else f"{len(names)} threads"


def _describe(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit code {status}"
