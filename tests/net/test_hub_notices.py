"""What the hub tells beyond "ready": the peer's end, room to write, a nudge by the owner; and of whose descriptor."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.net.sockets import HUBS, PAIRS, Waiters, drain, fill, running_hub, tcp_pair, unix_pair, waits
from trioserve.net.hub import Hub
from trioserve.net.transport import Transport

Pair = Callable[[], AbstractContextManager[tuple[socket.socket, socket.socket]]]


@pytest.fixture(params=HUBS)
async def hub(request: Any) -> AsyncIterator[Hub]:
    async with running_hub(request.param) as hub:
        yield hub


@pytest.fixture
async def epoll_hub() -> AsyncIterator[Hub]:
    async with running_hub("epoll") as hub:
        yield hub


@pytest.fixture(params=sorted(PAIRS))
def pair(request: Any) -> Pair:
    return PAIRS[request.param]


# -- notice of the peer's end without reading (epoll) ---------------------------------------------------------


async def test_epoll_tells_of_a_fin_behind_unread_data(epoll_hub: Hub, pair: Pair) -> None:
    with pair() as (ours, peer):
        watch = epoll_hub.watch(ours)
        calls: list[str] = []
        watch.on_hangup = lambda: calls.append("hangup")
        peer.sendall(b"unread")
        peer.shutdown(socket.SHUT_WR)
        await watch.wait_hangup()
        assert watch.hangup
        assert not watch.reset
        assert calls == ["hangup"]
        assert ours.recv(100) == b"unread"
        watch.close()


async def test_epoll_tells_of_a_reset_after_a_fin(epoll_hub: Hub) -> None:
    with tcp_pair() as (ours, peer):
        watch = epoll_hub.watch(ours)
        calls: list[bool] = []
        watch.on_hangup = lambda: calls.append(watch.reset)
        peer.shutdown(socket.SHUT_WR)
        await watch.wait_hangup()
        peer.close()
        ours.send(b"nobody reads this")
        while len(calls) < 2:
            await wait_all_tasks_blocked(0.001)
        assert calls == [False, True]
        watch.close()


async def test_portable_with_unread_data_waits_for_the_end_until_released() -> None:
    async with running_hub("portable") as hub:
        with tcp_pair() as (ours, peer):
            watch = hub.watch(ours)
            peer.sendall(b"unread")
            peer.shutdown(socket.SHUT_WR)
            async with trio.open_nursery() as nursery:
                waiters = Waiters(nursery)
                await waiters.start(watch, "hangup")
                assert waiters.results == {}
                watch.release_hangup_waiter()
            assert waiters.results == {"hangup": "ready"}
            assert not watch.hangup
            watch.close()


# -- woken by the owner --------------------------------------------------------------------------------------


async def test_wake_reader_lets_the_reader_look_again(hub: Hub) -> None:
    with tcp_pair() as (ours, peer):
        transport = Transport(ours, hub.watch(ours))
        assert transport.recv_nowait() is None
        transport.watch.wake_reader()  # nobody waits: no effect
        async with trio.open_nursery() as nursery:
            waiters = Waiters(nursery)
            await waiters.start(transport.watch, "readable")
            transport.watch.wake_reader()
        assert waiters.results == {"readable": "ready"}
        assert transport.recv_nowait() is None
        peer.sendall(b"a")
        await transport.watch.wait_readable()
        assert transport.recv_nowait() == b"a"
        transport.close()


async def test_release_hangup_waiter_lets_it_go_while_the_peer_stays(hub: Hub) -> None:
    with tcp_pair() as (ours, _):
        watch = hub.watch(ours)
        watch.release_hangup_waiter()  # nobody waits: no effect
        async with trio.open_nursery() as nursery:
            waiters = Waiters(nursery)
            await waiters.start(watch, "hangup")
            watch.release_hangup_waiter()
        assert waiters.results == {"hangup": "ready"}
        assert not watch.hangup
        watch.close()


async def test_on_writable_is_called_once_and_only_if_no_task_waits(epoll_hub: Hub) -> None:
    with tcp_pair() as (ours, peer):
        watch = epoll_hub.watch(ours)
        assert watch.calls_on_writable
        peer.setblocking(False)
        calls: list[str] = []
        fill(ours)
        await wait_all_tasks_blocked(0.01)
        watch.on_writable = lambda: calls.append("writable")
        await wait_all_tasks_blocked(0.01)
        assert calls == []
        while not calls:
            await drain(peer)
        assert watch.on_writable is None
        fill(ours)
        watch.on_writable = lambda: calls.append("again")
        async with trio.open_nursery() as nursery:
            waiters = Waiters(nursery)
            await waiters.start(watch, "writable")
            while not waiters.results:
                await drain(peer)
        assert calls == ["writable"]
        watch.close()


# -- descriptors ---------------------------------------------------------------------------------------------


async def test_a_descriptor_number_is_reused_right_after_close(hub: Hub) -> None:
    with unix_pair() as (ours, peer):
        old = hub.watch(ours)
        Transport(ours, old).recv_nowait()
        number = ours.fileno()
        peer.sendall(b"for the old one")
        old.close()
        ours.close()
        with unix_pair() as (second, second_peer):
            assert second.fileno() == number  # POSIX: the lowest free one
            transport = Transport(second, hub.watch(second))
            assert await empty(transport)
            second_peer.sendall(b"for the new one")
            await transport.watch.wait_readable()
            assert transport.recv_nowait() == b"for the new one"
            assert not transport.watch.hangup
            transport.close()


async def empty(transport: Transport) -> bool:
    """Nothing to read, and nothing that wakes a reader."""
    return transport.recv_nowait() is None and await waits(transport.watch)


async def test_a_copy_of_a_closed_descriptor_says_nothing_about_its_successor(hub: Hub) -> None:
    """A child process that was forked meanwhile holds the old connection open; its events are not the new one's."""
    with unix_pair() as (ours, peer):
        number = ours.fileno()
        copy = os.dup(number)
        try:
            hub.watch(ours).close()
            ours.close()
            with unix_pair() as (second, _):
                assert second.fileno() == number
                transport = Transport(second, hub.watch(second))
                assert transport.recv_nowait() is None
                peer.close()
                assert await waits(transport.watch)
                assert not transport.watch.hangup
                transport.close()
        finally:
            os.close(copy)
