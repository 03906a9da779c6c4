"""The history in the worker itself, for trying the chat: it goes with the worker, and other workers have their own."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from examples.chat.store import BATCH, KEPT, Message, place_of


@dataclass
class _Log:
    messages: deque[Message] = field(default_factory=lambda: deque(maxlen=KEPT))
    grown: trio.Event = field(default_factory=trio.Event)


class MemoryStore:
    """A `Store` that is never lost, and never found again."""

    def __init__(self) -> None:
        self._logs: defaultdict[str, _Log] = defaultdict(_Log)
        self._numbers = itertools.count()

    async def add(self, room: str, *, name: str, text: str, key: str) -> None:
        """Put a message at the end of the log."""
        log = self._logs[room]
        # Ids are those of Redis, but the number grows all the time: the clock may be put back.
        now = max(round(time.time() * 1000), log.messages[-1].place[0] if log.messages else 0)
        log.messages.append(Message(f"{now}-{next(self._numbers)}", name, text, key))
        log.grown.set()
        log.grown = trio.Event()

    async def recent(self, room: str, count: int) -> list[Message]:
        """The last messages, oldest first."""
        return list(self._logs[room].messages)[-count:]

    async def after(self, room: str, message_id: str, count: int) -> list[Message]:
        """The first messages behind an id."""
        known = place_of(message_id)
        newer = (message for message in self._logs[room].messages if message.place > known)
        return list(itertools.islice(newer, count))

    async def follow(self, room: str, message_id: str, tell: Callable[[Message], None]) -> None:
        """Tell of each message behind an id as it comes, until cancelled."""
        while True:
            grown = self._logs[room].grown
            while messages := await self.after(room, message_id, BATCH):
                for message in messages:
                    tell(message)
                message_id = messages[-1].id
                await trio.lowlevel.checkpoint()
            await grown.wait()

    async def count(self, room: str, here: int) -> int:
        """There is nobody else to ask."""
        del room
        return here
