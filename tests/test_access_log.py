"""The access log: each atom, JSON, what a hostile client can write into a line, and where lines go."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypercorn.config import Config
from hypothesis import given
from hypothesis import strategies as st

from trioserve.errors import ConfigError
from trioserve.observe.access_log import AccessEntry, AccessLog, compile_format, escape, format_json
from trioserve.observe.log_writer import LogWriter

STARTED = 1_767_323_045.25  # 2026-01-02T03:04:05.25Z
REQUEST_HEADERS = [(b"host", b"example.org"), (b"user-agent", b"curl/8"), (b"referer", b"http://there/")]


def make_entry(**changes: Any) -> AccessEntry:
    values: dict[str, Any] = {
        "started_at": STARTED,
        "client": ("192.0.2.1", 4711),
        "server": ("127.0.0.1", 8000),
        "scheme": "http",
        "method": "GET",
        "target": b"/a%20b?x=1&y=2",
        "http_version": "1.1",
        "request_headers": REQUEST_HEADERS,
        "status": 200,
        "response_headers": [(b"Content-Type", b"text/plain"), (b"content-length", b"99")],
        "request_bytes": 12,
        "response_bytes": 34,
        "seconds": 1.25,
        "head_seconds": 1.0,
        "outcome": "complete",
        "connection_id": 5,
        "request_number": 6,
        "error": None,
    }
    return AccessEntry(**values | changes)


def render(text: str, **changes: Any) -> str:
    return compile_format(text)(make_entry(**changes))


@pytest.fixture
def writer() -> Iterator[LogWriter]:
    made = LogWriter(linger=0.005)
    yield made
    made.close(0.2)


@pytest.fixture
def utc_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def set_zone(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    set_zone("UTC")
    yield set_zone
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("atom", "changes", "expected"),
    [
        ("h", {}, "192.0.2.1:4711"),
        ("h", {"client": ("2001:db8::1", 4711)}, "[2001:db8::1]:4711"),
        ("h", {"client": ("/run/app.sock", None)}, "/run/app.sock"),
        ("h", {"client": None}, "-"),
        ("l", {}, "-"),
        ("u", {}, "-"),
        (
            "u",
            {"request_headers": [(b"authorization", b"Basic " + base64.b64encode(b"ann b:pw"))]},
            "ann\\x20b",
        ),
        ("u", {"request_headers": [(b"authorization", b"Basic !!")]}, "-"),
        ("u", {"request_headers": [(b"authorization", b"Basic " + base64.b64encode(b":pw"))]}, "-"),
        ("u", {"request_headers": [(b"authorization", b"Bearer abc")]}, "-"),
        ("r", {}, "GET /a%20b 1.1"),
        ("R", {}, "GET /a%20b?x=1&y=2 1.1"),
        ("m", {}, "GET"),
        ("U", {}, "/a%20b"),
        ("Uq", {}, "/a%20b?x=1&y=2"),
        ("Uq", {"target": b"http://h:1/p?u=http://x/"}, "/p?u=http://x/"),
        ("Uq", {"target": b"http://host"}, "/"),
        ("U", {"target": b"http://host?q"}, ""),
        ("U", {"target": b"*"}, "*"),
        ("q", {}, "x=1&y=2"),
        ("q", {"target": b"/"}, ""),
        ("H", {}, "1.1"),
        ("s", {}, "200"),
        ("s", {"status": None}, "-"),
        ("st", {}, "OK"),
        ("st", {"status": 299}, "-"),
        ("st", {"status": None}, "-"),
        ("S", {}, "http"),
        ("b", {}, "34"),
        ("b", {"response_bytes": 0}, "-"),
        ("B", {"response_bytes": 0}, "0"),
        ("f", {}, "http://there/"),
        ("a", {}, "curl/8"),
        ("a", {"request_headers": []}, "-"),
        ("T", {}, "1"),
        ("D", {}, "1250000"),
        ("L", {}, "1.250000"),
        pytest.param("p", {}, f"<{os.getpid()}>", id="p"),  # a name of its own, the same in every process
        ("{Host}i", {}, "example.org"),
        ("{Accept}i", {"request_headers": [(b"accept", b"a"), (b"accept", b"b")]}, "a, b"),
        ("{content-TYPE}o", {}, "text/plain"),
        ("{X}o", {}, "-"),
        ("a", {"request_headers": [(b"uSer-Agent", b"raw names"), (b"user-agent", b"two")]}, "raw names"),
    ],
)
def test_atoms(atom: str, changes: dict[str, Any], expected: str) -> None:
    assert render(f"<%({atom})s>", **changes) == f"<{expected}>"


def test_the_environment_atom_is_read_once_and_without_regard_to_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRIOSERVE_TEST_POD", 'pod "7"')
    format_line = compile_format("%({trioserve_test_POD}e)s %({TRIOSERVE_TEST_NOTHING}e)s")
    monkeypatch.delenv("TRIOSERVE_TEST_POD")
    assert format_line(make_entry()) == "pod \\x227\\x22 -"


def test_hypercorns_default_format(utc_clock: Callable[[str], None]) -> None:
    assert render(Config().access_log_format) == (
        '192.0.2.1:4711 - - [02/Jan/2026:03:04:05 +0000] "GET /a%20b 1.1" 200 34 "http://there/" "curl/8"'
    )


@pytest.mark.parametrize(("zone", "expected"), [("UTC+5", "-0500"), ("XXX-5:45", "+0545")])
def test_the_time_zone_is_shown(utc_clock: Callable[[str], None], zone: str, expected: str) -> None:
    utc_clock(zone)
    # A second that no other test has cached.
    assert render("%(t)s", started_at=STARTED + len(zone) * 3600).endswith(f" {expected}]")


def test_other_conversions_of_numbers_widths_and_percent_signs() -> None:
    assert (
        render("%(D)010d|%(T)d|%(h)20s|%(m)-5s|%(B)d 100%%")
        == "0001250000|1|      192.0.2.1:4711|GET  |34 100%"
    )
    assert render("nothing") == "nothing"
    assert render("") == ""


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("%(host)s", "unknown atom %(host)s; did you mean %({Host}i)s?"),
        ("%(Status)s", "did you mean %(s)s?"),
        ("%(zzzzz)s", "unknown atom %(zzzzz)s. Known: h, l, u"),
        ("%({Host}x)s", "write %({Host}i)s for a request header"),
        ("%({}i)s", "unknown atom"),
        ("%(s)d", "cannot be formatted as 'd'; write %(s)s"),
        ("%(h)r", "cannot be formatted as 'r'"),
        ("%(h)", "is not of the form"),
        ("50% done", "write %% for a percent sign"),
        ("%s", "is not of the form"),
    ],
)
def test_a_wrong_format_is_a_config_error(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        compile_format(text)


@given(value=st.binary() | st.text())
def test_no_value_can_leave_its_quotes_or_its_line(value: bytes | str) -> None:
    shown = escape(value)
    assert shown.isascii()
    assert shown.isprintable()
    assert '"' not in shown
    # Every backslash starts an escape, so the escaping can be undone.
    assert re.fullmatch(r"(?:[^\\]|\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\U[0-9a-f]{8})*", shown)


@given(
    method=st.text(max_size=20),
    target=st.binary(max_size=60),
    agent=st.binary(max_size=60),
    reflected=st.binary(max_size=20),
    user=st.binary(max_size=20),
)
def test_a_line_cannot_be_forged(
    method: str, target: bytes, agent: bytes, reflected: bytes, user: bytes
) -> None:
    changes: dict[str, Any] = {
        "method": method,
        "target": target,
        "request_headers": [(b"user-agent", agent), (b"authorization", b"basic " + base64.b64encode(user))],
        "response_headers": [(b"location", reflected)],
    }
    line = render('%(h)s %(u)s "%(R)s" %(s)s "%(a)s" "%({location}o)s" "%(q)s"', **changes)
    assert re.fullmatch(r'192\.0\.2\.1:4711 [^ "]+ "[^"]* 1\.1" 200 "[^"]*" "[^"]*" "[^"]*"', line)
    line = format_json(make_entry(**changes))
    assert line.isascii()
    assert line.isprintable()
    parsed = json.loads(line)
    assert parsed["method"] == method
    assert parsed["user_agent"] == agent.decode("latin-1")
    assert parsed["status"] == 200


def test_long_values_are_cut() -> None:
    line = render("%(a)s", request_headers=[(b"user-agent", b"x" * 100_000)])
    assert len(line) < 9000
    assert line.endswith("...")
    assert len(format_json(make_entry(target=b"/" * 100_000, method="M" * 100_000))) < 20_000


def test_json_has_the_phases_and_the_outcome() -> None:
    assert json.loads(format_json(make_entry(outcome="peer gone", error="ValueError at app.py:3"))) == {
        "time": "2026-01-02T03:04:05.250000Z",
        "client": "192.0.2.1",
        "client_port": 4711,
        "server": "127.0.0.1",
        "server_port": 8000,
        "scheme": "http",
        "method": "GET",
        "path": "/a%20b",
        "query": "x=1&y=2",
        "http_version": "1.1",
        "status": 200,
        "request_bytes": 12,
        "response_bytes": 34,
        "seconds": 1.25,
        "head_seconds": 1.0,
        "body_seconds": 0.25,
        "outcome": "peer gone",
        "connection": 5,
        "request": 6,
        "user_agent": "curl/8",
        "referer": "http://there/",
        "pid": os.getpid(),
        "error": "ValueError at app.py:3",
    }


def test_json_of_a_request_that_was_never_answered() -> None:
    line = json.loads(
        format_json(make_entry(status=None, head_seconds=None, client=None, server=None, request_headers=[]))
    )
    for name in (
        "status",
        "head_seconds",
        "body_seconds",
        "client",
        "client_port",
        "server",
        "user_agent",
        "referer",
    ):
        assert line[name] is None, name
    assert "error" not in line


def test_the_access_log_is_off_by_default(writer: LogWriter) -> None:
    assert AccessLog.from_config(Config(), writer) is None


def test_lines_go_to_a_file(writer: LogWriter, tmp_path: Path) -> None:
    config = Config()
    config.accesslog = str(tmp_path / "access")
    config.access_log_format = "%(m)s %(U)s"
    log = AccessLog.from_config(config, writer)
    assert log is not None
    for number in range(300):
        log.log(make_entry(target=b"/%d" % number))
    assert writer.close(5)
    assert (tmp_path / "access").read_text().splitlines() == [f"GET /{number}" for number in range(300)]
    assert log.dropped == 0
    assert repr(log) == "<AccessLog 1 lanes, 0 dropped>"


def test_a_file_that_cannot_be_opened_is_a_config_error(writer: LogWriter, tmp_path: Path) -> None:
    config = Config()
    config.accesslog = str(tmp_path / "nowhere" / "access")
    with pytest.raises(ConfigError, match=r"accesslog = .*No such file"):
        AccessLog.from_config(config, writer)


def test_a_dash_is_the_default_stream_if_there_is_one(writer: LogWriter) -> None:
    config = Config()
    config.accesslog = "-"
    config.access_log_format = "json"
    assert AccessLog.from_config(config, writer, default_stream=None) is None
    stream = io.StringIO()
    log = AccessLog.from_config(config, writer, default_stream=stream)
    assert log is not None
    log.log(make_entry())
    assert writer.close(5)
    assert json.loads(stream.getvalue())["path"] == "/a%20b"


def test_a_logger_gets_the_lines_in_the_writers_thread(writer: LogWriter) -> None:
    seen: list[tuple[str, str | None, int]] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append((record.getMessage(), record.threadName, record.levelno))

    config = Config()
    config.accesslog = logging.Logger("mine")  # noqa: LOG001
    config.accesslog.addHandler(Collect())
    config.access_log_format = "%(U)s 100%%"
    log = AccessLog.from_config(config, writer)
    assert log is not None
    log.log(make_entry())
    assert writer.close(5)
    assert seen == [("/a%20b 100%", "trioserve-log", logging.INFO)]


@pytest.mark.parametrize("text", ["%(U)s", "json"])
def test_dropped_entries_are_told_in_the_logs_own_format(
    writer: LogWriter, tmp_path: Path, text: str
) -> None:
    config = Config()
    config.access_log_format = text
    release = threading.Event()

    class Slow(io.StringIO):
        def write(self, line: str) -> int:
            release.wait(10)
            return super().write(line)

    stream = Slow()
    config.accesslog = "-"
    log = AccessLog.from_config(config, writer, default_stream=stream)
    assert log is not None
    entry = make_entry()
    for _ in range(12_000):
        log.log(entry)
    dropped = log.dropped
    assert 1 <= dropped <= 2000
    release.set()
    assert writer.close(10)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 12_000 - dropped + 1
    if text == "json":
        assert (
            json.loads(lines[-1]).items() >= {"event": "access log lines dropped", "count": dropped}.items()
        )
    else:
        assert f"trioserve dropped {dropped} access log lines" in lines[-1]
        assert lines[-1].startswith("# 20")


def test_a_logger_is_told_of_dropped_entries(writer: LogWriter) -> None:
    release = threading.Event()
    seen: list[str] = []

    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            release.wait(10)
            seen.append(record.getMessage())

    logger = logging.Logger("mine")  # noqa: LOG001
    logger.addHandler(Slow())
    config = Config()
    config.accesslog = logger
    log = AccessLog.from_config(config, writer)
    assert log is not None
    for _ in range(11_000):
        log.log(make_entry())
    release.set()
    assert writer.close(10)
    assert seen[-1] == f"{log.dropped} access log lines were dropped: the queue was full"


def test_an_entry_describes_itself() -> None:
    assert repr(make_entry()) == "<AccessEntry GET b'/a%20b?x=1&y=2' 200 'complete'>"
    positional = AccessEntry(
        STARTED, None, None, "http", "GET", b"/", "1.0", [], None, [], 0, 0, 0.0, None, "refused", 1, 2, "bad"
    )
    assert (positional.http_version, positional.outcome, positional.request_number, positional.error) == (
        "1.0",
        "refused",
        2,
        "bad",
    )
