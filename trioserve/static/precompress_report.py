"""What people see of `trioserve precompress`: how far it is, what goes wrong, and in the end what it has come to.

Used by `precompress.py`, in its main thread only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from trioserve.observe.command_line import say
from trioserve.static.codings import DCZ, SUFFIXES
from trioserve.static.progress import ProgressLine
from trioserve.static.sibling_writer import Outcome, Result, Task
from trioserve.static.text import name_as_text, size_as_text


@dataclass(slots=True)
class Tally:
    """What came of the siblings of one coding; sizes are those of the ones written."""

    written: int = 0
    current: int = 0
    not_smaller: int = 0
    before: int = 0
    after: int = 0

    def in_words(self) -> str:
        """For a line of the summary."""
        counts = (self.written, "written"), (self.current, "up to date"), (self.not_smaller, "not smaller")
        text = ", ".join(f"{count:,} {word}" for count, word in counts if count)
        return f"{text}; {_shrinking(self.before, self.after)}" if self.written else text


def _shrinking(before: int, after: int) -> str:
    saved = f", {100 * (before - after) // before} % saved" if before else ""
    return f"{size_as_text(before)} -> {size_as_text(after)}{saved}"


class Report:
    """Says what happens: on a terminal by a line at its foot, elsewhere by a line for each file; problems always."""

    def __init__(self, *, quiet: bool) -> None:
        self.failed = 0
        self._quiet = quiet
        self._tallies: dict[bytes, Tally] = {}
        self._removed = self._removed_bytes = 0
        self._line = None if quiet else ProgressLine()

    def tally(self, coding: bytes) -> Tally:
        """That of one coding."""
        return self._tallies.setdefault(coding, Tally())

    def note(self, task: Task, result: Result) -> None:
        """A sibling was written, or was not."""
        tally = self.tally(task.coding.name)
        if result.outcome is Outcome.WRITTEN:
            tally.written += 1
            tally.before += result.before
            tally.after += result.after
            self._detail(f"{name_as_text(task.path)}: {_shrinking(result.before, result.after)}")
        elif result.outcome is Outcome.NOT_SMALLER:
            tally.not_smaller += 1
            self._detail(f"{name_as_text(task.path)}: not smaller")
        elif result.outcome is not Outcome.STOPPED:
            self.problem(task.path, result.reason)

    def removed(self, path: bytes, size: int) -> None:
        """A file of so many bytes was removed."""
        self._removed += 1
        self._removed_bytes += size
        self._detail(f"{name_as_text(path)}: removed")

    def problem(self, path: bytes, reason: str) -> None:
        """Something could not be done."""
        self.failed += 1
        self.remark(f"{name_as_text(path) or 'the directory'}: {reason}")

    def remark(self, text: str) -> None:
        """Say it, whatever is said else."""
        self.end()
        say(text, sys.stderr)

    def show(self, share: float, count: str, running: Sequence[Task]) -> None:
        """How far it is."""
        if self._line is not None:
            busy = f"  {name_as_text(running[0].path)}" if running else ""
            self._line.show(share, f"{count}{busy}")

    def end(self) -> None:
        """No line at the foot any more."""
        if self._line is not None:
            self._line.clear()

    def summarise(self, asked: argparse.Namespace) -> None:
        """Say what it has come to."""
        if self._quiet:
            return
        rows = [
            f"{suffix.decode():<5} {text}"
            for coding, suffix in [*SUFFIXES.items(), (DCZ, b".dcz")]
            if coding in self._tallies and (text := self._tallies[coding].in_words())
        ]
        if not rows and not self.failed and not asked.clean:
            rows = [
                f"nothing to compress: no file of {asked.min_size:,} bytes or more has a type that shrinks"
            ]
        if self._removed or asked.clean:
            rows.append(f"{self._removed:,} siblings removed, {size_as_text(self._removed_bytes)}")
        if self.failed:
            rows.append(f"{self.failed:,} failed")
        say("\n".join(rows))

    def _detail(self, text: str) -> None:
        if self._line is not None and not self._line.is_shown:
            say(text)
