"""Opening below a root while its tree changes, in many threads, and while the root is closed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.static.trees import (
    opened,
    refusal,
)
from trioserve.static import confine, walk
from trioserve.static.confine import ConfinedRoot, Method, NotServed, SymlinkPolicy

pytestmark = pytest.mark.usefixtures("every_descriptor_is_closed")


# -- while the tree changes ----------------------------------------------------------------------------------


def test_a_file_that_is_replaced_or_removed_stays_what_was_opened(tree: Path, method: Method) -> None:
    with closing(ConfinedRoot(tree, method=method)) as root:
        found = root.open(b"index.html")
        try:
            (tree / "new").write_bytes(b"something longer")
            (tree / "new").replace(tree / "index.html")
            assert os.pread(found.fd, 100, 0) == b"index"
            assert found.stat.st_size == 5
            assert opened(root, b"index.html") == b"something longer"
            (tree / "index.html").unlink()
            assert "no such file" in refusal(root, b"index.html").reason
            assert os.pread(found.fd, 100, 0) == b"index"
        finally:
            os.close(found.fd)


def test_a_root_that_is_removed_serves_nothing_more(tree: Path, method: Method) -> None:
    public = tree / "docs" / "deep" / "er"
    with closing(ConfinedRoot(public, method=method)) as root:
        assert opened(root, b"b.txt") == b"b"
        (public / "b.txt").unlink()
        public.rmdir()
        assert "no such file" in refusal(root, b"b.txt").reason
        assert refusal(root, b"").reason == "the directory has been removed"
        # Nor does one that takes its name.
        public.mkdir()
        (public / "b.txt").touch()
        refusal(root, b"b.txt")


def test_a_root_that_is_a_link_is_resolved_once(tree: Path, tmp_path: Path, method: Method) -> None:
    current = tmp_path / "current"
    current.symlink_to("www")
    with closing(ConfinedRoot(current, symlinks="never", method=method)) as root:
        assert root.path == os.path.realpath(tree)
        assert opened(root, b"index.html") == b"index"
        current.unlink()
        current.symlink_to("outside")
        assert opened(root, b"index.html") == b"index"
        refusal(root, b"secret.txt")


Change = Callable[[Path], None]


def _file_becomes_a_link_out(tree: Path) -> None:
    (tree / "docs" / "a.txt").unlink()
    (tree / "docs" / "a.txt").symlink_to("../../outside/secret.txt")


def _file_becomes_a_fifo(tree: Path) -> None:
    (tree / "docs" / "a.txt").unlink()
    os.mkfifo(tree / "docs" / "a.txt")


def _directory_becomes_a_link_out(tree: Path) -> None:
    (tree / "docs").rename(tree / "gone")
    (tree / "docs").symlink_to("../outside")


def _directory_is_moved_out(tree: Path) -> None:
    (tree / "docs").rename(tree.parent / "outside" / "docs")


@pytest.mark.parametrize(
    ("change", "relative", "expected"),
    [
        (_file_becomes_a_link_out, b"docs/a.txt", None),
        (_file_becomes_a_fifo, b"docs/a.txt", None),
        # The directory that was entered is the one that goes on; a later `..` leads back to where we came from.
        (_directory_becomes_a_link_out, b"docs/a.txt", b"a"),
        (_directory_is_moved_out, b"docs/a.txt", b"a"),
        (_directory_is_moved_out, b"docs/up", b"index"),
        (_directory_is_moved_out, b"docs/escape_deep", None),
    ],
)
def test_a_change_in_the_middle_of_a_walk_leads_nowhere_else(
    tree: Path, monkeypatch: pytest.MonkeyPatch, change: Change, relative: bytes, expected: bytes | None
) -> None:
    """Just after `docs` was entered."""
    real = os.open
    done: list[bytes] = []

    def open_then_change(path: bytes, flags: int, *, dir_fd: int) -> int:
        fd = real(path, flags, dir_fd=dir_fd)
        if path == b"docs" and not done:
            done.append(path)
            change(tree)
        return fd

    with closing(ConfinedRoot(tree, method="portable")) as root:
        monkeypatch.setattr(os, "open", open_then_change)
        if expected is None:
            refusal(root, relative)
        else:
            assert opened(root, relative) == expected
    assert done


@pytest.mark.parametrize("target", [b"", None])
def test_a_link_that_vanishes_or_is_empty_leads_nowhere(
    tree: Path, monkeypatch: pytest.MonkeyPatch, target: bytes | None
) -> None:
    """Empty links exist outside Linux; taken by their text they would stand for the directory that they are in."""
    real = os.readlink

    def read(path: bytes, *, dir_fd: int) -> bytes:
        if target is not None:
            return target
        (tree / os.fsdecode(path)).unlink()
        return real(path, dir_fd=dir_fd)

    with closing(ConfinedRoot(tree, method="portable")) as root:
        monkeypatch.setattr(os, "readlink", read)
        assert "no such file" in refusal(root, b"link").reason


def test_a_link_that_becomes_a_file_before_it_is_read_is_not_followed(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.readlink

    def read(path: bytes, *, dir_fd: int) -> bytes:
        (tree / "link").unlink()
        (tree / "link").touch()
        return real(path, dir_fd=dir_fd)

    with closing(ConfinedRoot(tree, method="portable")) as root:
        monkeypatch.setattr(os, "readlink", read)
        refusal(root, b"link")
        assert opened(root, b"link") == b""


def test_without_procfs_there_are_no_magic_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "_PROCFS", tmp_path / "none")
    assert walk._procfs.__wrapped__() == -1


@contextmanager
def flipping(tree: Path) -> Iterator[None]:
    """In a thread: `swap` is a directory and a link out of the root, `file` a file and such a link, in turn."""
    over = threading.Event()
    (tree / "swap").mkdir()
    (tree / "swap" / "secret.txt").write_bytes(b"public")
    (tree / "file").write_bytes(b"public")

    def flip() -> None:
        while not over.is_set():
            (tree / "swap").rename(tree / "aside")
            (tree / "swap").symlink_to("../outside")
            (tree / "tmp").symlink_to("../outside/secret.txt")
            (tree / "tmp").replace(tree / "file")
            (tree / "swap").unlink()
            (tree / "aside").rename(tree / "swap")
            (tree / "tmp").write_bytes(b"public")
            (tree / "tmp").replace(tree / "file")

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=60)
        assert not thread.is_alive()


@pytest.mark.parametrize("symlinks", ["beneath", "never"])
def test_a_race_between_links_and_files_is_never_won(
    tree: Path, method: Method, symlinks: SymlinkPolicy
) -> None:
    (tree / "docs" / "back").symlink_to("../swap/../swap/secret.txt")
    paths = (b"swap/secret.txt", b"file", b"docs/back")
    seen: dict[object, int] = {}
    with closing(ConfinedRoot(tree, symlinks=symlinks, method=method)) as root, flipping(tree):
        number = 0
        # Until the race was run often enough and has had both ends.
        while number < 3000 or not {b"public", None} <= seen.keys():
            number += 1
            assert number < 200_000
            outcome: object
            try:
                outcome = opened(root, paths[number % 3])
            except NotServed:
                outcome = None
            seen[outcome] = seen.get(outcome, 0) + 1
    assert seen.keys() <= {b"public", b"", None}  # b"": created and not written yet


def test_roots_may_be_used_by_many_threads_at_once(tree: Path, method: Method) -> None:
    """Each gets its own file and its own errors, though all share the prepared arguments."""
    for number in range(4):
        (tree / f"{number}").write_bytes(b"%d" % number)
    wrong: list[object] = []

    def use(root: ConfinedRoot, number: int) -> None:
        for _ in range(300):
            if opened(root, b"%d" % number) != b"%d" % number:
                wrong.append(number)
            for path, reason in ((b"missing", "no such"), (b"escape", "leads out"), (b"loop", "too many")):
                try:
                    wrong.append(opened(root, path))
                except NotServed as error:
                    if reason not in error.reason:
                        wrong.append((path, error.reason))

    with closing(ConfinedRoot(tree, method=method)) as root:
        threads = [threading.Thread(target=use, args=(root, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_an_opening_that_runs_while_the_root_is_closed_still_ends_below_it(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptor is not given to somebody else meanwhile."""
    real = walk.open_by_walking
    root = ConfinedRoot(tree, method="portable")

    def close_first(fd: int, path: bytes, symlinks: SymlinkPolicy, flags: int) -> int:
        root.close()
        other = os.open(tree.parent / "outside", os.O_RDONLY)
        try:
            assert other != fd
            return real(fd, path, symlinks, flags)
        finally:
            os.close(other)

    monkeypatch.setattr(confine, "open_by_walking", close_first)
    assert opened(root, b"index.html") == b"index"
