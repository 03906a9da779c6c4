"""Accepting connections: admit, accept a batch, start a task for each.

One task per listening socket, in a scope of its own that a drain cancels first. Cancelling it accepts nothing more;
what has been accepted lives on in the connections' nursery.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable

import trio

from trioserve.net.bind import describe
from trioserve.net.certificates import Certificates
from trioserve.net.share_board import Patience, Share
from trioserve.net.transport import Transport
from trioserve.structure.context import Address, ConnectionContext, WorkerContext
from trioserve.worker.connection import serve_connection

# The machine is out of something that connections closing elsewhere give back (accept(2)).
_OUT_OF_CAPACITY = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

# The connection died in the queue, or the network said so meanwhile (accept(2)): not the listener's problem.
_ONLY_THIS_ONE = frozenset(
    getattr(errno, name)
    for name in (
        "ECONNABORTED", "EPERM", "EPROTO", "ENETDOWN", "ENOPROTOOPT", "EHOSTDOWN", "ENONET", "EHOSTUNREACH",
        "EOPNOTSUPP", "ENETUNREACH", "EINTR",
    )
    if hasattr(errno, name)
)  # fmt: skip

# The peer has reset it between our accept and the first thing we asked of it.
_RESET_MEANWHILE = frozenset({errno.ENOTCONN, errno.EINVAL, errno.ECONNRESET})

# Pause when out of descriptors: connections wait in the kernel's queue meanwhile and none is lost; ranch and trio
# take the same 100 ms. A connection that closes here ends the pause early.
_CAPACITY_PAUSE = 0.1

# The longest queue that the kernel keeps for a socket of somebody else's making, by default (somaxconn, listen(2)).
_QUEUE_MAX = 4096

# An exhausted machine would otherwise fill the log at ten lines a second.
_LOG_INTERVAL = 10.0


class Listener:
    """One listening socket of the worker."""

    def __init__(
        self,
        worker: WorkerContext,
        sock: socket.socket,
        connections: trio.Nursery,
        certificates: Certificates | None = None,
    ) -> None:
        self._worker = worker
        self._sock = sock
        self._connections = connections
        self._certificates = certificates
        self._name = describe(sock, "http" if certificates is None else "https")
        self._address = _server_address(sock)
        self._last_complaint = float("-inf")
        self._patience = Patience()

    def __repr__(self) -> str:
        return f"<Listener {self._name}>"

    async def run(self) -> None:
        """Accept until cancelled.

        Raises:
            OSError: the listening socket itself is broken.
        """
        worker = self._worker
        batch = worker.config.accept_batch
        limit = worker.config.max_connections
        fd = self._sock.fileno()
        while True:
            while limit is not None and len(worker.connections) >= limit:
                worker.stand_aside()
                await worker.room.park()
            # A drain may have closed the socket in the very turn in which this task was woken, or was to begin.
            await trio.lowlevel.checkpoint_if_cancelled()
            await trio.lowlevel.wait_readable(fd)
            await trio.lowlevel.checkpoint_if_cancelled()
            room = batch if worker.share is None else min(batch, await self._find_fair_room(worker.share))
            if limit is not None:
                room = min(room, limit - len(worker.connections))
            if not self.accept(room):
                await self._wait_capacity()

    async def _find_fair_room(self, share: Share) -> int:
        """How many connections are ours to take; waits a moment if they are another worker's."""
        worker = self._worker
        patience = self._patience
        worker.count_share()
        while (room := share.room(len(worker.connections))) <= 0:
            await trio.sleep(patience.pause)
            worker.count_share()
            if share.room(len(worker.connections)) <= 0:
                most = patience.judge(queued=self._is_queued())
                if most is not None:
                    return most
        patience.reset()
        return room

    def _is_queued(self) -> bool:
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        return bool(poller.poll(0))

    def accept_last(self) -> None:
        """Accept all that the kernel has queued: whoever is left in the queue of a closed socket is reset.

        Raises:
            OSError: as `run`.
        """
        self.accept(max(self._worker.config.backlog, _QUEUE_MAX) + 1)

    def accept(self, most: int) -> bool:
        """Accept up to `most` queued connections; False if the machine has no room for more."""
        for _ in range(most):
            try:
                sock, peer = self._sock.accept()
            except BlockingIOError:
                return True
            except OSError as error:
                if error.errno in _OUT_OF_CAPACITY:
                    self._complain(error)
                    return False
                if error.errno not in _ONLY_THIS_ONE:
                    raise
                continue
            self._start(sock, peer)
        return True

    def _start(self, sock: socket.socket, peer: object) -> None:
        worker = self._worker
        client: Address | None = None
        server = self._address
        try:
            sock.setblocking(False)
            if self._sock.family != socket.AF_UNIX:
                assert isinstance(peer, tuple)
                client = (peer[0], peer[1])
                if server is None:
                    server = _server_address(sock)
            if self._certificates is None:
                transport = Transport(sock, worker.hub.watch(sock))
            else:
                transport = self._certificates.wrap(sock, worker.hub)
        except OSError as error:
            sock.close()
            if error.errno in _RESET_MEANWHILE:
                worker.counters.peer_gone += 1
            else:
                self._complain(error)
            return
        worker.counters.connections += 1
        connection = ConnectionContext(worker, transport, client, server)
        # The task's context is the lifespan's, not this listener's: start_soon copies the context it is called in.
        worker.base_context.copy().run(_start_task, self._connections.start_soon, connection)

    async def _wait_capacity(self) -> None:
        self._worker.stand_aside()
        with trio.move_on_after(_CAPACITY_PAUSE):
            await self._worker.room.park()
        self._worker.note_share()

    def _complain(self, error: OSError) -> None:
        now = self._worker.clock()
        if now - self._last_complaint >= _LOG_INTERVAL:
            self._last_complaint = now
            self._worker.error_log.warning(
                "cannot accept on %s: %s; pausing until there is room (%d connections open; for more, raise the limit "
                "on open files)",
                self._name,
                os.strerror(error.errno or 0),
                len(self._worker.connections),
            )


def _start_task(start_soon: Callable[..., None], connection: ConnectionContext) -> None:
    start_soon(serve_connection, connection, name="connection")


def _server_address(sock: socket.socket) -> Address | None:
    """The address for `scope["server"]`; None for a wildcard listener, where each connection has its own."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return os.fsdecode(name), None
    return None if name[0] in ("0.0.0.0", "::") and _is_listener(sock) else (name[0], name[1])  # noqa: S104


def _is_listener(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return True
    return False
