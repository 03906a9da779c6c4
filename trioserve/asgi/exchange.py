r"""One request and its response as the app sees them: `receive()` and `send()`, and what may follow what.

A protocol in `http/` subclasses `Exchange` and supplies the wire: the methods that begin with `wire_`. The base owns
the ASGI state tables (https://asgi.readthedocs.io/en/latest/specs/www.html, version 2.5), so that every misuse is a
named error whatever the protocol, and it owns no bytes.

    response:  NONE -start-> HELD -first body-> STREAMING -last body-> COMPLETE
                                  \-only body-----------------------/
                             (trailers announced: -last body-> TRAILERS -trailers-> COMPLETE)

The head is held until the first body event, so that head and body leave in one write and the framing is known.

Cancellation: a cancelled `receive()` loses no body part, a cancelled `send()` may leave a part of its bytes
written; the connection that cancelled it closes. Neither is a checkpoint as long as it need not wait; a sender
that never has to wait is made to yield every few milliseconds.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Iterable
from typing import Any, NoReturn

import trio

from trioserve.asgi.file_body import PATHSEND, ZEROCOPYSEND, FilePart, borrowed_part, part_of, path_of
from trioserve.errors import (
    ClientDisconnected,
    ConcurrentCall,
    FileSendFailed,
    InvalidResponse,
    UnexpectedMessage,
    WrongContentLength,
)
from trioserve.net.transport import Transport
from trioserve.structure.context import Message, Served

# A sender whose writes never block gives way to the other connections this often (seconds).
_FAIRNESS_INTERVAL = 0.002


class ResponseState(enum.IntEnum):
    """How far the response is; ordered."""

    #: nothing sent
    NONE = 0
    #: `http.response.start` accepted, nothing on the wire
    HELD = 1
    #: the head is on the wire, more body may come
    STREAMING = 2
    #: the body is complete, trailers were announced
    TRAILERS = 3
    #: nothing more may be sent
    COMPLETE = 4


_NONE, _HELD, _STREAMING, _TRAILERS, _COMPLETE = ResponseState

# What the app may send in each state, for the messages of `UnexpectedMessage`.
_EXPECTED = {
    _NONE: "'http.response.start'",
    _HELD: "'http.response.body'",
    _STREAMING: "'http.response.body'",
    _TRAILERS: "'http.response.trailers'",
    _COMPLETE: "nothing: the response is complete",
}


class Exchange:
    """The two callables of one request, and their state.

    Attributes:
        connection: the connection, or the stream, that it runs on.
        state: the response's `ResponseState`.
        status: as sent by the app, or by us on its behalf; None before.
        head_at: when the head was written (trio's clock), None before.
        response_bytes: body bytes handed to the transport.
        gone: the `ClientDisconnected` that this exchange raised, for the boundary to recognise.
        file_error: the last `FileSendFailed`, which the app may have let pass, or made up for with something else.
        torn: a file was begun and not sent whole, for whatever reason: nothing may stand where its bytes are missing.
        debug_info: the `info` of an `http.response.debug` event, or None.
    """

    # An exchange is made for every request: what nearly always keeps its first value stands on the class.
    connection: Served
    transport: Transport
    state: ResponseState
    status: int | None = None
    head_at: float | None = None
    response_bytes = 0
    gone: ClientDisconnected | None = None
    file_error: FileSendFailed | None = None
    torn = False
    debug_info: Any = None
    _request_told = False  # the app has been given the end of the request body
    _receiving = False
    _sending: bool
    _ends_with_file = False  # what is being sent is a file, and the last part of the body
    _last_yield = 0.0

    def outlasts(self, _phase: str) -> bool:
        """No phase of a request is entered anew by itself."""
        return False

    def note_drain(self) -> None:
        """A drain has begun: a request is answered all the same."""

    @property
    def response_started(self) -> bool:
        """The head is on the wire, or at least handed over."""
        return self.state > _HELD

    @property
    def response_complete(self) -> bool:
        """All of the response was handed to the transport."""
        return self.state is _COMPLETE

    @property
    def response_given(self) -> bool:
        """The app has said all: the response is complete, or the last part of it is a file that is being sent."""
        return self.state is _COMPLETE or (self._ends_with_file and self._sending)

    @property
    def is_sending(self) -> bool:
        """A task of the app is in `send()`, waiting."""
        return self._sending

    # -- what the app awaits ---------------------------------------------------------------------------------

    async def receive(self) -> Message:
        """Return the next part of the request body, or `http.disconnect` once there is nothing else to tell.

        Raises:
            ConcurrentCall: another task is in `receive()` of this request.
        """
        if self._receiving:
            raise ConcurrentCall("receive() was called while another task of the app is waiting in it")
        if not self._request_told and self.state is not _COMPLETE:
            if self._last_yield:
                await self._give_way()  # before it takes a part, which a cancellation must not lose
            message = self.wire_next_body()
            if message is None:
                self._receiving = True
                try:
                    message = await self.wire_wait_body()
                finally:
                    self._receiving = False
            if message.get("more_body", False):
                self._last_yield = self._last_yield or self.connection.worker.clock()
            else:
                self._request_told = True
            return message
        # What is already known is told without a checkpoint: frameworks ask from inside a cancelled scope.
        if self.state is not _COMPLETE and not self.wire_is_peer_gone():
            self._receiving = True
            try:
                await self.wire_wait_disconnect()
            finally:
                self._receiving = False
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Accept the app's next event; return once the kernel, or a bounded buffer, has taken its bytes.

        Raises:
            UnexpectedMessage, InvalidResponse, WrongContentLength: the event may not be sent (the app's bug).
            ConcurrentCall: another task is in `send()` of this request.
            ClientDisconnected: the peer has reset the connection, or a write to it has failed.
            FileSendFailed: a file is shorter than it was, or cannot be read.
        """
        if self._sending:
            raise ConcurrentCall("send() was called while another task of the app is waiting in it")
        try:
            event = message["type"]
        except (KeyError, TypeError):
            raise UnexpectedMessage(f"send() takes a dict with a 'type', not {message!r:.100}") from None
        state = self.state
        if event == "http.response.body" and (state is _STREAMING or state is _HELD):
            more = message.get("more_body", False)
            body = message.get("body", b"")
            try:
                blocked = self.wire_send_body(body, more)
            except OSError as error:
                self._raise_failure(error)
            except TypeError:
                raise UnexpectedMessage(f"'body' must be bytes, not {type(body).__name__}") from None
            if blocked:
                await self._flush()
            elif more:
                await self._give_way()
        elif event == "http.response.start" and state is _NONE:
            if self.transport.broken is not None:
                self._check_connected()
            try:
                status = message["status"]
            except KeyError:
                raise UnexpectedMessage("'http.response.start' needs a 'status'") from None
            self.wire_start(status, message.get("headers", ()), message.get("trailers", False))
            self.status = status
            self.state = _HELD
        else:
            await self._send_rarer(event, message)

    # -- the other events ------------------------------------------------------------------------------------

    async def _send_rarer(self, event: object, message: Message) -> None:
        state = self.state
        if event == "http.response.trailers" and state is _TRAILERS:
            # Sent in one piece with the end of the body: more_trailers only collects.
            self.wire_add_trailers(message.get("headers", ()))
            if not message.get("more_trailers", False):
                await self._write(self.wire_end_trailers)
        elif event in (ZEROCOPYSEND, PATHSEND) and (state is _HELD or state is _STREAMING):
            await self._send_file(message, message.get("more_body", False))
        elif event == "http.response.early_hint" and state is _NONE:
            self._check_connected()
            links = listed(message.get("links", ()))
            await self._write(lambda: self.wire_interim(103, [(b"link", link) for link in links]))
        elif (
            event == "http.response.debug"
            and state is _NONE
            and self.connection.worker.config.debug_extension
        ):
            self.debug_info = message.get("info")
        else:
            self._refuse_event(event, state)

    async def _send_file(self, message: Message, more: bool) -> None:
        if not self.wire_takes_body():
            await self._write(lambda: self.wire_send_body(b"", more))
            return
        if self.torn:
            self.raise_torn()
        opened: int | None = None
        self._sending = True
        try:
            if message["type"] == PATHSEND:
                opened = await self.wire_open(path_of(message))
                part = part_of(message, opened)
            else:
                part = borrowed_part(message)
            await self.wire_send_file(part, more)
            if opened is None and message.get("offset") is None:
                os.lseek(part.fd, part.offset + part.count, os.SEEK_SET)  # as a read would have moved it
        except (OSError, trio.ClosedResourceError) as error:
            self._raise_failure(error)
        finally:
            self._sending = False
            if opened is not None:
                os.close(opened)
            self.wire_resume()
        if more:
            await self._give_way()

    async def send_last_part(self, part: FilePart) -> None:
        """Send a part of a file as the end of the body; for a protocol that has begun with it already.

        Raises:
            ClientDisconnected, FileSendFailed: as `send`.
        """
        self._sending = True
        try:
            await self.wire_send_file(part, False)
        except (OSError, trio.ClosedResourceError) as error:
            self._raise_failure(error)
        finally:
            self._sending = False

    def _refuse_event(self, event: object, state: ResponseState) -> NoReturn:
        if state in (_NONE, _COMPLETE) and str(event).startswith("http.response."):
            self._check_connected()  # it may be why there is no start
        raise UnexpectedMessage(
            f"send() got {event!r} while the response is {state.name.lower()}; expected {_EXPECTED[state]}"
        )

    async def _write(self, write: Any) -> None:
        try:
            blocked = write()
        except OSError as error:
            self.raise_disconnected(error)
        if blocked:
            await self._flush()

    # -- waiting ---------------------------------------------------------------------------------------------

    async def _flush(self) -> None:
        self._sending = True
        try:
            await self.wire_flush()
        except (OSError, trio.ClosedResourceError) as error:
            self._raise_failure(error)
        finally:
            self._sending = False

    def _raise_failure(self, error: OSError | trio.ClosedResourceError) -> NoReturn:
        """Say what a write has met in the app's terms: the file is at fault, or the peer is gone."""
        if isinstance(error, FileSendFailed):
            self.file_error = error
            try:
                raise error
            finally:
                del error  # its traceback holds this frame
        if isinstance(error, OSError):
            self.raise_disconnected(error)
        # A task that has outlived its request: the connection was closed under it.
        self.raise_disconnected(OSError(errno.EPIPE, os.strerror(errno.EPIPE)))

    def raise_torn(self) -> NoReturn:
        """Refuse what the app would send behind a file that was not sent whole."""
        if self.gone is not None:
            raise self.gone
        if self.file_error is None:
            self.file_error = FileSendFailed(
                errno.ECANCELED,
                "nothing can follow a file whose send() was cancelled before all of it was sent",
            )
        raise self.file_error

    async def _give_way(self) -> None:
        now = self.connection.worker.clock()
        if now - self._last_yield > _FAIRNESS_INTERVAL:
            first = not self._last_yield
            self._last_yield = now
            if not first:
                await trio.lowlevel.checkpoint()

    def _check_connected(self) -> None:
        broken = self.transport.broken
        if broken is not None:
            self.raise_disconnected(broken)

    def note_gone(self, error: OSError) -> ClientDisconnected:
        """What a broken connection is for the app: the one error that the boundary knows by identity."""
        if self.gone is None:
            self.gone = ClientDisconnected(error.errno, f"the client is gone ({error.strerror or error})")
        return self.gone

    def raise_disconnected(self, error: OSError) -> NoReturn:
        """Tell the app of a broken connection."""
        raise self.note_gone(error) from error

    # -- what the protocol supplies --------------------------------------------------------------------------

    def wire_next_body(self) -> Message | None:
        """The next `http.request` message if it is here already, else None."""
        raise NotImplementedError

    async def wire_wait_body(self) -> Message:
        """Wait for the next part of the body; `http.disconnect` if the peer leaves first."""
        raise NotImplementedError

    def wire_is_peer_gone(self) -> bool:
        """Whether the peer is known, without waiting, to have sent FIN or RST."""
        raise NotImplementedError

    async def wire_wait_disconnect(self) -> None:
        """Wait for the peer to leave or the response to be complete."""
        raise NotImplementedError

    def wire_start(self, status: int, headers: Iterable[tuple[bytes, bytes]], trailers: bool) -> None:
        """Check and hold the response head."""
        raise NotImplementedError

    def wire_send_body(self, body: bytes, more: bool) -> bool:
        """Write a part of the body (with the head if it is still held) and move `state`; True if it would block."""
        raise NotImplementedError

    def wire_takes_body(self) -> bool:
        """Whether this response has a body at all; False for HEAD and for statuses without one."""
        raise NotImplementedError

    async def wire_open(self, path: str | bytes) -> int:
        """Open a file for reading without blocking the event loop; the descriptor is the caller's.

        Raises:
            FileSendFailed: it cannot be opened.
        """
        raise NotImplementedError

    async def wire_send_file(self, part: FilePart, more: bool) -> None:
        """Write a part of a file as the next part of the body, and move `state`; returns once it is sent.

        However else it ends, `torn` says whether a part of the file, or of its framing, may be on the wire.

        Raises:
            FileSendFailed: the file turned out to be shorter, or cannot be read.
        """
        raise NotImplementedError

    def wire_resume(self) -> None:
        """A file was sent, or could not be: what is still held back may be written in the background again."""
        raise NotImplementedError

    async def wire_flush(self) -> None:
        """Wait until what `wire_…` could not write has been taken by the kernel."""
        raise NotImplementedError

    def wire_interim(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Write an interim (1xx) response; True if it would block."""
        raise NotImplementedError

    def wire_add_trailers(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Check and collect trailer fields."""
        raise NotImplementedError

    def wire_end_trailers(self) -> bool:
        """Write the collected trailers and the end of the response; True if it would block."""
        raise NotImplementedError


def check_body_length(sent: int, expected: int | None, final: bool) -> None:
    """Hold the body against the Content-Length the app declared, before the excess or the end is written.

    Raises:
        WrongContentLength: more than `expected` bytes, or fewer at the end.
    """
    if expected is not None and (sent > expected or (final and sent < expected)):
        relation = "more than" if sent > expected else "only"
        raise WrongContentLength(f"the body has {relation} {sent} bytes where content-length says {expected}")


def listed(fields: Any) -> list[Any]:
    """What the app gave as headers, as a list.

    Raises:
        InvalidResponse: it cannot be iterated over.
    """
    try:
        return list(fields)
    except TypeError:
        raise InvalidResponse(
            f"response headers must be pairs of bytes in a list, not {type(fields).__name__}"
        ) from None


def invalid_header(name: object, value: object, why: str) -> InvalidResponse:
    """The error for a response field that may not be sent; shows the name, and the value only by its type."""
    return InvalidResponse(f"response header {name!r:.80} ({type(value).__name__} value): {why}")
