"""The error boundary: where something was raised decides what the client hears and what becomes of the worker.

THE table is `ROWS`; everything that goes wrong in a worker passes through `Boundary`.

Callers: `http1.py` (what left the app), `connection.py` (what left our own code), `lifespan.py` and `worker.py`.
It never waits and never raises: it counts, logs, reports, begins the drain where the verdict asks for it, and
remembers the failure that `serve()` will raise, or the command exit with.

    verdict    the worker
    CONTAIN    serves on; only this connection is over
    REPLACE    is tainted: report, drain with `TAINTED_GRACE`, exit 75 (a supervisor has started its successor)
    FATAL      state untrusted: report, drain with `FATAL_GRACE`, exit with the row's code
    EXIT       the app asked the process to end: drain, then exit with its code
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from trioserve import errors
from trioserve.errors import LifespanDied
from trioserve.structure.crash_report import RequestFacts, WorkerFacts, build_report, emit_report
from trioserve.structure.drain import DrainState
from trioserve.structure.error_tree import signature

if TYPE_CHECKING:
    from trioserve.structure.context import Served, WorkerContext
    from trioserve.structure.phases import RunningExchange

# Seconds that requests in flight get when the worker is tainted, and when its state cannot be trusted.
TAINTED_GRACE = 10.0
FATAL_GRACE = 2.0


class Verdict(enum.Enum):
    """What becomes of the worker."""

    CONTAIN = "contain"
    REPLACE = "replace"
    FATAL = "fatal"
    EXIT = "exit"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        verdict: what becomes of the worker; REPLACE is subject to `on_app_error`.
        status: the answer to the client if the response has not begun; None: say nothing.
        exit_code: what the process ends with, where the verdict ends it.
        meaning: for logs and the README.
    """

    verdict: Verdict
    status: int | None
    exit_code: int
    meaning: str


_C, _R, _F, _X = Verdict.CONTAIN, Verdict.REPLACE, Verdict.FATAL, Verdict.EXIT

# fmt: off
ROWS: dict[str, Row] = {
    "C1": Row(_C, 400, 0, "malformed or oversized request"),
    "C2": Row(_C, None, 0, "the peer is gone"),
    "C3": Row(_C, 408, 0, "the peer was too late"),
    "C4": Row(_C, 500, 0, "a file could not be sent whole"),
    "A1": Row(_R, 500, errors.EXIT_TAINTED, "the app raised before it had responded"),
    "A2": Row(_R, 500, errors.EXIT_TAINTED, "the app raised in the middle of its response"),
    "A3": Row(_R, 500, errors.EXIT_TAINTED, "the app raised after it had answered with an error"),
    "A4": Row(_R, 500, errors.EXIT_TAINTED, "the app raised after its response was complete"),
    "A5": Row(_R, 500, errors.EXIT_TAINTED, "the app broke the ASGI contract"),
    "A6": Row(_F, 500, errors.EXIT_TAINTED, "the app declared its process beyond repair"),
    "A7": Row(_C, 500, 0, "the app raised an error that is declared safe"),
    "W1": Row(_R, 500, errors.EXIT_TAINTED, "the app raised in a WebSocket session"),
    "B1": Row(_F, 500, errors.EXIT_SERVER_BUG, "the app left a nursery or cancel scope open"),
    "B2": Row(_R, None, errors.EXIT_TAINTED, "an async generator of the app failed while it was finalised"),
    "L3": Row(_F, None, errors.EXIT_TAINTED, "the app's lifespan task died while serving"),
    "S1": Row(_F, 500, errors.EXIT_SERVER_BUG, "trioserve's own code failed"),
    "S2": Row(_F, None, errors.EXIT_SERVER_BUG, "trio's internal state is broken"),
    "S3": Row(_F, None, errors.EXIT_OS, "a listening socket failed"),
    "X1": Row(_X, 503, errors.EXIT_TAINTED, "the app raised SystemExit"),
    "X2": Row(_X, 503, errors.EXIT_SIGINT, "KeyboardInterrupt"),
    "X3": Row(_F, 500, errors.EXIT_TAINTED, "the app raised a BaseException of its own"),
    "M1": Row(_F, 503, errors.EXIT_MEMORY, "out of memory"),
    "H1": Row(_F, None, errors.EXIT_LOOP_BLOCKED, "the event loop was blocked for too long"),
    "H2": Row(_F, None, errors.EXIT_HARD_DRAIN, "the drain did not end in time"),
}
# fmt: on


# Ends that were not the app's doing.
_OUTCOMES = {"C2": "peer gone", "C4": "file error"}


@dataclass(frozen=True, slots=True)
class Fault:
    """One judged event."""

    row: str
    error: BaseException
    verdict: Verdict
    status: int | None
    exit_code: int
    summary: str

    @property
    def outcome(self) -> str:
        """What the access log calls the end of a response that came to this."""
        return _OUTCOMES.get(self.row, "app error")


class Boundary:
    """The worker's judge and its memory of what it judged.

    Attributes:
        failure: the fault that ends this worker, or None; the first one wins, a worse one replaces it.
        on_report: is given each crash report; None without a supervisor.
        ask_replacement: asks the supervisor for a successor; False if the fault is to be contained. The worker serves
            on meanwhile, until it is told to drain. None without a supervisor: then a tainted worker drains at once.
    """

    def __init__(self, worker: WorkerContext, contain: tuple[type[BaseException], ...] = (),
                 fatal: tuple[type[BaseException], ...] = ()) -> None:  # fmt: skip
        self._worker = worker
        self._policy = str(worker.config.on_app_error)
        self._contain = contain
        self._fatal: tuple[type[BaseException], ...] = (errors.Fatal, *fatal)
        self._seen: dict[str, int] = {}
        self.failure: Fault | None = None
        self.on_report: Callable[[dict[str, Any]], None] | None = None
        self.ask_replacement: Callable[[Fault], bool] | None = None

    # -- verdicts --------------------------------------------------------------------------------------------

    def judge_app(self, connection: Served, exchange: Any, error: BaseException) -> Fault:
        """Judge what came out of `await app(...)`, or what the app left undone."""
        stripped = without_cancelled(error)
        row = _row_of_leaves(stripped) or self._row_of_app_error(stripped, exchange)
        return self._pronounce(row, stripped, connection, exchange)

    def judge_own(self, connection: Served | None, error: BaseException) -> Fault:
        """Judge what was raised outside the app: our bug, unless trio says that the app broke its scopes."""
        stripped = without_cancelled(error)
        row = _row_of_leaves(stripped)
        # A BaseException of the app's own cannot come from where the app does not run.
        row = "S1" if row in ("", "X3") else row
        return self._pronounce(row, stripped, connection, connection.exchange if connection else None)

    def judge_lifespan(self, error: BaseException, when: str) -> Fault:
        """Judge what came out of the app's lifespan task; `when` says whether it was serving or shutting down."""
        stripped = without_cancelled(error)
        row = _row_of_leaves(stripped)
        if row not in ("", "B1", "X3"):
            return self._pronounce(row, stripped, None, None)
        names = ", ".join(dict.fromkeys(type(leaf).__name__ for leaf in leaves(stripped)))
        death = LifespanDied(f"the app's lifespan task ended with {names:.200} {when}")
        death.__cause__ = stripped
        return self._pronounce("L3", death, None, None)

    def judge(self, row: str, error: BaseException) -> Fault:
        """Judge an event whose row the caller knows: the lifespan, a listener, an async generator."""
        return self._pronounce(row, error, None, None)

    def pardon(self) -> None:
        """The supervisor will not replace this worker for its taint: it serves on as if that had been contained."""
        if self.failure is not None and self.failure.verdict is _R:
            self._worker.error_log.warning(
                "not replaced for %s: the same error has cost a worker before, or too many have",
                self.failure.summary,
            )
            self.failure = None

    def _row_of_app_error(self, error: BaseException, exchange: Any) -> str:
        """The row of an ordinary exception that left the app, by its leaves and by the state of the response."""
        found = list(leaves(error))
        if any(isinstance(leaf, self._fatal) for leaf in found):
            return "A6"
        if self._is_peers_doing(found, exchange):
            return "C2"
        # By its class: `StaticFiles` raises it, too, where it has to read a file behind somebody's middleware.
        if all(any(isinstance(link, errors.FileSendFailed) for link in _chain(leaf)) for leaf in found):
            return "C4"
        if self._contain and all(isinstance(leaf, self._contain) for leaf in found):
            return "A7"
        if any(isinstance(leaf, errors.AppMisuse) for leaf in found):
            return "A5"
        if getattr(exchange, "is_websocket", False):
            return "W1"
        if exchange.response_complete:
            return "A3" if (exchange.status or 0) >= 500 else "A4"
        return "A2" if exchange.response_started else "A1"

    def _is_peers_doing(self, found: list[BaseException], exchange: Any) -> bool:
        """All leaves go back to our `ClientDisconnected`, or the app was told mid-request that the peer had gone.

        The second half means: an app that raises after `http.disconnect` is not judged a broken one, since
        frameworks turn that message into an exception of their own. It is still logged.
        """
        if exchange.told_gone or exchange.refusal is not None:
            return True
        return exchange.gone is not None and all(_descends_from(leaf, exchange.gone) for leaf in found)

    # -- consequences ----------------------------------------------------------------------------------------

    def _pronounce(self, name: str, error: BaseException, connection: Served | None,
                   exchange: RunningExchange | None) -> Fault:  # fmt: skip
        row = ROWS[name]
        verdict, exit_code = row.verdict, row.exit_code
        if verdict is _R and self._policy == "contain":
            verdict = _C
        elif verdict is _R and self._policy == "crash":
            verdict = _F
        if name == "X1":
            exit_code = _exit_status(_exit_leaf(error), exit_code)
        fault = Fault(name, error, verdict, row.status, exit_code, summarise(error))
        self._worker.counters.faults[name] += 1
        self._log(fault, connection, exchange)
        if name not in ("C1", "C2", "C3", "C4"):
            self._report(fault, connection, exchange)
        if verdict is not _C:
            self._end_worker(fault)
        return fault

    def _end_worker(self, fault: Fault) -> None:
        severity = {_R: 0, _X: 1, _F: 2}
        if fault.verdict is _R and self.ask_replacement is not None:
            # Replacement first: it accepts until its successor does.
            if (
                self.failure is None
                and self._worker.drain.state is DrainState.RUNNING
                and self.ask_replacement(fault)
            ):
                self.failure = fault
            return
        if self.failure is None or severity[fault.verdict] > severity[self.failure.verdict]:
            self.failure = fault
        meaning = ROWS[fault.row].meaning
        drain = self._worker.drain
        if fault.verdict is _F:
            grace = 0.0 if self._policy == "crash" and fault.row.startswith("A") else FATAL_GRACE
            drain.begin(
                f"{meaning} ({fault.row})", grace=grace, fatal=fault.row in ("S1", "S2", "B1", "M1", "L3")
            )
        elif fault.verdict is _R:
            drain.begin(f"{meaning} ({fault.row})", grace=TAINTED_GRACE)
        else:
            drain.begin(f"{meaning} ({fault.row})")

    def _log(self, fault: Fault, connection: Served | None, exchange: RunningExchange | None) -> None:
        log = self._worker.error_log
        where = ""
        if exchange is not None:
            facts = exchange.describe()
            where = f" in {facts['method']} {facts['path']}"
        meaning = ROWS[fault.row].meaning
        if fault.row == "C2":
            log.debug("%s%s: %s", meaning, where, fault.summary)
            return
        if fault.row == "C4":
            log.warning("%s%s: %s", meaning, where, fault.summary)
            return
        to_be_replaced = (
            "draining, to be replaced" if self.ask_replacement is None else "asking to be replaced"
        )
        consequence = {
            _C: "serving on", _R: to_be_replaced, _F: "ending this worker", _X: "draining, then exit",
        }[fault.verdict]  # fmt: skip
        log.error(
            "%s%s on connection %s; row %s, %s", meaning, where, connection.id if connection else "-", fault.row,
            consequence, exc_info=fault.error,
        )  # fmt: skip

    def _report(self, fault: Fault, connection: Served | None, exchange: RunningExchange | None) -> None:
        mark = signature(fault.error)
        nth = self._seen[mark] = self._seen.get(mark, 0) + 1
        if len(self._seen) > 1000:
            self._seen.clear()
        # What comes again and again is counted, not written down in full each time: also where it is up to the
        # supervisor whether it costs the worker, which serves on after most of these.
        if fault.verdict in (_C, _R) and nth > 1:
            return
        worker = self._worker
        request = request_facts(connection, exchange) if connection and exchange else None
        report = build_report(
            row=fault.row,
            verdict=fault.verdict.value,
            error=fault.error,
            request=request,
            worker=worker_facts(worker),
            nth=nth,
        )
        emit_report(report, worker.config.crash_dir)
        if self.on_report is not None:
            self.on_report(report)


def request_facts(connection: Served, exchange: RunningExchange) -> RequestFacts:
    """What a report may say of a request: no query, no values."""
    facts = exchange.describe()
    return RequestFacts(
        method=facts["method"],
        path=facts["path"],
        http_version=facts["http_version"],
        header_names=facts["header_names"],
        peer=connection.client[0] if connection.client is not None else None,
        request_bytes=facts["request_bytes"],
        response_bytes=facts["response_bytes"],
        seconds=facts["elapsed"],
        response_state=facts["response"],
        connection_id=connection.id,
        request_number=connection.requests,
    )


def worker_facts(worker: WorkerContext) -> WorkerFacts:
    """What a report says of the worker."""
    return WorkerFacts(
        uptime=worker.clock() - worker.started_at,
        requests_served=worker.requests_served,
        in_flight=worker.in_flight,
        connections=len(worker.connections),
        drain=f"{worker.drain.state.value}, grace {worker.drain.grace:g} s {worker.drain.reason}".rstrip(),
    )


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions inside any nesting of groups; the exception itself if it is none."""
    pending = [error]
    while pending:
        current = pending.pop()
        if isinstance(current, BaseExceptionGroup):
            pending += reversed(current.exceptions)
        else:
            yield current


def summarise(error: BaseException) -> str:
    """One line for logs: the type, and the message within bounds."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "(its message cannot be shown)"
    return f"{type(error).__name__}: {text:.200}" if text else type(error).__name__


def is_cancellation(error: BaseException) -> bool:
    """`error` is `Cancelled`, or a group of nothing else, and this task is indeed cancelled.

    A nursery makes a group of the several `Cancelled` in it. One that nobody has asked for is something else: an
    app that has kept one and raises it again, which must not take siblings or the server down.
    """
    if not isinstance(error, trio.Cancelled) and not isinstance(error, BaseExceptionGroup):
        return False
    return all(isinstance(leaf, trio.Cancelled) for leaf in leaves(error)) and (
        trio.current_effective_deadline() == -math.inf
    )


def without_cancelled(error: BaseException) -> BaseException:
    """A group less the `Cancelled` in it; anything else, and a group of nothing but them, as it is."""
    if isinstance(error, BaseExceptionGroup):
        cancelled, rest = error.split(trio.Cancelled)
        if cancelled is not None and rest is not None:
            return rest
    return error


def _row_of_leaves(error: BaseException) -> str:
    """The row that certain leaves decide wherever they were raised; "" if there is none of them."""
    found = list(leaves(error))
    leaf = _exit_leaf(error)
    if leaf is not None:
        return "X1" if isinstance(leaf, SystemExit) else "X2"
    if any(isinstance(leaf, MemoryError) for leaf in found):
        return "M1"
    if any(isinstance(leaf, trio.TrioInternalError) for leaf in found):
        return "S2"
    if any(isinstance(leaf, errors.TaskLeak) or is_scope_corruption(leaf) for leaf in found):
        return "B1"
    # A Cancelled that is no cancellation (`is_cancellation`) is an exception like others.
    return "" if all(isinstance(leaf, Exception | trio.Cancelled) for leaf in found) else "X3"


def is_scope_corruption(error: BaseException) -> bool:
    """Trio's complaint about a nursery or cancel scope that was left open; it has no class of its own."""
    return type(error) is RuntimeError and "stack corrupted" in str(error)


def _exit_leaf(error: BaseException) -> BaseException | None:
    for leaf in leaves(error):
        if isinstance(leaf, SystemExit | KeyboardInterrupt):
            return leaf
    return None


def _descends_from(error: BaseException, ancestor: BaseException) -> bool:
    """`ancestor` is `error` itself or stands in its chain of causes and contexts."""
    return any(link is ancestor for link in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error itself, and its causes and contexts."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        pending += [current.__cause__, current.__context__]


def _exit_status(leaf: BaseException | None, default: int) -> int:
    """The process exit code that a SystemExit asks for; 0 and None become `default`: the app cannot end us cleanly."""
    code = leaf.code if isinstance(leaf, SystemExit) else None
    if isinstance(code, int):
        return code & 0xFF or default
    return 1 if code is not None else default
