"""One worker as its parent sees it: started, told what to do over a socketpair, watched until it is gone.

Made by `pool.py`, one for each process (`start_worker`): by exec, or forked by a process that has the app loaded
(`preload.py`). What the child inherits, by exec from descriptor 3 on: the listening sockets in their order
(sd_listen_fds(3) numbers them so), then its end of the socketpair, the table of its requests, a file for last stacks,
a pipe that ends it when its loop no longer listens, and the board on which all workers note their connections.
Everything else it is told in one line of JSON.

Nothing here waits but `wait()`, `receive()` and `end_hung()`; cancelling them leaves the process as it is.
"""

from __future__ import annotations

import base64
import contextlib
import enum
import math
import os
import pickle
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import trio

from trioserve.config import Config
from trioserve.errors import ConfigError
from trioserve.net.json_lines import JsonLines
from trioserve.net.share_board import ShareBoard
from trioserve.observe.in_flight import InFlightTable
from trioserve.structure.crash_report import SIZE_LIMIT
from trioserve.supervisor.child_process import FIRST_INHERITED, ChildProcess, spawn_worker
from trioserve.worker.parent_link import MESSAGE_LIMIT

# What a hung worker gets to write its report, and then to die of a signal that dumps its stacks.
_LAST_WORDS = 4.0
_LAST_STACKS = 1.0

# A report that could not be sent any more, and stacks.
_LAST_WORDS_LIMIT = SIZE_LIMIT + 64 * 1024

# Kinds of errors that a worker was told to go on after, of which the report is kept here: 15 kB each.
_SPARED_MAX = 16


# What `packed` has made; nobody changes a configuration that is in force.
_packed: WeakKeyDictionary[Config, str] = WeakKeyDictionary()


class WorkerState(enum.Enum):
    """How far a worker is in its life."""

    #: importing the app, or in its lifespan startup
    STARTING = "starting"
    #: accepting connections
    READY = "ready"
    #: accepting no more, finishing what it has
    DRAINING = "draining"
    #: ended, and its status read
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Orders:
    """What every worker of one generation is started with."""

    application: str
    config: Config
    generation: int
    sockets: Sequence[socket.socket]
    board: ShareBoard
    environment: Mapping[str, str] = field(default_factory=dict)
    #: Which of `sockets` speak plain HTTP although there is TLS, by their place.
    plain: Sequence[int] = ()
    #: Makes a process that has the app loaded and these descriptors, and returns its pid; None: workers are exec'd.
    fork: Callable[[Sequence[int]], int] | None = None


class ForkRefused(Exception):
    """`Orders.fork` has made no process, or none that is known: the descriptors may be held by one that comes late."""


class WorkerProcess:
    """One child process.

    Attributes:
        id: counts the workers of this supervisor from 1.
        place: its own on the board of connections, as long as it lives.
        state: its `WorkerState`.
        leaving: why it is to be replaced or given up, or ""; it goes on accepting until it is told to drain.
        is_tainted: its replacement is decided, but may have to wait.
        sockets: those on which it listens.
        asked: what the supervisor has asked it to do last ("", "drain: ...", "kill: ..."), for the exit report.
        heard: it has said that it drains, or is gone.
        has_closed: it has said that it has closed its listening sockets.
        ends_with: the exit code that it has announced, because it drains by itself (0: after a signal), or None.
        failure: why it could not start, as it has said, fit for a line of the log; or "".
        statistics: the last heartbeat.
        own_report: the crash report it has sent, or None.
    """

    def __init__(self, number: int, place: int, orders: Orders, now: float) -> None:
        self.id = number
        self.place = place
        self.generation = orders.generation
        self.state = WorkerState.STARTING
        self.leaving = ""
        self.is_tainted = False
        self.asked = ""
        self.ends_with: int | None = None
        self.failure = ""
        self.config = orders.config
        self.sockets = orders.sockets
        self._has_orders = False
        self.started_at = now
        self.ready_at: float | None = None
        self.heartbeat_at: float | None = None
        self.statistics: dict[str, Any] = {}
        self.own_report: dict[str, Any] | None = None
        self._spared: dict[str, dict[str, Any]] = {}  # reports that it does not send again, by signature
        self.heard = trio.Event()
        self.has_closed = False
        self.gone = trio.Event()
        self._answers: dict[str, tuple[trio.Event, list[str]]] = {}
        with ExitStack() as kept:
            self._table = InFlightTable.create()
            kept.callback(self._table.close)
            self._stacks = os.memfd_create("trioserve-stacks")
            kept.callback(os.close, self._stacks)
            ours, theirs = socket.socketpair()
            kept.callback(ours.close)
            with theirs:
                abort_read, self._abort_write = os.pipe()
                kept.callback(os.close, self._abort_write)
                try:
                    inherited = [*(sock.fileno() for sock in orders.sockets), theirs.fileno(), self._table.fd]
                    inherited += [self._stacks, abort_read, orders.board.fd]
                    # A worker that ends at once cannot wait until its report has been read.
                    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_LIMIT)
                    self._process = ChildProcess(_start(orders, inherited))
                    kept.callback(self._process.close)
                finally:
                    os.close(abort_read)
            ours.setblocking(False)
            self._kept = kept.pop_all()
        self.link = JsonLines(ours, limit=MESSAGE_LIMIT)

    def __repr__(self) -> str:
        return f"<WorkerProcess {self.id} pid={self.pid} {self.state.value}>"

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """How it ended, as `ChildProcess.status`."""
        return self._process.status

    @property
    def is_staying(self) -> bool:
        """It counts towards the workers that are wanted."""
        return not self.leaving and self.state in (WorkerState.STARTING, WorkerState.READY)

    @property
    def may_accept(self) -> bool:
        """It accepts connections, or has yet to take what the kernel has queued for it."""
        return self.ready_at is not None and not self.has_closed

    @property
    def may_be_deaf(self) -> bool:
        """In its startup it may block its loop: told to end, it would hold its sockets until it is ended."""
        return self.ready_at is None and not self.heard.is_set()

    def lived(self, now: float) -> float:
        """Seconds since it became ready; since its start if it never did."""
        return now - (self.started_at if self.ready_at is None else self.ready_at)

    def condemn(self, signature: str) -> None:
        """It is to be replaced for an error of this signature."""
        self.is_tainted = True
        self.own_report = self.own_report or self._spared.get(signature)

    def spare(self, signature: str) -> None:
        """It is to go on after an error of this signature, whose report it sends only once."""
        self.tell("contain")
        if self.own_report is not None and len(self._spared) < _SPARED_MAX:
            self._spared[signature] = self.own_report
        self.own_report = None  # it is not what will end it

    def stay(self) -> None:
        """Its replacement has come to nothing: it goes on, and if it is tainted it may ask again."""
        self.leaving = ""
        if self.is_tainted:
            self.is_tainted = False
            self.tell("contain")

    # -- what it is told -------------------------------------------------------------------------------------

    async def send_orders(self, orders: Orders) -> None:
        """The first line: all that it needs to know."""
        await self.link.send(
            {
                "application": orders.application,
                "settings": packed(orders.config),
                "listeners": len(orders.sockets),
                "plain": list(orders.plain),
                "worker": self.id,
                "place": self.place,
                "generation": self.generation,
            }
        )
        self._has_orders = True

    def tell(self, order: str, **details: Any) -> bool:
        """Send one order; False if the worker is not reading, or gone."""
        if not self._has_orders:
            return False  # they must be the first line
        try:
            return self.link.send_nowait({"do": order, **details})
        except (OSError, trio.ClosedResourceError):
            return False

    async def ask(self, order: str) -> str | None:
        """Give an order and return what the worker has to say about it; None if it is gone before it says anything."""
        answered, answer = self._answers.setdefault(order, (trio.Event(), []))
        if not self.tell(order):
            self._answers.pop(order, None)
            answered.set()
            return None
        await answered.wait()
        return answer[0] if answer else None

    def take_answer(self, order: str, answer: str) -> None:
        """It has done what it was asked to, or could not."""
        answered, answers = self._answers.pop(order, (trio.Event(), []))
        answers.append(answer)
        answered.set()

    def drain(self, reason: str, left_to_others: Sequence[int] = ()) -> None:
        """Have it finish what it has and exit; one that still starts has nothing to finish.

        Nor has it what is queued on those of its sockets, by their place, on which somebody else goes on accepting.
        """
        self.asked = f"drain: {reason}"
        if self.state is WorkerState.STARTING or not self.tell(
            "drain", reason=reason, left_to_others=left_to_others
        ):
            self.send_signal(signal.SIGTERM)
        self.state = WorkerState.DRAINING

    def hurry(self, reason: str) -> None:
        """Have it cancel what still runs; one whose startup does not hear of it has nothing to cancel."""
        self.state = WorkerState.DRAINING
        if self.may_be_deaf:
            self.cut_startup(reason)
            return
        self.asked = f"hurry: {reason}"
        if not self.tell("hurry", reason=reason):
            self.send_signal(signal.SIGQUIT)

    def cut_startup(self, reason: str) -> None:
        """End one that was never ready: it has served nothing, so nothing is lost."""
        self.asked = f"end: {reason}"
        self.send_signal(signal.SIGKILL)

    def kill(self, reason: str) -> None:
        """End it at once."""
        self.asked = f"kill: {reason}"
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: signal.Signals) -> None:
        """Signal it; no error if it is gone."""
        self._process.send_signal(number)

    async def end_hung(self, reason: str) -> None:
        """Its loop does not answer: let a thread of it report, then a signal handler in C, then end it."""
        self.asked = f"kill: {reason}"
        with contextlib.suppress(OSError):
            os.write(self._abort_write, b"!")
        with trio.move_on_after(_LAST_WORDS):
            await self.gone.wait()
            return
        # No thread of it gets to run: only faulthandler, which needs no interpreter, can still tell where it is.
        self.send_signal(signal.SIGABRT)
        with trio.move_on_after(_LAST_STACKS):
            await self.gone.wait()
            return
        self.send_signal(signal.SIGKILL)

    # -- what it says ----------------------------------------------------------------------------------------

    async def wait(self) -> int:
        """Return its exit code, or minus the number of the signal that ended it."""
        return await self._process.wait()

    def requests_in_flight(self) -> list[Any]:
        """The requests it is (or was, when it died) busy with."""
        return self._table.read()

    def last_words(self) -> str:
        """What it, or faulthandler in it, wrote when it could not use the link any more; cut."""
        with contextlib.suppress(OSError):
            return os.pread(self._stacks, _LAST_WORDS_LIMIT, 0).decode("utf-8", "replace")
        return ""

    def close(self) -> None:
        """Give back its descriptors; it is gone."""
        self.state = WorkerState.GONE
        self.link.close()
        self._kept.close()
        self.heard.set()
        self.gone.set()
        for answered, _ in self._answers.values():
            answered.set()


def start_worker(number: int, place: int, orders: Orders, now: float) -> WorkerProcess:
    """One more worker: forked, if the orders say how and it works, by exec otherwise.

    Raises:
        OSError: the machine is out of processes or descriptors.
    """
    if orders.fork is not None:
        with contextlib.suppress(ForkRefused):
            return WorkerProcess(number, place, orders, now)
    # With descriptors of its own: a process that comes late finds that nobody is at the other end, and ends.
    return WorkerProcess(number, place, replace(orders, fork=None), now)


def _start(orders: Orders, inherited: Sequence[int]) -> int:
    """A process with `inherited` as its descriptors 3, 4, ...; returns its id."""
    if orders.fork is not None:
        return orders.fork(inherited)
    link = FIRST_INHERITED + len(orders.sockets)
    return spawn_worker("worker", orders.environment, inherited, link)


def boot_patience(config: Config) -> float:
    """How long the import of the app and its startup may take, as far as a parent can tell; no heartbeat tells more."""
    return math.inf if config.worker_timeout is None else config.worker_timeout + config.startup_timeout


def packed(config: Config) -> str:
    """The settings that are not at their defaults, with their sources, as text.

    Pickled, since a Python file may set loggers and exception classes; it is our own child that reads it. Once: a
    reload that fails has imported the module of such a class again, and the one of before is not in it any more.
    """
    if (known := _packed.get(config)) is not None:
        return known
    found = config.given()
    try:
        text = _packed[config] = base64.b85encode(pickle.dumps(found)).decode("ascii")
        return text
    except Exception:
        for name, (value, source) in found.items():
            try:
                pickle.dumps(value)
            except Exception as error:
                raise ConfigError(
                    f"{source.place(name)}: a {type(value).__name__} cannot be handed to worker processes ({error}); "
                    "define it in a module that they can import, or serve with --workers 0"
                ) from None
        raise
