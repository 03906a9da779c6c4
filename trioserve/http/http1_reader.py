"""Reading in the place of a connection's task: heads of requests, and what can be answered without running the app.

`http1.py` has one `RequestReader` for each connection. While the connection's task waits for a request, the hub reads
it in the task's place (`RequestReader.pull`), and where the app has its answer ready before there is a scope to ask
with, sends that: to wake a task for a file that is in memory costs as much as to answer. All requests of a turn are
read before the first of them is answered, here or by its task: so each part of the interpreter and of the kernel is
used many times while it is in the processor's caches. Whatever is not over with that is the task's, which goes on where
this has stopped. Nothing in here waits, so there is nothing to cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from trioserve.http.engine import END_OF_HEAD, NO_FIELDS, Engine
from trioserve.http.http1_exchange import Http1Exchange
from trioserve.http.http_exchange import log_exchange
from trioserve.http.quick import Quick
from trioserve.http.response import prepare_message
from trioserve.static.answers import Answer
from trioserve.static.request_fields import pick_fields
from trioserve.structure.context import ConnectionContext


class _Sent(NamedTuple):
    """What the access log wants to know of an exchange, where there was none."""

    started_at: float
    head_at: float
    status: int
    fields: Sequence[tuple[bytes, bytes]]
    response_bytes: int


class RequestReader:
    """Reads the requests of one connection, and answers at once where that is possible.

    Attributes:
        answer: to the request whose head the engine has, if it has an answer which was not sent, or only in part.
        has_head: `pull` has read a whole head and counted the request; `answer` is what was found then. The task takes
            this back.
    """

    __slots__ = (
        "_ask", "_asks_early", "_connection", "_data", "_engine", "_error", "_keep_alive", "_most_requests",
        "_root_path", "answer", "has_head",
    )  # fmt: skip

    def __init__(self, connection: ConnectionContext, engine: Engine, quick: Quick | None) -> None:
        self._connection = connection
        self._engine = engine
        self._ask = None if quick is None else quick[0]
        self._root_path = "" if quick is None else quick[1]
        worker = connection.worker
        # A request that may have to wait for its place is the task's.
        self._asks_early = quick is not None and worker.admission is None
        self._keep_alive = worker.timeouts.keep_alive
        self._most_requests = (
            worker.limits.keep_alive_requests if self._asks_early and self._keep_alive else 0
        )
        self.answer: Answer | None = None
        self.has_head = False
        self._data: bytes | None = None
        self._error: BaseException | None = None

    def ask(self) -> Answer | None:
        """The answer to the request whose head the engine has."""
        assert self._ask is not None  # otherwise nobody asks
        engine = self._engine
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
        connection = self._connection
        was_read, self.has_head = self.has_head, False
        if not was_read:
            connection.requests += 1
        elif connection.exchange is not None or (self.answer is None and self._asks_early):
            return False
        self.answer = self.ask()  # also if `pull` has: nobody has held its file since
        return self._answer_at_once()

    def _answer_at_once(self) -> bool:
        answer = self.answer
        if answer is None:
            return False
        engine = self._engine
        connection = self._connection
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
        if message is None or now >= answer.message_until:
            message = prepare_message(answer, worker.response_defaults, now)
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

    # -- in the place of the waiting task --------------------------------------------------------------------

    def pull(self) -> bool | Callable[[], bool]:
        """Read a request; False if there is none, so that the task may wait on, True if the task must be woken.

        Where there is an answer, the method that sends it: to be called in the same turn, before any task runs; it
        returns the same. Who is woken finds what there is by `has_head` and `take`. Raises nothing.
        """
        try:
            data = self._connection.transport.recv_nowait()
            if data is None:
                return False
            if not data.endswith(END_OF_HEAD) and (END_OF_HEAD not in data or data.startswith(b"\r")):
                self._data = data  # a part of a head, whose phase is the task's to begin
            elif self._engine.receive_head(data):
                self._connection.requests += 1
                if self._asks_early:
                    self.answer = self.ask()
                self.has_head = True
                if self.answer is not None:
                    return self._send
        except BaseException as error:  # to be judged as the task's; here it would be the end of the hub
            self._error = error
        return True

    def _send(self) -> bool:
        try:
            if not self._answer_at_once():
                return True
        except BaseException as error:  # as above
            self._error = error
        self.has_head = False
        self._data = self._engine.leftover or None
        return self._error is not None or self._data is not None or self._connection.transport.watch.readable

    def take(self) -> bytes | None:
        """What `pull` has read and the engine has not; None if there is nothing. Raises what it has met."""
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # nor has this frame, which its traceback holds, a name for it
        data, self._data = self._data, None
        return data
