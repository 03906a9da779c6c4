"""What the compression middleware does to responses, message by message."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.middleware.calling import (
    CODINGS,
    PROSE,
    TEXT,
    Answer,
    Decoder,
    app_sending,
    body,
    call,
    http_scope,
    start,
    text,
)
from trioserve.errors import ConfigError, UnexpectedMessage, WrongContentLength
from trioserve.middleware import encoders
from trioserve.middleware.compression import Compression

VARY = "accept-encoding"
LENGTH = (b"content-length", b"%d" % len(PROSE))
ETAG = (b"etag", b'"a"')

# -- what is coded, and in what ------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", CODINGS)
async def test_a_text_in_one_message_is_coded_and_keeps_a_content_length(coding):
    answer = await call(Compression(text()), coding)
    assert answer.coding == coding
    assert int(answer.fields["content-length"]) == len(answer.raw) < len(PROSE) / 5
    assert answer.body == PROSE
    assert (answer.fields["vary"], answer.fields["content-type"]) == (VARY, "text/plain")


@pytest.mark.parametrize("coding", CODINGS)
async def test_what_each_message_brought_can_be_decoded_at_once(coding):
    lines = PROSE.splitlines(keepends=True)[:5]
    app = app_sending(start(), *(body(line, more=True) for line in lines), body(b""))
    answer = await call(Compression(app), coding)
    assert answer.coding == coding
    assert "content-length" not in answer.fields
    decoder = Decoder(coding)
    assert [decoder.decode(part) for part in answer.parts] == [*lines, b""]


async def test_the_client_chooses_by_weight_and_we_break_ties():
    app = Compression(text(), codings=("gzip", "br"))
    assert (await call(app, "br, gzip")).coding == "gzip"
    assert (await call(app, "br, gzip;q=0.9")).coding == "br"
    assert (await call(app, "br;q=0, *;q=0.1")).coding == "gzip"
    assert (await call(app, "gzip;q=0.5, identity")).coding is None


@pytest.mark.parametrize("accept", [None, "", "identity", "deflate", "gzip;q=0"])
async def test_who_accepts_no_coding_gets_the_plain_form_with_vary(accept):
    answer = await call(Compression(text()), accept)
    assert (answer.coding, answer.raw, answer.fields["vary"]) == (None, PROSE, VARY)


async def test_several_accept_encoding_fields_are_one_list():
    scope = http_scope()
    scope["headers"] = [(b"Accept-Encoding", b"deflate"), (b"accept-encoding", b"gzip;q=0.3")]
    answer = Answer()
    await Compression(text())(scope, None, answer.send)
    assert answer.coding == "gzip"


async def test_small_bodies_stay_plain_where_their_size_is_known():
    app = Compression(text(b"x" * 999), minimum_size=1000)
    assert (await call(app, "gzip")).fields.get("vary") == VARY
    assert (await call(app, "gzip")).coding is None
    assert (await call(Compression(text(b"x" * 1000), minimum_size=1000), "gzip")).coding == "gzip"
    # In parts with a Content-Length: known, too. Without one it is not.
    sized = app_sending(start([*TEXT, (b"content-length", b"4")]), body(b"ab", more=True), body(b"cd"))
    answer = await call(Compression(sized), "gzip")
    assert (answer.coding, answer.raw) == (None, b"abcd")
    unsized = app_sending(start(), body(b"ab", more=True), body(b"cd"))
    answer = await call(Compression(unsized), "gzip")
    assert (answer.coding, answer.body) == ("gzip", b"abcd")


async def test_who_refuses_the_plain_form_gets_small_bodies_coded():
    app = Compression(text(b"tiny"))
    answer = await call(app, "gzip, identity;q=0")
    assert (answer.coding, answer.body) == ("gzip", b"tiny")
    assert (await call(Compression(text(b"")), "gzip, identity;q=0")).coding is None, (
        "nothing cannot be coded"
    )


async def test_where_nothing_is_acceptable_the_plain_form_is_sent():
    answer = await call(Compression(text()), "compress, *;q=0")
    assert (answer.start["status"], answer.coding, answer.raw) == (200, None, PROSE)


@pytest.mark.parametrize("accept, coding", [("br", None), ("br, identity;q=0", "br")])
async def test_what_does_not_shrink_stays_plain_if_it_may(accept, coding):
    noise = bytes((n * n * 7919 >> 7) & 255 for n in range(3000))
    noise = b"".join(noise[n::37] for n in range(37))
    app = Compression(text(noise), minimum_size=0, brotli_level=0)
    answer = await call(app, accept)
    assert (answer.coding, answer.body) == (coding, noise)
    assert answer.fields["vary"] == VARY


@pytest.mark.parametrize(
    "types, kind, coded",
    [
        (None, "application/json; charset=utf-8", True),
        (None, "application/problem+json", True),
        (None, "text/event-stream", True),
        (None, "image/png", False),
        (None, "video/mp4", False),
        (["text/*", "Image/SVG+xml"], "text/x-anything", True),
        (["text/*", "Image/SVG+xml"], "image/svg+xml;charset=utf-8", True),
        (["text/*", "Image/SVG+xml"], "application/json", False),
        (lambda kind: kind == b"a/b", "a/b", True),
        (lambda kind: kind == b"a/b", "text/html", False),
    ],
)
async def test_only_types_of_the_list_are_coded_or_vary(types, kind, coded):
    app = Compression(app_sending(start([(b"Content-Type", kind.encode())]), body(PROSE)), types=types)
    answer = await call(app, "gzip")
    assert (answer.coding, answer.fields.get("vary")) == (("gzip", VARY) if coded else (None, None))
    assert answer.body == PROSE


async def test_a_response_without_a_type_is_left_alone():
    answer = await call(Compression(app_sending(start([]), body(PROSE))), "gzip")
    assert (answer.fields, answer.raw) == ({}, PROSE)


async def test_a_body_above_a_mebibyte_is_sent_while_it_is_coded():
    data = PROSE * 80
    assert len(data) > 2 * 1024 * 1024
    for coding in CODINGS:
        answer = await call(Compression(text(data)), coding)
        assert answer.coding == coding
        assert "content-length" not in answer.fields
        assert len(answer.parts) > 1
        assert answer.body == data


# -- other events --------------------------------------------------------------------------------------------


async def test_other_events_pass_in_their_places():
    hint = {"type": "http.response.early_hint", "links": [b"</a.css>"]}
    debug = {"type": "http.response.debug", "info": {}}
    push = {"type": "http.response.push", "path": "/a", "headers": []}
    trailers = {"type": "http.response.trailers", "headers": [(b"a", b"b")], "more_trailers": False}
    app = app_sending(hint, debug, start(trailers=True), push, body(PROSE), trailers)
    answer = await call(Compression(app), "gzip")
    assert [m["type"].rpartition(".")[2] for m in answer.messages] == [
        "early_hint", "debug", "push", "start", "body", "trailers",
    ]  # fmt: skip
    assert (answer.messages[0], answer.messages[-1]) == (hint, trailers)
    assert answer.start["trailers"] is True
    assert "content-length" not in answer.fields, "trailers need a body in chunks"
    assert answer.body == PROSE


async def test_trailers_follow_a_stream_and_events_pass_within_it():
    trailers = {"type": "http.response.trailers", "headers": []}
    push = {"type": "http.response.push", "path": "/a", "headers": []}
    app = app_sending(start(trailers=True), body(b"a", more=True), push, body(b"b"), trailers)
    answer = await call(Compression(app), "gzip")
    assert (answer.body, answer.messages[2], answer.messages[-1]) == (b"ab", push, trailers)


@pytest.mark.parametrize("event", ["http.response.pathsend", "http.response.zerocopysend"])
async def test_files_are_sent_as_they_are(event):
    message = {"type": event, "path": "/tmp/x", "file": None}
    fields = [*TEXT, LENGTH, ETAG, (b"accept-ranges", b"bytes")]
    answer = await call(Compression(app_sending(start(fields), message)), "gzip", extensions=[event])
    # As its HEAD and its parts do.
    assert answer.messages == [start([*fields, (b"vary", b"accept-encoding")]), message]
    picture = start([(b"content-type", b"image/png")])
    answer = await call(Compression(app_sending(picture, message)), "gzip", extensions=[event])
    assert answer.messages == [picture, message]


async def test_a_file_within_a_coded_body_is_an_error_that_says_what_to_do():
    app = app_sending(
        start(), body(b"a" * 2000, more=True), {"type": "http.response.zerocopysend", "file": 3}
    )
    with pytest.raises(UnexpectedMessage, match="content-encoding: identity"):
        await call(Compression(app), "gzip")


async def test_other_scopes_are_not_touched():
    seen = []

    async def app(scope, receive, send):
        seen.append((scope, receive, send))

    receive, send = object(), object()
    for kind in ("lifespan", "websocket"):
        await Compression(app)({"type": kind}, receive, send)
        assert seen.pop() == ({"type": kind}, receive, send)


async def test_what_is_no_proper_message_reaches_the_server_for_its_judgement():
    wrong = [
        {"type": "http.response.start"},
        {"type": "http.response.start", "status": 200, "headers": [b"x"]},
        {"type": "http.response.start", "status": "200", "headers": []},
        {"no": "type"},
    ]
    for message in wrong:
        assert (await call(Compression(app_sending(message)), "gzip")).messages == [message]
    # A second start, and trailers that nobody announced: after what was held.
    for message in (start(), {"type": "http.response.trailers", "headers": []}):
        assert (await call(Compression(app_sending(start(), message)), "gzip")).messages == [start(), message]
    answer = await call(Compression(app_sending(start(), body(b"a", more=True), start())), "gzip")
    assert answer.messages[2:] == [start()]
    with pytest.raises(UnexpectedMessage, match="not str"):
        await call(Compression(app_sending(start(), body("text"))), "gzip")


async def test_an_app_that_fails_before_its_body_has_sent_nothing():
    async def app(scope, receive, send):
        await send(start())
        raise LookupError("a bug")

    answer = Answer()
    with pytest.raises(LookupError):
        await Compression(app)(http_scope("gzip"), None, answer.send)
    assert answer.messages == []


# -- declared lengths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts", [[PROSE[:-1]], [PROSE + b"x"], [PROSE[:-1], b""], [PROSE, b"x"], [b"", PROSE * 2]]
)
async def test_a_body_that_is_not_as_long_as_declared_is_an_error_although_the_length_is_not_sent(parts):
    messages = [body(part, more=True) for part in parts[:-1]] + [body(parts[-1])]
    app = app_sending(start([*TEXT, LENGTH]), *messages)
    with pytest.raises(WrongContentLength):
        await call(Compression(app), "gzip")


async def test_after_an_error_nothing_more_is_sent_and_the_error_stays_the_same():
    errors = []

    async def app(scope, receive, send):
        await send(start([*TEXT, (b"content-length", b"2000")]))
        for message in (body(b"a" * 1500, more=True), body(b"b" * 600, more=True), body(b"")):
            try:
                await send(message)
            except WrongContentLength as error:
                errors.append(error)

    answer, middleware = Answer(), Compression(app)
    await middleware(http_scope("gzip"), None, answer.send)
    assert len(errors) == 2
    assert errors[0] is errors[1]
    assert [m["type"] for m in answer.messages] == ["http.response.start", "http.response.body"]
    assert middleware.open_streams == 0


@pytest.mark.parametrize("fails_at", ["http.response.start", "http.response.body"])
@pytest.mark.parametrize("accept", ["gzip", None])
async def test_an_app_hears_of_a_lost_connection_each_time(fails_at, accept):
    gone = ConnectionResetError("gone")
    heard = []

    async def send(message):
        if message["type"] == fails_at:
            raise gone

    async def app(scope, receive, send):
        await send(start())
        for message in (body(PROSE, more=True), body(b"")):
            try:
                await send(message)
            except OSError as error:
                heard.append(error)

    await Compression(app)(http_scope(accept), None, send)
    assert heard == [gone, gone]


async def test_a_start_that_the_server_refuses_may_be_followed_by_another():
    answer = Answer()

    async def send(message):
        if (b"bad", b"\n") in message.get("headers", ()):
            raise ValueError("bad header")
        await answer.send(message)

    async def app(scope, receive, send):
        try:
            await send(start([(b"bad", b"\n")]))
        except ValueError:
            await send(start(status=500))
            await send(body(PROSE))

    await Compression(app)(http_scope("gzip"), None, send)
    assert (answer.start["status"], answer.coding, answer.body) == (500, "gzip", PROSE)


# -- any chunks, any coding ----------------------------------------------------------------------------------

CHUNK = st.one_of(
    st.binary(max_size=50),
    st.builds(
        lambda start, size: (PROSE * 3)[start : start + size], st.integers(0, 5000), st.integers(0, 60_000)
    ),
)


@given(
    chunks=st.lists(CHUNK, min_size=1, max_size=6),
    coding=st.sampled_from(CODINGS),
    flush=st.booleans(),
    threaded_size=st.sampled_from([1, 2000, 10**9]),
    kind=st.sampled_from([bytes, bytearray, memoryview]),
)
async def test_the_decoded_body_is_the_original(chunks, coding, flush, threaded_size, kind):
    messages = [body(kind(chunk), more=True) for chunk in chunks]
    messages[-1]["more_body"] = False
    app = Compression(app_sending(start(), *messages), flush=flush, threaded_size=threaded_size)
    whole = b"".join(chunks)
    answer = await call(app, f"{coding}, identity;q=0")
    assert answer.coding == (coding if len(chunks) > 1 or whole else None)
    assert answer.body == whole
    assert (app.open_streams, app.shed, app.offload.calls) == (0, 0, 0)


async def test_without_flush_a_stream_waits_for_more_but_events_do_not():
    for kind, waits in ((b"text/plain", True), (b"text/event-stream; charset=utf-8", False)):
        app = app_sending(
            start([(b"content-type", kind)]), body(b"data: 1\n\n", more=True), body(b"data: 2\n\n")
        )
        answer = await call(Compression(app, flush=False), "gzip")
        assert (Decoder("gzip").decode(answer.parts[0]) == b"") == waits
        assert answer.body == b"data: 1\n\ndata: 2\n\n"


# -- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"codings": ["deflate"]}, "'deflate' is not among br, zstd, gzip"),
        ({"codings": "zip"}, "'zip'"),
        ({"brotli_level": 12}, "brotli_level is 12, but goes from 0 to 11"),
        ({"gzip_level": 0}, "gzip_level is 0, but goes from 1 to 9"),
        ({"zstd_level": 22}, "zstd_level is 22, but goes from 1 to 19"),
        ({"gzip_level": "5"}, "gzip_level is '5'"),
        ({"minimum_size": -1}, "minimum_size is -1, but must be a whole number from 0 on"),
        ({"threads": 0}, "threads is 0"),
        ({"threaded_size": 1.5}, "threaded_size is 1.5"),
        ({"types": "text/html"}, "types is 'text/html'"),
        ({"types": ["html"]}, r"types is \['html'\]"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        Compression(text(), **settings)


async def test_where_zstd_is_missing_it_is_not_offered(monkeypatch):
    monkeypatch.setattr(encoders, "find_zstd", lambda: None)
    app = Compression(text())
    assert app.codings == (b"br", b"gzip")
    assert (await call(app, "zstd, gzip;q=0.5")).coding == "gzip"
    assert (await call(Compression(text(), codings=["zstd"]), "zstd")).coding is None


def test_there_is_a_thread_for_each_core(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 5}, raising=False)
    assert Compression(text()).offload.threads == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert Compression(text()).offload.threads == 1


def test_it_describes_itself():
    app = Compression(text(), codings=("gzip", "br"))
    assert repr(app) == "<Compression gzip, br; 0 streams open, 0 shed>"
    assert app.codings == (b"gzip", b"br")
    assert Compression(text(), codings="gzip").codings == (b"gzip",)
    assert app.offload.threads >= 1
