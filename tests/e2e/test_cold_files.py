"""Cold gigabytes: a server that reads files from the disk keeps answering what has nothing to do with it.

A real process, files that are not in memory, curl that fetches eight at once, and one client that asks for
hello again and again. Three kinds of turns, one right after the other, each with a server of its own, so that whatever
else the machine does falls on all of them: the files in memory; the files on the disk; and, to know that the measure
sees what it is for, the files on the disk before a server that takes them to be in memory (`unwarmed.py`).

What is measured is first the state in which the kernel says the event loop's thread is: "D" is a thread that waits for
a disk, however fast that is. How long hello took depends on the disk, so its bound is a generous one. How much each
thread has had read says nothing: asking whether a page is in memory makes the kernel fetch it, and counts, but does not
wait.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from tests.static.cold_files import ASKING, MIB, any_resident, method_of

from .process import ServerProcess, require_tool, serve_command, start_process

pytestmark = pytest.mark.slow

FILES = 8
WARM_FILES = 2  # each is fetched by several at once; so nothing has to be read again from a slow disk
SIZE = 128 * MIB
FREE = 3 * 1024 * MIB

# A slow disk does not get to the end of a gigabyte; what is measured is a share of the time.
TURN_SECONDS = 3.0
SAMPLE_SECONDS = 0.002

# The share of samples in which a loop waits for the disk when nobody warms, at the least: it was 0.98 at 60 MB/s, 0.6
# at 1 GB/s, 0.2 when others had most of the CPU. With warming none of 10,000 was one; a page of the program itself may
# have to be fetched now and then.
SEEN = 0.03
FEWER = 5

# Seconds that a hello may take whatever the disk does; 1.4 s at 60 MB/s when nobody warms.
BOUND = 0.1


@dataclass
class Turn:
    """What was measured while the files were fetched: seconds per hello, samples of the loop's thread, bytes read."""

    latencies: list[float] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    read: int = 0

    def __str__(self) -> str:
        p50, p99 = self.percentile(50), self.percentile(99)
        return (
            f"{len(self.latencies)} hellos, p50 {p50 * 1000:.2f} ms, p99 {p99 * 1000:.2f} ms, "
            f"max {max(self.latencies) * 1000:.2f} ms; the loop waited for the disk in {self.waiting:.1%} "
            f"of {len(self.states)} samples; {self.read // MIB} MiB were read"
        )

    @property
    def waiting(self) -> float:
        """The share of samples in which the loop's thread waited for a disk."""
        return self.states.count("D") / len(self.states)

    def percentile(self, number: int) -> float:
        return statistics.quantiles(self.latencies, n=100, method="inclusive")[number - 1]


def write_files(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    block = os.urandom(MIB)
    paths = [folder / f"{number}.bin" for number in range(count)]
    for path in paths:
        with path.open("wb") as file:
            for _ in range(SIZE // MIB):
                file.write(block)
            os.fsync(file.fileno())  # what has yet to be written cannot leave the memory
    return paths


def make_cold(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            deadline = time.monotonic() + 60
            while any_resident(file.fileno(), 0, SIZE):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert time.monotonic() < deadline, "the file does not leave the page cache"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """What is served: on a disk, with room for gigabytes."""
    if method_of(tmp_path) not in ASKING:
        pytest.skip(f"no file of {tmp_path} is ever cold, or its filesystem does not tell")
    if shutil.disk_usage(tmp_path).free < FREE:
        pytest.skip(f"less than {FREE // MIB} MiB are free in {tmp_path}")
    folder = tmp_path / "files"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)  # pytest keeps what is there for three runs


async def test_hello_keeps_its_latency_while_cold_gigabytes_are_served(folder: Path) -> None:
    require_tool("curl")
    in_memory = write_files(folder / "warm", WARM_FILES) * (FILES // WARM_FILES)
    on_disk = write_files(folder / "cold", FILES)
    warm, cold, unwarmed = Turn(), Turn(), Turn()
    for _ in range(2):
        await take_turn(folder, in_memory, warm)
        make_cold(on_disk)
        await take_turn(folder, on_disk, cold)
    make_cold(on_disk)
    await take_turn(folder, on_disk, unwarmed, module="tests.e2e.unwarmed")

    figures = f"\nwarm:     {warm}\ncold:     {cold}\nunwarmed: {unwarmed}"
    print(figures)
    assert cold.read > FILES * MIB, f"the files were in memory{figures}"
    assert unwarmed.waiting >= SEEN, f"the measure does not see a loop that waits for the disk{figures}"
    assert cold.waiting <= unwarmed.waiting / FEWER, f"the loop waits for the disk{figures}"
    assert cold.percentile(99) <= max(BOUND, 5 * warm.percentile(99)), figures


async def take_turn(folder: Path, paths: list[Path], turn: Turn, module: str = "trioserve") -> None:
    """Have files fetched from a new server, for a while, and add what is measured to `turn`."""
    flags = ("--static", f"/files={folder}", "--keep-alive-max-requests", "1000000000")
    async with serve_command("tests.e2e.apps:app", *flags, module=module) as server:
        await server.get()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_again_and_again, server, turn)
            nursery.start_soon(watch_the_loop, server, turn)
            await fetch_all([f"{server.url}/files/{path.relative_to(folder)}" for path in paths])
            nursery.cancel_scope.cancel()
        turn.read += read_bytes(server)


def read_bytes(server: ServerProcess) -> int:
    """What the process has had read from disks, whichever of its threads waited for it."""
    found = re.search(r"^read_bytes: (\d+)$", Path(f"/proc/{server.pid}/io").read_text(), re.MULTILINE)
    assert found
    return int(found.group(1))


async def fetch_all(urls: list[str]) -> None:
    """All at once, to their end or for as long as a turn lasts."""
    told = ("--silent", "--show-error", "--parallel", "--parallel-max", f"{len(urls)}")
    wanted = [word for url in urls for word in ("--output", os.devnull, url)]
    line = ("--write-out", "%{http_code} %{size_download}\n")
    async with start_process("curl", *told, *line, *wanted) as curl:
        with trio.move_on_after(TURN_SECONDS) as limit:
            assert await curl.wait() == 0, curl.stderr.text
            assert curl.stdout.text.splitlines() == [f"200 {SIZE}"] * len(urls)
        if limit.cancelled_caught:
            curl.kill()
            await curl.wait()


async def ask_again_and_again(server: ServerProcess, turn: Turn) -> None:
    async with server.connect() as client:
        while True:
            began = time.perf_counter()
            response = await client.get()
            turn.latencies.append(time.perf_counter() - began)
            assert response.body == b"hello"


async def watch_the_loop(server: ServerProcess, turn: Turn) -> None:
    """The state of the process's first thread, in which the loop runs."""
    stat = Path(f"/proc/{server.pid}/task/{server.pid}/stat")
    while True:
        turn.states.append(stat.read_text().rpartition(")")[2].split(maxsplit=1)[0])
        await trio.sleep(SAMPLE_SECONDS)
