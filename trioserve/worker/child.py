"""A worker process that a supervisor has started: take what was inherited, read the orders, serve.

Called by `__main__.py`. From descriptor 3 on it finds the listening sockets, then the link, the table of
requests in flight, the file for last stacks, the pipe by which it is ended when its loop is blocked, and the board on
which all workers note their connections.
"""

from __future__ import annotations

import base64
import faulthandler
import json
import os
import pickle
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from trioserve.asgi.load import LoadedApp, load_app, wrap_app
from trioserve.config import Config
from trioserve.errors import EXIT_LOOP_BLOCKED, EXIT_OK, TrioserveError
from trioserve.net.bind import open_listeners
from trioserve.net.json_lines import JsonLines
from trioserve.net.share_board import Share, ShareBoard
from trioserve.observe.in_flight import InFlightTable
from trioserve.observe.privileges import drop_privileges
from trioserve.observe.process import explain
from trioserve.worker.command import Supervised, run_app
from trioserve.worker.parent_link import MESSAGE_LIMIT, ParentLink

# How much of the first line is read at once.
_READ_SIZE = 64 * 1024


@dataclass(frozen=True, slots=True)
class Inherited:
    """Descriptors, in the order in which the supervisor lists them."""

    listeners: Sequence[int]
    link: int
    table: int
    stacks: int
    abort: int
    board: int

    @classmethod
    def listed(cls, numbers: Sequence[int]) -> Self:
        """The last five are ours alone; those before them are listening sockets."""
        return cls(numbers[:-5], *numbers[-5:])


def main(link: int) -> int:
    """Serve until told to stop; returns the exit code."""
    numbers = range(3, link + 5)
    for number in numbers:
        os.set_inheritable(number, False)
    return serve_inherited(Inherited.listed(numbers))


def serve_inherited(inherited: Inherited, loaded: LoadedApp | None = None) -> int:
    """Read the orders and follow them; with `loaded` (by `preloader.py`) the app need not be loaded."""
    sock = socket.socket(fileno=inherited.link)
    orders = _read_orders(sock)
    if orders is None:
        return EXIT_OK  # the supervisor has gone before it could say anything
    sock.setblocking(False)
    return serve_orders(orders, inherited, sock, loaded)


def serve_orders(
    orders: dict[str, Any], inherited: Inherited, sock: socket.socket, loaded: LoadedApp | None = None
) -> int:
    """Load the app that the orders name, unless it is loaded, and serve it on the inherited sockets."""
    faulthandler.enable(inherited.stacks)  # SIGSEGV and its kin, and the SIGABRT that ends a hung worker
    config = restore_config(orders)
    link = JsonLines(sock, limit=MESSAGE_LIMIT)
    listeners = open_listeners([f"fd://{number}" for number in inherited.listeners])
    listeners.secure = config.ssl_enabled
    listeners.plain = {id(listeners.sockets[place]) for place in orders["plain"]}
    supervised = Supervised(
        link=ParentLink(link, config),
        listeners=listeners,
        in_flight=InFlightTable.attach(inherited.table),
        share=Share(ShareBoard(inherited.board), orders["place"]),
        last_words=inherited.stacks,
        watch_abort=lambda report: _watch_abort(inherited.abort, report),
    )
    try:
        if loaded is None:
            drop_privileges(config.user, config.group)
            loaded = load_app(orders["application"], factory=config.factory)
        return run_app(wrap_app(loaded.app, loaded.mode, config), config, supervised)
    except TrioserveError as error:
        explain(error)
        supervised.link.tell("failed", reason=str(error))
        return error.exit_code
    finally:
        listeners.close()
        link.close()  # with what is left of a report


def restore_config(orders: dict[str, Any]) -> Config:
    """The settings that our own parent has sent."""
    return Config.restored(pickle.loads(base64.b85decode(orders["settings"])))  # noqa: S301


def _read_orders(sock: socket.socket) -> dict[str, Any] | None:
    """The first line; the supervisor sends nothing more until we have answered."""
    sock.setblocking(True)
    line = b""
    while not line.endswith(b"\n"):
        # No more than this line: an order may be right behind it.
        end = sock.recv(_READ_SIZE, socket.MSG_PEEK).find(b"\n") + 1
        part = sock.recv(end or _READ_SIZE)
        if not part:
            return None
        line += part
    found: dict[str, Any] = json.loads(line)
    return found


def _watch_abort(pipe: int, report: Callable[[], None]) -> None:
    """Start the thread that reports and ends this process when the supervisor says that its loop is blocked.

    It blocks in read(2) until then, so it costs nothing, and the loop need not be able to do anything.
    """

    def watch() -> None:
        if os.read(pipe, 1):
            report()
            os._exit(EXIT_LOOP_BLOCKED)

    threading.Thread(target=watch, name="trioserve-abort", daemon=True).start()
