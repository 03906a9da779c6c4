"""What the tests of confinement share: a tree with links of every kind, and how to look at what was opened."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trioserve.static import openat2
from trioserve.static.confine import ConfinedRoot, NotServed

CALL, SUPPORT = openat2.load()
needs_openat2 = pytest.mark.skipif(CALL is None, reason="no openat2 on this system")
needs_cached = pytest.mark.skipif(not SUPPORT.cached, reason="no RESOLVE_CACHED on this system")

METHODS = [pytest.param("openat2", marks=needs_openat2), "portable"]

SECRET = b"the secret"


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd" if os.path.exists("/proc/self/fd") else "/dev/fd"))


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors() == before


def plant(folder: Path) -> Path:
    """The root, `www`, among things that must not be reached from it."""
    root = folder / "www"
    (root / "docs" / "deep" / "er").mkdir(parents=True)
    (root / "docs" / "deep" / "er" / "b.txt").write_bytes(b"b")
    (root / "docs" / "a.txt").write_bytes(b"a")
    (root / "index.html").write_bytes(b"index")
    (root / ".hidden").write_bytes(b"hidden")
    (root / "two..dots").write_bytes(b"two")
    (folder / "outside").mkdir()
    (folder / "outside" / "secret.txt").write_bytes(SECRET)
    (folder / "www-private").mkdir()
    (folder / "www-private" / "secret.txt").write_bytes(SECRET)
    links = {
        "link": "index.html",
        "docs/up": "../index.html",
        "docs/self": ".",
        "dirlink": "docs",
        "dirlink_slash": "docs/",
        "file_slash": "index.html/",
        "winding": "docs/../docs/./deep//er/../../a.txt",
        "to_root": "docs/..",
        "chain": "chain1", "chain1": "chain2", "chain2": "docs/chain3", "docs/chain3": "../dirlink/a.txt",
        "loop": "loop", "loop_a": "loop_b", "loop_b": "docs/../loop_a",
        "dangling": "missing",
        "escape": "../outside/secret.txt",
        "escape_dir": "../outside",
        "sibling": "../www-private/secret.txt",
        "docs/escape_deep": "deep/../../../outside/secret.txt",
        "out_and_in": "../www/index.html",
        "indirect": "docs/escape_deep",
        "absolute": str(folder / "outside" / "secret.txt"),
        "absolute_inside": str(root / "index.html"),
        "absolute_dir": str(folder / "outside"),
        "top": "/",
        "into_a_file": "index.html/x",
    }  # fmt: skip
    for name, target in links.items():
        (root / name).symlink_to(target)
    return root


def opened(root: ConfinedRoot, relative: bytes) -> bytes | list[str]:
    """What is there: a file's bytes or a directory's names; the descriptor is closed again."""
    found = root.open(relative)
    try:
        assert os.path.samestat(os.fstat(found.fd), found.stat)
        assert not os.get_inheritable(found.fd)
        if stat.S_ISDIR(found.stat.st_mode):
            return sorted(os.listdir(found.fd))
        return os.read(found.fd, 100)
    finally:
        os.close(found.fd)


def refusal(root: ConfinedRoot, relative: bytes) -> NotServed:
    before = descriptors()
    with pytest.raises(NotServed) as raised:
        root.open(relative)
    assert descriptors() == before
    assert str(raised.value) == raised.value.reason != ""
    return raised.value
