"""The benchmark's own arithmetic: what it parses, what it computes, what it draws."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the benchmark reads /proc")

if sys.platform.startswith("linux"):
    from bench import (
        chart,
        compression,
        h2_load,
        load,
        measure,
        process,
        report,
        servers,
        targets,
        tls_load,
        websocket_client,
        websocket_load,
        workloads,
    )
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
        process.ServerProcess(broken, "bench.apps:hello", cores),
    ):
        pytest.fail("it must not get this far")


# -- HTTP/2 -------------------------------------------------------------------------------------------------

_H2LOAD = """
Application protocol: h2
finished in 2.01s, 100.50 req/s, 4.20KB/s
requests: 201 total, 329 started, 201 done, 201 succeeded, %d failed, 0 errored, 0 timeout
status codes: %d 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 8.42KB (8623) total, 2.10KB (2150) headers (space savings 80.00%%), 2.75KB (2814) data
                     min         max         mean         sd        +/- sd
time for request:     1.14ms     12.30ms      3.50ms      1.20ms    70.00%%
"""


def test_what_h2load_prints_is_parsed() -> None:
    result = h2_load.parse_h2load(_H2LOAD % (0, 201))
    assert (result["requests"], result["good"], result["data"], result["mean_us"]) == (201, 201, 2814, 3500)
    with pytest.raises(TurnError, match="not as expected"):
        h2_load.parse_h2load("Application protocol: h2\n")


def test_http_1_under_h2load_does_not_count_as_http_2() -> None:
    with pytest.raises(TurnError, match=r"http/1\.1 instead of HTTP/2"):
        h2_load.parse_h2load(_H2LOAD.replace("protocol: h2", "protocol: http/1.1") % (0, 201))


@pytest.mark.parametrize(
    ("failed", "good", "calls", "words"),
    [
        (0, 201, 200, "the application 200 calls"),
        (0, 201, 330, "the application 330 calls"),
        (3, 201, 201, "not good"),
        (0, 200, 201, "not good"),
    ],
)
def test_h2load_and_application_must_agree(failed: int, good: int, calls: int, words: str) -> None:
    (hello,) = workloads.select(["h2-hello"])
    h2_load.check_h2_result(h2_load.parse_h2load(_H2LOAD % (0, 201)), 329, hello)
    with pytest.raises(TurnError, match=words):
        h2_load.check_h2_result(h2_load.parse_h2load(_H2LOAD % (failed, good)), calls, hello)


# -- WebSocket ----------------------------------------------------------------------------------------------


def test_frames_are_those_of_the_standard() -> None:
    # RFC 6455, 5.7.
    assert websocket_client.frame(1, b"Hello") == bytes.fromhex("810548656c6c6f")
    masked = websocket_client.frame(1, b"Hello", mask=bytes.fromhex("37fa213d"))
    assert masked == bytes.fromhex("818537fa213d7f9f4d5158")
    assert websocket_client.frame(2, bytes(256))[:4] == bytes.fromhex("827e0100")
    assert websocket_client.frame(2, bytes(65536))[:10] == bytes.fromhex("827f0000000000010000")


@pytest.mark.parametrize("size", [0, 125, 126, 65535, 65536])
def test_the_end_of_a_frame_is_found_once_it_is_there(size: int) -> None:
    whole = websocket_client.frame(1, bytes(size))
    assert websocket_client.frame_end(whole) == websocket_client.frame_end(whole + b"more") == len(whole)
    assert [end for end in range(len(whole)) if websocket_client.frame_end(whole[:end])] == []


@pytest.mark.parametrize("size", [32, 1024])
def test_messages_are_text_of_one_size_and_all_different(size: int) -> None:
    script = websocket_client.write_script(size, seed=1, number=200)
    assert {len(text) for text in script.texts} == {size}
    assert len(set(script.texts)) == len(set(script.sent)) == 200
    assert all(text.decode() for text in script.texts)
    assert script.texts != websocket_client.write_script(size, seed=2, number=200).texts


def test_compressed_messages_keep_to_the_window_that_was_agreed() -> None:
    script = websocket_client.write_script(1024, seed=1, deflate_bits=9, number=3)
    for sent, text in zip(script.sent, script.texts, strict=True):
        start = 6 if sent[1] & 0x7F < 126 else 8
        mask = sent[start - 4 : start]
        packed = bytes(byte ^ mask[i % 4] for i, byte in enumerate(sent[start:]))
        assert sent[0] == 0xC1
        assert zlib.decompressobj(-9).decompress(packed + b"\0\0\xff\xff") == text


def _member(deflate_bits: int = 0) -> tuple[websocket_client.Member, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(10)
    return websocket_client.Member(ours, deflate_bits), theirs


def test_an_answer_is_taken_when_all_of_it_is_there() -> None:
    member, server = _member()
    with member.socket, server:
        member.expected = websocket_client.frame(1, b"hello")
        server.sendall(member.expected[:3])
        assert not member.take(b"hello")
        server.sendall(member.expected[3:])
        assert member.take(b"hello")
        assert not member.take(b"hello"), "there is nothing"


def test_a_ping_between_messages_is_answered() -> None:
    member, server = _member()
    with member.socket, server:
        member.expected = websocket_client.frame(1, b"hello")
        server.sendall(websocket_client.frame(9, b"are you there"))
        assert not member.take(b"hello")
        server.sendall(websocket_client.frame(9, b"") + member.expected)
        assert member.take(b"hello")
        pongs = server.recv(4096)
    assert pongs == websocket_client.frame(
        10, b"are you there", mask=b"\x01\x02\x03\x04"
    ) + websocket_client.frame(10, b"", mask=b"\x01\x02\x03\x04")


@pytest.mark.parametrize(
    "wrong",
    [
        b"\x81\x05hallo",
        b"\x82\x05hello",  # not text
        b"\x81\x05hello" * 2,
        b"\x88\x02\x03\xe8",  # a close
        None,  # the end
    ],
)
def test_any_other_answer_fails_the_turn(wrong: bytes | None) -> None:
    member, server = _member()
    with member.socket, server:
        member.expected = websocket_client.frame(1, b"hello")
        if wrong is None:
            server.close()
        else:
            server.sendall(wrong)
        with pytest.raises(TurnError):
            member.take(b"hello")


def test_a_compressed_answer_is_compared_by_its_text() -> None:
    member, server = _member(deflate_bits=15)
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    with member.socket, server:
        for text in (b"hello, hello", b"hello, again"):  # the second refers to the first
            packed = packer.compress(text) + packer.flush(zlib.Z_SYNC_FLUSH)
            server.sendall(websocket_client.frame(1, packed[:-4], compressed=True))
            assert member.take(text)
        server.sendall(websocket_client.frame(1, packer.compress(b"bye") + packer.flush(zlib.Z_SYNC_FLUSH)))
        with pytest.raises(TurnError):
            member.take(b"hello, again")


def _turn_of_trioserve(name: str, turn: Callable[..., Turn], **changes: object) -> dict[str, float]:
    (workload,) = workloads.select([name])
    workload = dataclasses.replace(workload, **changes)  # type: ignore[arg-type]
    cores = servers.Cores(server=-1, load=-1)
    settings = load.Settings(cores, seconds=0.2, warm_up_seconds=0.1)
    (ours,) = (server for server in servers.SERVERS if server.name == "trioserve")
    return turn(ours, workload, settings, 1).figures


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ws-echo-32", "ws-echo-1k", "ws-echo-deflate"])
def test_an_echo_is_measured(name: str) -> None:
    found = _turn_of_trioserve(name, websocket_load.take_echo_turn, connections=4)
    assert found["requests"] > 4
    assert found["cpu_us"] > 0


@pytest.mark.slow
def test_a_broadcast_counts_every_message_that_arrived() -> None:
    found = _turn_of_trioserve("ws-broadcast", websocket_load.take_broadcast_turn, connections=20)
    assert found["requests"] % 20 == 0
    assert found["per_cpu_second"] == pytest.approx(1e6 / found["cpu_us"])


@pytest.mark.slow
@pytest.mark.parametrize("resumed", [False, True])
def test_handshakes_are_full_or_resumed_as_was_asked(resumed: bool) -> None:
    pytest.importorskip("trustme")
    found = _turn_of_trioserve(
        "tls-handshakes", tls_load.take_handshakes_turn, connections=4, resumed=resumed
    )
    assert found["requests"] > 4


def test_a_workload_says_what_its_load_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    (hello, secure) = workloads.select(["hello-64", "h2-hello"])
    monkeypatch.setattr(workloads, "find_program", lambda name: None)
    monkeypatch.setattr(workloads, "find_module", lambda name: False)
    assert hello.missing == []
    assert [what.partition(" ")[0] for what in secure.missing] == ["h2load", "trustme"]


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


def test_a_target_that_is_only_written_down_is_never_missed() -> None:
    target = targets.Target("h2-hello", 4.0, math.inf, "granian")
    results = {"h2-hello": {"trioserve": _turns(90.0), "granian": _turns(1.0)}}
    (verdict,) = targets.judge(results, [target])
    assert verdict.word == "at least"
    assert json.loads(json.dumps(verdict.as_json(), allow_nan=False))["at_least"] is None


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
        process.ServerProcess(mortal, "bench.apps:hello", servers.choose_cores()) as running,
    ):
        pid = running.pid
        running.fetch("GET", "/die")
    assert measure.process_tree(pid) == []


def test_workloads_of_another_run_come_whole_and_say_when() -> None:
    before = {
        "when": "then", "machine": {}, "versions": {"a": "1"}, "servers": {}, "method": {},
        "targets": [{"what": "x", "reached": 1.0}, {"what": "y", "reached": 2.0}],
        "workloads": {"w": {"title": "old"}, "v": {"title": "kept"}},
    }  # fmt: skip
    now = {
        "when": "now", "machine": "m", "versions": {"a": "2"}, "servers": {}, "method": {},
        "targets": [{"what": "x", "reached": 3.0}, {"what": "y", "reached": None}, {"what": "z", "reached": None}],
        "workloads": {"w": {"title": "new"}},
    }  # fmt: skip
    added = report.add_results(before, now)
    assert added["workloads"] == {
        "w": {"title": "new", "when": "now", "machine": "m"},
        "v": {"title": "kept"},
    }
    assert [target["reached"] for target in added["targets"]] == [3.0, 2.0, None]
    assert (added["when"], added["versions"]) == ("then", {"a": "2"})
