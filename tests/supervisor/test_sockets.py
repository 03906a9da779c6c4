"""What becomes of a supervisor's listening sockets: which are given up with whom, and what a successor is told."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from trioserve.config import Config
from trioserve.supervisor.sockets import ACTIVATED, SocketStore


@pytest.fixture
def store() -> Iterator[SocketStore]:
    found = SocketStore()
    yield found
    found.close()


def config(*binds: str) -> Config:
    return Config.from_mapping(bind=list(binds))


@pytest.mark.parametrize("key", [ACTIVATED, "fd://7"])
def test_what_others_have_opened_is_only_closed(key: str, store: SocketStore) -> None:
    """Its listening is theirs to end: the service manager keeps the queue for who is started next."""
    with socket.create_server(("127.0.0.1", 0)) as theirs:
        store.adopt(key, [os.dup(theirs.fileno())])
        asked = Config() if key == ACTIVATED else config(key)
        (ours,) = store.sockets_for(asked)
        assert store.leave_to_workers(asked) == []
        assert ours.fileno() == -1
        with socket.create_connection(theirs.getsockname()), theirs.accept()[0]:
            pass


def test_what_is_retired_keeps_its_file_and_is_no_news_to_a_successor(
    store: SocketStore, tmp_path: Path
) -> None:
    kept, dropped = f"unix:{tmp_path / 'kept'}", f"unix:{tmp_path / 'dropped'}"
    store.open(config(kept, dropped))
    (ours,) = store.sockets_for(config(dropped))
    assert store.retire_others(config(kept)) == [ours]
    assert store.retire_others(config(kept)) == []
    with ours:
        descriptors, numbers = store.describe_for_upgrade(3)
        assert (len(descriptors), numbers) == (1, {kept: [3]})
        assert Path(dropped[5:]).exists()
        (taken,) = store.sockets_for(config(kept))
        assert store.hand_over() == [taken]
    assert Path(kept[5:]).exists()
    assert not Path(dropped[5:]).exists()


def test_what_is_retired_is_dropped_in_the_end_and_may_come_back(store: SocketStore, tmp_path: Path) -> None:
    kept, dropped = f"unix:{tmp_path / 'kept'}", f"unix:{tmp_path / 'dropped'}"
    store.open(config(kept, dropped))
    for sock in store.retire_others(config(kept)):
        sock.close()
    assert store.drop_others(config(kept)) == []
    assert not Path(dropped[5:]).exists()
    assert list(store.open(config(kept, dropped))) == [dropped]
    assert len(store.describe_for_upgrade(3)[0]) == 2
