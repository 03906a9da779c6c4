"""All logs of one server, set up from its Config: error log, access log, StatsD.

`worker.py` calls `setup_logs(config)` before it serves, `Logs.reopen()` on SIGUSR1, and `Logs.close()` as the
last thing it does. Nothing here awaits; `close()` may block for its time-out, so it belongs after the trio
run or into a thread.

Several servers in one process do not meet: the error logger is a `logging.Logger` called "trioserve.error" of
each server's own, not the one that `logging.getLogger` knows, and neither that one nor the root logger is
changed. Handlers that somebody has put on `logging.getLogger("trioserve.error")` before get the lines instead
of the `errorlog` file. Only `logconfig` and `logconfig_dict` are process-wide by nature; `Logs.close()` takes
back what they did once the last server that brought one has closed.

Differences from hypercorn: its `logger_class` with a class of one's own is refused (an async method awaited
for each request, in the way of the event loop; pass a `logging.Logger` as `accesslog` or `errorlog` instead).
Loggers that a `logconfig` sets up as `hypercorn.error` or `hypercorn.access` are used where it has none of
our names.
"""

from __future__ import annotations

import difflib
import logging
import sys
from typing import Any

from trioserve.errors import ConfigError
from trioserve.observe.access_log import AccessLog, compile_format
from trioserve.observe.log_config import LogConfig, apply_log_config, check_log_config
from trioserve.observe.log_writer import LineHandler, LogStatistics, LogWriter, Target
from trioserve.observe.statsd import StatsdClient, StatsdHandler

ERROR_LOGGER = "trioserve.error"
ACCESS_LOGGER = "trioserve.access"
# Of what an app may use under any server, too: it logs as libraries do.
_PARTS = ("trioserve.static", "trioserve.wsgi")
# hypercorn's line, so that whatever reads its logs reads ours.
ERROR_FORMAT = "%(asctime)s [%(process)d] [%(levelname)s] %(message)s"
ERROR_DATE_FORMAT = "[%Y-%m-%d %H:%M:%S %z]"


def setup_logs(config: Any) -> Logs:
    """The logs that `config` asks for; ConfigError names the setting that cannot be followed."""
    _check_logger_class(config)
    level = _parse_level(config.loglevel)
    applied = apply_log_config(config)
    writer = LogWriter()
    try:
        return Logs(config, writer, applied, level)
    except BaseException:
        writer.close(0)
        applied.undo()
        raise


def check_logs(config: Any) -> None:
    """ConfigError for what `setup_logs` would refuse, as far as it shows without opening or changing anything."""
    _check_logger_class(config)
    check_log_config(config)
    if config.accesslog:
        compile_format(config.access_log_format)


class Logs:
    """The logs of one server. `error` is a `logging.Logger`; `access` is None where nobody wants entries."""

    def __init__(self, config: Any, writer: LogWriter, applied: LogConfig, level: int | None) -> None:
        self._writer = writer
        self._applied = applied
        self._attached: list[tuple[logging.Logger, logging.Handler]] = []
        self._statsd = StatsdClient.from_config(config)
        self.error = self._make_error_logger(config.errorlog, level)
        extra_lanes = []
        if self._statsd is not None:
            lane = writer.add_lane(self._statsd.deliver)
            extra_lanes.append(lane)
            self._attach(self.error, StatsdHandler(lane))
        self.access = AccessLog.from_config(
            config,
            writer,
            default_stream=sys.stdout,
            logger=self._find_access_logger(config.accesslog),
            extra_lanes=extra_lanes,
        )

    def __repr__(self) -> str:
        return f"<Logs {self._writer!r}, access {'on' if self.access is not None else 'off'}>"

    def statistics(self) -> LogStatistics:
        """A frozen picture of the writer behind all of them."""
        return self._writer.statistics()

    def take_parts(self) -> None:
        """Have `error` take what static files and WSGI say as well, unless the app has put handlers on the root logger.

        For a process of ours: there it would be neither in the `errorlog` file nor have a date.
        """
        for name in _PARTS:
            self._attach(logging.getLogger(name), _PartHandler(self.error))

    def reopen(self) -> None:
        """Open the log files anew (SIGUSR1, after a rotation); those of a `logconfig` are left alone."""
        self._writer.reopen()

    def change_error_log(self, config: Any) -> None:
        """Have `error` write where `config` says, at its level, and remain the same logger.

        May block for half a second, for lines that the old place does not take.

        Raises:
            ConfigError: the setting cannot be followed; nothing has changed.
        """
        successor = setup_logs(config)
        writer, applied, logger = self._writer, self._applied, successor.error
        self.error.handlers[:] = logger.handlers
        self.error.setLevel(logger.level)
        self.error.parent, self.error.propagate = logger.parent, logger.propagate
        self._attached = [(self.error, handler) for _, handler in successor._attached]
        self._writer, self._applied = successor._writer, successor._applied
        writer.close(0.5)
        applied.undo()

    def close(self, timeout: float = 2.0) -> bool:
        """Write what is queued, for at most `timeout` seconds, and undo what was changed; True if all went.

        Later lines of `error` that are warnings or worse go to stderr, by the standard library's last resort.
        """
        for logger, handler in self._attached:
            logger.removeHandler(handler)
        self._attached.clear()
        written = self._writer.close(timeout)
        if self._statsd is not None and not self._writer.statistics().alive:
            self._statsd.close()
        self._applied.undo()
        return written

    def _make_error_logger(self, target: logging.Logger | Target | None, level: int | None) -> logging.Logger:
        if isinstance(target, logging.Logger):
            return target  # the operator's own: its level and handlers are not ours to change
        logger = _ErrorLogger(ERROR_LOGGER)
        logger.propagate = False
        logger.parent = logging.getLogger()  # whose level counts where `loglevel` is None; it gets no lines
        if level is not None:
            logger.setLevel(level)
        registered = self._find_registered(ERROR_LOGGER, "hypercorn.error")
        if registered is not None:
            logger.parent = registered
            logger.propagate = True
            if registered.level != logging.NOTSET:
                logger.setLevel(logging.NOTSET)  # logconfig's level goes before loglevel, as in hypercorn
        elif target:
            self._attach(logger, self._make_error_handler(target))
        else:
            logger.addHandler(logging.NullHandler())
        return logger

    def _make_error_handler(self, target: Target) -> logging.Handler:
        stream: Target | None = sys.stderr if target == "-" else target
        if stream is None:
            return logging.NullHandler()  # a process without stderr
        try:
            file = self._writer.open(stream)
        except OSError as error:
            raise ConfigError(f"errorlog = {str(target)!r} cannot be opened: {error.strerror}") from error
        # Urgent: who watches an error log wants to see the line before what it announces.
        lane = self._writer.add_lane(file.write_lines, notice=_make_error_notice, urgent=True)
        handler = LineHandler(lane)
        handler.setFormatter(logging.Formatter(ERROR_FORMAT, ERROR_DATE_FORMAT))
        return handler

    def _find_registered(self, *names: str) -> logging.Logger | None:
        """The first logger of these that a logconfig has set up, or that has handlers of somebody's."""
        for name in names:
            if name in self._applied.names:
                return logging.getLogger(name)
        known = logging.getLogger(names[0])
        return known if known.handlers else None

    def _find_access_logger(self, target: object) -> logging.Logger | None:
        """The logger that takes access lines instead of a file.

        One that a logconfig sets up under our name speaks for itself; hypercorn's needs `accesslog`, as
        there.
        """
        if ACCESS_LOGGER in self._applied.names:
            return logging.getLogger(ACCESS_LOGGER)
        if target and not isinstance(target, logging.Logger):
            return self._find_registered(ACCESS_LOGGER, "hypercorn.access")
        return None

    def _attach(self, logger: logging.Logger, handler: logging.Handler) -> None:
        logger.addHandler(handler)
        self._attached.append((logger, handler))


class _PartHandler(logging.Handler):
    """Hands lines on to the error log that nobody else takes."""

    def __init__(self, error: logging.Logger) -> None:
        super().__init__()
        self._error = error

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers and self._error.isEnabledFor(record.levelno):
            self._error.handle(record)


class _ErrorLogger(logging.Logger):
    """A logger that `logging.getLogger` does not know, one for each server.

    The base class caches its answers and relies on the manager, which only knows registered loggers, to drop
    them.
    """

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - the base class's name
        return not self.disabled and self.manager.disable < level and level >= self.getEffectiveLevel()


def _make_error_notice(count: int) -> bytes:
    message = "%d lines of this log were dropped: too many were waiting"
    record = logging.LogRecord(ERROR_LOGGER, logging.WARNING, "", 0, message, (count,), None)
    return logging.Formatter(ERROR_FORMAT, ERROR_DATE_FORMAT).format(record).encode() + b"\n"


def _parse_level(value: str | int | None) -> int | None:
    if value is None or isinstance(value, int):
        return value
    known = logging.getLevelNamesMapping()
    level = known.get(value.upper())
    if level is None:
        nearest = difflib.get_close_matches(value.upper(), known, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ConfigError(f"loglevel = {value!r} is not a level{hint} Known: {', '.join(known)}")
    return level


def _check_logger_class(config: Any) -> None:
    cls = getattr(config, "logger_class", None)
    # hypercorn's own classes, which its statsd_host switches between, do what we do.
    if cls is None or cls.__module__.partition(".")[0] in ("hypercorn", "trioserve"):
        return
    raise ConfigError(
        f"logger_class = {cls.__module__}.{cls.__qualname__} is not supported: its methods are awaited "
        "in the middle of serving. Give a logging.Logger as accesslog and errorlog, or set access_log_format"
    )
