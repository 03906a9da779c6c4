"""Who is in which room, and who hears what.

`app.py` has one `Chat` a worker, and a task for each WebSocket that calls `Member.stay`. A room is a nursery of its own
below the lifespan's, from the first member on this worker to the last: one task tells of what is said (on any worker),
one counts the members. A member's own two tasks are in his handler, which is where his connection is:

    lifespan's nursery                     a handler
    └─ room's nursery                      └─ member's nursery
       ├─ pump: store -> all queues           ├─ deliver: history, then queue -> client
       └─ census                              └─ listen: client -> store

Nobody waits for a member. His queue is bounded, and when it is full he is sent away with a code that says so; he comes
back with the last id he has seen, and is told what he has missed. A room that loses its store sends all away likewise.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from examples.chat.said import SaidWrong, parse
from examples.chat.store import Message, Store, StoreLost, encode, place_of

# A member may be so many messages behind, above what the network holds.
QUEUE = 100

# What a newcomer is shown, and how much at a time is sent to who has been away.
RECENT = 50
PAGE = 200

# Each room on this worker has a connection to Redis of its own; more rooms than these are refused.
ROOMS = 200

# Members are counted so often (seconds), if somebody came or went earlier, but never more often than once in PAUSE.
CENSUS = 10.0
PAUSE = 1.0

# Nobody talks faster than a message in so many seconds: the network holds up who tries.
PACE = 0.05

# A client that has been sent away gets so long (seconds) to be told.
FAREWELL = 5.0

# Close codes: IANA's, and one of our own from the range left to applications.
TRY_AGAIN = 1013
TOO_SLOW = 4008

ID = re.compile(r"\d{1,15}-\d{1,15}")


class Chat:
    """The rooms of this worker.

    Args:
        store: where the history is.
        nursery: the lifespan's, which the rooms live in.
    """

    def __init__(self, store: Store, nursery: trio.Nursery) -> None:
        self.store = store
        self._nursery = nursery
        self._rooms: dict[str, Room] = {}

    def enter(self, name: str, member: Member) -> Room | None:
        """Put a member into a room, which begins with him if need be; None if there are too many rooms."""
        room = self._rooms.get(name)
        if room is None or room.over:
            if len(self._rooms) >= ROOMS:
                return None
            room = self._rooms[name] = Room(name, self.store)
            self._nursery.start_soon(self._run, room)
        room.members.add(member)
        room.moved.set()
        return room

    async def _run(self, room: Room) -> None:
        try:
            await room.run()
        finally:
            if self._rooms.get(room.name) is room:
                del self._rooms[room.name]


class Room:
    """What the members of one room on this worker share."""

    def __init__(self, name: str, store: Store) -> None:
        self.name = name
        self.store = store
        self.members: set[Member] = set()
        # Set when somebody has come or gone.
        self.moved = trio.Event()
        # Set once nothing that is said from now on escapes the pump.
        self.open = trio.Event()
        # It takes no more members; who comes now begins another one.
        self.over = False

    async def run(self) -> None:
        """The room's life: until the last member has left, or the store is lost."""
        try:
            latest = await self.store.recent(self.name, 1)
            self.open.set()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.store.follow, self.name, latest[0].id if latest else "0-0", self.tell)
                await self.census()
                nursery.cancel_scope.cancel()
        except* StoreLost:
            self.over = True
            for member in self.members:
                member.send_away(TRY_AGAIN, "the history cannot be reached")

    def tell(self, message: Message) -> None:
        """Give everybody what was said; who has no room left for it has to go."""
        for member in self.members:
            member.offer(message.frame, message.place)

    async def census(self) -> None:
        """Tell everybody how many are here, on all workers, until there is nobody on this one."""
        while True:
            self.moved = trio.Event()
            told = len(self.members)
            everywhere = await self.store.count(self.name, told)
            if told == len(self.members) == 0:
                self.over = True
                return
            for member in self.members:
                member.offer(json.dumps({"here": everywhere}))
            await trio.sleep(PAUSE)
            with trio.move_on_after(CENSUS - PAUSE):
                await self.moved.wait()


class Member:
    """One WebSocket in a room.

    Args:
        receive, send: ASGI's, of a WebSocket that has been accepted.
    """

    def __init__(
        self,
        receive: Callable[[], Awaitable[dict[str, Any]]],
        send: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        self._receive = receive
        self._send = send
        self._incoming, self._queue = trio.open_memory_channel[tuple[str, tuple[int, ...]]](QUEUE)
        self._scope = trio.CancelScope()
        self._sent_away: tuple[int, str] | None = None

    async def stay(self, chat: Chat, room_name: str, seen: str) -> None:
        """Be a member until the client leaves or is sent away; `seen` is the last id it has, or nothing."""
        with self._scope:
            room = chat.enter(room_name, self)
            if room is None:
                self.send_away(TRY_AGAIN, f"there are {ROOMS} rooms already")
            else:
                await self._talk(room, seen)
        if self._sent_away is not None:
            code, reason = self._sent_away
            with trio.move_on_after(FAREWELL), contextlib.suppress(OSError):
                await self._send({"type": "websocket.close", "code": code, "reason": reason})

    async def _talk(self, room: Room, seen: str) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.deliver, room, seen)
                await self.listen(room)
                nursery.cancel_scope.cancel()
        finally:
            room.members.discard(self)
            room.moved.set()

    def offer(self, frame: str, place: tuple[int, ...] = ()) -> None:
        """Queue what the client is to be sent; a message has a place in the log. Never waits."""
        try:
            self._incoming.send_nowait((frame, place))
        except trio.WouldBlock:
            self.send_away(TOO_SLOW, f"{QUEUE} messages behind")

    def send_away(self, code: int, reason: str) -> None:
        """End the membership, even in the middle of a `send` that the client holds up by not reading."""
        if self._sent_away is None:
            self._sent_away = (code, reason)
            self._scope.cancel()

    async def deliver(self, room: Room, seen: str) -> None:
        """Send what was said before, then what is being said. What is said meanwhile waits in the queue."""
        try:
            await room.open.wait()
            reached = await self.catch_up(room, seen)
            async for frame, place in self._queue:
                if place:
                    if place <= reached:
                        continue  # was in the history already
                    reached = place
                await self._send({"type": "websocket.send", "text": frame})
        except StoreLost:
            self.send_away(TRY_AGAIN, "the history cannot be reached")
        except OSError:
            pass  # the client has gone; `listen` is being told

    async def catch_up(self, room: Room, seen: str) -> tuple[int, ...]:
        """Send the history, and return the place of the last message in it."""
        if ID.fullmatch(seen):
            messages = await room.store.after(room.name, seen, PAGE)
        else:
            seen = "0-0"
            messages = await room.store.recent(room.name, RECENT)
        while messages:
            await self._send({"type": "websocket.send", "text": encode(messages)})
            seen = messages[-1].id
            messages = await room.store.after(room.name, seen, PAGE)
        await self._send({"type": "websocket.send", "text": '{"ready": true}'})
        return place_of(seen)

    async def listen(self, room: Room) -> None:
        """Keep what the client says until it leaves. Until that is done, and a moment more, nothing else is read."""
        while (event := await self._receive())["type"] == "websocket.receive":
            try:
                said = parse(event.get("text"))
                await room.store.add(room.name, **said)
            except SaidWrong as wrong:
                self.send_away(wrong.code, wrong.reason)
                return
            except StoreLost:
                self.send_away(TRY_AGAIN, "the history cannot be reached")
                return
            await trio.sleep(PACE)
