"""The board on which workers note their connections, what each may take, and how long it waits for the others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from trioserve.net.share_board import Load, Patience, Share, ShareBoard


@pytest.fixture
def board() -> Iterator[ShareBoard]:
    made = ShareBoard.create()
    for place in range(48):
        assert made.take_place(set(range(place))) == place
    yield made
    made.close()


class Clock:
    """Stands still."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# -- the share -----------------------------------------------------------------------------------------------


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
    assert shares[0].room(5) < 0
    assert shares[1].room(2) == 3


@pytest.mark.parametrize(
    ("mine", "others", "room"),
    [
        (Load(0, 200, 0), [Load(1, 1, 1)], 1),  # at rest, all of them: the other one is busier
        (Load(0, 200, 9), [Load(1, 1, 1)], 1),
        (Load(0, 200, 0), [Load(0, 0, 0)], 0),  # equally busy: the total decides
        (Load(0, 0, 0), [Load(0, 200, 0)], 1),
        (Load(0, 0, 9), [Load(0, 200, 0)], 1),
        (Load(0, 200, 0), [Load(0, 0, 4)], 0),
        (Load(0, 200, 0), [Load(0, 0, 5)], 1),  # but the other one has taken several more lately
        (Load(0, 200, 5), [Load(0, 0, 5)], 0),
        (Load(3, 203, 3), [Load(5, 5, 5)], 2),
        (Load(3, 203, 3), [Load(5, 5, 15)], 3),
        (Load(3, 3, 3), [Load(5, 205, 5)], 3),
        (Load(5, 5, 5), [Load(3, 203, 0)], -1),
        (Load(2, 40, 1), [Load(2, 40, 1), Load(2, 41, 1)], 1),
        (Load(2, 41, 1), [Load(2, 40, 1), Load(9, 9, 0)], 0),
        (Load(7, 7, 7), [Load(0, 1_048_576, 0)], -6),
        (Load(1_048_576, 1_048_576, 1_048_576), [Load(1_048_576, 1_048_577, 1_048_576)], 1),
    ],
    ids=str,
)
def test_the_busy_count_and_between_equals_the_total_and_what_was_taken_decide(
    board: ShareBoard, mine: Load, others: list[Load], room: int
) -> None:
    for place, load in enumerate(others, 7):
        board.write(place, *load)
    share = Share(board, 3)
    share.count(mine.total, lambda: mine.total - mine.busy)
    share.note(mine.total, mine.taken)
    assert sorted(board.loads()) == sorted([mine, *others])
    assert share.room(mine.total) == room


def test_who_accepts_no_more_does_not_count(board: ShareBoard) -> None:
    shares = [Share(board, place) for place in range(2)]
    shares[0].note(50)
    shares[1].note(0)
    assert shares[0].room(50) < 0
    shares[1].withdraw()
    assert shares[0].room(50) > 50
    assert board.loads() == [Load(50, 50, 0)]
    shares[1].count(0, lambda: 0)
    assert board.loads() == [Load(50, 50, 0)]  # a heartbeat is no return


def test_connections_are_busy_until_they_are_counted(board: ShareBoard) -> None:
    share = Share(board, 0, Clock())
    share.note(10)
    assert board.loads() == [Load(10, 10, 0)]
    share.count(10, lambda: 8)
    assert board.loads() == [Load(2, 10, 0)]
    share.note(12, 2)
    assert board.loads() == [Load(4, 12, 2)]
    share.note(7)  # more are closed than were busy
    assert board.loads() == [Load(0, 7, 2)]


@pytest.mark.parametrize(
    ("seconds", "taken"), [(0.05, 100), (0.15, 50), (0.25, 25), (0.75, 0), (3600, 0)], ids=str
)
def test_what_was_taken_is_forgotten_within_a_second(board: ShareBoard, seconds: float, taken: int) -> None:
    clock = Clock()
    share = Share(board, 0, clock)
    share.count(0, lambda: 0)
    share.note(100, 100)
    clock.now += seconds
    share.count(100, lambda: 100)
    assert board.loads()[0].taken == taken


def test_they_are_counted_now_and_then_and_many_of_them_seldom(board: ShareBoard) -> None:
    clock = Clock()
    share = Share(board, 0, clock)
    counts = []

    def count_resting(takes: float = 0.0) -> int:
        counts.append(clock.now)
        clock.now += takes
        return 0

    for _ in range(1000):
        share.count(5, count_resting)
        clock.now += 0.001
    assert len(counts) == 10
    clock.now += 1
    counts.clear()
    for _ in range(1000):
        share.count(5, lambda: count_resting(0.004))
        clock.now += 0.001
    assert len(counts) == 3


# -- the patience --------------------------------------------------------------------------------------------


def judged(patience: Patience, queued: bool, times: int) -> list[int | None]:
    return [patience.judge(queued=queued) for _ in range(times)]


WAIT = [None] * 5


def test_what_nobody_else_takes_is_taken_after_all_and_more_each_time() -> None:
    patience = Patience()
    assert judged(patience, True, 18) == [*WAIT, 1, *WAIT, 2, *WAIT, 4]
    assert judged(patience, False, 1) == [0]  # somebody has taken the rest
    assert judged(patience, True, 12) == [*WAIT, 1, *WAIT, 2]
    patience.reset()
    assert judged(patience, True, 12) == [*WAIT, 1, *WAIT, 2]
    assert judged(patience, True, 600)[-1] == 1024


def test_a_worker_whose_help_is_not_needed_looks_less_often() -> None:
    patience = Patience()
    pauses = []
    for _ in range(2000):
        pauses.append(patience.pause)
        patience.judge(queued=False)
    assert pauses[:5] == [0.002, 0.004, 0.008, 0.016, 0.016]
    assert pauses[-1] == 0.016
    patience.judge(queued=True)
    assert patience.pause == 0.002
    patience.judge(queued=False)
    patience.reset()
    assert patience.pause == 0.002


# -- the memory ----------------------------------------------------------------------------------------------


def test_places_are_used_again_from_the_lowest(board: ShareBoard) -> None:
    assert board.take_place(set()) == 0
    assert board.take_place({0, 1, 3}) == 2


def test_the_board_is_one_for_all_who_attach_it(board: ShareBoard) -> None:
    other = ShareBoard(board.fd)
    other.write(3, 5, 6, 7)
    assert board.loads() == [Load(5, 6, 7)]
    assert board.least_of_others(0) == Load(5, 6, 7)
    assert board.least_of_others(3) is None
    board.clear(3)
    assert other.loads() == []


def test_places_far_apart_are_all_seen(board: ShareBoard) -> None:
    for place in (0, 15, 16, 31):
        board.write(place, place, place, 0)
    assert board.loads() == [Load(number, number, 0) for number in (0, 15, 16, 31)]
    assert board.least_of_others(0) == Load(15, 15, 0)
