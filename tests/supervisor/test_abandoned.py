"""Who is turned away where nobody is to accept any more, and who is not."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trioserve.supervisor.abandoned import AbandonedSockets


@pytest.fixture(params=["tcp", "unix"])
def listening(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    family, place = (
        (socket.AF_INET, ("127.0.0.1", 0))
        if request.param == "tcp"
        else (socket.AF_UNIX, str(tmp_path / "s"))
    )
    with socket.socket(family) as sock:
        sock.bind(place)
        sock.listen()
        sock.setblocking(False)
        yield sock


@pytest.fixture
def copy(listening: socket.socket) -> Iterator[socket.socket]:
    """A worker's."""
    with listening.dup() as sock:
        yield sock


def connect(place: Any, family: int) -> socket.socket:
    sock = socket.socket(family)
    sock.settimeout(60)
    try:
        sock.connect(place)
    except OSError:
        sock.close()
        raise
    return sock


def a_worker(sock: socket.socket, *, deaf: bool = False, accepts: bool = False) -> Any:
    return SimpleNamespace(sockets=[sock], may_be_deaf=deaf, may_accept=accepts)


def test_where_nobody_accepts_who_is_deaf_queues_nobody(
    listening: socket.socket, copy: socket.socket
) -> None:
    place, family = listening.getsockname(), listening.family
    abandoned = AbandonedSockets()
    with connect(place, family) as queued:
        abandoned.add([listening])
        abandoned.review([a_worker(listening, deaf=True)])
        assert listening.fileno() == -1
        with pytest.raises(ConnectionRefusedError):
            connect(place, family)
        try:
            assert queued.recv(1) == b""
        except ConnectionResetError:
            pass


def test_who_accepts_is_let_finish(listening: socket.socket, copy: socket.socket) -> None:
    place, family = listening.getsockname(), listening.family
    deaf, accepting = a_worker(listening, deaf=True), a_worker(listening, accepts=True)
    abandoned = AbandonedSockets()
    abandoned.add([listening])
    abandoned.review([deaf, accepting])
    with connect(place, family), copy.accept()[0]:
        pass
    accepting.may_accept = False
    abandoned.review([deaf, accepting])
    with pytest.raises(ConnectionRefusedError):
        connect(place, family)


@pytest.mark.parametrize("accepts", [True, False], ids=["accepting", "about to close"])
def test_where_all_hear_it_is_left_to_them(
    accepts: bool, listening: socket.socket, copy: socket.socket
) -> None:
    place, family = listening.getsockname(), listening.family
    abandoned = AbandonedSockets()
    abandoned.add([listening])
    abandoned.review([a_worker(listening, accepts=accepts), a_worker(copy, deaf=True)])
    assert listening.fileno() == -1
    with connect(place, family), copy.accept()[0]:
        pass
    copy.close()
    with pytest.raises(ConnectionRefusedError):
        connect(place, family)


def test_where_a_system_cannot_it_ends_with_the_last_copy() -> None:
    class Unwilling(socket.socket):
        def shutdown(self, how: int) -> None:
            raise OSError(errno.ENOTCONN, "as on macOS")

    sock = Unwilling()
    abandoned = AbandonedSockets()
    abandoned.add([sock])
    abandoned.review([a_worker(sock, deaf=True)])
    assert sock.fileno() == -1
