"""The requests in flight, as the supervisor finds them when the worker is gone."""

from __future__ import annotations

import gc
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.apps import hello, read_body, respond
from tests.http.feeding import head
from trioserve.observe.in_flight import (
    NO_REQUEST,
    PATH_SIZE,
    SIZE,
    SLOT_SIZE,
    SLOTS,
    InFlight,
    InFlightTable,
    Slot,
)
from trioserve.testing import TestServer, serving

SECRET = "hunter2"


@pytest.fixture
def table() -> Iterator[InFlightTable]:
    """The supervisor's end."""
    table = InFlightTable.create()
    yield table
    table.close()


@pytest.fixture
def attached(table: InFlightTable) -> Iterator[InFlightTable]:
    """The worker's end."""
    attached = InFlightTable.attach(table.fd)
    yield attached
    attached.close()


def take(table: InFlightTable) -> Slot:
    slot = table.take()
    assert slot is not None
    return slot


def begin(slot: Slot, path: bytes = b"/", method: str = "GET") -> None:
    slot.write_method(method)
    slot.path.value = path


def paths(table: InFlightTable) -> list[str]:
    return [request.path for request in table.read()]


# -- the table -----------------------------------------------------------------------------------------------


def test_the_supervisor_sees_what_the_worker_has_begun_and_not_ended(
    table: InFlightTable, attached: InFlightTable
) -> None:
    assert table.read() == []
    first, second = take(attached), take(attached)
    begin(first, b"/orders/7", "POST")
    begin(second, b"*", "OPTIONS")
    assert table.read() == [InFlight("POST", "/orders/7", None), InFlight("OPTIONS", "*", None)]
    first.whole.value = NO_REQUEST
    assert paths(table) == ["*"]
    begin(first, b"/7", "POST")
    assert sorted(paths(table)) == ["*", "/7"], "nothing is left of a longer path"


def test_a_released_slot_is_empty_and_the_first_to_be_taken_again(
    table: InFlightTable, attached: InFlightTable
) -> None:
    first, second = take(attached), take(attached)
    begin(first)
    begin(second)
    attached.release(first)
    assert (len(table.read()), attached.taken) == (1, 1)
    assert attached.take() is first
    assert attached.taken == 2


def test_there_are_no_more_slots_than_there_are(table: InFlightTable, attached: InFlightTable) -> None:
    slots = [take(attached) for _ in range(SLOTS)]
    assert attached.take() is None
    for slot in slots:
        begin(slot)
    assert len(table.read()) == SLOTS
    attached.release(slots[7])
    assert attached.take() is slots[7]


def test_when_a_request_began_is_known_once_it_is_dated(
    table: InFlightTable, attached: InFlightTable
) -> None:
    slots = [take(attached) for _ in range(3)]
    for slot, path in zip(slots, (b"/young", b"/middle", b"/old"), strict=True):
        begin(slot, path)
    slots[1].write_time(70.0)
    slots[2].write_time(50.0)
    found = table.read(now=100.0)
    assert [(request.path, request.started) for request in found] == [
        ("/old", 50.0),
        ("/middle", 70.0),
        ("/young", None),
    ]
    slots[2].clear()
    begin(slots[2], b"/next")
    assert InFlight("GET", "/next", None) in table.read(now=100.0), "not the time of the one before"


def test_what_has_no_room_is_cut(table: InFlightTable, attached: InFlightTable) -> None:
    fits, too_long = take(attached), take(attached)
    begin(fits, b"/" + b"x" * (PATH_SIZE - 2))
    begin(too_long, b"/" + b"x" * (PATH_SIZE - 1), "M" * 64)
    with pytest.raises(ValueError, match="too long"):
        too_long.path.value = b"/" * (PATH_SIZE + 1)
    assert sorted(table.read(), key=lambda request: len(request.path)) == [
        InFlight("GET", "/" + "x" * (PATH_SIZE - 2), None),
        InFlight("M" * 19, "/" + "x" * (PATH_SIZE - 1) + "...", None),
    ]


def test_both_ends_describe_themselves(table: InFlightTable, attached: InFlightTable) -> None:
    take(attached)
    assert repr(table) == f"<InFlightTable fd={table.fd}>"
    assert repr(attached) == f"<InFlightTable attached, 1 of {SLOTS} slots taken>"
    assert table.taken == 0
    assert table.take() is None, "the supervisor has none to give"


def test_closing_twice_or_under_a_connection_does_no_harm() -> None:
    table = InFlightTable.create()
    attached = InFlightTable.attach(table.fd)
    slot = take(attached)
    attached.close()
    table.close()
    begin(slot)
    attached.release(slot)
    attached.close()
    table.close()
    assert attached.take() is None
    assert table.fd == -1


def test_the_descriptor_is_not_handed_down_by_accident(table: InFlightTable) -> None:
    assert not os.get_inheritable(table.fd)


# -- other systems, and when things are short ----------------------------------------------------------------


@pytest.mark.parametrize("way", ["no memfd_create", "it fails"])
def test_without_memfd_it_is_a_file_that_has_no_name(
    way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> int:
        raise OSError("not allowed")

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    if way == "it fails":
        monkeypatch.setattr(os, "memfd_create", fail)
    else:
        monkeypatch.delattr(os, "memfd_create")
    table = InFlightTable.create()
    attached = InFlightTable.attach(table.fd)
    try:
        assert list(tmp_path.iterdir()) == []
        begin(take(attached), b"/x")
        assert paths(table) == ["/x"]
    finally:
        attached.close()
        table.close()


def test_a_full_disk_is_noticed_by_the_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(os, "pwrite", lambda *_: 4096)
    with pytest.raises(OSError, match="No space left"):
        InFlightTable.create()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_no_table_cannot_be_attached(tmp_path: Path) -> None:
    with open(tmp_path / "small", "wb+") as file, pytest.raises(ValueError, match="size"):
        InFlightTable.attach(file.fileno())


# -- a worker that has lost its mind -------------------------------------------------------------------------


def write(table: InFlightTable, at: int, data: bytes) -> None:
    os.pwrite(table.fd, data, at)


@pytest.mark.parametrize(
    "path, shown",
    [
        (b"/a?token=hunter2", "/a"),
        (b"/a#hunter2", "/a"),
        (b"/a\r\nINFO all is well", "/a\ufffd\ufffdINFO\ufffdall\ufffdis\ufffdwell"),
        (b"/\x1b[31m\xff\x7f", "/\ufffd[31m\ufffd\ufffd"),
    ],
)
def test_what_stands_there_is_shown_as_a_path_and_no_more(
    table: InFlightTable, attached: InFlightTable, path: bytes, shown: str
) -> None:
    begin(take(attached), path)
    assert paths(table) == [shown]


@pytest.mark.parametrize("path, method", [(b"no path", "GET"), (b"/", "G T"), (b"/", ""), (b"?", "GET")])
def test_what_cannot_be_a_request_is_left_out(
    table: InFlightTable, attached: InFlightTable, path: bytes, method: str
) -> None:
    begin(take(attached), path, method)
    assert table.read() == []


@pytest.mark.parametrize("started", [math.nan, math.inf, -math.inf, -1.0, 1e300, 102.0])
def test_a_time_that_cannot_be_is_none(table: InFlightTable, attached: InFlightTable, started: float) -> None:
    slot = take(attached)
    begin(slot)
    slot.write_time(started)
    assert table.read(now=100.0) == [InFlight("GET", "/", None)]


def test_clocks_that_differ_a_little_give_no_time_to_come(
    table: InFlightTable, attached: InFlightTable
) -> None:
    slot = take(attached)
    begin(slot)
    slot.write_time(100.0001)
    assert table.read(now=100.0) == [InFlight("GET", "/", 100.0)]


def test_no_bytes_at_all_confuse_the_supervisor(table: InFlightTable) -> None:
    chance = random.Random(7)
    for data in (b"\xff" * SIZE, b"/" * SIZE, b"A" * SIZE, *(chance.randbytes(SIZE) for _ in range(5))):
        write(table, 0, data)
        for request in table.read():
            assert (request.method + request.path).isprintable()
            assert len(request.method) <= 19
            assert len(request.path) <= PATH_SIZE + 3


@pytest.mark.parametrize("size", [0, SLOT_SIZE - 1, SLOT_SIZE + 7])
def test_a_table_that_was_cut_off_does_not_end_the_supervisor(table: InFlightTable, size: int) -> None:
    write(table, 0, struct.pack("=d101s19s", 1.0, b"/x", b"GET"))
    os.ftruncate(table.fd, size)
    assert paths(table) == ["/x"] * (size >= SLOT_SIZE)


# -- in a worker ---------------------------------------------------------------------------------------------


def use(server: TestServer, attached: InFlightTable) -> None:
    server.worker.context.in_flight_table = attached


async def waiting(scope: Any, receive: Any, send: Any) -> None:
    """Answers when the request body is complete."""
    if scope["type"] == "http":
        await respond(send, await read_body(receive))


async def test_a_request_is_listed_while_the_app_runs_and_no_longer(
    table: InFlightTable, attached: InFlightTable, engine: str
) -> None:
    seen: list[InFlight] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            seen.extend(table.read())
            await respond(send)
            seen.extend(table.read())  # what follows the response may be the end of the process as well

    async with serving(app, http_engine=engine) as server:
        use(server, attached)
        async with server.connect() as client:
            for method, target in (("GET", "/a?b=c"), ("BREW", "/%41//.."), ("GET", "/")):
                seen.clear()
                await client.get(target, method=method)
                await trio.testing.wait_all_tasks_blocked()
                assert seen == [InFlight(method, target.partition("?")[0], None)] * 2
                assert table.read() == []
                assert attached.taken == 1, "the connection keeps its slot"
        await server.wait_idle()
        assert attached.taken == 0


async def test_requests_in_a_pipeline_are_listed_one_after_the_other(
    table: InFlightTable, attached: InFlightTable
) -> None:
    seen: list[list[str]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            seen.append(paths(table))
            await respond(send)

    async with serving(app) as server, server.connect() as client:
        use(server, attached)
        await client.send(b"".join(head(f"GET /{number} HTTP/1.1") for number in range(5)))
        for _ in range(5):
            await client.read_response()
        assert seen == [[f"/{number}"] for number in range(5)]
        assert len(list(data_of(table))) == 1


def data_of(table: InFlightTable) -> Iterator[bytes]:
    """The slots that have ever been used."""
    data = os.pread(table.fd, SIZE, 0)
    for at in range(0, SIZE, SLOT_SIZE):
        slot = data[at : at + SLOT_SIZE]
        if slot.strip(b"\0"):
            yield slot


async def test_a_path_that_is_too_long_is_cut_and_served(
    table: InFlightTable, attached: InFlightTable
) -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            seen.extend(paths(table))
            await respond(send, scope["path"].encode())

    async with serving(app) as server, server.connect() as client:
        use(server, attached)
        long = "/" + "x" * 1000
        assert (await client.get(long)).body == long.encode()
        assert seen == [long[:PATH_SIZE] + "..."]


async def test_no_query_header_or_body_is_stored(table: InFlightTable, attached: InFlightTable) -> None:
    async with serving(waiting) as server, server.connect() as client:
        use(server, attached)
        fields = (f"Authorization: {SECRET}", f"Cookie: {SECRET}", "Content-Length: 8")
        await client.send(head(f"POST /x?token={SECRET} HTTP/1.1", *fields) + SECRET.encode())
        while not table.read():
            await trio.lowlevel.checkpoint()
        assert SECRET.encode() not in os.pread(table.fd, SIZE, 0)
        await client.send(b"!")
        await client.read_response()
        assert SECRET.encode() not in os.pread(table.fd, SIZE, 0)


@pytest.mark.parametrize("end", ["app error", "half an answer", "peer gone", "late", "refused body"])
async def test_a_request_that_ends_badly_is_over_too(
    table: InFlightTable, attached: InFlightTable, end: str
) -> None:
    entered = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        entered.set()
        if end == "app error":
            raise LookupError
        if end == "half an answer":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        elif end == "refused body":
            await read_body(receive)
        else:
            await trio.sleep_forever()

    settings = {
        "on_app_error": "contain",
        "request_timeout": 0.05 if end == "late" else None,
        "disconnect_grace": 0.0,
    }
    async with serving(app, **settings) as server:
        use(server, attached)
        async with server.connect() as client:
            chunked = ("Transfer-Encoding: chunked",) if end == "refused body" else ()
            await client.send(head("POST / HTTP/1.1", *chunked))
            await entered.wait()
            if end == "refused body":
                await client.send(b"no number\r\n")
            if end == "peer gone":
                client.reset()
            else:
                await client.receive_all()
        await server.wait_idle()
        assert table.read() == []
        assert attached.taken == 0


@pytest.mark.parametrize("answered_by", ["the app", "the server"])
async def test_a_request_is_over_while_its_connection_still_lingers(
    table: InFlightTable, attached: InFlightTable, answered_by: str
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            if answered_by == "the server":
                raise LookupError
            await respond(send)

    async with serving(app, linger_timeout=30, on_app_error="contain") as server, server.connect() as client:
        use(server, attached)
        await client.send(head("POST / HTTP/1.1", "Content-Length: 1000000"))
        assert (await client.read_response()).header("connection") == "close"
        await trio.testing.wait_all_tasks_blocked()
        assert [connection.phase for connection in server.worker.context.connections] == ["linger"]
        assert table.read() == []


async def test_a_connection_that_has_no_slot_is_served(table: InFlightTable, attached: InFlightTable) -> None:
    for _ in range(SLOTS):
        take(attached)
    async with serving(hello) as server, server.connect() as client:
        use(server, attached)
        for _ in range(3):
            assert (await client.get()).status == 200
        assert table.read() == []
    assert attached.taken == SLOTS


async def test_a_request_that_waits_for_admission_has_not_begun(
    table: InFlightTable, attached: InFlightTable
) -> None:
    async with serving(waiting, max_concurrent_requests=1, request_queue_size=1) as server:
        use(server, attached)
        async with server.connect() as first, server.connect() as second:
            await first.send(head("POST /first HTTP/1.1", "Content-Length: 1"))
            await trio.testing.wait_all_tasks_blocked(0.01)
            await second.send(head("GET /second HTTP/1.1"))
            await trio.testing.wait_all_tasks_blocked(0.01)
            server.worker.context.date_requests()
            assert paths(table) == ["/first"]
            await first.send(b"!")
            await first.read_response()
            assert (await second.read_response()).status == 200


async def test_the_heartbeat_dates_the_requests(
    table: InFlightTable, attached: InFlightTable, autojump_clock: trio.testing.MockClock
) -> None:
    """By the clock of the machine, whatever the worker's own clock says."""
    async with serving(waiting) as server, server.connect() as client, server.connect() as idle:
        use(server, attached)
        await idle.get()
        await client.send(head("POST /x HTTP/1.1", "Content-Length: 1"))
        while not table.read():
            await trio.lowlevel.checkpoint()
        await trio.sleep(10)
        assert table.read() == [InFlight("POST", "/x", None)]
        server.worker.context.date_requests()
        (request,) = table.read()
        assert request.started is not None
        assert time.monotonic() - request.started == pytest.approx(10, abs=5)
        await client.send(b"!")
        await client.read_response()
        server.worker.context.date_requests()
        assert table.read() == []


async def test_without_a_table_there_is_nothing_to_date() -> None:
    async with serving(hello) as server, server.connect() as client:
        await client.get()
        server.worker.context.date_requests()


async def test_an_idle_connection_holds_nothing_of_the_apps(attached: InFlightTable) -> None:
    class Luggage:
        """What a framework puts into the scope."""

    kept: list[weakref.ref[Luggage]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope["luggage"] = luggage = Luggage()
            kept.append(weakref.ref(luggage))
            await respond(send)

    async with serving(app) as server, server.connect() as client:
        use(server, attached)
        gc.disable()
        try:
            await client.get()
            await trio.testing.wait_all_tasks_blocked()
            assert [luggage() for luggage in kept] == [None]
        finally:
            gc.enable()


# -- the end -------------------------------------------------------------------------------------------------

WORKER = """
import ctypes, os, resource, signal, sys
import trio
from trioserve.observe.in_flight import InFlightTable
from trioserve.testing import serving

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
table = InFlightTable.attach(int(sys.argv[1]))
os.close(int(sys.argv[1]))

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    if scope["path"] == "/die":
        server.worker.context.date_requests()
        if sys.argv[2] == "SIGSEGV":
            ctypes.string_at(0)
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    if scope["path"].startswith("/slow"):
        await trio.sleep_forever()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})

async def main():
    global server
    async with serving(app) as server:
        server.worker.context.in_flight_table = table
        clients = [server.connect() for _ in range(4)]
        assert (await clients[0].get("/done")).status == 200
        await clients[0].send(b"GET /slow?token=hunter2 HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n")
        await clients[1].send(b"PUT /slow/2 HTTP/1.1\\r\\nHost: a\\r\\nContent-Length: 5\\r\\n\\r\\n")
        assert (await clients[2].get("/done")).status == 200
        await trio.testing.wait_all_tasks_blocked(0.01)
        await clients[3].send(b"GET /die?token=hunter2 HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n")
        await trio.sleep_forever()

import trio.testing
trio.run(main)
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGABRT"])
def test_what_a_worker_was_doing_outlives_it(table: InFlightTable, name: str) -> None:
    before = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(table.fd), name],
        pass_fds=[table.fd],
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == -getattr(signal, name), done.stderr.decode()
    found = table.read()
    assert sorted((request.method, request.path) for request in found) == [
        ("GET", "/die"),
        ("GET", "/slow"),
        ("PUT", "/slow/2"),
    ]
    assert found[-1].path == "/die", "the youngest comes last"
    for request in found:
        assert request.started is not None
        assert before < request.started < time.monotonic()
