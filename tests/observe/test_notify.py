"""What the service manager hears, over a real datagram socket; and that nothing happens where there is none."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from trioserve.observe.notify import Notifier, clean_environment, run_watchdog

LOG = logging.getLogger("tests.notify")


class Manager:
    """The other end."""

    def __init__(self, address: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(address.replace("@", "\0", 1))
        self.sock.setblocking(False)
        self.address = address

    def heard(self) -> list[list[str]]:
        """All messages so far, each as its lines."""
        found = []
        while True:
            try:
                found.append(self.sock.recv(4097).decode().split("\n"))
            except BlockingIOError:
                return found

    def notifier(self, **more: str) -> Notifier:
        return Notifier({"NOTIFY_SOCKET": self.address, **more}, LOG)

    def close(self) -> None:
        self.sock.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    name = f"@trioserve-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
    with closing(Manager(name)) as manager:
        yield manager


# -- messages -----------------------------------------------------------------------------------------------------


def test_each_message_is_one_datagram_as_the_protocol_has_it(manager: Manager) -> None:
    notifier = manager.notifier()
    assert notifier.is_on
    notifier.ready("2 workers")
    notifier.stopping("draining: SIGTERM")
    notifier.status("half way")
    notifier.main_pid(42)
    notifier.feed()
    notifier.extend_timeout(1.5)
    assert manager.heard() == [
        ["READY=1", "STATUS=2 workers"],
        ["STOPPING=1", "STATUS=draining: SIGTERM"],
        ["STATUS=half way"],
        ["MAINPID=42"],
        ["WATCHDOG=1"],
        ["EXTEND_TIMEOUT_USEC=1500000"],
    ]


def test_reloading_carries_the_monotonic_time_in_microseconds(manager: Manager) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    manager.notifier().reloading()
    ((reloading, stamp),) = manager.heard()
    assert reloading == "RELOADING=1"
    name, _, value = stamp.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(value) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_a_status_can_neither_say_anything_else_nor_be_too_long(manager: Manager) -> None:
    notifier = manager.notifier()
    notifier.ready("a\nMAINPID=1\r\n  b\udcff")
    notifier.status("\N{GRINNING FACE}" * 5000)
    first, second = manager.heard()
    assert first == ["READY=1", "STATUS=a MAINPID=1 b?"]
    assert second[0].endswith("\N{GRINNING FACE}")
    assert len(second[0].encode()) < 4096


# -- nobody there -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"WATCHDOG_USEC": "1000000"}])
async def test_without_a_socket_it_does_nothing(environ, caplog) -> None:
    notifier = Notifier(environ, LOG)
    assert not notifier.is_on
    assert notifier.watchdog_interval is None
    notifier.ready("x")
    notifier.feed()
    await run_watchdog(notifier, lambda: True)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("/nonexistent/notify", "No such file or directory"),
        ("/" + "x" * 200, "AF_UNIX path too long"),
        ("vsock:2:1234", "expected a path, or a name after @"),
        ("relative", "expected a path, or a name after @"),
    ],
)
def test_a_failure_is_logged_once_and_never_raised(address, reason, caplog) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address}, LOG)
    for _ in range(3):
        notifier.ready("x")
        notifier.feed()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"cannot tell the service manager READY: {reason}")
    assert f"NOTIFY_SOCKET={address!r}" in record.getMessage()


def test_after_a_success_the_next_failure_is_logged_again(tmp_path: Path, caplog) -> None:
    path = tmp_path / "notify"
    notifier = Notifier({"NOTIFY_SOCKET": str(path)}, LOG)
    notifier.feed()
    with closing(Manager(str(path))) as manager:
        notifier.feed()
        assert manager.heard() == [["WATCHDOG=1"]]
    notifier.feed()
    assert len(caplog.records) == 2


def test_a_manager_that_does_not_read_holds_nobody_up_for_long(tmp_path: Path, caplog) -> None:
    with closing(Manager(str(tmp_path / "notify"))) as manager:
        notifier = manager.notifier()
        for _ in range(100_000):
            notifier.feed()
            if caplog.records:
                break
        began = time.monotonic()
        notifier.feed()
        assert time.monotonic() - began < 5
        assert "cannot tell the service manager WATCHDOG: " in caplog.text


# -- the watchdog -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pid", "interval"),
    [(None, 1.5), ("", 1.5), pytest.param(str(os.getpid()), 1.5, id="ours"), ("1", None), ("x", None)],
)
def test_the_watchdog_is_fed_twice_in_its_time_by_the_process_it_watches(manager, pid, interval) -> None:
    more = {} if pid is None else {"WATCHDOG_PID": pid}
    assert manager.notifier(WATCHDOG_USEC="3000000", **more).watchdog_interval == interval


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", "9" * 30])
def test_a_watchdog_time_that_is_none_is_logged(manager: Manager, value: str, caplog) -> None:
    assert manager.notifier(WATCHDOG_USEC=value).watchdog_interval is None
    assert f"WATCHDOG_USEC={value!r} in the environment: expected microseconds" in caplog.text


async def test_it_is_fed_only_while_healthy(manager: Manager, autojump_clock: MockClock, caplog) -> None:
    caplog.set_level(logging.INFO)
    notifier = manager.notifier(WATCHDOG_USEC="20000000")
    healthy = True

    def heard() -> int:
        messages = manager.heard()
        assert all(message == ["WATCHDOG=1"] for message in messages)
        return len(messages)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_watchdog, notifier, lambda: healthy)
        await trio.sleep(35)
        assert heard() == 4  # at 0, 10, 20, 30
        healthy = False
        await trio.sleep(100)
        assert heard() == 0
        healthy = True
        await trio.sleep(10)
        assert heard() == 1
        nursery.cancel_scope.cancel()
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]


# -- environments -------------------------------------------------------------------------------------------------


def test_children_get_nothing_that_is_meant_for_us() -> None:
    ours = {
        "NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "LISTEN_PID": "1", "LISTEN_FDS": "1",
        "LISTEN_FDNAMES": "a",
    }  # fmt: skip
    assert clean_environment({**ours, "PATH": "/bin"}) == {"PATH": "/bin"}


def test_a_successor_gets_the_way_to_the_manager_and_the_watchdog() -> None:
    environ = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid()), "A": "1"}
    passed_on = Notifier(environ, LOG).successor_environment()
    assert passed_on == {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "2000000"}
    assert Notifier(passed_on, LOG).watchdog_interval == 1
    assert Notifier({}, LOG).successor_environment() == {}


def test_it_describes_itself() -> None:
    assert repr(Notifier({"NOTIFY_SOCKET": "@x"}, LOG)) == "<Notifier @x>"
    assert repr(Notifier({}, LOG)) == "<Notifier off>"
