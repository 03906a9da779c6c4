"""send(): which event may follow which, what may stand in them, and the named error for everything else."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import pytest
import trio
import trio.testing

from trioserve import testing
from trioserve.errors import (
    AppMisuse,
    ConcurrentCall,
    IncompleteResponse,
    InvalidResponse,
    UnexpectedMessage,
    WrongContentLength,
)
from trioserve.testing import Response, encode_request

from ..apps import respond
from ..waiting import until_blocked

pytestmark = pytest.mark.modes("tls", "http2")

serving = functools.partial(testing.serving, lifespan="off", on_app_error="contain")

Event = dict[str, Any]


def start(status: Any = 200, *headers: tuple[Any, Any], **more: Any) -> Event:
    return {"type": "http.response.start", "status": status, "headers": list(headers), **more}


def body(data: Any = b"", more: bool = False) -> Event:
    return {"type": "http.response.body", "body": data, "more_body": more}


def trailers(*headers: Any, more: bool = False) -> Event:
    return {"type": "http.response.trailers", "headers": headers, "more_trailers": more}


class Sender:
    """An app that sends `events` and keeps the exception that stopped it."""

    def __init__(self, events: Sequence[Any]) -> None:
        self.events = events
        self.error: BaseException | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/ok":
            await respond(send)
            return
        try:
            for event in self.events:
                await send(event)
        except Exception as error:
            self.error = error
            raise


async def answer_to(
    *events: Any, method: str = "GET", version: str = "1.1", headers: Any = (), **settings: Any
) -> Response:
    """The response that these events make; none of them may be refused."""
    app = Sender(events)
    async with serving(app, **settings) as server, server.connect() as client:
        await client.send(encode_request(method, headers=headers, version=version))
        response = await client.read_response(method)
        if response.header("connection") != "close":
            assert (await client.get("/ok")).body == b"hello"  # it was framed as it should
        assert not server.worker.context.counters.faults
    assert app.error is None
    return response


# -- misuse --------------------------------------------------------------------------------------------------

LENGTH = (b"content-length", b"3")

MISUSE: dict[str, tuple[list[Any], type[AppMisuse], str]] = {
    # what may follow what
    "body before start": (
        [body(b"x")],
        UnexpectedMessage,
        "'http.response.body' while the response is none; expected 'http.response.start'",
    ),
    "start twice": (
        [start(), start()],
        UnexpectedMessage,
        "'http.response.start' while the response is held; expected 'http.response.body'",
    ),
    "start after body": (
        [start(), body(b"x", True), start()],
        UnexpectedMessage,
        "'http.response.start' while the response is streaming; expected 'http.response.body'",
    ),
    "body after the end": (
        [start(), body(b"x"), body(b"y")],
        UnexpectedMessage,
        "'http.response.body' while the response is complete; expected nothing",
    ),
    "unannounced trailers": (
        [start(), body(b"x", True), trailers()],
        UnexpectedMessage,
        "'http.response.trailers' while the response is streaming",
    ),
    "body after trailers were due": (
        [start(trailers=True), body(b"x"), body(b"y")],
        UnexpectedMessage,
        "'http.response.body' while the response is trailers; expected 'http.response.trailers'",
    ),
    "hint after start": (
        [start(), {"type": "http.response.early_hint", "links": []}],
        UnexpectedMessage,
        "'http.response.early_hint' while the response is held",
    ),
    "debug that is not offered": (
        [{"type": "http.response.debug", "info": {}}],
        UnexpectedMessage,
        "'http.response.debug'",
    ),
    "another protocol's event": ([{"type": "websocket.accept"}], UnexpectedMessage, "'websocket.accept'"),
    # the shape of an event
    "no type": ([{"status": 200}], UnexpectedMessage, "takes a dict with a 'type', not {'status': 200}"),
    "no dict": ([b"hello"], UnexpectedMessage, "takes a dict with a 'type', not b'hello'"),
    "no status": ([{"type": "http.response.start"}], UnexpectedMessage, "needs a 'status'"),
    "body as text": ([start(), body("text")], UnexpectedMessage, "'body' must be bytes, not str"),
    "a long body as text": ([start(), body("text" * 9999)], UnexpectedMessage, "must be bytes, not str"),
    "a later body as text": ([start(), body(b"1", True), body("2")], UnexpectedMessage, "not str"),
    "body None": ([start(), body(None)], UnexpectedMessage, "must be bytes, not NoneType"),
    "body as a list": ([start(), body([b"a"], True)], UnexpectedMessage, "must be bytes, not list"),
    # the response head
    "status as text": ([start("200")], InvalidResponse, "status must be an int from 200 to 999, not '200'"),
    "status 100": ([start(100)], InvalidResponse, "not 100"),
    "status 1000": ([start(1000)], InvalidResponse, "not 1000"),
    "status True": ([start(True)], InvalidResponse, "not True"),
    "status as a list": ([start([200])], InvalidResponse, ""),
    "headers None": ([{**start(), "headers": None}], InvalidResponse, "pairs of bytes"),
    "headers a dict": ([{**start(), "headers": {b"a": b"b"}}], InvalidResponse, "pairs of bytes"),
    "name as text": ([start(200, ("x", b"1"))], InvalidResponse, "'x'"),
    "value as text": ([start(200, (b"x", "1"))], InvalidResponse, "bytes"),
    "name with a space": ([start(200, (b"x y", b"1"))], InvalidResponse, "not a field name"),
    "empty name": ([start(200, (b"", b"1"))], InvalidResponse, "not a field name"),
    "CRLF in a value": ([start(200, (b"x", b"1\r\ny: 2"))], InvalidResponse, "cannot contain CR, LF or NUL"),
    "LF in a value": ([start(200, (b"x", b"1\ny"))], InvalidResponse, "cannot contain CR, LF or NUL"),
    "NUL in a value": ([start(200, (b"x", b"\0"))], InvalidResponse, "cannot contain CR, LF or NUL"),
    "length that is none": ([start(200, (b"content-length", b"-1"))], InvalidResponse, "is no length"),
    "length twice": ([start(200, LENGTH, LENGTH)], InvalidResponse, "twice"),
    "hop-by-hop": ([start(200, (b"Proxy-Connection", b"x"))], InvalidResponse, "the server's to set"),
    "transfer coding": ([start(200, (b"transfer-encoding", b"gzip"))], InvalidResponse, "frames the body"),
    "connection option": (
        [start(200, (b"connection", b"x-mine"))],
        InvalidResponse,
        "concerns the connection",
    ),
    # the length of the body
    "too long at once": ([start(200, LENGTH), body(b"1234")], WrongContentLength, "more than 4 bytes where"),
    "too short at once": ([start(200, LENGTH), body(b"1")], WrongContentLength, "only 1 bytes where"),
    "too long in the end": (
        [start(200, LENGTH), body(b"12", True), body(b"34", True)],
        WrongContentLength,
        "more than 4 bytes where content-length says 3",
    ),
    "too short in the end": (
        [start(200, LENGTH), body(b"12", True), body(b"")],
        WrongContentLength,
        "only 2 bytes where content-length says 3",
    ),
    "a body for 204": ([start(204), body(b"x")], WrongContentLength, "a 204 response has no body"),
    "a body for 304": (
        [start(304), body(b"", True), body(b"x")],
        WrongContentLength,
        "a 304 response has no",
    ),
    # rarer events
    "hints that are text": (
        [{"type": "http.response.early_hint", "links": ["</a>"]}],
        InvalidResponse,
        "bytes",
    ),
    "hints None": ([{"type": "http.response.early_hint", "links": None}], InvalidResponse, "pairs of bytes"),
    "hints with CRLF": (
        [{"type": "http.response.early_hint", "links": [b"</a>\r\nx: 1"]}],
        InvalidResponse,
        "cannot contain CR, LF or NUL",
    ),
    "trailers None": (
        [start(trailers=True), body(), {**trailers(), "headers": None}],
        InvalidResponse,
        "pairs of bytes",
    ),
    "trailers of three": (
        [start(trailers=True), body(), trailers((b"a", b"b", b"c"))],
        InvalidResponse,
        "pairs of bytes",
    ),
    "trailers that frame": (
        [start(trailers=True), body(), trailers((b"content-length", b"1"))],
        InvalidResponse,
        "not allowed in trailers",
    ),
}


@pytest.mark.modes("tls", because="it reads HTTP/1 on the wire")
@pytest.mark.parametrize("case", MISUSE)
async def test_misuse_is_a_named_error_and_the_client_can_see_it(case: str) -> None:
    events, error_type, words = MISUSE[case]
    app = Sender(events)
    async with serving(app) as server:
        async with server.connect() as client:
            await client.send(encode_request("GET", headers=[("te", "trailers")]))
            received = await client.receive_all()
        assert (await server.get("/ok")).status == 200
        assert server.worker.context.counters.faults == {"A5": 1}
    assert type(app.error) is error_type
    assert words in str(app.error)
    if len(events) == 1 or b"500" in received:
        assert received.startswith(b"HTTP/1.1 500 ")
        assert b"\r\nconnection: close\r\n" in received
    elif case != "body after the end":
        assert not received.endswith(b"0\r\n\r\n")  # neither a last chunk …
        assert not received.endswith(b"\r\n\r\n123")  # … nor a whole length


@pytest.mark.parametrize(
    "events, words",
    [
        ([], "returned without sending a response"),
        ([start()], "returned while its response was held"),
        ([start(), body(b"x", True)], "returned while its response was streaming"),
        ([start(trailers=True), body(b"x")], "returned while its response was trailers"),
    ],
)
async def test_an_app_that_returns_too_early_is_incomplete_response(events: list[Event], words: str) -> None:
    faults: list[Any] = []
    async with serving(Sender(events)) as server:
        server.worker.context.boundary.on_report = faults.append
        async with server.connect() as client:
            response = await client.get()
        assert response.status == (500 if len(events) < 2 else 200)
        assert response.complete is (len(events) < 2)
    assert faults[0]["row"] == "A5"
    assert IncompleteResponse.__name__ in faults[0]["summary"]
    assert words in faults[0]["summary"]


async def test_two_tasks_in_send_is_concurrent_call() -> None:
    errors: list[Exception] = []
    done = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, body(bytes(16 * 1024 * 1024), True))
            await trio.testing.wait_all_tasks_blocked(0.01)
            try:
                await send(body(b"x", True))
            except ConcurrentCall as error:
                errors.append(error)
            nursery.cancel_scope.cancel()
        done.set()

    async with serving(app) as server, server.connect(receive_buffer=4096) as client:
        await client.send(encode_request("GET"))
        with trio.fail_after(30):
            await done.wait()
    assert "send() was called while another task" in str(errors[0])


async def test_a_last_part_whose_sending_was_cancelled_is_still_sent(hub: str) -> None:
    """The app has said all that it had to say; giving up the wait takes nothing back."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        async with until_blocked() as scope_:
            await send(body(bytes(16 * 1024 * 1024)))
        assert scope_.cancelled_caught
        given_up.set()

    given_up = trio.Event()
    async with serving(app, hub=hub) as server, server.connect() as client:
        await client.send(encode_request("GET"))
        await given_up.wait()
        await client.receive_until(b"\r\n\r\n")
        total = len(client.received)
        while total < 16 * 1024 * 1024:
            total += len(await client.receive(1024 * 1024))
        (connection,) = server.worker.context.connections
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert connection.phase == "keep_alive"
    assert server.failure is None


async def test_a_header_value_is_not_shown_in_an_error() -> None:
    app = Sender([start(200, (b"set-cookie", b"token=hunter2\n"))])
    async with serving(app) as server:
        await server.get()
    assert "set-cookie" in str(app.error)
    assert "hunter2" not in str(app.error)


# -- what may be sent ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [b"bytes", bytearray(b"bytes"), memoryview(b"bytes"), memoryview(b"xbytesx")[1:6]]
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_body_may_be_anything_like_bytes(data: Any, streamed: bool) -> None:
    events = [start(), body(data, True), body(data)] if streamed else [start(), body(data)]
    assert (await answer_to(*events)).body == b"bytes" * len(events[1:])


async def test_a_memoryview_of_wider_items_counts_in_bytes() -> None:
    wide = memoryview(b"12345678").cast("I")
    assert (await answer_to(start(), body(wide))).header("content-length") == "8"
    assert (await answer_to(start(), body(wide, True), body())).body == b"12345678"


async def test_a_part_that_the_app_changes_afterwards_is_sent_as_it_was() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        buffer = bytearray(b"before")
        await send(start())
        await send(body(buffer, True))
        buffer[:] = b"after!"
        await send(body())

    async with serving(app) as server:
        assert (await server.get()).body == b"before"


async def test_defaults_of_the_specification() -> None:
    response = await answer_to(
        {"type": "http.response.start", "status": HTTPStatus.CREATED}, {"type": "http.response.body"}
    )
    assert (response.status, response.body, response.header("content-length")) == (201, b"", "0")


async def test_headers_may_come_from_any_iterable() -> None:
    event = {**start(), "headers": iter([(b"x-one", b"1"), [b"x-two", b"2"]])}
    response = await answer_to(event, body())
    assert (response.header("x-one"), response.header("x-two")) == ("1", "2")


async def test_a_status_without_a_registered_phrase() -> None:
    assert (await answer_to(start(299), body(b"x"))).status == 299


@pytest.mark.parametrize("wanted", [True, False])
async def test_trailers_go_to_a_client_that_takes_them_and_are_dropped_for_others(wanted: bool) -> None:
    events = [
        start(trailers=True), body(b"1", True), body(b"2"),
        trailers((b"x-sum", b"3"), more=True), trailers((b"x-end", b"4")),
    ]  # fmt: skip
    response = await answer_to(*events, headers=[("te", "trailers")] if wanted else ())
    assert response.body == b"12"
    assert response.trailers == ([(b"x-sum", b"3"), (b"x-end", b"4")] if wanted else [])


async def test_early_hints_go_out_before_the_response() -> None:
    go_on = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.early_hint", "links": [b"</a.css>; rel=preload", b"</b>"]})
        await go_on.wait()
        await respond(send)

    async with serving(app) as server, server.connect() as client:
        await client.send(encode_request("GET"))
        hints = await client.receive_until(b"\r\n\r\n")
        assert hints == b"HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\nlink: </b>\r\n\r\n"
        go_on.set()
        assert (await client.read_response()).body == b"hello"


async def test_the_debug_event_is_taken_where_it_is_offered() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append("http.response.debug" in scope["extensions"])
        await send({"type": "http.response.debug", "info": {"template": "x.html"}})
        seen.append(send.__self__.debug_info)
        await respond(send)

    async with serving(app, debug_extension=True) as server:
        assert (await server.get()).status == 200
    assert seen == [True, {"template": "x.html"}]
