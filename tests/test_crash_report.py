"""The crash report: what is in it, what never is, and the odd errors that it must survive."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import trioserve
from trioserve.observe.log_file import LogFile
from trioserve.structure import crash_report
from trioserve.structure.crash_report import (
    SIZE_LIMIT,
    RequestFacts,
    WorkerFacts,
    build_report,
    emit_report,
    serialise,
)
from trioserve.structure.error_tree import (
    describe_error,
    find_leaf,
    innermost_app_frame,
    redact,
    safe_message,
    signature,
    stack_as_traceback,
)

WORKER = WorkerFacts(uptime=12.5, requests_served=7, in_flight=2, connections=3, generation=1, drain="10 s")
REQUEST = RequestFacts(
    method="POST",
    path="/orders/7?token=SECRET-QUERY#SECRET-FRAGMENT",
    http_version="1.1",
    header_names=["host", "authorization", "cookie"],
    peer="192.0.2.1:4711",
    request_bytes=10,
    response_bytes=20,
    seconds=0.5,
    response_state="started",
)


def catch(function: Callable[[], object]) -> BaseException:
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("it did not raise")


def fail_with_secrets() -> None:
    password = "SECRET-LOCAL"  # noqa: F841 - what a report must not show
    raise ValueError("no such order")


def make_report(error: BaseException, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "row": "A1",
        "request": REQUEST,
        "worker": WORKER,
        "nth": 1,
        "verdict": "replace",
    }
    return build_report(error=error, **values | changes)


def emit(report: dict[str, Any], folder: Path | None = None) -> tuple[bytes, Path | None]:
    """The line on "stderr", which is a pipe, and the file."""
    reader, sender = os.pipe()
    received: list[bytes] = []

    def read() -> None:
        with os.fdopen(reader, "rb") as end:
            received.append(end.read())

    thread = threading.Thread(target=read)
    thread.start()
    path = emit_report(report, None if folder is None else str(folder), sender)
    os.close(sender)
    thread.join()
    return received[0], path


async def test_it_holds_what_is_worth_knowing() -> None:
    error = catch(fail_with_secrets)
    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(trio.sleep_forever, name="connection")
        await trio.testing.wait_all_tasks_blocked()
        report = make_report(error)
        nursery.cancel_scope.cancel()
    line = json.loads(serialise(report))
    assert "cut" not in line
    assert (line["row"], line["verdict"], line["nth"], line["pid"]) == ("A1", "replace", 1, os.getpid())
    assert line["signature"] == f"ValueError at {__file__}:{fail_with_secrets.__code__.co_firstlineno + 2}"
    assert line["summary"] == "ValueError: no such order"
    assert line["time"].endswith("Z")
    assert line["worker"]["requests_served"] == 7
    assert line["request"] == {
        "method": "POST",
        "path": "/orders/7",
        "http_version": "1.1",
        "header_names": ["host", "authorization", "cookie"],
        "peer": "192.0.2.1:4711",
        "request_bytes": 10,
        "response_bytes": 20,
        "seconds": 0.5,
        "response_state": "started",
        "connection_id": 0,
        "request_number": 0,
    }
    frames = line["error"]["frames"]
    assert [frame["function"] for frame in frames] == ["catch", "fail_with_secrets"]
    assert frames[-1]["code"] == 'raise ValueError("no such order")'
    assert line["statistics"]["tasks_living"] > 30
    assert line["statistics"]["seconds_to_next_deadline"] is None  # there is none: JSON has no infinity
    assert any("30 x connection" in entry for entry in line["tasks"])
    assert line["process"]["open_fds"] > 2
    assert line["process"]["rss_bytes"] > 1_000_000
    assert len(line["process"]["gc_counts"]) == 3
    assert line["versions"]["trio"] == trio.__version__
    assert line["versions"]["trioserve"] == trioserve.__version__
    assert line["versions"]["h11"] is not None or "h11" not in sys.modules
    mine = [thread for thread in line["threads"] if thread["current"]]
    assert mine[0]["name"] == "MainThread"
    assert any(frame.get("function") == "build_report" for frame in mine[0]["frames"])


def test_it_holds_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIOSERVE_TEST_KEY", "SECRET-ENVIRONMENT")
    local = "SECRET-LOCAL-HERE"  # noqa: F841
    report = make_report(catch(fail_with_secrets))
    line = serialise({**report, "odd": REQUEST}).decode()
    # Where the source line itself holds the word, as in this file, it is shown: that is code.
    frames = json.dumps(report["error"]["frames"]) + json.dumps(report["threads"])
    for secret in ("SECRET-QUERY", "SECRET-FRAGMENT", "SECRET-ENVIRONMENT", "SECRET-LOCAL"):
        assert line.count(secret) == frames.count(secret) == 0, secret
    assert json.loads(line)["odd"] == "<RequestFacts>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot reach postgres://ann:pw@db:5432/x", "cannot reach postgres://***@db:5432/x"),
        ("GET https://h/p?a=1&key=2 failed", "GET https://h/p?*** failed"),
        ("password=hunter2, user=ann", "password=***, user=ann"),
        ("{'api_key': 'abc', 'n': 1}", "{'api_key': '***', 'n': 1}"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("DB_PASSWORD = x", "DB_PASSWORD = ***"),
        ("why? because", "why? because"),
        ("KeyError: 'name'", "KeyError: 'name'"),
    ],
)
def test_messages_lose_the_usual_secrets(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_messages_are_cut_and_redacting_takes_no_long_time() -> None:
    for piece in ("x", "a://", "password", "password=", "-", "token:\t", "a://b?", " "):
        start = time.thread_time()
        assert len(safe_message(ValueError(piece * 1_000_000))) < 600
        assert time.thread_time() - start < 5


def test_a_file_and_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    line, path = emit(make_report(catch(fail_with_secrets)), folder)
    assert path is not None
    assert path.read_bytes() == line
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    assert path.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert path.name == f"crash-{json.loads(line)['id']}.json"
    _, second = emit(make_report(catch(fail_with_secrets)), folder)
    assert sorted(folder.iterdir()) == sorted([path, second])  # type: ignore[type-var]


def test_a_regular_file_as_stderr(tmp_path: Path) -> None:
    with open(tmp_path / "stderr", "w+b") as file:
        assert emit_report(make_report(catch(fail_with_secrets)), None, file.fileno()) is None
    assert json.loads((tmp_path / "stderr").read_bytes())["row"] == "A1"


def test_a_folder_that_cannot_be_written_costs_only_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    line, path = emit(make_report(catch(fail_with_secrets)), tmp_path / "file")
    assert path is None
    first, second, _ = line.split(b"\n")
    assert first.startswith(b"trioserve: cannot write a crash report to ")
    assert json.loads(second)["row"] == "A1"


def test_an_unfinished_file_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = make_report(catch(fail_with_secrets))
    (tmp_path / f"crash-{report['id']}.json").mkdir()  # so that the last step fails
    _, path = emit(report, tmp_path)
    assert path is None
    assert [entry.name for entry in tmp_path.iterdir()] == [f"crash-{report['id']}.json"]


def test_a_stderr_that_nobody_reads_does_not_hold_it_up_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crash_report, "STDERR_PATIENCE", 0.1)
    report = make_report(catch(fail_with_secrets)) | {"extra": "x" * 200_000}
    for blocking in (True, False):
        reader, sender = os.pipe()
        os.set_blocking(sender, blocking)
        start = time.monotonic()
        assert emit_report(report, str(tmp_path), sender) is not None
        assert time.monotonic() - start < 20
        os.close(reader)
        assert emit_report(report, None, sender) is None  # EPIPE
        os.close(sender)
        assert emit_report(report, None, sender) is None  # EBADF


def test_a_long_report_has_no_log_lines_in_its_middle() -> None:
    """Both go to stderr, which is one pipe, and a report is longer than what a pipe takes in one piece."""
    reader, sender = os.pipe()
    report = make_report(catch(fail_with_secrets)) | {"extra": "x" * 30_000}
    stop = threading.Event()
    received = bytearray()

    def read() -> None:
        while part := os.read(reader, 65536):
            received.extend(part)

    def log() -> None:
        with open(sender, "w", closefd=False) as stream:
            file = LogFile(stream, 1_000_000)
            while not stop.is_set():
                file.write_lines([b"a log line\n"])
                file.flush()
            file.close()

    threads = [threading.Thread(target=log), threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        emit_report(report, None, sender)
    stop.set()
    threads[0].join()
    os.close(sender)
    threads[1].join()
    os.close(reader)
    lines = bytes(received).splitlines()
    assert lines.count(b"a log line") > 50
    reports = [json.loads(line) for line in lines if line != b"a log line"]
    assert [found["extra"] for found in reports] == ["x" * 30_000] * 50


def test_every_part_is_bounded_together() -> None:
    def deep(depth: int) -> None:
        if depth:
            deep(depth - 1)
        raise ValueError("x" * 100_000)

    members = []
    for number in range(100):
        try:
            try:
                deep(50)
            finally:
                raise KeyError("y" * 100_000, number)
        except KeyError as error:
            members.append(error)
    request = RequestFacts("M" * 9999, "/" * 99_999, "1.1", ["n" * 999] * 9999, None, 0, 0, 0.0, "none")
    report = make_report(ExceptionGroup("g" * 9999, members), request=request)
    assert report["request"]["header_names"][-1] == "... (9899 more)"
    line = serialise(report)
    assert len(line) <= SIZE_LIMIT
    assert json.loads(line)["error"]["members"] == 100


def test_a_report_that_is_too_long_loses_its_bulk_and_says_so() -> None:
    report = make_report(catch(fail_with_secrets))
    report["tasks"] = ["x" * 100] * 10_000
    line = json.loads(serialise(report))
    assert len(line["tasks"]) == 21
    assert line["cut"] == ["tasks: too long"]
    report["mine"] = "y" * 300_000
    line = json.loads(serialise(report))
    assert len(serialise(report)) <= SIZE_LIMIT
    assert "mine: the report was too long" in line["cut"]
    assert line["signature"].startswith("ValueError at")
    report["row"] = "z" * 300_000
    line = json.loads(serialise(report))
    assert line["cut"] == ["all but this: the report was too long"]
    assert line["signature"].startswith("ValueError at")


def test_values_that_json_does_not_know() -> None:
    circle: dict[str, Any] = {}
    circle["self"] = circle
    report = {
        "id": "x",
        "nan": float("nan"),
        "bytes": b"secret",
        3: {1, 2},
        "circle": circle,
        "lone": "\udcff",
    }
    line, _ = emit(report)
    parsed = json.loads(line)
    assert (parsed["nan"], parsed["bytes"], parsed["3"], parsed["lone"]) == (
        None,
        "<bytes>",
        "<set>",
        "\udcff",
    )

    class Hostile(dict[str, Any]):
        def items(self) -> Any:
            raise RuntimeError("no items")

        def get(self, *args: Any) -> Any:
            raise RuntimeError("no values")

    line, _ = emit(Hostile())
    assert "everything" in json.loads(line)["cut"][0]


class Unprintable(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)

    def __repr__(self) -> str:
        raise RuntimeError


class NotText(Exception):
    def __str__(self) -> str:
        return 3  # type: ignore[return-value]


def make_circle() -> BaseException:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__ = second
    second.__cause__ = first
    return first


def make_own_cause() -> BaseException:
    error = ValueError("own")
    error.__cause__ = error
    return error


def make_chain() -> BaseException:
    error: BaseException = ValueError(0)
    for number in range(100_000):
        previous, error = error, ValueError(number)
        error.__context__ = previous
    return error


def make_nest() -> BaseException:
    error: Exception = ValueError("innermost")
    for _ in range(10_000):
        error = ExceptionGroup("nest", [error])
    return error


def make_wide() -> BaseException:
    return ExceptionGroup("wide", [catch(fail_with_secrets) for _ in range(10_000)])  # type: ignore[misc]


def make_distinct() -> BaseException:
    return ExceptionGroup("distinct", [ValueError(number) for number in range(10_000)])


def recurse() -> None:
    recurse()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Unprintable("x"),
        lambda: NotText("x"),
        lambda: ExceptionGroup("odd", [Unprintable("x"), NotText("y")]),
        make_circle,
        make_own_cause,
        make_chain,
        make_nest,
        make_wide,
        make_distinct,
        lambda: catch(recurse),
        lambda: catch(lambda: compile("1 +", "<x>", "eval")),
        lambda: SystemExit(),
        lambda: KeyboardInterrupt(),
        lambda: MemoryError(),
        lambda: catch(lambda: b"\xff".decode()),
    ],
)
def test_odd_errors(make: Callable[[], BaseException]) -> None:
    error = make()
    start = time.thread_time()
    report = make_report(error)
    line, _ = emit(report)
    assert time.thread_time() - start < 20
    assert len(line) <= SIZE_LIMIT
    parsed = json.loads(line)
    assert "cut" not in parsed
    assert parsed["error"]["type"] == type(error).__qualname__ or "." in parsed["error"]["type"]
    error.__cause__ = error.__context__ = None  # a chain of 100,000 must not be freed recursively


def test_what_is_said_of_odd_errors() -> None:
    assert safe_message(Unprintable()) == "<str() of it raised SystemExit>"
    described = describe_error(make_circle())
    assert described["cause"]["cause"] == {"type": "ValueError", "seen": "above, or the chain is a circle"}
    described = describe_error(make_wide())
    assert described["members"] == 10_000
    assert [entry["count"] for entry in described["exceptions"]] == [1000]
    assert described["left_out"] == 9000
    described = describe_error(catch(recurse))
    assert sum("left_out" in frame for frame in described["frames"]) == 1
    assert len(described["frames"]) == 31
    noted = ValueError("x")
    noted.add_note("password=abc")
    assert describe_error(noted)["notes"] == ["password=***"]
    broken = ValueError("x")
    broken.__notes__ = "no list"  # type: ignore[assignment]
    assert "notes" not in describe_error(broken)
    suppressed = catch(lambda: exec("try: 1/0\nexcept Exception: raise KeyError from None"))
    assert "context" not in describe_error(suppressed)
    assert (
        describe_error(catch(lambda: exec("try: 1/0\nexcept Exception: raise KeyError")))["context"]["type"]
        == "ZeroDivisionError"
    )


async def test_a_cancelled_tells_its_reason() -> None:
    with trio.CancelScope() as scope:
        scope.cancel(reason="late: request_head")
        with pytest.raises(trio.Cancelled) as caught:
            await trio.sleep_forever()
    error = caught.value
    described = describe_error(error)
    assert described["cancelled"]["source"] == "explicit"
    assert described["cancelled"]["reason"] == "late: request_head"
    group = BaseExceptionGroup("mixed", [error, ValueError("the real one")])
    assert find_leaf(group).args == ("the real one",)
    assert find_leaf(BaseExceptionGroup("only", [error])) is error


# -- signatures ---------------------------------------------------------------------------------------------


def load_module(path: Path, source: str) -> types.ModuleType:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_signature_is_the_apps_innermost_frame(tmp_path: Path) -> None:
    app = load_module(
        tmp_path / "app.py", "import json\n\ndef view(call):\n    json.loads('{')\n    call()\n"
    )
    assert signature(catch(lambda: app.view(None))) == f"json.decoder.JSONDecodeError at {tmp_path}/app.py:4"
    library = tmp_path / "lib" / "site-packages"
    starlette = load_module(library / "starlette" / "routing.py", "def run(call):\n    call()\n")
    # An app is called by a framework, and calls a library.
    helper = load_module(library / "helper.py", "def broken():\n    raise KeyError\n")
    app = load_module(tmp_path / "app.py", "def view(call):\n    call()\n")
    error = catch(lambda: starlette.run(lambda: app.view(helper.broken)))
    # The lambda of this very test is "the app" as well, but further out.
    assert signature(error) == f"KeyError at {tmp_path}/app.py:2"


def test_an_installed_app_is_told_from_its_framework(tmp_path: Path) -> None:
    library = tmp_path / "lib" / "dist-packages"
    framework = load_module(library / "starlette" / "x.py", "def fail():\n    raise OSError\n")
    app = load_module(library / "shop" / "views.py", "def view(call):\n    call()\n")
    error = catch(lambda: app.view(framework.fail))
    assert error.__traceback__ is not None
    # Without the frames of this file, which are "the app's" as well.
    within = error.__traceback__.tb_next
    assert within is not None
    error.__traceback__ = within.tb_next
    assert signature(error) == f"OSError at {library}/shop/views.py:2"
    assert error.__traceback__ is not None
    error.__traceback__ = error.__traceback__.tb_next
    assert signature(error) == f"OSError at {library}/starlette/x.py:2"
    error.__traceback__ = None
    assert signature(error) == "OSError at no traceback"


def test_the_signature_of_a_group_is_that_of_its_first_leaf() -> None:
    inner = catch(fail_with_secrets)
    group = ExceptionGroup("outer", [ExceptionGroup("inner", [inner])])  # type: ignore[list-item]
    assert signature(group) == signature(inner)
    first = signature(catch(lambda: int("x")))
    second = signature(catch(lambda: int("y")))
    assert first != second


# -- memory -------------------------------------------------------------------------------------------------


def test_a_memory_error_gives_the_ballast_back_and_the_next_report_has_it_again() -> None:
    report = make_report(MemoryError())
    assert crash_report._ballast == []
    emit(report)
    assert len(crash_report._ballast) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is not enforced elsewhere")
def test_it_is_written_while_memory_is_really_gone(tmp_path: Path) -> None:
    script = """
import resource, sys
from trioserve.structure.crash_report import WorkerFacts, build_report, emit_report
now = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (now + (32 << 20), resource.RLIM_INFINITY))
hoard = []
size = 16 << 20
error = None
while size > 64:
    try:
        hoard.append(bytearray(size))
    except MemoryError as problem:
        error = problem
        size //= 2
path = emit_report(
    build_report(row="M1", error=error, request=None, worker=WorkerFacts(1.0, 2, 3), nth=1), sys.argv[1]
)
hoard.clear()
assert path is not None
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    parsed = json.loads(done.stderr)
    assert parsed["row"] == "M1"
    assert parsed["signature"].startswith("MemoryError at")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [done.stderr]


async def test_another_thread_may_show_the_tasks_of_a_run() -> None:
    """As the watchdog does, when the run itself cannot any more."""
    root = trio.lowlevel.current_root_task()
    report = await trio.to_thread.run_sync(lambda: make_report(TimeoutError("too long"), root=root))
    assert any("test_another_thread" in entry for entry in report["tasks"])
    assert report["statistics"] is None


def test_a_part_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise MemoryError

    monkeypatch.setattr(crash_report, "_describe_process", fail)
    report = make_report(ValueError("x"))
    assert report["cut"] == ["process: MemoryError while it was gathered"]
    assert crash_report._ballast == []
    emit(report)


# -- a stack without an exception ---------------------------------------------------------------------------


def go_down(depth: int) -> types.FrameType:
    return go_down(depth - 1) if depth else sys._getframe()


def test_a_running_stack_passes_for_a_traceback() -> None:
    error = TimeoutError("late").with_traceback(stack_as_traceback(go_down(2)))
    frames = describe_error(error)["frames"]
    assert [frame["function"] for frame in frames[-4:]] == [
        "test_a_running_stack_passes_for_a_traceback", *["go_down"] * 3,
    ]  # fmt: skip
    found = innermost_app_frame(error.__traceback__)
    assert found is not None
    assert (found[0], found[2]) == (__file__, "go_down")
    assert signature(error) == f"TimeoutError at {found[0]}:{found[1]}"


def test_a_running_stack_is_cut_where_it_is_asked_to_be() -> None:
    inner, here = go_down(100), sys._getframe()
    for most, outermost, length in [(10, None, 10), (1000, here, 102), (1000, inner, 1)]:
        tb = stack_as_traceback(inner, outermost, most=most)
        count = 0
        while tb is not None:
            count, tb = count + 1, tb.tb_next
        assert count == length


def test_there_is_no_place_without_a_traceback() -> None:
    assert innermost_app_frame(None) is None
    assert signature(TimeoutError()) == "TimeoutError at no traceback"
