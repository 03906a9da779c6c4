"""Listening sockets that are abandoned: nobody new is to be queued there once no worker accepts any more.

Workers have copies, and close them when they begin to drain; an address refuses as soon as the last copy is closed.
But who is still in a startup that blocks does not hear that it is to end, and its copy goes on queueing clients whom
nobody will serve. shutdown(2) ends the listening of all copies at once (Linux), so ours is kept for that, as long as
there is such a worker. `pool.py` makes one `AbandonedSockets`, which looks at them again whenever something happens to
a worker. Nothing here waits.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterable
from contextlib import suppress

from trioserve.supervisor.worker_process import WorkerProcess


class AbandonedSockets:
    """Those of one pool that are not closed yet."""

    def __init__(self) -> None:
        self._kept: list[socket.socket] = []

    def __repr__(self) -> str:
        return f"<AbandonedSockets {self._kept}>"

    def add(self, sockets: Iterable[socket.socket]) -> None:
        """From now on they are ours to close. Nobody but these workers may be listening on them, or be about to."""
        self._kept += sockets

    def review(self, workers: Collection[WorkerProcess]) -> None:
        """Close those that `workers` close by themselves, and end the listening of those that nobody else will."""
        self._kept = [sock for sock in self._kept if not _let_go(sock, workers)]


def _let_go(sock: socket.socket, workers: Iterable[WorkerProcess]) -> bool:
    """Whether it could be closed."""
    holders = [worker for worker in workers if sock in worker.sockets]
    if any(worker.may_be_deaf for worker in holders):
        if any(worker.may_accept for worker in holders):
            return False  # these are to serve what is queued
        _end_listening(sock)
    sock.close()
    return True


def _end_listening(sock: socket.socket) -> None:
    """Turn away who is queued, and who is yet to connect."""
    with suppress(OSError):  # elsewhere than on Linux it may not work: then it ends with the last copy
        sock.shutdown(socket.SHUT_RDWR)
        while True:  # of a unix socket the kernel keeps the queue
            sock.accept()[0].close()
