"""What the compression middleware says in the head of a response, and which responses it leaves alone."""

from __future__ import annotations

import pytest

from tests.middleware.calling import PROSE, TEXT, app_sending, body, call, start, text
from trioserve.middleware.compression import Compression

VARY = "accept-encoding"

# -- what is changed in the head -----------------------------------------------------------------------------


async def test_the_etag_becomes_weak_and_ranges_are_not_offered():
    ranges = (b"accept-ranges", b"bytes")
    answer = await call(Compression(text(headers=[(b"ETag", b'"v1"'), ranges])), "gzip")
    assert answer.fields["etag"] == 'W/"v1"'
    assert "accept-ranges" not in answer.fields
    answer = await call(Compression(text(headers=[(b"etag", b'"v1"'), ranges])), "identity")
    assert (answer.fields["etag"], answer.fields["accept-ranges"]) == ('"v1"', "bytes")
    answer = await call(Compression(text(headers=[(b"etag", b'W/"v1"')])), "gzip")
    assert answer.fields["etag"] == 'W/"v1"'


@pytest.mark.parametrize(
    "vary, result",
    [
        (b"origin", "origin, accept-encoding"),
        (b"Accept-Encoding", "Accept-Encoding"),
        (b"origin , ACCEPT-ENCODING", "origin , ACCEPT-ENCODING"),
        (b"*", "*"),
        (b" ", "accept-encoding"),
        (b"x-accept-encoding", "x-accept-encoding, accept-encoding"),
    ],
)
@pytest.mark.parametrize("accept", ["gzip", "identity"])
async def test_vary_is_added_to_what_the_app_has_there(vary, result, accept):
    answer = await call(Compression(text(headers=[(b"Vary", vary)])), accept)
    assert answer.fields["vary"] == result


async def test_the_apps_own_list_of_fields_is_not_changed():
    fields = ((b"content-type", b"text/plain"), (b"etag", b'"a"'))
    message = {"type": "http.response.start", "status": 200, "headers": fields}

    async def app(scope, receive, send):
        await send(message)
        await send(body(PROSE))

    for _ in range(2):
        assert (await call(Compression(app), "gzip")).body == PROSE
    assert message == {"type": "http.response.start", "status": 200, "headers": fields}


# -- what is skipped -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    [
        (b"content-encoding", b"gzip"),
        (b"content-encoding", b"identity, gzip"),
        (b"cache-control", b"public, no-transform"),
        (b"content-digest", b"sha-256=:RBNvo1WzZ4oRRq0W9+hknpT7T8If536DEMBg9hyq/4o=:"),
        (b"Repr-Digest", b"sha-256=:RBNvo1WzZ4oRRq0W9+hknpT7T8If536DEMBg9hyq/4o=:"),
    ],
)
async def test_what_must_not_be_changed_is_not(field):
    app = text(headers=[field, (b"etag", b'"a"'), (b"accept-ranges", b"bytes")])
    plain, answer = await call(app, "gzip"), await call(Compression(app), "gzip")
    assert answer.messages == plain.messages


@pytest.mark.parametrize("status", [204, 205])
async def test_responses_without_a_body_are_left_alone(status):
    app = app_sending(start(status=status), body(b""))
    assert (await call(Compression(app), "gzip")).messages == (await call(app)).messages


@pytest.mark.parametrize(
    "status, fields, vary",
    [
        (206, [*TEXT, (b"content-range", b"bytes 0-29999/40000")], VARY),
        (206, [(b"content-type", b"multipart/byteranges; boundary=x")], VARY),
        (206, [(b"content-type", b"image/png"), (b"content-range", b"bytes 0-9/10")], None),
        (416, [*TEXT, (b"content-range", b"bytes */10")], VARY),
    ],
)
async def test_parts_of_something_are_not_coded_but_vary_with_the_whole(status, fields, vary):
    app = app_sending(start([*fields, (b"etag", b'"a"')], status), body(PROSE))
    answer = await call(Compression(app), "gzip")
    assert (answer.coding, answer.raw, answer.fields["etag"]) == (None, PROSE, '"a"')
    assert answer.fields.get("vary") == vary


async def test_an_app_opts_out_with_content_encoding_identity():
    fields = [*TEXT, (b"etag", b'"a"')]
    app = app_sending(start([*fields, (b"Content-Encoding", b"Identity")]), body(PROSE))
    answer = await call(Compression(app), "gzip")
    assert answer.start["headers"] == fields
    assert answer.raw == PROSE


@pytest.mark.parametrize(
    "fields, if_none_match, expected",
    [
        ({"etag": '"a"'}, 'W/"a"', {"etag": 'W/"a"', "vary": VARY}),
        ({"etag": '"a"'}, '"b", W/"a"', {"etag": 'W/"a"', "vary": VARY}),
        ({"etag": '"a"'}, '"a"', {"etag": '"a"', "vary": VARY}),
        ({"etag": 'W/"a"'}, 'W/"a"', {"etag": 'W/"a"', "vary": VARY}),
        ({"etag": '"a"', "vary": "origin"}, "*", {"etag": '"a"', "vary": "origin, accept-encoding"}),
        ({}, '"a"', {"vary": VARY}),
        ({"content-type": "image/png"}, 'W/"a"', {"content-type": "image/png"}),
        ({"cache-control": "no-transform"}, 'W/"a"', {"cache-control": "no-transform"}),
    ],
)
async def test_a_304_is_what_its_200_would_be(fields, if_none_match, expected):
    headers = [(name.encode(), value.encode()) for name, value in fields.items()]
    app = Compression(app_sending(start(headers, 304), body(b"")))
    answer = await call(app, "gzip", if_none_match=if_none_match)
    assert (answer.start["status"], answer.fields, answer.raw) == (304, expected, b"")


async def test_the_weak_etag_comes_back_and_is_recognised():
    """As in Starlette and Django: the app compares weakly, and has only ever seen its own strong ETag."""

    async def app(scope, receive, send):
        held = dict(scope["headers"]).get(b"if-none-match", b"")
        if b'"v1"' in [etag.strip().removeprefix(b"W/") for etag in held.split(b",")]:
            await send(start([(b"etag", b'"v1"')], 304))
            await send(body(b""))
        else:
            await send(start([*TEXT, (b"etag", b'"v1"')]))
            await send(body(PROSE))

    first = await call(Compression(app), "gzip")
    again = await call(Compression(app), "gzip", if_none_match=first.fields["etag"])
    assert again.start["status"] == 304
    assert again.fields["etag"] == first.fields["etag"] == 'W/"v1"'


# -- HEAD ----------------------------------------------------------------------------------------------------

LENGTH = (b"content-length", b"%d" % len(PROSE))
ETAG = (b"etag", b'"a"')


@pytest.mark.parametrize(
    "messages",
    [
        [start([*TEXT, LENGTH, ETAG]), body(b"")],
        [start([*TEXT, LENGTH, ETAG]), body(PROSE)],
        [start([*TEXT, ETAG]), body(PROSE)],
        [start([*TEXT, ETAG]), body(PROSE[:10], more=True), body(PROSE[10:])],
    ],
)
async def test_head_says_what_get_says_without_a_length_and_without_a_body(messages):
    app = Compression(app_sending(*messages))
    head, get = await call(app, "gzip", method="HEAD"), await call(app, "gzip")
    expected = {"content-type": "text/plain", "etag": 'W/"a"', "content-encoding": "gzip", "vary": VARY}
    assert head.fields == expected
    assert head.parts[0] == b""
    if messages[1]["body"]:
        assert {name: get.fields[name] for name in expected} == expected


async def test_head_says_only_what_is_certain_where_get_may_be_a_file():
    app = Compression(app_sending(start([*TEXT, LENGTH, ETAG]), body(b"")))
    answer = await call(app, "gzip", method="HEAD", extensions=["http.response.pathsend"])
    assert answer.fields == {"content-type": "text/plain", "etag": '"a"', "vary": VARY}
    answer = await call(Compression(app_sending(start([*TEXT, ETAG]), body(b""))), "gzip", method="HEAD")
    assert answer.fields == {"content-type": "text/plain", "etag": '"a"', "vary": VARY}


async def test_head_of_what_stays_plain_keeps_its_length():
    app = Compression(app_sending(start([*TEXT, (b"content-length", b"20")]), body(b"")))
    assert (await call(app, "gzip", method="HEAD")).fields["content-length"] == "20"
    app = Compression(app_sending(start([*TEXT, LENGTH]), body(b"")))
    answer = await call(app, None, method="HEAD")
    assert answer.fields == {"content-type": "text/plain", "content-length": str(len(PROSE)), "vary": VARY}
