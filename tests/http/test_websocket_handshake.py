"""Opening a session over HTTP/1.1: RFC 6455 section 4.2, and what becomes of requests that do not open one."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import trio

from trioserve import testing
from trioserve.http.websocket_handshake import WebSocketRequest, agree_compression
from trioserve.testing import no_leaks

from .websocket_apps import Handled, Recorder, echo
from .websocket_client import (
    ACCEPT,
    FIELDS,
    KEY,
    TEXT,
    WebSocketClient,
    frame,
    handshake,
    session,
    without,
)

serving = functools.partial(testing.serving, lifespan="off")


async def test_a_session_is_opened(hub: str, engine: str) -> None:
    app = Handled(echo)
    async with no_leaks(), serving(app, hub=hub, http_engine=engine) as server:
        async with session(server, "/a%20b?c=d", [(b"cookie", b"x=y")]) as client:
            assert client.response.header("upgrade") == "websocket"
            assert client.response.header("connection") == "Upgrade"
            assert client.response.header("server") == "trioserve"
            assert client.response.header("date") is not None
            assert client.response.header("sec-websocket-extensions") is None
            assert client.response.header("content-length") is None
            await client.send("hello")
            assert await client.receive() == "hello"
            await client.close()
            await client.expect_close(1000)
    (scope,) = app.scopes
    address = scope.pop("client"), scope.pop("server")
    assert [host for host, _ in address] == ["127.0.0.1", "127.0.0.1"]
    headers = scope.pop("headers")
    assert headers == [(b"host", b"testserver"), *FIELDS, (b"cookie", b"x=y")]
    assert scope == {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.5"},
        "http_version": "1.1",
        "scheme": "ws",
        "path": "/a b",
        "raw_path": b"/a%20b",
        "query_string": b"c=d",
        "root_path": "",
        "subprotocols": [],
        "state": {},
        "extensions": {"websocket.http.response": {}},
    }
    assert app.outcomes == [None]


def test_the_key_of_the_rfc() -> None:
    from trioserve.http.websocket_handshake import accept_value

    request = WebSocketRequest(b"/", "1.1", [(b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ==")])
    assert accept_value(request) == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert ACCEPT != b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


SPELLINGS = {
    "several protocols": [(b"upgrade", b"h2c, WebSocket"), (b"connection", b"keep-alive, Upgrade")],
    "several fields": [(b"upgrade", b"foo"), (b"upgrade", b"websocket"), (b"connection", b"upgrade")],
    "capitals": [(b"Upgrade", b"WEBSOCKET"), (b"CONNECTION", b"UPGRADE")],
    "close": [(b"upgrade", b"websocket"), (b"connection", b"upgrade, close")],
}


@pytest.mark.parametrize("name", SPELLINGS)
async def test_spellings(name: str) -> None:
    async with serving(Handled(echo)) as server, server.connect() as raw:
        await raw.send(handshake(fields=[*SPELLINGS[name], *without(b"upgrade", b"connection")]))
        assert (await raw.receive_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")


REFUSED = {
    "no version": (handshake(fields=without(b"sec-websocket-version")), 400),
    "version 8": (
        handshake(fields=without(b"sec-websocket-version"), extra=[(b"sec-websocket-version", b"8")]),
        426,
    ),
    "two versions": (handshake(extra=[(b"sec-websocket-version", b"8")]), 426),
    "no key": (handshake(fields=without(b"sec-websocket-key")), 400),
    "two keys": (handshake(extra=[(b"sec-websocket-key", KEY)]), 400),
    "short key": (
        handshake(fields=[*without(b"sec-websocket-key"), (b"sec-websocket-key", b"c2hvcnQ=")]),
        400,
    ),
    "no base64": (handshake(fields=[*without(b"sec-websocket-key"), (b"sec-websocket-key", b"!" * 24)]), 400),
    "POST": (handshake(method="POST"), 400),
    "POST with a body": (handshake(method="POST", extra=[(b"content-length", b"2")]) + b"hi", 400),
    "a body": (handshake(extra=[(b"content-length", b"2")]) + b"hi", 400),
    "a body to come": (handshake(extra=[(b"transfer-encoding", b"chunked")]), 400),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_open_a_session_is_refused(name: str, engine: str) -> None:
    request, status = REFUSED[name]
    app = Handled(echo)
    async with no_leaks(), serving(app, http_engine=engine) as server, server.connect() as raw:
        await raw.send(request)
        response = await raw.read_response()
        assert response.status == status
        assert response.header("connection") is not None
        if status == 426:
            assert response.header("sec-websocket-version") == "13"
            assert response.header("upgrade") == "websocket"
        assert await raw.receive() == b""
        assert server.worker.context.counters.refused == {str(status): 1}
        assert server.failure is None
    assert app.scopes == []


async def test_a_malformed_offer_of_compression_is_refused() -> None:
    app = Handled(echo)
    async with serving(app, websocket_compression="on") as server, server.connect() as raw:
        await raw.send(handshake(extra=[(b"sec-websocket-extensions", b"permessage-deflate; =")]))
        assert (await raw.read_response()).status == 400
    assert app.scopes == []


@pytest.mark.parametrize(
    "request_bytes",
    [
        handshake(fields=[(b"upgrade", b"h2c"), (b"connection", b"upgrade")]),
        handshake(fields=without(b"connection")),
        handshake(fields=without(b"upgrade")),
        handshake(version="1.0"),
    ],
    ids=["h2c", "not named by Connection", "no Upgrade", "HTTP/1.0"],
)
async def test_other_upgrades_are_ignored(request_bytes: bytes, engine: str) -> None:
    async with serving(Handled(echo), http_engine=engine) as server, server.connect() as raw:
        await raw.send(request_bytes)
        response = await raw.read_response()
        assert (response.status, response.body) == (200, b"plain")
        if b"HTTP/1.1" in request_bytes:
            assert (await raw.get()).body == b"plain"  # and the connection is kept


async def test_a_session_after_requests() -> None:
    async with serving(Handled(echo)) as server, server.connect() as raw:
        assert (await raw.get()).status == 200
        client = WebSocketClient(raw)
        await client.open()
        await client.send("x")
        assert await client.receive() == "x"


async def test_bytes_behind_the_request_are_frames(hub: str) -> None:
    recorder = Recorder()
    early = frame(TEXT, b"one") + frame(TEXT, b"two") + frame(TEXT, b"thr")[:3]
    async with serving(Handled(recorder), hub=hub) as server:
        async with session(server, early=early) as client:
            await client.raw.send(frame(TEXT, b"thr")[3:])
            await client.close(4321, "done")
            await client.expect_close(4321)
    assert recorder.messages == ["one", "two", "thr", (4321, "done")]


async def test_frames_that_come_before_the_app_accepts(hub: str) -> None:
    """As a client may not, but some do: they wait."""
    recorder = Recorder()
    told = trio.Event()

    async def slow(receive: Any, send: Any) -> None:
        await receive()
        await told.wait()
        await send({"type": "websocket.accept"})
        await recorder(receive, send)

    async with serving(Handled(slow, accept=False), hub=hub) as server, server.connect() as raw:
        await raw.send(handshake() + frame(TEXT, b"one"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        await raw.send(frame(TEXT, b"two") + frame(8))
        await trio.testing.wait_all_tasks_blocked(0.01)
        told.set()
        await raw.receive_all()
    assert recorder.messages == ["one", "two", (1005, "")]


# -- compression ---------------------------------------------------------------------------------------------

OFFERS = [
    # offered, agreed on, and what it means: our window and theirs, and whose contexts are kept
    ("permessage-deflate", "permessage-deflate; server_max_window_bits=12", (12, 15, True, True)),
    (
        "permessage-deflate; client_max_window_bits",
        "permessage-deflate; server_max_window_bits=12; client_max_window_bits=12",
        (12, 12, True, True),
    ),
    (
        "permessage-deflate; client_max_window_bits=10; server_max_window_bits=9",
        "permessage-deflate; server_max_window_bits=9; client_max_window_bits=10",
        (9, 10, True, True),
    ),
    (
        "permessage-deflate; server_no_context_takeover; client_no_context_takeover",
        "permessage-deflate; server_no_context_takeover; client_no_context_takeover; server_max_window_bits=12",
        (12, 15, False, False),
    ),
    ("x-foo, permessage-deflate", "permessage-deflate; server_max_window_bits=12", (12, 15, True, True)),
    # The first is not acceptable: zlib has no raw window of 8 bits.
    (
        "permessage-deflate; server_max_window_bits=8, permessage-deflate",
        "permessage-deflate; server_max_window_bits=12",
        (12, 15, True, True),
    ),
    ("permessage-deflate; server_max_window_bits=16", None, None),
    ("permessage-deflate; foo", None, None),
    ("permessage-deflate; server_no_context_takeover=1", None, None),
    ("x-webkit-deflate-frame", None, None),
]


@pytest.mark.parametrize(("offer", "answer", "meaning"), OFFERS)
def test_compression_is_agreed_on(offer: str, answer: str | None, meaning: Any) -> None:
    request = WebSocketRequest(b"/", "1.1", [(b"sec-websocket-extensions", offer.encode())])
    agreed = agree_compression(request, "on")
    if answer is None:
        assert agreed is None
        return
    assert agreed is not None
    assert agreed.answer.decode() == answer
    deflater, inflater = agreed.deflater, agreed.inflater
    assert (deflater._bits, inflater._bits, deflater._keep, inflater._keep) == meaning
    assert agree_compression(request, "off") is None


def test_offers_without_end_are_declined_unread() -> None:
    for size, lines in ((1024, 1), (1026, 1), (60_000, 1), (40, 100)):
        # What could be agreed on stands last.
        field = (b"a," * size)[: size - 18] + b"permessage-deflate"
        request = WebSocketRequest(b"/", "1.1", [(b"sec-websocket-extensions", field)] * lines)
        assert (agree_compression(request, "on") is not None) is (size * lines <= 1024)


def test_contextless_compression_asks_for_as_much() -> None:
    request = WebSocketRequest(b"/", "1.1", [(b"sec-websocket-extensions", b"permessage-deflate")])
    agreed = agree_compression(request, "contextless")
    assert agreed is not None
    assert b"server_no_context_takeover; client_no_context_takeover" in agreed.answer
    assert not agreed.deflater._keep
    assert not agreed.inflater._keep


@pytest.mark.parametrize("mode", ["on", "contextless"])
async def test_compressed_both_ways(mode: str) -> None:
    async with serving(Handled(echo), websocket_compression=mode) as server:
        async with session(server, deflate="permessage-deflate; client_max_window_bits") as client:
            for number in range(10):
                for data in (
                    "some text that repeats itself, " * 20 + str(number),
                    bytes([number]) * 5000,
                    "short",
                ):
                    await client.send(data)
                    assert await client.receive() == data
            before = client.raw
            await client.close()
            await client.expect_close(1000)
            assert before.received == b""


async def test_compression_is_off_unless_asked_for() -> None:
    async with serving(Handled(echo)) as server:
        async with session(server, deflate="permessage-deflate") as client:
            assert client.response.header("sec-websocket-extensions") is None
