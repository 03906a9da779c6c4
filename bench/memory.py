"""Memory of idle connections, and memory over a long life.

Called by `run.py`. Memory is what the process tree alone keeps (private pages, clean and dirty); the
kernel's socket buffers are not in it. Needs as many open files as connections, in the server and here:
`raise_file_limit` does it, within the hard limit.
"""

from __future__ import annotations

import resource
import select
import socket
import time

from bench.load import Settings, check_answer, check_result, run_wrk
from bench.measure import Turn, TurnError, private_memory_kb
from bench.process import ServerProcess
from bench.servers import Server
from bench.workloads import LEAK_CONNECTIONS, LEAK_REQUESTS, Workload

_SPARE_FILES = 200
KEEP_ALIVE = 300  # seconds; the defaults would close the first connection before the last one is open
SETTLE_SECONDS = 4.0  # servers may give buffers and parsers back a while after the last request

# The leak workload: what counts as warm-up, the length of one load, how many connections are open at a time.
_WARM_UP_REQUESTS = 100_000
_WARM_UP_CONNECTIONS = 2_000
_LEAK_STEP_SECONDS = 2.0
_WAVE = 500

_REQUEST = b"GET /idle HTTP/1.1\r\nHost: localhost\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n"
_LAST_REQUEST = _REQUEST.replace(b"Accept: */*\r\n", b"Accept: */*\r\nConnection: close\r\n")


def raise_file_limit(connections: int) -> None:
    """Raise RLIMIT_NOFILE for this process and its servers; TurnError where the hard limit forbids it."""
    needed = connections + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise TurnError(f"{needed} open files are needed, the hard limit is {hard}: raise it (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


# -- idle connections ---------------------------------------------------------------------------------------


def take_memory_turn(server: Server, workload: Workload, settings: Settings, seed: int) -> Turn:
    """Measure what one idle keep-alive connection, which has made one request, costs in memory."""
    raise_file_limit(workload.idle)
    process = ServerProcess(
        server, workload.app, settings.cores, keep_alive=KEEP_ALIVE, speaks=workload.speaks
    )
    with process:
        check_answer(process, workload)
        run_wrk(process, workload, settings.warm_up_seconds, seed)
        calls = process.settled_count()
        time.sleep(1.0)
        before = private_memory_kb(process.pid)
        opened: list[socket.socket] = []
        try:
            for _ in range(workload.idle):
                opened.append(_open_and_ask(process, workload))  # noqa: PERF401 (closed below after a failure too)
            time.sleep(SETTLE_SECONDS)
            after = private_memory_kb(process.pid)
            _check_still_open(opened)
            if (served := process.settled_count() - calls) != workload.idle:
                raise TurnError(f"{workload.idle} requests were answered, the application counted {served}")
        finally:
            for connection in opened:
                connection.close()
        per_connection = (after - before) / workload.idle
        return Turn({"kb_per_connection": per_connection, "before_kb": before, "after_kb": after})


def _open_and_ask(process: ServerProcess, workload: Workload) -> socket.socket:
    connection = process.connect()
    try:
        _ask(connection, _REQUEST, workload.probe.expected)
    except BaseException:
        connection.close()
        raise
    return connection


def _ask(connection: socket.socket, request: bytes, expected: bytes) -> None:
    connection.sendall(request)
    answer = b""
    while not answer.endswith(b"\r\n\r\n" + expected):
        part = connection.recv(65536)
        if not part:
            raise TurnError(f"the server closed a connection after {answer[:200]!r}")
        answer += part
    if not answer.startswith(b"HTTP/1.1 200"):
        raise TurnError(f"the server answered {answer[:100]!r}")


def _check_still_open(connections: list[socket.socket]) -> None:
    poll = select.poll()
    for connection in connections:
        poll.register(connection, select.POLLIN | select.POLLRDHUP)
    if closed := len(poll.poll(0)):
        raise TurnError(
            f"the server closed {closed} of {len(connections)} idle connections before the measurement"
        )


# -- a long life --------------------------------------------------------------------------------------------


def take_leak_turn(server: Server, workload: Workload, settings: Settings, seed: int) -> Turn:
    """Measure how memory grows, after a warm-up, over a million requests and 20,000 connections."""
    raise_file_limit(_WAVE)
    process = ServerProcess(server, workload.app, settings.cores)
    with process:
        check_answer(process, workload)
        _serve_requests(process, workload, _WARM_UP_REQUESTS, seed)
        _open_and_close(process, workload, _WARM_UP_CONNECTIONS)
        memory = [_settled_memory(process)]
        served = 0
        while served < LEAK_REQUESTS:
            served += _serve_requests(process, workload, LEAK_REQUESTS // 10, seed + served)
            memory.append(_settled_memory(process))
        after_requests = memory[-1]
        _open_and_close(process, workload, LEAK_CONNECTIONS)
        memory.append(_settled_memory(process))
        base = memory[0]
        turn = Turn(
            {
                "growth_percent": 100 * (memory[-1] - base) / base,
                "growth_after_requests_percent": 100 * (after_requests - base) / base,
                "requests": float(served),
                "connections": float(LEAK_CONNECTIONS),
            }
        )
        turn.notes.append("private kB: " + " ".join(f"{kb:.0f}" for kb in memory))
        return turn


def _settled_memory(process: ServerProcess) -> float:
    process.settled_count()
    time.sleep(0.5)
    return private_memory_kb(process.pid)


def _serve_requests(process: ServerProcess, workload: Workload, at_least: int, seed: int) -> int:
    before = process.settled_count()
    served = 0
    while served < at_least:
        result = run_wrk(process, workload, _LEAK_STEP_SECONDS, seed)
        now = process.settled_count()
        check_result(result, now - before, workload)
        served += result.requests
        before = now
    return served


def _open_and_close(process: ServerProcess, workload: Workload, number: int) -> None:
    # Half of the connections are closed by the client, half by the server.
    before = process.settled_count()
    for start in range(0, number, _WAVE):
        wave = [_open_and_ask(process, workload) for _ in range(min(_WAVE, number - start))]
        for place, connection in enumerate(wave):
            with connection:
                if place % 2:
                    _ask(connection, _LAST_REQUEST, workload.probe.expected)
                    if connection.recv(1):
                        raise TurnError("the server sent more than its last answer")
    expected = number + sum(min(_WAVE, number - start) // 2 for start in range(0, number, _WAVE))
    if (served := process.settled_count() - before) != expected:
        raise TurnError(f"{expected} requests were answered, the application counted {served}")
