"""`StaticFiles` among other apps: mounted, wrapped, on asyncio, by itself; and what becomes of its descriptors."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import starlette.applications
import starlette.middleware
import starlette.middleware.base
import starlette.middleware.gzip
import starlette.routing
import trio

import trioserve
from trioserve import ConfigError, StaticFiles
from trioserve.asgi.exchange import Exchange
from trioserve.static.confine import ConfinedRoot, NeedsThread
from trioserve.testing import no_leaks, serving

from .asking import LARGE, ask, http_scope, nothing_to_receive


def test_it_is_public() -> None:
    assert trioserve.StaticFiles is StaticFiles
    assert "StaticFiles" in trioserve.__all__
    with pytest.raises(AttributeError, match="no attribute 'Static'"):
        trioserve.Static  # noqa: B018


def test_it_says_what_it_serves(site: Path) -> None:
    app = StaticFiles(site)
    assert repr(app) == f"<StaticFiles {site}, <FileCache 0 files, 0 descriptors, 0 bytes, 0 absent>>"
    app.close()
    assert repr(app) == f"<StaticFiles {site}, closed>"


@pytest.mark.parametrize("directory", ["nowhere", "plain.txt"])
def test_what_is_no_directory_is_refused_at_once(site: Path, directory: str) -> None:
    with pytest.raises(ConfigError, match="cannot be opened"):
        StaticFiles(site / directory)


# -- below a mount -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scope",
    [
        {"root_path": "", "path": "/docs/a b.txt", "raw_path": b"/docs/a%20b.txt"},
        # The specification's: the path has the root path in it.
        {"root_path": "/s", "path": "/s/docs/a b.txt", "raw_path": b"/s/docs/a%20b.txt"},
        {"root_path": "/s/", "path": "/s/docs/a b.txt", "raw_path": b"/s/docs/a%20b.txt"},
        {"root_path": "/a b/c", "path": "/a b/c/docs/a b.txt", "raw_path": b"/a%20b/c/docs/a%20b.txt"},
        # Without raw_path, which is optional.
        {"root_path": "/s", "path": "/s/docs/a b.txt", "raw_path": None},
        # Older frameworks take the prefix off the path, and not off raw_path.
        {"root_path": "/s", "path": "/docs/a b.txt", "raw_path": b"/s/docs/a%20b.txt"},
        # A proxy has taken it off, and the framework has mounted us.
        {"root_path": "/s", "path": "/docs/a b.txt", "raw_path": b"/docs/a%20b.txt"},
        {
            "root_path": "/p/s",
            "app_root_path": "/p",
            "path": "/s/docs/a b.txt",
            "raw_path": b"/s/docs/a%20b.txt",
        },
        # Servers that leave the query in.
        {"root_path": "", "path": "/docs/a b.txt", "raw_path": b"/docs/a%20b.txt?x=1"},
    ],
)
async def test_the_path_below_a_mount_is_found(site: Path, scope: Any) -> None:
    app = StaticFiles(site)
    for _ in range(2):
        assert (await ask(app, "/", **scope)).body == b"blank"
    app.close()


async def test_the_mount_itself_is_redirected_to_its_slash(site: Path) -> None:
    app = StaticFiles(site)
    response = await ask(app, "/my%20site?x", root_path="/my site")
    assert (response.status, response.header("location")) == (308, "./my%20site/?x")
    assert (await ask(app, "/my%20site/", root_path="/my site")).status == 200
    assert (await ask(app, "/my%20site-2/", root_path="/my site")).status == 404
    app.close()


def in_starlette(site: Path, *middleware: Any) -> Any:
    route = starlette.routing.Mount("/files", app=StaticFiles(site))
    return starlette.applications.Starlette(routes=[route], middleware=list(middleware))


class PassingOn(starlette.middleware.base.BaseHTTPMiddleware):
    async def dispatch(self, request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["x-passed"] = "on"
        return response


@pytest.mark.modes("tls", "http2")
@pytest.mark.parametrize(
    "middleware",
    [
        [],
        [starlette.middleware.Middleware(PassingOn)],
        [starlette.middleware.Middleware(starlette.middleware.gzip.GZipMiddleware)],
    ],
    ids=["none", "base", "gzip"],
)
async def test_in_starlette_and_behind_its_middleware(site: Path, engine: str, middleware: Any) -> None:
    """Which loses events that it does not know: files must get through all the same, whole and in parts."""
    app = in_starlette(site, *middleware)
    plain = [("accept-encoding", "identity")]
    async with serving(app, http_engine=engine) as server, server.connect() as client:
        for _ in range(2):
            response = await client.get("/files/large.bin", plain)
            assert (response.status, response.body, response.complete) == (200, LARGE, True)
            assert response.header("x-passed") == ("on" if "PassingOn" in repr(middleware) else None)
            ranged = await client.get("/files/large.bin", [*plain, ("range", "bytes=5-99999")])
            assert (ranged.status, ranged.body) == (206, LARGE[5:100000])
            several = await client.get("/files/large.bin", [*plain, ("range", "bytes=5-9,1000-1009")])
            assert (several.status, several.body.count(b"Content-Range")) == (206, 2)
            assert (await client.get("/files/plain.txt", plain)).body == b"0123456789"
            assert (await client.get("/files/docs", plain)).header("location") == "./docs/"
            assert (await client.get("/files/nothing", plain)).status == 404
        assert server.failure is None


class Private(StaticFiles):
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (b"authorization", b"Basic eDp5") not in scope["headers"]:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"who are you?"})
            return
        await super().__call__(scope, receive, send)


class Renamed(Private):
    pass


class Named(StaticFiles):
    name = "files"


@pytest.mark.modes("tls", "http2")
@pytest.mark.parametrize("kind", [Private, Renamed])
async def test_a_subclass_that_asks_for_a_password_asks_for_it_each_time(
    site: Path, engine: str, kind: Any
) -> None:
    """Also when the file is in the cache, where the server would have the answer without a call."""
    allowed = [("authorization", "Basic eDp5")]
    async with serving(kind(site), http_engine=engine) as server, server.connect() as client:
        for target in ("/plain.txt", "/large.bin", "/"):
            for _ in range(2):
                assert (await client.get(target, allowed)).status == 200
                assert (await client.get(target)).status == 401
    assert kind.quick_answer is None
    assert Named.quick_answer is StaticFiles.quick_answer


class HandingOn:
    """A wrapper as many write it: what it does not have is looked for in the app."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def __getattr__(self, name: str) -> Any:
        return getattr(self.app, name)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (b"authorization", b"Basic eDp5") not in scope["headers"]:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"who are you?"})
            return
        await self.app(scope, receive, send)


@pytest.mark.modes("tls", "http2")
async def test_a_wrapper_that_asks_for_a_password_asks_for_it_each_time(site: Path, engine: str) -> None:
    allowed = [("authorization", "Basic eDp5")]
    async with (
        serving(HandingOn(StaticFiles(site)), http_engine=engine) as server,
        server.connect() as client,
    ):
        for target in ("/plain.txt", "/large.bin"):
            for _ in range(2):
                assert (await client.get(target, allowed)).status == 200
                assert (await client.get(target)).status == 401


async def test_closing_it_ends_requests_under_way_with_503(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ConfinedRoot.open
    apps: list[StaticFiles] = []

    def close_meanwhile(root: ConfinedRoot, relative: bytes, *, nonblocking: bool = False) -> Any:
        if nonblocking:
            raise NeedsThread
        apps[0].close()
        return real(root, relative)

    monkeypatch.setattr(ConfinedRoot, "open", close_meanwhile)
    async with no_leaks():
        for target in ("/large.bin", "/bare/"):
            apps[:] = [StaticFiles(site, listing=True)]
            response = await ask(apps[0], target)
            assert (response.status, response.header("retry-after")) == (503, "1")
        monkeypatch.undo()
        assert (await ask(apps[0], "/large.bin")).body == LARGE
        apps[0].close()


# -- sending without the server's help -----------------------------------------------------------------------


async def test_without_zero_copy_a_file_is_read_in_parts(site: Path) -> None:
    app = StaticFiles(site)
    sizes = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sizes.append(len(message["body"]))

    await app(http_scope("/large.bin"), nothing_to_receive, send)
    assert sum(sizes) == len(LARGE)
    assert max(sizes) <= 128 * 1024
    assert len(sizes) > 2
    app.close()


@pytest.mark.parametrize("run", [trio.run, lambda function: asyncio.run(function())], ids=["trio", "asyncio"])
def test_a_server_that_never_waits_does_not_keep_the_others_waiting(
    site: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    """As uvicorn and hypercorn do when the client has gone: gigabytes would be read before anybody else had a turn."""
    monkeypatch.setattr("trioserve.static.sending.read_resident", lambda fd, at, size: os.pread(fd, size, at))
    app = StaticFiles(site)
    done: list[str] = []

    async def send(message: Any) -> None:
        done.append(message["type"])

    async def download() -> None:
        await app(http_scope("/large.bin"), nothing_to_receive, send)

    async def other() -> None:
        done.append("other")

    async def main() -> None:
        await ask(app, "/large.bin", "HEAD")  # no thread is needed for it any more
        if run is trio.run:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(other)
                await download()
        else:
            await asyncio.gather(download(), other())

    run(main)
    app.close()
    assert done.index("other") < len(done) - 1


@pytest.mark.parametrize("resident", [True, False])
async def test_a_file_that_becomes_shorter_is_never_made_up_for(
    site: Path, monkeypatch: pytest.MonkeyPatch, resident: bool
) -> None:
    if not resident:
        monkeypatch.setattr("trioserve.static.sending.read_resident", lambda *_: None)
    app = StaticFiles(site)
    received = []

    async def send(message: Any) -> None:
        received.append(message)
        os.truncate(site / "large.bin", 10_000)

    with pytest.raises(OSError, match="has become shorter"):
        await app(http_scope("/large.bin"), nothing_to_receive, send)
    assert received[-1].get("more_body", True)
    app.close()


async def test_a_file_that_cannot_be_read_is_an_error_of_the_response(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    app = StaticFiles(site)
    await ask(app, "/large.bin", "HEAD")
    monkeypatch.setattr("trioserve.static.sending.read_resident", fail)
    with pytest.raises(OSError, match="cannot be read at byte 0: Input/output error"):
        await ask(app, "/large.bin")
    app.close()


async def test_a_client_that_has_gone_ends_the_app_with_the_servers_error(site: Path) -> None:
    async def send(message: Any) -> None:
        raise BrokenPipeError("gone")

    app = StaticFiles(site)
    async with no_leaks():
        for target in ("/large.bin", "/plain.txt", "/nothing"):
            with pytest.raises(BrokenPipeError):
                await app(http_scope(target), nothing_to_receive, send)
        app.close()
        app._open()
    app.close()


class Passing:
    """Middleware that lets files through, and says so."""

    def __init__(self, send: Any) -> None:
        self.inner_send = send

    async def send(self, message: Any) -> None:
        await self.inner_send(message)


@pytest.mark.modes("tls", "http2")
async def test_our_own_server_gets_files_as_files(
    site: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither read in threads nor opened a second time."""

    async def no(*_: Any) -> None:
        raise AssertionError("there is a shorter way")

    monkeypatch.setattr("trioserve.static.sending._send_by_reading", no)
    monkeypatch.setattr("trioserve.static.sending._send_by_path", no)
    files = StaticFiles(site)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passing = Passing(send).send if scope["type"] == "http" and scope["query_string"] else send
        await files(scope, receive, passing)

    async with serving(app, http_engine=engine) as server, server.connect() as client:
        for target in ("/large.bin", "/large.bin?through-middleware"):
            assert (await client.get(target)).body == LARGE
            several = await client.get(target, [("range", "bytes=0-0,1000-200000")])
            assert (several.status, LARGE[1000:200001] in several.body) == (206, True)


async def test_files_are_borrowed_until_they_are_sent(site: Path) -> None:
    """Whatever happens to the cache meanwhile."""
    app = StaticFiles(site)
    seen = []

    class Server(Exchange):
        async def send(self, message: Any) -> None:
            if message["type"] == "http.response.zerocopysend":
                app.close()
                file = message["file"]
                seen.append(os.pread(file.fileno(), message["count"], message["offset"]))

    async with no_leaks():
        scope = http_scope("/large.bin", extensions={"http.response.zerocopysend": {}})
        await app(scope, nothing_to_receive, Passing(Server().send).send)
    assert seen == [LARGE]


@pytest.mark.modes("tls", "http2")
async def test_an_event_that_is_handed_on_late_leads_to_its_file_and_no_other(
    site: Path, tmp_path: Path, engine: str
) -> None:
    """The cache has closed the file, and its number is another one's, when the server hears of it."""
    (tmp_path / "other").write_bytes(bytes(len(LARGE)))
    files = StaticFiles(site)
    others: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        late: list[Any] = []

        async def keep(message: Any) -> None:
            late.append(message)

        await files(scope, receive, keep)
        files.close()
        others.extend(os.open(tmp_path / "other", os.O_RDONLY) for _ in range(4))
        while late:
            await send(late.pop(0))

    async with (
        no_leaks(),
        serving(app, http_engine=engine, lifespan="off") as server,
        server.connect() as client,
    ):
        assert (await client.get("/large.bin")).body == LARGE
        ranged = await client.get("/large.bin", [("range", "bytes=5-99999")])
        assert (ranged.status, ranged.body) == (206, LARGE[5:100000])
        for descriptor in others:
            os.close(descriptor)


async def test_a_path_for_which_there_is_no_descriptor_is_an_error_of_the_response(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(24, "Too many open files")

    app = StaticFiles(site)
    monkeypatch.setattr("os.dup", fail)
    with pytest.raises(OSError, match="cannot be sent: Too many open files"):
        await ask(app, "/large.bin", extensions={"http.response.pathsend": {"ranges": True}})
    app.close()


def test_it_runs_on_asyncio(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trioserve.static.confine import ConfinedRoot, NeedsThread

    real = ConfinedRoot.open

    def from_disk(self: ConfinedRoot, relative: bytes, *, nonblocking: bool = False) -> Any:
        if nonblocking:
            raise NeedsThread
        return real(self, relative)

    monkeypatch.setattr(ConfinedRoot, "open", from_disk)
    monkeypatch.setattr("trioserve.static.sending.read_resident", lambda *_: None)
    app = StaticFiles(site, listing=True)

    async def main() -> None:
        for _ in range(2):
            assert (await ask(app, "/large.bin")).body == LARGE
            assert (await ask(app, "/plain.txt")).body == b"0123456789"
            assert b"one.txt" in (await ask(app, "/bare/")).body
            assert (await ask(app, "/nothing")).status == 404

    asyncio.run(main())
    app.close()


# -- as an app of its own ------------------------------------------------------------------------------------


async def test_its_lifespan_gives_the_descriptors_back(site: Path) -> None:
    app = StaticFiles(site)
    async with no_leaks():
        async with serving(app, lifespan="on") as server:
            assert (await server.get("/large.bin")).body == LARGE
        assert "closed" in repr(app)
        # It serves again, all the same.
        async with serving(app, lifespan="on") as server:
            assert (await server.get("/large.bin")).body == LARGE


async def test_what_nobody_closes_ends_with_its_app(site: Path) -> None:
    """Mounted in another app it is told of no shutdown; tests may make an app each."""
    async with no_leaks():
        for _ in range(3):
            app = StaticFiles(site)
            assert (await ask(app, "/large.bin")).body == LARGE
        del app


async def test_the_fallthrough_apps_lifespan_is_the_servers_to_see(site: Path) -> None:
    events = []

    async def other(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "lifespan"
        for _ in range(2):
            event = (await receive())["type"]
            events.append(event)
            await send({"type": f"{event}.complete"})

    app = StaticFiles(site, fallthrough=other)
    async with serving(app, lifespan="on") as server:
        assert (await server.get("/plain.txt")).status == 200
    assert events == ["lifespan.startup", "lifespan.shutdown"]
    assert "closed" in repr(app)


@pytest.mark.parametrize("extensions", [None, {}, {"websocket.http.response": {}}])
async def test_a_websocket_is_refused(site: Path, extensions: Any) -> None:
    app = StaticFiles(site)
    events = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        events.append(message)

    await app({"type": "websocket", "path": "/", "extensions": extensions}, receive, send)
    if extensions:
        assert events[0]["status"] == 404
        assert events[1]["body"] == b"404 Not Found\n"
    else:
        assert [event["type"] for event in events] == ["websocket.close"]
    app.close()


async def test_a_websocket_falls_through(site: Path) -> None:
    seen = []

    async def other(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    app = StaticFiles(site, fallthrough=other)
    await app({"type": "websocket", "path": "/"}, nothing_to_receive, nothing_to_receive)
    assert seen == ["websocket"]
    app.close()


async def test_what_is_no_protocol_of_ours_is_an_error(site: Path) -> None:
    app = StaticFiles(site)
    with pytest.raises(ValueError, match="not 'mqtt'"):
        await app({"type": "mqtt"}, nothing_to_receive, nothing_to_receive)
    app.close()


# -- the machine's troubles ----------------------------------------------------------------------------------


async def test_without_descriptors_it_is_503_for_now(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trioserve.static.confine import ConfinedRoot

    def exhausted(*_: Any, **__: Any) -> None:
        raise OSError(24, "Too many open files")

    app = StaticFiles(site)
    with monkeypatch.context() as patch:
        patch.setattr(ConfinedRoot, "open", exhausted)
        response = await ask(app, "/plain.txt")
        assert (response.status, response.header("retry-after")) == (503, "1")
    assert (await ask(app, "/plain.txt")).status == 200
    app.close()


async def test_a_broken_disk_is_500_and_tells_nobody_why(
    site: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from trioserve.static.confine import ConfinedRoot

    def broken(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    app = StaticFiles(site, listing=True)
    monkeypatch.setattr(ConfinedRoot, "open", broken)
    response = await ask(app, "/plain.txt")
    assert (response.status, response.body) == (500, b"500 Internal Server Error\n")
    assert "Input/output error" in caplog.text
    app.close()


async def test_many_requests_at_once_for_a_file_on_a_slow_disk(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trioserve.static.confine import ConfinedRoot, NeedsThread

    real = ConfinedRoot.open

    def from_disk(self: ConfinedRoot, relative: bytes, *, nonblocking: bool = False) -> Any:
        if nonblocking:
            raise NeedsThread
        return real(self, relative)

    monkeypatch.setattr(ConfinedRoot, "open", from_disk)
    app = StaticFiles(site, revalidate=0)

    async def one() -> None:
        for _ in range(3):
            assert (await ask(app, "/large.bin")).body == LARGE

    async with no_leaks():
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(one)
        assert app._cache._descriptors == 1
        app.close()
        app._open()
    app.close()
