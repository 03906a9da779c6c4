"""Large downloads as they happen: broken off, taken up again, of a file that has changed; and a player that jumps.

The server is `examples/downloads.py` in a process of its own, the clients are curl and Chromium as they come.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio

from .browser import dump_dom
from .process import PATIENCE, ServerProcess, require_tool, run_to_end, serve_command, start_process

pytestmark = pytest.mark.slow

SIZE = 50 * 1024 * 1024
LOG = ("--access-logfile", "-", "--access-logformat", "%(s)s %(U)s %({content-range}o)s")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What is served."""
    (tmp_path / "served").mkdir()
    return large_file(tmp_path / "served" / "large.bin", seed=1).parent


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """What takes the place of the large file: as long, and another from the first byte."""
    return large_file(tmp_path / "newer.bin", seed=2)


def large_file(path: Path, seed: int) -> Path:
    path.write_bytes(random.Random(seed).randbytes(SIZE))
    # Old enough for a strong ETag, without which nobody can say that a part belongs to it.
    moment = time.time() - 3600 + 60 * seed
    os.utime(path, (moment, moment))
    return path


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def serve(
    folder: Path, *flags: str, application: str = "examples.downloads:app"
) -> AbstractAsyncContextManager[ServerProcess]:
    return serve_command(application, *LOG, *flags, env={"DOWNLOADS": str(folder)})


async def curl(*arguments: str) -> ServerProcess:
    """curl, once it has ended; what it got over the wire is in `stderr`, in lower case."""
    command = (require_tool("curl"), "--silent", "--show-error", "--verbose", "--max-time", "60", *arguments)
    ended = await run_to_end(*command)
    ended.stderr.text = ended.stderr.text.lower()
    return ended


async def break_off(url: str, path: Path) -> str:
    """Begin a download and kill it after its first megabyte; the ETag of what `path` is the beginning of."""
    head = path.with_suffix(".head")
    slowly = ("--silent", "--limit-rate", "5M", "--dump-header", str(head), "--output", str(path))
    async with start_process(require_tool("curl"), *slowly, url) as download:
        with trio.fail_after(PATIENCE):
            while not path.exists() or path.stat().st_size < 1024 * 1024:
                assert download.returncode is None, "it has ended already"
                await trio.sleep(0.02)
        download.send_signal(signal.SIGKILL)
        await download.wait()
    assert path.stat().st_size < SIZE
    found = re.search(r"^etag: (\S+)", head.read_text(), re.MULTILINE | re.IGNORECASE)
    assert found
    return found.group(1)


async def wait_replaced(url: str, etag: str) -> None:
    """Return once the server has seen that the file is another: it looks once a second."""
    with trio.fail_after(PATIENCE):
        while f"etag: {etag}" in (await curl("--head", url)).stderr.text:
            await trio.sleep(0.1)


@pytest.mark.parametrize("engine", ["httptools", "h11"])
async def test_curl_takes_up_a_download_where_it_was_broken_off(
    folder: Path, tmp_path: Path, engine: str
) -> None:
    path = tmp_path / "large.bin"
    async with serve(folder, "--http-engine", engine) as server:
        url = f"{server.url}/files/large.bin"
        await break_off(url, path)
        had = path.stat().st_size
        ended = await curl("--continue-at", "-", "--output", str(path), url)
        assert ended.returncode == 0, ended.stderr.text
        assert f"content-range: bytes {had}-{SIZE - 1}/{SIZE}" in ended.stderr.text
        assert hash_of(path) == hash_of(folder / "large.bin")
        # Nothing is left to fetch, and to ask for it is no error.
        ended = await curl("--continue-at", "-", "--output", str(path), url)
        assert ended.returncode == 0, ended.stderr.text
        assert "< http/1.1 416" in ended.stderr.text
        assert f"content-range: bytes */{SIZE}" in ended.stderr.text
        assert hash_of(path) == hash_of(folder / "large.bin")
    assert f"206 /files/large.bin bytes {had}-{SIZE - 1}/{SIZE}\n" in server.stdout.text
    assert f"416 /files/large.bin bytes */{SIZE}\n" in server.stdout.text


async def test_with_if_range_an_unchanged_file_goes_on_and_a_new_one_begins_anew(
    folder: Path, newer: Path, tmp_path: Path
) -> None:
    new = hash_of(newer)
    path, whole = tmp_path / "large.bin", tmp_path / "whole.bin"
    async with serve(folder) as server:
        url = f"{server.url}/files/large.bin"
        etag = await break_off(url, path)
        had, first_part = path.stat().st_size, path.read_bytes()
        on = ("--continue-at", "-", "--header", f"If-Range: {etag}", "--output", str(path), url)
        rest = ("--range", f"{had}-", "--header", f"If-Range: {etag}", "--output", str(whole), url)

        ended = await curl(*rest)
        assert "< http/1.1 206" in ended.stderr.text
        assert first_part + whole.read_bytes() == (folder / "large.bin").read_bytes()

        newer.replace(folder / "large.bin")
        await wait_replaced(url, etag)
        # All of the new file, whatever range was asked for.
        ended = await curl(*rest)
        assert ended.returncode == 0, ended.stderr.text
        assert "< http/1.1 200" in ended.stderr.text
        assert "content-range" not in ended.stderr.text
        assert hash_of(whole) == new
        # curl, which wanted to append, says that it cannot, and leaves what it had as it was.
        ended = await curl(*on)
        assert ended.returncode == 33, ended.stderr.text
        assert path.read_bytes() == first_part
        # From the beginning, then.
        ended = await curl("--output", str(path), url)
        assert ended.returncode == 0, ended.stderr.text
        assert hash_of(path) == new


async def test_a_download_under_way_ends_with_the_file_it_began_with(
    folder: Path, newer: Path, tmp_path: Path
) -> None:
    path = tmp_path / "large.bin"
    old = hash_of(folder / "large.bin")
    async with serve(folder) as server:
        command = ("--silent", "--limit-rate", "10M", "--output", str(path), f"{server.url}/files/large.bin")
        async with start_process(require_tool("curl"), *command) as download:
            with trio.fail_after(PATIENCE):
                while not path.exists() or path.stat().st_size < 1024 * 1024:
                    await trio.sleep(0.02)
            newer.replace(folder / "large.bin")
            assert path.stat().st_size < SIZE, "it was faster than the replacement: this shows nothing"
            assert await download.wait() == 0
    assert hash_of(path) == old


async def test_a_player_that_jumps_gets_the_range_it_jumps_to(tmp_path: Path) -> None:
    async with serve(tmp_path, application="tests.e2e.seeking:app") as server:
        dom = await dump_dom(f"{server.url}/#480")
    assert "<title>seeked</title>" in dom
    assert "<output>at 480 of 600 seconds</output>" in dom
    size = (tmp_path / "tones.wav").stat().st_size
    ranges = re.findall(r"^206 /files/tones\.wav bytes (\d+)-(\d+)/", server.stdout.text, re.MULTILINE)
    # It begins at the beginning, and then in the ninth of ten minutes: the eight before it are not fetched.
    assert ("0", str(size - 1)) in ranges
    assert [start for start, _ in ranges if size * 0.75 < int(start) <= size * 0.81], ranges
