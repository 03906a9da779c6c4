"""Files with a past, and requests without a server: an app is driven by hand and its events are put together."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from trioserve.testing import Response

#: More than is kept in memory, and more than is read at once.
LARGE = random.Random(4).randbytes(300_000)

#: When the files of a site were changed last: long ago, so that their validators are strong.
OLD = int(time.time()) - 3600


def put(path: Path, content: bytes, modified: int = OLD) -> Path:
    """A file that was last changed at `modified`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (modified, modified))
    return path


def http_scope(target: str, method: str = "GET", headers: Sequence[tuple[str, str]] = (), **more: Any) -> Any:
    raw_path, _, query = target.partition("?")
    return {
        "type": "http",
        "method": method,
        "path": unquote(raw_path),
        "raw_path": raw_path.encode("latin-1"),
        "query_string": query.encode("latin-1"),
        "root_path": "",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
        "extensions": {},
    } | more


class Recorder:
    """The `send` of a server that takes no files."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    async def send(self, message: Any) -> None:
        self.events.append(message)

    @property
    def response(self) -> Response:
        start, *rest = self.events
        assert start["type"] == "http.response.start"
        assert [event["type"] for event in rest] == ["http.response.body"] * len(rest)
        assert [event.get("more_body", False) for event in rest] == [True] * (len(rest) - 1) + [False]
        return Response(start["status"], start["headers"], b"".join(event["body"] for event in rest))


async def nothing_to_receive() -> Any:
    raise AssertionError("nobody has to receive anything")


async def ask(
    app: Any, target: str, method: str = "GET", headers: Sequence[tuple[str, str]] = (), **more: Any
) -> Response:
    """One request, driven by hand."""
    recorder = Recorder()
    await app(http_scope(target, method, headers, **more), nothing_to_receive, recorder.send)
    return recorder.response
