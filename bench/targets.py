"""The figures to reach, and how far a run is from them.

Called by `report.py`. Ratios are CPU time per request of trioserve over that of the peer, median over the
rounds of one run; the two other kinds are absolute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.measure import Turn, median_of, median_ratio

Results = Mapping[str, Mapping[str, Sequence[Turn]]]  # workload -> server -> turns by round


@dataclass(frozen=True)
class Target:
    """One figure: lower is better, `least` must be reached, `goal` is aimed at.

    With an infinite `least` it is only written down.
    """

    workload: str
    goal: float
    least: float
    peer: str | None = None
    ours: str = "trioserve"
    figure: str = "cpu_us"
    unit: str = ""

    @property
    def what(self) -> str:
        """The target in words."""
        subject = self.workload if self.ours == "trioserve" else f"{self.workload}, h11 engine"
        return f"{subject} vs {self.peer}" if self.peer else subject


TARGETS: tuple[Target, ...] = (
    Target("hello-64", 0.70, 0.90, "granian"),
    Target("hello-64", 0.60, 0.78, "uvicorn"),
    Target("browser", 0.80, 1.00, "granian"),
    Target("browser", 0.68, 0.85, "uvicorn"),
    Target("hello-64", 1.00, 1.30, "fastpysgi"),
    Target("hello-64", 1 / 30, 1 / 20, "hypercorn"),
    Target("browser", 1 / 30, 1 / 20, "hypercorn"),
    Target("post-1k", 0.70, 0.85, "uvicorn"),
    Target("body-10k", 0.70, 0.85, "uvicorn"),
    Target("stream-10", 0.70, 0.85, "uvicorn"),
    Target("hello-64", 0.70, 0.85, "uvicorn-h11", ours="trioserve-h11"),
    Target("browser", 0.70, 0.85, "uvicorn-h11", ours="trioserve-h11"),
    Target("files-1k", 2.0, 2.8, "nginx"),
    Target("files-1k", 0.5, 0.7, "granian"),
    Target("files-16k", 2.0, 2.8, "nginx"),
    Target("files-16k", 0.5, 0.7, "granian"),
    Target("files-100k", 0.7, 1.1, "nginx"),
    Target("files-10m", 1.1, 1.4, "nginx"),
    Target("files-1k", 1 / 25, 1 / 15, "uvicorn"),
    Target("files-304", 2.0, 2.8, "nginx"),
    Target("slow-readers", 2.0, 5.0, figure="growth_mb", unit=" MB"),
    Target("memory", 6.0, 7.0, figure="kb_per_connection", unit=" kB"),
    Target("https-hello", 0.7, 0.9, "uvicorn"),
    # "1.3 times as many handshakes, or messages, in the same CPU time" is a cost of 1 / 1.3.
    Target("tls-handshakes", 1 / 1.3, 1.0, "uvicorn"),
    Target("h2-hello", 1 / 10, 1 / 4, "hypercorn"),
    Target("h2-hello", 4.0, math.inf, "granian"),
    Target("ws-echo-32", 0.9, 1.1, "uvicorn"),
    Target("ws-echo-32", 1 / 7, 1 / 5, "hypercorn"),
    Target("ws-echo-1k", 0.9, 1.1, "uvicorn"),
    Target("ws-echo-1k", 1 / 7, 1 / 5, "hypercorn"),
    Target("ws-broadcast", 1 / 1.2, 1.0, "uvicorn"),
    Target("ws-memory", 12.0, 20.0, figure="kb_per_connection", unit=" kB"),
    # "Flat": what the allocator moves by itself is within one per cent.
    Target("leak", 1.0, 5.0, figure="growth_percent", unit=" %"),
)


@dataclass(frozen=True)
class Verdict:
    """A target with what the run reached; None where it was not measured."""

    target: Target
    reached: float | None

    @property
    def word(self) -> str:
        """One of: goal, at least, missed, not measured."""
        if self.reached is None:
            return "not measured"
        if self.reached <= self.target.goal:
            return "goal"
        return "at least" if self.reached <= self.target.least else "missed"

    def as_json(self) -> dict[str, Any]:
        """The verdict as it goes into the results file."""
        target = self.target
        return {
            "what": target.what,
            "unit": target.unit.strip() or "ratio",
            "goal": target.goal,
            "at_least": target.least if math.isfinite(target.least) else None,
            "reached": self.reached,
            "verdict": self.word,
        }


def judge(results: Results, targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """Set every target beside what was measured."""
    return [Verdict(target, _reached(results, target)) for target in targets]


def _reached(results: Results, target: Target) -> float | None:
    servers = results.get(target.workload, {})
    ours = servers.get(target.ours, ())
    if target.peer is None:
        return median_of(ours, target.figure)
    return median_ratio(ours, servers.get(target.peer, ()), target.figure)
