"""The picture: CPU time per request (or message) as horizontal bars, a panel per workload that was measured, as an SVG.

Called by `run.py`; `python bench/chart.py results.json chart.svg` draws an earlier run again. The colours
follow the reader's light or dark scheme, and the background is transparent. A bar more than a few times
longer than the others is cut, with a visible gap, since its number is what counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

PANELS = (
    ("hello-64", "Hello world, 64 connections"),
    ("browser", "Browser-like GET, 13 headers, all different"),
    ("files-1k", "Static file of 1 KiB (uvicorn with Starlette's)"),
    ("files-100k", "Static file of 100 KiB (uvicorn with Starlette's)"),
    ("https-hello", "HTTPS hello world, 64 connections"),
    ("h2-hello", "HTTP/2 over TLS, 8 connections of 16 streams"),
    ("ws-echo-32", "WebSocket, 32 bytes echoed, per message"),
    ("ws-broadcast", "WebSocket, 1,000 members of a room, per message delivered"),
)

_WIDTH = 760
_LABELS = 130  # the column of names
_NUMBERS = 70  # room after the longest bar
_BAR, _STEP = 18, 26
_CUT = 4.0  # a bar longer than this many times the median one is cut

_STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #24292f }
.title { font-weight: 600; font-size: 15px }
.note { font-size: 11px; fill: #57606a }
.ours { fill: #0a7d4b } .peer { fill: #a6b1bb } .own { font-weight: 600 }
.gap { stroke: #ffffff; stroke-width: 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .note { fill: #9198a1 }
  .ours { fill: #2fbf7f } .peer { fill: #59636e } .gap { stroke: #0d1117 }
}
"""


def draw_chart(panels: Sequence[tuple[str, Mapping[str, float]]], note: str) -> str:
    """Draw one panel per (title, server -> µs); the note below should say what it was measured on."""
    parts: list[str] = []
    y = 8.0
    for title, bars in panels:
        y += 18
        parts.append(f'<text class="title" x="8" y="{y:g}">{escape(title)}</text>')
        y += 10
        parts += _draw_bars(bars, y)
        y += _STEP * len(bars) + 14
    parts.append(
        f'<text class="note" x="8" y="{y + 4:g}">CPU µs per request (or message), whole server; less is better</text>'
    )
    parts.append(f'<text class="note" x="8" y="{y + 20:g}">{escape(note)}</text>')
    height = y + 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:g}" '
        f'width="{_WIDTH}" height="{height:g}" role="img" aria-label="CPU time per request by server">\n'
        f"<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _draw_bars(bars: Mapping[str, float], top: float) -> list[str]:
    ordered = sorted(bars.items(), key=lambda item: item[1])
    longest = _scale_end([value for _, value in ordered])
    room = _WIDTH - _LABELS - _NUMBERS - 8
    parts = []
    for place, (name, value) in enumerate(ordered):
        y = top + place * _STEP
        cut = value > longest
        length = max(1.0, room * min(value, longest) / longest)
        kind, weight = ("ours", ' class="own"') if name.startswith("trioserve") else ("peer", "")
        base = y + _BAR - 5
        parts.append(f'<text{weight} x="{_LABELS - 8}" y="{base:g}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect class="{kind}" x="{_LABELS}" y="{y:g}" width="{length:.1f}" height="{_BAR}" rx="2"/>'
        )
        if cut:
            x = _LABELS + length * 0.93
            parts.append(f'<path class="gap" d="M{x:.1f} {y + _BAR + 1:g}l6 {-_BAR - 2}"/>')
        shown = f"{value:.0f}" if value >= 100 else f"{value:.1f}"
        parts.append(f'<text{weight} x="{_LABELS + length + 6:.1f}" y="{base:g}">{shown}</text>')
    return parts


def _scale_end(ordered: Sequence[float]) -> float:
    """The value of a full-length bar: the largest that is not out of all proportion to the others."""
    if not ordered:
        return 1.0
    middle = ordered[(len(ordered) - 1) // 2]
    return max((value for value in ordered if value <= _CUT * middle), default=ordered[0])


def chart_of(results: Mapping[str, Any]) -> str | None:
    """Draw the chart of a results file's content; None where none of the panels' workloads was measured."""
    panels = []
    for name, title in PANELS:
        servers = results["workloads"].get(name, {}).get("servers", {})
        medians = {server: entry["median"].get("cpu_us") for server, entry in servers.items()}
        if bars := {server: value for server, value in medians.items() if value is not None}:
            panels.append((title, bars))
    if not panels:
        return None
    machine = results["machine"]
    note = (
        f"{machine['cpu']}, Linux {machine['kernel']}, {machine['python']}, one core; {results['when'][:10]}"
    )
    return draw_chart(panels, note)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    if (chart := chart_of(json.loads(source.read_text()))) is None:
        sys.exit(f"{source} has none of the workloads that the chart shows")
    target.write_text(chart)
