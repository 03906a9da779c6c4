"""Files as bodies: the events `zerocopysend` and `pathsend`, on both engines and both ways of sending."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.http.feeding import head
from tests.http.large_file import SIZE
from tests.http.test_wire_framing import GET, LAST, OLD, App, bare, wire
from trioserve.net.transport import Transport
from trioserve.static.sendfile import READ_SIZE, WINDOW
from trioserve.testing import RawClient, serving

pytestmark = pytest.mark.modes("tls", "http2")

HEAD = head("HEAD / HTTP/1.1", "Connection: close")


@pytest.fixture(params=["sendfile", "reading"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By sendfile, or by reads in threads as on a connection that cannot take a file."""
    if request.param == "reading":
        monkeypatch.setattr(Transport, "sends_files", False)
    return str(request.param)


@pytest.fixture
def digits(tmp_path: Path) -> Iterator[Any]:
    path = tmp_path / "digits.txt"
    path.write_bytes(b"0123456789")
    with path.open("rb") as file:
        yield file


def sending(*events: Any, status: int = 200, headers: Any = (), trailers: bool = False) -> App:
    """An app that sends these events behind its start; a dict with `file` or `path` is a file, bytes are a body."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await send(
            {"type": "http.response.start", "status": status, "headers": headers, "trailers": trailers}
        )
        for number, event in enumerate(events, 1):
            more = {"more_body": number < len(events)}
            if isinstance(event, bytes):
                await send({"type": "http.response.body", "body": event, **more})
            else:
                kind = "zerocopysend" if "file" in event else "pathsend"
                await send({"type": f"http.response.{kind}", **more, **event})
        if trailers:
            await send({"type": "http.response.trailers", "headers": [(b"x-sum", b"1")]})

    return app


# -- framing -------------------------------------------------------------------------------------------------


@pytest.mark.modes("tls", because="it reads HTTP/1 on the wire")
@pytest.mark.parametrize(
    ("message", "body"),
    [
        ({}, b"0123456789"),
        ({"offset": 3}, b"3456789"),
        ({"offset": 3, "count": 4}, b"3456"),
        ({"count": 4}, b"0123"),
        ({"offset": 10}, b""),
        ({"offset": 2, "count": 0}, b""),
        ({"offset": None, "count": None}, b"0123456789"),
    ],
)
@pytest.mark.parametrize("by", ["file", "path"])
async def test_a_part_of_a_file_is_framed_by_its_length(
    message: dict[str, Any], body: bytes, by: str, digits: Any, engine: str, way: str
) -> None:
    part = {by: digits if by == "file" else digits.name, **message}
    expected = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b" % (len(body), body)
    assert await wire(sending(part), http_engine=engine) == expected
    digits.seek(0)
    assert await wire(sending(part), OLD, http_engine=engine) == expected


async def test_without_an_offset_a_file_is_read_from_where_it_stands_and_moves_on(digits: Any) -> None:
    digits.seek(4)
    part = {"file": digits, "count": 2}
    assert (await wire(sending(part, part, headers=[(b"content-length", b"4")]))).endswith(b"\r\n\r\n4567")
    assert os.lseek(digits.fileno(), 0, os.SEEK_CUR) == 8
    assert (await wire(sending({"file": digits, "offset": 1, "count": 1}))).endswith(b"\r\n\r\n1")
    assert os.lseek(digits.fileno(), 0, os.SEEK_CUR) == 8


@pytest.mark.modes("tls", because="it reads HTTP/1 on the wire")
async def test_parts_of_files_and_bytes_make_one_body_chunked_or_by_its_length(digits: Any, way: str) -> None:
    events = (b"<", {"file": digits, "offset": 0, "count": 3}, b"|", {"path": digits.name, "offset": 8}, b">")
    chunked = await wire(sending(*events))
    assert chunked.endswith(
        b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
        b"1\r\n<\r\n3\r\n012\r\n1\r\n|\r\n2\r\n89\r\n1\r\n>\r\n0\r\n\r\n"
    )
    known = await wire(sending(*events, headers=[(b"content-length", b"8")]))
    assert known.endswith(b"content-length: 8\r\nconnection: close\r\n\r\n<012|89>")


@pytest.mark.modes("tls", because="HTTP/1.0")
async def test_http_1_0_gets_several_parts_of_a_file_up_to_the_end_of_the_connection(digits: Any) -> None:
    part = {"file": digits, "offset": 0, "count": 3}
    assert (await wire(sending(part, part), OLD)).endswith(b"OK\r\nconnection: close\r\n\r\n012012")


@pytest.mark.modes("tls", because="it reads HTTP/1 on the wire")
async def test_trailers_may_follow_a_file(digits: Any) -> None:
    request = head("GET / HTTP/1.1", "TE: trailers", "Connection: close, TE")
    data = await wire(sending({"file": digits, "offset": 0}, trailers=True), request)
    assert data.endswith(b"\r\n\r\na\r\n0123456789\r\n0\r\nx-sum: 1\r\n\r\n")


@pytest.mark.modes("tls", because="it reads HTTP/1 on the wire")
@pytest.mark.parametrize(("request_", "status"), [(HEAD, 200), (LAST, 304), (LAST, 204)])
async def test_a_response_without_a_body_reads_no_file(
    request_: bytes, status: int, digits: Any, tmp_path: Path
) -> None:
    gone = {"path": str(tmp_path / "not-there")}
    length = [] if status == 204 else [(b"content-length", b"10")]
    for part in ({"file": digits, "offset": 0}, gone, {"file": None}):
        data = await wire(sending(part, status=status, headers=length), request_)
        assert data.endswith(
            b"content-length: 10\r\nconnection: close\r\n\r\n" if length else b"close\r\n\r\n"
        )


async def test_the_extensions_are_advertised() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            seen.append(scope["extensions"])
            await sending(b"")(scope, receive, send)

    await wire(app)
    assert seen[0]["http.response.zerocopysend"] == {}
    assert seen[0]["http.response.pathsend"] == {"ranges": True}


# -- all of it, and nothing else -----------------------------------------------------------------------------


async def test_a_large_file_arrives_whole_and_the_connection_goes_on(
    large: Path, content: bytes, engine: str, hub: str, way: str
) -> None:
    async with bare(sending({"path": str(large)}), http_engine=engine, hub=hub) as server:
        async with server.connect() as client:
            for _ in range(2):
                response = await client.get()
                assert response.body == content
        await server.wait_idle()
        assert server.worker.context.counters.faults == {}


@pytest.mark.modes("tls", because="the client, which is Python, would take minutes")
async def test_many_slow_readers_of_one_file_get_it_whole_and_cost_no_memory(
    large: Path, content: bytes
) -> None:
    with large.open("rb") as file:
        async with bare(sending({"file": file, "offset": 0})) as server:

            async def read() -> None:
                async with server.connect(receive_buffer=4096) as client:
                    await client.send(LAST)
                    data = await client.receive_all()
                    assert data.partition(b"\r\n\r\n")[2] == content

            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(read)


@pytest.mark.modes(because="records are no segments")
async def test_head_and_file_leave_in_one_segment(digits: Any) -> None:
    async with bare(sending({"file": digits, "offset": 0})) as server, server.connect() as client:
        for _ in range(3):
            await client.send(GET)
            await trio.lowlevel.wait_readable(client.sock)
            assert client.sock.recv(65536).endswith(b"0123456789")
        info = client.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
        # tcpi_data_segs_in: a u32 at byte 152 (linux/tcp.h).
        assert int.from_bytes(info[152:156], "little") == 3


@pytest.mark.modes("tls", because="the client, which is Python, would take minutes")
async def test_others_are_served_while_a_peer_takes_all_we_send(large: Path) -> None:
    """A peer as fast as the server never gives its task a reason to wait."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        parts = [{"path": str(large)}] * 40 if scope.get("path") == "/large" else [b"small"]
        await sending(*parts)(scope, receive, send)

    async with bare(app) as server:
        order: list[str] = []

        async def drain(client: RawClient) -> None:
            await client.send(head("GET /large HTTP/1.1", "Connection: close"))
            while await client.receive(1 << 20):
                pass
            order.append("large")

        async with server.connect() as fast, server.connect() as other, trio.open_nursery() as nursery:
            nursery.start_soon(drain, fast)
            while not any(connection.exchange for connection in server.worker.context.connections):
                await trio.lowlevel.checkpoint()
            assert (await other.get("/small")).body == b"small"
            order.append("small")
        assert order == ["small", "large"]


# -- files that change ---------------------------------------------------------------------------------------


@pytest.mark.modes("tls", because="it reads HTTP/1 on the wire")
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_file_cut_short_while_it_is_sent_is_seen_by_the_peer_and_desyncs_nothing(
    large: Path, content: bytes, way: str, chunked: bool
) -> None:
    parts = [{"path": str(large)}, b"after"] if chunked else [{"path": str(large)}]
    async with bare(sending(*parts)) as server, server.connect(receive_buffer=4096) as client:
        await client.send(GET + GET)
        got = await client.receive()
        os.truncate(large, 2 * WINDOW)
        got += await client.receive_all()
        # One head, the file as far as it went, and not a byte of anything else.
        head_, _, body = got.partition(b"\r\n\r\n")
        body = b"".join(_chunks(body)) if chunked else body
        assert b"HTTP/1.1 200 OK" in head_
        assert len(body) < SIZE
        # What was read before the cut may have come from memory; what is there is the file's.
        assert content.startswith(body)
        await server.wait_idle()
        assert server.worker.context.counters.faults == {"C4": 1}
        assert server.failure is None


def _chunks(body: bytes) -> Iterator[bytes]:
    """The data of the one chunk, which is cut short."""
    size, _, rest = body.partition(b"\r\n")
    assert len(rest) < int(size, 16)
    yield rest


async def test_a_file_that_grows_or_is_replaced_is_sent_as_it_was_announced(
    large: Path, content: bytes
) -> None:
    async with bare(sending({"path": str(large)})) as server, server.connect(receive_buffer=4096) as client:
        await client.send(GET)
        first = await client.receive(4096)
        with large.open("ab") as file:
            file.write(b"more")
        large.rename(large.with_suffix(".old"))
        large.write_bytes(b"another file")
        client.received = first
        response = await client.read_response()
        assert response.body == content
        assert (await client.get()).body == b"another file"


async def test_a_file_that_is_not_there_or_too_short_is_answered_with_500_and_the_worker_serves_on(
    tmp_path: Path, digits: Any
) -> None:
    for part in (
        {"path": str(tmp_path / "gone")},
        {"path": "nul\0"},
        {"path": digits.name, "count": 11},
        {"file": digits, "offset": 11},
        {"file": digits, "offset": 8, "count": 3},
    ):
        async with serving(sending(part), on_app_error="replace") as server, server.connect() as client:
            assert (await client.get()).status == 500
            assert server.worker.context.counters.faults == {"C4": 1}
            assert (await server.get()).status == 500  # still there


async def test_an_app_may_answer_otherwise_when_a_file_is_not_there(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            try:
                await send({"type": "http.response.pathsend", "path": str(tmp_path / "gone")})
            except OSError:
                await send({"type": "http.response.body", "body": b"instead"})

    async with bare(app) as server:
        response = await server.get()
        assert (response.body, server.worker.context.counters.faults) == (b"instead", {})


@pytest.mark.modes("tls", because="it reads HTTP/1 on the wire")
async def test_an_app_that_hides_a_cut_file_cannot_fill_the_hole(large: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        length = [(b"content-length", b"%d" % SIZE)]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        try:
            await send({"type": "http.response.pathsend", "path": str(large)})
        except OSError:
            pass
        for kind in ({"body": b"x" * SIZE}, {"body": b"", "more_body": True}):
            with pytest.raises(OSError):
                await send({"type": "http.response.body", **kind})
                await send({"type": "http.response.body", "body": b"x"})

    async with bare(app) as server, server.connect(receive_buffer=4096) as client:
        await client.send(GET)
        await client.receive()
        os.truncate(large, 2 * WINDOW)
        assert b"xxxx" not in await client.receive_all()
        assert server.worker.context.counters.faults == {"C4": 1}


# -- peers that leave, are slow, or are cut off ----------------------------------------------------------------


async def test_a_peer_that_leaves_in_the_middle_is_no_error_of_the_app(large: Path, way: str) -> None:
    async with bare(sending({"path": str(large)})) as server:
        client = server.connect(receive_buffer=4096)
        await client.send(GET)
        await client.receive()
        client.reset()
        await server.wait_idle()
        assert set(server.worker.context.counters.faults) <= {"C2"}


@pytest.mark.modes("tls", because="it looks at HTTP/1's way to wait")
async def test_a_peer_that_stops_reading_is_aborted_after_the_write_time_out(
    large: Path, way: str, autojump_clock: Any
) -> None:
    async with bare(sending({"path": str(large)}), response_write_timeout=7) as server:
        async with server.connect(receive_buffer=4096) as client:
            await client.send(GET)
            await client.receive(1)
            began = trio.current_time()
            await server.wait_idle()
            assert 7 <= trio.current_time() - began < 15
            assert server.worker.context.counters.late == {"response_write": 1}


@pytest.mark.modes("tls", because="it reads HTTP/1 on the wire")
async def test_a_drain_cuts_a_stalled_reader_off_visibly(large: Path, way: str, autojump_clock: Any) -> None:
    async with bare(sending({"path": str(large)}), graceful_timeout=1) as server:
        async with server.connect(receive_buffer=4096) as client:
            await client.send(GET)
            got = await client.receive()
            server.worker.drain.begin("test")
            await server.wait_idle()
            got += await client.receive_all()
            assert len(got) < SIZE


# -- misuse --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"file": None}, "'file' must be an open file"),
        ({"file": b"x"}, "'file' must be an open file"),
        ({"file": 12345}, "'file' cannot be read from"),
        ({"path": 5}, "'path' must be a path"),
        ({"offset": -1}, "'offset' must be a number of bytes"),
        ({"count": "1"}, "'count' must be a number of bytes"),
        ({"count": True}, "'count' must be a number of bytes"),
        ({"path": "/"}, "'file' must be a regular file, not a directory"),
        ({"path": "/dev/null"}, "'file' must be a regular file, not a device"),
    ],
)
async def test_misuse_is_named(message: dict[str, Any], words: str, digits: Any, caplog: Any) -> None:
    part = message if "path" in message else {"file": digits, **message}
    async with bare(sending(part)) as server:
        assert (await server.get()).status == 500
        assert server.worker.context.counters.faults == {"A5": 1}
    assert words in caplog.text


async def test_a_pipe_or_socket_is_no_file(caplog: Any) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as file, os.fdopen(writing, "wb"):
        assert b" 500 " in await wire(sending({"file": file}))
    assert "not a pipe" in caplog.text


@pytest.mark.modes("tls", because="it reads HTTP/1 on the wire")
@pytest.mark.parametrize("length", [b"9", b"11"])
async def test_a_file_must_be_as_long_as_content_length_says(length: bytes, digits: Any, caplog: Any) -> None:
    app = sending({"file": digits, "offset": 0}, headers=[(b"content-length", length)])
    assert b" 500 " in await wire(app)
    assert f"content-length says {length.decode()}" in caplog.text


@pytest.mark.modes("tls", because="the client, which is Python, would take minutes")
async def test_no_descriptor_stays_open(large: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with bare(sending({"path": str(large)})) as server:
        for _ in range(3):
            client = server.connect(receive_buffer=4096)
            await client.send(GET)
            await client.receive()
            client.reset()
            assert (await server.get("/")).body
        await server.wait_idle()
    assert len(os.listdir("/proc/self/fd")) == before


assert READ_SIZE < WINDOW < SIZE
