"""The encoders behind `trioserve precompress`: each content coding at its smallest.

Used by `sibling_writer.py`, in threads: all of them let other threads run while they work. A file is compressed once
and sent many times, so that levels are those that nobody would choose for a response; what is kept within bounds is
what the client needs to decode.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import brotli  # type: ignore[import-untyped]  # has no stubs

from trioserve.asgi.zstd import find_zstd
from trioserve.static.codings import SUFFIXES

# 22 levels of effort, of which those above 19 use windows beyond the 8 MiB that RFC 9659 has clients accept.
_ZSTD_LEVEL: Final = 19

# For zlib: the largest window, with gzip's head and tail. The head has no name and no time, so that the same source
# makes the same bytes.
_GZIP_WINDOW: Final = 16 + zlib.MAX_WBITS

# Windows that browsers take, as powers of two.
_SMALLEST_BROTLI_WINDOW: Final = 16
_LARGEST_BROTLI_WINDOW: Final = 24


class Encoder(NamedTuple):
    """One stream: what takes its parts, and what ends it; both return bytes to be written."""

    feed: Callable[[bytes], bytes]
    finish: Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class Coding:
    """A content coding for which siblings are made.

    Attributes:
        name: as in Content-Encoding.
        begin: makes the encoder for a source of so many bytes; they must be as many.
        cost: time it takes for a byte, relative to gzip; for the progress bar and to begin with what takes longest.
    """

    name: bytes
    begin: Callable[[int], Encoder]
    cost: int

    @property
    def suffix(self) -> bytes:
        return SUFFIXES[self.name]


def _begin_brotli(size: int) -> Encoder:
    # Just large enough to look back to the start: the client sets aside as much before it has seen the first byte.
    window = min(max((size + 16).bit_length(), _SMALLEST_BROTLI_WINDOW), _LARGEST_BROTLI_WINDOW)
    encoder = brotli.Compressor(quality=11, lgwin=window)
    return Encoder(encoder.process, encoder.finish)


def _begin_gzip(_size: int) -> Encoder:
    encoder = zlib.compressobj(9, zlib.DEFLATED, _GZIP_WINDOW)
    return Encoder(encoder.compress, encoder.flush)


def _begin_zstd(module: Any) -> Callable[[int], Encoder]:
    def begin(size: int) -> Encoder:
        encoder = module.ZstdCompressor(level=_ZSTD_LEVEL)
        # Knowing the size, the encoder asks no larger window of the client than the source can fill.
        if hasattr(encoder, "compressobj"):  # the package
            encoder = encoder.compressobj(size=size)
        elif hasattr(encoder, "set_pledged_input_size"):
            encoder.set_pledged_input_size(size)
        return Encoder(encoder.compress, encoder.flush)

    return begin


def available_codings() -> dict[bytes, Coding]:
    """The codings that can be made here, by name, in the order of `SUFFIXES`."""
    zstd = find_zstd()
    found = [Coding(b"br", _begin_brotli, 40), Coding(b"gzip", _begin_gzip, 1)]
    if zstd is not None:
        found.append(Coding(b"zstd", _begin_zstd(zstd), 10))
    return {coding.name: coding for name in SUFFIXES for coding in found if coding.name == name}
