"""The settings of the process: app, sockets, workers, shutdown, logs, and the TLS that is not served yet.

Each declares its default with the reason for it, or the reason for which it is refused.
"""

from __future__ import annotations

import ssl

import hypercorn.config
import hypercorn.logging

from trioserve.config.setting import Setting, under
from trioserve.config.text_values import (
    Binds,
    Choice,
    EnumMember,
    HostPort,
    LoggerClass,
    LogLevel,
    LogTarget,
    Table,
    Text,
)
from trioserve.config.values import Account, Seconds, Switch, Umask, Whole

_NO_TLS = (
    "TLS is not served yet, and serving plain HTTP where TLS was asked for would be a hole: "
    "end TLS in a proxy in front and remove this setting"
)
_NO_SUPERVISOR = "the supervisor is not there yet"

APPLICATION = under(
    "Application",
    Setting(
        "application_path",
        Text(metavar="APP"),
        "",
        help="The app, when the command line names none: module:attribute, path/file.py:attribute, asgi: or "
        "wsgi: in front",
        reason="not set: normally an argument",
        positional=True,
    ),
    Setting(
        "factory",
        Switch(),
        False,
        help="What the path names is called without arguments and returns the app",
        reason="most paths name the app itself",
    ),
    Setting(
        "lifespan",
        Choice("auto", "on", "off"),
        "auto",
        help="ASGI lifespan: on (startup must succeed), off (not sent), or auto (an app without it is "
        "served without)",
        reason="auto suits every app; on makes a broken startup an error in an app that is known to have one",
    ),
    Setting(
        "startup_timeout",
        Seconds(above=True),
        60.0,
        help="Longest lifespan startup; else exit 3",
        reason="hypercorn's value: time for a connection pool or a model to load",
    ),
    Setting(
        "wsgi_max_body_size",
        Whole(0, unit="bytes"),
        16 * 1024 * 1024,
        help="WSGI apps: largest request body, which is held in memory; else 413",
        reason="hypercorn's value",
    ),
    Setting(
        "wsgi_threads",
        Whole(1),
        40,
        help="WSGI apps: most requests in threads at once; further ones wait",
        reason="trio's own default for threads",
    ),
)

LISTENING = under(
    "Listening",
    Setting(
        "bind",
        Binds(),
        ["127.0.0.1:8000"],
        help="Address to listen on: host:port, host, [v6]:port, unix:path or fd://number; repeatable",
        reason="hypercorn's value: only this machine can reach it",
        flags=("-b", "--bind"),
    ),
    Setting(
        "backlog",
        Whole(0, maximum=65535),
        100,
        help="Connections that the kernel holds until they are accepted",
        reason="hypercorn's value; the kernel's own limit (net.core.somaxconn) caps it",
    ),
    Setting(
        "umask",
        Umask(),
        None,
        help="Permission mask for unix sockets, in octal",
        reason="not set: the process's own",
        flags=("-m", "--umask"),
    ),
    Setting(
        "user",
        Account("user"),
        None,
        help="Owner of unix sockets, by name or number",
        reason="not set: the process's own",
        flags=("-u", "--user"),
    ),
    Setting(
        "group",
        Account("group"),
        None,
        help="Group of unix sockets, by name or number",
        reason="not set: the process's own",
        flags=("-g", "--group"),
    ),
    Setting(
        "accept_batch",
        Whole(1, maximum=65536),
        64,
        help="Most connections accepted in one go before other tasks run",
        reason="drains a burst without holding up the requests that are under way",
    ),
    Setting(
        "hub",
        Choice("auto", "epoll", "portable"),
        "auto",
        help="How readiness is learned: epoll, portable (trio's own), or auto: epoll where it exists",
        reason="epoll saves two system calls a wait; portable runs everywhere",
    ),
)

PROCESSES = under(
    "Processes",
    Setting(
        "workers",
        Whole(0),
        1,
        help="Worker processes; 0 and 1 both serve in this process",
        reason="one, as in hypercorn",
        flags=("-w", "--workers"),
        refused=f"{_NO_SUPERVISOR}: run one per port behind a proxy, or several as instances of a systemd "
        f"template",
        refused_when=lambda value: bool(value > 1),
        refused_in_library=False,
    ),
    Setting(
        "worker_class",
        Choice("trio", "asyncio", "uvloop"),
        "trio",
        help="Accepted for hypercorn's sake: trioserve always runs trio",
        reason="the only one there is",
        flags=("-k", "--worker-class"),
    ),
    Setting(
        "max_requests",
        Whole(1, off=True),
        None,
        help="Requests after which a worker is recycled",
        reason="off as in hypercorn",
        refused=f"recycling a worker needs a supervisor to start its successor, and {_NO_SUPERVISOR}: "
        f"remove it",
    ),
    Setting(
        "max_requests_jitter",
        Whole(0),
        0,
        help="Random extra on max_requests, so that workers are not recycled together",
        reason="0 as in hypercorn",
        without_effect="max_requests is not served yet",
    ),
    Setting(
        "use_reloader",
        Switch(),
        False,
        help="Start again when code changes",
        reason="off: for development only",
        flags=("--reload",),
        refused=f"reloading needs a supervisor to start the new worker, and {_NO_SUPERVISOR}: restart by "
        f"hand for now",
        refused_in_library=False,
    ),
    Setting(
        "pid_path",
        Text(optional=True, metavar="PATH"),
        None,
        help="File for the process id, written whole at start and removed at exit",
        reason="not set: service managers know the process without",
        flags=("-p", "--pid"),
    ),
    Setting(
        "daemon",
        Switch(),
        True,
        help="Accepted for hypercorn's sake, without effect",
        reason="hypercorn's value",
        flags=("-D", "--daemon"),
        without_effect="it marks hypercorn's worker processes as daemonic, and there are none here",
    ),
    Setting(
        "debug",
        Switch(),
        False,
        help="Accepted for hypercorn's sake, without effect",
        reason="hypercorn's value",
        without_effect="it is asyncio's debug mode; trio's checks are always on",
    ),
)

SHUTDOWN = under(
    "Shutdown",
    Setting(
        "pre_drain_delay",
        Seconds(),
        0.0,
        help="After the signal, time during which everything is still served before the drain begins",
        reason="0: set it where a load balancer learns of the shutdown late (Kubernetes endpoints)",
    ),
    Setting(
        "graceful_timeout",
        Seconds(),
        30.0,
        help="The drain: how long requests under way may take to finish; then they are cancelled",
        reason="30 is what systemd units and Kubernetes pods are commonly given; hypercorn's 3 is kept "
        "where a hypercorn Config is served",
    ),
    Setting(
        "hard_exit_after",
        Seconds(off=True),
        5.0,
        help="Time past the drain and the lifespan shutdown after which a watchdog thread ends the process "
        "(exit 82)",
        reason="cancelled handlers clean up in far less; code that blocks the loop never does",
    ),
    Setting(
        "shutdown_timeout",
        Seconds(above=True),
        60.0,
        help="Longest lifespan shutdown, on top of the drain",
        reason="hypercorn's value",
    ),
)

LOGS = under(
    "Logs",
    Setting(
        "accesslog",
        LogTarget(),
        None,
        help="File for the access log, - for stdout",
        reason="not set, as in hypercorn: a proxy in front usually writes one",
        flags=("--access-logfile",),
        deprecated_flags=("--access-log",),
    ),
    Setting(
        "access_log_format",
        Text(metavar="FORMAT"),
        hypercorn.config.Config.access_log_format,
        help="Format of access lines in hypercorn's atoms, or json for one object a line with phases and "
        "outcome",
        reason="hypercorn's value",
        flags=("--access-logformat",),
    ),
    Setting(
        "errorlog",
        LogTarget(),
        "-",
        help="File for the error log, - for stderr",
        reason="hypercorn's value: stderr",
        flags=("--error-logfile", "--log-file"),
        deprecated_flags=("--error-log",),
    ),
    Setting(
        "loglevel",
        LogLevel(),
        "INFO",
        help="Level of both logs",
        reason="hypercorn's value",
        flags=("--log-level",),
    ),
    Setting(
        "logconfig",
        Text(optional=True, metavar="PATH"),
        None,
        help="Configuration of Python's logging: an ini file, or json:path, or toml:path",
        reason="not set: the other settings of this group are enough for most",
        flags=("--log-config",),
    ),
    Setting(
        "logconfig_dict",
        Table(),
        None,
        help="The same as a table; not used when logconfig is given",
        reason="not set",
    ),
    Setting(
        "logger_class",
        LoggerClass(),
        hypercorn.logging.Logger,
        help="Accepted for hypercorn's sake: one of hypercorn's own classes; one of your own is refused at start (give "
        "a logging.Logger as accesslog and errorlog instead)",
        reason="hypercorn's own: its formats and atoms are served by a faster writer",
    ),
    Setting(
        "statsd_host",
        HostPort(),
        None,
        help="StatsD server for hypercorn's metrics",
        reason="not set",
    ),
    Setting(
        "statsd_prefix",
        Text(),
        "",
        help="Prefix of the metrics' names",
        reason="none",
    ),
    Setting(
        "dogstatsd_tags",
        Text(metavar="TAGS"),
        "",
        help="Tags added to each metric, as name:value,name:value",
        reason="none",
    ),
)

TLS = under(
    "TLS (refused: not served yet)",
    Setting(
        "certfile",
        Text(optional=True, metavar="PATH"),
        None,
        help="Certificate chain",
        reason="not set",
        refused=_NO_TLS,
    ),
    Setting(
        "keyfile",
        Text(optional=True, metavar="PATH"),
        None,
        help="Private key",
        reason="not set",
        refused=_NO_TLS,
    ),
    Setting(
        "keyfile_password",
        Text(optional=True),
        None,
        help="Password of the private key",
        reason="not set",
        refused=_NO_TLS,
        secret=True,
    ),
    Setting(
        "ca_certs",
        Text(optional=True, metavar="PATH"),
        None,
        help="Authorities for client certificates",
        reason="not set",
        refused=_NO_TLS,
    ),
    Setting(
        "ciphers",
        Text(),
        "ECDHE+AESGCM",
        help="Ciphers up to TLS 1.2",
        reason="hypercorn's value",
        refused=_NO_TLS,
    ),
    Setting(
        "verify_mode",
        EnumMember(ssl.VerifyMode),
        None,
        help="Whether client certificates are asked for",
        reason="not set",
        refused=_NO_TLS,
    ),
    Setting(
        "verify_flags",
        EnumMember(ssl.VerifyFlags),
        None,
        help="How certificates are checked",
        reason="not set",
        refused=_NO_TLS,
    ),
    Setting(
        "cert_reqs",
        EnumMember(ssl.VerifyMode),
        None,
        help="Old spelling of verify_mode",
        reason="not set",
        deprecated_flags=("--cert-reqs",),
        refused=_NO_TLS,
        write_only=True,
    ),
    Setting(
        "ssl_handshake_timeout",
        Seconds(above=True),
        60.0,
        help="Longest TLS handshake",
        reason="hypercorn's value",
        refused=_NO_TLS,
    ),
    Setting(
        "insecure_bind", Binds(), [], help="Address for plain HTTP beside TLS", reason="none", refused=_NO_TLS
    ),
    Setting(
        "quic_bind",
        Binds(),
        [],
        help="Address for HTTP/3",
        reason="none",
        refused="HTTP/3 is not served yet: remove it and offer HTTP/3 in a proxy in front",
    ),
)
