"""The precompressed siblings of a file, by name.

    app.js.br                       `app.js` in brotli; `.zst` and `.gz` likewise
    app.js.0123456789abcdef.dcz     in Zstandard, for who has a certain other file (RFC 9842): its dictionary

Read by `variants.py`, which serves them, and by `sibling_writer.py`, which makes them. Pure.
"""

from __future__ import annotations

import re
from typing import Final

#: Content coding -> what its sibling's name has at the end; in our order of preference where the client has none.
#: Siblings are made once at the highest level, where brotli is the smallest on text, and bytes are what the client
#: waits for; `middleware/compression.py`, which pays for each response anew, weighs speed and may order otherwise.
SUFFIXES: Final[dict[bytes, bytes]] = {b"br": b".br", b"zstd": b".zst", b"gzip": b".gz"}

#: The content coding that needs a dictionary. Its siblings are smaller than any other, or they are not made.
DCZ: Final = b"dcz"

_ANY: Final = re.compile(rb"(.+)(?:\.br|\.zst|\.gz|\.[0-9a-f]{16}\.dcz)", re.DOTALL)


def dcz_tag(dictionary: bytes) -> bytes:
    """What tells the siblings of one file apart, of the SHA-256 of their dictionaries.

    A part of it, for names of a bearable length; `dcz_head` has all of it.
    """
    return dictionary[:8].hex().encode("ascii")


def dcz_suffix(dictionary: bytes) -> bytes:
    """What the name of the sibling has at the end that was made with this dictionary (SHA-256)."""
    return b".%b.dcz" % dcz_tag(dictionary)


def dcz_head(dictionary: bytes) -> bytes:
    """The first 40 bytes of such a sibling (RFC 9842 section 5): a Zstandard frame to be skipped, of the SHA-256."""
    return b"\x5e\x2a\x4d\x18\x20\x00\x00\x00" + dictionary


def coding_of(suffix: bytes) -> bytes:
    """The content coding of a sibling whose name has this at the end."""
    return next((coding for coding, known in SUFFIXES.items() if known == suffix), DCZ)


def source_of(name: bytes) -> bytes | None:
    """The name of the file whose sibling has this name; None if it is no sibling's name."""
    match = _ANY.fullmatch(name)
    return match[1] if match is not None else None
