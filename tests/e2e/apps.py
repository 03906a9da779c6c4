"""The app behind the processes: a path for each behaviour, and stdout to tell the test where it is.

`/hold` and its kin say "holding" and go on when the request body is complete: the test holds its last byte.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import trio

import trioserve
from tests.apps import echo, read_body, respond
from tests.threads import IMPOSSIBLE_STACK

# What stands in messages, queries, headers and bodies, and may stand in no report.
SECRET = "hunter2"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """All of the paths below, with a lifespan that tells of its startup and shutdown."""
    if scope["type"] == "lifespan":
        await _lifespan(receive, send)
        return
    handler = ROUTES.get(scope["path"], _hello)
    await handler(scope, receive, send)


async def _lifespan(receive: Any, send: Any) -> None:
    while True:
        message = await receive()
        print(message["type"], flush=True)
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _hello(scope: Any, receive: Any, send: Any) -> None:
    await respond(send, b"hello", headers=[(b"content-type", b"text/plain")])


async def _pid(scope: Any, receive: Any, send: Any) -> None:
    """Which process answers; with a short wait, so that requests are in flight when something happens."""
    await trio.sleep(0.002)
    await respond(send, str(os.getpid()).encode())


async def _burn(scope: Any, receive: Any, send: Any) -> None:
    """Keeps a CPU busy until the request body is complete."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_spin)
        await read_body(receive)
        nursery.cancel_scope.cancel()
    await respond(send)


async def _spin() -> None:
    while True:
        await trio.lowlevel.checkpoint()


_LEAKED: list[bytes] = []


async def _grow(scope: Any, receive: Any, send: Any) -> None:
    """Keeps as many MiB for ever as the query says."""
    _LEAKED.append(b"x" * (int(scope["query_string"]) * 1024 * 1024))
    await respond(send)


async def _segfault(scope: Any, receive: Any, send: Any) -> None:
    import ctypes

    ctypes.string_at(0)


async def _no_threads(scope: Any, receive: Any, send: Any) -> None:
    """From here on no thread can be started."""
    threading.stack_size(IMPOSSIBLE_STACK)
    await respond(send)


async def _describe(scope: Any, receive: Any, send: Any) -> None:
    """What the app sees of the request, a line each."""
    lines = [
        f"{scope['method']} {scope['raw_path'].decode()} {scope['query_string'].decode()} {scope['http_version']}",
        *(f"{name.decode()}: {value.decode()}" for name, value in scope["headers"]),
        f"body {len(await read_body(receive))}",
    ]
    await respond(send, "\n".join(lines).encode())


async def _count(scope: Any, receive: Any, send: Any) -> None:
    """The length of the body, which is not kept."""
    size = parts = 0
    more = True
    while more:
        message = await receive()
        assert message["type"] == "http.request"
        size += len(message["body"])
        parts += 1
        more = message["more_body"]
    await respond(send, f"{size}".encode())


async def _hold(scope: Any, receive: Any, send: Any) -> None:
    print("holding", flush=True)
    try:
        body = await read_body(receive)
    except BaseException as error:
        print("held request ended by", type(error).__name__, flush=True)
        raise
    await respond(send, body)


async def _stubborn(scope: Any, receive: Any, send: Any) -> None:
    """Eats Cancelled for ever."""
    print("holding", flush=True)
    while True:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            # It comes again at once, for ever. Lending the GIL out in between lets coverage save what it has seen.
            time.sleep(0.001)


async def _block(scope: Any, receive: Any, send: Any) -> None:
    """Blocks the event loop, once it is let."""
    print("holding", flush=True)
    await read_body(receive)
    time.sleep(3600)


async def _sleep(scope: Any, receive: Any, send: Any) -> None:
    """Blocks the event loop for as many seconds as the query says."""
    print("sleeping", flush=True)
    time.sleep(float(scope["query_string"]))
    await respond(send)


async def _stream(scope: Any, receive: Any, send: Any) -> None:
    """Streams until the client is gone or the request is cancelled, and says so."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    try:
        while True:
            await send({"type": "http.response.body", "body": b"tick\n" * 100, "more_body": True})
            await trio.sleep(0.01)
    except BaseException as error:
        print("stream ended by", type(error).__name__, flush=True)
        raise


async def _large(scope: Any, receive: Any, send: Any) -> None:
    """As many MiB as the query says, in parts, without a length."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(16 * int(scope["query_string"])):
        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _raise(scope: Any, receive: Any, send: Any) -> None:
    password = SECRET
    body = await read_body(receive)
    raise LookupError(f"nothing for {len(password) + len(body)} bytes")


async def _raise_late(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"half", "more_body": True})
    raise LookupError("in the middle")


async def _range(scope: Any, receive: Any, send: Any) -> None:
    """Serves `bytes=a-b` of the alphabet."""
    alphabet = b"abcdefghijklmnopqrstuvwxyz"
    wanted = dict(scope["headers"]).get(b"range", b"")
    if not wanted.startswith(b"bytes="):
        await respond(send, alphabet, headers=[(b"accept-ranges", b"bytes")])
        return
    first, last = (int(number) for number in wanted.removeprefix(b"bytes=").split(b"-"))
    content_range = f"bytes {first}-{last}/{len(alphabet)}".encode()
    await respond(send, alphabet[first : last + 1], 206, [(b"content-range", content_range)])


async def _break_trio(scope: Any, receive: Any, send: Any) -> None:
    """A system task that fails ends all of trio, as its documentation says."""
    trio.lowlevel.spawn_system_task(_fail_at_once)
    await trio.sleep_forever()


async def _fail_at_once() -> None:
    raise LookupError("in a system task")


async def _leak(scope: Any, receive: Any, send: Any) -> None:
    """Leaves a nursery open in a task that is not its own."""
    await trio.open_nursery().__aenter__()


async def _hints(scope: Any, receive: Any, send: Any) -> None:
    """Two early hints, then the response."""
    for link in (b"</style.css>; rel=preload; as=style", b"</app.js>; rel=preload; as=script"):
        await send({"type": "http.response.early_hint", "links": [link]})
    await respond(send)


async def _trailers(scope: Any, receive: Any, send: Any) -> None:
    """A body, and behind it a field."""
    await send({"type": "http.response.start", "status": 200, "headers": [], "trailers": True})
    await send({"type": "http.response.body", "body": b"hello", "more_body": True})
    await send({"type": "http.response.body", "body": b" again"})
    await send({"type": "http.response.trailers", "headers": [(b"x-sum", b"11")]})


async def _tls(scope: Any, receive: Any, send: Any) -> None:
    """What the `tls` extension says, a line each; long values by their length."""
    found = scope["extensions"].get("tls", {})
    short = {
        name: len(value) if name.endswith(("chain", "_cert")) else value for name, value in found.items()
    }
    await respond(send, "\n".join(f"{name}: {value}" for name, value in sorted(short.items())).encode())


def _raiser(error: type[BaseException], *arguments: Any) -> Any:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        raise error(*arguments)

    return handler


ROUTES: dict[str, Any] = {
    "/burn": _burn,
    "/grow": _grow,
    "/pid": _pid,
    "/segfault": _segfault,
    "/block": _block,
    "/break-trio": _break_trio,
    "/count": _count,
    "/describe": _describe,
    "/echo": echo,
    "/exit": _raiser(SystemExit, 7),
    "/fatal": _raiser(trioserve.Fatal, "beyond repair"),
    "/hints": _hints,
    "/hold": _hold,
    "/interrupt": _raiser(KeyboardInterrupt),
    "/large": _large,
    "/leak": _leak,
    "/no-threads": _no_threads,
    "/memory": _raiser(MemoryError),
    "/raise": _raise,
    "/raise-late": _raise_late,
    "/range": _range,
    "/sleep": _sleep,
    "/stream": _stream,
    "/stubborn": _stubborn,
    "/tls": _tls,
    "/trailers": _trailers,
}


# -- apps with a lifespan of their own ----------------------------------------------------------------------


async def startup_fails(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no database"})


async def startup_hangs(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    print("starting", flush=True)
    await trio.sleep_forever()


async def shutdown_hangs(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "lifespan":
        await respond(send)
        return
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    print("stopping", flush=True)
    await trio.sleep_forever()


async def lifespan_dies(scope: Any, receive: Any, send: Any) -> None:
    """Its background work fails when a request says so."""
    if scope["type"] == "lifespan":
        await receive()
        scope["state"]["die"] = trio.Event()
        await send({"type": "lifespan.startup.complete"})
        await scope["state"]["die"].wait()
        raise RuntimeError("the background task has failed")
    await respond(send)
    scope["state"]["die"].set()
