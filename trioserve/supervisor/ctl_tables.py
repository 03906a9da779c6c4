"""What `trioserve ctl` prints for people: tables with units, ages in words, reports as an outline.

Used by `ctl.py`. Pure. The server may be an older or a newer one than this: what is missing is shown as "-", and what
is not known here is left to `--json`, except in the outlines, which show all there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_ABSENT = "-"


def as_text(command: str, result: Any) -> str:
    """The result of a command, for a person to read."""
    if command == "status" and isinstance(result, Mapping):
        return _status(result)
    if command == "workers" and isinstance(result, Sequence):
        return _table(_WORKER_COLUMNS, result) if result else "no workers"
    if command == "crashes" and isinstance(result, list):
        return _table(_CRASH_COLUMNS, result) if result else "no crashes"
    lines = "\n".join(_outline(result))
    if command == "crashes":
        return lines
    return f"{command}: done" + (f"\n{lines}" if lines else "")


# -- values --------------------------------------------------------------------------------------------------


def printable(value: Any) -> str:
    """Text on one line that cannot move a terminal's cursor: paths and reasons may hold anything."""
    return "".join(char if char.isprintable() else "?" for char in str(value))


def in_words(seconds: Any) -> str:
    """A duration in its two largest units."""
    if not _is_number(seconds):
        return _ABSENT
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    whole = int(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if whole < 60:
        return f"{whole} s"
    if minutes < 60:
        return f"{minutes} min {whole % 60} s"
    if hours < 24:
        return f"{hours} h {minutes % 60} min"
    return f"{days} d {hours % 24} h"


def _size(value: Any) -> str:
    if not _is_number(value):
        return _ABSENT
    mebibytes = value / 1024**2
    return f"{mebibytes:.1f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.2f} GiB"


def _percent(value: Any) -> str:
    return f"{100 * value:.0f} %" if _is_number(value) else _ABSENT


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else _text(value)


def _ago(value: Any) -> str:
    return f"{in_words(value)} ago" if _is_number(value) else _ABSENT


def _text(value: Any) -> str:
    return _ABSENT if value is None else printable(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# -- status --------------------------------------------------------------------------------------------------


def _status(status: Mapping[str, Any]) -> str:
    addresses = status.get("addresses") or []
    rows = [
        ("state", f"{_text(status.get('state'))}, up {in_words(status.get('uptime'))}"),
        ("degraded", _text(status.get("degraded") or "no")),
        ("application", _text(status.get("application"))),
        ("addresses", printable(", ".join(map(str, addresses))) or "none"),
        ("workers", _workers_in_words(status.get("workers"))),
        ("generation", _text(status.get("generation"))),
        ("restarts", _counts_in_words(status.get("restarts"))),
        ("requests", f"{_count(status.get('requests'))}, {_count(status.get('in_flight'))} in flight"),
        ("connections", _count(status.get("connections"))),
    ]
    width = max(len(name) for name, _ in rows)
    head = f"trioserve {_text(status.get('version'))}, pid {_text(status.get('pid'))}"
    return "\n".join([head, *(f"  {name:{width}}  {value}" for name, value in rows)])


def _workers_in_words(workers: Any) -> str:
    if not isinstance(workers, Mapping):
        return _text(workers)
    parts = [f"{_count(workers.get('ready'))} of {_count(workers.get('wanted'))} ready"]
    parts += [f"{_count(workers[name])} {name}" for name in ("starting", "draining") if workers.get(name)]
    return ", ".join(parts)


def _counts_in_words(counts: Any) -> str:
    if not isinstance(counts, Mapping):
        return _text(counts)
    return (
        ", ".join(f"{printable(name)} {_count(count)}" for name, count in counts.items() if count) or "none"
    )


# -- tables --------------------------------------------------------------------------------------------------

# heading, key, how to write it, whether it is a figure (and stands at the right of its column)
_Column = tuple[str, str, Callable[[Any], str], bool]

_WORKER_COLUMNS: tuple[_Column, ...] = (
    ("ID", "id", _text, True),
    ("PID", "pid", _text, True),
    ("STATE", "state", _text, False),
    ("GEN", "generation", _text, True),
    ("AGE", "age", in_words, True),
    ("REQUESTS", "requests", _count, True),
    ("IN FLIGHT", "in_flight", _count, True),
    ("CONNECTIONS", "connections", _count, True),
    ("MEMORY", "rss", _size, True),
    ("CPU", "cpu", _percent, True),
    ("HEARTBEAT", "last_heartbeat", _ago, True),
    ("LEAVING BECAUSE", "reason", _text, False),
)

_CRASH_COLUMNS: tuple[_Column, ...] = (
    ("ID", "id", _text, False),
    ("TIME", "time", _text, False),
    ("WORKER", "worker", _text, True),
    ("PID", "pid", _text, True),
    ("CLASS", "class", _text, False),
    ("EXIT", "exit", _text, False),
    ("SUMMARY", "summary", _text, False),
)


def _table(columns: Sequence[_Column], entries: Sequence[Any]) -> str:
    rows = [[heading for heading, _, _, _ in columns]]
    rows += [
        [write(entry.get(key)) for _, key, write, _ in columns]
        for entry in entries
        if isinstance(entry, Mapping)
    ]
    widths = [max(len(row[index]) for row in rows) for index in range(len(columns))]
    lines = []
    for row in rows:
        cells = zip(row, widths, columns, strict=True)
        line = "  ".join(
            f"{text:>{width}}" if right else f"{text:<{width}}" for text, width, (*_, right) in cells
        )
        lines.append(line.rstrip())
    return "\n".join(lines)


# -- outlines ------------------------------------------------------------------------------------------------

# Stacks within groups within requests; a report has eight levels or so.
_DEEPEST = 40


def _outline(value: Any, indent: int = 0) -> Iterator[str]:
    """Nested values, a line each, indented; lists have dashes, except those of lines of text."""
    margin = " " * indent
    if indent > 2 * _DEEPEST:
        yield f"{margin}..."
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if isinstance(item, Mapping | list) and item:
                yield f"{margin}{printable(name)}:"
                yield from _outline(item, indent + 2)
            else:
                yield f"{margin}{printable(name)}: {_leaf(item)}"
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, Mapping | list) and item:
                yield f"{margin}-"
                yield from _outline(item, indent + 2)
            else:
                yield f"{margin}{_leaf(item)}"
    elif value is not None:
        yield f"{margin}{_leaf(value)}"


def _leaf(value: Any) -> str:
    if value in ({}, []):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _text(value)
