"""A headless Chromium that stays open: several pages at once, and what is done in them.

    async with open_browser() as browser:
        page = await browser.open(f"{server.url}/")
        assert await page.evaluate("document.title") == "Chat"
        await page.wait_for("document.querySelectorAll('li').length === 3")
        await page.screenshot(path)

`browser.py` has what needs a page only once. This one speaks the DevTools protocol over a pair of pipes: a JSON object
each way, with a NUL behind it. Each browser has an empty profile of its own, and ends with the block.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio

from .browser import FLAGS
from .process import PATIENCE, require_tool, start_process

# Chromium reads commands from descriptor 3 and writes to 4, whatever ours are called.
_START = """
import fcntl, os, sys
reads, writes, *command = sys.argv[1:]
# Via others, lest one is put where the other still is.
reads, writes = (fcntl.fcntl(int(end), fcntl.F_DUPFD_CLOEXEC, 5) for end in (reads, writes))
os.dup2(reads, 3)
os.dup2(writes, 4)
os.execv(command[0], command)
"""


class BrowserError(Exception):
    """Chromium refused a command, or a script in a page raised."""


class Browser:
    """One process with any number of pages."""

    def __init__(self, commands: trio.lowlevel.FdStream, answers: trio.lowlevel.FdStream) -> None:
        self._commands = commands
        self._answers = answers
        self._numbers = itertools.count(1)
        self._waiting: dict[int, trio.MemorySendChannel[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}

    async def run(self) -> None:
        """Read what Chromium says, until it ends."""
        rest = b""
        async for part in self._answers:
            *messages, rest = (rest + part).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._waiting.pop(message["id"]).send_nowait(message)
                elif message.get("sessionId") in self._pages:
                    self._pages[message["sessionId"]].happened(message["method"], message["params"])

    async def command(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        number = next(self._numbers)
        told, answer = trio.open_memory_channel[dict[str, Any]](1)
        self._waiting[number] = told
        message = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        with trio.fail_after(PATIENCE):
            await self._commands.send_all(json.dumps(message).encode() + b"\0")
            said = await answer.receive()
        if "error" in said:
            raise BrowserError(f"{method}: {said['error']['message']}")
        result: dict[str, Any] = said["result"]
        return result

    async def open(
        self, url: str, *, size: tuple[int, int] = (1200, 900), dark: bool = False, phone: bool = False
    ) -> Page:
        """A page of its own, with storage of its own, once it has been loaded."""
        context = await self.command("Target.createBrowserContext")
        target = await self.command(
            "Target.createTarget", url="about:blank", browserContextId=context["browserContextId"]
        )
        attached = await self.command("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = Page(self, attached["sessionId"])
        self._pages[page.session] = page
        for domain in ("Page", "Runtime", "Network", "Log"):
            await page.command(f"{domain}.enable")
        await page.command(
            "Emulation.setDeviceMetricsOverride",
            width=size[0],
            height=size[1],
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await page.command("Emulation.setEmulatedMedia", features=[scheme])
        # A page that is not in front is not drawn, and a browser has one page in front.
        await page.command("Emulation.setFocusEmulationEnabled", enabled=True)
        went = await page.command("Page.navigate", url=url)
        if "errorText" in went:
            raise BrowserError(f"{url}: {went['errorText']}")
        await page.wait_for("document.readyState === 'complete'")
        return page


class Page:
    """One page.

    Attributes:
        complaints: errors of scripts, and what the browser has refused or could not load.
        protocols: how each request for a document or a part of one was answered ("http/1.1", "h2").
        frames: payloads of the WebSocket messages it has received.
        handshakes: the status each WebSocket was opened with: 101 over HTTP/1.1, 200 over HTTP/2.
    """

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self.session = session
        self.complaints: list[str] = []
        self.protocols: list[str] = []
        self.frames: list[str] = []
        self.handshakes: list[int] = []

    def happened(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"].get("text", "an exception"))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(params["entry"]["text"])
        elif method == "Network.responseReceived":
            self.protocols.append(params["response"].get("protocol", ""))
        elif method == "Network.webSocketFrameReceived":
            self.frames.append(params["response"]["payloadData"])
        elif method == "Network.webSocketHandshakeResponseReceived":
            self.handshakes.append(params["response"]["status"])

    async def command(self, method: str, **params: Any) -> dict[str, Any]:
        return await self._browser.command(method, self.session, **params)

    async def evaluate(self, script: str) -> Any:
        """The value of an expression, of what it promises if it is a promise."""
        result = await self.command(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in result:
            raise BrowserError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    async def wait_for(self, condition: str, patience: float = PATIENCE) -> None:
        """Return once an expression is true; it is looked at again and again, but not for ever."""
        with trio.move_on_after(patience):
            while not await self.evaluate(condition):
                await trio.sleep(0.02)
            return
        text = await self.evaluate("document.body.innerText")
        raise AssertionError(f"{condition} has not come true. The page says:\n{text}\n{self.complaints}")

    async def type(self, selector: str, text: str) -> None:
        """Type as somebody at a keyboard does; "\\n" is the Enter key."""
        await self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        for line in text.splitlines(keepends=True):
            await self.command("Input.insertText", text=line.rstrip("\n"))
            if line.endswith("\n"):
                key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
                await self.command("Input.dispatchKeyEvent", type="keyDown", **key)
                await self.command("Input.dispatchKeyEvent", type="keyUp", **key)

    async def screenshot(self, path: Path) -> bytes:
        """A picture of what is seen, PNG, written to `path` for who wants to look at it."""
        picture = base64.b64decode((await self.command("Page.captureScreenshot", format="png"))["data"])
        path.write_bytes(picture)
        return picture


@contextlib.asynccontextmanager
async def open_browser(*flags: str) -> AsyncIterator[Browser]:
    """Start Chromium; without it the test is skipped, or fails (`require_tool`)."""
    chromium = require_tool("chromium")
    async with contextlib.AsyncExitStack() as stack:
        home = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="trioserve-browser-", ignore_cleanup_errors=True)
        )
        reads, commands = os.pipe()
        answers, writes = os.pipe()
        sending = await stack.enter_async_context(trio.lowlevel.FdStream(commands))
        receiving = await stack.enter_async_context(trio.lowlevel.FdStream(answers))
        starter = (sys.executable, "-c", _START, str(reads), str(writes), chromium)
        own = ("--remote-debugging-pipe", f"--user-data-dir={home}/profile")
        try:
            process = await stack.enter_async_context(
                start_process(*starter, *FLAGS, *own, *flags, env={"HOME": home}, pass_fds=(reads, writes))
            )
        finally:
            os.close(reads)
            os.close(writes)
        browser = Browser(sending, receiving)
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(browser.run)
            try:
                yield browser
                await browser.command("Browser.close")
                code = await process.wait()
                assert code == 0, f"chromium ended with {code}:\n{process.stderr.text}"
            except Exception as error:
                failure = error  # out of the nursery it would come in a group, which pytest shows less well
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
