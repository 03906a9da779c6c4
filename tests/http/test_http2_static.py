"""StaticFiles over HTTP/2: prepared answers, ranges, files from memory and from threads."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.http.http2_serving import get, served
from trioserve import StaticFiles
from trioserve.static import sendfile


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
