"""What is answered: a table of requests, each as RFC 9110 has it, through the real server on both engines."""

from __future__ import annotations

import dataclasses
import email.utils
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from trioserve import StaticFiles
from trioserve.static.conditional import http_date
from trioserve.testing import Response, serving

from .asking import LARGE, OLD, ask, put

DATE = http_date(OLD).decode()
NOSNIFF = {"x-content-type-options": "nosniff"}


def tag(size: int, coding: str = "") -> str:
    return f'"{size:x}-{OLD * 10**9:x}{coding}"'


def fields_of(response: Response) -> dict[str, str]:
    """All but the server's own; none of them twice."""
    names = [name for name, _ in response.headers]
    assert len(set(names)) == len(names), response.headers
    fields = {name.decode(): value.decode("latin-1") for name, value in response.headers}
    assert fields.pop("server", "trioserve") == "trioserve"
    if fields.pop("connection", "close") != "close":
        raise AssertionError(fields)
    fields.pop("date", None)
    return fields


def file_fields(size: int, kind: str, cache: str = "max-age=60", **more: str) -> dict[str, str]:
    fields = NOSNIFF | {
        "content-type": kind,
        "content-length": str(size),
        "cache-control": cache,
        "accept-ranges": "bytes",
        "etag": tag(size),
        "last-modified": DATE,
    }
    if kind.startswith("text"):
        fields["vary"] = "accept-encoding"
    return fields | {name.replace("_", "-"): value for name, value in more.items()}


def error_fields(status: str, **more: str) -> dict[str, str]:
    fields = {"content-type": "text/plain; charset=utf-8", "content-length": str(len(status) + 1)}
    return NOSNIFF | fields | {name.replace("_", "-"): value for name, value in more.items()}


TEXT, HTML, BINARY = "text/plain; charset=utf-8", "text/html; charset=utf-8", "application/octet-stream"
PLAIN = file_fields(10, TEXT)
HOME = file_fields(14, HTML, "no-cache")
NOT_MODIFIED = {"etag": tag(10), "cache-control": "max-age=60", "vary": "accept-encoding"}
FAILED = error_fields("412 Precondition Failed", vary="accept-encoding")
LATER, EARLIER = http_date(OLD + 1).decode(), http_date(OLD - 1).decode()


def ranged(span: str, length: int) -> dict[str, str]:
    return PLAIN | {"content-length": str(length), "content-range": f"bytes {span}/10"}


UNSATISFIED = error_fields("416 Range Not Satisfiable", content_range="bytes */10", vary="accept-encoding")


@dataclasses.dataclass
class Case:
    request: str
    fields: dict[str, str]
    status: int
    expected: dict[str, str]
    body: bytes | None = None


def case(
    request: str, fields: dict[str, str], status: int, expected: dict[str, str], body: bytes = b""
) -> Case:
    return Case(request, fields, status, expected, body)


D = b"0123456789"

CASES = [
    # A file.
    case("GET /plain.txt", {}, 200, PLAIN, D),
    case("HEAD /plain.txt", {}, 200, PLAIN),
    case("GET /plain.txt?v=2", {}, 200, PLAIN, D),
    case("GET /pl%61in.txt", {}, 200, PLAIN, D),
    case("GET /docs/a%20b.txt", {}, 200, file_fields(5, TEXT), b"blank"),
    case("GET /empty.txt", {}, 200, file_fields(0, TEXT)),
    case("GET /image.png", {}, 200, file_fields(4, "image/png"), b"\x89PNG"),
    case("GET /large.bin", {}, 200, file_fields(len(LARGE), BINARY), LARGE),
    case("HEAD /large.bin", {}, 200, file_fields(len(LARGE), BINARY)),
    case("GET /.well-known/security.txt", {}, 200, file_fields(11, TEXT), b"Contact: me"),
    # Directories.
    case("GET /", {}, 200, HOME, b"<h1>home</h1>\n"),
    case("HEAD /", {}, 200, HOME),
    case("GET /docs", {}, 308, {"location": "./docs/", "content-length": "0"}),
    case("HEAD /docs?a=b&c", {}, 308, {"location": "./docs/?a=b&c", "content-length": "0"}),
    case("GET /docs/", {}, 200, file_fields(14, HTML, "no-cache"), b"<h1>docs</h1>\n"),
    case("GET /bare/", {}, 404, error_fields("404 Not Found"), b"404 Not Found\n"),
    case("GET /bare", {}, 404, error_fields("404 Not Found"), b"404 Not Found\n"),
    case("GET /plain.txt/", {}, 404, error_fields("404 Not Found"), b"404 Not Found\n"),
    # Methods.
    case("OPTIONS /plain.txt", {}, 204, {"allow": "GET, HEAD, OPTIONS"}),
    case("OPTIONS /nothing", {}, 404, error_fields("404 Not Found"), b"404 Not Found\n"),
    case(
        "POST /plain.txt",
        {},
        405,
        error_fields("405 Method Not Allowed", allow="GET, HEAD, OPTIONS"),
        b"405 Method Not Allowed\n",
    ),
    case("DELETE /nothing", {}, 404, error_fields("404 Not Found"), b"404 Not Found\n"),
    case("HEAD /nothing", {}, 404, error_fields("404 Not Found")),
    # Preconditions, in the order of section 13.2.2.
    case("GET /plain.txt", {"if-none-match": tag(10)}, 304, NOT_MODIFIED),
    case("HEAD /plain.txt", {"if-none-match": tag(10)}, 304, NOT_MODIFIED),
    case("GET /plain.txt", {"if-none-match": f'"x", W/{tag(10)}'}, 304, NOT_MODIFIED),
    case("GET /plain.txt", {"if-none-match": "*"}, 304, NOT_MODIFIED),
    case("GET /plain.txt", {"if-none-match": '"x"'}, 200, PLAIN, D),
    case("GET /plain.txt", {"if-none-match": '"x"', "if-modified-since": DATE}, 200, PLAIN, D),
    case("GET /plain.txt", {"if-modified-since": DATE}, 304, NOT_MODIFIED),
    case("GET /plain.txt", {"if-modified-since": LATER}, 304, NOT_MODIFIED),
    case("GET /plain.txt", {"if-modified-since": EARLIER}, 200, PLAIN, D),
    case("GET /plain.txt", {"if-modified-since": "yesterday"}, 200, PLAIN, D),
    case("GET /plain.txt", {"if-match": tag(10)}, 200, PLAIN, D),
    case("GET /plain.txt", {"if-match": "*"}, 200, PLAIN, D),
    case("GET /plain.txt", {"if-match": '"x"'}, 412, FAILED, b"412 Precondition Failed\n"),
    case("HEAD /plain.txt", {"if-match": '"x"'}, 412, FAILED),
    case("GET /plain.txt", {"if-match": f"W/{tag(10)}"}, 412, FAILED, b"412 Precondition Failed\n"),
    case("GET /plain.txt", {"if-match": '"x"', "if-none-match": "*"}, 412, FAILED, b"412 Precondition Failed\n"),
    case("GET /plain.txt", {"if-unmodified-since": EARLIER}, 412, FAILED, b"412 Precondition Failed\n"),
    case("GET /plain.txt", {"if-unmodified-since": DATE}, 200, PLAIN, D),
    case("GET /plain.txt", {"if-match": tag(10), "if-unmodified-since": EARLIER}, 200, PLAIN, D),
    case("POST /plain.txt", {"if-none-match": tag(10)}, 405, error_fields(
        "405 Method Not Allowed", allow="GET, HEAD, OPTIONS"), b"405 Method Not Allowed\n"),
    # Ranges.
    case("GET /plain.txt", {"range": "bytes=0-3"}, 206, ranged("0-3", 4), b"0123"),
    case("GET /plain.txt", {"range": "bytes=7-"}, 206, ranged("7-9", 3), b"789"),
    case("GET /plain.txt", {"range": "bytes=-3"}, 206, ranged("7-9", 3), b"789"),
    case("GET /plain.txt", {"range": "bytes=-99"}, 206, ranged("0-9", 10), D),
    case("GET /plain.txt", {"range": "bytes=0-999"}, 206, ranged("0-9", 10), D),
    case("GET /plain.txt", {"range": "bytes=-0"}, 416, UNSATISFIED, b"416 Range Not Satisfiable\n"),
    case("GET /plain.txt", {"range": "bytes=10-"}, 416, UNSATISFIED, b"416 Range Not Satisfiable\n"),
    case("GET /plain.txt", {"range": "bytes=10-,0-1"}, 206, ranged("0-1", 2), b"01"),
    case("GET /plain.txt", {"range": "bytes=3-1"}, 200, PLAIN, D),
    case("GET /plain.txt", {"range": "bytes=a-b"}, 200, PLAIN, D),
    case("GET /plain.txt", {"range": "lines=1-2"}, 200, PLAIN, D),
    case("GET /plain.txt", {"range": f"bytes={'0-0,' * 16}1-1"}, 200, PLAIN, D),
    case("GET /plain.txt", {"range": "bytes=0-9,0-9"}, 200, PLAIN, D),
    case("GET /plain.txt", {"range": f"bytes={'9' * 5000}-"}, 416, UNSATISFIED, b"416 Range Not Satisfiable\n"),
    case("GET /empty.txt", {"range": "bytes=0-"}, 200, file_fields(0, TEXT)),
    # Section 14.2: for GET alone.
    case("HEAD /plain.txt", {"range": "bytes=0-3"}, 200, PLAIN),
    case("GET /plain.txt", {"range": "bytes=0-3", "if-none-match": tag(10)}, 304, NOT_MODIFIED),
    case("GET /plain.txt", {"range": "bytes=0-3", "if-match": '"x"'}, 412, FAILED, b"412 Precondition Failed\n"),
    case("GET /plain.txt", {"range": "bytes=0-3", "if-range": tag(10)}, 206, ranged("0-3", 4), b"0123"),
    case("GET /plain.txt", {"range": "bytes=0-3", "if-range": DATE}, 206, ranged("0-3", 4), b"0123"),
    case("GET /plain.txt", {"range": "bytes=0-3", "if-range": '"x"'}, 200, PLAIN, D),
    case("GET /plain.txt", {"range": "bytes=0-3", "if-range": f"W/{tag(10)}"}, 200, PLAIN, D),
    case("GET /plain.txt", {"range": "bytes=0-3", "if-range": LATER}, 200, PLAIN, D),
    case("GET /plain.txt", {"if-range": '"x"'}, 200, PLAIN, D),
    case(
        "GET /large.bin",
        {"range": "bytes=100000-299998"},
        206,
        file_fields(len(LARGE), BINARY)
        | {"content-length": "199999", "content-range": "bytes 100000-299998/300000"},
        LARGE[100000:299999],
    ),
    # Codings.
    case("GET /plain.txt", {"accept-encoding": "br, gzip"}, 200, PLAIN, D),
    case("GET /plain.txt", {"accept-encoding": "identity;q=0"}, 406, error_fields(
        "406 Not Acceptable", vary="accept-encoding"), b"406 Not Acceptable\n"),
]  # fmt: skip


@pytest.mark.modes("tls", "http2")
async def test_requests_are_answered_as_rfc_9110_has_it(site: Path, engine: str) -> None:
    app = StaticFiles(site)
    async with serving(app, http_engine=engine) as server, server.connect() as client:
        # Twice: the second time out of the cache, by the short way.
        for number in range(2):
            for row in CASES:
                method, _, target = row.request.partition(" ")
                response = await client.request(method, target, list(row.fields.items()))
                found = (response.status, fields_of(response), response.body)
                assert found == (row.status, row.expected, row.body), (row, number)
                assert response.complete
                assert response.header("date")


async def test_the_cache_answers_by_the_short_way(site: Path) -> None:
    app = StaticFiles(site)
    assert app.quick_answer("GET", b"/plain.txt", {}) is None
    await ask(app, "/plain.txt")
    first = app.quick_answer("GET", b"/plain.txt", {})
    assert first is not None
    assert first.body == b"0123456789"
    second = app.quick_answer("GET", b"/plain.txt", {b"accept-encoding": b"br"})
    assert second is not None
    assert second.fields is first.fields
    assert app.quick_answer("POST", b"/plain.txt", {}) is None
    assert app.quick_answer("GET", b"/plain.txt", {}, "/other") is None
    assert app.quick_answer("GET", b"/pl%61in.txt", {}) is None
    found = app.quick_answer("GET", b"/plain.txt", {b"if-none-match": b"*"})
    assert found is not None
    assert found.status == 304
    app.close()
    assert app.quick_answer("GET", b"/plain.txt", {}) is None


async def test_what_middleware_adds_to_one_response_is_not_in_the_next(site: Path) -> None:
    app = StaticFiles(site)
    for _ in range(3):
        response = await ask(app, "/plain.txt")
        assert (b"x-added", b"1") not in response.headers
        response.headers.append((b"x-added", b"1"))
    app.close()


# -- several ranges ------------------------------------------------------------------------------------------


def parts_of(response: Response) -> list[tuple[dict[str, str], bytes]]:
    kind = response.header("content-type") or ""
    boundary = re.fullmatch(r"multipart/byteranges; boundary=([0-9a-f]{32})", kind)
    assert boundary, kind
    delimiter = b"--" + boundary[1].encode()
    before, *parts, end = response.body.split(delimiter)
    assert (before, end) == (b"", b"--\r\n")
    found = []
    for part in parts:
        head, _, body = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        fields = dict(line.lower().split(": ", 1) for line in head.decode().split("\r\n"))
        found.append((fields, body.removesuffix(b"\r\n")))
    return found


@pytest.mark.modes("tls", "http2")
@pytest.mark.parametrize("path", ["/large.bin", "/small.bin"])
async def test_several_ranges_are_parts_of_one_body(site: Path, engine: str, path: str) -> None:
    content = LARGE if path == "/large.bin" else LARGE[:5000]
    put(site / "small.bin", LARGE[:5000])
    size = len(content)
    async with serving(StaticFiles(site), http_engine=engine) as server:
        response = await server.get(path, [("range", "bytes=4000-4099,0-0,-100")])
    assert response.status == 206
    assert response.header("content-range") is None
    assert response.header("etag") == tag(size)
    assert int(response.header("content-length") or 0) == len(response.body)
    spans = [(4000, 4100), (0, 1), (size - 100, size)]
    assert parts_of(response) == [
        (
            {"content-type": BINARY, "content-range": f"bytes {start}-{stop - 1}/{size}"},
            content[start:stop],
        )
        for start, stop in spans
    ]


async def test_more_ranges_than_allowed_get_the_whole_file(site: Path) -> None:
    app = StaticFiles(site, max_ranges=2)
    assert (await ask(app, "/large.bin", headers=[("range", "bytes=0-0,200-200")])).status == 206
    assert (await ask(app, "/large.bin", headers=[("range", "bytes=0-0,200-200,400-400")])).status == 200
    app.close()


# -- validators over time ------------------------------------------------------------------------------------


async def test_a_fresh_file_has_a_weak_tag_that_becomes_strong(site: Path) -> None:
    now = time.time()
    put(site / "fresh.txt", b"new", int(now))
    app = StaticFiles(site, revalidate=0)
    first = await ask(app, "/fresh.txt")
    etag = first.header("etag")
    assert etag is not None
    assert etag.startswith("W/")
    os.utime(site / "fresh.txt", (now - 10, now - 10))
    second = (await ask(app, "/fresh.txt")).header("etag")
    assert second is not None
    assert not second.startswith("W/")
    app.close()


async def test_the_tag_becomes_strong_without_a_change_of_the_file(site: Path, monkeypatch: Any) -> None:
    put(site / "fresh.txt", b"new", int(time.time()))
    for frozen in (False, True):
        app = StaticFiles(site, revalidate=0, frozen=frozen)
        assert ((await ask(app, "/fresh.txt")).header("etag") or "").startswith("W/")
        later = dataclasses.replace(app._cache._looker, wall=lambda: time.time() + 3)
        app._cache._looker = later
        assert ((await ask(app, "/fresh.txt")).header("etag") or "").startswith('"')
        app.close()


@pytest.mark.parametrize("modified", [0, 1])
async def test_a_file_without_a_time_has_no_validators(site: Path, modified: int) -> None:
    put(site / "store.txt", b"nix", modified)
    app = StaticFiles(site)
    response = await ask(app, "/store.txt")
    assert response.header("etag") is None
    assert response.header("last-modified") is None
    app.close()


async def test_last_modified_is_never_in_the_future(site: Path) -> None:
    put(site / "future.txt", b"soon", int(time.time()) + 9999)
    app = StaticFiles(site)
    response = await ask(app, "/future.txt")
    modified = email.utils.parsedate_to_datetime(response.header("last-modified") or "")
    assert modified.timestamp() <= time.time()
    app.close()


# -- while it is sent -----------------------------------------------------------------------------------------


@pytest.mark.modes("tls", "http2")
async def test_a_file_that_is_cut_short_while_it_is_sent_ends_the_connection(site: Path, engine: str) -> None:
    put(site / "huge.bin", LARGE * 40)
    async with serving(StaticFiles(site), http_engine=engine, on_app_error="contain") as server:
        async with server.connect(receive_buffer=4096) as client:
            await client.send(
                b"GET /huge.bin HTTP/1.1\r\nhost: x\r\n\r\nGET /plain.txt HTTP/1.1\r\nhost: x\r\n\r\n"
            )
            await client.receive_until(b"\r\n\r\n")
            os.truncate(site / "huge.bin", 1000)
            rest = await client.receive_all()
        assert len(rest) < len(LARGE) * 40
        assert b"HTTP/1.1" not in rest
        assert b"0123456789" not in rest
        assert server.failure is None
