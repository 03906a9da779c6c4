"""The first thing on a connection that speaks TLS: its handshake, bounded in time, and in turn with others.

`connection.py` awaits `open_tls` before it chooses a protocol, and calls `refuse_handshake` for what came to nothing.
`HandshakeTurns.run` is a task of the worker. Cancelling a handshake leaves the connection to be closed.
"""

from __future__ import annotations

import trio

from trioserve.http.response import minimal_response
from trioserve.net.tls import HandshakeFailed, TlsTransport, handshake, wait_hello
from trioserve.net.tls_info import tls_info
from trioserve.structure.context import LAST_REQUEST_PATIENCE, ConnectionContext

# Steps of handshakes in one turn of the loop. One of each signs: 0.1 ms with ECDSA, 1 ms with RSA. A crowd that arrives
# at once would otherwise hold up everybody's requests for as long as all of them take together.
_PER_TURN = 4

_PLAIN_HTTP = (
    b"text/plain; charset=utf-8",
    b"400 Bad Request: this port speaks HTTPS (HTTP over TLS), and the request came in plain HTTP.\n",
)


class HandshakeTurns:
    """Lets a few handshakes go on in each turn of the loop, so that requests get theirs in between."""

    def __init__(self) -> None:
        self._taken = 0
        self._waiting = trio.lowlevel.ParkingLot()
        self._used_up = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        return f"<HandshakeTurns {len(self._waiting)} waiting>"

    async def take(self) -> None:
        """Return when it is the caller's turn: at once, unless there is a crowd."""
        if self._taken < _PER_TURN:
            self._taken += 1
            return
        # Only now is there something to count: a turn of the loop for each of few would cost them more than it gives.
        self._used_up.unpark_all()
        await self._waiting.park()

    async def run(self) -> None:
        """Give out turns until cancelled."""
        while True:
            if not self._waiting:
                await self._used_up.park()
            while self._taken:
                await trio.lowlevel.checkpoint()
                self._taken = len(self._waiting.unpark(count=_PER_TURN))


async def open_tls(connection: ConnectionContext, transport: TlsTransport, turns: HandshakeTurns) -> None:
    """Make an encrypted connection of an accepted one.

    Raises:
        HandshakeFailed: the peer's fault.
    """
    worker = connection.worker
    patience = worker.timeouts.tls_handshake
    if worker.draining:
        patience = min(patience, LAST_REQUEST_PATIENCE)
    connection.start_phase("tls_handshake", connection.accepted_at + patience)
    await wait_hello(transport)
    await handshake(transport, turns.take)
    worker.counters.handshakes += 1
    connection.tls = tls_info(transport.tls)
    connection.scheme = "https"
    connection.accepted_at = worker.clock()  # what follows is counted from here


def refuse_handshake(connection: ConnectionContext, failure: HandshakeFailed) -> bool:
    """Count and note what came to nothing; True if the peer has been given an answer that it needs time to read."""
    worker = connection.worker
    worker.counters.handshakes_failed += 1
    worker.error_log.debug("connection %d: no TLS handshake: %s", connection.id, failure.strerror)
    transport = connection.transport
    if not failure.plain_http or not isinstance(transport, TlsTransport):
        return False
    block = worker.response_defaults.block(worker.clock())
    transport.answer_plainly(minimal_response(400, block, page=_PLAIN_HTTP))
    return True
