"""For tests of real time: did the machine stand still meanwhile?

    @undisturbed
    async def test_...

A thread wants to wake up every few milliseconds and notes how late it came. A test that fails although the machine was
there all the time has failed; after a failure in which it was not, the test is run again, a few times at the most.
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

# Less than what the tests allow for; more than the interpreter's switch interval and a thread's start.
TOLERATED = 0.04
ATTEMPTS = 6
_INTERVAL = 0.005


class Disturbances:
    """How long the machine has stood still while the block ran, at the longest."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="disturbances", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            time.sleep(_INTERVAL)
            self.longest = max(self.longest, time.monotonic() - began - _INTERVAL)


def undisturbed(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Run the test again if it fails on a machine that stood still meanwhile."""

    @functools.wraps(test)
    async def repeated(**fixtures: Any) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            with Disturbances() as seen:
                try:
                    await test(**fixtures)
                except Exception as error:
                    failure = error
                else:
                    break
            if seen.longest < TOLERATED or attempt == ATTEMPTS:
                raise failure
            print(f"attempt {attempt}: the machine stood still for {seen.longest:.3f} s: {failure!r:.300}")

    repeated.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return repeated
