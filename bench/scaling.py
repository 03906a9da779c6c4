"""What a second worker brings: `python bench/scaling.py`, a table and no files.

Two workers against one, hello world at 64 connections, trioserve and granian turn and turn about. The load client runs
on the same cores, so neither can double: what counts is whose gain is the larger. It is throughput here, since the
question is what two processes get out of two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.load import check_answer, run_wrk
from bench.measure import TurnError
from bench.process import ServerProcess
from bench.servers import SERVERS, Cores, Launch, Server
from bench.workloads import WORKLOADS

_NAMES = ("trioserve", "granian")


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3)
    args = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        print("two cores are needed", file=sys.stderr)
        return 2
    found: dict[tuple[str, int], list[float]] = {}
    for number in range(args.rounds):
        order = [(name, workers) for name in _NAMES for workers in (1, 2)]
        for name, workers in order[number % 4 :] + order[: number % 4]:
            rate = _measure(next(s for s in SERVERS if s.name == name), workers, args.seconds)
            found.setdefault((name, workers), []).append(rate)
    print(
        f"{'':10} {'1 worker':>10} {'2 workers':>10} {'gain':>6}   requests a second; gain: median over the rounds"
    )
    for name in _NAMES:
        one, two = found[name, 1], found[name, 2]
        gain = median(b / a for a, b in zip(one, two, strict=True))
        print(f"{name:10} {median(one):10.0f} {median(two):10.0f} {gain:6.2f}")
    return 0


def _measure(server: Server, workers: int, seconds: int) -> float:
    """Requests per second, on all cores."""
    workload = next(w for w in WORKLOADS if w.name == "hello-64")

    def arguments(launch: Launch) -> list[str]:
        given = server.arguments(launch)
        if "--workers" in given:
            given[given.index("--workers") + 1] = str(workers)
            return given
        return [*given[:-1], "--workers", str(workers), given[-1]]

    unpinned = dataclasses.replace(server, arguments=arguments)
    with ServerProcess(unpinned, workload.app, Cores(server=-1, load=-1)) as process:
        check_answer(process, workload)
        run_wrk(process, workload, 1, 1)
        result = run_wrk(process, workload, seconds, 2)
        if result.errors or not result.requests:
            raise TurnError(f"wrk saw {result.errors} in {result.requests} requests")
        return result.requests / result.seconds


if __name__ == "__main__":
    sys.exit(main())
