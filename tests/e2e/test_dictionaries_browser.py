"""A browser that has the last release of a script gets the next one as what has changed (RFC 9842)."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from trioserve.static.precompress import run_precompress

from .chromium import open_browser
from .process import serve_command

pytestmark = pytest.mark.slow

pytest.importorskip("zstandard")

# What clients have of a file must be fresh to serve as a dictionary.
APP = """\
import trioserve

app = trioserve.StaticFiles({site!r}, max_age=3600, use_as_dictionary=[("app-*.js", "/app-*.js", "app")])
"""

PAGE = "<!doctype html><link rel=icon href=data:,><script src=/app-{number}.js></script>"

# Status, path, coding and length of each answer, and the dictionary that was offered for it.
FORMAT = "%(s)s %(U)s %({content-encoding}o)s %(B)s %({available-dictionary}i)s %({dictionary-id}i)s"


def release(number: int) -> str:
    words = random.Random(1).choices([f"word{word}" for word in range(2000)], k=20_000)
    words[5000 * number] = f"release-{number}"
    return f"document.title = 'release {number}'; let words = '{' '.join(words)}';"


async def test_the_next_release_is_sent_as_what_has_changed(tmp_path: Path) -> None:
    site, old = tmp_path / "site", tmp_path / "old" / "app-1.js"
    old.parent.mkdir()
    old.write_text(release(1))
    site.mkdir()
    for number in (1, 2):
        (site / f"app-{number}.js").write_text(release(number))
        (site / f"{number}.html").write_text(PAGE.format(number=number))
    assert run_precompress([str(site), "--dictionary", f"{old}=app-2.js", "--quiet"]) == 0
    smallest = min(path.stat().st_size for path in site.glob("app-2.js.*") if path.suffix != ".dcz")
    (tmp_path / "serve.py").write_text(APP.format(site=str(site)))
    log = ("--access-logfile", "-", "--access-logformat", FORMAT)
    async with serve_command(f"{tmp_path}/serve.py:app", *log) as server, open_browser() as browser:
        page = await browser.open(f"{server.url}/1.html")
        assert await page.evaluate("document.title") == "release 1"
        # The browser puts a dictionary away in its own time.
        await page.wait_for(
            "fetch('/app-2.js', {cache: 'reload'}).then(answer => answer.headers.get('content-encoding') === 'dcz')"
        )
        assert await page.evaluate("fetch('/app-2.js', {cache: 'reload'}).then(answer => answer.text())") == (
            release(2)
        )
        await page.command("Page.navigate", url=f"{server.url}/2.html")
        await page.wait_for("document.title === 'release 2'")
        assert page.complaints == []
    answers = [line.split() for line in server.stdout.text.splitlines()]
    first = next(answer for answer in answers if answer[1] == "/app-1.js")
    assert (first[0], first[2], first[4]) == ("200", "br", "-")
    delta = next(answer for answer in answers if answer[2] == "dcz")
    assert delta[:2] == ["200", "/app-2.js"]
    assert int(delta[3]) < smallest / 20
    assert re.fullmatch(r":[A-Za-z0-9+/]{43}=:", delta[4])
    assert delta[5] == r"\x22app\x22"
