"""Compression of a JSON answer in one process: `trioserve.Compression` beside Starlette's GZipMiddleware.

    python bench/compression.py                      50 kB at the levels that people use
    python bench/compression.py --size 1000000       where both go to threads

Both wrap the same application and are called on the same trio loop, without a server, turn and turn about; who begins
changes each round. CPU time is that of the whole process, its threads included. The ratio is taken within each round,
and its median is shown: of work done in the same CPU time, so that above 1 trioserve's does more. "Held" is the longest
that one step of a task ran on the event loop, in CPU time of its thread: so long everybody else had to wait.

Nothing is written: this is a figure about a middleware, not about a server. Exit codes as those of `run.py`.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trioserve import Compression

_SIZE = 50_000
_ROUNDS = 30
_CALLS = 20  # per turn: long enough for the clock of CPU time, short enough that a ratio sees one weather

# Coding, our level, Starlette's level of gzip: the same one, and for brotli also the one that makes as little of it.
_CASES = (("gzip", 4, 4), ("gzip", 5, 5), ("gzip", 6, 6), ("br", 4, 4), ("br", 4, 6))

_HEADER = """\
                     CPU µs per answer                       bytes            loop held, ms
                   trioserve  Starlette   ratio  trioserve  Starlette  trioserve  Starlette"""


def make_body(size: int) -> bytes:
    """JSON as an API answers with: a list of records, keys that repeat, values that do so less."""
    source = random.Random(size)
    words = [
        "".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(3, 9))) for _ in range(400)
    ]
    records: list[dict[str, object]] = []
    length = 2
    while length < size:
        records.append(
            {
                "id": source.getrandbits(40),
                "name": " ".join(source.choices(words, k=2)).title(),
                "email": f"{source.choice(words)}@{source.choice(words)}.example",
                "created": f"2025-{source.randint(1, 12):02}-{source.randint(1, 28):02}T12:00:00Z",
                "active": source.random() < 0.8,
                "score": round(source.random() * 100, 3),
                "tags": source.choices(words, k=3),
            }
        )
        length += len(json.dumps(records[-1])) + 2
    return json.dumps(records).encode()


# -- one side -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Side(trio.abc.Instrument):
    """One middleware at one level, and what was measured of it.

    Attributes:
        app: it, around an app that answers with the body.
        coding: what it is asked for.
        cpu_us: CPU time per answer, of each round.
        held: the longest step of a task, in seconds of CPU time.
        size: bytes of the coded answer.
    """

    app: Any
    coding: str
    cpu_us: list[float] = field(default_factory=list)
    held: float = 0.0
    size: int = 0
    _began: float = 0.0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Look at the clock."""
        self._began = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Keep the longest."""
        self.held = max(self.held, time.thread_time() - self._began)

    async def check(self, body: bytes) -> None:
        """Whether the answer is what it should be.

        Raises:
            RuntimeError: it is not.
        """
        coding, coded = await self._answer()
        decode: Callable[[bytes], bytes] = (
            gzip.decompress if coding == b"gzip" else importlib.import_module("brotli").decompress
        )
        if coding != self.coding.encode() or decode(coded) != body:
            raise RuntimeError(f"{self.app!r} answered {len(coded)} bytes in {coding!r}, which are wrong")
        self.size = len(coded)

    async def take_turn(self) -> None:
        """Answer some times and keep the figures."""
        trio.lowlevel.add_instrument(self)
        self._began = time.thread_time()  # in the middle of a step
        began = time.process_time()
        for _ in range(_CALLS):
            await self._answer()
            await trio.lowlevel.checkpoint()
        self.cpu_us.append((time.process_time() - began) / _CALLS * 1e6)
        trio.lowlevel.remove_instrument(self)

    async def _answer(self) -> tuple[bytes, bytes]:
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
            "path": "/", "raw_path": b"/", "query_string": b"", "root_path": "",
            "headers": [(b"host", b"bench"), (b"accept-encoding", self.coding.encode())],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "extensions": {}, "state": {},
        }  # fmt: skip
        sent: list[Any] = []

        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        fields = dict(sent[0]["headers"])
        return fields.get(b"content-encoding", b""), b"".join(message["body"] for message in sent[1:])


def make_sides(coding: str, ours: int, theirs: int, body: bytes) -> tuple[Side, Side]:
    """Both middlewares around the same app. Starlette's only makes gzip."""
    gzip_middleware = importlib.import_module("starlette.middleware.gzip").GZipMiddleware

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    compression = Compression(app, codings=(coding,), brotli_level=ours, gzip_level=ours)
    return Side(compression, coding), Side(gzip_middleware(app, compresslevel=theirs), "gzip")


# -- all of it ----------------------------------------------------------------------------------------------


async def compare(coding: str, ours: int, theirs: int, body: bytes, rounds: int) -> str:
    """The row of the table."""
    mine, starlette = sides = make_sides(coding, ours, theirs, body)
    for side in sides:
        await side.check(body)
        await side.take_turn()  # warms up
        side.cpu_us.clear()
        side.held = 0.0
    for number in range(rounds):
        for side in sides if number % 2 else reversed(sides):
            await side.take_turn()
    ratio = statistics.median(b / a for a, b in zip(mine.cpu_us, starlette.cpu_us, strict=True))
    name = f"{coding} {ours}" if coding == "gzip" else f"{coding} {ours} : gzip {theirs}"
    return (
        f"{name:17}{statistics.median(mine.cpu_us):11,.0f}{statistics.median(starlette.cpu_us):11,.0f}{ratio:8.2f}"
        f"{mine.size:11,}{starlette.size:11,}{mine.held * 1000:11.2f}{starlette.held * 1000:11.2f}"
    )


async def run(size: int, rounds: int) -> None:
    """Print the table."""
    body = make_body(size)
    print(f"JSON of {len(body):,} bytes, {rounds} rounds of {_CALLS} answers each\n\n{_HEADER}")
    for coding, ours, theirs in _CASES:
        print(await compare(coding, ours, theirs, body, rounds), flush=True)


def main() -> int:
    """Run what the arguments ask for; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="bench/compression.py", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--size", type=int, default=_SIZE, metavar="BYTES", help=f"of the answer ({_SIZE})")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, metavar="N", help=f"({_ROUNDS})")
    args = parser.parse_args()
    if args.size < 2000 or args.rounds < 1:
        parser.error("--size is at least 2000 (less is not compressed), --rounds at least 1")
    if importlib.util.find_spec("starlette") is None:
        print("bench/compression.py: starlette is not installed: pip install --group bench", file=sys.stderr)
        return 2
    try:
        trio.run(run, args.size, args.rounds)
    except RuntimeError as error:
        print(f"bench/compression.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
