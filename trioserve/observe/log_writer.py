"""The background thread that writes every log of a worker, so that the event loop never waits for one.

Used by `logs.py` (one `LogWriter` per worker), `access_log.py` and `statsd.py`. Three parts:

- `Lane`: a bounded queue into the thread. `put()` is what the event loop calls; it never blocks.
- `LogFile` (`log_file.py`): the bytes on their way to one file, pipe, terminal or stream. The thread's own.
- `LogWriter`: owns the thread, its lanes and its files.

The thread sleeps without a time-out while there is nothing to write. A line wakes it only when it sleeps, and
it then waits `LINGER` for company, so a busy worker pays a handful of wake-ups a second, not one a request.
Nothing here knows of trio, so there is nothing to cancel; `close()` has a deadline instead.
"""

from __future__ import annotations

import atexit
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from trioserve.observe.log_file import PENDING_LIMIT, LogFile, tell_stderr

# Records, not bytes: what an access line costs is the request it keeps alive. 10,000 is half a second of a
# worker at 20,000 requests a second: more than any hiccup of the writer, and a few MB of heads at worst.
QUEUE_CAPACITY = 10_000
# How long a first line waits for others; people who tail a log do not notice, and 20,000 requests a second
# fill a tenth of the queue meanwhile.
LINGER = 0.05
# The thread formats under the GIL: after this many records it lets go of it, or the event loop would have to
# win it back after the interpreter's switch interval (5 ms). A loop that is never idle makes the thread wait
# as long for its own next turn, so with a long queue a slice is an eighth of it, up to 2 or 3 ms: that keeps up
# with 40,000 lines a second.
SLICE = 32
SLICE_OF_QUEUE = 8
SLICE_LONGEST = 400
SLICE_PAUSE = 0.0002
# At most one line a second that says how many were dropped.
NOTICE_INTERVAL = 1.0

Target = str | os.PathLike[str] | TextIO
# Takes a batch, in the thread; returns how many records it had to drop.
Deliver = Callable[[Sequence[Any]], int]
# Makes the record that tells of `n` dropped ones.
Notice = Callable[[int], Any]


@dataclass(frozen=True, slots=True)
class LogStatistics:
    """What a `LogWriter` has done and holds at this moment."""

    queued: int
    pending_bytes: int
    lines_written: int
    bytes_written: int
    writes: int
    dropped: int
    errors: int
    wakeups: int
    files: int
    alive: bool


class LogWriter:
    """One daemon thread and everything it writes.

    Resource handling: `close()` when done; at interpreter exit it is called for you, with one second.
    """

    def __init__(self, *, linger: float = LINGER) -> None:
        self._linger = linger
        # Replaced as a whole when they change, so the thread may iterate over them without a lock.
        self._lanes: tuple[Lane, ...] = ()
        self._files: tuple[LogFile, ...] = ()
        self._reopen = False
        self._deadline: float | None = None
        self._wakeups = 0
        self._undelivered = 0
        self._errors = 0
        self._told = False
        # True while the thread sleeps without a time-out: only then does a line cost a system call.
        self.asleep = False
        self._hurried = False
        # A socket pair, since a socket that is closed knows it; a closed descriptor number may be someone
        # else's.
        self._wake_sender, self._wake_receiver = socket.socketpair()
        self._wake_sender.setblocking(False)
        self._wake_receiver.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="trioserve-log", daemon=True)
        self._thread.start()
        atexit.register(self.close, 1.0)

    def __repr__(self) -> str:
        now = self.statistics()
        state = "running" if now.alive else "closed"
        return f"<LogWriter {state}, {now.files} files, {now.queued} queued, {now.dropped} dropped>"

    def open(self, target: Target, *, pending_limit: int = PENDING_LIMIT) -> LogFile:
        """A file to write to, shared with whoever has opened it before; OSError if it cannot be opened."""
        if isinstance(target, (str, os.PathLike)):
            path = Path(target).absolute()
            for file in self._files:
                if file.path == path:
                    return file
            opened = LogFile(path, pending_limit)
        else:
            opened = LogFile(target, pending_limit)
        self._files = (*self._files, opened)
        return opened

    def add_lane(
        self,
        deliver: Deliver,
        *,
        notice: Notice | None = None,
        capacity: int = QUEUE_CAPACITY,
        urgent: bool = False,
    ) -> Lane:
        """A queue whose records `deliver` gets in batches, in the thread. `urgent`: without lingering."""
        lane = Lane(self, deliver, notice, capacity=capacity, urgent=urgent)
        self._lanes = (*self._lanes, lane)
        return lane

    def reopen(self) -> None:
        """Open every path anew, as after a log rotation; lines put before and after it are all kept."""
        self._reopen = True
        self.hurry()

    def close(self, timeout: float = 2.0) -> bool:
        """Write what is queued, for at most `timeout` seconds; True if all of it went out. Idempotent.

        Blocks the caller that long when a reader has stalled; a file that fails is tried once more, not
        waited for.
        """
        atexit.unregister(self.close)
        for lane in self._lanes:
            lane.shut()
        if self._deadline is None:
            self._deadline = time.monotonic() + timeout
        self.hurry()
        if self._thread is not threading.current_thread():
            # The thread keeps the deadline itself; the margin covers a write that the kernel does not return
            # from.
            self._thread.join(timeout + 0.25)
        pending = self._undelivered + sum(file.pending_bytes for file in self._files)
        return pending == 0 and not self._thread.is_alive()

    def statistics(self) -> LogStatistics:
        """A frozen picture; the numbers of one moment may differ by a line or two."""
        lanes, files = self._lanes, self._files
        return LogStatistics(
            queued=sum(len(lane) for lane in lanes),
            pending_bytes=sum(file.pending_bytes for file in files),
            lines_written=sum(file.lines_written for file in files),
            bytes_written=sum(file.bytes_written for file in files),
            writes=sum(file.writes for file in files),
            dropped=sum(lane.dropped for lane in lanes),
            errors=self._errors + sum(file.errors for file in files),
            wakeups=self._wakeups,
            files=len(files),
            alive=self._thread.is_alive(),
        )

    def wake(self) -> None:
        """End the thread's sleep; called by a lane that found it asleep."""
        self.asleep = False
        try:
            self._wake_sender.send(b"w")
        except OSError:
            pass  # full: it is awake already; closed: nobody to wake

    def hurry(self) -> None:
        """Have the thread work now, without lingering."""
        if not self._hurried:
            self._hurried = True
            self.wake()

    def note_failure(self, what: str, error: BaseException) -> None:
        """Count a failure of a lane's own code, and tell the first one on stderr."""
        self._errors += 1
        if not self._told:
            self._told = True
            tell_stderr(f"{what} failed: {type(error).__name__}: {error}; the lines concerned are lost")

    # -- in the thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            # Read before the lanes: what was put before close() is then seen by this very pass.
            closing = self._deadline is not None
            if self._reopen:
                self._reopen = False
                for file in self._files:
                    file.reopen()
            more = self._pass_on()
            for file in self._files:
                file.flush(now=closing)
            if closing and self._is_finished(more):
                break
            if not more:
                self._sleep()
            elif not closing:
                time.sleep(SLICE_PAUSE)
        self._finish()

    def _pass_on(self) -> bool:
        """One slice of each lane to its receiver; True if there is more."""
        more = False
        for lane in self._lanes:
            more |= lane.pass_on(SLICE)
        return more

    def _is_finished(self, more: bool) -> bool:
        assert self._deadline is not None
        if time.monotonic() >= self._deadline:
            return True
        return not more and all(file.pending_bytes == 0 or file.failing for file in self._files)

    def _sleep(self) -> None:
        """Until a line, a request, a stalled reader that reads again, a retry, or the deadline."""
        timeout = self._seconds_to_sleep()
        self.asleep = True
        if any(self._lanes) or self._reopen or self._hurried:
            self.asleep = False
            self._hurried = False
            return
        poller = select.poll()
        poller.register(self._wake_receiver, select.POLLIN)
        for file in self._files:
            if file.stalled:
                poller.register(file.fd, select.POLLOUT)
        poller.poll(timeout)
        self.asleep = False
        self._wakeups += 1
        if self._drain_wakes() and self._deadline is None:
            self._wait_for_company()
        self._hurried = False

    def _wait_for_company(self) -> None:
        """Let lines gather for a while; whoever is in a hurry ends it."""
        if self._hurried or self._linger <= 0:
            return
        poller = select.poll()  # not select(): a busy worker has descriptors above 1,023
        poller.register(self._wake_receiver, select.POLLIN)
        poller.poll(self._linger * 1000)
        self._drain_wakes()

    def _seconds_to_sleep(self) -> int | None:
        """As milliseconds for poll(); None is without end."""
        moments = [file.retry_at for file in self._files if file.failing and file.pending_bytes]
        moments += [lane.notice_at for lane in self._lanes if lane.owes_notice]
        if self._deadline is not None:
            moments.append(self._deadline)
        if not moments:
            return None
        return max(0, int((min(moments) - time.monotonic()) * 1000) + 1)

    def _drain_wakes(self) -> bool:
        try:
            return bool(self._wake_receiver.recv(4096))
        except BlockingIOError:
            return False

    def _finish(self) -> None:
        self._undelivered = sum(lane.discard() for lane in self._lanes)
        for file in self._files:
            file.close()
        self._wake_receiver.close()
        self._wake_sender.close()


class Lane:
    """A bounded queue of records into the writer's thread; when full, new ones are dropped and counted."""

    __slots__ = (
        "_capacity", "_deliver", "_lock", "_notice", "_records", "_reported", "_urgent", "_writer", "dropped",
        "notice_at",
    )  # fmt: skip

    def __init__(
        self, writer: LogWriter, deliver: Deliver, notice: Notice | None, *, capacity: int, urgent: bool
    ) -> None:
        self._writer = writer
        self._deliver = deliver
        self._notice = notice
        self._capacity = capacity
        self._urgent = urgent
        self._records: deque[Any] = deque()
        self._lock = threading.Lock()
        self._reported = 0
        self.dropped = 0
        self.notice_at = 0.0

    def __len__(self) -> int:
        return len(self._records)

    def put(self, record: object) -> None:
        """Queue `record`; from any thread, never blocking, never raising."""
        records = self._records
        if len(records) >= self._capacity:
            self._drop(1)
            return
        records.append(record)
        writer = self._writer
        if self._urgent:
            writer.hurry()
        elif writer.asleep:
            writer.wake()

    def shut(self) -> None:
        """Drop whatever is put from now on."""
        self._capacity = -1

    @property
    def owes_notice(self) -> bool:
        """Records were dropped that no line has told of."""
        return self._notice is not None and self.dropped > self._reported

    def pass_on(self, most: int) -> bool:
        """In the thread: deliver a slice and the notice that is due; True if there are more."""
        records = self._records
        count = min(len(records), max(most, min(len(records) // SLICE_OF_QUEUE, SLICE_LONGEST)))
        if count:
            self._give([records.popleft() for _ in range(count)])
        if self.owes_notice and self._is_notice_due():
            self._give_notice()
        return bool(records)

    def _is_notice_due(self) -> bool:
        """After the lines queued before the dropped ones; under constant overload, in their midst."""
        if self._capacity < 0:
            return not self._records
        now = time.monotonic()
        return now >= self.notice_at and (not self._records or now >= self.notice_at + NOTICE_INTERVAL)

    def discard(self) -> int:
        """In the thread, at its end: what could not be delivered in time is dropped; returns how many."""
        count = len(self._records)
        self._records.clear()
        self._drop(count)
        return count

    def _give(self, batch: list[Any]) -> None:
        try:
            lost = self._deliver(batch)
        except Exception as error:
            lost = len(batch)
            self._writer.note_failure("formatting a log line", error)
        if lost:
            self._drop(lost)

    def _give_notice(self) -> None:
        assert self._notice is not None
        self.notice_at = time.monotonic() + NOTICE_INTERVAL
        dropped = self.dropped
        try:
            lost = self._deliver([self._notice(dropped - self._reported)])
        except Exception as error:
            self._writer.note_failure("telling of dropped log lines", error)
            lost = 0
        if not lost:
            self._reported = dropped

    def _drop(self, count: int) -> None:
        with self._lock:
            if not self.owes_notice:
                self.notice_at = max(self.notice_at, time.monotonic())
            self.dropped += count


class LineHandler(logging.Handler):
    """Joins the standard library's logging to a lane.

    The record is formatted in the caller's thread: its arguments may change later, and its `exc_info` would
    keep the frames of a failed request, with all their locals, alive until the thread gets to it.
    """

    def __init__(self, lane: Lane) -> None:
        super().__init__()
        self._lane = lane

    def emit(self, record: logging.LogRecord) -> None:
        """Format and queue; never blocks."""
        if not record.msg and hasattr(record, "metric"):
            return  # only a carrier for a metric, see statsd.py
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)
        else:
            self._lane.put(line.encode("utf-8", "backslashreplace") + b"\n")
