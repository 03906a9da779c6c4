"""The tables of the conformance suite: request heads, with what must come of them and the section that says so.

RFC 9112 (HTTP/1.1) where only a section is named, RFC 9110 (semantics) as "9110 …".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.http.feeding import head

GET = "GET / HTTP/1.1"
POST = "POST / HTTP/1.1"


@dataclass(frozen=True)
class Valid:
    """A head to be accepted; `expected` holds attributes of the engine afterwards."""

    name: str
    section: str
    data: bytes
    expected: dict[str, Any] = field(default_factory=dict)

    @property
    def message(self) -> bytes:
        """The head and a body that fits it."""
        length = re.search(rb"\r\ncontent-length:\s*(\d+)\s*\r\n", self.data, re.IGNORECASE)
        if length is not None:
            return self.data + b"x" * int(length[1])
        if b"\r\nTransfer-Encoding" in self.data:
            return self.data + b"2;x\r\nab\r\n0\r\nTrailer: 1\r\n\r\n"
        return self.data


@dataclass(frozen=True)
class Refused:
    """A head to be refused with `status`."""

    name: str
    section: str
    data: bytes
    status: int


def _valid(name: str, section: str, data: bytes, **expected: Any) -> Valid:
    return Valid(name, section, data, expected)


def as_params(cases: list[Any]) -> list[Any]:
    """For `pytest.mark.parametrize`, with readable and unique names."""
    assert len({case.name for case in cases}) == len(cases), "two cases have the same name"
    return [pytest.param(case, id=case.name) for case in cases]


# -- accepted ------------------------------------------------------------------------------------------------

_METHODS = [
    _valid(f"method {method[:20]}", "9110 9.1", head(f"{method} / HTTP/1.1"), method=method)
    for method in (
        "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "PROPFIND", "M-SEARCH", "QUERY",
        "PRI",
        "SOURCE", "DESCRIBE", "BREW", "CONNECTED", "get", "Get", "X!#$%&'*+-.^_`|~9", "m" * 64,
    )
]  # fmt: skip

_TARGETS = [
    _valid(f"target {target[:30]}", "3.2.1", head(f"GET {target} HTTP/1.1"), target=target.encode())
    for target in (
        "/", "/?", "//", "//a/b", "/a/../b/./c", "/a?b=c&d=e?f/g", "/%41%7e%00", "/%", "/%zz",
        "/a;b:c@d!e$f&g'h(i)j*k+l,m=n~o",
        '/"<>[\\]^`{|}', "/-._~", "/http://other/x", "/*", "/a?*",
    )
]  # fmt: skip

_ABSOLUTE = [
    _valid(
        "absolute form", "3.2.2", head("GET http://b.example/x?y=1 HTTP/1.1"),
        target=b"/x?y=1", headers=[(b"host", b"b.example")],
    ),
    _valid(
        "absolute form, port and upper case", "3.2.2", head("GET HTTP://B.example:8080/ HTTP/1.1", "X: 1"),
        target=b"/", headers=[(b"host", b"B.example:8080"), (b"x", b"1")],
    ),
    _valid(
        "absolute form without a path", "3.2.2", head("GET https://b HTTP/1.1"),
        target=b"/", headers=[(b"host", b"b")],
    ),
    _valid("absolute form with only a query", "3.2.2", head("GET http://b?c=/d HTTP/1.1"), target=b"/?c=/d"),
    _valid(
        "absolute form, IPv6", "3.2.2", head("GET http://[::1]:80/ HTTP/1.1"),
        headers=[(b"host", b"[::1]:80")],
    ),
    _valid(
        "absolute form in 1.0 without Host", "3.2.2", head("GET http://b/c HTTP/1.0", host=None),
        target=b"/c", headers=[(b"host", b"b")],
    ),
    _valid(
        "absolute form keeps a name as it came", "3.2.2", head("GET http://b/ HTTP/1.1", "HOST: c", host=None),
        headers=[(b"host", b"b")],
    ),
    _valid("asterisk form", "3.2.4", head("OPTIONS * HTTP/1.1"), target=b"*"),
    _valid("OPTIONS of a path", "3.2.1", head("OPTIONS /x HTTP/1.1"), target=b"/x"),
    _valid("OPTIONS of a whole server, absolute", "3.2.4", head("OPTIONS http://b HTTP/1.1"), target=b"*"),
    _valid("OPTIONS of the root, absolute", "3.2.4", head("OPTIONS http://b/ HTTP/1.1"), target=b"/"),
    _valid("OPTIONS with only a query, absolute", "3.2.4", head("OPTIONS http://b?x HTTP/1.1"), target=b"/?x"),
]  # fmt: skip

_HOSTS = [
    _valid(f"Host {host}", "9110 7.2", head(GET, host=host), headers=[(b"host", host.encode())])
    for host in (
        "", "a", "a.b.example", "A.Example:80", "a:", ":80", "a:65535", "127.0.0.1:8000", "[::1]",
        "[::1]:80", "[2001:db8::A]",
        "[::ffff:1.2.3.4]", "[fe80::1%25eth0]", "a_b", "%41", "a,b", "xn--bcher-kva.example", "a!$&'()*+;=~b",
    )
]  # fmt: skip

_FIELDS = [
    _valid("no Host in 1.0", "3.2", head("GET / HTTP/1.0", host=None), version="1.0", headers=[]),
    _valid("Host in 1.0", "3.2", head("GET / HTTP/1.0"), headers=[(b"host", b"a")]),
    _valid(
        "white space around a value", "5", head(GET, "A:b", "C:  d", "E: f \t ", "G:\t h\ti  j "),
        headers=[(b"host", b"a"), (b"a", b"b"), (b"c", b"d"), (b"e", b"f"), (b"g", b"h\ti  j")],
    ),
    _valid(
        "empty values", "9110 5.5", head(GET, "A:", "B: ", "C: \t "),
        headers=[(b"host", b"a"), (b"a", b""), (b"b", b""), (b"c", b"")],
    ),
    _valid("no fields at all", "2.1", head("GET / HTTP/1.0", host=None), headers=[]),
    _valid(
        "names in lower case, order and repetition kept", "9110 5.1", head(GET, "X-B: 1", "x-a: 2", "X-b: 3"),
        headers=[(b"host", b"a"), (b"x-b", b"1"), (b"x-a", b"2"), (b"x-b", b"3")],
    ),
    _valid(
        "every character of a token in a name", "9110 5.6.2", head(GET, "!#$%&'*+-.^_`|~09azAZ: 1"),
        headers=[(b"host", b"a"), (b"!#$%&'*+-.^_`|~09azaz", b"1")],
    ),
    _valid(
        "every visible character and obs-text in a value", "9110 5.5",
        head(GET, b"X: " + bytes(range(0x21, 0x7F)) + bytes(range(0x80, 0x100))),
        headers=[(b"host", b"a"), (b"x", bytes(range(0x21, 0x7F)) + bytes(range(0x80, 0x100)))],
    ),
    _valid("a colon in a value", "5", head(GET, "X: :a: b"), headers=[(b"host", b"a"), (b"x", b":a: b")]),
    _valid("no space after the colon", "5", head(GET, "X:a"), headers=[(b"host", b"a"), (b"x", b"a")]),
    _valid("one empty line before", "2.2", b"\r\n" + head(GET), target=b"/"),
    _valid("two empty lines before", "2.2", b"\r\n\r\n" + head(GET), target=b"/"),
    _valid(
        "names that h11 judges, with a mark", "9110 5.1", head(GET, "~host: 1", "~content-length: x"),
        headers=[(b"host", b"a"), (b"~host", b"1"), (b"~content-length", b"x")],
    ),
]  # fmt: skip

_FRAMING = [
    _valid("no body", "6.3", head(POST), content_length=0, body_complete=True),
    _valid("Content-Length 0", "6.3", head(POST, "Content-Length: 0"), content_length=0, body_complete=True),
    _valid("Content-Length", "6.2", head(POST, "Content-Length: 12"), content_length=12, body_complete=False),
    _valid(
        "Content-Length with zeros in front",
        "9110 8.6",
        head(POST, "Content-Length: 0012"),
        content_length=12,
    ),
    _valid(
        "Content-Length of 18 digits",
        "9110 8.6",
        head(POST, "Content-Length: " + "9" * 18),
        content_length=10**18 - 1,
    ),
    _valid(
        "Content-Length with white space around", "5", head(POST, "Content-Length: \t5 "), content_length=5
    ),
    _valid("Content-Length with GET", "9110 9.3.1", head(GET, "Content-Length: 5"), content_length=5),
    _valid("Content-Length in 1.0", "6.3", head("POST / HTTP/1.0", "Content-Length: 5"), content_length=5),
    _valid(
        "chunked", "6.1", head(POST, "Transfer-Encoding: chunked"), content_length=None, body_complete=False
    ),
    _valid("chunked in upper case", "7", head(POST, "Transfer-Encoding: CHUNKED"), content_length=None),
    _valid(
        "chunked with white space around",
        "5",
        head(POST, "Transfer-Encoding:  chunked\t"),
        content_length=None,
    ),
    _valid("chunked with GET", "6.1", head(GET, "Transfer-Encoding: chunked"), content_length=None),
]

_CONNECTION = [
    _valid(f"keep-alive: HTTP/{version}, Connection {value}", "9.3", head(
        f"GET / HTTP/{version}", *[f"Connection: {v}" for v in value.split("|") if v]), keep_alive=kept)
    for version, value, kept in (
        ("1.1", "", True), ("1.1", "close", False), ("1.1", "Close", False), ("1.1", "keep-alive", True),
        ("1.1", "keep-alive, close", False), ("1.1", "close, keep-alive", False), ("1.1", "x, close ,y", False),
        ("1.1", "x|close", False), ("1.1", "closed", True), ("1.1", "not-close", True), ("1.1", "upgrade", True),
        ("1.0", "", False), ("1.0", "keep-alive", True), ("1.0", "Keep-Alive", True), ("1.0", "x|keep-alive", True),
        ("1.0", "close", False), ("1.0", "keep-alive, close", False), ("1.0", "x-keep-alive", False),
    )
]  # fmt: skip

_EXPECT_AND_TE = [
    _valid(
        "Expect",
        "9110 10.1.1",
        head(POST, "Expect: 100-continue", "Content-Length: 5"),
        expects_continue=True,
    ),
    _valid("Expect in upper case", "9110 10.1.1", head(POST, "Expect: 100-Continue"), expects_continue=True),
    _valid("no Expect", "9110 10.1.1", head(POST, "Content-Length: 5"), expects_continue=False),
    _valid(
        "Expect in 1.0",
        "9110 10.1.1",
        head("POST / HTTP/1.0", "Expect: 100-continue"),
        expects_continue=False,
    ),
    _valid(
        "unknown Expect in 1.0", "9110 10.1.1", head("POST / HTTP/1.0", "Expect: x"), expects_continue=False
    ),
    _valid("TE trailers", "9110 10.1.4", head(GET, "TE: trailers"), wants_trailers=True),
    _valid(
        "TE Trailers among others",
        "9110 10.1.4",
        head(GET, "TE: deflate;q=0.5, Trailers"),
        wants_trailers=True,
    ),
    _valid("TE in two lines", "9110 10.1.4", head(GET, "TE: gzip", "TE: trailers"), wants_trailers=True),
    _valid("TE without trailers", "9110 10.1.4", head(GET, "TE: gzip"), wants_trailers=False),
    _valid(
        "TE with a coding of a similar name", "9110 10.1.4", head(GET, "TE: x-trailers"), wants_trailers=False
    ),
    _valid("TE trailers in 1.0", "7.1.2", head("GET / HTTP/1.0", "TE: trailers"), wants_trailers=False),
]

_UPGRADE = [
    _valid(f"upgrade to {protocol}, left alone", "9110 7.8", head(
        line, f"Upgrade: {protocol}", "Connection: upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA",
        *more), keep_alive=True, content_length=length)
    for protocol, line, more, length in (
        ("h2c", GET, (), 0), ("websocket", GET, (), 0), ("h2c with a body", POST, ("Content-Length: 5",), 5),
        ("h2c with chunks", POST, ("Transfer-Encoding: chunked",), None),
        ("h2c, no body", POST, ("Content-Length: 0",), 0),
    )
]  # fmt: skip

# Not for tests that want its body, too.
HUGE = "Content-Length of 18 digits"

VALID: list[Valid] = [
    *_METHODS, *_TARGETS, *_ABSOLUTE, *_HOSTS, *_FIELDS, *_FRAMING, *_CONNECTION, *_EXPECT_AND_TE, *_UPGRADE,
]  # fmt: skip

# -- refused -------------------------------------------------------------------------------------------------

_BAD_LINES = [
    Refused(f"line {line!r:.45}", section, head(line), status)
    for section, status, lines in (
        ("3", 400, (
            "GET  / HTTP/1.1", "GET /  HTTP/1.1", " GET / HTTP/1.1", "GET / HTTP/1.1 ", "GET\t/\tHTTP/1.1",
            "GET", "GET ",
            "GET /", "GET / ", "GET / / HTTP/1.1", "/ HTTP/1.1", "HTTP/1.1 200 OK", "GET / HTTP/1.1\r",
            "\rGET / HTTP/1.1",
            "GET\r / HTTP/1.1", "GET /\r HTTP/1.1",
        )),
        ("2.3", 400, (
            "GET / http/1.1", "GET / HTTP/11", "GET / HTTP/1", "GET / HTTP/1.", "GET / HTTP/.1",
            "GET / HTTP/1.1x",
            "GET / HTTP/1.10", "GET / HTTP/10.1", "GET / HTTPS/1.1", "GET / HTTP/a.b", "GET / HTTP-1.1",
            "GET / ICY/1.1",
            "GET / HTTP/+1.1", "GET / HTTP/1,1",
        )),
        ("2.3", 505, ("GET / HTTP/0.9", "GET / HTTP/1.2", "GET / HTTP/2.0", "GET / HTTP/3.0", "GET / HTTP/9.9",
                      "PRI * HTTP/2.0", "CONNECT a:1 HTTP/2.0")),
        ("9110 9.1", 400, (
            "G@T / HTTP/1.1", "G(T / HTTP/1.1", "GET: / HTTP/1.1", "G\x00T / HTTP/1.1", "G\xc9T / HTTP/1.1",
            '"GET" / HTTP/1.1', "G\x7fT / HTTP/1.1",
        )),
        ("3", 501, ("m" * 65 + " / HTTP/1.1",)),
        ("3.2.3", 501, ("CONNECT a:80 HTTP/1.1", "CONNECT / HTTP/1.1", "CONNECT a:80 HTTP/1.0")),
        ("3.2", 400, (
            "GET /a b HTTP/1.1", "GET /a#b HTTP/1.1", "GET #b HTTP/1.1", "GET /\x7f HTTP/1.1",
            "GET /\xc3\xa9 HTTP/1.1",
            "GET /\x00 HTTP/1.1", "GET /\x01 HTTP/1.1", "GET /a\tb HTTP/1.1", "GET * HTTP/1.1",
            "POST * HTTP/1.1",
            "OPTIONS ** HTTP/1.1", "OPTIONS *? HTTP/1.1", "GET x HTTP/1.1", "GET ?x HTTP/1.1",
            "GET a:80 HTTP/1.1",
            "GET a.example:80/x HTTP/1.1", "GET :80 HTTP/1.1", "GET @ HTTP/1.1", "GET . HTTP/1.1",
        )),
        ("3.2.2", 400, (
            "GET http:// HTTP/1.1", "GET http:///x HTTP/1.1", "GET http://:80/ HTTP/1.1",
            "GET http://u@h/ HTTP/1.1",
            "GET http://u:p@h/ HTTP/1.1", "GET http://[::1/ HTTP/1.1", "GET http://h:x/ HTTP/1.1",
            "GET http:/x HTTP/1.1",
            "GET http:x HTTP/1.1", "GET http HTTP/1.1", "GET ftp://h/ HTTP/1.1",
            "GET file:///etc/passwd HTTP/1.1",
            "GET http://h/#x HTTP/1.1", "GET http://h\\x/ HTTP/1.1", "GET http://%zz/ HTTP/1.1",
            "OPTIONS http:// HTTP/1.1",
        )),
    )
    for line in lines
]  # fmt: skip

_BAD_STARTS = [
    Refused("HTTP/0.9", "2.3", b"GET /\r\n", 400),
    Refused("three empty lines", "2.2", b"\r\n\r\n\r\n" + head(GET), 400),
    Refused("a thousand empty lines", "2.2", b"\r\n" * 1000, 400),
    Refused("an empty line of LF", "2.2", b"\n" + head(GET), 400),
    Refused("an empty line of CR", "2.2", b"\r" + head(GET), 400),
    Refused("an empty line with a space", "2.2", b" \r\n" + head(GET), 400),
    Refused("a line that ends in LF", "2.2", b"GET / HTTP/1.1\nHost: a\r\n\r\n", 400),
    Refused("everything ends in LF", "2.2", b"GET / HTTP/1.1\nHost: a\n\n", 400),
    Refused("everything ends in CR", "2.2", b"GET / HTTP/1.1\rHost: a\r\r", 400),
    Refused("the last line ends in LF", "2.2", b"GET / HTTP/1.1\r\nHost: a\n\r\n", 400),
    Refused("the empty line is LF", "2.2", b"GET / HTTP/1.1\r\nHost: a\r\n\n", 400),
    Refused("the HTTP/2 preface", "9113 3.4", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    Refused("a TLS ClientHello", "3", bytes.fromhex("16030100f8010000f40303") + bytes(32), 400),
    Refused("NUL", "3", b"\0", 400),
    Refused("random text", "3", b"{'a': 1}\r\n\r\n", 400),
    Refused("a response", "3", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 400),
]

_BAD_HOSTS = [
    Refused("no Host in 1.1", "3.2", head(GET, host=None), 400),
    Refused("no Host in 1.1, absolute form", "3.2", head("GET http://b/ HTTP/1.1", host=None), 400),
    Refused("Host twice", "3.2", head(GET, "Host: b"), 400),
    Refused("Host twice, the same", "3.2", head(GET, "Host: a"), 400),
    Refused("Host twice, one empty", "3.2", head(GET, "hOsT:"), 400),
    Refused("Host twice in 1.0", "3.2", head("GET / HTTP/1.0", "Host: a"), 400),
    Refused("invalid Host in 1.0", "3.2", head("GET / HTTP/1.0", host="a b"), 400),
    Refused("invalid Host beside an absolute form", "3.2", head("GET http://b/ HTTP/1.1", host="a/b"), 400),
    *(
        Refused(f"Host {host!r}", "9110 7.2", head(GET, host=host), 400)
        for host in (
            "a b", "a\tb", "a, b", "a/b", "a@b", "a#b", "a?b", "a:b", "a:-1", "a:80:80", "a:123456", "::1",
            "[::1", "::1]", "[]",
            "[::1]x", "[g::]", "[::::]", "[1.2.3.4]", "[::1%25]", "a%", "a%zz", '"a"', "<a>", "a\\b", "a^b",
            "a|b", "{a}", "\xe9",
            "http://a", "a\x7f",
        )
    ),
]  # fmt: skip

_BAD_FIELDS = [
    Refused(f"field {line!r:.30}", section, head(GET, line), 400)
    for section, lines in (
        ("5.1", ("A : b", "A\t: b", " A: b", "\tA: b", "A", "A b", "A b: c", ": b", ":", " : b", "A\x0b: b")),
        ("5.2", ("A: b\r\n c", "A: b\r\n\tc", "A:\r\n b", "A: b\r\n ", "A: b\r\n \r\n c: d")),
        ("2.2", ("A: b\rc", "A: b\r", "A: b\r\r", "A: b\nc: d", "A: b\n", "A\r: b", "A:\rb", "\rA: b", "A: b\n\r")),
        ("9110 5.5", (
            "A: \0", "A: b\0c", "A: \x01", "A: b\x0b", "A: \x0cb", "A: \x08b", "A: b\x1fc", "A: \x7f", "A\0: b",
        )),
        ("9110 5.1", ("A@: b", "A(: b", "A/b: c", 'A": b', "A[]: b", "A,B: c", "A;: b", "\xc9: b", "A{}: b", "A\\: b")),
    )
    for line in lines
]  # fmt: skip

_BAD_FIRST_FIELDS = [
    Refused("white space before the first field", "2.2", head(GET, " Host: a", host=None), 400),
    Refused("an empty folded line first", "2.2", head(GET, " ", "Host: a", host=None), 400),
]


def _codings(values: str) -> list[str]:
    return [f"Transfer-Encoding: {value}" for value in values.split("|")]


_BAD_FRAMING = [
    *(
        Refused(f"Content-Length {value!r:.40}", "6.2", head(POST, f"Content-Length: {value}"), 400)
        for value in (
            "", "-1", "+5", "5x", "x", "0x5", "5,5", "5, 5", "5, 6", "5 5", "5;", "1e3", "1_000", "5.0",
            '"5"', "\xb2", "9" * 19, "9" * 40,
        )
    ),
    Refused("Content-Length twice", "6.3", head(POST, "Content-Length: 5", "Content-Length: 6"), 400),
    Refused("Content-Length twice, the same", "6.3", head(POST, "Content-Length: 5", "content-length: 5"), 400),
    Refused("Content-Length twice, zeros", "6.3", head(POST, "Content-Length: 0", "Content-Length: 0"), 400),
    Refused("Content-Length twice, one empty", "6.3", head(POST, "Content-Length: 5", "Content-Length:"), 400),
    Refused("TE and CL", "6.1", head(POST, "Transfer-Encoding: chunked", "Content-Length: 5"), 400),
    Refused("CL and TE", "6.1", head(POST, "Content-Length: 5", "Transfer-Encoding: chunked"), 400),
    Refused("CL and TE, other coding", "6.1", head(POST, "Content-Length: 5", "Transfer-Encoding: gzip, chunked"), 400),
    Refused("CL 0 and TE", "6.1", head(POST, "Content-Length: 0", "Transfer-Encoding: chunked"), 400),
    Refused("TE in 1.0", "6.1", head("POST / HTTP/1.0", "Transfer-Encoding: chunked"), 400),
    *(
        Refused(f"Transfer-Encoding {value!r}", "6.3", head(POST, *_codings(value)), 400)
        for value in (
            "", "gzip", "identity", "xchunked", "chunkedx", "chunked, gzip", "chunked,identity",
            "chunked, chunked", "chunked,",
            ",chunked", ",", "chunked;a=b", "chunked ;", '"chunked"', "chunk ed", "chun\xebked",
            "chunked|chunked", "chunked|gzip",
            "chunked|", "|chunked", "gzip, chunked, chunked", "\x0bchunked", "ch\x00unked",
        )
    ),
    Refused("Transfer-Encoding with a space before the colon", "5.1", head(POST, "Transfer-Encoding : chunked"), 400),
    Refused("Transfer-Encoding folded", "5.2", head(POST, "Transfer-Encoding:\r\n chunked"), 400),
    *(
        Refused(f"unknown coding {value!r}", "6.1", head(POST, *_codings(value)), 501)
        for value in ("gzip, chunked", "gzip,chunked", "identity, chunked", "gzip|chunked", "x, y ,\tchunked")
    ),
    *(
        Refused(f"Expect {value!r}", "9110 10.1.1", head(POST, f"Expect: {value}"), 417)
        for value in ("", "200-ok", "100-continue, x", "100", "100-continue;a=b")
    ),
]  # fmt: skip

# Two faults: the one that comes first in the bytes decides, or for fields the order of the checks.
_TWO_FAULTS = [
    Refused("version and method", "3", head("G@T / HTTP/2.0"), 400),
    Refused("version and target", "3", head("GET x HTTP/2.0"), 505),
    Refused("CONNECT and a bad field", "3", head("CONNECT a:1 HTTP/1.1", "A b: c"), 501),
    Refused("bare LF in the line and version", "3", b"GET / HTTP/2.0\n\r\n\r\n", 400),
    Refused("bad field and Expect", "5", head(POST, "A b: c", "Expect: x"), 400),
    Refused("no Host and Expect", "3.2", head(POST, "Expect: x", host=None), 400),
    Refused("bad length and Expect", "6.3", head(POST, "Expect: x", "Content-Length: x"), 400),
]

REFUSED: list[Refused] = [
    *_BAD_LINES, *_BAD_STARTS, *_BAD_HOSTS, *_BAD_FIELDS, *_BAD_FIRST_FIELDS, *_BAD_FRAMING, *_TWO_FAULTS,
]  # fmt: skip
