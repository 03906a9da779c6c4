"""A channel of JSON objects, one a line, over a connected stream socket.

Used between the supervisor and each worker (a socketpair), and by the control socket for each of its clients. The
kernel's buffer is the only queue: what does not fit there waits in `send`, or is dropped by `send_nowait`.

What cancelling does. `receive` loses nothing: what has arrived is there for the next call. `send` that is cancelled
before the first byte of its line has gone has sent nothing, and the channel is as it was; later than that, half a
line is on its way which nothing can follow, so the channel is closed, and a task in `receive` is told so.
"""

from __future__ import annotations

import json
import select
import socket
from contextlib import suppress
from typing import Any, NoReturn

import trio

from trioserve.errors import TrioserveError

# Room for a crash report (256 KiB) several times over.
DEFAULT_LIMIT = 1024 * 1024

# A unix socket's buffer holds about 200 KiB; a message of ours is rarely over 1 KiB.
_READ_SIZE = 65536


class BadMessage(TrioserveError):
    """What arrived is no JSON object on a line, or what is to be sent cannot be one.

    The channel is still whole: the line has been read (or nothing was sent), and the caller may answer.
    """


class JsonLines:
    """One end of the channel; the socket is its own from now on.

    One task may receive and any number may send; senders take turns.

    Args:
        sock: a connected stream socket.
        limit: the longest line that is accepted, in bytes. What is sent is not measured: the other end has a limit
            of its own.
    """

    __slots__ = ("_ended", "_received", "_searched", "_sending", "_skipping", "_sock", "_unsent", "limit")

    def __init__(self, sock: socket.socket, *, limit: int = DEFAULT_LIMIT) -> None:
        sock.setblocking(False)
        self.limit = limit
        self._sock = sock
        self._sending = trio.Lock()
        # At most one line: the rest of one of which the kernel has taken a part.
        self._unsent = bytearray()
        self._received = bytearray()
        # No line ends before here, so that a long one that comes in small parts is not searched again and again.
        self._searched = 0
        self._skipping = False
        self._ended = False

    def __repr__(self) -> str:
        fd = self._sock.fileno()
        state = "closed" if fd < 0 else "at its end" if self._ended else "open"
        return f"<JsonLines fd={fd} {state}, {len(self._unsent)} bytes to send>"

    # -- sending ---------------------------------------------------------------------------------------------

    async def send(self, message: dict[str, Any]) -> None:
        """Write one message, waiting for room if need be.

        Raises:
            BadMessage: JSON cannot express it (an object, NaN, an infinity).
            OSError: the peer is gone.
            trio.ClosedResourceError: this end was closed, before or meanwhile.
        """
        line = _encode(message)
        async with self._sending:
            await self._flush()  # what `send_nowait` may have left
            self._unsent += line
            try:
                await self._flush()
            except trio.Cancelled:
                if len(self._unsent) == len(line):
                    self._unsent.clear()
                else:
                    self.close()
                raise

    def send_nowait(self, message: dict[str, Any]) -> bool:
        """Write one message at once; False if the kernel's buffer is full, in which case it is dropped.

        A message of which the kernel takes a part (only one of more than 32 KiB can be) counts as written; the rest
        goes with the next message, or with `close`. Raises as `send` does.
        """
        line = _encode(message)
        self._check_open()
        if self._unsent and (self._sending.locked() or not self._write()):
            return False
        self._unsent += line
        if not self._write() and len(self._unsent) == len(line):
            self._unsent.clear()
            return False
        return True

    async def _flush(self) -> None:
        self._check_open()
        while not self._write():
            await trio.lowlevel.wait_writable(self._sock)

    def _write(self) -> bool:
        """Give the kernel what it takes; True if nothing is left."""
        try:
            while self._unsent:
                sent = self._sock.send(self._unsent)
                del self._unsent[:sent]
        except BlockingIOError:
            return False
        return True

    # -- receiving -------------------------------------------------------------------------------------------

    async def receive(self) -> dict[str, Any] | None:
        """The next message, or None once the peer has closed or died. Half a line before that is no message.

        Raises:
            BadMessage: the next line is too long, or no JSON object; the one after it comes with the next call.
            trio.ClosedResourceError: this end was closed, before or meanwhile.
            trio.BusyResourceError: another task is waiting to receive.
        """
        while True:
            # Between any two reads, so that a peer that never stops sending leaves the others their turn.
            await trio.lowlevel.checkpoint()
            self._check_open()
            line = self._take_line()
            if line is not None:
                return _decode(line)
            if self._ended:
                return None
            try:
                data = self._sock.recv(_READ_SIZE)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock)
                continue
            except OSError:  # a peer that closes with something unread resets the connection
                data = b""
            self._received += data
            self._ended = not data

    async def wait_hung_up(self) -> None:
        """Return once the peer has closed its socket, or died. One that just sends no more still wants its answer.

        Nothing is read, and another task may receive meanwhile. Linux only, where epoll tells the two apart.
        """
        self._check_open()
        with select.epoll() as poll:
            poll.register(self._sock, 0)  # EPOLLHUP is told unasked
            await trio.lowlevel.wait_readable(poll.fileno())

    def _take_line(self) -> bytearray | None:
        """The next whole line without its end, None if there is none yet; `BadMessage` if it is too long."""
        buffer = self._received
        end = buffer.find(b"\n", self._searched)
        if self._skipping and end >= 0:
            # The end of a line that was refused when it grew too long.
            del buffer[: end + 1]
            self._skipping = False
            self._searched = 0
            end = buffer.find(b"\n")
        if end < 0:
            if self._skipping:
                buffer.clear()
            self._searched = len(buffer)
            if self._searched <= self.limit:
                return None
            buffer.clear()
            self._skipping = True
            self._searched = 0
        else:
            line = buffer[:end]
            del buffer[: end + 1]
            self._searched = 0
            if len(line) <= self.limit:
                return line
        raise BadMessage(f"the line is longer than {self.limit} bytes")

    # -- the end ---------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the socket; whoever waits on the channel gets `ClosedResourceError`. May be called again."""
        if self._sock.fileno() >= 0:
            with suppress(OSError):
                self._write()
            with suppress(RuntimeError):  # after the end of trio's run nobody can be waiting
                trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    def _check_open(self) -> None:
        if self._sock.fileno() < 0:
            raise trio.ClosedResourceError("this end of the channel was closed")


# -- JSON ----------------------------------------------------------------------------------------------------


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


# Made once: the functions of the json module make one for each call with options. Pure ASCII is UTF-8 too, and
# file names that are no UTF-8 (lone surrogates) get through.
_ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _encode(message: dict[str, Any]) -> bytes:
    try:
        return _ENCODER.encode(message).encode("ascii") + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise BadMessage(f"cannot be written as JSON: {error}") from error


def _decode(line: bytearray) -> dict[str, Any]:
    try:
        message = _DECODER.decode(line.decode("utf-8"))
    except RecursionError:
        raise BadMessage("not JSON: nested too deeply") from None
    except ValueError as error:
        raise BadMessage(f"not JSON: {error}") from None
    if not isinstance(message, dict):
        raise BadMessage(f"expected a JSON object, such as {{}}, but this is {_NAMES[type(message)]}")
    return message


_NAMES = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}
