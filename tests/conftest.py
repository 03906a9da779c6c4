"""What holds for all tests."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import trio.testing

from tests.http.feeding import ENGINES
from tests.net.sockets import HUBS

# A shell that starts the tests in the background makes them, and every process they start, ignore SIGINT; servers
# that are started here must hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What is imported from here on is not kept compiled, neither here nor in a process that a test starts.

    An app that a test rewrites within a second, at the same length, would be taken for the old one.
    """
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


# Where tests that are marked `alone` may be: the run that has only those need not collect the others (see Makefile).
_ALONE_IN = ("e2e", "observe")


@pytest.hookimpl(tryfirst=True)  # before `-m` takes any out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("alone") and item.path.parent.name not in _ALONE_IN:
            raise pytest.UsageError(
                f"{item.nodeid} is marked `alone`: such tests are run from {_ALONE_IN} only"
            )


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
