"""Files that are not sent whole, or take long: what may follow them, whose fault it is, who may end them."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import trioserve.asgi.exchange
from tests.http.feeding import head
from tests.http.test_wire_framing import GET, LAST, OLD, App, bare
from trioserve import StaticFiles
from trioserve.net.hub import open_hub
from trioserve.net.transport import Transport
from trioserve.testing import TestServer

pytestmark = pytest.mark.modes("tls", "http2")

# More than the buffers of both ends hold.
SIZE = 16 * 1024 * 1024
SECOND = head("GET /second HTTP/1.1")


@pytest.fixture(params=["sendfile", "reading"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reading":
        monkeypatch.setattr(Transport, "sends_files", False)
    return str(request.param)


@pytest.fixture
def autojump_clock(autojump_clock: trio.testing.MockClock) -> trio.testing.MockClock:
    """A window of 4 KiB that has closed is opened again by the kernel's probes, 200 ms later at the earliest."""
    autojump_clock.autojump_threshold = 0.3
    return autojump_clock


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.txt"
    path.write_bytes(b"0123456789")
    return path


def http(answer: Any) -> App:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/second":
            await start(send)
            await part(send, b"SECOND", more=False)
        else:
            await answer(receive, send)

    return app


async def start(send: Any, *headers: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": list(headers)})


async def part(send: Any, body: bytes | Path, *, more: bool = True) -> None:
    if isinstance(body, Path):
        await send({"type": "http.response.pathsend", "path": str(body), "more_body": more})
    else:
        await send({"type": "http.response.body", "body": body, "more_body": more})


def faults(server: TestServer) -> dict[str, int]:
    return server.worker.context.counters.faults


# -- nothing may stand where a file's bytes are missing --------------------------------------------------------


@pytest.mark.modes("tls", because="HTTP/1.0")
@pytest.mark.parametrize("last", [b"", b"x", "file"])
@pytest.mark.parametrize("request_", [GET, OLD], ids=["chunked", "1.0"])
async def test_a_cut_file_that_the_app_hides_ends_the_response_and_the_connection(
    request_: bytes, last: Any, large: Path, small: Path, way: str
) -> None:
    async def answer(_receive: Any, send: Any) -> None:
        await start(send)
        with pytest.raises(OSError):
            await part(send, large)
        await part(send, small if last == "file" else last, more=False)

    async with bare(http(answer)) as server, server.connect(receive_buffer=4096) as client:
        await client.send(request_ + SECOND)
        await client.receive(100)
        os.truncate(large, 2 * 1024 * 1024)
        received = await client.receive_all()
        client.close()
        await server.wait_idle()
        assert faults(server) == {"C4": 1}
    assert b"SECOND" not in received
    assert not received.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("last", [b"", b"x", "file"])
async def test_a_file_whose_send_the_app_cancels_ends_the_response_and_the_connection(
    last: Any, large: Path, small: Path, way: str, autojump_clock: Any
) -> None:
    """A chunk that has been announced must be sent whole before anything else."""

    async def answer(_receive: Any, send: Any) -> None:
        await start(send)
        with trio.move_on_after(1):
            await part(send, large)
        cut.set()
        await part(send, small if last == "file" else last, more=False)

    cut = trio.Event()
    async with bare(http(answer)) as server, server.connect(receive_buffer=4096) as client:
        await client.send(GET + SECOND)
        await cut.wait()
        received = await client.receive_all()
        client.close()
        await server.wait_idle()
        assert faults(server) == {"C4": 1}
    assert b"SECOND" not in received
    assert len(received) < SIZE


async def test_an_app_that_only_gives_up_on_a_file_has_not_finished_its_response(
    large: Path, autojump_clock: Any
) -> None:
    async def answer(_receive: Any, send: Any) -> None:
        await start(send)
        with trio.move_on_after(1):
            await part(send, large, more=False)

    async with bare(http(answer)) as server, server.connect(receive_buffer=4096) as client:
        await client.send(GET + SECOND)
        await trio.sleep(2)
        assert b"SECOND" not in await client.receive_all()
        assert faults(server) == {"A5": 1}


@pytest.mark.parametrize("begun", [False, True])
async def test_a_file_of_which_nothing_was_sent_may_be_made_up_for(
    begun: bool, small: Path, way: str
) -> None:
    async def answer(_receive: Any, send: Any) -> None:
        await start(send)
        if begun:
            await part(send, b"begun ")
        with pytest.raises(OSError):
            await part(send, small.with_name("gone"))
        for body in (b"instead ", small, b" of it"):
            await part(send, body)
        await part(send, b"", more=False)

    async with bare(http(answer)) as server, server.connect() as client:
        response = await client.get()
        assert response.body == (b"begun " if begun else b"") + b"instead 0123456789 of it"
        assert (await client.get("/second")).body == b"SECOND"
        assert faults(server) == {}


# -- who may end a file that takes long ------------------------------------------------------------------------


@pytest.mark.modes("tls", because="HTTP/2 has no half-closed connections")
@pytest.mark.parametrize("request_", [LAST, OLD])
async def test_a_peer_that_has_shut_down_its_side_gets_the_whole_file(
    request_: bytes, large: Path, hub: str, way: str, autojump_clock: Any
) -> None:
    async def answer(_receive: Any, send: Any) -> None:
        await start(send)
        await part(send, large, more=False)

    async with bare(http(answer), hub=hub) as server:
        assert await half_closed(server, request_) == SIZE
        assert server.worker.context.counters.late == {}


@pytest.mark.modes("tls", because="HTTP/2 has no half-closed connections")
async def test_the_same_of_a_directory_from_the_cache_too(large: Path, autojump_clock: Any) -> None:
    async with bare(StaticFiles(large.parent)) as server:
        for _ in range(2):
            request = head("GET /large.bin HTTP/1.1", "Connection: close")
            assert await half_closed(server, request) == SIZE
        assert server.worker.context.counters.late == {}


async def half_closed(server: TestServer, request: bytes) -> int:
    """The bytes of the body that a client gets which sends FIN, and then reads for longer than the grace."""
    async with server.connect(receive_buffer=4096) as client:
        await client.send(request)
        client.send_eof()
        received = b""
        for _ in range(5):
            received += await client.receive()
            await trio.sleep(2)
        received += await client.receive_all()
        return len(received.partition(b"\r\n\r\n")[2])


@pytest.mark.modes("tls", because="HTTP/2 has no half-closed connections")
async def test_the_handlers_time_out_is_not_the_downloads(large: Path, way: str, autojump_clock: Any) -> None:
    async def answer(_receive: Any, send: Any) -> None:
        await start(send)
        await part(send, large, more=False)

    async with bare(http(answer), request_timeout=3) as server:
        assert await half_closed(server, LAST) == SIZE


@pytest.mark.modes("tls", because="HTTP/1.0")
@pytest.mark.parametrize("body", ["file", "bytes"])
async def test_an_app_that_has_more_to_say_is_ended_and_what_has_no_framing_is_reset(
    body: str, large: Path, autojump_clock: Any
) -> None:
    """A FIN would tell an HTTP/1.0 peer that this was all."""

    async def answer(_receive: Any, send: Any) -> None:
        await start(send)
        if body == "file":
            await part(send, large)
        else:
            await part(send, b"bytes")
            await trio.sleep_forever()

    async with bare(http(answer)) as server, server.connect(receive_buffer=4096) as client:
        await client.send(OLD)
        client.send_eof()
        await client.receive(1)
        await server.wait_idle()
        assert server.worker.context.counters.late == {"disconnect_grace": 1}
        with pytest.raises(ConnectionResetError):
            while await client.receive():
                pass


@pytest.mark.modes(because="it looks at the socket itself")
async def test_a_file_ends_the_write_that_was_blocked_before_it(small: Path, autojump_clock: Any) -> None:
    """What was held back stalled in the background; the file's send wrote it, and the app may then take its time."""

    async def answer(_receive: Any, send: Any) -> None:
        await start(send)
        (connection,) = server.worker.context.connections
        while connection.phase != "response_write":
            await part(send, b"x" * 8000)
            await trio.testing.wait_all_tasks_blocked()
        try:
            while client.sock.recv(1 << 20):
                pass
        except BlockingIOError:
            pass
        await part(send, small)
        sent.set()
        await trio.sleep(10)
        await part(send, b"end", more=False)

    sent = trio.Event()
    async with bare(http(answer), response_write_timeout=1) as server, server.connect() as client:
        if not server.worker.context.hub.calls_on_writable:
            pytest.skip("nothing is held back without epoll")
        await client.send(LAST)
        await sent.wait()
        assert (await client.receive_all()).endswith(b"3\r\nend\r\n0\r\n\r\n")
        assert server.worker.context.counters.late == {}


@pytest.mark.modes("tls", because="it looks at HTTP/1's way to wait")
async def test_an_app_that_reads_and_sends_at_once_keeps_both_deadlines(autojump_clock: Any) -> None:
    """The end of the one wait must not take the other's deadline along."""

    async def reads_all(receive: Any, send: Any) -> None:
        async with trio.open_nursery() as nursery:
            await start(send)
            nursery.start_soon(part, send, b"x" * SIZE)
            while (await receive())["more_body"]:
                pass

    async def writes_all(receive: Any, send: Any) -> None:
        async with trio.open_nursery() as nursery:
            await start(send)
            nursery.start_soon(receive)
            await part(send, b"x" * SIZE)

    post = head("POST / HTTP/1.1", "Content-Length: 2")
    async with bare(http(reads_all), response_write_timeout=1) as server:
        async with server.connect(receive_buffer=4096) as client:
            await client.send(post)
            await trio.sleep(0.5)
            await client.send(b"ab")
            await server.wait_idle()
            assert server.worker.context.counters.late == {"response_write": 1}
    async with bare(http(writes_all), request_body_timeout=1) as server:
        async with server.connect() as client:
            await client.send(post)
            await trio.sleep(0.5)
            assert len(await client.receive_all()) > SIZE
            assert server.worker.context.counters.late == {"request_body": 1}


async def test_many_small_parts_give_way(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trioserve.asgi.exchange, "_FAIRNESS_INTERVAL", -1.0)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async def answer(_receive: Any, send: Any) -> None:
        await start(send)
        with small.open("rb") as file:
            for _ in range(20):
                message = {"file": file, "offset": 0, "count": 1, "more_body": True}
                await send({"type": "http.response.zerocopysend", **message})
        taken.append(turns)
        await part(send, b"", more=False)

    taken: list[int] = []
    async with bare(http(answer)) as server, trio.open_nursery() as nursery:
        nursery.start_soon(count)
        before = turns
        assert (await server.get()).body == b"0" * 20
        assert taken[0] - before >= 19
        nursery.cancel_scope.cancel()


# -- whose fault it is -----------------------------------------------------------------------------------------


async def test_a_cut_file_behind_middleware_is_no_error_of_the_app(large: Path) -> None:
    """Where `StaticFiles` has to read the file itself, nobody's `send()` can say it."""
    files = StaticFiles(large.parent)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await files({**scope, "extensions": {}}, receive, lambda message: send(message))

    async with bare(app, lifespan="off") as server, server.connect(receive_buffer=4096) as client:
        await client.send(head("GET /large.bin HTTP/1.1"))
        await client.receive(100)
        os.truncate(large, 8 * 1024 * 1024)
        assert len(await client.receive_all()) < SIZE
        client.close()
        await server.wait_idle()
        assert faults(server) == {"C4": 1}
    files.close()


async def test_the_access_log_tells_a_files_fault_from_the_apps(large: Path) -> None:
    class Log:
        def log(self, entry: Any) -> None:
            entries.append(entry)

    async def answer(_receive: Any, send: Any) -> None:
        await start(send)
        await part(send, large, more=False)

    entries: list[Any] = []
    async with bare(http(answer)) as server, server.connect(receive_buffer=4096) as client:
        server.worker.context.access_log = Log()  # type: ignore[assignment]
        await client.send(GET)
        await client.receive(100)
        os.truncate(large, 8 * 1024 * 1024)
        await client.receive_all()
        client.close()
        await server.wait_idle()
    (entry,) = entries
    assert (entry.outcome, entry.status, entry.response_bytes) == ("file error", 200, 8 * 1024 * 1024)


@pytest.mark.parametrize("swallowed", [False, True])
async def test_an_exchange_whose_file_failed_is_no_work_for_the_collector(
    small: Path, swallowed: bool
) -> None:
    class Resource:
        pass

    held: list[Any] = []

    async def answer(_receive: Any, send: Any) -> None:
        resource = Resource()
        held.append(weakref.ref(resource))
        await start(send)
        try:
            await part(send, small.with_name("gone"))
        except OSError:
            if not swallowed:
                raise

    gc.collect()
    gc.disable()
    try:
        async with bare(http(answer)) as server:
            assert (await server.get()).status == 500
            await server.wait_idle()
            await trio.testing.wait_all_tasks_blocked()
            assert held[0]() is None
    finally:
        gc.enable()


async def test_a_connection_that_was_closed_is_not_the_files_fault(small: Path) -> None:
    """A task of the app that has outlived its request; the socket's number is nobody's by now."""
    hub = open_hub()
    ours, theirs = trio.socket.socketpair()
    with small.open("rb") as file, theirs:
        transport = Transport(ours._sock, hub.watch(ours._sock))  # type: ignore[attr-defined]
        transport.close()
        with pytest.raises(OSError):
            transport.sendfile_nowait(file.fileno(), 0, 10)
        assert transport.broken is not None
    hub.close()


@pytest.mark.modes("tls", because="it looks at HTTP/1's way to wait")
async def test_an_app_that_leaves_the_sending_to_a_task_is_no_bug_of_ours() -> None:
    async def leave(send: Any) -> None:
        with pytest.raises(OSError):
            await part(send, b"x" * SIZE, more=False)

    async def answer(_receive: Any, send: Any) -> None:
        await start(send)
        nursery.start_soon(leave, send)
        await trio.testing.wait_all_tasks_blocked()
        left.set()

    left = trio.Event()
    async with trio.open_nursery() as nursery, bare(http(answer)) as server:
        async with server.connect(receive_buffer=4096) as client:
            await client.send(GET)
            await left.wait()
            assert len(await client.receive_all()) < SIZE
        client.close()
        await server.wait_idle()
        assert faults(server) == {"A5": 1}


async def test_tasks_that_outlive_their_request_leave_no_deadline_behind(hub: str) -> None:
    """`serving` asserts it. Which of the two is woken first when the connection closes is chance."""

    async def leave(call: Any, *args: Any) -> None:
        try:
            await call(*args)
        except OSError:
            pass

    async def answer(receive: Any, send: Any) -> None:
        await start(send)
        nursery.start_soon(leave, receive)
        nursery.start_soon(leave, part, send, b"x" * SIZE)
        await left.wait()

    for _ in range(8):
        left = trio.Event()
        async with trio.open_nursery() as nursery, bare(http(answer), hub=hub) as server:
            async with server.connect(receive_buffer=4096) as client:
                await client.send(head("POST / HTTP/1.1", "Content-Length: 2"))
                await client.receive(1)
                left.set()
                await client.receive_all()
            await server.wait_idle()
