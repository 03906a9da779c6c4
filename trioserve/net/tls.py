"""TLS on a raw non-blocking socket: the transport of an encrypted connection, and its handshake.

`Certificates.wrap` makes one where the listener would make a `Transport`; `worker/connection.py` awaits `handshake`
before anything else. Cancelling the handshake leaves the transport to be closed; cancelling any other wait loses
nothing. Here is what all encrypted connections have in common; how bytes come to OpenSSL and from it is in
`tls_records.py`, and in `ktls.py` for those who want the kernel to encrypt.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import ssl
import struct
import sys
import termios
from collections.abc import Awaitable, Callable
from contextlib import suppress

from trioserve.net.tls_info import TlsObject, TlsSocket
from trioserve.net.transport import READ_SIZE, Transport
from trioserve.net.watch import Watch

# The most that one record carries (RFC 8446 section 5.1).
RECORD_SIZE = 16 * 1024

# Parts up to here become one run of records.
_JOIN_SIZE = 64 * 1024

# TIOCOUTQ of a socket with nothing to send.
NOTHING = b"\0\0\0\0"

# Where tcpi_bytes_acked is in what TCP_INFO gives (linux/tcp.h; Linux 4.1 and later).
_BYTES_ACKED = 120
_TCP_INFO_SIZE = _BYTES_ACKED + 8

# tcpi_state of a connection that was reset; one that has only had the peer's FIN is in TCP_CLOSE_WAIT.
_TCP_CLOSE = 7


class HandshakeFailed(OSError):
    """The peer did not complete the handshake: it left, it sent what is no TLS, or nothing was agreed on.

    Attributes:
        plain_http: it began a request in plain text, and can be told so.
    """

    plain_http = False


class TlsFault(ConnectionAbortedError):
    """The peer has broken the rules of TLS after the handshake, or has said that we did (an alert)."""


class TlsTransport(Transport):
    """The plain bytes of one encrypted connection; see `Transport` for what each method promises.

    Attributes:
        tls: its state in OpenSSL.
        established: the handshake is complete.
    """

    __slots__ = ("_ahead", "_counted", "_raw", "established", "tls")

    sends_files = False

    def __init__(self, sock: socket.socket, watch: Watch, tls: TlsObject | TlsSocket) -> None:
        super().__init__(sock, watch)
        self.tls = tls
        self.established = False
        self._ahead: bytes | None = None  # read by somebody who only wanted to look; b"": the end
        self._raw = False  # no TLS any more (or it never came about): what is read is thrown away
        self._counted = (0, 0)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.watch!r} in={self.bytes_read} out={self.bytes_written}>"

    # -- what is different where the kernel encrypts ---------------------------------------------------------

    def shake_hands(self) -> bool:
        """One step of the handshake; True if that was the last. Otherwise there is something to be waited for.

        Raises:
            OSError, ValueError: there will be no agreement.
        """
        raise NotImplementedError

    @property
    def is_in_record(self) -> bool:
        """The kernel has taken a record in part, or what is in front of it: nothing else can be sent now."""
        raise NotImplementedError

    def _decrypt(self, size: int) -> bytes | None:
        """The next data, of one record; b"" at the end, None if there is no whole record yet."""
        raise NotImplementedError

    def _unwrap(self) -> None:
        """Send close_notify."""
        raise NotImplementedError

    # -- reading ---------------------------------------------------------------------------------------------

    def recv_nowait(self, size: int = READ_SIZE) -> bytes | None:
        if self._ahead is not None:
            return self._take_ahead(size)
        if self._raw:
            return self._recv_raw(size)
        data = self._decrypt(size)
        if data:
            self.bytes_read += len(data)
        return data

    def _take_ahead(self, size: int) -> bytes:
        data = self._ahead
        assert data is not None
        if not data:
            return data  # the end stays the end
        self._ahead = data[size:] or None
        data = data[:size]
        self.bytes_read += len(data)
        return data

    def _recv_raw(self, size: int) -> bytes | None:
        """What a peer still sends that nobody will decrypt."""
        try:
            data = socket.socket.recv(self.sock, size)
        except BlockingIOError:
            self.watch.readable = False
            return None
        except OSError as error:
            self._note_broken(error)
            return b""
        if not data:
            self.watch.note_hangup(reset=False)
        return data

    def look_ahead(self) -> bool:
        """Read without anybody having asked for it, once: True if nothing is there yet; notes close_notify, FIN, RST.

        A look at the kernel's buffer would not tell the end from the beginning of a request: both are records.
        """
        if self._ahead is not None:
            return False
        if self._raw or not self.established:
            return True
        data = self._decrypt(READ_SIZE)
        if data is None:
            return True
        self._ahead = data
        # The edge may have been used up with this: nobody but us knows of these bytes.
        self.watch.readable = True
        self.watch.wake_reader()
        return False

    def is_peer_gone(self) -> bool:
        if not self.watch.hangup:
            self.look_ahead()
        return self.watch.hangup

    def has_input(self) -> bool:
        # A record that has only begun is none: a client could keep a connection for ever by one byte at a time.
        return not self.look_ahead() and bool(self._ahead)

    # -- writing ---------------------------------------------------------------------------------------------

    def send_parts_nowait(self, parts: list[bytes | memoryview], flags: int = 0) -> bool:
        while parts:
            data = parts[0]
            taken = 1
            if len(parts) > 1 and len(data) < RECORD_SIZE:
                # Full records: each costs the peer a decryption, and us one, whatever is in it.
                size = len(data)
                while taken < len(parts) and size < _JOIN_SIZE:
                    size += len(parts[taken])
                    taken += 1
                data = b"".join(parts[:taken])
            sent = self.send_nowait(data, flags)
            if sent < len(data):
                parts[:taken] = [memoryview(data)[sent:]]
                return True
            del parts[:taken]
        return False

    def sendfile_nowait(self, fd: int, offset: int, count: int) -> int | None:  # noqa: ARG002 - never in the clear
        # As of a file that cannot be sent like this: it will be read.
        raise OSError(errno.EINVAL, "the kernel does not encrypt on this connection")

    def send_with_file_nowait(self, head: bytes, fd: int, offset: int, count: int) -> int:
        sent = self.send_nowait(head)
        if sent == len(head):
            with suppress(OSError):
                sent += self.sendfile_nowait(fd, offset, count) or 0
        return sent

    def has_progressed(self) -> bool:
        # Not by what the kernel holds: that is ciphertext, of which nobody knows how much there was.
        try:
            info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
            acked: int = struct.unpack_from("=Q", info, _BYTES_ACKED)[0]
        except (OSError, AttributeError, struct.error):
            return self._has_less_queued()
        before, self._taken = self._taken, acked
        return acked > before

    def _has_less_queued(self) -> bool:
        """Where the system does not count: a socket that was full has made room, or we could not have written."""
        try:
            queued = fcntl.ioctl(self.sock, termios.TIOCOUTQ, NOTHING)
        except (OSError, ValueError):
            return False
        written, left = self._counted
        self._counted = self.bytes_written, int.from_bytes(queued, sys.byteorder)
        return self.bytes_written > written or self._counted[1] < left

    # -- the end ---------------------------------------------------------------------------------------------

    def say_goodbye(self) -> None:
        """Send close_notify if that can be done at once; not in the middle of a record, whose end must be missed."""
        raw, self._raw = self._raw, True
        if raw or not self.established or self.broken is not None or self.is_in_record:
            return
        # Nothing is decrypted after this.
        self._unwrap()

    def shutdown_write(self) -> None:
        self.outbox.flush()
        self.say_goodbye()
        try:
            # Not the method of a wrapped socket, which would forget its TLS.
            socket.socket.shutdown(self.sock, socket.SHUT_WR)
        except OSError as error:
            self._note_broken(error)

    def answer_plainly(self, data: bytes) -> None:
        """Last words for a peer that does not speak TLS; what it still sends is thrown away."""
        self._raw = True
        try:
            socket.socket.send(self.sock, data)
        except OSError as error:
            self._note_broken(error)

    def close(self) -> None:
        if not self.watch.closed:
            self.outbox.flush()
            self.say_goodbye()
        super().close()

    def _note_broken(self, error: OSError) -> None:
        super()._note_broken(self._as_connection_error(error))

    def _as_connection_error(self, error: OSError) -> OSError:
        """OpenSSL's refusals are the peer's doing as a reset is; whoever writes gets what it gets for one."""
        if not isinstance(error, ssl.SSLError):
            return error
        if self._raw:
            return BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))  # it is we who have said goodbye
        reason = error.reason or error.strerror or "the connection has ended"
        broken = TlsFault(errno.ECONNABORTED, f"TLS: {reason.lower().replace('_', ' ')}")
        broken.__cause__ = error.with_traceback(None)
        return broken


def is_reset(sock: socket.socket) -> bool:
    """Whether what Python calls an unexpected end was an RST: 3.11 makes no difference."""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE
    except (OSError, AttributeError, IndexError):
        return False


# -- the handshake -------------------------------------------------------------------------------------------


async def wait_hello(transport: TlsTransport) -> None:
    """Return once the first bytes of a client are there.

    Raises:
        HandshakeFailed: they are the beginning of a request in plain text, or none have come and none will.
    """
    while True:
        try:
            found = socket.socket.recv(transport.sock, 8, socket.MSG_PEEK)
        except BlockingIOError:
            transport.watch.readable = False
            await transport.watch.wait_readable()
            continue
        except OSError as error:
            raise _failed(transport, error) from None
        if not found:
            transport.watch.note_hangup(reset=False)
            raise HandshakeFailed(0, "the client left without a word")
        # A method is upper-case letters; a record of a handshake begins with 22.
        if found[0:1].isalpha() and found[0:1].isupper():
            failure = HandshakeFailed(0, "the client speaks plain HTTP to a TLS port")
            failure.plain_http = True
            raise failure
        return


async def handshake(transport: TlsTransport, take_turn: Callable[[], Awaitable[None]]) -> None:
    """Agree with the client on keys. The caller bounds the time.

    `take_turn` is awaited before each step: nobody knows which one will be the expensive one, since what the client
    sends may come in any number of parts.

    Raises:
        HandshakeFailed: the peer's fault.
    """
    watch = transport.watch
    while True:
        await take_turn()
        try:
            if transport.shake_hands():
                break
        except (OSError, ValueError) as error:
            raise _failed(transport, error) from None
        if transport.is_in_record:
            await watch.wait_writable()
        else:
            await watch.wait_readable()
    watch.look_ahead = transport.look_ahead
    # The client's first request may have come with the end of its handshake; and its edge is used up.
    watch.readable = True


def _failed(transport: TlsTransport, error: Exception) -> HandshakeFailed:
    broken = error if isinstance(error, OSError) else OSError(0, str(error))
    transport._note_broken(broken)
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    # Without the exception itself: its traceback holds the frames of the connection.
    return HandshakeFailed(0, f"{reason}".lower().replace("_", " "))
