"""The drain by itself: its steps, and how later causes shorten its time."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from tests.threads import no_more_threads
from trioserve.structure.drain import Drain, DrainState, HardExit


async def test_each_step_is_taken_once_in_any_order_of_calls() -> None:
    begun: list[str] = []
    drain = Drain(30)
    drain.on_begin(lambda: begun.append(drain.reason))
    assert drain.state is DrainState.RUNNING
    drain.begin("first")
    drain.begin("second")
    assert (drain.state, drain.reason, drain.grace, begun) == (DrainState.DRAINING, "first", 30, ["first"])
    drain.hurry("third")
    drain.hurry("fourth")
    assert (drain.state, drain.reason, drain.grace) == (DrainState.CANCELLING, "first", 0)
    drain.advance(DrainState.DRAINING)  # never back
    drain.begin("fifth", grace=100)
    assert (drain.state, drain.grace) == (DrainState.CANCELLING, 0)
    drain.advance(DrainState.STOPPED)
    drain.begin("sixth")
    drain.hurry("seventh")
    assert (drain.state, begun) == (DrainState.STOPPED, ["first"])
    with trio.fail_after(30):
        for state in DrainState:
            await drain.wait(state)


async def test_hurry_begins_what_nobody_has_begun() -> None:
    drain = Drain(30)
    drain.hurry("at once")
    assert (drain.state, drain.reason) == (DrainState.CANCELLING, "at once")


async def test_a_later_cause_shortens_the_grace_and_never_lengthens_it(autojump_clock: Any) -> None:
    drain = Drain(30, delay=5)
    began = trio.current_time()
    drain.begin("signal")
    assert (drain.serve_until - began, drain.deadline - began) == (5, 35)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain.wait_delay)
        nursery.start_soon(drain.wait_grace)
        await trio.sleep(2)
        drain.begin("a tainted worker", grace=10)
        await trio.testing.wait_all_tasks_blocked(0.001)
        drain.begin("another", grace=20)
        assert (drain.serve_until - began, drain.deadline - began) == (2, 12)
        drain.begin("a fatal one", grace=2, fatal=True)
        assert drain.deadline - began == 4
    assert trio.current_time() - began == pytest.approx(4)
    assert drain.cut_lifespan


def test_a_hard_exit_that_has_no_thread_says_so_and_can_be_armed_later() -> None:
    hard_exit = HardExit(lambda: None, 82)
    with no_more_threads():
        assert not hard_exit.arm(3600)
        hard_exit.disarm()
    hard_exit = HardExit(lambda: None, 82)
    with no_more_threads():
        assert not hard_exit.arm(3600)
    assert hard_exit.arm(3600)
    with no_more_threads():
        assert hard_exit.arm(3600)
    hard_exit.disarm()
