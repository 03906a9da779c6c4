"""Build the site, once: Markdown becomes pages, assets get their content's hash into their names, all is compressed.

    python -m examples.docs_site.build [OUT]

What it teaches: what can be done before the first request should not be done in one. What comes out are files that
`StaticFiles` sends as they are (see `app.py`), and that any other file server can send as well:

- An asset whose name changes with its content may be kept by browsers for good. Only pages have to be asked for again.
- No page holds a style, a script or an event handler of its own, so the Content-Security-Policy can forbid them all.
- The same sources give the same bytes, and a file that would not change is not written: its ETag holds, and a visitor
  who has it is told so after a rebuild too.
- A link to a page or heading that is not there fails the build, not the visitor.

Each file is replaced whole, so the folder may be served while it is built. What an earlier build has written and this
one does not stays: a page that somebody has open still asks for the assets it names.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from markdown_it import MarkdownIt
from markdown_it.token import Token

from examples.docs_site import OUT
from trioserve.static.precompress import run_precompress

SOURCES = Path(__file__).parent

# The pages in the order of the navigation: `pages/NAME.md` is served as /NAME/, and the first as /.
PAGES = ("index", "use", "workers", "timeouts", "errors")

# Digits of the hash in an asset's name: 48 bits tell apart all the versions a file will ever have.
HASH_DIGITS = 12

NOT_FOUND = (
    "<h1>Not found</h1>\n<p>There is no page of this name. Those there are stand in the list beside this.</p>"
)


class BrokenPage(Exception):
    """A page cannot be built; the message names it and says what to change."""


@dataclass(frozen=True)
class Page:
    """A parsed page: its place, its title and its content before links are resolved."""

    path: str
    title: str
    anchors: frozenset[str]
    tokens: list[Token]


def main(arguments: list[str]) -> int:
    """Build into the folder that is named, or into `OUT`."""
    if len(arguments) > 1 or (arguments and arguments[0].startswith("-")):
        print(
            f"usage: python -m examples.docs_site.build [OUT]   (OUT is {OUT} unless named)", file=sys.stderr
        )
        return 2
    out = Path(arguments[0]) if arguments else OUT
    try:
        build(out)
    except BrokenPage as broken:
        print(f"not built: {broken}", file=sys.stderr)
        return 1
    return run_precompress([str(out), "--quiet"])


def build(out: Path, sources: Path = SOURCES) -> None:
    """Write the whole site, uncompressed, into `out`."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    pages = {name: read_page(markdown, name, sources / "pages" / f"{name}.md") for name in PAGES}
    assets = write_assets(sources / "assets", out)
    template = Template((sources / "template.html").read_text(encoding="utf-8"))
    for name, page in pages.items():
        resolve_links(name, pages)
        content = markdown.renderer.render(page.tokens, markdown.options, {})
        title = page.title if page.path == "/" else f"{page.title} - trioserve"
        html = fill_in(template, title, content, navigation(pages, page.path), assets)
        write(out / page.path.strip("/") / "index.html", html)
    write(out / "404.html", fill_in(template, "Not found - trioserve", NOT_FOUND, navigation(pages), assets))


# -- pages ---------------------------------------------------------------------------------------------------


def read_page(markdown: MarkdownIt, name: str, source: Path) -> Page:
    """Parse a page, and give its headings names to link to."""
    tokens = markdown.parse(source.read_text(encoding="utf-8"))
    title, anchors = "", set()
    for heading, inline in itertools.pairwise(tokens):
        if heading.type != "heading_open":
            continue
        text = "".join(part.content for part in inline.children or ())
        anchor = re.sub(r"\W+", "-", text.lower()).strip("-")
        if anchor in anchors:
            raise BrokenPage(f"{source} has two headings {text!r}: a link could mean either, rename one")
        anchors.add(anchor)
        heading.attrSet("id", anchor)
        if heading.tag == "h1":
            title = text
    if not title:
        raise BrokenPage(f"{source} has no title: begin it with a line such as '# Workers'")
    return Page("/" if name == PAGES[0] else f"/{name}/", title, frozenset(anchors), tokens)


def resolve_links(name: str, pages: dict[str, Page]) -> None:
    """Let links from page to page, `other.md#heading` as in the sources, lead to where the pages are served."""
    for block in pages[name].tokens:
        for token in block.children or ():
            href = str(token.attrGet("href") or "")
            if token.type != "link_open" or re.match(r"[a-z]+:", href):
                continue
            file, _, anchor = href.partition("#")
            target = pages.get(file.removesuffix(".md") if file else name)
            if target is None or (anchor and anchor not in target.anchors):
                raise BrokenPage(
                    f"{name}.md links to {href}, which is not there: write PAGE.md or PAGE.md#heading"
                )
            token.attrSet("href", (target.path if file else "") + (f"#{anchor}" if anchor else ""))


def navigation(pages: dict[str, Page], current: str = "") -> str:
    """The list of all pages, with the one that is read marked for eyes and screen readers."""
    lines = []
    for page in pages.values():
        mark = ' aria-current="page"' if page.path == current else ""
        lines.append(f'<li><a href="{page.path}"{mark}>{escape(page.title)}</a></li>')
    return "\n".join(lines)


def fill_in(template: Template, title: str, content: str, links: str, assets: dict[str, str]) -> bytes:
    """One whole page."""
    return template.substitute(
        assets, title=escape(title), content=content.strip(), navigation=links
    ).encode()


# -- files ---------------------------------------------------------------------------------------------------


def write_assets(sources: Path, out: Path) -> dict[str, str]:
    """Write each asset under its hashed name; `site.css` is then `$site_css` in the template."""
    paths = {}
    for source in sorted(sources.iterdir()):
        content = source.read_bytes()
        digest = hashlib.sha256(content).hexdigest()[:HASH_DIGITS]
        name = f"{source.stem}.{digest}{source.suffix}"
        write(out / "assets" / name, content)
        paths[source.name.replace(".", "_")] = f"/assets/{name}"
    return paths


def write(path: Path, content: bytes) -> None:
    """Put `content` into place whole, or leave the file alone if it has it already."""
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")  # a dot name: never served
    part.write_bytes(content)
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
