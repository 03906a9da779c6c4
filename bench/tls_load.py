"""TLS handshakes: one turn of one server under clients that come, ask once, and go.

Called by `run.py`. The client is in this process, on the core of the load: some connections at a time on one epoll,
each with a request of its own, which asks the server to close; so a handshake counts when it has worked on both sides,
and the application can count too. Only TLS 1.3; full handshakes, or each with a ticket of an earlier one.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator

from bench.load import Settings, check_answer
from bench.measure import Turn, TurnError, cpu_used_us, snapshot_cpu
from bench.process import ServerProcess
from bench.servers import HOST, Server
from bench.workloads import Workload

_PATIENCE = 10.0  # seconds without anything from the server until a turn is given up
_REQUEST = b"GET /visit/%d HTTP/1.1\r\nHost: localhost\r\nUser-Agent: bench\r\nConnection: close\r\n\r\n"


def take_handshakes_turn(server: Server, workload: Workload, settings: Settings, seed: int) -> Turn:
    """Measure CPU time per connection of one request."""
    process = ServerProcess(server, workload.app, settings.cores, speaks=workload.speaks)
    with process:
        check_answer(process, workload)
        context = _fast_context()
        session = _session(process, context) if workload.resumed else None
        visit(process, workload, context, session, settings.warm_up_seconds)
        calls_before = process.settled_count()
        before = snapshot_cpu(process.pid)
        begin = time.perf_counter()
        times = visit(process, workload, context, session, settings.seconds)
        seconds = time.perf_counter() - begin
        after = snapshot_cpu(process.pid)
        calls = process.settled_count() - calls_before
        if calls != len(times):
            raise TurnError(f"the client got {len(times)} answers, the application counted {calls} calls")
        clocks, ticks = cpu_used_us(before, after)
        times.sort()
        return Turn(
            {
                "cpu_us": clocks / calls,
                "cpu_us_by_ticks": ticks / calls,
                "requests": float(calls),
                "rps": calls / seconds,
                "per_cpu_second": 1e6 * calls / clocks,
                "p50_us": 1e6 * times[len(times) // 2],
                "p99_us": 1e6 * times[len(times) * 99 // 100],
                "busy": clocks / 1e6 / seconds,
            }
        )


def _fast_context() -> ssl.SSLContext:
    # That the certificate is right is seen by `check_answer`; to check it each time would cost only the client.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    return context


def _session(process: ServerProcess, context: ssl.SSLContext) -> ssl.SSLSession:
    connection = socket.create_connection((HOST, process.port), timeout=10)
    with context.wrap_socket(connection, server_hostname=HOST) as secure:
        secure.sendall(_REQUEST % 0)
        while secure.recv(65536):  # tickets come with the answer
            pass
        if (session := secure.session) is None or not session.has_ticket:
            raise TurnError("the server gave no ticket to resume a session with")
        return session


def visit(
    process: ServerProcess,
    workload: Workload,
    context: ssl.SSLContext,
    session: ssl.SSLSession | None,
    seconds: float,
) -> list[float]:
    """Connect, ask, hear the end, and again, on so many connections at a time; returns how long each took."""
    clock = time.perf_counter
    times: list[float] = []
    visits: dict[int, tuple[Iterator[int], float, socket.socket]] = {}
    number = 0
    with select.epoll() as epoll, contextlib.ExitStack() as at_end:
        at_end.callback(lambda: [connection.close() for _, _, connection in visits.values()])

        def begin() -> None:
            nonlocal number
            number += 1
            began = clock()
            plain = socket.create_connection((HOST, process.port), timeout=10)
            plain.setblocking(False)
            connection = context.wrap_socket(
                plain, server_hostname=HOST, do_handshake_on_connect=False, session=session
            )
            steps = _one_visit(connection, number, workload.probe.expected, session is not None)
            visits[connection.fileno()] = (steps, began, connection)
            epoll.register(connection.fileno(), select.EPOLLOUT)  # at once: the first step is the client's

        for _ in range(workload.connections):
            begin()
        end = clock() + seconds
        while visits:
            ready = epoll.poll(_PATIENCE)
            if not ready:
                raise TurnError(f"{len(visits)} connections got nothing for {_PATIENCE:g} s")
            for fd, _ in ready:
                steps, began, connection = visits[fd]
                wanted = next(steps, None)
                if wanted is not None:
                    epoll.modify(fd, wanted)
                    continue
                times.append(clock() - began)
                del visits[fd]
                epoll.unregister(fd)
                connection.close()
                if clock() < end:
                    begin()
    return times


def _one_visit(connection: ssl.SSLSocket, number: int, expected: bytes, resumed: bool) -> Iterator[int]:
    """The life of one connection; yields what it waits for."""
    yield from _until_done(connection.do_handshake)
    if connection.session_reused != resumed:
        raise TurnError(f"a session was {'not ' if resumed else ''}resumed")
    connection.send(_REQUEST % number)
    answer = b""
    while True:
        try:
            part = connection.recv(65536)
        except ssl.SSLWantReadError:
            yield select.EPOLLIN
            continue
        if not part:
            break
        answer += part
    if not answer.startswith(b"HTTP/1.1 200") or not answer.endswith(b"\r\n\r\n" + expected):
        raise TurnError(f"the server answered {answer[:200]!r}")
    # Our close_notify, for servers that wait for it; one that does not has gone.
    with contextlib.suppress(OSError):
        connection.unwrap()


def _until_done(step: Callable[[], None]) -> Iterator[int]:
    while True:
        try:
            return step()
        except ssl.SSLWantReadError:
            yield select.EPOLLIN
        except ssl.SSLWantWriteError:
            yield select.EPOLLOUT
