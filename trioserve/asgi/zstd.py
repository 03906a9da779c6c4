"""Which module makes zstd here; for the compression middleware, and for `trioserve precompress`."""

from __future__ import annotations

import importlib
import sys
from typing import Any


def find_zstd() -> Any | None:
    """The standard library's module (Python 3.14), or else the package `zstandard`; None if there is neither."""
    # Asked for by version, so that an app's own package `compression` is not imported in its place.
    names = ("compression.zstd", "zstandard") if sys.version_info >= (3, 14) else ("zstandard",)
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None
