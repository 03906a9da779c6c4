"""Kernel TLS (`ktls`): the transport of an encrypted connection whose descriptor OpenSSL has to itself.

The kernel encrypts what is sent and can send files by itself, if OpenSSL could hand it the keys; otherwise OpenSSL does
it here as usual. Made by `Certificates.wrap`, for connections with a context that has `ktls` only: since OpenSSL reads
by itself, it goes on as long as records without data come, and the bound of `tls_records.py` does not hold.

`readable` is cleared only when OpenSSL asked for more and the kernel had nothing, or when a record was read to its end
and the kernel has nothing left. What OpenSSL has begun to send it must be given again, so the bytes of a record that
the kernel took in part are kept here (`_owed`) until it is whole.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import ssl
import termios

from trioserve.net.tls import NOTHING, RECORD_SIZE, TlsTransport, is_reset
from trioserve.net.tls_info import TlsSocket
from trioserve.net.transport import Transport
from trioserve.net.watch import Watch

# getsockopt(SOL_TLS, TLS_TX): what the kernel encrypts with (linux/tls.h).
_SOL_TLS, _TLS_TX = 282, 1


class KtlsTransport(TlsTransport):
    """The plain bytes of one encrypted connection, which the kernel encrypts if it can.

    Attributes:
        sock: wrapped, with `do_handshake_on_connect=False` and `suppress_ragged_eofs=False`.
        sends_files: the kernel does encrypt.
    """

    __slots__ = ("_blocked", "_descriptor", "_owed", "_read", "_write", "sends_files")

    tls: TlsSocket

    def __init__(self, sock: TlsSocket, watch: Watch) -> None:
        super().__init__(sock, watch, sock)
        self.sends_files = False
        self._read = sock.read
        self._write = sock.send
        self._descriptor = sock.fileno()
        self._owed = b""  # given to OpenSSL, or half with the kernel, and not reported as written yet
        self._blocked = False  # the record at the beginning of `_owed` is not with the kernel yet

    @property
    def is_in_record(self) -> bool:
        return self._blocked

    # -- the handshake ---------------------------------------------------------------------------------------

    def shake_hands(self) -> bool:
        self._blocked = False
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            self.watch.readable = False
            return False
        except ssl.SSLWantWriteError:
            self._blocked = True
            return False
        self.established = True
        self.sends_files = kernel_encrypts(self.tls)
        return True

    # -- reading ---------------------------------------------------------------------------------------------

    def _decrypt(self, size: int) -> bytes | None:
        watch = self.watch
        try:
            data = self._read(size)
        except ssl.SSLWantReadError:
            watch.readable = False
            return None
        except (OSError, ValueError) as error:
            return self._fail_to_read(error)
        if not data:
            watch.note_hangup(reset=False)
        # The record has been read to its end, and the kernel has no other: the next arrival is a new edge. Asking
        # costs a quarter of another read that finds nothing. Not so with a FIN behind the data.
        elif (
            len(data) < size
            and not watch.hangup
            and fcntl.ioctl(self._descriptor, termios.FIONREAD, NOTHING) == NOTHING
        ):
            watch.readable = False
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

    # -- writing ---------------------------------------------------------------------------------------------

    def send_nowait(self, data: bytes | memoryview, flags: int = 0) -> int:  # noqa: ARG002 - a record leaves at once
        view = memoryview(data)
        done = 0
        if self._owed:
            if self._blocked and not self._write_again():
                return 0
            done = self._settle_owed(view)
        while done < len(view):
            # CPython sets SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER and no SSL_MODE_ENABLE_PARTIAL_WRITE: of more than a
            # record that blocks nobody could tell how much has gone.
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
        broken = self._as_connection_error(error)
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
        if bytes(view[:done]) != self._owed[:done]:
            self._owed = b""
            return 0
        self._owed = self._owed[done:]
        return done

    def sendfile_nowait(self, fd: int, offset: int, count: int) -> int | None:
        if not self.sends_files:
            return super().sendfile_nowait(fd, offset, count)
        if self._blocked and not self._write_again():
            return None
        self._owed = b""
        return Transport.sendfile_nowait(self, fd, offset, count)

    # -- the end ---------------------------------------------------------------------------------------------

    def _unwrap(self) -> None:
        try:
            # Sends ours, then looks for the peer's, which is either there or not.
            self.tls.unwrap()
        except (OSError, ValueError):
            pass


def kernel_encrypts(sock: socket.socket) -> bool:
    """Whether OpenSSL has handed over its keys."""
    try:
        sock.getsockopt(_SOL_TLS, _TLS_TX, 4)
    except OSError:
        return False
    return True
