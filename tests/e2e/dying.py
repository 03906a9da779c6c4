"""Apps that do not live long, for the supervisor's tests."""

from __future__ import annotations

import os
import time
from typing import Any

import trio

import trioserve


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


async def fails_and_stays(scope: Any, receive: Any, send: Any) -> None:
    """Is beyond repair at its first request, and does not get done with its shutdown."""
    if scope["type"] == "http":
        raise trioserve.Fatal("beyond repair")
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await trio.sleep_forever()


async def blocks_to_start(scope: Any, receive: Any, send: Any) -> None:
    """Is busy with its startup for longer than anybody waits, and lets nobody else have a turn."""
    assert scope["type"] == "lifespan"
    await receive()
    print("blocking", flush=True)
    time.sleep(600)


async def waits_to_start(scope: Any, receive: Any, send: Any) -> None:
    """Becomes ready once there is a file of the name that the environment says."""
    assert scope["type"] == "lifespan"
    await receive()
    print("waiting", flush=True)
    while not await trio.Path(os.environ["MAY_START"]).exists():
        await trio.sleep(0.01)
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})
