"""What the commands have in common: how their arguments are refused, and how what they print gets out.

Used by `cli.py`, and by `ctl` and `precompress`, which have parsers of their own.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn, TextIO

from trioserve.errors import OutputFailed, UsageError


def say(text: str, stream: TextIO | None = None) -> None:
    """Print what was asked for, on stdout if nothing else is said, and have it out; a reader that has left is content.

    Raises:
        OutputFailed: the disk is full, or something of its kind.
    """
    stream = sys.stdout if stream is None else stream
    if stream is None:
        return  # the process was started without it
    encoding = stream.encoding or "utf-8"
    try:
        # A terminal of an older encoding must not end the command.
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except BrokenPipeError:
        _give_up(stream)  # `trioserve --help | head -1`
    except OSError as error:
        _give_up(stream)
        name = "stderr" if stream is sys.stderr else "stdout"
        raise OutputFailed(f"cannot write to {name}: {error.strerror or error}") from None


def _give_up(stream: TextIO) -> None:
    """What is left in the buffer must not be tried again when Python ends."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class CommandParser(argparse.ArgumentParser):
    """Whose every refusal is a `UsageError` that says what was given, what was expected, and what was meant.

    Attributes:
        surplus: said of an argument for which there is no place.
    """

    surplus = "there is no place for {!r}"

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Like `parse_args`, with a hint at the flag that was meant."""
        found, extra = self.parse_known_args(list(argv))
        for argument in extra:
            # Before the others: what an unknown flag was given looks like one of them.
            if argument.startswith("-") and argument != "-":
                flag = argument.partition("=")[0]
                near = self.nearest_flag(flag)
                self.error(f"unknown flag {flag}" + (f"; did you mean {near}?" if near else ""))
        if extra:
            self.error(self.surplus.format(extra[0]))
        return found

    def nearest_flag(self, wanted: str) -> str | None:
        """The flag that was probably meant."""
        known = [flag for action in self._actions for flag in action.option_strings]
        # hypercorn takes prefixes.
        near = [flag for flag in known if len(wanted) > 3 and flag.startswith(wanted)]
        near = near or difflib.get_close_matches(wanted, known, 1)
        return near[0] if near else None

    def error(self, message: str) -> NoReturn:
        """Called by argparse, too."""
        raise UsageError(message, self.prog)

    def print_help(self, file: Any = None) -> None:
        """Called for --help; argparse's own is silent when it cannot print."""
        say(self.format_help().rstrip("\n"), file)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        # argparse's hook for `choices`, commands included.
        if action.choices is not None and value not in action.choices:
            near = difflib.get_close_matches(str(value), action.choices, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            words = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"{value!r}: expected one of {words}{hint}")
