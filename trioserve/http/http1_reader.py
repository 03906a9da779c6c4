"""Reading in the place of a connection's task: heads of requests, and what can be answered without waking it.

`http1.py` has one `RequestReader` for each connection. While the connection's task waits for a request, the hub has it
read in the task's place (`RequestReader.pull`), and a `RequestTurn` (`http1_turn.py`) takes all that were read together
through the steps below: to wake a task for a file that is in memory costs as much as to answer, and many apps have
their answer ready without waiting for anything. Whatever is not over with that is the task's, which goes on where this
has stopped. Only `end_of_run` waits; cancelling it cancels the app.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from trio.lowlevel import Abort, reschedule, wait_task_rescheduled

from trioserve.http.engine import NO_FIELDS, Engine
from trioserve.http.http1_exchange import Http1Exchange
from trioserve.http.http_exchange import log_exchange
from trioserve.http.quick import Quick
from trioserve.http.response import prepare_message
from trioserve.net.watch import WOKEN
from trioserve.observe.in_flight import NO_REQUEST, PATH_SIZE
from trioserve.static.answers import Answer
from trioserve.static.request_fields import pick_fields
from trioserve.structure.boundary import is_cancellation
from trioserve.structure.context import ConnectionContext, Scope
from trioserve.structure.deadlines import NEVER

if TYPE_CHECKING:
    from trioserve.http.http1_lane import Lane


class _Sent(NamedTuple):
    """What the access log wants to know of an exchange, where there was none."""

    started_at: float
    head_at: float
    status: int
    fields: Sequence[tuple[bytes, bytes]]
    response_bytes: int


class RequestReader:
    """Reads the requests of one connection, and sees them answered without its task where that is possible.

    Attributes:
        connection, engine: whose requests, and what parses them.
        data: what was read and the engine has not taken.
        answer: to the request whose head the engine has, if it has an answer which was not sent, or only in part.
        has_head: there is a whole head, and its request is counted; the task takes this back.
        scope: for the app, once the connection has an exchange for it; who runs the app takes it.
        was_run: the app was run, or is being, in a lane; then `end_of_run` tells how it ended.
        run_error: what the app has raised there.
        watch: the connection's; `watch.taken` is its task while the app is to be run in a lane, or has been.
    """

    __slots__ = (
        "_ask", "_asks_early", "_error", "_is_awaited", "_keep_alive", "_lane", "_most_requests", "_root_path",
        "_times", "answer", "connection", "data", "engine", "has_head", "run_error", "scope", "was_run", "watch",
    )  # fmt: skip

    def __init__(self, connection: ConnectionContext, engine: Engine, quick: Quick | None) -> None:
        self.connection = connection
        self.engine = engine
        self.watch = connection.transport.watch
        engine.keeps_fields = quick is not None
        self._ask = None if quick is None else quick[0]
        self._root_path = "" if quick is None else quick[1]
        worker = connection.worker
        # A request that may have to wait for its place is the task's.
        self._asks_early = quick is not None and worker.admission is None
        self._keep_alive = worker.timeouts.keep_alive
        self._most_requests = (
            worker.limits.keep_alive_requests if self._keep_alive and worker.admission is None else 0
        )
        self._times = worker.timeouts.request is not NEVER
        self.answer: Answer | None = None
        self.has_head = False
        self.data: bytes | None = None
        self._error: BaseException | None = None
        self.scope: Scope | None = None
        self.was_run = self._is_awaited = False
        self._lane: Lane | None = None
        self.run_error: BaseException | None = None

    # -- reading, in the hub's task; all of a turn take a step before any takes the next ---------------------

    def pull(self) -> RequestReader | bool:
        """Read what there is: False if that is nothing, True if it is the task's; otherwise to be gone on with."""
        try:
            data = self.connection.transport.recv_nowait()
        except BaseException as error:  # as in `fail`
            self._error = error
            return True
        if data is None:
            return False
        self.data = data
        return self

    def count_request(self) -> None:
        """The engine has a whole head. Raises what the app's answers do."""
        self.connection.requests += 1
        if self._asks_early:
            self.answer = self.ask()
        self.data = None
        self.has_head = True

    def fail(self, error: BaseException) -> None:
        """Have the task judge an error; here it would be the end of the hub."""
        self._error = error
        self.data = None
        self.wake()

    def take(self) -> bytes | None:
        """What `pull` has read and the engine has not; None if there is nothing. Raises what it has met."""
        self.raise_error()
        data, self.data = self.data, None
        return data

    def raise_error(self) -> None:
        """Raise what was met in the task's place."""
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # nor has this frame, which its traceback holds, a name for it

    def wake(self) -> None:
        """Have the task see to the rest, if it still waits."""
        watch = self.watch
        task = watch.taken or watch.reader
        if task is not None:
            watch.taken = watch.reader = None
            reschedule(task, WOKEN)

    # -- answers without the app -----------------------------------------------------------------------------

    def ask(self) -> Answer | None:
        """The answer to the request whose head the engine has."""
        assert self._ask is not None  # otherwise nobody asks
        engine = self.engine
        fields: Mapping[bytes, bytes] | None = engine.fields
        if fields is None:
            fields = pick_fields(engine.headers)
        raw_path = engine.target.partition(b"?")[0]
        return self._ask(engine.method, raw_path, fields, self._root_path)

    def answer_now(self) -> bool:
        """Answer the request whose head the engine has, in a call or two; True if that was all there is to do.

        For the connection's task. Otherwise `answer` is what to go on with, and where some of it was sent, the
        connection has an exchange.

        Raises:
            OSError: the connection is broken.
        """
        connection = self.connection
        was_read, self.has_head = self.has_head, False
        if not was_read:
            connection.requests += 1
        elif connection.exchange is not None or (self.answer is None and self._asks_early):
            return False
        self.answer = self.ask()  # also if the hub has: nobody has held its file since
        return self._answer_at_once()

    def _answer_at_once(self) -> bool:
        answer = self.answer
        if answer is None:
            return False
        engine = self.engine
        connection = self.connection
        worker = connection.worker
        transport = connection.transport
        if (
            engine.method != "GET"
            or not engine.keep_alive
            or engine.content_length != 0  # the body, if it is here, has to be thrown away
            or engine.version != "1.1"
            or worker.draining
            or transport.watch.hangup
            or connection.requests >= self._most_requests
        ):
            return False
        now = worker.clock()
        message = answer.message
        defaults = worker.response_defaults
        if message is None or now >= answer.message_until or answer.message_by is not defaults:
            message = prepare_message(answer, defaults, now)
            if message is None:
                return False
        size = len(message)
        file = answer.file
        if file is None:
            length = len(answer.body)
            sent = transport.send_nowait(message)
        else:
            span = answer.span
            if span is None:
                return False
            length = span.stop - span.start
            size += length
            begun = worker.files.begin(transport, message, file, span.start, length, now)
            if begun is None:
                return False
            sent = begun
        if sent < size:
            connection.exchange = exchange = Http1Exchange(connection, engine, now, True)
            exchange.take_rest(answer, message, sent)
            return False
        if worker.access_log is not None:
            sent_answer = _Sent(now, now, answer.status, answer.fields, length)
            log_exchange(connection, engine.request_facts(), sent_answer, "complete")
        self.answer = None  # it may hold a file that the cache gives up
        engine.headers, engine.fields = NO_FIELDS, None
        connection.phase = "keep_alive"
        connection.deadline = deadline = now + self._keep_alive
        if deadline < connection.armed_at:
            worker.deadlines.arm(connection)
        return True

    def send_answer(self, has_time: Callable[[], bool]) -> bool:
        """Send the answer in the task's place; True if the task was woken, for that or for what is left to do."""
        is_over = False
        if has_time():
            try:
                is_over = self._answer_at_once()
            except BaseException as error:  # as in `fail`
                self._error = error
                is_over = True
        if is_over:
            self.has_head = False
            self.data = self.engine.leftover or None
            if self._error is None and self.data is None and not self.watch.readable:
                return False
        self.wake()
        return True

    # -- running the app in a lane ---------------------------------------------------------------------------

    def prepare(self, now: float) -> bool:
        """Make exchange and scope for the app, which is to be run in a lane; False if the task was woken for that.

        `now` is trio's clock, looked at once for all of a turn.
        """
        connection = self.connection
        worker = connection.worker
        engine = self.engine
        watch = self.watch
        task = watch.reader
        if (
            task is None
            or worker.draining
            or watch.hangup
            or connection.requests >= self._most_requests
            # Only the connection's task reads a body, changes the protocol, and closes.
            or (engine.is_odd and not (engine.body_complete and engine.keep_alive and engine.upgrade is None))
        ):
            self.wake()
            return False
        connection.phase = "request"
        connection.deadline = NEVER
        connection.exchange = exchange = Http1Exchange(connection, engine, now, True)
        if self._times:
            connection.begin_handler(now + worker.timeouts.request)
        try:
            self.scope = scope = exchange.scope()
        except BaseException as error:  # as in `fail`
            self._error = error
            self.wake()
            return False
        slot = connection.slot
        if slot is not None:
            # For the supervisor, should this be the end of the process.
            if engine.method is not slot.method:
                slot.write_method(engine.method)
            slot.path.value = scope["raw_path"][:PATH_SIZE]
        watch.taken = task
        watch.reader = None
        return True

    def finish(self) -> None:
        """The app has ended well without waiting for anything: be ready for the next request, if that is all."""
        connection = self.connection
        worker = connection.worker
        engine = self.engine
        watch = self.watch
        if watch.taken is None:
            return  # the task has it, or was cancelled
        exchange: Http1Exchange = connection.exchange  # type: ignore[assignment]  # from `prepare`
        completed_at = exchange.completed_at
        if (
            not exchange.keep_alive
            or worker.draining
            or engine.body
            or (not completed_at and (exchange.queue or connection.transport.broken is not None))
        ):
            self.give_back()
            return
        if worker.access_log is not None:
            try:
                log_exchange(connection, engine.request_facts(), exchange, "complete")
            except BaseException as error:  # as in `fail`
                self._error = error
                self.give_back()
                return
        connection.exchange = None
        if connection.slot is not None:
            connection.slot.whole.value = NO_REQUEST
        # As in `Http1.serve`.
        engine.headers, engine.fields = NO_FIELDS, None
        self.has_head = False
        connection.phase = "keep_alive"
        connection.deadline = deadline = (completed_at or worker.clock()) + self._keep_alive
        if deadline < connection.armed_at:
            worker.deadlines.arm(connection)
        self.data = engine.leftover or None
        if self.data is not None or watch.readable:
            self.wake()
        else:
            watch.reader, watch.taken = watch.taken, None

    def give_back(self) -> None:
        """The app has ended, and there is more to do: have the task see to it."""
        self.was_run = True
        self.wake()

    def begin_wait(self, lane: Lane) -> None:
        """The app waits for something: it goes on in `lane`, and the task in `end_of_run`."""
        self.was_run = True
        self._lane = lane
        self.wake()

    def end_wait(self, error: BaseException | None) -> None:
        """The app has ended in its lane."""
        self._lane = None
        self.run_error = error
        if self._is_awaited:
            self._is_awaited = False
            reschedule(self.connection.task, WOKEN)

    async def end_of_run(self) -> BaseException | None:
        """Wait until the app has ended in its lane; returns what it has raised.

        Cancelling this cancels the app; it is over when the app is.
        """
        self.was_run = False
        lane = self._lane
        if lane is not None:
            raise_cancel: Callable[[], Any] | None = None

            def abort(cancel: Callable[[], Any]) -> Abort:
                nonlocal raise_cancel
                raise_cancel = cancel
                lane.scope.cancel(reason=self.connection.why_cancelled())
                return Abort.FAILED

            self._is_awaited = True
            await wait_task_rescheduled(abort)
            if raise_cancel is not None and self.run_error is not None and is_cancellation(self.run_error):
                self.run_error = None
                raise_cancel()
        error, self.run_error = self.run_error, None
        return error
