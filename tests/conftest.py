"""What holds for all tests."""

from __future__ import annotations

import signal

import pytest
import trio.testing

from tests.http.feeding import ENGINES
from tests.net.sockets import HUBS

# A shell that starts the tests in the background makes them, and every process they start, ignore SIGINT; servers
# that are started here must hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
