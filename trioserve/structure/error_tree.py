"""Exceptions as bounded, plain values: what the crash report shows of an error, and its signature.

Used by `crash_report.py` and, for signatures, by the boundary. An error may be anything: groups of 10,000,
causes in a circle, a thousand frames, a `__str__` that raises. `traceback.TracebackException` would follow
all of it before any limit could apply, so the walk is ours and only the reading of frames is the standard
library's; no locals are ever looked at.

Messages are kept, since a report without them is of little use, but cut at `MESSAGE_LIMIT` and passed through
`redact()`: passwords and queries of URLs, and values that follow words such as `password=` or `token:`. That
is a net for accidents, no guarantee: an app that puts secrets into messages in other shapes will find them in
reports.
"""

from __future__ import annotations

import itertools
import re
import sysconfig
import traceback
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

import trio

# Characters of one message: enough for any sentence, too little for a whole request body.
MESSAGE_LIMIT = 500
# Exceptions described in one tree, groups and causes together.
MOST_EXCEPTIONS = 60
# Groups within groups, and causes of causes; a group's members each count one more.
DEEPEST = 12
# Members of a group that are looked at to find out which are alike.
MOST_MEMBERS = 1000
# Frames of one traceback: a RecursionError has a thousand, and they are all alike.
OUTER_FRAMES = 5
INNER_FRAMES = 25
# Steps to find the leaf of a group in which nearly everything is a Cancelled: 2 ms.
LONGEST_WALK = 20_000

# Packages whose frames are never the app's, wherever they are installed: a deployed app may itself live in
# site-packages, so the folder alone does not tell.
FRAMEWORKS = frozenset({
    "a2wsgi", "anyio", "asgiref", "blacksheep", "django", "exceptiongroup", "fastapi", "flask", "gunicorn_h1c",
    "h11", "h2", "httptools", "hypercorn", "jinja2", "litestar", "outcome", "pydantic", "quart", "sniffio", "starlette",
    "trio", "trioserve", "werkzeug", "wsproto",
})  # fmt: skip


def describe_error(error: BaseException) -> dict[str, Any]:
    """The error with its causes and, for a group, its members; equal members once, with a count."""
    return _describe(error, DEEPEST, itertools.count(1), set())


def signature(error: BaseException, *, most: int = LONGEST_WALK) -> str:
    """`type at file:line` of the app's innermost frame: equal for what is probably the same bug.

    Of a group, the first leaf that is not a `Cancelled`, within `most` steps. "The app's" is whatever is
    neither the standard library nor installed; failing that, installed but no framework that we know; failing
    that, the innermost of all.
    """
    leaf = find_leaf(error, most=most)
    found = innermost_app_frame(leaf.__traceback__)
    return f"{type_name(leaf)} at {f'{found[0]}:{found[1]}' if found else 'no traceback'}"


def innermost_app_frame(tb: TracebackType | None) -> tuple[str, int, str] | None:
    """File, line and function; "the app's" as in `signature`."""
    best: tuple[str, int, str] | None = None
    best_rank = -1
    for current in _walk(tb):
        code = current.tb_frame.f_code
        rank = _rank(code)
        if rank >= best_rank:  # >=: later in the list is further in
            best_rank, best = rank, (code.co_filename, current.tb_lineno, code.co_qualname)
    return best


def stack_as_traceback(
    frame: FrameType, outermost: FrameType | None = None, *, most: int = INNER_FRAMES
) -> TracebackType | None:
    """The stack of a thread that raises nothing, for an exception that stands for what it is doing.

    Args:
        frame: the innermost.
        outermost: where it begins to be of interest, if that is known.
        most: frames, counted from the innermost.
    """
    tb = None
    current: FrameType | None = frame
    for _ in range(most):
        if current is None:
            break
        tb = TracebackType(tb, current, current.f_lasti, current.f_lineno or current.f_code.co_firstlineno)
        current = None if current is outermost else current.f_back
    return tb


def find_leaf(error: BaseException, *, most: int = LONGEST_WALK) -> BaseException:
    """The first exception in a group that is not itself a group, and no `Cancelled` if there is another."""
    first: BaseException | None = None
    levels = [iter((error,))]
    for _ in range(most):
        current = next(levels[-1], None)
        if current is None:
            levels.pop()
            if not levels:
                break
        elif isinstance(current, BaseExceptionGroup):
            levels.append(iter(current.exceptions))
        elif isinstance(current, trio.Cancelled):
            first = first or current
        else:
            return current
    return first or error


def type_name(error: BaseException) -> str:
    """`ValueError`, `trio.Cancelled`, `app.errors.Broken`."""
    cls = type(error)
    if cls.__module__ == "builtins":
        return cls.__qualname__
    return f"{cls.__module__}.{cls.__qualname__}"[:200]


def safe_message(error: BaseException) -> str:
    """The error's text, cut and redacted; never raises."""
    try:
        # Cut before the patterns run: their time must not depend on what an app puts into a message.
        text = str(error)[: 4 * MESSAGE_LIMIT]
    except BaseException as problem:
        return f"<str() of it raised {type(problem).__name__}>"
    return cut(redact(text), MESSAGE_LIMIT)


def redact(text: str) -> str:
    """Without the usual carriers of secrets; see the module's docstring for what this is worth."""
    text = _URL_USER.sub(r"\1***@", text)
    text = _URL_QUERY.sub(r"\1?***", text)
    return _NAMED_SECRET.sub(r"\1\2***", text)


def cut(text: str, limit: int) -> str:
    """At most about `limit` characters, and a note where some are missing."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text) - limit} more)"


def read_frames(tb: TracebackType | None) -> list[dict[str, Any]]:
    """A traceback's frames, outermost first, without the middle of a long one."""
    return _shorten([(current.tb_frame, current.tb_lineno) for current in _walk(tb)])


def read_stack(frame: FrameType | None) -> list[dict[str, Any]]:
    """A running thread's frames, outermost first, bounded in the same way."""
    places = []
    while frame is not None:
        places.append((frame, frame.f_lineno))
        frame = frame.f_back
    return _shorten(places[::-1])


# -- the tree -----------------------------------------------------------------------------------------------


def _describe(
    error: BaseException, depth: int, budget: itertools.count[int], seen: set[int]
) -> dict[str, Any]:
    seen.add(id(error))
    found: dict[str, Any] = {"type": type_name(error), "message": safe_message(error)}
    notes = getattr(error, "__notes__", None)
    if isinstance(notes, list):
        found["notes"] = [
            cut(redact(note[: 4 * MESSAGE_LIMIT]), MESSAGE_LIMIT)
            for note in notes[:5]
            if isinstance(note, str)
        ]
    if isinstance(error, trio.Cancelled):
        found["cancelled"] = _describe_cancelled(error)
    found["frames"] = read_frames(error.__traceback__)
    if isinstance(error, BaseExceptionGroup):
        found |= _describe_members(error, depth, budget, seen)
    relation, origin = _origin(error)
    if origin is not None:
        if id(origin) in seen:
            found[relation] = {"type": type_name(origin), "seen": "above, or the chain is a circle"}
        elif depth <= 0 or next(budget) > MOST_EXCEPTIONS:
            found[relation] = {"type": type_name(origin), "left_out": "the chain is too long"}
        else:
            found[relation] = _describe(origin, depth - 1, budget, seen)
    return found


def _describe_members(
    group: BaseExceptionGroup[BaseException], depth: int, budget: itertools.count[int], seen: set[int]
) -> dict[str, Any]:
    """The members of a group: of those that look alike (type, place, message) one, with their number."""
    alike: dict[tuple[str, str], list[Any]] = {}
    members = group.exceptions
    for member in members[:MOST_MEMBERS]:
        key = (signature(member, most=50), safe_message(member))
        if key in alike:
            alike[key][1] += 1
        else:
            alike[key] = [member, 1]
    described: list[dict[str, Any]] = []
    for member, count in alike.values():
        if depth <= 0 or next(budget) > MOST_EXCEPTIONS:
            break
        described.append({"count": count, **_describe(member, depth - 1, budget, seen)})
    shown = sum(entry["count"] for entry in described)
    found: dict[str, Any] = {"members": len(members), "exceptions": described}
    if shown < len(members):
        found["left_out"] = len(members) - shown
    return found


def _origin(error: BaseException) -> tuple[str, BaseException | None]:
    """The exception behind this one, by the rule that the interpreter's own tracebacks follow."""
    if error.__cause__ is not None:
        return "cause", error.__cause__
    if error.__suppress_context__:
        return "context", None
    return "context", error.__context__


def _describe_cancelled(error: trio.Cancelled) -> dict[str, str | None]:
    # trio 0.31 gave them; getattr, since an app may raise something odd that only looks the part.
    read = {name: getattr(error, name, None) for name in ("source", "reason", "source_task")}
    return {
        name: None if value is None else cut(redact(str(value)), MESSAGE_LIMIT)
        for name, value in read.items()
    }


# -- frames -------------------------------------------------------------------------------------------------


def _walk(tb: TracebackType | None) -> Iterator[TracebackType]:
    while tb is not None:
        yield tb
        tb = tb.tb_next


def _shorten(places: list[tuple[FrameType, int]]) -> list[dict[str, Any]]:
    left_out = len(places) - OUTER_FRAMES - INNER_FRAMES
    if left_out <= 0:
        return _summarise(places)
    outer, inner = _summarise(places[:OUTER_FRAMES]), _summarise(places[-INNER_FRAMES:])
    return [*outer, {"left_out": left_out}, *inner]


def _summarise(places: list[tuple[FrameType, int]]) -> list[dict[str, Any]]:
    # Source lines are looked up on disk, once a file; a RecursionError's are all from one.
    summary = traceback.StackSummary.extract(iter(places), capture_locals=False)
    return [
        {
            "file": frame.filename,
            "line": frame.lineno,
            "function": frame.name,
            "code": (frame.line or "")[:200],
        }
        for frame in summary
    ]


def _rank(code: CodeType) -> int:
    return rank_of_file(code.co_filename)


@lru_cache(maxsize=1024)
def rank_of_file(filename: str) -> int:
    """2: the app's; 1: installed, and no framework we know; 0: the standard library's or a framework's."""
    if filename.startswith(("<frozen", _HERE)):
        return 0
    parts = Path(filename).parts
    for marker in ("site-packages", "dist-packages"):
        if marker in parts:
            after = parts[len(parts) - parts[::-1].index(marker) :]
            package = after[0].removesuffix(".py") if after else ""
            return 0 if package in FRAMEWORKS else 1
    return 0 if filename.startswith(_STDLIB) else 2


_HERE = str(Path(__file__).resolve().parent.parent) + "/"
_STDLIB = tuple(
    str(Path(sysconfig.get_path(name)).resolve()) + "/"
    for name in ("stdlib", "platstdlib")
    if sysconfig.get_path(name)
)

_URL_USER = re.compile(r"\b([a-zA-Z][a-zA-Z0-9+.-]{1,20}://)[^\s/@'\"]{1,300}@")
_URL_QUERY = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]{1,20}://[^\s?'\"]{0,2000})\?[^\s'\"]+")
_TELLING_WORD = r"passw(?:or)?d|passphrase|secret|token|api[_-]?key|authorization|cookie|credentials?"
_NAMED_SECRET = re.compile(
    rf"(?i)\b([\w-]{{0,40}}(?:{_TELLING_WORD})[\w-]{{0,20}})"
    r"(['\"]?\s{0,3}[:=]\s{0,3}['\"]?(?:(?:basic|bearer|digest)\s+)?)[^\s'\",;)}\]]+"
)
