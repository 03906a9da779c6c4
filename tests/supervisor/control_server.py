"""A control socket with something behind it that scales, recycles and refuses, but has no processes."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import trio

from trioserve.net.json_lines import JsonLines
from trioserve.supervisor.control import ControlRefused, serve_control

LOG = logging.getLogger("tests.control")

CRASH = {
    "id": "20300102T030405-77-0a1b2c3d",
    "time": "2030-01-02T03:04:05.678Z",
    "worker": 3,
    "pid": 77,
    "class": "native crash",
    "exit": "SIGSEGV",
    "summary": "killed by signal 11 (SIGSEGV)",
}


class FakeServer:
    """Implements `ControlHandler`; `slow` commands wait for `gate`."""

    def __init__(self) -> None:
        self.wanted = 2
        self.generation = 1
        self.state = "running"
        self.next_id = 3
        self.ids = [1, 2]
        self.gate = trio.Event()
        self.waiting = trio.Event()
        self.broken: BaseException | None = None
        self.status_extra: dict[str, Any] = {}

    def status(self) -> dict[str, Any]:
        if self.broken is not None:
            raise self.broken
        return {
            "version": "9.8.7",
            "pid": os.getpid(),
            "state": self.state,
            "uptime": 3 * 3600 + 12 * 60,
            "application": "shop.main:app",
            "addresses": ["http://127.0.0.1:8000", "unix:/run/shop.sock"],
            "workers": {"wanted": self.wanted, "ready": len(self.ids), "starting": 1, "draining": 0},
            "generation": self.generation,
            "degraded": None,
            "restarts": {"crashed": 1, "recycled": 4, "hung": 0},
            "requests": 1234567,
            "in_flight": 3,
            "connections": 64,
            **self.status_extra,
        }

    def workers(self) -> list[dict[str, Any]]:
        return [
            {
                "id": number,
                "pid": 4000 + number,
                "state": "ready" if number > 1 else "tainted",
                "generation": self.generation,
                "age": 70.0 * number,
                "requests": 12345 * number,
                "in_flight": 1,
                "connections": 32,
                "rss": 50 * 1024 * 1024,
                "cpu": 0.123 if number > 1 else None,
                "last_heartbeat": 0.42,
                "reason": "" if number > 1 else "tainted: KeyError",
            }
            for number in self.ids
        ]

    async def scale(self, n: int) -> dict[str, Any]:
        if not 1 <= n <= 16:
            raise ControlRefused(f"{n} workers: give a number from 1 to 16")
        before, self.wanted = self.wanted, n
        return {"from": before, "to": n}

    async def recycle(self, worker_id: int | None) -> dict[str, Any]:
        chosen = list(self.ids) if worker_id is None else [worker_id]
        if worker_id is not None and worker_id not in self.ids:
            raise ControlRefused(f"there is no worker {worker_id}; there are {self.ids}")
        for number in chosen:
            self.ids[self.ids.index(number)] = self.next_id
            self.next_id += 1
        return {"recycled": chosen}

    async def reload(self) -> dict[str, Any]:
        self.waiting.set()
        await self.gate.wait()
        self.generation += 1
        return {"generation": self.generation}

    async def drain(self) -> dict[str, Any]:
        self.state = "draining"
        return {"state": self.state, "in_flight": 3}

    async def stop(self) -> dict[str, Any]:
        self.state = "stopping"
        return {"state": self.state, "in_flight": 3}

    def crashes(self, crash_id: str | None) -> Any:
        if crash_id is None:
            return [CRASH]
        if crash_id != CRASH["id"]:
            raise ControlRefused(f"no crash {crash_id!r} is known")
        return {**CRASH, "threads": [{"name": "MainThread", "frames": ["a.py:1 f", "b.py:2 g"]}], "error": {}}


class Client:
    """The protocol as a program speaks it that is not ours."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(path))
        self.channel = JsonLines(self.sock)

    async def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self.sock.send(rest) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock)

    async def ask(self, **request: Any) -> Any:
        await self.channel.send(request)
        return await self.answer()

    async def answer(self) -> Any:
        """The next one; None if there is none and the connection is closed."""
        with trio.fail_after(300):  # virtual where a test waits for a deadline
            return await self.channel.receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()


@asynccontextmanager
async def serving(path: Path, server: FakeServer | None = None) -> AsyncIterator[FakeServer]:
    """A control socket that takes commands while the block runs."""
    server = server or FakeServer()
    async with trio.open_nursery() as nursery:
        assert await nursery.start(serve_control, path, server, LOG) == path
        try:
            yield server
        finally:
            nursery.cancel_scope.cancel()


async def assert_serves(path: Path) -> None:
    with Client(path) as client:
        assert (await client.ask(command="status"))["ok"]
