"""The engine that nearly everybody can install: field lines parsed by llhttp (C) through httptools, in its strict mode.

Used by `http1.py` where gunicorn_h1c is not installed. llhttp reads the whole head in one call; bodies are none of
its business: `engine.py` counts one with a Content-Length, and `chunked.py` decodes the others.
"""

from __future__ import annotations

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from trioserve.errors import RequestRefused
from trioserve.http.engine import NO_FIELDS, Engine, Headers, neutral_head, unmark
from trioserve.structure.context import Limits


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


class HttptoolsEngine(Engine):
    """llhttp behind the engine interface."""

    __slots__ = ("_collector", "_parser")

    def __init__(self, limits: Limits, *, raw_names: bool = False) -> None:
        super().__init__(limits, raw_names=raw_names)
        self._collector = _RawFieldCollector() if raw_names else _FieldCollector()
        # None while it is in no state to read another head.
        self._parser: HttpRequestParser | None = HttpRequestParser(self._collector)

    def parse_fields(self, head: bytes) -> Headers:
        collector = self._collector
        fields: Headers = []
        collector.fields = fields
        parser = self._parser
        if parser is None:
            self._parser = parser = HttpRequestParser(collector)
        try:
            parser.feed_data(head)
        except HttpParserUpgrade:
            # An Upgrade field: left alone unless something here supports it. llhttp would read on as if it were.
            self._parser = None
        except HttpParserError:
            self._parser = None
            return self._parse_again(head)
        collector.fields = NO_FIELDS
        return fields

    def _parse_again(self, head: bytes) -> Headers:
        """After a complaint: was it the syntax, or one of llhttp's own rules?

        It knows a table of methods, where RFC 9110 section 9.1 allows any token, and it judges framing in its own way.
        """
        collector = self._collector
        fields: Headers = []
        collector.fields = fields
        try:
            HttpRequestParser(collector).feed_data(neutral_head(head))
        except HttpParserError as error:
            raise RequestRefused(400, str(error)) from None
        return unmark(fields)

    def begin_body(self) -> None:
        if self._parser is not None and len(self.leftover) == self.content_length:
            # All of it is here: llhttp skips it, which costs less than another parser.
            self._parser.feed_data(self.leftover)
        else:
            # llhttp waits for a body that it will not be given.
            self._parser = None
        super().begin_body()
