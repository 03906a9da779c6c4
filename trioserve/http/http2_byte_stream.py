"""A WebSocket on an HTTP/2 stream (RFC 8441): the extended CONNECT, and the stream as a `ByteStream` after it.

`http2_stream.py` calls `serve_connect` in the stream's task, in place of the app. DATA frames carry the session's
bytes, END_STREAM is its end; what is kept for a peer that does not read is bounded by the session (`websocket.py`).
Cancelling it ends the session.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import trio

from trioserve.errors import RequestRefused
from trioserve.http.byte_stream import Fields
from trioserve.http.http2_codes import ErrorCode
from trioserve.http.http2_exchange import Http2Exchange
from trioserve.http.http2_fields import check_fields
from trioserve.http.http2_pipe import reset_by_peer
from trioserve.http.response import flags_of
from trioserve.http.websocket import run_websocket
from trioserve.http.websocket_handshake import WebSocketRequest


async def serve_connect(exchange: Http2Exchange) -> None:
    """Serve a request that would open a session; if it was one, it is over, and `exchange.was_session`.

    Raises:
        RequestRefused: it cannot become a session; also noted in `exchange.refusal`.
    """
    head = exchange.head
    request = WebSocketRequest(head.target, "2", head.headers, b"", None)
    stream = Http2ByteStream(exchange)
    try:
        exchange.was_session = not await run_websocket(exchange.stream, request, exchange, stream)
    except RequestRefused as refusal:
        exchange.refusal = refusal
        raise
    finally:
        exchange.on_received = None
    if exchange.unsent:
        with contextlib.suppress(OSError):
            await exchange.wire_flush()


class Http2ByteStream:
    """The stream below a session."""

    __slots__ = ("_exchange",)

    def __init__(self, exchange: Http2Exchange) -> None:
        self._exchange = exchange

    @property
    def broken(self) -> OSError | None:
        """What ended reading or writing, or None."""
        broken: OSError | None = self._exchange.transport.broken
        return broken

    @property
    def on_readable(self) -> Callable[[], None] | None:
        """Called when something has arrived."""
        return self._exchange.on_received

    @on_readable.setter
    def on_readable(self, callback: Callable[[], None] | None) -> None:
        self._exchange.on_received = callback

    def accept(self, fields: Fields) -> bool:
        """Send the 200."""
        exchange = self._exchange
        if exchange.transport.broken is not None:
            raise exchange.transport.broken
        exchange.open_tunnel(_with_defaults(exchange, check_fields(fields)))
        return False

    # -- reading ---------------------------------------------------------------------------------------------

    def read_nowait(self) -> bytes | None:
        """What is there."""
        exchange = self._exchange
        if exchange.received:
            return exchange.take()
        return b"" if exchange.ended or exchange.transport.broken is not None else None

    async def wait_readable(self) -> None:
        """Wait for more."""
        exchange = self._exchange
        if exchange.stream.closed:
            raise trio.ClosedResourceError("the session is over")
        if not exchange.received and not exchange.ended and exchange.transport.broken is None:
            await exchange.wait_received()

    def wake_reader(self) -> None:
        """Let the reading task go on."""
        self._exchange.wake_reader()

    # -- writing ---------------------------------------------------------------------------------------------

    @property
    def is_full(self) -> bool:
        """Something is kept."""
        return bool(self._exchange.unsent)

    def write_nowait(self, data: bytes) -> bool:
        """Send, or keep."""
        exchange = self._exchange
        if exchange.transport.broken is not None:
            raise exchange.transport.broken
        return exchange.put(data, False)

    async def flush(self) -> None:
        """Wait until nothing is kept."""
        await self._exchange.wait_sent()

    def end(self) -> None:
        """END_STREAM, behind what is kept."""
        exchange = self._exchange
        if exchange.transport.broken is None:
            exchange.put(b"", True)

    def abort(self) -> None:
        """RST_STREAM."""
        exchange = self._exchange
        if exchange.transport.broken is None:
            exchange.engine.reset(exchange.stream_id, ErrorCode.CANCEL)
            exchange.output.request()
            exchange.lose(reset_by_peer(ErrorCode.CANCEL))


def _with_defaults(
    exchange: Http2Exchange, fields: Sequence[tuple[bytes, bytes]]
) -> list[tuple[bytes, bytes]]:
    worker = exchange.stream.worker
    return [*worker.response_defaults.fields(worker.clock(), flags_of(fields)), *fields]
