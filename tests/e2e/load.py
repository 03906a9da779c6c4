"""A load client that accounts for every request and retries nothing, for tests in which servers come and go.

    load = Load(address, connections=64)
    async with load.running():
        ...
    assert not load.failures

Each connection sends a request as soon as it has the last answer, and opens another where the server has said that it
closes. A request counts as failed when its connection ends, or stays silent, before its answer is whole, and when a
connection is refused or reset. What the client cannot know it does not guess: nothing is sent twice.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import socket
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass

import trio

from trioserve.testing import connect

# No answer of the tests' apps takes so long.
_PATIENCE = 20.0


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
        failures: all others.
        workers: how many answers came from each worker, by pid (the app answers with it).
    """

    def __init__(self, address: str, connections: int, *, path: str = "/pid") -> None:
        self._address = address
        self._connections = connections
        self._path = path
        self._numbers = itertools.count()
        self._stopping = False
        self.answered = 0
        self.failures: list[Failure] = []
        self.workers: Counter[int] = Counter()
        self.connected: Counter[int] = Counter()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Load]:
        """Ask while the block runs; at its end every connection finishes the request it is at."""
        async with trio.open_nursery() as nursery:
            for _ in range(self._connections):
                nursery.start_soon(self._ask_for_ever)
            try:
                yield self
            finally:
                self._stopping = True

    async def wait_for(self, more: int) -> None:
        """Return once so many more requests have been answered."""
        goal = self.answered + more
        with trio.fail_after(_PATIENCE):
            while self.answered < goal:
                await trio.sleep(0.01)

    def __str__(self) -> str:
        kinds = Counter(failure.error for failure in self.failures)
        return f"{self.answered} answered, {len(self.failures)} failed: {dict(kinds)}"

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
            data = sock.recv(65536)
            if not data:
                raise EOFError("closed in mid-answer" if received else "closed without an answer")
            received += data
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head[9:12]), b"\r\nconnection: close" in head.lower(), body


def _length(received: bytes) -> int:
    head, _, _ = received.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(head) + 4 + int(line[15:])
    raise AssertionError(f"an answer without a length: {head!r}")
