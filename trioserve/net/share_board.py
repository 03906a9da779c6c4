"""How busy each worker is, in memory that all workers of a supervisor share, so that they share connections fairly.

One listening socket wakes all its workers, and the first to wake would take all that is queued. Each worker writes here
how many of its connections are busy, how many it has, and how many it has taken lately, and looks at the others' before
it accepts (`worker/listener.py`). It has its share when it has more busy ones than the least busy of the others; if it
has as many, the total decides, unless that other one has just taken several more. So connections that rest, as most
that are kept alive do, are spread evenly, but keep no worker from taking new ones: when one worker has been replaced,
the others have them all.

A board is advice: whoever reads what is a moment old accepts one connection too many or too few, nothing more.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Callable
from typing import NamedTuple, Self

# Workers at once, successors included.
_PLACES = 2047
# Before the places stands how many of them were ever taken: nobody looks further.
_SIZE = 8 * (1 + _PLACES)

# In a place stands one number, so that nobody reads half of it, and the least number is the least load: from the top
# down busy, total and taken in so many bits each (for twice as many as Linux allows descriptors), and 1 for "accepts".
_BITS = 21
_MASK = (1 << _BITS) - 1

# How often a worker counts which of its connections rest, at the most; and where there are many (10,000 take some 3 ms)
# counting may take this part of its time.
_COUNT_INTERVAL = 0.1
_COUNT_PART = 0.01

# Between workers that are equally busy: from how many more connections taken lately on the total no longer decides.
_MORE_TAKEN = 4

# A worker that has its share leaves what is queued to the others this often before it takes some after all: on a busy
# machine they must get a CPU first. Each time they have a few turns of a loop that is busy.
_YIELDS = 6
_YIELD = 0.002
# If they were quicker each time, it need not look so soon.
_LONGEST_YIELD = 0.016


class Load(NamedTuple):
    """A worker's connections, compared in this order: those on which something happens, all, and those taken lately."""

    busy: int
    total: int
    taken: int


class ShareBoard:
    """The shared memory; made by the supervisor, attached by each worker.

    Attributes:
        fd: to be inherited.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, _SIZE)
        self._numbers = memoryview(self._memory).cast("Q")

    def __repr__(self) -> str:
        return f"<ShareBoard {self.loads()}>"

    @classmethod
    def create(cls) -> Self:
        """An empty board."""
        fd = os.memfd_create("trioserve-share")
        os.ftruncate(fd, _SIZE)
        return cls(fd)

    def close(self) -> None:
        """Give the memory back."""
        self._numbers.release()
        self._memory.close()
        os.close(self.fd)

    def loads(self) -> list[Load]:
        """The connections of every worker that accepts some."""
        return [_unpack(number) for number in self._numbers[1 : self._numbers[0] + 1] if number]

    def take_place(self, taken: set[int]) -> int:
        """The first place that is not taken, for a new worker; for the supervisor only. OSError if there is none."""
        place = next((place for place in range(_PLACES) if place not in taken), None)
        if place is None:
            raise OSError(errno.EAGAIN, f"there are {_PLACES} workers already")
        self._numbers[0] = max(self._numbers[0], place + 1)
        return place

    def write(self, place: int, busy: int, total: int, taken: int) -> None:
        """Note the connections of a worker that accepts some."""
        self._numbers[place + 1] = (((busy << _BITS) + total) << _BITS) + taken + 1

    def clear(self, place: int) -> None:
        """A worker accepts none."""
        self._numbers[place + 1] = 0

    def accepts(self, place: int) -> bool:
        """Whether it was noted that a worker accepts connections."""
        return self._numbers[place + 1] != 0

    def least_of_others(self, place: int) -> Load | None:
        """The load of the least busy of the other workers that accept some; None if there is no other."""
        numbers = self._numbers[1 : self._numbers[0] + 1].tolist()
        numbers[place] = 0
        return _unpack(min(filter(None, numbers))) if any(numbers) else None


def _unpack(number: int) -> Load:
    number -= 1
    return Load(number >> 2 * _BITS, number >> _BITS & _MASK, number & _MASK)


class Share:
    """One worker's place on the board, and what it may take.

    Nothing is done for a request: which connections rest is counted when there is a new one to be taken, and with each
    heartbeat. Between two counts all that are new are busy, and those that close were.
    """

    def __init__(self, board: ShareBoard, place: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._board = board
        self._place = place
        self._clock = clock
        self._resting = 0
        self._taken = 0
        self._counted_at = self._count_at = 0.0

    def note(self, connections: int, taken: int = 0) -> None:
        """It has so many now, so many of them new, and accepts."""
        self._taken += taken
        self._board.write(self._place, max(0, connections - self._resting), connections, self._taken)

    def withdraw(self) -> None:
        """It accepts none, until the next `note`."""
        self._board.clear(self._place)

    def count(self, connections: int, count_resting: Callable[[], int]) -> None:
        """Have those counted on which nothing happens, unless that was done a moment ago."""
        began = self._clock()
        if began < self._count_at:
            return
        self._resting = count_resting()
        # What was taken counts half with each interval, so that it is forgotten within a second.
        self._taken >>= min(int((began - self._counted_at) / _COUNT_INTERVAL), _BITS)
        self._counted_at = began
        ended = self._clock()
        self._count_at = max(began + _COUNT_INTERVAL, ended + (ended - began) / _COUNT_PART)
        if self._board.accepts(self._place):
            self.note(connections)

    def room(self, connections: int) -> int:
        """How many it may accept before another one should; 0 or less: let another one."""
        least = self._board.least_of_others(self._place)
        if least is None:
            return _PLACES
        # With so many more it is as busy as that one.
        room = least.busy - max(0, connections - self._resting)
        is_due = connections + room <= least.total or self._taken + room + _MORE_TAKEN < least.taken
        return room + is_due


class Patience:
    """How a worker that has its share yields what is in the queue of one listening socket. Pure.

    It ends, however busy the others are meanwhile: if they do not take all that is queued, then the clients shall not
    wait for them.
    """

    def __init__(self) -> None:
        self._left_over = 0  # pauses in a row after which something was still queued, since it last took some
        self._insisted = 0  # times that it took some, since nothing was queued
        self._taken_away = 0  # pauses in a row after which nothing was queued

    def reset(self) -> None:
        """What is queued is its own to take."""
        self._left_over = self._insisted = self._taken_away = 0

    @property
    def pause(self) -> float:
        """How long the others get now, in seconds."""
        return min(_YIELD * 2.0**self._taken_away, _LONGEST_YIELD)

    def judge(self, *, queued: bool) -> int | None:
        """After a pause: how many to take, twice as many each time; 0 if nothing is queued, None: pause again."""
        if not queued:
            self._left_over = self._insisted = 0
            self._taken_away = min(self._taken_away + 1, 10)
            return 0
        self._taken_away = 0
        self._left_over += 1
        if self._left_over < _YIELDS:
            return None
        self._left_over = 0
        self._insisted = min(self._insisted + 1, 11)
        return 1 << self._insisted - 1
