"""The transport writes and reads at once, says exactly how much, and ends a connection the way it was asked to."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.net.sockets import (
    HUBS,
    affordable_pairs,
    fill,
    receive_exactly,
    reset,
    running_hub,
    send_all,
    tcp_pair,
    unix_pair,
)
from trioserve.net.hub import Hub, open_hub
from trioserve.net.transport import READ_SIZE, Transport

Link = tuple[Transport, socket.socket]


@pytest.fixture
def link() -> Iterator[Link]:
    """A transport on one end of a TCP connection, and the other end."""
    hub = open_hub("auto")
    with tcp_pair() as (ours, peer):
        yield Transport(ours, hub.watch(ours)), peer
        hub.close()


@pytest.fixture(params=HUBS)
async def hub(request: pytest.FixtureRequest) -> AsyncIterator[Hub]:
    async with running_hub(request.param) as hub:
        yield hub


# -- reading -------------------------------------------------------------------------------------------------


def test_recv_gives_none_if_empty_bytes_if_any_and_nothing_at_the_end(link: Link) -> None:
    transport, peer = link
    assert transport.recv_nowait() is None
    assert not transport.watch.readable
    peer.sendall(b"abc")
    assert transport.recv_nowait() == b"abc"
    peer.close()
    assert transport.recv_nowait() == b""
    assert transport.recv_nowait() == b""
    assert transport.broken is None
    assert transport.watch.hangup
    assert not transport.watch.reset
    assert transport.bytes_read == 3


def test_recv_reads_no_more_than_asked(link: Link) -> None:
    transport, peer = link
    peer.sendall(b"x" * (READ_SIZE + 1))
    data = transport.recv_nowait()
    assert data is not None
    assert len(data) == READ_SIZE
    assert transport.watch.readable
    assert transport.recv_nowait() == b"x"


def test_a_reset_reads_as_the_end_and_is_noted_once(link: Link) -> None:
    transport, peer = link
    reset(peer)
    assert transport.recv_nowait() == b""
    first = transport.broken
    assert isinstance(first, ConnectionResetError)
    assert transport.watch.reset
    with pytest.raises(BrokenPipeError):
        transport.send_nowait(b"x")
    assert transport.recv_nowait() == b""
    assert transport.broken is first


# -- writing -------------------------------------------------------------------------------------------------


def test_send_reports_what_the_kernel_took(link: Link) -> None:
    transport, peer = link
    data = random.Random(1).randbytes(8 << 20)
    sent = transport.send_nowait(data)
    assert 0 < sent < len(data)
    while more := transport.send_nowait(memoryview(data)[sent:]):
        sent += more
    assert transport.send_nowait(b"x") == 0
    assert transport.bytes_written == sent
    transport.close()
    with peer.makefile("rb") as stream:
        assert stream.read() == data[:sent]


def test_send_to_a_peer_that_is_gone_raises_and_is_noted(link: Link) -> None:
    transport, peer = link
    reset(peer)
    with pytest.raises(ConnectionResetError) as raised:
        transport.send_nowait(b"x")
    assert transport.broken is raised.value
    with pytest.raises(OSError):
        transport.send_parts_nowait([b"x" * 70_000, b"y"])
    assert transport.broken is raised.value
    assert transport.bytes_written == 0


PART_LISTS: dict[str, list[bytes | memoryview]] = {
    "one": [b"a" * 100],
    "one large": [b"a" * 100_000],
    "few small": [b"head", b"body"],
    "few large": [b"head", b"b" * 70_000, b"tail"],
    "above IOV_MAX": [b"%d" % (i % 10) for i in range(5000)],
    "large and above IOV_MAX": [bytes([i % 251]) * 30 for i in range(5000)],
    "empty ones": [b"", b"a", b"", b"b", b""],
    "empty ones among large": [b"", b"a" * 70_000, b"", b"", b"b" * 70_000, b"", b""],
    "many empty ones": [b"a" * 70_000, *[b""] * 2000, b"b"],
    "nothing": [b""],
    "views": [memoryview(b"abc" * 30_000)[5:], memoryview(b"x")],
}


@pytest.mark.parametrize("name", PART_LISTS)
async def test_parts_arrive_whole_and_in_order(hub: Hub, name: str) -> None:
    parts: list[bytes | memoryview] = list(PART_LISTS[name])
    expected = b"".join(parts)
    with tcp_pair() as (ours, peer):
        transport = Transport(ours, hub.watch(ours))
        async with trio.open_nursery() as nursery:
            received: list[bytes] = []
            nursery.start_soon(_collect, peer, received)
            while transport.send_parts_nowait(parts):
                assert parts
                await transport.watch.wait_writable()
            assert parts == []
            transport.close()
        assert b"".join(received) == expected
        assert transport.bytes_written == len(expected)


async def _collect(peer: socket.socket, received: list[bytes]) -> None:
    peer.setblocking(False)
    while True:
        try:
            data = peer.recv(1 << 20)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(peer)
            continue
        if not data:
            return
        received.append(data)


@pytest.mark.parametrize("name", ["large and above IOV_MAX", "many empty ones", "empty ones among large"])
def test_parts_are_left_over_only_where_the_kernel_takes_no_more(name: str) -> None:
    """With room in the kernel's buffer no edge would ever come, and the writer would wait for it in vain."""
    hub = open_hub("auto")
    with tcp_pair() as (ours, _):
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        parts: list[bytes | memoryview] = list(PART_LISTS[name])
        assert not Transport(ours, hub.watch(ours)).send_parts_nowait(parts)
        assert parts == []
    hub.close()


@pytest.mark.parametrize("sizes", [(1000, 50), (5000, 300), (3, 500_000), (2, 3)])
def test_parts_that_the_kernel_took_in_part_stay_as_the_exact_rest(
    link: Link, sizes: tuple[int, int]
) -> None:
    transport, peer = link
    for sock, option in ((transport.sock, socket.SO_SNDBUF), (peer, socket.SO_RCVBUF)):
        sock.setsockopt(socket.SOL_SOCKET, option, 16_384)
    room = fill(transport.sock)
    _read_exactly(peer, room // 2)
    rng = random.Random(sizes[0])
    parts: list[bytes | memoryview] = [rng.randbytes(rng.randrange(sizes[1])) for _ in range(sizes[0])]
    expected = b"".join(parts)
    rounds = 0
    received = b""
    while transport.send_parts_nowait(parts):
        rounds += 1
        rest = b"".join(parts)
        assert rest == expected[len(expected) - len(rest) :]
        received += peer.recv(100_000)
    assert rounds or len(expected) < 50_000
    transport.close()
    with peer.makefile("rb") as stream:
        received += stream.read()
    assert received[room - room // 2 :] == expected


def _read_exactly(peer: socket.socket, size: int) -> None:
    while size:
        size -= len(peer.recv(size))


def test_a_head_and_a_file_behind_it_leave_in_one_go(link: Link, tmp_path: Path) -> None:
    transport, peer = link
    (tmp_path / "file").write_bytes(b"0123456789")
    with (tmp_path / "file").open("rb") as file:
        assert transport.send_with_file_nowait(b"head ", file.fileno(), 2, 5) == 10
        assert peer.recv(100) == b"head 23456"
        # The file has become shorter.
        assert transport.send_with_file_nowait(b"head ", file.fileno(), 8, 5) == 7
        # It cannot be read: whoever sends the rest will be told so.
        assert transport.send_with_file_nowait(b"head ", 1 << 20, 0, 5) == 5
        assert transport.broken is None
        assert transport.bytes_written == 22
        fill(transport.sock)
        assert transport.send_with_file_nowait(b"head ", file.fileno(), 0, 5) == 0
        assert transport.bytes_written == 22
        reset(peer)
        with pytest.raises(OSError):
            while True:
                transport.send_with_file_nowait(b"head ", file.fileno(), 0, 5)
        assert transport.broken is not None
        assert transport.watch.reset


# -- the ends ------------------------------------------------------------------------------------------------


def test_is_peer_gone_sees_fin_and_reset_but_not_behind_unread_data(link: Link) -> None:
    transport, peer = link
    assert not transport.is_peer_gone()
    peer.sendall(b"unread")
    peer.shutdown(socket.SHUT_WR)
    assert not transport.is_peer_gone()
    assert transport.recv_nowait(100) == b"unread"
    assert transport.is_peer_gone()
    assert transport.broken is None


def test_is_peer_gone_notes_a_reset(link: Link) -> None:
    transport, peer = link
    reset(peer)
    assert transport.is_peer_gone()
    assert isinstance(transport.broken, ConnectionResetError)


def test_has_input_looks_without_reading(link: Link) -> None:
    transport, peer = link
    assert not transport.has_input()
    peer.sendall(b"a")
    assert transport.has_input()
    assert transport.recv_nowait() == b"a"
    reset(peer)
    assert not transport.has_input()
    assert isinstance(transport.broken, ConnectionResetError)


def test_has_progressed_tells_whether_the_peer_took_something_since(link: Link) -> None:
    transport, peer = link
    assert not transport.has_progressed()
    while transport.send_nowait(b"x" * 65536):
        pass
    assert transport.has_progressed()
    assert not transport.has_progressed()
    _read_exactly(peer, transport.bytes_written // 2)
    assert transport.has_progressed()
    transport.close()
    assert not transport.has_progressed()


def test_close_ends_with_a_fin_after_everything_written(link: Link) -> None:
    transport, peer = link
    transport.send_nowait(b"all of it")
    transport.close()
    transport.close()
    assert peer.recv(100) == b"all of it"
    assert peer.recv(100) == b""


def test_abort_ends_with_a_reset(link: Link) -> None:
    transport, peer = link
    transport.send_nowait(b"a part of it")
    assert peer.recv(100) == b"a part of it"
    transport.abort()
    with pytest.raises(ConnectionResetError):
        peer.recv(100)
    transport.abort()
    transport.close()


def test_abort_after_a_reset_is_no_error(link: Link) -> None:
    transport, peer = link
    reset(peer)
    transport.recv_nowait()
    transport.abort()
    assert transport.sock.fileno() == -1


def test_abort_ends_a_unix_connection_too() -> None:
    hub = open_hub("auto")
    with unix_pair() as (ours, peer):
        Transport(ours, hub.watch(ours)).abort()
        assert peer.recv(100) == b""
    hub.close()


def test_shutdown_write_sends_fin_and_still_reads(link: Link) -> None:
    transport, peer = link
    transport.shutdown_write()
    assert peer.recv(100) == b""
    peer.sendall(b"still here")
    assert transport.recv_nowait() == b"still here"
    assert transport.broken is None


def test_shutdown_write_on_a_dead_connection_is_noted_not_raised(link: Link) -> None:
    transport, peer = link
    reset(peer)
    assert transport.recv_nowait() == b""
    transport.shutdown_write()
    assert isinstance(transport.broken, ConnectionResetError)


def test_a_transport_describes_itself(link: Link) -> None:
    transport, peer = link
    peer.sendall(b"abc")
    transport.recv_nowait()
    transport.send_nowait(b"de")
    assert "open" in repr(transport)
    assert repr(transport).endswith("in=3 out=2>")


# -- both ways at once ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [tcp_pair, unix_pair], ids=["tcp", "unix"])
async def test_50_megabytes_both_ways_arrive_intact_past_slow_readers(hub: Hub, pair: object) -> None:
    """Both ends write until the kernel takes no more, hundreds of times: each write edge must be there."""
    size = 50 << 20
    block = random.Random(7).randbytes((1 << 20) + 13)
    data = (block * (size // len(block) + 1))[:size]
    with pair() as (left, right):  # type: ignore[operator]
        right.setblocking(False)
        ends = [Transport(sock, hub.watch(sock)) for sock in (left, right)]
        received: list[bytes] = []

        async def read(transport: Transport, read_size: int) -> None:
            parts = []
            for _ in range(0, size, 1 << 20):
                # Only now and then, so that the writer stands before a full buffer.
                parts.append(
                    await receive_exactly(transport, min(1 << 20, size - sum(map(len, parts))), read_size)
                )
                await wait_all_tasks_blocked()
            received.append(b"".join(parts))

        async with trio.open_nursery() as nursery:
            for end, read_size in zip(ends, (1 << 16, 1 << 18), strict=True):
                nursery.start_soon(send_all, end, data)
                nursery.start_soon(read, end, read_size)
        assert received == [data, data]
        for end in ends:
            end.close()


@pytest.mark.parametrize("seed", range(4))
async def test_random_chops_arrive_intact(hub: Hub, seed: int) -> None:
    """Writes and reads of every size, read sizes that fit exactly, and pauses wherever they fall."""
    rng = random.Random(seed)
    data = rng.randbytes(400_000)
    with tcp_pair() as (ours, peer):
        peer.setblocking(False)
        writer, reader = Transport(peer, hub.watch(peer)), Transport(ours, hub.watch(ours))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_write_chops, writer, data, random.Random(seed + 100))
            received = b""
            while True:
                part = reader.recv_nowait(rng.choice((1, 2, 7, 64, 1000, 4096, 65536)))
                if part is None:
                    await reader.watch.wait_readable()
                elif part:
                    received += part
                else:
                    break
        assert received == data
        reader.close()


async def _write_chops(transport: Transport, data: bytes, rng: random.Random) -> None:
    at = 0
    while at < len(data):
        size = rng.choice((1, 2, 7, 64, 1000, 4096, 65536))
        await send_all(transport, data[at : at + size])
        at += size
        for _ in range(rng.randrange(3)):
            await trio.lowlevel.checkpoint()
    transport.close()


async def test_2000_connections_are_each_told_of_their_own_data(hub: Hub) -> None:
    count = affordable_pairs(2000)
    pairs = [socket.socketpair() for _ in range(count)]
    echoed = 0

    async def echo(transport: Transport) -> None:
        nonlocal echoed
        for _ in range(2):
            data = await receive_exactly(transport, 4)
            await send_all(transport, data)
        with pytest.raises(EOFError):
            await receive_exactly(transport, 1)
        transport.close()
        echoed += 1

    async with trio.open_nursery() as nursery:
        for ours, _ in pairs:
            ours.setblocking(False)
            nursery.start_soon(echo, Transport(ours, hub.watch(ours)))
        await wait_all_tasks_blocked()
        order = list(range(count))
        for seed in range(2):
            random.Random(seed).shuffle(order)
            for index in order:
                pairs[index][1].sendall(b"%04d" % index)
            await wait_all_tasks_blocked(0.01)
            for index, (_, peer) in enumerate(pairs):
                assert peer.recv(100) == b"%04d" % index
        for _, peer in pairs:
            peer.close()
    assert echoed == count
