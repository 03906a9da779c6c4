"""What `trioserve.testing` tells the tests of apps."""

from __future__ import annotations

import os
import threading

import pytest

import trioserve.testing
from trioserve.testing import no_leaks


async def test_a_descriptor_that_a_thread_is_about_to_give_back_is_no_leak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked = threading.Event()
    inventory = trioserve.testing._inventory

    def look() -> dict[str, int]:
        found = inventory()
        looked.set()
        return found

    async with no_leaks():
        monkeypatch.setattr(trioserve.testing, "_inventory", look)
        descriptor = os.open("/", os.O_RDONLY)

        def give_back() -> None:
            looked.wait(30)
            os.close(descriptor)

        thread = threading.Thread(target=give_back, name="Trio thread of the test")
        thread.start()
    thread.join()


async def test_one_that_nobody_gives_back_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trioserve.testing, "_LAST_REFERENCES", 0.0)
    descriptor = -1
    try:
        with pytest.raises(AssertionError, match="descriptors leaked"):
            async with no_leaks():
                descriptor = os.open("/", os.O_RDONLY)
    finally:
        os.close(descriptor)
