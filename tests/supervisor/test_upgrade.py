"""What a supervisor and its successor tell each other, who may be of different versions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from trioserve.errors import BindError
from trioserve.supervisor.upgrade import Predecessor, take_upgrade

VARIABLE = "TRIOSERVE__UPGRADE"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    os.close(read)


def told(**orders: object) -> Predecessor:
    environ = {VARIABLE: json.dumps({"sockets": {"localhost:80": [3, 4]}, **orders}), "PATH": "/bin"}
    found = take_upgrade(environ)
    assert environ == {"PATH": "/bin"}
    assert found is not None
    return found


def test_who_was_started_by_nobody_replaces_nobody() -> None:
    assert take_upgrade({"PATH": "/bin"}) is None


def test_a_successor_learns_what_is_and_says_what_will_not_be(pipe: tuple[int, int]) -> None:
    found = told(ready=pipe[1], workers=[[1, 2], 5])
    assert (found.sockets, found.limits, found.wanted) == ({"localhost:80": [3, 4]}, (1, 2), 5)
    found.replace(["localhost:80"])
    assert os.read(pipe[0], 100) == b'ready["localhost:80"]'
    assert os.read(pipe[0], 100) == b"", "and nothing more follows"


def test_an_older_predecessor_says_nothing_of_its_workers(pipe: tuple[int, int]) -> None:
    found = told(ready=pipe[1])
    assert (found.limits, found.wanted) == ((0, 0), 0)
    found.replace([])


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"ready": 3}', '{"sockets": {}, "ready": 999999}'])
def test_what_no_supervisor_has_written_is_named(text: str) -> None:
    with pytest.raises(BindError, match=f"{VARIABLE} = .* is not what a supervisor hands to its successor"):
        take_upgrade({VARIABLE: text})
