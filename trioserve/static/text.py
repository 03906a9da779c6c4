"""How names and sizes are shown to people, on the page of a directory and in a terminal. Pure."""

from __future__ import annotations

import re
from typing import Final

# What moves a terminal's cursor, or shows what follows in another order than it has ("gpj.exe" for "exe.jpg"), becomes
# a mark. The joiners that make up emoji and Indic letters are not among them.
_UNPRINTABLE: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

_UNITS: Final = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def name_as_text(name: bytes | str) -> str:
    """A file's name for people: what is not UTF-8, and what would do more than stand there, is replaced by a mark."""
    return _UNPRINTABLE.sub("\ufffd", name if isinstance(name, str) else name.decode("utf-8", "replace"))


def size_as_text(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    if count < 1024:
        return f"{count} B"
    amount, units = count / 1024, iter(_UNITS)
    unit = next(units)
    # 1023.96 would be written as 1024.0.
    while amount >= 1023.95 and unit != _UNITS[-1]:
        amount, unit = amount / 1024, next(units)
    return f"{amount:.1f} {unit}"
