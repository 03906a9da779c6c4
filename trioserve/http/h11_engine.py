"""The reference engine: field lines parsed by h11, in pure Python.

Used by `http1.py` where no other is installed or `http_engine = "h11"` asks for it. Each head gets a fresh
`h11.Connection` on the server side: only h11's reading half is used here, since responses are framed by
`response.py` for every engine.
"""

from __future__ import annotations

import re

import h11

from trioserve.errors import RequestRefused
from trioserve.http.engine import Engine, Headers, neutral_head, unmark

# RFC 9110 section 5.5: h11 lets control characters through, for the sake of old cookies.
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class H11Engine(Engine):
    """h11 behind the engine interface."""

    __slots__ = ()

    def parse_fields(self, head: bytes) -> Headers:
        if head.count(b"\n") != head.count(b"\r\n"):
            raise RequestRefused(400, "bare LF in the head")
        if _CONTROL.search(head):
            raise RequestRefused(400, "control character in the head")
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=2 * len(head))
        connection.receive_data(neutral_head(head))
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError as error:
            raise RequestRefused(400, str(error)) from None
        assert isinstance(event, h11.Request), event
        return unmark(event.headers.raw_items() if self._raw_names else event.headers)
