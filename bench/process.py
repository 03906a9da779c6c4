"""One running server: started, asked, and ended.

Called by whoever takes a turn. `ServerProcess` is a context manager: whatever happens inside, on leaving it the
process and all its descendants are gone; processes are ended by their id only.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.apps import COUNT_PATH, FILES_VARIABLE
from bench.certificates import client_context, make_certificate
from bench.measure import ProcessStat, TurnError, listening_inode, process_tree, read_stat
from bench.servers import HOST, ROOT, TLS, Cores, Launch, Server

START_TIMEOUT = 30.0  # seconds until the first answer
STOP_TIMEOUT = 5.0  # seconds between SIGTERM and SIGKILL


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
        speaks: frozenset[str] = frozenset(),
    ) -> None:
        self.server = server
        self.app = app
        self.cores = cores
        self.port = 0
        self.startup_seconds = 0.0
        self._keep_alive = keep_alive
        self._files = files
        self._speaks = speaks
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

    @property
    def url(self) -> str:
        """Where it is to be found."""
        return f"{'https' if TLS in self._speaks else 'http'}://{HOST}:{self.port}/"

    def _start(self) -> None:
        self.port = free_port()
        launch = Launch(
            self.port,
            self.app,
            access_log=self.access_log_path,
            keep_alive=self._keep_alive,
            files=self._files,
            directory=Path(self._directory.name),
            speaks=self._speaks,
            certificate=make_certificate() if TLS in self._speaks else None,
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
        connection = self._http_connection()
        try:
            connection.request(method, path, body=body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _http_connection(self) -> http.client.HTTPConnection:
        if TLS in self._speaks:
            return http.client.HTTPSConnection(HOST, self.port, timeout=10, context=client_context())
        return http.client.HTTPConnection(HOST, self.port, timeout=10)

    def connect(self) -> socket.socket:
        """A connection for whoever speaks on it, over TLS if the server does."""
        connection = socket.create_connection((HOST, self.port), timeout=10)
        if TLS not in self._speaks:
            return connection
        try:
            return client_context().wrap_socket(connection, server_hostname=HOST)
        except BaseException:
            connection.close()
            raise

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
        last = self._patient_count()
        for _ in range(500):
            time.sleep(0.02)
            now = self._patient_count()
            if now == last:
                return now
            last = now
        raise TurnError("the application is still being called 10 s after the load has ended")

    def _patient_count(self) -> int:
        # hypercorn may drop a connection while it ends those of the load; the count of another try is as good.
        for _ in range(4):
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self.fetch_count().count
            time.sleep(0.05)
        return self.fetch_count().count

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
