"""Threads that are waited for, on trio and on asyncio."""

from __future__ import annotations

import asyncio
import threading

import pytest
import trio
import trio.testing

from trioserve.static.threads import in_thread


def divide(a: int, b: int) -> int:
    assert threading.current_thread() is not threading.main_thread()
    return a // b


async def test_the_result_or_the_error_comes_back() -> None:
    assert await in_thread(divide, 7, 2) == 3
    with pytest.raises(ZeroDivisionError):
        await in_thread(divide, 1, 0)


def test_the_same_on_asyncio() -> None:
    async def main() -> None:
        assert await in_thread(divide, 7, 2) == 3
        with pytest.raises(ZeroDivisionError):
            await in_thread(divide, 1, 0)

    asyncio.run(main())


async def test_on_trio_a_cancelled_task_still_gets_the_result() -> None:
    go = threading.Event()
    results = []

    async def work() -> None:
        results.append(await in_thread(go.wait, 5.0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        go.set()
    assert results == [True]


@pytest.mark.parametrize("with_discard", [True, False])
def test_on_asyncio_what_a_cancelled_task_would_have_got_is_discarded(with_discard: bool) -> None:
    go, started = threading.Event(), threading.Event()
    discarded: list[str] = []

    def work() -> str:
        started.set()
        assert go.wait(5)
        return "result"

    async def main() -> None:
        task = asyncio.create_task(in_thread(work, discard=discarded.append if with_discard else None))
        await asyncio.to_thread(started.wait, 5)
        for _ in range(2):  # twice: impatience does not end the thread either
            task.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert not task.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert discarded == (["result"] if with_discard else [])


def test_on_asyncio_a_failure_after_the_cancellation_is_not_discarded() -> None:
    go, started = threading.Event(), threading.Event()

    def work() -> str:
        started.set()
        assert go.wait(5)
        raise OSError("late")

    async def main() -> None:
        task = asyncio.create_task(in_thread(work, discard=pytest.fail))
        await asyncio.to_thread(started.wait, 5)
        task.cancel()
        await asyncio.sleep(0)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
