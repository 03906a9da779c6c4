"""The listener: how many it accepts, when it pauses, and that no connection in the kernel's queue is lost."""

from __future__ import annotations

import errno
import itertools
import logging
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import trioserve
from tests.apps import hello, respond
from tests.net.sockets import affordable_pairs
from trioserve.errors import BindError
from trioserve.net.epoll_hub import EpollHub
from trioserve.net.watch import Watch
from trioserve.structure.drain import DrainState
from trioserve.testing import RawClient, TestServer, encode_request, no_leaks, serving

GET = encode_request("GET")


@contextmanager
def waiting_clients(server: TestServer, count: int, data: bytes = GET) -> Iterator[list[RawClient]]:
    """Clients that have connected and sent `data` while the server had no chance to accept any."""
    with ExitStack() as stack:
        clients = []
        for _ in range(count):
            client = server.connect()
            stack.callback(client.close)
            client.sock.sendall(data)
            clients.append(client)
        yield clients


async def assert_served(clients: list[RawClient]) -> None:
    with trio.fail_after(30):
        for client in clients:
            response = await client.read_response()
            assert (response.status, response.body) == (200, b"hello")


# -- how many ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "most_at_once"), [(5, 10), (64, 40)])
async def test_accepting_gives_way_after_each_batch(batch: int, most_at_once: int) -> None:
    """Two turns of the listener may fall between two of ours, but no more."""
    async with serving(hello, accept_batch=batch) as server:
        with waiting_clients(server, 40, b"") as clients:
            counts = [0]
            while counts[-1] < 40:
                await trio.lowlevel.checkpoint()
                counts.append(server.worker.context.counters.connections)
            assert max(after - before for before, after in itertools.pairwise(counts)) <= most_at_once
            assert len(server.worker.context.connections) == 40
            for client in clients:
                await client.send(GET)
            await assert_served(clients)


async def test_1000_connections_at_once_are_all_served(hub: str) -> None:
    count = affordable_pairs(1000)
    async with serving(hello, hub=hub, backlog=2048) as server:
        with waiting_clients(server, count) as clients:
            await assert_served(clients)
        await server.wait_idle()
        assert server.worker.context.counters.connections == count


async def test_several_listeners_serve_side_by_side(tmp_path: Path) -> None:
    async with serving(hello, bind=["127.0.0.1:0", f"unix:{tmp_path / 's'}", "127.0.0.1:0"]) as server:
        for address in server.addresses:
            other = TestServer(server.worker, [address])
            assert (await other.get()).body == b"hello"


# -- max_connections -----------------------------------------------------------------------------------------


async def test_connections_above_the_limit_wait_and_are_served(hub: str) -> None:
    async with serving(hello, hub=hub, max_connections=3) as server:
        with waiting_clients(server, 10) as clients:
            await assert_served(clients[:3])
            await wait_all_tasks_blocked(0.01)
            context = server.worker.context
            assert len(context.connections) == 3
            assert context.counters.accept_pauses > 0
            for at in range(3, 10):
                clients[at - 3].close()
                await assert_served([clients[at]])
                assert len(context.connections) <= 3


async def test_the_limit_holds_for_all_listeners_together() -> None:
    async with serving(hello, bind=["127.0.0.1:0", "127.0.0.1:0"], max_connections=4) as server:
        second = TestServer(server.worker, server.addresses[1:])
        with waiting_clients(server, 6) as some, waiting_clients(second, 6) as others:
            waiting = [*some, *others]
            await wait_all_tasks_blocked(0.01)
            while waiting:
                assert len(server.worker.context.connections) == min(4, len(waiting))
                for client in waiting[:]:
                    if client.sock in await _readable(waiting):
                        await assert_served([client])
                        client.close()
                        waiting.remove(client)
                await wait_all_tasks_blocked(0.01)


async def _readable(clients: list[RawClient]) -> list[socket.socket]:
    """Those whose answer has arrived."""
    found = []
    for client in clients:
        try:
            client.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            continue
        found.append(client.sock)
    return found


# -- out of descriptors --------------------------------------------------------------------------------------


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Lower the limit on open files so that `count` more can be had."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        # Numbers are given from the lowest: the highest of `count` fresh ones marks where the limit must be.
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        highest = max(probe.fileno() for probe in probes)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_without_descriptors_accepting_pauses_and_all_are_served_in_the_end(
    hub: str, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async with serving(hello, hub=hub) as server:
        with waiting_clients(server, 12) as clients, descriptors_left(4):
            await assert_served(clients[:4])
            await wait_all_tasks_blocked(0.01)
            context = server.worker.context
            assert len(context.connections) == 4
            assert context.counters.accept_pauses > 0
            # A connection that closes makes room at once, well before the pause is over.
            began = trio.current_time()
            for at in range(4, 12):
                clients[at - 4].reset()
                await assert_served([clients[at]])
            assert trio.current_time() - began < 3 * 0.1
        (record,) = [record for record in caplog.records if "cannot accept" in record.message]
        assert record.levelno == logging.WARNING
        assert f"cannot accept on {server.addresses[0]}: Too many open files" in record.message
        assert "4 connections open" in record.message
        assert (await server.get()).status == 200


async def test_room_made_elsewhere_is_found_after_the_pause() -> None:
    async with serving(hello) as server:
        with ExitStack() as stack:
            with waiting_clients(server, 3) as clients:
                with descriptors_left(1):
                    others = stack.enter_context(socket.socket())
                    await wait_all_tasks_blocked(0.01)
                    assert not server.worker.context.connections
                    others.close()
                    await assert_served(clients[:1])
                await assert_served(clients[1:])


@pytest.fixture
def mock_clock() -> MockClock:
    return MockClock()


async def test_a_lasting_shortage_is_logged_every_ten_seconds_only(
    mock_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    def complaints() -> int:
        return sum("cannot accept" in record.message for record in caplog.records)

    async with serving(hello) as server:
        with waiting_clients(server, 1) as clients:
            with descriptors_left(1), socket.socket():
                await wait_all_tasks_blocked()
                pauses = server.worker.context.counters.accept_pauses
                for _ in range(9):
                    mock_clock.jump(1)
                    await wait_all_tasks_blocked()
                assert server.worker.context.counters.accept_pauses >= pauses + 9
                assert complaints() == 1
                mock_clock.jump(1)
                await wait_all_tasks_blocked()
                assert complaints() == 2
            mock_clock.jump(1)
            await assert_served(clients)


# -- errors of accept(2) -------------------------------------------------------------------------------------


class FailingListener(socket.socket):
    """A listening socket whose accept() fails a few times, as that of a machine in trouble does."""

    def __init__(self, number: int, times: int) -> None:
        super().__init__()
        self.bind(("127.0.0.1", 0))
        self.listen(16)
        self.failures = [number] * times

    def accept(self) -> tuple[socket.socket, Any]:
        if self.failures:
            number = self.failures.pop()
            raise OSError(number, "made up")
        return super().accept()


@asynccontextmanager
async def serving_on(sock: socket.socket) -> AsyncIterator[RawClient]:
    config = trioserve.Config()
    config.errorlog = logging.getLogger("trioserve.tests")
    async with trio.open_nursery() as nursery:
        await nursery.start(
            lambda task_status: trioserve.serve(hello, config, sockets=[sock], task_status=task_status)
        )
        client = socket.create_connection(sock.getsockname())
        client.setblocking(False)
        async with RawClient(client) as raw:
            yield raw
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "name", ["ECONNABORTED", "EPROTO", "EPERM", "ENETUNREACH", "EHOSTUNREACH", "EOPNOTSUPP"]
)
async def test_an_error_of_one_connection_is_passed_over(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with FailingListener(getattr(errno, name), 5) as sock:
        async with serving_on(sock) as client:
            assert (await client.get()).body == b"hello"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", ["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"])
async def test_a_shortage_is_waited_out(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with FailingListener(getattr(errno, name), 2) as sock:
        async with serving_on(sock) as client:
            assert (await client.get()).body == b"hello"
    assert len([record for record in caplog.records if "cannot accept" in record.message]) == 1


class FullHub(EpollHub):
    """A hub for which the kernel has no room, the first time."""

    failures = 1

    def watch(self, sock: socket.socket) -> Watch:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.ENOSPC, "made up")
        return super().watch(sock)


async def test_a_connection_that_cannot_be_watched_is_closed_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(hello) as server:
        context = server.worker.context
        hub = context.hub = FullHub()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hub.run)
            async with server.connect() as client:
                assert await client.receive() == b""
            assert (await server.get()).status == 200
            await server.wait_idle()
            nursery.cancel_scope.cancel()
        hub.close()
    assert "No space left on device" in caplog.text


async def test_a_broken_listening_socket_ends_the_server() -> None:
    with FailingListener(errno.EINVAL, 1) as sock, socket.create_connection(sock.getsockname()):
        with pytest.raises(OSError, match="made up"):
            await trioserve.serve(hello, sockets=[sock])


async def test_listening_that_a_supervisor_has_ended_is_no_error_of_who_is_to_drain() -> None:
    """It may have ended that of a worker which was ready, after all, before the order came."""
    async with serving(hello) as server:
        server.worker.supervised = True
        server.worker.listeners.sockets[0].shutdown(socket.SHUT_RDWR)
        await wait_all_tasks_blocked(0.05)
        server.worker.drain.begin("the supervisor's order")
    assert server.failure is None


async def test_listening_that_ends_without_an_order_is_an_error(autojump_clock: MockClock) -> None:
    async with serving(hello) as server:
        server.worker.supervised = True
        server.worker.listeners.sockets[0].shutdown(socket.SHUT_RDWR)
        await server.worker.drain.wait(DrainState.DRAINING)
    assert server.failure is not None
    assert server.failure.row == "S3"


async def test_connections_reset_in_the_queue_do_no_harm(hub: str) -> None:
    async with no_leaks():
        async with serving(hello, hub=hub) as server:
            for _ in range(20):
                server.connect().reset()
                dead = server.connect()
                dead.sock.sendall(GET)
                dead.reset()
            assert (await server.get()).status == 200
            await server.wait_idle()


# -- drain ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("_", range(8))
async def test_a_drain_serves_what_the_kernel_had_queued(hub: str, _: int) -> None:
    """Also where the listener was about to be woken for it: several times, since the order of tasks is random."""
    async with serving(hello, hub=hub, accept_batch=4) as server:
        await wait_all_tasks_blocked()
        with waiting_clients(server, 20) as clients:
            server.worker.drain.begin("the test")
            for client in clients:
                response = await client.read_response()
                assert response.status == 200
                assert response.header("connection") == "close"
    assert server.failure is None


async def test_a_drain_empties_a_queue_that_is_full_to_the_brim() -> None:
    async with serving(hello, backlog=5) as server:
        with waiting_clients(server, 6) as clients:  # Linux queues one more than it is asked to
            server.worker.drain.begin("the test")
            await assert_served(clients)


async def test_a_drain_serves_those_who_waited_at_the_limit() -> None:
    release = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/hold":
            await release.wait()
        await respond(send)

    async with serving(app, max_connections=1, lifespan="off") as server:
        with waiting_clients(server, 1, encode_request("GET", "/hold")) as holder:
            await wait_all_tasks_blocked(0.01)
            with waiting_clients(server, 4) as clients:
                await wait_all_tasks_blocked(0.01)
                server.worker.drain.begin("the test")
                await assert_served(clients)
                release.set()
                await assert_served(holder)


async def test_a_drain_leaves_the_queues_on_which_somebody_else_accepts() -> None:
    async with serving(hello, bind=["127.0.0.1:0", "127.0.0.1:0"], max_connections=1) as server:
        mine, theirs = (TestServer(server.worker, [address]) for address in server.addresses)
        with server.worker.listeners.sockets[1].dup() as sibling, waiting_clients(mine, 1) as holder:
            await assert_served(holder)
            with waiting_clients(mine, 3) as clients, waiting_clients(theirs, 3):
                server.worker.left_to_others = [1]
                server.worker.drain.begin("the test")
                await assert_served(clients)
                await server.worker.drain.wait(DrainState.STOPPED)
                for _ in range(3):
                    sibling.accept()[0].close()


async def test_a_worker_that_cannot_go_on_leaves_its_supervisor_the_queue() -> None:
    async with serving(hello, max_connections=1) as server:
        with server.worker.listeners.sockets[0].dup() as supervisors, waiting_clients(server, 1) as holder:
            await assert_served(holder)
            with waiting_clients(server, 3):
                server.worker.supervised = True
                server.worker.drain.begin("the test", grace=1.0, fatal=True)
                await server.worker.drain.wait(DrainState.STOPPED)
                for _ in range(3):
                    supervisors.accept()[0].close()


async def test_a_drain_during_a_shortage_ends_in_time(autojump_clock: MockClock) -> None:
    async with serving(hello) as server:
        with waiting_clients(server, 2), descriptors_left(1), socket.socket():
            await wait_all_tasks_blocked(0.01)
            server.worker.drain.begin("the test")
            with trio.fail_after(2):
                await server.worker.drain.wait(DrainState.STOPPED)


async def test_after_the_drain_nobody_can_connect() -> None:
    async with serving(hello) as server:
        server.worker.drain.begin("the test")
        await wait_all_tasks_blocked(0.01)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port))


# -- what a connection is told --------------------------------------------------------------------------------


async def _addresses(scope: Any, receive: Any, send: Any) -> None:
    await respond(send, repr((scope["client"], scope["server"])).encode())


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "0.0.0.0:0"])
async def test_the_app_is_told_the_address_that_the_client_has_reached(bind: str) -> None:
    async with serving(_addresses, bind=[bind], lifespan="off") as server:
        reached = TestServer(server.worker, [f"http://127.0.0.1:{server.port}"])
        async with reached.connect() as client:
            port = client.sock.getsockname()[1]
            expected = (("127.0.0.1", port), ("127.0.0.1", server.port))
            assert (await client.get()).body == repr(expected).encode()


async def test_over_a_unix_socket_the_app_is_told_the_path(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    async with serving(_addresses, bind=[f"unix:{path}"], lifespan="off") as server:
        assert (await server.get()).body == repr((None, (path, None))).encode()


async def test_an_address_taken_during_startup_is_a_bind_error() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        taken.bind(("127.0.0.1", port))
        taken.listen(1)
        await send({"type": "lifespan.startup.complete"})
        await receive()

    with socket.socket() as probe, socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        config = trioserve.Config()
        config.bind = [f"127.0.0.1:{port}"]
        with pytest.raises(BindError, match="the address is in use"):
            await trioserve.serve(app, config)
