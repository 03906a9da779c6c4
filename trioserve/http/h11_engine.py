"""The reference engine: heads and chunked bodies parsed by h11, in pure Python.

Used by `http1.py` where httptools is missing or `http_engine = "h11"` asks for it. Each request gets a fresh
`h11.Connection` on the server side: only h11's reading half is used here, since responses are framed by
`response.py` for both engines.
"""

from __future__ import annotations

import h11

from trioserve.errors import RequestRefused
from trioserve.http.engine import Engine, Headers

_CHUNKED_HEAD = b"POST / HTTP/1.1\r\nhost: chunks\r\ntransfer-encoding: chunked\r\n\r\n"
_NEUTRAL_LINE = b"GET / HTTP/1.1"


class H11Engine(Engine):
    """h11 behind the engine interface."""

    __slots__ = ("_chunks",)

    _chunks: h11.Connection | None

    def parse_fields(self, head: bytes) -> Headers:
        if b"\n" in head.replace(b"\r\n", b""):
            raise RequestRefused(400, "bare LF in the head")
        if b"\r\n " in head or b"\r\n\t" in head:
            raise RequestRefused(400, "obsolete line folding")
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=self._limits.head_size)
        # The request line has been checked already, for both engines alike.
        connection.receive_data(_NEUTRAL_LINE + head[head.find(b"\r\n") :])
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError as error:
            return self._without_h11s_own_rules(head, error)
        if not isinstance(event, h11.Request):
            raise RequestRefused(400, "the head has no end")
        return list(event.headers.raw_items()) if self._raw_names else [*event.headers]

    def _without_h11s_own_rules(self, head: bytes, error: h11.RemoteProtocolError) -> Headers:
        """h11 also judges Host and framing; those rules are in `Engine`, with one status for both engines."""
        message = str(error)
        if "Missing mandatory Host" in message:
            connection = h11.Connection(h11.SERVER, max_incomplete_event_size=self._limits.head_size)
            connection.receive_data(b"GET / HTTP/1.0" + head[head.find(b"\r\n") :])
            try:
                event = connection.next_event()
            except h11.RemoteProtocolError as again:
                raise RequestRefused(400, f"{again}") from None
            assert isinstance(event, h11.Request)
            return list(event.headers.raw_items()) if self._raw_names else [*event.headers]
        if "Transfer-Encoding" in message and error.error_status_hint == 501:
            raise RequestRefused(501 if b"chunked" in head.lower() else 400, message) from None
        raise RequestRefused(400, message) from None

    def begin_body(self) -> None:
        self._chunks = None
        super().begin_body()

    def receive_body(self, data: bytes) -> None:
        if self.content_length is not None:
            self._take_fixed(data)
            return
        if self._chunks is None:
            self._chunks = h11.Connection(h11.SERVER, max_incomplete_event_size=self._limits.head_size)
            self._chunks.receive_data(_CHUNKED_HEAD)
            self._chunks.next_event()
        connection = self._chunks
        connection.receive_data(data)
        try:
            event = connection.next_event()
            while event is not h11.NEED_DATA and event is not h11.PAUSED:
                if isinstance(event, h11.Data):
                    self._count_body(len(event.data))
                    self.body.append(bytes(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    if len(list(event.headers)) > self._limits.header_count:
                        raise RequestRefused(431, "trailer fields over the limit")
                    self.body_complete = True
                    self.leftover = connection.trailing_data[0]
                    self._chunks = None
                    return
                event = connection.next_event()
        except h11.RemoteProtocolError as error:
            status = error.error_status_hint if error.error_status_hint == 431 else 400
            raise RequestRefused(status, f"chunked body: {error}") from None
