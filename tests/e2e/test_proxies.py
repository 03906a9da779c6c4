"""Behind the proxies that people put in front: nginx and HAProxy as they are, with plain configurations.

The proxies listen on unix sockets, so no test depends on a free port.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from trioserve.testing import RawClient, encode_request

from .process import (
    PATIENCE,
    connect,
    require_tool,
    run_to_end,
    serve_command,
    start_process,
    wait_in_file,
    wait_listening,
)

APP = "tests.e2e.apps:app"

JSON_LOG = ("--access-logformat", "json")


@contextlib.asynccontextmanager
async def run_nginx(
    folder: Path, upstream: str, *, settings: str = "", scheme: str = "http"
) -> AsyncIterator[str]:
    """nginx in front of `upstream` while the block runs; the address to reach it at."""
    nginx = require_tool("nginx")
    sock = folder / "nginx.sock"
    server = upstream if upstream.startswith("unix:") else upstream.removeprefix("http://")
    (folder / "nginx.conf").write_text(
        textwrap.dedent(f"""\
            daemon off;
            worker_processes 1;
            pid {folder}/nginx.pid;
            error_log {folder}/nginx-error.log info;
            events {{ worker_connections 64; }}
            http {{
                access_log off;
                client_body_temp_path {folder}/body;
                proxy_temp_path {folder}/proxy;
                fastcgi_temp_path {folder}/fastcgi;
                uwsgi_temp_path {folder}/uwsgi;
                scgi_temp_path {folder}/scgi;
                client_max_body_size 0;
                upstream app {{ server {server}; keepalive 4; }}
                server {{
                    listen unix:{sock};
                    location / {{
                        proxy_pass {scheme}://app;
                        proxy_http_version 1.1;
                        proxy_set_header Connection "";
                        proxy_set_header Host $http_host;
                        proxy_set_header X-Forwarded-For $http_x_client;
                        {settings}
                    }}
                }}
            }}
        """)
    )
    # Its workers take another user's rights when root starts it, and must still reach what is in this folder.
    for place in (folder, *folder.parents):
        with contextlib.suppress(PermissionError):
            if str(place).startswith("/tmp/"):
                place.chmod(place.stat().st_mode | 0o011)
    async with start_process(nginx, "-c", str(folder / "nginx.conf"), "-e", f"{folder}/nginx-error.log"):
        await wait_listening(f"unix:{sock}")
        yield f"unix:{sock}"
    errors = (folder / "nginx-error.log").read_text()
    assert "upstream prematurely closed" not in errors
    assert "upstream sent invalid" not in errors


@contextlib.asynccontextmanager
async def run_haproxy(
    folder: Path,
    upstream: str,
    *,
    backend: str = "",
    server: str = "check inter 50ms rise 1 fall 1",
    listener: socket.socket | None = None,
) -> AsyncIterator[str]:
    """HAProxy in http mode in front of `upstream` while the block runs; the address to reach it at.

    `server` are options of the line that names the upstream; for clients that need a TCP port there is `listener`.
    Checks come often, and have the time that a busy machine takes: it would be as long as their interval by default.
    """
    haproxy = require_tool("haproxy")
    sock = folder / "haproxy.sock"
    bind, address, pass_fds = f"unix@{sock}", f"unix:{sock}", []
    if listener is not None:
        bind, address, pass_fds = (
            f"fd@{listener.fileno()}",
            "{}:{}".format(*listener.getsockname()),
            [listener.fileno()],
        )
    (folder / "haproxy.cfg").write_text(
        textwrap.dedent(f"""\
            defaults
                mode http
                retries 0
                timeout connect 5s
                timeout check 20s
                timeout client 30s
                timeout server 30s
                timeout http-keep-alive 30s
            frontend web
                bind {bind}
                default_backend app
            backend app
                http-reuse always
                {backend}
                server one {upstream} {server}
        """)
    )
    async with start_process(haproxy, "-db", "-f", str(folder / "haproxy.cfg"), pass_fds=pass_fds) as process:
        await wait_listening(address)
        yield address
        process.kill()
        await process.wait()


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def send_chunked(client: RawClient, target: str, parts: list[bytes]) -> None:
    await client.send(
        f"POST {target} HTTP/1.1\r\nhost: proxied\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    )
    for part in parts:
        await client.send(b"%x\r\n%b\r\n" % (len(part), part))
    await client.send(b"0\r\n\r\n")


# -- nginx --------------------------------------------------------------------------------------------------


async def test_nginx_keeps_its_upstream_connection_over_many_requests(tmp_path):
    log = tmp_path / "access.json"
    async with serve_command(APP, "--access-logfile", str(log), *JSON_LOG) as server:
        async with run_nginx(tmp_path, server.url) as address, connect(address) as client:
            for _ in range(20):
                response = await client.get("/describe", [("x-client", "192.0.2.7")])
                assert response.status == 200
                assert b"x-forwarded-for: 192.0.2.7" in response.body
                assert b"host: testserver" in response.body
    entries = read_log(log)
    assert len(entries) == 20
    assert len({entry["connection"] for entry in entries}) == 1


async def test_nginx_reaches_it_over_a_unix_socket(tmp_path):
    async with serve_command(APP, "--umask", "0", bind=f"unix:{tmp_path}/app.sock") as server:
        async with run_nginx(tmp_path, server.address) as address, connect(address) as client:
            assert (await client.get()).body == b"hello"
            assert (await client.request("POST", "/echo", body=b"x" * 5000)).body == b"x" * 5000


@pytest.mark.parametrize("buffering", ["on", "off"])
async def test_a_large_upload_and_a_large_download_pass_through_nginx(tmp_path, buffering):
    settings = f"proxy_request_buffering {buffering}; proxy_buffering {buffering};"
    async with serve_command(APP) as server:
        async with run_nginx(tmp_path, server.url, settings=settings) as address, connect(address) as client:
            size = 4 * 1024 * 1024
            assert (await client.request("POST", "/count", body=b"x" * size)).body == str(size).encode()
            response = await client.get("/large?2")
            assert (len(response.body), response.complete) == (2 * 1024 * 1024, True)


async def test_chunked_bodies_pass_through_nginx_both_ways(tmp_path):
    settings = "proxy_request_buffering off; proxy_buffering off;"
    async with serve_command(APP) as server:
        async with run_nginx(tmp_path, server.url, settings=settings) as address, connect(address) as client:
            await send_chunked(client, "/describe", [b"x" * 1000] * 30)
            response = await client.read_response("POST")
            assert b"transfer-encoding: chunked" in response.body
            assert response.body.endswith(b"body 30000")
            response = await client.get("/large?2")
            assert response.header("transfer-encoding") == "chunked"


async def test_a_client_that_leaves_nginx_ends_the_handler(tmp_path):
    settings = "proxy_buffering off;"
    log = tmp_path / "access.json"
    flags = ("--access-logfile", str(log), *JSON_LOG, "--disconnect-grace", "0.2")
    async with serve_command(APP, *flags) as server:
        async with run_nginx(tmp_path, server.url, settings=settings) as address:
            async with connect(address) as client:
                await client.send(encode_request("GET", "/stream"))
                await client.receive_until(b"tick")
            await server.stdout.wait_for("stream ended by (Cancelled|ClientDisconnected)")
            async with connect(address) as client:
                assert (await client.get()).status == 200
    assert [(entry["path"], entry["outcome"]) for entry in read_log(log)] == [
        ("/stream", "peer gone"),
        ("/", "complete"),
    ]
    assert server.reports() == []


async def test_an_upload_that_stops_behind_nginx_ends_in_no_error(tmp_path):
    async with serve_command(APP) as server:
        settings = "proxy_request_buffering off;"
        async with run_nginx(tmp_path, server.url, settings=settings) as address:
            async with connect(address) as client:
                await client.send(encode_request("POST", "/hold", body=b"x" * 100)[:-50])
                await server.stdout.wait_for("holding")
            await server.stdout.wait_for("held request ended by")
            async with connect(address) as client:
                assert (await client.get()).status == 200
    assert server.reports() == []


async def test_truncation_is_visible_through_nginx(tmp_path):
    async with serve_command(APP, "--on-app-error", "contain") as server:
        nginx = run_nginx(tmp_path, server.url, settings="proxy_buffering off;")
        with pytest.raises(AssertionError, match="prematurely closed"):
            async with nginx as address, connect(address) as client:
                response = await client.get("/raise-late")
                assert (response.status, response.complete) == (200, False)


async def test_nginx_meets_no_broken_connection_while_the_server_is_replaced(tmp_path):
    """The old server drains while a new one is there: with one inherited queue no client sees any of it."""
    address = f"unix:{tmp_path}/app.sock"
    failures: list[object] = []
    answered = 0
    over = trio.Event()

    async def client_loop(proxy: str) -> None:
        nonlocal answered
        while not over.is_set():
            async with connect(proxy) as client:
                response = await client.get()
                answered += 1
                if response.status != 200:
                    failures.append(response)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address.removeprefix("unix:"))
        listener.listen(100)
        (tmp_path / "app.sock").chmod(0o777)
        fd = listener.fileno()
        async with run_nginx(tmp_path, address) as proxy, trio.open_nursery() as nursery:
            async with serve_command(APP, bind=f"fd://{fd}", pass_fds=[fd]) as old:
                for _ in range(4):
                    nursery.start_soon(client_loop, proxy)
                async with serve_command(APP, bind=f"fd://{fd}", pass_fds=[fd]) as new:
                    old.send_signal(signal.SIGTERM)
                    assert await old.wait() == 0
                    before = answered
                    while answered < before + 100:
                        await trio.sleep(0.01)
                    over.set()
                    nursery.cancel_scope.deadline = trio.current_time() + PATIENCE
                    while nursery.child_tasks:
                        await trio.sleep(0.01)
                    assert new.returncode is None
    assert failures == []


# -- HAProxy ------------------------------------------------------------------------------------------------


async def test_haproxy_keeps_its_connections_and_checks_health_over_http(tmp_path):
    log = tmp_path / "access.json"
    async with serve_command(APP, "--access-logfile", str(log), *JSON_LOG) as server:
        async with run_haproxy(tmp_path, server.address, backend="option httpchk GET /health") as address:
            await wait_in_file(log, "/health")
            async with connect(address) as client:
                for _ in range(10):
                    response = await client.request("POST", "/echo", body=b"x" * 1000)
                    assert (response.status, response.body) == (200, b"x" * 1000)
                await send_chunked(client, "/count", [b"x" * 1000] * 20)
                assert (await client.read_response("POST")).body == b"20000"
    entries = read_log(log)
    assert {entry["outcome"] for entry in entries} == {"complete"}
    # HAProxy's checks are HTTP/1.0 without Host.
    assert {entry["http_version"] for entry in entries if entry["path"] == "/health"} == {"1.0"}
    assert len({entry["connection"] for entry in entries if entry["path"] == "/echo"}) == 1


async def test_haproxy_tcp_checks_leave_no_trace_in_the_logs(tmp_path):
    """They connect and reset at once, many times: neither an error nor an access line."""
    log = tmp_path / "access.json"
    async with serve_command(APP, "--access-logfile", str(log), *JSON_LOG, "--log-level", "DEBUG") as server:
        async with run_haproxy(tmp_path, server.address) as address:
            await trio.sleep(0.3)  # several checks; that nothing happens cannot be waited for
            async with connect(address) as client:
                assert (await client.get()).status == 200
    assert [entry["path"] for entry in read_log(log)] == ["/"]
    assert "ERROR" not in server.stderr.text
    assert "WARNING" not in server.stderr.text


async def test_haproxy_stops_sending_once_a_drain_has_begun(tmp_path):
    async with serve_command(APP) as server:
        async with run_haproxy(tmp_path, server.address, backend="option httpchk GET /health") as address:
            async with connect(address) as client:
                assert (await client.get()).status == 200
            server.send_signal(signal.SIGTERM)
            assert await server.wait() == 0
            with trio.fail_after(PATIENCE):
                while True:
                    async with connect(address) as client:
                        if (await client.get()).status == 503:
                            break
                    await trio.sleep(0.02)


async def test_a_client_that_leaves_haproxy_ends_the_handler(tmp_path):
    async with serve_command(APP, "--disconnect-grace", "0.2") as server:
        async with run_haproxy(tmp_path, server.address, backend="option abortonclose") as address:
            async with connect(address) as client:
                await client.send(encode_request("GET", "/stream"))
                await client.receive_until(b"tick")
            await server.stdout.wait_for("stream ended by (Cancelled|ClientDisconnected)")
    assert server.reports() == []


# -- load ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["httptools", "h11"])
async def test_wrk_sees_no_error_on_many_connections(engine):
    wrk = require_tool("wrk")
    async with serve_command(APP, "--http-engine", engine) as server:
        process = await run_to_end(wrk, "-t1", "-c64", "-d1s", "--timeout", "30s", f"{server.url}/")
        assert process.returncode == 0
    assert "Socket errors" not in process.stdout.text
    assert "Non-2xx" not in process.stdout.text
    assert "requests in" in process.stdout.text
