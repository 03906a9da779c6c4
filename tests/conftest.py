"""What holds for all tests."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import trio.testing

from tests.hangs import keep_stderr, pytest_timeout_cancel_timer, pytest_timeout_set_timer  # noqa: F401  (hooks)
from tests.http.feeding import ENGINES
from tests.http.http2_feeding import HTTP2_ENGINES
from tests.modes import add_modes, drop_repetitions, mode  # noqa: F401  (a fixture for all tests)
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
    drop_repetitions(items)


# Servers that these start run what others run too, beside other programs; measuring them would find nothing new, and it
# takes a third of a process's start.
_NOT_MEASURED = frozenset(
    {
        "test_autobahn.py",
        "test_bench.py",
        "test_browser.py",
        "test_chaos.py",
        "test_chat.py",
        "test_cold_files.py",
        "test_curl.py",
        "test_dictionaries_browser.py",
        "test_docs_site.py",
        "test_downloads.py",
        "test_examples.py",
        "test_framework_websockets.py",
        "test_frameworks.py",
        "test_h2_tools.py",
        "test_httplint.py",
        "test_hypercorn_parity.py",
        "test_pid_1.py",
        "test_proxies.py",
        "test_readme.py",
        "test_restarts.py",
        "test_scaling.py",
        "test_static_beside_nginx.py",
        "test_ticker.py",
        "test_tls_scan.py",
        "test_wheel.py",
    }
)
# Where coverage leaves its configuration for the processes that are started.
_COVERAGE = "COVERAGE_PROCESS_CONFIG"
_coverage_config = pytest.StashKey[str]()


@pytest.hookimpl(tryfirst=True)  # before fixtures start servers
def pytest_runtest_setup(item: pytest.Item) -> None:
    stash = item.config.stash
    if _COVERAGE in os.environ:
        stash[_coverage_config] = os.environ[_COVERAGE]
    if item.path.name in _NOT_MEASURED:
        os.environ.pop(_COVERAGE, None)
    elif _coverage_config in stash:
        os.environ[_COVERAGE] = stash[_coverage_config]


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that the test starts run without coverage."""
    monkeypatch.delenv(_COVERAGE, raising=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--plain", action="store_true", help="do not repeat tests in other modes (tests/modes.py)"
    )
    parser.addoption("--lanes", action="store_true", help="run apps in lanes from the first request on")


def pytest_configure(config: pytest.Config) -> None:
    keep_stderr(config)
    config.addinivalue_line(
        "markers", "modes(*names, because=''): runs in these modes, too; see tests/modes.py"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    add_modes(metafunc)


@pytest.fixture
def autojump_clock(mode: str) -> trio.testing.MockClock:  # noqa: F811
    """Virtual time; bytes in flight between two sockets get the 20 ms that trio cannot see them for.

    With TLS there are several flights before the first byte, and a core that does something else meanwhile is not
    waiting: more, or the clock jumps to the end of the handshake's time.
    """
    return trio.testing.MockClock(autojump_threshold=0.02 if mode == "plain" else 0.2)


# On the wire, the one that users have, and the reference; each is held to the rules by itself in `test_engine_…`.
@pytest.fixture(params=(ENGINES[0], ENGINES[-1]))
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=HTTP2_ENGINES)
def http2_engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=HUBS)
def hub(request: pytest.FixtureRequest) -> str:
    return str(request.param)
