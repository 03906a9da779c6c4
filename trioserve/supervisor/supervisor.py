"""The supervisor: bind, start the workers, keep them alive, stop. The parent process is a trio program.

Called by `cli.py`. Read this file first, then `pool.py` (how many workers there are), `worker_process.py` (one of
them), `restart_policy.py` (when one more is worth a try) and `renewal.py` (reloads). The app is never imported here,
so that no bug of it can take the parent along. Signals, in any order and number, do what `_SIGNALS` says.

While nothing happens nothing runs: every task waits for a signal, a message, an exit, or a deadline.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
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
from trioserve.supervisor.child_process import check_workers_can_run
from trioserve.supervisor.control import default_path, serve_control
from trioserve.supervisor.exits import ExitDesk
from trioserve.supervisor.operations import Operations
from trioserve.supervisor.pool import WorkerPool
from trioserve.supervisor.preload import Preloads
from trioserve.supervisor.reaper import become_subreaper, reap_orphans
from trioserve.supervisor.reload import Reloader
from trioserve.supervisor.renewal import Renewals, without_requests
from trioserve.supervisor.restart_policy import GiveUp, RestartPolicy
from trioserve.supervisor.scaling import Scaling, wanted_workers
from trioserve.supervisor.sockets import SocketStore
from trioserve.supervisor.upgrade import Predecessor, Upgrade, take_upgrade
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
    predecessor = take_upgrade(os.environ)
    store = SocketStore()
    supervisor = None
    try:
        remarks = _open_sockets(store, config, predecessor)
        # From here on nobody is root: not the workers, and not who opens the files that they are to reopen.
        if drop_privileges(config.user, config.group):
            config.check_places()
            check_workers_can_run()
        supervisor = Supervisor(config, application, reload_config, store, predecessor)
        for remark in remarks:
            supervisor.log.info("%s", remark)
        return supervisor.run_to_end()
    finally:
        if predecessor is not None and supervisor is None:
            store.hand_over()  # we never took over: the socket files are still our predecessor's
        store.close()


def _open_sockets(store: SocketStore, config: Config, predecessor: Predecessor | None) -> list[str]:
    """Have the listening sockets; returns what the log should say of them."""
    if predecessor is not None:
        store.take_over(predecessor.sockets)
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


class Supervisor:
    """The parent of the workers.

    Attributes:
        pool: the workers.
        config: in force; a reload replaces it.
        store: the listening sockets.
        predecessor: whose place we are to take once we are ready, or None.
        upgrade_under_way: the supervisor that is to take ours, or None.
        state: "starting", "running", "draining".
    """

    def __init__(
        self,
        config: Config,
        application: str,
        reload_config: Callable[[], Config],
        store: SocketStore,
        predecessor: Predecessor | None,
    ) -> None:
        packed(config)  # what no worker could be told is an error of the start, not of a worker's
        self.config = config
        self.store = store
        self.predecessor = predecessor
        self.state = "starting"
        self.logs = setup_logs(without_requests(config))
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
        limits = wanted_workers(config.workers)
        wanted = limits[0]
        if predecessor is not None and predecessor.limits == limits:
            wanted = predecessor.wanted  # what was changed by hand stays, as in a reload
        self.pool = WorkerPool(self.orders(1), wanted, self.policy, self.desk, self.log)
        self.scaling = Scaling(self.pool, self.log)
        self.scaling.set(config.workers)
        self.directory = WorkingDirectory(os.environ)
        self.preloads: Preloads
        self._application = application
        self._reload_config = reload_config
        self._renewals: Renewals
        self._stops = 0
        self.upgrade_under_way: Upgrade | None = None
        self._upgrade_waits = False
        self._replaced = False
        self._reaping = False
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
                self.preloads = Preloads(nursery, self.log)
                self._renewals = Renewals(self, nursery, self._reload_config)
                self.pool.on_failure = lambda: self.drain("giving up")
                self.pool.changed = self._tell_status
                nursery.start_soon(self._handle_signals, received, name="signals")
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
                self._renewals.begin()
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
            # Whatever a reload makes of the configuration meanwhile, this is what our workers serve on now.
            served = {sock for worker in self.pool.ready() for sock in worker.sockets}
            self.predecessor.replace(self.store.unserved(served))
            self.predecessor = None
            # What it has bound and we do not is nobody's any more; a reload that may yet be taken back knows when.
            if not self._renewals.is_running:
                self.pool.abandon(self.store.drop_others(self.config))
            elif not self._renewals.is_undecided:
                self.pool.abandon(self.store.retire_others(self.config))
        self.notifier.ready(self.status_text())

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
            self.notifier.status(self.status_text())

    def status_text(self) -> str:
        """For the service manager."""
        pool = self.pool
        degraded = ", degraded" if self.policy.degraded_reason(trio.current_time()) else ""
        return f"{len(pool.ready())} of {pool.wanted} workers ready, generation {pool.orders.generation}{degraded}"

    def _children(self) -> set[int]:
        found = {worker.pid for worker in self.pool.workers.values()}
        found |= self.preloads.pids()
        return found | ({self.upgrade_under_way.pid} if self.upgrade_under_way is not None else set())

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
        if self.upgrade_under_way is not None:
            self.upgrade_under_way.call_off()  # whoever ends us does not want another one instead
        if not self._replaced:
            self.notifier.stopping(f"draining: {reason}")
        self.log.info("draining %d workers: %s", len(self.pool.workers), reason)
        # Before the workers hear of it: who connects once the last of them has stopped to accept is to be turned away,
        # not to be queued for nobody and reset when all is over.
        released = self.store.leave_to_workers(self.config)
        if self.upgrade_under_way is None and self.predecessor is None:
            self.pool.abandon(released)
        else:
            for sock in released:
                sock.close()  # and no more: workers of the other one may be listening, too
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

    def request_reload(self, reason: str) -> None:
        """Reload configuration and app, worker by worker."""
        self._renewals.request(reason)

    async def reload(self, reason: str) -> str:
        """As `request_reload`; returns when it is over, with what went wrong, or ""."""
        renewal = self._renewals.request(reason)
        await renewal.done.wait()
        return renewal.error

    def upgrade(self, reason: str) -> None:
        """Start a new supervisor from the code that is installed now, and leave once it is ready."""
        # Who is yet to take over would leave a predecessor behind that waits for it in vain.
        is_upgrading = self.upgrade_under_way is not None or self.predecessor is not None
        if is_upgrading or self._upgrade_waits or self.pool.stopping:
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
        if self._renewals.is_undecided:
            # The successor is told what is bound, and of that not all may stay, nor all come.
            self.log.info(
                "%s: the upgrade waits until the reload under way has workers that serve, or has failed",
                reason,
            )
            self._upgrade_waits = True
            self._nursery.start_soon(self._upgrade_once_decided, reason, name="upgrade")
        else:
            self._begin_upgrade(reason)

    async def _upgrade_once_decided(self, reason: str) -> None:
        while self._renewals.is_undecided:
            await self._renewals.wait_decided()
        self._upgrade_waits = False
        if self.pool.stopping:
            self.log.warning("no upgrade (%s): the server is stopping", reason)
        else:
            self._begin_upgrade(reason)

    def _begin_upgrade(self, reason: str) -> None:
        self.log.info("upgrading: %s", reason)
        try:
            with self.directory.entered():  # a new release may fail, and our workers are of the old one
                self.upgrade_under_way = Upgrade(
                    self.store,
                    (self.scaling.low, self.scaling.high),
                    self.pool.wanted,
                    self._successor_environment(),
                )
        except (OSError, ConfigError) as error:
            self.log.error("upgrade failed, serving on as before: %s", error)
            return
        self.log.info("the new supervisor is pid %d", self.upgrade_under_way.pid)
        self._nursery.start_soon(self._follow_upgrade, self.upgrade_under_way, name="upgrade")

    async def _follow_upgrade(self, upgrade: Upgrade) -> None:
        error_text = await upgrade.wait_ready()
        pid, self.upgrade_under_way = upgrade.pid, None
        if error_text:
            self.log.error("upgrade failed, serving on as before: %s", error_text)
            return
        self.log.info("the new supervisor (pid %d) is ready", pid)
        self.notifier.main_pid(pid)
        self.pool.handed_over = self.store.hand_over(upgrade.dropped)
        self._replaced = True  # the service does not stop
        if not self.pool.stopping:
            self.drain(f"replaced by pid {pid}")

    def _successor_environment(self) -> dict[str, str]:
        """Ours, but the service manager's variables are for who is its main process by then."""
        return {**clean_environment(os.environ), **self.notifier.successor_environment()}

    # -- what workers are started with -----------------------------------------------------------------------

    def orders(self, generation: int) -> Orders:
        """Those of a generation with the configuration in force."""
        return Orders(
            self.application,
            self.config,
            generation,
            self.store.sockets_for(self.config),
            self.board,
            self.environment,
            plain=self.store.plain_for(self.config),
        )

    async def prepared(self, orders: Orders) -> Orders | GiveUp:
        """The orders once workers can be started with them: where the app is preloaded, it is loaded then."""
        if not orders.config.preload:
            return orders
        try:
            become_subreaper()
        except OSError as error:
            self.log.warning("no preloading: %s; workers are started by exec", error)
            return orders
        self._reap_orphans()
        return await self.preloads.prepare(orders)


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
