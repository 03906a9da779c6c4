"""Caching, saving and types by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioserve.static.field_rules import ASK_FIRST, IMMUTABLE, FieldRules, attachment, is_hashed
from trioserve.static.options import StaticOptions


def rules(**given: object) -> FieldRules:
    return FieldRules(StaticOptions.checked(given))


@pytest.mark.parametrize(
    "name",
    [
        "main.8f3a2b1c.js",
        "main.8f3a2b1c9d0e.chunk.css",
        "app-3b18e512dba79e4c8300dd08aeb37f8e728b8dad.js",
        "index-BKq3xy1aZ.js",
        "chunk-6G3ZK2QX.js",
        "style.D41D8CD98F00B204.css",
        "app.8f3a2b1c.js.map",
        "app.8f3a2b1c.min.js",
        "logo_5f2e8a91.svg",
        "chunk-vendors.8f3a2b1c.js",
        "font.9Xk2mQ7vB4.woff2",
        "app.2f00d001.js",
    ],
)
def test_a_hash_in_a_name_is_seen(name: str) -> None:
    assert is_hashed(name)


@pytest.mark.parametrize(
    "name",
    [
        "app.js",
        "jquery-migrate.min.js",
        "component-definitions.js",
        "report-20240115.pdf",
        "photo.20240115123456.jpg",
        "archive-1.2.10.tar.gz",
        "foo-MP3Converter.js",
        "win32release.exe",
        "bootstrap4theme.css",
        "page-Bootstrap5Theme.css",
        "setup-WIN32X64.exe",
        "feedface.js",
        "name-feedface.js",
        # Hexadecimal by chance: a word and a year, a date and an edition, a number and its version.
        "menu-cafe2023.jpg",
        "building.facade2024.png",
        "minutes-20240115b.pdf",
        "order-1000000a.pdf",
        "8f3a2b1c.js",
        "8f3a2b1c",
        "name-8f3a2b1c",
        "name.8f3a2b1",
        "name-internationalization.js",
        "UTF8encoding.txt",
        "iso-8859-1.txt",
        "",
        ".",
        "...",
    ],
)
def test_words_dates_and_versions_are_no_hashes(name: str) -> None:
    assert not is_hashed(name)


def test_cache_control_by_name() -> None:
    plain = rules()
    assert plain.cache_control(b"a/main.8f3a2b1c.js") == IMMUTABLE
    assert plain.cache_control(b"main.8f3a2b1c/x.js") == b"max-age=60"
    assert plain.cache_control(b"a/index.html") == ASK_FIRST
    assert plain.cache_control(b"a/index.8f3a2b1c.html") == IMMUTABLE
    assert rules(max_age=0).cache_control(b"x.png") == b"max-age=0"
    assert rules(cache_control="no-store").cache_control(b"a/main.8f3a2b1c.js") == b"no-store"
    assert rules(cache_control="").cache_control(b"x.png") == b""


def test_no_shared_cache_is_told_to_keep_what_needed_a_password() -> None:
    """RFC 9111 section 3.5: `public` allows it to."""
    values = {rules().cache_control(name) for name in (b"a.js", b"a.8f3a2b1c.js", b"a.html")}
    assert values == {b"max-age=60", b"max-age=31536000, immutable", b"no-cache"}


def test_rules_match_the_name_or_with_a_slash_the_path_and_the_first_wins() -> None:
    found = rules(cache_control=[("docs/*.pdf", "a"), ("*.pdf", "b"), ("/top.*", "c"), ("[xy].js", "d")])
    assert found.cache_control(b"docs/v1/x.pdf") == b"a"
    assert found.cache_control(b"other/docs/x.pdf") == b"b"
    assert found.cache_control(b"top.txt") == b"c"
    assert found.cache_control(b"a/top.txt") == b"max-age=60"
    assert found.cache_control(b"a/y.js") == b"d"
    assert found.cache_control(b"a/yy.js") == b"max-age=60"
    assert found.cache_control("ä\n.pdf".encode()) == b"b"
    assert found.cache_control(b"\xff.pdf") == b"b"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"a b.txt", b'attachment; filename="a b.txt"'),
        (b"100%.txt", b"attachment; filename=\"100_.txt\"; filename*=UTF-8''100%25.txt"),
        (b'a"b\\c.txt', b"attachment; filename=\"a_b_c.txt\"; filename*=UTF-8''a%22b%5Cc.txt"),
        (
            "€ rates.txt".encode(),
            b"attachment; filename=\"_ rates.txt\"; filename*=UTF-8''%E2%82%AC%20rates.txt",
        ),
        (b"it's;x.txt", b'attachment; filename="it\'s;x.txt"'),
    ],
)
def test_the_name_to_save_under(name: bytes, value: bytes) -> None:
    assert attachment(name) == value


@given(st.binary(max_size=40))
def test_no_name_gets_out_of_its_parameter(name: bytes) -> None:
    value = attachment(name)
    assert value.isascii()
    assert all(0x20 <= byte < 0x7F for byte in value)
    _, quoted, rest = value.split(b'"')
    assert b"\\" not in quoted
    assert rest == b"" or rest.startswith(b"; filename*=UTF-8''")


def test_others_only_where_they_match() -> None:
    found = rules(download=["*.zip", "reports/*"], headers={"x-a": "1"})
    assert found.others(b"a/b.zip") == [
        (b"content-disposition", b'attachment; filename="b.zip"'),
        (b"x-a", b"1"),
    ]
    assert found.others(b"reports/x.html")[0][0] == b"content-disposition"
    assert list(found.others(b"a/b.txt")) == [(b"x-a", b"1")]
