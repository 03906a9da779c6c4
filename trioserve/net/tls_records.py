"""TLS record by record: the transport of an encrypted connection whose bytes go to OpenSSL through memory.

OpenSSL never sees the descriptor. Left to read by itself, it goes on as long as records come that hold no data, and a
client that sends nothing else (27 bytes for new keys, which cost 25 microseconds) would keep the loop to itself. So the
bytes are taken off the kernel here, given to OpenSSL a whole record at a time, and records without data are counted.

`readable` is cleared (`watch.py`) only when the kernel was seen empty and there is no whole record left here: neither
that nor what OpenSSL has decrypted and not handed out gives an edge. What is encrypted must be sent, in order, whoever
has given up meanwhile: the rest of what the kernel took in part is kept (`_unsent`), and its plain bytes with it until
they have been reported as written (`_owed`), which is when their record is whole with the kernel.

Made by `Certificates.wrap`. Nothing here waits.
"""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress

from trioserve.net.tls import RECORD_SIZE, TlsFault, TlsTransport
from trioserve.net.tls_info import TlsObject
from trioserve.net.watch import Watch

# Type, version and length, in the clear in front of each record.
_RECORD_HEAD = 5

# One read takes a full record, with what TLS 1.3 may add to it (RFC 8446 section 5.2).
_RECV_SIZE = _RECORD_HEAD + RECORD_SIZE + 256

# What TLS 1.2 may add (RFC 5246 section 6.2.3). Nobody waits for the end of what says that it is longer.
_LONGEST_RECORD = _RECORD_HEAD + RECORD_SIZE + 2048

# Of a handshake in one step: enough for any greeting, and it may all be messages of a byte.
_HANDSHAKE_READ = 4096

# Records that came one after the other without data: new keys, warnings, padding. 32 are what BoringSSL allows of new
# keys, and OpenSSL of empty records; clients that mean well send one in a million records. A call never reads more of
# them than these, which is 1 ms.
SILENT_RECORDS = 32

# What is encrypted before it is sent. Four records in one call of the kernel cost what OpenSSL's own writes cost, and a
# peer that does not read makes us keep as much.
_SEND_SIZE = 4 * RECORD_SIZE


class TlsBuffers:
    """What OpenSSL reads from and writes to in place of a descriptor: one pair for all connections of a worker.

    Both are empty whenever nobody is in a call of OpenSSL: whole records go in and are used up, what comes out is taken
    out at once, and whoever is interrupted clears them. They are shared because a `MemoryBIO` never gives back the room
    that it has once needed, 22 KiB for a full record, which every connection would keep while it is idle. For one
    thread.
    """

    __slots__ = ("incoming", "outgoing")

    def __init__(self) -> None:
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()

    def __repr__(self) -> str:
        return f"<TlsBuffers in={self.incoming.pending} out={self.outgoing.pending}>"


class RecordTransport(TlsTransport):
    """The plain bytes of one encrypted connection, encrypted and decrypted in this process."""

    __slots__ = (
        "_choked", "_ended", "_incoming", "_outgoing", "_owed", "_pending", "_read", "_silent", "_unfed", "_unsent",
        "_whole", "_write",
    )  # fmt: skip

    tls: TlsObject

    def __init__(self, sock: socket.socket, watch: Watch, tls: TlsObject, buffers: TlsBuffers) -> None:
        super().__init__(sock, watch, tls)
        self._read = tls.read
        self._write: Callable[[bytes | memoryview], int] = tls.write
        self._incoming = buffers.incoming
        self._outgoing = buffers.outgoing
        self._unfed = b""  # off the kernel, and not given to OpenSSL yet
        self._pending = False  # OpenSSL has more of the last record
        self._silent = 0  # records without data since the last one with
        self._ended = False  # nothing comes behind what was handed out
        # Records that the kernel has not taken, and how much of `_owed` is in each.
        self._unsent: list[tuple[bytes, int]] = []
        self._owed: bytes | memoryview = b""  # encrypted, and not reported as written yet
        self._whole = 0  # how much of `_owed` is with the kernel
        self._choked = False  # what we have to say because of what was read is not with the kernel

    @property
    def is_in_record(self) -> bool:
        return bool(self._unsent)

    # -- the handshake ---------------------------------------------------------------------------------------

    def shake_hands(self) -> bool:
        if not self._push():
            return False
        if self.established:
            return True
        try:
            data = self.sock.recv(_HANDSHAKE_READ)
        except BlockingIOError:
            self.watch.readable = False
            return False
        if not data:
            raise ConnectionAbortedError(errno.ECONNABORTED, "the client left in the middle of the handshake")
        if len(data) < _HANDSHAKE_READ and not self.watch.hangup:
            self.watch.readable = False
        self._incoming.write(data)
        try:
            self.tls.do_handshake()
            self.established = True
        except ssl.SSLWantReadError:
            pass
        finally:
            # The first request may have come with the end of the handshake.
            self._unfed = self._incoming.read()
            if self._outgoing.pending:
                self._unsent.append((self._outgoing.read(), 0))
                with suppress(OSError):
                    self._push()
        return self.established and not self._unsent

    # -- reading ---------------------------------------------------------------------------------------------

    def _decrypt(self, size: int) -> bytes | None:
        # Written flat: every read would pay for a call.
        if self._pending or self._ended:
            return self._take_pending(size)
        if self._choked and self._is_choked():
            return None
        watch = self.watch
        unfed = self._unfed
        emptied = False  # the kernel has been seen empty
        while True:
            end = _record_end(unfed)
            if not end:
                if not emptied:
                    try:
                        more = self.sock.recv(_RECV_SIZE)
                    except BlockingIOError:
                        emptied = True
                        continue
                    except OSError as error:
                        return self._fail_to_read(error)
                    if not more:
                        return self._end_reading()
                    # Short read: empty now, and the next arrival is a new edge. Not so with a FIN behind the data.
                    emptied = len(more) < _RECV_SIZE and not watch.hangup
                    unfed = unfed + more if unfed else more
                    continue
                self._unfed = unfed
                watch.readable = False
                return None
            try:
                if end == len(unfed):
                    self._incoming.write(unfed)
                    unfed = b""
                else:
                    self._incoming.write(memoryview(unfed)[:end])
                    unfed = unfed[end:]
                data = self._read(size)
            except ssl.SSLWantReadError:
                data = None
            except (OSError, ValueError) as error:
                return self._fail_to_read(error)
            except BaseException:
                self._clear()
                raise
            if self._outgoing.pending:
                self._answer()
            if data:
                self._silent = 0
                self._unfed = unfed
                if len(data) == size and self.tls.pending():
                    self._pending = watch.readable = True
                elif emptied and not (unfed and _record_end(unfed)):
                    watch.readable = False
                elif not self._choked:
                    watch.readable = True
                return data
            if data is not None:
                return self._end_reading()
            self._unfed = unfed
            self._silent += 1
            if self._silent > SILENT_RECORDS:
                return self._refuse_silence()
            if self._choked:
                return None

    def _refuse_silence(self) -> bytes | None:
        self._write = _refuse  # OpenSSL would go on
        what = f"TLS: {self._silent} records in a row without data"
        return self._fail_to_read(TlsFault(errno.ECONNABORTED, what))

    def _take_pending(self, size: int) -> bytes | None:
        """What OpenSSL has decrypted already: no edge will tell of it."""
        if self._ended:
            return b""
        data = self._read(size)
        self._pending = len(data) == size and self.tls.pending() > 0
        return data

    def _answer(self) -> None:
        """Send what OpenSSL says to what was read: new keys of ours, an alert."""
        self._unsent.append((self._outgoing.read(), 0))
        self._choked = True
        self._is_choked()

    def _is_choked(self) -> bool:
        """Whether there is no room for our answers: then nothing is read that might ask for more of them."""
        try:
            self._choked = not self._push()
        except OSError:
            self._choked = False  # noted: whoever reads or writes next meets it
        self.watch.reads_when_writable = self._choked
        if self._choked:
            self.watch.readable = False
        return self._choked

    def _end_reading(self) -> bytes:
        """close_notify, or a FIN without one. Whether something is missing is for the framing of HTTP to say."""
        self._ended = True
        self._unfed = b""
        self.watch.note_hangup(reset=False)
        return b""

    def _fail_to_read(self, error: OSError | ValueError) -> bytes | None:
        self._incoming.read()  # OpenSSL may have left some of it
        if isinstance(error, ssl.SSLZeroReturnError):
            return self._end_reading()
        self._ended = True
        self._unfed = b""
        self._note_broken(error if isinstance(error, OSError) else OSError(errno.EBADF, str(error)))
        self._send_last()
        return b""

    # -- writing ---------------------------------------------------------------------------------------------

    def send_nowait(self, data: bytes | memoryview, flags: int = 0) -> int:  # noqa: ARG002 - a record leaves at once
        if len(data) > RECORD_SIZE or self._unsent or self._owed or not data:
            return self._send_records(data)
        try:
            size = self._write(data)
            record = self._outgoing.read()
        except OSError as error:
            self._note_unwritten(error)
            return 0
        except BaseException:
            self._clear()
            raise
        try:
            sent = self.sock.send(record)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._note_broken(error)
            raise
        if sent < len(record):
            self._unsent.append((record[sent:], size))
            self._owed = bytes(data)
            return 0
        self.bytes_written += size
        return size

    def _send_records(self, data: bytes | memoryview) -> int:
        """Longer than a record, or after one that the kernel took in part."""
        view = memoryview(data)
        done = 0
        if self._unsent or self._owed:
            self._push()
            done = self._settle_owed(view)
        while done < len(view) and not self._unsent:
            sent = self._send_some(view[done : done + _SEND_SIZE])
            if not sent:
                break
            done += sent
        return done

    def _send_some(self, view: memoryview) -> int:
        """Encrypt it all, send it with one call, and keep what the kernel does not take."""
        records: list[tuple[bytes, int]] = []
        try:
            for start in range(0, len(view), RECORD_SIZE):
                size = self._write(view[start : start + RECORD_SIZE])
                records.append((self._outgoing.read(), size))
        except OSError as error:
            if not records:
                self._note_unwritten(error)
                return 0
        except BaseException:
            self._clear()
            raise
        try:
            sent = self.sock.sendmsg([record for record, _ in records])
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._note_broken(error)
            raise
        done = 0
        while records and sent >= len(records[0][0]):
            record, size = records.pop(0)
            sent -= len(record)
            done += size
        if records:
            record, size = records[0]
            records[0] = record[sent:], size
            self._unsent = records
            rest = view[done : done + sum(size for _, size in records)]
            # What nobody can change need not be copied.
            self._owed = rest if isinstance(view.obj, bytes) else bytes(rest)
        self.bytes_written += done
        return done

    def _push(self) -> bool:
        """Send on what the kernel has not taken; False if it does not take all of it.

        Raises:
            OSError: the connection is broken.
        """
        unsent = self._unsent
        while unsent:
            record, size = unsent[0]
            try:
                sent = self.sock.send(record)
            except BlockingIOError:
                return False
            except OSError as error:
                self._note_broken(error)
                raise
            if sent < len(record):
                unsent[0] = record[sent:], size
                return False
            del unsent[0]
            self._whole += size
            self.bytes_written += size
        return True

    def _settle_owed(self, view: memoryview) -> int:
        """How much of what the caller wants written has been written already, with the records that were in the way.

        A caller that comes with something else has given up what it had wanted to send; it is on the wire all the same.
        """
        owed = self._owed
        count = min(len(view), len(owed))
        # Copied: element by element is how Python compares views.
        if bytes(view[:count]) != bytes(owed[:count]):
            if not self._unsent:
                self._owed = b""
                self._whole = 0
            return 0
        done = min(count, self._whole)
        self._owed = owed[done:]
        self._whole -= done
        return done

    def _note_unwritten(self, error: OSError) -> None:
        """OpenSSL has not taken the data. Raises unless that is because it has to hear something first."""
        if isinstance(error, ssl.SSLWantReadError):
            # A handshake in the middle of a connection.
            self.watch.writes_when_readable = True
            if self._outgoing.pending:
                self._answer()
            return
        broken = self._as_connection_error(error)
        self._note_broken(broken)
        self._send_last()
        raise broken

    # -- the end ---------------------------------------------------------------------------------------------

    def _unwrap(self) -> None:
        self._unfed = b""
        try:
            self.tls.unwrap()  # looks for the peer's as well, which has come before, or not
        except (OSError, ValueError):
            pass
        finally:
            self._send_last()

    def _clear(self) -> None:
        """Leave nothing of this connection to the next."""
        self._incoming.read()
        self._outgoing.read()

    def _send_last(self) -> None:
        """Send what OpenSSL has to say at the end, if there is room for it."""
        last = self._outgoing.read()
        if last and not self._unsent:
            try:
                self.sock.send(last)
            except OSError:
                pass


def _refuse(_data: bytes | memoryview) -> int:
    raise TlsFault(errno.ECONNABORTED, "TLS: the connection has been ended")


def _record_end(data: bytes) -> int:
    """Where the record ends that `data` begins with; 0 if not all of it is here.

    What is no record has no end to wait for: all of it goes to OpenSSL, which says what is wrong.
    """
    size = len(data)
    if size < _RECORD_HEAD:
        return 0
    end = _RECORD_HEAD + (data[3] << 8 | data[4])
    if end <= size:
        return end
    if data[1] != 3 or not 20 <= data[0] <= 23 or end > _LONGEST_RECORD:
        return size
    return 0
