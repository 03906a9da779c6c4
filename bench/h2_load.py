"""HTTP/2: one turn of one server under h2load.

Called by `run.py`. h2load keeps so many streams open on each of 8 connections; paths differ from request to request,
so that neither its header compression nor a memory of heads makes them one and the same.
"""

from __future__ import annotations

import random
import re
import subprocess
import tempfile
from pathlib import Path

from bench.load import Settings, check_answer, note_clocks
from bench.measure import Turn, TurnError, cpu_used_us, snapshot_cpu
from bench.process import ServerProcess
from bench.servers import Server, find_program
from bench.workloads import H2_STREAMS, Workload

_PATHS = 4096
_TIMEOUT = 30.0  # seconds that h2load may take beyond its time


def take_h2_turn(server: Server, workload: Workload, settings: Settings, seed: int) -> Turn:
    """Measure one server once."""
    process = ServerProcess(server, workload.app, settings.cores, speaks=workload.speaks)
    with process:
        check_answer(process, workload)
        run_h2load(process, workload, settings.warm_up_seconds, seed)
        calls_before = process.settled_count()
        before = snapshot_cpu(process.pid)
        result = run_h2load(process, workload, settings.seconds, seed + 1)
        calls = process.settled_count() - calls_before
        clocks, ticks = cpu_used_us(before, snapshot_cpu(process.pid))
        check_h2_result(result, calls, workload)
        turn = Turn(
            {
                "cpu_us": clocks / calls,
                "cpu_us_by_ticks": ticks / calls,
                "requests": float(result["requests"]),
                "rps": result["requests"] / settings.seconds,
                "mean_us": result["mean_us"],
                "busy": clocks / 1e6 / settings.seconds,
            }
        )
        note_clocks(turn, clocks, ticks)
        return turn


def run_h2load(process: ServerProcess, workload: Workload, seconds: float, seed: int) -> dict[str, float]:
    """Load the server for so long; what h2load says of it."""
    program = find_program("h2load")
    assert program is not None
    source = random.Random(seed)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        for number in range(_PATHS):
            file.write(f"{process.url}books/{source.getrandbits(30)}/item-{number}?page={number % 7}\n")
        file.flush()
        command = [program, "--clients", str(workload.connections // H2_STREAMS), "--threads", "1"]
        command += ["--max-concurrent-streams", str(H2_STREAMS), "--duration", f"{seconds:g}"]
        command += ["--input-file", str(Path(file.name))]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds + _TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            raise TurnError(f"h2load had not ended after {seconds + _TIMEOUT:g} s") from None
    if done.returncode != 0:
        raise TurnError(f"h2load ended with code {done.returncode}: {done.stderr.strip()[-400:]}")
    return parse_h2load(done.stdout)


_PARTS = (
    r"requests: \d+ total, \d+ started, (?P<done>\d+) done, (?P<requests>\d+) succeeded",
    r"succeeded, (?P<failed>\d+) failed, (?P<errored>\d+) errored, (?P<timeout>\d+) timeout",
    r"status codes: (?P<good>\d+) 2xx",
    r"traffic: .*\((?P<data>\d+)\) data",
)
_UNITS = {"us": 1.0, "ms": 1e3, "s": 1e6}


def parse_h2load(output: str) -> dict[str, float]:
    """The numbers in the last lines of h2load's output.

    Raises:
        TurnError: they are not there, or the server chose HTTP/1.1, which h2load speaks too.
    """
    spoken = re.search(r"Application protocol: (\S+)", output)
    if spoken is None or spoken[1] not in ("h2", "h2c"):
        raise TurnError(f"the server speaks {spoken[1] if spoken else 'nothing known'} instead of HTTP/2")
    found: dict[str, float] = {}
    for pattern in _PARTS:
        if (match := re.search(pattern, output)) is None:
            raise TurnError(f"h2load's output is not as expected: {output.strip()[-600:]!r}")
        found |= {key: float(value) for key, value in match.groupdict().items()}
    mean = re.search(r"time for request: +\S+ +\S+ +([\d.]+)(us|ms|s)", output)
    found["mean_us"] = float(mean[1]) * _UNITS[mean[2]] if mean else 0.0
    return found


def check_h2_result(result: dict[str, float], calls: int, workload: Workload) -> None:
    """Raise unless client and application agree, but for what was in flight when the load stopped."""
    done = result["requests"]
    if not done:
        raise TurnError("h2load got no answer at all")
    if result["failed"] or result["errored"] or result["timeout"] or result["good"] < done:
        raise TurnError(f"h2load saw answers that were not good: {result}")
    if not 0 <= calls - done <= workload.connections:
        raise TurnError(
            f"h2load counted {done:.0f} answers, the application {calls} calls; at most "
            f"{workload.connections} may have been in flight"
        )
    if result["data"] < done * len(workload.probe.expected):
        raise TurnError(f"{result['data']:.0f} bytes came in {done:.0f} answers, which is too few")
