"""The tasks in which the app is run on many requests, one after the other, for as long as it waits for nothing.

Most apps answer most requests without ever waiting. To wake the task of each connection for that makes trio, our loop
and the app put each other out of the processor's first cache at every request; a lane has the app run on all requests
of a turn before anything else is done (0.9 of what a request cost). As soon as an app does wait, the
lane is that request's: it takes the app to its end, the connection's task waits for that, and what is left of the turn
goes to the tasks of its connections. A lane has a cancel scope, which the connection's task cancels when it is
cancelled itself; so the app is where it would be in that task. `http1_turn.py` starts lanes and gives them work.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import trio
from trio.lowlevel import Abort, current_task

from trioserve.asgi.exchange import ResponseState
from trioserve.errors import TaskLeak
from trioserve.http.http1_reader import RequestReader
from trioserve.net.watch import wait_again, wait_request
from trioserve.structure.boundary import is_cancellation, is_scope_corruption
from trioserve.structure.context import ASGIApp, ConnectionContext, Receive, Scope, Send
from trioserve.structure.leaks import leak, outlive_leak

if TYPE_CHECKING:
    from trioserve.http.http1_turn import RequestTurn

_COMPLETE = ResponseState.COMPLETE

# In the place of what a coroutine waits for.
_ENDED = object()

# What trio calls the innermost cancel scope that is open in a task; see `Lane._outside`.
_STATUS = "_cancel_status"

# Idle ones beyond these end.
_MOST_SPARE = 4


class Lane:
    """One such task.

    Attributes:
        task: itself.
        scope: what the request is cancelled by that it has to itself.
        connection: whose request it runs, or has run last.
        readers: whose requests are to be run when it is woken.
        leaked: an app has left a nursery or a cancel scope open in here.
    """

    __slots__ = (
        "_ended", "_opened", "_outside", "_turn", "connection", "leaked", "readers", "scope", "task",
    )  # fmt: skip

    def __init__(self, turn: RequestTurn) -> None:
        self._turn = turn
        self.task = current_task()
        self.scope = trio.CancelScope()
        self.connection: ConnectionContext | None = None
        self.readers: list[RequestReader] = []
        self.leaked = False
        self._ended: list[RequestReader] = []
        self._opened = False  # the outbox
        # Where the apps begin, and have to be again when they end; another one while a cancel scope or a nursery is
        # open in the task. trio tells of scopes that were left open only to who leaves the one around them: a scope for
        # each request would cost as much as a lane saves, and without a look at this the next requests would run in a
        # scope that is not theirs. None if trio has it no more: then only nurseries are noticed.
        self._outside: object = None

    def __repr__(self) -> str:
        return f"<Lane {'idle' if self in self._turn.spare else f'of {self.connection!r}'}>"

    def abort(self, _raise_cancel: Callable[[], Any]) -> Abort:
        """Cancelled while it was waiting for work."""
        self._turn.spare.remove(self)
        return Abort.SUCCEEDED

    def is_wanted(self) -> bool:
        """Whether to go on: no app has left anything open in here, and not enough others have no work."""
        return not self.leaked and len(self._turn.spare) < _MOST_SPARE

    async def run_turns(self, request: Any) -> tuple[RequestReader, Begun] | None:
        """Run what the turns of the hub bring, until an app waits for something; as `run_all`.

        `request` is what the lane waits for work with; no attribute, since it refers to the lane. None: this lane is
        not wanted any more.
        """
        turn = self._turn
        while self.is_wanted():
            self.connection = None  # an idle lane holds nothing of the last request's
            turn.spare.append(self)
            await wait_again(request)
            waiting = self.run_all()
            if waiting is not None:
                return waiting
            turn.note_no_wait()
        return None

    def run_all(self) -> tuple[RequestReader, Begun] | None:
        """Run the app on all requests until it waits for something; the request that it waits in, if there is one.

        That one has to be awaited at once: nothing may wake this task before trio knows that it waits.
        """
        turn, task = self._turn, self.task
        app, new_context = turn.app, turn.worker.base_context.copy
        readers, self.readers = self.readers, []
        self._ended = ended = []
        self._outside = outside = getattr(task, _STATUS, None)
        self._opened = not turn.outbox.is_open
        if self._opened:
            turn.outbox.open()
        waiting: tuple[RequestReader, Begun] | None = None
        try:
            for reader in readers:
                if reader.watch.taken is None:
                    continue  # its connection was cancelled meanwhile
                self.connection = connection = reader.connection
                exchange: Any = connection.exchange
                scope: Any = reader.scope
                reader.scope = None
                context = new_context()
                try:
                    coroutine = app(scope, exchange.receive, exchange.send)
                    # Its `send` would have to raise an exception to say that it has ended.
                    trap = context.run(next, coroutine.__await__(), _ENDED)
                except BaseException as error:
                    reader.run_error = error
                else:
                    if trap is not _ENDED:
                        # From its next step on: so this is the context in which the app goes on.
                        task.context = context
                        waiting = reader, Begun(coroutine, trap)
                        break
                ended.append(reader)
                if reader.run_error is not None or exchange.state is not _COMPLETE:
                    reader.give_back()  # now: it must not be lost if the connection is cancelled next
                if task.child_nurseries if outside is None else task._cancel_status is not outside:
                    reader.run_error = self._note_leak(reader.run_error)
                    reader.give_back()
                    break
        finally:
            if len(ended) < len(readers):
                self._hand_back(readers, waiting)
            if waiting is None:
                self.finish_all()
        return waiting

    def _hand_back(self, readers: list[RequestReader], waiting: tuple[RequestReader, Begun] | None) -> None:
        """What was not run is for the tasks of its connections."""
        seen_to = set(self._ended)
        if waiting is not None:
            reader, _ = waiting
            seen_to.add(reader)
            reader.begin_wait(self)
            # All posts are sent before the hub reads on. Not this one, nor are lines logged: both may wake the app.
            outbox = self._turn.outbox
            outbox.flush_but(reader.connection.exchange)
            if self._opened:
                outbox.is_open = self._opened = False
            self._turn.worker.flusher.request(self.finish_all)
        for reader in readers:
            if reader not in seen_to and reader.watch.taken is not None:
                reader.wake()

    def finish_all(self) -> None:
        """Send what was left in the outbox, and see to those whose app has ended."""
        if self._opened:
            self._turn.outbox.close()
        else:
            self._turn.outbox.flush()
        ended, self._ended = self._ended, []
        for reader in ended:
            reader.finish()

    async def take_to_end(self, reader: RequestReader, begun: Begun) -> None:
        """Have an app that waits go on until it ends.

        Raises:
            trio.Cancelled: it was cancelled, and knows.
        """
        error: BaseException | None = None
        try:
            await begun
        except BaseException as raised:
            error = raised
        if self.task.child_nurseries or getattr(self.task, _STATUS, None) is not self._outside:
            error = self._note_leak(error)
        self.task.context = self._turn.worker.base_context.copy()
        reader.end_wait(error)
        try:
            if error is not None and is_cancellation(error):
                raise error
        finally:
            del error

    def _note_leak(self, error: BaseException | None) -> TaskLeak:
        self.leaked = True
        return leak("its", error, "nursery" if self.task.child_nurseries else "cancel scope")


class Begun:
    """A coroutine whose first step was taken already; awaiting it takes the others.

    `cr_frame` and `cr_await` are what `trio.lowlevel.Task.iter_await_frames` follows: so whoever looks at the task sees
    where the app waits.
    """

    __slots__ = ("_coroutine", "_first", "send", "throw")

    def __init__(self, coroutine: Coroutine[Any, Any, object], first: object) -> None:
        self._coroutine = coroutine
        self._first: Any = (first,)
        self.send = coroutine.send
        self.throw = coroutine.throw

    def __await__(self) -> Begun:
        return self

    def __iter__(self) -> Begun:
        return self

    def __next__(self) -> Any:
        if self._first is not None:
            (first,), self._first = self._first, None
            return first
        return self.send(None)

    def close(self) -> None:
        """End the coroutine."""
        self._coroutine.close()

    @property
    def cr_frame(self) -> Any:
        """The coroutine's frame."""
        return self._coroutine.cr_frame  # type: ignore[attr-defined]  # a native one

    @property
    def cr_await(self) -> Any:
        """What the coroutine awaits."""
        return self._coroutine.cr_await  # type: ignore[attr-defined]  # as above


def as_coroutine_function(app: ASGIApp) -> Callable[[Scope, Receive, Send], Coroutine[Any, Any, object]]:
    """The app as something that does nothing when it is called but to return a native coroutine.

    `inspect.iscoroutinefunction` is no help: what is only marked as a coroutine function may return anything.
    """
    function = app if isinstance(app, types.FunctionType | types.MethodType) else type(app).__call__
    code = getattr(function, "__code__", None)
    if code is not None and code.co_flags & inspect.CO_COROUTINE:
        return app  # type: ignore[return-value]  # as the flag says

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)

    return call


async def serve_lane(turn: RequestTurn) -> None:
    """Run what there is to run, again and again. Nothing that an app raises comes out of it."""
    lane = Lane(turn)
    worker = turn.worker
    request = wait_request(lane.abort)
    worker.lanes.add(lane)
    turn.note_started()
    try:
        while lane.is_wanted():
            # Another after each request that had it to itself, with which it may have been cancelled.
            with trio.CancelScope() as lane.scope:
                waiting = await lane.run_turns(request)
                if waiting is not None:
                    turn.note_wait()
                    await lane.take_to_end(*waiting)
                    waiting = None
            lane.connection = None
    except BaseException as error:
        if is_cancellation(error):
            raise
        if not (lane.leaked and is_scope_corruption(error)):  # else judged by who had the request
            worker.boundary.judge_own(lane.connection, error)
    finally:
        worker.lanes.discard(lane)
    if lane.task.child_nurseries:
        await outlive_leak(lane.task)
