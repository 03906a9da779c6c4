"""What an exchange is in both versions of HTTP: rules about bodies, files, patience, and its line in the access log.

The base of `Http1Request` (and so of `Http1Exchange`) and of `Http2Exchange`, which add their wire. Nothing here waits
but `wire_open`; what cancelling does is told in `asgi/exchange.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from trioserve.asgi.exchange import Exchange, ResponseState
from trioserve.errors import IncompleteResponse, RequestRefused, WrongContentLength
from trioserve.http.response import BODILESS
from trioserve.observe.access_log import AccessEntry
from trioserve.static.sendfile import FileSender
from trioserve.structure.context import Served

_NONE, _HELD, _STREAMING, _TRAILERS, _COMPLETE = ResponseState

# Phases of a request whose lateness is answered, and with what, if the response has not begun.
LATE_STATUS = {"request_body": 408, "request": 503}

#: method, target, version, header fields, and how many bytes of body have arrived
RequestFacts = tuple[str, bytes, str, Sequence[tuple[bytes, bytes]], int]


class HttpExchange(Exchange):
    """One request and its response, whatever carries them.

    Attributes:
        started_at: when the head was whole (trio's clock).
        fields: the app's response header fields, for the log.
        refusal: why the request body could not be read on (malformed, too large), or None.
        told_gone: `receive()` has said `http.disconnect` although the response was not complete.
        admitted: it holds a place of `max_concurrent_requests`.
        is_logged: it has its line in the access log.
    """

    started_at: float
    fields: Sequence[tuple[bytes, bytes]] = ()
    refusal: RequestRefused | None = None
    told_gone = False
    admitted = False
    is_logged = False
    _is_head: bool
    _body_waited = 0.0
    _body_deadline = 0.0  # while a task waits for the body

    def request_facts(self) -> RequestFacts:
        """The request, for logs and reports."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """For logs and reports: no query, no values."""
        method, target, version, headers, received = self.request_facts()
        return {
            "method": method,
            "http_version": version,
            "path": target.partition(b"?")[0].decode("ascii", "replace"),
            "header_names": [name.decode("latin-1") for name, _ in intact(headers)],
            "response": self.state.name.lower(),
            "status": self.status,
            "elapsed": self.connection.worker.clock() - self.started_at,
            "request_bytes": received,
            "response_bytes": self.response_bytes,
        }

    def find_unfinished(self) -> BaseException | None:
        """What is wrong with a response that is not complete although the app has returned; None if it is complete."""
        if self.state is _COMPLETE:
            return None
        peer_gone = self.told_gone or self.transport.broken is not None
        if self.file_error is not None and (self.torn or not peer_gone):
            return self.file_error
        if peer_gone:
            return self.gone or IncompleteResponse("the app stopped because the client had gone")
        if self.state is _NONE:
            return IncompleteResponse("the app returned without sending a response")
        return IncompleteResponse(f"the app returned while its response was {self.state.name.lower()}")

    # -- time ------------------------------------------------------------------------------------------------

    def body_patience(self, received: int) -> float:
        """Seconds that the next part may take: the pause between parts, or what the minimum rate leaves."""
        timeouts = self.connection.worker.timeouts
        patience = timeouts.request_body
        if timeouts.request_body_min_rate:
            earned = received / timeouts.request_body_min_rate
            allowed = max(timeouts.request_body_min_rate_grace, earned)
            patience = min(patience, max(0.0, allowed - self._body_waited))
        return patience

    def end_write(self) -> None:
        """A write that had to wait is over: what bounds the app is what bounded it before."""
        connection = self.connection
        if self._body_deadline and not connection.is_closed():
            # Another task of the app still waits for the body.
            connection.start_phase("request_body", self._body_deadline)
        else:
            connection.enter_handler()

    # -- bodies and files ------------------------------------------------------------------------------------

    def check_bodiless(self, size: int) -> None:
        """Of a response without a body: HEAD's may come with one, which is not sent.

        Raises:
            WrongContentLength: the status allows none.
        """
        if size and not self._is_head:
            raise WrongContentLength(f"a {self.status} response has no body, but the app sent {size} bytes")

    def wire_takes_body(self) -> bool:
        return not self._is_head and self.status not in BODILESS

    async def wire_open(self, path: str | bytes) -> int:
        files: FileSender = self.connection.worker.files
        return await files.open(path)


def intact(fields: Iterable[Any]) -> list[tuple[bytes, bytes]]:
    """The fields of a request that can be read still: the list is the app's too, which may have put anything there."""
    return [
        (field[0], field[1])
        for field in fields
        if isinstance(field, tuple | list)
        and len(field) == 2
        and all(isinstance(text, bytes) for text in field)
    ]


def as_bytes(body: Any) -> bytes:
    """A body that is no `bytes` as a copy.

    Raises:
        TypeError: it is nothing like bytes.
    """
    if isinstance(body, bytes):
        return body
    if not isinstance(body, bytearray | memoryview):
        raise TypeError(f"a bytes-like object is required, not {type(body).__name__}")
    return bytes(body)


def log_exchange(
    served: Served,
    request: RequestFacts,
    exchange: Any,
    outcome: str,
    error: str | None = None,
    *,
    status: int | None = None,
) -> None:
    """Write the line of the access log, which there is.

    Args:
        served: the connection or stream.
        request: what was asked.
        exchange: an exchange or a WebSocket session; None for what never became one.
        outcome: how it ended.
        error: what the boundary says of it.
        status: ours, where we answer in the app's stead; None: the app's.
    """
    worker = served.worker
    access_log = worker.access_log
    assert access_log is not None
    method, target, version, headers, received = request
    now = worker.clock()
    started, head_at, fields, sent = now, None, (), 0
    if exchange is not None:
        started, head_at = exchange.started_at, exchange.head_at
        fields, sent = exchange.fields, exchange.response_bytes
        if status is None:
            status = exchange.status
    access_log.log(
        AccessEntry(
            time.time() - (now - started),
            served.client,
            served.server,
            served.scheme,
            method,
            target,
            version,
            headers,
            status,
            fields,
            received,
            sent,
            now - started,
            None if head_at is None else head_at - started,
            outcome,
            served.id,
            served.requests,
            error,
        )
    )
