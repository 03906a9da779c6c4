"""A reload, whoever asks for it: the configuration and the app anew, worker by worker, and what the parent follows.

`supervisor.py` makes one `Renewals`, and passes on to it what SIGHUP, `ctl reload` and the watcher of `reload.py` ask
for. One reload runs at a time, after the first import of an app that is preloaded, and none begins during an upgrade.
What goes wrong in one, a wrong configuration or a new app that does not start, leaves everything as it was.

Cancelled with the supervisor, which has stopped its workers by then.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from trioserve.config import Config
from trioserve.errors import ConfigError, TrioserveError
from trioserve.supervisor.generations import SUPERSEDED
from trioserve.supervisor.restart_policy import GiveUp
from trioserve.supervisor.worker_process import Orders, packed

if TYPE_CHECKING:
    from trioserve.supervisor.supervisor import Supervisor

# Settings that are followed once, at the start.
_FOR_LIFE = ("control", "exit_when_idle", "group", "pid_path", "user")

_OF_THE_LOG = ("errorlog", "loglevel", "logconfig", "logconfig_dict")


@dataclass(slots=True)
class Renewal:
    """One that has been asked for.

    Attributes:
        reason: who has asked first.
        error: why it failed, or "".
        done: set when it is over, either way.
    """

    reason: str
    error: str = ""
    done: trio.Event = field(default_factory=trio.Event)


class Renewals:
    """The reloads of one supervisor.

    Args:
        supervisor: whose configuration and workers they renew.
        nursery: where they run.
        read_config: reads the configuration again, from the same flags, environment and file.
    """

    def __init__(
        self, supervisor: Supervisor, nursery: trio.Nursery, read_config: Callable[[], Config]
    ) -> None:
        self._supervisor = supervisor
        self._nursery = nursery
        self._read_config = read_config
        self._first_config = supervisor.config
        self._generation = supervisor.pool.orders.generation
        self._running = trio.Lock()
        self._next: Renewal | None = None  # waits for its turn
        self._decided = trio.Event()
        self._decided.set()
        self._may_begin = trio.Event()

    def __repr__(self) -> str:
        return f"<Renewals generation={self._generation}{', one under way' if self.is_running else ''}>"

    @property
    def is_running(self) -> bool:
        """One is under way, or the app is being imported for the first time."""
        return self._running.locked()

    @property
    def is_undecided(self) -> bool:
        """One is under way, and may yet leave everything as it was."""
        return not self._decided.is_set()

    async def wait_decided(self) -> None:
        """Return once the one under way, if there is one, has failed, or has workers that serve."""
        await self._decided.wait()

    def begin(self) -> None:
        """The pool is about to run: let it start workers, but not before an app that is preloaded is loaded."""
        if self._supervisor.config.preload:
            self._supervisor.pool.generations.holding = True
            self._nursery.start_soon(self._preload_first, name="preload")
        else:
            self._may_begin.set()

    async def _preload_first(self) -> None:
        """Let the pool start workers once the app is loaded; nobody reloads before."""
        pool = self._supervisor.pool
        async with self._running:
            self._may_begin.set()
            orders = await self._supervisor.prepared(pool.orders)
            if pool.stopping:
                return
            pool.generations.holding = False
            if isinstance(orders, GiveUp):
                pool.give_up(orders)
            else:
                pool.generations.orders = orders
                pool.reconcile()

    # -- one after another -----------------------------------------------------------------------------------

    def request(self, reason: str) -> Renewal:
        """Reload configuration and app, worker by worker; what is asked while one has yet to begin is asked of it."""
        if self._next is None:
            self._next = Renewal(reason)
            self._nursery.start_soon(self._run_next, self._next, name="reload")
        else:
            self._supervisor.log.info(
                "%s: the reload that is to follow will do (%s)", reason, self._next.reason
            )
        return self._next

    async def _run_next(self, renewal: Renewal) -> None:
        await self._may_begin.wait()
        async with self._running:
            while (upgrade := self._supervisor.upgrade_under_way) is not None:
                # The successor has been told what is bound; what is opened from here on would be nobody's.
                self._supervisor.log.info("%s: the reload waits for the upgrade under way", renewal.reason)
                await upgrade.over.wait()
            self._next = None  # it reads now: who asks from here on may have changed something since
            self._decided = trio.Event()
            try:
                renewal.error = await self._run(renewal.reason)
            finally:
                self._decided.set()
        renewal.done.set()

    async def _run(self, reason: str) -> str:
        supervisor = self._supervisor
        if supervisor.pool.stopping:
            supervisor.log.warning("no reload (%s): the server is stopping", reason)
            return "the server is stopping"
        supervisor.log.info("reloading: %s", reason)
        # Before there is anything that serves, the service manager waits for the end of the start, not of this.
        if supervisor.state == "running":
            supervisor.notifier.reloading()
        try:
            with supervisor.directory.entered() as stay:
                error = await self._renew()
                if not error:
                    stay()
        except (OSError, ConfigError) as failure:
            error = str(failure)
        # Failed or not: we may have taken over meanwhile; before that, what our predecessor has bound is its own.
        if supervisor.predecessor is None and not supervisor.pool.stopping:
            supervisor.pool.abandon(supervisor.store.drop_others(supervisor.config))
        if supervisor.state == "draining":
            supervisor.log.info("the reload ends with the server")
        elif error == SUPERSEDED:
            supervisor.log.info("this reload is given up: %s", error)
        elif error:
            state = "serving on as before" if supervisor.pool.ready() else "waiting for the next change"
            supervisor.log.error("reload failed, %s: %s", state, error)
        else:
            supervisor.log.info("reloaded: generation %d", supervisor.pool.orders.generation)
        if supervisor.state == "running":
            supervisor.notifier.ready(supervisor.status_text())
        return error

    # -- one of them -----------------------------------------------------------------------------------------

    async def _renew(self) -> str:
        supervisor = self._supervisor
        before, store = supervisor.config, supervisor.store
        try:
            config = self._read_config()
            config.validate()
            packed(config)
            opened = {} if store.is_activated else store.open(config)
        except TrioserveError as error:
            return str(error)
        except (Exception, SystemExit) as error:
            return f"reading the configuration raised {type(error).__name__}: {error}"
        supervisor.config = config
        self._generation += 1
        failure = await self._roll_out(await supervisor.prepared(supervisor.orders(self._generation)))
        supervisor.preloads.keep(supervisor.pool.orders)
        if failure and supervisor.pool.stopping:
            return failure  # until they end, workers of the new generation serve on what was opened for them
        if supervisor.pool.orders.generation != self._generation:
            supervisor.config = before
            supervisor.pool.abandon(store.drop(opened))
            return failure
        self._follow(before, config)
        # Otherwise one that was changed by hand stays.
        if config.workers != before.workers and config.workers != 0:
            supervisor.scale_to(supervisor.scaling.set(config.workers), "reload")
        return failure

    async def _roll_out(self, orders: Orders | GiveUp) -> str:
        supervisor = self._supervisor
        if isinstance(orders, GiveUp):
            return orders.reason
        if supervisor.pool.stopping:
            return "the server is stopping"
        rollout = supervisor.pool.roll_out(orders)
        await rollout.decided.wait()
        if rollout.proven:
            if supervisor.predecessor is None and not supervisor.pool.stopping:
                # No worker is started there any more: those that are left serve who is queued, and the last one to
                # drain takes the address along. With our copies open, who comes then would be queued until it has
                # ended.
                supervisor.pool.abandon(supervisor.store.retire_others(orders.config))
            self._decided.set()  # otherwise once what was opened for it is closed again
        await rollout.done.wait()
        return rollout.error

    def _follow(self, before: Config, config: Config) -> None:
        """Do what is the supervisor's to do about changed settings, and say which it cannot follow."""
        supervisor = self._supervisor
        supervisor.desk.crash_dir = config.crash_dir
        first = self._first_config
        left = [name for name in _FOR_LIFE if getattr(config, name) != getattr(first, name)]
        if config.use_reloader and supervisor.reloader is None:
            left.append("use_reloader")
        if config.workers == 0:
            left.append("workers")
        if any(getattr(config, name) != getattr(before, name) for name in _OF_THE_LOG):
            if isinstance(config.errorlog, logging.Logger) or isinstance(first.errorlog, logging.Logger):
                left.append("errorlog")
            else:
                supervisor.log.info("the error log is %s from here on", config.errorlog or "off")
                try:
                    supervisor.logs.change_error_log(without_requests(config))
                except ConfigError as error:
                    supervisor.log.error("the supervisor's own log stays where it is: %s", error)
        if left:
            supervisor.log.warning(
                "not applied by a reload, but by an upgrade (SIGUSR2) or a restart: %s",
                ", ".join(sorted(left)),
            )


def without_requests(config: Config) -> Config:
    """For the error log only: requests are the workers' to log."""
    ours = copy.copy(config)
    for name in ("accesslog", "statsd_host"):
        object.__setattr__(ours, name, None)
    return ours
