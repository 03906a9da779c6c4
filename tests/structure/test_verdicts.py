"""What follows from a verdict: the policies, what comes out of `serve()`, and what a report may say."""

from __future__ import annotations

import gc
import json
import socket
import weakref
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import trioserve
from trioserve.config import Config
from trioserve.structure.boundary import Verdict
from trioserve.structure.drain import DrainState
from trioserve.testing import RawClient, encode_request, serving

from ..apps import read_body, respond
from .test_boundary import OwnBase, check, fails, raising, raising_cancelled

# -- policy --------------------------------------------------------------------------------------------------


async def hold_or_fail(scope: Any, receive: Any, send: Any) -> None:
    if scope["path"] == "/hold":
        await trio.sleep(5)
        await respond(send)
    elif scope["path"] == "/ok":
        await respond(send)
    else:
        raise ValueError("boom")


@pytest.mark.parametrize("policy, row_grace", [("replace", 10), ("crash", 0)])
async def test_replace_lets_others_finish_and_crash_does_not(
    autojump_clock: Any, policy: str, row_grace: float
) -> None:
    async with (
        serving(hold_or_fail, lifespan="off", on_app_error=policy, graceful_timeout=60) as server,
        server.connect() as other,
    ):
        await other.send(encode_request("GET", "/hold"))
        assert (await server.get("/fail")).status == 500
        response = await other.read_response()
        assert response.status == (200 if policy == "replace" else 503)
        assert server.worker.drain.grace == row_grace
    assert server.failure is not None
    assert server.failure.exit_code == 75


async def test_contain_serves_on(autojump_clock: Any, caplog: Any) -> None:
    async with serving(hold_or_fail, lifespan="off", on_app_error="contain") as server:
        for _ in range(5):
            response = await server.get("/fail")
            assert (response.status, response.header("connection")) == (500, "close")
            assert (await server.get("/ok")).status == 200
        assert server.worker.context.counters.faults == {"A1": 5}
        assert server.worker.drain.state is DrainState.RUNNING
    assert server.failure is None
    assert caplog.text.count("row A1, serving on") == 5


@pytest.mark.modes("http2", because="the same over TLS")
@pytest.mark.parametrize("field", [None, (b"x",), ("x", "y")])
@pytest.mark.parametrize("development", [False, True])
async def test_an_app_that_has_spoiled_its_list_of_headers_is_judged_like_any_other(
    field: Any, development: bool
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["headers"].append(field)
        raise ValueError

    async with serving(app, lifespan="off", on_app_error="contain") as server:
        server.worker.context.development = development
        for _ in range(2):
            assert (await server.get()).status == 500
        assert server.worker.context.counters.faults == {"A1": 2}


async def test_what_a_failed_request_had_open_does_not_wait_for_the_collector() -> None:
    """Its report shows the stacks of all threads, and so the frames of its own making."""

    class Resource:
        pass

    opened: list[weakref.ref[Resource]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        resource = Resource()
        opened.append(weakref.ref(resource))
        raise ValueError

    async with serving(app, lifespan="off", on_app_error="contain", errorlog=None) as server:
        gc.disable()
        try:
            assert (await server.get()).status == 500
            await server.wait_idle()
            await trio.testing.wait_all_tasks_blocked()
            assert [resource() for resource in opened] == [None]
        finally:
            gc.enable()


async def test_a_worse_fault_replaces_a_lesser_one_and_not_the_other_way_round() -> None:
    async with serving(raising(ValueError), lifespan="off") as server:
        boundary = server.worker.context.boundary
        boundary.judge("B2", ValueError("first"))
        boundary.judge("B2", ValueError("second"))
        assert boundary.failure is not None
        assert str(boundary.failure.error) == "first"
        boundary.judge("X1", SystemExit(4))
        assert boundary.failure.row == "X1"
        boundary.judge("S3", OSError("third"))
        assert boundary.failure.row == "S3"
        boundary.judge("X1", SystemExit(4))
        assert boundary.failure.row == "S3"


# -- out of serve() ------------------------------------------------------------------------------------------


async def ending(app: Any, use: Any) -> None:
    """`serve()` with `app` until it ends by itself; `use(client)` is what makes it."""
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = None
    config.lifespan = "off"
    async with trio.open_nursery() as nursery:
        (address,) = await nursery.start(trioserve.serve, app, config)
        sock = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))
        sock.setblocking(False)
        async with RawClient(sock) as client:
            await use(client, nursery)


async def fetch(client: RawClient, _nursery: trio.Nursery) -> None:
    await client.send(encode_request("GET"))
    await client.receive_all()


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(3), KeyboardInterrupt(), OwnBase()])
async def test_the_error_that_ended_the_worker_comes_out_of_serve(error: BaseException) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        await ending(raising(lambda: error), fetch)
    assert caught.value.exceptions == (error,)


@pytest.mark.parametrize("grouped", [False, True])
async def test_a_cancelled_that_the_app_has_kept_is_not_taken_for_the_callers(grouped: bool) -> None:
    kept: list[BaseException] = []
    with pytest.raises(BaseExceptionGroup) as caught:
        await ending(raising_cancelled(kept, grouped=grouped), fetch)
    (error,) = caught.value.exceptions
    assert isinstance(error, RuntimeError)
    assert (error.__cause__.exceptions == tuple(kept)) if grouped else (error.__cause__ is kept[0])


async def test_also_when_the_caller_has_cancelled_meanwhile() -> None:
    error = ValueError("boom")

    async def fetch_and_cancel(client: RawClient, nursery: trio.Nursery) -> None:
        await client.send(encode_request("GET"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.cancel_scope.cancel()

    with pytest.raises(BaseExceptionGroup) as caught:
        await ending(raising(lambda: error), fetch_and_cancel)
    assert caught.value.exceptions == (error,)


# -- reports -------------------------------------------------------------------------------------------------

SECRET = "hunter2"


async def test_a_report_is_written_and_holds_no_secret(tmp_path: Path, capfd: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = await read_body(receive)
        assert body.decode() == SECRET
        raise ValueError("boom")

    request = encode_request("POST", f"/login?token={SECRET}", [("Authorization", SECRET)], SECRET.encode())
    _, server = await fails(app, request, crash_dir=str(tmp_path))
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    on_stderr = [line for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    assert [text.strip()] == on_stderr
    assert SECRET not in text
    report = json.loads(text)
    assert (report["row"], report["verdict"]) == ("A1", "replace")
    assert (report["request"]["method"], report["request"]["path"]) == ("POST", "/login")
    assert "authorization" in report["request"]["header_names"]
    assert report["request"]["response_state"] == "none"
    assert report["worker"]["requests_served"] == 1
    assert "boom" in report["summary"]
    check(server, "A1", Verdict.REPLACE, 75)


@pytest.mark.parametrize("policy", ["contain", "replace"])
async def test_an_error_that_repeats_is_reported_once_and_counted(tmp_path: Path, policy: str) -> None:
    settings = {"lifespan": "off", "on_app_error": policy, "crash_dir": str(tmp_path)}
    async with serving(hold_or_fail, **settings) as server:
        # As it is for a worker whose supervisor has replaced another one for this error already.
        server.worker.context.boundary.ask_replacement = lambda fault: False
        for _ in range(3):
            await server.get("/fail")
        assert server.worker.context.counters.faults == {"A1": 3}
    assert len(list(tmp_path.iterdir())) == 1


async def test_what_the_peer_does_is_not_reported(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await read_body(receive)

    async with serving(app, lifespan="off", crash_dir=str(tmp_path)) as server, server.connect() as client:
        await client.send(encode_request("POST", headers=[("content-length", "5")]))
        await trio.testing.wait_all_tasks_blocked(0.01)
        client.reset()
        await server.wait_idle()
        assert server.worker.context.counters.faults == {"C2": 1}
    assert not list(tmp_path.iterdir())
