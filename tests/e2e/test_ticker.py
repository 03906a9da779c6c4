"""`examples/ticker` in a browser: two windows on one world, of which one is slow."""

from __future__ import annotations

import pytest

from .chromium import Page, open_browser
from .process import serve_command

pytestmark = pytest.mark.slow

# The part of the picture that something is drawn on.
DRAWN = """(() => {
  const canvas = document.querySelector("canvas");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return data.filter((value, at) => at % 4 === 3 && value > 0).length / (data.length / 4);
})()"""


def number(field: str) -> str:
    return f"Number(document.querySelector('#{field}').textContent)"


async def test_two_windows_show_one_world_and_the_slow_one_skips_frames() -> None:
    async with serve_command("examples.ticker.app:app") as server, open_browser() as browser:
        quick = await browser.open(f"{server.url}/")
        slow = await browser.open(f"{server.url}/", size=(390, 844), phone=True, dark=True)
        for page in (quick, slow):
            await page.wait_for(f"{number('watchers')} === 2 && {DRAWN} > 0.1")
        assert await slow.evaluate("document.documentElement.scrollWidth") == 390

        await slow.evaluate("document.querySelector('#slow').click()")
        before = await slow.evaluate(number("skipped"))
        # What is under way still comes; after that it is sent as many as it draws, and the newest of those there are.
        await slow.wait_for(f"{number('rate')} <= 3 && {number('skipped')} > {before} + 20")
        seen = {page: len(page.frames) for page in (quick, slow)}
        await slow.wait_for(f"{number('skipped')} > {await slow.evaluate(number('skipped'))} + 20")
        came = {page: len(page.frames) - seen[page] for page in (quick, slow)}
        assert came[slow] < came[quick]
        assert await brightness(slow) < await brightness(quick)
        for page in (quick, slow):
            assert page.complaints == []


async def brightness(page: Page) -> int:
    """How bright the ground is, 0 to 255."""
    colour = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    return int(colour.partition("(")[2].partition(",")[0])
