"""StatsD: hypercorn's metrics on real UDP sockets, v4 and v6, and what happens when nobody listens."""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypercorn.config import Config

from tests.threads import no_more_threads
from trioserve.errors import ConfigError
from trioserve.observe.access_log import AccessEntry
from trioserve.observe.log_writer import LogWriter
from trioserve.observe.statsd import DATAGRAM_SIZE, StatsdClient, StatsdHandler, parse_statsd_host


def make_entry(status: int | None = 200, seconds: float = 0.25) -> AccessEntry:
    return AccessEntry(0.0, None, None, "http", "GET", b"/", "1.1", [], status, [], 0, 0, seconds)


def bind_server(family: socket.AddressFamily = socket.AF_INET, address: str = "127.0.0.1") -> socket.socket:
    server = socket.socket(family, socket.SOCK_DGRAM)
    server.settimeout(5)
    server.bind((address, 0))
    return server


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with bind_server() as made:
        yield made


def client_for(server: socket.socket, **settings: Any) -> StatsdClient:
    return StatsdClient(server.getsockname()[0], server.getsockname()[1], **settings)


def receive(server: socket.socket) -> list[str]:
    return server.recv(65536).decode().split("\n")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("localhost:8125", ("localhost", 8125)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
        ("[::1]:8125", ("::1", 8125)),
    ],
)
def test_hosts(value: str, expected: tuple[str, int]) -> None:
    assert parse_statsd_host(value) == expected


@pytest.mark.parametrize(
    "value", ["localhost", ":8125", "host:", "host:port", "host:0", "host:65536", "::1:8125", ""]
)
def test_wrong_hosts_are_named(value: str) -> None:
    with pytest.raises(ConfigError, match=r"statsd_host = .* is not HOST:PORT"):
        parse_statsd_host(value)


def test_a_request_sends_hypercorns_metrics(server: socket.socket) -> None:
    client = client_for(server)
    assert client.deliver([make_entry()]) == 0
    assert receive(server) == [
        "hypercorn.request.duration:250.0|ms",
        "hypercorn.requests:1|c|@1.0",
        "hypercorn.request.status.200:1|c|@1.0",
    ]
    assert client.statistics().datagrams_sent == 1
    client.close()
    client.deliver([make_entry()])
    assert client.statistics().errors == 1


def test_prefix_and_tags(server: socket.socket) -> None:
    client = client_for(server, prefix="shop", tags="env:prod,az:b")
    client.deliver([make_entry(status=None)])
    assert receive(server) == [
        "shop.hypercorn.request.duration:250.0|ms|#env:prod,az:b",
        "shop.hypercorn.requests:1|c|@1.0|#env:prod,az:b",
    ]
    client.close()


def test_a_batch_adds_its_counters_up_and_fits_into_datagrams(server: socket.socket) -> None:
    client = client_for(server)
    client.deliver([make_entry(status=200 if number % 4 else 500) for number in range(64)])
    metrics: list[str] = []
    while len(metrics) < 64 + 3:
        datagram = server.recv(65536)
        assert len(datagram) <= DATAGRAM_SIZE
        metrics += datagram.decode().split("\n")
    counted = Counter(metrics)
    assert counted["hypercorn.request.duration:250.0|ms"] == 64
    assert counted["hypercorn.requests:64|c|@1.0"] == 1
    assert counted["hypercorn.request.status.500:16|c|@1.0"] == 1
    client.close()


def test_ipv6() -> None:
    try:
        server = bind_server(socket.AF_INET6, "::1")
    except OSError:
        pytest.skip("no IPv6 loopback here")
    with server:
        config = Config()
        config.statsd_host = f"[::1]:{server.getsockname()[1]}"
        config.statsd_prefix = "p."
        client = StatsdClient.from_config(config)
        assert client is not None
        client.deliver([make_entry()])
        assert receive(server)[1] == "p.hypercorn.requests:1|c|@1.0"
        client.close()


def test_without_statsd_host_there_is_no_client() -> None:
    assert StatsdClient.from_config(Config()) is None


def test_a_host_name_is_resolved_without_holding_up_the_writer(server: socket.socket) -> None:
    client = StatsdClient("localhost", server.getsockname()[1])
    deadline = time.monotonic() + 60
    while not client.statistics().datagrams_sent:
        client.deliver([make_entry()])
        assert time.monotonic() < deadline
        time.sleep(0.005)
    client.close()


def test_a_name_that_does_not_resolve_is_told_once_and_counted(capfd: pytest.CaptureFixture[str]) -> None:
    # Not a legal host name, so no question leaves this machine.
    client = StatsdClient("no such host", 8125)
    deadline = time.monotonic() + 60
    while client.statistics().errors < 5:
        client.deliver([make_entry()])
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert client.statistics().datagrams_sent == 0
    assert "trioserve: cannot resolve 'no such host' of statsd_host: " in capfd.readouterr().err
    assert "errors" in repr(client)
    client.close()


def test_a_name_for_which_there_is_no_thread_is_counted_too() -> None:
    client = StatsdClient("localhost", 8125)
    with no_more_threads():
        client.deliver([make_entry()])
    assert client.statistics().errors >= 1
    client.close()


def test_a_server_that_is_away_costs_errors_and_is_found_again() -> None:
    with bind_server() as first:
        port = first.getsockname()[1]
        client = client_for(first)
        client.deliver([make_entry()])
        assert receive(first)
    deadline = time.monotonic() + 60
    while not client.statistics().errors:  # ECONNREFUSED comes with a later send
        client.deliver([make_entry()])
        assert time.monotonic() < deadline
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
        again.bind(("127.0.0.1", port))
        again.settimeout(5)
        client.deliver([make_entry()])
        client.deliver([make_entry()])
        assert receive(again)[0] == "hypercorn.request.duration:250.0|ms"
    client.close()


def test_log_lines_are_counted_by_level_and_extra_carries_metrics(server: socket.socket) -> None:
    writer = LogWriter(linger=10)
    client = client_for(server)
    logger = logging.Logger("test")  # noqa: LOG001
    logger.addHandler(StatsdHandler(writer.add_lane(client.deliver)))
    logger.debug("no")
    logger.info("no")
    logger.warning("yes")
    logger.warning("yes")
    logger.error("yes")
    logger.critical("yes")
    try:
        raise ValueError
    except ValueError:
        logger.exception("yes")
    logger.info("", extra={"metric": "app.queue", "value": 0, "mtype": "gauge"})
    logger.info("", extra={"metric": "app.jobs", "value": 3, "mtype": "counter"})
    logger.info("", extra={"metric": "app.time", "value": 1.5, "mtype": "histogram"})
    logger.info("", extra={"metric": "app.odd", "value": 1.5, "mtype": "no such"})
    assert writer.close(5)
    assert sorted(receive(server)) == [
        "app.jobs:3|c",
        "app.queue:0|g",
        "app.time:1.5|ms",
        "hypercorn.log.critical:1|c|@1.0",
        "hypercorn.log.error:1|c|@1.0",
        "hypercorn.log.exception:1|c|@1.0",
        "hypercorn.log.warning:2|c|@1.0",
    ]
    client.close()
