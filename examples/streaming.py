"""A live feed: server-sent events to every client, for as long as it listens.

Run it with `trioserve examples.streaming:app` and listen with `curl -N http://127.0.0.1:8000/events`; `?count=3`
ends the feed after three events, `?every=0.1` sets the seconds between them.

What it teaches: a stream is a loop round `send`, and `send` waits when the client reads slowly. What ends the stream
is one cancel scope: a second task asks `receive()`, which speaks again only when the client has gone.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import Any
from urllib.parse import parse_qs

import trio

from examples.hello import answer_lifespan


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Serve the feed at /events; everything else is not found."""
    if scope["type"] == "lifespan":
        await answer_lifespan(receive, send)
        return
    if scope["path"] != "/events":
        await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})
        return
    query = parse_qs(scope["query_string"].decode("latin-1"))
    count = _number(query, "count", math.inf)
    every = _number(query, "every", 1.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_when_client_leaves, receive, nursery.cancel_scope)
        await _send_events(send, count, every)
        nursery.cancel_scope.cancel()


def _number(query: dict[str, list[str]], name: str, default: float) -> float:
    try:
        return max(0.0, float(query[name][0]))
    except (KeyError, ValueError):
        return default


async def _send_events(send: Any, count: float, every: float) -> None:
    headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for number in itertools.count(1):
        if number > count:
            break
        data = json.dumps({"number": number})
        event = f"id: {number}\nevent: tick\ndata: {data}\n\n".encode()
        await send({"type": "http.response.body", "body": event, "more_body": True})
        if number < count:
            await trio.sleep(every)
    await send({"type": "http.response.body"})


async def _cancel_when_client_leaves(receive: Any, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass  # a body, though a GET should have none
    scope.cancel()
