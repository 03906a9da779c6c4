"""`trioserve ctl`: ask a running server for its state, or tell it what to do.

Called by `cli.py` for `trioserve ctl ...`. It finds the server's control socket (`control.py`, which describes the
protocol), sends one request, waits for the answer and prints it: a table for people, JSON for programs. It is a plain
blocking program; Ctrl-C ends the waiting, not the command.

Exit codes: 0 done, 1 the server refused, 2 usage (also: several servers to choose from), 69 no server answers, 74 the
answer cannot be printed.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trioserve.config.setting import ENVIRONMENT_PREFIX
from trioserve.errors import EXIT_OK, TrioserveError, UsageError
from trioserve.observe.command_line import CommandParser, say
from trioserve.supervisor.control import control_directories
from trioserve.supervisor.ctl_tables import as_text, printable

EXIT_REFUSED = 1
EXIT_UNAVAILABLE = 69  # sysexits.h: EX_UNAVAILABLE

# What the server answers out of its own memory.
_ASKING = ("status", "workers", "crashes")
_PATIENCE = 10.0
# After which a person at a terminal is told what is being waited for.
_SILENCE = 1.0

# Far beyond the longest crash report.
_ANSWER_LIMIT = 64 * 1024 * 1024

_VARIABLE = f"{ENVIRONMENT_PREFIX}CONTROL"


class ServerRefused(TrioserveError):
    """The server understood and said no, or failed to do it."""

    exit_code = EXIT_REFUSED


class NoServer(TrioserveError):
    """No server was found, or the one found does not answer."""

    exit_code = EXIT_UNAVAILABLE


class SeveralServers(TrioserveError):
    """The command line does not say which of those that run is meant."""

    exit_code = UsageError.exit_code


def run_ctl(argv: Sequence[str]) -> int:
    """Carry out `trioserve ctl` with these arguments; returns the exit code, 0.

    Raises:
        ServerRefused, NoServer, SeveralServers, UsageError, OutputFailed: for `cli.main` to print, each with its
            exit code.
        SystemExit: after --help.
    """
    asked = build_ctl_parser().parse(argv)
    given = vars(asked)
    request = {
        name: given[name] for name in ("command", "n", "worker_id", "crash_id") if given.get(name) is not None
    }
    with _find_server(given.get("control")) as sock:
        answer = _converse(sock, request, _PATIENCE if asked.command in _ASKING else None)
    if not answer["ok"]:
        raise ServerRefused(f"{asked.command}: {printable(answer.get('error'))}")
    result = answer.get("result")
    say(json.dumps(result, indent=2) if given.get("json") else as_text(asked.command, result))
    return EXIT_OK


# -- arguments -----------------------------------------------------------------------------------------------

_EXAMPLES = """\
examples:
  trioserve ctl status              how is it?
  trioserve ctl scale 4             run four workers
  trioserve ctl recycle             replace all workers, one after the other, without losing a request
  trioserve ctl reload && echo ok   new code and configuration are being served
  trioserve ctl workers --json | jq '.[].rss'

It is for a server that runs with a supervisor (--workers 1 or more) on this machine, and finds it by itself if
exactly one runs; otherwise give the socket with --control PATH, or in the environment as {variable}.
Exit codes: 0 done, 1 the server refused, 2 usage, 69 no server answers.
"""

_CRASH_ID_HELP = "show the whole report of this crash; without it, all crashes are listed"

# name, help, argument (name, type, whether it may be left out, metavar, help)
_Argument = tuple[str, Callable[[str], Any], bool, str, str]


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, such as 4")
    return int(text)


_COMMANDS: tuple[tuple[str, str, _Argument | None], ...] = (
    ("status", "the server's state, its traffic and its addresses", None),
    ("workers", "one line for each worker: age, requests, memory, CPU", None),
    (
        "scale",
        "change the number of workers; new ones start at once, superfluous ones finish what they have",
        ("n", _count, False, "N", "how many workers are wanted"),
    ),
    (
        "recycle",
        "replace a worker, or all in turn; each goes on serving until its successor is ready",
        ("worker_id", _count, True, "ID", "the worker's number in `workers`; without it, all of them"),
    ),
    (
        "reload",
        "load app and configuration again and replace the workers in turn; the old ones go on if that fails",
        None,
    ),
    (
        "certificates",
        "read certificates and keys again in the workers that run; the old ones go on if that fails",
        None,
    ),
    ("drain", "end gently, as SIGTERM does: accept nothing more, finish the requests under way", None),
    ("stop", "end now, as SIGQUIT does: requests under way are cancelled", None),
    ("crashes", "what has crashed, or one whole report", ("crash_id", str, True, "ID", _CRASH_ID_HELP)),
)


def build_ctl_parser() -> CommandParser:
    """The parser of `trioserve ctl`."""
    shared = CommandParser(add_help=False, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    shared.add_argument("--control", metavar="PATH", help="the server's control socket")
    shared.add_argument("--json", action="store_true", help="print the result as JSON, for programs")
    parser = CommandParser(
        prog="trioserve ctl",
        description="Ask a running trioserve for its state, or tell it what to do.",
        epilog=_EXAMPLES.format(variable=_VARIABLE),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[shared],
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, title="commands", parser_class=CommandParser
    )
    for name, help_, argument in _COMMANDS:
        command = commands.add_parser(
            name, help=help_, description=_sentence(help_), parents=[shared], allow_abbrev=False
        )
        if argument is not None:
            dest, type_, optional, metavar, help_ = argument
            command.add_argument(
                dest, type=type_, nargs="?" if optional else None, metavar=metavar, help=help_
            )
    return parser


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


# -- finding the server --------------------------------------------------------------------------------------


def _find_server(path: str | None) -> socket.socket:
    """A connection to the server that is meant."""
    wish = path or os.environ.get(_VARIABLE, "")
    if wish.lower() == "off" and not path:
        raise NoServer(f"{_VARIABLE} is off here: give the server's control socket with --control PATH")
    if wish.lower() not in ("", "auto"):
        return _connect_or_explain(Path(wish))
    live: list[tuple[Path, socket.socket]] = []
    closed: list[str] = []
    directories = control_directories()
    for candidate in sorted(_sockets_in(directories, closed)):
        try:
            live.append((candidate, _connect(candidate)))
        except PermissionError:
            closed.append(f"{candidate} belongs to {_owner(candidate)}: run this as that user, or as root")
        except OSError:
            continue  # left behind by a server that was killed
    if len(live) == 1:
        return live[0][1]
    lines = [_introduce(candidate, sock) for candidate, sock in live]
    if lines:
        raise SeveralServers(
            "several servers are running; choose one with --control PATH:\n" + "\n".join(lines)
        )
    looked = " and ".join(map(str, directories))
    advice = (
        "a server has one if it runs with a supervisor (--workers 1 or more) and --control is not off; if it is "
        "elsewhere, give its --control PATH here too"
    )
    found = f"no running server found; looked for control sockets in {looked}"
    raise NoServer("\n".join([found, *closed, advice]))


def _sockets_in(directories: Sequence[Path], closed: list[str]) -> list[Path]:
    found: list[Path] = []
    for directory in directories:
        try:
            found += [entry for entry in directory.iterdir() if entry.suffix == ".sock"]
        except PermissionError:
            closed.append(f"{directory} belongs to {_owner(directory)}: run this as that user, or as root")
        except OSError:
            continue  # there is none
    return found


def _owner(path: Path) -> str:
    try:
        return f"user {path.owner()}"
    except (KeyError, OSError):
        return "somebody else"


def _connect_or_explain(path: Path) -> socket.socket:
    try:
        return _connect(path)
    except OSError as error:
        reason = {
            FileNotFoundError: "there is no such file",
            ConnectionRefusedError: "nobody listens there; its server has ended",
            PermissionError: f"it belongs to {_owner(path)}: run this as that user, or as root",
        }.get(type(error), error.strerror or str(error))
        raise NoServer(f"no server answers on {path}: {reason}") from None


def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(_PATIENCE)
        sock.connect(str(path))
    except BaseException:
        sock.close()
        raise
    return sock


def _introduce(path: Path, sock: socket.socket) -> str:
    """One of several servers, so that a person can tell which it is."""
    with sock:
        try:
            status = _converse(sock, {"command": "status"}, _SILENCE)["result"]
            return f"  {path}  pid {status['pid']}  {status['application']}"
        except (TrioserveError, KeyError, TypeError):
            return f"  {path}"


# -- talking to it -------------------------------------------------------------------------------------------


def _converse(sock: socket.socket, request: dict[str, Any], patience: float | None) -> dict[str, Any]:
    """Send the request and wait for the answer, `patience` seconds for each part of it or without end."""
    sock.settimeout(patience)
    try:
        # A server that turns us away does so without listening; its answer says why.
        with suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(json.dumps(request).encode("ascii") + b"\n")
        line = _read_line(sock, patience)
    except TimeoutError:
        raise NoServer(
            f"the server has not answered within {patience:g} s; it may be stopped or stuck"
        ) from None
    except OSError as error:
        raise NoServer(
            f"the server has closed the connection: {error.strerror}; its log may say why"
        ) from None
    try:
        answer = json.loads(line)
        if isinstance(answer["ok"], bool):
            assert isinstance(answer, dict)
            return answer
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise NoServer(
        "the server has closed the connection without an answer; its log may say why"
        if not line
        else "what listens there does not answer as trioserve does"
    )


def _read_line(sock: socket.socket, patience: float | None) -> bytes:
    received = bytearray()
    if patience is None and sys.stderr.isatty():
        sock.settimeout(_SILENCE)
    while not received.endswith(b"\n") and len(received) < _ANSWER_LIMIT:
        try:
            part = sock.recv(65536)
        except TimeoutError:
            if patience is not None:
                raise
            sock.settimeout(None)
            print("waiting for the server; Ctrl-C ends the waiting, not the command", file=sys.stderr)
            continue
        if not part:
            break
        received += part
    return bytes(received)
