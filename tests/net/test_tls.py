"""The transport of an encrypted connection keeps the promises of the plain one."""

from __future__ import annotations

import os
import random
import socket
import ssl
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.net.sockets import receive_exactly, reset, running_hub, send_all, tcp_pair, waits
from tests.net.tls_sockets import SMALL, OpenSSL, certificates, receive_all_of, sealed, tls_pair
from trioserve.net.certificates import Certificates
from trioserve.net.ktls import KtlsTransport
from trioserve.net.tls import RECORD_SIZE, HandshakeFailed, handshake, wait_hello
from trioserve.net.transport import Transport


@pytest.fixture(params=["records", "ktls"])
def server(request: pytest.FixtureRequest) -> Certificates:
    """The two ways of bytes to OpenSSL and back; where the kernel cannot encrypt, OpenSSL does in the second, too."""
    return certificates(ktls=request.param == "ktls")


@pytest.fixture(params=["1.2", "1.3"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def fill(transport: Transport) -> int:
    """Write until neither kernel takes any more; the number of bytes."""
    sent = before = 0
    while True:
        while more := transport.send_nowait(b"x" * RECORD_SIZE):
            sent += more
        if sent == before:
            return sent
        before = sent
        await wait_all_tasks_blocked(0.05)


# -- bytes ---------------------------------------------------------------------------------------------------


async def test_bytes_go_both_ways(hub: str, server: Certificates, version: str) -> None:
    async with tls_pair(hub, server, version) as (transport, client):
        await client.send(b"question")
        assert await receive_exactly(transport, 8) == b"question"
        await send_all(transport, b"answer")
        assert await client.receive() == b"answer"
        assert transport.tls.version() == f"TLSv{version}"
        assert (transport.bytes_read, transport.bytes_written) == (8, 6)


async def test_much_arrives_whole_through_small_buffers(hub: str, server: Certificates, version: str) -> None:
    """Both ways at once, with writes of all sizes that block in the middle of records."""
    data = os.urandom(2_000_000)
    async with tls_pair(hub, server, version, buffers=SMALL) as (transport, client):
        dice = random.Random(version)

        async def write() -> None:
            view = memoryview(data)
            while view:
                size = dice.choice((1, 100, RECORD_SIZE, RECORD_SIZE + 1, 100_000))
                parts: list[bytes | memoryview] = [
                    view[:size],
                    view[size : size + 10],
                    view[size + 10 : size + 20],
                ]
                view = view[size + 20 :]
                while transport.send_parts_nowait(parts):
                    await transport.watch.wait_writable()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            nursery.start_soon(client.send, data)

            async def check_client() -> None:
                assert await receive_all_of(client, len(data)) == data

            nursery.start_soon(check_client)
            assert await receive_exactly(transport, len(data), 50_000) == data
        assert (transport.bytes_read, transport.bytes_written) == (len(data), len(data))


async def test_reading_a_little_at_a_time_leaves_nothing_behind(hub: str, server: Certificates) -> None:
    """What OpenSSL has decrypted and not handed out has no edge of its own."""
    async with tls_pair(hub, server) as (transport, client):
        await client.send(b"0123456789" * 1000)
        assert await receive_exactly(transport, 10_000, 7) == b"0123456789" * 1000
        assert transport.recv_nowait() is None
        assert not transport.watch.readable


async def test_records_that_come_together_are_all_read(hub: str, server: Certificates) -> None:
    async with tls_pair(hub, server) as (transport, client):
        for number in range(50):
            await client.send(b"%03d" % number)
        await wait_all_tasks_blocked(0.01)
        assert await receive_exactly(transport, 150) == b"".join(b"%03d" % n for n in range(50))
        assert not transport.watch.readable or transport.recv_nowait() is None


async def test_a_whole_record_costs_no_read_that_finds_nothing(hub: str, server: Certificates) -> None:
    async with tls_pair(hub, server) as (transport, client):
        while transport.recv_nowait() is not None:
            pass
        await client.send(b"request")
        await transport.watch.wait_readable()
        assert transport.recv_nowait() == b"request"
        assert not transport.watch.readable
        assert await waits(transport.watch)


async def test_half_a_record_is_nothing_yet(hub: str, server: Certificates) -> None:
    async with tls_pair(hub, server) as (transport, client):
        record = sealed(client.sock, b"whole")
        socket.socket.send(client.sock, record[:-3])
        await wait_all_tasks_blocked(0.01)
        assert not transport.has_input(), "or a client could stay for ever by a byte at a time"
        assert transport.recv_nowait() is None
        assert await waits(transport.watch)
        socket.socket.send(client.sock, record[-3:])
        await transport.watch.wait_readable()
        assert transport.recv_nowait() == b"whole"


async def test_a_caller_may_retry_with_less_or_more(hub: str, server: Certificates) -> None:
    """What OpenSSL has begun to send is sent once, however the caller cuts it the next time."""
    async with tls_pair(hub, server, buffers=SMALL) as (transport, client):
        data = bytes(range(256)) * 4000
        sent = 0
        while (more := transport.send_nowait(memoryview(data)[sent:])) > 0:
            sent += more
        dice = random.Random(1)

        async def write() -> None:
            nonlocal sent
            while sent < len(data):
                done = transport.send_nowait(
                    memoryview(data)[sent : sent + dice.choice((1, 50, 5000, 40_000))]
                )
                sent += done
                if not done:
                    await transport.watch.wait_writable()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            assert await receive_all_of(client, len(data)) == data
        assert transport.bytes_written == len(data)


async def test_an_empty_write_is_nothing(hub: str, server: Certificates) -> None:
    async with tls_pair(hub, server) as (transport, _):
        assert transport.send_nowait(b"") == 0
        assert transport.send_parts_nowait([b"", b""]) is False


# -- what a handshake is later on ----------------------------------------------------------------------------


@pytest.mark.parametrize("both", [True, False])
async def test_new_keys_in_the_middle_lose_nothing(hub: str, server: Certificates, both: bool) -> None:
    """RFC 8446 section 4.6.3. Ours must follow, which OpenSSL sends with our next record."""
    async with tls_pair(hub, server, "1.3", buffers=SMALL) as (transport, client):
        openssl = OpenSSL(client.sock)

        async def echo() -> None:
            for _ in range(20):
                await send_all(transport, await receive_exactly(transport, 50_000))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo)
            for number in range(20):
                openssl.update_keys(both=both)
                data = bytes([number]) * 50_000
                nursery.start_soon(client.send, data)
                assert await receive_all_of(client, len(data)) == data


async def test_a_client_may_not_renegotiate(hub: str, server: Certificates) -> None:
    """It is told so by an alert, and goes on or leaves; either way it has cost us nothing."""
    async with tls_pair(hub, server, "1.2") as (transport, client):
        OpenSSL(client.sock).renegotiate()
        await wait_all_tasks_blocked(0.01)
        assert transport.recv_nowait() is None
        assert transport.broken is None
        await send_all(transport, b"still here")
        with pytest.raises(ssl.SSLError, match=r"(?i)no.renegotiation"):
            await client.receive()


async def test_a_renegotiation_holds_up_a_write_and_loses_nothing(hub: str, server: Certificates) -> None:
    """Where OpenSSL is told to allow it: then a write waits for the peer to speak, and not for room."""
    context = server._loaded.default
    context.options &= ~ssl.OP_NO_RENEGOTIATION
    context.options |= 1 << 8  # SSL_OP_ALLOW_CLIENT_RENEGOTIATION, which Python has no name for
    async with tls_pair(hub, server, "1.2") as (transport, client):
        OpenSSL(client.sock).renegotiate()
        await wait_all_tasks_blocked(0.01)
        assert transport.recv_nowait() is None
        assert transport.send_nowait(b"late") == 0
        if hub == "epoll":
            assert await waits(transport.watch, "writable")
        assert transport.send_nowait(b"late") == 0

        async def read() -> None:
            while transport.recv_nowait() is None:
                await transport.watch.wait_readable()

        async def write() -> None:
            while not transport.send_nowait(b"late"):
                await transport.watch.wait_writable()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            nursery.start_soon(write)
            await client.handshake()
            assert await client.receive() == b"late"
            await client.send(b"ok")


async def test_nothing_more_is_read_until_there_is_room_for_our_answer(hub: str) -> None:
    """The client wants new keys of ours, again and again, and does not read."""
    async with tls_pair(hub, certificates(), buffers=SMALL) as (transport, client):
        sent = await fill(transport)
        # OpenSSL answers the first with our next record, or when there comes another.
        for _ in range(2):
            OpenSSL(client.sock).send_new_keys()
        await client.send(b"data")
        await wait_all_tasks_blocked(0.01)
        assert transport.recv_nowait() is None
        if hub == "epoll":  # the other one looks again after a moment
            assert await waits(transport.watch)
        assert transport.recv_nowait() is None
        read = []

        async def reader() -> None:
            read.append(await receive_exactly(transport, 4))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await wait_all_tasks_blocked(0.01)
            # Somebody waits to write at the same time.
            nursery.start_soon(send_all, transport, b"x" * RECORD_SIZE)
            await wait_all_tasks_blocked(0.001)
            await receive_all_of(client, sent + RECORD_SIZE)
        assert read == [b"data"]


async def test_who_waits_for_the_end_takes_no_turns_while_nothing_may_be_read(hub: str) -> None:
    """What the client has sent meanwhile is readable for the kernel all the time."""
    async with tls_pair(hub, certificates(), buffers=SMALL) as (transport, client):
        await fill(transport)
        for _ in range(2):
            OpenSSL(client.sock).send_new_keys()
        await wait_all_tasks_blocked(0.01)
        assert transport.recv_nowait() is None
        await client.send(b"data")
        await wait_all_tasks_blocked(0.01)
        looks = []
        transport.watch.look_ahead = lambda: looks.append(transport.look_ahead()) or looks[-1]  # type: ignore[func-returns-value]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.watch.wait_hangup)
            for _ in range(1000):
                await trio.lowlevel.checkpoint()
            assert len(looks) < 100
            nursery.cancel_scope.cancel()


async def test_a_read_that_has_to_write_first_goes_on_when_there_is_room(hub: str) -> None:
    """As OpenSSL says it on a descriptor of its own."""
    async with tls_pair(hub, certificates(ktls=True)) as (transport, client):
        assert isinstance(transport, KtlsTransport)
        await client.send(b"data")
        real, transport._read = transport._read, lambda _size: _raise(ssl.SSLWantWriteError())  # type: ignore[method-assign]
        assert transport.recv_nowait() is None
        transport._read = real  # type: ignore[method-assign]
        with trio.fail_after(30):
            while (data := transport.recv_nowait() if transport.watch.readable else None) is None:
                # Room comes by itself on an idle socket, but an edge only with something to tell.
                nothing = transport.watch.wait_readable()
                if hub == "epoll":
                    await client.send(b"!")
                await nothing
        assert data.startswith(b"data")


def _raise(error: BaseException) -> Any:
    raise error


# -- ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", ["close_notify", "fin", "both"])
async def test_the_end_is_told_once_what_came_before_is_read(
    hub: str, server: Certificates, version: str, leave: str
) -> None:
    """close_notify alone, a FIN alone, or both; whether something is missing is for HTTP to say."""
    async with tls_pair(hub, server, version) as (transport, client):
        await client.send(b"last")
        if leave != "fin":
            with pytest.raises(ssl.SSLWantReadError):
                client.sock.unwrap()
        if leave != "close_notify":
            client.send_eof()
        assert await receive_exactly(transport, 4) == b"last"
        while (data := transport.recv_nowait()) is None:
            await transport.watch.wait_readable()
        assert data == b""
        assert transport.watch.hangup
        assert transport.broken is None
        assert transport.recv_nowait() == b""
        # Its other half is open.
        await send_all(transport, b"answer")
        if leave == "fin":
            assert await client.receive() == b"answer"


async def test_a_peer_that_says_goodbye_is_noticed_while_nobody_reads(hub: str, server: Certificates) -> None:
    """A look at the kernel's buffer would only show a record."""
    async with tls_pair(hub, server) as (transport, client):
        assert not transport.is_peer_gone()
        with pytest.raises(ssl.SSLWantReadError):
            client.sock.unwrap()
        with trio.fail_after(30):
            await transport.watch.wait_hangup()
        assert transport.is_peer_gone()
        assert transport.recv_nowait() == b""


async def test_looking_for_the_end_takes_nothing_away(hub: str, server: Certificates) -> None:
    async with tls_pair(hub, server) as (transport, client):
        await client.send(b"x" * 20_000)
        await wait_all_tasks_blocked(0.01)
        assert not transport.is_peer_gone()
        assert transport.has_input()
        assert transport.has_input()
        assert await receive_exactly(transport, 20_000, 900) == b"x" * 20_000
        assert not transport.has_input()


async def test_whoever_waits_to_read_is_woken_by_what_another_has_looked_at(
    hub: str, server: Certificates
) -> None:
    async with tls_pair(hub, server) as (transport, client):
        while transport.recv_nowait() is not None:
            pass
        read = []

        async def reader() -> None:
            await transport.watch.wait_readable()
            read.append(transport.recv_nowait())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await wait_all_tasks_blocked()
            client.sock.send(b"news")
            # Before the hub has had its turn, so that it may find nothing any more.
            assert transport.has_input()
        assert read == [b"news"]


async def test_a_reset_breaks_the_connection(hub: str, server: Certificates) -> None:
    async with tls_pair(hub, server) as (transport, client):
        client.reset()
        while (data := transport.recv_nowait()) is None:
            await transport.watch.wait_readable()
        assert data == b""
        assert isinstance(transport.broken, ConnectionResetError)
        assert transport.watch.reset
        with pytest.raises(OSError):
            transport.send_nowait(b"x" * 100_000)


async def test_bytes_that_are_no_record_break_the_connection(hub: str, server: Certificates) -> None:
    async with tls_pair(hub, server) as (transport, client):
        socket.socket.send(client.sock, b"GET / HTTP/1.1\r\n\r\n")
        while (data := transport.recv_nowait()) is None:
            await transport.watch.wait_readable()
        assert data == b""
        assert isinstance(transport.broken, ConnectionAbortedError)
        assert "TLS" in str(transport.broken)
        assert transport.recv_nowait() == b""


async def test_closing_says_goodbye(hub: str, server: Certificates, version: str) -> None:
    async with tls_pair(hub, server, version) as (transport, client):
        await send_all(transport, b"last")
        transport.close()
        assert await client.receive_all() == b"last"
        assert not client.ragged


async def test_closing_answers_a_goodbye(hub: str, server: Certificates, version: str) -> None:
    async with tls_pair(hub, server, version) as (transport, client):
        with pytest.raises(ssl.SSLWantReadError):
            client.sock.unwrap()  # type: ignore[attr-defined]
        while (data := transport.recv_nowait()) is None:
            await transport.watch.wait_readable()
        assert data == b""
        transport.close()
        await wait_all_tasks_blocked(0.01)
        client.sock.unwrap()  # type: ignore[attr-defined]


async def test_aborting_says_nothing(hub: str, server: Certificates) -> None:
    async with tls_pair(hub, server) as (transport, client):
        transport.abort()
        with pytest.raises(ConnectionResetError):
            await client.receive()


async def test_a_write_cut_short_is_not_followed_by_a_goodbye(hub: str, server: Certificates) -> None:
    """The peer must not take what it has for everything."""
    async with tls_pair(hub, server, buffers=SMALL) as (transport, client):
        while transport.send_nowait(b"x" * RECORD_SIZE):
            pass
        transport.close()
        await client.receive_all()
        assert client.ragged


async def test_half_closing_sends_both_ends_and_throws_away_what_still_comes(
    hub: str, server: Certificates
) -> None:
    async with tls_pair(hub, server) as (transport, client):
        await send_all(transport, b"bye")
        transport.shutdown_write()
        assert await client.receive_all() == b"bye"
        assert not client.ragged
        await client.send(b"too late")
        client.send_eof()
        total = 0
        while True:
            data = transport.recv_nowait()
            if data is None:
                await transport.watch.wait_readable()
            elif data:
                total += len(data)
                assert b"too late" not in data
            else:
                break
        assert total > 0
        with pytest.raises(OSError):
            transport.send_nowait(b"nothing goes out in the clear")


async def test_progress_is_what_the_peer_has_taken(hub: str, server: Certificates) -> None:
    async with tls_pair(hub, server, buffers=4096) as (transport, client):
        while transport.send_nowait(b"x" * RECORD_SIZE):
            pass
        transport.has_progressed()
        assert not transport.has_progressed()
        await receive_all_of(client, 8 * 1024)
        with trio.fail_after(30):
            while not transport.has_progressed():
                await trio.sleep(0.001)
        transport.close()
        assert not transport.has_progressed()


async def test_progress_is_seen_where_the_system_does_not_count(
    hub: str, server: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(socket, "TCP_INFO")
    async with tls_pair(hub, server, buffers=4096) as (transport, client):
        while transport.send_nowait(b"x" * RECORD_SIZE):
            pass
        transport.has_progressed()
        assert not transport.has_progressed()
        await receive_all_of(client, 8 * 1024)
        with trio.fail_after(30):
            while not transport.has_progressed():
                await trio.sleep(0.001)
        transport.close()
        assert not transport.has_progressed()


# -- the handshake -------------------------------------------------------------------------------------------


async def fail(server: Certificates, hub: Any, sent: bytes, *, then_eof: bool = True) -> HandshakeFailed:
    """What our end makes of a client that begins like this."""
    with tcp_pair() as (ours, peer):
        transport = server.wrap(ours, hub)
        peer.sendall(sent)
        if then_eof:
            peer.shutdown(socket.SHUT_WR)
        try:
            with pytest.raises(HandshakeFailed) as raised, trio.fail_after(30):
                await wait_hello(transport)
                await handshake(transport, trio.lowlevel.checkpoint)
        finally:
            transport.close()
        return raised.value


@pytest.mark.parametrize(
    "sent",
    [
        b"", b"\x00", b"\x16", b"\x16\x03\x01", b"\x16\x03\x01\x40\x01" + b"x" * 100, b"\x16\x03\x01\x00\x05hello",
        b"\x80\x2e\x01\x00\x02", b"\r\n\r\n", b"get / http/1.1\r\n\r\n", bytes(100), b"\xff" * 3000,
        b"\x16\x03\x01\x00\x05\x01\xff\xff\xff\xff" * 50,
    ],
)  # fmt: skip
async def test_garbage_fails(hub: str, server: Certificates, sent: bytes) -> None:
    async with running_hub(hub) as running:
        failure = await fail(server, running, sent)
    assert not failure.plain_http
    assert failure.strerror


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\n", b"P", b"OPTIONS * HTTP/1.1\r\n", b"PRI * HTTP/2.0\r\n"]
)
async def test_a_request_in_plain_text_is_known(hub: str, server: Certificates, sent: bytes) -> None:
    async with running_hub(hub) as running:
        failure = await fail(server, running, sent, then_eof=False)
    assert failure.plain_http


async def test_a_client_that_resets_in_the_handshake(hub: str, server: Certificates) -> None:
    with tcp_pair() as (ours, peer):
        async with running_hub(hub) as running:
            transport = server.wrap(ours, running)
            peer.sendall(b"\x16\x03\x01\x02\x00\x01")
            await wait_hello(transport)
            reset(peer)
            with pytest.raises(HandshakeFailed):
                await handshake(transport, trio.lowlevel.checkpoint)
            transport.close()
