"""The hub's promises about waiting: no wake-up is lost, whoever waits, leaves or closes; on both hubs."""

from __future__ import annotations

import select
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.net.sockets import (
    HUBS,
    PAIRS,
    Waiters,
    drain,
    fill,
    open_hub_of,
    reset,
    running_hub,
    tcp_pair,
    waits,
)
from trioserve.net.epoll_hub import EpollHub
from trioserve.net.hub import Hub, open_hub
from trioserve.net.portable_hub import PortableHub
from trioserve.net.transport import Transport

Pair = Callable[[], AbstractContextManager[tuple[socket.socket, socket.socket]]]

ROLES = ("readable", "writable", "hangup")


@pytest.fixture(params=HUBS)
async def hub(request: Any) -> AsyncIterator[Hub]:
    async with running_hub(request.param) as hub:
        yield hub


@pytest.fixture(params=sorted(PAIRS))
def pair(request: Any) -> Pair:
    return PAIRS[request.param]


# -- which hub -----------------------------------------------------------------------------------------------


def test_open_hub_gives_the_kind_that_is_asked_for() -> None:
    for kind, expected in (("auto", EpollHub), ("epoll", EpollHub), ("portable", PortableHub)):
        with open_hub_of(kind) as hub:
            assert type(hub) is expected


def test_without_epoll_auto_is_portable_and_epoll_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "epoll")
    assert type(open_hub("auto")) is PortableHub
    with pytest.raises(RuntimeError, match='"auto" or "portable"'):
        open_hub("epoll")


# -- lost wake-ups -------------------------------------------------------------------------------------------


async def test_a_hub_says_how_many_it_watches(hub: Hub) -> None:
    with tcp_pair() as (ours, _):
        watch = hub.watch(ours)
        assert repr(hub).endswith("Hub watching 1>")
        watch.close()
        assert repr(hub).endswith("Hub watching 0>")


async def test_data_between_an_empty_read_and_the_wait_wakes(hub: Hub, pair: Pair) -> None:
    with pair() as (ours, peer):
        transport = Transport(ours, hub.watch(ours))
        assert transport.recv_nowait() is None
        peer.sendall(b"a")
        await transport.watch.wait_readable()
        assert transport.recv_nowait() == b"a"
        transport.close()


async def test_data_between_a_short_read_and_the_wait_wakes(hub: Hub, pair: Pair) -> None:
    with pair() as (ours, peer):
        transport = Transport(ours, hub.watch(ours))
        for _ in range(3):
            peer.sendall(b"ab")
            await transport.watch.wait_readable()
            assert transport.recv_nowait(10) == b"ab"
            peer.sendall(b"c")
            await transport.watch.wait_readable()
            assert transport.recv_nowait(10) == b"c"
            assert await waits(transport.watch)
        transport.close()


async def test_a_read_of_exactly_what_was_there_does_not_lose_what_follows(hub: Hub, pair: Pair) -> None:
    with pair() as (ours, peer):
        transport = Transport(ours, hub.watch(ours))
        peer.sendall(b"abcdefgh")
        await transport.watch.wait_readable()
        assert transport.recv_nowait(4) == b"abcd"
        # Nothing new arrives: what is left must be told of without an edge.
        await transport.watch.wait_readable()
        assert transport.recv_nowait(4) == b"efgh"
        await transport.watch.wait_readable()  # cannot know yet that nothing is left
        assert transport.recv_nowait(4) is None
        assert await waits(transport.watch)
        peer.sendall(b"i")
        await transport.watch.wait_readable()
        assert transport.recv_nowait(4) == b"i"
        transport.close()


async def test_an_edge_while_nobody_waits_is_remembered(hub: Hub, pair: Pair) -> None:
    with pair() as (ours, peer):
        transport = Transport(ours, hub.watch(ours))
        assert transport.recv_nowait() is None
        peer.sendall(b"a")
        await wait_all_tasks_blocked(0.01)  # the hub has seen it by now
        peer.sendall(b"b")
        await transport.watch.wait_readable()
        assert transport.recv_nowait() == b"ab"
        transport.close()


async def test_a_reader_that_was_woken_for_data_already_taken_waits_again(hub: Hub, pair: Pair) -> None:
    with pair() as (ours, peer):
        transport = Transport(ours, hub.watch(ours))
        assert transport.recv_nowait() is None
        peer.sendall(b"a")
        assert transport.recv_nowait() == b"a"  # before the hub could tell
        assert await waits(transport.watch)
        peer.sendall(b"b")
        await transport.watch.wait_readable()
        assert transport.recv_nowait() == b"b"
        transport.close()


async def test_a_fresh_watch_is_readable_until_seen_empty(hub: Hub, pair: Pair) -> None:
    with pair() as (ours, peer):
        peer.sendall(b"early")
        watch = hub.watch(ours)
        await watch.wait_readable()
        assert Transport(ours, watch).recv_nowait() == b"early"
        watch.close()


# -- two waiters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
async def test_a_second_waiter_of_the_same_kind_is_refused(hub: Hub, role: str) -> None:
    with tcp_pair() as (ours, _):
        watch = hub.watch(ours)
        assert Transport(ours, watch).recv_nowait() is None
        fill(ours)
        async with trio.open_nursery() as nursery:
            await Waiters(nursery).start(watch, role)
            with pytest.raises(trio.BusyResourceError, match=f"descriptor {ours.fileno()}"):
                await getattr(watch, f"wait_{role}")()
            nursery.cancel_scope.cancel()
        watch.close()


async def test_a_reader_and_a_writer_wait_together(hub: Hub) -> None:
    with tcp_pair() as (ours, peer):
        watch = hub.watch(ours)
        assert Transport(ours, watch).recv_nowait() is None
        fill(ours)
        async with trio.open_nursery() as nursery:
            waiters = Waiters(nursery)
            await waiters.start(watch, "readable")
            await waiters.start(watch, "writable")
            assert waiters.results == {}
            assert "awaited by reader, writer" in repr(watch)
            peer.setblocking(False)
            peer.sendall(b"a")
            await wait_all_tasks_blocked(0.01)
            assert waiters.results == {"readable": "ready"}
            while "writable" not in waiters.results:
                await drain(peer)
        watch.close()


# -- cancellation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
async def test_a_cancelled_wait_can_be_taken_up_again(hub: Hub, role: str) -> None:
    with tcp_pair() as (ours, peer):
        watch = hub.watch(ours)
        assert Transport(ours, watch).recv_nowait() is None
        sent = fill(ours)
        for _ in range(3):
            assert await waits(watch, role)
        assert "awaited" not in repr(watch)
        async with trio.open_nursery() as nursery:
            waiters = Waiters(nursery)
            await waiters.start(watch, role)
            if role == "readable":
                peer.sendall(b"a")
            elif role == "writable":
                while sent:
                    sent -= len(peer.recv(65536))
            else:
                peer.shutdown(socket.SHUT_WR)
        assert waiters.results == {role: "ready"}
        watch.close()


async def test_what_arrives_after_a_cancelled_wait_is_not_lost(hub: Hub, pair: Pair) -> None:
    with pair() as (ours, peer):
        transport = Transport(ours, hub.watch(ours))
        assert transport.recv_nowait() is None
        assert await waits(transport.watch)
        peer.sendall(b"a")
        await wait_all_tasks_blocked(0.01)
        await transport.watch.wait_readable()
        assert transport.recv_nowait() == b"a"
        transport.close()


# -- closing -------------------------------------------------------------------------------------------------


async def test_closing_ends_every_wait(hub: Hub) -> None:
    with tcp_pair() as (ours, _):
        watch = hub.watch(ours)
        Transport(ours, watch).recv_nowait()
        fill(ours)
        async with trio.open_nursery() as nursery:
            waiters = Waiters(nursery)
            for role in ROLES if isinstance(hub, EpollHub) else ("readable", "writable"):
                await waiters.start(watch, role)
            watch.close()
        assert set(waiters.results.values()) == {"closed"}
        assert "closed" in repr(watch)


@pytest.mark.parametrize("unread", [False, True])
async def test_closing_ends_the_wait_for_the_peers_end(hub: Hub, unread: bool) -> None:
    with tcp_pair() as (ours, peer):
        watch = hub.watch(ours)
        if unread:
            peer.sendall(b"unread")
        async with trio.open_nursery() as nursery:
            waiters = Waiters(nursery)
            await waiters.start(watch, "hangup")
            watch.close()
        assert waiters.results == {"hangup": "closed"}


@pytest.mark.parametrize("role", ROLES)
async def test_waiting_on_a_closed_watch_is_refused(hub: Hub, role: str) -> None:
    with tcp_pair() as (ours, _):
        watch = hub.watch(ours)
        watch.close()
        watch.close()
        with pytest.raises(trio.ClosedResourceError):
            await getattr(watch, f"wait_{role}")()


@pytest.mark.parametrize("kind", HUBS)
async def test_closing_the_hub_ends_every_wait(kind: str) -> None:
    with trio.fail_after(30), open_hub_of(kind) as hub, tcp_pair() as (ours, _), tcp_pair() as (other, _):
        watch, other_watch = hub.watch(ours), hub.watch(other)
        Transport(ours, watch).recv_nowait()
        fill(other)
        async with trio.open_nursery() as nursery:
            waiters = Waiters(nursery)
            await waiters.start(watch, "readable")
            await waiters.start(other_watch, "writable")
            hub.close()
        assert waiters.results == {"readable": "closed", "writable": "closed"}


# -- the peer's end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hub_first", [False, True], ids=["read first", "hub first"])
async def test_data_together_with_fin_is_read_and_then_the_end(hub: Hub, pair: Pair, hub_first: bool) -> None:
    with pair() as (ours, peer):
        transport = Transport(ours, hub.watch(ours))
        assert transport.recv_nowait() is None
        peer.sendall(b"last words")
        peer.close()
        if hub_first:
            await wait_all_tasks_blocked(0.01)
        received: list[bytes] = []
        while not received or received[-1]:
            await transport.watch.wait_readable()
            data = transport.recv_nowait()
            if data is not None:
                received.append(data)
        assert received == [b"last words", b""]
        assert transport.broken is None
        transport.close()


async def test_a_fin_between_a_short_read_and_the_wait_wakes(hub: Hub, pair: Pair) -> None:
    with pair() as (ours, peer):
        transport = Transport(ours, hub.watch(ours))
        peer.sendall(b"a")
        await transport.watch.wait_readable()
        assert transport.recv_nowait() == b"a"
        peer.shutdown(socket.SHUT_WR)
        await transport.watch.wait_readable()
        assert transport.recv_nowait() == b""
        assert transport.watch.hangup
        transport.close()


async def test_a_fin_alone_wakes_the_reader_and_stays_known(hub: Hub, pair: Pair) -> None:
    with pair() as (ours, peer):
        transport = Transport(ours, hub.watch(ours))
        assert transport.recv_nowait() is None
        peer.shutdown(socket.SHUT_WR)
        for _ in range(3):
            await transport.watch.wait_readable()
            assert transport.recv_nowait() == b""
        await transport.watch.wait_hangup()
        assert not transport.watch.reset
        assert "hangup" in repr(transport.watch)
        assert transport.send_nowait(b"still heard") == 11
        assert peer.recv(100) == b"still heard"
        transport.close()


async def test_a_reset_wakes_reader_and_writer(hub: Hub) -> None:
    with tcp_pair() as (ours, peer):
        transport = Transport(ours, hub.watch(ours))
        assert transport.recv_nowait() is None
        fill(ours)
        async with trio.open_nursery() as nursery:
            waiters = Waiters(nursery)
            await waiters.start(transport.watch, "readable")
            await waiters.start(transport.watch, "writable")
            reset(peer)
        assert waiters.results == {"readable": "ready", "writable": "ready"}
        assert transport.recv_nowait() == b""
        assert isinstance(transport.broken, ConnectionResetError)
        assert "reset" in repr(transport.watch)
        await transport.watch.wait_hangup()
        await transport.watch.wait_writable()
        transport.close()


async def test_the_peers_end_wakes_who_waits_for_it(hub: Hub, pair: Pair) -> None:
    with pair() as (ours, peer):
        watch = hub.watch(ours)
        async with trio.open_nursery() as nursery:
            waiters = Waiters(nursery)
            await waiters.start(watch, "hangup")
            peer.close()
        assert waiters.results == {"hangup": "ready"}
        assert watch.hangup
        watch.close()


@pytest.mark.parametrize("how", ["recv", "send", "peek"])
async def test_an_end_met_while_reading_or_writing_wakes_who_waits_for_it(hub: Hub, how: str) -> None:
    """The read or write may come before the hub's own notice, which is no news any more then."""
    with tcp_pair() as (ours, peer):
        transport = Transport(ours, hub.watch(ours))
        calls: list[bool] = []
        transport.watch.on_hangup = lambda: calls.append(transport.watch.reset)
        async with trio.open_nursery() as nursery:
            waiters = Waiters(nursery)
            await waiters.start(transport.watch, "hangup")
            reset(peer)
            if how == "recv":
                assert transport.recv_nowait() == b""
            elif how == "peek":
                assert transport.is_peer_gone()
            else:
                with pytest.raises(OSError):
                    transport.send_nowait(b"x")
        assert waiters.results == {"hangup": "ready"}
        assert calls[0] is True
        transport.close()


@pytest.mark.parametrize("how", ["recv", "peek"])
async def test_a_fin_met_while_reading_calls_on_hangup(hub: Hub, how: str) -> None:
    with tcp_pair() as (ours, peer):
        transport = Transport(ours, hub.watch(ours))
        calls: list[str] = []
        transport.watch.on_hangup = lambda: calls.append("hangup")
        peer.shutdown(socket.SHUT_WR)
        assert transport.recv_nowait() == b"" if how == "recv" else transport.is_peer_gone()
        await wait_all_tasks_blocked(0.01)
        assert calls == ["hangup"]
        transport.close()
