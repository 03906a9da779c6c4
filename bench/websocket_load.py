"""WebSocket: echo, broadcast, and the memory of idle connections. One turn of one server each.

Called by `run.py`. The client is `websocket_client.py`, in this process, on the core of the load. Connections are
opened before the measurement, and are not in its figures; each keeps one message in flight. The application counts the
messages it has got (echo) or sent (broadcast), and both sides must agree to the last one.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable, Iterator

from bench.load import Settings, note_clocks
from bench.measure import CpuSnapshot, Turn, TurnError, cpu_used_us, private_memory_kb, snapshot_cpu
from bench.memory import KEEP_ALIVE, SETTLE_SECONDS, raise_file_limit
from bench.process import ServerProcess
from bench.servers import DEFLATE, Server
from bench.websocket_client import Member, Script, open_member, write_script
from bench.workloads import Workload

_PATIENCE = 10.0  # seconds without any message until a turn is given up
_READ = select.EPOLLIN | select.EPOLLRDHUP
_WARM_UP_MEMBERS = 64  # of a memory turn


def take_echo_turn(server: Server, workload: Workload, settings: Settings, seed: int) -> Turn:
    """Measure CPU time per message that comes in and goes back."""
    process = ServerProcess(server, workload.app, settings.cores, speaks=workload.speaks)
    with process, _members(process, workload, workload.connections) as members:
        script = _script_for(members, workload, seed)
        echo(members, script, settings.warm_up_seconds)
        return _measured(process, lambda: echo(members, script, settings.seconds))


def take_broadcast_turn(server: Server, workload: Workload, settings: Settings, seed: int) -> Turn:
    """Measure CPU time per message that reaches one of many members of a room."""
    raise_file_limit(workload.connections)
    process = ServerProcess(server, workload.app, settings.cores, speaks=workload.speaks)
    with process, _members(process, workload, workload.connections) as members:
        with _members(process, workload, 1, path="/say") as (sender,):
            script = write_script(workload.message_size, seed)
            broadcast(sender, members, script, settings.warm_up_seconds)
            return _measured(
                process, lambda: broadcast(sender, members, script, settings.seconds), len(members)
            )


def take_websocket_memory_turn(server: Server, workload: Workload, settings: Settings, seed: int) -> Turn:
    """Measure what an idle WebSocket, which has echoed one message, costs in memory."""
    raise_file_limit(workload.idle)
    process = ServerProcess(
        server, workload.app, settings.cores, keep_alive=KEEP_ALIVE, speaks=workload.speaks
    )
    with process:
        with _members(process, workload, _WARM_UP_MEMBERS) as members:
            script = _script_for(members, workload, seed)
            echo(members, script, settings.warm_up_seconds)
        calls = process.settled_count()
        time.sleep(1.0)
        before = private_memory_kb(process.pid)
        with _members(process, workload, workload.idle) as members:
            echo(members, script, 0.0)
            time.sleep(SETTLE_SECONDS)
            after = private_memory_kb(process.pid)
            _check_still_open(members)
            if (served := process.settled_count() - calls) != workload.idle:
                raise TurnError(f"{workload.idle} messages were echoed, the application counted {served}")
        per_connection = (after - before) / workload.idle
        return Turn({"kb_per_connection": per_connection, "before_kb": before, "after_kb": after})


# -- around a load ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _members(
    process: ServerProcess, workload: Workload, number: int, path: str = "/"
) -> Iterator[list[Member]]:
    opened: list[Member] = []
    try:
        for _ in range(number):
            opened.append(open_member(process, path, deflate=DEFLATE in workload.speaks))  # noqa: PERF401
        yield opened
    finally:
        for member in opened:
            member.end()


def _script_for(members: list[Member], workload: Workload, seed: int) -> Script:
    script = write_script(workload.message_size, seed, deflate_bits=members[0].deflate_bits)
    for place, member in enumerate(members):
        member.position = place * 31 % len(script)
    return script


def _check_still_open(members: list[Member]) -> None:
    # A ping may have come; the end must not.
    poll = select.poll()
    for member in members:
        poll.register(member.fd, select.POLLRDHUP)
    if closed := len(poll.poll(0)):
        raise TurnError(
            f"the server closed {closed} of {len(members)} idle WebSockets before the measurement"
        )


def _measured(process: ServerProcess, load: Callable[[], list[float]], each: int = 1) -> Turn:
    calls_before = process.settled_count()
    before = snapshot_cpu(process.pid)
    begin = time.perf_counter()
    times = load()
    seconds = time.perf_counter() - begin
    calls = process.settled_count() - calls_before
    after = snapshot_cpu(process.pid)
    if calls != len(times) * each:
        raise TurnError(f"the client got {len(times) * each} messages, the application counted {calls}")
    return figures(times, calls, seconds, (before, after))


def figures(times: list[float], calls: int, seconds: float, cpu: tuple[CpuSnapshot, CpuSnapshot]) -> Turn:
    """What a load comes to: so many messages for the CPU time between two snapshots."""
    clocks, ticks = cpu_used_us(*cpu)
    times.sort()
    turn = Turn(
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
    note_clocks(turn, clocks, ticks)
    return turn


# -- loads --------------------------------------------------------------------------------------------------


def echo(members: list[Member], script: Script, seconds: float) -> list[float]:
    """Send on each connection, and again as soon as the echo is there, for so long; returns how long each took.

    Every message that was sent has come back when it returns; with 0 seconds it is one on each.
    """
    by_fd = {member.fd: member for member in members}
    sent, texts, answers, number = script.sent, script.texts, script.answers, len(script)
    clock = time.perf_counter
    times: list[float] = []
    with select.epoll() as epoll:
        for member in members:
            epoll.register(member.fd, _READ)
            _send(member, script)
        waiting = len(members)
        end = clock() + seconds
        while waiting:
            ready = epoll.poll(_PATIENCE)
            if not ready:
                raise TurnError(f"{waiting} messages were not echoed within {_PATIENCE:g} s")
            again = clock() < end
            for fd, _ in ready:
                member = by_fd[fd]
                position = member.position
                if not member.take(texts[position]):
                    continue
                now = clock()
                times.append(now - member.sent_at)
                member.position = position = (position + 1) % number
                if again:
                    member.expected = answers[position]
                    member.sent_at = now
                    member.socket.send(sent[position])
                else:
                    waiting -= 1
    return times


def broadcast(sender: Member, members: list[Member], script: Script, seconds: float) -> list[float]:
    """Let one say something, and again when all have heard it, for so long; returns how long each round took."""
    by_fd = {member.fd: member for member in members}
    clock = time.perf_counter
    times: list[float] = []
    with select.epoll() as epoll:
        for member in members:
            epoll.register(member.fd, _READ)
        end = clock() + seconds
        while not times or clock() < end:
            text, answer = script.texts[sender.position], script.answers[sender.position]
            for member in members:
                member.expected = answer
            _send(sender, script)
            waiting = len(members)
            while waiting:
                ready = epoll.poll(_PATIENCE)
                if not ready:
                    raise TurnError(f"{waiting} members had heard nothing after {_PATIENCE:g} s")
                for fd, _ in ready:
                    waiting -= by_fd[fd].take(text)
            times.append(clock() - sender.sent_at)
            sender.position = (sender.position + 1) % len(script)
    return times


def _send(member: Member, script: Script) -> None:
    member.expected = script.answers[member.position]
    member.sent_at = time.perf_counter()
    member.socket.send(script.sent[member.position])
