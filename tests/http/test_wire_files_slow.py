"""Files for peers that read slowly: the hub sends on in the task's place, and every deadline holds all the same."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.http.large_file import SIZE
from tests.http.test_wire_files import sending
from tests.http.test_wire_framing import GET, bare
from tests.net.sockets import fill, open_hub_of, unix_pair
from trioserve.asgi.file_body import borrowed_part
from trioserve.errors import FileSendFailed
from trioserve.net.transport import Transport
from trioserve.static.residency import PageCache
from trioserve.static.sendfile import WINDOW, FileSender
from trioserve.testing import RawClient


async def read_on(client: RawClient, size: int) -> int:
    """Take at least so many bytes."""
    taken = 0
    while taken < size:
        taken += len(await client.receive(65536))
    return taken


async def read_file(client: RawClient, size: int = 65536, pauses: Iterable[float] = ()) -> bytes:
    """The whole body; with pauses (seconds) between reads, as long as there are any."""
    got = bytearray()
    pause = iter(pauses)
    while len(got) < SIZE or len(got) - got.find(b"\r\n\r\n") - 4 < SIZE:
        part = await client.receive(size)
        assert part, "it was cut off"
        got += part
        if seconds := next(pause, 0):
            await trio.sleep(seconds)
    return bytes(got[got.find(b"\r\n\r\n") + 4 :])


# -- deadlines -----------------------------------------------------------------------------------------------


async def test_a_slow_peer_that_reads_on_is_given_all_the_time_it_needs(
    large: Path, content: bytes, hub: str, autojump_clock: Any
) -> None:
    began = trio.current_time()
    async with bare(sending({"path": str(large)}), response_write_timeout=7, hub=hub) as server:
        async with server.connect(receive_buffer=4096) as client:
            await client.send(GET)
            assert await read_file(client, 1 << 20, pauses=[6, 0.5, 6, 6, 6]) == content
        assert trio.current_time() - began > 21
        assert server.worker.context.counters.late == {}


async def test_a_peer_that_has_sent_its_fin_is_bounded_by_the_grace(large: Path, autojump_clock: Any) -> None:
    """The app has more to say behind the file: it is not response_write that ends it, but the grace."""
    # The portable hub hears of a FIN only once somebody reads.
    app = sending({"path": str(large)}, b"more")
    async with bare(app, response_write_timeout=300, disconnect_grace=2, hub="epoll") as server:
        async with server.connect(receive_buffer=4096) as client:
            await client.send(GET)
            await read_on(client, 100_000)
            began = trio.current_time()
            client.send_eof()
            await read_on(client, 100_000)
            await server.wait_idle()
            assert trio.current_time() - began < 30
        assert server.worker.context.counters.late == {"disconnect_grace": 1}


# -- what the hub meets, the task deals with -------------------------------------------------------------------


async def test_a_file_cut_short_behind_a_slow_peers_back_ends_visibly(large: Path, hub: str) -> None:
    async with bare(sending({"path": str(large)}), hub=hub) as server:
        async with server.connect(receive_buffer=4096) as client:
            await client.send(GET)
            await read_on(client, 1000)
            await trio.testing.wait_all_tasks_blocked()
            os.truncate(large, 5 * WINDOW)
            rest = await client.receive_all()
            assert len(rest) < 5 * WINDOW
        await server.wait_idle()
        assert server.worker.context.counters.faults == {"C4": 1}


async def test_a_cold_window_behind_a_slow_peer_is_read_by_a_thread(
    large: Path, content: bytes, hub: str
) -> None:
    async with bare(sending({"path": str(large)}), hub=hub) as server:
        page_cache = PageCache(method="blind")
        server.worker.context.files.page_cache = page_cache
        async with server.connect(receive_buffer=4096) as client:
            await client.send(GET)
            assert await read_file(client) == content
        assert page_cache.cold_windows >= SIZE // WINDOW
        assert server.worker.context.counters.faults == {}


async def test_a_peer_that_resets_while_the_hub_sends_is_no_error_of_the_app(large: Path, hub: str) -> None:
    async with bare(sending({"path": str(large)}), hub=hub) as server:
        client = server.connect(receive_buffer=4096)
        await client.send(GET)
        await read_on(client, 300_000)
        client.reset()
        await server.wait_idle()
        assert set(server.worker.context.counters.faults) <= {"C2"}


async def test_a_slow_download_is_no_work_for_the_collector(large: Path, content: bytes) -> None:
    class Resource:
        pass

    held: list[Any] = []
    inner = sending({"path": str(large)})

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        resource = Resource()
        held.append(weakref.ref(resource))
        held.append(weakref.ref(send.__self__))
        await inner(scope, receive, send)

    gc.collect()
    gc.disable()
    try:
        async with bare(app) as server:
            async with server.connect(receive_buffer=4096) as client:
                await client.send(GET)
                assert await read_file(client) == content
            await server.wait_idle()
            await trio.testing.wait_all_tasks_blocked()
            assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()


# -- the sender, without a server ------------------------------------------------------------------------------


class Sink:
    """A connection that is only a transport."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.sent = 0
        self.waits = 0

    def note_sent(self, count: int) -> None:
        self.sent += count

    async def write(self, data: bytes) -> None:
        raise AssertionError(f"{len(data)} bytes were read")

    async def wait_room(self, push: Any) -> None:
        self.waits += 1
        await self.transport.watch.wait_writable(push)


@pytest.fixture
def sink() -> Iterator[Sink]:
    with open_hub_of("epoll") as hub, unix_pair() as (ours, _peer):
        transport = Transport(ours, hub.watch(ours))
        fill(ours)
        yield Sink(transport)
        transport.close()


async def send(sink: Sink, path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        sender = FileSender(trio.current_time)
        part = borrowed_part({"file": fd, "offset": 0, "count": SIZE})
        await sender.prepare(part)
        await sender.send(part, sink)
    finally:
        os.close(fd)


async def test_a_dead_connection_with_a_full_socket_ends_the_send(large: Path, sink: Sink) -> None:
    """TLS is at its end, TCP is not: there is neither room nor an error of the socket."""
    sink.transport._note_broken(ConnectionResetError(errno.ECONNRESET, "a fatal alert"))
    with trio.fail_after(10), pytest.raises(ConnectionResetError):
        await send(sink, large)
    assert (sink.sent, sink.waits) == (0, 0)


async def test_an_error_of_the_disk_is_the_files(
    large: Path, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "sendfile", broken)
    with pytest.raises(FileSendFailed, match="cannot be read at byte 0"):
        await send(sink, large)
