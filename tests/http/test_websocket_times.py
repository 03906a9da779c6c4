"""The phases of a session, in virtual time: pings and their answers, closing, a blocked send, grace, and off."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import trio
import trio.testing

from trioserve import testing
from trioserve.testing import TestServer

from .test_websocket_frames import small_bombs
from .websocket_apps import Handled, Recorder, echo, text, wait_for_ever
from .websocket_client import (
    CLOSE,
    PONG,
    TEXT,
    Closed,
    WebSocketClient,
    close_payload,
    frame,
    handshake,
    session,
)

serving = functools.partial(testing.serving, lifespan="off")


def late(server: TestServer) -> dict[str, int]:
    return server.worker.context.counters.late


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.began = trio.current_time()

    @property
    def now(self) -> float:
        return trio.current_time() - self.began


# -- pings ---------------------------------------------------------------------------------------------------


async def test_pings_come_at_their_interval_and_answers_keep_the_session(
    autojump_clock: Any, hub: str
) -> None:
    async with serving(
        Handled(echo), hub=hub, websocket_ping_interval=10, websocket_ping_timeout=5
    ) as server:
        async with session(server) as client:
            clock = Clock()
            for number in range(1, 6):
                await client.next_event()
                assert clock.now == pytest.approx(10 * number, abs=0.5)
                await trio.sleep(3)
                await client.send_frame(PONG, client.pings[-1])
            await client.send("still here")
            assert await client.receive() == "still here"
        assert late(server) == {}


async def test_anything_is_an_answer(autojump_clock: Any, hub: str) -> None:
    async with serving(
        Handled(echo), hub=hub, websocket_ping_interval=10, websocket_ping_timeout=5
    ) as server:
        async with session(server) as client:
            for _ in range(5):
                await client.next_event()
                await client.send("no pong")
                assert await client.receive() == "no pong"
            assert len(client.pings) == 5
            assert late(server) == {}


@pytest.mark.parametrize(("receiving", "before"), [(True, b""), (False, b""), (False, frame(PONG) * 12_000)])
async def test_who_does_not_answer_is_gone(
    receiving: bool, before: bytes, autojump_clock: Any, hub: str
) -> None:
    """Whatever it has sent `before`."""
    recorder = Recorder()

    async def app(receive: Any, send: Any) -> None:
        if not receiving:
            await trio.sleep(100)
        await recorder(receive, send)

    settings: Any = {"websocket_ping_interval": 10, "websocket_ping_timeout": 5, "disconnect_grace": None}
    async with serving(Handled(app), hub=hub, **settings) as server:
        async with session(server) as client:
            clock = Clock()
            await client.raw.send(before)
            assert await client.receive() == Closed(1011, "keepalive ping timeout")
            assert clock.now == pytest.approx(15, abs=0.5)
            await server.wait_idle()
        assert late(server) == {"websocket_ping": 1}
        assert server.failure is None
    assert recorder.messages == [(1006, "keepalive ping timeout")]
    assert recorder.times[0] - clock.began == pytest.approx(15 if receiving else 100, abs=0.5)


async def test_an_interval_shorter_than_the_timeout(autojump_clock: Any) -> None:
    async with serving(Handled(echo), websocket_ping_interval=2, websocket_ping_timeout=9) as server:
        async with session(server) as client:
            clock = Clock()
            for _ in range(3):
                await client.next_event()
                await client.send_frame(PONG)
            assert clock.now == pytest.approx(6, abs=0.5)
            assert await client.receive() == Closed(1011, "keepalive ping timeout")
            assert clock.now == pytest.approx(8 + 9, abs=0.5)  # the first that was not answered


async def test_no_pings(autojump_clock: Any, hub: str) -> None:
    async with (
        serving(Handled(echo), hub=hub, websocket_ping_interval="off") as server,
        session(server) as client,
    ):
        with trio.move_on_after(100_000) as scope:
            await client.next_event()
        assert scope.cancelled_caught
        await client.send("x")
        assert await client.receive() == "x"


async def test_pings_without_a_timeout(autojump_clock: Any) -> None:
    settings: Any = {"websocket_ping_interval": 10, "websocket_ping_timeout": "off"}
    async with serving(Handled(echo), **settings) as server, session(server) as client:
        for _ in range(20):
            await client.next_event()
        assert len(client.pings) == 20


async def test_an_app_that_does_not_receive_does_not_make_its_client_late(autojump_clock: Any) -> None:
    """Its pong stands behind messages that the app has not taken."""
    go = trio.Event()

    async def app(receive: Any, send: Any) -> None:
        await go.wait()
        await echo(receive, send)

    settings: Any = {"websocket_ping_interval": 10, "websocket_ping_timeout": 5}
    async with serving(Handled(app), **settings) as server, session(server) as client:
        with trio.move_on_after(1):
            while True:
                await client.send(bytes(10_000))
        await trio.sleep(1000)
        assert late(server) == {}
        client.raw.reset()
        go.set()


async def test_the_pings_of_a_thousand_sessions_are_no_tasks(autojump_clock: Any) -> None:
    async with serving(Handled(echo)) as server, session(server), session(server), session(server):
        tasks = trio.lowlevel.current_statistics().tasks_living
        async with session(server):
            assert trio.lowlevel.current_statistics().tasks_living == tasks + 1
        assert server.worker.context.deadlines.armed >= 3


# -- closing -------------------------------------------------------------------------------------------------


async def test_a_close_that_is_not_answered(autojump_clock: Any, hub: str) -> None:
    async def app(receive: Any, send: Any) -> None:
        await send({"type": "websocket.close", "code": 4000})

    settings: Any = {"websocket_close_timeout": 7, "linger_timeout": 2}
    async with serving(Handled(app), hub=hub, **settings) as server, session(server) as client:
        clock = Clock()
        assert await client.receive() == Closed(4000, "")
        await client.expect_end()
        assert clock.now == pytest.approx(7, abs=0.5)
        await server.wait_idle()
        assert clock.now == pytest.approx(9, abs=0.5)
        assert late(server) == {"websocket_close": 1}


async def test_who_talks_on_instead_of_closing(autojump_clock: Any, hub: str) -> None:
    async def app(receive: Any, send: Any) -> None:
        await send({"type": "websocket.close", "code": 4000})

    settings: Any = {"websocket_close_timeout": 7, "linger_timeout": 2}
    async with serving(Handled(app), hub=hub, **settings) as server, session(server) as client:
        clock = Clock()
        async with trio.open_nursery() as nursery:

            async def talk() -> None:
                while True:
                    await client.send_frame(TEXT, b"on and on")
                    await trio.sleep(1)

            nursery.start_soon(talk)
            assert await client.receive() == Closed(4000, "")
            await client.expect_end()
            nursery.cancel_scope.cancel()
        assert clock.now == pytest.approx(7, abs=0.5)


async def test_work_after_closing_is_not_cancelled(autojump_clock: Any, hub: str) -> None:
    ended = trio.Event()

    async def app(receive: Any, send: Any) -> None:
        await send({"type": "websocket.close"})
        await trio.sleep(1000)
        ended.set()

    settings: Any = {"websocket_close_timeout": 7, "request_timeout": 20}
    async with serving(Handled(app), hub=hub, **settings) as server, session(server) as client:
        clock = Clock()
        assert await client.receive() == Closed(1000, "")
        await client.expect_end()
        assert clock.now == pytest.approx(7, abs=0.5)
        await ended.wait()
        assert clock.now == pytest.approx(1000, abs=1)


async def test_an_answered_close_ends_at_once_whatever_the_app_does(autojump_clock: Any) -> None:
    async def app(receive: Any, send: Any) -> None:
        await send({"type": "websocket.close"})
        await trio.sleep(1000)

    async with serving(Handled(app)) as server, session(server) as client:
        clock = Clock()
        await client.expect_close(1000)
        assert clock.now < 1


async def test_an_answer_behind_compressed_messages_ends_at_once_too(autojump_clock: Any) -> None:
    """Which nobody wants any more, and which are not decompressed therefore."""

    async def app(receive: Any, send: Any) -> None:
        await send({"type": "websocket.close"})
        await trio.sleep(1000)

    settings: Any = {"hub": "epoll", "websocket_compression": "on", "websocket_close_timeout": 7}
    async with serving(Handled(app), **settings) as server:
        async with session(server, deflate="permessage-deflate; client_max_window_bits") as client:
            clock = Clock()
            assert await client.receive() == Closed(1000, "")
            await client.raw.send(small_bombs(10) + frame(CLOSE, close_payload(1000)))
            await client.expect_end()
            assert clock.now < 1
        assert late(server) == {}


async def test_a_drain_is_not_kept_by_who_does_not_answer(autojump_clock: Any) -> None:
    recorder = Recorder()
    settings: Any = {"graceful_timeout": 60, "websocket_close_timeout": 7, "linger_timeout": 2}
    async with serving(Handled(recorder), **settings) as server, session(server) as client:
        await trio.testing.wait_all_tasks_blocked(0.01)
        clock = Clock()
        server.worker.drain.begin("test")
        assert await client.receive() == Closed(1012, "")
        await client.expect_end()
        assert clock.now == pytest.approx(7, abs=0.5)
        await server.wait_idle()
        assert clock.now == pytest.approx(9, abs=0.5)
    assert recorder.messages == [(1012, "")]


# -- other phases --------------------------------------------------------------------------------------------


async def test_a_send_that_makes_no_progress_is_aborted(autojump_clock: Any, hub: str) -> None:
    async def app(receive: Any, send: Any) -> None:
        await send({"type": "websocket.send", "bytes": bytes(20_000_000)})

    handled = Handled(app)
    settings: Any = {"response_write_timeout": 30, "websocket_ping_interval": 7, "websocket_ping_timeout": 3}
    async with serving(handled, hub=hub, **settings) as server, server.connect(receive_buffer=4096) as raw:
        await raw.send(handshake())
        clock = Clock()
        await handled.ended.wait()
        assert 29 < clock.now < 61  # the peer's kernel takes some at first
        await server.wait_idle()
        assert late(server) == {"response_write": 1}
        assert isinstance(handled.outcomes[0], trio.Cancelled)
        assert "response_write" in str(handled.outcomes[0])


async def test_a_send_that_makes_progress_is_not(autojump_clock: Any) -> None:
    async def app(receive: Any, send: Any) -> None:
        await send({"type": "websocket.send", "bytes": bytes(6_000_000)})

    settings: Any = {"response_write_timeout": 30, "websocket_ping_interval": 7, "websocket_ping_timeout": 3}
    async with serving(Handled(app), **settings) as server, server.connect(receive_buffer=65536) as raw:
        await raw.send(handshake())
        size = 0
        while size < 6_000_000:
            await trio.sleep(5)
            size += len(await raw.receive(200_000))
        assert "response_write" not in late(server)


async def test_pings_go_on_after_a_blocked_send(autojump_clock: Any, hub: str) -> None:
    async def app(receive: Any, send: Any) -> None:
        await send({"type": "websocket.send", "bytes": bytes(6_000_000)})
        await receive()

    settings: Any = {"websocket_ping_interval": 10, "websocket_ping_timeout": 5}
    async with (
        serving(Handled(app), hub=hub, **settings) as server,
        server.connect(receive_buffer=65536) as raw,
    ):
        client = WebSocketClient(raw)
        await client.open()
        await trio.sleep(25)
        assert len(await client.receive()) == 6_000_000
        clock = Clock()
        await client.next_event()
        assert clock.now <= 10.5
        assert client.pings


@pytest.mark.parametrize("how", ["close frame", "reset", "eof"])
async def test_the_grace_after_the_client_has_gone(how: str, autojump_clock: Any) -> None:
    handled = Handled(wait_for_ever)
    async with (
        serving(handled, disconnect_grace=30, websocket_ping_interval=2) as server,
        session(server) as client,
    ):
        await trio.testing.wait_all_tasks_blocked(0.01)
        clock = Clock()
        if how == "close frame":
            await client.close(1001)
        else:
            {"reset": client.raw.reset, "eof": client.raw.send_eof}[how]()
        await handled.ended.wait()
        assert clock.now == pytest.approx(30, abs=0.5)
        await server.wait_idle()
        assert late(server) == {"disconnect_grace": 1}
        assert "disconnect_grace" in str(handled.outcomes[0])


async def test_an_app_that_never_decides(autojump_clock: Any) -> None:
    handled = Handled(wait_for_ever, accept=False)
    async with serving(handled, request_timeout=20) as server, server.connect() as raw:
        clock = Clock()
        await raw.send(handshake())
        response = await raw.read_response()
        assert (response.status, response.header("retry-after")) == (503, "1")
        assert clock.now == pytest.approx(20, abs=0.5)


async def test_a_session_has_no_time_out(autojump_clock: Any) -> None:
    settings: Any = {"request_timeout": 20, "keep_alive_timeout": 5, "websocket_ping_interval": "off"}
    async with serving(Handled(echo), **settings) as server, session(server) as client:
        await trio.sleep(100_000)
        await client.send("x")
        assert await client.receive() == "x"


async def test_a_drain_before_the_app_has_decided(autojump_clock: Any) -> None:
    async with serving(Handled(wait_for_ever, accept=False), graceful_timeout=10) as server:
        async with server.connect() as raw:
            await raw.send(handshake())
            await trio.testing.wait_all_tasks_blocked(0.01)
            server.worker.drain.begin("test")
            assert (await raw.read_response()).status == 503


async def test_a_slow_member_does_not_hold_up_the_others(autojump_clock: Any) -> None:
    """One task sends to all, each within a bound of its own, as a chat room does."""
    members: list[Any] = []

    async def app(receive: Any, send: Any) -> None:
        members.append(send)
        await echo(receive, send)

    async with serving(Handled(app), response_write_timeout=30) as server:
        async with session(server) as fast, server.connect(receive_buffer=4096) as raw:
            await raw.send(handshake())
            await trio.testing.wait_all_tasks_blocked(0.02)
            sent = 0
            for _ in range(100):
                for send in members:
                    with trio.move_on_after(0.5):
                        await send(text("x" * 100_000))
                        sent += 1
                assert len(await fast.receive()) == 100_000
            assert 100 <= sent < 200
            kept = [c.exchange.stream._parts for c in server.worker.context.connections]  # type: ignore[union-attr]
            assert sum(len(part) for parts in kept for part in parts) <= 100_020
