"""Compression dictionaries (RFC 9842): which files become one, and who is sent what was made with his."""

from __future__ import annotations

import base64
import errno
import hashlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import http_sf
import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st

from trioserve import StaticFiles
from trioserve.static.codings import dcz_head, dcz_suffix, source_of
from trioserve.static.confine import ConfinedRoot, NeedsThread
from trioserve.static.dictionaries import available_dictionary, may_reveal, use_as_dictionary
from trioserve.static.field_rules import FieldRules
from trioserve.static.options import StaticOptions
from trioserve.static.request_fields import pick_fields
from trioserve.static.variants import Absent, Entry, Looker, Place, WithDictionary
from trioserve.testing import no_leaks, serving

from .asking import LARGE, OLD, ask, http_scope, put

Headers = list[tuple[str, str]]

FIRST, SECOND, LAST = (hashlib.sha256(text).digest() for text in (b"release 1", b"release 2", b"release 3"))
BROWSER = ("accept-encoding", "gzip, deflate, br, zstd, dcb, dcz")
VARY = "accept-encoding, available-dictionary"
RULES = [("app*.js", "/app*.js")]


def offer(dictionary: bytes) -> tuple[str, str]:
    return "available-dictionary", f":{base64.b64encode(dictionary).decode()}:"


def put_dcz(path: Path, dictionary: bytes, content: bytes, modified: int = OLD) -> Path:
    return put(Path(f"{path}{dcz_suffix(dictionary).decode()}"), dcz_head(dictionary) + content, modified)


@pytest.fixture
def coded(site: Path) -> Path:
    """app.js in brotli, and for who has either of two releases; large.txt for who has the first one."""
    put(site / "app.js.br", b"brotli")
    put_dcz(site / "app.js", FIRST, b"since first")
    put_dcz(site / "app.js", SECOND, b"since second")
    put(site / "large.txt", LARGE)
    put_dcz(site / "large.txt", FIRST, LARGE[:100_000])
    return site


def make(site: Path, **more: Any) -> StaticFiles:
    return StaticFiles(site, use_as_dictionary=RULES, **more)


# -- what is sent to whom ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "coding", "body"),
    [
        ([BROWSER, offer(FIRST)], "dcz", dcz_head(FIRST) + b"since first"),
        ([BROWSER, offer(SECOND)], "dcz", dcz_head(SECOND) + b"since second"),
        ([("accept-encoding", "dcz"), offer(FIRST)], "dcz", dcz_head(FIRST) + b"since first"),
        ([("accept-encoding", "br, dcz;q=0.9"), offer(FIRST)], "br", b"brotli"),
        ([("accept-encoding", "br;q=0.9, dcz"), offer(FIRST)], "dcz", dcz_head(FIRST) + b"since first"),
        ([("accept-encoding", "br, dcz;q=0"), offer(FIRST)], "br", b"brotli"),
        ([("accept-encoding", "identity, dcz;q=0.5"), offer(FIRST)], None, None),
        ([("accept-encoding", "dcz, identity;q=0"), offer(FIRST)], "dcz", dcz_head(FIRST) + b"since first"),
        # Nobody has said that he knows it.
        ([("accept-encoding", "br, dcb"), offer(FIRST)], "br", b"brotli"),
        ([offer(FIRST)], None, None),
        ([BROWSER], "br", b"brotli"),
        # No sibling was made with it.
        ([BROWSER, offer(LAST)], "br", b"brotli"),
        # Of one that was, the first half alone.
        ([BROWSER, offer(FIRST[:8] + LAST[8:])], "br", b"brotli"),
        # No hash, two of them.
        ([BROWSER, ("available-dictionary", "")], "br", b"brotli"),
        ([BROWSER, ("available-dictionary", FIRST.hex())], "br", b"brotli"),
        ([BROWSER, offer(FIRST), offer(FIRST)], "br", b"brotli"),
        ([BROWSER, offer(FIRST[:-1])], "br", b"brotli"),
        # What the server has called it says nothing.
        ([BROWSER, offer(FIRST), ("dictionary-id", '"other"')], "dcz", dcz_head(FIRST) + b"since first"),
        # Section 9.3.3: pages of others get what does not depend on what the client has.
        (
            [BROWSER, offer(FIRST), ("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "no-cors")],
            "br",
            b"brotli",
        ),
        (
            [BROWSER, offer(FIRST), ("sec-fetch-site", "same-origin"), ("sec-fetch-mode", "no-cors")],
            "dcz",
            dcz_head(FIRST) + b"since first",
        ),
    ],
)
async def test_who_has_a_dictionary_gets_what_was_made_with_it(
    coded: Path, headers: Headers, coding: str | None, body: bytes | None
) -> None:
    app = make(coded)
    content = body or b"let a = 1;\n" * 100
    for method in ("GET", "HEAD", "GET"):
        response = await ask(app, "/app.js", method, headers)
        assert response.status == 200
        assert response.header("content-encoding") == coding
        assert response.header("content-type") == "text/javascript; charset=utf-8"
        assert response.header("content-length") == str(len(content))
        assert response.header("vary") == VARY
        assert response.header("use-as-dictionary") == 'match="/app*.js"'
        assert response.body == (content if method == "GET" else b"")
    app.close()


@pytest.mark.modes("tls", "http2")
async def test_preconditions_and_ranges_are_of_the_form_that_was_chosen(coded: Path, engine: str) -> None:
    first, second = [BROWSER, offer(FIRST)], [BROWSER, offer(SECOND)]
    async with serving(make(coded), http_engine=engine) as server, server.connect() as client:
        tags = {}
        for name, headers in (("first", first), ("second", second), ("br", [BROWSER])):
            tags[name] = (await client.get("/app.js", headers)).header("etag") or ""
        assert tags["first"] == f'"33-{OLD * 10**9:x}-dcz-{FIRST[:8].hex()}"'
        assert len(set(tags.values())) == 3
        for name, tag in tags.items():
            response = await client.get("/app.js", [*first, ("if-none-match", tag)])
            assert response.status == (304 if name == "first" else 200)
            assert response.header("vary") == VARY
            assert response.header("use-as-dictionary") == (None if name == "first" else 'match="/app*.js"')
            response = await client.get("/app.js", [*second, ("if-match", tag)])
            assert response.status == (200 if name == "second" else 412)
            assert response.header("vary") == VARY
        large = await client.get("/large.txt", [*first, ("range", "bytes=90040-")])
        assert (large.status, large.body) == (206, LARGE[90_000:100_000])
        assert large.header("content-range") == "bytes 90040-100039/100040"
        assert (large.header("content-encoding"), large.header("vary")) == ("dcz", VARY)
        assert large.header("use-as-dictionary") is None, "no rule matches it"
        rest = [("range", "bytes=5-"), ("if-range", tags["first"])]
        assert (await client.get("/app.js", first + rest)).status == 206
        assert (await client.get("/app.js", second + rest)).status == 200
        beyond = await client.get("/app.js", [*first, ("range", "bytes=1000-")])
        assert (beyond.status, beyond.header("vary")) == (416, VARY)
        whole = await client.get("/large.txt", first)
        assert whole.body == dcz_head(FIRST) + LARGE[:100_000]


async def test_no_form_of_a_file_goes_on_where_another_of_the_same_time_has_ended(coded: Path) -> None:
    """Each has the time of the file; who has a part of one, and its date, may be sent another now."""
    app = make(coded, codings=[])
    offers = [BROWSER, offer(FIRST)]
    date = ("if-range", (await ask(app, "/large.txt", headers=offers)).header("last-modified") or "")
    for headers in (offers, [BROWSER, offer(LAST)], [BROWSER]):
        assert (await ask(app, "/large.txt", headers=[*headers, ("range", "bytes=5-"), date])).status == 200
    # Of this there is no other.
    assert (await ask(app, "/large.bin", headers=[("range", "bytes=5-"), date])).status == 206
    app.close()


async def test_what_depends_on_a_dictionary_says_so(coded: Path) -> None:
    """Also where there is no such sibling yet; and nothing else does."""
    app = make(coded, spa="index.html", not_found="app.js")
    refused = [("accept-encoding", "identity;q=0")]
    for target, headers, status, vary in (
        ("/plain.txt", [], 200, VARY),
        ("/plain.txt", [("if-none-match", "*")], 304, VARY),
        ("/plain.txt", refused, 406, VARY),
        ("/image.png", [], 200, None),
        ("/image.png", [offer(FIRST)], 200, None),
        ("/image.png", refused, 406, "accept-encoding"),
        ("/nothing", [*refused, ("accept", "text/css")], 404, "accept"),
    ):
        response = await ask(app, target, headers=headers)
        assert (response.status, response.header("vary")) == (status, vary), target
    # The error page is no answer to a request for it: the one or the other would be a dictionary that nobody has.
    missing = await ask(app, "/nothing.js", headers=[BROWSER, offer(FIRST)])
    assert (missing.status, missing.body) == (404, b"brotli")
    assert missing.header("use-as-dictionary") is None
    app.close()


async def test_the_page_of_a_single_page_app_may_need_a_dictionary(coded: Path) -> None:
    put_dcz(coded / "index.html", FIRST, b"page")
    app = make(coded, spa="index.html")
    response = await ask(app, "/place", headers=[BROWSER, offer(FIRST), ("accept", "text/html")])
    assert (response.status, response.body) == (200, dcz_head(FIRST) + b"page")
    assert [value for name, value in response.headers if name == b"vary"] == [VARY.encode(), b"accept"]
    app.close()


@pytest.mark.parametrize("given", [None, []])
async def test_without_rules_there_are_no_dictionaries_unless_they_come_from_elsewhere(
    coded: Path, given: list[Any] | None
) -> None:
    app = StaticFiles(coded, use_as_dictionary=given)
    for _ in range(2):
        response = await ask(app, "/app.js", headers=[BROWSER, offer(FIRST)])
        assert response.header("content-encoding") == ("br" if given is None else "dcz")
        assert response.header("vary") == ("accept-encoding" if given is None else VARY)
        assert response.header("use-as-dictionary") is None
    app.close()


async def test_where_nothing_else_is_looked_for(coded: Path) -> None:
    app = make(coded, codings=[])
    assert (await ask(app, "/app.js", headers=[BROWSER])).header("content-encoding") is None
    assert (await ask(app, "/app.js", headers=[BROWSER, offer(FIRST)])).header("content-encoding") == "dcz"
    app.close()


async def test_a_sibling_by_its_own_name_is_a_file(coded: Path) -> None:
    app = make(coded)
    name = f"app.js.{FIRST[:8].hex()}.dcz"
    # It has none itself.
    put(coded / f"{name}.br", b"in brotli")
    put(coded / "app.js.br.gz", b"in gzip")
    assert (await ask(app, "/app.js.br", headers=[BROWSER])).body == b"brotli"
    response = await ask(app, f"/{name}", headers=[BROWSER, offer(FIRST)])
    assert response.body == dcz_head(FIRST) + b"since first"
    assert response.header("content-encoding") is None
    assert response.header("content-type") == "application/octet-stream"
    assert (await ask(app, "/app.js", "POST", [BROWSER, offer(FIRST)])).status == 405
    app.close()


@pytest.mark.parametrize(
    "what", ["stale", "newer", "empty", "short", "another's", "directory", "outside", "fifo"]
)
async def test_what_is_no_use_as_a_sibling_is_not_sent(coded: Path, what: str) -> None:
    sibling = Path(f"{coded}/app.js{dcz_suffix(FIRST).decode()}")
    if what in ("stale", "newer"):
        modified = OLD - 1 if what == "stale" else OLD + 1  # of what was put back meanwhile
        os.utime(sibling, (modified, modified))
    elif what in ("empty", "short", "another's"):
        put(sibling, {"empty": b"", "short": dcz_head(FIRST)[:39]}.get(what, dcz_head(SECOND) + b"x"))
    else:
        sibling.unlink()
        if what == "directory":
            sibling.mkdir()
        elif what == "outside":
            put(coded.parent / "outside.dcz", dcz_head(FIRST) + b"secret")
            sibling.symlink_to("../outside.dcz")
        else:
            os.mkfifo(sibling)
    app = make(coded)
    async with no_leaks():
        assert (await ask(app, "/app.js", headers=[BROWSER, offer(FIRST)])).body == b"brotli"
        app.close()
        app._open()
    app.close()


async def test_siblings_come_and_go(site: Path) -> None:
    app = make(site, revalidate=0)
    headers = [BROWSER, offer(FIRST)]
    assert (await ask(app, "/app.js", headers=headers)).header("content-encoding") is None
    for content in (b"one", b"three"):
        put_dcz(site / "app.js", FIRST, content)
        assert (await ask(app, "/app.js", headers=headers)).body == dcz_head(FIRST) + content
    # The file was changed, and the build has not run.
    put(site / "app.js", b"changed", OLD + 5)
    assert (await ask(app, "/app.js", headers=headers)).body == b"changed"
    put_dcz(site / "app.js", FIRST, b"four", OLD + 5)
    assert (await ask(app, "/app.js", headers=headers)).body == dcz_head(FIRST) + b"four"
    (site / "app.js").unlink()
    assert (await ask(app, "/app.js", headers=headers)).status == 404
    app.close()


# -- what it costs -------------------------------------------------------------------------------------------


async def test_made_up_hashes_push_nothing_out(coded: Path) -> None:
    app = make(coded, cache_files=3)
    async with no_leaks():
        await ask(app, "/app.js", headers=[BROWSER, offer(FIRST)])
        await ask(app, "/plain.txt")
        assert (await ask(app, "/nothing")).status == 404
        absent = dict(app._cache._absent)
        known = dict(app._cache._entries)
        assert set(known) == {b"app.js", WithDictionary(b"app.js", FIRST), b"plain.txt"}
        for number in range(3000):
            made_up = hashlib.sha256(b"%d" % number).digest()
            assert (await ask(app, "/app.js", headers=[BROWSER, offer(made_up)])).body == b"brotli"
        assert dict(app._cache._entries) == known
        assert app._cache._absent == absent != {}
        assert len(app._cache._no_forms) == 1000
        assert len(known[b"app.js"].choices) == 1
        app.close()
        app._open()
    app.close()


async def test_who_offers_none_is_answered_from_memory(coded: Path) -> None:
    app = make(coded)
    await ask(app, "/app.js", headers=[BROWSER, offer(FIRST)])
    await ask(app, "/image.png")

    def quickly(target: str, *headers: tuple[str, str]) -> Any:
        scope = http_scope(target, headers=headers)
        return app.quick_answer("GET", scope["raw_path"], pick_fields(scope["headers"]))

    entry = app._cache.shortcuts[""][b"/app.js"]
    assert quickly("/app.js", BROWSER) is entry.forms[b"br"].whole
    assert quickly("/app.js", BROWSER) is entry.forms[b"br"].whole
    tag = entry.forms[b"br"].validators.etag.decode()
    assert quickly("/app.js", BROWSER, ("if-none-match", tag)) is entry.forms[b"br"].not_modified
    assert quickly("/app.js", ("accept-encoding", "identity;q=0, br;q=0")).status == 406
    # This one has to be looked for.
    assert quickly("/app.js", BROWSER, offer(FIRST)) is None
    assert quickly("/image.png", BROWSER, offer(FIRST)).status == 200
    app.close()


def looker(site: Path, method: str = "auto") -> Looker:
    options = StaticOptions.checked({"use_as_dictionary": RULES})
    root = ConfinedRoot(site, method=method)  # type: ignore[arg-type]
    return Looker(root, options, FieldRules(options), lambda: OLD + 1000.0)


async def test_only_its_own_form_is_kept_of_a_file_with_a_dictionary(coded: Path) -> None:
    look = looker(coded).look
    place = WithDictionary(b"large.txt", FIRST)
    async with no_leaks():
        first = look(place, None, nonblocking=False)
        assert isinstance(first, Entry)
        assert (first.relative, list(first.forms), first.descriptors) == (place, [b"dcz"], 1)
        assert look(place, first, nonblocking=False) is first
        put(coded / "large.txt", LARGE + b"more")
        put_dcz(coded / "large.txt", FIRST, b"small")
        second = look(place, first, nonblocking=False)
        assert isinstance(second, Entry)
        assert (second.descriptors, second.memory) == (0, 45)
        for missing in (b"large.txt", b"docs", b"nothing", b"app.js.br"):
            assert look(WithDictionary(missing, SECOND), None, nonblocking=False) is Absent.MISSING
        first.release()
        second.release()


async def test_what_would_have_to_be_waited_for_is_left_to_a_thread(
    coded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = WithDictionary(b"large.txt", FIRST)
    monkeypatch.setattr("trioserve.static.open_file.read_resident", lambda *_: None)
    async with no_leaks():
        with pytest.raises(NeedsThread):
            looker(coded).look(place, None, nonblocking=True)
        app = make(coded)
        response = await ask(app, "/large.txt", headers=[BROWSER, offer(FIRST)])
        assert response.header("content-encoding") == "dcz"
        app.close()


# -- what happens meanwhile -----------------------------------------------------------------------------------


class Gate:
    """Holds a thread that looks for a form with a dictionary until `meanwhile` has been done on the event loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], Awaitable[object]]) -> None:
        self.passed = 0
        real = Looker.look

        def look(looker: Looker, place: Place, known: Entry | None, *, nonblocking: bool) -> Entry | Absent:
            if isinstance(place, WithDictionary):
                if nonblocking:
                    raise NeedsThread
                trio.from_thread.run(meanwhile)
                self.passed += 1
            return real(looker, place, known, nonblocking=nonblocking)

        monkeypatch.setattr(Looker, "look", look)


@pytest.mark.parametrize("target", ["/large.txt", "/place"])
@pytest.mark.parametrize("removed", [False, True])
async def test_a_file_that_was_evicted_while_a_form_was_looked_for_is_opened_again(
    coded: Path, monkeypatch: pytest.MonkeyPatch, target: str, removed: bool
) -> None:
    app = make(coded, cache_files=1, spa="large.txt")

    async def evict() -> None:
        for _ in range(2):  # used once, it stays once
            await ask(app, "/large.bin")
            await ask(app, "/image.png")
        assert b"large.txt" not in app._cache._entries
        if removed:
            (coded / "large.txt").unlink()

    gate = Gate(monkeypatch, evict)
    async with no_leaks():
        headers = [BROWSER, offer(LAST), ("accept", "text/html")]
        response = await ask(app, target, headers=headers)
        assert gate.passed == 1
        assert (response.status, response.body) == ((404, b"404 Not Found\n") if removed else (200, LARGE))
        app.close()
        app._open()
    app.close()


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.EIO])
async def test_what_keeps_a_form_from_being_looked_for_is_no_harm_to_the_others(
    coded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    app = make(coded)
    await ask(app, "/large.txt")
    await ask(app, "/large.bin")
    known = dict(app._cache._entries)

    async def fail() -> None:
        raise OSError(error, os.strerror(error))

    Gate(monkeypatch, fail)
    response = await ask(app, "/large.txt", headers=[BROWSER, offer(FIRST)])
    assert (response.status, response.body) == (200, LARGE)
    assert app._cache._entries == known
    assert os.strerror(error) in caplog.text
    app.close()


# -- fields --------------------------------------------------------------------------------------------------


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="("), min_size=1))
@example('/a\\"b*')
def test_use_as_dictionary_is_a_structured_field(text: str) -> None:
    assert http_sf.parse(use_as_dictionary(text), tltype="dictionary") == {"match": (text, {})}
    named = http_sf.parse(use_as_dictionary("/*", text), tltype="dictionary")
    assert named == {"match": ("/*", {}), "id": (text, {})}


@given(st.binary(min_size=32, max_size=32))
def test_a_hash_comes_as_clients_write_it(digest: bytes) -> None:
    value: bytes = http_sf.ser(digest).encode("ascii")
    assert available_dictionary(value) == available_dictionary(b" " + value + b"\t") == digest
    assert available_dictionary(value.replace(b"=", b"")) == digest


@given(st.binary(max_size=40).filter(lambda digest: len(digest) != 32))
def test_a_hash_of_another_length_is_none(digest: bytes) -> None:
    assert available_dictionary(http_sf.ser(digest).encode("ascii")) is None


@pytest.mark.parametrize(
    "value",
    [
        "",
        "::",
        "pZGm1Av0IEBKARczz7exkNYsZb8LzaMrV7J32a2fFG4=",
        ":pZGm1Av0IEBKARczz7exkNYsZb8LzaMrV7J32a2fFG4=",
        '"pZGm1Av0IEBKARczz7exkNYsZb8LzaMrV7J32a2fFG4="',
        ":pZGm1Av0IEBKARczz7exkNYsZb8LzaMrV7J32a2fFG4==:",
        ":pZGm1Av0IEBKARczz7exkNYsZb8LzaMrV7J32a2fFG-=:",
        ":pZGm1Av0IEBKARczz7exkNYsZb8LzaMrV7J32a2 FG4=:",
        ":pZGm1Av0IEBKARczz7exkNYsZb8LzaMrV7J32a2fFG4=:, :pZGm1Av0IEBKARczz7exkNYsZb8LzaMrV7J32a2fFG4=:",
        ":" * 60_000,
    ],
)
def test_what_is_no_hash_is_as_good_as_not_there(value: str) -> None:
    assert available_dictionary(value.encode()) is None


SITE, MODE, ORIGIN = (b"sec-fetch-site", b"sec-fetch-mode", b"origin")


@pytest.mark.parametrize(
    ("asked", "allowed", "verdict"),
    [
        ({}, None, True),
        ({SITE: b"same-origin", MODE: b"no-cors"}, None, True),
        ({MODE: b"no-cors"}, None, True),
        ({SITE: b"cross-site"}, None, True),
        ({SITE: b"none", MODE: b"navigate"}, None, True),
        ({SITE: b"cross-site", MODE: b"same-origin"}, None, True),
        ({SITE: b"cross-site", MODE: b"no-cors"}, b"*", False),
        ({SITE: b"same-site", MODE: b"no-cors"}, None, False),
        ({SITE: b"cross-site", MODE: b"websocket"}, b"*", False),
        ({SITE: b"cross-site", MODE: b"cors", ORIGIN: b"https://a"}, None, False),
        ({SITE: b"cross-site", MODE: b"cors"}, b"*", False),
        ({SITE: b"cross-site", MODE: b"cors", ORIGIN: b"https://a"}, b"*", True),
        ({SITE: b"cross-site", MODE: b"cors", ORIGIN: b"https://a"}, b"https://a", True),
        ({SITE: b"cross-site", MODE: b"cors", ORIGIN: b"https://a"}, b"https://b", False),
    ],
)
def test_what_may_be_told_to_pages_of_others(
    asked: dict[bytes, bytes], allowed: bytes | None, verdict: bool
) -> None:
    fields = {} if allowed is None else {b"access-control-allow-origin": allowed}
    assert may_reveal([(b"host", b"x"), *asked.items()], fields) is verdict


async def test_a_page_that_may_read_the_answer_by_cors_gets_it_by_dictionary(coded: Path) -> None:
    cors = [("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "cors"), ("origin", "https://a")]
    for headers, coding in (({}, "br"), ({"Access-Control-Allow-Origin": "*"}, "dcz")):
        app = make(coded, headers=headers)
        response = await ask(app, "/app.js", headers=[BROWSER, offer(FIRST), *cors])
        assert response.header("content-encoding") == coding
        app.close()


async def test_the_first_rule_that_matches_holds(coded: Path) -> None:
    rules = [("docs/*", "/docs/*", 'the "docs"'), ["*.html", "/*"]]
    app = StaticFiles(coded, use_as_dictionary=rules, download=["*.txt"], headers={"X-Site": "1"})  # type: ignore[arg-type]
    page = await ask(app, "/docs/index.html")
    assert page.header("use-as-dictionary") == r'match="/docs/*", id="the \"docs\""'
    assert (await ask(app, "/index.html")).header("use-as-dictionary") == 'match="/*"'
    text = await ask(app, "/docs/a%20b.txt")
    assert text.header("use-as-dictionary") == page.header("use-as-dictionary")
    assert (text.header("content-disposition"), text.header("x-site")) == (
        'attachment; filename="a b.txt"',
        "1",
    )
    assert (await ask(app, "/app.js")).header("use-as-dictionary") is None
    app.close()


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (b"a.js.br", b"a.js"),
        (b"a.zst.gz", b"a.zst"),
        (b"a.js.0123456789abcdef.dcz", b"a.js"),
        (b"a\nb.gz", b"a\nb"),
        (b"a.js.0123456789ABCDEF.dcz", None),
        (b"a.js.0123456789abcde.dcz", None),
        (b"a.dcz", None),
        (b".gz", None),
        (b"a.js", None),
    ],
)
def test_siblings_are_known_by_name(name: bytes, source: bytes | None) -> None:
    assert source_of(name) == source
