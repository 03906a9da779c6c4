"""Both ends of Autobahn's WebSocket cases: an app that echoes, and the program that runs the cases against it.

    python -m tests.e2e.autobahn ws://127.0.0.1:8000 8 '1.*' 9.1.1 -12.2.15

The cases are Autobahn's own; kosoku runs them (it is written for asyncio, so it gets a process of its own). The second
argument is how many run at a time, one that begins with a minus leaves cases out. One JSON object a line says how a
case has ended, as Autobahn words it: its behavior is OK, NON-STRICT, INFORMATIONAL, UNIMPLEMENTED or FAILED.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Sends back whatever comes."""
    if scope["type"] != "websocket":
        return
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        if message.get("text") is not None:
            await send({"type": "websocket.send", "text": message["text"]})
        else:
            await send({"type": "websocket.send", "bytes": message["bytes"]})


async def main(url: str, at_a_time: str, *cases: str) -> None:
    from kosoku import FailureError, run_fuzzingclient

    included = [case for case in cases if not case.startswith("-")]
    excluded = [case.removeprefix("-") for case in cases if case.startswith("-")]
    try:
        results = await run_fuzzingclient(url, included, excluded, concurrency=int(at_a_time))
    except FailureError as failure:
        results = failure.results
    for result in results:
        row = {
            "case": result.case_id,
            "behavior": result.behavior.value,
            "close": result.behavior_close.value,
            "milliseconds": result.duration,
            "expectation": result.expectation,
            "result": f"{result.result} {result.result_close}",
            "received": str(result.received)[:500],
        }
        print(json.dumps(row))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
