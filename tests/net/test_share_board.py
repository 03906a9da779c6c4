"""The board on which workers note their connections, and what each may take."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from trioserve.net.share_board import Share, ShareBoard


@pytest.fixture
def board() -> Iterator[ShareBoard]:
    made = ShareBoard.create()
    for place in range(48):
        assert made.take_place(set(range(place))) == place
    yield made
    made.close()


def test_who_is_alone_takes_all(board: ShareBoard) -> None:
    share = Share(board, 0)
    share.note(1000)
    assert share.room(1000) > 1000


def test_nobody_gets_ahead_of_the_others_by_more_than_one(board: ShareBoard) -> None:
    shares = [Share(board, place) for place in range(3)]
    for share in shares:
        share.note(4)
    assert [share.room(4) for share in shares] == [1, 1, 1]
    shares[0].note(5)
    assert shares[0].room(5) == 0
    assert shares[1].room(4) == 1
    shares[1].note(2)
    assert shares[0].room(5) == -2
    assert shares[1].room(2) == 3


def test_who_accepts_no_more_does_not_count(board: ShareBoard) -> None:
    shares = [Share(board, place) for place in range(2)]
    shares[0].note(50)
    shares[1].note(0)
    assert shares[0].room(50) < 0
    shares[1].note(None)
    assert shares[0].room(50) > 50
    assert board.numbers() == [50]


def test_what_nobody_else_takes_is_taken_after_all_and_faster_each_time(board: ShareBoard) -> None:
    share, stuck = Share(board, 0), Share(board, 40)
    share.note(10)
    stuck.note(0)
    rooms = [share.room_after_yielding() for _ in range(10)]
    assert rooms == [0, 0, 0, 0, 0, 1, 2, 4, 8, 16]
    stuck.note(1)  # it moves: patience again
    assert share.room_after_yielding() == 0


def test_places_are_used_again_from_the_lowest(board: ShareBoard) -> None:
    assert board.take_place(set()) == 0
    assert board.take_place({0, 1, 3}) == 2


def test_the_board_is_one_for_all_who_attach_it(board: ShareBoard) -> None:
    other = ShareBoard(board.fd)
    other.write(3, 7)
    assert board.numbers() == [7]
    assert board.least_of_others(0) == 7
    assert board.least_of_others(3) is None


def test_places_far_apart_are_all_seen(board: ShareBoard) -> None:
    for place in (0, 15, 16, 31):
        board.write(place, place)
    assert board.numbers() == [0, 15, 16, 31]
    assert board.least_of_others(0) == 15
