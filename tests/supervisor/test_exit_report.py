"""What a death was: the table, the words, the report."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from trioserve.observe.in_flight import InFlight
from trioserve.supervisor.exit_report import (
    CrashHistory,
    ExitClass,
    WorkerDeath,
    build_exit_report,
    classify,
    describe,
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
        (-signal.SIGKILL, {**OOM, "asked": "kill: the drain took longer than 5 s"}, ExitClass.KILLED),
        (-signal.SIGKILL, {"asked": "kill: no heartbeat for 30 s"}, ExitClass.HANG),
        (80, {"asked": "kill: no heartbeat for 30 s"}, ExitClass.HANG),
        (-signal.SIGABRT, {"asked": "kill: no heartbeat for 30 s"}, ExitClass.HANG),
        (-signal.SIGSEGV, {}, ExitClass.NATIVE_CRASH),
        (-signal.SIGABRT, {}, ExitClass.NATIVE_CRASH),
        (-signal.SIGTERM, {}, ExitClass.KILLED),
        (-signal.SIGTERM, {"asked": "stop: SIGTERM", "was_ready": False}, ExitClass.STOPPED),
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


def test_a_report_of_the_workers_own_is_completed_under_its_id() -> None:
    own = {
        "report": "crash",
        "id": "x1",
        "row": "A1",
        "verdict": "replace",
        "summary": "ValueError: no",
        "pid": 4711,
    }
    report = build_exit_report(death(75, own_report=own, last_statistics={"requests": 9}))
    assert {name: report[name] for name in own} == own
    assert report["exit"]["class"] == "app error"
    assert report["exit"]["statistics"] == {"requests": 9}
    assert "exit" not in own


def test_a_new_report_has_what_the_parent_knows() -> None:
    report = build_exit_report(
        death(
            -11,
            stacks="Fatal Python error\n  File x",
            in_flight=[InFlight("POST", "/pay", None)],
            last_heartbeat=0.5,
        )
    )
    json.dumps(report)
    assert report["exit"]["signal"] == "SIGSEGV"
    assert report["exit"]["stacks"] == ["Fatal Python error", "  File x"]
    assert report["exit"]["in_flight"] == [{"method": "POST", "path": "/pay"}]
    assert report["summary"].startswith("worker 3 (pid 4711) ended: native crash")
    assert build_exit_report(death(-11))["id"] != report["id"]


def test_the_history_keeps_the_last_and_answers_by_id() -> None:
    history = CrashHistory(most=2)
    reports = [build_exit_report(death(status)) for status in (75, 70, -9)]
    for report in reports:
        history.add(report)
    assert [entry["class"] for entry in history.summaries()] == ["killed", "ours"]
    assert [entry["exit"] for entry in history.summaries()] == ["signal 9 (SIGKILL)", "exit code 70"]
    assert history.get(reports[0]["id"]) is None
    assert history.get(reports[2]["id"]) == reports[2]
