"""A page made of several answers, asked for at the same time.

Run it with `trioserve examples.fanout:app` and see it with `curl -i http://127.0.0.1:8000/`.

What it teaches: a handler may open a nursery of its own. All its tasks end before it does, so nothing goes on behind
the response's back; if the client leaves or the server drains, they are cancelled with it. Each question has its own
deadline and its own error handling, so one that is late or broken costs its own part of the page and nothing more.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from examples.hello import answer_lifespan

# Longer than this no part of the page is waited for (seconds).
PATIENCE = 0.25


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer with what each backend had to say in time."""
    if scope["type"] == "lifespan":
        await answer_lifespan(receive, send)
        return
    page: dict[str, Any] = {}
    async with trio.open_nursery() as nursery:
        for name, ask in BACKENDS.items():
            nursery.start_soon(_fill_in, page, name, ask)
    body = json.dumps(page, sort_keys=True).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _fill_in(page: dict[str, Any], name: str, ask: Callable[[], Awaitable[Any]]) -> None:
    page[name] = "too late"
    with trio.move_on_after(PATIENCE):
        try:
            page[name] = await ask()
        except OSError as error:
            page[name] = f"unavailable: {error}"


# -- stand-ins for services elsewhere ------------------------------------------------------------------------


async def _ask_price() -> float:
    await trio.sleep(0.1)
    return 19.5


async def _ask_stock() -> int:
    await trio.sleep(0.1)
    return 7


async def _ask_reviews() -> list[str]:
    await trio.sleep(0.05)
    raise ConnectionRefusedError("nobody listens at reviews:80")


async def _ask_recommendations() -> list[str]:
    await trio.sleep(60)
    return ["too good to wait for"]


BACKENDS: dict[str, Callable[[], Awaitable[Any]]] = {
    "price": _ask_price,
    "stock": _ask_stock,
    "reviews": _ask_reviews,
    "recommendations": _ask_recommendations,
}
