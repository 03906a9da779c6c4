"""Choosing the engines: for HTTP/1 the fastest that is installed, for HTTP/2 what the setting says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

from trioserve.config.settings_http import H1C_MOST_FIELDS
from trioserve.errors import ConfigError
from trioserve.http.engine import Engine
from trioserve.http.http2_codes import LARGEST_WINDOW
from trioserve.http.http2_engine import Http2Engine, Http2Limits, Http2Sink
from trioserve.structure.context import Limits


def _h1c() -> type[Engine]:
    from trioserve.http.h1c_engine import H1cEngine

    return H1cEngine


def _httptools() -> type[Engine]:
    from trioserve.http.httptools_engine import HttptoolsEngine

    return HttptoolsEngine


def _h11() -> type[Engine]:
    from trioserve.http.h11_engine import H11Engine

    return H11Engine


# How each is imported, and the package that it needs; the fastest first.
_ENGINES = {
    "h1c": (_h1c, "gunicorn_h1c, 0.6.10 or later"),
    "httptools": (_httptools, "httptools"),
    "h11": (_h11, "h11"),
}


def installed() -> Iterator[str]:
    """The HTTP/1 engines that can be used here, the fastest first; each is imported when it is come to."""
    for kind, (load, _) in _ENGINES.items():
        try:
            load()
        except ImportError:
            continue
        yield kind


def factory(
    kind: Literal["auto", "h1c", "httptools", "h11"], limits: Limits, *, raw_names: bool
) -> Callable[[], Engine]:
    """A callable that makes an engine for one connection.

    Raises:
        ConfigError: the engine that was asked for is not installed.
    """
    chosen: str = kind
    if kind == "auto":
        takes_all = limits.header_count <= H1C_MOST_FIELDS
        chosen = next(found for found in installed() if found != "h1c" or takes_all)
    load, package = _ENGINES[chosen]
    try:
        engine = load()
    except ImportError:
        raise ConfigError(
            f'http_engine = "{kind}" needs the package {package}; install it, or use "auto"'
        ) from None
    return functools.partial(engine, limits, raw_names=raw_names)


def http2_limits(config: Any) -> Http2Limits:
    """What an HTTP/2 connection may do, by a validated `Config`."""
    connection_window = config.h2_connection_window
    if connection_window == "auto":
        # A window for each stream that may be open: none of them can use up what another one needs.
        connection_window = min(config.h2_max_concurrent_streams * config.h2_stream_window, LARGEST_WINDOW)
    return Http2Limits(
        max_concurrent_streams=config.h2_max_concurrent_streams,
        max_header_list_size=config.h2_max_header_list_size,
        max_frame_size=config.h2_max_inbound_frame_size,
        header_count=config.max_header_count,
        target_size=config.max_target_size,
        body_window=config.h2_stream_window,
        connection_window=connection_window,
        reset_budget=2 * config.h2_max_concurrent_streams,
    )


def http2_factory(config: Any) -> Callable[[Http2Sink], Http2Engine]:
    """A callable that makes an HTTP/2 engine for one connection; what it needs is imported with the first."""
    limits = http2_limits(config)

    def new_engine(sink: Http2Sink) -> Http2Engine:
        if config.http2_engine == "h2":
            from trioserve.http.h2_engine import H2Engine

            return H2Engine(sink, limits)
        from trioserve.http.frame_engine import FrameEngine

        return FrameEngine(sink, limits)

    return new_engine
