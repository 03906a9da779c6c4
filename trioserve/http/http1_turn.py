"""The requests that have come in one turn of the hub, taken through each step together.

What a request needs of the interpreter, of trio and of the app is three times the size of a processor's first cache of
instructions: done one request after the other, each step finds nothing there of what the last request has left. So the
hub gives all `RequestReader`s that have read something to the worker's `RequestTurn`, which takes each step for all of
them before the next: first lines, field lines, rules, answers that need no app, exchanges and scopes, and at last the
app (`http1_lane.py`). Who is not to be served in this way is handed to the task of its connection. Nothing here waits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trio.lowlevel import reschedule

from trioserve.http.http1_lane import Lane, as_coroutine_function, serve_lane
from trioserve.http.http1_reader import RequestReader
from trioserve.http.quick import find_quick
from trioserve.net.watch import WOKEN

if TYPE_CHECKING:
    from trioserve.net.epoll_hub import EpollHub
    from trioserve.structure.context import WorkerContext

# From so many requests in a turn on, a lane costs less than waking the tasks.
_ENOUGH_FOR_LANE = 4

# An app that waits costs a little more in a lane: this many of its requests go straight to their tasks after the first
# that has waited, twice as many after each further one, up to the second number; until a turn has passed without.
_REQUESTS_APART = 64
_MOST_APART = 8192


class RequestTurn:
    """What the worker's connections have in common while the hub reads for them.

    Attributes:
        app: the worker's, to be called in a lane.
        worker, outbox: the worker's, and where responses are left until all of a turn have theirs.
        spare: lanes without work.
    """

    def __init__(self, worker: WorkerContext, hub: EpollHub) -> None:
        self.worker = worker
        self.app = as_coroutine_function(worker.app)
        self.outbox = hub.outbox
        self.spare: list[Lane] = []
        self._has_time = hub.has_time
        self._asks = find_quick(worker.app, worker.root_path) is not None
        self._start_soon: Callable[..., Any] | None = None
        self._is_starting = False
        self._apart = 0  # requests that are still to go to their tasks
        self._next_apart = _REQUESTS_APART
        hub.on_pulled = self.take

    def __repr__(self) -> str:
        return f"<RequestTurn with {len(self.spare)} spare lanes>"

    def open(self, start_soon: Callable[..., Any]) -> None:
        """From now on lanes may be started, in the nursery of the connections; the first is."""
        self._start_soon = start_soon
        self._start_lane()

    def take(self, readers: list[RequestReader]) -> int:
        """Serve those who have read something; returns how many tasks were woken for that."""
        some = len(readers)
        readers = self._read_heads(readers)
        woken = some - len(readers)
        if self._asks:
            has_time = self._has_time
            others = []
            for reader in readers:
                if reader.answer is None:
                    others.append(reader)
                else:
                    woken += reader.send_answer(has_time)
            readers = others
        lane = self._find_lane(len(readers))
        if lane is None:
            for reader in readers:
                reader.wake()
            return woken + len(readers)
        now = self.worker.clock()
        ready = [reader for reader in readers if reader.prepare(now)]
        if ready:
            self.spare.remove(lane)
            lane.readers = ready
            reschedule(lane.task, WOKEN)
        return woken + len(readers) - len(ready)

    def _read_heads(self, readers: list[RequestReader]) -> list[RequestReader]:
        """Those that have a whole head now; the others are for the tasks of their connections."""
        # Written flat: what the three loops have in common would be a call more for each step of each request.
        begun = []
        for reader in readers:
            try:
                if reader.engine.begin_head(reader.data):  # type: ignore[arg-type]  # it was pulled
                    begun.append(reader)
                else:
                    reader.wake()  # a part of a head, whose phase is the task's to begin; or an end
            except BaseException as error:
                reader.fail(error)
        parsed = begun
        if begun and not begun[0].engine.parses_at_once:  # as all of this worker's
            parsed = []
            for reader in begun:
                try:
                    reader.engine.parse_head()
                    parsed.append(reader)
                except BaseException as error:
                    reader.fail(error)
        whole = []
        for reader in parsed:
            try:
                reader.engine.end_head()
                reader.count_request()
                whole.append(reader)
            except BaseException as error:
                reader.fail(error)
        return whole

    def _find_lane(self, requests: int) -> Lane | None:
        if requests < _ENOUGH_FOR_LANE:
            return None
        if self._apart > 0:
            self._apart -= requests
            return None
        if self.spare:
            return self.spare[-1]
        if self._start_soon is not None and not self._is_starting:
            self._start_lane()
        return None

    def _start_lane(self) -> None:
        assert self._start_soon is not None
        self._is_starting = True
        # Its context is the lifespan's: start_soon copies the one it is called in.
        self.worker.base_context.copy().run(
            functools.partial(self._start_soon, name="lane"), serve_lane, self
        )

    def note_started(self) -> None:
        """A lane has begun."""
        self._is_starting = False

    def note_wait(self) -> None:
        """An app has waited for something."""
        self._apart = self._next_apart
        self._next_apart = min(2 * self._next_apart, _MOST_APART)

    def note_no_wait(self) -> None:
        """A whole turn has not."""
        self._next_apart = _REQUESTS_APART
