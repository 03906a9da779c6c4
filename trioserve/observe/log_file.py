"""The bytes of log lines on their way to one file, pipe, terminal or stream.

Made by `LogWriter.open`; after that only the writer's thread touches a `LogFile`, except for reading its
counters. It never waits: what cannot be written now stays pending, up to a limit.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

# What one file that cannot be written may hold back, about 20,000 lines. Beyond it lines are dropped and
# counted.
PENDING_LIMIT = 4 * 1024 * 1024
# A failing file is tried again after 1, 2, 4 ... seconds: ENOSPC and EPIPE tend to last.
RETRY_FIRST = 1.0
RETRY_LONGEST = 30.0


# Held by whoever writes to a pipe or terminal, which several may share: a crash report is too long to be written in one
# piece, and must not have log lines in its middle. It is held for a second at the most, for a stderr that nobody reads.
# Other processes on that pipe cannot be kept from it.
long_line = threading.Lock()


class LogFile:
    """The bytes on their way to one destination."""

    def __init__(self, target: Path | TextIO, pending_limit: int) -> None:
        self.path: Path | None = target if isinstance(target, Path) else None
        # For messages. A stream has a name of its own: "<stderr>", or the path of the file that it writes to.
        name = target if isinstance(target, Path) else getattr(target, "name", None)
        self._name = str(name) if isinstance(name, str | Path) else type(target).__name__
        self._stream: TextIO | None = None
        self.fd = -1
        self._regular = False
        if isinstance(target, Path):
            self._adopt(_open_for_append(target))
        else:
            self._take_stream(target)
        self._pending_limit = pending_limit
        self._pending = bytearray()
        # The written half of a line that is half written, so that a reopened file gets the line as a whole.
        self._half_line = b""
        self.stalled = False
        self.failing = False
        self.retry_at = 0.0
        self._retry_delay = RETRY_FIRST
        self.lines_written = 0
        self.bytes_written = 0
        self.writes = 0
        self.errors = 0

    @property
    def pending_bytes(self) -> int:
        """Taken, but not yet written."""
        return len(self._pending)

    def write_lines(self, lines: Sequence[bytes]) -> int:
        """Take lines, each with its newline; returns how many of them there was no room for."""
        room = self._pending_limit - len(self._pending)
        data = b"".join(lines)
        if len(data) <= room:
            self._pending += data
            return 0
        lost = 0
        for line in lines:
            if len(line) <= room:
                self._pending += line
                room -= len(line)
            else:
                lost += 1
        return lost

    def flush(self, *, now: bool = False) -> None:
        """Write as much as goes without waiting. `now`: a failing file need not wait for its next try."""
        self.stalled = False
        if not self._pending or (self.failing and not now and time.monotonic() < self.retry_at):
            return
        try:
            if self._stream is not None:
                self._write_stream(self._stream)
            while self._pending:
                if not self._write_once():
                    self.stalled = True
                    break
        except BlockingIOError:
            self.stalled = True
        except Exception as error:  # a stream that is not a file may raise anything
            self._note_failure(error)
            return
        self.failing = False
        self._retry_delay = RETRY_FIRST

    def reopen(self) -> None:
        """Change to the file that now has our path; keep the old one if that cannot be opened."""
        if self.path is None:
            return
        try:
            fd = _open_for_append(self.path)
        except OSError as error:
            self.errors += 1
            tell_stderr(f"cannot reopen the log {self.path}: {error}; writing on to the old file")
            return
        os.close(self.fd)
        self._adopt(fd)
        self._pending[:0] = self._half_line
        self._half_line = b""
        self.failing = False

    def close(self) -> None:
        """Let go of the descriptor; a stream stays open, it is its owner's."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _take_stream(self, stream: TextIO) -> None:
        try:
            # A duplicate: should anybody close the original, its number may become a client's socket.
            self._adopt(os.dup(stream.fileno()))
        except (AttributeError, OSError, ValueError):
            self._stream = stream  # StringIO, a notebook, a test's capture

    def _adopt(self, fd: int) -> None:
        self.fd = fd
        self._regular = stat.S_ISREG(os.fstat(fd).st_mode)

    def _write_once(self) -> bool:
        """One write; False if it would have to wait.

        A regular file gets everything. For the rest poll() only promises room for PIPE_BUF bytes, and a
        longer write could block although the descriptor is ready (it is shared, so it must not be made
        non-blocking). Up to PIPE_BUF a write is also atomic, so whole lines of several workers on one pipe do
        not mix.
        """
        pending = self._pending
        size = len(pending)
        if self._regular:
            self._account(self._write(size))
            return True
        if size > select.PIPE_BUF:
            size = pending.rfind(b"\n", 0, select.PIPE_BUF) + 1 or select.PIPE_BUF
        with long_line:
            if not is_writable(self.fd):
                return False
            self._account(self._write(size))
        return True

    def _write(self, size: int) -> int:
        with memoryview(self._pending) as view, view[:size] as part:
            return os.write(self.fd, part)

    def _write_stream(self, stream: TextIO) -> None:
        text = self._pending.decode("utf-8", "replace")
        # Taken before it is written: a stream that raises half-way must not get the same lines again and
        # again.
        self._account(len(self._pending))
        stream.write(text)
        stream.flush()

    def _account(self, written: int) -> None:
        pending = self._pending
        end = pending.rfind(b"\n", 0, written)
        if end < 0:
            self._half_line += pending[:written]
        else:
            self._half_line = bytes(pending[end + 1 : written])
            self.lines_written += pending.count(b"\n", 0, written)
        del pending[:written]
        self.bytes_written += written
        self.writes += 1

    def _note_failure(self, error: Exception) -> None:
        self.errors += 1
        if not self.failing:
            tell_stderr(
                f"cannot write the log {self._name}: {error}; trying again, dropping lines when too many wait"
            )
        else:
            self._retry_delay = min(self._retry_delay * 2, RETRY_LONGEST)
        self.failing = True
        self.retry_at = time.monotonic() + self._retry_delay


def _open_for_append(path: Path) -> int:
    # O_APPEND keeps the lines of several workers whole, and copes with a log that is truncated under us.
    # O_NONBLOCK: a FIFO without a reader is an error at start, not a thread that hangs in open().
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise OSError(errno.ENXIO, "it is a FIFO that nobody reads, or a socket", str(path)) from None


def is_writable(fd: int) -> bool:
    """A pipe, socket or terminal has room for PIPE_BUF bytes, or an error that a write would raise."""
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    return bool(poller.poll(0))


def tell_stderr(message: str) -> None:
    """The last way out for a log that cannot log; lost if stderr has no room either."""
    try:
        if is_writable(2):
            os.write(2, f"trioserve: {message}\n".encode("utf-8", "backslashreplace")[: select.PIPE_BUF])
    except OSError:
        pass
