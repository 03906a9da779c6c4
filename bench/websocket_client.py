"""A WebSocket client that costs little: frames made in advance, answers compared with what they must be.

Called by `websocket_load.py`, in the benchmark's own process. A `Script` is what connections say, and what they must
hear: every message differs from those before it, in its text, in its mask, and on each connection in where it begins.
A `Member` is one open connection. Nothing is decoded while a server is measured: an answer is compared byte by byte
with the frame that RFC 6455 has for it; only where messages are compressed, which each server does in its own way, are
they decompressed first.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import socket
import zlib
from dataclasses import dataclass

from bench.measure import TurnError
from bench.process import ServerProcess
from bench.servers import HOST

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_TAIL = b"\x00\x00\xff\xff"  # what a compressed message lacks of a flushed block (RFC 7692, 7.2.1)
_TEXT, _CLOSE, _PING, _PONG = 0x1, 0x8, 0x9, 0xA
_FINAL, _COMPRESSED = 0x80, 0x40
_BUFFER = 65536


# -- frames -------------------------------------------------------------------------------------------------


def frame(opcode: int, payload: bytes, *, mask: bytes | None = None, compressed: bool = False) -> bytes:
    """One whole message in one frame, as a client (with a mask) or a server (without) sends it."""
    first = _FINAL | opcode | (_COMPRESSED if compressed else 0)
    bit = 0x80 if mask else 0
    if len(payload) < 126:
        head = bytes((first, bit | len(payload)))
    elif len(payload) < 1 << 16:
        head = bytes((first, bit | 126)) + len(payload).to_bytes(2, "big")
    else:
        head = bytes((first, bit | 127)) + len(payload).to_bytes(8, "big")
    return head + (mask + _masked(payload, mask) if mask else payload)


def _masked(payload: bytes, mask: bytes) -> bytes:
    key = (mask * (len(payload) // 4 + 1))[: len(payload)]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(len(payload), "big")


def frame_end(data: bytes | bytearray) -> int:
    """The length of the first frame that a server sent; 0 while it is not all there."""
    if len(data) < 2:
        return 0
    length, start = data[1] & 0x7F, 2
    if length >= 126:
        start = 4 if length == 126 else 10
        length = int.from_bytes(data[2:start], "big") if len(data) >= start else _BUFFER
    return start + length if len(data) >= start + length else 0


@dataclass(frozen=True)
class Script:
    """Messages in their order: what is sent, the text that must come back, and its frame if it is not compressed."""

    sent: list[bytes]
    texts: list[bytes]
    answers: list[bytes]

    def __len__(self) -> int:
        return len(self.sent)


def write_script(size: int, seed: int, *, deflate_bits: int = 0, number: int = 1024) -> Script:
    """Messages of `size` bytes of JSON text, all different; compressed for a window of so many bits, if any."""
    source = random.Random(seed)
    texts = [_text(source, size) for _ in range(number)]
    sent = []
    for text in texts:
        mask = source.randbytes(4)
        if deflate_bits:
            packer = zlib.compressobj(6, zlib.DEFLATED, -deflate_bits)
            packed = packer.compress(text) + packer.flush(zlib.Z_SYNC_FLUSH)
            sent.append(frame(_TEXT, packed.removesuffix(_TAIL), mask=mask, compressed=True))
        else:
            sent.append(frame(_TEXT, text, mask=mask))
    return Script(sent, texts, [frame(_TEXT, text) for text in texts])


_WORDS = (
    "move", "stay", "left", "right", "score", "player", "north", "south", "grüße", "hello", "again", "thanks",
    "blue", "green", "house", "river", "stone", "light", "today", "later",
)  # fmt: skip


def _text(source: random.Random, size: int) -> bytes:
    # The shape of what chats and games send; the rest of the size is letters, so that all are equally long.
    words = " ".join(source.choices(_WORDS, k=max(1, size // 8)))
    start = json.dumps({"n": source.getrandbits(24), "t": words}, ensure_ascii=False).encode()[: size - 2]
    whole = start.decode("utf-8", errors="ignore").encode().removesuffix(b'"}')
    return whole + "".join(source.choices("abcdefghij", k=size - 2 - len(whole))).encode() + b'"}'


# -- connections --------------------------------------------------------------------------------------------


class Member:
    """One open connection, and the message that it waits for."""

    def __init__(self, connection: socket.socket, deflate_bits: int = 0) -> None:
        self.socket = connection
        self.fd = connection.fileno()
        self.deflate_bits = deflate_bits  # of the window for what it sends; 0: not compressed
        self.position = 0
        self.sent_at = 0.0
        self.expected = b""
        self._unpacker = zlib.decompressobj(-15) if deflate_bits else None
        self._partial = bytearray()

    def take(self, text: bytes) -> bool:
        """Read what has come; True when it is the one message that was expected, False while it is incomplete.

        A ping is answered.

        Raises:
            TurnError: it is something else, or the connection has ended.
        """
        try:
            data = self.socket.recv(_BUFFER)
        except BlockingIOError:
            return False
        if data == self.expected and not self._partial:
            return True
        if not data:
            raise TurnError("the server closed a WebSocket in the middle of the load")
        self._partial += data
        found = False
        while end := frame_end(self._partial):
            whole = bytes(self._partial[:end])
            del self._partial[:end]
            if whole[0] == _FINAL | _PING:
                self.socket.send(frame(_PONG, whole[2:], mask=b"\x01\x02\x03\x04"))
            elif not found and (whole == self.expected or self._unpack(whole) == text):
                found = True
            else:
                raise TurnError(
                    f"the answer to {text[:60]!r} is, or is followed by, the frame {whole[:80]!r}"
                )
        return found

    def _unpack(self, whole: bytes) -> bytes | None:
        if self._unpacker is None or whole[0] != _FINAL | _COMPRESSED | _TEXT:
            return None
        start = 2 if whole[1] < 126 else 4
        return self._unpacker.decompress(whole[start:] + _TAIL)

    def end(self) -> None:
        """Say goodbye and close, without waiting for the answer."""
        try:
            self.socket.send(frame(_CLOSE, (1000).to_bytes(2, "big"), mask=b"\x01\x02\x03\x04"))
        except OSError:
            pass
        self.socket.close()


def open_member(process: ServerProcess, path: str, *, deflate: bool = False) -> Member:
    """Connect and upgrade.

    Raises:
        TurnError: the server does not do what it should, or not what is measured.
    """
    key = base64.b64encode(os.urandom(16))
    offer = b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n" if deflate else b""
    request = (
        b"GET %s HTTP/1.1\r\nHost: %s:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nUser-Agent: bench\r\n"
        b"Sec-WebSocket-Key: %s\r\nSec-WebSocket-Version: 13\r\n%s\r\n"
    ) % (path.encode(), HOST.encode(), process.port, key, offer)
    connection = process.connect()
    try:
        connection.sendall(request)
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            part = connection.recv(_BUFFER)
            if not part:
                raise TurnError(f"the server closed the connection at an upgrade, after {answer[:200]!r}")
            answer += part
        bits = _check_upgrade(answer, key, deflate=deflate)
        connection.setblocking(False)
    except BaseException:
        connection.close()
        raise
    return Member(connection, bits)


def _check_upgrade(answer: bytes, key: bytes, *, deflate: bool) -> int:
    fields = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(b":") for line in answer.split(b"\r\n")[1:])
    }
    accept = base64.b64encode(hashlib.sha1(key + _GUID).digest())
    if not answer.startswith(b"HTTP/1.1 101 ") or fields.get(b"sec-websocket-accept") != accept:
        raise TurnError(f"an upgrade to WebSocket was answered {answer[:200]!r}")
    extensions = fields.get(b"sec-websocket-extensions", b"")
    if deflate != (b"permessage-deflate" in extensions):
        raise TurnError(f"compression was {'' if deflate else 'not '}offered, and answered {extensions!r}")
    if not deflate:
        return 0
    found = re.search(rb"client_max_window_bits=\"?(\d+)", extensions)
    return int(found[1]) if found else 15
