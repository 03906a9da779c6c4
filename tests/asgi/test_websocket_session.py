"""What an app may send and receive on a WebSocket, state by state; every misuse is an error that says what is wrong."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import trio

from trioserve import testing
from trioserve.asgi.websocket_session import check_close
from trioserve.errors import ClientDisconnected, ConcurrentCall, InvalidResponse, UnexpectedMessage
from trioserve.testing import no_leaks

from ..http.websocket_apps import Handled, echo, text
from ..http.websocket_client import Closed, handshake, session

serving = functools.partial(testing.serving, lifespan="off", linger_timeout=0.2, on_app_error="contain")

ACCEPT = {"type": "websocket.accept"}
CLOSE = {"type": "websocket.close"}


async def misuse(events: list[Any], expected: type[Exception], *, status: int) -> str:
    """Have an app send events, of which the last must raise; the client is answered with `status`; the message."""
    said: list[str] = []

    async def app(receive: Any, send: Any) -> None:
        await receive()
        for event in events[:-1]:
            await send(event)
        with pytest.raises(expected) as caught:
            await send(events[-1])
        said.append(str(caught.value))
        raise caught.value

    async with no_leaks(), serving(Handled(app, accept=False)) as server, server.connect() as raw:
        await raw.send(handshake())
        answer = await raw.receive_all() if status != 101 else await raw.receive_until(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer
        if status == 101:
            rest = raw.received or await raw.receive()
            assert rest == b"\x88\x02\x03\xf3" or events[-2] == CLOSE  # 1011
            raw.close()
        await server.wait_idle()
        assert server.worker.context.counters.faults == {"A5": 1}
    return said[0]


NOT_EVENTS = [None, "websocket.accept", {}, {"typ": "websocket.accept"}, []]


@pytest.mark.parametrize("event", NOT_EVENTS)
async def test_what_is_no_event(event: Any) -> None:
    assert "'type'" in await misuse([event], UnexpectedMessage, status=500)


@pytest.mark.parametrize(
    "event",
    [
        text("too soon"),
        {"type": "websocket.foo"},
        {"type": "http.response.start", "status": 200},
        {"type": "websocket.http.response.body", "body": b""},
        {"type": "websocket.receive", "text": ""},
    ],
)
async def test_before_accepting(event: Any) -> None:
    said = await misuse([event], UnexpectedMessage, status=500)
    assert said == (
        f"send() got {event['type']!r} while the WebSocket is connecting; expected 'websocket.accept', "
        "'websocket.close' or 'websocket.http.response.start'"
    )


@pytest.mark.parametrize(
    "event",
    [
        ACCEPT,
        {"type": "websocket.http.response.start", "status": 200},
        {"type": "http.response.body"},
        {"type": None},
    ],
)
async def test_when_open(event: Any) -> None:
    said = await misuse([ACCEPT, event], UnexpectedMessage, status=101)
    assert said == (
        f"send() got {event['type']!r} while the WebSocket is open; expected 'websocket.send' or 'websocket.close'"
    )


BAD_SENDS = [
    ({}, "'websocket.send' needs 'bytes' or 'text'"),
    ({"text": None, "bytes": None}, "'websocket.send' needs 'bytes' or 'text'"),
    ({"text": b"bytes"}, "'text' of 'websocket.send' must be a str, not bytes"),
    ({"text": 5}, "'text' of 'websocket.send' must be a str, not int"),
    ({"bytes": "text"}, "'bytes' of 'websocket.send' must be bytes, not str"),
    ({"text": "\ud800"}, "'text' of 'websocket.send' has lone surrogates: it is no valid text"),
]


@pytest.mark.parametrize(("event", "message"), BAD_SENDS)
async def test_what_cannot_be_sent(event: Any, message: str) -> None:
    assert (
        await misuse([ACCEPT, {"type": "websocket.send", **event}], UnexpectedMessage, status=101) == message
    )


BAD_CLOSES = [
    ({"code": 999}, "not 999"),
    ({"code": 1004}, "not 1004"),
    ({"code": 1005}, "not 1005"),
    ({"code": 1006}, "not 1006"),
    ({"code": 1015}, "not 1015"),
    ({"code": 2999}, "not 2999"),
    ({"code": 5000}, "not 5000"),
    ({"code": "1000"}, "not '1000'"),
    ({"reason": b"bytes"}, "must be a str, not bytes"),
    ({"reason": "ä" * 62}, "has 124 bytes; 123 are the most"),
    ({"reason": "\ud800"}, "has lone surrogates"),
]


@pytest.mark.parametrize(("event", "message"), BAD_CLOSES)
async def test_what_cannot_close(event: Any, message: str) -> None:
    with pytest.raises(UnexpectedMessage, match=message):
        check_close({**CLOSE, **event})
    assert message in await misuse([ACCEPT, {**CLOSE, **event}], UnexpectedMessage, status=101)


def test_what_can_close() -> None:
    assert check_close(CLOSE) == (1000, "")
    assert check_close({"code": None, "reason": None}) == (1000, "")
    assert check_close({"code": 3000, "reason": "ä" * 61}) == (3000, "ä" * 61)
    for code in (1000, 1001, 1002, 1003, *range(1007, 1015), 3000, 4999):
        assert check_close({"code": code}) == (code, "")


@pytest.mark.parametrize("event", [text("more"), CLOSE, ACCEPT])
async def test_after_closing(event: Any) -> None:
    said = await misuse([ACCEPT, CLOSE, event], UnexpectedMessage, status=101)
    assert (
        said
        == f"send() got {event['type']!r} while the WebSocket is closed; expected nothing: the app has closed it"
    )


@pytest.mark.parametrize("event", [ACCEPT, CLOSE, text("x")])
async def test_after_denying(event: Any) -> None:
    said = await misuse([CLOSE, event], UnexpectedMessage, status=403)
    assert "while the WebSocket is closed" in said


BAD_ACCEPTS = [
    ({"subprotocol": "chat"}, "subprotocol 'chat' was not offered by the client: none"),
    ({"subprotocol": b"chat"}, "was not offered"),
    ({"headers": [(b"sec-websocket-protocol", b"chat")]}, "a subprotocol has a key of its own"),
    ({"headers": [(b"Sec-WebSocket-Accept", b"x")]}, "the server's to set"),
    ({"headers": [(b"sec-websocket-extensions", b"x")]}, "the server's to set"),
    ({"headers": [(b"upgrade", b"x")]}, "the server's to set"),
    ({"headers": [(b"connection", b"close")]}, "not allowed"),
    ({"headers": [(b"content-length", b"0")]}, "not allowed"),
    ({"headers": [(b"transfer-encoding", b"chunked")]}, "not allowed"),
    ({"headers": [(b"x", b"a\r\nset-cookie: b=c")]}, "cannot contain CR, LF or NUL"),
    ({"headers": [(b"x\r\ny", b"a")]}, "not a field name"),
    ({"headers": [(b"x: y", b"a")]}, "not a field name"),
    ({"headers": [("x", "y")]}, "not a field name"),
    ({"headers": [(b"x", "y")]}, "values must be bytes"),
    ({"headers": [b"x: y"]}, "pairs of bytes"),
    ({"headers": 5}, "pairs of bytes in a list, not int"),
]


@pytest.mark.parametrize(("event", "message"), BAD_ACCEPTS)
async def test_what_cannot_accept(event: Any, message: str) -> None:
    assert message in await misuse([{**ACCEPT, **event}], InvalidResponse, status=500)


async def test_accept_with_fields_and_a_subprotocol() -> None:
    async def app(receive: Any, send: Any) -> None:
        await receive()
        headers = [(b"Set-Cookie", b"a=b"), [b"x-list", b""], (b"date", b"now"), (b"server", b"mine")]
        await send({**ACCEPT, "subprotocol": "v2.chat", "headers": iter(headers)})
        await echo(receive, send)

    handled = Handled(app, accept=False)
    offers = [(b"sec-websocket-protocol", b"v1.chat, v2.chat,"), (b"Sec-WebSocket-Protocol", b" ,v3")]
    async with serving(handled) as server, session(server, extra=offers) as client:
        assert client.response.header("sec-websocket-protocol") == "v2.chat"
        assert client.response.header("set-cookie") == "a=b"
        assert client.response.header("x-list") == ""
        assert [value for name, value in client.response.headers if name.lower() == b"date"] == [b"now"]
        assert [value for name, value in client.response.headers if name.lower() == b"server"] == [b"mine"]
    assert handled.scopes[0]["subprotocols"] == ["v1.chat", "v2.chat", "v3"]


# -- denying -------------------------------------------------------------------------------------------------


async def test_close_before_accepting_is_403(hub: str) -> None:
    told: list[Any] = []

    async def app(receive: Any, send: Any) -> None:
        await send({**CLOSE, "code": 1008, "reason": [{"type": "FastAPI's, and never sent"}]})
        told.extend([await receive(), await receive(), await receive()])

    async with no_leaks(), serving(Handled(app, accept=False), hub=hub) as server, server.connect() as raw:
        await raw.send(handshake())
        response = await raw.read_response()
        assert (response.status, response.body) == (403, b"403 Forbidden\n")
        assert response.header("connection") == "close"
        assert await raw.receive() == b""
    disconnect = {"type": "websocket.disconnect", "code": 1006, "reason": ""}
    assert told == [{"type": "websocket.connect"}, disconnect, disconnect]


async def test_a_denial_in_parts() -> None:
    async def app(receive: Any, send: Any) -> None:
        await receive()
        headers = [(b"content-type", b"text/plain"), (b"www-authenticate", b"Basic")]
        await send({"type": "websocket.http.response.start", "status": 401, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": b"one ", "more_body": True})
        await send({"type": "websocket.http.response.body", "body": b"two"})
        assert await receive() == {"type": "websocket.disconnect", "code": 1006, "reason": ""}

    handled = Handled(app, accept=False)
    async with no_leaks(), serving(handled) as server, server.connect() as raw:
        await raw.send(handshake())
        response = await raw.read_response()
        assert (response.status, response.body, response.complete) == (401, b"one two", True)
        assert response.header("transfer-encoding") == "chunked"
        assert response.header("www-authenticate") == "Basic"
        assert await raw.receive() == b""
    assert handled.outcomes == [None]
    assert server.failure is None


@pytest.mark.parametrize(
    ("events", "status"),
    [
        ([{"type": "websocket.http.response.start"}], 500),
        ([{"type": "websocket.http.response.start", "status": 99}], 500),
        ([{"type": "websocket.http.response.start", "status": 403}, ACCEPT], 500),
        ([{"type": "websocket.http.response.start", "status": 403}, CLOSE], 500),
    ],
)
async def test_denials_that_are_none(events: list[Any], status: int) -> None:
    await misuse(events, UnexpectedMessage if "99" not in str(events) else InvalidResponse, status=status)


async def test_a_denial_is_cut_when_the_app_dies_in_it() -> None:
    async def app(receive: Any, send: Any) -> None:
        await send({"type": "websocket.http.response.start", "status": 403})
        await send({"type": "websocket.http.response.body", "body": b"one", "more_body": True})
        raise RuntimeError("in the middle")

    async with serving(Handled(app, accept=False)) as server, server.connect() as raw:
        await raw.send(handshake())
        response = await raw.read_response()
        assert (response.status, response.complete) == (403, False)
        assert server.worker.context.counters.faults == {"A2": 1}


# -- receiving -----------------------------------------------------------------------------------------------


async def test_messages_have_both_keys() -> None:
    told: list[Any] = []

    async def app(receive: Any, send: Any) -> None:
        told.extend([await receive() for _ in range(3)])

    async with serving(Handled(app)) as server, session(server) as client:
        await client.send("text")
        await client.send(b"bytes")
        await client.close(3456, "über")
        await client.expect_close(3456, "über")
    assert told == [
        {"type": "websocket.receive", "text": "text", "bytes": None},
        {"type": "websocket.receive", "text": None, "bytes": b"bytes"},
        {"type": "websocket.disconnect", "code": 3456, "reason": "über"},
    ]


async def test_only_one_task_may_receive(hub: str) -> None:
    async def app(receive: Any, send: Any) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(ConcurrentCall, match="receive"):
                await receive()
            await send(text("now"))

    async with serving(Handled(app), hub=hub) as server, session(server) as client:
        assert await client.receive() == "now"
        await client.send("on")
        await client.expect_close(1000)
        assert server.failure is None


async def test_a_cancelled_receive_loses_nothing(hub: str) -> None:
    told: list[Any] = []

    async def app(receive: Any, send: Any) -> None:
        for _ in range(3):
            with trio.CancelScope() as scope:
                scope.cancel()
                told.append(await receive())
        with trio.move_on_after(0.01):
            told.append(await receive())
        await send(text("ready"))
        told.append((await receive())["text"])

    async with serving(Handled(app), hub=hub) as server, session(server) as client:
        assert await client.receive() == "ready"
        await client.send("kept")
        await client.expect_close(1000)
    assert told == ["kept"]


async def test_receiving_in_one_task_while_another_accepts(hub: str) -> None:
    """As Quart does."""
    told: list[Any] = []

    async def app(receive: Any, send: Any) -> None:
        async def read() -> None:
            while True:
                told.append(await receive())
                if told[-1]["type"] == "websocket.disconnect":
                    break

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await send(ACCEPT)

    async with serving(Handled(app, accept=False), hub=hub) as server, session(server) as client:
        await client.send("one")
        await client.close()
        await client.expect_close(1000)
    assert [message["type"].rpartition(".")[2] for message in told] == ["connect", "receive", "disconnect"]


async def test_receiving_in_one_task_while_another_closes(hub: str) -> None:
    told: list[Any] = []

    async def app(receive: Any, send: Any) -> None:
        async def read() -> None:
            told.append(await receive())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await send({**CLOSE, "code": 4001, "reason": "enough"})

    async with serving(Handled(app), hub=hub) as server, session(server) as client:
        await client.expect_close(4001, "enough")
    assert told == [{"type": "websocket.disconnect", "code": 4001, "reason": "enough"}]


async def test_who_asks_again_after_the_end_is_told_again_and_lets_others_run() -> None:
    turns = 0

    async def app(receive: Any, send: Any) -> None:
        nonlocal turns
        await send(CLOSE)

        async def others() -> None:
            nonlocal turns
            for _ in range(10):
                await trio.lowlevel.checkpoint()
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(others)
            while turns < 10:
                assert (await receive())["type"] == "websocket.disconnect"

    async with serving(Handled(app)) as server, session(server) as client:
        await client.expect_close(1000)


async def test_a_send_or_receive_that_never_waits_gives_way(hub: str) -> None:
    turns = 0

    async def app(receive: Any, send: Any) -> None:
        nonlocal turns

        async def others() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(others)
            for _ in range(2000):
                await send(text(""))
            assert turns >= 3
            turns = 0
            for _ in range(2000):
                await receive()
            assert turns >= 3
            nursery.cancel_scope.cancel()

    async with serving(Handled(app), hub=hub) as server, session(server) as client:
        for _ in range(2000):
            await client.send("")
        for _ in range(2000):
            assert await client.receive() == ""
        await client.expect_close(1000)


# -- the peer has gone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [text("x"), {"type": "websocket.send", "bytes": b""}, CLOSE])
async def test_send_after_the_peer_has_closed(event: Any, hub: str) -> None:
    async def app(receive: Any, send: Any) -> None:
        assert (await receive())["code"] == 1001
        with pytest.raises(ClientDisconnected, match=r"the WebSocket is closed \(1001 away\)") as caught:
            await send(event)
        assert isinstance(caught.value, OSError)
        raise caught.value  # which is no error of the app's

    handled = Handled(app)
    async with no_leaks(), serving(handled, hub=hub) as server, session(server) as client:
        await client.close(1001, "away")
        await client.expect_close(1001)
        await server.wait_idle()
        assert server.worker.context.counters.faults == {"C2": 1}
    assert isinstance(handled.outcomes[0], ClientDisconnected)


async def test_an_app_that_makes_an_error_of_the_disconnect_is_not_to_blame() -> None:
    async def app(receive: Any, send: Any) -> None:
        await receive()
        raise RuntimeError("WebSocketDisconnect, of some framework")

    async with serving(Handled(app), on_app_error="replace") as server, session(server) as client:
        await client.close(1001)
        assert await client.receive() == Closed(1001, "")
        await server.wait_idle()
        assert server.worker.context.counters.faults == {"C2": 1}
        assert server.failure is None


async def test_gone_before_it_was_accepted(hub: str) -> None:
    told: list[Any] = []

    async def app(receive: Any, send: Any) -> None:
        await receive()
        told.append(await receive())
        with pytest.raises(ClientDisconnected):
            await send(ACCEPT)

    handled = Handled(app, accept=False)
    async with no_leaks(), serving(handled, hub=hub) as server, server.connect() as raw:
        await raw.send(handshake())
        await trio.testing.wait_all_tasks_blocked(0.01)
        raw.close()
        await handled.ended.wait()
        await server.wait_idle()
        assert set(server.worker.context.counters.faults) <= {"C2"}
    assert told == [{"type": "websocket.disconnect", "code": 1006, "reason": ""}]
