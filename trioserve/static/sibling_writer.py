"""Finding the files that deserve siblings, and writing one sibling.

Used by `precompress.py`, which is a plain blocking program: `Tree.sources` in its main thread, `write_sibling` in many.
A thread is stopped by `stopped`, which it looks at between two parts of a file, within about a second.

Everything is opened below a `ConfinedRoot`, so that no link leads out of the tree, not even one that is put there while
we work; and written relative to the directory's descriptor. A sibling appears whole or not at all: it is written under
a name that the server does not serve, brought to the disk, and renamed. It has its source's time, by which the server
and the next run see that the source has changed since.
"""

from __future__ import annotations

import enum
import errno
import itertools
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from trioserve.asgi.media_types import content_type, is_compressible
from trioserve.static.codings import SUFFIXES, source_of
from trioserve.static.confine import ConfinedRoot, NotServed, Opened
from trioserve.static.sibling_encoders import Coding

# Of a source at a time: a tenth of a second or two of brotli, and then Ctrl-C is heard.
_PART: Final = 64 * 1024

# A sibling must save a twentieth: less is not worth the client's decoding, and a second copy in the caches between.
_LARGEST_SHARE: Final = 0.95

# Kernels take a file's times from a clock that ticks every 1 to 10 ms: a write in the same tick leaves the same time.
_TICK: Final = 20_000_000  # nanoseconds

# What a file costs besides its bytes, as bytes: it is opened, renamed, brought to the disk.
_FIXED_COST: Final = 4096

# Problems that the next file would have too.
_DISK_PROBLEMS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})

# The leading dot keeps the server from serving it, should the machine go down before it is renamed or removed.
_TEMPORARY: Final = b".trioserve-precompress-%d-%d.tmp"
LEFTOVER: Final = re.compile(rb"\.trioserve-precompress-\d+-\d+\.tmp")
_numbers = itertools.count()


# -- finding -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """A file of a compressible type.

    Attributes:
        directory: below the root, b"" for the root itself.
        siblings: suffix -> the stat of what has the sibling's name, links not followed.
    """

    directory: bytes
    name: bytes
    size: int
    mtime_ns: int
    siblings: dict[bytes, os.stat_result]

    @property
    def path(self) -> bytes:
        return _join(self.directory, self.name)

    def has_current(self, suffix: bytes) -> bool:
        """Whether its sibling was made of what the source is now."""
        sibling = self.siblings.get(suffix)
        return sibling is not None and _is_current(sibling, self.mtime_ns)


def _is_current(sibling: os.stat_result, mtime_ns: int) -> bool:
    """Whether it was made of a source of this time.

    The times must be equal: one that is newer may well belong to a source that was put back to an older state.
    """
    return stat.S_ISREG(sibling.st_mode) and sibling.st_size > 0 and sibling.st_mtime_ns == mtime_ns


@dataclass(slots=True)
class Tree:
    """What is below a root, as far as it concerns us.

    Attributes:
        is_excluded: whether the file or directory at this path is left alone.
        problems: (path, reason) of what could not be looked at.
        leftovers: files that a killed run has left behind.
    """

    root: ConfinedRoot
    is_excluded: Callable[[bytes], bool]
    problems: list[tuple[bytes, str]] = field(default_factory=list)
    leftovers: list[bytes] = field(default_factory=list)

    def sources(self) -> Iterator[Source]:
        """Every file of a compressible type, directory by directory.

        Links to directories are not entered: what is inside the root is found where it is. A link to a file inside the
        root counts as that file under its own name, as it does for the server.
        """
        pending = [b""]
        while pending:
            directory = pending.pop()
            try:
                opened = self.root.open(directory)
                try:
                    yield from self._look_into(directory, opened, pending)
                finally:
                    os.close(opened.fd)
            except NotServed as problem:
                self.problems.append((directory, problem.reason))
            except OSError as problem:
                self.problems.append((directory, reason_of(problem)))

    def _look_into(self, directory: bytes, opened: Opened, pending: list[bytes]) -> Iterator[Source]:
        with os.scandir(opened.fd) as items:
            found = {os.fsencode(item.name): item for item in items}
        siblings: dict[bytes, list[bytes]] = {}
        for name in found:
            if (of := source_of(name)) in found:
                siblings.setdefault(of, []).append(name)
        for name in sorted(found):
            path = _join(directory, name)
            if LEFTOVER.fullmatch(name):
                self.leftovers.append(path)
            # The server serves no other dot names.
            elif (name.startswith(b".") and path != b".well-known") or self.is_excluded(path):
                continue
            elif found[name].is_dir(follow_symlinks=False):
                pending.append(path)
            elif is_compressible(content_type(name)) and (looked := self._look_at(path, found[name])):
                stats = {}
                for sibling in sorted(siblings.get(name, ())):
                    with suppress(FileNotFoundError):  # another run has removed it meanwhile
                        stats[sibling.removeprefix(name)] = found[sibling].stat(follow_symlinks=False)
                yield Source(directory, name, looked.st_size, looked.st_mtime_ns, stats)

    def _look_at(self, path: bytes, item: os.DirEntry[str]) -> os.stat_result | None:
        """What the server would serve at this path, if it is a regular file."""
        try:
            if not item.is_symlink():
                looked = item.stat(follow_symlinks=False)
            else:
                opened = self.root.open(path)
                os.close(opened.fd)
                looked = opened.stat
        except (NotServed, FileNotFoundError):
            return None  # leads nowhere, or outside
        return looked if stat.S_ISREG(looked.st_mode) else None


def _join(directory: bytes, name: bytes) -> bytes:
    return directory + b"/" + name if directory else name


# -- writing -------------------------------------------------------------------------------------------------


class Outcome(enum.Enum):
    """What came of one sibling."""

    WRITTEN = "written"
    #: It would not have been smaller by a twentieth, than the source or than the siblings that need no dictionary; an
    #: earlier one has been removed.
    NOT_SMALLER = "not smaller"
    FAILED = "failed"
    #: It failed, and so would all others.
    DISK_FAILED = "disk failed"
    #: The run was stopped before it was done.
    STOPPED = "stopped"


@dataclass(slots=True)
class Task:
    """One sibling to be written.

    Attributes:
        done: bytes of the source that have been compressed; read by the progress bar.
    """

    source: Source
    coding: Coding
    done: int = 0

    @property
    def path(self) -> bytes:
        return self.source.path + self.coding.suffix

    @property
    def weight(self) -> int:
        """How long it takes, compared with others."""
        return (self.source.size + self.coding.dictionary_size + _FIXED_COST) * self.coding.cost

    @property
    def weight_done(self) -> int:
        return min(self.done, self.source.size) * self.coding.cost


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a task.

    Attributes:
        before: size of the source.
        after: size of the sibling.
        reason: why it failed.
    """

    outcome: Outcome
    before: int = 0
    after: int = 0
    reason: str = ""


class _Changed(Exception):
    """The source is not what it was when we began to read it."""


class _NotSmaller(Exception):
    """The sibling would be too large."""


class _Stopped(Exception):
    """Whoever runs us wants no more."""


def write_sibling(root: ConfinedRoot, task: Task, stopped: threading.Event) -> Result:
    """Compress a source into its sibling. Blocking; whatever goes wrong is in the result, and leaves no file behind."""
    try:
        directory = root.open(task.source.directory)
        try:
            return _write_in(directory.fd, root, task, stopped)
        finally:
            os.close(directory.fd)
    except _Stopped:
        return Result(Outcome.STOPPED)
    except _Changed:
        return Result(
            Outcome.FAILED, reason="its source changed while it was being compressed; run this again"
        )
    except NotServed as problem:
        return Result(Outcome.FAILED, reason=problem.reason)
    except OSError as problem:
        outcome = Outcome.DISK_FAILED if problem.errno in _DISK_PROBLEMS else Outcome.FAILED
        return Result(outcome, reason=reason_of(problem))
    except Exception as problem:  # an encoder's own, or memory
        return Result(Outcome.FAILED, reason=f"{type(problem).__name__}: {problem}")


def _write_in(directory: int, root: ConfinedRoot, task: Task, stopped: threading.Event) -> Result:
    source, sibling = root.open(task.source.path), task.source.name + task.coding.suffix
    try:
        before = _settled_stat(source.fd)
        temporary = _TEMPORARY % (os.getpid(), next(_numbers))
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        target = os.open(temporary, flags, 0o600, dir_fd=directory)
        try:
            try:
                largest = int(_otherwise(directory, task, before) * _LARGEST_SHARE)
                size = _compress(source.fd, before.st_size, target, task, stopped, largest)
                _finish(target, before)
            finally:
                os.close(target)
            _check_unchanged(root, task.source.path, before)
            os.rename(temporary, sibling, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            remove_file(temporary, directory)
            raise
    except _NotSmaller:
        # One from earlier, of another state of the source, would be there for nothing.
        remove_file(sibling, directory)
        return Result(Outcome.NOT_SMALLER, before=task.source.size)
    finally:
        os.close(source.fd)
    return Result(Outcome.WRITTEN, before.st_size, size)


def _settled_stat(fd: int) -> os.stat_result:
    """The source's stat, at a time when no further write can leave it as it is."""
    found = os.fstat(fd)
    age = time.time_ns() - found.st_mtime_ns
    if 0 <= age < _TICK:
        time.sleep((_TICK - age) / 1e9)
        found = os.fstat(fd)
    return found


def _otherwise(directory: int, task: Task, source: os.stat_result) -> int:
    """How many bytes a client gets that is not sent this sibling.

    Who knows a coding that needs a dictionary knows all those that need none.
    """
    sizes = [source.st_size]
    if task.coding.dictionary is not None:
        for suffix in SUFFIXES.values():
            try:
                other = os.stat(task.source.name + suffix, dir_fd=directory, follow_symlinks=False)
            except FileNotFoundError:
                continue
            if _is_current(other, source.st_mtime_ns):
                sizes.append(other.st_size)
    return min(sizes)


def _compress(source: int, size: int, target: int, task: Task, stopped: threading.Event, largest: int) -> int:
    """Write the compressed source, of which `size` bytes are there; returns the number of bytes."""
    encoder = task.coding.begin(size)
    written = _write(target, encoder.head)
    offset = 0
    while offset < size:
        if stopped.is_set():
            raise _Stopped
        part = os.pread(source, min(_PART, size - offset), offset)
        if not part:
            raise _Changed
        offset += len(part)
        written += _write(target, encoder.feed(part))
        task.done = offset
        if written > largest:
            raise _NotSmaller
    if stopped.is_set():
        raise _Stopped
    written += _write(target, encoder.finish())
    if written > largest:
        raise _NotSmaller
    return written


def _write(target: int, data: bytes) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]
    return len(data)


def _finish(target: int, source: os.stat_result) -> None:
    """Give the sibling its source's owner, mode and time, and bring it to the disk."""
    mode = stat.S_IMODE(source.st_mode) & 0o777
    own = os.fstat(target)
    if own.st_gid != source.st_gid:
        try:
            os.fchown(target, -1, source.st_gid)
        except PermissionError:
            # It belongs to a group that the source is not for: they get what everybody gets.
            mode = mode & ~0o070 | (mode & 0o007) << 3
    if own.st_uid != source.st_uid and os.geteuid() == 0:
        os.fchown(target, source.st_uid, -1)
    os.fchmod(target, mode)
    os.utime(target, ns=(source.st_mtime_ns, source.st_mtime_ns))
    # A machine that goes down now may keep the name and the time but not the bytes: that file would be served, and
    # never be made again.
    os.fsync(target)


def _check_unchanged(root: ConfinedRoot, path: bytes, before: os.stat_result) -> None:
    """Neither written to nor replaced."""
    try:
        now = root.open(path)
    except NotServed:
        raise _Changed from None
    os.close(now.fd)
    if _state(now.stat) != _state(before):
        raise _Changed


def _state(of: os.stat_result) -> tuple[int, ...]:
    # The time of the last change of status tells even of a write whose time was set back.
    return of.st_dev, of.st_ino, of.st_size, of.st_mtime_ns, of.st_ctime_ns


def remove_below(root: ConfinedRoot, path: bytes) -> bool:
    """Remove the regular file at this path below the root, if there is one.

    Raises:
        OSError, NotServed: it may not be removed, or its directory cannot be opened.
    """
    directory, _, name = path.rpartition(b"/")
    opened = root.open(directory)
    try:
        return remove_file(name, opened.fd)
    finally:
        os.close(opened.fd)


def remove_file(name: bytes, directory: int) -> bool:
    """Remove a regular file of this name, if there is one."""
    try:
        if not stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            return False
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return False
    return True


def reason_of(problem: OSError) -> str:
    """The system's words, without paths."""
    return problem.strerror or type(problem).__name__
