"""The encoders behind `trioserve precompress`: each content coding at its smallest.

Used by `sibling_writer.py`, in threads: all of them let other threads run while they work. A file is compressed once
and sent many times, so that levels are those that nobody would choose for a response; what is kept within bounds is
what the client needs to decode.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import brotli  # type: ignore[import-untyped]  # has no stubs

from trioserve.asgi.zstd import find_zstd
from trioserve.static.codings import DCZ, SUFFIXES, dcz_head, dcz_suffix

# 22 levels of effort, of which those above 19 use windows beyond the 8 MiB that RFC 9659 has clients accept.
_ZSTD_LEVEL: Final = 19

# For zlib: the largest window, with gzip's head and tail. The head has no name and no time, so that the same source
# makes the same bytes.
_GZIP_WINDOW: Final = 16 + zlib.MAX_WBITS

# Windows that browsers take, as powers of two.
_SMALLEST_BROTLI_WINDOW: Final = 16
_LARGEST_BROTLI_WINDOW: Final = 24

# RFC 9842 section 5: a window of 8 MiB, or of 5/4 of the dictionary, but not of more than 128 MiB.
_DCZ_WINDOW: Final = 8 << 20
_LARGEST_DCZ_WINDOW: Final = 128 << 20

#: Beyond this the start of a dictionary is out of reach whatever the source.
LARGEST_DICTIONARY: Final = _LARGEST_DCZ_WINDOW

# Levels from 13 on put all of the dictionary into a tree before the first byte, which cannot be stopped: a second for 1
# MiB, a minute and more for 9. What two releases have in common is found by level 12 as well.
_LARGEST_TREE: Final = 1 << 20
_ZSTD_LEVEL_WITHOUT_TREE: Final = 12


# Working through one for several sources stops all threads meanwhile, unlike what each does for itself: half a second
# for 1 MiB (a tree), one and a half for this. And it is kept in memory with its tables: 18 MB for 1 MiB.
LARGEST_KEPT: Final = 32 << 20

# What a dictionary begins with that zstd has trained (RFC 8878 section 5). To a client its bytes are like any others.
_TRAINED: Final = b"\x37\xa4\x30\xec"


class Encoder(NamedTuple):
    """One stream: what takes its parts, and what ends it; both return bytes to be written, behind `head`."""

    feed: Callable[[bytes], bytes]
    finish: Callable[[], bytes]
    head: bytes = b""


@dataclass(frozen=True, slots=True)
class Coding:
    """A content coding for which siblings are made.

    Attributes:
        name: as in Content-Encoding.
        begin: makes the encoder for a source of so many bytes; they must be as many.
        cost: time it takes for a byte, relative to gzip; for the progress bar and to begin with what takes longest.
        dictionary: SHA-256 of the one that is needed.
        dictionary_size: bytes of it that each encoder works through before the source.
    """

    name: bytes
    begin: Callable[[int], Encoder]
    cost: int
    dictionary: bytes | None = None
    dictionary_size: int = 0

    @property
    def suffix(self) -> bytes:
        return SUFFIXES[self.name] if self.dictionary is None else dcz_suffix(self.dictionary)


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


def dcz_window(dictionary: int, source: int) -> int:
    """The window for a source and a dictionary of so many bytes, as a power of two.

    The dictionary is within reach for as long as the window reaches back to the start of the source: it is just large
    enough for that where clients need not refuse it. The frame then says the size of the source in its place.
    """
    most = min(max(_DCZ_WINDOW, dictionary * 5 // 4), _LARGEST_DCZ_WINDOW)
    return max((source - 1).bit_length(), 10) if source <= most else most.bit_length() - 1


def make_dcz(
    digest: bytes, dictionary_size: int, read: Callable[[], bytes], *, shared: bool = False
) -> Coding:
    """The coding with one dictionary.

    Args:
        digest: its SHA-256.
        dictionary_size: in bytes.
        read: returns the dictionary, in the thread that needs it.
        shared: several sources have it. It is worked through once, then, and kept: that takes longer than a small
            source does.
    """
    is_kept = shared and dictionary_size <= LARGEST_KEPT
    kept: list[Any] = []
    lock = threading.Lock()

    def begin(size: int) -> Encoder:
        module = find_zstd()
        # The tables fit what is about as large as the dictionary: a source that is larger is better off with its own.
        if is_kept and size <= dictionary_size:
            with lock:
                if not kept:
                    kept.append(_worked_through(module, read()))
            known = kept[0]
        else:
            known = _as_it_is(module, read())
        encoder = _dcz_encoder(module, known, dictionary_size, size)
        return Encoder(encoder.compress, encoder.flush, dcz_head(digest))

    return Coding(DCZ, begin, 20, digest, 0 if is_kept else dictionary_size)


def _as_it_is(module: Any, dictionary: bytes) -> Any:
    """A dictionary for one encoder."""
    if hasattr(module, "ZstdCompressionDict"):  # the package
        return module.ZstdCompressionDict(dictionary, dict_type=module.DICT_TYPE_RAWCONTENT)
    return module.ZstdDict(dictionary, is_raw=True).as_prefix


def _worked_through(module: Any, dictionary: bytes) -> Any:
    """A dictionary for many encoders, in any threads, with the tables that each would fill from it."""
    known = _as_it_is(module, dictionary)
    if not hasattr(module, "ZstdCompressionDict"):
        if dictionary.startswith(_TRAINED):
            return known  # digested, it would not be raw, whatever `is_raw` says
        return module.ZstdDict(dictionary, is_raw=True).as_digested_dict  # fills them when it is first used
    size = len(dictionary)
    options = module.ZstdCompressionParameters.from_level(_dcz_level(size), source_size=size, dict_size=size)
    known.precompute_compress(compression_params=options)
    return known


def _dcz_level(dictionary: int) -> int:
    return _ZSTD_LEVEL if dictionary <= _LARGEST_TREE else _ZSTD_LEVEL_WITHOUT_TREE


def _dcz_encoder(module: Any, known: Any, dictionary: int, size: int) -> Any:
    window = dcz_window(dictionary, size)
    level = _dcz_level(dictionary)
    if hasattr(module, "ZstdCompressionDict"):  # the package
        options = module.ZstdCompressionParameters.from_level(
            level, source_size=size, dict_size=dictionary, window_log=window
        )
        return module.ZstdCompressor(dict_data=known, compression_params=options).compressobj(size=size)
    kinds = module.CompressionParameter
    encoder = module.ZstdCompressor(
        options={kinds.compression_level: level, kinds.window_log: window}, zstd_dict=known
    )
    encoder.set_pledged_input_size(size)
    return encoder


def available_codings() -> dict[bytes, Coding]:
    """The codings that can be made here, by name, in the order of `SUFFIXES`."""
    zstd = find_zstd()
    found = [Coding(b"br", _begin_brotli, 40), Coding(b"gzip", _begin_gzip, 1)]
    if zstd is not None:
        found.append(Coding(b"zstd", _begin_zstd(zstd), 10))
    return {coding.name: coding for name in SUFFIXES for coding in found if coding.name == name}
