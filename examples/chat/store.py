"""What was said, and how to ask for it; the history itself is kept by `redis_store.py` or `memory_store.py`.

`app.py` opens the store that `CHAT_STORE` names; rooms and members read it. The log of a room only grows at its end, so
whoever knows the last id he has seen can be told exactly what he has missed, by any worker. Cancelling a call leaves
the log as it was, or with the message added.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

# So many messages a room are kept.
KEPT = 10_000

# So many at most are told in one go; whoever queues them needs a moment to hand them on.
BATCH = 20


class StoreLost(Exception):
    """The store cannot be reached; it may come back."""


@dataclass(frozen=True)
class Message:
    """One thing said.

    Attributes:
        id: its place in the log of its room, as Redis writes it: milliseconds, and a number within them.
        key: the sender's own name for it. Who could not see whether it arrived says it again with the same key, and
            readers show each key once.
    """

    id: str
    name: str
    text: str
    key: str

    @cached_property
    def place(self) -> tuple[int, ...]:
        """The id as something that can be compared."""
        return place_of(self.id)

    @cached_property
    def frame(self) -> str:
        """What members are sent; made once for all of them."""
        return encode([self])


def encode(messages: list[Message]) -> str:
    """Messages as one WebSocket message."""
    fields = [{"id": m.id, "name": m.name, "text": m.text, "key": m.key} for m in messages]
    return json.dumps({"messages": fields}, ensure_ascii=False)


def place_of(message_id: str) -> tuple[int, ...]:
    """An id as numbers, to see which of two came first: "1795351769270-0" is (1795351769270, 0)."""
    return tuple(int(part) for part in message_id.split("-"))


class Store(Protocol):
    """What rooms and members ask of a store. Each call may raise StoreLost."""

    async def add(self, room: str, *, name: str, text: str, key: str) -> None:
        """Put a message at the end of the log."""

    async def recent(self, room: str, count: int) -> list[Message]:
        """The last messages, oldest first."""

    async def after(self, room: str, message_id: str, count: int) -> list[Message]:
        """The first messages behind an id."""

    async def follow(self, room: str, message_id: str, tell: Callable[[Message], None]) -> None:
        """Tell of each message behind an id as it comes, until cancelled."""

    async def count(self, room: str, here: int) -> int:
        """Say how many members this worker has, and learn how many all workers have."""


@asynccontextmanager
async def open_store(where: str) -> AsyncIterator[Store]:
    """The store called `memory`, or the Redis at that address; StoreLost says what to do if there is none."""
    if where == "memory":
        from examples.chat.memory_store import MemoryStore

        yield MemoryStore()
        return
    try:
        from examples.chat.redis_store import open_redis
    except ModuleNotFoundError as error:
        raise StoreLost(f"{error}: pip install coredis, or try the chat with CHAT_STORE=memory") from error
    async with open_redis(where) as store:
        yield store
