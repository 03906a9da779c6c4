"""Apps that do not live long, for the supervisor's tests."""

from __future__ import annotations

import os
from typing import Any

import trio


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Ends its process 0.2 s after it was started."""
    assert scope["type"] == "lifespan"
    await receive()
    print("born", flush=True)
    await send({"type": "lifespan.startup.complete"})
    await trio.sleep(0.2)
    os._exit(1)


async def refuses_to_start(scope: Any, receive: Any, send: Any) -> None:
    """Does not become ready."""
    assert scope["type"] == "lifespan"
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no database"})
