"""Precompressed siblings: which is sent to whom, and which is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trioserve import StaticFiles
from trioserve.static.confine import ConfinedRoot, NeedsThread
from trioserve.static.field_rules import FieldRules
from trioserve.static.options import StaticOptions
from trioserve.static.variants import Absent, Entry, Looker
from trioserve.testing import no_leaks, serving

from .asking import LARGE, OLD, ask, put

TYPE = "text/javascript; charset=utf-8"


@pytest.fixture
def coded(site: Path) -> Path:
    """app.js has three siblings, large.txt a large one."""
    put(site / "app.js.br", b"brotli")
    put(site / "app.js.zst", b"zstandard")
    put(site / "app.js.gz", b"gzipped")
    put(site / "large.txt", LARGE)
    put(site / "large.txt.gz", LARGE[:100_000])
    return site


@pytest.mark.parametrize(
    ("accepted", "coding", "body"),
    [
        ("br, zstd, gzip", "br", b"brotli"),
        ("gzip, deflate, br, zstd", "br", b"brotli"),
        ("gzip, br;q=0.5", "gzip", b"gzipped"),
        ("zstd, br;q=0", "zstd", b"zstandard"),
        ("x-gzip", "gzip", b"gzipped"),
        ("GZIP", "gzip", b"gzipped"),
        ("*", "br", b"brotli"),
        ("*;q=0.1, identity;q=0", "br", b"brotli"),
        ("gzip;q=0, *;q=0.5", "br", b"brotli"),
        # nginx, Starlette and others look for the word alone.
        ("gzip;q=0", None, None),
        ("identity", None, None),
        ("deflate", None, None),
        ("", None, None),
        (None, None, None),
        ("identity;q=1, br;q=0.5", None, None),
    ],
)
async def test_the_client_gets_the_coding_it_wants_most(
    coded: Path, accepted: str | None, coding: str | None, body: bytes | None
) -> None:
    app = StaticFiles(coded)
    headers = [] if accepted is None else [("accept-encoding", accepted)]
    for method in ("GET", "HEAD", "GET"):
        response = await ask(app, "/app.js", method, headers)
        content = body or b"let a = 1;\n" * 100
        assert response.status == 200
        assert response.header("content-encoding") == coding
        assert response.header("content-type") == TYPE
        assert response.header("content-length") == str(len(content))
        assert response.header("vary") == "accept-encoding"
        assert response.body == (content if method == "GET" else b"")
    app.close()


@pytest.mark.parametrize("accepted", ["identity;q=0", "*;q=0", "deflate, *;q=0"])
async def test_who_accepts_nothing_gets_406(coded: Path, accepted: str) -> None:
    app = StaticFiles(coded)
    for target in ("/app.js", "/image.png"):
        for method in ("GET", "HEAD"):
            response = await ask(app, target, method, [("accept-encoding", accepted)])
            assert (response.status, response.header("vary")) == (406, "accept-encoding")
    app.close()


async def test_who_refuses_the_plain_form_gets_another(coded: Path) -> None:
    app = StaticFiles(coded)
    response = await ask(app, "/app.js", headers=[("accept-encoding", "gzip, identity;q=0")])
    assert response.body == b"gzipped"
    app.close()


@pytest.mark.modes("tls", "http2")
async def test_each_coding_has_a_tag_of_its_own(coded: Path, engine: str) -> None:
    async with serving(StaticFiles(coded), http_engine=engine) as server, server.connect() as client:
        tags = {}
        for coding in ("br", "zstd", "gzip", "identity"):
            response = await client.get("/app.js", [("accept-encoding", coding)])
            tags[coding] = response.header("etag") or ""
        assert len(set(tags.values())) == 4
        assert tags["br"] == f'"6-{OLD * 10**9:x}-br"'
        for coding in tags:
            asked = [("accept-encoding", coding), ("if-none-match", tags["gzip"])]
            response = await client.get("/app.js", asked)
            assert response.status == (304 if coding == "gzip" else 200)
            assert response.header("vary") == "accept-encoding"
            assert response.header("content-encoding") == (None if coding in ("gzip", "identity") else coding)


@pytest.mark.modes("tls", "http2")
async def test_ranges_are_of_the_coded_form(coded: Path, engine: str) -> None:
    gzip = ("accept-encoding", "gzip")
    async with serving(StaticFiles(coded), http_engine=engine) as server, server.connect() as client:
        small = await client.get("/app.js", [gzip, ("range", "bytes=2-3")])
        assert (small.status, small.body) == (206, b"ip")
        assert small.header("content-range") == "bytes 2-3/7"
        assert small.header("content-encoding") == "gzip"
        large = await client.get("/large.txt", [gzip, ("range", "bytes=90000-")])
        assert (large.status, large.body) == (206, LARGE[90000:100_000])
        assert large.header("content-range") == "bytes 90000-99999/100000"
        plain = await client.get("/large.txt", [("range", "bytes=90000-90009")])
        assert plain.header("content-range") == "bytes 90000-90009/300000"
        wrong = await client.get(
            "/large.txt", [gzip, ("range", "bytes=5-"), ("if-range", plain.header("etag") or "")]
        )
        assert wrong.status == 200


async def test_a_date_that_codings_share_joins_no_parts_of_them(coded: Path) -> None:
    """RFC 9110 section 8.8.1: it is a weak validator; the rest of another form would be put behind the first part."""
    os.utime(coded / "app.js.br", (OLD + 60, OLD + 60))
    app = StaticFiles(coded)
    for coding, status in (("gzip", 200), ("identity", 200), ("br", 206)):
        part = await ask(app, "/app.js", headers=[("accept-encoding", coding), ("range", "bytes=0-1")])
        for field, expected in (("last-modified", status), ("etag", 206)):
            rest = [
                ("accept-encoding", coding),
                ("range", "bytes=2-"),
                ("if-range", part.header(field) or ""),
            ]
            assert (await ask(app, "/app.js", headers=rest)).status == expected, (coding, field)
    whole = [
        ("range", "bytes=2-"),
        ("if-range", (await ask(app, "/plain.txt")).header("last-modified") or ""),
    ]
    assert (await ask(app, "/plain.txt", headers=whole)).status == 206, "there is only one form of it"
    app.close()


async def test_a_sibling_by_its_own_name_is_a_file(coded: Path) -> None:
    app = StaticFiles(coded)
    response = await ask(app, "/app.js.gz", headers=[("accept-encoding", "gzip")])
    assert response.body == b"gzipped"
    assert response.header("content-encoding") is None
    assert response.header("content-type") == "application/gzip"
    app.close()


@pytest.mark.parametrize("what", ["stale", "empty", "directory", "dangling", "fifo"])
async def test_what_is_no_use_as_a_sibling_is_not_sent(coded: Path, what: str) -> None:
    sibling = coded / "app.js.br"
    if what == "stale":
        os.utime(sibling, (OLD - 1, OLD - 1))
    elif what == "empty":
        put(sibling, b"")
    else:
        sibling.unlink()
        if what == "directory":
            sibling.mkdir()
        elif what == "dangling":
            sibling.symlink_to("nowhere")
        else:
            os.mkfifo(sibling)
    app = StaticFiles(coded)
    async with no_leaks():
        response = await ask(app, "/app.js", headers=[("accept-encoding", "br, gzip;q=0.5")])
        assert response.header("content-encoding") == "gzip"
        app.close()
        app._open()
    app.close()


async def test_siblings_come_and_go(site: Path) -> None:
    app = StaticFiles(site, revalidate=0)
    brotli = [("accept-encoding", "br")]
    assert (await ask(app, "/app.js", headers=brotli)).header("content-encoding") is None
    put(site / "app.js.br", b"one")
    assert (await ask(app, "/app.js", headers=brotli)).body == b"one"
    put(site / "app.js.br", b"two")
    assert (await ask(app, "/app.js", headers=brotli)).body == b"two"
    # The file was changed, and the build has not run.
    put(site / "app.js", b"changed", OLD + 5)
    assert (await ask(app, "/app.js", headers=brotli)).body == b"changed"
    (site / "app.js.br").unlink()
    assert (await ask(app, "/app.js", headers=brotli)).body == b"changed"
    app.close()


async def test_codings_as_the_operator_prefers_them(coded: Path) -> None:
    app = StaticFiles(coded, codings=["gzip", "br"])
    assert (await ask(app, "/app.js", headers=[("accept-encoding", "br, gzip, zstd")])).body == b"gzipped"
    assert (await ask(app, "/app.js", headers=[("accept-encoding", "zstd")])).header(
        "content-encoding"
    ) is None
    app.close()
    plain = StaticFiles(coded, codings=[])
    response = await ask(plain, "/app.js", headers=[("accept-encoding", "br")])
    assert response.header("content-encoding") is None
    assert response.header("vary") is None
    plain.close()


async def test_vary_only_where_a_coding_is_thinkable(coded: Path) -> None:
    app = StaticFiles(coded)
    assert (await ask(app, "/image.png")).header("vary") is None
    assert (await ask(app, "/plain.txt")).header("vary") == "accept-encoding"
    put(coded / "image.png.gz", b"smaller, oddly")
    odd = StaticFiles(coded)
    assert (await ask(odd, "/image.png")).header("vary") == "accept-encoding"
    app.close()
    odd.close()


# -- looking -------------------------------------------------------------------------------------------------


def looker(site: Path, method: str = "auto", **given: object) -> Looker:
    options = StaticOptions.checked(given)
    return Looker(ConfinedRoot(site, method=method), options, FieldRules(options), lambda: OLD + 1000.0)  # type: ignore[arg-type]


async def test_an_entry_is_kept_as_long_as_nothing_has_changed(coded: Path) -> None:
    look = looker(coded).look
    async with no_leaks():
        first = look(b"large.txt", None, nonblocking=False)
        assert isinstance(first, Entry)
        assert repr(first) == "<Entry b'large.txt' as gzip, identity>"
        assert (first.descriptors, first.memory) == (2, 0)
        assert look(b"large.txt", first, nonblocking=False) is first
        put(coded / "large.txt.gz", b"changed")
        second = look(b"large.txt", first, nonblocking=False)
        assert isinstance(second, Entry)
        assert second is not first
        assert (second.descriptors, second.memory) == (1, 7)
        first.release()
        second.release()


async def test_what_has_no_entry(coded: Path) -> None:
    look = looker(coded).look
    assert look(b"docs", None, nonblocking=False) is Absent.DIRECTORY
    assert look(b"nothing", None, nonblocking=False) is Absent.MISSING
    assert look(b"plain.txt/x", None, nonblocking=False) is Absent.MISSING


async def test_what_would_have_to_be_waited_for_is_left_to_a_thread(
    coded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    portable = looker(coded, "portable")
    with pytest.raises(NeedsThread):
        portable.look(b"plain.txt", None, nonblocking=True)
    monkeypatch.setattr("trioserve.static.open_file.read_resident", lambda *_: None)
    async with no_leaks():
        with pytest.raises(NeedsThread):
            looker(coded).look(b"app.js", None, nonblocking=True)
    entry = looker(coded).look(b"app.js", None, nonblocking=False)
    assert isinstance(entry, Entry)
    assert entry.descriptors == 0


async def test_descriptors_are_given_back_when_a_sibling_cannot_be_opened(
    coded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ConfinedRoot.open

    def limited(self: ConfinedRoot, relative: bytes, *, nonblocking: bool = False) -> object:
        if relative.endswith(b".gz"):
            raise OSError(24, "Too many open files")
        return real(self, relative)

    monkeypatch.setattr(ConfinedRoot, "open", limited)
    async with no_leaks():
        with pytest.raises(OSError, match="Too many open files"):
            looker(coded).look(b"app.js", None, nonblocking=False)


def test_choices_are_remembered_but_not_without_end(coded: Path) -> None:
    entry = looker(coded).look(b"app.js", None, nonblocking=False)
    assert isinstance(entry, Entry)
    for number in range(100):
        form = entry.choose(b"gzip, x-%d" % number)
        assert form is not None
        assert form.coding == b"gzip"
    assert len(entry.choices) <= 16
    entry.choices.clear()
    form = entry.choose(b"gzip, " + b"x" * 60_000)
    assert form is not None
    assert not entry.choices, "a client could fill the memory with them"
    assert "gzip, 7 bytes" in repr(form)
