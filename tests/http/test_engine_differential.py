"""Both engines get the same near-valid requests and must agree in everything; random bytes are refused, no more."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.http.feeding import ENGINES, Outcome, by_byte, feed, make_engine, run

_FEW = {"head_size": 400, "header_count": 6, "target_size": 40, "body_size": 30}

methods = st.sampled_from(
    ["GET", "POST", "OPTIONS", "HEAD", "BREW", "CONNECT", "PRI", "get", "", "G@T", "M-SEARCH"]
)
targets = st.one_of(
    st.sampled_from(["/", "*", "http://b/c", "http://b", "https://[::1]:8/?x", "a:80", "", "x", "/a b", "/#", "/%zz"]),
    st.text(st.characters(max_codepoint=255), max_size=6).map(lambda text: "/" + text),
)  # fmt: skip
versions = st.sampled_from(
    ["HTTP/1.1"] * 6 + ["HTTP/1.0"] * 3 + ["HTTP/0.9", "HTTP/2.0", "http/1.1", "HTTP/1.1 ", "HTTP/1", ""]
)
names = st.sampled_from([
    "Host", "Content-Length", "Transfer-Encoding", "Connection", "Expect", "TE", "Upgrade", "X", "X-Y",
    "content-length",
    "transfer-encoding", "", " X", "X ", "X\t", "X\0", "~host", "Proxy-Connection", "Content-length\r",
])  # fmt: skip
values = st.one_of(
    st.sampled_from([
        "", "a", "a.b:80", "[::1]", "0", "5", "05", "5, 5", "+5", "-1", "31", "99999999999999999999",
        "chunked", "Chunked", "gzip",
        "gzip, chunked", "chunked, gzip", "chunked, chunked", "chunked,", "\tchunked ", "identity", "close",
        "keep-alive",
        "upgrade", "100-continue", "x", "trailers", "h2c", "websocket", " a ", "a\r\n b", "a\rb", "a\nb",
        "a\0", "a\x7f", "\xe9",
    ]),
    st.text(st.characters(max_codepoint=255), max_size=5),
)  # fmt: skip
separators = st.sampled_from([": "] * 8 + [":", " :", ":\t", ""])
line_ends = st.sampled_from(["\r\n"] * 30 + ["\n", "\r", "\r\r\n", "\r\n ", ""])
bodies = st.sampled_from(
    [
        b"",
        b"hello",
        b"5\r\nhello\r\n0\r\n\r\n",
        b"5;a=b\r\nhello\r\n0\r\nx: y\r\n\r\n",
        b"5\r\nhelloX",
        b"0\r\n\r\n",
        b"zz\r\n",
    ]
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    line = f"{draw(methods)} {draw(targets)} {draw(versions)}{draw(line_ends)}"
    fields = draw(st.lists(st.tuples(names, separators, values, line_ends), max_size=5))
    host = draw(st.sampled_from(["Host: a\r\n"] * 4 + [""]))
    text = line + host + "".join("".join(parts) for parts in fields) + draw(line_ends)
    return text.encode("latin-1") + draw(bodies)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """One or more requests with a few bytes changed, put in, or taken out."""
    data = bytearray(b"".join(draw(st.lists(requests(), min_size=1, max_size=3))))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        byte = draw(st.sampled_from(b"\r\n\t :,;0\0aZ~\x7f\xff"))
        match draw(st.sampled_from(["change", "insert", "delete"])):
            case "change":
                data[at : at + 1] = bytes([byte])
            case "insert":
                data.insert(at, byte)
            case _:
                del data[at : at + 1]
    return bytes(data)


def outcomes(data: bytes, **limits: int) -> dict[str, Outcome]:
    """By engine and way of feeding."""
    return {
        f"{kind}, {way}": run(kind, pieces, **limits)
        for kind in ENGINES
        for way, pieces in (("whole", data), ("byte by byte", by_byte(data)))
    }


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=mutated())
@example(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello")
@example(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\n")
@example(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\t\r\n\r\n0\r\n\r\n")
@example(b"GET / HTTP/1.1\r\nHost: a\r\nX: \x01\r\n\r\n")
def test_the_engines_agree_on_near_valid_requests(data: bytes) -> None:
    found = outcomes(data)
    assert len({repr(outcome) for outcome in found.values()}) == 1, found


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=mutated(), kind=st.sampled_from(ENGINES))
def test_the_engines_agree_under_tight_limits(data: bytes, kind: str) -> None:
    found = outcomes(data, **_FEW)
    assert len({repr(outcome) for outcome in found.values()}) == 1, found


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.binary(max_size=400), raw_names=st.booleans())
def test_random_bytes_are_refused_and_raise_nothing_else(data: bytes, raw_names: bool) -> None:
    found = {repr(feed(make_engine(kind, raw_names=raw_names), [data])) for kind in ENGINES}
    assert len(found) == 1


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    data=st.binary(max_size=200),
    start=st.sampled_from([
        b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nX: ",
        b"\r\n", b"GET /",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
    ]),
    end=st.sampled_from([b"", b"\r\n\r\n", b": a\r\n\r\n"]),
)  # fmt: skip
def test_random_bytes_in_any_state_raise_nothing_but_a_refusal(data: bytes, start: bytes, end: bytes) -> None:
    found = outcomes(start + data + end)
    assert len({repr(outcome) for outcome in found.values()}) == 1, found
