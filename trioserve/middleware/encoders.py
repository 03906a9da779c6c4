"""The content codings the middleware can make: brotli, zstd and gzip behind one small interface. No waiting.

Made by `compression.py`, which also decides in which thread each call runs: an encoder may move between threads, but
only one may be in it at a time (brotli raises "encoder concurrent access", zlib would be locked).

What was measured for the choices below (2 vCPU, 64 KiB of JSON):

    level      br 4   br 6   br 9   br 11   zstd 3   zstd 10   zstd 19   gzip 5   gzip 6   gzip 9
    ms          1.4    2.5     35     220      0.4       2.5        70      2.0      2.4      6.0

    memory of a stream that is open, after 1 kB and after 300 kB: br 4 530 and 890 kB, zstd 3 820 and 1110 kB, gzip 90
    and 200 kB. brotli's window changes neither speed nor memory (14 to 22) as long as little has been said, and 18
    compresses 300 kB of JSON as well as 22; its mode for text makes the same bytes as the generic one.
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import brotli  # type: ignore[import-untyped]  # has no stubs

from trioserve.asgi.zstd import find_zstd

# 2**18 bytes are looked back at. A larger window saves 1 to 3 % of a body of megabytes, and costs a stream that much
# memory as it fills.
_BROTLI_WINDOW = 18

# zlib: largest window, with a gzip header; the header's time stays 0.
_GZIP_WINDOW = 31


class Ending(enum.Enum):
    """What is to stand behind the data that an encoder is given."""

    #: more will come; keep what is better compressed with it
    KEEP = "keep"
    #: more will come, but the reader must be able to decode all of this now
    FLUSH = "flush"
    #: nothing
    FINISH = "finish"


class Encoder(Protocol):
    """One coded body in the making."""

    def encode(self, data: bytes, ending: Ending) -> bytes:
        """Take `data`; return what is ready of the coded form, perhaps nothing."""
        ...  # pragma: no cover


@dataclass(frozen=True, slots=True)
class Codec:
    """One coding at one level.

    Attributes:
        coding: as in Content-Encoding.
        encode_whole: codes a body that is at hand, at once.
        open: an encoder for a body that comes in parts.
        slowness: how many times longer it takes than the default levels, which need up to 2 ms for 64 KiB; rounded.
    """

    coding: bytes
    encode_whole: Callable[[bytes], bytes]
    open: Callable[[], Encoder]
    slowness: int


# -- brotli -------------------------------------------------------------------------------------------------


class BrotliEncoder:
    """A brotli stream (RFC 7932)."""

    __slots__ = ("_compressor",)

    def __init__(self, level: int) -> None:
        # The library's own default is level 11, a hundred times slower than 4.
        self._compressor = brotli.Compressor(quality=level, lgwin=_BROTLI_WINDOW)

    def encode(self, data: bytes, ending: Ending) -> bytes:
        coded: bytes = self._compressor.process(data)
        if ending is Ending.FLUSH:
            coded += self._compressor.flush()
        elif ending is Ending.FINISH:
            coded += self._compressor.finish()
        return coded


def _brotli_codec(level: int) -> Codec:
    # An encoder takes and gives back more than half a megabyte. glibc hands such a block to the kernel each time, which
    # costs 146 page faults a response, until it has seen a larger one freed (mallopt(3), M_MMAP_THRESHOLD).
    bytes(2 * 1024 * 1024)

    def encode_whole(data: bytes) -> bytes:
        return BrotliEncoder(level).encode(data, Ending.FINISH)

    return Codec(
        b"br", encode_whole, lambda: BrotliEncoder(level), _step(level, {6: 4, 9: 24, 10: 64, 11: 160})
    )


# -- gzip ---------------------------------------------------------------------------------------------------


class GzipEncoder:
    """A gzip stream (RFC 1952)."""

    __slots__ = ("_compressor",)

    def __init__(self, level: int) -> None:
        self._compressor = zlib.compressobj(level, zlib.DEFLATED, _GZIP_WINDOW)

    def encode(self, data: bytes, ending: Ending) -> bytes:
        coded = self._compressor.compress(data)
        if ending is Ending.FLUSH:
            coded += self._compressor.flush(zlib.Z_SYNC_FLUSH)
        elif ending is Ending.FINISH:
            coded += self._compressor.flush()
        return coded


def _gzip_codec(level: int) -> Codec:
    def encode_whole(data: bytes) -> bytes:
        return zlib.compress(data, level, _GZIP_WINDOW)

    return Codec(b"gzip", encode_whole, lambda: GzipEncoder(level), _step(level, {7: 2, 8: 4}))


# -- zstd ---------------------------------------------------------------------------------------------------


class StdlibZstdEncoder:
    """A zstd frame (RFC 8878) by `compression.zstd`, which came with Python 3.14."""

    __slots__ = ("_compressor",)

    def __init__(self, module: Any, level: int) -> None:
        self._compressor = module.ZstdCompressor(level=level)

    def encode(self, data: bytes, ending: Ending) -> bytes:
        compressor = self._compressor
        coded: bytes = compressor.compress(data, mode=compressor.CONTINUE)
        if ending is Ending.FLUSH:
            coded += compressor.flush(mode=compressor.FLUSH_BLOCK)
        elif ending is Ending.FINISH:
            coded += compressor.flush(mode=compressor.FLUSH_FRAME)
        return coded


class ZstandardEncoder:
    """A zstd frame (RFC 8878) by the package `zstandard`."""

    __slots__ = ("_compressor", "_flush")

    def __init__(self, module: Any, level: int) -> None:
        # Two streams of one ZstdCompressor would share its state: one each.
        self._compressor = module.ZstdCompressor(level=level).compressobj()
        self._flush = module.COMPRESSOBJ_FLUSH_BLOCK

    def encode(self, data: bytes, ending: Ending) -> bytes:
        coded: bytes = self._compressor.compress(data)
        if ending is Ending.FLUSH:
            coded += self._compressor.flush(self._flush)
        elif ending is Ending.FINISH:
            coded += self._compressor.flush()
        return coded


def zstd_codec(module: Any, level: int) -> Codec:
    """The zstd codec by one of the modules that `find_zstd` returns."""
    slowness = _step(level, {7: 2, 11: 8, 14: 40})
    if hasattr(module, "COMPRESSOBJ_FLUSH_BLOCK"):

        def encode_whole(data: bytes) -> bytes:
            coded: bytes = module.ZstdCompressor(level=level).compress(data)
            return coded

        return Codec(b"zstd", encode_whole, lambda: ZstandardEncoder(module, level), slowness)
    return Codec(
        b"zstd",
        lambda data: bytes(module.compress(data, level=level)),
        lambda: StdlibZstdEncoder(module, level),
        slowness,
    )


# -- the choice ---------------------------------------------------------------------------------------------

#: Coding -> the levels it may have. zstd's 20 to 22 need windows that RFC 9659 forbids on the web.
LEVELS: dict[str, range] = {"br": range(12), "zstd": range(1, 20), "gzip": range(1, 10)}


def make_codec(coding: str, level: int) -> Codec | None:
    """The codec for a coding of `LEVELS`; None if this installation cannot make it (zstd)."""
    if coding == "br":
        return _brotli_codec(level)
    if coding == "gzip":
        return _gzip_codec(level)
    module = find_zstd()
    return None if module is None else zstd_codec(module, level)


def _step(level: int, steps: dict[int, int]) -> int:
    """The value of the highest step that `level` reaches; 1 below the first."""
    return max((value for step, value in steps.items() if level >= step), default=1)
