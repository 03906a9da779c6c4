"""The ASGI applications under test: the same code, in the same interpreter, behind every server.

The servers import this module (`bench.apps:hello` and so on). Each application counts its calls in the
process that runs it, and tells the count and its pid at `/_count`; the benchmark compares that with what the
client says. The check costs one comparison and one addition a call, the same for all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

COUNT_PATH = "/_count"
FILES_VARIABLE = "BENCH_FILES"
HELLO_BODY = b"Hello, world!\n"
BODY_10K = bytes(range(32, 127)) * 108
BODY_10K = BODY_10K[:10240]
STREAM_CHUNK = b"0123456789abcdef" * 16
STREAM_CHUNKS = 10

_calls = 0
_members: dict[int, Send] = {}  # of the room
_starlette: Any = None

_HELLO_HEADERS = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(HELLO_BODY))]
_BODY_10K_HEADERS = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(BODY_10K))]
_STREAM_HEADERS = [(b"content-type", b"application/octet-stream")]


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    """A small text answer with its length, for any path."""
    global _calls
    if scope["type"] != "http" or scope["path"] == COUNT_PATH:
        await _not_counted(scope, receive, send)
        return
    _calls += 1
    await send({"type": "http.response.start", "status": 200, "headers": _HELLO_HEADERS})
    await send({"type": "http.response.body", "body": HELLO_BODY})


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the whole request body, answers with it."""
    global _calls
    if scope["type"] != "http" or scope["path"] == COUNT_PATH:
        await _not_counted(scope, receive, send)
        return
    _calls += 1
    message = await receive()
    parts = [message.get("body", b"")]
    while message.get("more_body", False):
        message = await receive()
        parts.append(message.get("body", b""))
    # Joined in any case: fastpysgi hands out memoryviews, and cannot send them. One `bytes` is not copied.
    body = b"".join(parts)
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def body_10k(scope: Scope, receive: Receive, send: Send) -> None:
    """10 KiB in one body event."""
    global _calls
    if scope["type"] != "http" or scope["path"] == COUNT_PATH:
        await _not_counted(scope, receive, send)
        return
    _calls += 1
    await send({"type": "http.response.start", "status": 200, "headers": _BODY_10K_HEADERS})
    await send({"type": "http.response.body", "body": BODY_10K})


async def stream_10(scope: Scope, receive: Receive, send: Send) -> None:
    """Ten body events of 256 bytes and no length, so that the server has to chunk."""
    global _calls
    if scope["type"] != "http" or scope["path"] == COUNT_PATH:
        await _not_counted(scope, receive, send)
        return
    _calls += 1
    await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
    for _ in range(STREAM_CHUNKS - 1):
        await send({"type": "http.response.body", "body": STREAM_CHUNK, "more_body": True})
    await send({"type": "http.response.body", "body": STREAM_CHUNK, "more_body": False})


async def websocket_echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Every message of a WebSocket comes back as it is; calls are messages."""
    global _calls
    if scope["type"] != "websocket":
        await _not_counted(scope, receive, send)
        return
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        _calls += 1
        if (text := message.get("text")) is not None:
            await send({"type": "websocket.send", "text": text})
        else:
            await send({"type": "websocket.send", "bytes": message["bytes"]})


async def websocket_room(scope: Scope, receive: Receive, send: Send) -> None:
    """A room: what comes in under /say goes to all other members; calls are messages sent.

    In the plainest way that ASGI has, and most tutorials show: one after the other, each with its own `send`.
    """
    global _calls
    if scope["type"] != "websocket":
        await _not_counted(scope, receive, send)
        return
    await receive()
    await send({"type": "websocket.accept"})
    if scope["path"] == "/say":
        while (message := await receive())["type"] == "websocket.receive":
            for send_to_member in list(_members.values()):
                await send_to_member({"type": "websocket.send", "text": message["text"]})
                _calls += 1
        return
    _members[id(send)] = send
    try:
        while (await receive())["type"] == "websocket.receive":
            pass
    finally:
        del _members[id(send)]


async def starlette_route(scope: Scope, receive: Receive, send: Send) -> None:
    """A Starlette route with a path parameter that answers JSON."""
    global _calls, _starlette
    if scope["type"] != "http" or scope["path"] == COUNT_PATH:
        await _not_counted(scope, receive, send)
        return
    _calls += 1
    if _starlette is None:
        _starlette = _build_starlette()
    await _starlette(scope, receive, send)


async def starlette_files(scope: Scope, receive: Receive, send: Send) -> None:
    """Starlette's StaticFiles under /files/, over the directory that the environment names."""
    global _starlette
    if scope["type"] != "http":
        await _not_counted(scope, receive, send)
        return
    if _starlette is None:
        from starlette.applications import Starlette
        from starlette.routing import Mount
        from starlette.staticfiles import StaticFiles

        _starlette = Starlette(routes=[Mount("/files", StaticFiles(directory=os.environ[FILES_VARIABLE]))])
    await _starlette(scope, receive, send)


async def _not_counted(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    body = json.dumps({"pid": os.getpid(), "count": _calls}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _build_starlette() -> Any:
    # Built at the first call, which is in the warm-up: the start-up time of the raw applications stays free
    # of a framework's.
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def show_user(request: Request) -> JSONResponse:
        return JSONResponse({"name": request.path_params["name"], "verbose": "v" in request.query_params})

    return Starlette(routes=[Route("/users/{name}", show_user)])
