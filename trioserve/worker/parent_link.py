"""A worker's end of the socketpair to its supervisor: says what it is doing, does what it is told.

`command.py` runs `ParentLink.run` as one task beside the worker, in a process that a supervisor has started. The
heartbeat is sent by a trio task, so a blocked loop sends none; an idle worker's comes slowly, because nothing may
wake a machine that has nothing to do. When the other end closes, the supervisor is gone: the worker drains.
Cancelling `run` stops the talking and harms nothing else.

    worker -> supervisor    {"is": "ready" | "beat" | "tainted" | "draining" | "failed" | "report" | "answer", ...}
    supervisor -> worker    {"do": "drain" | "hurry" | "contain" | "reopen" | "certificates", ...}
"""

from __future__ import annotations

import functools
import os
import resource
import sys
import time
from typing import Any

import trio

from trioserve.config import Config
from trioserve.errors import EXIT_OK
from trioserve.net.json_lines import BadMessage, JsonLines
from trioserve.structure.boundary import Fault
from trioserve.structure.drain import DrainState
from trioserve.structure.error_tree import signature
from trioserve.worker.worker import Worker

# A crash report is the longest message.
MESSAGE_LIMIT = 1024 * 1024

# Between heartbeats: while there is work, and while there is none (at most a third of what the parent waits for one).
BUSY_INTERVAL = 1.0
IDLE_INTERVAL = 10.0

# An app that fails at each request must not make its supervisor judge each of them.
_ASK_INTERVAL = 1.0

_PAGE = resource.getpagesize()


class ParentLink:
    """The worker's side of the link."""

    def __init__(self, link: JsonLines, config: Config) -> None:
        self._link = link
        # Who waits for a sign of life, or for the end of all work, waits for no more than a part of that on top.
        waits = [seconds / 3 for seconds in (config.worker_timeout, config.exit_when_idle) if seconds]
        self._idle_interval = min([IDLE_INTERVAL, *waits])
        self._busy_interval = min(BUSY_INTERVAL, self._idle_interval)
        self._worker: Worker | None = None
        self._asked_at = -_ASK_INTERVAL

    def adopt(self, worker: Worker) -> None:
        """The worker exists: from now on its faults and its end are told."""
        self._worker = worker
        boundary = worker.context.boundary
        boundary.on_report = self._tell_report
        boundary.ask_replacement = self._ask_replacement
        worker.drain.on_begin(self._tell_draining)
        worker.on_closed = functools.partial(self._tell_draining, listening=False)

    def tell(self, what: str, **details: Any) -> bool:
        """Send one message; False if the supervisor does not read, or is gone."""
        try:
            return self._link.send_nowait({"is": what, **details})
        except (OSError, trio.ClosedResourceError):
            return False

    async def run(self) -> None:
        """Talk and listen until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen, name="orders of the supervisor")
            nursery.start_soon(self._beat, name="heartbeat")

    def _tell_report(self, report: dict[str, Any]) -> None:
        self.tell("report", report=report)

    def _tell_draining(self, *, listening: bool = True) -> None:
        if self._worker is not None:
            failure = self._worker.context.boundary.failure
            code = EXIT_OK if failure is None else failure.exit_code
            self.tell("draining", reason=self._worker.drain.reason, exit_code=code, listening=listening)

    def say_ready(self) -> None:
        """The app's startup is complete and connections are accepted."""
        self.tell("ready", **self._statistics())

    # -- talking ---------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        before = -1
        while True:
            if self._worker is not None:
                self._worker.context.date_requests()
                self._worker.context.count_share()
            statistics = self._statistics()
            self.tell("beat", **statistics)
            busy = statistics["requests"] != before or statistics["in_flight"]
            before = statistics["requests"]
            await trio.sleep(self._busy_interval if busy else self._idle_interval)

    def _statistics(self) -> dict[str, Any]:
        found = {"requests": 0, "in_flight": 0, "connections": 0, "rss": _rss(), "cpu": time.process_time()}
        if self._worker is not None:
            context = self._worker.context
            found["requests"] = context.requests_served
            found["in_flight"] = context.in_flight
            found["connections"] = len(context.connections)
        return found

    def _ask_replacement(self, fault: Fault) -> bool:
        """Ask to be replaced; False if this is not the moment, and the fault is to be contained."""
        now = time.monotonic()
        if now - self._asked_at < _ASK_INTERVAL:
            return False
        self._asked_at = now
        if self.tell("tainted", row=fault.row, signature=signature(fault.error), summary=fault.summary):
            return True
        assert self._worker is not None
        self._worker.drain.begin("tainted, and there is no supervisor to replace it")
        return True

    # -- listening -------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        while True:
            try:
                order = await self._link.receive()
            except BadMessage as error:
                self._log_error("the supervisor sent what cannot be understood: %s", error)
                continue
            except OSError:
                order = None
            if order is None:
                break
            self._obey(order)
        if self._worker is None:
            os._exit(1)  # still starting, and nobody is left to serve for
        self._worker.drain.begin("the supervisor is gone")

    def _obey(self, order: dict[str, Any]) -> None:
        worker = self._worker
        if worker is None:
            return
        match order.get("do"):
            case "drain":
                worker.left_to_others = order.get("left_to_others", ())
                worker.drain.begin(str(order.get("reason", "")))
            case "hurry":
                if worker.drain.state is not DrainState.STOPPED:
                    worker.drain.hurry(str(order.get("reason", "")))
            case "contain":
                worker.context.boundary.pardon()
            case "reopen":
                worker.logs.reopen()
            case "certificates":
                self.tell("answer", to="certificates", text=worker.reload_certificates())
            case other:
                self._log_error("the supervisor sent an order that is not known: %r", other)

    def _log_error(self, text: str, *values: object) -> None:
        if self._worker is not None:
            self._worker.logs.error.error(text, *values)


def _rss() -> int:
    """Resident memory of this process, bytes; its peak where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - once a second, and the cheapest way
            return int(file.read().split()[1]) * _PAGE
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
