"""Opening below a root: one table for both methods, on real trees, and every kind of file."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.static.trees import (
    SECRET,
    SUPPORT,
    needs_cached,
    opened,
    plant,
    refusal,
)
from trioserve.errors import EXIT_CONFIG, ConfigError
from trioserve.static import walk
from trioserve.static.confine import ConfinedRoot, Method, NeedsThread, NotServed, SymlinkPolicy

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may make devices and give files away")


pytestmark = pytest.mark.usefixtures("every_descriptor_is_closed")


# -- the table -----------------------------------------------------------------------------------------------

NO, DOCS = None, ["a.txt", "chain3", "deep", "escape_deep", "self", "up"]

# path, then what it gives with: beneath, never, follow (None: not served).
TABLE: list[tuple[bytes, object, object, object]] = [
    (b"index.html", b"index", b"index", b"index"),
    (b".hidden", b"hidden", b"hidden", b"hidden"),
    (b"two..dots", b"two", b"two", b"two"),
    (b"docs/a.txt", b"a", b"a", b"a"),
    (b"docs/deep/er/b.txt", b"b", b"b", b"b"),
    (b"docs", DOCS, DOCS, DOCS),
    (b"docs/", DOCS, DOCS, DOCS),
    (b"docs/.", DOCS, DOCS, DOCS),
    (b"docs//a.txt", b"a", b"a", b"a"),
    (b"./docs/./a.txt", b"a", b"a", b"a"),
    (b"docs/deep", ["er"], ["er"], ["er"]),
    # Links that stay inside.
    (b"link", b"index", NO, b"index"),
    (b"docs/up", b"index", NO, b"index"),
    (b"docs/self", DOCS, NO, DOCS),
    (b"docs/self/self/a.txt", b"a", NO, b"a"),
    (b"dirlink", DOCS, NO, DOCS),
    (b"dirlink/", DOCS, NO, DOCS),
    (b"dirlink/a.txt", b"a", NO, b"a"),
    (b"dirlink/deep/er/b.txt", b"b", NO, b"b"),
    (b"dirlink_slash", DOCS, NO, DOCS),
    (b"dirlink_slash/a.txt", b"a", NO, b"a"),
    (b"winding", b"a", NO, b"a"),
    (b"chain", b"a", NO, b"a"),
    (b"to_root/docs/deep", ["er"], NO, ["er"]),
    # Links that do not.
    (b"escape", NO, NO, SECRET),
    (b"escape_dir", NO, NO, ["secret.txt"]),
    (b"escape_dir/secret.txt", NO, NO, SECRET),
    (b"sibling", NO, NO, SECRET),
    (b"docs/escape_deep", NO, NO, SECRET),
    (b"indirect", NO, NO, SECRET),
    (b"out_and_in", NO, NO, b"index"),
    (b"absolute", NO, NO, SECRET),
    (b"absolute_inside", NO, NO, b"index"),
    (b"absolute_dir/secret.txt", NO, NO, SECRET),
    (b"absolute_dir/../www/index.html", NO, NO, NO),
    # What leads nowhere.
    (b"top/does-not-exist-anywhere", NO, NO, NO),
    (b"loop", NO, NO, NO),
    (b"loop/x", NO, NO, NO),
    (b"loop_a", NO, NO, NO),
    (b"dangling", NO, NO, NO),
    (b"missing", NO, NO, NO),
    (b"missing/x", NO, NO, NO),
    (b"docs/missing", NO, NO, NO),
    (b"index.html/", NO, NO, NO),
    (b"index.html/.", NO, NO, NO),
    (b"index.html/x", NO, NO, NO),
    (b"link/", NO, NO, NO),
    (b"file_slash", NO, NO, NO),
    (b"into_a_file", NO, NO, NO),
    # What the lexical filter never lets through.
    (b"..", NO, NO, NO),
    (b"../outside/secret.txt", NO, NO, NO),
    (b"docs/../index.html", NO, NO, NO),
    (b"/etc/passwd", NO, NO, NO),
    (b"index.html\0.png", NO, NO, NO),
    (b"\0", NO, NO, NO),
    # Too long, by one and by far.
    (b"n" * 256, NO, NO, NO),
    (b"n" * 256 + b"/x", NO, NO, NO),
    (b"docs/" + b"./" * 2050 + b"a.txt", NO, NO, NO),
    (b"x/" * 100_000, NO, NO, NO),
]
ROWS = [
    pytest.param(row[0], policy, row[column], id=f"{row[0][:40].decode()!a}-{policy}")
    for row in TABLE
    for column, policy in enumerate(("beneath", "never", "follow"), start=1)
]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all rows, which only look."""
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize(("relative", "symlinks", "expected"), ROWS)
def test_the_table(
    planted: Path,
    method: Method,
    relative: bytes,
    symlinks: SymlinkPolicy,
    expected: bytes | list[str] | None,
) -> None:
    with closing(ConfinedRoot(planted, symlinks=symlinks, method=method)) as root:
        if expected is None:
            assert not refusal(root, relative).denied
        else:
            assert opened(root, relative) == expected


@needs_cached
@pytest.mark.parametrize(("relative", "symlinks", "expected"), ROWS)
def test_the_table_holds_without_blocking_too(
    planted: Path, relative: bytes, symlinks: SymlinkPolicy, expected: bytes | list[str] | None
) -> None:
    """The event loop's way gives the same answers, or none."""
    with closing(ConfinedRoot(planted, symlinks=symlinks)) as root:
        try:
            found = root.open(relative, nonblocking=True)
        except NeedsThread:
            return
        except NotServed:
            assert expected is None
            return
        os.close(found.fd)
        assert expected is not None
        assert stat.S_ISDIR(found.stat.st_mode) is isinstance(expected, list)


@pytest.mark.parametrize("symlinks", ["beneath", "follow"])
def test_forty_links_are_followed_and_no_more(tree: Path, method: Method, symlinks: SymlinkPolicy) -> None:
    (tree / "1").symlink_to("index.html")
    for number in range(2, 42):
        (tree / f"{number}").symlink_to(f"{number - 1}")
    with closing(ConfinedRoot(tree, symlinks=symlinks, method=method)) as root:
        assert opened(root, b"40") == b"index"
        assert "too many" in refusal(root, b"41").reason


@pytest.mark.parametrize("symlinks", ["beneath", "never", "follow"])
def test_the_root_itself(tree: Path, method: Method, symlinks: SymlinkPolicy) -> None:
    with closing(ConfinedRoot(tree, symlinks=symlinks, method=method)) as root:
        assert opened(root, b"") == opened(root, b".") == sorted(os.listdir(tree))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="no procfs")
def test_the_magic_links_of_procfs_are_never_followed(tree: Path, method: Method) -> None:
    """They stand for an object, whatever path they seem to read."""
    with open(tree / "index.html", "rb") as file, closing(
        ConfinedRoot(tree, symlinks="follow", method=method)
    ) as root:  # fmt: skip
        (tree / "magic").symlink_to(f"/proc/{os.getpid()}/fd/{file.fileno()}")
        (tree / "magic_root").symlink_to(f"/proc/{os.getpid()}/root")
        assert refusal(root, b"magic").reason == "a symbolic link that may not be followed, or too many"
        assert (
            refusal(root, b"magic_root/etc").reason == "a symbolic link that may not be followed, or too many"
        )


def test_a_tree_too_deep_for_the_walk_is_not_served_by_it(tree: Path) -> None:
    deep = b"/".join([b"d"] * (walk.MAX_DEPTH + 1))
    os.makedirs(tree / os.fsdecode(deep))
    (tree / os.fsdecode(deep) / "f").touch()
    (tree / os.fsdecode(deep[2:]) / "f").touch()
    with closing(ConfinedRoot(tree, method="portable")) as root:
        assert opened(root, deep[2:] + b"/f") == b""
        assert "too long" in refusal(root, deep + b"/f").reason
    with closing(ConfinedRoot(tree, symlinks="follow", method="portable")) as root:
        # Here nothing has to be kept open for the way back.
        assert opened(root, deep + b"/f") == b""


@needs_root
def test_somebody_elses_link_in_a_directory_for_everybody_is_not_followed_by_the_walk(tree: Path) -> None:
    """What fs.protected_symlinks does for links that the kernel follows itself."""
    drop = tree / "drop"
    drop.mkdir()
    drop.chmod(0o1777)
    for name, owner in (("mine", 0), ("theirs", 65534)):
        (drop / name).symlink_to("../index.html")
        os.lchown(drop / name, owner, owner)
    with closing(ConfinedRoot(tree, method="portable")) as root:
        assert opened(root, b"drop/mine") == b"index"
        assert refusal(root, b"drop/theirs").denied
        drop.chmod(0o777)
        assert opened(root, b"drop/theirs") == b"index"


# -- kinds of files ------------------------------------------------------------------------------------------


def test_a_fifo_does_not_hang_and_is_not_served(tree: Path, method: Method) -> None:
    os.mkfifo(tree / "fifo")
    (tree / "to_fifo").symlink_to("fifo")
    with closing(ConfinedRoot(tree, method=method)) as root:
        assert refusal(root, b"fifo").reason == "no regular file"
        assert refusal(root, b"to_fifo").reason == "no regular file"
        if SUPPORT.cached and method == "openat2":
            with pytest.raises(NotServed, match="no regular file"):
                root.open(b"fifo", nonblocking=True)


def test_a_socket_is_not_served(tree: Path, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)  # the address of a socket may be 107 bytes long
    with socket.socket(socket.AF_UNIX) as sock, closing(ConfinedRoot(tree, method=method)) as root:
        sock.bind("sock")
        assert refusal(root, b"sock").reason == "no regular file"


@needs_root
@pytest.mark.parametrize("number", [os.makedev(1, 3), os.makedev(255, 254)], ids=["null", "no driver"])
def test_a_device_is_not_served(tree: Path, method: Method, number: int) -> None:
    for name, kind in ((b"char", stat.S_IFCHR), (b"block", stat.S_IFBLK)):
        try:
            os.mknod(tree / os.fsdecode(name), kind | 0o600, number)
        except PermissionError:
            pytest.skip("root without the right to make devices")
        with closing(ConfinedRoot(tree, method=method)) as root:
            refusal(root, name)


# -- permissions, judged for a user who is not root ----------------------------------------------------------

_AS_NOBODY = """
import os, sys
from trioserve.static.confine import ConfinedRoot, NotServed
from trioserve.static import openat2, walk
root = ConfinedRoot(sys.argv[1], method=sys.argv[2])
if os.geteuid() == 0:
    os.setgroups([]); os.setresgid(65534, 65534, 0); os.setresuid(65534, 65534, 0)
for path in (b"public/f", b"private/f", b"unreadable", b"unlisted", b"unlisted/f"):
    try:
        os.close(root.open(path).fd)
        print("opened")
    except NotServed as error:
        print(error.reason, error.denied)
if os.getresuid()[2] == 0:
    os.seteuid(0)  # for what else has to be written at the end, such as coverage's data
"""


def test_what_permissions_forbid_is_marked_as_denied(tree: Path, method: Method) -> None:
    for name, mode in (("public", 0o755), ("private", 0o700), ("unlisted", 0o711)):
        (tree / name).mkdir()
        (tree / name / "f").touch(0o644)
        (tree / name).chmod(mode)
    (tree / "unreadable").touch(0o600)
    tree.chmod(0o755)
    if os.geteuid() != 0:
        (tree / "private").chmod(0)
        (tree / "unreadable").chmod(0)
        (tree / "unlisted").chmod(0o311)
    run = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, tree, method],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    (tree / "private").chmod(0o700)
    (tree / "unlisted").chmod(0o700)
    denied = "permission denied True"
    assert (run.stdout.splitlines(), run.stderr) == (["opened", denied, denied, denied, "opened"], "")


# -- the event loop's way ------------------------------------------------------------------------------------


@needs_cached
def test_what_is_in_memory_is_opened_without_a_thread(tree: Path) -> None:
    with closing(ConfinedRoot(tree, method="openat2")) as root:
        assert opened(root, b"docs/a.txt") == b"a"
        found = root.open(b"docs/a.txt", nonblocking=True)
        assert os.read(found.fd, 10) == b"a"
        os.close(found.fd)
        refusal(root, b"docs/none")
        with pytest.raises(NotServed):
            root.open(b"docs/none", nonblocking=True)


def test_the_walk_always_needs_a_thread(tree: Path) -> None:
    with closing(ConfinedRoot(tree, method="portable")) as root, pytest.raises(NeedsThread):
        root.open(b"index.html", nonblocking=True)


# -- construction and end ------------------------------------------------------------------------------------


def config_error(directory: object, **options: object) -> str:
    with pytest.raises(ConfigError) as raised:
        ConfinedRoot(directory, **options)  # type: ignore[arg-type]
    assert raised.value.exit_code == EXIT_CONFIG
    return str(raised.value)


def test_a_root_that_is_none_is_a_configuration_error(tree: Path) -> None:
    missing = config_error(tree / "missing")
    assert str(tree / "missing") in missing
    assert "No such file or directory; give a directory that exists" in missing
    assert "Not a directory" in config_error(tree / "index.html")
    assert "cannot be opened" in config_error(tree / "loop")
    assert "null" in config_error("a\0b")


def test_unknown_choices_are_named(tree: Path) -> None:
    assert config_error(tree, symlinks="sometimes") == (
        "symlinks='sometimes': choose one of 'beneath', 'never', 'follow'"
    )
    assert "method='fast': choose one of 'auto', 'openat2', 'portable'" in config_error(tree, method="fast")


def test_a_system_without_relative_opening_is_refused(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "supports_dir_fd", frozenset())
    assert "relative to a directory" in config_error(tree)


def test_a_root_tells_what_it_is(tree: Path, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    root = ConfinedRoot("docs", symlinks="never", method=method)
    path = os.path.realpath(tree / "docs")
    assert (root.path, root.method) == (path, method)
    assert repr(root) == f"<ConfinedRoot {path}, symlinks never, by {method}>"
    root.close()
    assert repr(root) == f"<ConfinedRoot {path}, symlinks never, by {method} (closed)>"


def test_a_closed_root_opens_nothing_and_may_be_closed_again(tree: Path, method: Method) -> None:
    root = ConfinedRoot(tree, method=method)
    root.close()
    root.close()
    with pytest.raises(ValueError, match="has been closed"):
        root.open(b"index.html")
