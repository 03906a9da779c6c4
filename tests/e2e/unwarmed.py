"""`python -m tests.e2e.unwarmed ...` is trioserve that believes all files to be in memory.

For tests: so a server would behave that sends files without a thought of the disk, and a measure of such waits must
tell the two apart.
"""

from __future__ import annotations

import sys

from trioserve.cli import main
from trioserve.static.residency import FilePages, PageCache


def believe(page_cache: PageCache, pages: FilePages, offset: int, count: int, now: float) -> bool:
    """What `PageCache.is_warm` answers here."""
    return True


if __name__ == "__main__":
    PageCache.is_warm = believe  # type: ignore[method-assign]
    sys.exit(main())
