"""trioserve as a library: what `serve()` takes, tells and raises, in somebody else's nursery."""

from __future__ import annotations

import functools
import gc
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import hypercorn.config
import pytest
import trio
import trio.testing

import trioserve
from trioserve.errors import BindError
from trioserve.net.bind import open_listeners
from trioserve.testing import RawClient, encode_request, no_leaks
from trioserve.worker.worker import Worker, serve_worker

from ..apps import hello, respond


def configure(**settings: Any) -> trioserve.Config:
    config = trioserve.Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = None
    config.graceful_timeout = 1
    for name, value in settings.items():
        setattr(config, name, value)
    return config


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[RawClient]:
    host, _, port = address.removeprefix("http://").rpartition(":")
    sock = socket.create_connection((host.strip("[]"), int(port)))
    sock.setblocking(False)
    async with RawClient(sock) as client:
        yield client


async def fetch(address: str, target: str = "/") -> tuple[int, bytes]:
    async with connected(address) as client:
        response = await client.get(target)
        return response.status, response.body


# -- the public names ----------------------------------------------------------------------------------------


def test_the_public_names_are_these() -> None:
    assert trioserve.__all__ == [
        "ClientDisconnected", "Compression", "Config", "ConfigError", "Fatal", "FileSendFailed", "LifespanFailed",
        "StaticFiles", "TrioserveError", "__version__", "run", "serve",
    ]  # fmt: skip
    for name in trioserve.__all__:
        assert hasattr(trioserve, name)


# -- in a nursery --------------------------------------------------------------------------------------------


async def test_port_0_is_told_through_task_status_and_cancelling_stops_it() -> None:
    async with no_leaks(), trio.open_nursery() as nursery:
        addresses = await nursery.start(trioserve.serve, hello, configure())
        assert len(addresses) == 1
        assert addresses[0].startswith("http://127.0.0.1:")
        assert await fetch(addresses[0]) == (200, b"hello")
        nursery.cancel_scope.cancel()


async def test_it_returns_when_the_shutdown_trigger_does() -> None:
    trigger = trio.Event()
    async with no_leaks(), trio.open_nursery() as nursery:
        (address,) = await nursery.start(
            functools.partial(trioserve.serve, hello, configure(), shutdown_trigger=trigger.wait)
        )
        assert await fetch(address) == (200, b"hello")
        trigger.set()


async def test_two_servers_in_one_nursery_do_not_meet() -> None:
    async def other(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await respond(send, b"other")

    trigger = trio.Event()
    async with no_leaks(), trio.open_nursery() as nursery:
        (one,) = await nursery.start(
            functools.partial(trioserve.serve, hello, configure(), shutdown_trigger=trigger.wait)
        )
        (two,) = await nursery.start(trioserve.serve, other, configure())
        assert await fetch(one) == (200, b"hello")
        assert await fetch(two) == (200, b"other")
        trigger.set()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert await fetch(two) == (200, b"other")
        with pytest.raises(ConnectionRefusedError):
            await fetch(one)
        nursery.cancel_scope.cancel()


async def test_who_is_to_end_while_it_starts_listens_no_more() -> None:
    starting, may_end = trio.Event(), trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            starting.set()
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await may_end.wait()

    listeners = open_listeners(["127.0.0.1:0"])
    listeners.listen(5)  # as one that is inherited does
    (address,) = listeners.addresses()
    workers: list[Worker] = []
    async with no_leaks(), trio.open_nursery() as nursery:
        nursery.start_soon(
            functools.partial(serve_worker, app, configure(), sockets=listeners, on_worker=workers.append)
        )
        await starting.wait()
        workers[0].drain.begin("the test")
        await trio.testing.wait_all_tasks_blocked(0.05)
        try:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))).close()
        finally:
            may_end.set()


async def test_several_binds_and_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with no_leaks(), trio.open_nursery() as nursery:
        config = configure(bind=["127.0.0.1:0", f"unix:{path}", "127.0.0.1:0"])
        addresses = await nursery.start(trioserve.serve, hello, config)
        assert addresses[1] == f"unix:{path}"
        for address in (addresses[0], addresses[2]):
            assert await fetch(address) == (200, b"hello")
        nursery.cancel_scope.cancel()
    assert not path.exists()


@pytest.mark.parametrize("listening", [False, True])
async def test_given_sockets_are_served_and_stay_open(listening: bool) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        if listening:
            sock.listen(5)
        address = f"http://127.0.0.1:{sock.getsockname()[1]}"
        for _ in range(2):  # it can be given again
            async with no_leaks(), trio.open_nursery() as nursery:
                serve = functools.partial(
                    trioserve.serve, hello, configure(bind=["1.2.3.4:1"]), sockets=[sock]
                )
                assert await nursery.start(serve) == [address]
                assert await fetch(address) == (200, b"hello")
                nursery.cancel_scope.cancel()
            assert sock.fileno() >= 0


async def test_a_hypercorn_config_is_taken_with_its_own_defaults(autojump_clock: Any) -> None:
    config = hypercorn.config.Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = None
    assert config.graceful_timeout == 3

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await trio.sleep_forever()

    async with no_leaks(), trio.open_nursery() as nursery:
        (address,) = await nursery.start(trioserve.serve, slow, config)
        async with connected(address) as client:
            await client.send(encode_request("GET"))
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                began = trio.current_time()
                assert (await client.read_response()).status == 503
                assert trio.current_time() - began == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("mode", ["wsgi", None])
async def test_a_wsgi_app_by_mode_and_by_its_looks(mode: Any) -> None:
    def application(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [environ["PATH_INFO"].encode()]

    async with no_leaks(), trio.open_nursery() as nursery:
        (address,) = await nursery.start(
            functools.partial(trioserve.serve, application, configure(), mode=mode)
        )
        assert await fetch(address, "/path") == (200, b"/path")
        nursery.cancel_scope.cancel()


async def test_defaults_are_used_without_a_config(unused_default_port: None) -> None:
    async with trio.open_nursery() as nursery:
        (address,) = await nursery.start(trioserve.serve, hello)
        assert address == "http://127.0.0.1:8000"
        assert await fetch(address) == (200, b"hello")
        nursery.cancel_scope.cancel()


@pytest.fixture
def unused_default_port() -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", 8000))
        except OSError:
            pytest.skip("somebody serves on port 8000 here")


async def test_under_virtual_time(autojump_clock: Any) -> None:
    async with no_leaks(), trio.open_nursery() as nursery:
        (address,) = await nursery.start(trioserve.serve, hello, configure(keep_alive_timeout=3600))
        async with connected(address) as client:
            assert (await client.get()).status == 200
            began = trio.current_time()
            assert await client.receive() == b""
            assert trio.current_time() - began == pytest.approx(3600, abs=0.1)
        nursery.cancel_scope.cancel()


async def test_it_leaves_the_process_as_it_was() -> None:
    """Signals, the collector's permanent generation, trio's logger: the caller's."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    frozen, loggers = gc.get_freeze_count(), list(logging.getLogger("trio.async_generator_errors").handlers)
    root = list(logging.getLogger().handlers)
    async with trio.open_nursery() as nursery:
        (address,) = await nursery.start(trioserve.serve, hello, configure())
        await fetch(address)
        assert {number: signal.getsignal(number) for number in handlers} == handlers
        assert gc.get_freeze_count() <= frozen  # what another test has frozen may go meanwhile
        assert logging.getLogger("trio.async_generator_errors").handlers == loggers
        assert logging.getLogger().handlers == root
        nursery.cancel_scope.cancel()


# -- errors --------------------------------------------------------------------------------------------------


async def test_what_keeps_it_from_starting_comes_out_as_it_is() -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database"})

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with no_leaks():
            with pytest.raises(BindError, match="in use"):
                await trioserve.serve(hello, configure(bind=[f"127.0.0.1:{port}"]))
            with pytest.raises(trioserve.LifespanFailed, match="no database"):
                await trioserve.serve(fails, configure())
            with pytest.raises(trioserve.ConfigError, match="certfile"):
                await trioserve.serve(hello, configure(certfile="cert.pem"))
            with pytest.raises(trioserve.ConfigError, match="errorlog"):
                await trioserve.serve(hello, configure(errorlog="/no/such/folder/log"))


async def test_one_bind_of_several_that_fails_closes_the_others(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        async with no_leaks():
            with pytest.raises(BindError):
                await trioserve.serve(
                    hello, configure(bind=[f"unix:{path}", f"127.0.0.1:{taken.getsockname()[1]}"])
                )
    assert not path.exists()


async def test_workers_are_none_of_a_librarys_business() -> None:
    async with trio.open_nursery() as nursery:
        (address,) = await nursery.start(trioserve.serve, hello, configure(workers=4))
        assert await fetch(address) == (200, b"hello")
        nursery.cancel_scope.cancel()


async def test_an_app_error_does_not_end_the_server_where_it_is_contained() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("boom")

    async with trio.open_nursery() as nursery:
        config = configure(on_app_error="contain", lifespan="off")
        (address,) = await nursery.start(trioserve.serve, app, config)
        for _ in range(3):
            assert (await fetch(address))[0] == 500
        nursery.cancel_scope.cancel()


# -- the worker underneath -----------------------------------------------------------------------------------


async def test_reprs_say_what_is_going_on() -> None:
    workers: list[Worker] = []
    async with trio.open_nursery() as nursery:
        serve = functools.partial(serve_worker, hello, configure(), on_worker=workers.append)
        (address,) = await nursery.start(serve)
        async with connected(address) as client:
            await client.get()
            (worker,) = workers
            assert repr(worker) == "<Worker running connections=1>"
            assert repr(worker.drain) == "<Drain running>"
            assert repr(worker.listeners) == f"<Listeners {address}>"
            assert repr(worker.context.deadlines) == "<Deadlines armed=1>"
            (connection,) = worker.context.connections
            name, port = client.sock.getsockname()
            assert repr(connection) == f"<connection 1 {name}:{port} keep_alive requests=1>"
            assert repr(worker.context.hub) == "<EpollHub watching 1>" or sys.platform != "linux"
        nursery.cancel_scope.cancel()
    assert repr(worker) == "<Worker stopped connections=0>"
    assert repr(worker.drain) == "<Drain stopped: cancelled by the caller>"


class Address:
    """A `task_status`, for who has no nursery to start the server in."""

    def __init__(self) -> None:
        self.client: socket.socket

    def started(self, addresses: list[str]) -> None:
        host, _, port = addresses[0].removeprefix("http://").rpartition(":")
        self.client = socket.create_connection((host, int(port)), timeout=30)
        self.client.sendall(encode_request("GET"))


def test_ctrl_c_drains_a_server_that_is_a_program_of_its_own() -> None:
    """`trio.run(serve, app, config)`, as hypercorn's documentation has it."""
    events = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for _ in range(2):
                events.append(message := (await receive())["type"])
                await send({"type": f"{message}.complete"})
            return
        signal.raise_signal(signal.SIGINT)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await respond(send)
        events.append("responded")

    status = Address()
    serve = functools.partial(trioserve.serve, task_status=status)
    with pytest.raises(KeyboardInterrupt):
        trio.run(serve, app, configure(), restrict_keyboard_interrupt_to_checkpoints=True)
    with status.client as client:
        response = b"".join(iter(functools.partial(client.recv, 65536), b""))
    assert response.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"connection: close" in response
    assert events == ["lifespan.startup", "responded", "lifespan.shutdown"]


# -- run() ---------------------------------------------------------------------------------------------------

SCRIPT = """
import signal, sys, trioserve

async def app(scope, receive, send):
    if scope["type"] == "http":
        if scope["path"] == "/exit":
            raise SystemExit(5)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"from a script"})

config = trioserve.Config()
config.bind = ["127.0.0.1:0"]
numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
before = [signal.getsignal(number) for number in numbers]
code = trioserve.run(app, config)
assert [signal.getsignal(number) for number in numbers] == before
sys.exit(code)
"""


@pytest.mark.parametrize("end, code", [("SIGTERM", 0), ("SIGINT", 0), ("/exit", 5)])
def test_run_serves_until_a_signal_and_returns_the_exit_code(end: str, code: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        address = ""
        while not address:
            line = process.stderr.readline()
            assert line, "it ended before it served"
            if "Running on" in line:
                address = line.split("Running on ")[1].split()[0]
        host, _, port = address.removeprefix("http://").rpartition(":")
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            sock.sendall(encode_request("GET", headers=[("connection", "close")]))
            assert b"from a script" in b"".join(iter(functools.partial(sock.recv, 65536), b""))
        if end == "/exit":
            with socket.create_connection((host, int(port)), timeout=10) as sock:
                sock.sendall(encode_request("GET", "/exit"))
                assert b" 503 " in sock.recv(65536)
        else:
            process.send_signal(getattr(signal, end))
        assert process.wait(20) == code
    finally:
        process.kill()
        process.communicate()


def test_run_says_what_it_has_no_supervisor_for() -> None:
    settings = "config.workers, config.max_requests = 3, 5\ncode ="
    script = SCRIPT.replace("code =", settings, 1)
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if "Running on" in line:
                break
        process.terminate()
        assert process.wait(20) == 0
        warned = [line.partition("[WARNING] ")[2] for line in said if "WARNING" in line]
        assert [line.partition(": trioserve.run()")[0] for line in warned] == [
            "Config: workers = 3 has no effect",
            "Config: max_requests = 5 has no effect",
        ]
    finally:
        process.kill()
        process.communicate()
