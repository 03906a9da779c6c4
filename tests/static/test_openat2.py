"""openat2 itself: what it is asked, how often, and how a system that has not got it is recognised."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trioserve.static import openat2
from trioserve.static.openat2 import BENEATH, CACHED, NO_MAGICLINKS, How, Openat2, Support, find_support

pytestmark = pytest.mark.skipif(openat2.load()[0] is None, reason="no openat2 on this system")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "file").write_bytes(b"x")
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


class Disturbed(Openat2):
    """The system call gives these errors first, one after the other, and only then an answer of its own."""

    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.calls = 0
        self._numbers = list(numbers)
        real = self._call

        def call(*arguments: How) -> int:
            self.calls += 1
            if not self._numbers:
                return real(*arguments)
            self._ctypes.set_errno(self._numbers.pop(0))
            return -1

        self._call = self._call_with_lock = call


def test_a_disturbed_walk_is_started_again(directory: int) -> None:
    call = Disturbed(errno.EAGAIN, errno.EINTR, errno.EAGAIN)
    fd = call.open(directory, b"file", call.how(os.O_RDONLY | os.O_CLOEXEC, BENEATH))
    assert os.read(fd, 2) == b"x"
    os.close(fd)
    assert call.calls == 4


def test_but_not_for_ever(directory: int) -> None:
    call = Disturbed(*[errno.EAGAIN] * 1000)
    assert call.open(directory, b"file", call.how(os.O_RDONLY, BENEATH)) == -errno.EAGAIN
    assert 3 < call.calls < 100


def test_other_errors_are_final_and_so_is_every_one_on_the_loop(directory: int) -> None:
    call = Disturbed(errno.ENOENT)
    assert call.open(directory, b"file", call.how(os.O_RDONLY, BENEATH)) == -errno.ENOENT
    call = Disturbed(errno.EAGAIN)
    assert call.open_cached(directory, b"file", call.how(os.O_RDONLY, CACHED)) == -errno.EAGAIN
    assert call.calls == 1


@pytest.mark.parametrize(
    ("numbers", "support"),
    [
        ((errno.ENOSYS, errno.ENOSYS), Support(works=False, cached=False)),
        ((errno.EPERM, errno.EPERM), Support(works=False, cached=False)),
        # Linux 5.6 to 5.11.
        ((0, errno.EINVAL), Support(works=True, cached=False)),
        # The root directory, of all things, is not in memory; what counts is that the kernel knows the limit.
        ((0, errno.EAGAIN), Support(works=True, cached=True)),
        ((0, 0), Support(works=True, cached=True)),
    ],
)
def test_what_the_kernel_can_do(numbers: tuple[int, int], support: Support) -> None:
    class Kernel(Openat2):
        def open(self, directory: int, path: bytes, how: How) -> int:
            answers.append(path)
            number = numbers[len(answers) - 1]
            return -number if number else os.open("/", os.O_RDONLY)

    answers: list[bytes] = []
    before = len(os.listdir("/proc/self/fd"))
    assert find_support(Kernel()) == support
    assert len(os.listdir("/proc/self/fd")) == before
    assert answers == [b"/", b"/"]


def test_the_kernel_is_asked_once() -> None:
    assert openat2.load() is openat2.load()


@pytest.mark.parametrize(
    "error", [ImportError("no ctypes"), OSError("no C library"), AttributeError("no syscall")]
)
def test_a_python_that_cannot_call_it_does_without(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class Unavailable:
        def __init__(self) -> None:
            raise error

    monkeypatch.setattr(openat2, "Openat2", Unavailable)
    assert openat2.load.__wrapped__() == (None, Support(works=False, cached=False))


def test_only_linux_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert openat2.load.__wrapped__() == (None, Support(works=False, cached=False))


def test_an_unknown_limit_is_refused_by_the_kernel_rather_than_ignored(directory: int) -> None:
    """What all of this relies on."""
    call, _ = openat2.load()
    assert call is not None
    assert call.open(directory, b"file", call.how(os.O_RDONLY, NO_MAGICLINKS | 1 << 40)) == -errno.EINVAL


_UNDER_A_FILTER = """
import ctypes, os, struct, sys
# BPF: load the call's number; 437 gives the errno, everything else is allowed.
program = b"".join(struct.pack("HBBI", *line) for line in (
    (0x20, 0, 0, 0), (0x15, 0, 1, 437), (0x06, 0, 0, 0x00050000 | int(sys.argv[2])), (0x06, 0, 0, 0x7FFF0000)))
buffer = ctypes.create_string_buffer(program)
header = ctypes.create_string_buffer(struct.pack("HL", 4, ctypes.addressof(buffer)))
prctl = ctypes.CDLL(None, use_errno=True).prctl
for arguments in ((38, 1, 0, 0, 0), (22, 2, ctypes.addressof(header), 0, 0)):
    if prctl(*map(ctypes.c_ulong, arguments)) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
from trioserve.static.confine import ConfinedRoot
root = ConfinedRoot(sys.argv[1])
print(root.method, os.read(root.open(b"file").fd, 10).decode())
"""


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_under_a_container_that_forbids_it_files_are_still_served(tmp_path: Path, number: int) -> None:
    (tmp_path / "file").write_bytes(b"x")
    run = subprocess.run(
        [sys.executable, "-c", _UNDER_A_FILTER, tmp_path, str(number)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if run.stderr.startswith("prctl:"):
        pytest.skip(f"no filter for system calls here: {run.stderr.strip()}")
    assert (run.stdout, run.stderr) == ("portable x\n", "")
