"""What a browser makes of our pages: headless Chromium, where it is installed."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from .browser import dump_dom, screenshot
from .process import serve_command

pytestmark = pytest.mark.slow

# What is raised looks like markup and like a script, and must stay text.
SOURCE = """\
from tests.apps import read_body


def divide(number):
    return 1 / number


async def app(scope, receive, send):
    await read_body(receive)
    try:
        divide(0)
    except ZeroDivisionError as error:
        raise LookupError("<script>document.title = 'taken'</script> in " + scope["path"]) from error
"""


def text_of(dom: str) -> str:
    """What stands on the page, without its elements."""
    return html.unescape(re.sub(r"<[^>]+>", "", dom))


async def test_an_error_while_developing_is_shown_with_its_file_and_line(tmp_path: Path) -> None:
    pytest.importorskip("watchfiles")
    (tmp_path / "broken.py").write_text(SOURCE)
    path = f"{tmp_path}/broken.py"
    async with serve_command(f"{path}:app", "--reload", "--control", "off", workers=1) as server:
        dom = await dump_dom(f"{server.url}/orders")
        picture = await screenshot(f"{server.url}/orders", tmp_path / "page.png")
    title = re.findall(r"<title>(.*?)</title>", dom)
    assert len(title) == 1
    assert title[0].startswith("LookupError: ")  # no script of the message's has run
    seen = text_of(dom.partition("<body>")[2])
    assert re.search(r"LookupError\s+<script>document\.title = 'taken'</script> in /orders", seen), seen
    assert re.search(r"caused by\s+ZeroDivisionError\s+division by zero", seen), seen
    for line, function in ((13, "app"), (11, "app"), (5, "divide")):
        assert f"{path}:{line} in {function}" in seen
    assert "return 1 / number" in seen
    assert picture.startswith(b"\x89PNG\r\n")
    assert len(picture) > 10_000  # a blank page has a tenth of that
