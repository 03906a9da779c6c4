"""What a death was: the table, the words, the report."""

from __future__ import annotations

import ctypes
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from trioserve.observe.in_flight import InFlight
from trioserve.structure.crash_report import SIZE_LIMIT, begin_report, complete_report, emit_report, serialise
from trioserve.supervisor.exit_report import (
    CrashHistory,
    ExitClass,
    WorkerDeath,
    build_exit_report,
    classify,
    completes_own_report,
    describe,
    split_last_words,
)


def death(status: int, **facts: Any) -> WorkerDeath:
    known: dict[str, Any] = {"was_ready": True, "asked": "", "uptime": 12.0, **facts}
    return WorkerDeath(worker_id=3, pid=4711, generation=2, status=status, **known)


OOM = {"memory_events_before": {"oom_kill": 1}, "memory_events_after": {"oom_kill": 2}}
NO_OOM = {"memory_events_before": {"oom_kill": 2}, "memory_events_after": {"oom_kill": 2}}


@pytest.mark.parametrize(
    "status, facts, kind",
    [
        (0, {"asked": "drain: reload"}, ExitClass.RECYCLED),
        (0, {"asked": "stop: SIGTERM"}, ExitClass.STOPPED),
        (0, {}, ExitClass.STOPPED),
        (3, {"was_ready": False}, ExitClass.BOOT),
        (4, {"was_ready": False}, ExitClass.BOOT),
        (1, {"was_ready": False}, ExitClass.BOOT),
        (1, {}, ExitClass.APP_ERROR),
        (7, {}, ExitClass.APP_ERROR),
        (75, {}, ExitClass.APP_ERROR),
        (75, {"asked": "drain: tainted by ValueError"}, ExitClass.APP_ERROR),
        (70, {}, ExitClass.OURS),
        (71, {}, ExitClass.OURS),
        (80, {}, ExitClass.HANG),
        (82, {"asked": "drain: reload"}, ExitClass.HANG),
        (83, {}, ExitClass.OUT_OF_MEMORY),
        (-signal.SIGKILL, {}, ExitClass.KILLED),
        (-signal.SIGKILL, NO_OOM, ExitClass.KILLED),
        (-signal.SIGKILL, OOM, ExitClass.OUT_OF_MEMORY),
        (-signal.SIGKILL, {**OOM, "asked": "kill: the drain took longer than 5 s"}, ExitClass.HANG),
        (-signal.SIGKILL, {**OOM, "asked": "kill: it sent what cannot be understood"}, ExitClass.KILLED),
        (-signal.SIGKILL, {**OOM, "asked": "drain: reload"}, ExitClass.OUT_OF_MEMORY),
        (
            -signal.SIGKILL,
            {"memory_events_after": {"oom_kill": 2}, "memory_events_before": {}},
            ExitClass.OUT_OF_MEMORY,
        ),
        (
            -signal.SIGKILL,
            {"memory_events_after": {}, "memory_events_before": {"oom_kill": 2}},
            ExitClass.KILLED,
        ),
        (137, NO_OOM, ExitClass.KILLED),
        (137, OOM, ExitClass.OUT_OF_MEMORY),
        (139, {}, ExitClass.NATIVE_CRASH),
        (134, {"was_ready": False}, ExitClass.NATIVE_CRASH),
        (143, {}, ExitClass.KILLED),
        (143, {"asked": "stop: SIGTERM"}, ExitClass.STOPPED),
        (130, {"asked": "stop: SIGINT"}, ExitClass.STOPPED),
        (200, {}, ExitClass.APP_ERROR),
        (0, {"asked": "recycle: max_requests"}, ExitClass.RECYCLED),
        (0, {"was_ready": False}, ExitClass.BOOT),
        (0, {"was_ready": False, "asked": "stop: SIGTERM"}, ExitClass.STOPPED),
        (71, {"was_ready": False}, ExitClass.BOOT),
        (75, {"was_ready": False}, ExitClass.BOOT),
        (78, {"was_ready": False}, ExitClass.BOOT),
        (70, {"was_ready": False}, ExitClass.OURS),
        (83, {"was_ready": False}, ExitClass.OUT_OF_MEMORY),
        (82, {}, ExitClass.HANG),
        (-signal.SIGSEGV, {"asked": "kill: no heartbeat for 30 s"}, ExitClass.NATIVE_CRASH),
        (-signal.SIGBUS, {"asked": "drain: reload"}, ExitClass.NATIVE_CRASH),
        (-signal.SIGHUP, {}, ExitClass.KILLED),
        (-200, {}, ExitClass.KILLED),
        (-signal.SIGKILL, {"asked": "kill: no heartbeat for 30 s"}, ExitClass.HANG),
        (80, {"asked": "kill: no heartbeat for 30 s"}, ExitClass.HANG),
        (-signal.SIGABRT, {"asked": "kill: no heartbeat for 30 s"}, ExitClass.HANG),
        (-signal.SIGSEGV, {}, ExitClass.NATIVE_CRASH),
        (-signal.SIGABRT, {}, ExitClass.NATIVE_CRASH),
        (-signal.SIGTERM, {}, ExitClass.KILLED),
        (-signal.SIGTERM, {"asked": "stop: SIGTERM", "was_ready": False}, ExitClass.STOPPED),
        (-signal.SIGKILL, {"asked": "end: SIGTERM", "was_ready": False}, ExitClass.STOPPED),
        (-signal.SIGKILL, {**OOM, "asked": "end: reload", "was_ready": False}, ExitClass.STOPPED),
    ],
)
def test_the_kind_of_end(status: int, facts: dict[str, Any], kind: ExitClass) -> None:
    assert classify(death(status, **facts)) is kind


def test_the_line_says_what_and_what_was_lost() -> None:
    lost = [InFlight("GET", f"/{number}", None) for number in range(5)]
    assert describe(death(-9, in_flight=lost)) == (
        "worker 3 (pid 4711) ended: killed, signal 9 (SIGKILL); after 12.0 s; "
        "5 requests in flight: GET /0, GET /1, GET /2 and 2 more"
    )
    assert "the app could not be imported" in describe(death(4, was_ready=False))
    assert "asked to drain: reload" in describe(death(0, asked="drain: reload"))


def test_only_an_end_that_was_wanted_is_planned() -> None:
    assert {kind for kind in ExitClass if kind.planned} == {ExitClass.RECYCLED, ExitClass.STOPPED}


def test_the_line_tells_what_the_worker_and_the_kernel_have_told() -> None:
    own = own_report(summary="ValueError: no\nsuch order", verdict="replace")
    assert "after 12.0 s; ValueError: no such order" in describe(death(75, own_report=own))
    assert "the kernel has killed for memory in this cgroup" in describe(death(-9, **OOM))
    assert "last heartbeat 30.0 s before" in describe(
        death(-9, asked="kill: no heartbeat", last_heartbeat=30.0)
    )


def test_nothing_that_a_worker_says_breaks_the_line() -> None:
    """A line of the log is one line, whatever is in it, and no terminal obeys it."""
    wild = "a\nb\r\x1b[31m\u2028password=hunter2 " + "x" * 100_000
    line = describe(
        death(
            75,
            asked=f"drain: {wild}",
            own_report=own_report(summary=wild),
            in_flight=[InFlight("GET", "/" + "y" * 100, None)],
        )
    )
    assert line.isprintable()
    assert "hunter2" not in line
    assert len(line) < 1000


# -- the report ----------------------------------------------------------------------------------------------


def own_report(**changes: Any) -> dict[str, Any]:
    return {
        "report": "crash",
        "id": "20261122T071753-4711-9e1e534e",
        "row": "A1",
        "verdict": "replace",
        "summary": "ValueError: no",
        "pid": 4711,
        **changes,
    }


def test_a_report_of_the_workers_own_is_completed_under_its_id() -> None:
    own = own_report()
    ended = death(75, own_report=own, last_statistics={"requests": 9})
    report = build_exit_report(ended)
    assert {name: report[name] for name in own} == own
    assert report["exit"]["class"] == "app error"
    assert report["exit"]["statistics"] == {"requests": 9}
    assert "exit" not in own
    assert completes_own_report(ended)


@pytest.mark.parametrize(
    "own",
    [
        own_report(verdict="contain"),  # it has gone on after that
        own_report(verdict=["replace"]),
        own_report(id="../../etc/cron.d/x"),
        own_report(id="20261122T071753-4711-9e1e534e/../x"),
        own_report(id="20261122T071753-4712-9e1e534e"),  # of another process
        own_report(id=7),
        own_report(id=None),
        {},
        "text",
        None,
    ],
)
def test_a_report_that_is_not_about_this_end_is_not_completed(own: Any) -> None:
    ended = death(7, own_report=own)
    report = build_exit_report(ended)
    assert not completes_own_report(ended)
    assert report["id"] != own_report()["id"]
    assert report["summary"].startswith("worker 3 (pid 4711) ended: app error, exit code 7")


def test_a_completed_report_takes_the_place_of_its_file(tmp_path: Path) -> None:
    own = begin_report(row="A1", verdict="replace", pid=4711)
    with open(os.devnull, "wb") as stderr:
        first = emit_report(own, str(tmp_path), stderr.fileno())
    # What it leaves that is ended while it writes.
    (tmp_path / f"crash-{own['id']}.tmp").write_text("half")
    complete_report(build_exit_report(death(75, own_report=own)), str(tmp_path))
    assert list(tmp_path.iterdir()) == [first]
    assert first is not None
    assert json.loads(first.read_text())["exit"]["class"] == "app error"
    assert first.stat().st_mode & 0o777 == 0o600


def test_a_new_report_has_what_the_parent_knows() -> None:
    stacks = (
        "Fatal Python error: Segmentation fault\n\nThread 0x1 (most recent call first):\n"
        '  File "/app/other.py", line 1 in other\n\n'
        "Current thread 0x2 (most recent call first):\n"
        f'  File "{ctypes.__file__}", line 517 in string_at\n'
        '  File "/app/shop.py", line 12 in pay\n  File "/app/main.py", line 3 in app\n\n'
        "Thread 0x3:\n"
    )
    report = build_exit_report(
        death(
            -11,
            stacks=stacks,
            in_flight=[InFlight("POST", "/pay", 100.0), InFlight("GET", "/", None)],
            last_heartbeat=0.5,
            last_statistics={"requests": 9, "connections": 4, "odd": ["hunter2"]},
        ),
        now=101.5,
    )
    parsed = json.loads(serialise(report))
    assert parsed == report
    assert (report["report"], report["row"], report["verdict"], report["pid"]) == (
        "crash",
        None,
        "fatal",
        4711,
    )
    assert report["signature"] == "native crash: signal 11 (SIGSEGV) at /app/shop.py:12"
    assert report["summary"].startswith("worker 3 (pid 4711) ended: native crash")
    assert report["worker"]["requests_served"] == 9
    assert report["worker"]["in_flight"] == 2
    assert report["versions"]["python"]
    ended = report["exit"]
    assert (ended["signal"], ended["status"], ended["was_ready"]) == ("SIGSEGV", -11, True)
    assert ended["stacks"] == stacks.splitlines()
    assert ended["in_flight"] == [
        {"method": "POST", "path": "/pay", "seconds": 1.5},
        {"method": "GET", "path": "/", "seconds": None},
    ]
    assert ended["statistics"] == {"requests": 9, "connections": 4}
    assert build_exit_report(death(-11))["id"] != report["id"]


@pytest.mark.parametrize(
    "stacks, place",
    [
        ("", ""),
        ("no frames here\n", ""),
        ('Thread 0x1 (most recent call first):\n  File "/app/x.py", line 7 in f\n', " at /app/x.py:7"),
        (f'Current thread 0x1:\n  File "{ctypes.__file__}", line 5 in f\n', f" at {ctypes.__file__}:5"),
    ],
)
def test_the_signature_has_the_place_if_there_is_one(stacks: str, place: str) -> None:
    report = build_exit_report(death(-6, stacks=stacks))
    assert report["signature"] == f"native crash: signal 6 (SIGABRT){place}"


def test_a_report_is_bounded_whatever_the_worker_has_left() -> None:
    ended = death(
        75,
        asked="drain: " + "x" * 1_000_000,
        stacks="password=hunter2 " * 100_000 + "\nline" * 100_000,
        in_flight=[InFlight("GET", "/" + "p" * 100, None)] * 4096,
        last_statistics={f"figure {number}": number for number in range(10_000)},
        own_report=own_report(
            tasks=["t" * 1000] * 1000, zzz="z" * 300_000, aaa="a" * 300_000, cut={"no": "list"}
        ),
    )
    line = serialise(build_exit_report(ended))
    report = json.loads(line)
    assert len(line) <= SIZE_LIMIT
    assert report["exit"]["class"] == "app error", "what the parent knows goes last"
    assert report["exit"]["in_flight"][-1] == "... (3896 more)"
    assert b"hunter2" not in line


def test_last_words_are_a_report_and_stacks() -> None:
    own = own_report(verdict="fatal")
    stacks = 'Fatal Python error: Aborted\n\n  File "/app/x.py", line 7 in f\n'
    line = serialise(own).decode()
    assert split_last_words(line + stacks) == (own, stacks)
    assert split_last_words(stacks) == (None, stacks)
    assert split_last_words(line[:50]) == (None, "")
    assert split_last_words('{"report":' + "[" * 100_000) == (None, "")
    assert split_last_words("") == (None, "")


# -- the history ---------------------------------------------------------------------------------------------


def test_the_history_keeps_the_last_and_answers_by_id() -> None:
    history = CrashHistory(most=2)
    reports = [build_exit_report(death(status)) for status in (75, 70, -9)]
    for report in reports:
        history.add(report)
    assert [entry["class"] for entry in history.summaries()] == ["killed", "ours"]
    assert [entry["exit"] for entry in history.summaries()] == ["signal 9 (SIGKILL)", "exit code 70"]
    assert set(history.summaries()[0]) == {"id", "time", "worker", "pid", "class", "exit", "summary"}
    assert history.get(reports[0]["id"]) is None
    assert history.get(reports[2]["id"]) == reports[2]
    assert repr(history) == "<CrashHistory 2 reports>"


def test_a_report_that_is_completed_later_replaces_itself() -> None:
    history = CrashHistory()
    history.add(own_report())
    assert (history.summaries()[0]["class"], history.summaries()[0]["exit"]) == (None, None)
    history.add(build_exit_report(death(75, own_report=own_report())))
    assert [entry["class"] for entry in history.summaries()] == ["app error"]


def test_the_history_is_bounded() -> None:
    history = CrashHistory()
    for _ in range(60):
        history.add(build_exit_report(death(-9)))
    history.add({**build_exit_report(death(-9)), "huge": "x" * 1_000_000})
    found = history.summaries()
    assert len(found) == 50
    whole = history.get(found[0]["id"])
    assert whole is not None
    assert len(json.dumps(whole)) <= SIZE_LIMIT
