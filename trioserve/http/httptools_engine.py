"""The fast engine: field lines and chunked bodies parsed by llhttp (C) through httptools, in its strict mode.

Used by `http1.py` where httptools is installed. llhttp reads the whole head in one call; a body with a
Content-Length is only counted. For a chunked body llhttp does not tell where in the bytes it ended, so it is fed
in slices that end wherever an empty line ends: the last chunk can only end there.
"""

from __future__ import annotations

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from trioserve.errors import RequestRefused
from trioserve.http.engine import Engine, Headers
from trioserve.structure.context import Limits

_CHUNKED_HEAD = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
_NEUTRAL_LINE = b"GET / HTTP/1.1"


class _FieldCollector:
    """What httptools calls for each field line."""

    __slots__ = ("fields",)

    def __init__(self) -> None:
        self.fields: Headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name.lower(), value.strip()))


class _RawFieldCollector(_FieldCollector):
    """The same, with names as the peer wrote them (`h11_pass_raw_headers`)."""

    __slots__ = ()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name, value.strip()))


class _ChunkCollector(_FieldCollector):
    """What httptools calls for a chunked body; `fields` gets the trailers."""

    __slots__ = ("complete", "parts")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[bytes] = []
        self.complete = False

    def on_body(self, data: bytes) -> None:
        self.parts.append(data)

    def on_message_complete(self) -> None:
        self.complete = True


class HttptoolsEngine(Engine):
    """llhttp behind the engine interface."""

    __slots__ = ("_chunks", "_collector", "_overhead", "_parser")

    def __init__(self, limits: Limits, *, raw_names: bool = False) -> None:
        super().__init__(limits, raw_names=raw_names)
        self._collector = _RawFieldCollector() if raw_names else _FieldCollector()
        self._parser = HttpRequestParser(self._collector)
        self._chunks: tuple[HttpRequestParser, _ChunkCollector] | None = None
        self._overhead = 0

    def parse_fields(self, head: bytes) -> Headers:
        collector = self._collector
        fields: Headers = []
        collector.fields = fields
        try:
            self._parser.feed_data(head)
        except HttpParserUpgrade:
            # An Upgrade field: left alone unless something here supports it. llhttp would read on as if it were.
            self._parser = HttpRequestParser(collector)
        except HttpParserError:
            return self._parse_again(head)
        return fields

    def _parse_again(self, head: bytes) -> Headers:
        """After a complaint: read the fields behind a neutral request line, since that line was checked already.

        llhttp only knows the methods in its table; RFC 9110 section 9 allows any token.
        """
        collector = self._collector
        fields: Headers = []
        collector.fields = fields
        self._parser = HttpRequestParser(collector)
        try:
            self._parser.feed_data(_NEUTRAL_LINE + head[head.find(b"\r\n") :])
        except HttpParserUpgrade:
            pass
        except HttpParserError as error:
            raise RequestRefused(400, f"{error}") from None
        finally:
            self._parser = HttpRequestParser(collector)
        return fields

    def begin_body(self) -> None:
        # llhttp now waits for a body that it will not be given: this parser only ever reads heads.
        self._parser = HttpRequestParser(self._collector)
        self._chunks = None
        super().begin_body()

    def receive_body(self, data: bytes) -> None:
        if self.content_length is not None:
            self._take_fixed(data)
            return
        if self._chunks is None:
            collector = _ChunkCollector()
            parser = HttpRequestParser(collector)
            parser.feed_data(_CHUNKED_HEAD)
            collector.fields.clear()
            self._chunks = parser, collector
            self._overhead = 0
        self._feed_chunks(data, *self._chunks)

    def _feed_chunks(self, data: bytes, parser: HttpRequestParser, collector: _ChunkCollector) -> None:
        start = 0
        try:
            for stop in _possible_ends(data):
                parser.feed_data(data[start:stop])
                start = stop
                if collector.complete:
                    break
        except HttpParserError as error:
            raise RequestRefused(400, f"chunked body: {error}") from None
        parts, collector.parts = collector.parts, []
        size = sum(map(len, parts))
        # Chunk headers, extensions and trailers are bounded like a head, or a peer could send them for ever.
        self._overhead = self._overhead + start - size if not size else start
        if self._overhead > max(self._limits.head_size, 16 * 1024 + size * 8):
            raise RequestRefused(431, "chunk extensions or trailers over the limit")
        if len(collector.fields) > self._limits.header_count:
            raise RequestRefused(431, f"{len(collector.fields)} trailer fields")
        self._count_body(size)
        self.body += parts
        if collector.complete:
            self.body_complete = True
            self.leftover = data[start:]
            self._chunks = None


def _possible_ends(data: bytes) -> list[int]:
    """Where in `data` a chunked body may end: behind each empty line, one that began in earlier bytes included."""
    size = len(data)
    ends = [at for at in (1, 2, 3) if at < size]
    at = data.find(b"\r\n\r\n")
    while at >= 0:
        ends.append(at + 4)
        at = data.find(b"\r\n\r\n", at + 2)
    if not ends or ends[-1] != size:
        ends.append(size)
    return ends
