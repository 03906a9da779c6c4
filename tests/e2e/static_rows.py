"""The table of requests that nginx and `StaticFiles` answer side by side.

`test_static_beside_nginx.py` asks them over the tree that it plants. In `Row.fields`, `{etag}` is the tag that the same
server gives to the file, `{same}`, `{earlier}` and `{later}` are the file's date and a minute before and after it, and
`{same850}` and `{sameasc}` are the same date in the two old forms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .static_differences import (
    ALLOW,
    ANY_CODING,
    BAD_DATE,
    BAD_PATH,
    BARE,
    BARE_NO_SLASH,
    BOTH,
    CACHE_CONTROL,
    CHARSET,
    CODED_BEYOND,
    CODED_RANGE,
    CODED_RANGES,
    DENIED,
    DOTFILE,
    DOTS,
    DOUBLE_SLASH,
    ENCODED_SLASH,
    ERROR,
    ERROR_VARY,
    ESCAPE,
    FUTURE,
    GUARDS,
    HEAD_BEYOND,
    HEAD_RANGE,
    HUGE_RANGE,
    LATER,
    MALFORMED_RANGE,
    MANY_RANGES,
    MULTIPART,
    NEAR_RANGES,
    NO_TIME,
    NOSNIFF,
    NOT_ACCEPTABLE,
    NOT_MODIFIED,
    OPTIONS,
    OPTIONS_STAR,
    OTHER_MISSING,
    POST_SLASH,
    PREFERS_PLAIN,
    RANGES_ON_206,
    SLASH,
    SLASH_QUERY,
    STALE,
    VARY,
    Difference,
)


@dataclass(frozen=True)
class Row:
    """One request, and what differs in the answers to it."""

    target: str
    differs: tuple[Difference, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    method: str = "GET"

    @property
    def name(self) -> str:
        more = [f"{name}: {value}" for name, value in self.fields.items()]
        return ", ".join([f"{self.method} {self.target}", *more])


TEXT = (CACHE_CONTROL, NOSNIFF, CHARSET, VARY)
BINARY = (CACHE_CONTROL, NOSNIFF)
PART = (*TEXT, RANGES_ON_206)
BINARY_PART = (*BINARY, RANGES_ON_206)
PARTS = (*BINARY_PART, MULTIPART)
MISSING = (ERROR,)
FAILED = (ERROR, ERROR_VARY)
CODED = (CACHE_CONTROL, NOSNIFF, CHARSET, CODED_RANGES)
PLAIN = (CACHE_CONTROL, NOSNIFF, CHARSET)

_MANY = "bytes=" + ",".join(f"{place * 200}-{place * 200}" for place in range(17))


def _given(name: str, differs: tuple[Difference, ...], *values: str) -> list[Row]:
    return [Row("/plain.txt", differs, {name: value}) for value in values]


def _ranges(target: str, differs: tuple[Difference, ...], *values: str) -> list[Row]:
    return [Row(target, differs, {"range": value}) for value in values]


def _accepting(target: str, differs: tuple[Difference, ...], *values: str) -> list[Row]:
    return [Row(target, differs, {"accept-encoding": value}) for value in values]


def _using(method: str, differs: tuple[Difference, ...], *targets: str) -> list[Row]:
    return [Row(target, differs, method=method) for target in targets]


# Status 304, and its fields.
_SAME = (NOT_MODIFIED, VARY)

ROWS: tuple[Row, ...] = (
    # Files and directories.
    *_using(
        "GET", TEXT, "/plain.txt", "/plain.txt?v=1", "/%70lain.txt", "/empty.txt", "/link.txt", "/docs/", "/"
    ),
    *_using(
        "GET", TEXT, "/a%20b.txt", "/caf%C3%A9.txt", "/100%25.txt", "/que%3F.txt", "/.well-known/security.txt"
    ),
    *_using("GET", BINARY, "/data.bin", "/unknown.xyz"),
    *_using("GET", PLAIN, "/app.js"),
    *_using("GET", MISSING, "/missing", "/plain.txt/", "/plain.txt/x", "/PLAIN.txt", "/fifo", "/caf%E9.txt"),
    *_using("GET", MISSING, "/%5cplain.txt", "/docs\\index.html", "/" + "a" * 300),
    *_using("HEAD", TEXT, "/plain.txt", "/empty.txt", "/docs/", "/"),
    *_using("HEAD", MISSING, "/missing"),
    *_using("GET", (SLASH,), "/docs"),
    *_using("HEAD", (SLASH,), "/docs"),
    *_using("GET", (SLASH_QUERY,), "/docs?x=1"),
    *_using("GET", (BARE,), "/bare/"),
    *_using("GET", (BARE_NO_SLASH,), "/bare"),
    *_using("GET", (DENIED,), "/denied.txt"),
    *_using("GET", (DOTFILE,), "/.env"),
    *_using("GET", (ENCODED_SLASH,), "/docs%2Findex.html"),
    *_using("GET", (DOUBLE_SLASH,), "//plain.txt", "/docs//index.html"),
    *_using("GET", (DOTS,), "/docs/../plain.txt", "/docs/%2e%2e/plain.txt", "/./plain.txt"),
    *_using("GET", (BAD_PATH,), "/../plain.txt", "/%2e%2e/plain.txt", "/plain.txt%00", "/100%.txt"),
    *_using("GET", (ESCAPE,), "/escape.txt"),
    # Ranges.
    *_ranges(
        "/plain.txt", PART, "bytes=0-3", "bytes=-3", "bytes=-50", "bytes=4-", "bytes=0-999", "BYTES=0-3"
    ),
    *_ranges("/plain.txt", PART, "bytes=0-1,500-"),
    *_ranges("/plain.txt", FAILED, "bytes=10-", "bytes=50-60", "bytes=-0", "bytes=50-,60-"),
    *_ranges("/plain.txt", TEXT, "chars=0-3", "bytes 0-3", "bytes=", "bytes=0-,0-,0-"),
    *_ranges("/plain.txt", (MALFORMED_RANGE,), "bytes=3-1", "bytes=a-b", "bytes=0-1,x"),
    *_ranges("/plain.txt", (HUGE_RANGE,), "bytes=0-99999999999999999999"),
    *_ranges("/data.bin", PARTS, "bytes=0-99,5000-5099", "bytes=5000-5099,0-99", "bytes=0-0,-1,5000-5000"),
    *_ranges("/data.bin", (*BINARY_PART, NEAR_RANGES), "bytes=0-99,150-199", "bytes=0-149,50-199"),
    *_ranges("/data.bin", (MANY_RANGES,), _MANY),
    *_ranges("/data.bin", BINARY, "bytes=0-,1-,2-"),
    *_ranges("/empty.txt", TEXT, "bytes=0-3", "bytes=-1"),
    *_ranges("/missing", MISSING, "bytes=0-3"),
    Row("/plain.txt", (HEAD_RANGE,), {"range": "bytes=0-3"}, "HEAD"),
    Row("/plain.txt", (HEAD_BEYOND,), {"range": "bytes=50-"}, "HEAD"),
    # Conditions.
    *_given("if-none-match", _SAME, "{etag}", "W/{etag}", '"x", {etag}', "*"),
    *_given("if-none-match", TEXT, '"x"', "x"),
    *_given("if-modified-since", _SAME, "{same}", "{same850}", "{sameasc}"),
    *_given("if-modified-since", TEXT, "{earlier}", "yesterday"),
    *_given("if-modified-since", (LATER,), "{later}"),
    *_given("if-match", TEXT, "{etag}", '"x", {etag}', "*"),
    *_given("if-match", FAILED, '"x"', "W/{etag}"),
    *_given("if-unmodified-since", TEXT, "{same}", "{later}"),
    *_given("if-unmodified-since", FAILED, "{earlier}"),
    *_given("if-unmodified-since", (BAD_DATE,), "yesterday"),
    Row("/plain.txt", _SAME, {"if-none-match": "{etag}", "if-modified-since": "{same}"}),
    Row("/plain.txt", (BOTH,), {"if-none-match": "{etag}", "if-modified-since": "{earlier}"}),
    Row("/plain.txt", TEXT, {"if-none-match": '"x"', "if-modified-since": "{same}"}),
    Row("/plain.txt", (GUARDS,), {"if-match": "{etag}", "if-unmodified-since": "{earlier}"}),
    Row("/plain.txt", FAILED, {"if-match": '"x"', "if-none-match": "{etag}"}),
    Row("/plain.txt", _SAME, {"if-none-match": "{etag}"}, "HEAD"),
    Row("/plain.txt", _SAME, {"if-modified-since": "{same}"}, "HEAD"),
    Row("/plain.txt", FAILED, {"if-match": '"x"'}, "HEAD"),
    Row("/missing", MISSING, {"if-none-match": "*"}),
    Row("/missing", MISSING, {"if-match": "*"}),
    Row("/old.txt", (*TEXT, NO_TIME)),
    Row("/future.txt", (*TEXT, FUTURE)),
    # Conditions and ranges.
    *[Row("/plain.txt", PART, {"range": "bytes=0-3", "if-range": value}) for value in ("{etag}", "{same}")],
    *[
        Row("/plain.txt", TEXT, {"range": "bytes=0-3", "if-range": value})
        for value in ('"x"', "W/{etag}", "{etag}, {etag}", "{earlier}", "{later}", "yesterday")
    ],
    Row("/plain.txt", TEXT, {"if-range": "{etag}"}),
    Row("/plain.txt", _SAME, {"if-none-match": "{etag}", "range": "bytes=0-3"}),
    Row("/plain.txt", FAILED, {"if-match": '"x"', "range": "bytes=0-3"}),
    # Methods.
    *[
        Row("/plain.txt", (ERROR, ALLOW), method=method)
        for method in ("POST", "PUT", "DELETE", "PATCH", "TRACE")
    ],
    *_using("POST", (ERROR, ALLOW), "/"),
    *_using("POST", MISSING, "/missing"),
    *_using("POST", (POST_SLASH,), "/docs"),
    *_using("OPTIONS", (OPTIONS,), "/plain.txt"),
    *_using("OPTIONS", (OTHER_MISSING,), "/missing"),
    *_using("OPTIONS", (OPTIONS_STAR,), "*"),
    *_using("PUT", (OTHER_MISSING,), "/missing"),
    # Compressed siblings.
    *_accepting("/app.js", CODED, "gzip", "GZIP", "deflate, gzip", "gzip;q=0.5", "identity;q=0, gzip"),
    *_accepting("/app.js", PLAIN, "", "br", "gzip;q=0", "deflate"),
    *_accepting("/app.js", (*PLAIN, PREFERS_PLAIN), "gzip;q=0.5, identity;q=1"),
    *_accepting("/app.js", (*PLAIN, ANY_CODING), "*", "x-gzip"),
    *_accepting("/app.js", (NOT_ACCEPTABLE,), "identity;q=0", "gzip;q=0, identity;q=0"),
    *_accepting("/stale.js", (*PLAIN, STALE), "gzip"),
    *_accepting("/stale.js", PLAIN, "identity"),
    *_accepting("/app.js.gz", BINARY, "gzip"),
    *_accepting("/plain.txt", TEXT, "gzip"),
    Row("/app.js", CODED, {"accept-encoding": "gzip"}, "HEAD"),
    Row("/app.js", (CODED_RANGE,), {"accept-encoding": "gzip", "range": "bytes=0-9"}),
    Row("/app.js", (CODED_BEYOND,), {"accept-encoding": "gzip", "range": "bytes=9999-"}),
    Row("/app.js", (NOT_MODIFIED,), {"accept-encoding": "gzip", "if-none-match": "{etag}"}),
    Row("/app.js", (NOT_MODIFIED,), {"accept-encoding": "gzip", "if-modified-since": "{same}"}),
    Row("/app.js", (ERROR,), {"accept-encoding": "gzip", "if-match": '"x"'}),
)
