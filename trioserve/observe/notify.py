"""What the process tells its service manager: ready, reloading, stopping, alive (sd_notify(3), protocol of systemd).

Held by whoever owns the service's main process: the supervisor, or the worker that has none (`worker/command.py`).
Without `NOTIFY_SOCKET` everything here does nothing. Nothing here raises: a service that serves must not end because
nobody listens to what it says of itself. Cancelling `run_watchdog` stops the feeding, and the service manager then
ends the process in its own time.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping

import trio

from trioserve.net.activation import ACTIVATION_VARIABLES

NOTIFY_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")

# The queue of the service manager's socket is full only while it hangs itself. We wait that long for it, no longer:
# this stops the event loop.
_SEND_TIMEOUT = 0.2

# systemd throws away messages above 4096 bytes; a character has four at most.
_STATUS_LENGTH = 900


class Notifier:
    """The way to the service manager, if there is one.

    Attributes:
        log: where the failures go, the first of a row.
        watchdog_interval: how often `feed` is to be called, in seconds: half of what the manager allows. None where
            it has no watchdog, or one for another process.
    """

    def __init__(self, environ: Mapping[str, str], log: logging.Logger) -> None:
        self.log = log
        self._socket = environ.get("NOTIFY_SOCKET", "")
        self._watchdog_usec = environ.get("WATCHDOG_USEC", "")
        self._failing = False
        self.watchdog_interval = (
            self._find_watchdog(environ.get("WATCHDOG_PID", "")) if self._socket else None
        )

    def __repr__(self) -> str:
        return f"<Notifier {self._socket or 'off'}>"

    @property
    def is_on(self) -> bool:
        """Somebody wants to hear."""
        return bool(self._socket)

    def ready(self, status: str) -> None:
        """Startup, or a reload, is complete."""
        self._send(READY=1, STATUS=_one_line(status))

    def reloading(self) -> None:
        """A reload has begun; `ready` ends it. The time stamp tells this reload from an earlier one."""
        self._send(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)

    def stopping(self, status: str) -> None:
        """The end has begun, by our own decision or the manager's."""
        self._send(STOPPING=1, STATUS=_one_line(status))

    def status(self, text: str) -> None:
        """What `systemctl status` shows in one line."""
        self._send(STATUS=_one_line(text))

    def main_pid(self, pid: int) -> None:
        """Another process of this service takes over. With `NotifyAccess=main` only the old one is believed."""
        self._send(MAINPID=pid)

    def feed(self) -> None:
        """Alive: the watchdog's time starts again."""
        self._send(WATCHDOG=1)

    def extend_timeout(self, seconds: float) -> None:
        """Startup or shutdown goes on, and is to be given at least this much longer from now on."""
        self._send(EXTEND_TIMEOUT_USEC=int(seconds * 1e6))

    def successor_environment(self) -> dict[str, str]:
        """The variables for a process that is to become the main one after us; whose the watchdog is is left out."""
        found = {"NOTIFY_SOCKET": self._socket, "WATCHDOG_USEC": self._watchdog_usec}
        return {name: value for name, value in found.items() if value}

    def _find_watchdog(self, pid: str) -> float | None:
        usec = self._watchdog_usec
        if not usec or (pid and pid != str(os.getpid())):
            return None
        if not usec.isascii() or not usec.isdigit() or len(usec) > 20 or int(usec) == 0:
            self.log.warning(
                "WATCHDOG_USEC=%r in the environment: expected microseconds; not feeding the watchdog", usec
            )
            return None
        return int(usec) / 2e6

    def _send(self, **assignments: object) -> None:
        if not self._socket:
            return
        message = "\n".join(f"{name}={value}" for name, value in assignments.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(_SEND_TIMEOUT)
                sock.sendto(message.encode("utf-8", "replace"), _address(self._socket))
        except (OSError, ValueError) as error:
            if not self._failing:
                self._failing = True
                reason = getattr(error, "strerror", None) or error
                self.log.warning(
                    "cannot tell the service manager %s: %s (NOTIFY_SOCKET=%r); serving on, and not saying so again",
                    next(iter(assignments)),
                    reason,
                    self._socket,
                )
        else:
            self._failing = False


async def run_watchdog(notifier: Notifier, is_healthy: Callable[[], bool]) -> None:
    """Feed the service manager's watchdog while `is_healthy()`; returns at once where there is none.

    That this runs at all proves that the event loop does: a thread must never do it.
    """
    interval = notifier.watchdog_interval
    if interval is None:
        return
    was_healthy = True
    while True:
        healthy = is_healthy()
        if healthy:
            notifier.feed()
        if healthy != was_healthy:
            notifier.log.log(
                logging.INFO if healthy else logging.ERROR,
                "feeding the service manager's watchdog again"
                if healthy
                else "not healthy: the service manager's watchdog is not fed, and ends us soon",
            )
            was_healthy = healthy
        await trio.sleep(interval)


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` for a child: without what the service manager says to this process alone.

    A worker that announced itself ready, fed the watchdog, or took the sockets a second time would speak for us.
    """
    ours = {*NOTIFY_VARIABLES, *ACTIVATION_VARIABLES}
    return {name: value for name, value in environ.items() if name not in ours}


def _address(name: str) -> str:
    if name.startswith("@"):
        return "\0" + name[1:]  # the abstract namespace of Linux (unix(7))
    if not name.startswith("/"):
        raise ValueError("expected a path, or a name after @")
    return name


def _one_line(text: str) -> str:
    """A line break would begin another assignment."""
    return " ".join(text.split())[:_STATUS_LENGTH]
