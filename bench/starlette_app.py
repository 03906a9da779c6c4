"""A Starlette app as its users write one, made on import; for `bench/preload.py`."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


async def index(request: Request) -> JSONResponse:
    return JSONResponse({"hello": request.url.path})


app = Starlette(routes=[Route("/", index)])
