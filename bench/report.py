"""What a run comes to: the tables on the terminal, and the results file.

Called by `run.py` after (and, table by table, during) the measurements.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import ssl
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.load import Settings
from bench.measure import Turn, median_of, median_ratio, values
from bench.servers import OURS, SERVERS, Cores, Server, find_program
from bench.targets import Results, Verdict, judge
from bench.workloads import WORKLOADS, Workload

_PACKAGES = (
    "trioserve", "trio", "h11", "httptools", "gunicorn_h1c", "hypercorn", "anycorn", "uvicorn", "uvloop", "granian",
    "fastpysgi", "starlette", "h2", "wsproto", "websockets",
)  # fmt: skip

# The figure that a kind of workload is about, and its heading.
_FIGURES = {
    "load": ("cpu_us", "CPU µs/request"),
    "files": ("cpu_us", "CPU µs/request"),
    "slow-readers": ("growth_mb", "growth MB"),
    "memory": ("kb_per_connection", "kB/connection"),
    "startup": ("startup_ms", "ms"),
    "leak": ("growth_percent", "growth %"),
    "h2load": ("cpu_us", "CPU µs/request"),
    "handshakes": ("cpu_us", "CPU µs/connection"),
    "ws-echo": ("cpu_us", "CPU µs/message"),
    "ws-broadcast": ("cpu_us", "CPU µs/delivery"),
    "ws-memory": ("kb_per_connection", "kB/connection"),
}


# -- the machine --------------------------------------------------------------------------------------------


def describe_machine(cores: Cores) -> dict[str, Any]:
    """CPU, kernel and interpreter, as far as they matter for the figures."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "server_core": cores.server,
        "load_core": cores.load,
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "load_average": os.getloadavg()[0],
    }


def describe_versions() -> dict[str, str]:
    """The versions of everything that takes part; what is not installed is left out."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    first_line = subprocess.run(["wrk", "-v"], capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )[0]
    versions["wrk"] = " ".join(first_line.split()[1:2])
    if (program := find_program("h2load")) is not None:
        line = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
        versions["h2load"] = line.strip().rpartition("/")[2]
    versions["OpenSSL"] = " ".join(ssl.OPENSSL_VERSION.split()[1:2])
    return versions


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def header_lines(machine: dict[str, Any], versions: dict[str, str]) -> list[str]:
    """The lines that every quoted number needs beside it."""
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, {machine['python']}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    if machine["server_core"] == machine["load_core"]:
        lines.append(
            f"NOTE: there is one core only, server and load share core {machine['server_core']}: "
            "compare ratios, do not quote absolute numbers"
        )
    else:
        lines.append(f"server on core {machine['server_core']}, load on core {machine['load_core']}")
    if machine["load_average"] > 0.5:
        lines.append(
            f"NOTE: the machine was not idle at the start (load average {machine['load_average']:.2f})"
        )
    return lines


# -- tables -------------------------------------------------------------------------------------------------


def workload_lines(
    workload: Workload, by_server: dict[str, list[Turn]], servers: Sequence[Server] = ()
) -> list[str]:
    """The table of one workload, the best server first; below it the failures and the unfit."""
    figure, heading = _FIGURES[workload.kind]
    ours = [name for name in OURS if name in by_server and values(by_server[name], figure)]
    has_ratio = workload.kind != "leak"
    is_load = figure == "cpu_us" and workload.kind != "files"
    head = ["server", heading, "min - max"]
    if is_load:
        head += ["requests/s", "p50 ms", "p99 ms", "busy"]
    head += [f"{name} is" for name in ours if has_ratio]
    rows = [head]
    worst = float("inf")
    for name in sorted(by_server, key=lambda name: _or(median_of(by_server[name], figure), worst)):
        turns = by_server[name]
        middle = median_of(turns, figure)
        if middle is None:
            rows.append([name, "failed"])
            continue
        found = values(turns, figure)
        row = [name, _number(middle), f"{_number(min(found))} - {_number(max(found))}"]
        if is_load:
            row += [_cell(turns, key, show) for key, show in _LOAD_COLUMNS]
        if has_ratio:
            row += [_ratio(median_ratio(by_server[us], turns, figure)) for us in ours]
        rows.append(row)
    rounds = max((len(turns) for turns in by_server.values()), default=0)
    title = f"{workload.name}: {workload.title}; " + (
        f"median of {rounds} rounds" if rounds > 1 else "one round"
    )
    unfit = [
        f"  not measured: {s.name}, {s.unfit[workload.name]}" for s in servers if workload.name in s.unfit
    ]
    return [title, *_columns(rows), *_failure_lines(by_server), *unfit, ""]


def target_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """The table of the figures to reach."""
    rows = [["figures to reach", "goal", "at least", "reached", ""]]
    for verdict in verdicts:
        target = verdict.target
        show = (lambda x, unit=target.unit: f"{x:.2f}{unit}") if target.unit else _ratio
        reached = "-" if verdict.reached is None else show(verdict.reached)
        rows.append([target.what, show(target.goal), show(target.least), reached, verdict.word])
    return [*_columns(rows), ""]


def _failure_lines(by_server: dict[str, list[Turn]]) -> list[str]:
    lines = []
    for name, turns in by_server.items():
        for number, turn in enumerate(turns, 1):
            if turn.failure is not None:
                lines.append(f"  FAILED {name}, round {number}: {turn.failure}")
            lines += [f"  {name}, round {number}: {note}" for note in turn.notes]
    return lines


def _cell(turns: Sequence[Turn], figure: str, show: Callable[[float], str]) -> str:
    middle = median_of(turns, figure)
    return "-" if middle is None else show(middle)


_LOAD_COLUMNS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("rps", lambda x: f"{x:,.0f}"),
    ("p50_us", lambda x: f"{x / 1e3:.2f}"),
    ("p99_us", lambda x: f"{x / 1e3:.2f}"),
    ("busy", lambda x: f"{x:.0%}"),
)


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f} (1/{1 / value:.0f})"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows if len(row) > i) for i in range(max(map(len, rows)))]
    lines = []
    for row in rows:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=False))
        lines.append("  ".join(["  " + first.strip().ljust(widths[0]), *rest]).rstrip())
    return lines


# -- the results file ---------------------------------------------------------------------------------------


def results_as_json(
    results: Results, settings: Settings, machine: dict[str, Any], when: str
) -> dict[str, Any]:
    """The whole run: medians, ratios, every turn, the targets, and what they were measured on."""
    titles = {workload.name: workload for workload in WORKLOADS}
    return {
        "when": when,
        "machine": machine,
        "versions": describe_versions(),
        "servers": {
            server.name: {"settings": server.settings, "unfit": dict(server.unfit)} for server in SERVERS
        },
        "method": {
            "command": " ".join(sys.argv),
            "seconds": settings.seconds,
            "warm_up_seconds": settings.warm_up_seconds,
            "figure": "CPU time of the server's whole process tree over requests served; median of rounds",
            "ratio": "median of the per-round ratios, trioserve over peer",
        },
        "targets": [verdict.as_json() for verdict in judge(results)],
        "workloads": {name: _workload_json(titles[name], dict(servers)) for name, servers in results.items()},
    }


def add_results(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The results of an earlier run with those of a run of some workloads added, or put in their place.

    Ratios are of one run all the same: a workload comes whole from one or from the other, and says when that was, and
    on which machine.
    """
    measured = {target["what"]: target for target in now["targets"] if target["reached"] is not None}
    kept = {target["what"]: target for target in before["targets"]}
    for workload in now["workloads"].values():
        workload["when"] = now["when"]
        workload["machine"] = now["machine"]
    return {
        **before,
        "versions": now["versions"],
        "servers": now["servers"],
        "targets": [
            measured.get(target["what"]) or kept.get(target["what"], target) for target in now["targets"]
        ],
        "workloads": before["workloads"] | now["workloads"],
    }


def _workload_json(workload: Workload, by_server: dict[str, Sequence[Turn]]) -> dict[str, Any]:
    figure = _FIGURES[workload.kind][0]
    servers = {}
    for name, turns in by_server.items():
        figures = sorted({key for turn in turns for key in turn.figures})
        servers[name] = {
            "median": {key: _rounded(median_of(turns, key)) for key in figures},
            "rounds": [turn.as_json() for turn in turns],
        }
    ratios = {
        ours: {peer: _rounded(median_ratio(by_server[ours], by_server[peer], figure)) for peer in by_server}
        for ours in OURS
        if ours in by_server and workload.kind != "leak"
    }
    return {"title": workload.title, "figure": figure, "servers": servers, "ratios": ratios}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
