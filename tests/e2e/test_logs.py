"""The access log of a running server: a line for each exchange, with how it ended; and what never gets one."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
import trio

from trioserve.testing import encode_request

from .process import held_request, serve_command, wait_in_file

APP = "tests.e2e.apps:app"


def json_log(path: Path) -> tuple[str, ...]:
    return ("--access-logfile", str(path), "--access-logformat", "json")


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- lines --------------------------------------------------------------------------------------------------


async def test_hypercorns_format_on_stdout():
    access_format = '%(h)s %(l)s "%(r)s" %(s)s %(st)s %(b)s "%({x-in}i)s" "%({content-type}o)s" %(S)s %(p)s'
    async with serve_command(APP, "--access-logfile", "-", "--access-logformat", access_format) as server:
        async with server.connect() as client:
            port = client.sock.getsockname()[1]
            await client.get("/some/path?x=%20", [("x-in", 'a"b')])
        await server.stdout.wait_for(
            rf'127\.0\.0\.1:{port} - "GET /some/path 1\.1" 200 OK 5 "a\\x22b" "text/plain" http <{server.pid}>\n'
        )


async def test_the_default_format_is_hypercorns(tmp_path):
    log = tmp_path / "access.log"
    async with serve_command(APP, "--access-logfile", str(log)) as server:
        await server.get("/", [("user-agent", "test"), ("referer", "http://before/")])
        await wait_in_file(log, "\n")
    assert re.fullmatch(
        r"127\.0\.0\.1:\d+ - - \[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\] "
        r'"GET / 1\.1" 200 5 "http://before/" "test"\n',
        log.read_text(),
    )


async def test_a_request_cannot_forge_a_line_or_its_fields(tmp_path):
    log = tmp_path / "access.json"
    async with serve_command(APP, *json_log(log)) as server:
        await server.get('/"},{"status":200,"x":"', [("user-agent", '"\\\x80\t{')])
    (entry,) = read_log(log)
    assert entry["path"] == '/"},{"status":200,"x":"'
    assert entry["user_agent"] == '"\\\x80\t{'


# -- outcomes -----------------------------------------------------------------------------------------------


async def test_a_complete_exchange_tells_its_bytes_times_and_place_on_the_connection(tmp_path):
    log = tmp_path / "access.json"
    async with serve_command(APP, *json_log(log)) as server:
        async with server.connect() as client:
            await client.get("/?q=1")
            await client.request("POST", "/echo", body=b"x" * 1000)
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
    first, second = read_log(log)
    assert (first["method"], first["path"], first["query"], first["status"]) == ("GET", "/", "q=1", 200)
    assert (first["outcome"], first["request"], second["request"]) == ("complete", 1, 2)
    assert first["connection"] == second["connection"]
    assert (second["request_bytes"], second["response_bytes"]) == (1000, 1000)
    assert 0 <= second["head_seconds"] <= second["seconds"] < 30
    assert second["pid"] == server.pid


async def test_a_head_that_is_late(tmp_path):
    log = tmp_path / "access.json"
    config = tmp_path / "server.toml"
    config.write_text("request_head_timeout = 0.2\n")
    async with serve_command(APP, *json_log(log), "--config", str(config)) as server:
        async with server.connect() as client:
            await client.send(b"GET /late HTTP/1.1\r\nhost: x\r\n")
            assert (await client.read_response()).status == 408
    (entry,) = read_log(log)
    assert (entry["status"], entry["outcome"]) == (408, "late: request_head")


async def test_a_body_that_is_late(tmp_path):
    log = tmp_path / "access.json"
    async with serve_command(APP, *json_log(log), env={"TRIOSERVE_REQUEST_BODY_TIMEOUT": "0.2"}) as server:
        async with server.connect() as client:
            await client.send(encode_request("POST", "/echo", body=b"xy")[:-1])
            assert (await client.read_response("POST")).status == 408
    (entry,) = read_log(log)
    assert (entry["path"], entry["status"], entry["outcome"]) == ("/echo", 408, "late: request_body")
    assert entry["request_bytes"] == 1


@pytest.mark.parametrize("leave", ["reset", "close"])
async def test_a_peer_that_goes(tmp_path, leave):
    log = tmp_path / "access.json"
    async with serve_command(APP, *json_log(log), "--disconnect-grace", "0.1") as server:
        async with server.connect() as client:
            await client.send(encode_request("GET", "/stream"))
            await client.receive_until(b"tick")
            getattr(client, leave)()
        await wait_in_file(log, "\n")
    (entry,) = read_log(log)
    assert (entry["path"], entry["status"], entry["outcome"]) == ("/stream", 200, "peer gone")


async def test_a_request_that_a_drain_cuts(tmp_path):
    log = tmp_path / "access.json"
    async with serve_command(APP, *json_log(log), "--graceful-timeout", "0.1") as server:
        async with held_request(server) as client:
            server.send_signal(signal.SIGTERM)
            assert (await client.read_response("POST")).status == 503
        assert await server.wait() == 0
    (entry,) = read_log(log)
    assert (entry["path"], entry["status"], entry["outcome"]) == ("/hold", 503, "drained")


REFUSED = {
    b"GET / HTTP/1.1\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 1, 2\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 11\r\n\r\n": 413,
    b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nhost: x\r\n\r\n": 414,
    b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 200 + b"\r\n": 431,
}


@pytest.mark.parametrize("engine", ["httptools", "h11"])
async def test_requests_that_are_refused(tmp_path, engine):
    log = tmp_path / "access.json"
    async with serve_command(APP, *json_log(log), "--max-body-size", "10", "--http-engine", engine) as server:
        for request, status in REFUSED.items():
            async with server.connect() as client:
                await client.send(request)
                assert (await client.read_response()).status == status
    entries = read_log(log)
    assert [(entry["status"], entry["outcome"]) for entry in entries] == [
        (status, "refused") for status in REFUSED.values()
    ]
    assert all(entry["error"] for entry in entries), "each says why"
    assert server.reports() == []


async def test_an_app_that_fails(tmp_path):
    log = tmp_path / "access.json"
    async with serve_command(APP, *json_log(log), "--on-app-error", "contain") as server:
        assert (await server.get("/raise")).status == 500
        assert not (await server.get("/raise-late")).complete
    before, during = read_log(log)
    assert (before["path"], before["status"], before["outcome"]) == ("/raise", 500, "app error")
    assert (during["path"], during["status"], during["outcome"]) == ("/raise-late", 200, "app error")
    assert before["error"].startswith("LookupError")


# -- what must not happen -----------------------------------------------------------------------------------


async def test_connections_that_say_nothing_get_no_line(tmp_path):
    log = tmp_path / "access.json"
    async with serve_command(APP, *json_log(log), env={"TRIOSERVE_FIRST_BYTE_TIMEOUT": "0.1"}) as server:
        server.connect().close()
        server.connect().reset()
        async with server.connect() as client:
            assert await client.receive() == b"", "the first byte is late: closed in silence"
        async with server.connect() as client:
            await client.get("/spoken")
    assert [entry["path"] for entry in read_log(log)] == ["/spoken"]


async def test_a_log_that_nobody_reads_holds_up_neither_requests_nor_the_end(tmp_path):
    fifo = tmp_path / "access.fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        flags = ("--access-logfile", str(fifo), "--access-logformat", "%(U)s " + "x" * 2000)
        async with serve_command(APP, *flags) as server:
            async with server.connect() as client:
                for _ in range(200):  # 400 kB; the pipe takes 64
                    assert (await client.get()).status == 200
            server.send_signal(signal.SIGTERM)
            assert await server.wait() == 0
    finally:
        os.close(reader)


async def test_two_servers_append_to_one_log_without_mixing_lines(tmp_path):
    log = tmp_path / "access.json"
    async with serve_command(APP, *json_log(log)) as one, serve_command(APP, *json_log(log)) as two:

        async def ask(server):
            async with server.connect() as client:
                for _ in range(100):
                    await client.get("/" + "x" * 500)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, one)
            nursery.start_soon(ask, two)
    assert sorted(entry["pid"] for entry in read_log(log)) == sorted([one.pid, two.pid] * 100)
