"""A project that was written for `hypercorn -k trio` starts unchanged, and its clients see no difference.

Each test starts both commands with the same configuration and compares what comes over the wire: status, body,
interim responses and header fields, apart from `Server` and `Date`.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from trioserve.testing import RawClient, Response

from .process import ServerProcess, connect, start_process, wait_in_file, wait_listening

APP = "tests.e2e.parity_app:app"

TRIOSERVE = [sys.executable, "-W", "error", "-m", "trioserve"]
HYPERCORN = [sys.executable, "-m", "hypercorn"]

TOML = """\
bind = ["127.0.0.1:0"]
worker_class = "trio"
workers = 1
backlog = 50
accesslog = "{folder}/{server}-access.log"
access_log_format = '%(m)s %(s)s %(b)s "%(f)s" "%({{x-once}}i)s" "%({{content-type}}o)s" %(H)s %(S)s'
errorlog = "-"
loglevel = "INFO"
keep_alive_timeout = 4.5
graceful_timeout = 2.5
startup_timeout = 20
shutdown_timeout = 20
include_server_header = false
root_path = "/api"
h11_max_incomplete_size = 8192
max_app_queue_size = 20
websocket_ping_interval = 20
pid_path = "{folder}/{server}.pid"
"""

PYTHON = """\
import pathlib

HERE = str(pathlib.Path(__file__).parent)
_host = "127.0.0.1"
bind = [f"{{_host}}:0"]
worker_class = "trio"
workers = 1
root_path = "/api"
include_server_header = False
accesslog = HERE + "/{server}-access.log"
access_log_format = "%(m)s %(s)s"
"""


@contextlib.asynccontextmanager
async def both(*arguments: str, folder: Path | None = None) -> AsyncIterator[list[ServerProcess]]:
    """trioserve and hypercorn with the same arguments, in which {folder} and {server} are filled in."""
    async with contextlib.AsyncExitStack() as stack:
        servers = []
        for name, command in (("trioserve", TRIOSERVE), ("hypercorn", HYPERCORN)):
            filled = [argument.format(folder=folder, server=name) for argument in arguments]
            servers.append(await stack.enter_async_context(start_process(*command, *filled)))
        for server in servers:
            await server.wait_running()
        yield servers


def write_configs(folder: Path, text: str, suffix: str) -> None:
    """One file for each, the same but for the names of what they write."""
    for server in ("trioserve", "hypercorn"):
        (folder / f"{server}{suffix}").write_text(text.format(folder=folder, server=server))


def comparable(response: Response) -> tuple[object, ...]:
    fields = sorted((name, value) for name, value in response.headers if name not in (b"date", b"server"))
    return (response.status, response.body, fields, response.interim, response.complete, response.trailers)


REQUESTS = {
    "a plain GET": b"GET /api/items/1?q=%20a&b=/ HTTP/1.1\r\nhost: x\r\n\r\n",
    "escapes": b"GET /api/%C3%A4%2Fb/c%20d/./e/../f HTTP/1.1\r\nhost: x\r\n\r\n",
    "HEAD": b"HEAD /api/ HTTP/1.1\r\nhost: x\r\n\r\n",
    "another method": b"PURGE /api/ HTTP/1.1\r\nhost: x\r\n\r\n",
    "names in capitals": b"GET /api/ HTTP/1.1\r\nHost: x\r\nX-Once:  a b \r\nX-2: 1\r\nX-2: 2\r\n\r\n",
    "a body": b"POST /api/ HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nhello",
    "a chunked body": b"POST /api/ HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "a stream": b"GET /api/stream HTTP/1.1\r\nhost: x\r\n\r\n",
    "a 404": b"GET /api/missing HTTP/1.1\r\nhost: x\r\n\r\n",
    "a 204": b"DELETE /api/empty HTTP/1.1\r\nhost: x\r\n\r\n",
    "a 304": b"GET /api/cached HTTP/1.1\r\nhost: x\r\n\r\n",
    "outside root_path": b"GET /elsewhere HTTP/1.1\r\nhost: x\r\n\r\n",
    "close": b"GET /api/ HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
}


async def exchange(client: RawClient, request: bytes) -> Response:
    await client.send(request)
    return await client.read_response(request.partition(b" ")[0].decode())


async def test_a_toml_config_starts_both_and_each_request_gets_the_same_answer(tmp_path):
    write_configs(tmp_path, TOML, ".toml")
    async with both("--config", "{folder}/{server}.toml", APP, folder=tmp_path) as (ours, theirs):
        for name, request in REQUESTS.items():
            async with ours.connect() as our_client, theirs.connect() as their_client:
                # Twice: the second finds a connection that has been used.
                for _ in range(1 if name == "close" else 2):
                    our_answer = await exchange(our_client, request)
                    their_answer = await exchange(their_client, request)
                    assert comparable(our_answer) == comparable(their_answer), name
                    assert our_answer.header("server") is None
                    assert our_answer.header("date") is not None
                if name == "close":
                    assert await our_client.receive() == await their_client.receive() == b""
        assert (tmp_path / "trioserve.pid").read_text().strip() == str(ours.pid)
    lines = (tmp_path / "trioserve-access.log").read_text().splitlines()
    assert len(lines) == 2 * len(REQUESTS) - 1
    their_lines = their_access_lines((tmp_path / "hypercorn-access.log").read_text())
    assert [without_bytes(line) for line in lines] == [without_bytes(line) for line in their_lines]


def without_bytes(line: str) -> list[str]:
    """Theirs prints the Content-Length header where ours counts bytes: the rest of each line is the same."""
    words = line.split(" ")
    return words[:2] + words[3:]


def their_access_lines(text: str) -> list[str]:
    """What compares to ours.

    Theirs puts the error log's prefix (date, pid, level) before the format that was asked for, and logs some requests
    twice, once without a status.
    """
    lines = [re.sub(r"^\[.*?\] \[\d+\] \[INFO\] ", "", line) for line in text.splitlines()]
    return [line for line in lines if line.split(" ")[1] != "-"]


async def test_a_python_file_as_config_starts_both(tmp_path):
    write_configs(tmp_path, PYTHON, "_config.py")
    async with both("--config", "file:{folder}/{server}_config.py", APP, folder=tmp_path) as (ours, theirs):
        async with ours.connect() as our_client, theirs.connect() as their_client:
            request = REQUESTS["a plain GET"]
            our_answer = await exchange(our_client, request)
            assert comparable(our_answer) == comparable(await exchange(their_client, request))
    for server in ("trioserve", "hypercorn"):
        assert their_access_lines((tmp_path / f"{server}-access.log").read_text()) == ["GET 200"]


@pytest.mark.parametrize(
    "flags",
    [
        ["-k", "trio", "-w", "1", "-b", "127.0.0.1:0", "--access-logfile", "-", "--access-logformat", "%(m)s %(s)s"],
        ["--worker-class", "trio", "--bind", "127.0.0.1:0", "--keep-alive", "3", "--graceful-timeout", "2",
         "--log-level", "debug", "--root-path", "/api/", "--backlog", "20", "--error-logfile", "-"],
    ],
)  # fmt: skip
async def test_the_same_flags_start_both(flags):
    async with both(*flags, APP) as (ours, theirs):
        async with ours.connect() as our_client, theirs.connect() as their_client:
            for name in ("a plain GET", "a body", "a stream"):
                our_answer = await exchange(our_client, REQUESTS[name])
                assert comparable(our_answer) == comparable(await exchange(their_client, REQUESTS[name])), (
                    name
                )
    if "--access-logfile" in flags:
        assert ours.stdout.text == "GET 200\nPOST 200\nGET 200\n"
        assert ours.stdout.text.splitlines() == their_access_lines(theirs.stdout.text)


async def test_http_1_0_clients_get_the_same_from_both():
    async with both("-k", "trio", "-b", "127.0.0.1:0", APP) as servers:
        answers = []
        for server in servers:
            async with server.connect() as client:
                await client.send(b"GET /missing HTTP/1.0\r\n\r\n")
                head, _, body = (await client.receive_all()).partition(b"\r\n\r\n")
                status, *lines = head.lower().split(b"\r\n")
                fields = {line for line in lines if not line.startswith((b"date:", b"server:"))}
                answers.append((status.split()[1], fields, body))
        assert answers[0] == answers[1]


async def test_both_ask_for_a_body_that_is_announced_with_an_expectation():
    async with both("-k", "trio", "-b", "127.0.0.1:0", APP) as servers:
        answers = []
        for server in servers:
            async with server.connect() as client:
                await client.send(
                    b"POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n"
                )
                assert (await client.receive_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
                await client.send(b"hello")
                answers.append(comparable(await client.read_response("POST")))
        assert answers[0] == answers[1]


async def test_a_unix_socket_in_the_config_is_served_by_both_with_the_same_permissions(tmp_path):
    text = 'bind = "unix:{folder}/{server}.sock"\numask = 7\nworker_class = "trio"\n'
    text += 'errorlog = "{folder}/{server}.log"\n'
    write_configs(tmp_path, text, ".toml")
    modes = []
    for server, command in (("trioserve", TRIOSERVE), ("hypercorn", HYPERCORN)):
        async with start_process(*command, "--config", f"{tmp_path}/{server}.toml", APP):
            address = f"unix:{tmp_path}/{server}.sock"
            await wait_listening(address)
            async with connect(address) as client:
                assert (await exchange(client, REQUESTS["a plain GET"])).status == 200
            await wait_in_file(tmp_path / f"{server}.log", "Running on (http://)?unix:")
            modes.append((tmp_path / f"{server}.sock").stat().st_mode & 0o777)
    assert modes[0] == modes[1] == 0o770
