"""Static files: one turn of one server, and its memory under slow readers.

Called by `run.py`. The files are made once per run, in a directory of their own. No application counts the calls here;
that it is our server that answers is seen by its listening socket, before the load and after it, and that the answers
are files, by one of them that is compared and by the number of bytes that came.
"""

from __future__ import annotations

import atexit
import functools
import http.client
import os
import random
import select
import shutil
import socket
import tempfile
import time
from pathlib import Path

from bench.load import Settings, figures, run_wrk
from bench.measure import Turn, TurnError, WrkResult, private_memory_kb, snapshot_cpu
from bench.process import ServerProcess
from bench.servers import HOST, Server
from bench.workloads import Workload

_SLOW_SECONDS = 8.0  # how long the slow readers read
_SLOW_READ = 256 * 1024  # bytes a reader takes at a time
_SLOW_PAUSE = 0.05  # seconds between two rounds over all readers


def take_files_turn(server: Server, workload: Workload, settings: Settings, seed: int) -> Turn:
    """Measure one server once under a load of requests for files."""
    process = ServerProcess(server, workload.app, settings.cores, files=_directory(workload))
    with process:
        validator = _check_file(process, workload)
        extra = (_stem(workload), str(workload.file_count), validator)
        run_wrk(process, workload, settings.warm_up_seconds, seed, extra)
        process.listening_pid()
        before = snapshot_cpu(process.pid)
        result = run_wrk(process, workload, settings.seconds, seed + 1, extra)
        after = snapshot_cpu(process.pid)
        process.listening_pid()
        _check_files_result(result, workload)
        return figures(result, result.requests, (before, after))


def take_slow_readers_turn(server: Server, workload: Workload, settings: Settings, seed: int) -> Turn:
    """Measure how much memory a server needs for many clients that read one large file slowly."""
    process = ServerProcess(server, workload.app, settings.cores, files=_directory(workload))
    with process:
        _fetch(process, "/files/none")
        time.sleep(0.5)
        before = private_memory_kb(process.pid)
        readers: list[socket.socket] = []
        taken, most = 0, before
        try:
            for _ in range(workload.connections):
                reader = socket.create_connection((HOST, process.port), timeout=10)
                readers.append(reader)
                reader.sendall(f"GET {_path(workload, 0)} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
                reader.setblocking(False)
            end = time.monotonic() + _SLOW_SECONDS
            while time.monotonic() < end:
                ready, _, _ = select.select(readers, [], [], 0)
                for reader in ready:
                    part = reader.recv(_SLOW_READ)
                    if not part:
                        raise TurnError("the server closed the connection of a slow reader")
                    taken += len(part)
                most = max(most, private_memory_kb(process.pid))
                time.sleep(_SLOW_PAUSE)
        finally:
            for reader in readers:
                reader.close()
        if taken < workload.connections * 1024 * 1024:
            raise TurnError(f"{workload.connections} readers got only {taken} bytes")
        return Turn({"growth_mb": (most - before) / 1024, "taken_mb": taken / 1024**2})


# -- the files ----------------------------------------------------------------------------------------------


@functools.cache
def _root() -> Path:
    path = Path(tempfile.mkdtemp(prefix="bench-files-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def _directory(workload: Workload) -> Path:
    directory = _root() / workload.name
    directory.mkdir()
    block = random.Random(workload.name).randbytes(min(workload.file_size, 1024**2))
    for number in range(workload.file_count):
        path = directory / f"{_stem(workload)}-{number}.bin"
        with path.open("wb") as file:
            for _ in range(workload.file_size // len(block)):
                file.write(block)
        # As files are that were deployed, not as those that are being written: their validators can be strong.
        long_ago = time.time() - 86_400
        os.utime(path, (long_ago, long_ago))
    return directory


def _stem(workload: Workload) -> str:
    return workload.name.replace("files-", "f")


def _path(workload: Workload, number: int) -> str:
    return f"/files/{_stem(workload)}-{number}.bin"


# -- checks -------------------------------------------------------------------------------------------------


def _check_file(process: ServerProcess, workload: Workload) -> str:
    """Compare one file, and return its entity tag if the load is to send one."""
    expected = (_directory(workload) / _path(workload, 0).rpartition("/")[2]).read_bytes()
    status, fields, body = _fetch(process, _path(workload, 0))
    if status != 200 or body != expected:
        raise TurnError(f"a file of {len(expected)} bytes was answered {status} with {len(body)} bytes")
    if not workload.validated:
        return ""
    tag = fields.get("etag")
    if tag is None or _fetch(process, _path(workload, 0), {"If-None-Match": tag})[0] != 304:
        raise TurnError(f"no 304 for the entity tag {tag!r}")
    return str(tag)


def _fetch(
    process: ServerProcess, path: str, fields: dict[str, str] | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection(HOST, process.port, timeout=10)
    try:
        connection.request("GET", path, headers=fields or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def _check_files_result(result: WrkResult, workload: Workload) -> None:
    if result.errors:
        raise TurnError(f"wrk saw {result.errors} in {result.requests} requests")
    size = 0 if workload.validated else workload.file_size
    if not result.requests or result.bytes < result.requests * size:
        raise TurnError(f"{result.bytes} bytes in {result.requests} answers, too few for files of {size}")
    if workload.validated and result.bytes > result.requests * 1000:
        raise TurnError(f"{result.bytes} bytes in {result.requests} answers, too many for 304s")
