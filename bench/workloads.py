"""The workloads: what is asked of every server, and what a right answer looks like.

A load workload is one wrk run (`load.py`); `memory`, `startup` and `leak` have code of their own
(`memory.py`, `load.py`). The names are those of `--workloads`; a name without its number of connections
means all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench import apps
from bench.servers import DEFLATE, HTTP2, TLS, WEBSOCKET, find_module, find_program

IDLE_CONNECTIONS = 4000
IDLE_SECURE = 2000  # over TLS, and WebSockets
ROOM_MEMBERS = 1000
H2_STREAMS = 16  # of each connection
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
    # load, memory, startup, leak, files, slow-readers, h2load, handshakes, ws-echo, ws-broadcast, ws-memory
    kind: str = "load"
    request: str = "plain"  # the KIND of wrk.lua
    connections: int = 64
    access_log: bool = False
    only: tuple[str, ...] = ()  # names of servers; empty: all
    key: bool = False  # one of the two that the chart shows: it gets two rounds more
    in_quick: bool = False
    file_size: int = 0  # bytes of each file, where files are served
    file_count: int = 0  # how many files take turns
    validated: bool = False  # the client has the file, and asks whether it is still the same
    speaks: frozenset[str] = frozenset()  # what the server must speak beside plain HTTP/1.1, see servers.py
    idle: int = IDLE_CONNECTIONS  # connections, where the memory of idle ones is measured
    message_size: int = 0  # bytes of each WebSocket message
    resumed: bool = False  # handshakes that resume a session

    @property
    def missing(self) -> list[str]:
        """What the load needs and cannot be found, with the way to get it."""
        missing = []
        if self.kind == "h2load" and find_program("h2load") is None:
            missing.append("h2load (`apt install nghttp2-client`)")
        if TLS in self.speaks and not find_module("trustme"):
            missing.append("trustme (`make bench` installs it)")
        return missing


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


def _h2(name: str, how: str, speaks: frozenset[str]) -> Workload:
    return Workload(
        name,
        f"HTTP/2 {how}, GET of {len(apps.HELLO_BODY)} bytes, paths differ, 8 connections of 16 streams",
        "bench.apps:hello",
        _HELLO,
        kind="h2load",
        connections=8 * H2_STREAMS,
        speaks=speaks,
        only=("trioserve", "granian", "hypercorn"),
    )


def _handshakes(name: str, what: str, only: tuple[str, ...], *, resumed: bool = False) -> Workload:
    return Workload(
        name,
        f"{what}, each with one request, 16 connections at a time",
        "bench.apps:hello",
        _HELLO,
        kind="handshakes",
        connections=16,
        speaks=frozenset({TLS}),
        resumed=resumed,
        only=only,
    )


def _websocket(name: str, title: str, kind: str, **more: Any) -> Workload:
    speaks = frozenset({WEBSOCKET, DEFLATE} if name.endswith("-deflate") else {WEBSOCKET})
    app = "bench.apps:websocket_room" if kind == "ws-broadcast" else "bench.apps:websocket_echo"
    # There is nothing to ask for: that a right answer comes is seen at each message.
    return Workload(name, title, app, Probe("GET", "/", None, b""), kind=kind, speaks=speaks, **more)


_SECURE = ("trioserve", "granian", "uvicorn", "hypercorn")
_COMPRESSING = ("trioserve", "uvicorn")
_TLS_ONLY = frozenset({TLS})

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
    Workload(
        "https-hello",
        f"HTTPS, GET /, {len(apps.HELLO_BODY)} bytes of text, 64 connections",
        "bench.apps:hello",
        _HELLO,
        speaks=_TLS_ONLY,
        only=_SECURE,
    ),
    _handshakes("tls-handshakes", "full TLS 1.3 handshakes, ECDSA P-256", _SECURE),
    _handshakes("tls-resumed", "TLS 1.3 sessions resumed", _COMPRESSING, resumed=True),
    _h2("h2-hello", "over TLS", frozenset({TLS, HTTP2})),
    _h2("h2c-hello", "without TLS (prior knowledge)", frozenset({HTTP2})),
    _websocket(
        "ws-echo-32",
        "WebSocket, 32 bytes of text echoed, 32 connections",
        "ws-echo",
        connections=32,
        message_size=32,
        only=_SECURE,
    ),
    _websocket(
        "ws-echo-1k",
        "WebSocket, 1 KiB of text echoed, 32 connections",
        "ws-echo",
        connections=32,
        message_size=1024,
        only=_SECURE,
    ),
    _websocket(
        "ws-echo-deflate",
        "WebSocket, 1 KiB of text echoed, compressed both ways, 32 connections",
        "ws-echo",
        connections=32,
        message_size=1024,
        only=_COMPRESSING,
    ),
    _websocket(
        "ws-broadcast",
        f"WebSocket, 32 bytes of text to {ROOM_MEMBERS:,} members of a room, per message delivered",
        "ws-broadcast",
        connections=ROOM_MEMBERS,
        message_size=32,
        only=_SECURE,
    ),
    _websocket(
        "ws-memory",
        f"private memory per idle WebSocket, {IDLE_SECURE:,} of them, one message each",
        "ws-memory",
        idle=IDLE_SECURE,
        message_size=256,
        only=_SECURE,
    ),
    _websocket(
        "ws-memory-deflate",
        f"private memory per idle WebSocket that compresses, {IDLE_SECURE:,} of them, one message each",
        "ws-memory",
        idle=IDLE_SECURE,
        message_size=256,
        only=(*_COMPRESSING, "hypercorn"),
    ),
    Workload(
        "tls-memory",
        f"private memory per idle TLS connection, {IDLE_SECURE:,} of them, one request each",
        "bench.apps:hello",
        _HELLO,
        kind="memory",
        speaks=_TLS_ONLY,
        idle=IDLE_SECURE,
        only=_SECURE,
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
