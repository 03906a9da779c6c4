"""Where a mount begins in a request's path: the one place that knows of `root_path`, `raw_path` and their dialects.

Called by `handler.py` and `mounts.py`. A prefix is compared segment by segment and after decoding, so `/assets` is no
prefix of `/assets-old`, and `/%61ssets` is the same as `/assets`. Pure.
"""

from __future__ import annotations

from urllib.parse import quote, unquote_to_bytes

from trioserve.structure.context import Scope

# RFC 3986: what stands for itself in a path.
_SAFE = "/!$&'()*+,;=:@~"


def path_of(scope: Scope) -> bytes:
    """The whole path as the client sent it, percent-encoded, without the query."""
    raw: bytes | None = scope.get("raw_path")
    if raw is None:
        return quote_path(scope["path"])
    # Some servers leave the query in.
    return raw.partition(b"?")[0] if b"?" in raw else raw


def quote_path(path: str | bytes) -> bytes:
    """A decoded path as it stands in a request."""
    return quote(path, safe=_SAFE).encode("ascii")


def path_below(scope: Scope) -> bytes:
    """The path below `root_path`: with a leading slash, or b"" for the mount itself without one.

    A path that does not begin with `root_path` is taken whole: a proxy has removed that. Behind such a proxy the mounts
    of Starlette add to `root_path` all the same, which `app_root_path` allows to tell.
    """
    raw_path = path_of(scope)
    root_path = scope.get("root_path") or ""
    below = strip_prefix(raw_path, root_path)
    if below is not None:
        return below
    outer = scope.get("app_root_path")
    if outer and root_path.startswith(outer):
        below = strip_prefix(raw_path, root_path[len(outer) :])
        if below is not None:
            return below
    return raw_path


def strip_prefix(raw_path: bytes, prefix: str) -> bytes | None:
    """What follows `prefix`, which is decoded; None if the path is not below it."""
    wanted = prefix.rstrip("/").encode("utf-8", "surrogateescape")
    if not wanted:
        return raw_path
    length = len(wanted)
    if raw_path.startswith(wanted) and b"%" not in wanted:
        return raw_path[length:] if raw_path[length : length + 1] in (b"/", b"") else None
    if b"%" not in raw_path:
        return None
    names = wanted.split(b"/")
    parts = raw_path.split(b"/", len(names))
    if [unquote_to_bytes(part) for part in parts[: len(names)]] != names:
        return None
    return b"/" + parts[-1] if len(parts) > len(names) else b""
