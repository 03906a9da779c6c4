"""Prefixes: by whole segments, decoded."""

from __future__ import annotations

import pytest

from trioserve.static.mount_path import path_below, path_of, strip_prefix


@pytest.mark.parametrize(
    ("raw_path", "prefix", "below"),
    [
        (b"/assets/x", "/assets", b"/x"),
        (b"/assets/x", "/assets/", b"/x"),
        (b"/assets/", "/assets", b"/"),
        (b"/assets", "/assets", b""),
        (b"/assets-old/x", "/assets", None),
        (b"/assets.env", "/assets", None),
        (b"/other", "/assets", None),
        (b"/Assets/x", "/assets", None),
        (b"/%61ssets/x%2Fy", "/assets", b"/x%2Fy"),
        (b"/%61ssets", "/assets", b""),
        (b"/assets%2Fx", "/assets", None),
        (b"/a%2Fb/x", "/a/b", None),
        (b"/a/b/x", "/a/b", b"/x"),
        (b"/a/%62/x/y", "/a/b", b"/x/y"),
        (b"/a%20b/x", "/a b", b"/x"),
        (b"/%C3%A4/x", "/\xe4", b"/x"),
        (b"/50%25/x", "/50%", b"/x"),
        (b"/x", "", b"/x"),
        (b"/x", "/", b"/x"),
        (b"//assets/x", "/assets", None),
    ],
)
def test_a_prefix_is_whole_segments(raw_path: bytes, prefix: str, below: bytes | None) -> None:
    assert strip_prefix(raw_path, prefix) == below


def test_the_path_is_the_raw_one_where_there_is_one() -> None:
    assert path_of({"raw_path": b"/a%20b?x", "path": "/wrong"}) == b"/a%20b"
    assert path_of({"path": "/a b/\xe4"}) == b"/a%20b/%C3%A4"


def test_a_root_path_that_a_proxy_has_removed() -> None:
    assert path_below({"raw_path": b"/x", "root_path": "/app"}) == b"/x"
    scope = {"raw_path": b"/s/x", "root_path": "/app/s", "app_root_path": "/app"}
    assert path_below(scope) == b"/x"
    assert path_below(scope | {"raw_path": b"/app/s/x"}) == b"/x"
    assert path_below(scope | {"raw_path": b"/t/x"}) == b"/t/x"
    assert path_below(scope | {"app_root_path": "/other"}) == b"/s/x"
