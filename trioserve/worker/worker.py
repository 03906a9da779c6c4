"""A worker's whole life: bind -> load the app's lifespan -> listen -> wait -> drain -> exit. START READING HERE.

    serve_worker                    hears the caller's cancellation, or his Ctrl-C: it begins the drain
    └─ worker (shield with a deadline)
       ├─ lifespan                 the app's startup and shutdown; its context is the template for requests
       ├─ hub, reaper, flusher
       ├─ trigger                  the caller's shutdown_trigger
       ├─ exit when idle           where that is asked for
       └─ connections nursery      its deadline is set when draining
          ├─ listeners             own scope, cancelled first
          └─ a task per connection

Callers: `trioserve.serve` (library) and `run_command` (the command). Cancelling `serve_worker` drains: requests in
flight get `graceful_timeout`, the app's lifespan its shutdown; then the cancellation goes on its way.
"""

from __future__ import annotations

import errno
import functools
import gc
import logging
import socket
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import trio

from trioserve.asgi.lifespan import Lifespan
from trioserve.asgi.server_names import serve_only
from trioserve.config import Config, resolve_exceptions
from trioserve.config.tls_context import find_certificate_remarks
from trioserve.errors import BindError, LifespanFailed
from trioserve.http import engines
from trioserve.http.flusher import Flusher
from trioserve.http.http1_turn import RequestTurn
from trioserve.http.response import DefaultFields
from trioserve.net.bind import Listeners, bind_config
from trioserve.net.certificates import Certificates
from trioserve.net.epoll_hub import EpollHub
from trioserve.net.hub import open_hub
from trioserve.observe.blocking import LoopWatch
from trioserve.observe.logs import Logs, setup_logs
from trioserve.static.sendfile import FileSender
from trioserve.structure.admission import Admission
from trioserve.structure.blocked_loop import BlockedLoop, LastWords
from trioserve.structure.boundary import Boundary, is_cancellation, is_scope_corruption
from trioserve.structure.context import ASGIApp, WorkerContext
from trioserve.structure.drain import CLEANUP_SECONDS, Drain, DrainState
from trioserve.worker.async_generators import watch_async_generators
from trioserve.worker.handshake import HandshakeTurns
from trioserve.worker.idle import drain_when_idle
from trioserve.worker.listener import Listener

if TYPE_CHECKING:
    from trioserve.static.mounts import StaticMounts

# How long an order to drain may be on its way to a worker whose listening has been ended (seconds).
_ORDER_PATIENCE = 5.0


class Worker:
    """One running worker: its context, its sockets and logs, and the steps of its life.

    Attributes:
        context: the record handed to every task below.
        listeners: the bound sockets.
        certificates: for those that speak TLS.
        trigger_error: what the caller's shutdown trigger raised, or None.
        supervised: a supervisor says where it can be reached, and when there is too little to do for it.
        on_closed: called when a drain has closed the listening sockets.
        left_to_others: the listening sockets, by their place, on which somebody goes on accepting after its drain.
        last_words: what a process that is ours says before the watchdog ends it, its loop being blocked; to be set
            by who owns the process, None where the watchdog may only warn.
    """

    def __init__(
        self, app: ASGIApp, config: Config, logs: Logs, listeners: Listeners, *, owns_process: bool
    ) -> None:
        self.logs = logs
        self.listeners = listeners
        self.config = config
        self.trigger_error: BaseException | None = None
        self.last_words: LastWords | None = None
        self.supervised = False
        self.on_closed: Callable[[], None] = lambda: None
        self.left_to_others: Collection[int] = ()
        self.certificates = Certificates(config) if listeners.secure else None
        self._owns_process = owns_process
        self._mounts: StaticMounts | None = None
        served = app
        if config.static_mounts:
            from trioserve.static.mounts import StaticMounts  # only who serves files needs all of that

            served = self._mounts = StaticMounts(app, config.static_mounts)
        if config.server_names:
            served = serve_only(served, config.server_names)
        self.context = context = WorkerContext(served, config, open_hub(config.hub), logs.error)
        context.access_log = logs.access
        context.boundary = Boundary(
            context,
            contain=resolve_exceptions(config.contain_errors),
            fatal=resolve_exceptions(config.fatal_errors, "fatal_errors"),
        )
        context.new_engine = engines.factory(
            config.http_engine, context.limits, raw_names=config.h11_pass_raw_headers
        )
        context.new_http2_engine = engines.http2_factory(config)
        context.h2c = config.h2c
        context.response_defaults = DefaultFields(
            date=config.include_date_header,
            server=b"trioserve" if config.include_server_header else None,
            others=[(b"alt-svc", value.encode("latin-1")) for value in config.alt_svc_headers],
        )
        if self.certificates is not None:
            context.handshake_turns = HandshakeTurns()
        if context.hub.calls_on_writable:
            context.flusher = Flusher()
        context.files = FileSender(context.clock)
        self._turn = RequestTurn(context, context.hub) if isinstance(context.hub, EpollHub) else None
        if config.max_concurrent_requests is not None:
            context.admission = Admission(
                config.max_concurrent_requests, config.request_queue_size, config.request_queue_timeout
            )
        self.lifespan = Lifespan(
            app, config.lifespan, context.state, logs.error, context.boundary.judge_lifespan
        )
        self._listening = trio.CancelScope()

    def __repr__(self) -> str:
        return f"<Worker {self.context.drain.state.value} connections={len(self.context.connections)}>"

    @property
    def drain(self) -> Drain:
        """The worker's end."""
        return self.context.drain

    # -- the life, top to bottom -----------------------------------------------------------------------------

    async def run(
        self,
        *,
        shutdown_trigger: Callable[..., Awaitable[object]] | None = None,
        task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until drained. Raises what startup raised; a later failure is in the boundary's `failure`."""
        context = self.context
        try:
            with self._watching_generators():
                async with trio.open_nursery() as structure:
                    structure.start_soon(context.hub.run, name="hub")
                    structure.start_soon(context.deadlines.run, name="reaper")
                    if context.handshake_turns is not None:
                        structure.start_soon(context.handshake_turns.run, name="handshakes")
                    if context.flusher is not None:
                        structure.start_soon(context.flusher.run, name="flusher")
                    if await self._start_lifespan(structure):
                        await self._serve_connections(structure, shutdown_trigger, task_status)
                    else:
                        await self._stop_lifespan()
                    structure.cancel_scope.cancel(reason="the worker has drained")
        finally:
            self._unwatch_loop()
            self.drain.advance(DrainState.STOPPED)
            context.hub.close()
            context.files.close()
            if self._mounts is not None:
                self._mounts.close()

    def _watching_generators(self) -> AbstractContextManager[None]:
        if not self._owns_process:
            return nullcontext()
        boundary = self.context.boundary
        return watch_async_generators(functools.partial(boundary.judge, "B2"))

    async def _start_lifespan(self, nursery: trio.Nursery) -> bool:
        """Run the app's startup; False if the worker is asked to end before the app is ready."""
        async with trio.open_nursery() as starting:
            starting.start_soon(self._give_up_startup, starting.cancel_scope)
            try:
                await self.lifespan.startup(nursery, self.config.startup_timeout)
            except LifespanFailed:
                self.drain.begin("the app's startup failed", grace=0, fatal=True)
                raise
            starting.cancel_scope.cancel(reason="startup is complete")
        if self.lifespan.context is not None:
            self.context.base_context = self.lifespan.context
        if self.drain.state is DrainState.RUNNING:
            return True
        self.logs.error.info("ending before the app's startup was complete: %s", self.drain.reason)
        return False

    async def _give_up_startup(self, scope: trio.CancelScope) -> None:
        await self.drain.wait(DrainState.DRAINING)
        self.listeners.close()  # the app may take its time: nobody is to be queued for who will not serve
        scope.cancel(reason=self.drain.reason)

    async def _serve_connections(
        self,
        structure: trio.Nursery,
        shutdown_trigger: Callable[..., Awaitable[object]] | None,
        task_status: trio.TaskStatus[list[str]],
    ) -> None:
        context = self.context
        self.listeners.listen(self.config.backlog)
        if self._owns_process:
            # What lives now lives as long as the worker: the collector need not look at it again.
            gc.collect()
            gc.freeze()
        with _dropping_scope_corruption():
            async with trio.open_nursery() as connections:
                if self._turn is not None:
                    self._turn.open(connections.start_soon)
                listeners = self._make_listeners(connections)
                connections.start_soon(self._listen, listeners, name="listeners")
                if not self.supervised:
                    for address in self.listeners.addresses():
                        self.logs.error.info("Running on %s (CTRL + C to quit)", address)
                task_status.started(self.listeners.addresses())
                self._watch_loop()
                if shutdown_trigger is not None:
                    structure.start_soon(self._await_trigger, shutdown_trigger, name="shutdown trigger")
                if (
                    self._owns_process
                    and not self.supervised
                    and (seconds := self.config.exit_when_idle) is not None
                ):
                    structure.start_soon(drain_when_idle, context, seconds, name="exit when idle")
                await self.drain.wait(DrainState.DRAINING)
                # What cancels the connections must not cancel the steps of the end.
                with trio.CancelScope(shield=True, deadline=_last_moment(self)):
                    await self._drain(listeners, connections)
                    await self._stop_lifespan()
                connections.cancel_scope.cancel(reason="the worker has drained")

    def _make_listeners(self, connections: trio.Nursery) -> list[Listener]:
        is_secure = self.listeners.is_secure
        return [
            Listener(self.context, sock, connections, self.certificates if is_secure(sock) else None)
            for sock in self.listeners.sockets
        ]

    def reload_certificates(self) -> str:
        """Read certificates and keys again; returns what went wrong, or "". Open connections keep what they have."""
        log = self.logs.error
        if self.certificates is None:
            return "there is no TLS here"
        try:
            self.certificates.reload()
        except (
            Exception
        ) as error:  # a ConfigError, or what a subclass of Config raises: the old ones are good
            log.error("certificates are not reloaded, serving on with the old ones: %s", error)
            return str(error)
        log.info("certificates are reloaded")
        for severe, text in find_certificate_remarks(self.config):
            log.log(logging.ERROR if severe else logging.WARNING, "%s", text)
        return ""

    def _watch_loop(self) -> None:
        """From here until the lifespan's shutdown: around these an app may block, and other deadlines hold."""
        warn_after = self.config.block_warn
        kill_after = None if self.last_words is None else self.config.block_kill
        if warn_after is not None or kill_after is not None:
            watch = LoopWatch(warn_after, kill_after, BlockedLoop(self.context, self.last_words))
            try:
                watch.start()
            except RuntimeError:
                self.logs.error.warning(
                    "no thread can be started to watch the event loop (pids.max, TasksMax, ulimit -u?): "
                    "block_warn and block_kill have no effect"
                )
            else:
                self.context.loop_watch = watch

    def _unwatch_loop(self) -> None:
        if self.context.loop_watch is not None:
            self.context.loop_watch.stop()

    async def _listen(self, listeners: list[Listener]) -> None:
        with self._listening:
            async with trio.open_nursery() as nursery:
                for listener in listeners:
                    nursery.start_soon(self._run_listener, listener, name=repr(listener))

    async def _run_listener(self, listener: Listener) -> None:
        try:
            await listener.run()
        except OSError as error:
            if self.supervised and error.errno == errno.EINVAL:
                # A supervisor that ends us before we are ready ends the listening, too, and may have taken us for that.
                with trio.move_on_after(_ORDER_PATIENCE):
                    await self.drain.wait(DrainState.DRAINING)
                    return
            self.context.boundary.judge("S3", error)

    async def _await_trigger(self, shutdown_trigger: Callable[..., Awaitable[object]]) -> None:
        try:
            await shutdown_trigger()
        except BaseException as error:
            if is_cancellation(error):
                raise
            # The caller's own: it comes out of `serve()`, but requests in flight need not suffer from it.
            self.trigger_error = error
            self.drain.begin(f"the shutdown trigger raised {type(error).__name__}")
        else:
            self.drain.begin("the shutdown trigger")

    # -- the end ---------------------------------------------------------------------------------------------

    async def _drain(self, listeners: list[Listener], connections: trio.Nursery) -> None:
        """DRAINING: stop accepting, close the idle, wait for the busy; then CANCELLING."""
        context = self.context
        drain = self.drain
        self.logs.error.info("draining: %s; %d requests in flight", drain.reason, context.in_flight)
        # A load balancer may need a moment to notice; what it still sends meanwhile is accepted and served.
        await drain.wait_delay()
        context.draining = True
        self._listening.cancel(reason="draining")
        for place, listener in enumerate(listeners):
            if place in self.left_to_others or (self.supervised and drain.cut_lifespan):
                continue  # a sibling or a successor has more time for them than we have
            # What the kernel has queued was accepted on our behalf: serve it, or its clients get a reset.
            try:
                listener.accept_last()
            except OSError as error:
                self.logs.error.debug("last accept: %s", error)
        self.listeners.close()
        self.on_closed()
        for connection in list(context.connections):
            connection.wake_for_drain()
        async with trio.open_nursery() as grace:
            grace.start_soon(self._wait_until_closed, grace.cancel_scope)
            await self._cancel_after_grace(connections)
            grace.cancel_scope.cancel(reason="the drain's time is over")

    async def _wait_until_closed(self, scope: trio.CancelScope) -> None:
        while self.context.connections:
            await self.context.room.park()
        scope.cancel(reason="all connections are closed")

    async def _cancel_after_grace(self, connections: trio.Nursery) -> None:
        await self.drain.wait_grace()
        self.drain.advance(DrainState.CANCELLING)
        self._log_cut()
        connections.cancel_scope.cancel(reason=f"drain: {self.drain.reason}")
        await trio.sleep(CLEANUP_SECONDS)
        self.logs.error.error(
            "%d cancelled requests do not end (a shield, or Cancelled was caught); not waiting for them",
            self.context.in_flight,
        )

    def _log_cut(self) -> None:
        """Say which requests did not make it."""
        cut = [found for connection in self.context.connections for found in connection.in_flight()]
        if not cut:
            return
        self.logs.error.warning("%d requests were cut by the drain after %g s:", len(cut), self.drain.grace)
        for served, exchange in cut[:100]:
            facts = exchange.describe()
            self.logs.error.warning(
                "  cut: %s %s after %.1f s, response %s, phase %s, connection %d",
                facts["method"],
                facts["path"],
                facts["elapsed"],
                facts["response"],
                served.phase,
                served.id,
            )

    async def _stop_lifespan(self) -> None:
        self._unwatch_loop()
        if self.drain.cut_lifespan:
            self.logs.error.warning("lifespan shutdown is skipped: the process's state cannot be trusted")
            return
        await self.lifespan.shutdown(self.config.shutdown_timeout)


@contextmanager
def _dropping_scope_corruption() -> Iterator[None]:
    """Row B1 was judged when it was found; trio repeats it when the connection's task ends (`connection.py`)."""
    try:
        yield
    except BaseExceptionGroup as group:
        rest = group.split(is_scope_corruption)[1]
        if rest is not None:
            raise rest from None


async def serve_worker(
    app: ASGIApp,
    config: Config,
    *,
    sockets: Iterable[socket.socket] | Listeners | None = None,
    shutdown_trigger: Callable[..., Awaitable[object]] | None = None,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
    on_worker: Callable[[Worker], None] | None = None,
    library: bool = False,
) -> Worker:
    """Run one worker to its end and return it, for the caller to read `context.boundary.failure`.

    Args:
        app: ASGI 3.
        config: validated.
        sockets: bound sockets to use instead of `config.bind`; those of a `Listeners` become the worker's to close.
        shutdown_trigger: the worker drains when this returns.
        task_status: told the bound addresses once connections are accepted.
        library: the process is the caller's, so settings about processes are none of our business.
        on_worker: called with the worker as soon as it exists (signals and the hard exit hold on to it).

    Raises:
        BindError, LifespanFailed: it could not start.
        trio.Cancelled, KeyboardInterrupt: the caller's, after the drain.
    """
    listeners = sockets if isinstance(sockets, Listeners) else bind_config(config, sockets)
    try:
        logs = setup_logs(config)
    except BaseException:
        listeners.close()
        raise
    try:
        if not library:
            logs.take_parts()
        for level, advice in config.advice(library=library):
            logs.error.log(level, "%s", advice)
        worker = Worker(app, config, logs, listeners, owns_process=not library)
        if on_worker is not None:
            on_worker(worker)
        shield = trio.CancelScope(shield=True)
        worker.drain.on_begin(lambda: setattr(shield, "deadline", _last_moment(worker)))

        async def run_shielded() -> None:
            with shield:
                await worker.run(shutdown_trigger=shutdown_trigger, task_status=task_status)
            outer.cancel_scope.cancel(reason="the worker has ended")

        async with trio.open_nursery() as outer:
            outer.start_soon(run_shielded, name="worker")
            # Not in the worker's own task: this may be the main task of trio.run, in which Ctrl-C is raised.
            await _drain_on_cancel(worker)
    except BaseExceptionGroup as group:
        found = _unwrap(group)
        raise found from found.__cause__
    finally:
        listeners.close()
        logs.close(CLEANUP_SECONDS)
    if worker.trigger_error is not None:
        raise worker.trigger_error
    return worker


async def _drain_on_cancel(worker: Worker) -> None:
    try:
        await trio.sleep_forever()
    finally:
        worker.drain.begin("cancelled by the caller")


def _last_moment(worker: Worker) -> float:
    """A shield has a deadline: once the end has begun, this is when it comes at the latest."""
    return worker.drain.deadline + 2 * CLEANUP_SECONDS + worker.config.shutdown_timeout


def _unwrap(group: BaseExceptionGroup[Any]) -> BaseException:
    """The single exception inside groups that only our own nurseries made; otherwise the group."""
    current: BaseException = group
    while isinstance(current, BaseExceptionGroup) and len(current.exceptions) == 1:
        current = current.exceptions[0]
    plain = LifespanFailed | BindError | trio.Cancelled | KeyboardInterrupt
    return current if isinstance(current, plain) else group
