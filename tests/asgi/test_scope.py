"""The http scope, key by key, and the context variables that a request sees."""

from __future__ import annotations

import contextvars
import socket
from pathlib import Path
from typing import Any

import pytest
import trio

from trioserve import serve
from trioserve.config import Config
from trioserve.testing import RawClient, TestServer, encode_request, serving

from ..apps import respond

pytestmark = pytest.mark.modes("tls", "http2")

# On every connection that is not TLS.
FILES: dict[str, Any] = {"http.response.zerocopysend": {}, "http.response.pathsend": {"ranges": True}}


class Witness:
    """An app that keeps the scopes it was given."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self.scopes.append(scope)
            await respond(send)


async def scope_of(request: bytes, **settings: Any) -> dict[str, Any]:
    """The scope that one raw request makes."""
    witness = Witness()
    async with serving(witness, **settings) as server, server.connect() as client:
        await client.send(request)
        assert (await client.read_response()).status == 200
    return witness.scopes[0]


# -- key by key ----------------------------------------------------------------------------------------------


@pytest.mark.modes(because="the scope says in which mode it is")
async def test_the_scope_has_exactly_the_keys_of_the_specification(engine: str) -> None:
    witness = Witness()
    async with serving(witness, http_engine=engine) as server, server.connect() as client:
        address = client.sock.getsockname()
        await client.get(
            "/a%20b?x=1&y=%C3%A9", [("X-One", "1"), ("Cookie", "a"), ("x-one", "2"), ("Cookie", "b")]
        )
        port = server.port
    assert witness.scopes == [
        {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.5"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": "/a b",
            "raw_path": b"/a%20b",
            "query_string": b"x=1&y=%C3%A9",
            "root_path": "",
            "headers": [
                (b"host", b"testserver"), (b"x-one", b"1"), (b"cookie", b"a"), (b"x-one", b"2"), (b"cookie", b"b"),
            ],
            "client": (address[0], address[1]),
            "server": ("127.0.0.1", port),
            "state": {},
            "extensions": {"http.response.early_hint": {}, **FILES},
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    "target, path, raw_path, query",
    [
        (b"/", "/", b"/", b""),
        (b"/%E2%82%AC", "/€", b"/%E2%82%AC", b""),
        (b"/%2F%3F%23", "//?#", b"/%2F%3F%23", b""),
        (b"/%FF%fe", "/\ufffd\ufffd", b"/%FF%fe", b""),  # no UTF-8: raw_path keeps the bytes
        (b"/100%", "/100%", b"/100%", b""),
        (b"/%zz%4", "/%zz%4", b"/%zz%4", b""),
        (b"/%00", "/\0", b"/%00", b""),
        (b"/a+b", "/a+b", b"/a+b", b""),
        (b"/a/../b//c/.", "/a/../b//c/.", b"/a/../b//c/.", b""),
        (b"/x?", "/x", b"/x", b""),
        (b"/x?a=%FF&b=1?2", "/x", b"/x", b"a=%FF&b=1?2"),
        (b"http://testserver/abs%20olute?q", "/abs olute", b"/abs%20olute", b"q"),
        (b"http://testserver?q", "/", b"/", b"q"),
    ],
)
async def test_path_is_decoded_once_and_raw_path_is_not(
    target: bytes, path: str, raw_path: bytes, query: bytes
) -> None:
    scope = await scope_of(b"GET %b HTTP/1.1\r\nhost: testserver\r\n\r\n" % target)
    assert (scope["path"], scope["raw_path"], scope["query_string"]) == (path, raw_path, query)


async def test_the_whole_server_as_target() -> None:
    scope = await scope_of(b"OPTIONS * HTTP/1.1\r\nhost: testserver\r\n\r\n")
    assert (scope["method"], scope["path"], scope["raw_path"]) == ("OPTIONS", "*", b"*")


async def test_root_path_is_the_setting_and_the_path_stays_whole() -> None:
    scope = await scope_of(encode_request("GET", "/api/x"), root_path="/api")
    assert (scope["root_path"], scope["path"]) == ("/api", "/api/x")


@pytest.mark.modes(because="the scope says in which mode it is")
@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_extensions_are_those_of_the_version_and_of_the_request(engine: str, version: str) -> None:
    plain = await scope_of(encode_request("GET", version=version), http_engine=engine)
    wanting = await scope_of(
        encode_request("GET", headers=[("TE", "gzip, trailers")], version=version), http_engine=engine
    )
    assert plain["http_version"] == wanting["http_version"] == version
    if version == "1.0":
        assert plain["extensions"] == wanting["extensions"] == FILES
    else:
        assert plain["extensions"].keys() == {"http.response.early_hint", *FILES}
        assert wanting["extensions"].keys() == {"http.response.early_hint", "http.response.trailers", *FILES}


async def test_names_are_lower_case_and_values_are_stripped(engine: str) -> None:
    request = b"GET / HTTP/1.1\r\nHOST:testserver\r\nX-Latin: \t caf\xe9 \t\r\nX-Empty:\r\n\r\n"
    scope = await scope_of(request, http_engine=engine)
    assert scope["headers"] == [(b"host", b"testserver"), (b"x-latin", b"caf\xe9"), (b"x-empty", b"")]


# -- addresses -----------------------------------------------------------------------------------------------


async def serve_on(bind: str, use: Any) -> dict[str, Any]:
    """The scope of a request to a server bound to `bind`; `use(address)` makes the connected socket."""
    witness = Witness()
    config = Config()
    config.bind = [bind]
    config.errorlog = None
    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(serve, witness, config)
        with use(addresses[0]) as sock:
            sock.setblocking(False)
            await RawClient(sock).get("/")
        nursery.cancel_scope.cancel()
    return witness.scopes[0]


def has_v6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_v6 = pytest.mark.skipif(not has_v6(), reason="no IPv6 loopback here")


@pytest.mark.parametrize(
    "bind, host",
    [
        ("127.0.0.1:0", "127.0.0.1"),
        ("0.0.0.0:0", "127.0.0.2"),  # a wildcard listener has the address that the client has called
        pytest.param("[::1]:0", "::1", marks=needs_v6),
        pytest.param("[::]:0", "::1", marks=needs_v6),
    ],
)
async def test_client_and_server_are_the_two_ends_of_the_connection(bind: str, host: str) -> None:
    ends: list[Any] = []

    def connect(address: str) -> socket.socket:
        sock = socket.create_connection((host, int(address.rpartition(":")[2])))
        ends.extend([sock.getsockname()[:2], sock.getpeername()[:2]])
        return sock

    scope = await serve_on(bind, connect)
    assert [scope["client"], scope["server"]] == ends
    assert scope["server"][0] == host


async def test_a_unix_socket_has_a_path_for_server_and_no_client(tmp_path: Path) -> None:
    def connect(address: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address.removeprefix("unix:"))
        return sock

    scope = await serve_on(f"unix:{tmp_path}/s", connect)
    assert scope["client"] is None
    assert scope["server"] == (f"{tmp_path}/s", None)


# -- what requests share, and what they do not ---------------------------------------------------------------


async def test_state_is_a_shallow_copy_of_the_lifespans_for_each_request() -> None:
    shared: list[int] = []
    seen: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            scope["state"]["shared"] = shared
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        seen.append(dict(scope["state"]))
        scope["state"]["shared"].append(1)
        scope["state"]["mine"] = True
        scope["extensions"]["mine"] = scope["headers"].append((b"x-mine", b"1"))
        await respond(send)

    async with serving(app) as server, server.connect() as client:
        await client.get()
        await client.get()
        await server.get()
    assert [set(state) for state in seen] == [{"shared"}] * 3
    assert all(state["shared"] is shared for state in seen)
    assert shared == [1, 1, 1]


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="default")


class ContextApp:
    """Sets a variable in its lifespan; each request notes what it sees and sets its own."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.go_on = trio.Event()
        self.started = trio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            variable.set("of the lifespan")
            await send({"type": "lifespan.startup.complete"})
            variable.set("too late")
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        self.seen.append(variable.get())
        variable.set(scope["path"])
        self.started.set()
        if scope["path"] == "/wait":
            await self.go_on.wait()
        assert variable.get() == scope["path"]
        await respond(send)

    async def check(self, send_requests: Any, count: int, **settings: Any) -> None:
        async with serving(self, **settings) as server:
            await send_requests(server)
        assert self.seen == ["of the lifespan"] * count


async def test_a_request_sees_the_lifespans_variables_and_not_another_connections() -> None:
    async def requests(server: TestServer) -> None:
        for n in range(3):
            await server.get(f"/{n}")

    await ContextApp().check(requests, 3)


async def test_a_request_does_not_see_what_the_one_before_it_on_the_connection_has_set(
    engine: str, hub: str
) -> None:
    async def requests(server: TestServer) -> None:
        async with server.connect() as client:
            for n in range(3):
                await client.get(f"/{n}")

    await ContextApp().check(requests, 3, http_engine=engine, hub=hub)


async def test_nor_when_they_were_pipelined(engine: str, hub: str) -> None:
    async def requests(server: TestServer) -> None:
        async with server.connect() as client:
            await client.send(b"".join(encode_request("GET", f"/{n}") for n in range(3)))
            for _ in range(3):
                await client.read_response()

    await ContextApp().check(requests, 3, http_engine=engine, hub=hub)


async def test_nor_when_the_second_arrives_while_the_first_is_served(hub: str) -> None:
    app = ContextApp()

    async def requests(server: TestServer) -> None:
        async with server.connect() as client:
            await client.send(encode_request("GET", "/wait"))
            await app.started.wait()
            await client.send(encode_request("GET", "/next"))
            with trio.fail_after(30):  # until the hub has noticed it
                await trio.testing.wait_all_tasks_blocked(0.01)
            app.go_on.set()
            for _ in range(2):
                await client.read_response()

    await app.check(requests, 2, hub=hub)
