"""Threads under trio and under asyncio: the same promises."""

from __future__ import annotations

import asyncio
import threading

import pytest
import trio
import trio.testing

from trioserve.middleware.offload import Offload


class Work:
    """A call that stays in its thread until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.go = threading.Event()
        self.threads: set[int] = set()
        self.running = 0
        self.most = 0
        self._lock = threading.Lock()

    def __call__(self, result: str) -> str:
        with self._lock:
            self.threads.add(threading.get_ident())
            self.running += 1
            self.most = max(self.most, self.running)
        self.entered.release()
        assert self.go.wait(10)
        with self._lock:
            self.running -= 1
        return result

    async def wait_entered(self, to_thread) -> None:
        assert await to_thread(self.entered.acquire, True, 10)


async def test_trio_calls_run_in_threads_a_few_at_a_time():
    offload, work, results = Offload(2, 1), Work(), []

    async def call(n):
        results.append(await offload.run(work, str(n)))

    async with trio.open_nursery() as nursery:
        for n in range(4):
            nursery.start_soon(call, n)
        for _ in range(2):
            await work.wait_entered(trio.to_thread.run_sync)
        await trio.testing.wait_all_tasks_blocked()
        assert (offload.calls, offload.overloaded) == (4, True)
        assert repr(offload) == "<Offload 4 calls, 2 threads>"
        work.go.set()
    assert sorted(results) == ["0", "1", "2", "3"]
    assert (work.most, offload.calls, offload.overloaded) == (2, 0, False)
    assert threading.get_ident() not in work.threads


async def test_a_trio_cancellation_waits_for_the_thread_but_not_for_a_turn():
    offload, work = Offload(1, 1), Work()
    over = []

    async def call(scope, name):
        with scope:
            await offload.run(work, name)
            await trio.lowlevel.checkpoint()
        over.append(name)

    running, waiting = trio.CancelScope(), trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call, running, "running")
        await work.wait_entered(trio.to_thread.run_sync)
        nursery.start_soon(call, waiting, "waiting")
        await trio.testing.wait_all_tasks_blocked()
        running.cancel()
        waiting.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert (over, offload.calls, work.running) == (["waiting"], 1, 1)
        work.go.set()
    assert over == ["waiting", "running"]
    assert running.cancelled_caught
    assert offload.calls == 0


def test_asyncio_calls_run_in_threads_a_few_at_a_time():
    async def main():
        tasks = [asyncio.create_task(offload.run(work, str(n))) for n in range(4)]
        for _ in range(2):
            await work.wait_entered(asyncio.to_thread)
        assert (offload.calls, offload.overloaded) == (4, True)
        work.go.set()
        return await asyncio.gather(*tasks)

    offload = Offload(2, 1)
    for _ in range(2):  # a second loop gets a limit of its own
        work = Work()
        assert asyncio.run(main()) == ["0", "1", "2", "3"]
        assert (work.most, offload.calls) == (2, 0)


def test_an_asyncio_cancellation_waits_for_the_thread_too():
    async def main():
        running = asyncio.create_task(offload.run(work, "running"))
        await work.wait_entered(asyncio.to_thread)
        waiting = asyncio.create_task(offload.run(work, "waiting"))
        await asyncio.sleep(0)
        for _ in range(2):
            running.cancel()
            waiting.cancel()
            await asyncio.wait({waiting})
        assert waiting.cancelled()
        assert not running.done()
        assert work.running == 1
        work.go.set()
        with pytest.raises(asyncio.CancelledError):
            await running

    offload, work = Offload(1, 1), Work()
    asyncio.run(main())
    assert (work.running, offload.calls) == (0, 0)


def test_an_error_in_the_thread_comes_out():
    def fail():
        raise LookupError("in a thread")

    async def call():
        with pytest.raises(LookupError, match="in a thread"):
            await offload.run(fail)

    offload = Offload(1, 1)
    asyncio.run(call())
    trio.run(call)
    assert offload.calls == 0
