"""The task tree: what it says, that equal tasks are one entry, and that it stays small."""

from __future__ import annotations

import re
import threading

import trio
import trio.testing

from trioserve.observe import task_tree
from trioserve.observe.task_tree import dump_tasks, find_running_task, group_tasks


async def sleeper(depth: int) -> None:
    if depth:
        await sleeper(depth - 1)
    else:
        await trio.sleep_forever()


async def parent_of(count: int) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(sleeper, 0)


async def test_it_shows_who_waits_where() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleeper, 1, name="the one")
        await trio.testing.wait_all_tasks_blocked()
        text = dump_tasks()
        nursery.cancel_scope.cancel()
    assert "the one\n" in text
    assert len(re.findall(r"test_task_tree\.py:\d+ sleeper", text)) == 2  # it calls itself once
    assert "sleep_forever" in text
    assert "_traps.py" not in text  # how trio waits is the same for everybody
    assert "nursery 1: 1 task\n" in text


async def test_equal_tasks_are_one_entry_also_with_equal_children() -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(parent_of, 3)
        for depth in (5, 5, 6):
            nursery.start_soon(sleeper, depth)
        await trio.testing.wait_all_tasks_blocked()
        text = dump_tasks(trio.lowlevel.current_task())
        nursery.cancel_scope.cancel()
    assert (
        text.count("50 x tests.test_task_tree.parent_of") + text.count("50 x test_task_tree.parent_of") == 1
    )
    assert text.count("3 x") == 1
    assert ": 53 tasks" in text
    assert text.count("2 x") == 1


async def test_a_deep_stack_loses_its_middle() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleeper, 200)
        await trio.testing.wait_all_tasks_blocked()
        text = dump_tasks()
        nursery.cancel_scope.cancel()
    assert "frames left out" in text
    assert text.count("sleeper") < 15


async def test_the_size_is_bounded(monkeypatch: object) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(3000):
            nursery.start_soon(sleeper, 0, name=f"task {number}")
        await trio.testing.wait_all_tasks_blocked()
        text = dump_tasks(most_lines=100)
        nursery.cancel_scope.cancel()
    lines = text.split("\n")
    assert len(lines) == 101
    assert lines[-1] == "... (cut)"


async def test_the_number_of_visited_tasks_is_bounded(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(task_tree, "MOST_TASKS", 10)
    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(sleeper, 0)
        await trio.testing.wait_all_tasks_blocked()
        text = dump_tasks(trio.lowlevel.current_task())
        nursery.cancel_scope.cancel()
    assert "10 x" in text
    assert "20 x ... (not visited)" in text


async def test_nested_nurseries_are_bounded() -> None:
    async def nest(depth: int) -> None:
        async with trio.open_nursery() as nursery:
            if depth:
                nursery.start_soon(nest, depth - 1)
            else:
                nursery.start_soon(trio.sleep_forever)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(nest, 300)
        await trio.testing.wait_all_tasks_blocked()
        text = dump_tasks()
        nursery.cancel_scope.cancel()
    assert 10 < text.count("nest") < 200


async def test_from_another_thread_with_a_root() -> None:
    root = trio.lowlevel.current_root_task()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleeper, 0)
        await trio.testing.wait_all_tasks_blocked()
        assert "sleeper" in await trio.to_thread.run_sync(dump_tasks, root)
        nursery.cancel_scope.cancel()


async def test_the_running_task_is_found_from_another_thread_and_none_while_all_wait() -> None:
    root = trio.lowlevel.current_root_task()
    assert root is not None
    found: list[trio.lowlevel.Task | None] = []

    def look() -> None:
        found.append(find_running_task(root))

    async def run_thread_and_wait() -> trio.lowlevel.Task:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        return trio.lowlevel.current_task()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(parent_of, 3)
        await trio.testing.wait_all_tasks_blocked()
        assert await run_thread_and_wait() is found[0]
        await trio.to_thread.run_sync(look)
        nursery.cancel_scope.cancel()
    assert found[1] is None


async def test_the_search_for_the_running_task_is_bounded(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    root = trio.lowlevel.current_root_task()
    assert root is not None
    assert find_running_task(root) is trio.lowlevel.current_task()
    monkeypatch.setattr(task_tree, "MOST_TASKS", 1)
    assert find_running_task(root) is None


def test_outside_of_trio_it_says_so() -> None:
    assert group_tasks() is None
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(dump_tasks()))
    thread.start()
    thread.join()
    assert found == ["no trio run in this thread"]
