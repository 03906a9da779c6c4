"""The one engine that puts files on a connection: zero-copy where the kernel can, without stopping the event loop.

`http/http1_exchange.py` calls it for every file that an app sends, `StaticFiles` included. The kernel copies from the
page cache to the socket (sendfile(2)); what is not in the page cache is read by a thread first, since sendfile would
hold up the whole worker for the disk. A file is sent in windows; between two of them the task gives way to others, and
may be cancelled: then, and when the file turns out to be shorter than it was, the response stays visibly truncated,
and the connection is not used again. While the task waits for a slow peer, the hub sends on in its place, and wakes it
when there is something else to do: to wake a task for every part that the peer has made room for costs more than to
send the part.

Where the connection cannot take a file (`Transport.sends_files`: TLS; and HTTP/2), or the file system has no sendfile,
its bytes are read, by threads where they are not in memory, a part at a time, as fast as the peer takes them.
"""

from __future__ import annotations

import enum
import errno
import os
import time
from collections.abc import Callable
from typing import Protocol

import trio

from trioserve.asgi.file_body import FilePart
from trioserve.errors import FileSendFailed
from trioserve.net.transport import Transport
from trioserve.static.open_file import OpenFile, read_resident
from trioserve.static.residency import SURPRISE_SECONDS, PageCache

# What one sendfile may take. Large enough that calls are few, small enough that one that meets a slow page, or a peer
# that reads as fast as we send, does not keep the others waiting for more than a fraction of a millisecond.
WINDOW = 2 * 1024 * 1024

# What a thread reads at once where there is no sendfile: two of them in memory for a connection at the most.
READ_SIZE = 128 * 1024

# Threads that open and read files. Disks answer better to several requests than to one, but not to fifty.
_THREADS = 8

# A peer that takes all we send gives the task no reason to wait: give way this often (seconds).
_FAIRNESS_INTERVAL = 0.002

# sendfile(2): the file system cannot do it.
_NO_SENDFILE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})

_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class ByteSink(Protocol):
    """Where the bytes of a file go that are read here: what every exchange offers."""

    async def write(self, data: bytes) -> None:
        """Write bytes, waiting as long as the peer leaves no room."""
        ...


class FileSink(ByteSink, Protocol):
    """Where a file goes: what an exchange offers whose connection may take one."""

    transport: Transport

    def note_sent(self, count: int) -> None:
        """`count` bytes of the file are with the kernel."""
        ...

    async def wait_room(self, push: Callable[[], bool]) -> None:
        """Wait, for as long as the peer may take, until the kernel takes more and `push` has returned True.

        `push` is called by whoever hears first that there is room, be it another task.
        """
        ...


class _State(enum.Enum):
    """Why a part was not sent any further."""

    #: the kernel has all of it
    DONE = enum.auto()
    #: the socket takes no more
    FULL = enum.auto()
    #: the window that begins here is not in memory
    COLD = enum.auto()
    #: others shall have their turn
    TURN = enum.auto()
    #: the file has ended (`error` is None), it cannot be read, or the connection is broken
    FAILED = enum.auto()


_DONE, _FULL, _COLD, _TURN, _FAILED = _State


class _Sending:
    """One part on its way by sendfile: all of it that needs no waiting.

    Attributes:
        offset: as far as the kernel has it. end: where the part ends.
        window_end: where the window ends that begins before `offset` or there.
        error: what sendfile has failed with, if it has.
    """

    __slots__ = (
        "_clock", "_fd", "_looked_at", "_page_cache", "_pages", "_sink", "_state", "end", "error", "offset",
        "window_end",
    )  # fmt: skip

    def __init__(
        self, part: FilePart, sink: FileSink, page_cache: PageCache, clock: Callable[[], float]
    ) -> None:
        self.offset = part.offset
        self.end = part.offset + part.count
        self.window_end = min(self.end, self.offset + WINDOW)
        self.error: OSError | None = None
        self._fd = part.fd
        self._pages = part.pages
        self._sink = sink
        self._page_cache = page_cache
        self._clock = clock
        self._state = _TURN
        # `prepare` has, but the head may have had to wait for the peer; to ask again is cheap.
        self._looked_at = False

    def push(self) -> _State:
        """Send what the socket takes; must not be called while somebody waits with `push_in_background`."""
        # What the hub has met, the task has to deal with.
        if self._state is not _COLD and self._state is not _FAILED:
            self._state = self._push()
        return self._state

    def push_in_background(self) -> bool:
        """What `push` does, for the hub, which does not raise; False if the socket is full again."""
        return self.push() is not _FULL

    def note_warm(self) -> None:
        """A thread has read the window."""
        self._looked_at = True
        self._state = _TURN

    def _push(self) -> _State:
        page_cache, pages, sink, fd, end = self._page_cache, self._pages, self._sink, self._fd, self.end
        sendfile = sink.transport.sendfile_nowait
        clock = self._clock
        offset = self.offset
        now = clock()
        give_way_at = now + _FAIRNESS_INTERVAL
        while offset < end:
            if offset == self.window_end:
                self.window_end = min(end, offset + WINDOW)
                self._looked_at = False
            if not self._looked_at:
                if not page_cache.is_warm(pages, offset, self.window_end - offset, now):
                    return _COLD
                self._looked_at = True
            began = now
            try:
                sent = sendfile(fd, offset, self.window_end - offset)
            except OSError as error:
                # Its traceback holds this frame, and with it all of the exchange.
                self.error = error.with_traceback(None)
                return _FAILED
            if sent is None:
                # TLS may be at its end while its socket is only full: there will be no room ever.
                self.error = sink.transport.broken
                # A slow peer may come back for pages that have left the cache meanwhile.
                self._looked_at = False
                return _FULL if self.error is None else _FAILED
            if not sent:
                return _FAILED
            self.offset = offset = offset + sent
            sink.note_sent(sent)
            now = clock()
            if now - began > SURPRISE_SECONDS:
                page_cache.note_send(pages, sent, now - began, now)
            if now > give_way_at and offset < end:
                return _TURN
        return _DONE


class FileSender:
    """Opens, warms and sends files for all connections of a worker."""

    def __init__(self, clock: Callable[[], float], page_cache: PageCache | None = None) -> None:
        """`clock` is trio's."""
        self.page_cache = page_cache or PageCache()
        self._clock = clock
        self._threads = trio.CapacityLimiter(_THREADS)

    def close(self) -> None:
        """Release what the page cache's probes hold."""
        self.page_cache.close()

    async def open(self, path: str | bytes) -> int:
        """Open a file for reading, in a thread; the descriptor is the caller's.

        Raises:
            FileSendFailed: it cannot be opened.
        """
        # Not abandoned when cancelled: nobody would close the descriptor.
        found = await trio.to_thread.run_sync(_open, path, limiter=self._threads)
        if isinstance(found, OSError):
            raise _failed(f"{path!r:.200} cannot be opened", found)
        if isinstance(found, ValueError):
            raise FileSendFailed(0, f"{path!r:.200} is no path: {found}")
        return found

    def begin(
        self, transport: Transport, head: bytes, file: OpenFile, start: int, count: int, now: float
    ) -> int | None:
        """Send a head and the first window behind it, in two calls, where that is certain to need no wait.

        `now` is what the clock has just said. Returns how many bytes the kernel has taken, the head's included, which
        may be fewer than these; what is left goes by `prepare` and `send`. None if nothing was sent.

        Raises:
            OSError: the connection is broken.
        """
        pages = file.pages
        if pages is None or not transport.sends_files:
            return None
        if count > WINDOW:
            count = WINDOW
        if not self.page_cache.is_warm(pages, start, count, now):
            return None
        began = time.perf_counter()
        sent = transport.send_with_file_nowait(head, file.fd, start, count)
        took = time.perf_counter() - began
        if took > SURPRISE_SECONDS:
            self.page_cache.note_send(pages, max(0, sent - len(head)), took, now + took)
        return sent

    async def prepare(self, part: FilePart) -> None:
        """Have the first window of a part in memory, so that its head need not wait for the disk.

        Raises:
            FileSendFailed: it cannot be read.
        """
        pages = part.pages
        if pages is None:
            pages = part.pages = self.page_cache.pages(part.fd, part.stat)
            if part.file is not None:
                part.file.pages = pages
        count = min(part.count, WINDOW)
        if pages.never_warm or not count:
            return
        if not self.page_cache.is_warm(pages, part.offset, count, self._clock()):
            await self._warm(part, part.offset, count)

    async def send(self, part: FilePart, sink: FileSink) -> None:
        """Send a prepared part; returns when the kernel has all of it.

        Raises:
            FileSendFailed: the file ended early, or cannot be read; what was sent of it cannot be taken back.
            OSError: the connection is broken.
        """
        if not sink.transport.sends_files or part.pages.never_warm:
            await self.send_by_reading(part, sink)
            return
        sending = _Sending(part, sink, self.page_cache, self._clock)
        while (state := sending.push()) is not _DONE:
            if state is _FULL:
                await sink.wait_room(sending.push_in_background)
            elif state is _TURN:
                await trio.lowlevel.checkpoint()
            elif state is _COLD:
                await self._warm(part, sending.offset, sending.window_end - sending.offset)
                sending.note_warm()
            elif (error := sending.error) is None:
                raise _cut_short(sending.offset, sending.end)
            elif sink.transport.broken is not None:
                raise error
            elif error.errno in _NO_SENDFILE and sending.offset == part.offset:
                await self.send_by_reading(part, sink)
                return
            else:
                raise _failed(f"the file cannot be read at byte {sending.offset}", error) from error

    async def _warm(self, part: FilePart, offset: int, count: int) -> None:
        try:
            await self.page_cache.warm(part.pages, offset, count)
        except OSError as error:
            raise _failed(f"the file cannot be read at byte {offset}", error) from error

    async def send_by_reading(self, part: FilePart, sink: ByteSink) -> None:
        """What `send` does, for a sink that can only be written to.

        Raises:
            FileSendFailed, OSError: as `send`.
        """
        offset, end = part.offset, part.offset + part.count
        last_yield = time.monotonic()
        while offset < end:
            size = min(READ_SIZE, end - offset)
            try:
                data = read_resident(part.fd, offset, size)  # what is in memory needs no thread
                if data is None:
                    # Not abandoned when cancelled: the descriptor's number might be another file's by then.
                    data = await trio.to_thread.run_sync(
                        os.pread, part.fd, size, offset, limiter=self._threads
                    )
                    last_yield = time.monotonic()
            except OSError as error:
                raise _failed(f"the file cannot be read at byte {offset}", error) from error
            if not data:
                raise _cut_short(offset, end)
            offset += len(data)
            await sink.write(data)
            if time.monotonic() - last_yield > _FAIRNESS_INTERVAL and offset < end:
                await trio.lowlevel.checkpoint()
                last_yield = time.monotonic()


def _open(path: str | bytes) -> int | OSError | ValueError:
    """In a thread. An error is returned: raised through trio, it would hold the frames of the app in a cycle."""
    try:
        return os.open(path, _OPEN_FLAGS)
    except (OSError, ValueError) as error:
        return error.with_traceback(None)


def _cut_short(offset: int, end: int) -> FileSendFailed:
    return FileSendFailed(0, f"the file ends at byte {offset}, {end - offset} bytes before the announced end")


def _failed(what: str, error: OSError) -> FileSendFailed:
    return FileSendFailed(error.errno, f"{what}: {error.strerror or error}")
