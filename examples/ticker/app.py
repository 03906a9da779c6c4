"""A game state that is shown live: one simulation on the server, twenty binary frames a second to whoever watches.

Run it with `trioserve examples.ticker.app:app` and open http://127.0.0.1:8000/ in several windows; click to push.

What it teaches: a task that all requests share lives in the lifespan's nursery. A live state needs no queue: who is
slow skips what is old and gets the newest. That a `send` returned is no sign that anybody has seen anything, since the
network holds minutes of such small frames; so the page says which frame it has drawn, and no more than AHEAD are under
way. A window in the background draws nothing, says nothing, and is sent nothing. Each worker has a world of its own;
one world for several workers would be kept outside of them, as `examples/chat` keeps its history.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import trio

from examples.ticker.world import HEIGHT, RATE, WIDTH, World
from trioserve import StaticFiles

# Frames on the way to one watcher: with twenty a second, enough for half a second there and back.
AHEAD = 10

INVALID = 1007

POLICY = b"default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'"

page = StaticFiles(
    Path(__file__).parent / "page", cache_control="no-cache", headers=[(b"content-security-policy", POLICY)]
)


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The page at /, and the state at /state."""
    if scope["type"] == "lifespan":
        await lifespan(scope, receive, send)
    elif scope["type"] == "http":
        await page(scope, receive, send)
    elif scope["path"] == "/state":
        await receive()
        await send({"type": "websocket.accept"})
        await Watcher(scope["state"]["world"], receive, send).watch()
    else:
        await receive()
        await send({"type": "websocket.close"})


async def lifespan(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The world turns for as long as the server serves."""
    await receive()
    world = scope["state"]["world"] = World()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.run)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        nursery.cancel_scope.cancel()
    await send({"type": "lifespan.shutdown.complete"})


class Watcher:
    """One WebSocket that is shown the world."""

    def __init__(self, world: World, receive: Any, send: Any) -> None:
        self._world = world
        self._receive = receive
        self._send = send
        self._sent = 0
        self._drawn = 0
        self._progress = trio.Event()

    async def watch(self) -> None:
        """Show the world until the client leaves."""
        world = self._world
        shape = {
            "width": WIDTH,
            "height": HEIGHT,
            "rate": RATE,
            "radii": [ball.radius for ball in world.balls],
        }
        await self._send({"type": "websocket.send", "text": json.dumps(shape)})
        world.begin_watching()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.show)
                understood = await self.listen()
                nursery.cancel_scope.cancel()
        finally:
            world.end_watching()
        if not understood:
            await self._send({"type": "websocket.close", "code": INVALID, "reason": "not a message"})

    async def show(self) -> None:
        """Send the newest frame, whenever there is one and the client has kept up."""
        seen = 0
        try:
            while True:
                await self._world.wait_newer(seen)
                while self._sent - self._drawn >= AHEAD:
                    self._progress = trio.Event()
                    await self._progress.wait()
                seen = self._world.number  # not the one that was waited for: that may be old by now
                self._sent += 1
                await self._send({"type": "websocket.send", "bytes": self._world.frame})
        except OSError:
            pass  # the client has gone; `listen` is being told

    async def listen(self) -> bool:
        """Hear what the client has drawn, and where it pokes: `{"drawn": 17}`, `{"poke": [0.5, 0.5]}`.

        Until it leaves (True), or says something else (False).
        """
        while (event := await self._receive())["type"] == "websocket.receive":
            try:
                said = json.loads(event.get("text") or "")
                if "drawn" in said:
                    self._drawn = min(self._sent, int(said["drawn"]))
                    self._progress.set()
                if "poke" in said:
                    x, y = said["poke"]
                    self._world.poke(min(1.0, max(0.0, float(x))), min(1.0, max(0.0, float(y))))
            except (ValueError, TypeError, OverflowError, RecursionError):
                return False
        return True
