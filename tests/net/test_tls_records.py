"""What a client can do with the records of TLS: cut them anywhere, send them without data, leave in the middle."""

from __future__ import annotations

import os
import random
import socket
import ssl
from contextlib import suppress
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.net.sockets import fill as fill_socket
from tests.net.sockets import receive_exactly, running_hub, send_all, tcp_pair, waits
from tests.net.tls_sockets import (
    SMALL,
    OpenSSL,
    certificates,
    client_context,
    new_keys,
    receive_all_of,
    sealed,
    tls_pair,
)
from trioserve.net.certificates import Certificates
from trioserve.net.tls import RECORD_SIZE, TlsFault, handshake
from trioserve.net.tls_records import SILENT_RECORDS, RecordTransport
from trioserve.net.transport import Transport


@pytest.fixture
def server() -> Certificates:
    return certificates()


async def empty(transport: Transport) -> None:
    """Read what is left of the handshake."""
    await wait_all_tasks_blocked(0.01)
    while transport.recv_nowait() is not None:
        pass


async def read_end(transport: Transport) -> bytes:
    """Read once more, as those do who go by `readable`."""
    with trio.fail_after(10):
        while True:
            if not transport.watch.readable:
                await transport.watch.wait_readable()
            data = transport.recv_nowait()
            if data is not None:
                return data


class Steps:
    """What OpenSSL is asked to read in one call of ours."""

    def __init__(self, transport: RecordTransport) -> None:
        self.count = 0
        self._real = transport._read
        transport._read = self._counted  # type: ignore[method-assign, assignment]

    def _counted(self, size: int) -> bytes:
        self.count += 1
        return self._real(size)


# -- records without data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("both", [True, False])
async def test_one_call_reads_no_more_than_a_few_records_without_data(
    hub: str, server: Certificates, both: bool
) -> None:
    async with tls_pair(hub, server) as (transport, client):
        assert isinstance(transport, RecordTransport)
        await empty(transport)
        transport.watch.look_ahead = None
        socket.socket.send(client.sock, new_keys(client.sock, 500, both=both))
        await transport.watch.wait_readable()
        steps = Steps(transport)
        assert transport.recv_nowait() == b""
        assert steps.count == SILENT_RECORDS + 1
        assert isinstance(transport.broken, TlsFault)
        assert "33 records in a row without data" in str(transport.broken)
        assert transport.watch.reset
        assert transport.recv_nowait() == b""
        assert steps.count == SILENT_RECORDS + 1
        with pytest.raises(OSError):
            await send_all(transport, b"x" * 1_000_000)


async def test_they_are_counted_over_calls(hub: str, server: Certificates) -> None:
    """Each comes alone, and is looked at by whoever waits for a request."""
    async with tls_pair(hub, server) as (transport, client):
        await empty(transport)
        openssl = OpenSSL(client.sock)
        for _ in range(SILENT_RECORDS):
            openssl.send_new_keys(both=False)
            await wait_all_tasks_blocked()
            assert transport.recv_nowait() is None
        openssl.send_new_keys(both=False)
        while transport.recv_nowait() is None:
            await transport.watch.wait_readable()
        assert isinstance(transport.broken, TlsFault)


@pytest.mark.parametrize("both", [True, False])
async def test_as_many_as_you_like_between_data(hub: str, server: Certificates, both: bool) -> None:
    async with tls_pair(hub, server) as (transport, client):
        await empty(transport)
        for number in range(20):
            data = b"request %d" % number
            records = new_keys(client.sock, 10, both=both) + sealed(client.sock, data)
            socket.socket.send(client.sock, records)
            assert await receive_exactly(transport, len(data)) == data
            await send_all(transport, data)
            assert await client.receive() == data
        assert transport.broken is None


async def test_empty_records_are_some_of_them(hub: str, server: Certificates) -> None:
    """Of one byte each in TLS 1.3, their type: what is left of data that is all padding."""
    async with tls_pair(hub, server, "1.2") as (transport, client):
        await empty(transport)
        OpenSSL(client.sock).renegotiate()  # refused with an alert each time
        for _ in range(3):
            await wait_all_tasks_blocked(0.01)
            assert transport.recv_nowait() is None
        assert transport.broken is None
        assert transport._silent == 1  # type: ignore[attr-defined]


# -- records in parts ----------------------------------------------------------------------------------------


async def test_records_are_cut_at_every_byte(hub: str, server: Certificates) -> None:
    async with tls_pair(hub, server) as (transport, client):
        await empty(transport)
        for cut in range(1, 2 * 27):
            records = sealed(client.sock, b"first") + sealed(client.sock, b"other")
            assert len(records) == 2 * 27
            socket.socket.send(client.sock, records[:cut])
            await trio.lowlevel.checkpoint()
            if cut < 27:
                await wait_all_tasks_blocked()
                assert transport.recv_nowait() is None
            else:
                assert await receive_exactly(transport, 5) == b"first"
                assert transport.recv_nowait() is None
            socket.socket.send(client.sock, records[cut:])
            if cut < 27:
                assert await receive_exactly(transport, 5) == b"first"
            assert await receive_exactly(transport, 5) == b"other"
        assert transport.recv_nowait() is None
        assert await waits(transport.watch)


async def test_a_byte_at_a_time(
    hub: str,
    server: Certificates,
) -> None:
    async with tls_pair(hub, server) as (transport, client):
        await empty(transport)
        for byte in sealed(client.sock, b"data"):
            assert transport.recv_nowait() is None
            assert not transport.has_input()
            socket.socket.send(client.sock, bytes([byte]))
            await transport.watch.wait_readable()
        assert await receive_exactly(transport, 4) == b"data"


@pytest.mark.parametrize("size", [1, 100, RECORD_SIZE - 1, RECORD_SIZE])
async def test_what_is_left_here_is_readable(hub: str, server: Certificates, size: int) -> None:
    """It was taken off the kernel together with what came before it: there will be no edge."""
    async with tls_pair(hub, server) as (transport, client):
        await empty(transport)
        transport.watch.look_ahead = None
        records = b"".join(sealed(client.sock, bytes([n]) * size) for n in range(3))
        socket.socket.send(client.sock, records)
        with trio.fail_after(30):
            await transport.watch.wait_readable()
        transport.watch.readable = False  # some look whether or not it is
        for number in range(3):
            assert transport.recv_nowait(size) == bytes([number]) * size
            assert transport.watch.readable or number == 2
        assert transport.recv_nowait() is None
        assert not transport.watch.readable


@pytest.mark.parametrize(
    "start", [b"\x17\x03\x03\xff\xff", b"\x17\x02\x03\x00\x20", b"GET /", b"\x00\x03\x03\x10\x00"]
)
async def test_what_is_no_record_is_not_waited_for(hub: str, server: Certificates, start: bytes) -> None:
    async with tls_pair(hub, server) as (transport, client):
        await empty(transport)
        socket.socket.send(client.sock, start)
        with trio.fail_after(30):
            while transport.recv_nowait() is None:
                await transport.watch.wait_readable()
        assert isinstance(transport.broken, TlsFault)


# -- ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("looked_at", [True, False])
@pytest.mark.parametrize("keep", [27, 26, 5, 3, 0])
async def test_data_with_a_fin_right_behind(
    hub: str, server: Certificates, keep: int, looked_at: bool
) -> None:
    """Whole or in part; what is not whole is lost, as if it had not been sent."""
    async with tls_pair(hub, server) as (transport, client):
        await empty(transport)
        records = sealed(client.sock, b"whole") + sealed(client.sock, b"other")[:keep]
        if not looked_at:
            transport.watch.look_ahead = None
        socket.socket.send(client.sock, records)
        client.send_eof()
        await wait_all_tasks_blocked(0.01)
        assert await receive_exactly(transport, 5) == b"whole"
        if keep == 27:
            assert await receive_exactly(transport, 5) == b"other"
        assert await read_end(transport) == b""
        assert transport.watch.hangup
        assert transport.broken is None
        await send_all(transport, b"answer")
        assert await client.receive() == b"answer"


@pytest.mark.parametrize("behind", [b"", b"\x16 no record"])
async def test_what_follows_a_goodbye_is_not_read(hub: str, server: Certificates, behind: bytes) -> None:
    async with tls_pair(hub, server) as (transport, client):
        await empty(transport)
        records = sealed(client.sock, b"last")
        goodbye = sealed(client.sock, None)
        socket.socket.send(client.sock, records + goodbye + (records + behind if behind else b""))
        await wait_all_tasks_blocked(0.01)
        assert await receive_exactly(transport, 4) == b"last"
        assert await read_end(transport) == b""
        assert transport.recv_nowait() == b"", "the end stays the end"
        assert transport.watch.hangup
        assert transport.broken is None


# -- writing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
async def test_what_is_reported_as_written_is_what_arrives(hub: str, server: Certificates, seed: int) -> None:
    """A write that blocks is given up, and the connection is reset."""
    dice = random.Random(seed)
    data = os.urandom(3_000_000)
    async with tls_pair(hub, server, buffers=dice.choice((4096, 20_000, SMALL))) as (transport, client):
        reported = 0
        found = b""
        for _ in range(12):
            with trio.move_on_after(0.001 * dice.randrange(3)):
                while True:
                    size = dice.choice((1, 100, RECORD_SIZE, 50_000, 300_000))
                    sent = transport.send_nowait(memoryview(data)[reported : reported + size])
                    reported += sent
                    if not sent:
                        await transport.watch.wait_writable()
            if dice.random() < 0.5 and len(found) < reported:
                found += await client.receive()
        assert transport.bytes_written >= reported
        transport.shutdown_write()
        found += await client.receive_all()
        assert found == data[: len(found)]
        # The kernel may have a record more, which nobody has asked about since it was whole.
        assert len(found) == reported or transport._unsent or transport._whole  # type: ignore[attr-defined]
        assert len(found) == transport.bytes_written


@pytest.mark.parametrize("kind", [bytes, bytearray])
async def test_a_caller_that_gives_up_and_comes_with_something_else(
    hub: str, server: Certificates, kind: type[bytes]
) -> None:
    """What was encrypted goes out in front, though the caller has changed it since, or never comes back for it."""
    async with tls_pair(hub, server, buffers=SMALL) as (transport, client):
        begun = kind(b"a" * 5_000_000)
        reported = transport.send_nowait(begun)
        assert 0 < reported < 5_000_000
        if isinstance(begun, bytearray):
            begun.clear()
        found = b""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all, transport, b"b" * 50_000)
            while not found.endswith(b"b" * 50_000):
                found += await client.receive()
        more = len(found) - 50_000 - reported
        assert 0 < more <= 4 * RECORD_SIZE
        assert found == b"a" * (reported + more) + b"b" * 50_000
        assert transport.bytes_written == len(found)


async def test_several_records_leave_together(hub: str, server: Certificates) -> None:
    async with tls_pair(hub, server) as (transport, client):
        calls: list[int] = []
        transport.sock = Calls(transport.sock, calls)  # type: ignore[assignment]
        data = os.urandom(10 * RECORD_SIZE + 5)
        view = memoryview(data)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all, transport, view)
            assert await receive_all_of(client, len(data)) == data
        assert len(calls) <= 4


class Calls:
    """A socket that counts what is sent with one call."""

    def __init__(self, sock: socket.socket, calls: list[int]) -> None:
        self._sock = sock
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def sendmsg(self, parts: list[bytes]) -> int:
        self._calls.append(len(parts))
        return self._sock.sendmsg(parts)


async def test_a_handshake_waits_for_room(hub: str, server: Certificates) -> None:
    """The kernel is full of something else, which the client reads first."""
    with tcp_pair() as (ours, peer):
        peer.setblocking(False)
        junk = 0
        while more := fill_socket(ours):
            junk += more
            await wait_all_tasks_blocked(0.05)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = client_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
        async with running_hub(hub) as running, trio.open_nursery() as nursery:
            transport = server.wrap(ours, running)
            with pytest.raises(ssl.SSLWantReadError):
                client.do_handshake()
            peer.send(outgoing.read())
            nursery.start_soon(handshake, transport, trio.lowlevel.checkpoint)
            await wait_all_tasks_blocked(0.01)
            assert transport.is_in_record
            assert transport.watch.writer is not None
            while not transport.established:
                await trio.lowlevel.wait_readable(peer)
                data = peer.recv(65536)
                incoming.write(data[junk:])
                junk -= min(junk, len(data))
                with suppress(ssl.SSLWantReadError):
                    client.do_handshake()
                if outgoing.pending:
                    peer.send(outgoing.read())
                    await wait_all_tasks_blocked(0.01)
            transport.close()


# -- what connections share ----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["_read", "_write"])
async def test_one_that_is_interrupted_leaves_nothing_to_the_next(
    hub: str, server: Certificates, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with tls_pair(hub, server) as (first, one), tls_pair(hub, server) as (second, other):
        await empty(first)
        await empty(second)
        first.watch.look_ahead = None
        await one.send(b"from one")
        await wait_all_tasks_blocked(0.01)
        real = getattr(first, call)

        def interrupted(argument: Any) -> Any:
            if call == "_write":
                real(argument)
            raise KeyboardInterrupt

        setattr(first, call, interrupted)
        with pytest.raises(KeyboardInterrupt):
            first.recv_nowait() if call == "_read" else first.send_nowait(b"to one")
        await other.send(b"from other")
        assert await receive_exactly(second, 10) == b"from other"
        await send_all(second, b"to other")
        assert await other.receive() == b"to other"
        with pytest.raises(ssl.SSLWantReadError):
            other.sock.recv(1)  # type: ignore[attr-defined]


async def test_one_that_breaks_the_rules_leaves_nothing_to_the_next(hub: str, server: Certificates) -> None:
    async with tls_pair(hub, server) as (first, one), tls_pair(hub, server) as (second, other):
        await empty(first)
        await empty(second)
        socket.socket.send(one.sock, b"\x17\x02\x03\x00\x20" + bytes(100))
        while first.recv_nowait() is None:
            await first.watch.wait_readable()
        assert isinstance(first.broken, TlsFault)
        await other.send(b"from other")
        assert await receive_exactly(second, 10) == b"from other"
        await send_all(second, b"to other")
        assert await other.receive() == b"to other"


async def test_a_reset_in_the_middle_of_a_record(hub: str, server: Certificates) -> None:
    async with tls_pair(hub, server) as (transport, client):
        await empty(transport)
        socket.socket.send(client.sock, sealed(client.sock, b"data")[:-1])
        await wait_all_tasks_blocked(0.01)
        assert transport.recv_nowait() is None
        client.reset()
        while (data := transport.recv_nowait()) is None:
            await transport.watch.wait_readable()
        assert data == b""
        assert isinstance(transport.broken, ConnectionResetError)
