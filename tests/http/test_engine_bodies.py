"""Request bodies: by Content-Length and by chunks, with what comes after them, with both engines."""

from __future__ import annotations

import pytest

from tests.http.feeding import ENGINES, by_byte, head, in_two, make_engine, run
from trioserve.errors import RequestRefused

pytestmark = pytest.mark.parametrize("kind", ENGINES)

POST = "POST / HTTP/1.1"
CHUNKED = head(POST, "Transfer-Encoding: chunked")
REST = b"GET /next HTTP/1.1\r\nHos"


# Bodies as chunks, and their content. RFC 9112 section 7.1; BWS and extensions: section 7.1.1; trailers: 7.1.2.
VALID_CHUNKS: list[tuple[bytes, bytes]] = [
    (b"0\r\n\r\n", b""),
    (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    (b"1\r\na\r\n2\r\nbc\r\n3\r\ndef\r\n0\r\n\r\n", b"abcdef"),
    (b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
    (b"a\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
    (b"00005\r\nhello\r\n000\r\n\r\n", b"hello"),
    (b"0000000000000005\r\nhello\r\n0000000000000000\r\n\r\n", b"hello"),
    (b"4\r\n\r\n\r\n\r\n0\r\n\r\n", b"\r\n\r\n"),
    (b"5\r\n0\r\n\r\n\r\n0\r\n\r\n", b"0\r\n\r\n"),
    (b"3\r\n\0\xff\n\r\n0\r\n\r\n", b"\0\xff\n"),
    (b"5;a\r\nhello\r\n0\r\n\r\n", b"hello"),
    (b"5;a=b\r\nhello\r\n0;c\r\n\r\n", b"hello"),
    (b'5;a="b;c\\"\xff\t d";e;f=g\r\nhello\r\n0\r\n\r\n', b"hello"),
    (b"5 ; a = b\t;\tc\r\nhello\r\n0\r\n\r\n", b"hello"),
    (b'5;a=""\r\nhello\r\n0\r\n\r\n', b"hello"),
    (b"0\r\nA: b\r\nX-Checksum:1\r\nempty:\r\n\r\n", b""),
    (b"2\r\nhi\r\n0\r\nA: \xff\tb  \r\n\r\n", b"hi"),
    (b"0\r\nContent-Length: 5\r\nTransfer-Encoding: gzip\r\nHost: x\r\n\r\n", b""),
]

BAD_CHUNKS = [
    b"\r\n", b"x\r\n", b" 5\r\nhello\r\n", b"5 \r\nhello\r\n", b"5\t\r\nhello\r\n", b"-5\r\nhello\r\n",
    b"+5\r\nhello\r\n",
    b"0x5\r\nhello\r\n", b"5_0\r\n", b"5h\r\nhello\r\n", b"5,\r\nhello\r\n", b"g\r\n", b"\xb2\r\n",
    b"5\0\r\nhello\r\n",
    b"00000000000000005\r\nhello\r\n", b"fffffffffffffffff\r\n", b"5\nhello\r\n", b"5\rhello\r\n",
    b"5\r\r\nhello\r\n",
    b"5\r\nhello\n0\r\n\r\n", b"5\r\nhello\r0\r\n\r\n", b"5\r\nhello0\r\n\r\n", b"5\r\nhelloo\r\n0\r\n\r\n",
    b"5\r\nhell\r\n0\r\n\r\n", b"5\r\nhello\r\n\r\n", b"5\r\nhello\r\n0\r\n\n", b"5\r\nhello\r\n0\n\r\n",
    b"0\r\n\rX",
    b"5;\r\nhello\r\n", b"5;;a\r\nhello\r\n", b"5;a=\r\nhello\r\n", b"5;a=b c\r\nhello\r\n",
    b"5;a b\r\nhello\r\n",
    b"5;=b\r\nhello\r\n", b'5;a="b\r\nhello\r\n', b'5;a="b"c\r\nhello\r\n', b"5;a\nhello\r\n",
    b"5;a\rb\r\nhello\r\n",
    b"5;a\0\r\nhello\r\n", b"5;a\x7f\r\nhello\r\n", b"5;a ;\r\nhello\r\n", b"5 a\r\nhello\r\n",
    b"5;\xff\r\nhello\r\n",
    b'5;a="\r"\r\nhello\r\n', b'5;a="\\\x01"\r\nhello\r\n',
    b"0\r\nA\r\n\r\n", b"0\r\n: b\r\n\r\n", b"0\r\nA : b\r\n\r\n", b"0\r\n A: b\r\n\r\n",
    b"0\r\nA: b\r\n c\r\n\r\n",
    b"0\r\nA: b\n\r\n", b"0\r\nA: \0\r\n\r\n", b"0\r\nA: b\rc\r\n\r\n", b"0\r\nA: b\x01\r\n\r\n",
    b"0\r\nA: b\x7f\r\n\r\n",
    b"0\r\nGET / HTTP/1.1\r\n\r\n", b"0\r\n\xff: b\r\n\r\n", b"0\r\n\n",
]  # fmt: skip


@pytest.mark.parametrize(("chunks", "content"), VALID_CHUNKS)
def test_chunks_are_decoded_and_what_follows_is_kept_to_the_byte(
    kind: str, chunks: bytes, content: bytes
) -> None:
    engine = make_engine(kind)
    assert engine.receive_head(CHUNKED + chunks + REST)
    assert (engine.body_complete, b"".join(engine.body), engine.leftover) == (True, content, REST)
    assert engine.body_bytes == len(content)


def test_a_chunked_body_ends_at_its_last_byte_and_not_before(kind: str) -> None:
    for first, second, content in (
        (*two, content) for chunks, content in VALID_CHUNKS for two in in_two(chunks)
    ):
        engine = make_engine(kind)
        engine.receive_head(CHUNKED)
        engine.receive_body(first)
        assert (engine.body_complete, engine.leftover) == (False, b"")
        engine.receive_body(second + REST)
        assert (engine.body_complete, engine.leftover) == (True, REST)
        assert b"".join(engine.body) == content


@pytest.mark.parametrize("chunks", BAD_CHUNKS)
def test_broken_chunks_are_refused_however_they_arrive(kind: str, chunks: bytes) -> None:
    data = CHUNKED + chunks
    assert run(kind, data).refused == 400
    assert run(kind, by_byte(data)).refused == 400
    assert {run(kind, pieces).refused for pieces in in_two(data)} == {400}


@pytest.mark.parametrize(
    "start",
    [
        b"x",
        b"\n",
        b"\r",
        b"5z",
        b"5\n",
        b"5\rx",
        b"5;\n",
        b"5;\0",
        b"3\r\nabcX",
        b"3\r\nabc\n",
        b"0\r\n\n",
        b"0" * 17,
    ],
)
def test_broken_chunks_are_refused_at_the_byte_that_breaks_them(kind: str, start: bytes) -> None:
    assert run(kind, CHUNKED + start[:-1]).refused is None
    assert run(kind, CHUNKED + start).refused == 400


def test_a_head_that_is_not_whole_is_never_taken_for_a_body(kind: str) -> None:
    engine = make_engine(kind)
    assert not engine.receive_head(CHUNKED[:-1])
    assert engine.receive_head(CHUNKED[-1:] + b"2\r\nhi\r\n0\r\n\r\n")
    assert (b"".join(engine.body), engine.body_complete) == (b"hi", True)


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_body_with_a_length_is_counted_to_the_byte(kind: str, size: int) -> None:
    body = bytes(n % 256 for n in range(size))
    data = head(POST, f"Content-Length: {size}")
    for pieces in ([data + body + REST], [data, body + REST], [data + body[:1], body[1:] + REST]):
        engine = make_engine(kind)
        assert engine.receive_head(pieces[0])
        for piece in filter(None, pieces[1:]):
            engine.receive_body(piece)
        assert (engine.body_complete, b"".join(engine.body), engine.leftover) == (True, body, REST)


def test_parts_are_handed_over_as_they_arrive(kind: str) -> None:
    for data, parts in (
        (head(POST, "Content-Length: 6"), [b"ab", b"cd", b"ef"]),
        (CHUNKED, [b"2\r\nab\r", b"\n3\r\ncde", b"\r\n1\r\nf\r\n0\r\n\r\n"]),
    ):
        engine = make_engine(kind)
        assert engine.receive_head(data)
        seen = []
        for part in parts:
            engine.receive_body(part)
            seen.append(b"".join(engine.body))
            engine.forget_body()
            assert engine.body == []
        assert b"".join(seen) == b"abcdef"
        assert all(seen)
        assert (engine.body_complete, engine.body_bytes) == (True, 6)


def test_expectation_and_body_may_arrive_together(kind: str) -> None:
    data = head(POST, "Expect: 100-continue", "Content-Length: 2") + b"hi"
    (message,) = run(kind, data).messages
    assert (message.body, message.complete, message.expects_continue) == (b"hi", True, True)


def test_a_pipeline_of_every_framing_is_told_apart(kind: str) -> None:
    data = (
        head()
        + head(POST, "Content-Length: 3") + b"abc"
        + CHUNKED + b"3\r\ndef\r\n0\r\nx: y\r\n\r\n"
        + b"\r\n" + head("PUT / HTTP/1.1", "Content-Length: 0")
        + CHUNKED + b"0\r\n\r\n"
        + head("GET / HTTP/1.0", "Connection: keep-alive", host=None)
        + head("DELETE /last HTTP/1.1", "Content-Length: 4") + b"GET "
    )  # fmt: skip
    bodies = [b"", b"abc", b"def", b"", b"", b"", b"GET "]
    for pieces in ([data], by_byte(data), [data[:40], data[40:90], data[90:]]):
        outcome = run(kind, pieces)
        assert [message.body for message in outcome.messages] == bodies
        assert all(message.complete for message in outcome.messages)
        assert not outcome.in_head


def test_a_request_hidden_in_a_body_is_a_body(kind: str) -> None:
    hidden = head("GET /admin HTTP/1.1")
    for data in (
        head(POST, f"Content-Length: {len(hidden)}") + hidden,
        CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(hidden), hidden),
    ):
        for pieces in ([data], by_byte(data)):
            (message,) = run(kind, pieces).messages
            assert (message.target, message.body) == (b"/", hidden)


def test_a_broken_body_that_comes_with_its_head_is_refused_at_once(kind: str) -> None:
    with pytest.raises(RequestRefused, match="chunk"):
        make_engine(kind).receive_head(CHUNKED + b"zz\r\n")
