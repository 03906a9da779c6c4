"""`examples/docs_site` in a browser: it looks as it should, comes compressed, and is not fetched a second time."""

from __future__ import annotations

import html
import io
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from examples.docs_site import build

from .browser import dump_dom, screenshot
from .process import serve_command

pytestmark = pytest.mark.slow

# Status, path, coding and length of each answer.
LOG = ("--access-logfile", "-", "--access-logformat", "%(s)s %(U)s %({content-encoding}o)s %(B)s")

BAND = (0x0B, 0x3D, 0x4F)
GROUND = (0xFB, 0xFA, 0xF7)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "site"
    assert build.main([str(out)]) == 0
    return out


def answers(log: str) -> list[tuple[str, str, str]]:
    """Status, path and coding of each line; a hash is written as `*`."""
    lines = re.findall(r"^(\d+) (\S+) (\S+) \d+$", log, re.MULTILINE)
    return [(status, re.sub(r"\.[0-9a-f]{12}\.", ".*.", path), coding) for status, path, coding in lines]


def without_icon(lines: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """A browser that is in no hurry to show it may end before it has asked for it; else it is asked for once."""
    icon = ("200", "/assets/icon.*.svg", "-")
    assert lines.count(icon) <= 1
    return [line for line in lines if line != icon]


async def test_a_page_has_its_content_its_links_and_what_its_script_adds(site: Path) -> None:
    async with serve_command("examples.docs_site.app:app", *LOG, env={"DOCS_SITE": str(site)}) as server:
        dom = await dump_dom(f"{server.url}/use/")
        assert "<title>Use - trioserve</title>" in dom
        text = html.unescape(re.sub(r"<[^>]+>", "", dom))
        assert "trioserve --workers auto myapp.main:app" in text
        assert re.findall(r'<a href="([^"]+)" aria-current="page">', dom) == ["/use/"]
        assert 'href="/timeouts/#phases"' in dom
        # The policy allows the site's own script: each block of code has got its button.
        assert dom.count("<pre>") == dom.count(">Copy</button>") == 3
    # Chromium takes br, and is sent what was compressed beforehand: what is over a kibibyte.
    assert sorted(without_icon(answers(server.stdout.text))) == [
        ("200", "/assets/site.*.css", "br"),
        ("200", "/assets/site.*.js", "-"),
        ("200", "/use/", "br"),
    ]


async def test_the_stylesheet_is_applied(site: Path, tmp_path: Path) -> None:
    async with serve_command("examples.docs_site.app:app", *LOG, env={"DOCS_SITE": str(site)}) as server:
        picture = await screenshot(f"{server.url}/", tmp_path / "page.png", size=(1000, 700))
    with Image.open(io.BytesIO(picture)) as image:
        width, height = image.size
        band = colours(image.crop((0, 0, width, 64)))
        below = colours(image.crop((0, 64, width, height)))
    # The band across the page, with the name of the site in white; below it the ground, with text on it.
    assert 0.9 < band[BAND] < 1, band.most_common(3)
    assert 0 < band[255, 255, 255] < 0.1, band.most_common(3)
    assert 0.6 < below[GROUND] < 0.99, below.most_common(3)
    assert below[BAND] == 0
    assert len(below) > 20, "there is no text"


def colours(image: Image.Image) -> Counter[tuple[int, int, int]]:
    """Which part of the picture has which colour."""
    counts = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert counts is not None
    total = sum(count for count, _ in counts)
    return Counter({colour: count / total for count, colour in counts})


async def test_a_second_visit_asks_for_the_page_alone_and_is_told_that_it_is_the_same(
    site: Path, tmp_path: Path
) -> None:
    profile = f"--user-data-dir={tmp_path}/profile"
    async with serve_command("examples.docs_site.app:app", *LOG, env={"DOCS_SITE": str(site)}) as server:
        first = await dump_dom(f"{server.url}/workers/", profile)
        second = await dump_dom(f"{server.url}/workers/", profile)
    assert second == first
    lines = without_icon(answers(server.stdout.text))
    assert [(status, path) for status, path, _coding in sorted(lines[:3])] == [
        ("200", "/assets/site.*.css"),
        ("200", "/assets/site.*.js"),
        ("200", "/workers/"),
    ]
    assert lines[3:] == [("304", "/workers/", "-")]


async def test_the_policy_stops_a_script_that_is_not_the_sites_own(site: Path, tmp_path: Path) -> None:
    """A file that should not have got into the site, then: none of its pages has such a script."""
    other = Path(shutil.copytree(site, tmp_path / "site")) / "other.html"
    other.write_text("<title>mine</title><script>document.title = 'taken'</script><p onclick='x()'>text")
    async with serve_command("examples.docs_site.app:app", env={"DOCS_SITE": str(other.parent)}) as server:
        dom = await dump_dom(f"{server.url}/other.html")
    assert "<p onclick=" in dom
    assert "<title>mine</title>" in dom
