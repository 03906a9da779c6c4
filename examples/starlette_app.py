"""A Starlette application: routes, a lifespan with state, a stream, an upload, work after the response.

Run it with `trioserve examples.starlette_app:app`; needs `pip install starlette`.

What it teaches: Starlette runs on trio as it is, since it waits through anyio. What the lifespan yields is there in
every request's `state`; a generator makes a streaming response; a `BackgroundTask` runs when the client has its
answer already, and a drain waits for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import trio
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route


@contextlib.asynccontextmanager
async def lifespan(_app: Starlette) -> AsyncIterator[dict[str, Any]]:
    """What is opened here is closed when the last request is done."""
    yield {"visits": [], "started_at": trio.current_time()}


async def index(request: Request) -> Response:
    """Greet, and note the visit once the answer is out."""
    visits: list[str] = request.state.visits
    note = BackgroundTask(visits.append, request.query_params.get("name", "somebody"))
    return PlainTextResponse("Hello from Starlette\n", background=note)


async def list_visits(request: Request) -> Response:
    """Who has been here."""
    return JSONResponse({"visits": request.state.visits})


async def count_down(request: Request) -> Response:
    """Stream the numbers from `start` to 0, one line each."""
    start: int = request.path_params["start"]

    async def lines() -> AsyncIterator[str]:
        for number in range(start, -1, -1):
            yield f"{number}\n"
            await trio.sleep(0.01)

    return StreamingResponse(lines(), media_type="text/plain")


async def measure(request: Request) -> Response:
    """Say how large the uploaded body is, without ever holding all of it."""
    size = 0
    async for part in request.stream():
        size += len(part)
    return JSONResponse({"bytes": size})


app = Starlette(
    routes=[
        Route("/", index),
        Route("/visits", list_visits),
        Route("/countdown/{start:int}", count_down),
        Route("/measure", measure, methods=["POST"]),
    ],
    lifespan=lifespan,
)
