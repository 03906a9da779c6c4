"""Metrics for StatsD over UDP, under hypercorn's names, so that dashboards made for hypercorn keep working.

Used by `logs.py`, which puts a lane of the `LogWriter` before it: requests come from the access log, counts
of log lines from a handler on the error logger. Everything here runs in the writer's thread, except resolving
a host name, which has a short thread of its own because it may take seconds. Sending never waits: a full
socket buffer or an unreachable host is counted, as UDP promises no more than that.

Names: `hypercorn.requests`, `hypercorn.request.duration` (ms), `hypercorn.request.status.N`,
`hypercorn.log.{critical,error,warning,exception}`, each behind `statsd_prefix`. Two things differ on the
wire, and mean the same to the server: several metrics share a datagram, and equal counters of a batch are
added up.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trioserve.errors import ConfigError
from trioserve.observe.access_log import AccessEntry
from trioserve.observe.log_file import tell_stderr
from trioserve.observe.log_writer import Lane

# Stays whole on Ethernet: 1,500 bytes less the IPv6 and UDP headers, and some for a tunnel.
DATAGRAM_SIZE = 1400
# A name that does not resolve, or an address that refuses, is looked up again no more often than this.
RESOLVE_INTERVAL = 30.0
# hypercorn's (and before it gunicorn's) way to send a metric of one's own: logger.info("", extra={...}).
_TYPES = {"gauge": "g", "counter": "c", "histogram": "ms"}

_Address = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class StatsdStatistics:
    """What a `StatsdClient` has sent, and what it could not send."""

    datagrams_sent: int
    errors: int


class StatsdClient:
    """A connected UDP socket and the text of the metrics."""

    def __init__(self, host: str, port: int, *, prefix: str = "", tags: str = "") -> None:
        self._host = host
        self._port = port
        self._prefix = prefix if not prefix or prefix.endswith(".") else prefix + "."
        self._tags = f"|#{tags}" if tags else ""
        self._socket: socket.socket | None = None
        self._resolved: tuple[socket.AddressFamily, _Address] | None = None
        self._resolving = False
        self._told = False  # that the name does not resolve
        self._resolve_at = 0.0
        self._datagrams_sent = 0
        self._errors = 0
        self._resolve_numeric()

    @classmethod
    def from_config(cls, config: Any) -> StatsdClient | None:
        """A client for `statsd_host`, or None where that is not set."""
        if not config.statsd_host:
            return None
        host, port = parse_statsd_host(config.statsd_host)
        return cls(host, port, prefix=config.statsd_prefix or "", tags=config.dogstatsd_tags or "")

    def __repr__(self) -> str:
        return f"<StatsdClient {self._host}:{self._port}, {self._datagrams_sent} sent, {self._errors} errors>"

    def statistics(self) -> StatsdStatistics:
        """A frozen picture."""
        return StatsdStatistics(self._datagrams_sent, self._errors)

    def deliver(self, batch: Sequence[AccessEntry | logging.LogRecord]) -> int:
        """Send what a batch of the lane amounts to; always takes all of it."""
        counters: Counter[str] = Counter()
        metrics: list[str] = []
        for record in batch:
            if isinstance(record, AccessEntry):
                counters["hypercorn.requests"] += 1
                if record.status is not None:
                    counters[f"hypercorn.request.status.{record.status}"] += 1
                metrics.append(self._metric("hypercorn.request.duration", record.seconds * 1000, "ms"))
            else:
                self._count_log_record(record, counters, metrics)
        metrics += [self._metric(name, count, "c|@1.0") for name, count in counters.items()]
        self._send(metrics)
        return 0

    def close(self) -> None:
        """Close the socket; later batches are counted as errors."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._resolved = None
        self._resolve_at = float("inf")

    def _count_log_record(
        self, record: logging.LogRecord, counters: Counter[str], metrics: list[str]
    ) -> None:
        kind = _log_metric(record)
        if kind is not None:
            counters[kind] += 1
        own = (
            getattr(record, "metric", None),
            getattr(record, "value", None),
            getattr(record, "mtype", None),
        )
        name, value, mtype = own
        if name and value is not None and mtype in _TYPES:
            metrics.append(self._metric(str(name), value, _TYPES[mtype]))

    def _metric(self, name: str, value: object, kind: str) -> str:
        return f"{self._prefix}{name}:{value}|{kind}{self._tags}"

    def _send(self, metrics: list[str]) -> None:
        target = self._connected()
        for datagram in _pack(metrics):
            if target is None:
                self._errors += 1
                continue
            try:
                target.send(datagram)
                self._datagrams_sent += 1
            except BlockingIOError:
                self._errors += 1
            except OSError:
                # Refused or unreachable: the name may point elsewhere by now.
                self._errors += 1
                self._lose()
                target = self._connected()

    def _connected(self) -> socket.socket | None:
        if self._socket is None and self._resolved is not None:
            family, address = self._resolved
            fresh = socket.socket(family, socket.SOCK_DGRAM)
            try:
                fresh.setblocking(False)
                fresh.connect(address)
            except OSError:
                fresh.close()
                self._resolved = None
            else:
                self._socket = fresh
        if self._socket is None:
            self._resolve_later()
        return self._socket

    def _lose(self) -> None:
        """The address did not work; a name is looked up again in a while, a numeric address kept."""
        if time.monotonic() < self._resolve_at:
            return
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._resolve_at = time.monotonic() + RESOLVE_INTERVAL
        self._resolve_numeric()

    def _resolve_numeric(self) -> None:
        try:
            self._resolve(socket.AI_NUMERICHOST)
        except OSError:
            self._resolved = None

    def _resolve(self, flags: int) -> None:
        found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_DGRAM, flags=flags)
        family, _, _, _, address = found[0]
        self._resolved = (family, address)

    def _resolve_later(self) -> None:
        if self._resolving or self._resolved is not None or time.monotonic() < self._resolve_at:
            return
        self._resolving = True
        self._resolve_at = time.monotonic() + RESOLVE_INTERVAL
        thread = threading.Thread(
            target=self._resolve_in_thread, name="trioserve-statsd-resolve", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # no room for one now
            self._errors += 1
            self._resolving = False

    def _resolve_in_thread(self) -> None:
        try:
            self._resolve(0)
        except OSError as error:
            self._errors += 1
            if not self._told:
                self._told = True
                reason = error.strerror or error
                tell_stderr(
                    f"cannot resolve {self._host!r} of statsd_host: {reason}; no metrics until it can be"
                )
        else:
            self._told = False
        finally:
            self._resolving = False


class StatsdHandler(logging.Handler):
    """Counts the lines of the error logger, as hypercorn does, and carries metrics given by `extra`."""

    def __init__(self, lane: Lane) -> None:
        super().__init__()
        self._lane = lane

    def emit(self, record: logging.LogRecord) -> None:
        """Queue what the counters need of it: the record itself would keep its exception's frames alive."""
        if record.levelno < logging.WARNING and getattr(record, "metric", None) is None:
            return
        bare = logging.LogRecord(record.name, record.levelno, "", 0, "", None, None)
        bare.exc_info = (None, None, None) if record.exc_info else None
        for key in ("metric", "value", "mtype"):
            if hasattr(record, key):
                setattr(bare, key, getattr(record, key))
        self._lane.put(bare)


def parse_statsd_host(value: str) -> tuple[str, int]:
    """`host:port`, `1.2.3.4:8125` or `[::1]:8125` as host and port."""
    host, colon, port_text = value.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    try:
        port = int(port_text)
    except ValueError:
        port = 0
    if not colon or not host or not 0 < port < 65536 or (":" in host and not bracketed):
        raise ConfigError(
            f"statsd_host = {value!r} is not HOST:PORT; write for example '127.0.0.1:8125' or '[::1]:8125'"
        )
    return host, port


def _log_metric(record: logging.LogRecord) -> str | None:
    if record.levelno >= logging.CRITICAL:
        return "hypercorn.log.critical"
    if record.levelno >= logging.ERROR:
        return "hypercorn.log.exception" if record.exc_info else "hypercorn.log.error"
    if record.levelno >= logging.WARNING:
        return "hypercorn.log.warning"
    return None


def _pack(metrics: list[str]) -> list[bytes]:
    """Datagrams of whole lines, none longer than `DATAGRAM_SIZE` unless one metric alone is."""
    datagrams: list[bytes] = []
    current = b""
    for metric in metrics:
        line = metric.encode("utf-8", "replace")
        if current and len(current) + 1 + len(line) > DATAGRAM_SIZE:
            datagrams.append(current)
            current = line
        else:
            current = current + b"\n" + line if current else line
    if current:
        datagrams.append(current)
    return datagrams
