"""Files that `StaticFiles` knows already: sent without an exchange, unless there is something to wait for."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.http.feeding import head
from tests.http.test_wire_framing import bare
from trioserve import StaticFiles
from trioserve.http import http1, http1_reader
from trioserve.http.http1_exchange import Http1Exchange
from trioserve.static.residency import PageCache
from trioserve.static.sendfile import WINDOW
from trioserve.testing import TestServer

pytestmark = pytest.mark.modes("tls", because="HTTP/2 has an exchange for each stream")

SIZE = 300_000
LONG = 2 * WINDOW + 4321

only_plain = pytest.mark.modes(because="without kernel TLS the exchange reads the file")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    source = random.Random(11)
    (tmp_path / "some.bin").write_bytes(source.randbytes(SIZE))
    (tmp_path / "long.bin").write_bytes(source.randbytes(LONG))
    return tmp_path


@pytest.fixture
def exchanges(monkeypatch: pytest.MonkeyPatch) -> list[Http1Exchange]:
    """All that are made."""
    made: list[Http1Exchange] = []

    class Noted(Http1Exchange):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    for module in (http1, http1_reader):
        monkeypatch.setattr(module, "Http1Exchange", Noted)
    return made


@asynccontextmanager
async def knowing(directory: Path, **settings: Any) -> AsyncIterator[TestServer]:
    """A server that has sent both files before."""
    async with bare(StaticFiles(directory), **settings) as server:
        async with server.connect() as client:
            for name in ("some.bin", "long.bin"):
                assert (await client.get(f"/{name}")).status == 200
        await server.wait_idle()
        yield server


@only_plain
async def test_a_file_that_is_known_needs_no_exchange(
    directory: Path, engine: str, hub: str, exchanges: list[Http1Exchange]
) -> None:
    content = (directory / "some.bin").read_bytes()
    async with knowing(directory, http_engine=engine, hub=hub) as server:
        async with server.connect() as client:
            exchanges.clear()
            for _ in range(3):
                response = await client.get("/some.bin")
                assert (response.status, response.body) == (200, content)
            partial = await client.get("/some.bin", [("Range", "bytes=1000-200999")])
            assert (partial.status, partial.body) == (206, content[1000:201_000])
            assert partial.header("content-range") == f"bytes 1000-200999/{SIZE}"
            assert not exchanges
            # What has more than one piece, or no body.
            several = await client.get("/some.bin", [("Range", "bytes=0-99,5000-5099")])
            assert (several.status, len(exchanges)) == (206, 1)
            assert content[5000:5100] in several.body
            nothing = await client.get("/some.bin", method="HEAD")
            assert (nothing.status, nothing.header("content-length")) == (200, str(SIZE))
            assert len(exchanges) == 2
            assert (await client.get("/some.bin")).body == content
            assert len(exchanges) == 2


async def test_a_field_that_is_sent_twice_is_one_list(directory: Path, engine: str) -> None:
    async with knowing(directory, http_engine=engine) as server, server.connect() as client:
        etag = (await client.get("/some.bin")).header("etag")
        assert etag is not None
        for tags in ([etag, '"another"'], ['"another"', etag]):
            response = await client.get("/some.bin", [("If-None-Match", tag) for tag in tags])
            assert response.status == 304


@pytest.mark.parametrize(
    "request_",
    [
        head("GET /some.bin HTTP/1.1", "Connection: close"),
        head("GET /some.bin HTTP/1.0"),
    ],
)
async def test_the_last_response_of_a_connection_says_so(directory: Path, request_: bytes) -> None:
    async with knowing(directory) as server, server.connect() as client:
        await client.send(request_)
        received = await client.receive_all()
        assert received.endswith(b"\r\n\r\n" + (directory / "some.bin").read_bytes())
        assert b"connection: close" in received.partition(b"\r\n\r\n")[0]


async def test_an_older_peer_is_told_that_its_connection_is_kept(directory: Path) -> None:
    async with knowing(directory) as server, server.connect() as client:
        for _ in range(2):
            await client.send(head("GET /some.bin HTTP/1.0", "Connection: keep-alive"))
            response = await client.read_response()
            assert response.body == (directory / "some.bin").read_bytes()
            assert response.header("connection") == "keep-alive"


async def test_a_slow_peer_gets_the_file_whole_and_may_go_on(directory: Path, engine: str, hub: str) -> None:
    content = (directory / "long.bin").read_bytes()
    async with knowing(directory, http_engine=engine, hub=hub) as server:
        async with server.connect(receive_buffer=4096) as client:
            for _ in range(2):
                await client.send(head("GET /long.bin HTTP/1.1"))
                assert (await client.read_response()).body == content
        assert server.worker.context.counters.faults == {}


async def test_a_peer_that_asks_ahead_and_reads_late_gets_every_byte_in_order(
    directory: Path, engine: str, hub: str
) -> None:
    """The socket is full at any place of a response, its head included."""
    content = (directory / "some.bin").read_bytes()
    async with knowing(directory, http_engine=engine, hub=hub) as server:
        async with server.connect(receive_buffer=4096) as client:
            await client.send(head("GET /some.bin HTTP/1.1") * 40)
            for _ in range(40):
                response = await client.read_response()
                assert response.body == content
        assert server.worker.context.counters.faults == {}


class Full:
    """A socket that once takes only so much."""

    def __init__(self, sock: Any, room: int) -> None:
        self.sock, self.room = sock, room

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def send(self, data: Any, flags: int = 0) -> int:
        room, self.room = self.room, 1 << 30
        if not room:
            raise BlockingIOError
        return int(self.sock.send(data[:room], flags))


@only_plain
async def test_a_head_that_finds_no_room_is_finished_by_an_exchange(
    directory: Path, exchanges: list[Http1Exchange]
) -> None:
    content = (directory / "some.bin").read_bytes()
    async with knowing(directory) as server, server.connect(receive_buffer=4096) as client:
        for room in (0, 1, 50):
            assert (await client.get("/some.bin")).body == content
            (connection,) = server.worker.context.connections
            transport = connection.transport
            exchanges.clear()
            transport.sock = Full(transport.sock, room)  # type: ignore[assignment]
            assert (await client.get("/some.bin")).body == content
            transport.sock = transport.sock.sock  # type: ignore[attr-defined]
            assert len(exchanges) == 1


async def test_a_known_file_that_was_cut_short_ends_visibly(directory: Path, hub: str) -> None:
    async with knowing(directory, hub=hub) as server:
        os.truncate(directory / "some.bin", 1000)
        async with server.connect() as client:
            await client.send(head("GET /some.bin HTTP/1.1"))
            received = await client.receive_all()
            assert b"content-length: %d\r\n" % SIZE in received
            assert len(received.partition(b"\r\n\r\n")[2]) <= 1000
        await server.wait_idle()
        assert server.worker.context.counters.faults == {"C4": 1}


@only_plain
async def test_a_known_file_that_is_not_in_memory_goes_by_way_of_a_thread(
    directory: Path, exchanges: list[Http1Exchange]
) -> None:
    content = (directory / "some.bin").read_bytes()
    async with knowing(directory) as server, server.connect() as client:
        files = server.worker.context.files
        assert (await client.get("/some.bin")).body == content
        exchanges.clear()
        before = files.page_cache.cold_windows
        stat = os.stat(directory / "some.bin")
        blind = PageCache(method="blind")
        (known,) = {
            entry.choices[None].file
            for paths in server.worker.context.app._cache.shortcuts.values()  # type: ignore[attr-defined]
            for name, entry in paths.items()
            if name == b"/some.bin"
        }
        known.pages = blind.pages(known.fd, stat)
        assert (await client.get("/some.bin")).body == content
        assert len(exchanges) == 1
        assert files.page_cache.cold_windows > before


async def test_a_request_that_waits_for_its_place_gets_its_file_and_no_other(
    directory: Path, tmp_path: Path, engine: str
) -> None:
    """Nobody holds a lease for it meanwhile: the cache may close the file, and its number be another one's."""
    (tmp_path / "other").write_bytes(bytes(SIZE))
    others: list[int] = []
    called, go_on = trio.Event(), trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.set()
        await go_on.wait()
        files.close()
        others.extend(os.open(tmp_path / "other", os.O_RDONLY) for _ in range(8))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    files = StaticFiles(directory, fallthrough=app)
    settings = {"max_concurrent_requests": 1, "lifespan": "off", "http_engine": engine}
    async with bare(files, **settings) as server, server.connect() as client, server.connect() as first:
        assert (await client.get("/some.bin")).status == 200
        await first.send(head("GET /else HTTP/1.1"))
        await called.wait()
        await client.send(head("GET /some.bin HTTP/1.1"))
        while not server.worker.context.admission.queued:  # type: ignore[union-attr]
            await trio.lowlevel.checkpoint()
        go_on.set()
        assert (await client.read_response()).body == (directory / "some.bin").read_bytes()
    for descriptor in others:
        os.close(descriptor)


@pytest.mark.parametrize("again", [[], [("X-Again", "1"), ("X-Again", "2")]])
async def test_what_needs_a_place_gets_its_own_file(
    directory: Path, engine: str, again: list[tuple[str, str]]
) -> None:
    settings = {"max_concurrent_requests": 10, "http_engine": engine}
    async with knowing(directory, **settings) as server, server.connect() as client:
        for name in ("some.bin", "long.bin"):
            assert (await client.get(f"/{name}", again)).body == (directory / name).read_bytes()
            assert (await client.get(f"/{name}")).body == (directory / name).read_bytes()
            assert (await client.get("/nothing", again)).status == 404


async def test_a_peer_that_stops_reading_a_known_file_is_aborted(
    directory: Path, hub: str, autojump_clock: Any
) -> None:
    async with knowing(directory, hub=hub, response_write_timeout=7) as server:
        async with server.connect(receive_buffer=4096) as client:
            await client.send(head("GET /long.bin HTTP/1.1") * 4)
            await client.receive(100)
            began = trio.current_time()
            await server.wait_idle()
            assert trio.current_time() - began >= 7
            with pytest.raises(OSError):
                while await client.receive(1 << 20):
                    pass
        assert server.worker.context.counters.late == {"response_write": 1}


async def test_the_access_log_has_a_line_for_each_known_file(directory: Path, hub: str) -> None:
    class Log:
        def log(self, entry: Any) -> None:
            entries.append(entry)

    entries: list[Any] = []
    async with knowing(directory, hub=hub) as server:
        server.worker.context.access_log = Log()  # type: ignore[assignment]
        async with server.connect(receive_buffer=4096) as client:
            for name in ("some", "long"):
                await client.get(f"/{name}.bin")
        await server.wait_idle()
    assert [(entry.outcome, entry.response_bytes) for entry in entries] == [
        ("complete", SIZE),
        ("complete", LONG),
    ]
