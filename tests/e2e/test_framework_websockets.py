"""The frameworks' WebSockets as they are: nothing in the app knows which server it runs on."""

import functools
from typing import Annotated, Any

import fastapi
import litestar
import pytest
import quart_trio
import trio
from starlette.applications import Starlette
from starlette.endpoints import WebSocketEndpoint
from starlette.responses import PlainTextResponse
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from trioserve import testing
from trioserve.testing import no_leaks

from ..http.websocket_client import Closed, handshake, session

serving = functools.partial(testing.serving, linger_timeout=0.2)


def make_starlette(ended: list[Any]) -> Starlette:
    class Echo(WebSocketEndpoint):
        encoding = "text"

        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.accept("v2", headers=[(b"x-room", b"tea")])

        async def on_receive(self, websocket: WebSocket, data: Any) -> None:
            await websocket.send_text(f"{websocket.path_params['name']}: {data}")

        async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
            ended.append(close_code)

    async def careless(websocket: WebSocket) -> None:
        """Lets WebSocketDisconnect out, as many do."""
        await websocket.accept()
        while True:
            await websocket.send_json({"got": await websocket.receive_json()})

    async def denied(websocket: WebSocket) -> None:
        await websocket.send_denial_response(
            PlainTextResponse("members only", 401, {"www-authenticate": "Basic"})
        )

    async def refused(websocket: WebSocket) -> None:
        await websocket.close(4003, "no")

    async def broken(websocket: WebSocket) -> None:
        await websocket.accept()
        raise LookupError("a bug")

    async def iterating(websocket: WebSocket) -> None:
        await websocket.accept()
        async for data in websocket.iter_bytes():
            await websocket.send_bytes(data[::-1])
        try:
            await websocket.send_text("too late")
        except WebSocketDisconnect as error:
            ended.append(type(error).__name__)

    routes: Any = {
        "/echo/{name}": Echo, "/careless": careless, "/denied": denied, "/refused": refused, "/broken": broken,
        "/iterating": iterating,
    }  # fmt: skip
    return Starlette(routes=[WebSocketRoute(path, endpoint) for path, endpoint in routes.items()])


async def test_a_starlette_endpoint(hub: str) -> None:
    ended: list[Any] = []
    async with no_leaks(), serving(make_starlette(ended), hub=hub) as server:
        offer = [(b"sec-websocket-protocol", b"v1, v2")]
        async with session(server, "/echo/ada", offer) as client:
            assert client.response.header("sec-websocket-protocol") == "v2"
            assert client.response.header("x-room") == "tea"
            await client.send("hello")
            assert await client.receive() == "ada: hello"
            await client.close(1001)
            await client.expect_close(1001)
        await server.wait_idle()
    assert ended == [1001]
    assert server.failure is None


async def test_a_disconnect_that_leaves_a_starlette_app_is_not_its_fault() -> None:
    async with serving(make_starlette([])) as server, session(server, "/careless") as client:
        await client.send('{"a": 1}')
        assert await client.receive() == '{"got":{"a":1}}'
        await client.close(1001)
        await client.expect_close(1001)
        await server.wait_idle()
    assert server.failure is None
    assert set(server.worker.context.counters.faults) <= {"C2"}


async def test_starlette_learns_that_the_client_has_gone(hub: str) -> None:
    ended: list[Any] = []
    async with serving(make_starlette(ended), hub=hub) as server, session(server, "/iterating") as client:
        await client.send(b"abc")
        assert await client.receive() == b"cba"
        client.raw.reset()
        await server.wait_idle()
    assert ended == ["WebSocketDisconnect"]  # what Starlette makes of our ClientDisconnected
    assert server.failure is None


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("/denied", 401, b"members only"),
        ("/refused", 403, b"403 Forbidden\n"),
        ("/unknown", 403, b"403 Forbidden\n"),
    ],
)
async def test_what_starlette_denies(path: str, status: int, body: bytes) -> None:
    async with no_leaks(), serving(make_starlette([])) as server, server.connect() as raw:
        await raw.send(handshake(path))
        response = await raw.read_response()
        assert (response.status, response.body) == (status, body)
        assert (response.header("www-authenticate") == "Basic") == (status == 401)
    assert server.failure is None


async def test_a_bug_in_a_starlette_websocket_is_judged() -> None:
    async with serving(make_starlette([])) as server, session(server, "/broken") as client:
        await client.expect_close(1011)
        await server.wait_idle()
    assert server.failure is not None
    assert server.failure.row == "W1"


async def test_fastapi_with_dependencies() -> None:
    events: list[str] = []
    app = fastapi.FastAPI()

    async def connection() -> Any:
        events.append("opened")
        yield "db"
        events.append("closed")

    @app.websocket("/items/{number}")
    async def item(
        websocket: fastapi.WebSocket, number: int, db: Annotated[str, fastapi.Depends(connection)]
    ) -> None:
        await websocket.accept()
        try:
            while True:
                await websocket.send_text(f"{db} {number} {await websocket.receive_text()}")
        except fastapi.WebSocketDisconnect as gone:
            events.append(f"{gone.code} {gone.reason}")

    async with no_leaks(), serving(app) as server:
        async with session(server, "/items/7") as client:
            await client.send("a")
            assert await client.receive() == "db 7 a"
            await client.close(4000, "enough")
            await client.expect_close(4000)
        await server.wait_idle()
        async with server.connect() as raw:  # its validation refuses before accepting
            await raw.send(handshake("/items/seven"))
            assert (await raw.read_response()).status == 403
    assert events[:3] == ["opened", "4000 enough", "closed"]
    assert server.failure is None


async def test_litestar() -> None:
    @litestar.websocket_listener("/")
    async def reverse(data: str) -> str:
        return data[::-1]

    async with serving(litestar.Litestar([reverse])) as server, session(server) as client:
        await client.send("abc")
        assert await client.receive() == "cba"
        await client.close()
        await client.expect_close(1000)
        await server.wait_idle()
    assert server.failure is None


async def test_quart_trio(hub: str) -> None:
    import quart

    app = quart_trio.QuartTrio(__name__)

    @app.websocket("/")
    async def talk() -> None:
        while True:
            await quart.websocket.send(f"you said {await quart.websocket.receive()}")

    async with serving(app, hub=hub) as server, session(server) as client:
        await client.send("hello")
        assert await client.receive() == "you said hello"
        await client.close(1001)
        assert await client.receive() == Closed(1001, "")
        with trio.fail_after(30):
            await server.wait_idle()
    assert server.failure is None


async def test_a_drain_is_told_to_starlette() -> None:
    ended: list[Any] = []
    async with serving(make_starlette(ended), graceful_timeout=5) as server:
        async with session(server, "/echo/ada", [(b"sec-websocket-protocol", b"v2")]) as client:
            server.worker.drain.begin("test")
            await client.expect_close(1012)
            await server.wait_idle()
    assert ended == [1012]
