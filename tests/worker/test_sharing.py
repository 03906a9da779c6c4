"""What a worker tells the others of its connections, and what of the common queue it takes beside them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.apps import respond
from tests.websocket_client import open_websocket
from trioserve.net.share_board import Load, Share, ShareBoard
from trioserve.structure.context import LAST_REQUEST_PATIENCE
from trioserve.testing import TestServer, encode_request, serving

OURS, OTHER = 0, 1


@pytest.fixture
def mock_clock() -> MockClock:
    return MockClock()


@pytest.fixture
def board() -> Iterator[ShareBoard]:
    made = ShareBoard.create()
    for place in (OURS, OTHER):
        made.take_place(set(range(place)))
    yield made
    made.close()


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers at once, never, or half, as the path says; WebSockets echo."""
    match scope["path"]:
        case "/never":
            await trio.sleep_forever()
        case "/half":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
            await trio.sleep_forever()
        case "/websocket":
            await receive()
            await send({"type": "websocket.accept"})
            while (message := await receive())["type"] == "websocket.receive":
                await send({"type": "websocket.send", "text": message["text"]})
        case _:
            await respond(send)


@asynccontextmanager
async def sharing(board: ShareBoard, **settings: Any) -> AsyncIterator[TestServer]:
    """A worker that shares, and accepts connections."""
    async with serving(app, lifespan="off", graceful_timeout=0, **settings) as server:
        server.worker.context.share = Share(board, OURS, trio.lowlevel.current_clock().current_time)
        server.worker.context.note_share()
        yield server


# -- what it tells -------------------------------------------------------------------------------------------


def busy(server: TestServer, board: ShareBoard) -> tuple[int, int]:
    """Its busy connections and all of them, counted now."""
    server.worker.context.count_share()
    load = board.loads()[0]
    return load.busy, load.total


async def test_a_connection_is_busy_until_nothing_has_happened_for_a_second(
    mock_clock: MockClock, board: ShareBoard
) -> None:
    async with sharing(board) as server, server.connect() as client, server.connect() as other:
        await client.get("/")
        await wait_all_tasks_blocked(0.01)
        assert busy(server, board) == (2, 2)
        mock_clock.jump(LAST_REQUEST_PATIENCE)
        assert busy(server, board)[0] <= 1  # what it has asked is news to us
        mock_clock.jump(LAST_REQUEST_PATIENCE)
        assert busy(server, board) == (0, 2)
        await other.get("/")
        mock_clock.jump(0.2)
        assert busy(server, board) == (1, 2)
        mock_clock.jump(LAST_REQUEST_PATIENCE)
        assert busy(server, board) == (0, 2)


@pytest.mark.parametrize(("path", "rests"), [("/never", False), ("/half", True)])
async def test_an_answer_that_is_due_is_work_and_one_that_has_begun_is_not(
    mock_clock: MockClock, board: ShareBoard, path: str, rests: bool
) -> None:
    async with sharing(board) as server, server.connect() as client:
        await client.send(encode_request("GET", path))
        await wait_all_tasks_blocked(0.01)
        for _ in range(3):
            mock_clock.jump(LAST_REQUEST_PATIENCE)
            counted = busy(server, board)
        assert counted == (0 if rests else 1, 1)


async def test_a_websocket_on_which_nobody_speaks_rests(mock_clock: MockClock, board: ShareBoard) -> None:
    async with (
        sharing(board) as server,
        await open_websocket(f"127.0.0.1:{server.port}", "/websocket") as client,
    ):
        for _ in range(3):
            mock_clock.jump(LAST_REQUEST_PATIENCE)
            counted = busy(server, board)
        assert counted == (0, 1)
        await client.send("hello")
        assert await client.receive() == "hello"
        mock_clock.jump(0.2)
        assert busy(server, board) == (1, 1)


async def test_who_has_no_room_is_not_waited_for(board: ShareBoard) -> None:
    async with sharing(board, max_connections=1) as server:
        assert board.loads() == [Load(0, 0, 0)]
        async with server.connect() as client:
            await client.get("/")
            await wait_all_tasks_blocked(0.01)
            assert board.loads() == []
        await server.wait_idle()
        assert board.loads() == [Load(0, 0, 1)]


# -- what it takes -------------------------------------------------------------------------------------------


async def test_the_others_are_not_waited_for_for_ever_however_busy_they_are(board: ShareBoard) -> None:
    """Their number changes whenever it is looked at, but they take nothing."""
    async with sharing(board) as server:
        share = server.worker.context.share
        assert share is not None
        numbers = iter(range(1_000_000))

        class Moving(Share):
            def room(self, connections: int) -> int:
                board.write(OTHER, 0, 0, next(numbers) % 2)
                return super().room(connections)

        server.worker.context.share = moving = Moving(board, OURS)
        moving.note(0)
        async with server.connect() as first, server.connect() as second, server.connect() as third:
            with trio.fail_after(15):
                for client in (first, second, third):
                    assert (await client.get("/")).status == 200
