"""`examples/docs_site/build.py`: what it writes is whole, safe to keep and the same each time; what is broken fails.

How the site is served is in `test_examples.py`, how it looks in `e2e/test_docs_site.py`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("markdown_it")

from examples.docs_site import build
from trioserve.config.settings import BY_NAME, default_with_unit

from .e2e.process import run_to_end


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "site"
    assert build.main([str(out)]) == 0
    return out


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """The sources, to be broken."""
    return Path(shutil.copytree(build.SOURCES, tmp_path / "sources"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text inside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""
        self._page = page
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.cdata_elem:
            self.inline += data

    def links_in(self, tag: str) -> list[str]:
        """Where the links of the only element of this kind lead."""
        (part,) = re.findall(rf"<{tag}\b.*?</{tag}>", self._page, re.DOTALL)
        return Elements(part).values("href")

    def values(self, name: str) -> list[str]:
        return [attributes[name] or "" for _tag, attributes in self.elements if name in attributes]


def pages(site: Path) -> dict[str, Elements]:
    """Each page by the path it is served as."""
    found = {}
    for path in sorted(site.rglob("*.html")):
        place = "/" + str(path.relative_to(site)).removesuffix("index.html")
        found[place] = Elements(path.read_text(encoding="utf-8"))
    return found


def test_every_source_is_a_page_and_a_line_of_the_navigation(site):
    assert {path.stem for path in (build.SOURCES / "pages").glob("*.md")} == set(build.PAGES)
    places = ["/", *(f"/{name}/" for name in build.PAGES[1:])]
    assert set(pages(site)) == {*places, "/404.html"}
    for place, page in pages(site).items():
        assert page.links_in("nav") == places
        assert page.values("aria-current") == ([] if place == "/404.html" else ["page"])


def test_all_links_and_assets_lead_somewhere(site):
    found = pages(site)
    for place, page in found.items():
        for link in page.values("href") + page.values("src"):
            path, _, anchor = link.partition("#")
            if path.startswith("https:"):
                continue
            if path.startswith("/assets/"):
                assert (site / path.lstrip("/")).is_file(), link
                continue
            assert (path or place) in found, (place, link)
            assert not anchor or anchor in found[path or place].values("id"), (place, link)


def test_an_assets_name_holds_the_hash_of_its_content(site):
    names = [path.name for path in (site / "assets").iterdir() if path.suffix[1:] in ("css", "js", "svg")]
    assert len(names) == 3
    for name in names:
        digest = hashlib.sha256((site / "assets" / name).read_bytes()).hexdigest()
        assert name.split(".")[1] == digest[: build.HASH_DIGITS]


def test_no_page_has_a_style_or_script_of_its_own(site):
    for page in pages(site).values():
        assert page.inline == ""
        names = {name for _tag, attributes in page.elements for name in attributes}
        assert "style" not in names
        assert not [name for name in names if name.startswith("on")]
        assert "style" not in {tag for tag, _attributes in page.elements}
        assert not [link for link in page.values("href") if link.startswith("javascript:")]


def test_what_shrinks_lies_beside_its_compressed_variants(site):
    names = set(files(site))
    for name in ("index.html", "use/index.html", *(name for name in names if name.endswith(".css"))):
        assert {name + ".br", name + ".gz"} <= names
    assert not [name for name in names if re.search(r"\.svg\.", name)]


async def test_the_command_builds_the_same_bytes_again(site, tmp_path):
    """In another process and folder, with another seed for hashes."""
    command = (sys.executable, "-W", "error", "-m", "examples.docs_site.build", str(tmp_path / "again"))
    process = await run_to_end(*command, env={"PYTHONHASHSEED": "4"})
    assert process.returncode == 0, process.stderr.text
    assert process.stderr.text == process.stdout.text == ""
    assert files(tmp_path / "again") == files(site)


def test_what_has_not_changed_is_not_touched(sources, tmp_path):
    out = tmp_path / "out"
    build.build(out, sources)
    for path in out.rglob("*"):
        os.utime(path, (1, 1))
    page = sources / "pages" / "use.md"
    page.write_text(page.read_text() + "\nOne line more.\n")
    style = sources / "assets" / "site.css"
    before = set(files(out))
    build.build(out, sources)
    assert [path for path in out.rglob("*") if path.is_file() and path.stat().st_mtime > 1] == [
        out / "use" / "index.html"
    ]
    # Another stylesheet is another file, and all pages refer to it; the one before stays for who has a page open.
    style.write_text(style.read_text() + "\n/* one line more */\n")
    build.build(out, sources)
    (added,) = set(files(out)) - before
    assert re.fullmatch(r"assets/site\.[0-9a-f]{12}\.css", added)
    for place in pages(out).values():
        assert "/" + added in place.values("href")


@pytest.mark.parametrize("link", ["elsewhere.md", "workers.md#elsewhere", "#elsewhere", "/workers/"])
def test_a_link_that_leads_nowhere_fails_the_build_and_is_named(sources, tmp_path, link):
    page = sources / "pages" / "use.md"
    page.write_text(page.read_text() + f"\n[there]({link})\n")
    with pytest.raises(build.BrokenPage, match=rf"use\.md links to {re.escape(link)}, "):
        build.build(tmp_path / "out", sources)


def test_a_page_without_a_title_and_headings_of_one_name_fail_the_build(sources, tmp_path):
    page = sources / "pages" / "use.md"
    page.write_text("No title.\n")
    with pytest.raises(build.BrokenPage, match=r"use\.md has no title"):
        build.build(tmp_path / "out", sources)
    page.write_text("# Use\n\n## It\n\n## It\n")
    with pytest.raises(build.BrokenPage, match="two headings 'It'"):
        build.build(tmp_path / "out", sources)


def test_text_stays_text(sources, tmp_path):
    """Whoever writes pages writes Markdown, and no HTML."""
    for page in (sources / "pages").iterdir():
        page.write_text("# <b> & $title\n\n<script>alert(1)</script> [x](javascript:alert)\n")
    build.build(tmp_path / "out", sources)
    text = (tmp_path / "out" / "use" / "index.html").read_text()
    assert "<title>&lt;b&gt; &amp; $title - trioserve</title>" in text
    assert "&lt;script&gt;alert(1)" in text
    assert 'href="javascript:' not in text


def test_the_timeouts_page_names_settings_and_their_defaults():
    text = (build.SOURCES / "pages" / "timeouts.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [\w ]+ \| `(\w+)` \| ([^|]+) \|", text, re.MULTILINE)
    assert len(rows) == 7
    for name, default in rows:
        assert default == default_with_unit(BY_NAME[name]), name


@pytest.mark.parametrize("arguments", [["--help"], ["a", "b"]])
def test_wrong_arguments_are_answered_with_the_usage(arguments, capsys):
    assert build.main(arguments) == 2
    assert "usage: python -m examples.docs_site.build [OUT]" in capsys.readouterr().err


def test_a_broken_page_is_an_exit_code_and_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build, "PAGES", ("index",))  # it links to the others
    assert build.main([str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("not built: index.md links to use.md, which is not there")
