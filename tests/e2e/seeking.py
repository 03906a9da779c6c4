"""`examples/downloads.py` for a browser that must not leave before its player has arrived where it was sent.

The page is the example's own, with a picture in it that is only answered once the player has said `seeked`: until
then the page is loading, and Chromium in its own time (`browser.py`) waits for what is loading.
"""

from __future__ import annotations

from typing import Any

import trio

from examples import downloads

WATCHER = """\
document.querySelector("audio").addEventListener("seeked", () => {
  document.title = "seeked";
  fetch("/arrived");
});
"""
PICTURE = '<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'

PARTS = {
    "/": ("text/html", downloads.PAGE + '<img src="/picture"><script src="/watcher.js" defer></script>'),
    "/watcher.js": ("text/javascript", WATCHER),
    "/picture": ("image/svg+xml", PICTURE),
    "/arrived": ("text/plain", ""),
}

arrived = trio.Event()


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    path = scope.get("path")
    if path not in PARTS:
        await downloads.app(scope, receive, send)
        return
    if path == "/arrived":
        arrived.set()
    if path == "/picture":
        await arrived.wait()
    content_type, body = PARTS[path]
    headers = [(b"content-type", content_type.encode()), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body.encode()})
