"""The flusher by itself: who asks again while it is called does not keep the others from their turn."""

from __future__ import annotations

import trio

from trioserve.http.flusher import Flusher


async def test_who_asks_again_waits_for_the_next_pass() -> None:
    flusher = Flusher()
    calls = 0

    def flush() -> None:
        nonlocal calls
        calls += 1
        if calls < 1000:
            flusher.request(flush)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flusher.run)
        flusher.request(flush)
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        assert 2 <= calls <= 11
        nursery.cancel_scope.cancel()
