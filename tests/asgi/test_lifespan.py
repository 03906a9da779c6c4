"""The lifespan protocol: auto, on and off; startup and shutdown, their failures and their time-outs."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing
from starlette.applications import Starlette
from starlette.routing import Route

from trioserve.config import Config
from trioserve.errors import LifespanDied, LifespanFailed
from trioserve.structure.drain import DrainState
from trioserve.testing import serving
from trioserve.worker.serve import serve
from trioserve.worker.worker import serve_worker

from ..apps import respond


class LifespanApp:
    """Follows a script in its lifespan; answers requests with what it has noted."""

    def __init__(self, *, startup: Any = None, running: Any = None, shutdown: Any = None) -> None:
        self.startup, self.running, self.shutdown = startup, running, shutdown
        self.events: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await respond(send, ",".join(self.events).encode())
            return
        self.events.append((await receive())["type"])
        if self.startup is not None:
            await self.startup(send)
        await send({"type": "lifespan.startup.complete"})
        if self.running is not None:
            await self.running()
        self.events.append((await receive())["type"])
        if self.shutdown is not None:
            await self.shutdown(send)
        await send({"type": "lifespan.shutdown.complete"})
        self.events.append("unwound")


def configure(**settings: Any) -> Config:
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = logging.getLogger("trioserve.tests")
    config.graceful_timeout = 1
    for name, value in settings.items():
        setattr(config, name, value)
    return config


async def startup_error(app: Any, **settings: Any) -> BaseException:
    """What `serve()` raises for an app that cannot start; it must not have listened."""
    started: list[Any] = []

    class Status:
        def started(self, value: Any = None) -> None:
            started.append(value)

    with trio.fail_after(100), pytest.raises(BaseException) as caught:
        await serve(app, configure(**settings), task_status=Status())
    assert not started
    return caught.value


# -- a lifespan that works -----------------------------------------------------------------------------------


async def test_the_scope_of_the_lifespan() -> None:
    scopes = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)

    async with serving(app):
        pass
    assert scopes == [{"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": {}}]


@pytest.mark.parametrize("mode", ["auto", "on"])
async def test_startup_before_the_first_request_and_shutdown_after_the_last(mode: str) -> None:
    app = LifespanApp()
    async with serving(app, lifespan=mode) as server:
        assert (await server.get()).body == b"lifespan.startup"
    assert app.events == ["lifespan.startup", "lifespan.shutdown", "unwound"]


async def test_nobody_can_connect_before_startup_is_complete() -> None:
    refused: list[bool] = []

    async def connect_too_early(_send: Any) -> None:
        (worker,) = workers
        with trio.socket.socket() as sock:
            try:
                await sock.connect(worker.listeners.sockets[0].getsockname())
            except ConnectionRefusedError:
                refused.append(True)

    workers: list[Any] = []
    app = LifespanApp(startup=connect_too_early)
    async with trio.open_nursery() as nursery:
        await nursery.start(functools.partial(serve_worker, app, configure(), on_worker=workers.append))
        nursery.cancel_scope.cancel()
    assert refused == [True]


async def test_off_never_calls_the_app_with_a_lifespan() -> None:
    app = LifespanApp()
    async with serving(app, lifespan="off") as server:
        assert (await server.get()).body == b""
    assert app.events == []


async def test_shutdown_waits_for_requests_in_flight() -> None:
    order: list[str] = []
    go_on, in_request = trio.Event(), trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            order.append("shutdown")
            await send({"type": "lifespan.shutdown.complete"})
            return
        in_request.set()
        await go_on.wait()
        order.append("request")
        await respond(send)

    async with serving(app) as server, trio.open_nursery() as nursery:
        nursery.start_soon(server.get)
        await in_request.wait()
        server.worker.drain.begin("test")
        await trio.testing.wait_all_tasks_blocked(0.01)
        go_on.set()
    assert order == ["request", "shutdown"]


async def test_background_tasks_of_the_lifespan_run_until_shutdown() -> None:
    """The pattern for work that outlives requests: a nursery round the lifespan's wait."""
    beats: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            scope["state"]["nursery"].start_soon(work, scope["path"])
            await respond(send)
            return
        async with trio.open_nursery() as nursery:
            await receive()
            scope["state"]["nursery"] = nursery
            await send({"type": "lifespan.startup.complete"})
            await receive()
            nursery.cancel_scope.cancel()
        await send({"type": "lifespan.shutdown.complete"})

    async def work(path: str) -> None:
        beats.append(1)
        await trio.sleep_forever()

    async with serving(app) as server:
        await server.get()
        await server.get()
    assert beats == [1, 1]
    assert server.failure is None


# -- apps without one ----------------------------------------------------------------------------------------


async def raises_for_lifespan(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        raise NotImplementedError("http only")
    await respond(send)


async def returns_for_lifespan(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "lifespan":
        await respond(send)


async def test_auto_serves_an_app_that_raises_and_shows_the_traceback(caplog: Any) -> None:
    async with serving(raises_for_lifespan) as server:
        assert (await server.get()).status == 200
    (record,) = [r for r in caplog.records if "lifespan" in r.message]
    assert record.levelname == "WARNING"
    assert "NotImplementedError" in caplog.text
    assert server.failure is None


async def test_auto_serves_an_app_that_returns_and_says_so_once(caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    async with serving(returns_for_lifespan) as server:
        assert (await server.get()).status == 200
    assert [r.levelname for r in caplog.records if "no lifespan" in r.message] == ["INFO"]


@pytest.mark.parametrize("app", [raises_for_lifespan, returns_for_lifespan])
async def test_on_makes_the_absence_of_a_lifespan_a_failure(app: Any) -> None:
    error = await startup_error(app, lifespan="on")
    assert type(error) is LifespanFailed
    assert 'lifespan is "on"' in str(error)
    if app is raises_for_lifespan:
        assert isinstance(error.__cause__, NotImplementedError)
        assert re.search(r": NotImplementedError at .*\.py:\d+: ", str(error))


async def test_returning_after_startup_goes_on_without_shutdown() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
        else:
            await respond(send)

    async with serving(app) as server:
        assert (await server.get()).status == 200
    assert server.failure is None


# -- startup that fails --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "on"])
async def test_startup_failed_is_the_apps_message(mode: str) -> None:
    async def fail(send: Any) -> None:
        await send({"type": "lifespan.startup.failed", "message": "no database at db:5432"})
        await trio.sleep_forever()

    error = await startup_error(LifespanApp(startup=fail), lifespan=mode)
    assert type(error) is LifespanFailed
    assert "no database at db:5432" in str(error)


async def test_an_app_that_raises_after_startup_failed_still_failed_by_its_message() -> None:
    """As Starlette does: it sends the traceback, then raises."""

    async def fail(send: Any) -> None:
        await send({"type": "lifespan.startup.failed", "message": "the reason"})
        raise RuntimeError("again")

    error = await startup_error(LifespanApp(startup=fail))
    assert type(error) is LifespanFailed
    assert "the reason" in str(error)


async def test_startup_that_takes_too_long(autojump_clock: Any) -> None:
    async def hang(_send: Any) -> None:
        await trio.sleep_forever()

    began = trio.current_time()
    error = await startup_error(LifespanApp(startup=hang), startup_timeout=60)
    assert trio.current_time() - began == pytest.approx(60, abs=0.1)
    assert type(error) is LifespanFailed
    assert "longer than 60 s (startup_timeout)" in str(error)


@pytest.mark.parametrize("mode", ["auto", "on"])
@pytest.mark.parametrize("late", [True, False], ids=["too long", "cancelled"])
async def test_what_an_app_raises_whose_startup_is_given_up_is_shown_as_that(
    autojump_clock: Any, caplog: Any, mode: str, late: bool
) -> None:
    async def hang(_send: Any) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("in the clean-up")

    app = LifespanApp(startup=hang)
    if late:
        assert "startup_timeout" in str(await startup_error(app, lifespan=mode, startup_timeout=60))
    else:
        with trio.move_on_after(1) as scope:
            async with serving(app, lifespan=mode, startup_timeout=60):
                raise AssertionError
        assert scope.cancelled_caught
    (record,) = [r for r in caplog.records if r.exc_info]
    assert record.getMessage() == "the app raised when its startup was given up"
    assert "in the clean-up" in caplog.text


@pytest.mark.parametrize(
    "raised", [SystemExit(5), KeyboardInterrupt(), BaseExceptionGroup("", [ValueError(), SystemExit(5)])]
)
async def test_an_exit_in_startup_is_never_taken_for_no_lifespan(raised: BaseException) -> None:
    async def leave(_send: Any) -> None:
        raise raised

    assert await startup_error(LifespanApp(startup=leave)) is raised


async def test_a_group_of_ordinary_exceptions_in_startup_is_like_one(caplog: Any) -> None:
    async def fail(_send: Any) -> None:
        raise ExceptionGroup("several", [ValueError(1), KeyError(2)])

    async with serving(LifespanApp(startup=fail)) as server:
        assert (await server.get()).status == 200
    assert server.failure is None


# -- the lifespan dies while serving -------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
async def test_an_error_after_startup_ends_the_worker(grouped: bool) -> None:
    die = trio.Event()
    error = ValueError("the feed is gone")

    async def crash() -> None:
        await die.wait()
        if not grouped:
            raise error
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise error

    async with serving(LifespanApp(running=crash)) as server:
        assert (await server.get()).status == 200
        die.set()
        with trio.fail_after(30):
            await server.worker.drain.wait(DrainState.STOPPED)
    assert server.failure is not None
    assert (server.failure.row, server.failure.exit_code) == ("L3", 75)
    assert isinstance(server.failure.error, LifespanDied)
    assert "ValueError" in str(server.failure.error)


async def test_system_exit_after_startup_ends_the_worker_with_its_code() -> None:
    die = trio.Event()

    async def leave() -> None:
        await die.wait()
        raise SystemExit(9)

    async with serving(LifespanApp(running=leave)) as server:
        die.set()
        with trio.fail_after(30):
            await server.worker.drain.wait(DrainState.STOPPED)
    assert server.failure is not None
    assert (server.failure.row, server.failure.exit_code) == ("X1", 9)


def starlette_app(die: trio.Event) -> Starlette:
    """With a task in its lifespan's nursery; it says `lifespan.shutdown.failed` of whatever ends its lifespan."""

    async def feed() -> None:
        await die.wait()
        raise ValueError("the feed is gone")

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed)
            yield
            nursery.cancel_scope.cancel()

    async def end(_: Any) -> None:
        await trio.open_nursery().__aenter__()  # which ends the worker without a shutdown of the lifespan

    return Starlette(lifespan=lifespan, routes=[Route("/end", end)])


async def test_an_error_in_a_starlette_lifespan_is_told_as_what_it_is() -> None:
    die = trio.Event()
    async with serving(starlette_app(die)) as server:
        die.set()
        with trio.fail_after(30):
            await server.worker.drain.wait(DrainState.STOPPED)
    assert server.failure is not None
    assert server.failure.row == "L3"
    assert str(server.failure.error) == "the app's lifespan task ended with ValueError while serving"


async def test_a_starlette_lifespan_that_is_cancelled_has_not_died(caplog: Any) -> None:
    async with serving(starlette_app(trio.Event())) as server:
        await server.get("/end")
        with trio.fail_after(30):
            await server.worker.drain.wait(DrainState.STOPPED)
    assert server.failure is not None
    assert server.failure.row == "B1"
    assert "lifespan task died" not in caplog.text


async def test_a_lifespan_that_fails_and_returns_is_logged_with_its_message(caplog: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.failed", "message": "the feed is gone"})
        else:
            await respond(send)

    async with serving(app) as server:
        assert (await server.get()).status == 200
    assert "the app's lifespan failed: the feed is gone" in caplog.text
    assert server.failure is None


# -- shutdown that fails -------------------------------------------------------------------------------------


async def test_shutdown_failed_is_logged_with_the_apps_message(caplog: Any) -> None:
    async def fail(send: Any) -> None:
        await send({"type": "lifespan.shutdown.failed", "message": "could not flush"})

    async with serving(LifespanApp(shutdown=fail)) as server:
        pass
    assert "shutdown failed: could not flush" in caplog.text
    assert server.failure is None


async def test_an_exception_in_shutdown_is_reported_as_one_in_shutdown(caplog: Any) -> None:
    async def fail(_send: Any) -> None:
        raise OSError("cannot flush")

    async with serving(LifespanApp(shutdown=fail)) as server:
        pass
    assert server.failure is not None
    assert server.failure.row == "L3"
    assert "OSError in its shutdown" in str(server.failure.error)
    assert "cannot flush" in caplog.text


async def test_shutdown_that_takes_too_long_is_cancelled(autojump_clock: Any, caplog: Any) -> None:
    cancelled: list[bool] = []

    async def hang(_send: Any) -> None:
        try:
            async with trio.open_nursery() as nursery:  # cancelled, this makes a group
                nursery.start_soon(trio.sleep_forever)
                await trio.sleep_forever()
        finally:
            cancelled.append(True)

    began = trio.current_time()
    async with serving(LifespanApp(shutdown=hang), shutdown_timeout=60) as server:
        pass
    assert trio.current_time() - began == pytest.approx(61, abs=1)
    assert "longer than 60 s (shutdown_timeout)" in caplog.text
    assert cancelled
    assert server.failure is None


async def test_context_managers_unwind_after_shutdown_complete(autojump_clock: Any) -> None:
    unwound: list[float] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        await trio.sleep(0.5)
        unwound.append(trio.current_time())

    async with serving(app):
        pass
    assert unwound


# -- misuse --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event", ["lifespan.shutdown.complete", "lifespan.shutdown.failed", "http.response.start"]
)
async def test_an_event_that_does_not_belong_there_is_an_error_of_the_startup(event: str) -> None:
    async def misuse(send: Any) -> None:
        await send({"type": event})

    error = await startup_error(LifespanApp(startup=misuse), lifespan="on")
    assert f"lifespan send() got {event!r}" in str(error.__cause__)


@pytest.mark.parametrize("event", [{}, None, {"kind": "x"}])
async def test_an_event_without_a_type_is_a_named_error(event: Any) -> None:
    async def misuse(send: Any) -> None:
        await send(event)

    error = await startup_error(LifespanApp(startup=misuse), lifespan="on")
    assert "UnexpectedMessage" in repr(error.__cause__)


async def test_startup_complete_twice_ends_the_worker() -> None:
    async def again(send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})

    error = await startup_error(LifespanApp(startup=again))
    assert type(error) is LifespanDied
    assert "UnexpectedMessage" in str(error)
