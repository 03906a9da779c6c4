"""Pages in a headless Chromium, as somebody sees them: the document after its scripts have run, or a picture of it.

    dom = await dump_dom(f"{server.url}/")
    await screenshot(f"{server.url}/", tmp_path / "page.png")

Each call starts a browser with an empty profile of its own, which ends with the call. It keeps off the network as far
as flags go: only what the page refers to is fetched. Without Chromium the test is skipped, or fails (`require_tool`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from .process import ServerProcess, require_tool, run_to_end

# No sandbox: it does not start as root, and in many a container. Everything it is shown is ours.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

# Milliseconds of a page's own time, which passes as fast as its scripts and requests allow.
_BUDGET = 5000


async def dump_dom(url: str, *flags: str, budget: int = _BUDGET) -> str:
    """The document as HTML once its scripts have run and its requests have been answered."""
    browser = await _browse(url, "--dump-dom", *flags, budget=budget)
    return browser.stdout.text


async def screenshot(
    url: str, path: Path, *flags: str, size: tuple[int, int] = (1200, 900), budget: int = _BUDGET
) -> bytes:
    """A picture of the page, PNG, written to `path` for who wants to look at it."""
    width, height = size
    await _browse(url, f"--screenshot={path}", f"--window-size={width},{height}", *flags, budget=budget)
    return path.read_bytes()


async def _browse(url: str, *flags: str, budget: int) -> ServerProcess:
    chromium = require_tool("chromium")
    with tempfile.TemporaryDirectory(prefix="trioserve-browser-", ignore_cleanup_errors=True) as home:
        own = (f"--user-data-dir={home}/profile", f"--virtual-time-budget={budget}")
        browser = await run_to_end(chromium, *FLAGS, *own, *flags, url, env={"HOME": home})
    assert browser.returncode == 0, f"chromium ended with {browser.returncode}:\n{browser.stderr.text}"
    return browser
