"""The channel of JSON lines: whole messages or named errors, whatever the peer does and whenever it is cancelled."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from tests.net.sockets import fill, unix_pair
from trioserve.net.json_lines import BadMessage, JsonLines

LIMIT = 100
# More than the kernel's buffer holds.
BIG = {"text": "x" * 1_000_000}

Link = tuple[JsonLines, socket.socket]


@pytest.fixture
def link() -> Iterator[Link]:
    """A channel that accepts lines of 100 bytes, and the socket at its other end, which does not block."""
    with unix_pair() as (ours, peer):
        peer.setblocking(False)
        yield JsonLines(ours, limit=LIMIT), peer


def pending(peer: socket.socket) -> bytes:
    """All that has arrived."""
    found = bytearray()
    try:
        while part := peer.recv(1 << 20):
            found += part
    except BlockingIOError:
        pass
    return bytes(found)


async def read_lines(peer: socket.socket, count: int) -> list[dict[str, Any]]:
    """As a slow peer does, bit by bit."""
    found = bytearray()
    with trio.fail_after(30):
        while found.count(b"\n") < count:
            await trio.lowlevel.wait_readable(peer)
            found += peer.recv(30_000)
    return [json.loads(line) for line in found.splitlines()]


# -- messages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [{}, {"a": [1, 2.5, None, True, {"b": "\n\r\0 ü 🐍"}]}, {"file": "/tmp/\udcff"}, {"n": 2**100}],
)
async def test_what_one_end_sends_the_other_receives(message):
    with unix_pair() as (one, other):
        sender, receiver = JsonLines(one), JsonLines(other)
        await sender.send(message)
        assert sender.send_nowait(message)
        assert await receiver.receive() == message
        assert await receiver.receive() == message


async def test_a_message_is_one_line(link):
    channel, peer = link
    await channel.send({"a": "x\ny", "b": 1})
    assert pending(peer) == b'{"a":"x\\ny","b":1}\n'


async def test_messages_are_found_wherever_the_stream_is_cut(link):
    channel, peer = link
    text = b'{"n":1}\n{"n":2}\r\n {"n": 3} \n'
    received: list[Any] = []

    async def receive() -> None:
        received.extend([await channel.receive() for _ in range(6)])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        for byte in text:
            peer.send(bytes([byte]))
            await wait_all_tasks_blocked()
        peer.send(text)
    assert received == [{"n": 1}, {"n": 2}, {"n": 3}] * 2


async def test_at_the_end_there_is_none_and_half_a_line_is_nothing(link):
    channel, peer = link
    peer.sendall(b'{"n":1}\n{"n":2')
    peer.close()
    assert await channel.receive() == {"n": 1}
    assert await channel.receive() is None
    assert await channel.receive() is None
    assert "at its end" in repr(channel)


async def test_a_peer_that_dies_with_something_unread_is_an_end_too(link):
    channel, peer = link
    await channel.send({})
    peer.sendall(b'{"last":1}\n')
    peer.close()
    assert await channel.receive() == {"last": 1}
    assert await channel.receive() is None


# -- what is no message --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"", "not JSON"),
        (b"hello", "not JSON"),
        (b'{"a":1', "not JSON"),
        (b'{"a":1}{"a":2}', "not JSON"),
        (b'{"a":NaN}', "NaN is no JSON"),
        (b"\xff\xfe\x00\x80", "utf-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"[1]", "expected a JSON object, such as {}, but this is an array"),
        (b"null", "this is null"),
        (b"3", "this is a number"),
        (b"true", "this is a boolean"),
        (b'"x"', "this is a string"),
    ],
)
async def test_a_bad_line_is_named_and_the_next_one_is_received(link, line, why):
    channel, peer = link
    peer.sendall(line + b'\n{"fine":1}\n')
    with pytest.raises(BadMessage) as caught:
        await channel.receive()
    assert why in str(caught.value)
    assert await channel.receive() == {"fine": 1}


@pytest.mark.parametrize("line", [b"[" * 200_000, b'{"a":' * 100_000, b'{"n":' + b"9" * 10_000 + b"}"])
async def test_deep_nesting_and_huge_numbers_are_bad_messages(line):
    with unix_pair() as (ours, peer):
        channel = JsonLines(ours)

        async def feed() -> None:
            await trio.to_thread.run_sync(peer.sendall, line + b'\n{"fine":1}\n')

        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed)
            with pytest.raises(BadMessage, match="not JSON"):
                await channel.receive()
            assert await channel.receive() == {"fine": 1}


@pytest.mark.parametrize("excess", [0, 1])
async def test_the_limit_is_that_of_the_line_without_its_end(link, excess):
    channel, peer = link
    line = b'{"a":"' + b"x" * (LIMIT - 8 + excess) + b'"}'
    assert len(line) == LIMIT + excess
    peer.sendall(line + b'\n{"fine":1}\n')
    if excess:
        with pytest.raises(BadMessage, match="longer than 100 bytes"):
            await channel.receive()
    else:
        assert await channel.receive() == json.loads(line)
    assert await channel.receive() == {"fine": 1}


async def test_a_line_without_end_is_refused_once_and_then_dropped_as_it_comes(link):
    channel, peer = link
    peer.sendall(b"x" * (LIMIT + 1))
    with pytest.raises(BadMessage):
        await channel.receive()
    received: list[Any] = []

    async def receive() -> None:
        received.append(await channel.receive())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        for _ in range(50):
            peer.sendall(b"x" * 10 * LIMIT)
            await wait_all_tasks_blocked()
            assert len(channel._received) == 0
        peer.sendall(b'x{"a":1}\n{"fine":1}\n')
    assert received == [{"fine": 1}]


@pytest.mark.parametrize(
    "message", [{"a": object()}, {"a": float("nan")}, {"a": float("inf")}, {"a": {(1,): 2}}]
)
async def test_what_json_cannot_say_is_not_sent(link, message):
    channel, peer = link
    with pytest.raises(BadMessage, match="cannot be written as JSON"):
        await channel.send(message)
    with pytest.raises(BadMessage, match="cannot be written as JSON"):
        channel.send_nowait(message)
    await channel.send({"fine": 1})
    assert pending(peer) == b'{"fine":1}\n'


# -- sending when there is no room ---------------------------------------------------------------------------


async def test_who_hangs_up_is_told_from_who_just_sends_no_more(link):
    channel, peer = link
    peer.send(b"{}\n")
    peer.shutdown(socket.SHUT_WR)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.wait_hung_up)
        assert await channel.receive() == {}
        assert await channel.receive() is None
        await wait_all_tasks_blocked()
        assert nursery.child_tasks
        peer.close()
    await channel.wait_hung_up()
    channel.close()
    with pytest.raises(trio.ClosedResourceError):
        await channel.wait_hung_up()


async def test_send_waits_for_room_and_everything_arrives_whole(link):
    channel, peer = link
    messages = [{"sender": number, **BIG} for number in range(5)]
    async with trio.open_nursery() as nursery:
        for message in messages:
            nursery.start_soon(channel.send, message)
        found = await read_lines(peer, len(messages))
    assert sorted(found, key=lambda message: message["sender"]) == messages


async def test_send_nowait_drops_what_does_not_fit_and_says_so(link):
    channel, peer = link
    sent = 0
    while channel.send_nowait({"n": sent}):
        sent += 1
    assert sent > 100
    assert not channel.send_nowait({"n": "dropped"})
    assert [message["n"] for message in await read_lines(peer, sent)] == list(range(sent))
    assert channel.send_nowait({"n": "after"})
    assert pending(peer) == b'{"n":"after"}\n'


async def test_send_nowait_keeps_the_rest_of_one_message_and_no_more(link):
    channel, peer = link
    assert channel.send_nowait(BIG)
    assert not channel.send_nowait({"n": 1})
    assert 0 < len(channel._unsent) < len(json.dumps(BIG))
    found = b""
    while not channel.send_nowait({"n": 2}):
        found += pending(peer)
    found += pending(peer)
    assert [json.loads(line) for line in found.splitlines()] == [BIG, {"n": 2}]


async def test_send_brings_the_rest_of_an_earlier_message_first(link):
    channel, peer = link
    assert channel.send_nowait(BIG)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.send, {"n": 1})
        assert await read_lines(peer, 2) == [BIG, {"n": 1}]


async def test_send_nowait_gives_way_to_a_send_that_waits(link):
    channel, peer = link
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.send, BIG)
        await wait_all_tasks_blocked()
        assert not channel.send_nowait({"n": 1})
        assert await read_lines(peer, 1) == [BIG]
    assert channel.send_nowait({"n": 2})
    assert pending(peer) == b'{"n":2}\n'


async def test_send_nowait_leaves_a_waiting_send_its_turn_even_if_there_is_room_again(link):
    channel, peer = link
    message = {"text": "x" * 300_000}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.send, message)
        await wait_all_tasks_blocked()
        found = pending(peer)
        assert not channel.send_nowait({"n": 1})
    assert json.loads(found + pending(peer)) == message


async def test_what_the_kernel_takes_at_the_end_is_still_sent():
    with unix_pair() as (ours, peer):
        channel = JsonLines(ours)
        assert channel.send_nowait({"text": "x" * 300_000})
        first = peer.recv(1 << 20)
        channel.close()
        peer.settimeout(5)
        found = bytearray(first)
        while part := peer.recv(1 << 20):
            found += part
        assert json.loads(found) == {"text": "x" * 300_000}


async def test_a_peer_that_has_gone_is_an_os_error(link):
    channel, peer = link
    peer.close()
    with pytest.raises(BrokenPipeError):
        await channel.send({})
    with pytest.raises(BrokenPipeError):
        channel.send_nowait({})


async def test_a_peer_that_goes_while_a_send_waits_is_an_os_error(link):
    channel, peer = link
    with pytest.RaisesGroup(pytest.RaisesExc(OSError)):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.send, BIG)
            await wait_all_tasks_blocked()
            peer.close()


# -- cancelling ----------------------------------------------------------------------------------------------


async def test_receive_that_is_cancelled_loses_nothing(link):
    channel, peer = link
    peer.sendall(b'{"half":')
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.receive)
            await wait_all_tasks_blocked()
            scope.cancel()
    peer.sendall(b'1}\n{"n":2}\n{"n":3}\n')
    assert await channel.receive() == {"half": 1}
    for _ in range(3):  # now the other two are in the channel's own buffer
        with trio.CancelScope() as scope:
            scope.cancel()
            await channel.receive()
        assert scope.cancelled_caught
    assert await channel.receive() == {"n": 2}
    assert await channel.receive() == {"n": 3}


async def test_receive_always_lets_others_have_their_turn(link):
    channel, peer = link
    peer.sendall(b'{"n":1}\n' * 2)
    for _ in range(2):
        with assert_checkpoints():
            await channel.receive()


async def test_send_cancelled_before_its_first_byte_has_sent_nothing(link):
    channel, peer = link
    filled = fill(channel._sock)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.send, {"never": "sent"})
            await wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert pending(peer) == b"x" * filled
    await channel.send({"n": 1})
    assert pending(peer) == b'{"n":1}\n'


async def test_send_cancelled_in_its_turn_has_sent_nothing(link):
    channel, peer = link
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.send, BIG)
        await wait_all_tasks_blocked()
        with trio.move_on_after(0.01) as scope:
            await channel.send({"never": "sent"})
        assert scope.cancelled_caught
        assert await read_lines(peer, 1) == [BIG]
    assert pending(peer) == b""


async def test_send_cancelled_behind_a_rest_leaves_the_rest(link):
    channel, peer = link
    assert channel.send_nowait(BIG)
    with trio.move_on_after(0.01) as scope:
        await channel.send({"never": "sent"})
    assert scope.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.send, {"n": 1})
        assert await read_lines(peer, 2) == [BIG, {"n": 1}]


async def test_send_cancelled_midway_closes_the_channel_and_the_receiver_is_told(link):
    channel, _ = link
    told: list[Exception] = []

    async def receive() -> None:
        try:
            await channel.receive()
        except trio.ClosedResourceError as error:
            told.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as sending:
                sending.start_soon(channel.send, BIG)
                await wait_all_tasks_blocked()
                scope.cancel()
    assert len(told) == 1
    assert "closed" in repr(channel)
    with pytest.raises(trio.ClosedResourceError):
        await channel.send({})


# -- the end -------------------------------------------------------------------------------------------------


async def test_a_closed_channel_says_so_and_may_be_closed_again(link):
    channel, peer = link
    peer.sendall(b'{"n":1}\n')
    channel.close()
    channel.close()
    with pytest.raises(trio.ClosedResourceError):
        await channel.send({})
    with pytest.raises(trio.ClosedResourceError):
        channel.send_nowait({})
    with pytest.raises(trio.ClosedResourceError):
        await channel.receive()


async def test_a_send_that_waits_is_told_of_the_close(link):
    channel, _ = link
    with pytest.RaisesGroup(trio.ClosedResourceError):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.send, BIG)
            await wait_all_tasks_blocked()
            channel.close()


def test_it_may_be_closed_after_trio_has_ended():
    with unix_pair() as (ours, peer):
        channel = trio.run(_make, ours)
        assert repr(channel) == f"<JsonLines fd={ours.fileno()} open, 0 bytes to send>"
        channel.close()
        assert peer.recv(1) == b""


async def _make(sock: socket.socket) -> JsonLines:
    return JsonLines(sock)


async def test_two_tasks_cannot_wait_to_receive(link):
    channel, peer = link
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.receive)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await channel.receive()
        peer.sendall(b"{}\n")
