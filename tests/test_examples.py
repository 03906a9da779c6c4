"""Every example does what its docstring says, as a real process, on trioserve and under `hypercorn -k trio`."""

from __future__ import annotations

import json
import os
import re
import sys
import wave
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import brotli
import pytest
import trio

from tests.e2e.process import ServerProcess, start_process, trioserve_command

FOLDER = Path(__file__).parents[1] / "examples"

SERVERS = {
    "trioserve": trioserve_command(),
    "hypercorn": [sys.executable, "-m", "hypercorn", "-k", "trio"],
}

Serve = Callable[..., AbstractAsyncContextManager[ServerProcess]]


@pytest.fixture(params=SERVERS)
def serve(request: Any) -> Serve:
    @asynccontextmanager
    async def serve(name: str, **env: str) -> AsyncIterator[ServerProcess]:
        command = [*SERVERS[request.param], "--bind", "127.0.0.1:0", f"examples.{name}:app"]
        async with start_process(*command, env=env) as server:
            await server.wait_running()
            yield server

    return serve


async def test_hello(serve: Serve) -> None:
    async with serve("hello") as server:
        async with server.connect() as client:
            for _ in range(2):
                response = await client.get()
                assert (response.status, response.body) == (200, b"Hello from trioserve\n")


async def test_streaming_sends_events_as_they_happen(serve: Serve) -> None:
    async with serve("streaming") as server:
        async with server.connect() as client:
            await client.send(b"GET /events?every=0.01 HTTP/1.1\r\nhost: x\r\n\r\n")
            head = await client.receive_until(b"\r\n\r\n")
            assert b"content-type: text/event-stream" in head
            for number in range(1, 6):
                await client.receive_until(
                    b'id: %d\nevent: tick\ndata: {"number": %d}\n\n' % (number, number)
                )
        # The client has left in the middle of it, and the server is none the worse.
        response = await server.get("/events?count=2&every=0")
        assert re.findall(rb"^id: (\d)", response.body, re.MULTILINE) == [b"1", b"2"]
        assert response.complete
        assert (await server.get("/events?count=1&every=soon")).complete
        assert (await server.get("/elsewhere")).status == 404


async def test_fanout_takes_no_longer_than_its_patience_and_says_what_failed(serve: Serve) -> None:
    async with serve("fanout") as server:
        began = trio.current_time()
        response = await server.get()
        assert trio.current_time() - began < 20  # one part would take a minute
        assert json.loads(response.body) == {
            "price": 19.5,
            "stock": 7,
            "reviews": "unavailable: nobody listens at reviews:80",
            "recommendations": "too late",
        }


async def test_starlette_app(serve: Serve) -> None:
    pytest.importorskip("starlette")
    async with serve("starlette_app") as server:
        assert (await server.get("/?name=Ada")).body == b"Hello from Starlette\n"
        with trio.fail_after(10):
            while (visits := json.loads((await server.get("/visits")).body)) != {"visits": ["Ada"]}:
                assert visits == {"visits": []}  # the note is written after the answer
        assert (await server.get("/countdown/3")).body == b"3\n2\n1\n0\n"
        async with server.connect() as client:
            response = await client.request("POST", "/measure", body=b"x" * 300_000)
            assert json.loads(response.body) == {"bytes": 300_000}
            assert (await client.get("/missing")).status == 404


async def test_fastapi_app(serve: Serve) -> None:
    pytest.importorskip("fastapi")
    json_type = [("content-type", "application/json")]
    async with serve("fastapi_app") as server:
        async with server.connect() as client:
            order = {"item": "tea", "amount": 2}
            response = await client.request("POST", "/orders", json_type, json.dumps(order).encode())
            assert (response.status, json.loads(response.body)) == (202, order)
            with trio.fail_after(10):
                while (done := json.loads((await client.get("/orders")).body)) != [order]:
                    assert done == []
            response = await client.request("POST", "/orders", json_type, b'{"item": "", "amount": 0}')
            assert response.status == 422
            statuses = []
            for _ in range(20):
                order["amount"] = 1000
                response = await client.request("POST", "/orders", json_type, json.dumps(order).encode())
                statuses.append(response.status)
            assert statuses[0] == 202
            assert statuses[-1] == 503
            assert response.header("retry-after") == "1"
            assert (await client.get("/openapi.json")).status == 200


_NO_WSGI = "hypercorn 0.18 on trio cannot start a WSGI app: its wrapper leaves the lifespan too early"


@pytest.mark.parametrize(
    "serve", ["trioserve", pytest.param("hypercorn", marks=pytest.mark.skip(reason=_NO_WSGI))], indirect=True
)
async def test_wsgi_app(serve: Serve) -> None:
    pytest.importorskip("flask")
    async with serve("wsgi_app") as server:
        assert (await server.get()).body == b"Hello from Flask\n"
        assert (await server.get("/lines")).body == b"line 1\nline 2\nline 3\n"
        async with server.connect() as client:
            response = await client.request("POST", "/shout", body="grüße".encode())
            assert response.body == "GRÜSSE".encode()
        async with trio.open_nursery() as nursery:
            ended: list[str] = []
            for path in ("/nap?seconds=0.5", "/"):
                nursery.start_soon(_get, server, path, ended)
        assert ended == ["/", "/nap?seconds=0.5"]


async def _get(server: ServerProcess, path: str, ended: list[str]) -> None:
    assert (await server.get(path)).status == 200
    ended.append(path)


async def test_docs_site(serve: Serve, tmp_path: Path) -> None:
    pytest.importorskip("markdown_it")
    from examples.docs_site import build

    assert build.main([str(tmp_path)]) == 0
    async with serve("docs_site.app", DOCS_SITE=str(tmp_path)) as server, server.connect() as client:
        page = await client.get("/", [("accept-encoding", "gzip, br")])
        assert (page.status, page.header("content-type")) == (200, "text/html; charset=utf-8")
        assert (page.header("content-encoding"), page.header("cache-control")) == ("br", "no-cache")
        assert brotli.decompress(page.body) == (tmp_path / "index.html").read_bytes()
        policy = page.header("content-security-policy")
        assert policy is not None
        assert "unsafe" not in policy
        etag = page.header("etag")
        assert etag is not None
        again = await client.get("/", [("accept-encoding", "gzip, br"), ("if-none-match", etag)])
        assert (again.status, again.body) == (304, b"")

        plain = await client.get("/use/")
        assert (plain.status, plain.header("content-encoding")) == (200, None)
        (style,) = re.findall(r'<link rel="stylesheet" href="([^"]+)">', plain.body.decode())
        asset = await client.get(style)
        assert (asset.status, asset.header("content-type")) == (200, "text/css; charset=utf-8")
        assert asset.header("cache-control") == "public, max-age=31536000, immutable"

        moved = await client.get("/use")
        assert (moved.status, moved.header("location")) == (308, "./use/")
        missing = await client.get("/used/")
        assert (missing.status, missing.header("content-security-policy")) == (404, policy)
        assert b"<h1>Not found</h1>" in missing.body


async def test_downloads(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "grüße.txt").write_text("hello")
    os.utime(tmp_path / "grüße.txt", (1_700_000_000, 1_700_000_000))
    async with serve("downloads", DOWNLOADS=str(tmp_path)) as server, server.connect() as client:
        page = await client.get("/")
        assert b'<audio controls preload="metadata" src="/files/tones.wav">' in page.body
        assert (await client.get("/player.js")).header("content-type") == "text/javascript; charset=utf-8"
        listing = await client.get("/files/")
        assert listing.header("content-disposition") is None
        links = set(re.findall(r'href="([^"]+)"', listing.body.decode()))
        assert {"./tones.wav", "./gr%C3%BC%C3%9Fe.txt"} <= links

        with wave.open(str(tmp_path / "tones.wav")) as sound:
            assert sound.getnframes() == 600 * sound.getframerate()
        start = await client.get("/files/tones.wav", [("range", "bytes=0-3")])
        assert (start.status, start.body) == (206, b"RIFF")

        target = "/files/gr%C3%BC%C3%9Fe.txt"
        whole = await client.get(target)
        etag = whole.header("etag")
        assert etag is not None
        assert whole.header("content-disposition") == (
            "attachment; filename=\"gr__e.txt\"; filename*=UTF-8''gr%C3%BC%C3%9Fe.txt"
        )
        for condition, status, body in ((etag, 206, b"llo"), ('"another"', 200, b"hello")):
            response = await client.get(target, [("range", "bytes=2-"), ("if-range", condition)])
            assert (response.status, response.body) == (status, body)
        assert (await client.get("/files")).header("location") == "./files/"
        for elsewhere in ("/filesystem", "/nothing", "/files/nothing", "/files/../examples/hello.py"):
            assert (await client.get(elsewhere)).status == 404
    # What was there when it started is what is there now: the recording is made once.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grüße.txt", "tones.wav"]


def test_each_example_is_in_the_readme_and_has_a_test() -> None:
    names = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    names |= {f"{path.parent.name}.app" for path in FOLDER.glob("*/app.py")}
    links = re.findall(
        r"^\| \[`[^`]+`\]\(([\w/]+)(?:\.py)?\)", (FOLDER / "README.md").read_text(), re.MULTILINE
    )
    assert {name.replace("/", ".") for name in links} == names
    assert set(re.findall(r'serve\("([\w.]+)"', Path(__file__).read_text())) == names
