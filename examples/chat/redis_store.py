"""The history in Redis: a stream a room, and a hash a room with how many members each worker has.

Workers share nothing else: one may be killed at any time, and another goes on where it was. coredis is made for anyio,
so it runs on trio as it is; it needs Redis 6.2 or later.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from coredis import PureToken, Redis
from coredis.exceptions import RedisError

from examples.chat.store import BATCH, KEPT, Message, StoreLost

# A room nobody has talked in for so long (seconds) is forgotten.
KEPT_FOR = 30 * 24 * 3600

# A worker that has not counted its members for so long (seconds) is gone; it counts them every 10.
STALE = 25


@asynccontextmanager
async def open_redis(url: str) -> AsyncIterator[RedisStore]:
    """The store, if it answers."""
    async with _connect(url) as redis:
        store = RedisStore(url, redis)
        lost = await store.check()
        if lost is None:
            yield store
            return
    # Not from within: the client has a nursery, and what leaves that is a group.
    raise lost


def _connect(url: str) -> Redis[str]:
    return Redis.from_url(url, decode_responses=True)


class RedisStore:
    """A `Store` in Redis."""

    def __init__(self, url: str, redis: Redis[str]) -> None:
        self._url = url
        self._redis = redis
        self._worker = os.urandom(8).hex()

    async def check(self) -> StoreLost | None:
        """What is wrong if nobody answers."""
        try:
            with self._lost():
                await self._redis.ping()
        except StoreLost as lost:
            return lost
        return None

    async def add(self, room: str, *, name: str, text: str, key: str) -> None:
        """Put a message at the end of the stream, and drop what is too old from its beginning."""
        said: dict[str, Any] = {"name": name, "text": text, "key": key}
        trim: dict[str, Any] = {
            "trim_strategy": PureToken.MAXLEN,
            "trim_operator": PureToken.APPROXIMATELY,
            "threshold": KEPT,
        }
        with self._lost():
            await self._redis.xadd(_log(room), said, **trim)
            await self._redis.expire(_log(room), KEPT_FOR)

    async def recent(self, room: str, count: int) -> list[Message]:
        """The last messages, oldest first."""
        with self._lost():
            entries = await self._redis.xrevrange(_log(room), count=count)
        return [_message(entry) for entry in reversed(entries)]

    async def after(self, room: str, message_id: str, count: int) -> list[Message]:
        """The first messages behind an id."""
        with self._lost():
            entries = await self._redis.xrange(_log(room), start=f"({message_id}", count=count)
        return [_message(entry) for entry in entries]

    async def follow(self, room: str, message_id: str, tell: Callable[[Message], None]) -> None:
        """Tell of each message behind an id as it comes, until cancelled."""
        # A read that waits has a connection to itself; with a client to itself that connection is closed when the
        # read is cancelled, and never missing where the others are taken from.
        async with _connect(self._url) as redis:
            while True:
                with self._lost():
                    answer = await redis.xread({_log(room): message_id}, count=BATCH, block=0)
                for entry in (answer or {}).get(_log(room), ()):
                    message = _message(entry)
                    tell(message)
                    message_id = message.id

    async def count(self, room: str, here: int) -> int:
        """Say how many members this worker has, and learn how many all workers have."""
        now = time.time()
        with self._lost():
            await self._redis.hset(_here(room), {self._worker: json.dumps([here, now])})
            await self._redis.expire(_here(room), STALE)
            counts = await self._redis.hgetall(_here(room))
        said = [json.loads(count) for count in counts.values()]
        return sum(members for members, when in said if when > now - STALE)

    @contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except (RedisError, OSError) as error:
            raise StoreLost(f"no Redis at {self._url}: {error}") from error


def _log(room: str) -> str:
    return f"chat:{room}"


def _here(room: str) -> str:
    return f"chat:{room}:here"


def _message(entry: Any) -> Message:
    fields = entry.field_values
    return Message(entry.identifier, fields["name"], fields["text"], fields["key"])
