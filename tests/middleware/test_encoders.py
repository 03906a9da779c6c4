"""Each encoder against a real decoder."""

from __future__ import annotations

import sys
import threading
import types
import zlib

import pytest

from tests.middleware.calling import CODINGS, PROSE, Decoder
from trioserve.asgi import zstd
from trioserve.asgi.zstd import find_zstd
from trioserve.middleware.encoders import LEVELS, Ending, make_codec, zstd_codec

KEEP, FLUSH, FINISH = Ending


def codec_of(coding, level=None):
    codec = make_codec(coding, LEVELS[coding][3] if level is None else level)
    assert codec is not None
    return codec


@pytest.mark.parametrize("coding", CODINGS)
def test_whole_and_in_parts_decode_to_the_original(coding):
    codec = codec_of(coding)
    assert codec.coding == coding.encode()
    assert Decoder(coding).decode(codec.encode_whole(PROSE)) == PROSE
    encoder, decoder = codec.open(), Decoder(coding)
    assert decoder.decode(encoder.encode(PROSE[:100], KEEP)) == b"", "so little is kept"
    assert decoder.decode(encoder.encode(PROSE[100:200], FLUSH)) == PROSE[:200]
    assert decoder.decode(encoder.encode(PROSE[200:], FINISH)) == PROSE[200:]


@pytest.mark.parametrize("coding", CODINGS)
def test_several_encoders_of_one_codec_do_not_mix(coding):
    codec = codec_of(coding)
    pairs = [(codec.open(), Decoder(coding), b"%d " % n) for n in range(3)]
    for ending in (FLUSH, KEEP, FINISH):
        parts = [(decoder, mark, encoder.encode(mark * 50, ending)) for encoder, decoder, mark in pairs]
        for decoder, mark, part in parts:
            assert set(decoder.decode(part).split()) <= {mark.strip()}


@pytest.mark.parametrize("coding", CODINGS)
def test_an_encoder_may_move_between_threads(coding):
    encoder, parts = codec_of(coding).open(), []
    for ending in (KEEP, FLUSH, FINISH):
        thread = threading.Thread(target=lambda ending=ending: parts.append(encoder.encode(PROSE, ending)))
        thread.start()
        thread.join(10)
    assert Decoder(coding).decode(b"".join(parts)) == PROSE * 3


@pytest.mark.parametrize("coding", CODINGS)
def test_all_levels_work_and_the_slow_ones_say_so(coding):
    levels = LEVELS[coding]
    slowness = []
    for level in levels:
        codec = codec_of(coding, level)
        slowness.append(codec.slowness)
        assert Decoder(coding).decode(codec.encode_whole(PROSE[:3000])) == PROSE[:3000]
    assert slowness == sorted(slowness)
    assert slowness[3] == 1 < slowness[-1]


def test_gzip_has_no_time_in_its_header():
    for coded in (codec_of("gzip").encode_whole(b"x"), codec_of("gzip").open().encode(b"x", FINISH)):
        assert coded[:2] == b"\x1f\x8b"
        assert coded[4:8] == bytes(4)


@pytest.mark.skipif(find_zstd() is None, reason="no zstd here")
def test_zstd_stays_within_the_window_that_browsers_must_have():
    """RFC 9659: 8 MiB."""
    for level in (3, 19):
        encoder = codec_of("zstd", level).open()
        frame = encoder.encode(b"x", FLUSH)
        # RFC 8878, 3.1.1.1: no single segment, then the window descriptor.
        assert frame[:4] == b"\x28\xb5\x2f\xfd"
        assert not frame[4] & 0x20
        exponent, mantissa = frame[5] >> 3, frame[5] & 7
        base = 1 << (10 + exponent)
        assert base + (base // 8) * mantissa <= 8 * 1024 * 1024


def test_without_zstd_it_is_not_offered(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(zstd.importlib, "import_module", missing)
    assert find_zstd() is None
    assert make_codec("zstd", 3) is None


def test_zstd_of_the_standard_library_is_called_as_documented():
    """A stand-in with the interface of Python 3.14's `compression.zstd`, so that every Python runs this path."""

    class ZstdCompressor:
        CONTINUE, FLUSH_BLOCK, FLUSH_FRAME = 0, 1, 2

        def __init__(self, level=None, options=None, zstd_dict=None):
            assert level == 3
            self._compressor = zlib.compressobj()

        def compress(self, data, mode=0):
            return self._compressor.compress(data) + (b"" if mode == self.CONTINUE else self.flush(mode))

        def flush(self, mode=2):
            assert mode in (self.FLUSH_BLOCK, self.FLUSH_FRAME)
            return self._compressor.flush(zlib.Z_SYNC_FLUSH if mode == self.FLUSH_BLOCK else zlib.Z_FINISH)

    module = types.SimpleNamespace(
        ZstdCompressor=ZstdCompressor, compress=lambda data, level=None: zlib.compress(data, level)
    )
    codec = zstd_codec(module, 3)
    assert zlib.decompress(codec.encode_whole(PROSE)) == PROSE
    encoder, decoder = codec.open(), zlib.decompressobj()
    assert decoder.decompress(encoder.encode(b"a", KEEP)) == b""
    assert decoder.decompress(encoder.encode(b"b", FLUSH)) == b"ab"
    assert decoder.decompress(encoder.encode(b"c", FINISH)) == b"c"
    assert decoder.eof


@pytest.mark.skipif(sys.version_info < (3, 14), reason="compression.zstd came with Python 3.14")
def test_zstd_is_the_standard_librarys_where_there_is_one():
    assert find_zstd().__name__ == "compression.zstd"
