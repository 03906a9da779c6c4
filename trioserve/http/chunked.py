"""Chunked request bodies (RFC 9112 section 7.1), decoded for every engine.

`engine.py` makes a `ChunkedDecoder` for each body so framed and feeds it what arrives. The parsers beneath the engines
read chunks, too, but llhttp does not tell where in its input a body ended, h11 takes what the grammar does not
allow, and neither bounds extensions over a whole body. Here a fault is found at the byte that makes it one, so where
the network split the bytes changes nothing. Extensions and trailers are checked and dropped: nobody asked for them.
"""

from __future__ import annotations

import re

from trioserve.errors import RequestRefused
from trioserve.structure.context import Limits

# Enough for any size that a file can have; leading zeros count.
_SIZE_DIGITS = 16

# Nobody uses extensions; a signature of each chunk is the longest that was ever proposed.
_LINE_MAX = 4096

_TCHAR = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"

# A chunk without extensions, as nearly all are.
_PLAIN_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})\r\n").match

# What a chunk line that is not whole may look like so far: the size, then nothing that ends a line by itself.
_LINE_START = re.compile(rb"[0-9A-Fa-f]{1,%d}+(?:[ \t;][\t\x20-\x7e\x80-\xff]*+)?+" % _SIZE_DIGITS).match

# RFC 9112 section 7.1.1. Possessive quantifiers: a line that does not fit is given up in linear time.
_QUOTED = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*+"'
_EXTENSIONS = rb"(?:[ \t]*+;[ \t]*+%b++(?:[ \t]*+=[ \t]*+(?:%b++|%b))?+)*+" % (_TCHAR, _TCHAR, _QUOTED)
_LINE = re.compile(rb"([0-9A-Fa-f]{1,%d}+)%b\r\n" % (_SIZE_DIGITS, _EXTENSIONS)).fullmatch

_TRAILER_LINE = re.compile(rb"%b++:[\t\x20-\x7e\x80-\xff]*+\r\n" % _TCHAR).fullmatch

# What the decoder waits for.
_SIZE, _DATA, _DATA_END, _TRAILERS = range(4)


class ChunkedDecoder:
    """One chunked body.

    Attributes:
        complete: the empty line that ends the body has been read.
    """

    __slots__ = (
        "_announced", "_extensions", "_fields", "_limits", "_missing", "_pending", "_state", "_trailers", "complete",
    )  # fmt: skip

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._state = _SIZE
        self._pending = bytearray()  # of a line that is not whole
        self._missing = 0  # bytes of this chunk's data that have not arrived
        self._announced = 0  # bytes of all chunks so far
        self._extensions = 0  # bytes of chunk extensions so far
        self._trailers = 0  # bytes of trailer fields so far
        self._fields = 0  # trailer fields so far
        self.complete = False

    def receive(self, data: bytes, parts: list[bytes]) -> bytes:
        """Take bytes of the body: its content is added to `parts`; returns what comes after the body.

        Raises:
            RequestRefused: 400 for broken framing, 413 for too large a body, 431 for extensions or trailers.
        """
        position, end = 0, len(data)
        while position < end:
            state = self._state
            if state == _DATA:
                part = data[position : position + self._missing]
                parts.append(part)
                position += len(part)
                self._missing -= len(part)
                if not self._missing:
                    self._state = _DATA_END
                continue
            if state == _SIZE and not self._pending:
                position = self._receive_whole_chunks(data, position, parts)
                if position == end:
                    break
            position = self._receive_line(data, position)
            if self.complete:
                break
        return data[position:]

    def _receive_whole_chunks(self, data: bytes, position: int, parts: list[bytes]) -> int:
        """Take chunks that are here from end to end and of the common kind; returns the position behind them."""
        room = self._limits.body_size - self._announced
        taken = 0
        while (line := _PLAIN_LINE(data, position)) is not None:
            size = int(line[1], 16)
            start = line.end()
            stop = start + size
            taken += size
            if not size or taken > room or data[stop : stop + 2] != b"\r\n":
                taken -= size
                break
            parts.append(data[start:stop])
            position = stop + 2
        self._announced += taken
        return position

    def _receive_line(self, data: bytes, position: int) -> int:
        """Take bytes up to the end of a line, or all; returns the position behind them."""
        stop = data.find(b"\n", position) + 1
        self._pending += data[position : stop or len(data)]
        line = bytes(self._pending)
        if self._state == _SIZE:
            self._check_size_line(line)
        elif self._state == _DATA_END:
            if not b"\r\n".startswith(line):
                raise RequestRefused(400, "chunked body: data longer than its chunk size says")
        else:
            self._check_trailers(line)
        if not stop:
            return len(data)
        self._pending.clear()
        if self._state == _SIZE:
            whole = _LINE(line)
            if whole is None:
                raise RequestRefused(400, "chunked body: invalid chunk extension")
            self._extensions += len(line) - len(whole[1]) - 2
            self._begin_chunk(whole[1])
        elif self._state == _DATA_END:
            self._state = _SIZE
        else:
            self._end_trailer(line)
        return stop

    def _begin_chunk(self, digits: bytes) -> None:
        self._missing = int(digits, 16)
        self._announced += self._missing
        if self._announced > self._limits.body_size:
            raise RequestRefused(413, f"a chunked body of over {self._limits.body_size:.0f} bytes")
        self._state = _DATA if self._missing else _TRAILERS

    def _check_size_line(self, line: bytes) -> None:
        """Refuse a chunk line, whole or not, by its bytes in their order."""
        start = _LINE_START(line)
        valid = 0 if start is None else start.end()
        # Extensions may be as long as a head, and beyond that as long as the data they come with; or a peer could
        # send them for ever in the place of data.
        room = self._limits.head_size + self._announced - self._extensions
        if valid > min(_SIZE_DIGITS + room, _LINE_MAX):
            raise RequestRefused(431, "chunk extensions over the limit")
        if not b"\r\n".startswith(line[valid:]) or not valid:
            raise RequestRefused(400, "chunked body: invalid chunk size")

    def _check_trailers(self, line: bytes) -> None:
        if b"\r\n".startswith(line):
            return
        if line.startswith(b"\r"):
            raise RequestRefused(400, "chunked body: bare CR in the trailers")
        if self._trailers + len(line) > self._limits.head_size:
            raise RequestRefused(431, f"trailers over {self._limits.head_size} bytes")
        if line[-1:] == b"\n" and line[-2:] != b"\r\n":
            raise RequestRefused(400, "chunked body: bare LF in the trailers")

    def _end_trailer(self, line: bytes) -> None:
        if line == b"\r\n":
            self.complete = True
            return
        self._trailers += len(line)
        self._fields += 1
        if self._fields > self._limits.header_count:
            raise RequestRefused(431, f"over {self._limits.header_count} trailer fields")
        if not _TRAILER_LINE(line):
            raise RequestRefused(400, "chunked body: invalid trailer field")
