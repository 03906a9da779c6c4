"""The control socket: where a person or a program tells a running server what to do.

The supervisor starts `serve_control` as a task and hands it a `ControlHandler`; `trioserve ctl` (`ctl.py`) is the
client. A request is one line of JSON, `{"command": "scale", "n": 4}`; the answer is `{"ok": true, "result": ...}` or
`{"ok": false, "error": "..."}`. Several requests may follow each other on one connection.

Only the server's own user and root get in: the file has mode 0600 from its first moment, and the kernel is asked who
has connected. Whatever a client sends or leaves unsent costs it its connection at most, and no failure in here ends
the supervisor: where the socket cannot be made, the server runs without.

Cancelling closes the connections, cuts commands that are under way, and removes the file. A client that leaves cuts
nothing: its command goes on, and its connection makes room for another one.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import trio

from trioserve.errors import BindError, TrioserveError
from trioserve.net.bind import Listeners, open_listeners
from trioserve.net.json_lines import BadMessage, JsonLines

# A person, a metrics collector, a deployment script; nobody needs more at a time.
MOST_CONNECTIONS = 8
# Beyond these, for who wants to know what is the matter, or to end it.
RESERVED_CONNECTIONS = 4
# Under way at a time, those included whose clients have left: a script that is tried again and again.
MOST_COMMANDS = 64
# From the connection, or the answer before, to the end of the request: further bytes don't extend it.
REQUEST_SECONDS = 30.0
# A client that asks and then does not read.
ANSWER_SECONDS = 30.0
# The longest command has a dozen characters.
REQUEST_LIMIT = 64 * 1024
# What the socket is worth when the process has run out of descriptors.
_ACCEPT_PAUSE = 1.0

SYSTEM_DIRECTORY = Path("/run/trioserve")


class ControlRefused(TrioserveError):
    """A command that is understood and not carried out; the message says why, to the person who gave it."""


class ControlHandler(Protocol):
    """What the commands do. Each result must be JSON; `ControlRefused` is the way to say no."""

    def status(self) -> dict[str, Any]:
        """The server as a whole."""
        ...

    def workers(self) -> list[dict[str, Any]]:
        """One entry for each worker."""
        ...

    async def scale(self, n: int, /) -> dict[str, Any]:
        """Have `n` workers (0 or more); `n` may be absurd."""
        ...

    async def recycle(self, worker_id: int | None, /) -> dict[str, Any]:
        """Replace one worker, or each of them in turn; return when that is done."""
        ...

    async def reload(self) -> dict[str, Any]:
        """Load configuration and app again; return when the new workers serve."""
        ...

    async def certificates(self) -> dict[str, Any]:
        """Have all workers read certificates and keys again, where they are; return when they have."""
        ...

    async def drain(self) -> dict[str, Any]:
        """End gently, as SIGTERM does; return once that has begun."""
        ...

    async def stop(self) -> dict[str, Any]:
        """End now, as SIGQUIT does; return once that has begun."""
        ...

    def crashes(self, crash_id: str | None, /) -> Any:
        """The crashes known, or the whole report of one."""
        ...


# -- where ---------------------------------------------------------------------------------------------------


def control_directories() -> list[Path]:
    """Where the sockets of this user's servers are, the place for a new one first."""
    user = os.geteuid()
    own = os.environ.get("XDG_RUNTIME_DIR") or (f"/run/user/{user}" if user else "")
    found = [Path(own, "trioserve")] if own else []
    # root's XDG_RUNTIME_DIR goes away when root logs out; a service that root runs does not.
    return [SYSTEM_DIRECTORY, *found] if user == 0 else [*found, SYSTEM_DIRECTORY]


def default_path(pid: int) -> Path | None:
    """Where the server `pid` has its control socket if nothing else is said; None if there is no place for it."""
    for directory in control_directories():
        there = os.access(directory, os.F_OK)
        if os.access(directory if there else directory.parent, os.W_OK | os.X_OK):
            return directory / f"{pid}.sock"
    return None


def is_live(path: Path) -> bool:
    """Whether somebody listens on this socket. Does not wait."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True  # so many clients that they queue
        except OSError:
            return False
    return True


def _open(path: Path, log: logging.Logger) -> Listeners | None:
    """The listening socket, or None where there can be none; that has been logged then."""
    is_default = path in [directory / f"{os.getpid()}.sock" for directory in control_directories()]
    try:
        if is_default:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            _sweep(path.parent)
        if is_live(path):
            log.warning(
                "the control socket is off: another server answers on %s; give each its own --control PATH",
                path,
            )
            return None
        listeners = open_listeners([f"unix:{path}"], umask=0o177)
        listeners.listen(MOST_CONNECTIONS + RESERVED_CONNECTIONS)
    except (OSError, BindError) as error:
        # Nobody asked for the default: a container with a read-only file system is no fault.
        level = logging.DEBUG if is_default else logging.ERROR
        log.log(level, "the control socket is off: %s; choose another path with --control PATH", error)
        return None
    return listeners


def _sweep(directory: Path) -> None:
    """Remove what servers that were killed have left behind."""
    for path in directory.glob("*.sock"):
        if path.stem.isascii() and path.stem.isdigit() and not is_live(path):
            try:
                os.kill(int(path.stem), 0)
            except (ProcessLookupError, OverflowError):
                with suppress(OSError):
                    path.unlink()
            except PermissionError:
                continue  # somebody else's process, which may be about to listen


# -- serving -------------------------------------------------------------------------------------------------


async def serve_control(
    path: Path | str,
    handler: ControlHandler,
    log: logging.Logger,
    *,
    task_status: trio.TaskStatus[Path | None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Take commands until cancelled; return at once where there can be no socket.

    Args:
        path: of the socket. A stale file is replaced, a live one left alone; the directory is made only where `path`
            is the default, and then it is no matter if it cannot be.
        handler: carries the commands out.
        log: the error log; commands that change something are logged.
        task_status: told the path once commands are taken, None if they won't be.
    """
    path = Path(path)
    listeners = _open(path, log)
    if listeners is None:
        task_status.started(None)
        return
    try:
        async with trio.open_nursery() as nursery:
            task_status.started(path)
            await _ControlServer(handler, log, nursery).run(listeners.sockets[0])
    finally:
        listeners.close()


@dataclass(frozen=True, slots=True)
class _Peer:
    """Who has connected, as the kernel says; None where it does not say (only Linux does, this way)."""

    pid: int | None
    uid: int | None

    def __str__(self) -> str:
        return f"process {self.pid} of user {self.uid}" if self.pid is not None else "a client"


class _ControlServer:
    """The clients of one control socket."""

    def __init__(self, handler: ControlHandler, log: logging.Logger, nursery: trio.Nursery) -> None:
        self._handler = handler
        self._log = log
        self._nursery = nursery
        self._connections = 0
        self._commands = 0

    async def run(self, listener: socket.socket) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener)
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError as error:
                self._log.warning("the control socket cannot accept a connection: %s", error.strerror)
                await trio.sleep(_ACCEPT_PAUSE)
                continue
            peer = _peer_of(sock)
            channel = JsonLines(sock, limit=REQUEST_LIMIT)
            objection = self._objection_to(peer)
            if objection:
                with suppress(OSError):
                    channel.send_nowait(_error(objection))
                channel.close()
            else:
                is_reserved = self._connections >= MOST_CONNECTIONS
                self._connections += 1
                self._nursery.start_soon(
                    self._serve, channel, peer, is_reserved, name=f"control connection of {peer}"
                )

    def _objection_to(self, peer: _Peer) -> str:
        if peer.uid not in (None, 0, os.geteuid()):
            self._log.warning("the control socket has turned %s away", peer)
            return f"only user {os.geteuid()} and root may control this server"
        if self._connections >= MOST_CONNECTIONS + RESERVED_CONNECTIONS:
            return f"{self._connections} control connections are open already; try again"
        return ""

    async def _serve(self, channel: JsonLines, peer: _Peer, is_reserved: bool) -> None:
        try:
            while (request := await self._next_request(channel)) is not None:
                if is_reserved and request.get("command") not in _ALWAYS:
                    answer = _error(
                        f"{MOST_CONNECTIONS} control connections are open already; try again, "
                        f"or ask for {', '.join(_ALWAYS)}"
                    )
                else:
                    answer = await self._answer_to(request, peer, channel)
                await self._send(channel, answer)
        except (OSError, trio.ClosedResourceError, trio.TooSlowError) as error:
            self._log.debug("control: %s has left: %s", peer, error)
        except Exception:
            self._log.exception("control: the connection of %s failed", peer)
        finally:
            channel.close()
            self._connections -= 1

    async def _next_request(self, channel: JsonLines) -> dict[str, Any] | None:
        """None at the end, which may be one that the client has just been told the reason for."""
        try:
            with trio.fail_after(REQUEST_SECONDS):
                return await channel.receive()
        except trio.TooSlowError:
            await self._send(channel, _error(f"no request came within {REQUEST_SECONDS:g} s"))
        except BadMessage as error:
            # Whoever does not speak the language has nothing further to say.
            await self._send(channel, _error(f"this is no request: {error}"))
        return None

    async def _answer_to(self, request: dict[str, Any], peer: _Peer, channel: JsonLines) -> dict[str, Any]:
        """Carry it out in a task of its own, which goes on when the client leaves.

        Raises:
            trio.ClosedResourceError: it has left before there was an answer.
        """
        answers: list[dict[str, Any]] = []

        async def carry_out() -> None:
            answers.append(await self._carry_out(request, peer))
            waiting.cancel(reason="there is an answer")

        with trio.CancelScope() as waiting:
            self._nursery.start_soon(carry_out, name=f"control command of {peer}")
            try:
                await channel.wait_hung_up()
            except OSError:
                # There is no descriptor left to see it by: there will be an answer.
                await trio.sleep_forever()
        if not answers:
            raise trio.ClosedResourceError("before there was an answer")
        return answers[0]

    async def _carry_out(self, request: dict[str, Any], peer: _Peer) -> dict[str, Any]:
        try:
            command, arguments = _check_request(request)
        except ControlRefused as refusal:
            return _error(str(refusal))
        if self._commands >= MOST_COMMANDS and command not in _ALWAYS:
            return _error(f"{MOST_COMMANDS} commands are under way already; the server's log says which")
        said = " ".join([command, *(str(value) for value in arguments if value is not None)])
        self._log.log(logging.DEBUG if command in _ASKING else logging.INFO, "control: %s, by %s", said, peer)
        self._commands += 1
        try:
            result = getattr(self._handler, command)(*arguments)
            if inspect.isawaitable(result):
                result = await result
        except ControlRefused as refusal:
            return _error(str(refusal))
        except Exception as error:
            self._log.exception("control: %s failed", said)
            return _error(f"{command} failed: {type(error).__name__}: {error} (the server's log has more)")
        finally:
            self._commands -= 1
        return {"ok": True, "result": result}

    async def _send(self, channel: JsonLines, answer: dict[str, Any]) -> None:
        with trio.fail_after(ANSWER_SECONDS):
            try:
                await channel.send(answer)
            except BadMessage as error:
                self._log.error("control: the answer %s", error)
                await channel.send(_error(f"the answer {error}"))


def _error(text: str) -> dict[str, Any]:
    return {"ok": False, "error": text}


def _peer_of(sock: socket.socket) -> _Peer:
    if not hasattr(socket, "SO_PEERCRED"):
        return _Peer(None, None)
    credentials = struct.Struct("iII")  # struct ucred, unix(7)
    pid, uid, _ = credentials.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))
    return _Peer(pid, uid)


# -- requests ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Argument:
    name: str
    is_right: Callable[[Any], bool]
    expects: str
    optional: bool = True


def _is_number(value: Any) -> bool:
    # More is a slip of the finger. What this machine bears is for the handler to say.
    return type(value) is int and 0 <= value <= 1_000_000


def _is_crash_id(value: Any) -> bool:
    # It becomes part of a file's name: no separators, no dots.
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,100}", value) is not None


#: every command is a method of the handler; nothing else of the handler can be reached
_COMMANDS: dict[str, _Argument | None] = {
    "status": None,
    "workers": None,
    "scale": _Argument("n", _is_number, "a number of workers", optional=False),
    "recycle": _Argument("worker_id", _is_number, "the number of a worker"),
    "reload": None,
    "certificates": None,
    "drain": None,
    "stop": None,
    "crashes": _Argument("crash_id", _is_crash_id, "the id of a crash"),
}
_ASKING = ("status", "workers", "crashes")
# None of them waits for anything, and who needs them cannot wait for others.
_ALWAYS = ("status", "drain", "stop")


def _check_request(request: dict[str, Any]) -> tuple[str, list[Any]]:
    """The command and its arguments in order; `ControlRefused` for what cannot be carried out."""
    command = request.pop("command", None)
    if not isinstance(command, str):
        raise ControlRefused('a request is an object such as {"command": "status"}')
    if command not in _COMMANDS:
        raise ControlRefused(f"unknown command {command[:40]!r}; there are {', '.join(_COMMANDS)}")
    argument = _COMMANDS[command]
    arguments = []
    if argument is not None:
        value = request.pop(argument.name, None)
        if not (argument.is_right(value) or (value is None and argument.optional)):
            raise ControlRefused(f"{command} needs {argument.name}: {argument.expects}")
        arguments.append(value)
    if request:
        raise ControlRefused(f"{command} has no argument {next(iter(request))[:40]!r}")
    return command, arguments
