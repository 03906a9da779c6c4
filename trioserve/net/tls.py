"""TLS on a raw non-blocking socket: the transport of an encrypted connection, and its handshake.

The listener makes a `TlsTransport` where it would make a `Transport`; `worker/connection.py` awaits `handshake` before
anything else. OpenSSL reads from and writes to the descriptor itself, so there is no buffer of ours between them and no
copy. Cancelling the handshake leaves the transport to be closed; cancelling any other wait loses nothing.

What the hub's edges ask for (`watch.py`) is harder to promise here, since OpenSSL takes a record off the kernel at a
time: `readable` is cleared only when it asked for more and the kernel had nothing, or when a record was read to its
end and the kernel has nothing left. What OpenSSL has begun to send it must be given again, so the bytes of a record
that the kernel took in part are kept here (`_owed`) until it is whole.
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

from trioserve.config.tls_context import KTLS_OPTION
from trioserve.net.transport import READ_SIZE, Transport
from trioserve.net.watch import Watch

# The most that one record carries (RFC 8446 section 5.1). CPython sets SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER and no
# SSL_MODE_ENABLE_PARTIAL_WRITE: of a longer write that blocks nobody can tell how much has gone.
RECORD_SIZE = 16 * 1024

# Parts up to here become one run of records.
_JOIN_SIZE = 64 * 1024

# FIONREAD of a socket with nothing to read.
_NOTHING = b"\0\0\0\0"

# Where tcpi_bytes_acked is in what TCP_INFO gives (linux/tcp.h; Linux 4.1 and later).
_BYTES_ACKED = 120
_TCP_INFO_SIZE = _BYTES_ACKED + 8

# tcpi_state of a connection that was reset; one that has only had the peer's FIN is in TCP_CLOSE_WAIT.
_TCP_CLOSE = 7

# getsockopt(SOL_TLS, TLS_TX): what the kernel encrypts with (linux/tls.h).
_SOL_TLS, _TLS_TX = 282, 1


class HandshakeFailed(OSError):
    """The peer did not complete the handshake: it left, it sent what is no TLS, or nothing was agreed on.

    Attributes:
        plain_http: it began a request in plain text, and can be told so.
    """

    plain_http = False


class TlsTransport(Transport):
    """The plain bytes of one encrypted connection; see `Transport` for what each method promises.

    Attributes:
        sock: wrapped, with `do_handshake_on_connect=False`.
        established: the handshake is complete.
        ktls: the kernel encrypts what is sent, so that it can send files by itself.
    """

    __slots__ = (
        "_ahead",
        "_blocked",
        "_counted",
        "_descriptor",
        "_owed",
        "_raw",
        "_read",
        "_write",
        "established",
        "ktls",
    )

    sock: ssl.SSLSocket

    def __init__(self, sock: ssl.SSLSocket, watch: Watch) -> None:
        super().__init__(sock, watch)
        self.established = False
        self.ktls = False
        self._read = sock.read
        self._write = sock.send
        self._descriptor = sock.fileno()
        self._ahead: bytes | None = None  # read by somebody who only wanted to look; b"": the end
        self._owed = b""  # given to OpenSSL, or half with the kernel, and not reported as written yet
        self._blocked = False  # the record at the beginning of `_owed` is not with the kernel yet
        self._raw = False  # no TLS any more (or it never came about): what is read is thrown away
        self._counted = (0, 0)

    def __repr__(self) -> str:
        return f"<TlsTransport {self.watch!r} in={self.bytes_read} out={self.bytes_written}>"

    @property
    def sends_files(self) -> bool:  # type: ignore[override]  # nobody sets it
        """Only where the kernel encrypts."""
        return self.ktls

    # -- reading ---------------------------------------------------------------------------------------------

    def recv_nowait(self, size: int = READ_SIZE) -> bytes | None:
        if self._ahead is not None:
            return self._take_ahead(size)
        if self._raw:
            return self._recv_raw(size)
        watch = self.watch
        try:
            data = self._read(size)
        except ssl.SSLWantReadError:
            watch.readable = False
            return None
        except (OSError, ValueError) as error:
            return self._fail_to_read(error)
        received = len(data)
        if received:
            self.bytes_read += received
            # The record has been read to its end, and the kernel has no other: the next arrival is a new edge. Asking
            # costs a quarter of another read that finds nothing. Not so with a FIN behind the data.
            if (
                received < size
                and not watch.hangup
                and fcntl.ioctl(self._descriptor, termios.FIONREAD, _NOTHING) == _NOTHING
            ):
                watch.readable = False
        else:
            watch.note_hangup(reset=False)
        return data

    def _fail_to_read(self, error: OSError | ValueError) -> bytes | None:
        if isinstance(error, ssl.SSLWantWriteError):
            # OpenSSL has something of its own to say first, and the kernel has no room for it.
            self.watch.readable = False
            self.watch.reads_when_writable = True
            return None
        if isinstance(error, ssl.SSLEOFError) and is_reset(self.sock):
            error = ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        if isinstance(error, ssl.SSLZeroReturnError | ssl.SSLEOFError):
            # close_notify, or a FIN without one. Whether something is missing is for the framing of HTTP to say.
            self.watch.note_hangup(reset=False)
        else:
            # A wrapped socket that was closed says so with a ValueError.
            self._note_broken(error if isinstance(error, OSError) else OSError(errno.EBADF, str(error)))
        return b""

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
        try:
            data: bytes | None = self._read(READ_SIZE)
        except ssl.SSLWantReadError:
            # Left as it is: whoever reads will find out, and a record that has begun gives an edge when it goes on.
            return True
        except (OSError, ValueError) as error:
            data = self._fail_to_read(error)
            if data is None:
                return True
        else:
            if not data:
                self.watch.note_hangup(reset=False)
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

    def send_nowait(self, data: bytes | memoryview, flags: int = 0) -> int:  # noqa: ARG002 - a record leaves at once
        if len(data) > RECORD_SIZE or self._owed or not data:
            return self._send_records(data)
        try:
            sent = self._write(data)
        except OSError as error:
            self._note_blocked(error, data)
            return 0
        self.bytes_written += sent
        return sent

    def _send_records(self, data: bytes | memoryview) -> int:
        """Longer than a record, or after one that the kernel took in part."""
        size = len(data)
        view = memoryview(data)
        done = 0
        if self._owed:
            if self._blocked and not self._write_again():
                return 0
            done = self._settle_owed(view)
        while done < size:
            part = view[done : done + RECORD_SIZE]
            try:
                sent = self._write(part)
            except OSError as error:
                self._note_blocked(error, part)
                break
            self.bytes_written += sent
            done += sent
        return done

    def _note_blocked(self, error: OSError, part: bytes | memoryview) -> None:
        """The kernel takes no more of this record: it has to be given to OpenSSL again. Raises what is worse."""
        if isinstance(error, ssl.SSLWantWriteError | ssl.SSLWantReadError):
            self._owed = bytes(part)
            self._blocked = True
            # To write it must read first: a handshake in the middle of a connection.
            self.watch.writes_when_readable = isinstance(error, ssl.SSLWantReadError)
            return
        broken = _as_connection_error(error)
        self._note_broken(broken)
        raise broken

    def _write_again(self) -> bool:
        try:
            self.bytes_written += self._write(self._owed)
        except OSError as error:
            self._note_blocked(error, self._owed)
            return False
        self._blocked = self.watch.writes_when_readable = False
        return True

    def _settle_owed(self, view: memoryview) -> int:
        """How much of what the caller wants written has been written already, with the record that was in the way.

        A caller that comes with something else has given up what it had wanted to send; it is on the wire all the same.
        """
        done = min(len(view), len(self._owed))
        if view[:done] != self._owed[:done]:
            self._owed = b""
            return 0
        self._owed = self._owed[done:]
        return done

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

    def sendfile_nowait(self, fd: int, offset: int, count: int) -> int | None:
        if self._blocked and not self._write_again():
            return None
        self._owed = b""
        return super().sendfile_nowait(fd, offset, count)

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
            queued = fcntl.ioctl(self.sock, termios.TIOCOUTQ, _NOTHING)
        except (OSError, ValueError):
            return False
        written, left = self._counted
        self._counted = self.bytes_written, int.from_bytes(queued, sys.byteorder)
        return self.bytes_written > written or self._counted[1] < left

    # -- the end ---------------------------------------------------------------------------------------------

    def say_goodbye(self) -> None:
        """Send close_notify if that can be done at once; not in the middle of a record, whose end must be missed."""
        if self._raw or not self.established or self.broken is not None or self._blocked:
            self._raw = True
            return
        self._raw = True
        try:
            # Sends ours, then looks for the peer's, which is either there or not. Nothing is decrypted after this.
            self.sock.unwrap()
        except (OSError, ValueError):
            pass

    def shutdown_write(self) -> None:
        self.say_goodbye()
        try:
            # Not the method of the wrapped socket, which would forget its TLS.
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
            self.say_goodbye()
        super().close()

    def _note_broken(self, error: OSError) -> None:
        super()._note_broken(_as_connection_error(error))


def _as_connection_error(error: OSError) -> OSError:
    """OpenSSL's refusals are the peer's doing as a reset is; whoever writes gets what it gets for one."""
    if not isinstance(error, ssl.SSLError):
        return error
    reason = error.reason or error.strerror or "the connection has ended"
    broken = ConnectionAbortedError(errno.ECONNABORTED, f"TLS: {reason.lower().replace('_', ' ')}")
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
            transport.sock.do_handshake()
        except ssl.SSLWantReadError:
            watch.readable = False
            await watch.wait_readable()
        except ssl.SSLWantWriteError:
            await watch.wait_writable()
        except (OSError, ValueError) as error:
            raise _failed(transport, error) from None
        else:
            break
    transport.established = True
    watch.look_ahead = transport.look_ahead
    # The client's first request may have come with the end of its handshake; and its edge is used up.
    watch.readable = True
    transport.ktls = _kernel_encrypts(transport.sock)


def _failed(transport: TlsTransport, error: Exception) -> HandshakeFailed:
    broken = error if isinstance(error, OSError) else OSError(0, str(error))
    transport._note_broken(broken)
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    # Without the exception itself: its traceback holds the frames of the connection.
    return HandshakeFailed(0, f"{reason}".lower().replace("_", " "))


def _kernel_encrypts(sock: ssl.SSLSocket) -> bool:
    if not sock.context.options & KTLS_OPTION:
        return False
    try:
        sock.getsockopt(_SOL_TLS, _TLS_TX, 4)
    except OSError:
        return False
    return True
