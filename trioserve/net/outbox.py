"""Responses that leave together: after all tasks that the hub has woken at once have run, not in between.

What the kernel does for a `send` and what the interpreter does for a request put each other out of the processor's
caches; done in turns, each costs up to a quarter more. So a hub that has woken several tasks opens its `Outbox`, those
whose response is complete and fits into one write `post` it there, and the hub closes it when they have all run. Who
posts waits for nothing, as with the kernel's own buffer. Nothing in here waits or raises.

A post is not sent yet: whoever is about to write to that connection, to shut it down or to close it calls `flush`
before.
"""

from __future__ import annotations

from typing import Protocol

# So many are sent without waiting for the end of the turn: most of the gain is there with these, and an app that holds
# up the loop, or ends the process, does so to fewer.
_MOST_POSTED = 16


class Poster(Protocol):
    """Who posts."""

    def send_posted(self, data: bytes) -> None:
        """Send it now. It must not raise."""


class Outbox:
    """What is to be sent at the end of this turn of the hub.

    Attributes:
        is_open: responses may be posted.
        turn: how often it was opened.
    """

    __slots__ = ("_flushed", "_posts", "is_open", "turn")

    def __init__(self) -> None:
        self.is_open = False
        self.turn = 0
        self._flushed = 0
        self._posts: list[tuple[Poster, bytes]] = []

    def __repr__(self) -> str:
        return f"<Outbox {'open' if self.is_open else 'closed'}, {len(self._posts)} posts>"

    @property
    def posted(self) -> int:
        """How many responses were posted since it was opened."""
        return self._flushed + len(self._posts)

    def open(self) -> None:
        """From now on responses may be posted."""
        self.is_open = True
        self._flushed = 0
        self.turn += 1

    def post(self, poster: Poster, data: bytes) -> None:
        """Have `poster.send_posted(data)` called, soon."""
        posts = self._posts
        posts.append((poster, data))
        if len(posts) == _MOST_POSTED:
            self.flush()

    def flush(self) -> None:
        """Send what was posted."""
        posts = self._posts
        if posts:
            self._posts = []
            self._flushed += len(posts)
            for poster, data in posts:
                poster.send_posted(data)

    def flush_but(self, one: object) -> None:
        """Send what others than this one have posted."""
        posts = self._posts
        self._posts = [post for post in posts if post[0] is one]
        self._flushed += len(posts) - len(self._posts)
        for poster, data in posts:
            if poster is not one:
                poster.send_posted(data)

    def close(self) -> None:
        """Send what was posted; nothing more may be."""
        self.is_open = False
        self.flush()


#: For watches whose hub has none: it is never open.
NO_OUTBOX = Outbox()
