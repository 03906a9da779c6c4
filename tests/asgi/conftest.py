"""Fixtures of the ASGI tests."""

from __future__ import annotations

import pytest
import trio.testing

ENGINES = ("httptools", "h11")
HUBS = ("epoll", "portable")


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    """Virtual time; bytes in flight between two sockets get the 20 ms that trio cannot see them for."""
    return trio.testing.MockClock(autojump_threshold=0.02)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=HUBS)
def hub(request: pytest.FixtureRequest) -> str:
    return str(request.param)
