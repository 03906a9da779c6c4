"""The workloads: what is asked of every server, and what a right answer looks like.

A load workload is one wrk run (`load.py`); `memory`, `startup` and `leak` have code of their own
(`memory.py`, `load.py`). The names are those of `--workloads`; a name without its number of connections
means all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench import apps

IDLE_CONNECTIONS = 4000
LEAK_REQUESTS = 1_000_000
LEAK_CONNECTIONS = 20_000


@dataclass(frozen=True)
class Probe:
    """One request with the answer it must get, sent to each server before it is measured."""

    method: str
    path: str
    body: bytes | None
    expected: bytes


@dataclass(frozen=True)
class Workload:
    """One thing that is measured."""

    name: str
    title: str
    app: str
    probe: Probe
    kind: str = "load"  # load, memory, startup, leak, files, slow-readers
    request: str = "plain"  # the KIND of wrk.lua
    connections: int = 64
    access_log: bool = False
    only: tuple[str, ...] = ()  # names of servers; empty: all
    key: bool = False  # one of the two that the chart shows: it gets two rounds more
    in_quick: bool = False
    file_size: int = 0  # bytes of each file, where files are served
    file_count: int = 0  # how many files take turns
    validated: bool = False  # the client has the file, and asks whether it is still the same


_HELLO = Probe("GET", "/", None, apps.HELLO_BODY)
_POST_BODY = b"0123456789abcdef" * 64


def _hello(connections: int) -> Workload:
    plural = "s" if connections > 1 else ""
    return Workload(
        f"hello-{connections}",
        f"GET /, {len(apps.HELLO_BODY)} bytes of text, {connections} connection{plural}",
        "bench.apps:hello",
        _HELLO,
        connections=connections,
        key=connections == 64,
        in_quick=connections == 64,
    )


def _files(name: str, size: int, count: int, *, connections: int = 64, **more: Any) -> Workload:
    what = "304 for" if more.get("validated") else "GET"
    return Workload(
        f"files-{name}",
        f"{what} static files of {size / 1024:,.0f} KiB, {count} of them in turn, {connections} connections",
        "bench.apps:hello",
        Probe("GET", "/", None, b""),
        kind="files",
        request="files",
        connections=connections,
        file_size=size,
        file_count=count,
        **more,
    )


WORKLOADS: tuple[Workload, ...] = (
    _hello(64),
    Workload(
        "browser",
        "browser-like GET: 13 headers, path and values differ each time, 64 connections",
        "bench.apps:hello",
        Probe("GET", "/books/1/item-1?page=2", None, apps.HELLO_BODY),
        request="browser",
        key=True,
        in_quick=True,
    ),
    _hello(1),
    _hello(8),
    _hello(512),
    Workload(
        "post-1k",
        "POST 1 KiB, echoed, 64 connections",
        "bench.apps:echo",
        Probe("POST", "/echo", _POST_BODY, _POST_BODY),
        request="post",
        in_quick=True,
    ),
    Workload(
        "body-10k",
        "GET 10 KiB, one body event, 64 connections",
        "bench.apps:body_10k",
        Probe("GET", "/", None, apps.BODY_10K),
        in_quick=True,
    ),
    Workload(
        "stream-10",
        "GET, ten body events of 256 bytes, chunked, 64 connections",
        "bench.apps:stream_10",
        Probe("GET", "/", None, apps.STREAM_CHUNK * apps.STREAM_CHUNKS),
        in_quick=True,
    ),
    Workload(
        "starlette",
        "GET a Starlette route with a path parameter, JSON, 64 connections",
        "bench.apps:starlette_route",
        Probe("GET", "/users/ada?v=1", None, b'{"name":"ada","verbose":true}'),
        request="route",
    ),
    Workload(
        "access-log",
        "hello with the access log on, to a file, 64 connections",
        "bench.apps:hello",
        _HELLO,
        access_log=True,
        only=("trioserve", "uvicorn", "hypercorn"),
    ),
    Workload(
        "memory",
        f"private memory per idle keep-alive connection, {IDLE_CONNECTIONS:,} connections, one request each",
        "bench.apps:hello",
        _HELLO,
        kind="memory",
        in_quick=True,
    ),
    _files("1k", 1024, 64, key=True, in_quick=True),
    _files("16k", 16 * 1024, 64),
    _files("100k", 100 * 1024, 64, in_quick=True),
    _files("10m", 10 * 1024 * 1024, 4, connections=8),
    # One file: each server has validators of its own for it.
    _files("304", 1024, 1, validated=True),
    Workload(
        "slow-readers",
        "memory growth while 50 clients read a file of 1 GiB slowly",
        "bench.apps:hello",
        Probe("GET", "/", None, b""),
        kind="slow-readers",
        connections=50,
        file_size=1024**3,
        file_count=1,
    ),
    Workload("startup", "from exec to the first answer", "bench.apps:hello", _HELLO, kind="startup"),
    Workload(
        "leak",
        f"memory growth over {LEAK_REQUESTS:,} requests and {LEAK_CONNECTIONS:,} connections",
        "bench.apps:hello",
        _HELLO,
        kind="leak",
        only=("trioserve", "trioserve-h11"),
    ),
)


def select(names: list[str]) -> list[Workload]:
    """Return the workloads of these names, in the order of the table; ValueError names an unknown one."""
    chosen: set[str] = set()
    for name in names:
        found = {w.name for w in WORKLOADS if w.name == name or w.name.rpartition("-")[0] == name}
        if not found:
            known = ", ".join(workload.name for workload in WORKLOADS)
            raise ValueError(f"there is no workload {name!r}; there are: {known}")
        chosen |= found
    return [workload for workload in WORKLOADS if workload.name in chosen]
