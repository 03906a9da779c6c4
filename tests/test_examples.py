"""Every example does what its docstring says, as a real process, on trioserve and under `hypercorn -k trio`."""

from __future__ import annotations

import json
import os
import re
import ssl
import struct
import sys
import wave
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import brotli
import pytest
import trio

from tests.e2e.process import ServerProcess, run_to_end, start_process, trioserve_command
from tests.websocket_client import Closed, Refused, WebSocketClient, open_websocket

FOLDER = Path(__file__).parents[1] / "examples"

SERVERS = {
    "trioserve": trioserve_command(),
    "hypercorn": [sys.executable, "-m", "hypercorn", "-k", "trio"],
}

Serve = Callable[..., AbstractAsyncContextManager[ServerProcess]]


@pytest.fixture(params=SERVERS)
def serve(request: Any) -> Serve:
    @asynccontextmanager
    async def serve(name: str, *flags: str, **env: str) -> AsyncIterator[ServerProcess]:
        command = [*SERVERS[request.param], "--bind", "127.0.0.1:0", *flags, f"examples.{name}:app"]
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
        assert trio.current_time() - began < 45  # one part would take a minute
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
        with trio.fail_after(30):
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
            with trio.fail_after(30):
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


async def test_chat(serve: Serve) -> None:
    """Without Redis, whose part `e2e/test_chat.py` has."""

    def message(text: str, name: str = "Ada", key: str = "") -> str:
        return json.dumps({"name": name, "text": text, "key": key or f"key of {text}"})

    async def hear(client: WebSocketClient) -> Any:
        """The next messages; how many are here is said in between."""
        while "here" in (frame := json.loads(await client.receive())):
            assert frame["here"] in (1, 2)
        return frame

    async def hear_text(client: WebSocketClient) -> tuple[str, str]:
        (said,) = (await hear(client))["messages"]
        return said["id"], said["text"]

    async with serve("chat.app", CHAT_STORE="memory") as server:
        page = await server.get("/")
        assert b'<script src="chat.js" type="module"></script>' in page.body
        assert "connect-src 'self'" in (page.header("content-security-policy") or "")
        assert (await server.get("/chat.js")).status == 200

        async with await open_websocket(server.address, "/rooms/tea") as ada:
            assert await hear(ada) == {"ready": True}
            await ada.send(message("one"))
            first, text = await hear_text(ada)
            assert text == "one"
            async with await open_websocket(server.address, "/rooms/tea") as bob:
                assert [said["text"] for said in (await hear(bob))["messages"]] == ["one"]
                assert await hear(bob) == {"ready": True}
                await bob.send(message("grüße", name="Bob"))
                assert (await hear_text(ada))[1] == (await hear_text(bob))[1] == "grüße"
            # Who has been away is told what he has missed, and nothing else; in another room there is nothing.
            async with await open_websocket(server.address, f"/rooms/tea?after={first}") as bob:
                assert [said["text"] for said in (await hear(bob))["messages"]] == ["grüße"]
                assert await hear(bob) == {"ready": True}
            async with await open_websocket(server.address, "/rooms/coffee?after=then") as bob:
                assert await hear(bob) == {"ready": True}

        for wrong, code in (
            ("hello", 1007),
            ("[" * 100_000, 1007),
            ("7", 1007),
            (json.dumps({"name": "Ada", "text": "hello"}), 1007),
            (message("\ud83d"), 1007),
            (message(" "), 1007),
            (message("x" * 2001), 1009),
            (message("x", name="A" * 41), 1009),
        ):
            async with await open_websocket(server.address, "/rooms/tea") as client:
                await client.send(wrong)
                with pytest.raises(Closed) as closed:
                    while True:
                        await client.receive()
                assert closed.value.code == code, wrong[:80]

        host = server.address.encode()
        for target, origin in (("/rooms/Tea", host), ("/elsewhere", host), ("/rooms/tea", b"example.com")):
            with pytest.raises(Refused, match="403"):
                await open_websocket(server.address, target, [(b"origin", b"http://" + origin)])
        async with await open_websocket(server.address, "/rooms/tea", [(b"origin", b"http://" + host)]):
            pass


async def test_ticker(serve: Serve) -> None:
    async with serve("ticker.app") as server:
        assert b"ticker.js" in (await server.get("/")).body
        async with await open_websocket(server.address, "/state") as client:
            shape = json.loads(await client.receive())
            balls = len(shape["radii"])

            async def frame() -> tuple[int, ...]:
                return struct.unpack(f"!IH{2 * balls}H", await client.receive())  # type: ignore[arg-type]

            frames = [await frame() for _ in range(10)]
            numbers = [number for number, *_ in frames]
            assert numbers == sorted(set(numbers))  # a machine that is late leaves some out
            assert len({tuple(places) for _, _, *places in frames}) == 10  # it moves
            # No more than ten are sent ahead of what is drawn; the next is then the newest, not the one after those.
            with trio.move_on_after(1):
                raise AssertionError(await frame())
            await client.send(json.dumps({"drawn": 1}))
            skipping = await frame()
            assert skipping[0] > numbers[-1] + 5
            assert skipping[1] == 1
            await client.send(json.dumps({"drawn": 2**64, "poke": [0.5, 7]}))
            assert (await frame())[0] > skipping[0]
            for wrong in ("hello", "[" * 100_000, "7", '{"drawn": 1e999}', '{"poke": [1]}'):
                async with await open_websocket(server.address, "/state") as other:
                    await other.send(wrong)
                    with pytest.raises(Closed, match="1007 not a message"):
                        while True:
                            await other.receive()
        with pytest.raises(Refused, match="403"):
            await open_websocket(server.address, "/")


async def test_https(serve: Serve, tmp_path: Path) -> None:
    pytest.importorskip("trustme")
    maker = await run_to_end(sys.executable, "-W", "error", "-m", "examples.https", str(tmp_path / "new"))
    assert maker.returncode == 0, maker.stderr.text
    files = {path.name: path for path in (tmp_path / "new").iterdir()}
    assert set(files) == {"ca.pem", "server.pem", "server.key", "client.pem", "client.key"}
    for name, path in files.items():
        assert (path.stat().st_mode & 0o077 == 0) == name.endswith(".key")
    (says,) = re.findall(r"(--certfile \S+ --keyfile \S+) examples\.https\.app:app", maker.stdout.text)
    verify = ("--ca-certs", str(files["ca.pem"]), "--verify-mode", "CERT_OPTIONAL")
    async with serve("https.app", *says.split(), *verify) as server:
        tls = ssl.create_default_context(cafile=str(files["ca.pem"]))
        for client in (None, "developer@localhost"):
            if client is not None:
                tls.load_cert_chain(files["client.pem"], files["client.key"])
            stream = await trio.open_ssl_over_tcp_stream(
                "localhost", server.port, https_compatible=True, ssl_context=tls
            )
            async with stream:
                await stream.send_all(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
                answer = b"".join([part async for part in stream])
            said = json.loads(answer.partition(b"\r\n\r\n")[2])
            assert (said["scheme"], said["http"]) == ("https", "1.1")
            if b"hypercorn" in answer:
                assert said["tls"] is None  # it does not say
            else:
                assert said["tls"]["version"] == "TLS 1.3"
                assert said["tls"]["cipher_suite"].startswith("0x13")
                assert client is said["tls"]["client"] or client in said["tls"]["client"]


def test_each_example_is_in_the_readme_and_has_a_test() -> None:
    names = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    names |= {f"{path.parent.name}.app" for path in FOLDER.glob("*/app.py")}
    links = re.findall(
        r"^\| \[`[^`]+`\]\(([\w/]+)(?:\.py)?\)", (FOLDER / "README.md").read_text(), re.MULTILINE
    )
    assert {name.replace("/", ".") for name in links} == names
    assert set(re.findall(r'serve\("([\w.]+)"', Path(__file__).read_text())) == names
