"""WebSocket over HTTP/2 (RFC 8441): the extended CONNECT, frames in DATA, and the ways in which such a stream ends."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.http.http2_client import Fields
from tests.http.http2_serving import Client, get, served
from trioserve.http.http2_codes import ENABLE_CONNECT_PROTOCOL

NO_ERROR, CANCEL = 0, 8
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def connect(path: bytes = b"/", *fields: tuple[bytes, bytes], version: bytes = b"13") -> Fields:
    return [
        (b":method", b"CONNECT"), (b":protocol", b"websocket"), *get(path)[1:],
        (b"sec-websocket-version", version), *fields,
    ]  # fmt: skip


def masked(opcode: int, payload: bytes = b"") -> bytes:
    """One whole frame of a client's; under a mask of zeros."""
    size = len(payload)
    if size < 126:
        length = bytes([0x80 | size])
    else:
        length = (
            bytes([0x80 | 126]) + size.to_bytes(2, "big")
            if size < 65536
            else bytes([0xFF]) + size.to_bytes(8, "big")
        )
    return bytes([0x80 | opcode]) + length + bytes(4) + payload


def frames(data: bytes) -> list[tuple[int, bytes]]:
    """Whole frames of a server's."""
    found, at = [], 0
    while at < len(data):
        size, at_payload = data[at + 1], at + 2
        if size >= 126:
            wide = 2 if size == 126 else 8
            size, at_payload = int.from_bytes(data[at + 2 : at + 2 + wide], "big"), at + 2 + wide
        found.append((data[at] & 15, data[at_payload : at_payload + size]))
        at = at_payload + size
    return found


async def echoing(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "websocket":
        return
    assert scope["http_version"] == "2"
    assert (await receive())["type"] == "websocket.connect"
    if scope["path"] == "/no":
        await send({"type": "websocket.close"})
        return
    if scope["path"] == "/denied":
        await send({"type": "websocket.http.response.start", "status": 401, "headers": [(b"a", b"b")]})
        await send({"type": "websocket.http.response.body", "body": b"go away"})
        return
    await send(
        {
            "type": "websocket.accept",
            "headers": [(b"x", b"y")],
            "subprotocol": (scope["subprotocols"] or [None])[0],
        }
    )
    while True:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            scope["state"]["seen"].append((message["code"], message.get("reason")))
            return
        if message.get("text") == "die":
            raise ValueError("dead")
        if message.get("text") == "close":
            await send({"type": "websocket.close", "code": 4000, "reason": "bye"})
            return
        await send({"type": "websocket.send", **{k: v for k, v in message.items() if k in ("text", "bytes")}})


def with_notes(seen: list[Any]) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            scope["state"]["seen"] = seen
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        await echoing(scope, receive, send)

    return app


async def opened(client: Client, *fields: tuple[bytes, bytes]) -> int:
    stream_id = await client.open(connect(b"/", *fields), end=False)
    await client.read_until(lambda peer: peer.responses[stream_id].status > 0)
    assert client.peer.responses[stream_id].status == 200
    return stream_id


async def test_a_session_from_accept_to_close(http2_engine: str, hub: str) -> None:
    seen: list[Any] = []
    async with served(with_notes(seen), http2_engine=http2_engine, hub=hub) as (server, client):
        assert client.peer.settings is not None
        assert client.peer.settings[ENABLE_CONNECT_PROTOCOL] == 1
        stream_id = await opened(client, (b"sec-websocket-protocol", b"chat, other"))
        response = client.peer.responses[stream_id]
        assert response.field(b"sec-websocket-protocol") == b"chat"
        assert response.field(b"x") == b"y"
        assert response.field(b"date")
        assert response.field(b"sec-websocket-accept") is None
        await client.send_body(stream_id, masked(TEXT, b"hello") + masked(PING, b"p"))
        await client.read_until(lambda _: len(frames(response.body)) == 2)
        assert sorted(frames(response.body)) == [(TEXT, b"hello"), (PONG, b"p")]
        response.body = b""
        await client.send_body(stream_id, masked(CLOSE, b"\x03\xe9bye"), end=True)
        await client.read_until(lambda _: response.ended)
        assert [kind for kind, _ in frames(response.body)] == [CLOSE]
        await wait_all_tasks_blocked(0.02)
        assert seen == [(1001, "bye")]
        assert server.worker.context.in_flight == 0
        assert server.failure is None


async def test_large_messages_pass_under_flow_control(http2_engine: str, hub: str) -> None:
    data = random.Random(3).randbytes(400_000)
    wire = masked(BINARY, data)
    async with served(with_notes([]), http2_engine=http2_engine, hub=hub) as (_, client):
        stream_id = await opened(client)
        sent = 0
        while sent < len(wire):
            room = min(client.peer.connection.local_flow_control_window(stream_id), 16384)
            if not room:
                assert await client.read_some()
                continue
            await client.send_body(stream_id, wire[sent : sent + room])
            sent += room
        response = client.peer.responses[stream_id]
        await client.read_until(lambda _: len(response.body) >= len(data))
        assert frames(response.body) == [(BINARY, data)]


@pytest.mark.parametrize(("kind", "receiving"), [(TEXT, True), (PING, True), (PING, False)])
async def test_the_smallest_frames_are_read_in_turns(kind: int, receiving: bool) -> None:
    """Thousands arrive at once: between two turns of the others only some of them are looked at."""
    go = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        if not receiving:
            await go.wait()
        while (await receive())["type"] == "websocket.receive":
            pass

    async with served(app, lifespan="off") as (server, client), trio.open_nursery() as nursery:
        stream_id = await opened(client)
        (connection,) = server.worker.context.connections
        reader = connection.streams[stream_id].exchange._reader
        for _ in range(3):
            client.peer.connection.send_data(stream_id, masked(kind) * 2700)
        client.peer.connection.send_data(stream_id, masked(CLOSE))
        nursery.start_soon(client.flush)
        seen = [0]
        while not reader.closed:
            await trio.lowlevel.checkpoint()
            seen.append(reader._frames)
        assert seen[-1] == 3 * 2700 + 1
        assert max(after - before for before, after in itertools.pairwise(seen)) <= 4 * 1024
        go.set()


@pytest.mark.parametrize(
    ("fields", "status"),
    [(connect(b"/no"), 403), (connect(b"/denied"), 401), (connect(version=b"12"), 400)],
)
async def test_a_session_that_is_not_opened_is_answered_in_http(
    http2_engine: str, fields: Fields, status: int
) -> None:
    """Its stream ends with that: a client that waits on its side keeps no place that others need."""
    async with served(with_notes([]), http2_engine=http2_engine, h2_max_concurrent_streams=1) as (
        server,
        client,
    ):
        stream_id = await client.open(fields, end=False)
        await client.read_until(lambda peer: peer.responses[stream_id].ended)
        assert client.peer.responses[stream_id].status == status
        await client.read_until(lambda peer: peer.responses[stream_id].reset == NO_ERROR)
        await opened(client)
        assert server.failure is None


async def test_the_apps_close_and_its_death_reach_the_client(http2_engine: str) -> None:
    async with served(with_notes([]), http2_engine=http2_engine, on_app_error="contain") as (server, client):
        for word, code in ((b"close", 4000), (b"die", 1011)):
            stream_id = await opened(client)
            await client.send_body(stream_id, masked(TEXT, word))
            response = client.peer.responses[stream_id]
            await client.read_until(lambda _, response=response: CLOSE in dict(frames(response.body)))
            ((_, payload),) = frames(response.body)
            assert int.from_bytes(payload[:2], "big") == code
            await client.send_body(stream_id, masked(CLOSE, payload[:2]), end=True)
            await client.read_until(lambda _, response=response: response.over)
        await wait_all_tasks_blocked(0.02)
        assert server.worker.context.counters.faults == {"W1": 1}
        assert server.worker.context.in_flight == 0


@pytest.mark.parametrize("how", ["reset", "end", "close"])
async def test_a_client_that_leaves_is_a_1006_for_the_app(
    http2_engine: str, hub: str, how: str, autojump_clock: MockClock
) -> None:
    seen: list[Any] = []
    async with served(with_notes(seen), http2_engine=http2_engine, hub=hub) as (server, client):
        stream_id = await opened(client)
        if how == "reset":
            await client.reset(stream_id)
        elif how == "end":
            await client.send_body(stream_id, b"", end=True)
        else:
            await trio.aclose_forcefully(client.stream)
        with trio.fail_after(60):
            while server.worker.context.in_flight:
                await trio.sleep(0.1)
        assert [code for code, _ in seen] == [1006]
        assert server.failure is None


async def test_a_drain_tells_the_session_1012(http2_engine: str, autojump_clock: MockClock) -> None:
    async with served(with_notes([]), http2_engine=http2_engine, graceful_timeout=5) as (server, client):
        stream_id = await opened(client)
        response = client.peer.responses[stream_id]
        server.worker.drain.begin("a test")
        await client.read_until(lambda _: CLOSE in dict(frames(response.body)), seconds=60)
        assert dict(frames(response.body))[CLOSE][:2] == (1012).to_bytes(2, "big")
        await trio.aclose_forcefully(client.stream)
        with trio.fail_after(60):
            await server.wait_idle()


def sending(size: int, outcomes: list[BaseException | None]) -> Any:
    """An app that accepts and sends one message."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        outcome: BaseException | None = None
        try:
            await send({"type": "websocket.send", "bytes": bytes(size)})
        except BaseException as error:
            outcome = error
            raise
        finally:
            outcomes.append(outcome)
            del outcome

    return app


async def test_a_session_is_not_late_while_the_socket_holds_it_up(
    http2_engine: str, autojump_clock: MockClock
) -> None:
    """The kernel takes nothing of this stream for longer than the time-out, but the peer reads all the while."""
    outcomes: list[BaseException | None] = []
    size = 6_000_000
    async with served(
        sending(size, outcomes), http2_engine=http2_engine, lifespan="off", response_write_timeout=30
    ) as (server, client):
        client.stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 65536)
        client.peer.connection.increment_flow_control_window(2**30)
        stream_id = await client.open(connect(), end=False)
        client.peer.connection.increment_flow_control_window(2**30, stream_id)
        await client.flush()
        response = client.peer.responses[stream_id]
        while len(response.body) < size:
            assert response.reset is None
            await trio.sleep(10)
            assert await client.read_some()
        assert "response_write" not in server.worker.context.counters.late
    assert outcomes == [None]


async def test_a_session_whose_window_stays_shut_is_late(
    http2_engine: str, autojump_clock: MockClock
) -> None:
    outcomes: list[BaseException | None] = []
    async with served(
        sending(100_000, outcomes),
        http2_engine=http2_engine,
        lifespan="off",
        client={"acknowledge": False},
    ) as (server, client):
        client.peer.connection.increment_flow_control_window(1_000_000)
        stream_id = await client.open(connect(), end=False)
        began = trio.current_time()
        await client.read_until(lambda peer: peer.responses[stream_id].reset is not None, seconds=100)
        assert 29 < trio.current_time() - began < 31
        assert client.peer.responses[stream_id].reset == CANCEL
        assert server.worker.context.counters.late == {"response_write": 1}
    assert isinstance(outcomes[0], trio.Cancelled)
