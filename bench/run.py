"""`make bench`: the whole benchmark, from the arguments to the tables, the results file and the chart.

Per workload and round every server has its turn, one after the other, in an order that moves on by one each
round; ratios are taken within a round. A turn that fails is shown with its reason and ends the run with exit
code 1, at the end; Ctrl-C ends it at once, and no process stays behind.

Exit codes: 0 all turns were good, 1 a turn failed, 2 something needed is missing or an argument is wrong,
130 interrupted.
"""

from __future__ import annotations

import argparse
import datetime as dt
import http.client
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import report
from bench.chart import PANELS, chart_of
from bench.files import take_files_turn, take_slow_readers_turn
from bench.h2_load import take_h2_turn
from bench.load import Settings, take_load_turn, take_startup_turn
from bench.measure import Turn, TurnError
from bench.memory import take_leak_turn, take_memory_turn
from bench.servers import OURS, ROOT, SERVERS, WEBSOCKET, Server, choose_cores
from bench.targets import judge
from bench.tls_load import take_handshakes_turn
from bench.websocket_load import take_broadcast_turn, take_echo_turn, take_websocket_memory_turn
from bench.workloads import WORKLOADS, Workload, select

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

# How a turn is taken of a kind of workload, where it is not by wrk.
_TURNS: dict[str, Callable[[Server, Workload, Settings, int], Turn]] = {
    "memory": take_memory_turn,
    "files": take_files_turn,
    "slow-readers": take_slow_readers_turn,
    "leak": take_leak_turn,
    "h2load": take_h2_turn,
    "handshakes": take_handshakes_turn,
    "ws-echo": take_echo_turn,
    "ws-broadcast": take_broadcast_turn,
    "ws-memory": take_websocket_memory_turn,
}
_ONE_ROUND = ("memory", "leak", "slow-readers", "ws-memory")
_STARTUP_ROUNDS = 5
_QUICK_MEMORY = ("trioserve", "uvicorn")
_EXTRA_KEY_ROUNDS = 2  # for the two workloads that everybody quotes


def main() -> int:
    """Run what the arguments ask for; returns the exit code."""
    args = _parse_arguments()
    if args.list:
        _print_list()
        return 0
    _check_machine()
    workloads, servers = _chosen_workloads(args), _chosen_servers(args)
    cores = choose_cores()
    os.sched_setaffinity(0, {cores.load})  # inherited by wrk
    settings = Settings(cores, seconds=args.seconds or (1 if args.quick else 2), warm_up_seconds=1)
    machine = report.describe_machine(cores)
    print("\n".join(report.header_lines(machine, report.describe_versions())), end="\n\n", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    results: dict[str, dict[str, list[Turn]]] = {}
    when = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    try:
        for workload in workloads:
            taking_part = [server for server in servers if _takes_part(server, workload, args)]
            if taking_part:
                results[workload.name] = _measure(workload, taking_part, settings, args)
                print("\n".join(report.workload_lines(workload, results[workload.name], servers)), flush=True)
    except KeyboardInterrupt:
        print("\ninterrupted: no results are written", file=sys.stderr)
        return EXIT_INTERRUPTED
    print("\n".join(report.target_lines(judge(results))))
    _write_files(args, report.results_as_json(results, settings, machine, when))
    failed = any(
        turn.failure for by_server in results.values() for turns in by_server.values() for turn in turns
    )
    return EXIT_FAILED if failed else 0


# -- arguments ----------------------------------------------------------------------------------------------


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/run.py",
        description="Measure trioserve against its peers, in one run, turn and turn about.",
        epilog="A full run (no --quick, --servers, --workloads) writes bench/results.json and "
        "bench/chart.svg; any other writes files only where --json and --chart say.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="about two minutes: fewer workloads and servers, one round"
    )
    parser.add_argument("--rounds", type=_positive(int), metavar="N", help="rounds per load workload (3)")
    parser.add_argument(
        "--seconds", type=_positive(int), metavar="S", help="length of one measurement (2, with --quick 1)"
    )
    parser.add_argument("--servers", metavar="A,B", help="only these, see --list")
    parser.add_argument("--workloads", metavar="X,Y", help="only these; `hello` means all of hello-…")
    parser.add_argument("--leak", action="store_true", help="add the leak workload: some minutes")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the results go")
    parser.add_argument("--chart", type=Path, metavar="PATH", help="where the chart goes")
    parser.add_argument(
        "--add",
        action="store_true",
        help="put the workloads of this run into bench/results.json, and redraw the chart",
    )
    parser.add_argument("--list", action="store_true", help="show servers and workloads, and end")
    return parser.parse_args()


def _positive(kind: type[int]):  # type: ignore[no-untyped-def]
    def parse(text: str) -> int:
        if (value := kind(text)) <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    parse.__name__ = "number"
    return parse


def _print_list() -> None:
    print("servers:")
    for server in SERVERS:
        missing = f"  (missing: {', '.join(server.missing)})" if server.missing else ""
        print(f"  {server.name:15} {server.settings}{missing}")
    print("workloads:")
    for workload in WORKLOADS:
        marks = [
            word for word, on in (("quick", workload.in_quick), ("--leak", workload.kind == "leak")) if on
        ]
        print(f"  {workload.name:15} {workload.title}{'  [' + ', '.join(marks) + ']' if marks else ''}")


def _usage_error(message: str) -> SystemExit:
    print(f"bench/run.py: {message}", file=sys.stderr)
    return SystemExit(EXIT_USAGE)


def _check_machine() -> None:
    if not sys.platform.startswith("linux"):
        raise _usage_error(f"CPU time and memory are read from Linux' /proc; this is {sys.platform}")
    if shutil.which("wrk") is None:
        raise _usage_error(
            "wrk, the load generator, is not on the PATH. Install your distribution's package: "
            "`apt install wrk`, `dnf install wrk`, `pacman -S wrk`, `apk add wrk`"
        )


def _chosen_workloads(args: argparse.Namespace) -> list[Workload]:
    if args.workloads:
        try:
            chosen = select(args.workloads.split(","))
        except ValueError as error:
            raise _usage_error(f"--workloads: {error}") from None
    else:
        chosen = [w for w in WORKLOADS if w.kind != "leak" and (w.in_quick or not args.quick)]
    if args.leak:
        chosen += [w for w in WORKLOADS if w.kind == "leak" and w not in chosen]
    able = [workload for workload in chosen if not workload.missing]
    for workload in chosen:
        if workload.missing:
            print(
                f"skipping {workload.name}: there is no {' and no '.join(workload.missing)}", file=sys.stderr
            )
    if not able:
        raise _usage_error("nothing is left to be measured")
    return able


def _chosen_servers(args: argparse.Namespace) -> list[Server]:
    by_name = {server.name: server for server in SERVERS}
    names = args.servers.split(",") if args.servers else list(by_name)
    if unknown := [name for name in names if name not in by_name]:
        raise _usage_error(f"--servers: there is no server {unknown[0]!r}; there are: {', '.join(by_name)}")
    chosen = []
    for name in names:
        if missing := by_name[name].missing:
            how = "`make bench` installs the peers" if name not in OURS else "install this project"
            print(f"skipping {name}: {' and '.join(missing)} cannot be imported ({how})", file=sys.stderr)
        else:
            chosen.append(by_name[name])
    if not chosen:
        raise _usage_error("none of the servers is installed: pip install --group bench")
    return chosen


def _takes_part(server: Server, workload: Workload, args: argparse.Namespace) -> bool:
    if workload.name in server.unfit or (workload.access_log and server.access_log is None):
        return False
    if server.files is None if workload.file_count else server.only_files:
        return False
    if not workload.speaks <= server.speaks or (server.only_websocket and WEBSOCKET not in workload.speaks):
        return False
    if args.servers:
        return True
    if args.quick and (server.minor or (workload.kind == "memory" and server.name not in _QUICK_MEMORY)):
        return False
    if server.minor and workload.kind == "load" and not workload.key:
        return False
    return not workload.only or server.name in workload.only


# -- measuring ----------------------------------------------------------------------------------------------


def _measure(
    workload: Workload, servers: list[Server], settings: Settings, args: argparse.Namespace
) -> dict[str, list[Turn]]:
    rounds = _number_of_rounds(workload, args)
    turns: dict[str, list[Turn]] = {server.name: [] for server in servers}
    for number in range(rounds):
        start = number % len(servers)
        for server in servers[start:] + servers[:start]:
            _progress(f"{workload.name}, round {number + 1} of {rounds}: {server.name}")
            turns[server.name].append(_take_turn(server, workload, settings, seed=1000 * number + 1))
    _progress("")
    return turns


def _number_of_rounds(workload: Workload, args: argparse.Namespace) -> int:
    if workload.kind in _ONE_ROUND:
        return 1
    if workload.kind == "startup":
        return max(_STARTUP_ROUNDS, args.rounds or 0)
    if args.rounds:
        return int(args.rounds)
    if args.quick:
        return 1
    return 3 + (_EXTRA_KEY_ROUNDS if workload.key else 0)


def _take_turn(server: Server, workload: Workload, settings: Settings, seed: int) -> Turn:
    try:
        if workload.kind == "startup":
            return take_startup_turn(server, workload, settings)
        if (take_turn := _TURNS.get(workload.kind)) is not None:
            return take_turn(server, workload, settings, seed)
        return take_load_turn(server, workload, settings, seed)
    except (TurnError, OSError, http.client.HTTPException) as error:
        reason = str(error) if isinstance(error, TurnError) else f"{type(error).__name__}: {error}"
        print(f"FAILED {workload.name}, {server.name}: {reason}", file=sys.stderr)
        return Turn(failure=reason)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


# -- files --------------------------------------------------------------------------------------------------


def _write_files(args: argparse.Namespace, results: dict[str, Any]) -> None:
    published = ROOT / "bench" / "results.json"
    if args.add:
        results = report.add_results(json.loads(published.read_text()), results)
    is_full = args.add or not (args.quick or args.servers or args.workloads)
    json_path = args.json or (published if is_full else None)
    chart_path = args.chart or (ROOT / "bench" / "chart.svg" if is_full else None)
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        print(f"wrote {json_path}")
    if chart_path is not None:
        if (chart := chart_of(results)) is None:
            shown = ", ".join(name for name, _ in PANELS)
            print(f"no chart: none of what it shows was measured in this run: {shown} ({chart_path} stays)")
        else:
            chart_path.write_text(chart)
            print(f"wrote {chart_path}")


if __name__ == "__main__":
    sys.exit(main())
