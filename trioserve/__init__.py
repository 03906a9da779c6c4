"""trioserve: a production HTTP server for ASGI applications on trio.

Read in this order: `worker/worker.py` (the life of a worker), `worker/listener.py`, `worker/connection.py`,
`http/http1.py` (the keep-alive loop), `http/http1_exchange.py` (its bytes), `asgi/exchange.py` (what the app may send
when), then `structure/boundary.py` (who is to blame). Beneath them: `http/engine.py` (bytes to requests), `net/hub.py`
(readiness), `structure/deadlines.py` (time). A request goes listener -> connection -> http1 (engine) -> exchange ->
your app, and back exchange -> http1_exchange -> transport.
"""

from __future__ import annotations

__version__ = "0.1.0"

from trioserve.config import Config
from trioserve.errors import ClientDisconnected, ConfigError, Fatal, LifespanFailed, TrioserveError
from trioserve.worker.serve import run, serve

__all__ = [
    "ClientDisconnected",
    "Config",
    "ConfigError",
    "Fatal",
    "LifespanFailed",
    "TrioserveError",
    "__version__",
    "run",
    "serve",
]
