"""Sending an `Answer` through ASGI: zero-copy where the server can, by reads in threads where it cannot.

Called by `handler.py`, which also serves under other servers. Cancelling ends between two events; the file's lease is
given back in any case, and a thread that still reads from it is waited for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, Self

from trioserve.asgi.exchange import Exchange
from trioserve.asgi.file_body import PATHSEND, ZEROCOPYSEND
from trioserve.errors import FileSendFailed
from trioserve.static.answers import Answer
from trioserve.static.open_file import OpenFile, read_resident
from trioserve.static.ranges import Span
from trioserve.static.threads import give_way, in_thread
from trioserve.structure.context import Scope, Send

# Read and sent at once where there is no zero-copy. Two of them are in memory for a connection at the most.
READ_SIZE = 128 * 1024

# Opens again what is open: a path to a file that was confined when it was opened, wherever its name leads by now.
_BY_NUMBER = "/proc/self/fd/%d" if sys.platform == "linux" else ""


class _OpenPath(str):
    """The path of an open file, by a descriptor of its own that is closed when nobody has the path any more.

    What stands before the server may hand an event on when we have returned (Starlette's `BaseHTTPMiddleware` does):
    the number of a descriptor that was only borrowed could be another file's by then.
    """

    __slots__ = ("_fd",)
    _fd: int

    def __new__(cls, fd: int) -> Self:
        own = os.dup(fd)
        path = super().__new__(cls, _BY_NUMBER % own)
        path._fd = own
        return path

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self._fd)


async def send_answer(answer: Answer, scope: Scope, send: Send) -> None:
    """Send a response whole.

    Raises:
        FileSendFailed: the file has become shorter or cannot be read; the response is incomplete.
        OSError: the client is gone, as the server says it.
    """
    # A copy: the fields are the cache's, and middleware may add its own in place.
    start = {"type": "http.response.start", "status": answer.status, "headers": answer.fields.copy()}
    file = answer.file
    if file is None:
        await send(start)
        # Errors that say something to GET, too: servers differ in whether they leave the body away.
        body = answer.body if scope["method"] != "HEAD" else b""
        await send({"type": "http.response.body", "body": body})
        return
    file.acquire()
    try:
        await send(start)
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        extensions = scope.get("extensions") or {}
        if ZEROCOPYSEND in extensions and _reaches_server(send):
            await send_pieces(answer, file, send)
        elif (extensions.get(PATHSEND) or {}).get("ranges") and len(answer.pieces) == 1 and _BY_NUMBER:
            await _send_by_path(answer, file, send)
        else:
            await _send_by_reading(answer, file, send)
    finally:
        file.release()


def _reaches_server(send: Any) -> bool:
    """Whether a file that is sent here gets to our server as such.

    The scope says what the server can, not what stands before it: Starlette's middleware, for one, loses events that it
    does not know (`BaseHTTPMiddleware` fails, `GZipMiddleware` drops them). What lets files through says so: its `send`
    is a method of an object whose `inner_send` is the next one.
    """
    while send is not None:
        owner = getattr(send, "__self__", None)
        if isinstance(owner, Exchange):
            return True
        send = getattr(owner, "inner_send", None)
    return False


async def send_pieces(answer: Answer, file: OpenFile, send: Send) -> None:
    """Send the body piece by piece, to a server that takes files."""
    last = len(answer.pieces) - 1
    for place, piece in enumerate(answer.pieces):
        more = place < last
        if isinstance(piece, Span):
            await send(
                {
                    "type": ZEROCOPYSEND,
                    "file": file,
                    "offset": piece.start,
                    "count": piece.length,
                    "more_body": more,
                }
            )
        else:
            await send({"type": "http.response.body", "body": piece, "more_body": more})


async def _send_by_path(answer: Answer, file: OpenFile, send: Send) -> None:
    """One span, by an event that middleware knows from Starlette's own file responses."""
    span = answer.span
    assert span is not None
    try:
        path = _OpenPath(file.fd)
    except OSError as error:
        raise FileSendFailed(error.errno, f"the file cannot be sent: {error.strerror}") from error
    await send({"type": PATHSEND, "path": path, "offset": span.start, "count": span.length})


async def _send_by_reading(answer: Answer, file: OpenFile, send: Send) -> None:
    for piece in answer.pieces:
        if not isinstance(piece, Span):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            continue
        offset = piece.start
        while offset < piece.stop:
            data = await _read(file, offset, min(READ_SIZE, piece.stop - offset))
            offset += len(data)
            await send({"type": "http.response.body", "body": data, "more_body": True})
            # Servers whose client has gone take all there is without a wait.
            await give_way()
    await send({"type": "http.response.body", "body": b""})


async def _read(file: OpenFile, offset: int, count: int) -> bytes:
    try:
        data = read_resident(file.fd, offset, count)
        if data is None:
            data = await in_thread(os.pread, file.fd, count, offset)
    except OSError as error:
        raise FileSendFailed(
            error.errno, f"the file cannot be read at byte {offset}: {error.strerror}"
        ) from error
    if not data:
        # Never made up for: a client that gets as many bytes as were announced takes them for the file.
        raise FileSendFailed(0, f"the file ends at byte {offset}; it has become shorter while it was sent")
    return data
