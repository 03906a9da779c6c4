"""Paths that are no files of the site: one answer for all that has been tried on others (CVEs in brackets)."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import trio

from trioserve import StaticFiles
from trioserve.static.confine import ConfinedRoot, NotServed
from trioserve.testing import no_leaks, serving

from .asking import ask, put

NOT_SERVED = [
    # Out of the root, in every spelling. [CVE-2021-41773, CVE-2021-42013: decoded twice]
    "/../outside.txt",
    "/docs/../../outside.txt",
    "/..%2foutside.txt",
    "/%2e%2e/outside.txt",
    "/%2e%2e%2foutside.txt",
    "/%252e%252e%252foutside.txt",
    "/docs/%2e%2e/plain.txt",
    "/./plain.txt",
    "/..;/outside.txt",
    # A sibling whose name begins like the root's. [CVE-2023-29159, CVE-2026-22860]
    "/../site-private/x.txt",
    "/../site-private",
    # Slashes: encoded [CVE-2022-35920, CVE-2026-6414], doubled [CVE-2026-39406], turned round [CVE-2026-52844].
    "/docs%2findex.html",
    "/docs%2Findex.html",
    "//plain.txt",
    "//outside.txt",
    "/docs//index.html",
    "/docs\\index.html",
    "/docs%5cindex.html",
    "/..\\outside.txt",
    "/..%5coutside.txt",
    # What is no name.
    "/plain.txt%00",
    "/plain.txt%00.png",
    "/%00",
    "/plain%0a.txt",
    "/plain.txt%20",
    "/%ff",
    "/%c0%ae%c0%ae/outside.txt",
    "/%e0%80%af",
    "/%zz",
    "/plain.txt%",
    # Names that are not for everybody.
    "/.env",
    "/%2eenv",
    "/.git/config",
    "/.git/",
    "/docs/.hidden",
    # Windows's own. [CVE-2024-49766, CVE-2025-66221, CVE-2026-48818]
    "/C:/outside.txt",
    "/plain.txt::$DATA",
    "/NUL",
    "/con.txt",
    "/%5c%5chost%5cshare",
    "/PLAIN~1.TXT",
    # Patterns are nobody's business in a request. [CVE-2026-27585]
    "/*",
    "/plain.*",
    "/[p]lain.txt",
    # Absolute, and as hosts.
    "//etc/passwd",
    "/%2fetc/passwd",
    "//evil.example/..",
    # Long ones.
    "/" + "a" * 256,
    "/" + "a/" * 2040,
    "/" + "%61" * 300,
    # Not there, and not like this.
    "/nothing",
    "/plain.txt/",
    "/plain.txt/x",
    "/PLAIN.TXT",
    "/fifo",
    "/socket",
    "/escape",
    "/escape-directory/passwd",
    "/dangling",
    "/circle",
    "/unreadable.txt",
    "/docs/index.html/",
]

NOT_FOUND = (404, b"404 Not Found\n")


@pytest.fixture
def trapped(site: Path) -> Path:
    """The site, with what a server should not touch in it."""
    os.mkfifo(site / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        # Its path may be longer than an address can be.
        before = Path.cwd()
        os.chdir(site)
        try:
            sock.bind("socket")
        finally:
            os.chdir(before)
    (site / "escape").symlink_to("../outside.txt")
    (site / "escape-directory").symlink_to("/etc")
    (site / "dangling").symlink_to("nowhere")
    (site / "circle").symlink_to("circle")
    (site / "inside").symlink_to("plain.txt")
    put(site / "unreadable.txt", b"SECRET=5").chmod(0)
    put(site / "docs" / ".hidden", b"SECRET=6")
    return site


def may_read_all() -> bool:
    return os.geteuid() == 0


@pytest.mark.modes("tls", "http2")
@pytest.mark.parametrize("method", ["openat2", "portable"])
async def test_what_is_not_served_gets_one_answer(trapped: Path, engine: str, method: str) -> None:
    app = StaticFiles(trapped)
    use_method(app, method)
    with trio.fail_after(30):
        async with serving(app, http_engine=engine, max_target_size=16384) as server:
            async with server.connect() as client:
                assert (await client.get("/inside")).body == b"0123456789"
                for target in NOT_SERVED:
                    if target == "/unreadable.txt" and may_read_all():
                        continue
                    response = await client.get(target)
                    # Some targets are not let in by the engine: they are no targets at all.
                    assert (response.status, response.body) == NOT_FOUND or response.status == 400, target
                    assert b"SECRET" not in response.body
                    if response.status == 400:
                        client.close()
                        client = server.connect()
                    elif len(target) < 100:
                        assert response.header("content-length") == "14"
                        assert response.header("location") is None
                client.close()


def use_method(app: StaticFiles, method: str) -> None:
    from trioserve.static import confine
    from trioserve.static.file_cache import FileCache

    root = confine.ConfinedRoot(app.directory, method=method)  # type: ignore[arg-type]
    looker = app._cache._looker
    app.close()
    app._root = root
    app._cache = FileCache(type(looker)(root, app.options, app._rules, looker.wall))


@pytest.mark.parametrize("target", [target for target in NOT_SERVED if target != "/unreadable.txt"])
async def test_the_app_itself_refuses_them_all(trapped: Path, target: str) -> None:
    """Under a server that lets everything through."""
    app = StaticFiles(trapped, spa="index.html", listing=True)
    response = await ask(app, target)
    assert (response.status, response.body) == NOT_FOUND
    app.close()


@pytest.mark.skipif(may_read_all(), reason="root may read everything")
async def test_what_may_not_be_read_is_403_only_where_that_is_wanted(trapped: Path) -> None:
    for forbidden in (403, 404):
        app = StaticFiles(trapped, forbidden=forbidden)  # type: ignore[arg-type]
        assert (await ask(app, "/unreadable.txt")).status == forbidden
        assert (await ask(app, "/.env")).status == 404
        assert (await ask(app, "/escape")).status == 404
        app.close()


@pytest.mark.parametrize("forbidden", [403, 404])
async def test_a_directory_that_may_be_entered_but_not_read_is_one_all_the_same(
    site: Path, monkeypatch: pytest.MonkeyPatch, forbidden: Any
) -> None:
    """Its mode is 711; root may read it, so the system call is told here what it answers others."""
    real = ConfinedRoot.open

    def deny(self: ConfinedRoot, relative: bytes, *, nonblocking: bool = False) -> Any:
        if relative in {b"docs", b"bare", b"plain.txt"}:
            raise NotServed("permission denied", denied=True)
        return real(self, relative, nonblocking=nonblocking)

    monkeypatch.setattr(ConfinedRoot, "open", deny)
    app = StaticFiles(site, forbidden=forbidden, listing=True)
    response = await ask(app, "/docs?x")
    assert (response.status, response.header("location")) == (308, "./docs/?x")
    assert (await ask(app, "/docs/")).status == 200
    for target in ("/bare", "/plain.txt"):
        assert (await ask(app, target)).status == forbidden
    app.close()


async def test_a_denial_is_403_only_where_that_is_wanted(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(self: ConfinedRoot, relative: bytes, *, nonblocking: bool = False) -> None:
        raise NotServed("permission denied", denied=True)

    for forbidden in (403, 404):
        app = StaticFiles(site, forbidden=forbidden)  # type: ignore[arg-type]
        with monkeypatch.context() as patch:
            patch.setattr(ConfinedRoot, "open", deny)
            for target in ("/plain.txt", "/", "/docs/"):
                response = await ask(app, target)
                assert response.status == forbidden
                assert b"permission" not in response.body
        app.close()


async def test_names_with_dots_are_served_where_that_is_wanted(site: Path) -> None:
    app = StaticFiles(site, dotfiles=True)
    assert (await ask(app, "/.env")).body == b"SECRET=1"
    assert (await ask(app, "/../outside.txt")).status == 404
    app.close()


@pytest.mark.parametrize(
    ("symlinks", "inside", "outside"), [("beneath", 200, 404), ("never", 404, 404), ("follow", 200, 200)]
)
async def test_links_by_policy(trapped: Path, symlinks: str, inside: int, outside: int) -> None:
    app = StaticFiles(trapped, symlinks=symlinks)  # type: ignore[arg-type]
    assert (await ask(app, "/inside")).status == inside
    assert (await ask(app, "/escape")).status == outside
    app.close()


async def test_a_variant_that_leads_outside_is_no_variant(site: Path) -> None:
    """A variant's link is followed no further than the file's own. [CVE-2024-42367]"""
    (site / "app.js.gz").symlink_to("../outside.txt")
    app = StaticFiles(site)
    response = await ask(app, "/app.js", headers=[("accept-encoding", "gzip")])
    assert response.header("content-encoding") is None
    assert b"SECRET" not in response.body
    app.close()


@pytest.mark.parametrize(
    ("target", "location"),
    [
        ("/docs", "./docs/"),
        ("/docs?", "./docs/"),
        ("/docs?next=//evil.example", "./docs/?next=//evil.example"),
        ("/%64ocs", "./docs/"),
        ("/deep/evil.example", "./evil.example/"),
        ("/deep/a:b", "./a%3Ab/"),
        ("/deep/%3Cb%3E%22", "./%3Cb%3E%22/"),
        ("//docs", None),
        ("/%2fevil.example", None),
        ("/\\evil.example", None),
    ],
)
async def test_a_redirect_leads_nowhere_else(site: Path, target: str, location: str | None) -> None:
    for name in ("evil.example", "a:b", '<b>"'):
        put(site / "deep" / name / "index.html", b"page")
    put(site / "evil.example" / "index.html", b"page")
    app = StaticFiles(site)
    response = await ask(app, target)
    assert response.header("location") == location
    assert (response.status, response.body) == (308, b"") if location else NOT_FOUND
    app.close()


async def test_a_query_that_could_end_a_field_is_left_away(site: Path) -> None:
    app = StaticFiles(site)
    response = await ask(app, "/docs", query_string=b"a\r\nset-cookie: b")
    assert response.header("location") == "./docs/"
    app.close()


async def test_nothing_is_left_open(trapped: Path) -> None:
    async with no_leaks():
        app = StaticFiles(trapped, listing=True)
        for target in [*NOT_SERVED, "/", "/plain.txt", "/large.bin", "/docs", "/bare/"]:
            await ask(app, target)
            await ask(app, target, headers=[("range", "bytes=0-0,100-100")])
        app.close()
