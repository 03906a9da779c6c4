"""The request side of one HTTP/1 exchange: its scope, its body from the engine, and whether its peer is still there.

The base of `Http1Exchange` (`http1_exchange.py`), which adds the response. Waiting for the body is the phase
`request_body`; what cancelling does is told in `asgi/exchange.py`.
"""

from __future__ import annotations

from typing import Any

import trio

from trioserve.asgi.exchange import ResponseState
from trioserve.asgi.scope import http_scope
from trioserve.errors import RequestRefused
from trioserve.http.engine import Engine
from trioserve.http.http_exchange import HttpExchange, RequestFacts
from trioserve.http.response import CONTINUE
from trioserve.net.transport import BODY_READ_SIZE
from trioserve.structure.context import ConnectionContext, Message


class Http1Request(HttpExchange):
    """What the app reads.

    Attributes:
        keep_alive: whether the connection may serve another request after this one; decided with the response's head.
        queue: bytes for the peer that the kernel has not taken yet.
    """

    connection: ConnectionContext
    engine: Engine
    keep_alive: bool
    queue: list[bytes | memoryview]

    def scope(self) -> Any:
        """The ASGI scope of this request."""
        engine = self.engine
        return http_scope(
            self.connection,
            engine.method,
            engine.target,
            engine.version,
            engine.headers,
            engine.wants_trailers,
        )

    def request_facts(self) -> RequestFacts:
        return self.engine.request_facts()

    @property
    def request_complete(self) -> bool:
        """Nothing more of the request will arrive: it is whole, or cut short."""
        return self.engine.body_complete or self.told_gone

    def wire_write_queue(self) -> bool:
        """Write what the kernel takes now; True if something is left."""
        raise NotImplementedError

    # -- the request body ------------------------------------------------------------------------------------

    def wire_next_body(self) -> Message | None:
        engine = self.engine
        if not engine.body and not engine.body_complete:
            if self.transport.watch.readable and not self.told_gone:
                self._read_body()
            if self.told_gone:
                return {"type": "http.disconnect"}
            if not engine.body and not engine.body_complete:
                return None
        parts = engine.body
        if not parts:
            return {"type": "http.request", "body": b"", "more_body": False}
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        return {"type": "http.request", "body": body, "more_body": not engine.body_complete}

    def _read_body(self) -> bool:
        """Read once; False if nothing was there. A broken body or a FIN ends in `told_gone`."""
        data = self.transport.recv_nowait(BODY_READ_SIZE)
        if data is None:
            return False
        if not data:
            self.told_gone = True
            self.keep_alive = False
            self.connection.peer_gone()
            return True
        try:
            self.engine.receive_body(data)
        except RequestRefused as refusal:
            self.refusal = refusal
            self.told_gone = True
            self.keep_alive = False
        if self.engine.body_complete and self.transport.watch.hangup:
            self.connection.peer_gone()
        return True

    async def wire_wait_body(self) -> Message:
        connection = self.connection
        clock = connection.worker.clock
        if self.engine.expects_continue and not self.response_started and not await self._send_continue():
            return {"type": "http.disconnect"}
        began = clock()
        self._body_deadline = began + self.body_patience(self.engine.body_bytes)
        connection.start_phase("request_body", self._body_deadline)
        try:
            # Once the response is complete, what comes may be the next request's.
            while not self.told_gone and self.state is not ResponseState.COMPLETE:
                message = self.wire_next_body()
                if message is not None:
                    return message
                await self.transport.watch.wait_readable()
            return {"type": "http.disconnect"}
        except trio.ClosedResourceError:
            return {"type": "http.disconnect"}  # a task that has outlived its request
        finally:
            waited = clock() - began
            self._body_waited += waited
            self._body_deadline = 0.0
            if connection.exchange is self:  # otherwise the connection is busy with other things already
                # The time-out of the handler counts what the app takes, not what the client takes to send.
                connection.resume_handler(waited)

    async def _send_continue(self) -> bool:
        """Ask the peer for the body; False if it is gone, which is no error of an app that only wanted to read."""
        self.engine.expects_continue = False
        self.queue.append(CONTINUE)
        try:
            if self.wire_write_queue():
                await self.wire_flush()
        except (OSError, trio.ClosedResourceError):
            self.queue.clear()
            self.told_gone = True
            self.keep_alive = False
        return not self.told_gone

    # -- the peer --------------------------------------------------------------------------------------------

    def wire_is_peer_gone(self) -> bool:
        if not self.told_gone and not self.transport.is_peer_gone():
            return False
        self.told_gone = True
        return True

    async def wire_wait_disconnect(self) -> None:
        watch = self.transport.watch
        try:
            while self.state is not ResponseState.COMPLETE and not watch.hangup and not self.told_gone:
                await watch.wait_hangup()
        except trio.ClosedResourceError:
            pass  # a task that has outlived its request: the connection is closed
        self.told_gone = self.state is not ResponseState.COMPLETE
