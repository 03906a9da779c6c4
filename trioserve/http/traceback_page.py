"""What the author of an app is shown in place of a bare 500: the exception with its source, as HTML or plain text.

`http1.py` asks for it in development only (`use_reloader`) and imports this file then; nothing of it is loaded in
production. Synchronous, bounded in size, and it never raises: what cannot be shown is left out, and the page says so.

The walk over groups and causes, and what becomes of secrets in messages, is that of crash reports
(`structure/error_tree.py`). No local variables are shown. All text is escaped, the page loads nothing and runs nothing,
and `FIELDS` has the browser hold it to that: messages and source may hold what a visitor of the app has sent.
"""

from __future__ import annotations

import base64
import hashlib
import html
import linecache
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trioserve.http.http_exchange import intact
from trioserve.structure.error_tree import cut, describe_error, rank_of_file

# Of one page. A browser shows it at once, and a terminal's scroll-back holds it.
SIZE_LIMIT = 256 * 1024

# Lines of source before and behind the one that was running, and characters of each.
_CONTEXT = 5
_LINE_LIMIT = 200
_NAME_LIMIT = 300

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.1rem; font-weight: normal; margin: 0 0 1.5rem; }
h2 { font-size: 1.25rem; margin: 0; }
pre, code { font: 13px/1.5 ui-monospace, monospace; }
pre { margin: .4rem 0; overflow-x: auto; white-space: pre; }
pre.message { font-size: 15px; white-space: pre-wrap; overflow-wrap: anywhere; }
section { border-left: 4px solid #c33; margin: 1.2rem 0; padding: .1rem 0 .1rem 1rem; }
section section { border-color: #b80; }
summary { cursor: pointer; overflow-wrap: anywhere; }
details { margin: .25rem 0; opacity: .65; }
details[open] { opacity: 1; }
details.app > summary { font-weight: bold; }
details.app { background: #8881; border-radius: 4px; padding: .3rem .6rem; }
.here { background: #e942; display: inline-block; font-weight: bold; min-width: 100%; }
.relation, .note { opacity: .8; }
"""

_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest())

#: Header fields of the page besides its type.
FIELDS = (
    b"cache-control: no-store\r\n"
    b"content-security-policy: default-src 'none'; style-src 'sha256-%b'; base-uri 'none'; form-action 'none'; "
    b"frame-ancestors 'none'\r\n"
    b"referrer-policy: no-referrer\r\n"
    b"vary: accept\r\n"
    b"x-content-type-options: nosniff\r\n"
) % _STYLE_HASH

_HTML = b"text/html; charset=utf-8"
_PLAIN = b"text/plain; charset=utf-8"

# What would move a terminal's cursor, or show a line in another order than it has, becomes a mark.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

_RELATIONS = {"cause": "caused by", "context": "while handling"}


def traceback_page(
    error: BaseException, title: str, request: str, fields: Iterable[tuple[bytes, bytes]]
) -> tuple[bytes, bytes]:
    """The content type and the body for `error`.

    Args:
        error: as the boundary has judged it.
        title: what happened, in the boundary's words.
        request: its method and path.
        fields: the request's header fields: HTML is for those who name it in Accept, which browsers do.
    """
    as_html = accepts_html(fields)
    form = _html_page if as_html else _plain_page
    try:
        body = form(describe_error(error), title, request)
    except Exception as problem:
        body = form(
            {"type": type(error).__name__, "message": f"(it cannot be shown: {type(problem).__name__})"},
            title,
            request,
        )
    return (_HTML if as_html else _PLAIN), body.encode("utf-8", "backslashreplace")


def accepts_html(fields: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether Accept names HTML and does not rule it out; `*/*` is what programs say."""
    for name, value in intact(fields):
        if name.lower() != b"accept":
            continue
        for choice in value.lower().split(b","):
            kind, _, parameters = choice.replace(b" ", b"").partition(b";")
            if kind in (b"text/html", b"application/xhtml+xml"):
                return not re.search(rb"(?:^|;)q=0(?:\.0*)?(?:;|$)", parameters)
    return False


# -- frames, for both forms ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Frame:
    """One line of a traceback: where, and the source around it as (number, text)."""

    place: str
    line: int
    function: str
    source: Sequence[tuple[int, str]]
    is_apps: bool


def _frames(found: dict[str, Any]) -> Iterator[_Frame | str]:
    """The frames of one exception, outermost first; text where some are missing."""
    entries = found.get("frames", ())
    ranks = [rank_of_file(entry["file"]) if "file" in entry else -1 for entry in entries]
    # Without any code of the app's own, the innermost frame is the one to look at.
    best = max(ranks, default=0)
    own = {index for index, rank in enumerate(ranks) if best > 0 and rank == best} or {len(ranks) - 1}
    for index, entry in enumerate(entries):
        if "file" not in entry:
            yield f"{entry.get('left_out')} more frames"
            continue
        line = entry["line"] or 0
        yield _Frame(
            _one_line(entry["file"]), line, _one_line(entry["function"]), _source(entry, line), index in own
        )


def _source(entry: dict[str, Any], line: int) -> list[tuple[int, str]]:
    lines = linecache.getlines(entry["file"])
    if not 0 < line <= len(lines):
        return [(line, _printable(entry["code"]))] if entry["code"] else []
    first = max(1, line - _CONTEXT)
    return [
        (first + index, _printable(cut(text.rstrip("\r\n").expandtabs(4), _LINE_LIMIT)))
        for index, text in enumerate(lines[first - 1 : line + _CONTEXT])
    ]


def _remarks(found: dict[str, Any]) -> Iterator[str]:
    """What else there is to say of one exception, a line each."""
    for note in found.get("notes", ()):
        yield _printable(note)
    for name, value in found.get("cancelled", {}).items():
        if value:
            yield f"{name.replace('_', ' ')}: {_one_line(value)}"
    if "seen" in found:
        yield f"({found['seen']})"
    if "left_out" in found:
        members = found.get("members")
        yield (
            f"{found['left_out']} of {members} exceptions are not shown"
            if members
            else f"({found['left_out']})"
        )


def _inner(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The exceptions behind and inside one, each with its relation to it."""
    for relation, words in _RELATIONS.items():
        if relation in found:
            yield words, found[relation]
    for number, member in enumerate(found.get("exceptions", ()), 1):
        times = f", {member['count']} times" if member.get("count", 1) > 1 else ""
        yield f"in the group, no. {number}{times}", member


def _printable(text: str) -> str:
    return _UNPRINTABLE.sub("\ufffd", text)


def _one_line(text: str) -> str:
    return _printable(" ".join(cut(text, _NAME_LIMIT).split()))


class _Budget:
    """Text that stops growing at a size.

    Attributes:
        full: something was left out.
    """

    def __init__(self, size: int) -> None:
        self.full = False
        self._left = size
        self._parts: list[str] = []

    def add(self, text: str, closing: str = "") -> bool:
        """Take it, if it fits together with what `close` will add; False if not."""
        size = len(text.encode("utf-8", "backslashreplace")) + len(closing)
        if size > self._left:
            self.full = True
            return False
        self._left -= size
        self._parts.append(text)
        return True

    def close(self, closing: str) -> None:
        """Add what was set aside for."""
        self._parts.append(closing)

    def text(self) -> str:
        """All of it."""
        return "".join(self._parts)


# -- HTML ----------------------------------------------------------------------------------------------------

_HTML_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{summary}</title>
<style>{style}</style>
</head>
<body>
<h1>500 for <code>{request}</code>: {title}</h1>
"""

_HTML_END = """{remark}<p class="note">The innermost call comes last; the app's own code is unfolded. This page is shown
because the server runs with <code>--reload</code>; without it, clients see nothing but the status.</p>
</body>
</html>
"""

_LEFT_OUT = f"Something was left out: this is limited to {SIZE_LIMIT // 1024} KiB. The log has all of it."


def _html_page(tree: dict[str, Any], title: str, request: str) -> str:
    summary = f"{_one_line(tree['type'])}: {_one_line(tree['message'])}"
    head = _HTML_HEAD.format(
        summary=_escape(summary), style=_STYLE, request=_escape(_one_line(request)), title=_escape(title)
    )
    remark = f'<p class="note">{_escape(_LEFT_OUT)}</p>\n'
    body = _Budget(SIZE_LIMIT - len(head.encode("utf-8", "backslashreplace")) - len(_HTML_END) - len(remark))
    _html_error(body, tree, "")
    return head + body.text() + _HTML_END.format(remark=remark if body.full else "")


def _html_error(page: _Budget, found: dict[str, Any], relation: str) -> None:
    opening = ["<section>\n"]
    if relation:
        opening.append(f'<p class="relation">{_escape(relation)}</p>\n')
    opening.append(f"<h2>{_escape(_one_line(found['type']))}</h2>\n")
    if found.get("message"):
        opening.append(f'<pre class="message">{_escape(_printable(found["message"]))}</pre>\n')
    opening += [f'<p class="note">{_escape(remark)}</p>\n' for remark in _remarks(found)]
    if not page.add("".join(opening), "</section>\n"):
        return
    for frame in _frames(found):
        page.add(f'<p class="note">{_escape(frame)}</p>\n' if isinstance(frame, str) else _html_frame(frame))
    for words, inner in _inner(found):
        _html_error(page, inner, words)
    page.close("</section>\n")


def _html_frame(frame: _Frame) -> str:
    lines = []
    for number, text in frame.source:
        line = _escape(f"{number:>5}  {text}")
        lines.append(f'<span class="here">{line}</span>' if number == frame.line else line)
    kind = 'class="app" open' if frame.is_apps else 'class="library"'
    place = f"<code>{_escape(frame.place)}</code>:{frame.line} in <code>{_escape(frame.function)}</code>"
    source = "\n".join(lines)
    return f"<details {kind}><summary>{place}</summary><pre>{source}</pre></details>\n"


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


# -- plain text ----------------------------------------------------------------------------------------------


def _plain_page(tree: dict[str, Any], title: str, request: str) -> str:
    head = f"500 for {_one_line(request)}: {title}\n\n"
    end = "\n(Shown because the server runs with --reload.)\n"
    page = _Budget(SIZE_LIMIT - len(head.encode("utf-8", "backslashreplace")) - len(end) - len(_LEFT_OUT) - 1)
    _plain_error(page, tree, "", "")
    return head + page.text() + (f"{_LEFT_OUT}\n" if page.full else "") + end


def _plain_error(page: _Budget, found: dict[str, Any], relation: str, indent: str) -> None:
    message = _printable(found.get("message", "")).replace("\n", f"\n{indent}  ")
    lines = [
        f"{relation}{': ' if relation else ''}{_one_line(found['type'])}{': ' if message else ''}{message}"
    ]
    lines += [f"  {line}" for remark in _remarks(found) for line in remark.split("\n")]
    if not page.add("".join(f"{indent}{line}\n" for line in lines)):
        return
    for frame in _frames(found):
        if isinstance(frame, str):
            page.add(f"{indent}  ... {frame}\n")
            continue
        code = next((text.strip() for number, text in frame.source if number == frame.line), "")
        mark = ">" if frame.is_apps else " "
        page.add(f"{indent}{mark} {frame.place}:{frame.line} in {frame.function}\n{indent}      {code}\n")
    for words, inner in _inner(found):
        _plain_error(page, inner, words, f"{indent}  ")
