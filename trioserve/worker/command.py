"""The worker as a whole process: signals, the hard exit, the exit code.

Called by `cli.py` (`run_command`) and `trioserve.run` (`run_app`). Signals, in any order and number:

    SIGTERM, SIGINT   first: drain; second: cancel what still runs; third: exit at once
    SIGQUIT           cancel what runs, as a second SIGTERM does
    SIGUSR1           reopen log files
    SIGHUP            reload is the supervisor's; without one it is logged and ignored
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from typing import Any

import trio

from trioserve.asgi.load import load_app, wrap_app
from trioserve.config import Config
from trioserve.errors import (
    EXIT_HARD_DRAIN,
    EXIT_OK,
    EXIT_SERVER_BUG,
    LifespanFailed,
    LoopBlocked,
    TrioserveError,
)
from trioserve.observe.blocking import LAST_WORDS, call_within
from trioserve.observe.process import pid_file
from trioserve.structure.blocked_loop import requests_in_flight
from trioserve.structure.boundary import FATAL_GRACE, ROWS, request_facts, worker_facts
from trioserve.structure.context import ASGIApp, ConnectionContext
from trioserve.structure.crash_report import RequestFacts, WorkerFacts, build_report, emit_report
from trioserve.structure.drain import CLEANUP_SECONDS, HardExit
from trioserve.worker.worker import Worker, serve_worker

# What a process that ends at once still gives its log writer, in seconds.
_LAST_LINES = 0.5

_SIGNALS = ("SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGHUP")


def run_command(config: Config, application: str) -> int:
    """Load `application` and serve it; returns the process's exit code.

    Raises:
        AppNotFound: there is no such app.
    """
    loaded = load_app(application, factory=config.factory)
    return run_app(wrap_app(loaded.app, loaded.mode, config), config)


def run_app(app: ASGIApp, config: Config) -> int:
    """Serve an ASGI app in a `trio.run` of its own; returns the process's exit code. Problems go to stderr."""
    process = _Process(config)
    try:
        with pid_file(config.pid_path):
            trio.run(process.main, app)
    except TrioserveError as error:
        if isinstance(error, LifespanFailed) and error.__cause__ is not None:
            # What the app raised is what its author needs to see.
            traceback.print_exception(error.__cause__, file=sys.stderr)
        print(f"trioserve: {error}", file=sys.stderr)
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
        emit_report(report, config.crash_dir)
        return EXIT_SERVER_BUG
    finally:
        process.hard_exit.disarm()
    return process.exit_code()


class _Process:
    """What a worker's process knows besides the worker."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._worker: Worker | None = None
        self._root: trio.lowlevel.Task | None = None
        self._stops = 0
        self._ended = False
        self._last_words = threading.Lock()
        self.hard_exit = HardExit(self._report_hard_exit, EXIT_HARD_DRAIN)

    async def main(self, app: ASGIApp) -> None:
        """The root of `trio.run`: the signal handler beside the worker."""
        wanted = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        failure: Exception | None = None
        with trio.open_signal_receiver(*wanted) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._handle_signals, signals, name="signals")
                nursery.start_soon(self._notice_broken_trio, name="notice a broken trio")
                try:
                    await serve_worker(app, self._config, on_worker=self._adopt)
                except Exception as error:
                    failure = error  # out of this nursery it would come in a group, and lose its exit code
                finally:
                    self._ended = True
                    nursery.cancel_scope.cancel(reason="the worker has ended")
        if failure is not None:
            raise failure

    async def _notice_broken_trio(self) -> None:
        """Nobody cancels the root of a process but trio, once it cannot go on: no time for a whole drain."""
        try:
            await trio.sleep_forever()
        finally:
            if not self._ended and self._worker is not None:
                self._worker.drain.begin("trio has failed", grace=FATAL_GRACE, fatal=True)

    def _adopt(self, worker: Worker) -> None:
        self._worker = worker
        worker.last_words = self._report_blocked_loop
        self._root = trio.lowlevel.current_root_task()
        worker.drain.on_begin(self._arm_hard_exit)

    def _arm_hard_exit(self) -> None:
        assert self._worker is not None
        config = self._config
        if config.hard_exit_after is None:
            return
        drain = self._worker.drain
        reserved = 0.0 if drain.cut_lifespan else config.shutdown_timeout
        left = drain.deadline - trio.current_time()
        self.hard_exit.arm(left + CLEANUP_SECONDS + reserved + config.hard_exit_after)

    async def _handle_signals(self, signals: Any) -> None:
        async for number in signals:
            self._handle_signal(number)

    def _handle_signal(self, number: int) -> None:
        worker = self._worker
        if worker is None:
            os._exit(128 + number)
        name = signal.Signals(number).name
        if name == "SIGUSR1":
            worker.logs.reopen()
        elif name == "SIGHUP":
            worker.logs.error.warning("SIGHUP ignored: reloading needs the supervisor; to stop, send SIGTERM")
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

    def exit_code(self) -> int:
        """What the process ends with, once the worker has ended."""
        failure = self._worker.context.boundary.failure if self._worker is not None else None
        return EXIT_OK if failure is None else failure.exit_code

    # -- in a watchdog's thread, before it ends the process --------------------------------------------------

    def _report_hard_exit(self) -> None:
        reason = self._worker.drain.reason if self._worker is not None else "?"
        error = TimeoutError(f"the drain ({reason}) did not end in time; requests or the app hold it up")
        self._say_last_words("H2", error, None)

    def _report_blocked_loop(self, error: LoopBlocked, connection: ConnectionContext | None) -> None:
        exchange = None if connection is None else connection.exchange
        request = request_facts(connection, exchange) if connection and exchange else None
        self._say_last_words("H1", error, request)

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
        emit_report(report, self._config.crash_dir)
        if worker is not None:
            # After the report, and bounded: a handler of the operator's may be what holds up the loop.
            line = "%s: %s; row %s, ending the process at once"
            call_within(_LAST_LINES, worker.logs.error.critical, line, ROWS[row].meaning, error, row)
            worker.logs.close(_LAST_LINES)
