"""The logs of a server as its Config asks for them, and that several servers do not meet."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypercorn.logging
import hypercorn.statsd
import pytest
from hypercorn.config import Config

from trioserve.errors import ConfigError
from trioserve.observe.access_log import AccessEntry
from trioserve.observe.logs import setup_logs

LINE = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}\] \[\d+\] \[WARNING\] careful 1\n")


def make_entry(path: bytes = b"/") -> AccessEntry:
    return AccessEntry(0.0, None, None, "http", "GET", path, "1.1", [], 200, [], 0, 0, 0.0)


def make_config(**settings: Any) -> Config:
    config = Config()
    for name, value in settings.items():
        setattr(config, name, value)
    return config


def logger_states() -> dict[str, Any]:
    found = {
        name: (logger.level, list(logger.handlers), list(logger.filters), logger.propagate, logger.disabled)
        for name, logger in logging.Logger.manager.loggerDict.items()
        if isinstance(logger, logging.Logger)
    }
    root = logging.getLogger()
    return found | {"": (root.level, list(root.handlers), list(root.filters), root.propagate, root.disabled)}


@pytest.fixture(autouse=True)
def no_logger_is_left_changed() -> Iterator[None]:
    before = logger_states()
    yield
    fresh = (logging.NOTSET, [], [], True, False)
    for name, state in logger_states().items():
        assert state == before.get(name, fresh), name


def test_the_error_log_can_be_moved_and_stays_the_same_logger(tmp_path: Path) -> None:
    logs = setup_logs(make_config(errorlog=str(tmp_path / "first"), accesslog=None, loglevel="INFO"))
    error = logs.error
    error.info("one")
    with pytest.raises(ConfigError, match="cannot be opened"):
        logs.change_error_log(make_config(errorlog=str(tmp_path / "none" / "second"), accesslog=None))
    error.info("two")
    logs.change_error_log(make_config(errorlog=str(tmp_path / "second"), accesslog=None, loglevel="WARNING"))
    assert logs.error is error
    error.info("three")
    error.warning("four")
    (tmp_path / "first").rename(tmp_path / "moved")
    logs.reopen()
    assert logs.close()
    assert re.findall(r"\] (\w+)\n", (tmp_path / "moved").read_text()) == ["one", "two"]
    assert re.findall(r"\] (\w+)\n", (tmp_path / "second").read_text()) == ["four"]
    assert not (tmp_path / "first").exists()


def test_the_error_log_has_hypercorns_line(tmp_path: Path) -> None:
    logs = setup_logs(make_config(errorlog=str(tmp_path / "error")))
    assert isinstance(logs.error, logging.Logger)
    assert logs.error.name == "trioserve.error"
    assert logs.access is None
    logs.error.warning("careful %d", 1)
    logs.error.debug("not at this level")
    assert logs.close(5)
    assert LINE.fullmatch((tmp_path / "error").read_text())
    assert "access off" in repr(logs)


def test_the_default_is_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    logs = setup_logs(Config())
    logs.error.warning("careful %d", 1)
    assert logs.close(5)
    assert LINE.fullmatch(capsys.readouterr().err)
    # After close() nothing is lost in silence.
    logs.error.error("too late")
    logs.error.info("too late and unimportant")
    assert capsys.readouterr().err == "too late\n"


def test_it_works_without_standard_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    logs = setup_logs(make_config(accesslog="-"))
    logs.error.warning("into nothing")
    assert logs.access is None
    assert logs.close(5)


@pytest.mark.parametrize("off", [None, ""])
def test_the_error_log_can_be_off(capfd: pytest.CaptureFixture[str], off: str | None) -> None:
    logs = setup_logs(make_config(errorlog=off))
    logs.error.critical("nobody hears this")
    assert logs.close(5)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("level", "expected"),
    [("debug", "DIWE"), ("INFO", "IWE"), ("warning", "WE"), ("ERROR", "E"), (None, "WE"), (30, "WE")],
)
def test_levels(tmp_path: Path, level: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        logging.getLogger(), "level", logging.WARNING
    )  # None: the root's, which others may change
    logs = setup_logs(make_config(errorlog=str(tmp_path / "error"), loglevel=level))
    for name in ("debug", "info", "warning", "error"):
        getattr(logs.error, name)(name[0].upper())
    assert logs.close(5)
    assert "".join(line[-1] for line in (tmp_path / "error").read_text().splitlines()) == expected


def test_the_level_can_change_and_logging_can_be_disabled_later(tmp_path: Path) -> None:
    logs = setup_logs(make_config(errorlog=str(tmp_path / "error")))
    logs.error.debug("no")
    logs.error.setLevel(logging.DEBUG)
    logs.error.debug("yes")
    logging.disable(logging.CRITICAL)
    logs.error.error("no")
    logging.disable(logging.NOTSET)
    assert logs.close(5)
    assert (tmp_path / "error").read_text().endswith("[DEBUG] yes\n")
    assert (tmp_path / "error").read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"loglevel": "warnign"}, "loglevel = 'warnign' is not a level; did you mean 'WARNING'?"),
        ({"loglevel": "???"}, "is not a level"),
        ({"errorlog": "/no/such/folder/log"}, "errorlog = '/no/such/folder/log' cannot be opened"),
        ({"accesslog": "/no/such/folder/log"}, "accesslog = '/no/such/folder/log' cannot be opened"),
        ({"accesslog": "-", "access_log_format": "%(x)s"}, "unknown atom"),
        ({"statsd_host": "nowhere"}, "statsd_host"),
        ({"logconfig": "/no/such/file"}, "logconfig = '/no/such/file' cannot be read"),
        ({"logconfig": "json:/no/such/file"}, "cannot be read"),
        ({"logconfig_dict": {"version": 2}}, "refused by the logging module"),
        ({"errorlog": "fifo"}, "errorlog = 'fifo' cannot be opened: it is a FIFO that nobody reads"),
        ({"accesslog": "fifo"}, "accesslog = 'fifo' cannot be opened: it is a FIFO that nobody reads"),
        ({"logconfig_dict": ["version"]}, "must be a table"),
        ({"logconfig_dict": {"version": 1, "loggers": 5}}, "refused by the logging module"),
        ({"logconfig_dict": {"version": 1, "handlers": {"x": {"class": "no.Such"}}}}, "handler 'x'"),
    ],
)
def test_settings_that_cannot_be_followed_are_named(
    settings: dict[str, Any], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        setup_logs(make_config(**settings))


def test_a_logger_class_of_ones_own_is_refused_and_hypercorns_are_not() -> None:
    class Mine(hypercorn.logging.Logger):
        pass

    with pytest.raises(ConfigError, match=r"logger_class = .*Mine is not supported: its methods are awaited"):
        setup_logs(make_config(logger_class=Mine))
    logs = setup_logs(make_config(logger_class=hypercorn.statsd.StatsdLogger, errorlog=None))
    assert logs.close(5)


def test_a_logger_may_be_given_and_is_left_as_it_was(tmp_path: Path) -> None:
    handler = logging.FileHandler(tmp_path / "error")
    mine = logging.Logger("mine", logging.WARNING)  # noqa: LOG001
    mine.addHandler(handler)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(5)
        logs = setup_logs(make_config(errorlog=mine, statsd_host=f"127.0.0.1:{server.getsockname()[1]}"))
        assert logs.error is mine
        logs.error.warning("hello")
        logs.error.info("no")
        assert server.recv(1000) == b"hypercorn.log.warning:1|c|@1.0"
        assert logs.close(5)
    assert mine.handlers == [handler]
    handler.close()
    assert (tmp_path / "error").read_text() == "hello\n"


def test_statsd_gets_requests_with_and_without_an_access_log(tmp_path: Path) -> None:
    for accesslog in (None, str(tmp_path / "access")):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("127.0.0.1", 0))
            server.settimeout(5)
            host = f"127.0.0.1:{server.getsockname()[1]}"
            logs = setup_logs(
                make_config(accesslog=accesslog, errorlog=None, statsd_host=host, statsd_prefix="x")
            )
            assert logs.access is not None
            logs.access.log(make_entry())
            assert b"x.hypercorn.requests:1|c|@1.0" in server.recv(1000)
            assert logs.close(5)
    assert (tmp_path / "access").read_text().count("\n") == 1


def test_two_servers_in_one_process_do_not_meet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = setup_logs(
        make_config(errorlog=str(tmp_path / "e1"), accesslog=str(tmp_path / "a1"), loglevel="DEBUG")
    )
    second = setup_logs(make_config(errorlog=str(tmp_path / "e2"), accesslog=str(tmp_path / "a2")))
    assert first.access is not None
    assert second.access is not None
    for logs, name in ((first, "one"), (second, "two")):
        logs.error.error(name)
        logs.error.debug("%s in detail", name)
        assert logs.access is not None
        logs.access.log(make_entry(name.encode()))
    assert first.close(5)
    second.error.error("still here")
    assert second.close(5)
    texts = {name: (tmp_path / name).read_text() for name in ("e1", "e2", "a1", "a2")}
    assert [texts[name].count("\n") for name in ("e1", "e2", "a1", "a2")] == [2, 2, 1, 1]
    assert "two" not in texts["e1"] + texts["a1"]
    assert "one" not in texts["e2"] + texts["a2"]
    assert capfd.readouterr() == ("", "")


def test_the_root_logger_gets_nothing_and_is_not_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logs = setup_logs(make_config(errorlog=str(tmp_path / "error")))
    logs.error.error("ours alone")
    assert logs.close(5)
    assert caplog.records == []


def test_what_static_files_and_wsgi_say_is_in_the_error_log_of_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, path = logging.getLogger(), tmp_path / "error.log"
    others = list(root.handlers)
    logs = setup_logs(make_config(errorlog=str(path)))
    logs.take_parts()
    monkeypatch.setattr(root, "handlers", [])
    logging.getLogger("trioserve.wsgi").warning("careful %d", 1)
    logging.getLogger("trioserve.static").debug("below the level")
    monkeypatch.setattr(root, "handlers", others or [logging.NullHandler()])
    logging.getLogger("trioserve.static").error("for the app's own logging")
    monkeypatch.undo()
    logs.close()
    logging.getLogger("trioserve.wsgi").warning("careful 2")
    assert LINE.fullmatch(path.read_text())


def test_handlers_that_an_embedding_program_has_set_up_take_the_place_of_the_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    known = logging.getLogger("trioserve.error")
    handler = logging.FileHandler(tmp_path / "theirs")
    known.addHandler(handler)
    try:
        logs = setup_logs(Config())
        logs.error.warning("hello")
        assert logs.close(5)
    finally:
        known.removeHandler(handler)
        handler.close()
    assert (tmp_path / "theirs").read_text() == "hello\n"
    assert capfd.readouterr().err == ""


def make_dict(tmp_path: Path, *names: str, **more: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "formatters": {"short": {"format": "%(levelname)s %(name)s %(message)s"}},
        "handlers": {
            "file": {"class": "logging.FileHandler", "filename": str(tmp_path / "out"), "formatter": "short"}
        },
        "loggers": {name: {"handlers": ["file"], "propagate": False} for name in names},
        **more,
    }


@pytest.mark.parametrize("brand", ["trioserve", "hypercorn"])
@pytest.mark.parametrize("form", ["dict", "json", "toml", "ini"])
def test_a_logconfig_in_every_form_under_both_names(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], brand: str, form: str
) -> None:
    settings = make_dict(tmp_path, f"{brand}.error", f"{brand}.access")
    config = make_config(accesslog="-", access_log_format="%(U)s")
    if form == "dict":
        config.logconfig_dict = settings
    elif form == "json":
        (tmp_path / "c.json").write_text(json.dumps(settings))
        config.logconfig = f"json:{tmp_path / 'c.json'}"
    elif form == "toml":
        (tmp_path / "c.toml").write_text(
            f"""
version = 1
[formatters.short]
format = "%(levelname)s %(name)s %(message)s"
[handlers.file]
class = "logging.FileHandler"
filename = "{tmp_path / "out"}"
formatter = "short"
[loggers."{brand}.error"]
handlers = ["file"]
propagate = false
[loggers."{brand}.access"]
handlers = ["file"]
propagate = false
"""
        )
        config.logconfig = f"toml:{tmp_path / 'c.toml'}"
    else:
        (tmp_path / "c.ini").write_text(
            f"""
[loggers]
keys=root,error,access
[handlers]
keys=file
[formatters]
keys=short
[logger_root]
handlers=
[logger_error]
qualname={brand}.error
handlers=file
propagate=0
[logger_access]
qualname={brand}.access
level=INFO
handlers=file
propagate=0
[handler_file]
class=FileHandler
args=("%(here)s/out",)
formatter=short
[formatter_short]
format=%(levelname)s %(name)s %(message)s
"""
        )
        config.logconfig = str(tmp_path / "c.ini")
    if form != "ini":
        settings["loggers"][f"{brand}.access"]["level"] = "INFO"
        if form == "json":
            (tmp_path / "c.json").write_text(json.dumps(settings))
        elif form == "toml":
            text = (tmp_path / "c.toml").read_text()
            (tmp_path / "c.toml").write_text(text + 'level = "INFO"\n')
    logs = setup_logs(config)
    logs.error.info("hello")
    logs.error.debug("not at loglevel")
    assert logs.access is not None
    logs.access.log(make_entry(b"/p"))
    assert logs.close(5)
    assert sorted((tmp_path / "out").read_text().splitlines()) == [
        f"INFO {brand}.access /p",
        "INFO trioserve.error hello",
    ]
    assert capfd.readouterr() == ("", "")


def test_a_logconfig_under_our_name_turns_the_access_log_on(tmp_path: Path) -> None:
    settings = make_dict(tmp_path, "trioserve.access")
    settings["loggers"]["trioserve.access"]["level"] = "INFO"
    logs = setup_logs(make_config(logconfig_dict=settings, errorlog=None, access_log_format="%(U)s"))
    assert logs.access is not None
    logs.access.log(make_entry(b"/p"))
    assert logs.close(5)
    assert (tmp_path / "out").read_text() == "INFO trioserve.access /p\n"
    logs = setup_logs(make_config(logconfig_dict=make_dict(tmp_path, "hypercorn.access"), errorlog=None))
    assert logs.access is None
    assert logs.close(5)


def test_a_logconfigs_level_goes_before_loglevel(tmp_path: Path) -> None:
    settings = make_dict(tmp_path, "trioserve.error")
    settings["loggers"]["trioserve.error"]["level"] = "ERROR"
    logs = setup_logs(make_config(logconfig_dict=settings, loglevel="debug"))
    logs.error.warning("no")
    logs.error.error("yes")
    assert logs.close(5)
    assert (tmp_path / "out").read_text() == "ERROR trioserve.error yes\n"


def test_a_logconfig_that_names_neither_of_us_leaves_the_error_log_alone(tmp_path: Path) -> None:
    """dictConfig disables existing loggers by default, which silences hypercorn."""
    config = make_config(errorlog=str(tmp_path / "error"), logconfig_dict=make_dict(tmp_path, "app"))
    logs = setup_logs(config)
    logs.error.warning("careful %d", 1)
    logging.getLogger("app").error("theirs")
    assert logs.close(5)
    assert LINE.fullmatch((tmp_path / "error").read_text())
    assert (tmp_path / "out").read_text() == "ERROR app theirs\n"


def test_servers_share_a_logconfig_until_the_last_has_closed(tmp_path: Path) -> None:
    settings = make_dict(tmp_path, "trioserve.error", root={"level": "ERROR", "handlers": ["file"]})
    first = setup_logs(make_config(logconfig_dict=settings))
    second = setup_logs(
        make_config(logconfig_dict=make_dict(tmp_path, "trioserve.error", root=settings["root"]))
    )
    other = setup_logs(make_config(logconfig_dict=make_dict(tmp_path, "trioserve.error", "third")))
    assert first.close(5)
    second.error.error("two")
    assert second.close(5)
    assert second.close(5)
    other.error.error("three")
    assert logging.getLogger("third").handlers
    assert other.close(5)
    assert (tmp_path / "out").read_text() == "ERROR trioserve.error two\nERROR trioserve.error three\n"


@pytest.mark.parametrize(
    ("name", "text"), [("json:{}", "{"), ("toml:{}", "= ="), ("{}", "no section"), ("json:{}", "[1]")]
)
def test_a_logconfig_that_cannot_be_parsed(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "broken").write_text(text)
    with pytest.raises(ConfigError, match="logconfig = "):
        setup_logs(make_config(logconfig=name.format(tmp_path / "broken")))


def test_a_broken_second_logconfig_does_not_undo_the_first(tmp_path: Path) -> None:
    logs = setup_logs(make_config(logconfig_dict=make_dict(tmp_path, "trioserve.error")))
    with pytest.raises(ConfigError):
        setup_logs(make_config(logconfig_dict={"version": 3}))
    logs.error.error("still there")
    assert logs.close(5)
    assert "still there" in (tmp_path / "out").read_text()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_rotation_by_signal_in_a_real_process(tmp_path: Path) -> None:
    script = """
import signal, sys
from hypercorn.config import Config
from trioserve.observe.logs import setup_logs
config = Config()
config.errorlog = sys.argv[1]
logs = setup_logs(config)
signal.signal(signal.SIGUSR1, lambda *_: logs.reopen())
for line in sys.stdin:
    logs.error.info(line.strip())
    assert logs.statistics().dropped == 0
    print("done", flush=True)
logs.close()
"""
    log = tmp_path / "error"
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(log)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("before\n")
        child.stdin.flush()
        assert child.stdout.readline() == "done\n"
        until(lambda: log.exists() and "before" in log.read_text())  # its writer has a thread of its own
        log.rename(tmp_path / "error.1")
        child.send_signal(signal.SIGUSR1)
        child.stdin.write("after\n")
        child.stdin.flush()
        assert child.stdout.readline() == "done\n"
        child.stdin.close()
        assert child.wait(10) == 0
    assert "before" in (tmp_path / "error.1").read_text()
    together = (tmp_path / "error.1").read_text() + log.read_text()
    assert together.count("before") == together.count("after") == 1
