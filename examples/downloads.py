"""A download server: large files that can be resumed, a listing of them, and a player that jumps to any minute.

Run it with `trioserve examples.downloads:app` and see http://127.0.0.1:8000/; `DOWNLOADS=FOLDER` names the folder it
serves, which is made if need be and gets one recording, so that there is something to fetch.

What it teaches: a range is `StaticFiles`' business, and none of the app's. An interrupted download goes on where it
was with `curl -C -`, and a browser's player fetches what it plays. A client that goes on with a file of yesterday says
so with If-Range, and gets the new file from its beginning, never the end of one behind the start of another. A file is
put into place whole and once, so that all workers serve the same one, with the same ETag.
"""

from __future__ import annotations

import array
import math
import os
import sys
import tempfile
import wave
from pathlib import Path
from typing import Any

import trio

from trioserve import StaticFiles

FOLDER = Path(os.environ.get("DOWNLOADS", "build/downloads"))
FOLDER.mkdir(parents=True, exist_ok=True)

RECORDING = "tones.wav"

# A minute each (Hz): whoever jumps hears where he is. Whole numbers, so that seconds join without a click.
TONES = (220, 247, 262, 294, 330, 349, 392, 440, 494, 523)

# Samples a second: 16 bits each, so ten minutes are 26 MB.
RATE = 22_050

# Files keep their name while they change, so each is asked for again before it is used again; all are saved, not shown.
files = StaticFiles(FOLDER, listing=True, download=("*",), cache_control="no-cache")


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The player at /, and the folder below /files/."""
    if scope["type"] == "lifespan":
        # Nothing is accepted before the startup is answered, so whoever asks finds the recording whole.
        await trio.to_thread.run_sync(make_recording, FOLDER / RECORDING)
        await files(scope, receive, send)
    elif (scope["path"] + "/").startswith("/files/"):
        await files({**scope, "root_path": scope["root_path"] + "/files"}, receive, send)
    else:
        status, content_type, body = PAGES.get(scope["path"], NOT_FOUND)
        headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def make_recording(path: Path) -> None:
    """Write the recording unless it is there. Of several workers that do, the first wins."""
    if path.exists():
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        part = Path(folder) / path.name
        with wave.open(str(part), "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(RATE)
            for tone in TONES:
                second = one_second(tone)
                for _ in range(60):
                    sound.writeframes(second)
        try:
            os.link(part, path)
        except FileExistsError:
            pass  # another worker's, the same but for its time; it may be in somebody's cache already


def one_second(tone: int) -> bytes:
    """A sine, as a WAV file holds it: little-endian, a quarter of the loudest."""
    samples = array.array("h", (round(8000 * math.sin(2 * math.pi * tone * i / RATE)) for i in range(RATE)))
    if sys.byteorder == "big":
        samples.byteswap()
    return samples.tobytes()


# -- the player ----------------------------------------------------------------------------------------------

PAGE = f"""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Downloads</title>
<link rel="icon" href="data:,">
<script src="/player.js" defer></script>
<h1>Downloads</h1>
<p><a href="/files/">All files</a></p>
<h2>Ten tones, a minute each</h2>
<audio controls preload="metadata" src="/files/{RECORDING}"></audio>
<p>Jump to minute
{" ".join(f'<a href="#{60 * minute}">{minute + 1}</a>' for minute in range(len(TONES)))}
<p><output>at the beginning</output>
"""

# The number behind # in the address is the second to jump to, so that a link can lead into the recording.
SCRIPT = """\
const player = document.querySelector("audio");
const place = document.querySelector("output");

function jump() {
  const second = Number.parseFloat(location.hash.slice(1));
  if (second >= 0) player.currentTime = second;
}

player.addEventListener("seeked", () => {
  place.textContent = `at ${player.currentTime} of ${player.duration} seconds`;
});
player.addEventListener("error", () => { place.textContent = player.error.message; });
window.addEventListener("hashchange", jump);
if (player.readyState >= HTMLMediaElement.HAVE_METADATA) jump();
else player.addEventListener("loadedmetadata", jump, { once: true });
"""

PAGES = {
    "/": (200, b"text/html; charset=utf-8", PAGE.encode()),
    "/player.js": (200, b"text/javascript; charset=utf-8", SCRIPT.encode()),
}
NOT_FOUND = (404, b"text/plain; charset=utf-8", b"There is no such page; the files are below /files/.\n")
