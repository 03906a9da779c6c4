"""Choosing the HTTP/1 engine: httptools where it is installed, h11 otherwise or where it is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

from trioserve.errors import ConfigError
from trioserve.http.engine import Engine
from trioserve.structure.context import Limits


def factory(
    kind: Literal["auto", "httptools", "h11"], limits: Limits, *, raw_names: bool
) -> Callable[[], Engine]:
    """A callable that makes an engine for one connection.

    Raises:
        ConfigError: httptools was asked for and is not installed.
    """
    if kind != "h11":
        try:
            from trioserve.http.httptools_engine import HttptoolsEngine
        except ImportError:
            if kind == "httptools":
                raise ConfigError(
                    'http_engine = "httptools" needs the package httptools; install it, or use "auto"'
                ) from None
        else:
            return functools.partial(HttptoolsEngine, limits, raw_names=raw_names)
    from trioserve.http.h11_engine import H11Engine

    return functools.partial(H11Engine, limits, raw_names=raw_names)
