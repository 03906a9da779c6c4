"""The settings of the process: app, sockets, workers, shutdown and logs.

Each declares its default with the reason for it, or the reason for which it is refused.
"""

from __future__ import annotations

import os

import hypercorn.config
import hypercorn.logging

from trioserve.config.setting import Setting, under
from trioserve.config.text_values import (
    AutoPath,
    Binds,
    Choice,
    HostPort,
    LoggerClass,
    LogLevel,
    LogTarget,
    StaticMounts,
    Table,
    Text,
)
from trioserve.config.values import Account, MemoryLimit, Seconds, Switch, Umask, Whole, WorkerCount

# What the supervisor is built on.
CAN_SUPERVISE = hasattr(os, "pidfd_open") and hasattr(os, "memfd_create")

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
        "static_mounts",
        StaticMounts(),
        [],
        help="Directory to serve beside the app, as /prefix=DIR; repeatable. What is below the prefix never reaches "
        "the app",
        reason="none: StaticFiles in the app says more, this needs no line of code",
        flags=("--static",),
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
        help="Address to listen on: host:port, host, [v6]:port, :port (all), unix:path or fd://number; repeatable",
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
        help="User to become once the sockets are bound, and owner of unix sockets, by name or number",
        reason="not set: the process's own",
        flags=("-u", "--user"),
    ),
    Setting(
        "group",
        Account("group"),
        None,
        help="Group to become once the sockets are bound, and group of unix sockets, by name or number",
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
        WorkerCount(),
        1,
        help="Worker processes under a supervisor; auto is one for each CPU that this process may use, MIN..MAX "
        "scales with the load, 0 serves in this process",
        reason="one, as in hypercorn",
        flags=("-w", "--workers"),
        refused="worker processes need Linux (pidfd_open(2), memfd_create(2)): serve with --workers 0",
        refused_when=lambda value: value not in (0, 1) and not CAN_SUPERVISE,
        refused_in_library=False,
        command_only=True,
    ),
    Setting(
        "preload",
        Switch(),
        False,
        help="Import the app once and fork workers from there: a start in milliseconds, and shared memory; by exec "
        "as usual where the app starts threads on import",
        reason="off: what an app opens on import its workers would share",
        command_only=True,
    ),
    Setting(
        "worker_timeout",
        Seconds(above=True, off=True),
        30.0,
        help="A worker whose event loop gives no sign of life for this long is reported, ended and replaced",
        reason="gunicorn's value; a loop that is blocked for a second is a fault, one for half a minute is lost",
        command_only=True,
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
        help="Requests after which a worker is recycled; its successor is ready first",
        reason="off as in hypercorn",
        command_only=True,
    ),
    Setting(
        "max_requests_jitter",
        Whole(0),
        0,
        help="Random extra on max_requests, so that workers are not recycled together",
        reason="0 as in hypercorn",
        command_only=True,
    ),
    Setting(
        "max_lifetime",
        Seconds(above=True, off=True),
        None,
        help="Age at which a worker is recycled, less a random tenth",
        reason="off: a sound app does not age",
        command_only=True,
    ),
    Setting(
        "max_rss",
        MemoryLimit(),
        None,
        help="Resident memory beyond which a worker is recycled; up to 1: the part of the cgroup's limit that all "
        "workers may use together",
        reason="off: only who knows the app and the machine knows how much is too much",
        command_only=True,
    ),
    Setting(
        "use_reloader",
        Switch(),
        False,
        help="For development: new workers when code or configuration changes, tracebacks in the browser, "
        "on_app_error contain by default",
        reason="off: whoever can connect is shown the app's source",
        flags=("--reload",),
        command_only=True,
    ),
    Setting(
        "control",
        AutoPath(),
        "auto",
        help="Unix socket for trioserve ctl, open to the server's own user and root: a path, off, or auto: PID.sock "
        "in the runtime directory",
        reason="auto: one command finds the server; where there is no such directory the server runs without",
        command_only=True,
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
        "exit_when_idle",
        Seconds(above=True, off=True),
        None,
        help="Time without a request after which the server drains and exits 0, within twice that time",
        reason="off: of use where socket activation starts it again",
        command_only=True,
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
