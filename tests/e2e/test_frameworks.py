"""Frameworks as they are: nothing in the app knows which server it runs on."""

import contextlib
import json
import threading
from collections.abc import AsyncIterator
from typing import Annotated, Any

import fastapi
import flask
import litestar
import litestar.response
import pytest
import quart_trio
import starlette.applications
import starlette.background
import starlette.middleware
import starlette.middleware.base
import starlette.middleware.gzip
import starlette.requests
import starlette.responses
import starlette.routing
import trio
from litestar.params import FromPath, FromQuery

from trioserve.testing import encode_request, no_leaks, serving

MULTIPART = [("content-type", "multipart/form-data; boundary=edge")]


def form(name: str, value: bytes, filename: str | None = None) -> bytes:
    """A multipart body with one part."""
    extra = f'; filename="{filename}"' if filename else ""
    head = f'--edge\r\ncontent-disposition: form-data; name="{name}"{extra}\r\n\r\n'
    return head.encode() + value + b"\r\n--edge--\r\n"


# -- Starlette ----------------------------------------------------------------------------------------------


def make_starlette(said: Any = None) -> starlette.applications.Starlette:
    """`said` is a memory channel's sending end, for handlers that tell the test where they are."""
    Request, Route = starlette.requests.Request, starlette.routing.Route
    responses = starlette.responses

    async def item(request: Request) -> Any:
        return responses.JSONResponse({"id": request.path_params["id"], "q": request.query_params.get("q")})

    async def state(request: Request) -> Any:
        return responses.PlainTextResponse(request.state.greeting)

    async def stream(request: Request) -> Any:
        async def parts() -> AsyncIterator[str]:
            for n in range(10):
                yield f"part {n}\n"

        return responses.StreamingResponse(parts(), media_type="text/plain")

    async def endless(request: Request) -> Any:
        async def parts() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"tick\n" * 100
                    await trio.sleep(0.01)
            finally:
                said.send_nowait("endless over")

        return responses.StreamingResponse(parts())

    async def poll(request: Request) -> Any:
        said.send_nowait("polling")
        while not await request.is_disconnected():
            await trio.sleep(0.01)
        said.send_nowait("disconnected")
        return responses.Response()

    async def background(request: Request) -> Any:
        async def work() -> None:
            said.send_nowait("working")
            await trio.sleep(0.05)
            said.send_nowait("worked")

        return responses.PlainTextResponse("soon", background=starlette.background.BackgroundTask(work))

    async def failing_background(request: Request) -> Any:
        async def work() -> None:
            raise LookupError("in the background")

        return responses.PlainTextResponse("soon", background=starlette.background.BackgroundTask(work))

    async def fail(request: Request) -> Any:
        raise LookupError("a bug")

    async def upload(request: Request) -> Any:
        size = 0
        async for part in request.stream():
            size += len(part)
        return responses.PlainTextResponse(str(size))

    async def file(request: Request) -> Any:
        return responses.FileResponse(__file__)

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[dict[str, str]]:
        yield {"greeting": "hello from the lifespan"}
        if said is not None:
            said.send_nowait("shut down")

    class Tag(starlette.middleware.base.BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: Any) -> Any:
            response = await call_next(request)
            response.headers["x-tag"] = "seen"
            return response

    Middleware = starlette.middleware.Middleware
    tagged = starlette.routing.Mount(
        "/tagged", routes=[Route("/stream", stream)], middleware=[Middleware(Tag)]
    )
    gzip = Middleware(starlette.middleware.gzip.GZipMiddleware, minimum_size=10)
    zipped = starlette.routing.Mount("/zipped", routes=[Route("/stream", stream)], middleware=[gzip])
    return starlette.applications.Starlette(
        routes=[
            Route("/items/{id:int}", item),
            Route("/state", state),
            Route("/stream", stream),
            Route("/endless", endless),
            Route("/poll", poll),
            Route("/background", background),
            Route("/failing-background", failing_background),
            Route("/fail", fail),
            Route("/upload", upload, methods=["POST"]),
            Route("/file", file),
            tagged,
            zipped,
        ],
        lifespan=lifespan,
    )


async def test_starlette_routes_lifespan_state_and_streams():
    async with no_leaks(), serving(make_starlette()) as server, server.connect() as client:
        assert json.loads((await client.get("/items/7?q=%C3%A4")).body) == {"id": 7, "q": "ä"}
        assert (await client.get("/items/x")).status == 404
        assert (await client.get("/state")).body == b"hello from the lifespan"
        whole = b"".join(b"part %d\n" % n for n in range(10))
        for path in ("/stream", "/tagged/stream"):
            response = await client.get(path)
            assert (response.body, response.header("transfer-encoding")) == (whole, "chunked")
        assert response.header("x-tag") == "seen"
        response = await client.get("/zipped/stream", [("accept-encoding", "gzip")])
        assert response.header("content-encoding") == "gzip"
        assert (await client.request("POST", "/upload", body=b"x" * 300_000)).body == b"300000"
        assert (await client.get("/stream", method="HEAD")).body == b""
    assert server.failure is None


async def test_starlette_serves_files_and_their_ranges():
    with open(__file__, "rb") as file:
        content = file.read()
    async with serving(make_starlette()) as server, server.connect() as client:
        response = await client.get("/file")
        assert response.body == content
        response = await client.get("/file", [("range", "bytes=10-19")])
        assert (response.status, response.body) == (206, content[10:20])
        fresh = [("if-none-match", response.header("etag"))]
        assert (await client.get("/file", fresh)).status in (200, 304)


async def test_starlette_lifespan_shuts_down_after_the_last_request():
    said, hears = trio.open_memory_channel[str](10)
    async with serving(make_starlette(said)) as server:
        await server.get("/state")
    assert await hears.receive() == "shut down"


# Starlette leaves an unfinished generator to the collector, which trio reports; that it is found at once is the point:
# nothing of ours holds it.
@pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")
@pytest.mark.parametrize(
    "path, first, last", [("/endless", None, "endless over"), ("/poll", "polling", "disconnected")]
)
async def test_starlette_learns_that_the_client_has_gone(path, first, last):
    said, hears = trio.open_memory_channel[str](10)
    # Its own end, not ours: the grace would come much later.
    async with serving(make_starlette(said), disconnect_grace=3600) as server:
        async with server.connect() as client:
            await client.send(encode_request("GET", path))
            if first is None:
                await client.receive_until(b"tick")
            else:
                assert await hears.receive() == first
        with trio.fail_after(30):
            assert await hears.receive() == last
            await server.wait_idle()
    assert server.failure is None


async def test_a_starlette_background_task_runs_after_its_response():
    said, hears = trio.open_memory_channel[str](10)
    async with serving(make_starlette(said)) as server, server.connect() as client:
        assert (await client.get("/background")).body == b"soon"
        assert [await hears.receive(), await hears.receive()] == ["working", "worked"]
        assert (await client.get("/state")).status == 200, "the connection goes on"


async def test_a_background_task_that_fails_is_an_app_error_after_a_complete_response():
    async with serving(make_starlette()) as server:
        assert (await server.get("/failing-background")).body == b"soon"
    assert server.failure.row == "A4"


async def test_an_exception_that_starlette_answers_and_raises_again_is_an_app_error():
    async with serving(make_starlette()) as server:
        response = await server.get("/fail")
        assert (response.status, response.body) == (500, b"Internal Server Error")
    assert server.failure.row == "A3"
    assert isinstance(server.failure.error, LookupError)


# -- FastAPI ------------------------------------------------------------------------------------------------


def make_fastapi(events: list[str]) -> fastapi.FastAPI:
    app = fastapi.FastAPI()
    together = threading.Barrier(2)

    async def connection() -> AsyncIterator[str]:
        events.append("opened")
        try:
            yield "connection"
        finally:
            await trio.lowlevel.checkpoint()
            events.append("closed")

    @app.get("/sync")
    def sync() -> dict[str, bool]:
        together.wait(10)
        return {"in_worker_thread": threading.current_thread() is not threading.main_thread()}

    @app.get("/items/{number}")
    async def item(number: int, db: Annotated[str, fastapi.Depends(connection)]) -> dict[str, Any]:
        return {"number": number, "db": db}

    @app.get("/fail")
    async def fail(db: Annotated[str, fastapi.Depends(connection)]) -> None:
        raise LookupError("a bug")

    @app.get("/teapot")
    async def teapot() -> None:
        raise fastapi.HTTPException(418, "short and stout")

    @app.post("/upload")
    async def upload(file: fastapi.UploadFile) -> dict[str, Any]:
        return {"name": file.filename, "size": len(await file.read())}

    return app


async def test_fastapi_sync_endpoints_run_at_the_same_time_in_threads():
    async with serving(make_fastapi([])) as server:
        bodies = []

        async def ask():
            bodies.append((await server.get("/sync")).body)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(ask)
    assert bodies == [b'{"in_worker_thread":true}'] * 2


async def test_fastapi_dependencies_are_closed_and_inputs_validated():
    events: list[str] = []
    async with serving(make_fastapi(events)) as server, server.connect() as client:
        assert json.loads((await client.get("/items/7")).body) == {"number": 7, "db": "connection"}
        response = await client.get("/items/seven")
        assert response.status == 422
        assert events[:2] == ["opened", "closed"], "closed after its response, before the next request"
        assert json.loads(response.body)["detail"][0]["loc"] == ["path", "number"]
        assert (await client.get("/teapot")).status == 418
        assert "/items/{number}" in json.loads((await client.get("/openapi.json")).body)["paths"]
    assert server.failure is None, "a declared HTTP error is an answer, not a failure"


async def test_fastapi_takes_uploads():
    async with serving(make_fastapi([])) as server, server.connect() as client:
        body = form("file", b"x" * 200_000, "data.bin")
        response = await client.request("POST", "/upload", MULTIPART, body)
        assert json.loads(response.body) == {"name": "data.bin", "size": 200_000}


async def test_a_fastapi_bug_closes_its_dependencies_and_is_judged():
    events: list[str] = []
    async with serving(make_fastapi(events)) as server:
        assert (await server.get("/fail")).status == 500
    assert events == ["opened", "closed"]
    assert server.failure.row == "A3"


# -- Flask, through WSGI ------------------------------------------------------------------------------------


def make_flask() -> flask.Flask:
    app = flask.Flask(__name__)

    @app.route("/hello/<name>")
    def hello(name: str) -> str:
        return f"hello {name} {flask.request.args.get('q')}"

    @app.route("/form", methods=["POST"])
    def take_form() -> dict[str, Any]:
        file = flask.request.files["file"]
        return {"name": file.filename, "size": len(file.read())}

    @app.route("/stream")
    def stream() -> flask.Response:
        return flask.Response((f"part {n}\n" for n in range(10)), mimetype="text/plain")

    @app.route("/empty", methods=["DELETE"])
    def empty() -> tuple[str, int]:
        return "", 204

    @app.route("/fail")
    def fail() -> None:
        raise LookupError("a bug")

    return app


async def test_flask_is_served_through_wsgi():
    async with serving(make_flask()) as server, server.connect() as client:
        assert (await client.get("/hello/w%C3%B6rld?q=1")).body.decode() == "hello wörld 1"
        assert (await client.get("/hello/x", method="HEAD")).header("content-length") == "12"
        response = await client.request("POST", "/form", MULTIPART, form("file", b"x" * 100_000, "a.bin"))
        assert json.loads(response.body) == {"name": "a.bin", "size": 100_000}
        assert (await client.get("/stream")).body == b"".join(b"part %d\n" % n for n in range(10))
        assert (await client.request("DELETE", "/empty")).status == 204
        assert (await client.get("/nowhere")).status == 404
        # Flask keeps its own errors: it answers and raises nothing.
        assert (await client.get("/fail")).status == 500
    assert server.failure is None


# -- Litestar -----------------------------------------------------------------------------------------------


async def test_litestar_handlers_run_with_state_streams_and_threads():
    @litestar.get("/items/{number:int}")
    async def item(number: FromPath[int], q: FromQuery[str | None] = None) -> dict[str, Any]:
        return {"number": number, "q": q}

    @litestar.get("/sync", sync_to_thread=True)
    def sync() -> dict[str, bool]:
        return {"in_worker_thread": threading.current_thread() is not threading.main_thread()}

    @litestar.get("/stream")
    async def stream() -> litestar.response.Stream:
        async def parts() -> AsyncIterator[str]:
            for n in range(10):
                yield f"part {n}\n"

        return litestar.response.Stream(parts())

    started: list[str] = []

    async def on_startup() -> None:
        started.append("up")

    app = litestar.Litestar(
        [item, sync, stream], on_startup=[on_startup], openapi_config=None, logging_config=None
    )
    async with serving(app, lifespan="on") as server, server.connect() as client:
        assert started == ["up"]
        assert json.loads((await client.get("/items/7?q=x")).body) == {"number": 7, "q": "x"}
        assert (await client.get("/items/x")).status == 404
        assert json.loads((await client.get("/sync")).body) == {"in_worker_thread": True}
        assert (await client.get("/stream")).body.startswith(b"part 0\npart 1\n")
    assert server.failure is None


# -- Quart-Trio ---------------------------------------------------------------------------------------------


async def test_quart_trio_runs_with_its_own_nursery_for_background_work():
    app = quart_trio.QuartTrio(__name__)
    worked = trio.Event()

    @app.route("/work", methods=["POST"])
    async def work() -> dict[str, int]:
        import quart

        size = len(await quart.request.get_data())

        async def later() -> None:
            worked.set()

        app.nursery.start_soon(later)
        return {"size": size}

    @app.route("/stream")
    async def stream() -> Any:
        async def parts() -> AsyncIterator[bytes]:
            for n in range(10):
                yield b"part %d\n" % n

        return parts()

    async with serving(app, lifespan="on") as server, server.connect() as client:
        response = await client.request("POST", "/work", body=b"x" * 100_000)
        assert json.loads(response.body) == {"size": 100_000}
        with trio.fail_after(30):
            await worked.wait()
        assert (await client.get("/stream")).body == b"".join(b"part %d\n" % n for n in range(10))
    assert server.failure is None
