"""How many connections each worker has, in memory that all workers of a supervisor share, so that they share fairly.

One listening socket wakes all its workers, and the first to wake would take all that is queued. Each worker writes its
own number of connections here and looks at the others' before it accepts (`worker/listener.py`). A board is advice:
whoever reads a number that is a moment old accepts one connection too many or too few, nothing more. Nothing waits.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import Self

# Workers at once, successors included.
_PLACES = 2047
# Before the places stands how many of them were ever taken: nobody looks further.
_SIZE = 4 * (1 + _PLACES)

# How often a worker yields before it takes what is another's: on a busy machine that one must get a CPU first.
_YIELDS = 6


class ShareBoard:
    """The shared memory; made by the supervisor, attached by each worker.

    Attributes:
        fd: to be inherited.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, _SIZE)
        self._numbers = memoryview(self._memory).cast("I")

    def __repr__(self) -> str:
        return f"<ShareBoard {self.numbers()}>"

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

    def numbers(self) -> list[int]:
        """The connections of every worker that accepts some."""
        return [number - 1 for number in self._numbers[1 : self._numbers[0] + 1] if number]

    def take_place(self, taken: set[int]) -> int:
        """The first place that is not taken, for a new worker; for the supervisor only. OSError if there is none."""
        place = next((place for place in range(_PLACES) if place not in taken), None)
        if place is None:
            raise OSError(errno.EAGAIN, f"there are {_PLACES} workers already")
        self._numbers[0] = max(self._numbers[0], place + 1)
        return place

    def write(self, place: int, connections: int | None) -> None:
        """Note how many connections a worker has; None: it accepts none."""
        self._numbers[place + 1] = 0 if connections is None else connections + 1

    def least_of_others(self, place: int) -> int | None:
        """The fewest connections that another accepting worker has; None if there is no other."""
        numbers = self._numbers[1 : self._numbers[0] + 1].tolist()
        numbers[place] = 0
        return min(filter(None, numbers)) - 1 if any(numbers) else None


class Share:
    """One worker's place on the board, and what it may take."""

    def __init__(self, board: ShareBoard, place: int) -> None:
        self._board = board
        self._place = place
        self._seen: int | None = None
        self._yielded = 0

    def note(self, connections: int | None) -> None:
        """It has so many now; None: it accepts no more."""
        self._board.write(self._place, connections)

    def room(self, connections: int) -> int:
        """How many it may accept before another one should; 0 or less: let another one."""
        least = self._board.least_of_others(self._place)
        return _PLACES if least is None else least + 1 - connections

    def room_after_yielding(self) -> int:
        """How many it may accept although it has given the others time: none at first, then twice as many each time.

        If nobody takes them, the others are stuck, and the clients shall not be.
        """
        least = self._board.least_of_others(self._place)
        self._yielded = 1 if least != self._seen else self._yielded + 1
        self._seen = least
        return 2 ** min(self._yielded - _YIELDS, 10) if self._yielded >= _YIELDS else 0
