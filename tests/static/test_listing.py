"""The page of a directory: every name leads to its file, none does anything else, and nothing outside is told of."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import stat
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import pytest

from trioserve import StaticFiles
from trioserve.static import listing
from trioserve.static.listing import FIELDS, Entry, list_directory, listing_json, listing_page
from trioserve.static.text import name_as_text, size_as_text

from .asking import ask

NOON = 1_767_268_800  # 2026-01-01T12:00:00Z

# Each has, in some server, left its place in a page (CVE-2024-27306 for one), in a link or on a terminal.
NASTY = [
    b"<img src=0 onerror=alert(1)>.txt",
    b"<script>alert(1)<",
    b'" onmouseover="alert(1)',
    b"' autofocus onfocus='alert(1)",
    b"&lt;b&gt;&amp;&#60;",
    b"javascript:alert(1)",
    b"data:,x",
    b"http:",
    b"?query=1&x",
    b"#fragment",
    b"100%",
    b"%2e%2e",
    b"..%2f",
    b"back\\slash",
    b" leading and trailing ",
    b"two  spaces",
    b"new\nline",
    b"tab\tand\x1b[31mcolour\x7f",
    "übergröße 日本語 👩‍👩‍👧.txt".encode(),
    "\u202egpj.exe".encode(),
    "\u2028line".encode(),
    "עברית".encode(),
    b"caf\xe9",
    b"\xff\xfe",
    b"...",
    b"{rows}{0}",
    b"$1\\1",
    b"C:",
    b"semi;colon=1,2+3*~!'()@[]|^`",
    b"x" * 255,
]


def file(name: bytes, size: int = 0, modified: int = NOON) -> Entry:
    return Entry(name, False, size, modified)


def folder(name: bytes) -> Entry:
    return Entry(name, True, 4096, NOON)


class Page(HTMLParser):
    """What a browser makes of it: tags, links, and the text of each link."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.labels: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page.decode("utf-8"))
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self._open.append(tag)
        if tag == "a":
            self.links.append(dict(attrs)["href"] or "")
            self.labels.append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.text += data
        if "a" in self._open:
            self.labels[-1] += data


def list_of(directory: Path, **options) -> list[Entry]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return list_directory(fd, **{"dotfiles": False, **options})
    finally:
        os.close(fd)


def names(entries: list[Entry]) -> list[bytes]:
    return [entry.name for entry in entries]


# -- reading -------------------------------------------------------------------------------------------------


def test_files_and_directories_are_listed_with_what_there_is_to_know(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes(b"12345")
    os.utime(tmp_path / "a.txt", (NOON + 0.9, NOON + 0.9))
    sub, text = list_of(tmp_path)
    assert (sub.name, sub.is_directory) == (b"sub", True)
    assert text == Entry(b"a.txt", is_directory=False, size=5, modified=NOON)


def test_directories_come_first_and_numbers_in_their_order(tmp_path):
    for name in ("file10.txt", "File9.txt", "file1.txt", "b", "B", "a", "10", "9", "09", "9a", "état"):
        (tmp_path / name).touch()
    for name in ("zoo", "Alpha", "v10", "v9"):
        (tmp_path / name).mkdir()
    assert b" ".join(names(list_of(tmp_path))).decode() == (
        "Alpha v9 v10 zoo 09 9 9a 10 a B b file1.txt File9.txt file10.txt état"
    )


def test_digits_of_other_scripts_and_very_long_numbers_are_sorted_too(tmp_path):
    for name in ("1" * 255, "²", "٣", "x٣", "x3", "x²"):
        (tmp_path / name).touch()
    assert len(list_of(tmp_path)) == 6


def test_dotfiles_are_for_who_asks_for_them(tmp_path):
    for name in (".env", ".well-known", "seen"):
        (tmp_path / name).mkdir()
    assert names(list_of(tmp_path)) == [b"seen"]
    assert names(list_of(tmp_path, dotfiles=True)) == [b".env", b".well-known", b"seen"]


async def test_each_link_leads_to_what_is_served(tmp_path):
    for name in (b"a\\b", b"not\xffutf-8", b"new\nline", b"tab\t", b"del\x7f"):
        (tmp_path / os.fsdecode(name)).touch()
        (tmp_path / os.fsdecode(name + b"-directory")).mkdir()
    for name in ("?#%20", "C:", "~", " ", "ü", "\u202e", "&<>\"'", "a" * 255):
        (tmp_path / name).touch()
    app = StaticFiles(tmp_path, listing=True)
    found = json.loads((await ask(app, "/", headers=[("accept", "application/json")])).body)
    assert len(found) == 8
    for entry in found:
        assert (await ask(app, entry["url"].removeprefix("."))).status == 200
    app.close()


def test_pipes_sockets_and_links_are_not_listed(tmp_path):
    (tmp_path / "plain").touch()
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        (tmp_path / "outside").symlink_to("/etc/passwd")
        (tmp_path / "inside").symlink_to("plain")
        (tmp_path / "dangling").symlink_to("nowhere")
        assert names(list_of(tmp_path)) == [b"plain"]


def test_a_link_is_what_the_mount_says_it_is(tmp_path):
    target = tmp_path / "plain"
    target.write_bytes(b"123")
    for name in ("inside", "outside", "refused", "device"):
        (tmp_path / name).symlink_to("plain")
    device = os.stat("/dev/null")
    asked = []

    def look(name: bytes) -> os.stat_result | None:
        asked.append(name)
        if name == b"refused":
            raise PermissionError
        return {b"inside": target.stat(), b"device": device}.get(name)

    assert [(entry.name, entry.size) for entry in list_of(tmp_path, look=look)] == [
        (b"inside", 3),
        (b"plain", 3),
    ]
    assert sorted(asked) == [b"device", b"inside", b"outside", b"refused"]


def test_being_out_of_descriptors_is_not_taken_for_a_missing_file(tmp_path):
    (tmp_path / "link").symlink_to("x")

    def look(name: bytes) -> None:
        raise OSError(24, "Too many open files")

    with pytest.raises(OSError, match="Too many open files"):
        list_of(tmp_path, look=look)


def test_a_descriptor_can_be_listed_again_and_by_several_at_a_time(tmp_path):
    for number in range(300):
        (tmp_path / str(number)).touch()
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with os.scandir(fd) as other:
            next(other)
            assert len(list_directory(fd, dotfiles=False)) == 300
        assert len(list_directory(fd, dotfiles=False)) == 300
    finally:
        os.close(fd)


def test_a_list_has_its_bounds(tmp_path, monkeypatch):
    for number in range(30):
        (tmp_path / str(number)).touch()
        (tmp_path / f".{number}").touch()
    monkeypatch.setattr(listing, "MOST_ENTRIES", 20)
    assert len(list_of(tmp_path)) == 20
    assert b"Not more than 20 entries" in listing_page("/", list_of(tmp_path))
    monkeypatch.setattr(listing, "_MOST_NAMES", 5)
    assert len(list_of(tmp_path, dotfiles=True)) == 5


def test_an_unreadable_directory_is_an_error_of_the_system(tmp_path):
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        with pytest.raises(NotADirectoryError):
            list_directory(fd, dotfiles=False)
    finally:
        os.close(fd)


# -- the page ------------------------------------------------------------------------------------------------


def test_the_page_reads_as_a_table():
    page = Page(listing_page("/docs/v2/", [folder(b"images"), file(b"intro.html", 1536), file(b"empty")]))
    assert [line for line in page.text.split("\n") if line] == [
        "Index of /docs/v2/",
        "Index of /docs/v2/",
        "NameSizeModified (UTC)",
        "../",
        "images/2026-01-01 12:00",
        "intro.html1.5 KiB2026-01-01 12:00",
        "empty0 B2026-01-01 12:00",
        "1 folder · 2 files, 1.5 KiB",
    ]
    assert page.links == ["../../", "../", "../", "./images/", "./intro.html", "./empty"]


def test_exact_values_are_in_the_titles():
    page = listing_page("/", [file(b"a", 1_234_567)])
    assert b'title="1,234,567 bytes"' in page
    assert b'<time datetime="2026-01-01T12:00:00Z" title="2026-01-01T12:00:00Z">' in page


@pytest.mark.parametrize("path", ["", "/"])
def test_the_mounts_root_has_no_way_up(path):
    page = Page(listing_page(path, [file(b"a")]))
    assert page.links == ["./a"]
    assert page.text.split("\n")[5] == "Index of /"


def test_an_empty_directory_says_so():
    assert b"This folder is empty." in listing_page("/", [])
    assert Page(listing_page("/a", [])).links == ["../", "../"]


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("make", [file, folder])
def test_a_name_stays_text_and_its_link_leads_to_it(name, make):
    harmless = Page(listing_page("/", [make(b"a")]))
    page = Page(listing_page("/", [make(name)]))
    assert page.tags == harmless.tags
    assert page.attributes == harmless.attributes
    slash = "/" if make is folder else ""
    assert page.labels == [name_as_text(name) + slash]
    # As a browser resolves it against the page's own address.
    resolved = urllib.parse.urlsplit(urllib.parse.urljoin("https://h.test/mount/", page.links[0]))
    assert (resolved.scheme, resolved.netloc, resolved.query, resolved.fragment) == (
        "https",
        "h.test",
        "",
        "",
    )
    assert urllib.parse.unquote_to_bytes(resolved.path) == b"/mount/" + name + slash.encode()
    assert re.fullmatch(r"\./[A-Za-z0-9_.~%-]+/?", page.links[0])


@pytest.mark.parametrize("name", NASTY)
def test_a_name_in_the_path_stays_text(name):
    path = f"/{os.fsdecode(name)}/"
    harmless = Page(listing_page("/a/", [file(b"a")]))
    page = Page(listing_page(path, [file(b"a")]))
    assert (page.tags, page.attributes, page.links) == (harmless.tags, harmless.attributes, harmless.links)
    assert f"Index of /{name_as_text(name)}/" in page.text


@pytest.mark.parametrize(
    "text", ["</title><script>alert(1)", "</style><script>", "</a></h1><img src=x>", "//evil.test"]
)
def test_a_path_closes_nothing(text):
    harmless = Page(listing_page("/a/", [file(b"a")]))
    page = Page(listing_page(f"/{text}/", [file(b"a")]))
    assert set(page.tags) == set(harmless.tags)
    assert page.attributes == harmless.attributes
    assert set(page.links) <= {"../../../", "../../", "../", "./a"}
    assert f"Index of /{text.lstrip('/')}/" in page.text


def test_every_byte_that_a_name_can_hold_is_linked():
    every = bytes(byte for byte in range(1, 256) if byte != ord("/"))
    link = Page(listing_page("/", [file(every)])).links[0]
    assert urllib.parse.unquote_to_bytes(link) == b"./" + every


def test_nothing_that_turns_text_around_reaches_the_page():
    page = listing_page("/", [file(name) for name in NASTY]).decode()
    assert not set(page) & {*map(chr, range(9)), "\x1b", "\x7f", "\u202e", "\u2028"}
    assert "👩‍👩‍👧" in page


@pytest.mark.parametrize("modified", [-(2**62), 2**62, -62_135_596_801, 253_402_300_800])
def test_a_time_that_no_calendar_has_is_left_out(modified):
    page = listing_page("/", [file(b"a", modified=modified)])
    assert b"<time" not in page
    assert json.loads(listing_json([file(b"a", modified=modified)]))[0]["modified"] is None


def test_early_years_have_four_digits():
    assert b'datetime="0001-01-01T00:00:00Z"' in listing_page("/", [file(b"a", modified=-62_135_596_800)])


# -- what holds the browser ----------------------------------------------------------------------------------


def test_the_policy_lets_the_style_through_and_nothing_else():
    fields = dict(FIELDS)
    policy = fields[b"content-security-policy"].decode()
    page = listing_page("/<style>/", [file(name) for name in NASTY]).decode()
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy.split("; ")[:2] == ["default-src 'none'", f"style-src 'sha256-{digest}'"]
    assert "unsafe" not in policy
    assert fields[b"x-content-type-options"] == b"nosniff"
    # Style elsewhere than in that element would be without effect.
    assert "style" not in Page(page.encode()).attributes


# -- for programs --------------------------------------------------------------------------------------------


def test_json_has_the_same_for_programs():
    assert json.loads(listing_json([folder(b"a b"), file("ü.txt".encode(), 7)])) == [
        {"name": "a b", "url": "./a%20b/", "type": "directory", "modified": "2026-01-01T12:00:00Z"},
        {
            "name": "ü.txt",
            "url": "./%C3%BC.txt",
            "type": "file",
            "size": 7,
            "modified": "2026-01-01T12:00:00Z",
        },
    ]
    assert listing_json([]) == b"[]"


@pytest.mark.parametrize("name", NASTY)
def test_json_leads_to_any_name(name):
    (entry,) = json.loads(listing_json([file(name)]).decode("utf-8"))
    assert entry["name"] == name.decode("utf-8", "replace")
    assert urllib.parse.unquote_to_bytes(entry["url"]) == b"./" + name


# -- words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1_048_500, "1023.9 KiB"),
        (1_048_575, "1.0 MiB"),
        (5 * 1024**3, "5.0 GiB"),
        (2**63, "8.0 EiB"),
        (2**80, "1048576.0 EiB"),
    ],
)
def test_sizes_are_in_the_unit_that_suits_them(count, text):
    assert size_as_text(count) == text


def test_modes_of_a_listing_are_told_apart_by_the_system(tmp_path):
    """The entry's kind comes from its stat, not from its name."""
    (tmp_path / "dir.txt").mkdir()
    (entry,) = list_of(tmp_path)
    assert entry.is_directory
    assert stat.S_ISDIR((tmp_path / "dir.txt").stat().st_mode)
