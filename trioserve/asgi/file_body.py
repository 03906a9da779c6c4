"""A file, or a part of one, as the body of a response: what the app's event says, checked.

`asgi/exchange.py` makes a `FilePart` of an `http.response.zerocopysend` or `http.response.pathsend` event
(https://asgi.readthedocs.io/en/latest/extensions.html) and hands it to the wire; who sends it is `static/sendfile.py`.
Nothing here waits.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import Any

from trioserve.errors import FileSendFailed, UnexpectedMessage
from trioserve.structure.context import Message

ZEROCOPYSEND = "http.response.zerocopysend"
PATHSEND = "http.response.pathsend"


class KnownFile:
    """An open file that has been looked at already, and will be sent more than once.

    Attributes:
        fd: its descriptor.
        stat: of it, when it was opened.
        pages: what whoever sends it knows of its place in the page cache (`static/residency.py`); None until then.
    """

    __slots__ = ("fd", "pages", "stat")

    def __init__(self, fd: int, stat: os.stat_result) -> None:
        self.fd = fd
        self.stat = stat
        self.pages: Any = None

    def fileno(self) -> int:
        """The descriptor, as ASGI's `http.response.zerocopysend` asks for it."""
        return self.fd

    def part(self, offset: int, count: int) -> FilePart:
        """Bytes `offset` to `offset + count` of it."""
        return FilePart(self.fd, offset, count, self.stat, self.pages, self)


@dataclass(slots=True)
class FilePart:
    """Bytes `offset` to `offset + count` of an open file.

    Attributes:
        fd: the descriptor, borrowed from whoever opened it until the part is sent.
        offset, count: in bytes; the file was at least that long when it was looked at.
        stat: how it was when it was looked at.
        pages: what is known of its place in the page cache, or None.
        file: where that is kept for the next time, or None.
    """

    fd: int
    offset: int
    count: int
    stat: os.stat_result
    pages: Any = None
    file: KnownFile | None = None


def part_of(message: Message, fd: int) -> FilePart:
    """The part of an open regular file that an event asks for; without `count`, all from `offset` on.

    Raises:
        UnexpectedMessage: `offset` or `count` is no number of bytes, or the descriptor is no regular file's.
        FileSendFailed: the file ends before the part does.
    """
    offset, count = message.get("offset"), message.get("count")
    for name, value in (("offset", offset), ("count", count)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise UnexpectedMessage(f"{name!r} must be a number of bytes from 0 up, not {value!r:.80}")
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            raise UnexpectedMessage(f"'file' must be a regular file, not {_kind(facts.st_mode)}")
        if offset is None:
            offset = os.lseek(fd, 0, os.SEEK_CUR)
    except OSError as error:
        raise UnexpectedMessage(f"'file' cannot be read from: {error.strerror}") from error
    end = facts.st_size if count is None else offset + count
    if end > facts.st_size or offset > end:
        raise FileSendFailed(
            0, f"the file has {facts.st_size} bytes, but the app wants to send from {offset} to {end}"
        )
    return FilePart(fd, offset, end - offset, facts)


def borrowed_part(message: Message) -> FilePart:
    """The part that an `http.response.zerocopysend` event asks for.

    Raises:
        UnexpectedMessage: `file` has no descriptor that can be sent from.
        FileSendFailed: as `part_of`.
    """
    file = message.get("file")
    if isinstance(file, KnownFile):
        return file.part(message["offset"], message["count"])
    try:
        fd = file if isinstance(file, int) else file.fileno()  # type: ignore[union-attr]
    except (AttributeError, OSError, ValueError) as error:
        raise UnexpectedMessage(
            f"'file' must be an open file with a descriptor, not {type(file).__name__}"
        ) from error
    return part_of(message, fd)


def path_of(message: Message) -> str | bytes:
    """The path of an `http.response.pathsend` event.

    Raises:
        UnexpectedMessage: there is none.
    """
    path = message.get("path")
    try:
        return os.fspath(path)  # type: ignore[arg-type]
    except TypeError:
        raise UnexpectedMessage(f"'path' must be a path, not {type(path).__name__}") from None


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for check, name in kinds if check(mode)), "a device")
