"""Leases on open files, and reads that do not wait."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from trioserve.static import open_file
from trioserve.static.open_file import OpenFile, read_resident, read_whole


def opened(path: Path) -> OpenFile:
    fd = os.open(path, os.O_RDONLY)
    return OpenFile(fd, os.fstat(fd))


def test_the_last_lease_closes_the_file(site: Path) -> None:
    file = opened(site / "plain.txt")
    assert file.fileno() == file.fd
    file.acquire()
    assert repr(file) == f"<OpenFile {file.fd}, 2 leases>"
    file.release()
    assert os.pread(file.fd, 3, 0) == b"012"
    file.release()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pread(file.fd, 3, 0)
    with pytest.raises(AssertionError, match="closed"):
        file.acquire()


def test_what_is_in_memory_is_read_at_once(site: Path) -> None:
    file = opened(site / "plain.txt")
    os.pread(file.fd, 10, 0)
    if read_resident(file.fd, 0, 1) is None:
        file.release()
        pytest.skip("this file system cannot tell what is in memory")
    assert read_resident(file.fd, 2, 3) == b"234"
    assert read_resident(file.fd, 8, 5) == b"89"
    assert read_resident(file.fd, 10, 5) == b""
    assert read_whole(file.fd, file.stat, nonblocking=True) == b"0123456789"
    file.release()


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EOPNOTSUPP])
def test_what_is_not_in_memory_is_left_to_a_thread(
    site: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def preadv(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    file = opened(site / "plain.txt")
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        assert read_resident(file.fd, 0, 3) is None
        assert read_whole(file.fd, file.stat, nonblocking=True) is None
    with monkeypatch.context() as patch:
        patch.setattr(open_file, "_NOWAIT", None)
        assert read_resident(file.fd, 0, 3) is None
    file.release()


def test_a_broken_disk_is_an_error(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    file = opened(site / "plain.txt")
    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(OSError, match="Input/output error"):
        read_resident(file.fd, 0, 3)
    file.release()


@pytest.mark.parametrize("content", [b"01234567890", b"012345678", b"9876543210"])
def test_a_file_that_is_being_changed_is_not_kept(site: Path, content: bytes) -> None:
    file = opened(site / "plain.txt")
    (site / "plain.txt").write_bytes(content)
    assert read_whole(file.fd, file.stat, nonblocking=False) is None
    file.release()


def test_an_empty_file_needs_no_reading(site: Path) -> None:
    file = opened(site / "empty.txt")
    assert read_whole(file.fd, file.stat, nonblocking=True) == b""
    file.release()
