"""Who has answers ready before there is a scope to ask with: `StaticFiles`, and directories beside an app.

`http1.py` and `http2.py` ask for each request, and run the app where there is no answer. Nothing in here waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from trioserve.static.answers import Answer
from trioserve.static.mounts import StaticMounts

#: `StaticFiles.quick_answer` (method, path as sent, fields by name, root path), and the root path to ask with
Quick = tuple[Callable[[str, bytes, Mapping[bytes, bytes], str], Answer | None], str]


def find_quick(app: object, root_path: str) -> Quick | None:
    """What an app answers with before it is run, if it has that.

    Its type must say so: a wrapper that hands on what it does not have itself may be there to look at each request.
    """
    if getattr(type(app), "quick_answer", None) is None:
        return None
    if isinstance(app, StaticMounts) and len(app.mounts) == 1:
        # One call less for each request.
        prefix, app = app.mounts[0]
        root_path += prefix
    return app.quick_answer, root_path  # type: ignore[attr-defined]
