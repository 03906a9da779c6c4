"""Sessions over HTTP/1.1 from beginning to end: who closes and how, hostile frames, back-pressure, drains, errors."""

from __future__ import annotations

import functools
import logging
import socket
from typing import Any

import pytest
import trio
import trio.testing

from trioserve import testing
from trioserve.errors import ClientDisconnected
from trioserve.testing import no_leaks

from ..waiting import until_blocked
from .test_websocket_frames import COMPRESSED_FAULTS, FAULTS, LIMIT, small_bombs
from .websocket_apps import Handled, Recorder, echo, text, wait_for_ever
from .websocket_client import (
    BINARY,
    CLOSE,
    CONT,
    PING,
    PONG,
    TEXT,
    Closed,
    close_payload,
    frame,
    handshake,
    session,
)

serving = functools.partial(testing.serving, lifespan="off", linger_timeout=0.2)


# -- messages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 300_000, 4_000_000])
async def test_echo_of_any_size(size: int, hub: str) -> None:
    async with no_leaks(), serving(Handled(echo), hub=hub) as server, session(server) as client:
        data = bytes(range(256)) * (size // 256 + 1)
        for message in (data[:size], "ä" * (size // 2)):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.send, message)
                assert await client.receive() == message
        await client.close()
        await client.expect_close(1000)


async def test_echo_of_every_split(hub: str) -> None:
    wire = (
        frame(TEXT, b"a", fin=False)
        + frame(PING, b"p")
        + frame(CONT, "ä".encode())
        + frame(BINARY, b"x" * 200)
    )
    async with serving(Handled(echo), hub=hub) as server, session(server) as client:
        for cut in range(0, len(wire), 7):
            await client.raw.send(wire[:cut])
            await trio.testing.wait_all_tasks_blocked(0.001)
            await client.raw.send(wire[cut:])
            assert await client.receive() == "aä"
            assert await client.receive() == b"x" * 200
    assert set(client.pongs) == {b"p"}


async def test_pings_are_answered_whatever_the_app_does() -> None:
    async with serving(Handled(wait_for_ever)) as server, session(server) as client:
        for number in range(3):
            await client.send("unread")
            await client.send_frame(PING, b"%d" % number)
            assert await client.receive_pong() == b"%d" % number
        await client.raw.send(b"".join(frame(PING, b"%d" % number) for number in range(10)))
        assert [await client.receive_pong() for _ in range(10)] == [b"%d" % number for number in range(10)]


async def test_controls_are_heard_however_many_there_were() -> None:
    """An app that only sends, and a client whose pongs come to more than is read ahead, after some days."""
    async with serving(Handled(wait_for_ever)) as server, session(server) as client:
        await client.send("unread")
        for _ in range(5):
            await client.raw.send(frame(PONG, b"p" * 10) * 1000)
            await trio.testing.wait_all_tasks_blocked(0.01)
        await client.send_frame(PING, b"still there?")
        with trio.fail_after(30):
            assert await client.receive_pong() == b"still there?"
            await client.close()
            await client.expect_close(1000)


async def test_unasked_pongs_are_ignored(hub: str) -> None:
    async with serving(Handled(echo), hub=hub) as server, session(server) as client:
        await client.send_frame(PONG, b"nobody asked")
        await client.send("x")
        assert await client.receive() == "x"


# -- closing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "told", "answer"),
    [
        (close_payload(1000), (1000, ""), 1000),
        (close_payload(1001, "the page is left"), (1001, "the page is left"), 1001),
        (close_payload(4999, "ä" * 61), (4999, "ä" * 61), 4999),
        (b"", (1005, ""), 1005),
    ],
)
async def test_the_client_closes(payload: bytes, told: Any, answer: int, hub: str) -> None:
    recorder = Recorder()
    async with no_leaks(), serving(Handled(recorder), hub=hub) as server, session(server) as client:
        await client.send("last")
        await client.send_frame(CLOSE, payload)
        event = await client.receive()
        assert (event.code, event.reason) == (answer, told[1])
        await client.expect_end()  # it is the server that ends the connection
    assert recorder.messages == ["last", told]


async def test_a_close_behind_unread_messages_is_answered_at_once_and_told_last() -> None:
    recorder = Recorder()
    go = trio.Event()

    async def app(receive: Any, send: Any) -> None:
        await go.wait()
        await recorder(receive, send)

    async with serving(Handled(app)) as server, session(server) as client:
        for number in range(5):
            await client.send(str(number))
        await client.close(1001)
        assert await client.receive() == Closed(1001, "")
        await client.expect_end()
        go.set()
    assert recorder.messages == ["0", "1", "2", "3", "4", (1001, "")]


@pytest.mark.parametrize("how", ["reset", "close", "eof"])
@pytest.mark.parametrize("receiving", [True, False])
async def test_the_client_vanishes(how: str, receiving: bool, hub: str) -> None:
    recorder = Recorder()

    async def app(receive: Any, send: Any) -> None:
        if not receiving:
            await trio.testing.wait_all_tasks_blocked(0.05)
        await recorder(receive, send)

    handled = Handled(app)
    async with no_leaks(), serving(handled, hub=hub) as server, session(server) as client:
        await client.send("last")
        await trio.testing.wait_all_tasks_blocked(0.02)
        {"reset": client.raw.reset, "close": client.raw.close, "eof": client.raw.send_eof}[how]()
        with trio.fail_after(30):
            await handled.ended.wait()
            await server.wait_idle()
        assert server.worker.context.counters.peer_gone == 1
    assert recorder.messages[-1] == (1006, "")
    assert how == "reset" or recorder.messages[0] == "last"


@pytest.mark.parametrize(("event", "code", "reason"), [
    ({}, 1000, ""),
    ({"code": 1001, "reason": None}, 1001, ""),
    ({"code": 4321, "reason": "go away"}, 4321, "go away"),
])  # fmt: skip
async def test_the_app_closes(event: Any, code: int, reason: str, hub: str) -> None:
    told: list[Any] = []

    async def app(receive: Any, send: Any) -> None:
        await send({"type": "websocket.close", **event})
        told.append(await receive())

    async with no_leaks(), serving(Handled(app), hub=hub) as server, session(server) as client:
        await client.expect_close(code, reason)
        await server.wait_idle()
        assert server.worker.context.counters.late == {}
    assert told == [{"type": "websocket.disconnect", "code": code, "reason": reason}]


async def test_what_the_client_still_sends_does_not_destroy_the_close(hub: str) -> None:
    async def app(receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.close", "code": 4000})

    async with no_leaks(), serving(Handled(app), hub=hub) as server, session(server) as client:
        for _ in range(50):
            await client.send("more " * 1000)
        await client.expect_close(4000)


async def test_an_app_that_returns_has_closed(hub: str) -> None:
    async def app(receive: Any, send: Any) -> None:
        await send(text("bye"))

    async with no_leaks(), serving(Handled(app), hub=hub) as server, session(server) as client:
        assert await client.receive() == "bye"
        await client.expect_close(1000, "")
        assert server.failure is None


async def test_an_app_that_returns_without_an_answer() -> None:
    async def app(receive: Any, send: Any) -> None:
        await receive()

    handled = Handled(app, accept=False)
    async with serving(handled, on_app_error="contain") as server, server.connect() as raw:
        await raw.send(handshake())
        assert (await raw.read_response()).status == 500
        assert server.worker.context.counters.faults == {"A5": 1}


async def test_both_close_at_once(hub: str) -> None:
    async def app(receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.close", "code": 4000})

    async with no_leaks(), serving(Handled(app), hub=hub) as server, session(server) as client:
        await client.send("x")
        await client.close(1001)
        event = await client.receive()
        assert event.code in (4000, 1001)
        await client.expect_end()


# -- errors --------------------------------------------------------------------------------------------------


class Broken(Exception):
    """What an app raises."""


@pytest.mark.parametrize("policy", ["contain", "replace"])
async def test_an_error_of_the_app_closes_with_1011(policy: str, hub: str) -> None:
    async def app(receive: Any, send: Any) -> None:
        await receive()
        raise Broken

    async with no_leaks(), serving(Handled(app), hub=hub, on_app_error=policy) as server:
        async with session(server) as client:
            await client.send("x")
            await client.expect_close(1011, "")
        await server.wait_idle()
        assert server.worker.context.counters.faults == {"W1": 1}
        assert (server.failure is None) == (policy == "contain")


async def test_an_error_before_accepting_is_500() -> None:
    async def app(receive: Any, send: Any) -> None:
        raise Broken

    async with serving(Handled(app, accept=False), on_app_error="contain") as server, server.connect() as raw:
        await raw.send(handshake())
        assert (await raw.read_response()).status == 500
        assert server.worker.context.counters.faults == {"A1": 1}


async def test_an_error_after_closing_is_judged_too() -> None:
    async def app(receive: Any, send: Any) -> None:
        await send({"type": "websocket.close", "code": 4000})
        raise Broken

    async with serving(Handled(app), on_app_error="contain") as server, session(server) as client:
        await client.expect_close(4000)
        await server.wait_idle()
        assert server.worker.context.counters.faults == {"W1": 1}


async def test_an_error_that_is_declared_safe() -> None:
    async def app(receive: Any, send: Any) -> None:
        raise Broken

    async with serving(Handled(app), contain_errors=[Broken]) as server, session(server) as client:
        await client.expect_close(1011)
        await server.wait_idle()
        assert server.worker.context.counters.faults == {"A7": 1}
        assert server.failure is None


async def test_system_exit_ends_the_worker() -> None:
    async def app(receive: Any, send: Any) -> None:
        raise SystemExit(5)

    async with serving(Handled(app)) as server, session(server) as client:
        await client.expect_close(1012)
        await server.wait_idle()
        assert server.failure is not None
        assert (server.failure.row, server.failure.exit_code) == ("X1", 5)


async def test_an_app_that_leaves_a_nursery_open() -> None:
    async def app(receive: Any, send: Any) -> None:
        await trio.open_nursery().__aenter__()

    async with serving(Handled(app)) as server, session(server) as client:
        assert await client.receive() == Closed(1011, "")
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert server.failure is not None
        assert server.failure.row == "B1"


# -- hostile frames ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAULTS, *COMPRESSED_FAULTS])
@pytest.mark.parametrize("receiving", [True, False])
async def test_faults_close_with_their_code(name: str, receiving: bool) -> None:
    data, code = {**FAULTS, **COMPRESSED_FAULTS}[name]
    told: list[Any] = []

    async def app(receive: Any, send: Any) -> None:
        if not receiving:
            await trio.testing.wait_all_tasks_blocked(0.02)
        while (message := await receive())["type"] != "websocket.disconnect":
            pass
        told.append(message["code"])
        with pytest.raises(ClientDisconnected):
            await send(text("x"))

    handled = Handled(app)
    settings: Any = {"websocket_max_message_size": LIMIT, "websocket_compression": "on"}
    offer = "permessage-deflate" if name in COMPRESSED_FAULTS else ""
    async with no_leaks(), serving(handled, **settings) as server, session(server, deflate=offer) as client:
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                try:
                    await client.raw.send(data + b"\xff" * 1000)
                except OSError:
                    pass  # it is not listened to any more

            nursery.start_soon(write)
            event = await client.receive()
        assert isinstance(event, Closed), event
        assert event.code == code
        await server.wait_idle()
        assert server.worker.context.counters.refused == {str(code): 1}
        assert server.failure is None
    assert told == [code]


async def test_a_bad_close_is_answered_with_1002(hub: str) -> None:
    recorder = Recorder()
    async with serving(Handled(recorder), hub=hub) as server, session(server) as client:
        await client.send_frame(CLOSE, close_payload(1005))
        await client.expect_close(1002)
    assert recorder.messages[0][0] == 1002


async def test_a_bomb_is_a_message_too_big() -> None:
    import zlib

    state = zlib.compressobj(wbits=-15)
    bomb = (state.compress(bytes(100 << 20)) + state.flush(zlib.Z_SYNC_FLUSH))[:-4]
    recorder = Recorder()
    async with serving(Handled(recorder), websocket_compression="on") as server:
        async with session(server, deflate="permessage-deflate") as client:
            await client.send_frame(BINARY, bomb, rsv=4)
            await client.expect_close(1009)
    assert recorder.messages[0][0] == 1009


@pytest.mark.parametrize("flood", [frame(PING), frame(PONG, b"x" * 125), frame(TEXT), frame(CONT, fin=False)])
async def test_floods_are_bounded(flood: bytes) -> None:
    """A client that sends and does not read can fill no more than the kernel's buffers and a bounded queue."""
    handled = Handled(wait_for_ever)
    first = frame(TEXT, fin=False) if flood == frame(CONT, fin=False) else b""
    async with serving(handled, disconnect_grace=0) as server, session(server) as client:
        client.raw.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await client.raw.send(first)
        async with until_blocked():
            for _ in range(100):
                await client.raw.send(flood * 4000)
        (connection,) = server.worker.context.connections
        running: Any = connection.exchange
        assert len(running.messages) * 6 <= 128 * 1024
        assert running._reader.buffered == 0
        kept = sum(map(len, running.stream._parts))
        assert kept <= 64 * 1024
        client.raw.reset()
        await handled.ended.wait()


# -- back-pressure -------------------------------------------------------------------------------------------


async def test_an_app_that_does_not_receive_stops_the_client(hub: str) -> None:
    go = trio.Event()
    received = 0

    async def app(receive: Any, send: Any) -> None:
        nonlocal received
        await go.wait()
        while (message := await receive())["type"] == "websocket.receive":
            received += len(message["bytes"])

    sent = 0
    async with no_leaks(), serving(Handled(app), hub=hub) as server, session(server) as client:
        part = frame(BINARY, bytes(10_000))
        async with until_blocked() as scope:
            while True:
                await client.raw.send(part)
                sent += 10_000
        assert scope.cancelled_caught
        (connection,) = server.worker.context.connections
        running: Any = connection.exchange
        assert sum(len(data) for _, data in running.messages) <= 128 * 1024
        assert connection.transport.bytes_read < 256 * 1024
        go.set()
        await trio.testing.wait_all_tasks_blocked(0.02)
        client.raw.send_eof()
        await client.raw.receive_all()
    assert received >= sent


async def test_what_comes_out_of_decompressing_is_bounded_too(hub: str) -> None:
    """Whole messages of a kilobyte that become a megabyte each: one more than there is room for is read."""
    go = trio.Event()
    recorder = Recorder()

    async def app(receive: Any, send: Any) -> None:
        await go.wait()
        await recorder(receive, send)

    settings: Any = {"websocket_compression": "on", "hub": hub}
    async with serving(Handled(app), **settings) as server:
        async with session(server, deflate="permessage-deflate; client_max_window_bits") as client:
            await client.raw.send(small_bombs(40))
            await trio.testing.wait_all_tasks_blocked(0.05)
            (connection,) = server.worker.context.connections
            running: Any = connection.exchange
            running.read_ahead()  # for hubs that do not call
            assert 1 <= len(running.messages) <= 2
            go.set()
            await client.close()
            await client.expect_close(1000)
    assert [len(data) for data in recorder.messages[:-1]] == [LIMIT] * 40
    assert recorder.messages[-1] == (1000, "")


async def test_an_app_that_only_receives_gives_way_while_much_is_decompressed(hub: str) -> None:
    go = trio.Event()
    turns = 0
    turns_at: list[int] = []

    async def app(receive: Any, send: Any) -> None:
        await go.wait()
        while (await receive())["type"] == "websocket.receive":
            turns_at.append(turns)

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    settings: Any = {"websocket_compression": "on", "hub": hub}
    async with serving(Handled(app), **settings) as server, trio.open_nursery() as nursery:
        async with session(server, deflate="permessage-deflate; client_max_window_bits") as client:
            await client.raw.send(small_bombs(20, 256 * 1024))
            await trio.testing.wait_all_tasks_blocked(0.05)
            nursery.start_soon(take_turns)
            go.set()
            await client.close()
            await client.expect_close(1000)
        nursery.cancel_scope.cancel()
    assert len(turns_at) == 20
    assert turns_at[-1] - turns_at[0] >= 15


async def test_a_message_that_a_ping_finds_reaches_the_app_that_waits_for_it(hub: str) -> None:
    """It came after the loop has looked at its sockets, and was read before the loop looks again."""
    handled = Handled(echo)
    async with serving(handled, hub=hub) as server, session(server) as client:
        await trio.testing.wait_all_tasks_blocked(0.02)
        (connection,) = server.worker.context.connections
        running: Any = connection.exchange
        socket.socket.send(client.raw.sock, frame(TEXT, b"found"))  # type: ignore[arg-type]
        assert running.outlasts("websocket_ping")
        assert bool(running.messages) is (hub == "portable")
        with trio.fail_after(5):
            assert await client.receive() == "found"


async def test_a_client_that_does_not_read_stops_the_app(hub: str) -> None:
    sent = 0
    held = trio.Event()

    async def app(receive: Any, send: Any) -> None:
        nonlocal sent
        async with until_blocked():
            while True:
                await send({"type": "websocket.send", "bytes": bytes(100_000)})
                sent += 1
        held.set()
        await send(text("the end"))

    async with no_leaks(), serving(Handled(app), hub=hub) as server:
        async with server.connect(receive_buffer=4096) as raw:
            from .websocket_client import WebSocketClient

            client = WebSocketClient(raw)
            await client.open()
            await held.wait()
            assert sent < 200
            count = 0
            while (message := await client.receive()) != "the end":
                assert message == bytes(100_000)  # the one whose send() was cancelled is whole, too
                count += 1
            assert count == sent + 1
            await client.expect_close(1000)


async def test_many_tasks_may_send_at_once(hub: str) -> None:
    async def app(receive: Any, send: Any) -> None:
        async def one(number: int) -> None:
            for part in range(5):
                await send({"type": "websocket.send", "bytes": bytes([number, part]) * 50_000})

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(one, number)

    async with no_leaks(), serving(Handled(app), hub=hub) as server:
        async with server.connect(receive_buffer=4096) as raw:
            from .websocket_client import WebSocketClient

            client = WebSocketClient(raw)
            await client.open()
            seen: dict[int, list[int]] = {}
            for _ in range(50):
                message = await client.receive()
                assert message == message[:2] * 50_000
                seen.setdefault(message[0], []).append(message[1])
            assert seen == {number: [0, 1, 2, 3, 4] for number in range(10)}
            await client.expect_close(1000)


async def test_one_of_many_senders_is_cancelled_and_the_others_go_on(hub: str) -> None:
    given_up = trio.Event()

    async def app(receive: Any, send: Any) -> None:
        async def one(number: int, scope: trio.CancelScope) -> None:
            with scope:
                await send({"type": "websocket.send", "bytes": bytes([number]) * 3_000_000})

        async with trio.open_nursery() as nursery:
            first = trio.CancelScope()
            nursery.start_soon(one, 1, first)
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.start_soon(one, 2, trio.CancelScope())
            nursery.start_soon(one, 3, trio.CancelScope())
            await trio.testing.wait_all_tasks_blocked(0.01)
            first.cancel()
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert first.cancelled_caught
            given_up.set()

    async with no_leaks(), serving(Handled(app), hub=hub) as server:
        async with server.connect(receive_buffer=4096) as raw:
            from .websocket_client import WebSocketClient

            client = WebSocketClient(raw)
            await client.open()
            await given_up.wait()
            got = [await client.receive() for _ in range(3)]
            assert sorted({message[0] for message in got}) == [1, 2, 3]
            assert all(message == message[:1] * 3_000_000 for message in got)
            await client.expect_close(1000)


async def test_the_client_goes_while_the_app_is_sending(hub: str) -> None:
    async def app(receive: Any, send: Any) -> None:
        with pytest.raises(ClientDisconnected):
            while True:
                await send({"type": "websocket.send", "bytes": bytes(1_000_000)})

    handled = Handled(app)
    async with no_leaks(), serving(handled, hub=hub) as server:
        async with server.connect(receive_buffer=4096) as raw:
            await raw.send(handshake())
            await handled.accepted.wait()
            await trio.testing.wait_all_tasks_blocked(0.02)
            raw.reset()
            with trio.fail_after(30):
                await handled.ended.wait()
                await server.wait_idle()
            assert server.failure is None


# -- draining ------------------------------------------------------------------------------------------------


async def test_a_drain_closes_sessions_with_1012(hub: str) -> None:
    recorder = Recorder()
    handled = Handled(recorder)
    async with no_leaks(), serving(handled, hub=hub, graceful_timeout=5) as server:
        async with session(server) as client:
            await client.send("before")
            await trio.testing.wait_all_tasks_blocked(0.01)
            server.worker.drain.begin("test")
            await client.expect_close(1012)
            await server.wait_idle()
    assert recorder.messages == ["before", (1012, "")]
    assert server.worker.context.counters.late == {}


async def test_a_drain_lets_the_app_end_in_its_grace() -> None:
    ended = False

    async def app(receive: Any, send: Any) -> None:
        nonlocal ended
        assert (await receive())["code"] == 1012
        with pytest.raises(ClientDisconnected):
            await send(text("too late"))
        await trio.sleep(0.2)  # saves what it has
        ended = True

    async with serving(Handled(app), graceful_timeout=5, disconnect_grace=0.05) as server:
        async with session(server) as client:
            server.worker.drain.begin("test")
            await client.expect_close(1012)
            await server.wait_idle()
    assert ended


async def test_a_drain_cuts_who_does_not_end(hub: str) -> None:
    handled = Handled(wait_for_ever)
    async with (
        no_leaks(),
        serving(handled, hub=hub, graceful_timeout=0.2) as server,
        session(server) as client,
    ):
        server.worker.drain.begin("test")
        await client.expect_close(1012)
        await server.wait_idle()
    assert isinstance(handled.outcomes[0], trio.Cancelled)


async def test_who_accepts_in_a_drain_is_closed_at_once() -> None:
    go = trio.Event()
    recorder = Recorder()

    async def app(receive: Any, send: Any) -> None:
        await receive()
        await go.wait()
        await send({"type": "websocket.accept"})
        await recorder(receive, send)

    async with serving(Handled(app, accept=False), graceful_timeout=5) as server, server.connect() as raw:
        await raw.send(handshake())
        await trio.testing.wait_all_tasks_blocked(0.01)
        server.worker.drain.begin("test")
        await trio.testing.wait_all_tasks_blocked(0.01)
        go.set()
        await raw.receive_until(b"\r\n\r\n")
        rest = raw.received or await raw.receive()
        assert rest == b"\x88\x02\x03\xf4"
    assert recorder.messages == [(1012, "")]


# -- the books -----------------------------------------------------------------------------------------------


async def test_sessions_are_in_flight_and_logged_when_they_end(caplog: Any) -> None:
    log = logging.getLogger("trioserve.tests.access")
    with caplog.at_level(logging.INFO, logger=log.name):
        app = Handled(echo)
        settings: Any = {"accesslog": log, "access_log_format": "%(r)s %(s)s %(b)s"}
        async with serving(app, **settings) as server:
            async with session(server, "/chat?secret=1") as client:
                await client.send("12345")
                await client.receive()
                context = server.worker.context
                assert context.in_flight == 1
                (connection,) = context.connections
                assert connection.exchange is not None
                facts = connection.exchange.describe()
                assert facts["path"] == "/chat"
                assert (facts["response"], facts["status"]) == ("open", 101)
                assert (facts["request_bytes"], facts["response_bytes"]) == (5, 5)
                assert connection.phase == "websocket_ping"
                assert "open" in repr(connection.exchange)
                assert not caplog.records
                await client.close()
                await client.expect_close(1000)
            await server.wait_idle()
            assert context.in_flight == 0
    assert [record.getMessage() for record in caplog.records] == ["GET /chat 1.1 101 5"]


async def test_places_for_requests_are_not_kept_by_sessions() -> None:
    async with serving(Handled(echo), max_concurrent_requests=1) as server:
        async with session(server) as one, session(server) as two:
            await one.send("1")
            await two.send("2")
            assert (await one.receive(), await two.receive()) == ("1", "2")
            assert (await server.get()).status == 200
        await server.wait_idle()
        assert server.worker.context.admission is not None
        assert server.worker.context.admission.admitted == 0


async def test_other_hosts_are_answered_with_404() -> None:
    async with serving(Handled(echo), server_names=["example.com"]) as server, server.connect() as raw:
        await raw.send(handshake())
        assert (await raw.read_response()).status == 404
        assert server.failure is None


async def test_wsgi_apps_have_no_websockets() -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        raise AssertionError("never called")

    async with serving(app) as server, server.connect() as raw:
        await raw.send(handshake())
        assert (await raw.read_response()).status == 403


async def test_who_resets_before_the_session_is_accepted_harms_nobody(hub: str) -> None:
    go = trio.Event()

    async def late(receive: Any, send: Any) -> None:
        await receive()
        await go.wait()
        await send({"type": "websocket.accept"})

    app = Handled(late, accept=False)
    async with serving(app, hub=hub) as server:
        async with server.connect() as client:
            await client.send(handshake())
            with trio.fail_after(30):
                while not app.scopes:
                    await trio.sleep(0.005)
            client.reset()
        await trio.testing.wait_all_tasks_blocked(0.02)
        go.set()
        with trio.fail_after(30):
            await app.ended.wait()
            while server.worker.context.connections:
                await trio.sleep(0.005)
        assert isinstance(app.outcomes[0], ClientDisconnected)
        assert server.worker.context.boundary.failure is None
        assert set(server.worker.context.counters.faults) <= {"C2"}
