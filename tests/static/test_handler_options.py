"""What the options of `StaticFiles` change in its answers."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from trioserve import StaticFiles
from trioserve.static import listing
from trioserve.testing import serving

from .asking import LARGE, ask, put
from .test_handler import HTML, NOSNIFF, fields_of


async def test_fields_by_pattern(site: Path) -> None:
    put(site / "app.8f3a2b1c.js", b"x")
    put(site / "docs" / "paper.pdf", b"%PDF")
    put(site / "docs" / 'naïve "x".pdf', b"%PDF")
    app = StaticFiles(
        site,
        max_age=5,
        cache_control=[("docs/*", "private"), ("*.png", "")],
        download=["*.pdf"],
        headers={"X-Site": "1"},
        content_types={".bin": "application/x-large"},
    )
    assert (await ask(app, "/app.8f3a2b1c.js")).header("cache-control") == "max-age=31536000, immutable"
    assert (await ask(app, "/app.js")).header("cache-control") == "max-age=5"
    assert (await ask(app, "/")).header("cache-control") == "no-cache"
    assert (await ask(app, "/docs/")).header("cache-control") == "private"
    assert (await ask(app, "/image.png")).header("cache-control") is None
    assert (await ask(app, "/large.bin")).header("content-type") == "application/x-large"
    paper = await ask(app, "/docs/paper.pdf")
    assert paper.header("content-disposition") == 'attachment; filename="paper.pdf"'
    named = await ask(app, "/docs/na%C3%AFve%20%22x%22.pdf")
    assert named.header("content-disposition") == (
        "attachment; filename=\"na_ve _x_.pdf\"; filename*=UTF-8''na%C3%AFve%20%22x%22.pdf"
    )
    assert (await ask(app, "/app.js")).header("x-site") == "1"
    assert (await ask(app, "/app.js", "OPTIONS")).header("x-site") == "1"
    # A 304 repeats what RFC 9110 section 15.4.5 lists, and nothing else.
    assert (await ask(app, "/app.js", headers=[("if-none-match", "*")])).header("x-site") is None
    app.close()


async def test_several_index_names_in_their_order(site: Path) -> None:
    app = StaticFiles(site, index=["index.html", "index.txt"], revalidate=0)
    put(site / "bare" / "index.txt", b"text")
    assert (await ask(app, "/bare/")).body == b"text"
    put(site / "bare" / "index.html", b"page")
    assert (await ask(app, "/bare/")).body == b"page"
    app.close()


async def test_without_index_names_there_is_no_index(site: Path) -> None:
    app = StaticFiles(site, index=[])
    assert (await ask(app, "/")).status == 404
    assert (await ask(app, "/docs")).status == 404
    app.close()


@pytest.mark.modes("tls", "http2")
async def test_a_directory_is_listed_where_that_is_asked_for(site: Path, engine: str) -> None:
    (site / "bare" / "inside").symlink_to("one.txt")
    (site / "bare" / "outside").symlink_to("/etc/passwd")
    (site / "bare" / "<script>.txt").write_bytes(b"")
    (site / "bare" / ".hidden").write_bytes(b"")
    async with serving(StaticFiles(site, listing=True), http_engine=engine) as server:
        page = await server.get("/bare/")
        assert page.status == 200
        assert page.header("content-type") == "text/html; charset=utf-8"
        assert "default-src 'none'" in (page.header("content-security-policy") or "")
        assert (page.header("vary"), page.header("cache-control")) == ("accept", "no-cache")
        assert b'href="./one.txt"' in page.body
        assert b'href="./inside"' in page.body
        assert b"outside" not in page.body
        assert b"hidden" not in page.body
        assert b"<script" not in page.body
        async with server.connect() as client:
            head = await client.request("HEAD", "/bare/")
        assert head.header("content-length") == str(len(page.body))
        assert head.body == b""
        listed = await server.get("/bare/", [("accept", "application/json")])
        assert listed.header("content-type") == "application/json; charset=utf-8"
        assert b'"one.txt"' in listed.body
        assert (await server.get("/bare")).header("location") == "./bare/"
        assert (await server.get("/docs/")).body == b"<h1>docs</h1>\n"
        assert (await server.get("/plain.txt/")).status == 404
        assert (await server.get("/nothing/")).status == 404
        assert (await server.get("/.git/")).status == 404


async def test_a_list_is_written_in_a_thread(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand names take a third of a second."""
    threads = []

    def watched(write: Any) -> Any:
        def call(*args: Any) -> Any:
            threads.append(threading.current_thread())
            return write(*args)

        return call

    for name in ("listing_page", "listing_json"):
        monkeypatch.setattr(listing, name, watched(getattr(listing, name)))
    app = StaticFiles(site, listing=True)
    for accept in ("text/html", "application/json"):
        assert (await ask(app, "/bare/", headers=[("accept", accept)])).status == 200
    assert len(threads) == 2
    assert threading.current_thread() not in threads
    app.close()


HTML_WANTED = [("accept", "text/html,application/xhtml+xml,*/*;q=0.8")]


async def test_a_single_page_app_gets_its_page_for_places_and_not_for_files(site: Path) -> None:
    app = StaticFiles(site, spa="index.html")
    for target in ("/users/7", "/users/", "/a/b/c?x=1"):
        page = await ask(app, target, headers=HTML_WANTED)
        assert (page.status, page.body) == (200, b"<h1>home</h1>\n")
        assert [value for name, value in page.headers if name == b"vary"] == [b"accept-encoding", b"accept"]
    etag = page.header("etag") or ""
    again = await ask(app, "/users/7", headers=[*HTML_WANTED, ("if-none-match", etag)])
    assert again.status == 304
    assert (await ask(app, "/users/7", "HEAD", HTML_WANTED)).status == 200
    assert (await ask(app, "/app.js", headers=HTML_WANTED)).header("content-type") != HTML
    for target, method, headers in [
        ("/missing.js", "GET", HTML_WANTED),
        ("/users/7", "GET", [("accept", "*/*")]),
        ("/users/7", "GET", [("accept", "text/html;q=0, */*")]),
        ("/users/7", "GET", []),
        ("/users/7", "POST", HTML_WANTED),
        ("/users//7", "GET", HTML_WANTED),
        ("/.git/config", "GET", HTML_WANTED),
    ]:
        missing = await ask(app, target, method, headers)
        assert (missing.status, missing.header("vary")) == (404, "accept"), target
    app.close()


@pytest.mark.modes("tls", "http2")
async def test_a_page_for_what_is_not_found(site: Path, engine: str) -> None:
    put(site / "404.html", b"<h1>lost</h1>")
    put(site / "404.html.gz", b"coded")
    async with serving(StaticFiles(site, not_found="404.html"), http_engine=engine) as server:
        for target in ("/nothing", "/.env", "/a//b"):
            page = await server.get(target, [("if-none-match", "*"), ("range", "bytes=0-1")])
            assert (page.status, page.body) == (404, b"<h1>lost</h1>")
            assert fields_of(page) == NOSNIFF | {
                "content-type": HTML,
                "content-length": "13",
                "vary": "accept-encoding",
            }
        coded = await server.get("/nothing", [("accept-encoding", "gzip")])
        assert (coded.status, coded.body, coded.header("content-encoding")) == (404, b"coded", "gzip")
        async with server.connect() as client:
            head = await client.request("HEAD", "/nothing")
        assert (head.status, head.body, head.header("content-length")) == (404, b"", "13")


async def test_who_takes_no_form_of_the_page_gets_words_that_vary_with_it(site: Path) -> None:
    put(site / "404.html", b"<h1>lost</h1>")
    app = StaticFiles(site, not_found="404.html")
    words = await ask(app, "/nothing", headers=[("accept-encoding", "identity;q=0")])
    assert (words.status, words.body, words.header("vary")) == (404, b"404 Not Found\n", "accept-encoding")
    app.close()


async def test_a_page_that_is_missing_itself_is_made_up_for(site: Path) -> None:
    app = StaticFiles(site, not_found="404.html", spa="spa.html")
    response = await ask(app, "/nothing", headers=HTML_WANTED)
    assert (response.status, response.body) == (404, b"404 Not Found\n")
    app.close()


@pytest.mark.modes("tls", "http2")
async def test_a_large_page_for_what_is_not_found_comes_from_its_file(site: Path, engine: str) -> None:
    put(site / "404.html", LARGE)
    async with serving(StaticFiles(site, not_found="404.html"), http_engine=engine) as server:
        page = await server.get("/nothing")
        assert (page.status, page.body) == (404, LARGE)
        async with server.connect() as client:
            head = await client.request("HEAD", "/nothing")
        assert (head.status, head.body, head.header("content-length")) == (404, b"", str(len(LARGE)))


@pytest.mark.modes("tls", "http2")
async def test_what_is_not_here_falls_through_to_an_app(site: Path, engine: str) -> None:
    async def other(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 299, "headers": []})
        await send({"type": "http.response.body", "body": scope["raw_path"]})

    app = StaticFiles(site, fallthrough=other)
    async with serving(app, http_engine=engine, lifespan="off") as server, server.connect() as client:
        for method, target, status in [
            ("GET", "/plain.txt", 200),
            ("POST", "/plain.txt", 405),
            ("GET", "/docs", 308),
            ("GET", "/nothing", 299),
            ("POST", "/api", 299),
            ("GET", "/bare/", 299),
            ("GET", "/.env", 299),
            ("GET", "/a//b", 299),
        ]:
            response = await client.request(method, target)
            assert response.status == status, target
            if status == 299:
                assert response.body == target.encode()
    app.close()
