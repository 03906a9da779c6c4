"""The worker as a whole process: signals, the hard exit, the exit code.

Called by `cli.py` (`run_command`) and `trioserve.run` (`run_app`). Signals, in any order and number:

    SIGTERM, SIGINT   first: drain; second: cancel what still runs; third: exit at once
    SIGQUIT           cancel what runs, as a second SIGTERM does
    SIGUSR1           reopen log files
    SIGHUP            reload is the supervisor's; without one certificates are read anew, if there are any
    others            SIGUSR2, SIGTTIN and SIGTTOU are the supervisor's
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import trio

from trioserve import signals
from trioserve.asgi.load import load_app, wrap_app
from trioserve.config import Config
from trioserve.errors import (
    EXIT_HARD_DRAIN,
    EXIT_OK,
    EXIT_SERVER_BUG,
    LoopBlocked,
    TrioserveError,
)
from trioserve.net.bind import Listeners
from trioserve.net.share_board import Share
from trioserve.observe.blocking import LAST_WORDS, Block, call_within
from trioserve.observe.in_flight import InFlightTable
from trioserve.observe.notify import run_watchdog
from trioserve.observe.process import explain, pid_file
from trioserve.structure.blocked_loop import BlockedLoop, requests_in_flight
from trioserve.structure.boundary import FATAL_GRACE, ROWS, request_facts, worker_facts
from trioserve.structure.context import ASGIApp, Served
from trioserve.structure.crash_report import RequestFacts, WorkerFacts, build_report, emit_report, serialise
from trioserve.structure.drain import CLEANUP_SECONDS, HardExit
from trioserve.worker.claim import Claim, claim_process
from trioserve.worker.parent_link import ParentLink
from trioserve.worker.worker import Worker, serve_worker

# What a process that ends at once still gives its log writer, in seconds.
_LAST_LINES = 0.5

_SIGNALS = ("SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGHUP")

# What the supervisor does on these; without one they are answered in the log. SIGHUP is, too, but has another use.
_NEEDS_SUPERVISOR = {
    "SIGHUP": "reloading",
    "SIGUSR2": "upgrading",
    "SIGTTIN": "a further worker",
    "SIGTTOU": "a worker fewer",
}


def run_command(config: Config, application: str) -> int:
    """Claim sockets and user, load `application` and serve it; returns the process's exit code.

    Raises:
        BindError, ConfigError: a socket cannot be had, or root not be given up.
        AppNotFound: there is no such app.
    """
    claim = claim_process(config)
    try:
        loaded = load_app(application, factory=config.factory)
        return run_app(wrap_app(loaded.app, loaded.mode, config), config, claim=claim)
    finally:
        claim.listeners.close()


@dataclass(frozen=True, slots=True)
class Supervised:
    """What a worker process has of its supervisor.

    Attributes:
        link: the socketpair between them.
        listeners: the inherited sockets, this process's copies: its drain closes them.
        in_flight: the table that tells the supervisor what this process was doing when it was killed.
        share: its part of the connections.
        last_words: a file that the supervisor reads when the process has ended.
        watch_abort: starts to wait, in a thread, for the order to report a blocked loop and end; takes who reports.
    """

    link: ParentLink
    listeners: Listeners
    in_flight: InFlightTable
    share: Share
    watch_abort: Callable[[Callable[[], None]], None]
    last_words: int


def run_app(
    app: ASGIApp, config: Config, supervised: Supervised | None = None, claim: Claim | None = None
) -> int:
    """Serve an ASGI app in a `trio.run` of its own; returns the process's exit code. Problems go to stderr.

    Raises:
        TrioserveError: it could not start, which a `supervised` process has to tell its supervisor, too.
    """
    process = _Process(config, supervised, is_callers=supervised is None and claim is None)
    try:
        if supervised is None:
            process.claim = claim = claim or claim_process(config)
        with pid_file(None if supervised else config.pid_path):
            trio.run(process.main, app)
    except TrioserveError as error:
        if supervised is not None:
            raise
        explain(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BaseException as error:
        # Whatever comes out here has passed by the boundary: it is ours.
        report = build_report(
            row="S2" if isinstance(error, trio.TrioInternalError) else "S1",
            verdict="fatal",
            error=error,
            request=None,
            worker=process.facts(),
            nth=1,
        )
        process.emit(report)
        return EXIT_SERVER_BUG
    finally:
        process.hard_exit.disarm()
        if claim is not None:
            claim.listeners.close()
    return process.exit_code()


class _Started:
    """As `trio.TaskStatus`: passes on that the worker accepts connections, and where."""

    def __init__(self, announce: Callable[[list[str]], None]) -> None:
        self._announce = announce

    def started(self, addresses: list[str] | None = None) -> None:
        """Called by the worker."""
        self._announce(addresses or [])


class _Process:
    """What a worker's process knows besides the worker."""

    def __init__(self, config: Config, supervised: Supervised | None, *, is_callers: bool = False) -> None:
        """`is_callers`: the process is whose who has called `trioserve.run`, and goes on afterwards."""
        self._is_callers = is_callers
        self._config = config
        self._supervised = supervised
        self.claim: Claim | None = None
        self._blocked_loop: BlockedLoop | None = None
        self._worker: Worker | None = None
        self._root: trio.lowlevel.Task | None = None
        self._stops = 0
        self._ended = False
        self._ending: signals.Ending
        self._last_words = threading.Lock()
        self.hard_exit = HardExit(self._report_hard_exit, EXIT_HARD_DRAIN)

    async def main(self, app: ASGIApp) -> None:
        """The root of `trio.run`: the signal handler beside the worker."""
        supervised = self._supervised
        wanted = signals.known(_SIGNALS if supervised is not None else {*_SIGNALS, *_NEEDS_SUPERVISOR})
        if supervised is not None:
            wanted.remove(signal.SIGINT)  # a terminal's Ctrl-C goes to all: the supervisor says what it means
        failure: Exception | None = None
        with self._receiving(wanted) as received:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._handle_signals, received, name="signals")
                nursery.start_soon(self._notice_broken_trio, name="notice a broken trio")
                if supervised is not None:
                    nursery.start_soon(supervised.link.run, name="link to the supervisor")
                if self.claim is not None:
                    nursery.start_soon(run_watchdog, self.claim.notifier, lambda: True, name="watchdog")
                try:
                    await serve_worker(
                        app,
                        self._config,
                        sockets=self._sockets(),
                        task_status=_Started(self._announce),
                        on_worker=self._adopt,
                    )
                except Exception as error:
                    failure = error  # out of this nursery it would come in a group, and lose its exit code
                finally:
                    self._ended = True
                    self._ending.decide()
                    nursery.cancel_scope.cancel(reason="the worker has ended")
        if failure is not None:
            raise failure

    @contextmanager
    def _receiving(self, wanted: Collection[int]) -> Iterator[Any]:
        self._ending = signals.Ending(wanted)
        try:
            with trio.open_signal_receiver(*wanted) as received:
                yield received
        finally:
            if self._is_callers:
                # Here, not behind trio.run: trio takes its own handler of SIGINT away only if it finds it.
                self._ending.restore()

    async def _notice_broken_trio(self) -> None:
        """Nobody cancels the root of a process but trio, once it cannot go on: no time for a whole drain."""
        try:
            await trio.sleep_forever()
        finally:
            if not self._ended and self._worker is not None:
                self._worker.drain.begin("trio has failed", grace=FATAL_GRACE, fatal=True)

    def _sockets(self) -> Listeners | None:
        if self._supervised is not None:
            return self._supervised.listeners
        return None if self.claim is None else self.claim.listeners

    def _announce(self, addresses: list[str]) -> None:
        if self._supervised is not None:
            self._supervised.share.note(0)
            self._supervised.link.say_ready()
        if self.claim is not None:
            self.claim.notifier.ready(f"serving on {', '.join(addresses)}")

    def _adopt(self, worker: Worker) -> None:
        self._worker = worker
        worker.last_words = self._report_blocked_loop
        self._root = trio.lowlevel.current_root_task()
        worker.drain.on_begin(self._arm_hard_exit)
        if (claim := self.claim) is not None:
            claim.notifier.log = worker.logs.error
            worker.drain.on_begin(lambda: claim.notifier.stopping(f"draining: {worker.drain.reason}"))
            for remark in claim.remarks:
                worker.logs.error.info("%s", remark)
        if self._supervised is not None:
            worker.supervised = True
            worker.context.development = self._config.use_reloader
            worker.context.in_flight_table = self._supervised.in_flight
            worker.context.share = self._supervised.share
            self._blocked_loop = BlockedLoop(worker.context, self._report_blocked_loop)
            self._supervised.link.adopt(worker)
            self._supervised.watch_abort(self._report_abort)

    def _arm_hard_exit(self) -> None:
        assert self._worker is not None
        config = self._config
        if config.hard_exit_after is None:
            return
        drain = self._worker.drain
        reserved = 0.0 if drain.cut_lifespan else config.shutdown_timeout
        left = drain.deadline - trio.current_time()
        if not self.hard_exit.arm(left + CLEANUP_SECONDS + reserved + config.hard_exit_after):
            self._worker.logs.error.warning(
                "no thread can be started to end the process should the drain hang (pids.max, TasksMax, ulimit -u?)"
            )

    async def _handle_signals(self, received: Any) -> None:
        async for number in received:
            self._handle_signal(number)

    def _handle_signal(self, number: int) -> None:
        worker = self._worker
        name = signal.Signals(number).name
        if worker is None:
            if name in signals.STOPS:
                os._exit(128 + number)
        elif name == "SIGUSR1":
            worker.logs.reopen()
        elif name == "SIGHUP" and self._supervised is None and worker.certificates is not None:
            worker.reload_certificates()
        elif name == "SIGHUP" and self._supervised is not None:
            pass  # a terminal that closes tells all; a supervisor has been told as well
        elif name in _NEEDS_SUPERVISOR:
            worker.logs.error.warning(
                "%s ignored: %s needs the supervisor; to stop, send SIGTERM", name, _NEEDS_SUPERVISOR[name]
            )
        elif name == "SIGQUIT":
            self._stops = max(self._stops, 1) + 1
            worker.drain.hurry(name)
        else:
            self._stops += 1
            if self._stops == 1:
                worker.drain.begin(name)
            elif self._stops == 2:
                worker.logs.error.warning("%s again: cancelling what still runs", name)
                worker.drain.hurry(name)
            else:
                os.write(2, f"trioserve: {name} for the third time: exiting at once\n".encode())
                worker.logs.close(_LAST_LINES)
                os._exit(128 + number)

    def facts(self) -> WorkerFacts:
        """For a report that is written outside `trio.run`."""
        worker = self._worker
        if worker is None:
            return WorkerFacts(uptime=0.0, requests_served=0, in_flight=0)
        try:
            return worker_facts(worker.context)
        except Exception:
            # The worker's clock may need trio's, which is gone once the run has crashed.
            context = worker.context
            return WorkerFacts(
                uptime=0.0, requests_served=context.requests_served, in_flight=context.in_flight
            )

    def emit(self, report: dict[str, Any]) -> None:
        """Write a report where the link cannot be used: outside of trio's run, or in another thread than its."""
        emit_report(report, self._config.crash_dir)
        if self._supervised is not None:
            with suppress(OSError):
                os.write(self._supervised.last_words, serialise(report))

    def exit_code(self) -> int:
        """What the process ends with, once the worker has ended."""
        failure = self._worker.context.boundary.failure if self._worker is not None else None
        return EXIT_OK if failure is None else failure.exit_code

    # -- in a watchdog's thread, before it ends the process --------------------------------------------------

    def _report_hard_exit(self) -> None:
        reason = self._worker.drain.reason if self._worker is not None else "?"
        error = TimeoutError(f"the drain ({reason}) did not end in time; requests or the app hold it up")
        self._say_last_words("H2", error, None)

    def _report_blocked_loop(self, error: LoopBlocked, connection: Served | None) -> None:
        exchange = None if connection is None else connection.exchange
        request = request_facts(connection, exchange) if connection and exchange else None
        self._say_last_words("H1", error, request)

    def _report_abort(self) -> None:
        """The supervisor has heard nothing for too long."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        if frame is not None and self._blocked_loop is not None:
            seconds = self._config.worker_timeout or 0.0
            self._blocked_loop.say_last_words(self._blocked_loop.explain(Block(seconds, frame)))

    def _say_last_words(self, row: str, error: Exception, request: RequestFacts | None) -> None:
        """Report, then let the logs out. Of two watchdogs at once the second only waits, lest it cut the first."""
        if not self._last_words.acquire(timeout=LAST_WORDS):
            return
        report = build_report(
            row=row,
            verdict="fatal",
            error=error,
            request=request,
            worker=self.facts(),
            nth=1,
            root=self._root,  # this is another thread than trio's, where trio cannot be asked
        )
        worker = self._worker
        if worker is not None:
            with suppress(Exception):  # what moves on while it is read must not cost the report
                report["requests_in_flight"] = requests_in_flight(worker.context)
        self.emit(report)
        if worker is not None:
            # After the report, and bounded: a handler of the operator's may be what holds up the loop.
            line = "%s: %s; row %s, ending the process at once"
            call_within(_LAST_LINES, worker.logs.error.critical, line, ROWS[row].meaning, error, row)
            worker.logs.close(_LAST_LINES)
