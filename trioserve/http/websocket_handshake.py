"""The opening of a WebSocket: what the request must be (RFC 6455 section 4.2, RFC 8441), and what the answer says.

`websocket.py` and `http1_websocket.py` call these; nothing here waits or keeps anything.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass

from trioserve.asgi.exchange import invalid_header, listed
from trioserve.errors import InvalidResponse, RequestRefused
from trioserve.http.websocket_frames import Deflater, Inflater
from trioserve.structure.context import Scope

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_VERSION = b"13"

Fields = list[tuple[bytes, bytes]]

#: how messages are compressed, by the setting `websocket_compression`; `contexts` are kept between messages, or not
COMPRESSION = {"on": True, "contextless": False}

# The window we compress with, and ask the peer to: nearly all the gain of 15 bits for a fifth of the memory.
_WINDOW_BITS = 12

# Longest value of Sec-WebSocket-Extensions that is looked at: 1 ms to parse at worst. A browser's has 45 bytes.
_OFFERS_SIZE = 1024


@dataclass(slots=True)
class WebSocketRequest:
    """The request that would open a session.

    Attributes:
        target: path and query, in origin-form.
        http_version: "1.1" or "2".
        headers: in order, names in lower case.
        early: bytes that came with the request, behind it: the first frames, perhaps (HTTP/1 only).
        scope: its http scope, which becomes that of the session; None: the exchange is asked for it.
    """

    target: bytes
    http_version: str
    headers: Fields
    early: bytes = b""
    scope: Scope | None = None

    def values(self, name: bytes) -> list[bytes]:
        """The values of a field, in order."""
        return [value for found, value in self.headers if found == name or found.lower() == name]

    @property
    def subprotocols(self) -> list[str]:
        """What the peer offers, in its order of preference."""
        offered = b",".join(self.values(b"sec-websocket-protocol"))
        return [name.strip().decode("latin-1") for name in offered.split(b",") if name.strip()]


def names_websocket(upgrade: bytes) -> bool:
    """Whether the value of an Upgrade field, in lower case, asks for WebSocket among others."""
    return b"websocket" in [protocol.strip() for protocol in upgrade.split(b",")]


def check_request(request: WebSocketRequest) -> None:
    """Check what a request to open a session must carry.

    Raises:
        RequestRefused: it does not: 426 for another version (HTTP/1.1), else 400.
    """
    versions = request.values(b"sec-websocket-version")
    if versions != [_VERSION]:
        # RFC 6455 section 4.4. HTTP/2 has no 426, and no draft of WebSocket was ever spoken over it.
        status = 426 if versions and request.http_version == "1.1" else 400
        shown = b", ".join(versions).decode("latin-1")
        raise RequestRefused(
            status, f"Sec-WebSocket-Version {shown:.40}" if versions else "no WebSocket version"
        )
    if request.http_version == "1.1":
        keys = request.values(b"sec-websocket-key")
        if len(keys) != 1 or not _is_key(keys[0]):
            raise RequestRefused(400, "Sec-WebSocket-Key is not 16 bytes in base64")


def _is_key(key: bytes) -> bool:
    try:
        return len(base64.b64decode(key, validate=True)) == 16
    except binascii.Error:
        return False


def accept_value(request: WebSocketRequest) -> bytes:
    """What Sec-WebSocket-Accept must say to the peer's key."""
    (key,) = request.values(b"sec-websocket-key")
    # Not for secrecy: it shows that the server has understood the request (RFC 6455 section 1.3).
    return base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())


def accept_fields(request: WebSocketRequest, subprotocol: object, fields: object) -> Fields:
    """The app's part of the answer.

    Raises:
        InvalidResponse: a subprotocol that was not offered, or a field that is the server's.
    """
    found: Fields = []
    if subprotocol is not None:
        if subprotocol not in request.subprotocols:
            offered = ", ".join(request.subprotocols) or "none"
            raise InvalidResponse(
                f"subprotocol {subprotocol!r:.80} was not offered by the client: {offered:.200}"
            )
        found.append((b"sec-websocket-protocol", str(subprotocol).encode("latin-1")))
    for field in listed(fields):
        name = field[0] if isinstance(field, tuple | list) and len(field) == 2 else None
        if isinstance(name, bytes) and (
            name.lower().startswith(b"sec-websocket-") or name.lower() == b"upgrade"
        ):
            why = "the server's to set; a subprotocol has a key of its own in 'websocket.accept'"
            raise invalid_header(name, field[1], why)
        found.append(field)
    return found


@dataclass(slots=True)
class Compression:
    """What was agreed on about permessage-deflate."""

    answer: bytes
    inflater: Inflater
    deflater: Deflater


def agree_compression(request: WebSocketRequest, mode: str) -> Compression | None:
    """Choose from the peer's offers (RFC 7692 section 5.1), or None: nothing is compressed.

    Offers of unusual length are declined unread.

    Raises:
        RequestRefused: its field is malformed.
    """
    lines = request.values(b"sec-websocket-extensions")
    if mode not in COMPRESSION or not lines:
        return None
    offers = b", ".join(lines)
    if len(offers) > _OFFERS_SIZE:
        return None
    # Only here, because all of that library comes with it.
    from websockets.exceptions import InvalidHeader, NegotiationError
    from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
    from websockets.headers import build_extension, parse_extension

    contextless = not COMPRESSION[mode]
    factory = ServerPerMessageDeflateFactory(
        server_no_context_takeover=contextless,
        client_no_context_takeover=contextless,
        server_max_window_bits=_WINDOW_BITS,
        client_max_window_bits=_WINDOW_BITS,
    )
    try:
        parsed = parse_extension(offers.decode("latin-1"))
    except InvalidHeader:
        raise RequestRefused(400, "malformed Sec-WebSocket-Extensions") from None
    for name, parameters in parsed:
        if name != factory.name:
            continue
        try:
            answer, agreed = factory.process_request_params(parameters, [])
        except (NegotiationError, ValueError):
            # The next offer, perhaps. ValueError: a window of 8 bits, which zlib does not have (websockets < 17.4).
            continue
        return Compression(
            build_extension([(name, answer)]).encode("latin-1"),
            Inflater(agreed.remote_max_window_bits, keep=not agreed.remote_no_context_takeover),
            Deflater(agreed.local_max_window_bits, keep=not agreed.local_no_context_takeover),
        )
    return None
