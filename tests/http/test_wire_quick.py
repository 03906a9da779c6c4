"""Requests that the hub answers in the place of the connection's task; and all that it must leave to the task."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.http.feeding import head
from tests.http.test_wire_framing import bare
from tests.waiting import until
from trioserve import StaticFiles
from trioserve.net import epoll_hub
from trioserve.static.answers import Answer
from trioserve.static.sendfile import WINDOW
from trioserve.structure.context import ConnectionContext
from trioserve.testing import RawClient, TestServer

pytestmark = pytest.mark.modes("tls", because="HTTP/2 has a task for each stream")

TEXT = b"in memory, and sent in one piece\n"
LONG = b"0123456789abcdef" * 20_000


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_bytes(TEXT)
    (tmp_path / "long.bin").write_bytes(LONG)
    return tmp_path


async def called(scope: Any, receive: Any, send: Any) -> None:
    """What is no file; says how many bytes were sent to it."""
    size = 0
    while True:
        event = await receive()
        size += len(event["body"])
        if not event["more_body"]:
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-app", b"%d" % size)]})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, the hub has time to answer."""
    monkeypatch.setattr(epoll_hub, "_BUSY_SECONDS", 60.0)


@asynccontextmanager
async def known(
    directory: Path, hub: str = "epoll", **settings: Any
) -> AsyncIterator[tuple[TestServer, RawClient, ConnectionContext]]:
    """A server that knows the files, a client, and its connection, which waits for the next request."""
    async with (
        closing_files(StaticFiles(directory, fallthrough=called)) as files,
        bare(files, hub=hub, lifespan="off", **settings) as server,
        server.connect() as client,
    ):
        for name in ("a.txt", "long.bin", "a.txt"):
            assert (await client.get(f"/{name}")).status == 200
        (connection,) = server.worker.context.connections
        await at_rest(connection)
        yield server, client, connection


@asynccontextmanager
async def closing_files(files: StaticFiles) -> AsyncIterator[StaticFiles]:
    """Without a lifespan nobody else gives its descriptors back."""
    try:
        yield files
    finally:
        files.close()


async def at_rest(connection: ConnectionContext) -> None:
    await until(lambda: connection.transport.watch.reader is not None)


async def test_two_servers_of_one_app_write_their_own_fields(directory: Path) -> None:
    async with (
        closing_files(StaticFiles(directory, fallthrough=called)) as files,
        bare(files, lifespan="off", include_server_header=True) as one,
        bare(files, lifespan="off", include_server_header=False) as other,
        one.connect() as named,
        other.connect() as nameless,
    ):
        for _ in range(4):
            for server, client, has_name in ((one, named, True), (other, nameless, False)):
                response = await client.get("/a.txt")
                (connection,) = server.worker.context.connections
                await at_rest(connection)  # so that the hub answers the next
                assert response.body == TEXT
                assert (b"server" in dict(response.headers)) == has_name


class Steps(trio.abc.Instrument):
    """Counts the turns of one task."""

    def __init__(self, task: trio.lowlevel.Task) -> None:
        self.task = task
        self.count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += task is self.task


@contextmanager
def steps_of(connection: ConnectionContext) -> Iterator[Steps]:
    steps = Steps(connection.task)
    trio.lowlevel.add_instrument(steps)
    try:
        yield steps
    finally:
        trio.lowlevel.remove_instrument(steps)


async def test_what_is_known_is_answered_without_the_task(directory: Path, engine: str) -> None:
    async with known(directory, http_engine=engine) as (server, client, connection):
        tag = (await client.get("/a.txt")).header("etag")
        before = connection.requests
        await at_rest(connection)
        with steps_of(connection) as steps:
            for _ in range(3):
                assert (await client.get("/a.txt")).body == TEXT
            assert (await client.get("/a.txt", [("If-None-Match", str(tag))])).status == 304
            assert (await client.get("/a.txt", [("Range", "bytes=3-8")])).body == TEXT[3:9]
        assert steps.count == 0
        assert connection.requests == before + 5
        assert server.worker.context.requests_served == before + 5


class Log:
    """An access log that keeps what it is told."""

    def __init__(self) -> None:
        self.entries: list[Any] = []

    def log(self, entry: Any) -> None:
        self.entries.append(entry)


async def test_each_has_its_line_in_the_access_log(directory: Path, engine: str) -> None:
    async with known(directory, http_engine=engine) as (server, client, connection):
        log = server.worker.context.access_log = Log()  # type: ignore[assignment]
        tag = str((await client.get("/a.txt")).header("etag"))
        await at_rest(connection)
        with steps_of(connection) as steps:
            assert (await client.get("/a.txt?q=1", [("X-Own", "1")])).body == TEXT
            assert (await client.get("/a.txt", [("If-None-Match", tag)])).status == 304
            assert (await client.get("/a.txt", [("Range", "bytes=3-8")])).status == 206
        assert steps.count == 0
        assert [
            (entry.method, entry.target, entry.status, entry.response_bytes, entry.outcome)
            for entry in log.entries[1:]
        ] == [
            ("GET", b"/a.txt?q=1", 200, len(TEXT), "complete"),
            ("GET", b"/a.txt", 304, 0, "complete"),
            ("GET", b"/a.txt", 206, 6, "complete"),
        ]
        first = log.entries[1]
        assert (b"x-own", b"1") in first.request_headers
        assert (b"etag", tag.encode()) in first.response_headers
        assert 0 <= first.head_seconds <= first.seconds < 30
        assert first.request_number == connection.requests - 2


async def test_everything_else_is_the_tasks(directory: Path, engine: str, hub: str) -> None:
    async with known(directory, hub, http_engine=engine) as (_server, client, _connection):
        for _ in range(2):
            assert (await client.get("/else")).header("x-app") == "0"
            posted = await client.request("POST", "/else", [("Content-Length", "9")], b"nine\r\n\r\n!")
            assert (posted.header("x-app"), posted.body) == ("9", b"/else")
            nothing = await client.get("/a.txt", method="HEAD")
            assert (nothing.header("content-length"), nothing.body) == (str(len(TEXT)), b"")
            refused = await client.request("POST", "/a.txt", [("Content-Length", "4")], b"\r\n\r\n")
            assert refused.status == 405
            assert (await client.get("/long.bin")).body == LONG
            assert (await client.get("/a.txt")).body == TEXT


@pytest.mark.parametrize("body", [b"unasked for", b"unasked for\r\n\r\n"])
async def test_a_body_that_nobody_wants_is_no_part_of_the_next_request(
    directory: Path, engine: str, hub: str, body: bytes
) -> None:
    async with known(directory, hub, http_engine=engine) as (_server, client, _connection):
        for _ in range(2):
            await client.send(head("GET /a.txt HTTP/1.1", f"Content-Length: {len(body)}") + body)
            assert (await client.read_response()).body == TEXT
            posted = await client.request("POST", "/else", [("Content-Length", "3")], b"own")
            assert posted.header("x-app") == "3"


@pytest.mark.parametrize("cut", [1, 3, 10, -5, -4, -3, -2, -1])
async def test_a_head_in_two_parts(directory: Path, engine: str, hub: str, cut: int) -> None:
    request = head("GET /a.txt HTTP/1.1")
    async with known(directory, hub, http_engine=engine) as (_server, client, connection):
        for part in (request[:cut], request[cut:]):
            await client.send(part)
            if part is not request[cut:]:
                while connection.phase != "request_head":
                    await trio.lowlevel.checkpoint()
                await at_rest(connection)
        assert (await client.read_response()).body == TEXT
        assert (await client.get("/a.txt")).body == TEXT


@pytest.mark.parametrize("empty", [b"\r\n", b"\r\n\r\n"])
async def test_empty_lines_before_a_request(directory: Path, engine: str, hub: str, empty: bytes) -> None:
    async with known(directory, hub, http_engine=engine) as (_server, client, connection):
        await client.send(empty + head("GET /a.txt HTTP/1.1"))
        assert (await client.read_response()).body == TEXT
        await at_rest(connection)
        read = connection.transport.bytes_read
        await client.send(empty)
        while connection.transport.bytes_read == read:
            await trio.lowlevel.checkpoint()
        await at_rest(connection)
        await client.send(head("GET /a.txt HTTP/1.1"))
        assert (await client.read_response()).body == TEXT


async def test_a_part_of_a_head_behind_empty_lines_begins_its_phase(
    directory: Path, engine: str, hub: str
) -> None:
    async with known(directory, hub, http_engine=engine) as (_server, client, connection):
        await client.send(b"\r\n\r\nGET /a")
        await until(lambda: connection.phase == "request_head")
        await client.send(b".txt HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.read_response()).body == TEXT


async def test_several_requests_at_once_are_answered_in_order(directory: Path, engine: str, hub: str) -> None:
    async with known(directory, hub, http_engine=engine) as (_server, client, _connection):
        paths = ["a.txt", "a.txt", "else", "long.bin", "a.txt", "else", "else", "a.txt", "a.txt"]
        whole = b"".join(head(f"GET /{path} HTTP/1.1") for path in paths)
        for data in (whole, whole + head("GET /a.txt HTTP/1.1")[:9]):
            await client.send(data)
            bodies = [(await client.read_response()).body for _ in paths]
            assert bodies == [{"a.txt": TEXT, "long.bin": LONG}.get(path, b"/else") for path in paths]
        await client.send(head("GET /a.txt HTTP/1.1")[9:])
        assert (await client.read_response()).body == TEXT


@pytest.mark.parametrize("line", ["GET /a.txt HTTP/9.9", "GET  /a.txt HTTP/1.1", "CONNECT a:1 HTTP/1.1"])
async def test_what_is_refused_is_refused_by_the_task(
    directory: Path, engine: str, hub: str, line: str
) -> None:
    async with known(directory, hub, http_engine=engine) as (server, client, _connection):
        await client.send(head(line))
        response = await client.read_response()
        assert response.status >= 400
        assert response.header("connection") == "close"
        await server.wait_idle()
        assert sum(server.worker.context.counters.refused.values()) == 1
        assert server.worker.context.counters.faults == {}


async def test_a_refused_connection_is_not_left_to_the_collector(directory: Path, hub: str) -> None:
    async with bare(StaticFiles(directory), hub=hub, lifespan="off") as server, server.connect() as client:
        assert (await client.get("/a.txt")).status == 200
        (connection,) = server.worker.context.connections
        await at_rest(connection)
        gone = weakref.ref(connection)
        del connection
        gc.collect()
        gc.disable()
        try:
            await client.send(head("GET  /a.txt HTTP/1.1"))
            assert (await client.read_response()).status == 400
            client.close()
            await server.wait_idle()
            await wait_all_tasks_blocked()
            assert gone() is None
        finally:
            gc.enable()


async def test_the_last_request_of_a_connection_is_told_so(directory: Path, engine: str, hub: str) -> None:
    async with known(directory, hub, http_engine=engine, keep_alive_max_requests=5) as (_, client, _c):
        assert (await client.get("/a.txt")).header("connection") is None
        assert (await client.get("/a.txt")).header("connection") == "close"
        assert await client.receive() == b""


async def test_a_drain_finds_a_request_that_was_read_already(directory: Path, hub: str) -> None:
    async with known(directory, hub) as (server, client, connection):
        await client.send(head("GET /a.txt HTTP/1.1"))
        server.worker.context.drain.begin("test")
        response = await client.read_response()
        assert response.body == TEXT
        assert (await client.receive()) == b""
        assert connection.requests == 4


async def test_a_peer_that_is_gone_is_no_fault(directory: Path, hub: str) -> None:
    async with known(directory, hub) as (server, client, connection):
        transport = connection.transport
        send = transport.send_nowait

        def broken(data: Any, flags: int = 0) -> int:
            client.reset()
            while True:
                send(data, flags)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(transport), "send_nowait", lambda _self, data, flags=0: broken(data, flags))
            await client.send(head("GET /a.txt HTTP/1.1"))
            await server.wait_idle()
        assert server.worker.context.counters.peer_gone == 1
        assert server.worker.context.counters.faults == {}


@pytest.mark.parametrize(
    ("error", "row"), [(RuntimeError("a bug"), "S1"), (SystemExit(3), "X1"), (KeyboardInterrupt(), "X2")]
)
async def test_an_error_in_here_is_judged_as_any_of_ours(
    directory: Path, hub: str, error: BaseException, row: str
) -> None:
    class Broken(StaticFiles):
        def quick_answer(
            self, method: str, raw_path: bytes | None, fields: Mapping[bytes, bytes], root_path: str = ""
        ) -> Answer | None:
            if raw_path == b"/broken":
                raise error
            return super().quick_answer(method, raw_path, fields, root_path)

    async with bare(Broken(directory), hub=hub, lifespan="off") as server, server.connect() as client:
        assert (await client.get("/a.txt")).status == 200
        (connection,) = server.worker.context.connections
        await at_rest(connection)
        await client.send(head("GET /broken HTTP/1.1"))
        with suppress(OSError):
            assert await client.receive() == b""
        await server.wait_idle()
        assert server.worker.context.counters.faults == {row: 1}


@pytest.mark.parametrize("begun", [False, True])
async def test_a_file_that_is_closed_before_the_task_has_its_turn_is_sent_all_the_same(
    directory: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """What the hub has found is looked for again; but what it has begun to send has to be the same to the end."""
    others: list[int] = []
    data = LONG * (1 + begun * WINDOW // len(LONG))
    (directory / "long.bin").write_bytes(data)
    async with known(directory) as (server, client, connection):
        if not begun:
            # As for a file that is not in memory.
            monkeypatch.setattr(server.worker.context.files, "begin", lambda *_: None)
        files: Any = server.worker.context.app
        watch: Any = connection.transport.watch
        go_on = watch._hub.on_pulled

        def go_on_and_close(pulled: list[Any]) -> int:
            woken: int = go_on(pulled)
            assert woken == 1
            assert (connection.exchange is not None) == (begun and connection.transport.sends_files)
            files.close()
            others.extend(os.open(directory / "a.txt", os.O_RDONLY) for _ in range(8))
            return woken

        watch._hub.on_pulled = go_on_and_close
        await client.send(head("GET /long.bin HTTP/1.1"))
        assert (await client.read_response()).body == data
        client.close()
        await server.wait_idle()
        assert server.worker.context.counters.faults == {}
    assert others
    for descriptor in others:
        os.close(descriptor)


async def test_an_answer_for_which_the_hub_has_no_time_left_is_the_tasks(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with known(directory) as (_server, client, connection):
        watch: Any = connection.transport.watch
        pull = watch.pull

        def pull_too_late() -> Any:
            pulled = pull()
            assert not isinstance(pulled, bool)
            watch._hub._busy_until = 0.0
            return pulled

        before = connection.requests
        for target, body in (("/a.txt", TEXT), ("/long.bin", LONG), ("/a.txt", TEXT)):
            await at_rest(connection)
            watch.pull = pull_too_late
            with steps_of(connection) as steps:
                assert (await client.get(target)).body == body
            assert steps.count > 0
        assert connection.requests == before + 3


async def test_time_outs_hold_after_requests_that_no_task_has_seen(
    directory: Path, autojump_clock: Any
) -> None:
    settings: dict[str, Any] = {"keep_alive_timeout": 7, "request_head_timeout": 3}
    async with known(directory, **settings) as (_server, client, _connection):
        for _ in range(3):
            await trio.sleep(5)
            assert (await client.get("/a.txt")).body == TEXT
        began = trio.current_time()
        await client.send(b"GET /a")
        assert (await client.read_response()).status == 408
        assert 3 <= trio.current_time() - began < 4
    async with known(directory, **settings) as (_server, client, _connection):
        assert (await client.get("/a.txt")).body == TEXT
        began = trio.current_time()
        assert await client.receive() == b""
        assert 7 <= trio.current_time() - began < 8


async def test_empty_lines_are_no_sign_of_life(directory: Path, autojump_clock: Any) -> None:
    async with known(directory, keep_alive_timeout=7) as (_server, client, connection):
        began = trio.current_time()
        for at in (3.0, 6.95):
            await trio.sleep_until(began + at)
            read = connection.transport.bytes_read
            await client.send(b"\r\n")
            while connection.transport.bytes_read == read:
                await trio.lowlevel.checkpoint()
            await at_rest(connection)
        assert await client.receive() == b""
        assert 7 <= trio.current_time() - began < 7.06


async def test_a_head_that_drips_is_late_all_the_same(directory: Path, autojump_clock: Any) -> None:
    async with known(directory, request_head_timeout=3) as (_server, client, connection):
        began = trio.current_time()
        await client.send(b"GET /a.txt HTTP/1.1\r\nX-Long: ")
        while connection.phase != "request_head":
            await trio.lowlevel.checkpoint()
        while connection.phase == "request_head":
            await at_rest(connection)
            await trio.sleep(0.4)
            await client.send(b"x")
            await trio.sleep(0.0001)
        assert (await client.read_response()).status == 408
        assert 3 <= trio.current_time() - began < 4


@pytest.mark.parametrize("cut", [0, 7])
async def test_a_request_in_the_last_moment_is_answered(
    directory: Path, autojump_clock: Any, cut: int
) -> None:
    """The reaper looks when the request, or a part of it, has left the kernel, but its task has not had its turn."""
    async with known(directory, keep_alive_timeout=7) as (server, client, connection):
        worker = server.worker.context
        watch: Any = connection.transport.watch
        go_on = watch._hub.on_pulled

        def go_on_late(pulled: list[Any]) -> int:
            watch._hub.on_pulled = go_on  # only this once
            connection.deadline = trio.current_time()
            woken: int = go_on(pulled)
            assert woken == 1 or watch.taken is not None  # for a lane
            # As the reaper does with who is late.
            if connection.deadline <= trio.current_time():
                connection.expire()
            return woken

        watch._hub.on_pulled = go_on_late
        request = head("GET /else HTTP/1.1")
        await client.send(request[:cut] or request)
        if cut:
            while connection.phase != "request_head":
                await trio.lowlevel.checkpoint()
            await client.send(request[cut:])
        assert (await client.read_response()).header("x-app") == "0"
        assert worker.counters.late == {}
