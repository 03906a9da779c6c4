"""A connected, non-blocking stream socket: reads and writes that happen at once or say that they would block.

One per connection, made by the listener, used by the protocol in `http/`. It never waits by itself for more than
the kernel; all waiting goes through its `watch`, so a cancelled wait loses no byte: what `send_nowait` reports as
written is written, the rest is still the caller's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import sys
import termios

from trioserve.net.watch import Watch

# What one read asks for. Large enough for a head and a small body in one call, small enough that the
# allocation stays cheap; bodies are read in larger parts (`BODY_READ_SIZE`).
READ_SIZE = 16 * 1024
BODY_READ_SIZE = 64 * 1024

# What sendfile(2) says when it is the connection that is broken; anything else it says of the file.
_CONNECTION_ERRNOS = frozenset(
    {
        errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED, errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT,
        errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.ENETRESET, errno.ECONNREFUSED,
    }
)  # fmt: skip

_HAS_SENDFILE = hasattr(os, "sendfile")

# Linux: more is about to follow, so do not send a short segment yet (send(2)).
MSG_MORE = getattr(socket, "MSG_MORE", 0)

# Up to here one copy is cheaper than handing the kernel a list; above it, the parts go as they are.
_JOIN_SIZE = 64 * 1024
_PARTS_PER_CALL = 512  # below IOV_MAX (1024 on Linux, sysconf(3))


class Transport:
    """The bytes of one connection.

    Attributes:
        sock: the socket itself, for what needs its descriptor (`os.sendfile`).
        watch: its readiness in the hub.
        broken: the first error that ended reading or writing, or None.
        bytes_read, bytes_written: totals over the connection.
        outbox: where a response may be left that need not be sent at once; who ends the connection sends it before.
        sends_files: the kernel can send a file by itself (`sendfile_nowait`); otherwise its bytes must be read and
            written.
    """

    __slots__ = ("_taken", "broken", "bytes_read", "bytes_written", "outbox", "sock", "watch")

    # No property: it is asked for every file.
    sends_files: bool = _HAS_SENDFILE

    def __init__(self, sock: socket.socket, watch: Watch) -> None:
        self.sock = sock
        self.watch = watch
        self.outbox = watch.outbox
        self.broken: OSError | None = None
        self.bytes_read = 0
        self.bytes_written = 0
        self._taken = 0

    def __repr__(self) -> str:
        return f"<Transport {self.watch!r} in={self.bytes_read} out={self.bytes_written}>"

    def recv_nowait(self, size: int = READ_SIZE) -> bytes | None:
        """Read what is there: bytes, `b""` at the end of the stream (FIN or a broken connection), None if empty."""
        try:
            data = self.sock.recv(size)
        except BlockingIOError:
            self.watch.readable = False
            return None
        except OSError as error:
            self._note_broken(error)
            return b""
        received = len(data)
        if received < size:
            # Short read: empty now, and the next arrival is a new edge. Not so with a FIN behind the data.
            if received and not self.watch.hangup:
                self.watch.readable = False
            elif not received:
                self.watch.note_hangup(reset=False)
        self.bytes_read += received
        return data

    def send_nowait(self, data: bytes | memoryview, flags: int = 0) -> int:
        """Write as much as the kernel takes now; the number of bytes written, 0 if it would block.

        `flags` as in send(2): `MSG_MORE` for what a file follows at once, so that both leave in one segment.

        Raises:
            OSError: the connection is broken (EPIPE, ECONNRESET …); also noted in `broken`.
        """
        try:
            sent = self.sock.send(data, flags)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._note_broken(error)
            raise
        self.bytes_written += sent
        return sent

    def send_parts_nowait(self, parts: list[bytes | memoryview], flags: int = 0) -> bool:
        """Write parts, taking what was written off the list; True if the kernel takes no more and something is left.

        Only then may the caller wait: with room left in the kernel's buffer there is no edge to be woken by.
        `flags` as in `send_nowait`.

        Raises:
            OSError: as `send_nowait`.
        """
        size = sum(map(len, parts))
        if size <= _JOIN_SIZE or len(parts) == 1:
            data = parts[0] if len(parts) == 1 else b"".join(parts)
            sent = self.send_nowait(data, flags)
            if sent == size:
                parts.clear()
                return False
            parts[:] = [memoryview(data)[sent:]]
            return True
        return self._send_list(parts, flags)

    def _send_list(self, parts: list[bytes | memoryview], flags: int) -> bool:
        while parts:
            batch = parts[:_PARTS_PER_CALL]
            try:
                sent = self.sock.sendmsg(batch, (), flags)
            except BlockingIOError:
                return True
            except OSError as error:
                self._note_broken(error)
                raise
            self.bytes_written += sent
            for written, part in enumerate(batch):
                if len(part) > sent:
                    parts[written] = memoryview(part)[sent:]
                    del parts[:written]
                    return True
                sent -= len(part)
            del parts[: len(batch)]
        return False

    def sendfile_nowait(self, fd: int, offset: int, count: int) -> int | None:
        """Have the kernel send of a file what the socket takes now: bytes sent, 0 at the end of the file.

        None if the socket takes nothing. Blocks if the file's pages must be read from a disk (sendfile(2)).

        Raises:
            OSError: the connection is broken or closed, as `send_nowait`; or the file cannot be read, then `broken`
                stays None.
        """
        try:
            sent = os.sendfile(self.sock.fileno(), fd, offset, count)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in _CONNECTION_ERRNOS or self.watch.closed:
                self._note_broken(error)
            raise
        self.bytes_written += sent
        return sent

    def send_with_file_nowait(self, head: bytes, fd: int, offset: int, count: int) -> int:
        """Write a head and a part of a file behind it, in as few segments as if they were one; the bytes written.

        That is 0 if it would block. What `sendfile_nowait` would raise is left to whoever sends the rest.

        Raises:
            OSError: as `send_nowait`, of the head.
        """
        # Not by way of the two methods above: every request for a larger file would pay for the calls.
        sock = self.sock
        size = len(head)
        try:
            sent = sock.send(head, MSG_MORE)
            if sent == size:
                try:
                    sent += os.sendfile(sock.fileno(), fd, offset, count)
                except OSError:
                    pass
        except BlockingIOError:
            return 0
        except OSError as error:
            self._note_broken(error)
            raise
        self.bytes_written += sent
        return sent

    def is_peer_gone(self) -> bool:
        """Whether the peer has sent FIN or RST, as far as can be known without waiting or reading."""
        watch = self.watch
        if not watch.hangup:
            try:
                if self.sock.recv(1, socket.MSG_PEEK) == b"":
                    watch.note_hangup(reset=False)
            except BlockingIOError:
                return False
            except OSError as error:
                self._note_broken(error)
        return watch.hangup

    def has_input(self) -> bool:
        """Whether bytes of the peer wait to be read; for those who are not the connection's own task."""
        try:
            return bool(self.sock.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False
        except OSError as error:
            self._note_broken(error)  # the kernel tells it only once
            return False

    def has_progressed(self) -> bool:
        """Whether the peer has taken bytes of ours since this was last asked.

        Writability does not tell: the kernel reports it when a third of its buffer is free, which may be megabytes.
        """
        try:
            queued = fcntl.ioctl(self.sock, termios.TIOCOUTQ, b"\0\0\0\0")
        except (OSError, ValueError):
            return False  # the system cannot say, or the socket is closed
        before, self._taken = self._taken, self.bytes_written - int.from_bytes(queued, sys.byteorder)
        return self._taken > before

    def shutdown_write(self) -> None:
        """Send our FIN; the peer may go on sending. Does nothing on a connection that is gone."""
        self.outbox.flush()
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._note_broken(error)

    def close(self) -> None:
        """Stop watching and close; what the kernel still holds is sent in the background."""
        self.outbox.flush()
        self.watch.close()
        self.sock.close()

    def abort(self) -> None:
        """Close with RST, so that the peer cannot take a truncated response for a whole one (SO_LINGER, socket(7))."""
        self.outbox.flush()
        self.watch.close()
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass  # not connected any more: there is nobody left to tell
        self.sock.close()

    def _note_broken(self, error: OSError) -> None:
        if self.broken is None:
            self.broken = error
        self.watch.readable = True
        self.watch.note_hangup(reset=True)
