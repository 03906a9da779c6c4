"""A load client that accounts for every request and retries nothing, for tests in which servers come and go.

    load = Load(address, connections=64)
    async with load.running():
        ...
    assert not load.failures

Each connection sends a request as soon as it has the last answer, and opens another where the server has said that it
closes. A request counts as failed when its connection ends, or stays silent, before its answer is whole, and when a
connection is refused or reset. What the client cannot know it does not guess: nothing is sent twice.

A server that drains waits for a last request (`LAST_REQUEST_PATIENCE`). Who is kept from the CPU for most
of it has missed that, and a request that then meets a closed connection is no loss of the server's. So the client
watches its own pauses.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import socket
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass

import trio

from trioserve.structure.context import LAST_REQUEST_PATIENCE
from trioserve.testing import connect

# No answer of the tests' apps takes so long.
_PATIENCE = 60.0

# How often the client looks whether it gets its turn, and how late it must be to have missed something.
_BEAT = 0.02
_PAUSE = LAST_REQUEST_PATIENCE / 2


@dataclass(frozen=True, slots=True)
class Failure:
    """One request that got no whole answer, and which worker had its connection (its pid; 0: not known)."""

    at: float
    error: str
    worker: int


class Load:
    """Requests on a fixed number of connections, for as long as it runs.

    Attributes:
        answered: requests that were answered in full with status 200.
        failures: all others, less those that the client has missed itself.
        missed: how many those are.
        workers: how many answers came from each worker, by pid (the app answers with it).
        longest_pause: for how long the client has got no turn.
    """

    def __init__(self, address: str, connections: int, *, path: str = "/pid") -> None:
        self._address = address
        self._connections = connections
        self._path = path
        self._numbers = itertools.count()
        self._stopping = False
        self.answered = 0
        self.failures: list[Failure] = []
        self.missed = 0
        self.longest_pause = 0.0
        self._beat_at = 0.0
        self._paused_at = -math.inf
        self.workers: Counter[int] = Counter()
        self.connected: Counter[int] = Counter()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Load]:
        """Ask while the block runs; at its end every connection finishes the request it is at."""
        self._beat_at = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_pauses)
            for _ in range(self._connections):
                nursery.start_soon(self._ask_for_ever)
            try:
                yield self
            finally:
                self._stopping = True

    async def wait_for(self, more: int) -> None:
        """Return once so many more requests have been answered."""
        goal = self.answered + more
        with trio.move_on_after(_PATIENCE):
            while self.answered < goal:
                await trio.sleep(0.01)
            return
        raise AssertionError(f"no {more} more within {_PATIENCE:g} s: {self}")

    def __str__(self) -> str:
        kinds = Counter(failure.error for failure in self.failures)
        missed = f"{self.missed} missed in pauses of up to {self.longest_pause:.1f} s"
        return f"{self.answered} answered, {len(self.failures)} failed: {dict(kinds)}, {missed}"

    async def _watch_pauses(self) -> None:
        while not self._stopping:
            self._note_turn()
            await trio.sleep(_BEAT)

    def _note_turn(self) -> None:
        now = trio.current_time()
        pause, self._beat_at = now - self._beat_at, now
        self.longest_pause = max(self.longest_pause, pause)
        if pause > _PAUSE:
            self._paused_at = now

    def _has_paused(self) -> bool:
        """So lately that a drain may have come and gone meanwhile."""
        self._note_turn()
        return trio.current_time() - self._paused_at < LAST_REQUEST_PATIENCE

    async def _ask_for_ever(self) -> None:
        while not self._stopping:
            try:
                client = connect(self._address)
            except OSError as error:
                self._fail(f"connect: {errno.errorcode.get(error.errno or 0)}", 0)
                await trio.sleep(0.05)
                continue
            try:
                with client.sock:
                    await self._ask_on(client.sock)
            except _Lost as lost:
                self._fail(lost.args[0], lost.args[1])

    async def _ask_on(self, sock: socket.socket) -> None:
        """Requests on one connection until the server says that it closes, or it has closed in between."""
        worker = 0
        while not self._stopping:
            # A close that is here before we send is no loss: the server had every right to it.
            if worker and _is_closed(sock):
                break
            number = next(self._numbers)
            request = f"GET {self._path}?n={number} HTTP/1.1\r\nHost: test\r\nX-Number: {number}\r\n\r\n"
            try:
                sock.send(request.encode())
                status, closes, body = await _read_response(sock)
            except OSError as error:
                if self._has_paused():
                    self.missed += 1
                    break
                raise _Lost(errno.errorcode.get(error.errno or 0, str(error)), worker) from None
            except EOFError as error:
                raise _Lost(str(error), worker) from None
            except trio.TooSlowError:
                raise _Lost("no answer", worker) from None
            if status != 200:
                raise _Lost(f"status {status}", worker)
            if not worker:
                worker = int(body)
                self.connected[worker] += 1
            self.answered += 1
            self.workers[worker] += 1
            if closes:
                break

    def _fail(self, error: str, worker: int) -> None:
        self.failures.append(Failure(trio.current_time(), error, worker))


class _Lost(Exception):
    """A request without an answer: why, and whose it was."""


def _is_closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


async def _read_response(sock: socket.socket) -> tuple[int, bool, bytes]:
    received = b""
    with trio.fail_after(_PATIENCE):
        while b"\r\n\r\n" not in received or len(received) < _length(received):
            await trio.lowlevel.wait_readable(sock)
            try:
                data = sock.recv(65536)
            except OSError:
                if not received:
                    raise
                data = b""
            if not data:
                if received:
                    raise EOFError("broken off in mid-answer")
                raise ConnectionAbortedError(errno.ECONNABORTED, "closed without an answer")
            received += data
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head[9:12]), b"\r\nconnection: close" in head.lower(), body


def _length(received: bytes) -> int:
    head, _, _ = received.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(head) + 4 + int(line[15:])
    raise AssertionError(f"an answer without a length: {head!r}")
