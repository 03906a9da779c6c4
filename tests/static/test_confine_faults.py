"""Opening below a root on a machine that fails, and on one that has no openat2."""

from __future__ import annotations

import errno
import os
import resource
from contextlib import closing
from pathlib import Path

import pytest

from tests.static.trees import (
    CALL,
    descriptors,
    needs_openat2,
    opened,
    refusal,
)
from trioserve.errors import ConfigError
from trioserve.static import openat2
from trioserve.static.confine import ConfinedRoot, Method, NeedsThread, NotServed

pytestmark = pytest.mark.usefixtures("every_descriptor_is_closed")


# -- the machine's faults ------------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [b"index.html", b"docs/deep/er/b.txt", b"chain", b""])
def test_without_descriptors_left_the_file_is_not_called_missing(
    tree: Path, method: Method, relative: bytes
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with closing(ConfinedRoot(tree, method=method)) as root:
        filler = []
        try:
            filler.append(os.open(tree, os.O_RDONLY))
            # All numbers below the limit are in use after this.
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
            with pytest.raises(OSError) as full:
                while True:
                    filler.append(os.dup(filler[0]))
            assert full.value.errno == errno.EMFILE
            with pytest.raises(OSError) as raised:
                root.open(relative)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in filler:
                os.close(fd)
        assert raised.value.errno == errno.EMFILE
        assert raised.value.filename == os.fsdecode(relative)
        assert opened(root, b"index.html") == b"index"


def test_an_error_after_the_opening_closes_what_was_opened(
    tree: Path, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> os.stat_result:
        raise OSError(errno.EIO, "the disk is broken")

    with closing(ConfinedRoot(tree, method=method)) as root:
        before = descriptors()
        monkeypatch.setattr(os, "fstat", fail)
        with pytest.raises(OSError, match="the disk is broken"):
            root.open(b"index.html")
        monkeypatch.undo()
        assert descriptors() == before


class FixedCall(openat2.Openat2):
    """openat2 on a machine where it always gives the same error."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def open(self, directory: int, path: bytes, how: openat2.How) -> int:
        return -self.number

    def open_cached(self, directory: int, path: bytes, how: openat2.How) -> int:
        return -self.number


NOT_SERVED = (
    "ENOENT",
    "ENOTDIR",
    "ELOOP",
    "EXDEV",
    "ENAMETOOLONG",
    "EACCES",
    "EPERM",
    "ENXIO",
    "ENODEV",
    "EINVAL",
)
RAISED = ("EMFILE", "ENFILE", "ENOMEM", "EIO", "ESTALE", "ETIMEDOUT", "EBADF", "ENOSYS")


@needs_openat2
@pytest.mark.parametrize("name", NOT_SERVED + RAISED)
@pytest.mark.parametrize("nonblocking", [False, True])
def test_every_error_has_a_meaning(
    tree: Path, monkeypatch: pytest.MonkeyPatch, name: str, nonblocking: bool
) -> None:
    number = getattr(errno, name)
    call = FixedCall(number)
    monkeypatch.setattr(openat2, "load", lambda: (call, openat2.Support(works=True, cached=True)))
    with closing(ConfinedRoot(tree)) as root:
        if name in RAISED:
            with pytest.raises(OSError) as raised:
                root.open(b"index.html", nonblocking=nonblocking)
            assert (raised.value.errno, raised.value.filename) == (number, "index.html")
        else:
            with pytest.raises(NotServed) as refused:
                root.open(b"index.html", nonblocking=nonblocking)
            assert refused.value.denied is (name in {"EACCES", "EPERM"})


@needs_openat2
@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EINTR])
def test_where_the_kernel_cannot_say_a_thread_does_and_there_the_walk(
    tree: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    call = FixedCall(number)
    monkeypatch.setattr(openat2, "load", lambda: (call, openat2.Support(works=True, cached=True)))
    with closing(ConfinedRoot(tree)) as root:
        with pytest.raises(NeedsThread):
            root.open(b"index.html", nonblocking=True)
        if number == errno.EAGAIN:
            assert opened(root, b"docs/up") == b"index"
            refusal(root, b"escape")


def test_without_openat2_auto_means_portable(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openat2, "load", lambda: (None, openat2.Support(works=False, cached=False)))
    with closing(ConfinedRoot(tree)) as root:
        assert root.method == "portable"
        assert opened(root, b"link") == b"index"
        with pytest.raises(NeedsThread):
            root.open(b"link", nonblocking=True)
    with pytest.raises(ConfigError, match=r"no openat2 \(Linux 5\.6 or later.*use method='auto'"):
        ConfinedRoot(tree, method="openat2")


@needs_openat2
def test_a_kernel_without_the_limit_for_the_loop_always_needs_a_thread(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openat2, "load", lambda: (CALL, openat2.Support(works=True, cached=False)))
    with closing(ConfinedRoot(tree)) as root:
        assert opened(root, b"index.html") == b"index"
        with pytest.raises(NeedsThread):
            root.open(b"index.html", nonblocking=True)
