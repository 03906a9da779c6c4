"""Reading in the hub while a task waits to read: `wait_readable(pull=...)`; and how long the hub goes on by itself."""

from __future__ import annotations

import functools
import gc
import socket
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.net.sockets import check_one_wake_up, fill, parked, reset, running_hub, tcp_pair, unix_pair
from trioserve.net import epoll_hub
from trioserve.net.hub import Hub
from trioserve.net.watch import Pull, Watch


@contextmanager
def empty_socket(hub: Hub) -> Iterator[tuple[Watch, socket.socket, socket.socket]]:
    """A watched socket that has been seen empty, and its peer."""
    with tcp_pair() as (ours, peer):
        watch = hub.watch(ours)
        watch.readable = False
        yield watch, ours, peer
        watch.close()


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, the hub has time."""
    monkeypatch.setattr(epoll_hub, "_BUSY_SECONDS", 60.0)


class Puller:
    """Reads what is there, as a transport does, and has enough when it has read that."""

    def __init__(self, watch: Watch, sock: socket.socket, last: bytes) -> None:
        self.watch, self.sock, self.last = watch, sock, last
        self.read: list[bytes] = []

    def __call__(self) -> bool:
        data = self.sock.recv(1000)
        self.watch.readable = False
        self.read.append(data)
        return data == self.last


async def wait(watch: Watch, pull: Pull | None = None) -> None:
    """A task's wait; what it awaits has to be asked for in that task."""
    await watch.wait_readable(None, pull)


@pytest.fixture
async def turns() -> AsyncIterator[list[int]]:
    """How often trio's loop has let tasks run."""

    class Counter(trio.abc.Instrument):
        def before_io_wait(self, timeout: float) -> None:
            counted[0] += 1

    counted = [0]
    instrument = Counter()
    trio.lowlevel.add_instrument(instrument)
    yield counted
    with suppress(KeyError, RuntimeError):
        trio.lowlevel.remove_instrument(instrument)


async def test_a_task_is_woken_only_when_the_pull_asks_for_it() -> None:
    async with running_hub("epoll") as hub:
        with empty_socket(hub) as (watch, ours, peer):
            puller = Puller(watch, ours, b"last")
            with trio.fail_after(30):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(wait, watch, puller)
                    for number in range(3):
                        await wait_all_tasks_blocked()
                        assert watch.reader is not None
                        peer.sendall(b"%d" % number)
                        while len(puller.read) <= number:
                            await trio.lowlevel.checkpoint()
                    peer.sendall(b"last")
            assert puller.read == [b"0", b"1", b"2", b"last"]
            assert watch.reader is None


async def test_a_fin_is_the_tasks_affair_and_so_is_a_reset() -> None:
    """It has to know that the peer is gone before it reads what came before that."""
    for end in (lambda peer: peer.shutdown(socket.SHUT_WR), reset):
        async with running_hub("epoll") as hub:
            with empty_socket(hub) as (watch, ours, peer):
                puller = Puller(watch, ours, b"")
                async with parked(wait, watch, puller):
                    end(peer)
                assert puller.read == []
                assert watch.hangup
                assert watch.readable


async def test_a_pull_belongs_to_one_wait() -> None:
    async with running_hub("epoll") as hub:
        with empty_socket(hub) as (watch, ours, peer):
            puller = Puller(watch, ours, b"last")
            with trio.move_on_after(0):
                await wait(watch, puller)
            async with parked(wait, watch):
                peer.sendall(b"for the task")
            assert puller.read == []
            assert ours.recv(100) == b"for the task"


async def test_a_pull_whose_task_is_cancelled_meanwhile_wakes_it_only_once() -> None:
    async with running_hub("epoll") as hub:
        with empty_socket(hub) as (watch, _ours, peer):

            async def send(_: trio.CancelScope) -> None:
                peer.sendall(b"x")

            await check_one_wake_up(functools.partial(wait, watch), send)


async def test_when_its_time_is_up_the_hub_wakes_the_tasks_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests have come at once, all other tasks have their turn in between."""
    monkeypatch.setattr(epoll_hub, "_BUSY_SECONDS", 0.0)
    async with running_hub("epoll") as hub:
        with empty_socket(hub) as (watch, ours, peer):
            puller = Puller(watch, ours, b"last")
            async with parked(wait, watch, puller):
                peer.sendall(b"x")
            assert puller.read == []


@pytest.mark.parametrize("most", [1, 2, 64])
async def test_what_has_been_read_is_gone_on_with_together(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(epoll_hub, "_EVENTS_PER_POLL", most)
    steps: list[object] = []

    def puller(sock: socket.socket, watch: Watch) -> Callable[[], Watch]:
        def pull() -> Watch:
            steps.append("read")
            sock.recv(10)
            watch.readable = False
            return watch

        return pull

    def go_on(pulled: list[Watch]) -> int:
        steps.append(len(pulled))
        for watch in pulled:
            assert watch.reader is not None, "the wait goes on until somebody ends it"
            watch.wake_reader()
        return len(pulled)

    async with running_hub("epoll") as hub:
        hub.on_pulled = go_on  # type: ignore[attr-defined]
        with ExitStack() as stack, trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                peers = []
                for _ in range(3):
                    watch, ours, peer = stack.enter_context(empty_socket(hub))
                    nursery.start_soon(wait, watch, puller(ours, watch))
                    peers.append(peer)
                await wait_all_tasks_blocked()
                for peer in peers:
                    peer.sendall(b"x")
    expected = {
        1: ["read", 1] * 3,
        2: ["read", "read", 2, "read", 1],
        64: ["read"] * 3 + [3],
    }
    assert steps == expected[most]


async def test_who_waits_to_write_beside_it_is_served_as_well() -> None:
    async with running_hub("epoll") as hub:
        with empty_socket(hub) as (watch, ours, peer):
            puller = Puller(watch, ours, b"last")
            fill(ours)
            peer.setblocking(False)
            wrote = trio.Event()

            async def write() -> None:
                await watch.wait_writable()
                wrote.set()

            with trio.fail_after(30):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(wait, watch, puller)
                    nursery.start_soon(write)
                    await wait_all_tasks_blocked()
                    # Both in one event: there is something to read, and room to write.
                    while not wrote.is_set():
                        with suppress(BlockingIOError):
                            while peer.recv(1 << 20):
                                pass
                        peer.send(b"x")
                        await wait_all_tasks_blocked(0.001)
                    assert watch.reader is not None
                    peer.sendall(b"last")


async def test_a_connection_that_is_closed_is_not_held_by_its_pull() -> None:
    class Owner:
        def __init__(self, watch: Watch) -> None:
            self.watch = watch

        def pull(self) -> bool:
            return True

    async with running_hub("epoll") as hub:
        with tcp_pair() as (ours, peer):
            watch = hub.watch(ours)
            watch.readable = False
            owner = Owner(watch)
            peer.sendall(b"x")
            with trio.fail_after(30):
                await wait(watch, owner.pull)
            watch.close()
            gone = weakref.ref(owner)
            gc.disable()
            try:
                del owner
                assert gone() is None
            finally:
                gc.enable()


class Torrent:
    """Fills a socket whose peer reads as fast as we write; has enough when `is_enough` says so."""

    def __init__(self, ours: socket.socket, peer: socket.socket, is_enough: Callable[[], bool]) -> None:
        self.ours, self.peer, self.is_enough = ours, peer, is_enough
        self.calls = 0

    def __call__(self) -> bool:
        self.calls += 1
        if self.is_enough():
            return True
        fill(self.ours)
        self.make_room()
        return False

    def make_room(self) -> None:
        with suppress(BlockingIOError):
            while self.peer.recv(1 << 20):
                pass


async def run_torrent(hub: Hub, is_enough: Callable[[], bool]) -> Torrent:
    # Not TCP, whose peer tells of its room when it sees fit.
    with unix_pair() as (ours, peer):
        peer.setblocking(False)
        torrent = Torrent(ours, peer, is_enough)
        watch = hub.watch(ours)

        async def write() -> None:
            await watch.wait_writable(torrent)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                fill(ours)
                nursery.start_soon(write)
                await wait_all_tasks_blocked()
                while watch.writer is not None:
                    torrent.make_room()
                    await wait_all_tasks_blocked(0.001)
        watch.close()
        return torrent


async def test_room_that_is_made_while_the_hub_writes_costs_no_turn_of_the_loop(turns: list[int]) -> None:
    seen: list[int] = []

    def is_enough() -> bool:
        seen.append(turns[0])
        return len(seen) == 200

    async with running_hub("epoll") as hub:
        await run_torrent(hub, is_enough)
    assert len(set(seen)) < 100


async def test_the_hub_gives_way_however_fast_a_peer_reads(
    turns: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epoll_hub, "_BUSY_SECONDS", 0.002)
    async with running_hub("epoll") as hub:
        begun: list[int] = []

        def is_enough() -> bool:
            begun.append(turns[0])
            return turns[0] > begun[0] + 3 or len(begun) > 100_000

        torrent = await run_torrent(hub, is_enough)
    assert turns[0] > begun[0] + 3
    assert torrent.calls <= 100_000
