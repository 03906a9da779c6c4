"""The command: its flags are hypercorn's and ours; whatever is wrong ends with a message and an exit code."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import hypercorn.__main__
import pytest

import trioserve
from trioserve.cli import build_parser, configure, main
from trioserve.config import SETTINGS, Config
from trioserve.config.provenance import Origin
from trioserve.config.settings import BY_NAME
from trioserve.errors import (
    EXIT_APP_NOT_FOUND,
    EXIT_CONFIG,
    EXIT_OK,
    EXIT_OS,
    EXIT_OUTPUT,
    EXIT_USAGE,
    ConfigError,
)
from trioserve.observe.process import pid_file

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("TRIOSERVE_")]:
        monkeypatch.delenv(variable)


def configured(*argv: str) -> Config:
    """The configuration that a worker would be started with."""
    config, wish = configure(argv, {})
    config.validate()
    assert wish == "serve"
    return config


# -- hypercorn's flags --------------------------------------------------------------------------------------


def hypercorn_options(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Action]:
    """Every option of hypercorn's own parser, which it builds inside its main()."""
    found: list[argparse.Action] = []

    class Stop(Exception):
        pass

    def parse_args(self: argparse.ArgumentParser, _: Any = None) -> None:
        found.extend(self._actions)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Stop):
            hypercorn.__main__.main(["x"])
    return [action for action in found if action.option_strings and action.dest != "help"]


# A value for each of hypercorn's flags, and what becomes of it: a setting and its value, or a refusal.
HYPERCORN_FLAGS: dict[str, tuple[list[str], str, Any]] = {
    "--access-log": (["-"], "accesslog", "-"),
    "--access-logfile": (["-"], "accesslog", "-"),
    "--access-logformat": (["%(h)s"], "access_log_format", "%(h)s"),
    "--backlog": (["7"], "backlog", 7),
    "-b": (["127.0.0.1:0"], "bind", ["127.0.0.1:0"]),
    "--bind": (["unix:/tmp/x"], "bind", ["unix:/tmp/x"]),
    "--ca-certs": (["x"], "ca_certs", "refused"),
    "--certfile": (["x"], "certfile", "refused"),
    "--cert-reqs": (["2"], "cert_reqs", "refused"),
    "--ciphers": (["x"], "ciphers", "x"),
    "-D": ([], "daemon", True),
    "--daemon": ([], "daemon", True),
    "--debug": ([], "debug", True),
    "--error-log": (["x"], "errorlog", "x"),
    "--error-logfile": (["x"], "errorlog", "x"),
    "--log-file": (["x"], "errorlog", "x"),
    "--graceful-timeout": (["2.5"], "graceful_timeout", 2.5),
    "--read-timeout": (["3"], "read_timeout", 3.0),
    "--max-requests": (["5"], "max_requests", 5),
    "--max-requests-jitter": (["5"], "max_requests_jitter", 5),
    "-g": (["0"], "group", 0),
    "--group": (["0"], "group", 0),
    "-k": (["trio"], "worker_class", "trio"),
    "--worker-class": (["trio"], "worker_class", "trio"),
    "--keep-alive": (["7"], "keep_alive_timeout", 7.0),
    "--keyfile": (["x"], "keyfile", "refused"),
    "--keyfile-password": (["x"], "keyfile_password", "refused"),
    "--insecure-bind": (["a:1"], "insecure_bind", ["a:1"]),
    "--log-config": (["json:x"], "logconfig", "json:x"),
    "--log-level": (["debug"], "loglevel", "debug"),
    "-p": (["/tmp/x"], "pid_path", "/tmp/x"),
    "--pid": (["/tmp/x"], "pid_path", "/tmp/x"),
    "--quic-bind": (["a:1"], "quic_bind", "refused"),
    "--reload": ([], "use_reloader", True),
    "--root-path": (["/x/"], "root_path", "/x"),
    "--server-name": (["a"], "server_names", ["a"]),
    "--statsd-host": (["a:1"], "statsd_host", "a:1"),
    "--statsd-prefix": (["x"], "statsd_prefix", "x"),
    "-m": (["007"], "umask", 7),
    "--umask": (["0o22"], "umask", 0o22),
    "-u": (["0"], "user", 0),
    "--user": (["root"], "user", 0),
    "--verify-mode": (["CERT_REQUIRED"], "verify_mode", "refused"),
    "--websocket-ping-interval": (["2"], "websocket_ping_interval", 2.0),
    "-w": (["0"], "workers", 0),
    "--workers": (["2"], "workers", 2),
}


def test_the_list_of_hypercorns_flags_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {flag for action in hypercorn_options(monkeypatch) for flag in action.option_strings}
    assert theirs - {"-c", "--config"} == HYPERCORN_FLAGS.keys()


def test_hypercorns_repeatable_flags_are_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {flag: action for action in build_parser()._actions for flag in action.option_strings}
    for action in hypercorn_options(monkeypatch):
        for flag in action.option_strings:
            assert (ours[flag].nargs == 0) == (action.nargs == 0), flag
            assert isinstance(ours[flag], argparse._AppendAction) == isinstance(
                action, argparse._AppendAction
            ), flag


@pytest.mark.parametrize("flag", HYPERCORN_FLAGS)
def test_each_flag_of_hypercorn_is_accepted_or_refused_by_name(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values, name, expected = HYPERCORN_FLAGS[flag]
    if expected == "refused":
        assert main([flag, *values, "module:app"]) == EXIT_CONFIG
        assert f"command line: {BY_NAME[name].main_flag}" in capsys.readouterr().err
    else:
        config = configured(flag, *values, "module:app")
        assert config.application_path == "module:app"
        assert getattr(config, name) == expected
        assert config.source_of(name).origin is Origin.FLAG


@pytest.mark.parametrize(
    ("flag", "now"),
    [
        ("--access-log", "--access-logfile"),
        ("--error-log", "--error-logfile"),
        ("--cert-reqs", "--verify-mode"),
    ],
)
def test_an_old_spelling_warns(flag: str, now: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([flag, "2", "--check-config"])
    assert f"trioserve: warning: {flag} is deprecated, use {now}\n" in capsys.readouterr().err


# -- our flags ----------------------------------------------------------------------------------------------


def test_every_setting_has_a_flag_or_is_named_as_having_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == EXIT_OK
    text = capsys.readouterr().out
    for setting in SETTINGS:
        for flag in setting.option_strings + setting.deprecated_flags:
            assert re.search(rf"^ .*{flag}\b", text, re.MULTILINE), flag
        assert setting.option_strings or setting.deprecated_flags or setting.name in text
    assert "Settings without a flag: application_path, logconfig_dict." in text
    for topic in {setting.topic for setting in SETTINGS}:
        assert f"\n{topic}:\n" in text


def test_help_gives_default_unit_and_the_name_in_files(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "0 closes after each response (setting keep_alive_timeout; default 5 s)" in text
    assert "(default off)" in text
    assert "refused: HTTP/3 is not served yet" in text
    assert 'default %(h)s %(l)s %(l)s %(t)s "%(r)s"' in text


OURS: list[tuple[list[str], str, Any]] = [
    (["--first-byte-timeout", "0.5"], "first_byte_timeout", 0.5),
    (["--disconnect-grace", "off"], "disconnect_grace", None),
    (["--request-timeout=off"], "request_timeout", None),
    (["--max-connections", "5"], "max_connections", 5),
    (["--http-engine", "h11"], "http_engine", "h11"),
    (["--on-app-error", "contain"], "on_app_error", "contain"),
    (["--contain-error", "KeyError", "--contain-error", "a:B"], "contain_errors", ["KeyError", "a:B"]),
    (["-b", "a:1", "--bind", "b:2"], "bind", ["a:1", "b:2"]),
    (["--factory"], "factory", True),
    (["--no-include-server-header"], "include_server_header", False),
    (["--no-daemon"], "daemon", False),
    (["--crash-dir", "/tmp"], "crash_dir", "/tmp"),
    (["--logger-class", "hypercorn.logging:Logger"], "logger_class", Config.logger_class),
]


@pytest.mark.parametrize(("argv", "name", "value"), OURS)
def test_our_flags_set_our_settings(argv: list[str], name: str, value: Any) -> None:
    assert getattr(configured(*argv, "m:a"), name) == value


# -- usage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--kep-alive", "5", "m:a"], "unknown flag --kep-alive; did you mean --keep-alive?"),
        (["--kep-alive=5", "m:a"], "unknown flag --kep-alive; did you mean --keep-alive?"),
        (["m:a", "--port", "80"], "unknown flag --port; did you mean --bind?"),
        (["m:a", "--host", "0.0.0.0"], "unknown flag --host; did you mean --bind?"),
        (["m:a", "--uds", "app.sock"], "unknown flag --uds; did you mean --bind?"),
        (["m:a", "--fd", "3"], "unknown flag --fd; did you mean --bind?"),
        (["m:a", "--timeout", "60"], "unknown flag --timeout; did you mean --worker-timeout?"),
        (["m:a", "--timeout-keep-alive", "80"], "did you mean --keep-alive?"),
        (["m:a", "--ws-max-size", "80"], "did you mean --websocket-max-message-size?"),
        (["m:a", "--keep", "80"], "unknown flag --keep; did you mean --keep-alive?"),
        (["m:a", "-Z"], "unknown flag -Z"),
        (["--zzzzzzzzzz"], "unknown flag --zzzzzzzzzz\n"),
        (["m:a", "n:b"], "only one application can be served, but there is also 'n:b'"),
        ([], "no application given; for example: trioserve"),
        (["--graceful-timeout"], "expected one argument"),
        (["--workers", "four"], "argument -w/--workers: 'four': expected a whole number of at least 0"),
        (["--max-rss", "512"], "no worker can live with so little"),
        (["--request-timeout", "0"], 'write "off" for no limit'),
        (["--umask", "9"], "octal"),
        (["--bind", "localhost:x"], "host:port"),
        (["--contain-error", "a:B,c"], "'a:B,c' is not"),
        (["--hub", "epol"], "did you mean epoll?"),
    ],
)
def test_a_usage_error_exits_2_and_helps(
    argv: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == EXIT_USAGE
    error = capsys.readouterr().err
    assert text in error
    assert error.endswith("trioserve: try trioserve --help\n")


def test_a_bind_that_is_empty_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIOSERVE_BIND", "")  # as "${BIND}" is in a compose file
    assert main(["m:a"]) == EXIT_CONFIG
    assert "environment: TRIOSERVE_BIND = [] (list): nobody could connect" in capsys.readouterr().err
    Config.from_mapping(bind=[]).validate(library=True)  # there may be sockets=


def test_the_application_may_come_from_any_source(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('application_path = "in:file"\n')
    environment = {"TRIOSERVE_APPLICATION_PATH": "in:environment"}
    assert configure(["-c", str(file)], {})[0].application_path == "in:file"
    assert configure(["-c", str(file)], environment)[0].application_path == "in:environment"
    config, _ = configure(["in:argument", "-c", str(file)], environment)
    assert config.application_path == "in:argument"
    assert str(config.source_of("application_path")) == "flag application_path"


# -- real processes -----------------------------------------------------------------------------------------


def run(*argv: str, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    keep = {name: value for name, value in os.environ.items() if not name.startswith("TRIOSERVE_")}
    keep["PYTHONPATH"] = str(REPOSITORY)
    return subprocess.run(
        [sys.executable, "-m", "trioserve", *argv],
        cwd=cwd,
        env=keep | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_version_names_what_a_bug_report_needs() -> None:
    done = run("--version")
    assert done.returncode == EXIT_OK
    assert done.stdout.startswith(f"trioserve {trioserve.__version__} (trio ")
    assert "Python" in done.stdout


def test_check_config_says_valid_and_notes_what_is_odd(tmp_path: Path) -> None:
    done = run("--check-config", "--max-app-queue-size", "5", "no_such:app", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (EXIT_OK, "configuration is valid\n")
    assert done.stderr.startswith("info: command line: --max-app-queue-size = 5 (int) has no effect")


def test_check_config_refuses_a_wrong_file_without_a_traceback(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("kep_alive = 3\nworkers = 'x'\n")
    done = run("-c", str(file), "--check-config", "m:a")
    assert done.returncode == EXIT_CONFIG
    assert done.stderr.splitlines() == [
        f"trioserve: {file}: kep_alive = 3 (int): unknown setting; did you mean keep_alive_timeout?",
        f"trioserve: {file}: workers = 'x' (str): expected {BY_NAME['workers'].kind.expects}",
    ]


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["--bind", "8000"], EXIT_OS, "write :8000 for all addresses"),
        (["--bind", "http://localhost:8000"], EXIT_OS, "without 'http://'"),
        (["--insecure-bind", "unix:" + 200 * "a"], EXIT_OS, "bytes at most, this one 200"),
        (["--crash-dir", __file__], EXIT_CONFIG, "is no directory"),
        (["--access-logfile", "-", "--access-logformat", "%(bogus)s"], EXIT_CONFIG, "unknown atom %(bogus)s"),
        (["--log-config", "/no/such/file"], EXIT_CONFIG, "logconfig = '/no/such/file' cannot be read"),
        (["--log-config", f"json:{__file__}"], EXIT_CONFIG, "cannot be parsed"),
    ],
)
def test_check_config_finds_what_the_start_would(
    argv: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--check-config", *argv, "m:a"]) == code
    assert text in capsys.readouterr().err


PRINTING = [
    ["--help"],
    ["--version"],
    ["--print-config"],
    ["--check-config", "m:a"],
    ["static", "--help"],
    ["precompress", "--help"],
    ["ctl", "--help"],
    ["ctl", "scale", "--help"],
]


@pytest.mark.parametrize("argv", PRINTING, ids=" ".join)
def test_what_cannot_be_printed_is_one_line_and_an_exit_code(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(argv) == EXIT_OUTPUT
    assert capsys.readouterr().err == "trioserve: cannot write to stdout: No space left on device\n"


@pytest.mark.parametrize("argv", PRINTING, ids=" ".join)
def test_a_reader_that_has_left_is_content(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(argv) == EXIT_OK
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("argv", PRINTING, ids=" ".join)
def test_a_process_without_stdout_prints_nothing(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # what Python makes of `>&-`
    assert main(argv) == EXIT_OK


def test_a_wrong_flag_is_exit_code_2_even_if_stderr_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert main(["--nope"]) == EXIT_USAGE
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # for what its buffer still holds


def test_print_config_round_trips_and_shows_sources(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('bind = "127.0.0.1:0"\nloglevel = "debug"\n')
    first = run("-c", "c.toml", "--print-config", "--keep-alive", "7", cwd=tmp_path, TRIOSERVE_BACKLOG="9")
    assert first.returncode == EXIT_OK, first.stderr
    assert 'bind = ["127.0.0.1:0"]  # file c.toml\n' in first.stdout
    assert "keep_alive_timeout = 7.0  # flag --keep-alive\n" in first.stdout
    assert "backlog = 9  # environment TRIOSERVE_BACKLOG\n" in first.stdout
    assert "accept_batch = 64  # default\n" in first.stdout
    file.write_text(first.stdout)
    second = run("-c", "c.toml", "--print-config", cwd=tmp_path)
    assert second.returncode == EXIT_OK
    assert tomllib.loads(second.stdout) == tomllib.loads(first.stdout)


def test_print_config_shows_even_what_is_refused(tmp_path: Path) -> None:
    done = run("--print-config", "--keyfile-password", "hunter2")
    assert done.returncode == EXIT_CONFIG
    assert '# keyfile_password = "***"  # flag --keyfile-password; masked' in done.stdout
    assert "hunter2" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], EXIT_OK),
        (["--nope"], EXIT_USAGE),
        ([], EXIT_USAGE),
        (["--workers", "2..1", "m:a"], EXIT_USAGE),
        (["--workers", "2", "no_such_module_here:app"], EXIT_APP_NOT_FOUND),
        (["-c", "/no/such.toml", "m:a"], EXIT_CONFIG),
        (["no_such_module_here:app"], EXIT_APP_NOT_FOUND),
    ],
)
def test_exit_codes_of_a_process(argv: list[str], code: int, tmp_path: Path) -> None:
    done = run(*argv, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_an_app_that_fails_to_import_shows_its_own_traceback(tmp_path: Path) -> None:
    (tmp_path / "broken_app.py").write_text(
        "def helper():\n    raise RuntimeError('no settings')\nhelper()\n"
    )
    done = run("--workers", "0", "broken_app:app", cwd=tmp_path)
    assert done.returncode == EXIT_APP_NOT_FOUND
    assert done.stderr.splitlines()[-1] == (
        "trioserve: cannot load 'broken_app:app': importing 'broken_app' failed at "
        f"{tmp_path / 'broken_app.py'}:2: RuntimeError: no settings"
    )
    assert done.stderr.startswith("Traceback")
    assert "importlib" not in done.stderr
    assert "trioserve/asgi" not in done.stderr


@pytest.mark.parametrize(("code", "expected"), [("9", 9), ("", 0), ("'words'", 1)])
def test_an_app_that_ends_the_process_ends_it(code: str, expected: int, tmp_path: Path) -> None:
    (tmp_path / "ending_app.py").write_text(f"import sys\nsys.exit({code})\n")
    done = run("--workers", "0", "ending_app:app", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (expected, "words\n" if "words" in code else "")


# -- the pid file -------------------------------------------------------------------------------------------


def test_the_pid_file_is_there_while_it_matters(tmp_path: Path) -> None:
    file = tmp_path / "x.pid"
    file.write_text("stale")
    with pid_file(str(file)):
        assert file.read_text() == f"{os.getpid()}\n"
        assert file.stat().st_mode & 0o777 == 0o644
        assert [entry.name for entry in tmp_path.iterdir()] == ["x.pid"]
    assert not file.exists()
    with pid_file(None):
        pass


def test_a_successors_pid_file_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "x.pid"
    with pid_file(str(file)):
        file.write_text("1\n")
    assert file.read_text() == "1\n"
    with pid_file(str(file)):
        file.unlink()


def test_a_pid_file_that_cannot_be_written_is_a_configuration_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="cannot write the pid file: No such file"),
        pid_file(str(tmp_path / "a" / "b")),
    ):
        pass
    (tmp_path / "d").mkdir()
    with pytest.raises(ConfigError, match="Is a directory"), pid_file(str(tmp_path / "d")):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["d"]
