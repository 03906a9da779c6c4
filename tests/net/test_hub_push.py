"""Writing on from the hub while a task waits for room: `wait_writable(push)`, on both hubs."""

from __future__ import annotations

import functools
import gc
import socket
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.net.sockets import HUBS, check_one_wake_up, drain, fill, parked, reset, running_hub, tcp_pair
from trioserve.net import epoll_hub
from trioserve.net.hub import Hub
from trioserve.net.watch import Watch


@pytest.fixture(params=HUBS)
async def hub(request: Any) -> AsyncIterator[Hub]:
    async with running_hub(request.param) as hub:
        yield hub


@contextmanager
def full_socket(hub: Hub) -> Iterator[tuple[Watch, socket.socket, socket.socket]]:
    """A watched socket that takes no more, and its peer."""
    with tcp_pair() as (ours, peer):
        peer.setblocking(False)
        watch = hub.watch(ours)
        fill(ours)
        yield watch, ours, peer
        watch.close()


async def drain_until(peer: socket.socket, is_done: Callable[[], bool]) -> None:
    """Make room until that has come about."""
    while not is_done():
        await drain(peer)


async def wait(watch: Watch, push: Callable[[], bool] | None = None) -> None:
    """A task's wait; what it awaits has to be asked for in that task."""
    await watch.wait_writable(push)


class Pusher:
    """Fills the socket each time it is asked to, and has enough after so many times."""

    def __init__(self, sock: socket.socket, times: int) -> None:
        self.sock = sock
        self.left = times
        self.calls = 0

    def __call__(self) -> bool:
        self.calls += 1
        self.left -= 1
        if not self.left:
            return True
        try:
            fill(self.sock)
        except OSError:
            return True
        return False


async def test_the_wait_goes_on_until_the_push_has_had_enough(hub: Hub) -> None:
    with full_socket(hub) as (watch, ours, peer):
        pusher = Pusher(ours, 10**6)
        over = trio.Event()

        async def wait_long() -> None:
            await wait(watch, pusher)
            over.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_long)
            await wait_all_tasks_blocked()
            assert pusher.calls == 0, "nothing has left the socket"
            for calls in (1, 2):
                while pusher.calls < calls:
                    assert not over.is_set()
                    await drain(peer)
                assert watch.writer is not None, "the task was not woken for it"
            pusher.left = 1
            await drain_until(peer, over.is_set)
        assert pusher.left == 0, "woken by the first push that had enough, and not before"
        assert watch.writer is None
        assert not watch.writing


@pytest.mark.parametrize("end", ["cancelled", "closed"])
async def test_nothing_is_pushed_for_a_task_that_has_left(hub: Hub, end: str) -> None:
    with full_socket(hub) as (watch, ours, peer):
        pusher = Pusher(ours, 99)
        scope = trio.CancelScope()

        async def leave() -> None:
            with scope, suppress(trio.ClosedResourceError):
                await wait(watch, pusher)
                raise AssertionError("the wait has ended by itself")

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(leave)
                await wait_all_tasks_blocked()
                if end == "cancelled":
                    scope.cancel()
                else:
                    watch.close()
            if end == "cancelled":
                # A later wait has nothing to do with it.
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(wait, watch)
                    await wait_all_tasks_blocked()
                    await drain_until(peer, lambda: watch.writer is None)
        assert pusher.calls == 0


async def test_who_has_pushed_is_held_no_longer_than_the_wait() -> None:
    async with running_hub("epoll") as hub:
        with full_socket(hub) as (watch, ours, peer):
            gc.collect()
            gc.disable()
            try:
                pusher = Pusher(ours, 1)
                pushed = weakref.ref(pusher)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(wait, watch, pusher)
                    await wait_all_tasks_blocked()
                    await drain_until(peer, lambda: watch.writer is None)
                assert pusher.calls == 1
                del pusher
                await wait_all_tasks_blocked()
                assert pushed() is None
            finally:
                gc.enable()


async def test_a_reset_is_met_by_the_push_and_ends_the_wait(hub: Hub) -> None:
    with full_socket(hub) as (watch, ours, peer):
        pusher = Pusher(ours, 99)
        async with parked(wait, watch, pusher):
            reset(peer)
        assert pusher.calls == 1


async def test_a_push_whose_task_is_cancelled_meanwhile_wakes_it_only_once() -> None:
    async with running_hub("epoll") as hub:
        with full_socket(hub) as (watch, _ours, peer):

            async def make_room(scope: trio.CancelScope) -> None:
                await drain_until(peer, lambda: scope.cancel_called)

            await check_one_wake_up(functools.partial(wait, watch), make_room)


async def test_when_its_time_is_up_the_hub_wakes_the_tasks_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many peers have made room at once, who has something to read is served in between."""
    monkeypatch.setattr(epoll_hub, "_BUSY_SECONDS", 0.0)
    async with running_hub("epoll") as hub:
        with full_socket(hub) as (watch, ours, peer):
            pusher = Pusher(ours, 99)
            async with parked(wait, watch, pusher):
                await drain_until(peer, lambda: watch.writer is None)
            assert pusher.calls == 0
