"""Opening files below a directory, and never one outside it.

The static handler and its caches hold one `ConfinedRoot` per mount and open everything through it: files, their
variants, index pages. With `nonblocking=True` it may be called on the event loop; else it waits for the disk and is to
be called in a thread, which must not be abandoned when its task is cancelled, or the descriptor is lost. All methods
may be called from any number of threads at once.

The root is opened once, at construction, and everything is opened relative to that descriptor: a root that is renamed
or whose link is pointed elsewhere stays what it was. What was opened is judged by its descriptor alone, never by its
name, so nothing that is swapped between two looks is taken for something else.

    symlinks    followed
    beneath     those that stay inside the root at every step; absolute ones never do
    never       none, at any place of the path
    follow      all: whoever may write below the root decides what is served; the operator vouches for the links

    method      how
    openat2     one call that the kernel confines; Linux 5.6
    portable    name by name, see `walk.py`; never on the event loop
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from trioserve.errors import ConfigError
from trioserve.static import openat2
from trioserve.static.walk import WALK_FLAGS, SymlinkPolicy, open_by_walking

Method = Literal["auto", "openat2", "portable"]

__all__ = ["ConfinedRoot", "Method", "NeedsThread", "NotServed", "Opened", "RootClosed", "SymlinkPolicy"]

# Not waiting for a FIFO's other end or for a device, and never getting a terminal that could send us signals.
# O_LARGEFILE is 0 where files over 2 GiB need no asking. Windows lacks most of them; it is refused at construction.
_OPEN_FLAGS = os.O_RDONLY | sum(
    getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY", "O_LARGEFILE")
)

_RESOLVE: dict[SymlinkPolicy, int] = {
    "beneath": openat2.NO_MAGICLINKS | openat2.BENEATH,
    "never": openat2.NO_MAGICLINKS | openat2.BENEATH | openat2.NO_SYMLINKS,
    "follow": openat2.NO_MAGICLINKS,
}

# Errors that say something about the path. Any other is about the machine (no descriptors, no memory, a broken disk)
# and is raised as it is: to answer it with 404 would tell caches and crawlers that the file is gone.
_NOT_SERVED: dict[int, str] = {
    errno.ENOENT: "no such file or directory",
    errno.ENOTDIR: "part of the path is no directory",
    errno.ELOOP: "a symbolic link that may not be followed, or too many",
    errno.EXDEV: "a symbolic link leads out of the root",
    errno.ENAMETOOLONG: "the path, or a name in it, is too long",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EINVAL: "a name that the file system refuses",
    errno.EILSEQ: "a name that the file system refuses",
    # Sockets, and devices without a driver.
    errno.ENXIO: "no regular file",
    errno.ENODEV: "no regular file",
    errno.EOPNOTSUPP: "no regular file",
}
_DENIED = frozenset({errno.EACCES, errno.EPERM})


class NotServed(Exception):
    """There is nothing to be served at that path.

    Attributes:
        reason: for logs; the client gets the same answer for all of them.
        denied: a matter of permissions, which the handler may have been asked to answer with 403.
    """

    def __init__(self, reason: str, *, denied: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.denied = denied


class RootClosed(ValueError):
    """The root has been closed: nothing can be opened below it any more."""


class NeedsThread(Exception):
    """The answer is not in memory: call `open` again in a thread, without `nonblocking`."""


@dataclass(slots=True)
class Opened:
    """An open regular file or directory, which now belongs to the caller.

    Attributes:
        fd: the descriptor; reads of a regular file are not affected by its O_NONBLOCK.
        stat: of that descriptor.
    """

    fd: int
    stat: os.stat_result


class _Directory:
    """The root's descriptor, which stays open for as long as somebody holds this object.

    `close()` in one thread while another one opens would else free the number for somebody else's directory, and the
    file would be opened below that one.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.fd)


class ConfinedRoot:
    """A directory below which files are opened; see the module.

    Attributes:
        path: the root as an absolute path without links, for messages.
        method: the one in use, "openat2" or "portable".
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        symlinks: SymlinkPolicy = "beneath",
        method: Method = "auto",
    ) -> None:
        """Open the directory.

        Raises:
            ConfigError: it is no directory or cannot be opened, or this system lacks the method.
        """
        _check_choice("symlinks", symlinks, get_args(SymlinkPolicy))
        _check_choice("method", method, get_args(Method))
        call, support = openat2.load()
        if method == "openat2" and call is None:
            raise ConfigError(
                "method='openat2': this system has no openat2 (Linux 5.6 or later, and not forbidden by a container's "
                "system call filter); use method='auto'"
            )
        self._call = call if method != "portable" else None
        self._how = self._how_cached = None
        if self._call is not None:
            self._how = self._call.how(_OPEN_FLAGS, _RESOLVE[symlinks])
            if support.cached:
                self._how_cached = self._call.how(_OPEN_FLAGS, _RESOLVE[symlinks] | openat2.CACHED)
        self._symlinks: SymlinkPolicy = symlinks
        self.method = "portable" if self._call is None else "openat2"
        self._root: _Directory | None
        self.path, self._root = _open_root(directory)

    def __repr__(self) -> str:
        closed = " (closed)" if self._root is None else ""
        return f"<ConfinedRoot {self.path}, symlinks {self._symlinks}, by {self.method}{closed}>"

    def open(self, relative: bytes, *, nonblocking: bool = False) -> Opened:
        """Open a regular file or a directory for reading.

        Args:
            relative: names joined by slashes; `b""` is the root itself.
            nonblocking: raise rather than wait for a disk.

        Raises:
            NotServed: there is nothing at that path that may be served.
            NeedsThread: only with `nonblocking`.
            RootClosed: by `close`.
            OSError: the machine's fault: EMFILE, ENFILE, ENOMEM, EIO and whatever else says nothing about the path.
        """
        # The lexical filter lets none of these through. They are checked once more because a NUL would cut the path
        # short, and because nothing else confines "follow". (`find` takes less than half the time of `in`.)
        if relative.find(b"..") >= 0 or relative.find(0) >= 0 or relative[:1] == b"/":
            _check_relative(relative)
        root = self._root
        if root is None:
            raise RootClosed(f"{self.path}: this root has been closed")
        if not nonblocking:
            result = self._open(root.fd, relative or b".")
        elif self._call is None or self._how_cached is None:
            result = -errno.EAGAIN
        else:
            result = self._call.open_cached(root.fd, relative or b".", self._how_cached)
        # Not to be kept open by the traceback of what is raised from here on.
        del root
        if result >= 0:
            return _judge(result)
        if nonblocking and result in _ASK_AGAIN:
            raise NeedsThread
        raise _error(-result, relative)

    def close(self) -> None:
        """Close the root; calls of `open` that run in other threads still end well, later ones raise RootClosed."""
        self._root = None

    def _open(self, root: int, path: bytes) -> int:
        """The descriptor, or a negative errno; waits for the disk."""
        if self._call is not None:
            result = self._call.open(root, path, self._how)
            # The walk needs no peace from those who rename.
            if result != -errno.EAGAIN:
                return result
        try:
            return open_by_walking(root, path, self._symlinks, _OPEN_FLAGS)
        except OSError as error:
            return -(error.errno or errno.EIO)


# EINTR: a signal came first.
_ASK_AGAIN = frozenset({-errno.EAGAIN, -errno.EINTR})


def _judge(fd: int) -> Opened:
    """What was opened, if it is of a kind that is served; else it is closed."""
    try:
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode):
            return Opened(fd, found)
        if not stat.S_ISDIR(found.st_mode):
            raise NotServed("no regular file")
        if found.st_nlink == 0:
            # The root itself can be opened even after it was removed.
            raise NotServed("the directory has been removed")
        return Opened(fd, found)
    except BaseException:
        os.close(fd)
        raise


def _error(number: int, relative: bytes) -> Exception:
    reason = _NOT_SERVED.get(number)
    if reason is None:
        return OSError(number, os.strerror(number), os.fsdecode(relative))
    return NotServed(reason, denied=number in _DENIED)


def _check_relative(relative: bytes) -> None:
    if b"\0" in relative:
        raise NotServed("a NUL in the path")
    if relative.startswith(b"/"):
        raise NotServed("an absolute path")
    if b".." in relative.split(b"/"):
        raise NotServed("'..' in the path")


def _open_root(directory: str | os.PathLike[str]) -> tuple[str, _Directory]:
    """Its real path, and the descriptor."""
    shown = os.fspath(directory)
    if os.open not in os.supports_dir_fd:
        raise ConfigError(
            f"static directory {shown!r}: this system cannot open files relative to a directory"
        )
    try:
        path = os.path.realpath(shown)
        return path, _Directory(os.open(path, WALK_FLAGS))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        advice = "give a directory that exists and that the server's user may enter"
        raise ConfigError(f"static directory {shown!r} cannot be opened: {reason}; {advice}") from None


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}")
