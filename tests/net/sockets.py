"""Connected sockets for the tests of the hub and the transport."""

from __future__ import annotations

import resource
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import trio
from trio.testing import wait_all_tasks_blocked

from trioserve.net.hub import Hub, open_hub
from trioserve.net.transport import Transport
from trioserve.net.watch import Watch

HUBS = ("epoll", "portable")


@contextmanager
def tcp_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of one TCP connection on loopback; ours first, non-blocking."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    with ours, peer:
        ours.setblocking(False)
        for sock in (ours, peer):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield ours, peer


@contextmanager
def unix_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of one unix connection; ours first, non-blocking."""
    ours, peer = socket.socketpair()
    with ours, peer:
        ours.setblocking(False)
        yield ours, peer


PAIRS = {"tcp": tcp_pair, "unix": unix_pair}


def reset(peer: socket.socket) -> None:
    """Close with RST."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def fill(sock: socket.socket) -> int:
    """Write until the kernel takes no more; the number of bytes."""
    total = 0
    while True:
        try:
            total += sock.send(b"x" * 65536)
        except BlockingIOError:
            return total


async def drain(peer: socket.socket) -> None:
    """Read all that is there, and let the others have their turns."""
    try:
        while peer.recv(1 << 20):
            pass
    except BlockingIOError:
        await wait_all_tasks_blocked(0.001)


async def receive_exactly(transport: Transport, size: int, read_size: int = 65536) -> bytes:
    """Read as a connection does: at once, and wait only when nothing is there."""
    parts = []
    while size:
        data = transport.recv_nowait(min(size, read_size))
        if data is None:
            await transport.watch.wait_readable()
            continue
        if not data:
            raise EOFError(f"the stream ended {size} bytes early")
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


async def send_all(transport: Transport, data: bytes) -> None:
    """Write as a connection does."""
    rest = memoryview(data)
    while rest:
        sent = transport.send_nowait(rest)
        rest = rest[sent:]
        if rest:
            await transport.watch.wait_writable()


@asynccontextmanager
async def parked(wait: Callable[..., Awaitable[None]], *args: Any) -> AsyncIterator[None]:
    """The block runs when a task waits by `wait(*args)`, and has to do what lets it go on."""
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, *args)
            await wait_all_tasks_blocked()
            yield


async def check_one_wake_up(
    wait: Callable[[Callable[[], bool]], Awaitable[None]],
    make_ready: Callable[[trio.CancelScope], Awaitable[None]],
) -> None:
    """What the hub calls in a task's place runs `on_hangup`, which may cancel that very task."""
    scope = trio.CancelScope()

    def cancel() -> bool:
        scope.cancel()
        return True

    async def wait_in_scope() -> None:
        with scope:
            await wait(cancel)

    async with parked(wait_in_scope):
        await make_ready(scope)
    assert scope.cancelled_caught
    await wait_all_tasks_blocked()  # the hub goes on


class Waiters:
    """Tasks that wait on a watch, and what came of it."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.results: dict[str, str] = {}

    async def start(self, watch: Watch, role: str, name: str | None = None) -> None:
        """Begin to wait for `role` (readable, writable, hangup) and return once the task is parked."""
        name = name or role
        self._nursery.start_soon(self._wait, watch, role, name)
        await wait_all_tasks_blocked()

    async def _wait(self, watch: Watch, role: str, name: str) -> None:
        try:
            await getattr(watch, f"wait_{role}")()
        except trio.ClosedResourceError:
            self.results[name] = "closed"
        else:
            self.results[name] = "ready"


@contextmanager
def open_hub_of(kind: str) -> Iterator[Hub]:
    """A hub that is not running yet; closed at the end."""
    hub = open_hub(kind)  # type: ignore[arg-type]
    try:
        yield hub
    finally:
        hub.close()


@asynccontextmanager
async def running_hub(kind: str) -> AsyncIterator[Hub]:
    """A hub that dispatches while the block runs; a lost wake-up ends it with an error."""
    with open_hub_of(kind) as hub:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hub.run)
            nursery.start_soon(_give_up)
            yield hub
            nursery.cancel_scope.cancel()


async def _give_up() -> None:
    await trio.sleep(30)
    raise TimeoutError("a test of the hub hangs: a wake-up was lost")


async def waits(watch: Watch, role: str = "readable") -> bool:
    """Whether a wait would last; the wait is cancelled again."""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_wait_and_cancel, watch, role, nursery)
            await wait_all_tasks_blocked(0.01)
            scope.cancel()
    return scope.cancelled_caught


async def _wait_and_cancel(watch: Watch, role: str, nursery: trio.Nursery) -> None:
    await getattr(watch, f"wait_{role}")()
    nursery.cancel_scope.cancel()


def affordable_pairs(count: int) -> int:
    """As many connections as the limit on open files lets this process have, `count` at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * count + 200
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return min(count, (soft - 200) // 2)
    return count
