"""What httplint and REDbot say of static answers: nothing bad, and no warning that is not explained here.

httplint reads one answer, REDbot asks for more by itself: with gzip, with both validators, and for a part. A finding
that is explained must occur where it is declared, so that no explanation outlives it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from trioserve import StaticFiles
from trioserve.static.codings import dcz_head, dcz_suffix
from trioserve.static.precompress import run_precompress
from trioserve.testing import Response, serving

from ..static.asking import LARGE, put
from .process import run_to_end

httplint = pytest.importorskip("httplint")

# Findings by name, and why they stay.
EXPLAINED = {
    "PARTIAL_WITHOUT_RANGE": "RFC 9110 §15.3.7.2: the head of a multipart must not have Content-Range, its parts do",
    "FRESHNESS_NO_CACHE_NO_VALIDATOR": "a listing is made for each request; to compare tags it would be made as well",
    "BAD_BROTLI": "httplint decodes a part as if it were the whole; RFC 9110 §14.2: ranges are of the coded bytes",
}

CODED_PART = frozenset({"BAD_BROTLI"})
PARTS = frozenset({"PARTIAL_WITHOUT_RANGE"})
LISTING = frozenset({"FRESHNESS_NO_CACHE_NO_VALIDATOR"})
NONE: frozenset[str] = frozenset()

PAGE = b"<!DOCTYPE html>\n<html lang=en><meta charset=utf-8><title>home</title>\n" + b"<p>word\n" * 200
SCRIPT = b"let a = 1;\n" * 200


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("site")
    put(root / "index.html", PAGE)
    put(root / "app.js", SCRIPT)
    put(root / "app-3f9a2b7c.js", SCRIPT)
    put(root / "style.css", b"p { color: red }\n" * 100)
    put(root / "plain.txt", b"some words\n" * 100)
    put(root / "large.bin", LARGE)
    put(root / "empty.txt", b"")
    put(root / "logo.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>\n')
    put(root / "logo.png", b"\x89PNG\r\n\x1a\n" + bytes(100))
    put(root / "data.json", b'{"a": 1}\n')
    put(root / "caf\N{LATIN SMALL LETTER E WITH ACUTE}.pdf", b"%PDF-1.7\n" + b"x" * 100)
    put(root / "old.txt", b"from a store\n", 1)
    put(root / "folder" / "one.txt", b"1")
    put(root / "section" / "index.html", PAGE)
    put(root / "gone.html", PAGE)
    assert run_precompress([str(root), "--quiet", "--min-size", "500"]) == 0
    # Not every Python here has an encoder for it.
    for name in ("index.html", "app.js"):
        put(root / f"{name}.zst", as_zstd((root / name).read_bytes()))
    return root


def as_zstd(content: bytes) -> bytes:
    """A frame with one block, stored (RFC 8878 section 3.1.1)."""
    size = len(content)
    assert 256 <= size < 65536 + 256
    return b"\x28\xb5\x2f\xfd\x60%b%b%b" % (
        (size - 256).to_bytes(2, "little"), (size << 3 | 1).to_bytes(3, "little"), content
    )  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """A request, the status of its answer, and what is found in it. `{etag}` and `{date}` are the file's."""

    target: str
    status: int = 200
    findings: frozenset[str] = NONE
    fields: Mapping[str, str] = field(default_factory=dict)
    method: str = "GET"

    @property
    def name(self) -> str:
        return f"{self.status} {self.method} {self.target} {dict(self.fields) or ''}".rstrip()


FILES = ("/app.js", "/app-3f9a2b7c.js", "/style.css", "/plain.txt", "/large.bin", "/empty.txt", "/logo.svg",
         "/logo.png", "/data.json", "/caf%C3%A9.pdf")  # fmt: skip
CODINGS = ("gzip", "br", "zstd")
# What says which form is meant.
CHOOSING = ("accept", "accept-encoding", "available-dictionary")
THREE = "bytes=0-9,500-509,-10"

PROBES = (
    *[Probe(target, 200, NONE) for target in FILES],
    *[Probe(target, 200, NONE) for target in ("/", "/section/")],
    Probe("/old.txt", 200, NONE),
    *[Probe(target, 200, NONE, method="HEAD") for target in ("/plain.txt", "/large.bin", "/empty.txt")],
    *[Probe("/app.js", 200, NONE, {"accept-encoding": coding}) for coding in CODINGS],
    *[Probe("/app.js", 200, NONE, {"accept-encoding": coding}, "HEAD") for coding in CODINGS],
    *[Probe("/", 200, NONE, {"accept-encoding": coding}) for coding in CODINGS],
    Probe("/app.js", 200, NONE, {"range": "bytes=0-9", "if-range": '"x"'}),
    Probe("/folder/", 200, LISTING),
    Probe("/folder/", 200, LISTING, {"accept": "application/json"}),
    Probe("/folder/", 200, LISTING, method="HEAD"),
    Probe("/app.js", 204, NONE, method="OPTIONS"),
    *[Probe(target, 206, NONE, {"range": "bytes=0-9"}) for target in ("/app.js", "/large.bin")],
    Probe("/", 206, NONE, {"range": "bytes=-10"}),
    Probe("/app.js", 206, NONE, {"range": "bytes=0-9", "if-range": "{etag}"}),
    Probe("/app.js", 206, CODED_PART, {"range": "bytes=5-", "accept-encoding": "br"}),
    *[Probe(target, 206, PARTS, {"range": THREE}) for target in ("/app.js", "/large.bin")],
    *[Probe(target, 304, NONE, {"if-none-match": "{etag}"}) for target in ("/app.js", "/large.bin")],
    *[Probe("/app.js", 304, NONE, {"if-none-match": "{etag}", "accept-encoding": one}) for one in CODINGS],
    Probe("/app.js", 304, NONE, {"if-modified-since": "{date}"}),
    Probe("/app.js", 304, NONE, {"if-none-match": "{etag}"}, "HEAD"),
    Probe("/", 304, NONE, {"if-none-match": "{etag}"}),
    Probe("/section", 308),
    Probe("/section?x=1", 308, NONE, {}, "HEAD"),
    Probe("/missing", 404),
    Probe("/missing", 404, NONE, {"accept-encoding": "br"}),
    Probe("/missing", 404, NONE, {}, "HEAD"),
    *[Probe("/app.js", 405, NONE, {}, method) for method in ("POST", "PUT", "DELETE")],
    Probe("/app.js", 406, NONE, {"accept-encoding": "identity;q=0"}),
    Probe("/app.js", 412, NONE, {"if-match": '"x"'}),
    Probe("/app.js", 412, NONE, {"if-unmodified-since": "Sun, 06 Nov 1994 08:49:37 GMT"}),
    Probe("/app.js", 416, NONE, {"range": "bytes=99999-"}),
)


def lint(probe: Probe, fields: list[tuple[str, str]], response: Response) -> dict[str, str]:
    """The warnings and worse, by name."""
    url = b"http://testserver" + probe.target.encode()
    asked = httplint.HttpRequestLinter()
    asked.process_request_topline(probe.method.encode(), url, b"1.1")
    asked.process_headers([(name.encode(), value.encode()) for name, value in fields])
    linter = httplint.HttpResponseLinter(start_time=time.time())
    linter.request = asked
    linter.base_uri = url.decode()
    linter.is_head_response = probe.method == "HEAD"
    linter.process_response_topline(b"1.1", b"%d" % response.status)
    linter.process_headers(response.headers)
    if response.body:
        linter.feed_content(response.body)
    linter.finish_content(response.complete, response.trailers)
    notes = [one for note in linter.notes for one in (note, *note.subnotes)]
    assert notes
    return {type(note).__name__: note.summary for note in notes if note.level.value in ("bad", "warning")}


async def ask(probe: Probe, app: StaticFiles) -> tuple[list[tuple[str, str]], Response]:
    fields = [("user-agent", "tests"), *probe.fields.items()]
    async with serving(app) as server, server.connect() as client:
        if any("{" in value for _, value in fields):
            # Without the conditions.
            chosen = [(name, value) for name, value in fields if name in CHOOSING]
            whole = await client.get(probe.target, chosen)
            words = {"etag": whole.header("etag") or "", "date": whole.header("last-modified") or ""}
            fields = [(name, value.format_map(words)) for name, value in fields]
        response = await client.get(probe.target, fields, method=probe.method)
    return fields, response


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
async def test_httplint_finds_nothing_that_is_not_explained(probe, site):
    app = StaticFiles(site, listing=True, download=("*.pdf",), headers={"x-robots-tag": "noindex"})
    fields, response = await ask(probe, app)
    assert response.status == probe.status
    assert lint(probe, fields, response).keys() == probe.findings


@pytest.mark.parametrize("options", [{"not_found": "gone.html"}, {"spa": "index.html"}], ids=str)
@pytest.mark.parametrize("coding", ["identity", *CODINGS])
async def test_httplint_finds_nothing_in_pages_for_what_is_not_here(options, coding, site):
    fields = {"accept": "text/html", "accept-encoding": coding}
    probe = Probe("/nowhere", 404 if "not_found" in options else 200, NONE, fields)
    sent, response = await ask(probe, StaticFiles(site, **options))
    assert response.status == probe.status
    assert lint(probe, sent, response) == {}


async def test_httplint_finds_nothing_in_a_file_that_was_written_just_now(site, tmp_path):
    """Its tag is weak still."""
    put(tmp_path / "new.txt", b"new words\n", int(time.time()))
    probe = Probe("/new.txt", 200, NONE)
    sent, response = await ask(probe, StaticFiles(tmp_path))
    assert (response.header("etag") or "").startswith("W/")
    assert lint(probe, sent, response) == {}


@pytest.mark.parametrize("asked", [{}, {"if-none-match": "{etag}"}], ids=str)
async def test_httplint_finds_nothing_in_what_needs_a_dictionary(asked, tmp_path):
    digest = hashlib.sha256(b"an earlier release").digest()
    put(tmp_path / "app.js", SCRIPT)
    sibling = tmp_path / f"app.js{dcz_suffix(digest).decode()}"
    put(sibling, dcz_head(digest) + as_zstd(SCRIPT))
    offered = {"accept-encoding": "dcz", "available-dictionary": f":{base64.b64encode(digest).decode()}:"}
    probe = Probe("/app.js", 304 if asked else 200, NONE, asked | offered)
    app = StaticFiles(tmp_path, use_as_dictionary=[("app*.js", "/app*.js", "app")])
    sent, response = await ask(probe, app)
    assert response.status == probe.status
    assert response.body == (b"" if asked else sibling.read_bytes())
    assert lint(probe, sent, response) == {}


def test_every_explanation_is_needed():
    assert frozenset().union(*(probe.findings for probe in PROBES)) == EXPLAINED.keys()


# -- REDbot --------------------------------------------------------------------------------------------------

# All that it finds, as JSON: by address and request, the level, name and text of each note.
REDBOT = """
import json, sys
from configparser import ConfigParser
import thor
from redbot.resource import HttpResource

parser = ConfigParser()
parser.read_dict({"redbot": {"enable_local_access": "True"}})
found, left = {}, set(sys.argv[1:])

def start(address):
    resource = HttpResource(parser["redbot"])
    resource.set_request(address)

    @thor.events.on(resource)
    def check_done():
        for one in (resource, *resource.subreqs.values()):
            if one.fetch_started:
                found[f"{address} {one.check_id}"] = [
                    (note.level.value, type(note).__name__, note.summary) for note in one.response.notes
                ]
        left.discard(address)
        if not left:
            thor.stop()

    resource.check()

for address in sys.argv[1:]:
    start(address)
thor.run()
print(json.dumps(found))
"""

# What it must have found out by asking.
SUPPORTED = {"IMS_304", "INM_304", "RANGE_CORRECT"}


@pytest.mark.slow
async def test_redbot_finds_nothing_that_is_not_explained(site):
    pytest.importorskip("redbot")
    targets = ("/", "/app.js", "/plain.txt", "/large.bin")
    async with serving(StaticFiles(site)) as server:
        addresses = [f"http://127.0.0.1:{server.port}{target}" for target in targets]
        process = await run_to_end(sys.executable, "-c", REDBOT, *addresses)
    assert process.returncode == 0, process.stderr.text
    found = json.loads(process.stdout.text)
    for address, target in zip(addresses, targets, strict=True):
        names = {name for _, name, _ in found[f"{address} default"]}
        assert names >= SUPPORTED, target
        # What is random does not shrink.
        assert ("CONNEG_GZIP_GOOD" in names) == (target != "/large.bin"), target
    notes = [tuple(note) for one in found.values() for note in one]
    assert len(notes) > 50
    assert {note[1] for note in notes if note[0] in ("bad", "warning")} == NONE
