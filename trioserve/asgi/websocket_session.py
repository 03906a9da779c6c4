r"""One WebSocket as the app sees it: `receive()` and `send()`, and what may follow what.

`http/websocket.py` subclasses `WebSocketSession` and supplies the wire: the methods that begin with `wire_`. The base
owns the state table of ASGI's websocket protocol (version 2.5 of its specification), so that every misuse is a named
error, and it owns no bytes.

    CONNECTING -accept-> OPEN -close-> CLOSED
        |                  \-the peer closes or is gone, or the server closes-> LOST
        |-close-> CLOSED (403)
        \-http.response.start-> DENYING (the request's exchange has it from here)

Cancellation: a cancelled `receive()` loses no message. Of a cancelled `send()` nothing has been sent if another message
was in its way; once some of it is on the wire, the rest follows, so that frames stay whole. Neither is a checkpoint as
long as it need not wait; who never has to wait is made to yield now and then.

Several tasks may be in `send()` at once, as they may under hypercorn and uvicorn: messages go out whole, those of one
task in its order. Only one may be in `receive()`.
"""

from __future__ import annotations

import enum
import errno
from typing import Any, NoReturn

import trio

from trioserve.errors import ClientDisconnected, ConcurrentCall, UnexpectedMessage
from trioserve.structure.context import Message

# How many sends and receives may follow one another without a wait before the other tasks get a turn: about a
# millisecond. One count for all sessions, since one task may send to thousands of them.
_TURN = 256

_ABNORMAL = 1006
_REASON_MAX = 123  # bytes; what a close frame has room for (RFC 6455 section 5.5)


class SessionState(enum.Enum):
    """How far the session is, as far as `send()` is concerned."""

    #: neither accepted nor refused
    CONNECTING = "connecting"
    #: accepted
    OPEN = "open"
    #: the app answers the request as any other, instead of accepting it
    DENYING = "denying"
    #: the app has closed it, or denied it
    CLOSED = "closed"
    #: the peer has closed it, or is gone; or it was closed by us in the app's stead
    LOST = "lost"


_CONNECTING, _OPEN, _DENYING, _CLOSED, _LOST = SessionState

# What the app may send in each state, for the messages of `UnexpectedMessage`.
_EXPECTED = {
    _CONNECTING: "'websocket.accept', 'websocket.close' or 'websocket.http.response.start'",
    _OPEN: "'websocket.send' or 'websocket.close'",
    _DENYING: "'websocket.http.response.body'",
    _CLOSED: "nothing: the app has closed it",
    _LOST: "nothing: it is over",
}


class Turn:
    """How many calls in a row needed no wait, over all of a worker's sessions."""

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class WebSocketSession:
    """The two callables of one session, and their state.

    Attributes:
        state: the session's `SessionState`.
        exchange: the request's; it has the response if the session is denied.
        messages: what has arrived and the app has not taken; each is 1 with a str, or 2 with bytes.
        told_gone: the app knows by `websocket.disconnect` that it was not the app that has ended it.
        gone: the `ClientDisconnected` that was raised, for the boundary to recognise.
    """

    state: SessionState = _CONNECTING
    exchange: Any  # the `Exchange` of whichever protocol
    messages: list[tuple[int, Any]]
    told_gone = False
    gone: ClientDisconnected | None = None
    _end: tuple[int, str] | None = None  # what `websocket.disconnect` says
    _connect_told = False
    _receiving = False
    _disconnect_told = False
    _turn: Turn

    # -- what the app awaits ---------------------------------------------------------------------------------

    async def receive(self) -> Message:
        """Return the next message, or `websocket.disconnect` once there is none and there will be none.

        Raises:
            ConcurrentCall: another task is in `receive()` of this session.
        """
        if self._receiving:
            raise ConcurrentCall("receive() was called while another task of the app is waiting in it")
        messages = self.messages
        if messages:
            turn = self._turn
            turn.calls += 1
            if turn.calls >= _TURN:
                await self._give_way()  # before it takes one, which a cancellation must not lose
        elif self.state is _OPEN:
            self._receiving = True
            try:
                await self.wire_wait_message()
            finally:
                self._receiving = False
        if not messages or not self._connect_told:
            return await self._receive_rarer()
        kind, data = messages.pop(0)
        if kind == 1:
            return {"type": "websocket.receive", "text": data, "bytes": None}
        return {"type": "websocket.receive", "text": None, "bytes": data}

    async def send(self, message: Message) -> None:
        """Accept the app's next event; return once the kernel, or a bounded buffer, has taken its bytes.

        Raises:
            UnexpectedMessage, InvalidResponse: the event may not be sent (the app's bug).
            ClientDisconnected: the session is over, and not by the app's own doing.
        """
        try:
            event = message["type"]
        except (KeyError, TypeError):
            raise UnexpectedMessage(f"send() takes a dict with a 'type', not {message!r:.100}") from None
        if event != "websocket.send" or self.state is not _OPEN:
            await self._send_rarer(event, message)
            return
        data: Any = message.get("bytes")
        if data is None:
            data = message.get("text")
            try:
                payload = data.encode()
            except (AttributeError, UnicodeEncodeError) as error:
                _refuse_text(data, error)
            kind = 1
        else:
            payload = data if type(data) is bytes else _as_bytes(data)
            kind = 2
        try:
            full = self.wire_send(kind, payload)
        except OSError as error:
            self.raise_disconnected(error)
        if full is None:
            await self._send_later(kind, payload, message)
        elif full:
            await self._flush()
        else:
            turn = self._turn
            turn.calls += 1
            if turn.calls >= _TURN:
                await self._give_way()

    async def _send_later(self, kind: int, payload: bytes, message: Message) -> None:
        """Another message is on its way: wait for that one first."""
        full: bool | None = None
        while full is None:
            await self._flush()
            if self.state is not _OPEN:
                await self._send_rarer("websocket.send", message)
                return
            try:
                full = self.wire_send(kind, payload)
            except OSError as error:
                self.raise_disconnected(error)
        if full:
            await self._flush()

    # -- the other events ------------------------------------------------------------------------------------

    async def _receive_rarer(self) -> Message:
        if not self._connect_told:
            self._connect_told = True
            return {"type": "websocket.connect"}
        if self.state is _CONNECTING or self.state is _DENYING:
            self._receiving = True
            try:
                await self._wait_undecided()
            finally:
                self._receiving = False
            if self.messages:
                return await self.receive()
        if self._disconnect_told:
            await trio.lowlevel.checkpoint()  # for who asks again and again
        self._disconnect_told = True
        self.told_gone = self.told_gone or self.state is not _CLOSED
        code, reason = self._end or (_ABNORMAL, "")
        return {"type": "websocket.disconnect", "code": code, "reason": reason}

    async def _wait_undecided(self) -> None:
        """Wait while there is no session yet: for the peer to leave, or another task to decide."""
        while self.state is _CONNECTING and not await self.wire_wait_leave():
            pass
        if self.state is _OPEN:
            await self.wire_wait_message()
        elif self.state is _DENYING:
            while (await self.exchange.receive())["type"] != "http.disconnect":
                pass

    async def _send_rarer(self, event: object, message: Message) -> None:
        state = self.state
        if state is _LOST and str(event).startswith("websocket."):
            self.raise_disconnected(None)
        if state is _CONNECTING and event == "websocket.accept":
            try:
                full = self.wire_accept(message.get("subprotocol"), message.get("headers", ()))
            except OSError as error:
                self.raise_disconnected(error)
            if full:
                await self._flush()
        elif state is _CONNECTING and event == "websocket.close":
            # Its code and reason are not looked at: nothing of them is sent, and FastAPI's reason is no text here.
            self.state = _CLOSED
            self._end = (_ABNORMAL, "")
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await self.exchange.send({"type": "http.response.start", "status": 403, "headers": headers})
            await self.exchange.send({"type": "http.response.body", "body": b"403 Forbidden\n"})
        elif state is _CONNECTING and event == "websocket.http.response.start":
            await self.exchange.send({**message, "type": "http.response.start"})
            self.state = _DENYING
        elif state is _DENYING and event == "websocket.http.response.body":
            more = message.get("more_body", False)
            if not more:
                self.state = _CLOSED
                self._end = (_ABNORMAL, "")
            await self.exchange.send({**message, "type": "http.response.body"})
        elif state is _OPEN and event == "websocket.close":
            code, reason = check_close(message)
            self.state = _CLOSED
            self._end = (code, reason)
            try:
                full = self.wire_close(code, reason)
            except OSError as error:
                self.raise_disconnected(error)
            if full:
                await self._flush()
        else:
            raise UnexpectedMessage(
                f"send() got {event!r} while the WebSocket is {state.value}; expected {_EXPECTED[state]}"
            )

    def lose(self, code: int, reason: str = "") -> None:
        """The session is over, and not by the app's doing: `code` and `reason` are what it will be told."""
        if self.state is _OPEN or self.state is _CONNECTING:
            self.state = _LOST
            self._end = (code, reason)

    # -- waiting ---------------------------------------------------------------------------------------------

    async def _flush(self) -> None:
        try:
            await self.wire_flush()
        except OSError as error:
            self.raise_disconnected(error)

    async def _give_way(self) -> None:
        self._turn.calls = 0
        await trio.lowlevel.checkpoint()

    def raise_disconnected(self, error: OSError | None) -> NoReturn:
        """Say that there is nobody to send to, by the one error that the boundary knows by identity."""
        if self.gone is None:
            if error is not None:
                why = f"the client is gone ({error.strerror or error})"
            else:
                code, reason = self._end or (_ABNORMAL, "")
                why = f"the WebSocket is closed ({code}{' ' if reason else ''}{reason})"
            self.gone = ClientDisconnected(errno.EPIPE if error is None else error.errno, why)
        raise self.gone from error

    # -- what the protocol supplies --------------------------------------------------------------------------

    async def wire_wait_message(self) -> None:
        """Wait for `messages` to have something, or for the session to be over."""
        raise NotImplementedError

    async def wire_wait_leave(self) -> bool:
        """Before the session is open: True once the peer has left; False as well when another task has decided."""
        raise NotImplementedError

    def wire_accept(self, subprotocol: Any, headers: Any) -> bool:
        """Open the session and move `state`; True if writing would block."""
        raise NotImplementedError

    def wire_send(self, kind: int, payload: bytes) -> bool | None:
        """Write a message: text (1) or bytes (2); True if it would block, None if nothing can be written yet."""
        raise NotImplementedError

    def wire_close(self, code: int, reason: str) -> bool:
        """Write a close frame on the app's behalf; True if it would block."""
        raise NotImplementedError

    async def wire_flush(self) -> None:
        """Wait until what was written has been taken by the kernel."""
        raise NotImplementedError


def check_close(message: Message) -> tuple[int, str]:
    """The code and reason of a `websocket.close` event.

    Raises:
        UnexpectedMessage: they cannot stand in a close frame.
    """
    code = message.get("code", 1000)
    code = 1000 if code is None else code
    reason = message.get("reason") or ""
    registered = isinstance(code, int) and 1000 <= code <= 1014 and code not in (1004, 1005, 1006)
    if not registered and not (isinstance(code, int) and 3000 <= code <= 4999):
        raise UnexpectedMessage(
            f"'code' of 'websocket.close' must be 1000 to 1003, 1007 to 1014 or 3000 to 4999, not {code!r:.40}"
        )
    if not isinstance(reason, str):
        raise UnexpectedMessage(f"'reason' of 'websocket.close' must be a str, not {type(reason).__name__}")
    try:
        size = len(reason.encode())
    except UnicodeEncodeError:
        raise UnexpectedMessage("'reason' of 'websocket.close' has lone surrogates") from None
    if size > _REASON_MAX:
        raise UnexpectedMessage(f"'reason' of 'websocket.close' has {size} bytes; {_REASON_MAX} are the most")
    return int(code), reason


def _refuse_text(data: object, error: Exception) -> NoReturn:
    if data is None:
        raise UnexpectedMessage("'websocket.send' needs 'bytes' or 'text'") from None
    if isinstance(error, UnicodeEncodeError):
        raise UnexpectedMessage(
            "'text' of 'websocket.send' has lone surrogates: it is no valid text"
        ) from None
    raise UnexpectedMessage(f"'text' of 'websocket.send' must be a str, not {type(data).__name__}") from None


def _as_bytes(data: Any) -> bytes:
    if isinstance(data, bytes | bytearray | memoryview):
        return bytes(data)
    raise UnexpectedMessage(f"'bytes' of 'websocket.send' must be bytes, not {type(data).__name__}")
