"""What is posted is sent in order, once, and soon enough."""

from __future__ import annotations

import pytest

from trioserve.net.outbox import NO_OUTBOX, Outbox


class Sent:
    """Who posts, and what was sent of it."""

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox
        self.data: list[bytes] = []

    def send_posted(self, data: bytes) -> None:
        self.data.append(data)

    def post(self, *parts: bytes) -> None:
        for part in parts:
            self.outbox.post(self, part)


@pytest.fixture
def sent() -> Sent:
    outbox = Outbox()
    outbox.open()
    return Sent(outbox)


def test_posts_are_sent_in_order_when_it_is_closed(sent: Sent) -> None:
    sent.post(b"one", b"two")
    assert sent.data == []
    assert sent.outbox.is_open
    sent.outbox.close()
    assert sent.data == [b"one", b"two"]
    assert not sent.outbox.is_open
    sent.outbox.close()
    assert sent.data == [b"one", b"two"]


def test_flushed_before_it_stays_open(sent: Sent) -> None:
    sent.post(b"one")
    sent.outbox.flush()
    assert sent.data == [b"one"]
    assert sent.outbox.is_open
    sent.post(b"two")
    sent.outbox.close()
    assert sent.data == [b"one", b"two"]


def test_sixteen_are_enough(sent: Sent) -> None:
    parts = [b"%d" % number for number in range(20)]
    sent.post(*parts)
    assert sent.data == parts[:16]
    assert sent.outbox.posted == 20
    sent.outbox.close()
    assert sent.data == parts


def test_the_next_turn_counts_anew(sent: Sent) -> None:
    sent.post(b"one")
    sent.outbox.close()
    sent.outbox.open()
    assert sent.outbox.posted == 0


class EagerlySent(Sent):
    """Flushes before it sends."""

    def send_posted(self, data: bytes) -> None:
        self.outbox.flush()
        super().send_posted(data)


def test_who_flushes_while_it_is_flushed_sends_nothing_twice() -> None:
    outbox = Outbox()
    outbox.open()
    sent = EagerlySent(outbox)
    sent.post(b"one", b"two")
    outbox.close()
    assert sent.data == [b"one", b"two"]


def test_all_but_one_posters_are_sent(sent: Sent) -> None:
    other = Sent(sent.outbox)
    sent.post(b"one")
    other.post(b"two")
    sent.post(b"three")
    sent.outbox.flush_but(sent)
    assert (sent.data, other.data) == ([], [b"two"])
    assert sent.outbox.posted == 3
    sent.outbox.close()
    assert (sent.data, other.data) == ([b"one", b"three"], [b"two"])


def test_a_hub_without_one_never_opens_it() -> None:
    assert not NO_OUTBOX.is_open
    NO_OUTBOX.flush()
    assert not NO_OUTBOX.is_open
