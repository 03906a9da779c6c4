"""Every exception trioserve raises, grouped by whose fault it is.

Who uses it: all tiers; it imports nothing of ours. The boundary (`structure/boundary.py`) decides by *where*
an exception was raised; these classes only say what happened and, where it helps, carry the HTTP status or
the process exit code that goes with it.

- the peer's: `RequestRefused`, `ClientDisconnected`
- the app's: `AppMisuse` and its kin, `LifespanFailed`, `LoopBlocked`, `Fatal`
- the operator's: `ConfigError`, `UsageError`, `AppNotFound`
- the machine's: `BindError`, `OutputFailed`, `FileSendFailed`
"""

from __future__ import annotations

# Exit codes of a worker process (and of the command); sysexits.h where it has a fitting number.
EXIT_OK = 0
EXIT_USAGE = 2
EXIT_STARTUP_FAILED = 3
EXIT_APP_NOT_FOUND = 4
EXIT_SERVER_BUG = 70
EXIT_OS = 71
EXIT_OUTPUT = 74
EXIT_TAINTED = 75
EXIT_CONFIG = 78
EXIT_LOOP_BLOCKED = 80
EXIT_HARD_DRAIN = 82
EXIT_MEMORY = 83
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


class TrioserveError(Exception):
    """Base of the errors that trioserve itself defines. `exit_code` is what the command ends with."""

    exit_code: int = EXIT_SERVER_BUG


# -- the peer's fault ---------------------------------------------------------------------------------------


class RequestRefused(TrioserveError):
    """The peer's bytes cannot be served; the connection answers `status` and closes.

    Never reaches an app. `reason` is for our log and counters; the client only sees the status.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status = status
        self.reason = reason


class ClientDisconnected(OSError):
    """`send()` was called after the peer had reset the connection or a write to it had failed (ASGI 2.4).

    Apps may let it pass: the boundary knows it by identity and counts the peer as gone, not the app as broken.
    You do not get it for a mere FIN, since the peer may still be reading.
    """


# -- the app's fault ----------------------------------------------------------------------------------------


class AppMisuse(TrioserveError):
    """The app broke the ASGI contract; the message names the event, the state and what was expected."""


class UnexpectedMessage(AppMisuse):
    """`send()` got an event that this state of the exchange does not allow, or of a wrong shape."""


class InvalidResponse(AppMisuse):
    """A response status, header name or value that may not be sent (RFC 9110 section 5.5, RFC 9112)."""


class WrongContentLength(AppMisuse):
    """The body is longer or shorter than the Content-Length that the app declared."""


class IncompleteResponse(AppMisuse):
    """The app returned before it had started, or before it had finished, its response."""


class ConcurrentCall(AppMisuse):
    """Two tasks called `receive()`, or two called `send()`, of one exchange at the same time."""


class TaskLeak(AppMisuse):
    """The app left a nursery or cancel scope open in the connection's task; cancellation cannot be trusted."""


class LifespanFailed(TrioserveError):
    """Lifespan startup failed, timed out, or (with `lifespan = "on"`) is not supported by the app."""

    exit_code = EXIT_STARTUP_FAILED


class LifespanDied(TrioserveError):
    """The app's lifespan task ended with an exception while the worker was serving."""


class LoopBlocked(TrioserveError):
    """Code of the app kept the event loop from going on. Never raised: it stands in logs and reports for the place."""

    exit_code = EXIT_LOOP_BLOCKED


class Fatal(Exception):
    """Raised by an app that knows its process is beyond repair: report, short drain, exit. Subclass freely."""


# -- the operator's fault -----------------------------------------------------------------------------------


class ConfigError(TrioserveError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another one."""

    exit_code = EXIT_CONFIG


class UsageError(TrioserveError):
    """The command line itself cannot be understood. `command` is the one whose --help tells more."""

    exit_code = EXIT_USAGE

    def __init__(self, message: str, command: str = "trioserve") -> None:
        super().__init__(message)
        self.command = command


class AppNotFound(TrioserveError):
    """The app's module, file or attribute does not exist or could not be imported."""

    exit_code = EXIT_APP_NOT_FOUND


# -- the machine's ------------------------------------------------------------------------------------------


class FileSendFailed(OSError):
    """A file could not be sent whole: it was cut short or deleted meanwhile, or reading it failed.

    Raised by `send()` for `http.response.zerocopysend` and `http.response.pathsend`. Apps may let it pass: the boundary
    knows it by identity, ends the response visibly truncated (500 if nothing was sent), and serves on.
    """


class OutputFailed(TrioserveError):
    """What a command was asked to print cannot be written, other than for want of a reader."""

    exit_code = EXIT_OUTPUT


class BindError(TrioserveError):
    """A socket could not be created, bound or inherited."""

    exit_code = EXIT_OS
