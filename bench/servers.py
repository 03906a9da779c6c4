"""The servers under test: how each is started, asked, and ended.

Called by `load.py` and `memory.py`. Every server gets one core, one worker, no access log unless the workload
asks for it, and its own fastest settings. `ServerProcess` is a context manager: whatever happens inside, on
leaving it the process and all its descendants are gone; processes are ended by their id only.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.apps import COUNT_PATH, FILES_VARIABLE
from bench.measure import ProcessStat, TurnError, listening_inode, process_tree, read_stat

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"

START_TIMEOUT = 30.0  # seconds until the first answer
STOP_TIMEOUT = 5.0  # seconds between SIGTERM and SIGKILL


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

    @property
    def missing(self) -> list[str]:
        """The needed modules and programs that cannot be found."""
        missing = [module for module in self.needs if not _can_find(module)]
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


def _can_find(module: str) -> bool:
    # The package is looked for, not imported: one that is broken shall fail in its turns, with its words.
    package, _, part = module.partition(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not part:
        return spec is not None
    return any(Path(place, f"{part}.py").exists() for place in spec.submodule_search_locations or ())


def _optional(flag: str, value: object) -> list[str]:
    return [] if value is None else [flag, str(value)]


def _trioserve(launch: Launch, engine: str) -> list[str]:
    arguments = ["-m", "trioserve", "--bind", f"{HOST}:{launch.port}", "--http-engine", engine]
    arguments += _optional("--keep-alive", launch.keep_alive)
    return [*arguments, *_optional("--access-logfile", launch.access_log), launch.app]


def _hypercorn_kind(module: str, launch: Launch) -> list[str]:
    arguments = ["-m", module, "-k", "trio", "--bind", f"{HOST}:{launch.port}", "--log-level", "warning"]
    if launch.access_log is not None:
        arguments[-1] = "info"
    arguments += _optional("--keep-alive", launch.keep_alive)
    return [*arguments, *_optional("--access-logfile", launch.access_log), launch.app]


def _uvicorn(launch: Launch, loop: str, http: str) -> list[str]:
    arguments = ["-m", "uvicorn", "--host", HOST, "--port", str(launch.port), "--loop", loop, "--http", http]
    if launch.access_log is None:
        arguments += ["--no-access-log", "--log-level", "warning"]
    return [*arguments, *_optional("--timeout-keep-alive", launch.keep_alive), launch.app]


def _granian(launch: Launch) -> list[str]:
    arguments = ["-m", "granian", "--host", HOST, "--port", str(launch.port), "--interface", "asgi"]
    arguments += ["--workers", "1", "--loop", "uvloop", "--http", "1", "--no-ws", "--log-level", "warning"]
    arguments += ["--runtime-threads", "1", "--no-access-log"]
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


OURS = ("trioserve", "trioserve-h11")

SERVERS: tuple[Server, ...] = (
    Server(
        "trioserve",
        ("trioserve.__main__", "httptools"),
        "one worker, httptools engine",
        lambda launch: _trioserve(launch, "httptools"),
        access_log="file",
        files=lambda launch: _trioserve_files(launch, "httptools"),
    ),
    Server(
        "trioserve-h11",
        ("trioserve.__main__", "h11"),
        "one worker, h11 engine",
        lambda launch: _trioserve(launch, "h11"),
        access_log="file",
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
        "ASGI, uvloop, HTTP/1, one runtime thread",
        _granian,
        files=_granian_files,
        unfit={"files-304": "it sends no validators"},
    ),
    Server(
        "uvicorn",
        ("uvicorn", "uvloop", "httptools"),
        "uvloop, httptools",
        lambda launch: _uvicorn(launch, "uvloop", "httptools"),
        access_log="stdout",
        # Starlette's StaticFiles; its directory comes with the environment.
        files=lambda launch: _uvicorn(
            replace(launch, app="bench.apps:starlette_files"), "uvloop", "httptools"
        ),
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


# -- one running server -------------------------------------------------------------------------------------


def free_port() -> int:
    """Return a port that nobody listens on: the kernel picked it for a socket that we bound and closed."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """A server from its start to the end of its last process; use it as a context manager."""

    def __init__(
        self,
        server: Server,
        app: str,
        cores: Cores,
        *,
        access_log: bool = False,
        keep_alive: int | None = None,
        files: Path | None = None,
    ) -> None:
        self.server = server
        self.app = app
        self.cores = cores
        self.port = 0
        self.startup_seconds = 0.0
        self._keep_alive = keep_alive
        self._files = files
        self._directory = tempfile.TemporaryDirectory(prefix="bench-")
        self._output = Path(self._directory.name, "output.log")
        self._wants_access_log = access_log
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            self._directory.cleanup()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        code = None
        if error is not None and self._process is not None:
            # A dying process drops its connections a moment before it can be waited for.
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(0.2)
        tail = self.output_tail()
        self.stop()
        self._directory.cleanup()
        if not isinstance(error, OSError | http.client.HTTPException | TurnError):
            return
        if code is not None:
            message = f"the server ended with code {code} ({error}); it said: {tail}"
            raise TurnError(message) from error
        if not isinstance(error, TurnError):
            message = f"{type(error).__name__}: {error}; the server, still running, had said: {tail}"
            raise TurnError(message) from error

    @property
    def pid(self) -> int:
        """The id of the process we started; its workers are below it."""
        assert self._process is not None
        return self._process.pid

    @property
    def access_log_path(self) -> Path | None:
        """The file that holds the access log."""
        if not self._wants_access_log:
            return None
        return (
            self._output if self.server.access_log == "stdout" else Path(self._directory.name, "access.log")
        )

    def _start(self) -> None:
        self.port = free_port()
        launch = Launch(
            self.port,
            self.app,
            self.access_log_path,
            self._keep_alive,
            self._files,
            Path(self._directory.name),
        )
        command = self.server.command(launch)
        with self._output.open("wb") as output:
            begin = time.perf_counter()
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=_environment(self._files),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the benchmark, which then ends the server in order.
                start_new_session=True,
                preexec_fn=lambda: _in_child(self.cores.server),
            )
        self._wait_answer(begin)

    def _wait_answer(self, begin: float) -> None:
        assert self._process is not None
        while True:
            if (code := self._process.poll()) is not None:
                raise TurnError(
                    f"ended with code {code} before its first answer; it said: {self.output_tail()}"
                )
            try:
                answered_by = self.fetch_count().pid if self._files is None else self.listening_pid()
            except (OSError, http.client.HTTPException):
                if time.perf_counter() - begin > START_TIMEOUT:
                    tail = self.output_tail()
                    raise TurnError(f"no answer within {START_TIMEOUT:g} s; it said: {tail}") from None
                time.sleep(0.001)
                continue
            self.startup_seconds = time.perf_counter() - begin
            if answered_by not in {stat.pid for stat in process_tree(self.pid)}:
                raise TurnError(
                    f"port {self.port} is answered by process {answered_by}, which is not of this server"
                )
            return

    # -- asking ---------------------------------------------------------------------------------------------

    def fetch(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """One request on its own connection; returns status and body."""
        # No "Connection: close": fastpysgi 0.6 dies of a segmentation fault some time after such a request.
        connection = http.client.HTTPConnection(HOST, self.port, timeout=10)
        try:
            connection.request(method, path, body=body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def fetch_count(self) -> Count:
        """How many calls the application has counted, and in which process."""
        status, body = self.fetch("GET", COUNT_PATH)
        if status != 200:
            raise http.client.HTTPException(f"{COUNT_PATH} answered {status}")
        return Count(**json.loads(body))

    def listening_pid(self) -> int:
        """A process of ours that holds the listening socket of our port; for servers that run no application of ours.

        Raises:
            ConnectionError: nobody listens there yet.
            TurnError: somebody else does.
        """
        socket.create_connection((HOST, self.port), timeout=10).close()
        inode = listening_inode(self.port)
        for stat in process_tree(self.pid):
            for link in Path(f"/proc/{stat.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(link.readlink()) == f"socket:[{inode}]":
                        return stat.pid
        raise TurnError(f"port {self.port} is served by a process that is not of this server")

    def settled_count(self) -> int:
        """The count once it stands still: what the load left in flight has then been served."""
        last = self.fetch_count().count
        for _ in range(500):
            time.sleep(0.02)
            now = self.fetch_count().count
            if now == last:
                return now
            last = now
        raise TurnError("the application is still being called 10 s after the load has ended")

    def output_tail(self) -> str:
        """The end of what the server printed."""
        try:
            text = self._output.read_text(errors="replace").strip()
        except OSError:
            return "(nothing)"
        return text[-600:] or "(nothing)"

    # -- ending ---------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """SIGTERM, then SIGKILL for whatever is left of the tree; returns when all of it is gone."""
        process, self._process = self._process, None
        if process is None:
            return
        tree = process_tree(process.pid)
        try:
            process.terminate()
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stat in tree[1:]:
                _kill_leftover(stat)


@dataclass(frozen=True)
class Count:
    """The application's own account."""

    pid: int
    count: int


def _kill_leftover(stat: ProcessStat) -> None:
    # Workers normally end with their parent; one that a killed parent left behind is found by its id, and by
    # its start time, so that a stranger with a recycled id is left alone.
    deadline = time.monotonic() + 1.0
    while (now := read_stat(stat.pid)) is not None and now.start_time == stat.start_time:
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.kill(stat.pid, signal.SIGKILL)
            return
        time.sleep(0.01)


_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _in_child(core: int) -> None:
    if core >= 0:
        os.sched_setaffinity(0, {core})
    # Should the benchmark itself be killed, no server stays behind.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _environment(files: Path | None) -> dict[str, str]:
    # Settings of the caller's shell must not reach a server.
    prefixes = ("GRANIAN_", "UVICORN_", "TRIOSERVE_", "HYPERCORN_", "PYTHON", "WEB_CONCURRENCY", "FORWARDED_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    if files is not None:
        kept[FILES_VARIABLE] = str(files)
    return {**kept, "PYTHONPATH": str(ROOT)}
