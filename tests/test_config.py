"""Config: what is accepted, what is refused, in which words, and which source wins."""

from __future__ import annotations

import ast
import codecs
import copy
import dataclasses
import grp
import importlib
import inspect
import logging
import math
import os
import pickle
import pwd
import ssl
import sys
import tomllib
import typing
from pathlib import Path
from typing import Any

import hypercorn.config
import hypercorn.logging
import pytest

import trioserve.config.config
from trioserve.config import (
    SETTINGS,
    Config,
    load_config,
    resolve_exceptions,
    settings_table_markdown,
)
from trioserve.config.provenance import Origin
from trioserve.config.setting import Setting
from trioserve.config.settings import BY_NAME, nearest_setting
from trioserve.config.settings_server import CAN_SUPERVISE
from trioserve.config.sources import config_as_toml
from trioserve.errors import ConfigError

HYPERCORN = hypercorn.config.Config
READABLE = [setting for setting in SETTINGS if not setting.write_only]


def named(setting: Setting) -> str:
    return setting.name


# -- the table ----------------------------------------------------------------------------------------------


def test_every_public_attribute_of_hypercorn_is_a_setting() -> None:
    theirs = {
        name
        for name, value in vars(HYPERCORN).items()
        if not name.startswith("_")
        and not inspect.isroutine(value)
        and not isinstance(value, classmethod)
        and name not in ("log", "ssl_enabled")
    }
    assert theirs | {"application_path"} == {s.name for s in SETTINGS if s.source == "hypercorn"}


def test_our_settings_are_annotated_on_config() -> None:
    tree = ast.parse(inspect.getsource(trioserve.config.config.Config))
    annotated = {
        node.target.id
        for node in tree.body[0].body  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert {n for n in annotated if not n.startswith("_")} == {
        s.name for s in SETTINGS if s.source == "trioserve"
    }


@pytest.mark.parametrize(
    "name", ["http2_engine", "http_engine", "hub", "lifespan", "on_app_error", "websocket_compression"]
)
def test_choices_are_annotated_as_they_are_declared(name: str) -> None:
    hints = typing.get_type_hints(Config)
    assert typing.get_args(hints[name]) == BY_NAME[name].kind.words  # type: ignore[attr-defined]


@pytest.mark.parametrize("setting", SETTINGS, ids=named)
def test_each_setting_says_what_and_why(setting: Setting) -> None:
    assert setting.help
    assert setting.reason
    assert setting.topic
    assert len(setting.help) < 160


@pytest.mark.parametrize("setting", READABLE, ids=named)
def test_each_default_is_accepted_by_its_own_kind(setting: Setting) -> None:
    assert setting.kind.check(setting.default) == setting.default
    assert getattr(Config(), setting.name) == setting.default


@pytest.mark.parametrize("setting", [s for s in READABLE if s.source == "hypercorn"], ids=named)
def test_hypercorns_defaults_are_kept_but_for_a_few(setting: Setting) -> None:
    ours_differ = {
        "graceful_timeout": 30.0,
        "worker_class": "trio",
        "application_path": "",
        "ssl_handshake_timeout": 10.0,
        "websocket_ping_interval": 20.0,
    }
    theirs = ours_differ.get(setting.name, getattr(HYPERCORN(), setting.name, None))
    assert setting.default == theirs


def test_our_defaults_are_the_designs() -> None:
    config = Config()
    assert {s.name: getattr(config, s.name) for s in SETTINGS if s.source == "trioserve"} == {
        "accept_batch": 64,
        "block_kill": 60,
        "block_warn": 1,
        "contain_errors": [],
        "control": "auto",
        "crash_dir": None,
        "debug_extension": False,
        "disconnect_grace": 3,
        "exit_when_idle": None,
        "factory": False,
        "fatal_errors": [],
        "first_byte_timeout": 10,
        "h2_connection_window": "auto",
        "h2_stream_window": 2**16,
        "h2c": False,
        "hard_exit_after": 5,
        "http2_engine": "own",
        "http_engine": "auto",
        "hub": "auto",
        "ktls": False,
        "lifespan": "auto",
        "linger_timeout": 2,
        "max_body_size": None,
        "max_concurrent_requests": None,
        "max_connections": None,
        "max_head_size": 65536,
        "max_header_count": 100,
        "max_lifetime": None,
        "max_rss": None,
        "max_target_size": 8192,
        "on_app_error": "replace",
        "pre_drain_delay": 0,
        "preload": False,
        "request_body_min_rate": 240,
        "request_body_min_rate_grace": 30,
        "request_body_timeout": 30,
        "request_head_timeout": 10,
        "request_queue_size": 100,
        "request_queue_timeout": 1,
        "request_timeout": None,
        "response_write_timeout": 30,
        "sni_certificates": {},
        "static_mounts": [],
        "websocket_close_timeout": 5,
        "websocket_compression": "off",
        "websocket_ping_timeout": 20,
        "worker_timeout": 30,
        "wsgi_threads": 40,
    }


def test_the_table_for_the_readme_has_a_row_for_each_setting() -> None:
    table = settings_table_markdown()
    for setting in SETTINGS:
        row = next(line for line in table.splitlines() if line.startswith(f"| `{setting.name}` "))
        assert row.count("|") - row.count("\\|") == 6
        assert ("†" in row) == (setting.source == "trioserve")
    assert "| `first_byte_timeout` † | `--first-byte-timeout` | `10 s` |" in table
    assert "refused: HTTP/3 is not served yet" in table


# -- values -------------------------------------------------------------------------------------------------

GOOD: list[tuple[str, Any, Any]] = [
    ("bind", "0.0.0.0:80", ["0.0.0.0:80"]),
    ("bind", ["[::1]:80", "unix:/tmp/x", "fd://3", "localhost", "[::]", "::1", ":80"], None),
    ("bind", ("a:1",), ["a:1"]),
    ("server_names", "example.org", ["example.org"]),
    ("graceful_timeout", 0, 0.0),
    ("graceful_timeout", 2, 2.0),
    ("disconnect_grace", "off", None),
    ("disconnect_grace", None, None),
    ("disconnect_grace", "None", None),
    ("disconnect_grace", 0, 0.0),
    ("request_timeout", 0.5, 0.5),
    ("request_body_min_rate", 0, 0.0),
    ("request_body_min_rate", "off", 0.0),
    ("request_body_min_rate", None, 0.0),
    ("max_body_size", 0, 0),
    ("max_body_size", "off", None),
    ("umask", "007", 7),
    ("umask", "0o27", 0o27),
    ("umask", 18, 18),
    ("umask", "", None),
    ("user", os.getuid(), os.getuid()),
    ("user", pwd.getpwuid(os.getuid()).pw_name, os.getuid()),
    ("group", grp.getgrgid(os.getgid()).gr_name, os.getgid()),
    ("group", "0", 0),
    ("group", None, None),
    ("pid_path", Path("/run/x.pid"), "/run/x.pid"),
    ("pid_path", "", None),
    ("control", "AUTO", "auto"),
    ("control", "./auto", "./auto"),
    ("control", Path("/run/x.sock"), "/run/x.sock"),
    ("control", "off", None),
    ("control", None, None),
    ("h2_connection_window", "AUTO", "auto"),
    ("h2_connection_window", 100_000, 100_000),
    ("loglevel", "debug", "debug"),
    ("hub", "EPOLL", "epoll"),
    ("root_path", "/api/", "/api"),
    ("errorlog", None, None),
    ("errorlog", logging.getLogger("x"), None),
    ("logconfig_dict", {"version": 1}, {"version": 1}),
    ("logger_class", "hypercorn.logging:Logger", hypercorn.logging.Logger),
    ("logger_class", "hypercorn.logging.Logger", hypercorn.logging.Logger),
    ("statsd_host", "[::1]:8125", "[::1]:8125"),
    ("statsd_host", "bücher.example:1", "bücher.example:1"),
    ("verify_mode", "CERT_REQUIRED", ssl.VerifyMode.CERT_REQUIRED),
    ("verify_mode", 2, ssl.VerifyMode.CERT_REQUIRED),
    ("verify_mode", ssl.VerifyMode.CERT_NONE, ssl.VerifyMode.CERT_NONE),
    ("verify_mode", "", None),
    ("contain_errors", "ValueError", ["ValueError"]),
    ("contain_errors", ["a.b:C.D", KeyError], ["a.b:C.D", KeyError]),
    ("contain_errors", KeyError, [KeyError]),
    ("include_date_header", False, False),
    ("max_rss", 0.5, 0.5),
    ("max_rss", 1, 1.0),
    ("max_rss", 2**24, 2.0**24),
    ("max_rss", "off", None),
]


@pytest.mark.parametrize(("name", "value", "settled"), GOOD)
def test_a_value_is_accepted_and_settled(name: str, value: Any, settled: Any) -> None:
    config = Config()
    setattr(config, name, value)
    assert getattr(config, name) == (
        value if settled is None and value not in (None, "", "off", "None") else settled
    )


BAD: list[tuple[str, Any, str]] = [
    ("workers", "4", "workers = '4' (str): expected a whole number of at least 0, \"auto\", or a range"),
    ("workers", "2..", "or a range such as"),
    ("workers", "0..3", "must begin at 1 or more"),
    ("workers", "4..3", "must begin at 1 or more"),
    ("workers", "²..3", "or a range such as"),
    ("workers", True, "(bool)"),
    ("workers", -1, "at least 0"),
    ("workers", 1.0, "(float)"),
    ("backlog", 70000, "at most 65535"),
    ("max_head_size", 10, "a whole number of bytes of at least 256"),
    ("graceful_timeout", "5", "a number of seconds of at least 0"),
    ("graceful_timeout", None, "(NoneType)"),
    ("graceful_timeout", math.inf, "must be finite"),
    ("graceful_timeout", math.nan, "must be finite"),
    ("graceful_timeout", 10**400, "a number of seconds"),
    ("graceful_timeout", -0.1, "at least 0"),
    ("request_timeout", 0, 'write "off" for no limit'),
    ("request_timeout", math.inf, 'write "off" for no limit'),
    ("first_byte_timeout", True, 'above 0, or "off"'),
    ("max_connections", 0, 'write "off"'),
    ("max_rss", 512, "bytes of at least 16777216 (512 MiB are 536870912), or a part above 0 and at most 1"),
    ("max_rss", 1.5, "no worker can live with so little"),
    ("max_rss", "512M", "a number of bytes of at least 16777216"),
    ("max_rss", 0, 'write "off" for no limit'),
    ("include_date_header", 1, "expected true or false"),
    ("include_date_header", "no", "expected true or false"),
    ("bind", 8000, "host:port"),
    ("bind", ["a:1", 2], "2 is int"),
    ("bind", ["localhost:80a"], "'localhost:80a' is not"),
    ("bind", ["localhost:"], "is not"),
    ("bind", ["localhost:99999"], "is not"),
    ("bind", ["fd://x"], "is not"),
    ("bind", ["unix:"], "is not"),
    ("bind", ["unix:\0abstract"], "is not"),
    ("bind", [" "], "is not"),
    ("bind", "[::1", "'[::1' is not: an IPv6 address stands whole in brackets, as in [::1]:8000"),
    ("bind", "::1]", "in brackets"),
    ("bind", "[]:80", "in brackets"),
    ("bind", "[::1]]:80", "in brackets"),
    ("bind", "[::1]x", "in brackets"),
    ("bind", "x[::1]:80", "in brackets"),
    ("insecure_bind", "[::1:80", "in brackets"),
    ("bind", {"a": 1}, "host:port"),
    ("bind", b"a:1", "host:port"),
    ("umask", "8", "octal"),
    ("umask", 0o1000, "0o777"),
    ("umask", True, "(bool)"),
    ("umask", 1.5, "(float)"),
    ("user", "no-such-user-here", "there is no user 'no-such-user-here'"),
    ("group", "no-such-group-here", "there is no group"),
    ("user", -1, "a user id"),
    ("user", True, "a user id"),
    ("root_path", None, "expected text"),
    ("accesslog", 3, "logging.Logger"),
    ("pid_path", "a\0b", "NUL"),
    ("control", "", 'expected a path, "auto" or "off"'),
    ("control", True, "(bool)"),
    ("control", "a\0b", "NUL"),
    ("h2_connection_window", "100000", 'at most 2.14748e+09, or "auto"'),
    ("h2_connection_window", 1.5, "(float)"),
    ("loglevel", "LOUD", "a logging level"),
    ("loglevel", 10, "a logging level"),
    ("hub", "epol", "did you mean epoll?"),
    ("hub", "x", "one of auto, epoll, portable"),
    ("hub", 1, "one of"),
    ("logconfig_dict", [1], "a table"),
    ("logger_class", int, "hypercorn.logging.Logger"),
    ("logger_class", "hypercorn.logging:Loger", "has no attribute 'Loger'"),
    ("logger_class", "nowhere_at_all:X", "importing 'nowhere_at_all' failed"),
    ("statsd_host", "localhost", "host:port"),
    ("statsd_host", ":1", "host:port"),
    ("statsd_host", "::1:8125", "'::1' is no name of a host"),
    ("statsd_host", "a..b:8125", "'a..b' is no name of a host"),
    ("statsd_host", "x" * 64 + ".com:1", "is no name of a host"),
    ("verify_mode", "CERT_PERHAPS", "CERT_REQUIRED"),
    ("verify_mode", [], "CERT_REQUIRED"),
    ("contain_errors", ["not a name"], "'not a name' is not"),
    ("contain_errors", [int], "is type"),
    ("contain_errors", 3, "a list of exceptions"),
]


@pytest.mark.parametrize(("name", "value", "text"), BAD)
def test_a_wrong_value_is_refused_where_it_is_assigned(name: str, value: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        setattr(Config(), name, value)
    assert str(caught.value).startswith(f"Config: {name} = ")
    assert text in str(caught.value)


def test_a_secret_never_shows() -> None:
    config = Config()
    config.keyfile_password = "hunter2"
    with pytest.raises(ConfigError) as caught:
        config.validate()
    assert "hunter2" not in str(caught.value) + repr(config) + config_as_toml(config)
    assert "keyfile_password = ***" in str(caught.value)
    with pytest.raises(ConfigError, match=r"\*\*\*"):
        config.keyfile_password = 12345  # type: ignore[assignment]


def test_the_places_that_settings_name_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "file")
    wrong = {
        ("crash_dir", "file"): "file is no directory",
        ("crash_dir", "file/deeper"): "file is no directory",
        ("pid_path", "folder"): "folder is a directory",
        ("pid_path", "gone/pid"): f"there is no directory {tmp_path}/gone: make it, or correct the path",
        ("accesslog", "folder"): "folder is a directory",
        ("accesslog", "link"): f"there is no directory {tmp_path}/gone",
        ("errorlog", "gone/log"): f"there is no directory {tmp_path}/gone",
        ("errorlog", "file/log"): "Not a directory",
    }
    for (name, place), reason in wrong.items():
        config = Config.from_mapping({name: str(tmp_path / place)})
        with pytest.raises(ConfigError) as caught:
            config.validate()
        assert str(caught.value).startswith(
            f"mapping: {name} = '{tmp_path / place}' (str) cannot be written: "
        )
        assert reason in str(caught.value)
    right = {"crash_dir": "new/deeper", "pid_path": "pid", "accesslog": "file", "errorlog": "new.log"}
    Config.from_mapping({name: str(tmp_path / place) for name, place in right.items()}).validate()
    Config.from_mapping(accesslog="/gone/log", logconfig_dict={"version": 1}).validate()
    assert sorted(found.name for found in tmp_path.iterdir()) == ["file", "folder", "link"]


def test_what_toml_cannot_say_is_a_comment() -> None:
    text = config_as_toml(
        Config.from_mapping(pid_path="caf\udce9", logconfig_dict={"version": 1, "none": None})
    )
    assert "# pid_path: caf\udce9  # code mapping; TOML cannot say it\n" in text
    assert "# logconfig_dict: " in text
    Config.from_mapping(tomllib.loads(text))


# -- names --------------------------------------------------------------------------------------------------

NEAR = [
    ("kep_alive", "keep_alive_timeout"),
    ("keep_alive", "keep_alive_timeout"),
    ("keepalive_timeout", "keep_alive_timeout"),
    ("timeout_keep_alive", "keep_alive_timeout"),
    ("log_level", "loglevel"),
    ("bnd", "bind"),
    ("port", "bind"),
    ("worker", "workers"),
    ("ssl_certfile", "certfile"),
    ("MAX_BODY_SIZE", "max_body_size"),
    ("reload", "use_reloader"),
    ("pid", "pid_path"),
]


@pytest.mark.parametrize(("wrong", "right"), NEAR)
def test_an_unknown_name_is_refused_with_the_nearest_right_one(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=rf"{wrong} = 3 \(int\): unknown setting; did you mean {right}\?"):
        setattr(Config(), wrong, 3)


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    assert nearest_setting("zzzzzz") is None
    with pytest.raises(ConfigError, match=r"unknown setting$"):
        Config.from_mapping(zzzzzz=1)


def test_private_names_and_a_subclasss_own_properties_are_free() -> None:
    class Special(Config):
        @property
        def shout(self) -> str:
            return self._shout

        @shout.setter
        def shout(self, value: str) -> None:
            self._shout = value.upper()

    config = Special()
    config.shout = "x"
    config._anything = 3  # type: ignore[attr-defined]
    assert config.shout == "X"


def test_a_subclass_may_set_settings_in_its_body() -> None:
    class Mine(Config):
        graceful_timeout = 1
        bind = "0.0.0.0:9"  # type: ignore[assignment]
        umask = "022"  # type: ignore[assignment]

        def helper(self) -> None: ...

    config = Mine()
    assert (config.graceful_timeout, config.bind, config.umask) == (1.0, ["0.0.0.0:9"], 0o22)
    assert str(config.source_of("bind")).startswith("code class ")
    config.bind = "a:1"
    assert config.bind == ["a:1"]


def test_a_subclass_with_a_wrong_name_or_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean keep_alive_timeout"):

        class Wrong(Config):
            kep_alive = 3

    class WrongValue(Config):
        workers = "many"  # type: ignore[assignment]

    with pytest.raises(ConfigError, match="WrongValue: workers = 'many'"):
        WrongValue()


# -- hypercorn's own machinery ------------------------------------------------------------------------------


def test_a_list_belongs_to_one_config() -> None:
    one, two = Config(), Config()
    one.bind.append("0.0.0.0:1")
    one.server_names.append("x")
    assert two.bind == ["127.0.0.1:8000"]
    assert two.server_names == HYPERCORN.server_names == []
    assert one.source_of("bind").origin is Origin.CODE
    assert two.source_of("bind").origin is Origin.DEFAULT


def test_a_config_can_be_copied_and_pickled() -> None:
    config = Config.from_mapping(bind="a:1", request_timeout="off", root_path="/x")
    for twin in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert config_as_toml(twin) == config_as_toml(config)


def test_a_config_shows_what_differs_from_the_default() -> None:
    assert repr(Config()) == "<Config all default>"
    assert repr(Config.from_mapping(bind="a:1", disconnect_grace="off")) == (
        "<Config bind=a:1, disconnect_grace=off>"
    )


def test_hypercorns_methods_still_work() -> None:
    config = Config.from_mapping(bind="127.0.0.1:0", statsd_host="127.0.0.1:8125", alt_svc_headers=["h3"])
    sockets = config.create_sockets()
    for sock in sockets.insecure_sockets:
        sock.close()
    assert len(sockets.insecure_sockets) == 1
    assert isinstance(config.log, hypercorn.logging.Logger)
    assert config.create_ssl_context() is None
    assert not config.ssl_enabled

    class Statsd(hypercorn.logging.Logger):
        pass

    config.set_statsd_logger_class(Statsd)
    assert config.logger_class is Statsd


def test_response_headers_name_trioserve() -> None:
    config = Config.from_mapping(alt_svc_headers=['h3=":1"'])
    assert dict(config.response_headers("h11"))[b"server"] == b"trioserve"
    assert [name for name, _ in config.response_headers("h11")] == [b"date", b"server", b"alt-svc"]
    config.include_date_header = config.include_server_header = False
    assert [name for name, _ in config.response_headers("h11")] == [b"alt-svc"]


def test_cert_reqs_sets_verify_mode_and_warns() -> None:
    config = Config()
    with pytest.warns(Warning, match="verify_mode"):
        config.cert_reqs = 2  # type: ignore[assignment]
    assert config.verify_mode is ssl.VerifyMode.CERT_REQUIRED


# -- sources ------------------------------------------------------------------------------------------------


def test_a_toml_file_lists_all_its_mistakes_at_once(tmp_path: Path) -> None:
    file = tmp_path / "hypercorn.toml"
    file.write_text('kep_alive = 5\nworkers = "4"\nbind = "127.0.0.1:0"\n[tool]\nx = 1\n')
    with pytest.raises(ConfigError) as caught:
        Config.from_toml(file)
    assert str(caught.value).splitlines() == [
        f"{file}: kep_alive = 5 (int): unknown setting; did you mean keep_alive_timeout?",
        f"{file}: workers = '4' (str): expected {BY_NAME['workers'].kind.expects}",
        f"{file}: tool = {{'x': 1}} (dict): unknown setting",
    ]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"bind = [", "not valid TOML: "),
        (b"\xff", "not valid TOML"),
        (None, "No such file or directory"),
        (
            b"\xef\xbb\xbfworkers = 1",
            "the byte order mark of UTF-8 (ef bb bf), and TOML has none: save the file",
        ),
        (
            "workers = 1".encode("utf-16"),
            "UTF-16 (ff fe), and TOML has none: save the file as UTF-8 without one",
        ),
        ("workers = 1".encode("utf-16-be"), "not valid TOML"),
        (codecs.BOM_UTF16_BE + "workers = 1".encode("utf-16-be"), "UTF-16 (fe ff)"),
    ],
)
def test_an_unreadable_toml_file_is_named(tmp_path: Path, content: bytes | None, text: str) -> None:
    file = tmp_path / "c.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config({}, {}, str(file))
    assert str(caught.value).startswith(f"{file}: ")
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            "[trioserve]\nbind = 'a:1'\nworkers = 1\n",
            "[trioserve] with bind, workers: settings stand at the top level",
        ),
        (
            "[server]\nport = 1\n[tool.x]\ny = 1\n[tool.trioserve]\nworkers = 1\n",
            "[tool.trioserve] with workers: ",
        ),
        ("[[server]]\nworkers = 1\n", "server = [{'workers': 1}] (list): unknown setting"),
        ("[server]\nport = 1\n", "server = {'port': 1} (dict): unknown setting"),
    ],
)
def test_settings_in_a_table_are_told_where_they_belong(tmp_path: Path, content: str, text: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f"backlog = 5\n{content}[sni_certificates.'a']\ncertfile = 'x'\nkeyfile = 'y'\n")
    with pytest.raises(ConfigError) as caught:
        Config.from_toml(file)
    assert str(caught.value).startswith(f"{file}: {text}")
    assert "\n" not in str(caught.value)


PYTHON_FILE = """
from __future__ import annotations
import os
from os import environ, path
from pathlib import Path

from hypercorn.logging import Logger

_half = 2
CPUS = 4
WORKERS = CPUS
def helper(): return 7
class Helper: pass
logger = __import__("logging").getLogger("x")

bind = ["127.0.0.1:0", "unix:x"]
keep_alive_timeout = helper()
logger_class = Logger
"""


def test_a_python_file_gives_its_settings_and_keeps_its_helpers(tmp_path: Path) -> None:
    file = tmp_path / "c"
    file.write_text(PYTHON_FILE)
    config = load_config({}, {}, f"file:{file}")
    assert config.keep_alive_timeout == 7
    assert config.bind == ["127.0.0.1:0", "unix:x"]
    assert str(config.source_of("bind")) == f"file {file}"
    assert config.advice() == [
        (logging.WARNING, f"{file}: WORKERS is not read: settings are written in lower case (workers)")
    ]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("kep_alive = 3", "kep_alive = 3 (int): unknown setting; did you mean"),
        ("bind = [", "c.py:1: "),
        ("x = 1\n1 / 0", "c.py:2: ZeroDivisionError"),
        ("open('/nowhere/at/all')", "c.py:1: FileNotFoundError"),
        ("import nowhere_at_all", "c.py:1: ModuleNotFoundError"),
        (None, "No such file"),
    ],
)
def test_a_python_files_failure_names_file_and_line(tmp_path: Path, content: str | None, text: str) -> None:
    file = tmp_path / "c.py"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        Config.from_pyfile(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert text in str(caught.value)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory for modules, which leaves nothing imported behind."""
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_modules_and_objects_in_them_are_found_from_the_working_directory(modules: Path) -> None:
    (modules / "conf_pkg").mkdir()
    (modules / "conf_pkg" / "__init__.py").write_text("backlog = 7\n")
    (modules / "conf_pkg" / "prod.py").write_text(
        "import hypercorn.config\n"
        "class Settings:\n    backlog = 8\n    _x = 1\n"
        "class Theirs(hypercorn.config.Config):\n    backlog = 9\n"
        "theirs = Theirs()\n"
    )
    for name, backlog in {
        "conf_pkg": 7,
        "conf_pkg.prod.Settings": 8,
        "conf_pkg.prod.Theirs": 9,
        "conf_pkg.prod.theirs": 9,
    }.items():
        assert load_config({}, {}, f"python:{name}").backlog == backlog


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nowhere_at_all", "no module named 'nowhere_at_all' in "),
        ("nowhere_at_all.x", "no module named 'nowhere_at_all' in "),
        ("conf_mod.x", "module 'conf_mod' has no attribute 'x'"),
        ("conf_bad", "conf_bad.py:1: ModuleNotFoundError"),
        ("conf_worse", "conf_worse.py:1: ZeroDivisionError"),
    ],
)
def test_a_module_that_is_missing_or_fails_is_told_apart(modules: Path, name: str, text: str) -> None:
    (modules / "conf_mod.py").write_text("bind = 'a:1'\n")
    (modules / "conf_bad.py").write_text("import also_nowhere\n")
    (modules / "conf_worse.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError) as caught:
        Config.from_object(name)
    assert str(caught.value).startswith(f"python:{name}: ") or name == "conf_mod.x"
    assert text in str(caught.value)


def test_an_object_gives_its_attributes() -> None:
    @dataclasses.dataclass
    class Mine:
        bind: str = "a:1"
        workers: int = 1

    assert Config.from_object(Mine()).bind == ["a:1"]
    with pytest.raises(ConfigError, match="object Mine: workers"):
        Config.from_object(type("Mine", (), {"workers": "x"})())


def test_mapping_and_keywords_mix() -> None:
    config = Config.from_mapping({"backlog": 1, "bind": "a:1"}, backlog=2)
    assert (config.backlog, config.bind) == (2, ["a:1"])


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("backlog = 1\naccept_batch = 1\nworkers = 0\n")
    environment = {"TRIOSERVE_BACKLOG": "2", "TRIOSERVE_ACCEPT_BATCH": "2", "PATH": "/bin"}
    config = load_config({"backlog": 3}, environment, str(file))
    assert (config.backlog, config.accept_batch, config.workers) == (3, 2, 0)
    assert str(config.source_of("backlog")) == "flag --backlog"
    assert str(config.source_of("accept_batch")) == "environment TRIOSERVE_ACCEPT_BATCH"
    assert str(config.source_of("workers")) == f"file {file}"
    assert str(config.source_of("bind")) == "default"


def test_the_environment_names_the_file_unless_a_flag_does(tmp_path: Path) -> None:
    one, two = tmp_path / "1.toml", tmp_path / "2.toml"
    one.write_text("backlog = 1")
    two.write_text("backlog = 2")
    assert load_config({}, {"TRIOSERVE_CONFIG": str(one)}).backlog == 1
    assert load_config({}, {"TRIOSERVE_CONFIG": str(one)}, str(two)).backlog == 2


ENVIRONMENT: list[tuple[str, str, Any]] = [
    ("bind", "a:1, unix:/x ,", ["a:1", "unix:/x"]),
    ("bind", "", []),
    ("workers", "0", 0),
    ("graceful_timeout", "2.5", 2.5),
    ("disconnect_grace", "off", None),
    ("disconnect_grace", "NONE", None),
    ("max_connections", "off", None),
    ("h2_connection_window", "auto", "auto"),
    ("h2_connection_window", "70000", 70000),
    ("umask", "007", 7),
    ("user", "0", 0),
    ("include_date_header", "no", False),
    ("include_date_header", "ON", True),
    ("pid_path", "", None),
    ("verify_flags", "VERIFY_X509_STRICT", ssl.VerifyFlags.VERIFY_X509_STRICT),
    ("logger_class", "hypercorn.logging:Logger", hypercorn.logging.Logger),
    ("contain_errors", "KeyError,a:B", ["KeyError", "a:B"]),
]


@pytest.mark.parametrize(("name", "text", "value"), ENVIRONMENT)
def test_an_environment_variable_is_read_as_its_kind(name: str, text: str, value: Any) -> None:
    config = load_config({}, {f"TRIOSERVE_{name.upper()}": text})
    assert getattr(config, name) == value


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        (
            "KEP_ALIVE",
            "3",
            "= '3' (str): unknown setting; did you mean TRIOSERVE_KEEP_ALIVE_TIMEOUT?",
        ),
        ("WORKERS", "four", "TRIOSERVE_WORKERS = 'four' (str): expected a whole number"),
        ("GRACEFUL_TIMEOUT", "soon", "expected a number of seconds"),
        ("GRACEFUL_TIMEOUT", "nan", "expected a number of seconds"),
        ("DAEMON", "maybe", "expected 1, true, yes, on"),
        ("UMASK", "9", "octal"),
        ("LOGCONFIG_DICT", "{}", "put it into a configuration file"),
    ],
)
def test_a_wrong_environment_variable_is_named(variable: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({}, {f"TRIOSERVE_{variable}": text})
    assert str(caught.value).startswith(f"environment: TRIOSERVE_{variable}")
    assert message in str(caught.value)


def test_an_unknown_override_is_refused() -> None:
    with pytest.raises(ConfigError, match="command line: bnd = 'x'"):
        load_config({"bnd": "x"}, {})


# -- hypercorn's Config -------------------------------------------------------------------------------------


def test_a_hypercorn_config_is_copied_with_its_own_graceful_timeout() -> None:
    theirs = HYPERCORN()
    theirs.bind = "0.0.0.0:80"
    theirs.root_path = "/x/"
    theirs.keep_alive_timeout = 7
    ours = Config.from_hypercorn(theirs)
    assert (ours.bind, ours.root_path, ours.keep_alive_timeout) == (["0.0.0.0:80"], "/x", 7)
    assert ours.graceful_timeout == 3
    assert ours.worker_class == "trio"
    assert ours.max_head_size == 65536
    assert ours.advice() == []
    ours.validate()
    ours.bind.append("x:1")
    assert theirs.bind == ["0.0.0.0:80"]


def test_a_hypercorn_subclasss_attributes_are_copied() -> None:
    class Base(HYPERCORN):  # type: ignore[misc, valid-type]
        graceful_timeout = 9
        bind = "a:1"

    class Theirs(Base):
        backlog = 5
        max_body_size = 10

        def response_headers(self, protocol: str) -> list[tuple[bytes, bytes]]:
            return []

    theirs = Theirs()
    theirs.kep_alive = 3
    ours = Config.from_hypercorn(theirs)
    assert (ours.graceful_timeout, ours.bind, ours.backlog, ours.max_body_size) == (9, ["a:1"], 5, 10)
    texts = [text for _, text in ours.advice()]
    assert texts[0] == "hypercorn Config: kep_alive is no setting; did you mean keep_alive_timeout?"
    assert "Theirs.response_headers is not called" in texts[1]


def test_a_hypercorn_config_with_a_wrong_value_is_refused() -> None:
    theirs = HYPERCORN()
    theirs.backlog = "many"
    with pytest.raises(ConfigError, match="hypercorn Config: backlog = 'many'"):
        Config.from_hypercorn(theirs)


def test_a_trioserve_config_is_not_copied() -> None:
    ours = Config()
    assert Config.from_hypercorn(ours) is ours


def test_hypercorns_event_loops_are_only_warned_of_in_hypercorns_sources(tmp_path: Path) -> None:
    theirs = HYPERCORN()
    theirs.worker_class = "uvloop"
    file = tmp_path / "hypercorn.toml"
    file.write_text('worker_class = "asyncio"\n')
    for config in (Config.from_hypercorn(theirs), Config.from_toml(file)):
        config.validate()
        assert "is ignored: trioserve always runs trio" in config.advice()[0][1]
    for config in (
        load_config({"worker_class": "asyncio"}, {}),
        load_config({}, {"TRIOSERVE_WORKER_CLASS": "uvloop"}),
        Config.from_mapping(worker_class="asyncio"),
    ):
        with pytest.raises(ConfigError, match="trioserve always runs trio"):
            config.validate()


def test_a_typical_hypercorn_file_starts_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "hypercorn.toml"
    file.write_text(
        'accesslog = "-"\naccess_log_format = "%(h)s %(r)s"\nbind = ["0.0.0.0:8000", "unix:/tmp/x.sock"]\n'
        'errorlog = "-"\ngraceful_timeout = 10\nh11_max_incomplete_size = 4\nkeep_alive_timeout = 30\n'
        'loglevel = "warning"\nworker_class = "uvloop"\nworkers = 1\nuse_reloader = false\n'
        "read_timeout = 20\n"
        "include_server_header = false\nwebsocket_ping_interval = 20\nmax_app_queue_size = 20\ndebug = true\n"
        'h2_max_concurrent_streams = 50\nroot_path = "/api"\nserver_names = ["example.org"]\numask = 7\n'
        'max_requests_jitter = 5\ndaemon = false\nalpn_protocols = ["http/1.1"]\n'
    )
    config = Config.from_toml(file)
    assert config.max_head_size == 4
    with pytest.raises(
        ConfigError, match=r"max_head_size \(from h11_max_incomplete_size \(file .*at least 256"
    ):
        config.validate()
    config.h11_max_incomplete_size = 4096
    config.validate()
    noted = {
        text.split(" = ")[0].rpartition(" ")[2] for level, text in config.advice() if level == logging.INFO
    }
    assert noted >= {
        "max_app_queue_size",
        "debug",
        "daemon",
    }


def test_a_python_file_that_is_taken_for_toml_is_told_how_to_be_given(tmp_path: Path) -> None:
    file = tmp_path / "conf.py"
    file.write_text("import os\n")
    with pytest.raises(ConfigError, match=f"for a Python file give file:{file}"):
        load_config({}, {}, str(file))


# -- the whole ----------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, Any, str]] = [
    ("keyfile", "x", "TLS needs certfile, too"),
    ("ca_certs", "x", "TLS needs certfile, too"),
    ("verify_mode", "CERT_REQUIRED", "TLS needs certfile, too"),
    ("verify_flags", "VERIFY_X509_STRICT", "TLS needs certfile, too"),
    ("sni_certificates", {"a.example": "x"}, "TLS needs certfile, too"),
    ("quic_bind", "a:1", "HTTP/3 is not served yet"),
]


@pytest.mark.parametrize(("name", "value", "text"), REFUSED)
def test_what_is_not_served_is_refused_by_name_with_the_reason(name: str, value: Any, text: str) -> None:
    config = Config.from_mapping({name: value})
    with pytest.raises(ConfigError) as caught:
        config.validate()
    assert f"mapping: {name} = " in str(caught.value)
    assert text in str(caught.value)


def test_all_problems_are_listed_at_once() -> None:
    config = Config.from_mapping(keyfile="x", ca_certs="x")
    with pytest.raises(ConfigError) as caught:
        config.validate()
    assert len(str(caught.value).splitlines()) == 2


def test_the_library_ignores_what_concerns_processes_with_a_warning() -> None:
    config = Config.from_mapping(workers=4, use_reloader=True)
    config.validate(library=True)
    assert config.advice(library=True) == [
        (logging.WARNING, "workers = 4 is ignored by serve(): it is for the command"),
        (logging.WARNING, "use_reloader = on is ignored by serve(): it is for the command"),
    ]
    config.max_requests = 5
    config.validate(library=True)
    assert "max_requests = 5 is ignored by serve()" in str(config.advice(library=True))


@pytest.mark.skipif(not CAN_SUPERVISE, reason="needs a supervisor")
def test_reloading_needs_a_supervisor() -> None:
    Config.from_mapping(use_reloader=True, workers=2).validate()
    with pytest.raises(ConfigError, match=r"workers = 0 \(code mapping\) has none: serve with --workers 1"):
        Config.from_mapping(use_reloader=True, workers=0).validate()


def test_reloading_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    with pytest.raises(ConfigError, match=r"pip install 'trioserve\[reload\]'"):
        Config.from_mapping(use_reloader=True).validate()
    Config.from_mapping(use_reloader=True).validate(library=True)


def test_in_development_errors_are_contained_unless_something_else_was_asked_for() -> None:
    config = load_config({"use_reloader": True}, {})
    assert config.on_app_error == "contain"
    assert config.advice() == [
        (logging.INFO, "on_app_error is contain, taken from use_reloader (flag --reload)")
    ]
    for flags, environment in [
        ({"use_reloader": True, "on_app_error": "replace"}, {}),
        ({"use_reloader": True}, {"TRIOSERVE_ON_APP_ERROR": "replace"}),
        ({}, {}),
    ]:
        assert load_config(flags, environment).on_app_error == "replace"
    # serve() does not reload, so it does not take what follows from reloading either.
    assert Config.from_mapping(use_reloader=True).on_app_error == "replace"


@pytest.mark.parametrize("bind", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.test:0"])
def test_development_on_a_public_address_is_warned_of(bind: str) -> None:
    config = load_config({"use_reloader": True, "bind": ["127.0.0.1:0", bind]}, {})
    assert (
        logging.WARNING,
        f"use_reloader: whoever can connect to {bind} is shown the app's source when it fails",
    ) in config.advice()
    for local in ("127.0.0.1:0", "localhost:0", "[::1]:0", "unix:/tmp/x"):
        config.bind = [local]
        assert "whoever" not in str(config.advice())


def test_a_command_knows_the_file_it_was_configured_by(tmp_path: Path) -> None:
    toml, python = tmp_path / "a.toml", tmp_path / "a.py"
    toml.write_text("")
    python.write_text("")
    assert load_config({}, {}, str(toml)).file_path == str(toml)
    assert load_config({}, {"TRIOSERVE_CONFIG": f"file:{python}"}).file_path == str(python)
    assert load_config({}, {}, "python:tests.apps").file_path is None
    assert load_config({}, {}).file_path is None


def test_a_command_reads_a_module_each_time_and_a_package_only_if_it_is_the_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    package = tmp_path / "again_package"
    package.mkdir()
    (package / "__init__.py").write_text("import trioserve\nimported = []\nmade = trioserve.Config\n")
    (package / "conf.py").write_text("workers = 1\n")
    (tmp_path / "again_module.py").write_text("class conf:\n    workers = 1\n")
    try:
        importlib.import_module("again_package").imported.append("by somebody")
        for name in ("again_package.conf", "again_module.conf"):
            assert load_config({}, {}, f"python:{name}").workers == 1
        (package / "conf.py").write_text("workers = 2\n")
        (tmp_path / "again_module.py").write_text("class conf:\n    workers = 2\n")
        for name in ("again_package.conf", "again_module.conf"):
            assert load_config({}, {}, f"python:{name}").workers == 2
        assert sys.modules["again_package"].imported == ["by somebody"]
        load_config({}, {}, "python:again_package.made")
        assert sys.modules["again_package"].imported == []
    finally:
        for name in [name for name in sys.modules if name.startswith("again_")]:
            del sys.modules[name]


def test_a_list_changed_into_nonsense_is_found() -> None:
    config = Config()
    config.bind.append("fd://x")
    with pytest.raises(ConfigError, match="'fd://x' is not"):
        config.validate()


def test_a_target_larger_than_the_head_is_a_contradiction_only_when_asked_for() -> None:
    Config.from_mapping(max_head_size=4096).validate()
    with pytest.raises(ConfigError, match=r"larger than max_head_size = 4096 \(code mapping\)"):
        Config.from_mapping(max_head_size=4096, max_target_size=8192).validate()


def test_an_engine_that_is_asked_for_has_to_take_as_many_fields_as_are_allowed() -> None:
    Config.from_mapping(http_engine="h1c", max_header_count=256).validate()
    Config.from_mapping(max_header_count=257).validate()
    with pytest.raises(
        ConfigError,
        match=r"'h1c'.*up to 256 fields, and max_header_count = 257 \(code mapping\) allows more: lower",
    ):
        Config.from_mapping(http_engine="h1c", max_header_count=257).validate()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"bind": ["unix:/x", "a:1", "unix:/x"]}, "unix:/x is named more than once: remove all but one"),
        ({"bind": ["unix:/x", "unix:/y/../x"]}, "unix:/x and unix:/y/../x are the same: remove one of them"),
        ({"bind": [f"unix:{os.getcwd()}/x", "unix:x"]}, "unix:x are the same"),
        ({"bind": ["a:1", "a:1"], "workers": 0}, "a:1 is named more than once"),
        ({"bind": ["fd://3", "fd://3"]}, "fd://3 is named more than once"),
    ],
)
def test_an_address_is_bound_once(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_mapping(settings).validate()
    assert str(caught.value).startswith("mapping: bind = [")
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_socket_file_has_one_name(tmp_path: Path) -> None:
    """As /run and /var/run are the same directory; what is behind `..` of a link is another one."""
    (tmp_path / "run" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run" / "deep")
    config = Config.from_mapping(bind=[f"unix:{tmp_path}/x", f"unix:{tmp_path}/link/../x"])
    config.validate()
    config.bind = [f"unix:{tmp_path}/run/deep/x", f"unix:{tmp_path}/link/x"]
    with pytest.raises(ConfigError, match="link/x are the same: remove one of them"):
        config.validate()


def test_an_address_speaks_either_tls_or_not() -> None:
    config = Config.from_mapping(bind=["a:1", "unix:x"], insecure_bind=["b:1", "unix:./x"])
    config.validate()  # without TLS it is not bound
    config.certfile = "certificate.pem"
    with pytest.raises(ConfigError) as caught:
        config.validate()
    assert str(caught.value) == (
        "mapping: insecure_bind = ['b:1', 'unix:./x'] (list): unix:./x is in bind (code mapping), where TLS is spoken, "
        "as well: remove it from one of them"
    )


def test_ports_that_the_kernel_chooses_are_not_the_same() -> None:
    Config.from_mapping(bind=["a:0", "a:0", "unix:x", "unix:y"]).validate()


def test_an_error_cannot_be_contained_and_fatal() -> None:
    with pytest.raises(ConfigError, match="both name 'KeyError'"):
        Config.from_mapping(contain_errors="KeyError", fatal_errors=["OSError", "KeyError"]).validate()


@pytest.mark.parametrize(("warn", "kill"), [(1, 1), (2, 1), (60, 60.0), (0.2, 0.1)])
def test_a_blocked_loop_is_warned_of_before_it_is_ended(warn: float, kill: float) -> None:
    with pytest.raises(
        ConfigError, match=rf"longer than block_warn = {warn} \(code mapping\), or one of them off"
    ):
        Config.from_mapping(block_warn=warn, block_kill=kill).validate()


@pytest.mark.parametrize(("warn", "kill"), [("off", 0.1), (100, "off"), ("off", "off"), (0.1, 0.2)])
def test_each_half_of_the_watch_may_be_off(warn: float | str, kill: float | str) -> None:
    Config.from_mapping(block_warn=warn, block_kill=kill).validate()


def test_h11s_limit_becomes_the_heads_unless_that_is_given() -> None:
    config = Config.from_mapping(h11_max_incomplete_size=4096)
    assert config.max_head_size == 4096
    assert config.advice() == [
        (logging.INFO, "max_head_size is 4096, taken from h11_max_incomplete_size (code mapping)")
    ]
    config.h11_max_incomplete_size = 5000
    assert config.max_head_size == 5000
    config.max_head_size = 6000
    config.h11_max_incomplete_size = 7000
    assert config.max_head_size == 6000
    assert config.advice() == []


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"request_queue_size": 5}, "request_queue_size has no effect without max_concurrent_requests"),
        ({"request_queue_timeout": 5}, "request_queue_timeout has no effect without"),
        ({"logconfig": "x.ini", "logconfig_dict": {}}, "logconfig_dict is ignored"),
        (
            {"websocket_ping_interval": "off", "websocket_ping_timeout": 5},
            "websocket_ping_timeout has no effect without websocket_ping_interval",
        ),
        ({"workers": 0, "max_requests": 5}, "max_requests = 5 has no effect with workers = 0"),
        ({"max_app_queue_size": 5}, "max_app_queue_size = 5 (int) has no effect: the app is never more than"),
    ],
)
def test_what_does_nothing_is_said(values: dict[str, Any], text: str) -> None:
    config = Config.from_mapping(values)
    config.validate()
    assert text in config.advice()[0][1]


def test_the_queues_settings_have_their_effect_with_a_limit() -> None:
    config = Config.from_mapping(request_queue_size=5, max_concurrent_requests=5)
    config.validate()
    assert config.advice() == []


def test_exceptions_are_resolved_by_name_or_taken_as_they_are() -> None:
    names = ["KeyError", "email.errors:MessageError", "json.decoder.JSONDecodeError", OSError]
    import email.errors
    import json

    assert resolve_exceptions(names) == (KeyError, email.errors.MessageError, json.JSONDecodeError, OSError)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("NoSuchError", "contain_errors: 'NoSuchError': module 'builtins' has no attribute"),
        ("json:loads", "is function, not an exception class"),
        ("int", "is type, not an exception class"),
        ("nowhere_at_all:X", "importing 'nowhere_at_all' failed"),
    ],
)
def test_an_exception_that_is_none_is_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_exceptions([name])
    assert text in str(caught.value)


# -- showing ------------------------------------------------------------------------------------------------


def test_the_printed_configuration_reads_back_the_same(tmp_path: Path) -> None:
    flags = {
        "bind": ["127.0.0.1:0", 'unix:/tmp/"quoted"'],
        "request_timeout": None,
        "umask": 7,
        "user": os.getuid(),
        "accesslog": "/tmp/\x7f\tü",
        "contain_errors": [KeyError, "a:B"],
        "logconfig_dict": {"version": 1, "root": {"handlers": ["x"], "level": 3.5}, "incremental": True},
        "verify_flags": ssl.VerifyFlags.VERIFY_X509_STRICT | ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF,
        "errorlog": None,
        "control": None,
        "root_path": "/x",
        "max_requests": 3,
    }
    config = load_config(flags, {"TRIOSERVE_MAX_HEAD_SIZE": "4096"})
    printed = config_as_toml(config)
    assert set(tomllib.loads(printed)) == {s.name for s in READABLE}
    file = tmp_path / "c.toml"
    file.write_text(printed, encoding="utf-8")
    again = load_config({}, {}, str(file))
    for setting in READABLE:
        mine, theirs = getattr(config, setting.name), getattr(again, setting.name)
        if setting.name == "contain_errors":
            mine = ["KeyError", "a:B"]
        assert mine == theirs, setting.name
    assert "max_head_size = 4096  # environment TRIOSERVE_MAX_HEAD_SIZE" in printed
    assert 'request_timeout = "off"  # flag --request-timeout' in printed
    assert "umask = 0o7" in printed


def test_what_toml_cannot_say_is_printed_as_a_comment() -> None:
    config = Config()
    config.errorlog = logging.getLogger("mine")
    config.logconfig_dict = {"version": None}
    printed = config_as_toml(config)
    tomllib.loads(printed)
    assert "# errorlog: <Logger mine" in printed
    assert "# logconfig_dict: {'version': None}" in printed
