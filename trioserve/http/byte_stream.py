"""What carries the frames of a WebSocket: the interface between `websocket.py` and the protocols below it.

`http1_websocket.py` implements it over a connection, `http2.py` over a stream. No method but the two that wait is ever
awaited, and none but those that say so raises.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

Fields = Sequence[tuple[bytes, bytes]]


class ByteStream(Protocol):
    """Bytes both ways, each way with its end.

    Reading is by one task at a time, or by `on_readable` while none waits. Writing is by any number of tasks.

    Attributes:
        broken: what ended reading or writing, or None.
        on_readable: called when `read_nowait` may have something new (bytes, the end, an error) and no task is in
            `wait_readable`. Does not raise. Where nothing can call it, it stays uncalled (`PortableHub`).
    """

    on_readable: Callable[[], None] | None

    @property
    def broken(self) -> OSError | None:
        """What ended reading or writing, or None."""
        ...

    @property
    def is_full(self) -> bool:
        """Something that was written is kept still."""
        ...

    def accept(self, fields: Fields) -> bool:
        """Write the head that opens the session: 101 or 200, the server's own fields, then `fields`.

        `fields` are the app's and the session's (subprotocol, extensions); HTTP/1 adds Upgrade, Connection and
        Sec-WebSocket-Accept. Returns what `write_nowait` does.

        Raises:
            InvalidResponse: one of `fields` may not be sent; nothing has been written.
            OSError: the connection is broken.
        """
        ...

    def read_nowait(self) -> bytes | None:
        """What is there: bytes, `b""` at the end (FIN, END_STREAM, or broken), None if nothing is there yet.

        What has been returned is off the peer's window: back-pressure is not calling this.
        """
        ...

    def wait_readable(self) -> Awaitable[None]:
        """Return once `read_nowait` may have something, or when `wake_reader` is called; at once if it may now.

        Raises:
            trio.ClosedResourceError: nobody serves it any more; a task of the app has outlived its session.
        """
        ...

    def wake_reader(self) -> None:
        """Let the task in `wait_readable` go on, whether or not there is anything to read."""
        ...

    def write_nowait(self, data: bytes) -> bool:
        """Write, keeping what the peer does not take yet; True if some is kept: wait with `flush()`.

        What is kept is written in the background as soon as there is room, as far as anything calls then.

        Raises:
            OSError: the connection is broken, or the stream reset.
        """
        ...

    async def flush(self) -> None:
        """Return once nothing is kept any more. Several tasks may wait; phases are the caller's business.

        Raises:
            OSError: the connection is broken, or the stream reset.
        """
        ...

    def end(self) -> None:
        """Nothing more from us (FIN, END_STREAM), once what is kept has been written. Called once; reading goes on."""
        ...

    def abort(self) -> None:
        """End both ways at once: RST, or RST_STREAM(CANCEL). Later calls of anything here do no harm."""
        ...
