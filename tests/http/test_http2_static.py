"""StaticFiles over HTTP/2: prepared answers, ranges, files from memory and from threads."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import trio
from h2.settings import SettingCodes

from tests.http.http2_serving import Client, get, served
from trioserve import StaticFiles
from trioserve.static import sendfile
from trioserve.testing import TestServer


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "small.txt").write_bytes(b"small")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "large.bin").write_bytes(random.Random(5).randbytes(700_000))
    return tmp_path


@pytest.mark.parametrize("name", ["small.txt", "empty.txt", "large.bin"])
async def test_files_whole_their_heads_and_their_304(
    http2_engine: str, hub: str, root: Path, name: str
) -> None:
    data = (root / name).read_bytes()
    path = b"/" + name.encode()
    async with served(StaticFiles(root), http2_engine=http2_engine, hub=hub, lifespan="off") as (
        server,
        client,
    ):
        for _ in range(3):
            response = await client.request(get(path))
            assert (response.status, response.body) == (200, data)
            assert response.field(b"content-length") == b"%d" % len(data)
        response = await client.request(get(path, method=b"HEAD"))
        assert (response.status, response.body) == (200, b"")
        assert response.field(b"content-length") == b"%d" % len(data)
        etag = response.field(b"etag")
        assert etag
        response = await client.request(get(path, (b"if-none-match", etag)))
        assert (response.status, response.body) == (304, b"")
        assert server.worker.context.in_flight == 0


async def test_ranges(http2_engine: str, root: Path) -> None:
    data = (root / "large.bin").read_bytes()
    async with served(StaticFiles(root), http2_engine=http2_engine, lifespan="off") as (_, client):
        response = await client.request(get(b"/large.bin", (b"range", b"bytes=100000-399999")))
        assert (response.status, response.body) == (206, data[100_000:400_000])
        response = await client.request(get(b"/large.bin", (b"range", b"bytes=0-9,20-29")))
        assert response.status == 206
        assert data[:10] in response.body
        assert data[20:30] in response.body
        response = await client.request(get(b"/missing"))
        assert response.status == 404


async def test_a_file_that_is_not_in_memory_is_read_by_threads(
    http2_engine: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def nothing_resident(*arguments: Any) -> None:
        calls.append(arguments)

    monkeypatch.setattr(sendfile, "read_resident", nothing_resident)
    async with served(StaticFiles(root), http2_engine=http2_engine, lifespan="off") as (_, client):
        response = await client.request(get(b"/large.bin"))
        assert response.body == (root / "large.bin").read_bytes()
    assert len(calls) == 6


async def open_windows(server: TestServer, client: Client, send_buffer: int) -> None:
    """Let nothing but the kernels' buffers, which are small, keep the server from sending."""
    client.peer.connection.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 2**30})
    client.peer.connection.increment_flow_control_window(2**30)
    await client.flush()
    client.stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 65536)  # type: ignore[attr-defined]
    (connection,) = server.worker.context.connections
    connection.transport.sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_SNDBUF, send_buffer)


async def test_a_prepared_answer_that_the_kernel_does_not_take_at_once(
    http2_engine: str, hub: str, root: Path
) -> None:
    data = (root / "large.bin").read_bytes() * 3
    (root / "large.bin").write_bytes(data)
    app = StaticFiles(root, small_file=4 * 1024 * 1024)
    async with served(app, http2_engine=http2_engine, hub=hub, lifespan="off") as (server, client):
        await open_windows(server, client, 32768)
        for _ in range(3):
            response = await client.request(get(b"/large.bin"))
            assert response.reset is None
            assert response.body == data


@pytest.mark.parametrize("send_buffer", [8192, 32768])
async def test_one_of_many_prepared_answers_meets_a_full_socket(
    http2_engine: str, hub: str, tmp_path: Path, send_buffer: int
) -> None:
    """Wherever among heads and bodies that is, all of them arrive."""
    data = random.Random(6).randbytes(8000)
    (tmp_path / "file").write_bytes(data)
    app = StaticFiles(tmp_path)
    async with served(app, http2_engine=http2_engine, hub=hub, lifespan="off") as (server, client):
        await open_windows(server, client, send_buffer)
        assert (await client.request(get(b"/file"))).body == data
        streams = [client.peer.request(get(b"/file")) for _ in range(90)]
        await client.flush()
        for stream_id in streams:
            response = await client.response(stream_id)
            assert (response.reset, response.body) == (None, data)
