"""The servers under test: the cores they get, what each speaks, and its command line.

Called by `process.py`, which runs them, and by `run.py`. Every server gets one core, one worker, no access log unless
the workload asks for it, and its own fastest settings.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.certificates import Certificate

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"

# What a workload may ask for beside HTTP/1.1 on a plain connection, and a server may speak.
TLS, HTTP2, WEBSOCKET, DEFLATE = "tls", "h2", "websocket", "deflate"
_ALL_OF_THEM = frozenset({TLS, HTTP2, WEBSOCKET, DEFLATE})


# -- the cores ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cores:
    """Which core the server is pinned to, and which one the load; the same one where there is only one.

    Below 0: to none.
    """

    server: int
    load: int

    @property
    def separate(self) -> bool:
        """Whether server and load have a core each."""
        return self.server != self.load


def choose_cores() -> Cores:
    """Take the last allowed core for the server; for the load one that is not its hyper-thread sibling."""
    allowed = sorted(os.sched_getaffinity(0))
    server = allowed[-1]
    siblings = _hardware_threads(server)
    others = [core for core in allowed if core != server]
    apart = [core for core in others if core not in siblings]
    return Cores(server=server, load=(apart or others or [server])[0])


def _hardware_threads(core: int) -> set[int]:
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    try:
        text = path.read_text().strip()
    except OSError:
        return {core}
    threads: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        threads |= set(range(int(first), int(last or first) + 1))
    return threads


# -- the servers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """What one start needs: the port, the application, and what the workload asks for."""

    port: int
    app: str
    access_log: Path | None = None  # None: off; else the file it shall end up in
    keep_alive: int | None = None  # seconds; None leaves the server's default
    files: Path | None = None  # serve this directory instead of an application, under /files/
    directory: Path = Path()  # for what the server itself must have on disk
    speaks: frozenset[str] = frozenset()  # of TLS, HTTP2, WEBSOCKET, DEFLATE; HTTP/2 without TLS is h2c
    certificate: Certificate | None = None  # with TLS


@dataclass(frozen=True)
class Server:
    """A server, the module it needs, and its command line. `settings` is printed with the results."""

    name: str
    needs: tuple[str, ...]
    settings: str
    arguments: Callable[[Launch], list[str]]
    # Where the access log comes out: in its own file, on standard output, or not at all.
    access_log: str | None = None
    # Workloads that it cannot serve, with the reason that is printed in place of a figure.
    unfit: Mapping[str, str] = field(default_factory=dict)
    # Measured only under the workloads that matter most, unless --servers names it.
    minor: bool = False
    # How it serves `Launch.files`, where it can.
    files: Callable[[Launch], list[str]] | None = None
    # The program that takes the arguments; Python where there is none.
    program: str | None = None
    only_files: bool = False
    # What it speaks beside HTTP/1.1 on a plain connection.
    speaks: frozenset[str] = frozenset()
    only_websocket: bool = False

    @property
    def missing(self) -> list[str]:
        """The needed modules and programs that cannot be found."""
        missing = [module for module in self.needs if not find_module(module)]
        if self.program is not None and find_program(self.program) is None:
            missing.append(self.program)
        return missing

    def command(self, launch: Launch) -> list[str]:
        """The whole command line."""
        arguments = self.arguments if launch.files is None else self.files
        assert arguments is not None
        program = sys.executable if self.program is None else find_program(self.program)
        assert program is not None
        return [program, *arguments(launch)]


def find_program(name: str) -> str | None:
    """Where a program is; distributions put daemons where users do not look."""
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/usr/local/sbin")


def find_module(module: str) -> bool:
    """Whether a module could be imported."""
    # The package is looked for, not imported: one that is broken shall fail in its turns, with its words.
    package, _, part = module.partition(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not part:
        return spec is not None
    return any(Path(place, f"{part}.py").exists() for place in spec.submodule_search_locations or ())


def _optional(flag: str, value: object) -> list[str]:
    return [] if value is None else [flag, str(value)]


def _certificate(launch: Launch, chain: str, key: str) -> list[str]:
    if launch.certificate is None:
        return []
    return [chain, str(launch.certificate.chain), key, str(launch.certificate.key)]


def _trioserve(launch: Launch, engine: str) -> list[str]:
    arguments = ["-m", "trioserve", "--bind", f"{HOST}:{launch.port}", "--http-engine", engine]
    arguments += _optional("--keep-alive", launch.keep_alive)
    arguments += _certificate(launch, "--certfile", "--keyfile")
    if HTTP2 in launch.speaks:
        # Where wrk opens another connection, h2load is through; the peers come to no such end here.
        arguments += ["--keep-alive-max-requests", "1000000000"]
    if HTTP2 in launch.speaks and TLS not in launch.speaks:
        arguments += ["--h2c"]
    if WEBSOCKET in launch.speaks:
        arguments += ["--websocket-compression", "on" if DEFLATE in launch.speaks else "off"]
    return [*arguments, *_optional("--access-logfile", launch.access_log), launch.app]


def _hypercorn_kind(module: str, launch: Launch) -> list[str]:
    arguments = ["-m", module, "-k", "trio", "--bind", f"{HOST}:{launch.port}", "--log-level", "warning"]
    if launch.access_log is not None:
        arguments[-1] = "info"
    arguments += _optional("--keep-alive", launch.keep_alive)
    arguments += _certificate(launch, "--certfile", "--keyfile")
    return [*arguments, *_optional("--access-logfile", launch.access_log), launch.app]


def _uvicorn(launch: Launch, loop: str, http: str, websocket: str = "websockets-sansio") -> list[str]:
    arguments = ["-m", "uvicorn", "--host", HOST, "--port", str(launch.port), "--loop", loop, "--http", http]
    if launch.access_log is None:
        arguments += ["--no-access-log", "--log-level", "warning"]
    arguments += ["--ws", websocket if WEBSOCKET in launch.speaks else "none"]
    if WEBSOCKET in launch.speaks:
        arguments += ["--ws-per-message-deflate", "true" if DEFLATE in launch.speaks else "false"]
    arguments += _certificate(launch, "--ssl-certfile", "--ssl-keyfile")
    return [*arguments, *_optional("--timeout-keep-alive", launch.keep_alive), launch.app]


def _granian(launch: Launch) -> list[str]:
    arguments = ["-m", "granian", "--host", HOST, "--port", str(launch.port), "--interface", "asgi"]
    arguments += ["--workers", "1", "--loop", "uvloop", "--log-level", "warning"]
    arguments += ["--http", "auto" if HTTP2 in launch.speaks else "1"]
    arguments += ["--ws" if WEBSOCKET in launch.speaks else "--no-ws"]
    arguments += ["--runtime-threads", "1", "--no-access-log"]
    arguments += _certificate(launch, "--ssl-certificate", "--ssl-keyfile")
    if launch.keep_alive is not None:
        # A minute is the limit of its only clock on an idle connection; and it serves as many connections at
        # a time as its backpressure allows, 1,024 by default.
        arguments += ["--http1-header-read-timeout", "60000", "--backpressure", "16384"]
    return [*arguments, launch.app]


def _trioserve_files(launch: Launch, engine: str) -> list[str]:
    assert launch.files is not None
    mount = f"/files={launch.files}"
    return ["-m", "trioserve", "--bind", f"{HOST}:{launch.port}", "--http-engine", engine, "--static", mount,
            "bench.apps:hello"]  # fmt: skip


def _granian_files(launch: Launch) -> list[str]:
    route = ["--static-path-route", "/files", "--static-path-mount", str(launch.files)]
    return [*_granian(launch)[:-1], *route, "bench.apps:hello"]


# As the issue of a fair comparison asks: sendfile, whole segments, and descriptors kept open; one worker.
_NGINX = """
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr error;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    tcp_nodelay on;
    keepalive_requests 100000000;
    open_file_cache max=1000 inactive=60s;
    open_file_cache_valid 60s;
    open_file_cache_errors on;
    types {{ text/html html; application/octet-stream bin; }}
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen {host}:{port} backlog=511;
        location /files/ {{ alias {files}/; }}
    }}
}}
"""


def _nginx_files(launch: Launch) -> list[str]:
    path = launch.directory / "nginx.conf"
    path.write_text(
        _NGINX.format(directory=launch.directory, host=HOST, port=launch.port, files=launch.files)
    )
    # Of root's right to change the user nothing is left to it: it would lose the files.
    user = ["-g", "user root;"] if os.geteuid() == 0 else []
    return ["-p", str(launch.directory), "-c", str(path), "-e", "stderr", *user]


# It has no `python -m` form; the settings that its command line lacks are set on its module's server object.
_FASTPYSGI = """
import sys, fastpysgi
fastpysgi.server.tcp_nodelay = 1
sys.argv[0] = "fastpysgi"
fastpysgi.run_from_cli()
"""


def _fastpysgi(launch: Launch) -> list[str]:
    return ["-c", _FASTPYSGI, "--host", HOST, "-p", str(launch.port), launch.app]


OURS = ("trioserve", "trioserve-httptools", "trioserve-h11")

# What `--http-engine auto` takes; named, so that the table says which.
_FASTEST = "httptools"
with suppress(ImportError):
    from trioserve.http.engines import installed

    _FASTEST = next(installed())

SERVERS: tuple[Server, ...] = (
    Server(
        "trioserve",
        ("trioserve.__main__", "httptools"),
        f"one worker, {_FASTEST} engine",
        lambda launch: _trioserve(launch, _FASTEST),
        access_log="file",
        speaks=_ALL_OF_THEM,
        files=lambda launch: _trioserve_files(launch, _FASTEST),
    ),
    Server(
        "trioserve-httptools",
        ("trioserve.__main__", "httptools"),
        "one worker, httptools engine",
        lambda launch: _trioserve(launch, "httptools"),
        minor=True,
    ),
    Server(
        "trioserve-h11",
        ("trioserve.__main__", "h11"),
        "one worker, h11 engine",
        lambda launch: _trioserve(launch, "h11"),
        access_log="file",
        speaks=_ALL_OF_THEM,
        files=lambda launch: _trioserve_files(launch, "h11"),
    ),
    Server(
        "nginx",
        (),
        "sendfile, tcp_nopush, open_file_cache, one worker",
        _nginx_files,
        files=_nginx_files,
        program="nginx",
        only_files=True,
    ),
    Server(
        "fastpysgi",
        ("fastpysgi",),
        "ASGI, TCP_NODELAY",
        _fastpysgi,
        unfit={"stream-10": "version 0.6 sends the first of several body events in a row, then nothing more"},
    ),
    Server(
        "granian",
        ("granian", "uvloop"),
        "ASGI, uvloop, HTTP/1 (auto where HTTP/2 is measured), one runtime thread",
        _granian,
        speaks=_ALL_OF_THEM - {DEFLATE},
        files=_granian_files,
        unfit={"files-304": "it sends no validators"},
    ),
    Server(
        "uvicorn",
        ("uvicorn", "uvloop", "httptools"),
        "uvloop, httptools, websockets-sansio",
        lambda launch: _uvicorn(launch, "uvloop", "httptools"),
        access_log="stdout",
        speaks=_ALL_OF_THEM - {HTTP2},
        # Starlette's StaticFiles; its directory comes with the environment.
        files=lambda launch: _uvicorn(
            replace(launch, app="bench.apps:starlette_files"), "uvloop", "httptools"
        ),
    ),
    Server(
        "uvicorn-websockets",
        ("uvicorn", "uvloop", "httptools", "websockets"),
        "uvloop, httptools, websockets (its older implementation)",
        lambda launch: _uvicorn(launch, "uvloop", "httptools", "websockets"),
        minor=True,
        only_websocket=True,
        speaks=_ALL_OF_THEM - {HTTP2},
    ),
    Server(
        "uvicorn-h11",
        ("uvicorn", "h11"),
        "asyncio, h11",
        lambda launch: _uvicorn(launch, "asyncio", "h11"),
        access_log="stdout",
    ),
    Server(
        "hypercorn",
        ("hypercorn", "trio"),
        "-k trio",
        lambda launch: _hypercorn_kind("hypercorn", launch),
        access_log="file",
        speaks=_ALL_OF_THEM,
        unfit={"h2c-hello": "version 0.18 ends with a BusyResourceError when the connections of the load do"},
    ),
    Server(
        "anycorn",
        ("anycorn", "trio"),
        "-k trio",
        lambda launch: _hypercorn_kind("anycorn", launch),
        access_log="file",
        minor=True,
    ),
)
