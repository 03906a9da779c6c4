"""Media types: the same on every host, text says its charset, and only what shrinks is compressed."""

from __future__ import annotations

import re

import pytest

from trioserve.asgi import media_types
from trioserve.asgi.media_types import TYPES, TYPES_OF_NAMES, UNKNOWN, content_type, is_compressible

# What a site is made of, and what browsers take it for.
EXPECTED = {
    "index.html": b"text/html; charset=utf-8",
    "style.css": b"text/css; charset=utf-8",
    "app.js": b"text/javascript; charset=utf-8",
    "app.mjs": b"text/javascript; charset=utf-8",
    "data.json": b"application/json; charset=utf-8",
    "app.js.map": b"application/json; charset=utf-8",
    "site.webmanifest": b"application/manifest+json; charset=utf-8",
    "logo.svg": b"image/svg+xml; charset=utf-8",
    "sitemap.xml": b"application/xml; charset=utf-8",
    "feed.rss": b"application/rss+xml; charset=utf-8",
    "feed.atom": b"application/atom+xml; charset=utf-8",
    "robots.txt": b"text/plain; charset=utf-8",
    "notes.md": b"text/markdown; charset=utf-8",
    "table.csv": b"text/csv; charset=utf-8",
    "meeting.ics": b"text/calendar; charset=utf-8",
    "subtitles.vtt": b"text/vtt; charset=utf-8",
    "module.wasm": b"application/wasm",
    "a.png": b"image/png",
    "a.jpg": b"image/jpeg",
    "a.webp": b"image/webp",
    "a.avif": b"image/avif",
    "a.gif": b"image/gif",
    "favicon.ico": b"image/vnd.microsoft.icon",
    "a.woff": b"font/woff",
    "a.woff2": b"font/woff2",
    "a.ttf": b"font/ttf",
    "a.otf": b"font/otf",
    "film.mp4": b"video/mp4",
    "film.webm": b"video/webm",
    "sound.ogg": b"audio/ogg",
    "sound.mp3": b"audio/mpeg",
    "sound.wav": b"audio/wav",
    "sound.flac": b"audio/flac",
    "sound.m4a": b"audio/mp4",
    "live.m3u8": b"application/vnd.apple.mpegurl; charset=utf-8",
    "live0001.ts": b"video/mp2t",
    "paper.pdf": b"application/pdf",
    "a.zip": b"application/zip",
    "a.tar": b"application/x-tar",
    "a.tar.gz": b"application/gzip",
    "a.zst": b"application/zstd",
    "a.7z": b"application/x-7z-compressed",
    "a.docx": b"application/vnd.openxmlformats-officedocument.wordprocessingml.document",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_has_the_type_of_its_extension(name):
    assert content_type(name) == EXPECTED[name]
    assert content_type(name.encode()) == EXPECTED[name]
    assert content_type(name.upper()) == EXPECTED[name]


@pytest.mark.parametrize(
    "name", ["", "a", "a.unheard-of", "a.", ".", "..", ".html", "..html", b"\xff.\xfe", "a.br"]
)
def test_what_is_not_known_is_octets(name):
    assert content_type(name) == UNKNOWN == b"application/octet-stream"


@pytest.mark.parametrize(
    "name", [b"caf\xe9.html", "caf\udce9.html", "dir.css/page.html", b"/x/.y/..html.html"]
)
def test_only_the_last_extension_of_the_last_segment_counts(name):
    assert content_type(name) == b"text/html; charset=utf-8"


def test_a_directory_lends_a_file_no_extension():
    assert content_type("v1.html/data") == UNKNOWN


@pytest.mark.parametrize("name", ["README", "LICENSE", b"docs/Changelog"])
def test_some_names_need_no_extension(name):
    assert content_type(name) == b"text/plain; charset=utf-8"


def test_apples_and_openids_files_are_json():
    assert content_type(b".well-known/apple-app-site-association") == b"application/json; charset=utf-8"


def test_own_types_go_before_the_table():
    own = {
        ".ts": b"text/plain; charset=utf-8",
        ".glb": b"x/y",
        "readme": b"text/markdown",
        "a.js": b"x/whole-name",
    }
    assert content_type("src/main.ts", own) == b"text/plain; charset=utf-8"
    assert content_type("A.GLB", own) == b"x/y"
    assert content_type(b"README", own) == b"text/markdown"
    assert content_type("a.js", own) == b"x/whole-name"
    assert content_type("b.js", own) == EXPECTED["app.js"]
    assert content_type("plain", own) == UNKNOWN


def test_the_table_is_fit_for_the_wire_and_frozen():
    for key, value in {**TYPES, **TYPES_OF_NAMES}.items():
        assert key == key.lower()
        assert key.isascii()
        assert "." not in key
        assert re.fullmatch(rb"[a-z]+/[a-z0-9.+-]+(; charset=utf-8)?", value), (key, value)
        assert not value.startswith(b"text/") or value.endswith(b"; charset=utf-8")
    with pytest.raises(TypeError):
        TYPES["html"] = b"text/plain"  # type: ignore[index]


def test_no_extension_stands_for_two_types():
    """A dict would let the later one win without a word."""
    extensions = " ".join([*media_types._TEXTS.values(), *media_types._BINARY.values()]).split()
    assert len(extensions) == len(set(extensions)) == len(TYPES)


# -- compressing ---------------------------------------------------------------------------------------------

SHRINKING = [
    *(
        EXPECTED[name]
        for name in ("index.html", "style.css", "app.js", "data.json", "site.webmanifest", "logo.svg")
    ),
    *(EXPECTED[name] for name in ("sitemap.xml", "feed.rss", "module.wasm", "a.ttf", "a.otf", "live.m3u8")),
    EXPECTED["favicon.ico"],
    b"text/event-stream",
    b"text/x-unheard-of",
    b"application/javascript",
    b"application/problem+json",
    b"application/vnd.api+json; version=1",
    b"application/soap+xml",
    b"APPLICATION/JSON ; Charset=UTF-8",
    b" text/html",
]
FIXED = [
    *(
        EXPECTED[name]
        for name in ("a.png", "a.jpg", "a.woff", "a.woff2", "film.mp4", "sound.mp3", "paper.pdf")
    ),
    *(EXPECTED[name] for name in ("a.zip", "a.tar.gz", "a.docx", "a.tar", "sound.wav")),
    UNKNOWN,
    b"",
    b";",
    b"multipart/byteranges; boundary=text/html",
    b"application/xml-not-really",
    b"image/png; like=image/svg+xml",
    b"textual/html",
]


@pytest.mark.parametrize("value", SHRINKING)
def test_text_code_and_plain_fonts_are_compressible(value):
    assert is_compressible(value)


@pytest.mark.parametrize("value", FIXED)
def test_what_is_compressed_inside_or_unknown_is_not(value):
    assert not is_compressible(value)


def test_what_an_app_makes_up_is_not_remembered_without_bounds():
    remembered = media_types._judge_remembered
    for number in range(2000):
        assert is_compressible(b"text/plain; boundary=%d" % number)
    assert remembered.cache_info().currsize <= media_types._REMEMBERED
    before = remembered.cache_info()
    assert is_compressible(b"text/plain; x=" + b"x" * 100_000)
    assert remembered.cache_info() == before
