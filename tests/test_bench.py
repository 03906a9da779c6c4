"""The benchmark's own arithmetic: what it parses, what it computes, what it draws."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the benchmark reads /proc")

if sys.platform.startswith("linux"):
    from bench import chart, compression, load, measure, report, servers, targets, workloads
    from bench.measure import Turn, TurnError

_ROOT = Path(__file__).resolve().parent.parent

_LINE = (
    'bench-result {"requests": 61000, "seconds": 2.001, "bytes": 9000000, "p50_us": 1010.0, '
    '"p99_us": 2500.0, "max_us": 9000.0, "connect_errors": 0, "read_errors": %d, "write_errors": 0, '
    '"timeouts": 0, "bad_statuses": %d}'
)


def _wrk(read_errors: int = 0, bad_statuses: int = 0) -> measure.WrkResult:
    return measure.parse_wrk(
        "Running 2s test @ http://127.0.0.1/\n" + _LINE % (read_errors, bad_statuses) + "\n"
    )


def _turns(*cpu_us: float | None) -> list[Turn]:
    return [Turn(failure="broken") if value is None else Turn({"cpu_us": value}) for value in cpu_us]


# -- parsing ------------------------------------------------------------------------------------------------


def test_the_result_line_of_wrk_is_found_and_parsed() -> None:
    result = _wrk()
    assert (result.requests, result.seconds, result.p99_us) == (61000, 2.001, 2500.0)
    assert result.errors == {}


def test_errors_that_wrk_saw_are_kept_by_kind() -> None:
    assert _wrk(read_errors=3, bad_statuses=7).errors == {"read_errors": 3, "bad_statuses": 7}


def test_output_without_a_result_line_fails_the_turn() -> None:
    with pytest.raises(TurnError, match="unable to connect"):
        measure.parse_wrk("unable to connect to 127.0.0.1:1 Connection refused\n")


def test_stat_is_parsed_though_the_name_holds_spaces_and_parentheses() -> None:
    fields = "S 10 1 1 0 -1 0 0 0 0 0 123 45 6 7 20 0 1 0 9999 0 0"
    stat = measure.parse_stat(f"4321 (a (b) c) {fields}")
    assert (stat.pid, stat.parent, stat.utime, stat.stime) == (4321, 10, 123, 45)
    assert (stat.children_time, stat.start_time) == (13, 9999)


def test_private_memory_adds_the_private_lines_only() -> None:
    rollup = "Rss: 900 kB\nPrivate_Clean: 100 kB\nPrivate_Dirty: 250 kB\nShared_Clean: 40 kB\nSwapPss: 5 kB\n"
    assert measure.parse_private_kb(rollup) == 355


# -- CPU time -----------------------------------------------------------------------------------------------


def test_cpu_time_of_a_tree_includes_children_that_began_meanwhile() -> None:
    before = measure.CpuSnapshot({(1, 5): 100.0}, {(1, 5): 0.0}, 10.0)
    after = measure.CpuSnapshot({(1, 5): 400.0, (2, 9): 50.0}, {(1, 5): 300.0, (2, 9): 0.0}, 30.0)
    assert measure.cpu_used_us(before, after) == (370.0, 320.0)


def test_a_process_that_ended_meanwhile_fails_the_turn() -> None:
    before = measure.CpuSnapshot({(1, 5): 1.0, (7, 6): 1.0}, {(1, 5): 0.0, (7, 6): 0.0}, 0.0)
    after = measure.CpuSnapshot({(1, 5): 2.0}, {(1, 5): 0.0}, 0.0)
    with pytest.raises(TurnError, match="process 7 "):
        measure.cpu_used_us(before, after)


def test_the_clock_of_another_process_is_its_cpu_time() -> None:
    source = "while __import__('time').process_time() < 0.2: pass\nprint(flush=True)\ninput()"
    child = subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        (used,) = measure.snapshot_cpu(child.pid).clocks_us.values()
    finally:
        child.communicate(b"\n")
    assert 200_000 <= used < 1_000_000


def test_the_process_tree_begins_with_its_root() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        tree = measure.process_tree(os.getpid())
        assert tree[0].pid == os.getpid()
        assert child.pid in {stat.pid for stat in tree}
    finally:
        child.communicate(b"\n")
    assert measure.process_tree(child.pid) == []


# -- verification -------------------------------------------------------------------------------------------


def test_the_application_may_have_been_called_for_what_was_in_flight() -> None:
    (hello,) = workloads.select(["hello-64"])
    load.check_result(_wrk(), 61000, hello)
    load.check_result(_wrk(), 61064, hello)


@pytest.mark.parametrize("calls", [60999, 61065, 0])
def test_client_and_application_must_agree(calls: int) -> None:
    (hello,) = workloads.select(["hello-64"])
    with pytest.raises(TurnError, match=f"the application {calls} calls"):
        load.check_result(_wrk(), calls, hello)


def test_an_error_seen_by_the_client_fails_the_turn() -> None:
    (hello,) = workloads.select(["hello-64"])
    with pytest.raises(TurnError, match="7 bad statuses"):
        load.check_result(_wrk(bad_statuses=7), 61000, hello)


def test_answers_without_their_bodies_fail_the_turn() -> None:
    (body,) = workloads.select(["body-10k"])
    with pytest.raises(TurnError, match="too few for bodies of 10240 bytes"):
        load.check_result(_wrk(), 61000, body)


def test_a_server_that_cannot_start_is_reported_with_its_words_and_leaves_nothing() -> None:
    broken = servers.Server("broken", (), "", lambda launch: ["-c", "import sys; sys.exit('no such thing')"])
    cores = servers.choose_cores()
    with (
        pytest.raises(TurnError, match=r"ended with code 1 .*no such thing"),
        servers.ServerProcess(broken, "bench.apps:hello", cores),
    ):
        pytest.fail("it must not get this far")


# -- medians, ratios, targets -------------------------------------------------------------------------------


def test_the_ratio_is_the_median_of_the_rounds_not_of_the_totals() -> None:
    assert measure.median_ratio(_turns(10, 20, 30), _turns(20, 20, 100), "cpu_us") == 0.5


def test_rounds_that_failed_on_either_side_do_not_count() -> None:
    assert measure.median_ratio(_turns(10, None, 30), _turns(None, 20, 60), "cpu_us") == 0.5
    assert measure.median_ratio(_turns(None), _turns(1.0), "cpu_us") is None
    assert measure.median_of(_turns(None, 4.0, 8.0), "cpu_us") == 6.0


@pytest.mark.parametrize(
    ("reached", "word"),
    [(0.5, "goal"), (0.6, "goal"), (0.7, "at least"), (0.79, "missed"), (None, "not measured")],
)
def test_a_target_is_judged_by_goal_and_least(reached: float | None, word: str) -> None:
    target = targets.Target("hello-64", 0.60, 0.78, "uvicorn")
    results = {} if reached is None else {"hello-64": {"trioserve": _turns(reached), "uvicorn": _turns(1.0)}}
    (verdict,) = targets.judge(results, [target])
    assert verdict.word == word


def test_targets_name_workloads_and_servers_that_exist() -> None:
    names = {server.name for server in servers.SERVERS}
    for target in targets.TARGETS:
        assert workloads.select([target.workload])
        assert {target.ours, target.peer} - {None} <= names
        assert target.goal <= target.least


def test_an_unknown_workload_is_named_with_those_that_exist() -> None:
    assert [w.connections for w in workloads.select(["hello"])] == [64, 1, 8, 512]
    with pytest.raises(ValueError, match=r"'helo'.*hello-64, browser"):
        workloads.select(["helo"])


# -- what is shown ------------------------------------------------------------------------------------------


def test_a_table_shows_failures_beside_figures() -> None:
    (hello,) = workloads.select(["hello-64"])
    lines = report.workload_lines(hello, {"trioserve": _turns(10, 10), "uvicorn": _turns(20, None)})
    text = "\n".join(lines)
    assert "trioserve is" in text
    assert "0.50" in next(line for line in lines if line.strip().startswith("uvicorn"))
    assert "FAILED uvicorn, round 2: broken" in text


def test_the_chart_is_well_formed_and_has_a_bar_a_server() -> None:
    bars = {"trioserve": 11.9, "uvicorn <&>": 20.0, "granian": 17.5, "hypercorn": 450.0}
    root = ET.fromstring(chart.draw_chart([("hello & more", bars), ("browser", bars)], "a <machine>"))
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{space}rect")) == 8
    width = float(root.attrib["width"])
    for bar in root.findall(f"{space}rect"):
        assert float(bar.attrib["x"]) + float(bar.attrib["width"]) < width
    assert len(root.findall(f"{space}path")) == 2, "the long bar of each panel is cut, and shows it"
    assert "450" in {text.text for text in root.findall(f"{space}text")}


def _results(*workloads: str) -> dict[str, object]:
    servers = {
        name: {"median": {"cpu_us": value}} for name, value in {"trioserve": 9.0, "nginx": 7.0}.items()
    }
    return {
        "when": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "a CPU", "kernel": "6.1", "python": "CPython 3.13"},
        "workloads": {name: {"servers": servers} for name in workloads},
    }


@pytest.mark.parametrize(
    ("measured", "titles"),
    [
        (("browser", "hello-64", "memory"), ["Hello world", "Browser-like GET"]),
        (
            ("hello-64", "files-100k", "files-1k"),
            ["Hello world", "Static file of 1 KiB", "Static file of 100 KiB"],
        ),
        (("files-1k",), ["Static file of 1 KiB"]),
    ],
)
def test_the_chart_has_a_panel_for_each_workload_that_was_measured(
    measured: tuple[str, ...], titles: list[str]
) -> None:
    drawn = chart.chart_of(_results(*measured))
    assert drawn is not None
    root = ET.fromstring(drawn)
    space = "{http://www.w3.org/2000/svg}"
    shown = [text.text or "" for text in root.findall(f"{space}text") if text.get("class") == "title"]
    assert len(shown) == len(titles)
    assert all(text.startswith(title) for text, title in zip(shown, titles, strict=True))
    assert len(root.findall(f"{space}rect")) == 2 * len(titles)


def test_there_is_no_chart_of_what_it_does_not_show() -> None:
    assert chart.chart_of(_results("memory")) is None


def test_the_panels_are_workloads() -> None:
    assert all(workloads.select([name]) for name, _ in chart.PANELS)


# -- compression, in one process ----------------------------------------------------------------------------


def _compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(_ROOT / "bench" / "compression.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT / "tests")


def test_compression_is_compared_row_by_row() -> None:
    pytest.importorskip("starlette")
    done = _compare("--size", "3000", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    rows = {line[:17].strip(): line[17:].split() for line in done.stdout.splitlines()[4:]}
    assert list(rows) == ["gzip 4", "gzip 5", "gzip 6", "br 4 : gzip 4", "br 4 : gzip 6"]
    for name, (ours, theirs, ratio, our_size, their_size, *held) in rows.items():
        assert float(ours) > 0 < float(theirs)
        assert float(ratio) > 0
        assert name.startswith("br") or our_size == their_size, "the same zlib at the same level"
        assert len(held) == 2


def test_an_answer_too_small_to_be_compressed_is_a_usage_error() -> None:
    done = _compare("--size", "100")
    assert done.returncode == 2
    assert "--size is at least 2000" in done.stderr


def test_a_side_that_answers_in_another_coding_is_an_error() -> None:
    pytest.importorskip("starlette")
    body = compression.make_body(3000)
    assert len(body) >= 3000
    side, _ = compression.make_sides("gzip", 4, 4, body)
    side.coding = "identity"
    with pytest.raises(RuntimeError, match="which are wrong"):
        trio.run(side.check, body)


def test_the_longest_step_of_a_task_is_what_the_loop_was_held() -> None:
    def spin(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    async def app(scope: object, receive: object, send: Callable[[object], Awaitable[None]]) -> None:
        await trio.to_thread.run_sync(spin, 0.02)
        spin(0.005)
        await send({"type": "http.response.start", "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    side = compression.Side(app, "gzip")
    trio.run(side.take_turn)
    assert 0.005 <= side.held < 0.02
    assert side.cpu_us[0] >= 25_000


def test_the_list_of_servers_and_workloads_is_printed_without_measuring() -> None:
    command = [sys.executable, str(_ROOT / "bench" / "run.py"), "--list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT / "tests")
    assert done.returncode == 0, done.stderr
    assert "hypercorn" in done.stdout
    assert "stream-10" in done.stdout


def test_a_wrong_name_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "wrk").touch(mode=0o755)
    command = [sys.executable, str(_ROOT / "bench" / "run.py"), "--servers", "gunicorn"]
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 2
    assert "no server 'gunicorn'" in done.stderr


def test_missing_wrk_is_explained_with_the_package() -> None:
    command = [sys.executable, str(_ROOT / "bench" / "run.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PATH": str(_ROOT / "tests")}
    )
    assert done.returncode == 2
    assert "apt install wrk" in done.stderr


def test_a_server_that_dies_in_mid_run_is_reported_with_code_and_words() -> None:
    source = (
        "import http.server, json, os, sys\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def log_message(self, *args): pass\n"
        "    def do_GET(self):\n"
        "        if self.path == '/die': print('out of luck', flush=True); os._exit(9)\n"
        "        body = json.dumps({'pid': os.getpid(), 'count': 0}).encode()\n"
        "        self.send_response(200); self.end_headers(); self.wfile.write(body)\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()\n"
    )
    mortal = servers.Server("mortal", (), "", lambda launch: ["-c", source, str(launch.port)])
    with (
        pytest.raises(TurnError, match=r"ended with code 9 .*out of luck"),
        servers.ServerProcess(mortal, "bench.apps:hello", servers.choose_cores()) as process,
    ):
        pid = process.pid
        process.fetch("GET", "/die")
    assert measure.process_tree(pid) == []


def test_workloads_of_another_run_come_whole_and_say_when() -> None:
    before = {
        "when": "then", "machine": {}, "versions": {"a": "1"}, "servers": {}, "method": {},
        "targets": [{"what": "x", "reached": 1.0}, {"what": "y", "reached": 2.0}],
        "workloads": {"w": {"title": "old"}, "v": {"title": "kept"}},
    }  # fmt: skip
    now = {
        "when": "now", "machine": {}, "versions": {"a": "2"}, "servers": {}, "method": {},
        "targets": [{"what": "x", "reached": 3.0}, {"what": "y", "reached": None}, {"what": "z", "reached": None}],
        "workloads": {"w": {"title": "new"}},
    }  # fmt: skip
    added = report.add_results(before, now)
    assert added["workloads"] == {"w": {"title": "new", "when": "now"}, "v": {"title": "kept"}}
    assert [target["reached"] for target in added["targets"]] == [3.0, 2.0, None]
    assert (added["when"], added["versions"]) == ("then", {"a": "2"})
