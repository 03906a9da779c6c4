"""The boundary's table, row by row: what is answered, what becomes of the worker, and what the report may say."""

from __future__ import annotations

import gc
import logging
import socket
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

import trioserve
from trioserve.structure.boundary import ROWS, Fault, Verdict
from trioserve.structure.drain import DrainState
from trioserve.testing import TestServer, encode_request, no_leaks, serving

from ..apps import respond

BEGIN = {"type": "http.response.start", "status": 200, "headers": [(b"x-app", b"1")]}
PART = {"type": "http.response.body", "body": b"part", "more_body": True}


class Declared(Exception):
    """What a test declares safe, or fatal."""


class OwnBase(BaseException):
    """Neither an Exception nor one of Python's own."""


def raising(error: Callable[[], BaseException], when: str = "none") -> Any:
    """An app that raises with its response in that state."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/ok":
            await respond(send)
            return
        if when == "held":
            await send(BEGIN)
        elif when == "started":
            await send(BEGIN)
            await send(PART)
        elif when == "complete":
            await respond(send, headers=[(b"x-app", b"1")])
        elif when == "complete 500":
            await respond(send, b"sorry", 500)
        raise error()

    return app


async def fails(app: Any, request: bytes = b"", **settings: Any) -> tuple[bytes, TestServer]:
    """What the client receives from an app that fails, and the worker afterwards."""
    settings = {"lifespan": "off", **settings}
    async with no_leaks(), serving(app, **settings) as server, server.connect() as client:
        await client.send(request or encode_request("GET"))
        received = await client.receive_all()
        await trio.testing.wait_all_tasks_blocked(0.01)
    return received, server


def check(server: TestServer, row: str, verdict: Verdict, exit_code: int) -> Fault:
    fault = server.failure
    assert server.worker.context.counters.faults == {row: 1}
    assert fault is not None
    assert (fault.row, fault.verdict, fault.exit_code) == (row, verdict, exit_code)
    return fault


def is_answer(received: bytes, status: int) -> bool:
    """A whole response of the server's own, which closes."""
    assert received.startswith(b"HTTP/1.1 %d " % status), received
    assert b"\r\nconnection: close\r\n" in received
    assert b"x-app" not in received
    return received.endswith(b"\n")


# -- A: what leaves the app ----------------------------------------------------------------------------------


@pytest.mark.parametrize("when, row", [("none", "A1"), ("held", "A1")])
async def test_a1_before_the_response(engine: str, when: str, row: str) -> None:
    received, server = await fails(raising(lambda: ValueError("boom"), when), http_engine=engine)
    assert is_answer(received, 500)
    assert b"boom" not in received
    fault = check(server, "A1", Verdict.REPLACE, 75)
    assert isinstance(fault.error, ValueError)


async def test_a2_in_the_middle_of_the_response(engine: str) -> None:
    received, server = await fails(raising(lambda: ValueError("boom"), "started"), http_engine=engine)
    assert received.endswith(b"4\r\npart\r\n")  # what was sent, and no last chunk
    check(server, "A2", Verdict.REPLACE, 75)


async def test_a2_with_a_declared_length_ends_short() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({**BEGIN, "headers": [(b"content-length", b"100")]})
        await send(PART)
        raise ValueError("boom")

    received, server = await fails(app)
    assert received.endswith(b"\r\n\r\npart")
    check(server, "A2", Verdict.REPLACE, 75)


async def test_a2_to_http_1_0_is_a_reset_since_the_end_of_the_connection_is_the_end_of_the_body() -> None:
    async with serving(raising(ValueError, "started"), lifespan="off") as server, server.connect() as client:
        await client.send(encode_request("GET", version="1.0"))
        with pytest.raises(ConnectionResetError):
            while await client.receive():
                pass


async def test_a3_after_an_error_response_of_the_frameworks_own() -> None:
    received, server = await fails(raising(ValueError, "complete 500"))
    assert received.startswith(b"HTTP/1.1 500 ")
    assert received.endswith(b"sorry")
    check(server, "A3", Verdict.REPLACE, 75)


async def test_a4_after_a_complete_response() -> None:
    received, server = await fails(raising(ValueError, "complete"))
    assert received.endswith(b"hello")
    check(server, "A4", Verdict.REPLACE, 75)


async def test_a5_a_broken_contract() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    received, server = await fails(app)
    assert is_answer(received, 500)
    fault = check(server, "A5", Verdict.REPLACE, 75)
    assert "returned without sending a response" in fault.summary


@pytest.mark.parametrize(
    "error", [trioserve.Fatal("corrupt"), ExceptionGroup("", [trioserve.Fatal("corrupt")])]
)
async def test_a6_declared_fatal(error: Exception) -> None:
    received, server = await fails(raising(lambda: error))
    assert is_answer(received, 500)
    assert server.worker.drain.grace <= 2
    check(server, "A6", Verdict.FATAL, 75)


async def test_a6_by_the_setting() -> None:
    _received, server = await fails(raising(Declared), fatal_errors=[Declared])
    check(server, "A6", Verdict.FATAL, 75)


@pytest.mark.parametrize("grouped", [False, True])
async def test_a7_declared_safe(grouped: bool) -> None:
    def error() -> Exception:
        return ExceptionGroup("", [Declared(), Declared()]) if grouped else Declared()

    async with serving(raising(error), lifespan="off", contain_errors=[Declared]) as server:
        assert (await server.get()).status == 500
        assert (await server.get("/ok")).status == 200
        assert server.worker.context.counters.faults == {"A7": 1}
    assert server.failure is None


async def test_a_group_is_safe_only_if_all_of_it_is() -> None:
    def error() -> Exception:
        return ExceptionGroup("", [Declared(), ValueError()])

    _, server = await fails(raising(error), contain_errors=[Declared])
    check(server, "A1", Verdict.REPLACE, 75)


# -- M and X: what counts wherever it comes from -------------------------------------------------------------

LEAVES: list[tuple[BaseException, str, Verdict, int, int]] = [
    (SystemExit(3), "X1", Verdict.EXIT, 3, 503),
    (SystemExit(0), "X1", Verdict.EXIT, 75, 503),
    (SystemExit(), "X1", Verdict.EXIT, 75, 503),
    (SystemExit("a message"), "X1", Verdict.EXIT, 1, 503),
    (SystemExit(256), "X1", Verdict.EXIT, 75, 503),
    (KeyboardInterrupt(), "X2", Verdict.EXIT, 130, 503),
    (OwnBase("mine"), "X3", Verdict.FATAL, 75, 500),
    (MemoryError(), "M1", Verdict.FATAL, 83, 503),
    (trio.TrioInternalError("broken"), "S2", Verdict.FATAL, 70, 500),
]


@pytest.mark.parametrize("leaf, row, verdict, exit_code, status", LEAVES)
@pytest.mark.parametrize("grouped", [False, True])
async def test_leaves_that_count_alone_and_in_a_group_with_others(
    leaf: BaseException, row: str, verdict: Verdict, exit_code: int, status: int, grouped: bool
) -> None:
    error = BaseExceptionGroup("outer", [ValueError(), BaseExceptionGroup("inner", [KeyError(), leaf])])
    received, server = await fails(raising(lambda: error if grouped else leaf))
    if ROWS[row].status is not None:
        assert is_answer(received, status)
    fault = check(server, row, verdict, exit_code)
    assert fault.error is (error if grouped else leaf)


async def test_system_exit_out_of_a_nursery_whose_other_tasks_are_cancelled() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def leave() -> None:
            raise SystemExit(7)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(leave)

    received, server = await fails(app)
    assert is_answer(received, 503)
    check(server, "X1", Verdict.EXIT, 7)


async def test_cancelled_that_is_mixed_with_an_error_does_not_hide_it(autojump_clock: Any) -> None:
    """The handler is late and is cancelled; what it raises on its way out is an error of its own."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def clean_up() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("in the clean-up")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(clean_up)

    received, server = await fails(app, request_timeout=5)
    assert is_answer(received, 500)
    fault = check(server, "A1", Verdict.REPLACE, 75)
    assert not isinstance(fault.error, trio.Cancelled)
    assert "Cancelled" not in repr(fault.error)


def raising_cancelled(kept: list[BaseException], *, grouped: bool) -> Callable[..., Any]:
    """An app that keeps a `Cancelled` of its own, and raises it when nobody cancels it any more."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with trio.CancelScope() as own:
            own.cancel()
            try:
                await trio.sleep_forever()
            except trio.Cancelled as error:
                kept[:] = [error]
                raise
        raise BaseExceptionGroup("", kept) if grouped else kept[0]

    return app


@pytest.mark.parametrize("grouped", [False, True])
async def test_a_cancelled_that_nobody_has_asked_for_is_an_error_like_others(grouped: bool) -> None:
    """As a cache does that keeps what its first caller got; it must not take siblings or the server down."""
    received, server = await fails(raising_cancelled([], grouped=grouped))
    assert is_answer(received, 500)
    check(server, "A1", Verdict.REPLACE, 75)


async def test_m3_a_recursion_error_is_an_ordinary_error() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        def deeper() -> None:
            deeper()

        deeper()

    received, server = await fails(app)
    assert is_answer(received, 500)
    fault = check(server, "A1", Verdict.REPLACE, 75)
    assert isinstance(fault.error, RecursionError)


# -- B: what the app leaves behind ---------------------------------------------------------------------------


def leaking(what: str, then: str) -> Any:
    kept: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/hold":
            await trio.sleep(0.2)
            await respond(send)
            return
        if what == "nursery":
            manager = trio.open_nursery()
            nursery = await manager.__aenter__()
            nursery.start_soon(trio.sleep_forever)
        else:
            manager = trio.CancelScope()
            manager.__enter__()
        kept.append(manager)
        if then == "raises":
            raise ValueError("and an error of its own")
        if then == "responds":
            await respond(send)

    return app


@pytest.mark.parametrize("what", ["nursery", "scope"])
@pytest.mark.parametrize("then", ["responds", "returns", "raises"])
async def test_b1_a_leaked_nursery_or_scope_is_fatal_and_spares_the_others(what: str, then: str) -> None:
    async with no_leaks(), serving(leaking(what, then), lifespan="off") as server:
        async with server.connect() as other, server.connect() as client:
            await other.send(encode_request("GET", "/hold"))
            await trio.testing.wait_all_tasks_blocked(0.01)
            await client.send(encode_request("GET", "/leak", [("connection", "close")]))
            received = await client.receive_all()
            assert (await other.read_response()).status == 200
        await server.worker.drain.wait(DrainState.STOPPED)
    if then == "responds":
        assert received.endswith(b"hello")
    else:
        assert is_answer(received, 500)
    assert server.failure is not None
    assert (server.failure.row, server.failure.exit_code) == ("B1", 70)
    assert server.worker.drain.cut_lifespan


@pytest.mark.filterwarnings("ignore:Async generator")
async def test_b2_an_abandoned_generator_that_fails_while_it_is_finalised() -> None:
    async def generate() -> Any:
        try:
            yield 1
        finally:
            raise ValueError("in a finally")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async for _ in generate():
            break
        gc.collect()
        await respond(send)

    async with serving(app, lifespan="off") as server:
        assert (await server.get()).status == 200
        await server.worker.drain.wait(DrainState.STOPPED)
    fault = check(server, "B2", Verdict.REPLACE, 75)
    assert isinstance(fault.error, ValueError)


# -- S: our own ----------------------------------------------------------------------------------------------


class Broken:
    """Stands where something of ours stands, and fails."""

    def __getattr__(self, name: str) -> Any:
        raise ZeroDivisionError(f"no {name}")


async def test_s1_a_broken_log_is_ours_and_ends_no_other_connection() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await trio.sleep(0.1 if scope["path"] == "/hold" else 0)
        await respond(send)

    async with no_leaks(), serving(app, lifespan="off") as server:
        server.worker.context.access_log = Broken()  # type: ignore[assignment]
        async with server.connect() as client, server.connect() as other:
            await other.send(encode_request("GET", "/hold"))
            await client.send(encode_request("GET"))
            for waiting in (client, other):
                assert (await waiting.read_response()).body == b"hello"  # it was out by then
                assert await waiting.receive() == b""  # and is not destroyed by a reset
        await server.worker.drain.wait(DrainState.STOPPED)
    assert server.failure is not None
    assert (server.failure.row, server.failure.exit_code) == ("S1", 70)


def no_engine() -> Any:
    raise ZeroDivisionError("no engine")


@pytest.mark.parametrize("new_engine", [Broken, no_engine])
async def test_s1_a_broken_engine_is_answered_by_closing(new_engine: Any) -> None:
    async with no_leaks(), serving(raising(ValueError), lifespan="off") as server:
        server.worker.context.new_engine = new_engine
        async with server.connect() as client:
            await client.send(encode_request("GET"))
            assert await client.receive_all() == b""
        await server.worker.drain.wait(DrainState.STOPPED)
    check(server, "S1", Verdict.FATAL, 70)


async def test_s3_a_listening_socket_that_fails() -> None:
    async with no_leaks(), serving(raising(ValueError), lifespan="off") as server:
        async with server.connect() as client:
            assert (await client.get("/ok")).status == 200
            (sock,) = server.worker.listeners.sockets
            sock.shutdown(socket.SHUT_RDWR)
            await server.worker.drain.wait(DrainState.STOPPED)
    check(server, "S3", Verdict.FATAL, 71)


# -- C: the peer's -------------------------------------------------------------------------------------------


async def test_c1_and_c3_are_counted_and_end_only_their_connection(autojump_clock: Any, caplog: Any) -> None:
    async with serving(raising(ValueError), lifespan="off", request_head_timeout=5) as server:
        async with server.connect() as malformed, server.connect() as slow:
            await malformed.send(b"nonsense\r\n\r\n")
            await slow.send(b"GET / ")
            assert (await malformed.receive_all()).startswith(b"HTTP/1.1 400 ")
            assert (await slow.receive_all()).startswith(b"HTTP/1.1 408 ")
        assert (await server.get("/ok")).status == 200
        counters = server.worker.context.counters
        assert (counters.refused, counters.late, counters.faults) == ({"400": 1}, {"request_head": 1}, {})
    assert server.failure is None
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
