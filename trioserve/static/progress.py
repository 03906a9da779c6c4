"""A line at the foot of a terminal that says how far a command is.

Used by `precompress_report.py`. Nothing is written where stderr is not a terminal, or one that cannot go back in its
line.
"""

from __future__ import annotations

import os
import sys
import time
import unicodedata
from typing import Final, TextIO

# Often enough to be seen to move, seldom enough to cost nothing.
_INTERVAL: Final = 0.1

_BAR: Final = 30
_FALLBACK_WIDTH: Final = 80

_TO_START: Final = "\r\x1b[K"


class ProgressLine:
    """The line; `show` draws it anew, `clear` makes room for something to be printed."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self.is_shown = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._next = 0.0
        self._drawn = False

    def show(self, share: float, text: str) -> None:
        """Draw it, unless that was done just now.

        Args:
            share: what is done, from 0 to 1.
            text: free of anything that moves the cursor; cut where the line ends.
        """
        now = time.monotonic()
        if not self.is_shown or now < self._next:
            return
        self._next = now + _INTERVAL
        self._drawn = True
        # Without the last column: some terminals go to the next line as soon as it is written to.
        self._write(_TO_START + progress_text(share, text, self._width() - 1))

    def clear(self) -> None:
        """Remove it; the next `show` draws it again."""
        if self._drawn:
            self._drawn = False
            self._next = 0.0
            self._write(_TO_START)

    def _width(self) -> int:
        # Asked each time: windows change.
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or _FALLBACK_WIDTH
        except (OSError, ValueError):
            return _FALLBACK_WIDTH

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self.is_shown = False  # the terminal is gone; the work is not


def progress_text(share: float, text: str, width: int) -> str:
    """The line for a terminal of this width: a bar where there is room for one, the share in any case."""
    share = min(max(share, 0.0), 1.0)
    # Not 100 before it is true.
    line = f"{int(share * 100):3} %"
    bar = min(_BAR, width // 3)
    if bar >= 10:
        filled = int(share * bar)
        line = f"[{'#' * filled}{'.' * (bar - filled)}] {line}"
    return _cut(f"{line}  {text}", width)


def _cut(text: str, width: int) -> str:
    """As much of it as has room in so many columns."""
    used = 0
    for index, char in enumerate(text):
        if not unicodedata.combining(char):
            used += 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if used > width:
            return text[:index]
    return text
