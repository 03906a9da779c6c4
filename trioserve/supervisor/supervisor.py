"""The supervisor: bind, start the workers, keep them alive, stop. The parent process is a trio program.

Called by `cli.py`. Read this file first, then `pool.py` (how many workers there are), `worker_process.py` (one of
them) and `restart_policy.py` (when one more is worth a try). The app is never imported here, so that no bug of it
can take the parent along. Signals, in any order and number, do what `_SIGNALS` says.

While nothing happens nothing runs: every task waits for a signal, a message, an exit, or a deadline.
"""

from __future__ import annotations

import copy
import logging
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import trio

from trioserve import signals
from trioserve.config import Config
from trioserve.errors import EXIT_SERVER_BUG, ConfigError, TrioserveError
from trioserve.net.activation import activated_sockets
from trioserve.net.share_board import ShareBoard
from trioserve.observe.logs import setup_logs
from trioserve.observe.notify import Notifier, clean_environment, run_watchdog
from trioserve.observe.privileges import drop_privileges
from trioserve.observe.process import explain, pid_file
from trioserve.supervisor.control import default_path, serve_control
from trioserve.supervisor.exits import ExitDesk
from trioserve.supervisor.operations import Operations
from trioserve.supervisor.pool import WorkerPool
from trioserve.supervisor.preload import Preloads
from trioserve.supervisor.reaper import become_subreaper, reap_orphans
from trioserve.supervisor.reload import Reloader
from trioserve.supervisor.restart_policy import GiveUp, RestartPolicy
from trioserve.supervisor.scaling import Scaling, wanted_workers
from trioserve.supervisor.sockets import SocketStore, take_upgrade
from trioserve.supervisor.upgrade import Upgrade
from trioserve.supervisor.worker_process import Orders, packed
from trioserve.supervisor.working_directory import WorkingDirectory
from trioserve.worker.claim import activation_remarks, chooses_by_number


def run_supervisor(config: Config, application: str, reload_config: Callable[[], Config]) -> int:
    """Serve `application` with worker processes; returns the process's exit code.

    Args:
        config: validated.
        application: as on the command line; only workers import it.
        reload_config: reads the configuration again, from the same flags, environment and file.

    Raises:
        BindError, ConfigError: it could not start.
    """
    upgrade = take_upgrade(os.environ)
    store = SocketStore()
    supervisor = None
    try:
        remarks = _open_sockets(store, config, upgrade[0] if upgrade else None)
        # From here on nobody is root: not the workers, and not who opens the files that they are to reopen.
        if drop_privileges(config.user, config.group):
            config.check_places()
        supervisor = Supervisor(config, application, reload_config, store)
        for remark in remarks:
            supervisor.log.info("%s", remark)
        if upgrade is not None:
            supervisor.predecessor = upgrade[1]
        return supervisor.run_to_end()
    finally:
        if upgrade is not None and supervisor is None:
            store.hand_over()  # we never took over: the socket files are still our predecessor's
        store.close()


def _open_sockets(store: SocketStore, config: Config, inherited: dict[str, list[int]] | None) -> list[str]:
    """Have the listening sockets; returns what the log should say of them."""
    if inherited is not None:
        store.take_over(inherited)
        if store.is_activated:
            return []
    elif not chooses_by_number(config):
        # As in a worker of its own (`worker/claim.py`): what the service manager passes replaces `bind`.
        sockets = activated_sockets(os.environ, os.getpid())
        if sockets:
            remarks = activation_remarks(config, sockets)
            store.adopt_activated(sockets)
            return remarks
    store.open(config)
    return []


@dataclass(slots=True)
class _Reload:
    """One that has been asked for, and how it went."""

    reason: str
    error: str = ""
    done: trio.Event = field(default_factory=trio.Event)


class Supervisor:
    """The parent of the workers.

    Attributes:
        pool: the workers.
        config: in force; a reload replaces it.
        store: the listening sockets.
        predecessor: a descriptor to tell that we are ready to take over, or None.
        state: "starting", "running", "draining".
    """

    def __init__(
        self, config: Config, application: str, reload_config: Callable[[], Config], store: SocketStore
    ) -> None:
        packed(config)  # what no worker could be told is an error of the start, not of a worker's
        self.config = config
        self.store = store
        self.predecessor: int | None = None
        self.state = "starting"
        self.logs = setup_logs(_without_requests(config))
        self.log: logging.Logger = self.logs.error
        self.board = ShareBoard.create()
        self.environment = clean_environment(os.environ)
        self.reloader = Reloader(self) if config.use_reloader else None
        if self.reloader is not None:
            # A .pyc belongs to its source by size and second: of two saves in a second it may be the wrong one.
            self.environment = {**self.environment, "PYTHONDONTWRITEBYTECODE": "1"}
        self.notifier = Notifier(os.environ, self.log)
        self.pid = os.getpid()
        self.started_at = 0.0
        self.desk = ExitDesk(config.crash_dir, self.log)
        self.policy = RestartPolicy()
        least, _ = wanted_workers(config.workers)
        self.pool = WorkerPool(self._orders(1), least, self.policy, self.desk, self.log)
        self.scaling = Scaling(self.pool, self.log)
        self.scaling.set(config.workers)
        self.generation = 1
        self._application = application
        self._first_config = config
        self._reload_config = reload_config
        self._directory = WorkingDirectory(os.environ)
        self._stops = 0
        self._upgrade: Upgrade | None = None
        self._replaced = False
        self._reloading = trio.Lock()
        self._next_reload: _Reload | None = None  # waits for its turn
        self._may_reload = trio.Event()  # the pool is about to run, or to be kept from it by the preloading
        self._reaping = False
        self._preloads: Preloads
        self._nursery: trio.Nursery

    def run_to_end(self) -> int:
        """`trio.run` and what comes before and after it; returns the exit code."""
        try:
            for level, advice in self.config.advice():
                self.log.log(level, "%s", advice)
            # Whoever has us ignore it would have the kernel throw away how the workers ended.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            trio.run(self.run)
        except TrioserveError as error:
            explain(error)
            return error.exit_code
        except Exception:
            self.log.critical("the supervisor has failed; its workers notice and drain", exc_info=True)
            return EXIT_SERVER_BUG
        finally:
            if self.predecessor is not None:
                self.store.hand_over()  # as above
            self.store.close()  # before what may take long: whoever loses patience now would leave socket files
            self.board.close()
            self.logs.close(2.0)
        return self.pool.exit_code

    async def run(self) -> None:
        """The whole life."""
        self.started_at = trio.current_time()
        # Whoever reads the file may send signals at once: they must not find a process that does not expect them.
        ending = signals.Ending(_SIGNALS)
        with trio.open_signal_receiver(*_SIGNALS) as received, ExitStack() as self._at_end:
            if self.predecessor is None:  # otherwise the file is its, until we take over
                self._at_end.enter_context(pid_file(self.config.pid_path))
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self.pool.on_failure = lambda: self.drain("giving up")
                self.pool.changed = self._tell_status
                nursery.start_soon(self._handle_signals, received, name="signals")
                self._preloads = Preloads(nursery, self.log)
                if os.getpid() == 1:
                    self._reap_orphans()
                nursery.start_soon(self._serve_control, name="control")
                nursery.start_soon(run_watchdog, self.notifier, self.is_healthy, name="systemd watchdog")
                nursery.start_soon(self._announce, name="announce")
                if self.config.exit_when_idle is not None:
                    nursery.start_soon(self._stop_when_idle, self.config.exit_when_idle, name="idle")
                nursery.start_soon(self.scaling.run, name="scaling")
                if self.reloader is not None:
                    await nursery.start(self.reloader.run, name="reloader")
                if self.config.preload:
                    self.pool.holding = True
                    nursery.start_soon(self._preload_first, name="preload")
                else:
                    self._may_reload.set()
                await self.pool.run()
                ending.decide()
                nursery.cancel_scope.cancel(reason="all workers have ended")
        self.log.info("stopped")

    @property
    def application(self) -> str:
        """What workers import."""
        return self.config.application_path or self._application

    def is_healthy(self) -> bool:
        """There is at least one worker that serves, or all are still starting or leaving."""
        return bool(self.pool.ready()) or self.state != "running"

    # -- the tasks beside the pool ---------------------------------------------------------------------------

    async def _announce(self) -> None:
        """Say where to find us once the workers accept connections."""
        await self.pool.wait_ready()
        if self.pool.stopping:
            return
        for address in self.store.addresses(self.config):
            self.log.info("Running on %s (CTRL + C to quit)", address)
        if self.state == "starting":
            self.state = "running"
        if self.predecessor is not None:
            try:
                self._at_end.enter_context(pid_file(self.config.pid_path))
            except ConfigError as error:
                self.log.error("%s", error)
            with suppress(OSError):
                os.write(self.predecessor, b"ready")
            os.close(self.predecessor)
            self.predecessor = None
            if not self._reloading.locked():  # else that knows when
                self.store.drop_others(self.config)  # what it has bound and we do not is nobody's any more
        self.notifier.ready(self._status_text())

    async def _serve_control(self) -> None:
        wish = self.config.control
        path = default_path(self.pid) if wish == "auto" else wish
        if path is not None and wish is not None:
            if self.predecessor is not None and wish != "auto":
                await _wait_gone(os.getppid())  # who still listens there
            await serve_control(path, Operations(self), self.log)

    async def _stop_when_idle(self, seconds: float) -> None:
        """End when no worker has had a request for so long; the service manager keeps the socket, and starts us again.

        Wakes when the workers speak, which they do the more seldom the less there is to do.
        """
        await self.pool.wait_ready()
        while (left := self.pool.busy_at + seconds - trio.current_time()) > 0 or self.pool.busy:
            with trio.move_on_after(max(left, 0.0) if not self.pool.busy else seconds):
                await self.pool.wait_change()
        self.drain(f"idle for {seconds:g} s")

    def _tell_status(self) -> None:
        if self.state == "running":
            self.notifier.status(self._status_text())

    def _status_text(self) -> str:
        pool = self.pool
        degraded = ", degraded" if self.policy.degraded_reason(trio.current_time()) else ""
        return f"{len(pool.ready())} of {pool.wanted} workers ready, generation {pool.orders.generation}{degraded}"

    def _children(self) -> set[int]:
        found = {worker.pid for worker in self.pool.workers.values()}
        found |= self._preloads.pids()
        return found | ({self._upgrade.pid} if self._upgrade is not None else set())

    def _reap_orphans(self) -> None:
        if not self._reaping:
            self._reaping = True
            self._nursery.start_soon(reap_orphans, lambda pid: pid in self._children(), name="orphans")

    # -- signals ---------------------------------------------------------------------------------------------

    async def _handle_signals(self, received: Any) -> None:
        async for number in received:
            _SIGNALS[number](self, signal.Signals(number).name)

    def drain(self, reason: str) -> None:
        """Have the workers finish what they have, then end."""
        self.state = "draining"
        if self._upgrade is not None:
            self._upgrade.call_off()  # whoever ends us does not want another one instead
        if not self._replaced:
            self.notifier.stopping(f"draining: {reason}")
        self.log.info("draining %d workers: %s", len(self.pool.workers), reason)
        # Before the workers hear of it: who connects once the last of them has stopped to accept is to be turned away,
        # not to be queued for nobody and reset when all is over.
        self.store.leave_to_workers()
        self.pool.stop(reason)

    def stop(self, reason: str) -> None:
        """Somebody's order. First: drain; again: cancel what still runs; a third time: end the workers at once.

        A drain of our own accord is none: who then says it for the first time does not mean to cut anything.
        """
        self._stops += 1
        if self._stops == 1:
            self.drain(reason)
        elif self._stops == 2:
            self.log.warning("%s again: cancelling what still runs", reason)
            self.pool.hurry(reason)
        else:
            self.log.warning("%s once more: ending the workers at once", reason)
            self.pool.kill(reason)

    def quit(self, reason: str) -> None:
        """Cancel what runs, without a grace; again: end the workers at once."""
        if self._stops == 0:
            self.stop(reason)
        self.stop(reason)

    def reopen_logs(self, _: str = "") -> None:
        """After a rotation."""
        self.logs.reopen()
        self.pool.tell_all("reopen")

    def more_workers(self, reason: str) -> None:
        """One more."""
        self.scale_to(self.pool.wanted + 1, reason)

    def fewer_workers(self, reason: str) -> None:
        """One fewer, but never none."""
        self.scale_to(max(1, self.pool.wanted - 1), reason)

    def scale_to(self, wanted: int, reason: str) -> None:
        """Have this many workers."""
        if self.pool.stopping or wanted == self.pool.wanted:
            self.log.info("%s: staying at %d workers", reason, self.pool.wanted)
            return
        self.log.info("%s: from %d to %d workers", reason, self.pool.wanted, wanted)
        self.pool.scale(wanted)

    def request_reload(self, reason: str) -> _Reload:
        """Reload configuration and app, worker by worker; what is asked while one has yet to begin is asked of it."""
        if self._next_reload is None:
            self._next_reload = _Reload(reason)
            self._nursery.start_soon(self._reload_next, self._next_reload, name="reload")
        else:
            self.log.info("%s: the reload that is to follow will do (%s)", reason, self._next_reload.reason)
        return self._next_reload

    async def reload(self, reason: str) -> str:
        """Read the configuration again and replace all workers; returns what went wrong, or "".

        A configuration that is wrong, or an app whose first worker does not become ready, leaves everything as it is.
        """
        reload = self.request_reload(reason)
        await reload.done.wait()
        return reload.error

    async def _reload_next(self, reload: _Reload) -> None:
        await self._may_reload.wait()
        async with self._reloading:
            self._next_reload = None  # it reads now: who asks from here on may have changed something since
            reload.error = await self._reload_now(reload.reason)
        reload.done.set()

    async def _reload_now(self, reason: str) -> str:
        if self.pool.stopping:
            return "the server is stopping"
        self.log.info("reloading: %s", reason)
        # Before there is anything that serves, the service manager waits for the end of the start, not of this.
        if self.state == "running":
            self.notifier.reloading()
        try:
            with self._directory.entered() as stay:
                error = await self._reload()
                if not error:
                    stay()
        except (OSError, ConfigError) as failure:
            error = str(failure)
        if self.state == "draining":
            self.log.info("the reload ends with the server")
        elif error:
            state = "serving on as before" if self.pool.ready() else "waiting for the next change"
            self.log.error("reload failed, %s: %s", state, error)
        else:
            self.log.info("reloaded: generation %d", self.pool.orders.generation)
        if self.state == "running":
            self.notifier.ready(self._status_text())
        return error

    async def _reload(self) -> str:
        before = self.config
        try:
            config = self._reload_config()
            config.validate()
            packed(config)
            opened = {} if self.store.is_activated else self.store.open(config)
        except TrioserveError as error:
            return str(error)
        except (Exception, SystemExit) as error:
            return f"reading the configuration raised {type(error).__name__}: {error}"
        self.config = config
        self.generation += 1
        failure = await self._roll_out(await self._prepared(self._orders(self.generation)))
        self._preloads.keep(self.pool.orders)
        if failure:
            self.config = before
            self.store.drop(opened)
            return failure
        if self.predecessor is None:  # otherwise they are its, until we take over
            self.store.drop_others(config)
        self._take_over(before, config)
        self._apply_workers(before, config)
        return ""

    async def _roll_out(self, orders: Orders | GiveUp) -> str:
        if isinstance(orders, GiveUp):
            return orders.reason
        if self.pool.stopping:
            return "the server is stopping"
        rollout = self.pool.roll_out(orders)
        await rollout.done.wait()
        return rollout.error

    def _take_over(self, before: Config, config: Config) -> None:
        """The settings that are ours and no worker's."""
        self.desk.crash_dir = config.crash_dir
        first = self._first_config
        left = [name for name in _FOR_LIFE if getattr(config, name) != getattr(first, name)]
        if config.use_reloader and self.reloader is None:
            left.append("use_reloader")
        if config.workers == 0:
            left.append("workers")
        if any(getattr(config, name) != getattr(before, name) for name in _OF_THE_LOG):
            if isinstance(config.errorlog, logging.Logger) or isinstance(first.errorlog, logging.Logger):
                left.append("errorlog")
            else:
                self.log.info("the error log is %s from here on", config.errorlog or "off")
                try:
                    self.logs.change_error_log(_without_requests(config))
                except ConfigError as error:
                    self.log.error("the supervisor's own log stays where it is: %s", error)
        if left:
            self.log.warning(
                "not applied by a reload, but by an upgrade (SIGUSR2) or a restart: %s",
                ", ".join(sorted(left)),
            )

    def _apply_workers(self, before: Config, config: Config) -> None:
        """A changed number of workers counts; one that was changed by hand since stays otherwise."""
        if config.workers != before.workers and config.workers != 0:
            self.scale_to(self.scaling.set(config.workers), "reload")

    def upgrade(self, reason: str) -> None:
        """Start a new supervisor from the code that is installed now, and leave once it is ready."""
        if self._upgrade is not None or self.pool.stopping:
            self.log.warning(
                "%s ignored: %s", reason, "stopping" if self.pool.stopping else "an upgrade is under way"
            )
            return
        if self.pid == 1:
            self.log.error(
                "%s ignored: this is process 1 of its container, which ends with it, and a new supervisor with both. "
                "SIGHUP reloads the configuration and the app; for a new trioserve or Python roll out a new container",
                reason,
            )
            return
        self.log.info("upgrading: %s", reason)
        try:
            with self._directory.entered():  # a new release may fail, and our workers are of the old one
                self._upgrade = Upgrade(self.store, self._successor_environment())
        except (OSError, ConfigError) as error:
            self.log.error("upgrade failed, serving on as before: %s", error)
            return
        self.log.info("the new supervisor is pid %d", self._upgrade.pid)
        self._nursery.start_soon(self._follow_upgrade, self._upgrade, name="upgrade")

    async def _follow_upgrade(self, upgrade: Upgrade) -> None:
        error_text = await upgrade.wait_ready()
        pid, self._upgrade = upgrade.pid, None
        if error_text:
            self.log.error("upgrade failed, serving on as before: %s", error_text)
            return
        self.log.info("the new supervisor (pid %d) is ready", pid)
        self.notifier.main_pid(pid)
        self.store.hand_over()
        self._replaced = self.pool.handed_over = True  # the service does not stop
        if not self.pool.stopping:
            self.drain(f"replaced by pid {pid}")

    def _successor_environment(self) -> dict[str, str]:
        """Ours, but the service manager's variables are for who is its main process by then."""
        return {**clean_environment(os.environ), **self.notifier.successor_environment()}

    # -- what workers are started with -----------------------------------------------------------------------

    def _orders(self, generation: int) -> Orders:
        return Orders(
            self.application,
            self.config,
            generation,
            self.store.sockets_for(self.config),
            self.board,
            self.environment,
            plain=self.store.plain_for(self.config),
        )

    async def _prepared(self, orders: Orders) -> Orders | GiveUp:
        """The orders once workers can be started with them: where the app is preloaded, it is loaded then."""
        if not orders.config.preload:
            return orders
        try:
            become_subreaper()
        except OSError as error:
            self.log.warning("no preloading: %s; workers are started by exec", error)
            return orders
        self._reap_orphans()
        return await self._preloads.prepare(orders)

    async def _preload_first(self) -> None:
        """Let the pool start workers once the app is loaded; nobody reloads before."""
        async with self._reloading:
            self._may_reload.set()
            orders = await self._prepared(self.pool.orders)
            if self.pool.stopping:
                return
            self.pool.holding = False
            if isinstance(orders, GiveUp):
                self.pool.give_up(orders)
            else:
                self.pool.orders = orders
                self.pool.reconcile()


# Settings that are followed once, at the start.
_FOR_LIFE = ("control", "exit_when_idle", "group", "pid_path", "user")

_OF_THE_LOG = ("errorlog", "loglevel", "logconfig", "logconfig_dict")

# What each signal does to a supervisor.
_SIGNALS: dict[int, Callable[[Supervisor, str], object]] = {
    signal.SIGTERM: Supervisor.stop,
    signal.SIGINT: Supervisor.stop,
    signal.SIGQUIT: Supervisor.quit,
    signal.SIGHUP: Supervisor.request_reload,
    signal.SIGUSR1: Supervisor.reopen_logs,
    signal.SIGUSR2: Supervisor.upgrade,
    signal.SIGTTIN: Supervisor.more_workers,
    signal.SIGTTOU: Supervisor.fewer_workers,
}


async def _wait_gone(pid: int) -> None:
    with suppress(OSError):
        descriptor = os.pidfd_open(pid)
        try:
            await trio.lowlevel.wait_readable(descriptor)
        finally:
            os.close(descriptor)


def _without_requests(config: Config) -> Config:
    """For the error log only: requests are the workers' to log."""
    ours = copy.copy(config)
    for name in ("accesslog", "statsd_host"):
        object.__setattr__(ours, name, None)
    return ours
