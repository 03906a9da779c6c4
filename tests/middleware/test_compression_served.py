"""Compression between real frameworks and a real client."""

from __future__ import annotations

import zlib

import brotli
import h11
import pytest
import starlette.applications
import starlette.middleware
import starlette.responses
import starlette.routing
import trio

from tests.middleware.calling import CODINGS, PROSE, Decoder, app_sending, body, start, text
from trioserve import Compression, StaticFiles
from trioserve.testing import encode_request, no_leaks, serving

pytestmark = pytest.mark.modes("tls", "http2")


async def read_parts(client):
    """The response's head, then its body as it arrives."""
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    parser.send(h11.EndOfMessage())
    while True:
        event = parser.next_event()
        if event is h11.NEED_DATA:
            parser.receive_data(await client.receive())
        elif isinstance(event, h11.Response):
            yield dict(event.headers)
        elif isinstance(event, h11.Data):
            yield bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            return


@pytest.mark.parametrize("coding", CODINGS)
async def test_server_sent_events_arrive_when_they_are_sent(coding):
    """No event is sent before the client has decoded the one before it."""
    received = [trio.Event() for _ in range(3)]

    async def events(scope, receive, send):
        if scope["type"] != "http":
            return
        await send(start([(b"content-type", b"text/event-stream")]))
        for number, event in enumerate(received):
            await send(body(b"data: event %d\n\n" % number, more=True))
            await event.wait()
        await send(body(b""))

    async with no_leaks(), serving(Compression(events)) as server, server.connect() as client:
        await client.send(encode_request("GET", "/", [("accept-encoding", coding)]))
        text = b""
        decoder = Decoder(None)
        with trio.fail_after(30):
            async for part in read_parts(client):
                if isinstance(part, dict):
                    assert part[b"content-encoding"] == coding.encode()
                    decoder = Decoder(coding)
                    continue
                text += decoder.decode(part)
                for number, event in enumerate(received):
                    if b"data: event %d\n\n" % number in text:
                        event.set()
        assert text == b"".join(b"data: event %d\n\n" % n for n in range(3))
    assert server.failure is None


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("size", [5_000, 300_000, 3_000_000])
async def test_a_client_decodes_what_it_asked_for(coding, size, engine):
    data = (PROSE * 110)[:size]
    async with no_leaks(), serving(Compression(text(data)), http_engine=engine) as server:
        async with server.connect() as client:
            for _ in range(2):
                response = await client.get("/", [("accept-encoding", f"{coding}, identity;q=0.5")])
                assert (response.status, response.complete) == (200, True)
                assert response.header("content-encoding") == coding
                assert Decoder(coding).decode(response.body) == data
            head = await client.get("/", [("accept-encoding", coding)], method="HEAD")
            assert (head.header("content-encoding"), head.header("content-length")) == (coding, None)
            response = await client.get("/")
            assert (response.header("content-encoding"), response.body) == (None, data)
    assert server.failure is None


async def test_a_body_shorter_than_declared_is_visibly_cut():
    app = app_sending(
        start([(b"content-type", b"text/plain"), (b"content-length", b"90000")]),
        body(PROSE, True),
        body(b"x"),
    )
    async with serving(Compression(app)) as server, server.connect() as client:
        response = await client.get("/", [("accept-encoding", "gzip")])
        assert not response.complete
    assert server.failure.row == "A5"


async def test_a_client_that_leaves_is_no_error_of_the_app():
    async def endless(scope, receive, send):
        await send(start())
        while True:
            await send(body(PROSE, more=True))

    middleware = Compression(endless)
    async with no_leaks(), serving(middleware, disconnect_grace=0.01) as server:
        async with server.connect() as client:
            await client.send(encode_request("GET", "/", [("accept-encoding", "br")]))
            await client.receive_until(b"\r\n\r\n")
            client.reset()
        with trio.fail_after(30):
            await server.wait_idle()
    assert server.failure is None
    assert middleware.open_streams == 0


def make_starlette(path):
    responses, Route = starlette.responses, starlette.routing.Route

    async def as_json(request):
        return responses.JSONResponse({"lines": PROSE.decode().splitlines()}, headers={"etag": '"v1"'})

    async def file(request):
        return responses.FileResponse(path)

    async def stream(request):
        async def lines():
            for line in PROSE.splitlines(keepends=True):
                yield line

        return responses.StreamingResponse(lines(), media_type="text/plain")

    async def image(request):
        return responses.Response(PROSE, media_type="image/png")

    routes = [Route("/json", as_json), Route("/file", file), Route("/stream", stream), Route("/image", image)]
    middleware = [starlette.middleware.Middleware(Compression, gzip_level=6)]
    return starlette.applications.Starlette(routes=routes, middleware=middleware)


def without_file_events(app):
    """As under a server that cannot send files."""

    async def plain(scope, receive, send):
        scope.get("extensions", {}).clear()
        await app(scope, receive, send)

    return plain


async def test_starlette_is_compressed_by_its_own_middleware_list(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_bytes(PROSE * 10)
    app = without_file_events(make_starlette(path))
    async with serving(app) as server, server.connect() as client:
        response = await client.get("/json", [("accept-encoding", "gzip, deflate, br")])
        assert response.header("content-encoding") == "br"
        assert response.header("etag") == 'W/"v1"'
        assert int(response.header("content-length")) == len(response.body)
        assert brotli.decompress(response.body).startswith(b'{"lines":["Line 0')

        response = await client.get("/stream", [("accept-encoding", "gzip")])
        assert zlib.decompress(response.body, 31) == PROSE

        response = await client.get("/file", [("accept-encoding", "gzip")])
        assert zlib.decompress(response.body, 31) == PROSE * 10
        etag = response.header("etag")
        assert etag.startswith('W/"')
        assert (response.header("accept-ranges"), response.header("content-length")) == (None, None)

        response = await client.get("/file", [("accept-encoding", "gzip"), ("range", "bytes=5-9")])
        assert (response.status, response.body) == (206, PROSE[5:10])
        assert (response.header("content-encoding"), response.header("vary")) == (None, "accept-encoding")

        head = await client.get("/file", [("accept-encoding", "gzip")], method="HEAD")
        assert (head.status, head.header("etag"), head.header("content-encoding")) == (200, etag, "gzip")
        assert (head.header("content-length"), head.body) == (None, b"")

        response = await client.get("/image", [("accept-encoding", "gzip")])
        assert (response.body, response.header("vary")) == (PROSE, None)
    assert server.failure is None


async def test_starlettes_files_go_out_as_files_where_the_server_can(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_bytes(PROSE)
    async with serving(make_starlette(path)) as server, server.connect() as client:
        response = await client.get("/file", [("accept-encoding", "gzip")])
        coding = response.header("content-encoding")
        assert Decoder(coding).decode(response.body) == PROSE
        assert coding is None, "it has become a body that was compressed"
        assert response.header("accept-ranges") == "bytes"
    assert server.failure is None


async def test_files_of_static_files_stay_zero_copy(tmp_path):
    """Nothing of a file passes through the middleware, nor through the app."""
    (tmp_path / "movie.mp4").write_bytes(b"m" * 300_000)
    events = []

    class Spy:
        """What stands between the middleware and the server, and says that files get through."""

        def __init__(self, send):
            self.inner_send = send

        async def send(self, message):
            events.append(message["type"])
            await self.inner_send(message)

    app = Compression(StaticFiles(tmp_path))

    async def spied(scope, receive, send):
        await app(scope, receive, send if scope["type"] != "http" else Spy(send).send)

    async with serving(spied) as server, server.connect() as client:
        response = await client.get("/movie.mp4", [("accept-encoding", "br")])
        assert response.body == b"m" * 300_000
        assert response.header("content-encoding") is None
        assert events == ["http.response.start", "http.response.zerocopysend"]
