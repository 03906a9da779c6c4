"""Opening a path below a directory name by name: what `openat2` does in the kernel, where there is no `openat2`.

Called by `confine.py`, in a thread: it waits for the disk. Each name is opened relative to the descriptor of the
directory before it and never through a link; links are read and their names put in the place of the link, so that
nothing that is renamed or replaced meanwhile can lead elsewhere. Staying beneath is not a matter of comparing strings:
`..` goes back to the descriptor that we came from, and below the root there is none to go back to.

What is refused is an OSError with the errno that openat2 gives.
"""

from __future__ import annotations

import errno
import os
import stat
from functools import lru_cache
from pathlib import Path
from typing import Literal

SymlinkPolicy = Literal["beneath", "never", "follow"]

# Directories only need to be walked through, which O_PATH and O_SEARCH (BSD, macOS) allow without the right to list
# them.
WALK_FLAGS = (
    getattr(os, "O_PATH", getattr(os, "O_SEARCH", os.O_RDONLY))
    | getattr(os, "O_DIRECTORY", 0)
    | getattr(os, "O_CLOEXEC", 0)
)

# Links in one walk, as in Linux.
MAX_LINKS = 40

# The kernel's limit for one path, NUL included.
PATH_MAX = 4096

# Directories inside each other that a walk keeps open to be able to go back: 40 threads at this depth stay within 4096
# descriptors. Deeper trees need openat2.
MAX_DEPTH = 96

_PROCFS = Path("/proc/self")

# What opening a link with O_NOFOLLOW gives: on most systems, for a directory, and on FreeBSD.
_MAYBE_A_LINK = frozenset({errno.ELOOP, errno.ENOTDIR, errno.EMLINK})


def open_by_walking(root: int, path: bytes, symlinks: SymlinkPolicy, flags: int) -> int:
    """The descriptor of what `path` leads to from the directory `root`; `b""` or `b"."` is the directory itself.

    Raises:
        OSError: EXDEV for what leads out of the root, ELOOP for a link that may not be followed, else as open(2).
    """
    if len(path) >= PATH_MAX:
        raise OSError(errno.ENAMETOOLONG, "the path is too long")
    walk = _Walk(root, symlinks, flags)
    try:
        return walk.run(path)
    finally:
        walk.close()


class _Walk:
    """One walk: the directories that were entered, innermost last, and the number of links so far."""

    def __init__(self, root: int, symlinks: SymlinkPolicy, flags: int) -> None:
        self._root = root
        self._symlinks = symlinks
        self._flags = flags
        self._entered: list[int] = []
        self._links = 0

    def close(self) -> None:
        for descriptor in self._entered:
            os.close(descriptor)
        self._entered.clear()

    @property
    def _here(self) -> int:
        return self._entered[-1] if self._entered else self._root

    def run(self, path: bytes) -> int:
        pending, directory = _split(path)
        while pending:
            name = pending.pop()
            if name == b"..":
                self._go_up()
                continue
            last = not pending
            flags = (self._flags | (os.O_DIRECTORY if directory else 0)) if last else WALK_FLAGS
            try:
                descriptor = os.open(name, flags | os.O_NOFOLLOW, dir_fd=self._here)
            except OSError as error:
                if error.errno not in _MAYBE_A_LINK:
                    raise
                target = self._read_link(name, error)
                names, slash = _split(target)
                directory = directory or (last and slash)
                pending += names
                if target.startswith(b"/"):
                    self._go_to_the_top()
            else:
                if last:
                    return descriptor
                self._enter(descriptor)
        return os.open(b".", self._flags | os.O_DIRECTORY, dir_fd=self._here)

    # -- from directory to directory

    def _enter(self, descriptor: int) -> None:
        if self._symlinks == "follow":
            # Its way back is the file system's `..`, wherever that leads.
            self.close()
        self._entered.append(descriptor)
        if len(self._entered) > MAX_DEPTH:
            raise OSError(errno.ENAMETOOLONG, f"more than {MAX_DEPTH} directories inside each other")

    def _go_up(self) -> None:
        if self._symlinks == "follow":
            self._enter_outside(b"..")
        elif not self._entered:
            raise OSError(errno.EXDEV, "the path leads out of the root")
        else:
            os.close(self._entered.pop())

    def _go_to_the_top(self) -> None:
        if self._symlinks != "follow":
            raise OSError(errno.EXDEV, "an absolute link")
        self._enter_outside(b"/")

    def _enter_outside(self, path: bytes) -> None:
        self._enter(os.open(path, WALK_FLAGS, dir_fd=self._here))

    # -- links

    def _read_link(self, name: bytes, found: OSError) -> bytes:
        """Where the link leads; raises `found` if it is none, and ELOOP if it may not be followed."""
        try:
            target = os.readlink(name, dir_fd=self._here)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise found from None
            raise
        self._links += 1
        if self._symlinks == "never" or self._links > MAX_LINKS:
            raise OSError(errno.ELOOP, "a symbolic link")
        self._check_link(name)
        if not target:
            raise OSError(errno.ENOENT, "an empty symbolic link")
        return target

    def _check_link(self, name: bytes) -> None:
        """Two rules that the kernel has for links it follows itself."""
        parent = os.fstat(self._here)
        # The magic links of procfs read like a path, but stand for something else.
        if parent.st_dev == _procfs():
            raise OSError(errno.ELOOP, "a link of procfs")
        # Where everybody may put links (sticky and world-writable, as /tmp), only those of the directory's owner and
        # our own are followed (fs.protected_symlinks in proc(5)).
        if parent.st_mode & stat.S_ISVTX and parent.st_mode & stat.S_IWOTH:
            owner = os.lstat(name, dir_fd=self._here).st_uid
            if owner not in {parent.st_uid, os.geteuid()}:
                raise OSError(errno.EACCES, "somebody else's link in a directory that is open to everybody")


@lru_cache(maxsize=1)
def _procfs() -> int:
    """The device number of /proc; -1 where there is none."""
    try:
        return _PROCFS.stat().st_dev
    except OSError:
        return -1


def _split(path: bytes) -> tuple[list[bytes], bool]:
    """The names, first one last; and whether what they lead to must be a directory."""
    names = path.split(b"/")
    directory = names[-1] in {b"", b"."}
    return [name for name in reversed(names) if name not in {b"", b"."}], directory
