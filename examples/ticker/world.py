"""Balls in a box: the state that is sent twenty times a second. Nothing here knows of HTTP.

`app.py` runs one `World` in the lifespan and shows it to whoever watches; cancelling `run` stops the balls.
"""

from __future__ import annotations

import itertools
import math
import random
import struct
from dataclasses import dataclass

import trio

# The box, in lengths of its own, and steps a second.
WIDTH, HEIGHT = 16.0, 9.0
RATE = 20

BALLS = 18
CRUISE, FASTEST = 2.5, 14.0

# How far a poke reaches, and how hard it is.
REACH, PUSH = 3.0, 12.0


@dataclass
class Ball:
    """Place, speed, and radius; the mass is the area."""

    x: float
    y: float
    dx: float
    dy: float
    radius: float


class World:
    """The balls, and who wants to see them.

    Attributes:
        number: how many steps were made.
        frame: the state after the last one, as it is sent: number and watchers, then x and y of each ball, as parts of
            65535 of the box. Made once for all watchers.
        watchers: how many watch. While nobody does, nothing moves, and the process sleeps.
    """

    def __init__(self) -> None:
        self.number = 0
        self.frame = b""
        self.watchers = 0
        self.balls = [_ball(index) for index in range(BALLS)]
        self._watched = trio.Event()
        self._stepped = trio.Event()

    async def run(self) -> None:
        """Step at RATE while somebody watches, until cancelled."""
        while True:
            await self._watched.wait()
            due = trio.current_time()
            while self.watchers:
                self.step(1 / RATE)
                self.number += 1
                self.frame = self._encode()
                self._stepped.set()
                self._stepped = trio.Event()
                # By the clock, so that steps do not drift; one that is late is not made up for.
                due = max(due + 1 / RATE, trio.current_time())
                await trio.sleep_until(due)
            self._watched = trio.Event()

    def begin_watching(self) -> None:
        """Somebody wants to see it."""
        self.watchers += 1
        self._watched.set()

    def end_watching(self) -> None:
        """He does not any more."""
        self.watchers -= 1

    async def wait_newer(self, seen: int) -> None:
        """Return when there is a newer state than the one with that number."""
        while self.number <= seen:
            await self._stepped.wait()

    def poke(self, x: float, y: float) -> None:
        """Push all balls near a point away from it; x and y are parts of the box, 0 to 1."""
        x, y = x * WIDTH, y * HEIGHT
        for ball in self.balls:
            away = math.hypot(ball.x - x, ball.y - y) or 0.01
            if away < REACH:
                push = PUSH * (1 - away / REACH) / away
                ball.dx += (ball.x - x) * push
                ball.dy += (ball.y - y) * push

    def step(self, seconds: float) -> None:
        """Move everything, and let it bounce."""
        for ball in self.balls:
            speed = math.hypot(ball.dx, ball.dy) or 0.01
            # What was pushed comes back to the pace of the others, soon but not at once.
            wanted = min(FASTEST, speed + (CRUISE - speed) * 0.8 * seconds)
            ball.dx, ball.dy = ball.dx * wanted / speed, ball.dy * wanted / speed
            ball.x, ball.dx = _bounce(ball.x + ball.dx * seconds, ball.dx, ball.radius, WIDTH)
            ball.y, ball.dy = _bounce(ball.y + ball.dy * seconds, ball.dy, ball.radius, HEIGHT)
        for one, other in itertools.combinations(self.balls, 2):
            _collide(one, other)

    def _encode(self) -> bytes:
        places = (
            round(min(1.0, max(0.0, part)) * 65535)
            for ball in self.balls
            for part in (ball.x / WIDTH, ball.y / HEIGHT)
        )
        return struct.pack(f"!IH{2 * BALLS}H", self.number, min(self.watchers, 65535), *places)


def _ball(index: int) -> Ball:
    radius = 0.35 + 0.55 * (index % 5) / 4
    angle = random.uniform(0, math.tau)
    x = (index % 6 + 0.5) * WIDTH / 6
    y = (index // 6 + 0.5) * HEIGHT / 3
    return Ball(x, y, CRUISE * math.cos(angle), CRUISE * math.sin(angle), radius)


def _bounce(place: float, speed: float, radius: float, end: float) -> tuple[float, float]:
    if place < radius:
        return radius, abs(speed)
    if place > end - radius:
        return end - radius, -abs(speed)
    return place, speed


def _collide(one: Ball, other: Ball) -> None:
    x, y = other.x - one.x, other.y - one.y
    away = math.hypot(x, y) or 0.01
    overlap = one.radius + other.radius - away
    if overlap <= 0:
        return
    x, y = x / away, y / away
    mass, other_mass = one.radius**2, other.radius**2
    share = other_mass / (mass + other_mass)
    one.x, one.y = one.x - x * overlap * share, one.y - y * overlap * share
    other.x, other.y = other.x + x * overlap * (1 - share), other.y + y * overlap * (1 - share)
    # Speed towards each other along the line between them; an elastic impact turns it round.
    closing = (one.dx - other.dx) * x + (one.dy - other.dy) * y
    if closing > 0:
        one.dx, one.dy = one.dx - 2 * closing * share * x, one.dy - 2 * closing * share * y
        other.dx, other.dy = (
            other.dx + 2 * closing * (1 - share) * x,
            other.dy + 2 * closing * (1 - share) * y,
        )
