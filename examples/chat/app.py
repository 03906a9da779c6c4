"""A chat room in the browser whose history outlives its workers.

Run it with `trioserve --workers 2 examples.chat.app:app` and open http://127.0.0.1:8000/ in two windows. It needs
`pip install coredis` and a Redis (`apt-get install redis-server`) at `CHAT_STORE`, redis://127.0.0.1:6379/0 unless
that says otherwise. `CHAT_STORE=memory trioserve examples.chat.app:app` needs neither, and forgets all when it stops.

What it teaches: nothing a client needs again is in the worker, so workers can be killed any day. What is sent to many
goes through a bounded queue for each, and who does not read is sent away instead of waited for. And what a page must
do: say again what has not come back, and come back with the last id it has seen, a little later each time.
A drain needs no code here: the server closes each WebSocket with 1012, and the pages find another worker.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import trio

from examples.chat.room import Chat, Member
from examples.chat.store import StoreLost, open_store
from trioserve import StaticFiles

STORE = os.environ.get("CHAT_STORE", "redis://127.0.0.1:6379/0")

# The page has no inline scripts and styles, so none that somebody says in the chat will ever run.
POLICY = b"default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'"

page = StaticFiles(
    Path(__file__).parent / "page",
    cache_control="no-cache",
    headers=[(b"content-security-policy", POLICY), (b"referrer-policy", b"same-origin")],
)


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The page at /, and a WebSocket a room at /rooms/NAME?after=ID."""
    if scope["type"] == "lifespan":
        await lifespan(scope, receive, send)
    elif scope["type"] == "websocket":
        await meet(scope, receive, send)
    else:
        await page(scope, receive, send)


async def lifespan(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The store is open, and rooms may begin, for as long as the server serves."""
    await receive()
    try:
        async with open_store(STORE) as store, trio.open_nursery() as nursery:
            scope["state"]["chat"] = Chat(store, nursery)
            await send({"type": "lifespan.startup.complete"})
            await receive()
            nursery.cancel_scope.cancel()
    except StoreLost as lost:
        why = f"{lost}. Start one (apt-get install redis-server), or try CHAT_STORE=memory"
        await send({"type": "lifespan.startup.failed", "message": why})
    else:
        await send({"type": "lifespan.shutdown.complete"})


async def meet(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Let a client into the room that it asks for."""
    await receive()
    room = re.fullmatch(r"/rooms/([a-z0-9-]{1,32})", scope["path"])
    if room is None or not is_ours(scope):
        await send({"type": "websocket.close"})  # not accepted yet: the client gets a 403
        return
    await send({"type": "websocket.accept"})
    asked = parse_qs(scope["query_string"].decode("ascii", "replace"))
    await Member(receive, send).stay(scope["state"]["chat"], room[1], asked.get("after", [""])[0])


def is_ours(scope: dict[str, Any]) -> bool:
    """Whether the page that opens the WebSocket is ours: browsers let any page do it, but say which one it is."""
    headers = dict(scope["headers"])
    origin = headers.get(b"origin")
    return origin is None or urlsplit(origin).netloc == headers.get(b"host")
