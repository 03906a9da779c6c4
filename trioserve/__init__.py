"""trioserve: a production HTTP server for ASGI applications on trio.

Read in this order: `worker/worker.py` (the life of a worker), `worker/listener.py`, `worker/connection.py`,
`http/http1.py` (the keep-alive loop), `http/http1_exchange.py` (its bytes), `asgi/exchange.py` (what the app may send
when), then `structure/boundary.py` (who is to blame). Beneath them: `http/engine.py` (bytes to requests), `net/hub.py`
(readiness), `structure/deadlines.py` (time). A request goes listener -> connection -> http1 (engine) -> exchange ->
your app, and back exchange -> http1_exchange -> transport.
"""

from __future__ import annotations

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

from trioserve.config import Config
from trioserve.errors import (
    ClientDisconnected,
    ConfigError,
    Fatal,
    FileSendFailed,
    LifespanFailed,
    TrioserveError,
)
from trioserve.worker.serve import run, serve

if TYPE_CHECKING:
    from trioserve.middleware.compression import Compression
    from trioserve.static.handler import StaticFiles

__all__ = [
    "ClientDisconnected",
    "Compression",
    "Config",
    "ConfigError",
    "Fatal",
    "FileSendFailed",
    "LifespanFailed",
    "StaticFiles",
    "TrioserveError",
    "__version__",
    "run",
    "serve",
]


def __getattr__(name: str) -> Any:
    # Only who uses them needs what they are made of.
    if name == "StaticFiles":
        from trioserve.static.handler import StaticFiles

        return StaticFiles
    if name == "Compression":
        from trioserve.middleware.compression import Compression

        return Compression
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
