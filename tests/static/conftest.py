"""A small site, as old as a site is: its validators are strong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from trioserve.static.confine import Method

from .asking import LARGE, put
from .cold_files import asker, clock, cold_disk, gate, make_file, nowait  # noqa: F401  (fixtures)
from .trees import METHODS, no_descriptor_left, plant


@pytest.fixture
def site(tmp_path: Path) -> Path:
    root = tmp_path / "site"
    put(root / "index.html", b"<h1>home</h1>\n")
    put(root / "plain.txt", b"0123456789")
    put(root / "app.js", b"let a = 1;\n" * 100)
    put(root / "large.bin", LARGE)
    put(root / "empty.txt", b"")
    put(root / "image.png", b"\x89PNG")
    put(root / "docs" / "index.html", b"<h1>docs</h1>\n")
    put(root / "docs" / "a b.txt", b"blank")
    put(root / "bare" / "one.txt", b"1")
    put(root / ".env", b"SECRET=1")
    put(root / ".git" / "config", b"SECRET=2")
    put(root / ".well-known" / "security.txt", b"Contact: me")
    put(tmp_path / "outside.txt", b"SECRET=3")
    put(tmp_path / "site-private" / "x.txt", b"SECRET=4")
    return root


# -- for the tests of confinement ------------------------------------------------------------------------------


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def every_descriptor_is_closed() -> Iterator[None]:
    with no_descriptor_left():
        yield


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return plant(tmp_path)
