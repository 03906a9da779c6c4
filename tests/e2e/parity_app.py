"""An app as projects have them that were written for hypercorn: it sets its lengths, and knows no server."""

from __future__ import annotations

import json
from typing import Any

from tests.apps import read_body


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Tell what the request looked like; `/stream` in parts, `/missing` with 404, `/empty` with 204."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
    if scope["type"] != "http":
        return
    seen = {
        "method": scope["method"],
        "path": scope["path"],
        "raw_path": scope["raw_path"].decode(),
        "query": scope["query_string"].decode(),
        "root_path": scope["root_path"],
        "scheme": scope["scheme"],
        "http_version": scope["http_version"],
        "asgi": scope["asgi"]["version"],
        "client": scope["client"][0] if scope["client"] else None,
        "headers": [[name.decode(), value.decode()] for name, value in scope["headers"] if name != b"host"],
        "body": (await read_body(receive)).decode(),
    }
    body = json.dumps(seen, sort_keys=True).encode()
    path = scope["path"].removeprefix(scope["root_path"])
    status = {"/missing": 404, "/empty": 204, "/cached": 304}.get(path, 200)
    fields = [(b"content-type", b"application/json"), (b"x-twice", b"1"), (b"x-twice", b"2")]
    if path == "/stream":
        await send({"type": "http.response.start", "status": status, "headers": fields})
        for start in range(0, len(body), 50):
            await send({"type": "http.response.body", "body": body[start : start + 50], "more_body": True})
        await send({"type": "http.response.body"})
        return
    if status in (204, 304):
        body = b""
    else:
        fields.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})
