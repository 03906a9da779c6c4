"""What `worker/connection.py` asks of a protocol: serve the connection, and end it whichever way it ends.

`http1.py` and `http2.py` are the two there are. All methods but `serve` return at once and raise nothing that is the
peer's doing: a connection that cannot be written to any more is not written to.
"""

from __future__ import annotations

import typing

from trioserve.errors import RequestRefused
from trioserve.structure.context import ConnectionContext

#: how a client begins that knows beforehand that we speak HTTP/2 (RFC 9113 section 3.4)
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Protocol(typing.Protocol):
    """One connection's protocol.

    Attributes:
        connection: whose bytes it speaks.
        linger: the peer may still be sending, so closing must not destroy our last words (RFC 9112 section 9.6).
    """

    connection: ConnectionContext
    linger: bool

    async def serve(self, data: bytes | None = None) -> None:
        """Serve requests until the connection may not be kept. Returning means: close it.

        Args:
            data: what was read already, to find out which protocol this is; None for nothing.

        Raises:
            RequestRefused: the peer's bytes cannot be served; nothing has been answered yet.
            OSError: the connection is broken (`Transport.broken`).
        """
        ...

    def end_refused(self, refusal: RequestRefused) -> None:
        """What `serve` has raised: answer it."""
        ...

    def end_late(self, phase: str) -> None:
        """The reaper has cancelled the connection in `phase`: answer where that phase has an answer."""
        ...

    def end_cut(self) -> None:
        """A drain, or the server's caller, has cancelled the connection: say so to who has no response yet."""
        ...

    def end_broken(self, error: BaseException) -> None:
        """Something of ours, or the app's scopes, broke: one answer if possible, and the boundary's verdict."""
        ...

    def break_off(self) -> None:
        """End the connection so that no peer takes a part of a response for the whole of it."""
        ...

    def end(self) -> None:
        """Take what was being answered off the books; called last, and perhaps before."""
        ...

    def log(self, outcome: str, error: str | None = None, *, status: int | None = None) -> None:
        """Write the access-log line of what is being answered, if anything is."""
        ...
