"""One turn of one server: start, check one answer, warm up, load, verify, end.

Called by `run.py`, round by round. A turn either returns its figures or says why they must not be used: wrk
saw an error, the application was called more or less often than the client says, or a process of the server
died.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.apps import COUNT_PATH
from bench.measure import CpuSnapshot, Turn, TurnError, WrkResult, cpu_used_us, parse_wrk, snapshot_cpu
from bench.process import ServerProcess
from bench.servers import Cores, Server
from bench.workloads import Workload

_WRK_SCRIPT = Path(__file__).with_name("wrk.lua")
_WRK_TIMEOUT = 10  # seconds until wrk counts a request as timed out

# The two ways to read CPU time may differ by this part, or by this much (a few ticks), before a turn says so.
_CLOCK_TOLERANCE = 0.05
_CLOCK_SLACK_US = 40_000


@dataclass(frozen=True)
class Settings:
    """What holds for the whole run."""

    cores: Cores
    seconds: float
    warm_up_seconds: float


def take_load_turn(server: Server, workload: Workload, settings: Settings, seed: int) -> Turn:
    """Measure one server once under a wrk workload."""
    process = ServerProcess(
        server, workload.app, settings.cores, access_log=workload.access_log, speaks=workload.speaks
    )
    with process:
        check_answer(process, workload)
        run_wrk(process, workload, settings.warm_up_seconds, seed)
        calls_before = process.settled_count()
        cpu_before = snapshot_cpu(process.pid)
        result = run_wrk(process, workload, settings.seconds, seed + 1)
        calls_after = process.settled_count()
        cpu_after = snapshot_cpu(process.pid)
        calls = calls_after - calls_before
        check_result(result, calls, workload)
        turn = figures(result, calls, (cpu_before, cpu_after))
        if (log := process.access_log_path) is not None:
            process.stop()
            _check_access_log(log, calls_after)
    return turn


def take_startup_turn(server: Server, workload: Workload, settings: Settings) -> Turn:
    """Measure the time from exec to the first answer."""
    with ServerProcess(server, workload.app, settings.cores) as process:
        check_answer(process, workload)
        return Turn({"startup_ms": process.startup_seconds * 1e3})


def check_answer(process: ServerProcess, workload: Workload) -> None:
    """Raise unless the server gives the one right answer."""
    probe = workload.probe
    status, body = process.fetch(probe.method, probe.path, probe.body)
    if status != 200 or body != probe.expected:
        raise TurnError(
            f"{probe.method} {probe.path} answered {status} with {len(body)} bytes {body[:60]!r}, "
            f"expected 200 with {len(probe.expected)} bytes {probe.expected[:60]!r}"
        )


def run_wrk(
    process: ServerProcess, workload: Workload, seconds: float, seed: int, extra: Sequence[str] = ()
) -> WrkResult:
    """Load the server for whole seconds; wrk counts no fractions of them."""
    command = ["wrk", "--threads", "1", "--connections", str(workload.connections)]
    command += ["--duration", f"{max(1, round(seconds))}s", "--timeout", f"{_WRK_TIMEOUT}s"]
    command += ["--script", str(_WRK_SCRIPT), process.url]
    command += ["--", workload.request, str(seed), *extra]
    limit = seconds + 3 * _WRK_TIMEOUT
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        raise TurnError(f"wrk had not ended after {limit:g} s") from None
    if done.returncode != 0:
        raise TurnError(
            f"wrk ended with code {done.returncode}: {(done.stderr or done.stdout).strip()[-400:]}"
        )
    return parse_wrk(done.stdout)


def check_result(result: WrkResult, calls: int, workload: Workload) -> None:
    """Raise unless client and application agree, but for what was in flight when the load stopped."""
    if result.errors:
        listed = ", ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in result.errors.items())
        raise TurnError(f"wrk saw {listed} in {result.requests} requests")
    if result.requests == 0:
        raise TurnError("wrk got no answer at all")
    if not 0 <= calls - result.requests <= workload.connections:
        raise TurnError(
            f"wrk counted {result.requests} answers, the application {calls} calls ({COUNT_PATH}); "
            f"at most {workload.connections} may have been in flight"
        )
    if result.bytes < result.requests * len(workload.probe.expected):
        raise TurnError(
            f"{result.bytes} bytes came in {result.requests} answers, too few for bodies of "
            f"{len(workload.probe.expected)} bytes"
        )


def figures(result: WrkResult, calls: int, cpu: tuple[CpuSnapshot, CpuSnapshot]) -> Turn:
    """What a load comes to: `calls` requests for the CPU time between two snapshots."""
    clocks, ticks = cpu_used_us(*cpu)
    turn = Turn(
        {
            "cpu_us": clocks / calls,
            "cpu_us_by_ticks": ticks / calls,
            "requests": float(result.requests),
            "rps": result.requests / result.seconds,
            "p50_us": result.p50_us,
            "p99_us": result.p99_us,
            # Near 1: the server's core was saturated by the server, and by nobody else.
            "busy": clocks / 1e6 / result.seconds,
        }
    )
    note_clocks(turn, clocks, ticks)
    return turn


def note_clocks(turn: Turn, clocks: float, ticks: float) -> None:
    """Say so where the two ways to read CPU time differ."""
    if abs(clocks - ticks) > max(_CLOCK_TOLERANCE * clocks, _CLOCK_SLACK_US):
        turn.notes.append(f"CPU clocks say {clocks / 1e3:.0f} ms, utime + stime {ticks / 1e3:.0f} ms")


def _check_access_log(log: Path, calls: int) -> None:
    lines = 0
    if log.exists():
        with log.open("rb") as file:
            lines = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    if lines < calls:
        raise TurnError(f"the access log has {lines} lines for {calls} requests")
