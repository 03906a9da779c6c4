"""How answers of `StaticFiles` differ from nginx's, each difference with its reason.

`static_rows.py` has the requests, and names the differences in the answers to each; `test_static_beside_nginx.py` asks
both servers, and fails over a difference that is not named and over one that is named and does not occur;
`tests/test_readme.py` keeps the README's table of them current.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Values = Mapping[str, tuple[str | None, str | None]]


@dataclass(frozen=True, eq=False)
class Difference:
    """What differs, for people and to the value.

    Attributes:
        request: which requests, in words. nginx, ours: what each answers, in words. why: the reason for ours.
        values: by field, nginx's value and ours.
    """

    request: str
    nginx: str
    ours: str
    why: str
    values: Values


def status(nginx: int, ours: int, **others: tuple[str | None, str | None]) -> Values:
    more = {name.replace("_", "-"): values for name, values in others.items()}
    return {"status": (str(nginx), str(ours)), **more}


# -- on every answer of a kind -------------------------------------------------------------------------------

CACHE_CONTROL = Difference(
    "any file",
    "no Cache-Control",
    "`max-age=60`; HTML `no-cache`; names with a hash a year and `immutable`",
    "without it each browser and cache guesses by the file's age",
    {"cache-control": (None, "yes")},
)
NOSNIFF = Difference(
    "any file",
    "no X-Content-Type-Options",
    "`nosniff`",
    "an upload must not become a script by what its bytes look like",
    {"x-content-type-options": (None, "nosniff")},
)
CHARSET = Difference(
    "a file of text",
    "`text/plain`",
    "`text/plain; charset=utf-8`",
    "browsers would guess, and guess by the reader's language; nginx's `charset utf-8` does the same",
    {"charset": (None, "utf-8")},
)
VARY = Difference(
    "a file of a type that compresses, without a compressed sibling",
    "no Vary",
    "`Vary: accept-encoding`, also with 206 and 304",
    "a cache that keeps the plain form must ask again once there is a sibling",
    {"vary": (None, "accept-encoding")},
)
ERROR = Difference(
    "any error",
    "a page of HTML that names nginx and its version",
    "one line of plain text, and `nosniff`",
    "it says the status and nothing else, and nothing in it can be markup",
    {
        "content-type": ("text/html", "text/plain"),
        "charset": (None, "utf-8"),
        "x-content-type-options": (None, "nosniff"),
        "body": ("a page", "a line"),
    },
)
ERROR_VARY = Difference(
    "412 and 416",
    "no Vary",
    "Vary as with the file",
    "another Accept-Encoding selects another form, which may have no error",
    {"vary": (None, "accept-encoding")},
)
NOT_MODIFIED = Difference(
    "any 304",
    "with Last-Modified, without Cache-Control",
    "with Cache-Control, without Last-Modified",
    "RFC 9110 §15.4.5: what guides a cache must be repeated, what it already has should not be",
    {"last-modified": ("the file's", None), "cache-control": (None, "yes")},
)
RANGES_ON_206 = Difference(
    "any 206",
    "no Accept-Ranges",
    "`Accept-Ranges: bytes`",
    "it is a field of the resource, and says the same in each answer",
    {"accept-ranges": (None, "bytes")},
)

# -- paths ---------------------------------------------------------------------------------------------------

SLASH = Difference(
    "a directory without its slash",
    "301 to `http://…/docs/`, built from Host; a page",
    "308 to `./docs/`; no body",
    "308 keeps the method, a relative place is right behind any proxy, and Host cannot lead elsewhere",
    status(301, 308, location=("http://testserver/docs/", "./docs/")),
)
SLASH_QUERY = Difference(
    "the same with a query",
    "301 to `http://…/docs/?x=1`",
    "308 to `./docs/?x=1`",
    "as above",
    status(301, 308, location=("http://testserver/docs/?x=1", "./docs/?x=1")),
)
BARE = Difference(
    "a directory that has no index page, with its slash",
    "403",
    "404; a page with `listing=True`",
    "nobody learns which directories there are",
    status(403, 404),
)
BARE_NO_SLASH = Difference(
    "the same without its slash",
    "301",
    "404",
    "as above",
    status(301, 404, location=("http://testserver/bare/", None)),
)
DENIED = Difference(
    "a file that the server's user may not read",
    "403",
    "404; 403 with `forbidden=403`",
    "nobody learns that it is there",
    status(403, 404),
)
DOTFILE = Difference(
    "`/.env`",
    "200",
    "404; 200 with `dotfiles=True`; `/.well-known/` is served",
    "`.env` and `.git` lie in many directories, and nobody means to publish them",
    status(200, 404),
)
ENCODED_SLASH = Difference(
    "`/docs%2Findex.html`",
    "200",
    "404",
    "to a proxy and its rules this is one name, and not below `/docs/`",
    status(200, 404),
)
DOUBLE_SLASH = Difference(
    "`//plain.txt`, `/docs//index.html`",
    "200 (`merge_slashes`)",
    "404",
    "one file, one path: rules by prefix miss `//admin`",
    status(200, 404),
)
DOTS = Difference(
    "`/docs/../plain.txt`, encoded or not",
    "200, resolved",
    "404",
    "clients resolve dots before they send them; what is left is an attempt",
    status(200, 404),
)
BAD_PATH = Difference(
    "`/../x`, `%00`, `%` without two digits",
    "400",
    "404",
    "one answer for all that is not here",
    status(400, 404),
)
ESCAPE = Difference(
    "a link that leads out of the directory",
    "200",
    '404; 200 with `symlinks="follow"`',
    "whoever can write a link into the directory must not publish the machine; links that stay inside work",
    status(200, 404),
)

# -- ranges --------------------------------------------------------------------------------------------------

MALFORMED_RANGE = Difference(
    "`Range: bytes=3-1`, `bytes=a-b`, `bytes=0-1,x`",
    "416",
    "200, the whole file",
    "RFC 9110 §14.2 allows both; 416 would say that the range lies beyond the end",
    status(416, 200, content_range=("bytes */all", None)),
)
HUGE_RANGE = Difference(
    "`Range: bytes=0-99999999999999999999` (beyond 64 bits)",
    "416",
    "206, up to the end",
    "RFC 9110 §14.1.2: a last position beyond the end means the end, however many digits it has",
    status(416, 206, content_range=("bytes */all", "bytes 0-9/all")),
)
MULTIPART = Difference(
    "several ranges",
    "a CRLF before the first delimiter",
    "none, as in the examples of RFC 9110",
    "both are allowed; the boundary is 128 random bits, where nginx counts from 1",
    {"preamble": ("CRLF", "none")},
)
NEAR_RANGES = Difference(
    "several ranges that overlap, or lie fewer than 80 bytes apart",
    "each by itself, in a multipart",
    "joined, here to a plain 206",
    "RFC 9110 §15.3.7.2; a part costs about 80 bytes, and overlaps send bytes twice",
    {
        "content-type": ("multipart/byteranges", "application/octet-stream"),
        "preamble": ("CRLF", None),
        "content-range": (None, "bytes 0-199/all"),
        "content-length": (None, "200"),
        "body": ("2 parts, application/octet-stream", "its part"),
    },
)
MANY_RANGES = Difference(
    "more than 16 ranges",
    "206 with as many parts; `max_ranges 16` does the same",
    "200, the whole file (`max_ranges=16`)",
    "nobody needs them; an answer of many tiny parts costs more than the file",
    status(206, 200),
)
HEAD_RANGE = Difference(
    "HEAD with Range",
    "206",
    "200",
    "RFC 9110 §14.2: Range is for GET; with any other method it is ignored",
    status(206, 200, content_range=("bytes 0-3/all", None)),
)
HEAD_BEYOND = Difference(
    "HEAD with a Range beyond the end",
    "416",
    "200",
    "as above",
    status(416, 200, content_range=("bytes */all", None)),
)

# -- conditions ----------------------------------------------------------------------------------------------

LATER = Difference(
    "If-Modified-Since after the file's date",
    "200 (`if_modified_since exact`)",
    "304",
    "RFC 9110 §13.1.3: it has not been modified since; `before` does the same in nginx",
    status(200, 304),
)
BOTH = Difference(
    "If-None-Match that matches, If-Modified-Since that does not",
    "200",
    "304",
    "RFC 9110 §13.1.3: where there is an If-None-Match, If-Modified-Since is ignored",
    status(200, 304),
)
BAD_DATE = Difference(
    "If-Unmodified-Since that is no date",
    "412",
    "200",
    "RFC 9110 §13.1.4: it is ignored",
    status(412, 200),
)
GUARDS = Difference(
    "If-Match that matches, If-Unmodified-Since that does not",
    "412",
    "200",
    "RFC 9110 §13.1.4: where there is an If-Match, If-Unmodified-Since is ignored",
    status(412, 200),
)
NO_TIME = Difference(
    "a file whose time is 0 or 1 (Nix, ostree)",
    "ETag and Last-Modified of 1970",
    "neither",
    "all files there have this time, whatever they contain: it would keep old copies valid for ever",
    {"etag": ("strong", None), "last-modified": ("the file's", None)},
)
FUTURE = Difference(
    "a file whose time lies in the future",
    "that time, strong ETag",
    "Last-Modified is the time of the answer, weak ETag",
    "RFC 9110 §8.8.2.1: never later than Date; what is not at rest has no strong tag",
    {"etag": ("strong", "weak"), "last-modified": ("the file's", "now")},
)

# -- methods -------------------------------------------------------------------------------------------------

ALLOW = Difference(
    "405",
    "no Allow",
    "`Allow: GET, HEAD, OPTIONS`",
    "RFC 9110 §15.5.6: it must be there",
    {"allow": (None, "GET, HEAD, OPTIONS")},
)
OPTIONS = Difference(
    "OPTIONS for a file",
    "405",
    "204 with Allow",
    "RFC 9110 §9.3.7",
    status(405, 204, allow=(None, "GET, HEAD, OPTIONS")),
)
OTHER_MISSING = Difference(
    "PUT, OPTIONS and the like where nothing is",
    "405",
    "404",
    "whether a method is allowed is told of what is there, as nginx does with POST",
    status(405, 404),
)
OPTIONS_STAR = Difference(
    "`OPTIONS *`", "400", "404", "there is no such file, and nothing else that could answer",
    status(400, 404),
)  # fmt: skip
POST_SLASH = Difference(
    "POST to a directory without its slash",
    "301",
    "405 with Allow",
    "a redirect would lead to a 405",
    status(301, 405, location=("http://testserver/docs/", None), allow=(None, "GET, HEAD, OPTIONS")),
)

# -- compressed siblings -------------------------------------------------------------------------------------

CODED_RANGES = Difference(
    "a compressed sibling",
    "no Accept-Ranges",
    "`Accept-Ranges: bytes`",
    "a compressed download can be resumed as well",
    {"accept-ranges": (None, "bytes")},
)
CODED_RANGE = Difference(
    "a range of a compressed sibling",
    "200, all of it",
    "206",
    "RFC 9110 §14.2: a range of the form that was chosen",
    status(200, 206, content_range=(None, "bytes 0-9/all")),
)
CODED_BEYOND = Difference(
    "a range beyond the end of a compressed sibling",
    "200, all of it",
    "416",
    "as above",
    status(200, 416, content_range=(None, "bytes */all")),
)
STALE = Difference(
    "a sibling that is older than its file",
    "200, the old content",
    "200, the file itself",
    "the file was changed and the build did not run; what is in the sibling is history",
    {
        "content-encoding": ("gzip", None),
        "last-modified": ("the sibling's", "the file's"),
        "accept-ranges": (None, "bytes"),
        "body": ("the sibling", "the file"),
        "content-length": ("the sibling's", "the file's"),
    },
)
PREFERS_PLAIN = Difference(
    "`Accept-Encoding: gzip;q=0.5, identity;q=1`",
    "gzip",
    "the plain file",
    "RFC 9110 §12.5.3: the higher q-value wins",
    {
        "content-encoding": ("gzip", None),
        "accept-ranges": (None, "bytes"),
        "body": ("the sibling", "the file"),
        "content-length": ("the sibling's", "the file's"),
    },
)
ANY_CODING = Difference(
    "`Accept-Encoding: *` or `x-gzip`",
    "the plain file",
    "gzip",
    "RFC 9110 §12.5.3 and §8.4.1.3: both accept it",
    {
        "content-encoding": (None, "gzip"),
        "body": ("the file", "the sibling"),
        "content-length": ("the file's", "the sibling's"),
    },
)
NOT_ACCEPTABLE = Difference(
    "`Accept-Encoding: identity;q=0` and no coding that there is",
    "200, the plain file",
    "406",
    "the client has said that it cannot use it",
    status(200, 406),
)

# In the order of this file, which is the README's.
DIFFERENCES: tuple[Difference, ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, Difference)
)


def differences_markdown() -> str:
    """The differences, for people."""
    rows = [f"| {one.request} | {one.nginx} | {one.ours} | {one.why} |" for one in DIFFERENCES]
    return "\n".join(["| request | nginx | trioserve | why |", "|---|---|---|---|", *rows]) + "\n"
