"""`examples.chat` that gives whom it sends away as long as a busy machine takes, for tests: see `FAREWELL`."""

from __future__ import annotations

from examples.chat import room
from examples.chat.app import app

__all__ = ["app"]

room.FAREWELL = 60.0
