"""What a directory holds, as a page for people and as JSON for programs.

Called by `handler.py`, where listing is on. `list_directory` reads the disk: it blocks, and runs in a thread that is
not abandoned, so that cancelling waits for it; it is bounded by `MOST_ENTRIES`. The rest is pure.

Names are whatever somebody has uploaded. In text they are escaped, in links each byte that is not harmless everywhere
is percent-encoded, so that any name leads to its file; and `FIELDS` has the browser run and load nothing on the page,
should that ever fail. All links are relative: a proxy may have put the mount elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from urllib.parse import quote

from trioserve.static.request_path import can_be_asked_for
from trioserve.static.text import name_as_text, size_as_text

#: A page of 10,000 lines is about 2.5 MB; whoever has more wants a search, not a list.
MOST_ENTRIES: Final = 10_000

# Names that are looked at, of which many may be hidden: bounds the time that a thread is taken up.
_MOST_NAMES: Final = 10 * MOST_ENTRIES


@dataclass(frozen=True, slots=True)
class Entry:
    """One file or directory of a listing.

    Attributes:
        name: as the file system has it, which need not be UTF-8.
        size: in bytes; of a directory, what the file system says, which means nothing to a reader.
        modified: seconds since the epoch.
    """

    name: bytes
    is_directory: bool
    size: int
    modified: int


# -- reading the disk ----------------------------------------------------------------------------------------


def list_directory(
    fd: int, *, dotfiles: bool, look: Callable[[bytes], os.stat_result | None] | None = None
) -> list[Entry]:
    """The regular files and directories of the directory `fd`, in the order they are shown; `MOST_ENTRIES` at most.

    Blocking. `fd` stays open and untouched, so that several threads may list it at a time.

    Args:
        fd: a descriptor of the directory, opened for reading or with O_PATH.
        dotfiles: whether names with a leading dot are listed. Others that no request can have are not in any case.
        look: what a symbolic link's name leads to, by the mount's policy, or None where the mount would not serve it.
            Without `look` links are left out: to follow one here would tell what lies outside.

    Raises:
        OSError: the directory cannot be read, or the process is out of descriptors.
    """
    # An own descriptor, since a duplicate would share its place in the directory with every other reader.
    own = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    try:
        with os.scandir(own) as names:
            seen = itertools.islice(names, _MOST_NAMES)
            found = list(itertools.islice(_entries(seen, dotfiles, look), MOST_ENTRIES))
    finally:
        os.close(own)
    found.sort(key=_sort_key)
    return found


def _entries(
    names: Iterable[os.DirEntry[str]], dotfiles: bool, look: Callable[[bytes], os.stat_result | None] | None
) -> Iterator[Entry]:
    for item in names:
        name = os.fsencode(item.name)
        if not can_be_asked_for(name, dotfiles=dotfiles):
            continue
        try:
            if item.is_symlink():
                found = look(name) if look is not None else None
            else:
                found = item.stat(follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue  # gone since, or none of our business
        if found is None:
            continue
        is_directory = stat.S_ISDIR(found.st_mode)
        if is_directory or stat.S_ISREG(found.st_mode):
            yield Entry(name, is_directory, found.st_size, int(found.st_mtime))


_NUMBERS: Final = re.compile("([0-9]+)")


def _sort_key(entry: Entry) -> tuple[bool, list[str | int], bytes]:
    """Directories first; then as people order names: "file9" before "file10", "a" beside "A"."""
    parts = _NUMBERS.split(entry.name.decode("utf-8", "replace").casefold())
    # Every second part is a number, so that only likes are compared.
    natural = [int(part) if index % 2 else part for index, part in enumerate(parts)]
    return not entry.is_directory, natural, entry.name


# -- what goes out -------------------------------------------------------------------------------------------

_STYLE: Final = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
:root { --dim: #636c76; --line: #8883; --link: #0a58ca; }
@media (prefers-color-scheme: dark) { :root { --dim: #9aa4ae; --link: #7ab7ff; } }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.25rem; font-weight: 600; line-height: 1.35; margin: 0 0 1rem; overflow-wrap: anywhere; }
h1 span { color: var(--dim); font-weight: 400; }
a { color: var(--link); text-decoration: none; }
a:hover, a:focus-visible { text-decoration: underline; }
table { border-collapse: collapse; width: 100%; }
th { color: var(--dim); font-size: .85rem; font-weight: 500; text-align: left; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .75rem .35rem 0; vertical-align: baseline; }
tbody tr:hover { background: #8881; }
td:first-child { overflow-wrap: anywhere; white-space: break-spaces; width: 100%; }
td:first-child a { display: block; }
.directory a { font-weight: 600; }
.size { text-align: right; }
td.size, td.time { color: var(--dim); font-size: .9rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.time { padding-right: 0; }
p { color: var(--dim); font-size: .9rem; }
@media (max-width: 36rem) {
  body { margin: 1rem auto; }
  thead { display: none; }
  tr { border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; padding: .45rem 0; }
  td { border: 0; padding: 0 .75rem 0 0; }
  td:first-child { padding-right: 0; }
  td.size:empty { display: none; }
}
"""

_STYLE_HASH: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest())

#: Types of the two forms.
HTML: Final = b"text/html; charset=utf-8"
JSON: Final = b"application/json; charset=utf-8"

#: Header fields of either form, besides its type and Vary. It has no validator, so that it is asked for each time.
FIELDS: Final[tuple[tuple[bytes, bytes], ...]] = (
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'sha256-%b'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        % _STYLE_HASH,
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-cache"),
)

_PAGE: Final = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{heading}</h1>
{table}<p>{summary}</p>
</body>
</html>
"""

_TABLE: Final = """\
<table>
<thead><tr><th scope="col">Name</th><th scope="col" class="size">Size</th><th scope="col" class="time">Modified (UTC)\
</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
"""

_PARENT: Final = (
    '<tr class="directory"><td><a href="../">../</a></td><td class="size"></td><td class="time"></td></tr>'
)


def listing_page(path: str, entries: Sequence[Entry]) -> bytes:
    """The page of the directory at `path`, in HTML.

    Args:
        path: where it lies below the mount, decoded, "/" being the mount's root; as `os.fsdecode` or UTF-8 gives it. It
            is only shown: no link depends on it, but for the number of its segments.
        entries: as `list_directory` gives them.
    """
    segments = [name_as_text(segment) for segment in path.split("/") if segment]
    rows = [_PARENT] if segments else []
    rows += map(_row, entries)
    page = _PAGE.format(
        title=html.escape("Index of /" + "".join(f"{segment}/" for segment in segments)),
        style=_STYLE,
        heading=_heading(segments),
        table=_TABLE.format(rows="\n".join(rows)) if rows else "",
        summary=_summary(entries),
    )
    return page.encode("utf-8")


def _heading(segments: Sequence[str]) -> str:
    """The path, each directory above this one a link."""
    parts = []
    for index, text in enumerate(["", *segments]):
        up = len(segments) - index
        label = f"<bdi>{html.escape(text)}</bdi>/" if text else "/"
        parts.append(f'<a href="{"../" * up}">{label}</a>' if up else label)
    return "<span>Index of</span> " + "".join(parts)


def _row(entry: Entry) -> str:
    slash = "/" if entry.is_directory else ""
    # `bdi`: a name in Arabic must not turn the slash behind it, nor the line, around.
    link = f'<a href="{_link(entry)}"><bdi>{html.escape(name_as_text(entry.name))}</bdi>{slash}</a>'
    size = f'<td class="size" title="{entry.size:,} bytes">{size_as_text(entry.size)}</td>'
    if entry.is_directory:
        size = '<td class="size"></td>'
    kind = ' class="directory"' if entry.is_directory else ""
    return f'<tr{kind}><td>{link}</td>{size}<td class="time">{_time_tag(entry.modified)}</td></tr>'


def _link(entry: Entry) -> str:
    # With "./" no name is taken for a scheme, a host or a query.
    return f"./{quote(entry.name, safe='')}{'/' if entry.is_directory else ''}"


def _time_tag(modified: int) -> str:
    exact = _time(modified)
    if exact is None:
        return ""
    return f'<time datetime="{exact}" title="{exact}">{exact[:10]} {exact[11:16]}</time>'


def _time(modified: int) -> str | None:
    """In RFC 3339's form; None for what no calendar knows, which file systems may hold all the same."""
    try:
        return datetime.fromtimestamp(modified, UTC).strftime("%Y-%m-%dT%H:%M:%SZ").zfill(20)
    except (ValueError, OverflowError, OSError):
        return None


def _summary(entries: Sequence[Entry]) -> str:
    if len(entries) >= MOST_ENTRIES:
        return f"Not more than {MOST_ENTRIES:,} entries are shown."
    files = [entry for entry in entries if not entry.is_directory]
    parts = []
    if len(files) < len(entries):
        parts.append(_counted(len(entries) - len(files), "folder"))
    if files:
        parts.append(f"{_counted(len(files), 'file')}, {size_as_text(sum(entry.size for entry in files))}")
    return " · ".join(parts) or "This folder is empty."


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listing_json(entries: Iterable[Entry]) -> bytes:
    """The same as an array of objects: name, url, type, modified and, of files, size.

    `url` is relative to the directory's own, and exact; of a name that is not UTF-8 `name` is what can be shown.
    """
    return json.dumps([_as_json(entry) for entry in entries], ensure_ascii=False).encode("utf-8")


def _as_json(entry: Entry) -> dict[str, str | int | None]:
    shown: dict[str, str | int | None] = {
        "name": entry.name.decode("utf-8", "replace"),
        "url": _link(entry),
        "type": "directory" if entry.is_directory else "file",
    }
    if not entry.is_directory:
        shown["size"] = entry.size
    return shown | {"modified": _time(entry.modified)}
