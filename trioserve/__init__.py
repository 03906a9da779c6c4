"""trioserve: a production HTTP server for ASGI applications on trio.

Read in this order: `worker/worker.py` (the life of a worker), `worker/listener.py`, `worker/connection.py`,
`http/http1.py` (the keep-alive loop), `http/http1_exchange.py` (its bytes), `asgi/exchange.py` (what the app may send
when), then `structure/boundary.py` (who is to blame). Beneath them: `http/engine.py` (bytes to requests), `net/hub.py`
(readiness), `structure/deadlines.py` (time). A request goes listener -> connection -> http1 (engine) -> exchange ->
your app, and back exchange -> http1_exchange -> transport.
"""

from __future__ import annotations

__version__ = "0.1.0"

# Type checkers take it for True; the module `typing`, which has it, takes longer to import than all of this.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from trioserve.config import Config
    from trioserve.errors import (
        ClientDisconnected,
        ConfigError,
        Fatal,
        FileSendFailed,
        LifespanFailed,
        TrioserveError,
    )
    from trioserve.middleware.compression import Compression
    from trioserve.static.handler import StaticFiles
    from trioserve.worker.serve import run, serve

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


# Imported when they are asked for: only who uses them needs what they are made of, and while it is imported no process
# of ours can say what a signal is to do.
_HOMES = {
    "ClientDisconnected": "errors",
    "Compression": "middleware.compression",
    "Config": "config",
    "ConfigError": "errors",
    "Fatal": "errors",
    "FileSendFailed": "errors",
    "LifespanFailed": "errors",
    "StaticFiles": "static.handler",
    "TrioserveError": "errors",
    "run": "worker.serve",
    "serve": "worker.serve",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
