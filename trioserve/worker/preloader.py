"""The process that has the app imported and forks workers from it (`--preload`): one thread, no trio, one socket.

Called by `__main__.py` in a process that `supervisor/preload.py` has started, which explains why. It imports what a
worker needs, takes all of it out of the garbage collector's sight, so that collections leave the shared pages alone,
and then does nothing but fork when told. It ends when the other end of its socket closes.

    supervisor -> preloader    {"application": ..., "settings": ...}, then for each worker {"do": "fork"} with the
                               descriptors that `worker_process.py` lists, as SCM_RIGHTS (unix(7))
    preloader -> supervisor    {"is": "loaded"} | {"is": "threads", "names": [...]} | {"is": "failed", "error": ...},
                               then for each worker {"is": "forked", "pid": ...} | {"is": "failed", "error": ...}

A worker is forked twice over, so that it becomes the child of the supervisor, which is a child subreaper (prctl(2)):
it is waited for like any other worker, and outlives this process. From then on it goes the way of one that was
started by exec. What it has in common with its siblings is what the app has made on import: also open files,
connections and temporary directories, which is why those belong into the lifespan.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from trioserve.asgi.load import LoadedApp, load_app
from trioserve.config import Config
from trioserve.errors import EXIT_OK, ConfigError, TrioserveError
from trioserve.http import engines
from trioserve.observe.privileges import drop_privileges
from trioserve.observe.process import explain
from trioserve.structure.context import Limits
from trioserve.worker.child import Inherited, restore_config, serve_inherited

_READ_SIZE = 64 * 1024

# As many as one message can carry (SCM_MAX_FD, unix(7)).
_MOST_DESCRIPTORS = 253

# What is sent to a whole process group, or to all processes of one name, is meant for others: nothing ends or stops
# this process but its socket and SIGKILL. Blocked and not ignored, so that a new worker finds what was sent to it.
_BLOCKED = signal.valid_signals()


def main(link: int) -> int:
    """Load, then fork; returns the exit code of this process, or of the worker that it has become."""
    os.set_inheritable(link, False)
    sock = socket.socket(fileno=link)
    orders, _ = _receive(sock)
    if orders is None:
        return EXIT_OK
    config = restore_config(orders)
    try:
        drop_privileges(config.user, config.group)
        loaded = load_app(orders["application"], factory=config.factory)
        import_rest(config)
    except TrioserveError as error:
        explain(error)
        _send(sock, {"is": "failed", "error": str(error)})
        return error.exit_code
    _flush()
    names = running_threads()
    if names:
        _send(sock, {"is": "threads", "names": names})
        os._exit(
            EXIT_OK
        )  # without the app's own ends: nothing has been served, and its threads need not agree
    gc.collect()
    gc.freeze()
    return _fork_on_request(sock, loaded)


def import_rest(config: Config) -> None:
    """Import what a worker would import later on."""
    with contextlib.suppress(ConfigError):  # a worker that cannot have it says so itself
        engines.factory(config.http_engine, Limits.from_config(config), raw_names=True)


def running_threads() -> list[str]:
    """The names of all threads but the one that asks, those that Python knows nothing of included."""
    known = {thread.native_id: thread.name for thread in threading.enumerate()}
    found = []
    for task in Path("/proc/self/task").iterdir():
        number = int(task.name)
        if number == threading.get_native_id():
            continue
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found.append(known.get(number) or (task / "comm").read_text(encoding="utf-8").strip())
    return sorted(found)


# -- forking -------------------------------------------------------------------------------------------------


def _fork_on_request(sock: socket.socket, loaded: LoadedApp) -> int:
    """Fork a worker for each request; returns only in a worker that has ended, with its exit code."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    _send(sock, {"is": "loaded"})
    while True:
        request, descriptors = _receive(sock)
        if request is None:
            os._exit(EXIT_OK)  # what the app wants done at the end of a process is for workers to do
        try:
            pid = fork_grandchild()
            if pid is None:
                sock.close()
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                return serve_inherited(Inherited.listed(descriptors), loaded)
            answer = {"is": "forked", "pid": pid}
        except OSError as error:
            answer = {"is": "failed", "error": str(error)}
        for descriptor in descriptors:
            os.close(descriptor)
        _send(sock, answer)


def fork_grandchild() -> int | None:
    """Fork a process whose parent is gone; returns its pid here, and None in it.

    The kernel gives an orphan to the nearest subreaper among its ancestors before the parent's end can be waited for,
    so by the time of the return it has its new parent.

    Raises:
        OSError: the machine is out of processes, memory or descriptors.
    """
    read, write = os.pipe()
    try:
        try:
            child = os.fork()
            if child == 0 and _fork_and_end(write):
                return None
        finally:
            os.close(write)
        # An app that has SIGCHLD ignored leaves nothing to wait for, but the call still lasts until the end.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
        told = int(os.read(read, _READ_SIZE) or -errno.EAGAIN)
    finally:
        os.close(read)
    if told < 0:
        raise OSError(-told, os.strerror(-told))
    return told


def _fork_and_end(write: int) -> bool:
    """In the process between: fork, tell the result, and end. Returns only in the process that this makes: True."""
    told = -errno.EAGAIN
    try:
        told = os.fork()
    except OSError as error:
        told = -(error.errno or errno.EAGAIN)
    finally:
        if told != 0:
            try:
                os.write(write, b"%d" % told)
            finally:
                os._exit(EXIT_OK)
    return True


# -- talking -------------------------------------------------------------------------------------------------


def _send(sock: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the supervisor has gone: the next read says so
        sock.sendall(json.dumps(message).encode() + b"\n")


def _receive(sock: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """One line, and the descriptors that came with it; None once the supervisor has gone."""
    line = b""
    descriptors: list[int] = []
    while not line.endswith(b"\n"):
        try:
            part, found, _, _ = socket.recv_fds(sock, _READ_SIZE, _MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            part, found = b"", []
        if not part:
            return None, []
        line += part
        descriptors += found
    message: dict[str, Any] = json.loads(line)
    return message, descriptors


def _flush() -> None:
    """What the app has printed on import and is still in a buffer is not for each worker to print again."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
