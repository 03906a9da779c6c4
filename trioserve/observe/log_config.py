"""`logconfig` and `logconfig_dict`: the standard library's logging configuration, applied and taken back.

Used by `logs.py`. A configuration is process-wide, so servers that run at the same time share it: the same
one is applied once, a different one on top, and the loggers return to what they were when the last server has
closed.
"""

from __future__ import annotations

import configparser
import json
import logging
import threading
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from logging.config import dictConfig, fileConfig
from pathlib import Path
from typing import Any

from trioserve.errors import ConfigError


def apply_log_config(config: Any) -> LogConfig:
    """Apply what `config` has, `logconfig` before `logconfig_dict` as in hypercorn; ConfigError if broken."""
    wish = _read(config)
    if wish is None:
        return LogConfig(frozenset(), None)
    try:
        _shared.apply(wish.source, wish.configure)
    except Exception as error:  # whatever a handler's or formatter's constructor raises
        cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
        raise ConfigError(f"{wish.shown} was refused by the logging module: {error}{cause}") from error
    return LogConfig(wish.names, wish.source)


def check_log_config(config: Any) -> None:
    """ConfigError if it cannot be read; what the logging module says of it shows only when it is applied."""
    _read(config)


class LogConfig:
    """One server's part in the process's logging configuration. `names` are the loggers that it set up."""

    def __init__(self, names: frozenset[str], source: object) -> None:
        self.names = names
        self._source = source

    def __repr__(self) -> str:
        return f"<LogConfig {', '.join(sorted(self.names)) or 'none'}>"

    def undo(self) -> None:
        """This server is done with it. Idempotent."""
        source, self._source = self._source, None
        if source is not None:
            _shared.release(source)


@dataclass(frozen=True, slots=True)
class _LoggerState:
    level: int
    handlers: tuple[logging.Handler, ...]
    filters: tuple[Any, ...]
    propagate: bool
    disabled: bool

    @classmethod
    def read(cls, logger: logging.Logger) -> _LoggerState:
        return cls(
            logger.level, tuple(logger.handlers), tuple(logger.filters), logger.propagate, logger.disabled
        )

    def restore(self, logger: logging.Logger) -> list[logging.Handler]:
        """Returns the handlers that are not wanted any more."""
        surplus = [handler for handler in logger.handlers if handler not in self.handlers]
        logger.setLevel(self.level)
        logger.handlers[:] = self.handlers
        logger.filters[:] = self.filters
        logger.propagate = self.propagate
        logger.disabled = self.disabled
        return surplus


# What `logging.getLogger` makes of a name nobody has configured.
_FRESH = _LoggerState(logging.NOTSET, (), (), True, False)


class _Shared:
    """The configurations in force, and the state of all loggers before the first of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_force: list[object] = []
        self._before: dict[str, _LoggerState] = {}
        self._root_before = _FRESH

    def apply(self, source: object, configure: Any) -> None:
        with self._lock:
            if not self._in_force:
                self._before = {name: _LoggerState.read(logger) for name, logger in _registered().items()}
                self._root_before = _LoggerState.read(logging.getLogger())
            if source not in self._in_force:
                try:
                    configure()
                except BaseException:
                    if not self._in_force:
                        self._restore()
                    raise
            self._in_force.append(source)

    def release(self, source: object) -> None:
        with self._lock:
            self._in_force.remove(source)
            if not self._in_force:
                self._restore()

    def _restore(self) -> None:
        surplus = self._root_before.restore(logging.getLogger())
        for name, logger in _registered().items():
            surplus += self._before.get(name, _FRESH).restore(logger)
        self._before = {}
        for handler in dict.fromkeys(surplus):
            handler.close()


_shared = _Shared()


def _registered() -> dict[str, logging.Logger]:
    known = logging.Logger.manager.loggerDict
    return {name: logger for name, logger in tuple(known.items()) if isinstance(logger, logging.Logger)}


@dataclass(frozen=True, slots=True)
class _Wish:
    """A configuration that was read: the loggers that it names, what applies it, and what messages call it."""

    names: frozenset[str]
    configure: Callable[[], None]
    shown: str
    source: object


def _read(config: Any) -> _Wish | None:
    if config.logconfig is not None:
        return _read_source(config.logconfig)
    if config.logconfig_dict is not None:
        return _read_dict(config.logconfig_dict, "logconfig_dict", config.logconfig_dict)
    return None


def _read_source(source: str) -> _Wish:
    """`json:FILE`, `toml:FILE`, or a file in the standard library's ini format."""
    kind, _, rest = source.partition(":")
    shown = f"logconfig = {source!r}"
    try:
        if kind == "json":
            return _read_dict(json.loads(Path(rest).read_text(encoding="utf-8")), shown, source)
        if kind == "toml":
            return _read_dict(tomllib.loads(Path(rest).read_text(encoding="utf-8")), shown, source)
        return _read_ini(source, shown)
    except OSError as error:
        raise ConfigError(f"{shown} cannot be read: {error.strerror or error}") from error
    except (ValueError, configparser.Error) as error:
        raise ConfigError(f"{shown} cannot be parsed: {' '.join(str(error).split())}") from error


def _read_ini(source: str, shown: str) -> _Wish:
    path = Path(source)
    # hypercorn's (and gunicorn's) names for use inside the file.
    defaults = {"__file__": source, "here": str(path.parent) if path.parent != Path() else ""}
    parser = configparser.ConfigParser(defaults)
    parser.read_string(path.read_text(encoding="utf-8"), source=source)
    sections = [section for section in parser.sections() if section.startswith("logger_")]
    names = frozenset(parser.get(section, "qualname", fallback="") for section in sections) - {""}
    return _Wish(names, lambda: fileConfig(parser, disable_existing_loggers=False), shown, source)


def _read_dict(settings: Any, shown: str, source: object) -> _Wish:
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f"{shown} must be a table as for logging.config.dictConfig, not {type(settings).__name__}"
        )
    loggers = settings.get("loggers")
    # Anything else is for the logging module to refuse.
    names = frozenset(loggers) if isinstance(loggers, Mapping) else frozenset()
    return _Wish(names, lambda: dictConfig(dict(settings)), shown, source)
