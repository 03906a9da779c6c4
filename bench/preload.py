"""What `--preload` gains: the time to replace a killed worker, and the memory of many workers, against exec.

    python -m bench.preload [--workers 8] [--kills 10]

Memory is PSS (proc(5), smaps_rollup): a page that n processes share counts 1/n for each, so the sum is what they take
together. With `--preload` the preloading process is counted too. Each worker has answered requests by then.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue
from threading import Thread

REPOSITORY = Path(__file__).resolve().parents[1]
_PATIENCE = 60.0

HELLO = "bench.apps:hello"
STARLETTE = "bench.starlette_app:app"


class Server:
    """A running supervisor; its log, line by line."""

    def __init__(self, app: str, workers: int, flags: list[str]) -> None:
        command = [
            sys.executable,
            "-m",
            "trioserve",
            "--bind",
            "127.0.0.1:0",
            "--workers",
            str(workers),
            *flags,
            app,
        ]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
        self._lines: Queue[tuple[float, str]] = Queue()
        Thread(target=self._read, daemon=True).start()
        self._text = ""
        self.workers: list[int] = []
        self.url = self.wait_for(r"Running on (\S+)")[1]

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.put((time.perf_counter(), line))
        self._lines.put((time.perf_counter(), ""))

    def wait_for(self, pattern: str) -> tuple[float, str]:
        """When a line came that matches, and its first group; notes workers on the way."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                moment, line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                line = ""
            if not line:
                raise SystemExit(f"the server has not said {pattern!r}:\n{self._text}")
            self._text += line
            if started := re.search(r"worker \d+ \(pid (\d+)\) started", line):
                self.workers.append(int(started[1]))
            if found := re.search(pattern, line):
                return moment, found.group(1)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(_PATIENCE)


@contextmanager
def serving(app: str, workers: int, flags: list[str]) -> Iterator[Server]:
    server = Server(app, workers, flags)
    try:
        yield server
    finally:
        server.stop()


def replacement_times(flags: list[str], kills: int) -> list[float]:
    """Milliseconds from SIGKILL to "is ready" in the log, of a hello-world app."""
    times = []
    with serving(HELLO, 2, flags) as server:
        for _ in range(kills):
            time.sleep(0.5)  # the machine shall be quiet
            victim = server.workers.pop(0)
            before = time.perf_counter()
            os.kill(victim, signal.SIGKILL)
            moment, _ = server.wait_for(r"pid (\d+)\) is ready")
            times.append(1000 * (moment - before))
    return times


def memory(flags: list[str], workers: int, requests: int) -> float:
    """PSS of all workers of a Starlette app after some requests, in MiB; with the preloader where there is one."""
    with serving(STARLETTE, workers, flags) as server:
        for _ in range(requests):
            with urllib.request.urlopen(server.url + "/") as answer:
                answer.read()
        time.sleep(1.0)
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        assert len(children) == workers + (1 if flags else 0), children
        return sum(_pss(int(pid)) for pid in children) / 1024


def _pss(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    assert found
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--requests", type=int, default=400)
    options = parser.parse_args()
    for name, flags in (("exec", []), ("--preload", ["--preload"])):
        times = replacement_times(flags, options.kills)
        print(
            f"{name:10} kill to ready: median {statistics.median(times):.0f} ms, "
            f"{min(times):.0f} to {max(times):.0f} ms in {len(times)}"
        )
    for requests in (0, options.requests):
        by_exec = memory([], options.workers, requests)
        preloaded = memory(["--preload"], options.workers, requests)
        print(
            f"PSS of {options.workers} workers after {requests} requests: exec {by_exec:.0f} MiB, "
            f"--preload {preloaded:.0f} MiB with the preloader: {100 * preloaded / by_exec:.0f} %"
        )


if __name__ == "__main__":
    main()
