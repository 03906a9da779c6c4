"""The control socket: for its user only, bounded in all it takes, and never a reason for the server to end."""

from __future__ import annotations

import logging
import os
import random
import resource
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.supervisor.control_server import CRASH, LOG, Client, assert_serves, serving
from trioserve.supervisor.control import (
    ANSWER_SECONDS,
    MOST_COMMANDS,
    MOST_CONNECTIONS,
    REQUEST_LIMIT,
    REQUEST_SECONDS,
    RESERVED_CONNECTIONS,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture(autouse=True)
def all_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, LOG.name)


# -- commands ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "result"),
    [
        ({"command": "scale", "n": 4}, {"from": 2, "to": 4}),
        ({"command": "recycle"}, {"recycled": [1, 2]}),
        ({"command": "recycle", "worker_id": None}, {"recycled": [1, 2]}),
        ({"command": "recycle", "worker_id": 2}, {"recycled": [2]}),
        ({"command": "drain"}, {"state": "draining", "in_flight": 3}),
        ({"command": "stop"}, {"state": "stopping", "in_flight": 3}),
        ({"command": "reload"}, {"generation": 2}),
        ({"command": "crashes"}, [CRASH]),
    ],
)
async def test_a_command_is_carried_out_and_answered(path, request_, result):
    async with serving(path) as server:
        server.gate.set()
        with Client(path) as client:
            assert await client.ask(**request_) == {"ok": True, "result": result}


async def test_questions_are_answered_with_all_the_handler_says(path):
    async with serving(path) as server:
        with Client(path) as client:
            assert (await client.ask(command="status"))["result"] == server.status()
            assert (await client.ask(command="workers"))["result"] == server.workers()
            report = (await client.ask(command="crashes", crash_id=CRASH["id"]))["result"]
            assert report == server.crashes(str(CRASH["id"]))


async def test_what_changes_something_is_logged_with_who_asked(path, caplog):
    async with serving(path):
        with Client(path) as client:
            await client.ask(command="status")
            await client.ask(command="scale", n=3)
            await client.ask(command="recycle")
    who = f"process {os.getpid()} of user {os.geteuid()}"
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO] == [
        f"control: scale 3, by {who}",
        f"control: recycle, by {who}",
    ]


async def test_a_refusal_is_an_answer_with_its_reason_and_no_log(path, caplog):
    async with serving(path) as server:
        with Client(path) as client:
            answer = await client.ask(command="scale", n=1000)
            assert answer == {"ok": False, "error": "1000 workers: give a number from 1 to 16"}
            assert (await client.ask(command="scale", n=5))["ok"]
            assert server.wanted == 5
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


@pytest.mark.parametrize(
    "error", [RuntimeError("no luck"), MemoryError("no luck"), ExceptionGroup("no luck", [ValueError()])]
)
async def test_a_handler_that_raises_is_answered_logged_and_survived(path, error, caplog):
    async with serving(path) as server:
        server.broken = error
        with Client(path) as client:
            answer = await client.ask(command="status")
            assert not answer["ok"]
            assert f"status failed: {type(error).__name__}: no luck" in answer["error"]
            (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
            assert record.exc_info is not None
            assert record.exc_info[1] is error
            server.broken = None
            assert (await client.ask(command="status"))["ok"]


async def test_a_result_that_is_no_json_is_answered_and_logged(path, caplog):
    async with serving(path) as server:
        server.status_extra = {"requests": float("inf")}
        with Client(path) as client:
            answer = await client.ask(command="status")
            assert not answer["ok"]
            assert "the answer cannot be written as JSON" in answer["error"]
            assert (await client.ask(command="workers"))["ok"]
    assert "the answer cannot be written as JSON" in caplog.text


async def test_a_long_command_holds_up_nobody_else(path):
    async with serving(path) as server:
        with Client(path) as first, Client(path) as second:
            await first.channel.send({"command": "reload"})
            await server.waiting.wait()
            assert (await second.ask(command="status"))["ok"]
            server.gate.set()
            assert (await first.answer())["result"] == {"generation": 2}


async def test_a_command_goes_on_when_its_client_leaves(path):
    async with serving(path) as server:
        with Client(path) as client:
            await client.channel.send({"command": "reload"})
            await server.waiting.wait()
        await wait_all_tasks_blocked()
        assert server.generation == 1
        server.gate.set()
        await wait_all_tasks_blocked()
        assert server.generation == 2
        await assert_serves(path)


async def test_a_client_that_leaves_makes_room_while_its_command_goes_on(path):
    async with serving(path) as server:
        for _ in range(2 * (MOST_CONNECTIONS + RESERVED_CONNECTIONS)):
            with Client(path) as client:
                await client.channel.send({"command": "reload"})
                await server.waiting.wait()
                server.waiting = trio.Event()
            await wait_all_tasks_blocked()
        with Client(path) as client:
            assert (await client.ask(command="workers"))["ok"]
        server.gate.set()
        await wait_all_tasks_blocked()
        assert server.generation == 1 + 2 * (MOST_CONNECTIONS + RESERVED_CONNECTIONS)


async def test_there_is_an_end_to_what_those_who_left_have_asked_for(path):
    async with serving(path) as server:
        for _ in range(MOST_COMMANDS + 3):
            with Client(path) as client:
                await client.channel.send({"command": "reload"})
                await wait_all_tasks_blocked()
        with Client(path) as client:
            assert "64 commands are under way" in (await client.ask(command="workers"))["error"]
            assert (await client.ask(command="status"))["ok"]
            server.gate.set()
            await wait_all_tasks_blocked()
            assert server.generation == 1 + MOST_COMMANDS
            assert (await client.ask(command="workers"))["ok"]


async def test_a_client_that_has_nothing_more_to_ask_still_gets_its_answer(path):
    async with serving(path) as server:
        with Client(path) as client:
            await client.channel.send({"command": "reload"})
            client.sock.shutdown(socket.SHUT_WR)
            await server.waiting.wait()
            await wait_all_tasks_blocked()
            server.gate.set()
            assert (await client.answer())["result"] == {"generation": 2}
            assert await client.answer() is None


async def test_no_deadline_falls_on_a_command(path, autojump_clock):
    async with serving(path) as server:
        with Client(path) as client:
            await client.channel.send({"command": "reload"})
            await trio.sleep(10 * REQUEST_SECONDS)
            server.gate.set()
            assert (await client.answer())["ok"]


# -- requests that are none ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ({}, "a request is an object such as"),
        ({"command": None}, "a request is an object such as"),
        ({"command": ["status"]}, "a request is an object such as"),
        ({"command": "stauts"}, "unknown command 'stauts'; there are status, workers, scale"),
        ({"command": "__init__"}, "unknown command"),
        ({"command": "gate"}, "unknown command"),
        ({"command": "x" * 1000}, "unknown command 'xxxx"),
        ({"command": "scale"}, "scale needs n: a number of workers"),
        ({"command": "scale", "n": "4"}, "scale needs n"),
        ({"command": "scale", "n": True}, "scale needs n"),
        ({"command": "scale", "n": 2.0}, "scale needs n"),
        ({"command": "scale", "n": -1}, "scale needs n"),
        ({"command": "scale", "n": 10**30}, "scale needs n"),
        ({"command": "scale", "n": [[[]]]}, "scale needs n"),
        ({"command": "scale", "n": None}, "scale needs n"),
        ({"command": "recycle", "worker_id": "1"}, "recycle needs worker_id: the number of a worker"),
        ({"command": "recycle", "id": 1}, "recycle has no argument 'id'"),
        ({"command": "status", "x": {}}, "status has no argument 'x'"),
        ({"command": "crashes", "crash_id": "../../etc/passwd"}, "crashes needs crash_id"),
        ({"command": "crashes", "crash_id": "x" * 101}, "crashes needs crash_id"),
        ({"command": "crashes", "crash_id": 5}, "crashes needs crash_id"),
    ],
)
async def test_a_wrong_request_is_explained_and_the_next_one_taken(path, request_, why):
    async with serving(path) as server:
        with Client(path) as client:
            answer = await client.ask(**request_)
            assert not answer["ok"]
            assert answer["error"].startswith(why)
            assert len(answer["error"]) < 200
            assert server.wanted == 2
            assert server.ids == [1, 2]
            assert (await client.ask(command="status"))["ok"]


@pytest.mark.parametrize(
    "data",
    [
        b"\n",
        b"status\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"[" * 60_000 + b"\n",
        b'{"command":' * 5000 + b"\n",
        b'{"command":"scale","n":' + b"9" * 5000 + b"}\n",
        b'["status"]\n',
        random.Random(3).randbytes(5000) + b"\n",
        b"x" * (REQUEST_LIMIT + 1),
    ],
    ids=lambda data: repr(data[:10]),
)
async def test_what_is_no_request_gets_an_error_and_the_door(path, data, caplog):
    async with serving(path):
        with Client(path) as client:
            await client.send(data)
            answer = await client.answer()
            assert not answer["ok"]
            assert answer["error"].startswith("this is no request: ")
            assert await client.answer() is None
        await assert_serves(path)
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


async def test_a_line_without_end_is_cut_off(path):
    async with serving(path):
        with Client(path) as client:
            with pytest.raises(BrokenPipeError), trio.fail_after(30):
                while True:
                    await client.send(b"x" * 65536)
            assert "longer than 65536 bytes" in (await client.answer())["error"]
        await assert_serves(path)


@pytest.mark.parametrize("data", [b"", b'{"command":'])
async def test_silence_ends_with_an_error_at_the_deadline(path, data, autojump_clock):
    async with serving(path):
        with Client(path) as client:
            begun = trio.current_time()
            await client.send(data)
            assert (await client.answer())["error"] == "no request came within 30 s"
            assert trio.current_time() - begun == pytest.approx(REQUEST_SECONDS, abs=1)
            assert await client.answer() is None


async def test_dripping_does_not_move_the_deadline(path, autojump_clock):
    async with serving(path):
        with Client(path) as client:
            begun = trio.current_time()
            with pytest.raises(BrokenPipeError):
                for _ in range(100):
                    await client.send(b" ")
                    await trio.sleep(1)
            assert trio.current_time() - begun == pytest.approx(REQUEST_SECONDS, abs=2)


async def test_each_request_has_a_deadline_of_its_own(path, autojump_clock):
    async with serving(path):
        with Client(path) as client:
            for _ in range(4):
                await trio.sleep(REQUEST_SECONDS - 5)
                assert (await client.ask(command="status"))["ok"]


async def test_a_client_that_does_not_read_is_let_go(path, autojump_clock):
    async with serving(path) as server:
        server.status_extra = {"long": "x" * 1_000_000}
        with Client(path) as client:
            await client.channel.send({"command": "status"})
            await trio.sleep(ANSWER_SECONDS + 5)
            received = b""
            while True:
                try:
                    part = client.sock.recv(1 << 20)
                except ConnectionResetError:
                    break
                if not part:
                    break
                received += part
            assert 0 < len(received) < 1_000_000


# -- connections ---------------------------------------------------------------------------------------------


async def test_one_connection_too_many_is_told_so(path):
    async with serving(path):
        clients = [Client(path) for _ in range(MOST_CONNECTIONS)]
        for client in clients:
            assert (await client.ask(command="status"))["ok"]
        # These are kept for who wants to know what is the matter, or to end it.
        reserved = [Client(path) for _ in range(RESERVED_CONNECTIONS)]
        for client in reserved:
            assert "8 control connections are open already" in (await client.ask(command="workers"))["error"]
            assert "8 control connections are open already" in (await client.ask(command=["x"]))["error"]
            for command in ("status", "drain", "stop"):
                assert (await client.ask(command=command))["ok"]
        for _ in range(3):
            with Client(path) as surplus:
                assert "12 control connections are open already" in (await surplus.answer())["error"]
                assert await surplus.answer() is None
        for client in reserved:
            client.channel.close()
        clients[0].channel.close()
        await wait_all_tasks_blocked()
        await assert_serves(path)
        for client in clients:
            client.channel.close()


async def test_thousands_of_connections_that_say_nothing_leave_no_trace(path):
    async with serving(path):
        with Client(path) as client:
            await client.ask(command="status")
            before = len(os.listdir("/dev/fd"))
            for _ in range(2000):
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.setblocking(False)
                    while True:
                        try:
                            sock.connect(str(path))
                            break
                        except BlockingIOError:  # the queue is full
                            await trio.lowlevel.checkpoint()
            await wait_all_tasks_blocked()
            assert len(os.listdir("/dev/fd")) == before
            assert (await client.ask(command="status"))["ok"]


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The lowest free one is the limit: only what is open already stays open.
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def test_a_lack_of_descriptors_is_waited_out(path, autojump_clock, caplog):
    async with serving(path):
        with Client(path) as client:
            with no_more_descriptors():
                await trio.sleep(3.5)
            assert (await client.ask(command="status"))["ok"]
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert set(told) == {"the control socket cannot accept a connection: Too many open files"}
    assert len(told) in (3, 4)


async def test_a_lack_of_descriptors_leaves_commands_their_answers(path):
    async with serving(path) as server:
        with Client(path) as client:
            await client.ask(command="status")
            with no_more_descriptors():
                await client.channel.send({"command": "reload"})
                await server.waiting.wait()
                await wait_all_tasks_blocked()
            server.gate.set()
            assert (await client.answer())["ok"]


@contextmanager
def as_another_user(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What connects in here does not look like the server's user, nor like root."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        own = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: own + 1)
        yield


async def test_other_users_are_turned_away_even_if_the_file_lets_them_in(monkeypatch, caplog):
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        path = Path(directory) / "control.sock"
        async with serving(path) as server:
            path.chmod(0o666)
            with as_another_user(monkeypatch):
                client = Client(path)
            with client:
                await client.send(b'{"command":"scale","n":5}\n')
                answer = await client.answer()
                assert not answer["ok"]
                assert "and root may control this server" in answer["error"]
                assert await client.answer() is None
            assert server.wanted == 2
        assert "the control socket has turned process" in caplog.text


async def test_cancelling_ends_connections_and_commands(path):
    async with serving(path) as server:
        client = Client(path)
        await client.channel.send({"command": "reload"})
        await server.waiting.wait()
    with client:
        assert await client.answer() is None
        assert server.generation == 1
