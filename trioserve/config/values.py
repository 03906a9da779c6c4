"""The kinds of value a setting can have: what is accepted, how text becomes one, how one is written as TOML.

Used by the table (`settings_server.py`, `settings_http.py`) and, through `Setting`, by everything that reads
or shows settings. A kind knows nothing of names or sources: it raises `ValueError` with what it expected, and
the caller adds where the value came from. Nothing here waits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

#: Stands for a secret.
MASK = "***"

_OFF = ("off", "none")
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


class Kind:
    """One kind of value.

    Attributes:
        metavar: what `--help` shows for the value.
        unit: "s", "bytes", … or nothing.
        is_list: the flag may be repeated, and text is split at commas.
        is_switch: the flag takes no value and has a `--no-` form.
        from_text: there is a spelling for flags and the environment.
    """

    metavar = "VALUE"
    unit = ""
    is_list = False
    is_switch = False
    from_text = True

    @property
    def expects(self) -> str:
        """What is accepted, to follow the word "expected"."""
        raise NotImplementedError

    def check(self, value: Any) -> Any:
        """Return the value in its settled form, or raise `ValueError`."""
        raise NotImplementedError

    def parse(self, text: str) -> Any:
        """Like `check`, for the text of a flag or an environment variable."""
        return self.check(text)

    def parse_flag(self, text: str) -> Any:
        """Like `parse`, for one occurrence of a flag that may be repeated."""
        return self.parse(text)

    def masked(self, value: Any) -> Any:
        """The value for people to see, also one that `check` refuses: without the passwords that may be in it."""
        return value

    def to_toml(self, value: Any) -> str | None:
        """The value as TOML that `check` takes back, or None where it has no such form."""
        return as_toml(value)

    def _refuse(self, also: str = "") -> ValueError:
        return ValueError(f"expected {self.expects}" + (f"; {also}" if also else ""))


class Switch(Kind):
    """True or false."""

    metavar = ""
    is_switch = True
    expects = "true or false"

    def check(self, value: Any) -> Any:
        """Take a bool only: 0 and "no" in a file are more often a mistake than a wish."""
        if not isinstance(value, bool):
            raise self._refuse()
        return value

    def parse(self, text: str) -> Any:
        """Take the usual words."""
        word = text.strip().lower()
        if word not in _TRUE + _FALSE:
            raise ValueError("expected 1, true, yes, on, or 0, false, no, off")
        return word in _TRUE


class Number(Kind):
    """A finite number within limits, optionally with "off"."""

    def __init__(
        self,
        minimum: float = 0,
        *,
        unit: str = "",
        above: bool = False,
        maximum: float = math.inf,
        off: bool = False,
    ) -> None:
        self.minimum, self.maximum = minimum, maximum
        self.unit = unit
        self.above = above  # the minimum itself is refused
        self.off = off  # None, "off" and "none" are accepted and settle as None
        self.metavar = {"s": "SECONDS", "bytes": "BYTES"}.get(unit, "N")

    noun = "a number"

    @property
    def expects(self) -> str:
        """The noun, its unit, its range, and "off" where that is accepted."""
        unit = {"s": " of seconds", "": ""}.get(self.unit, f" of {self.unit}")
        limit = f"above {self.minimum:g}" if self.above else f"of at least {self.minimum:g}"
        if self.maximum != math.inf:
            limit += f" and at most {self.maximum:g}"
        return f"{self.noun}{unit} {limit}" + (', or "off"' if self.off else "")

    def check(self, value: Any) -> Any:
        """Settle as a float."""
        if self._means_off(value):
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._refuse()
        try:
            number = float(value)
        except OverflowError:
            raise self._refuse() from None
        return self._within(number)

    def parse(self, text: str) -> Any:
        """Read a decimal number."""
        if self._means_off(text):
            return None
        try:
            number = float(text)
        except ValueError:
            raise self._refuse() from None
        return self.check(number)

    def to_toml(self, value: Any) -> str | None:
        """Write None as "off"."""
        return '"off"' if value is None and self.off else as_toml(value)

    def _means_off(self, value: Any) -> bool:
        return self.off and (value is None or (isinstance(value, str) and value.strip().lower() in _OFF))

    def _within(self, number: Any) -> Any:
        if not math.isfinite(number):
            raise self._refuse('write "off" for no limit' if self.off else "it must be finite")
        if number < self.minimum or (self.above and number == self.minimum) or number > self.maximum:
            raise self._refuse('write "off" for no limit' if self.off and number == 0 else "")
        return number


class Seconds(Number):
    """A duration; a bare number in every source."""

    def __init__(self, minimum: float = 0, *, above: bool = False, off: bool = False) -> None:
        super().__init__(minimum, unit="s", above=above, off=off)


class Rate(Number):
    """A minimum rate, for which 0 and "off" are the same thing; settles as a float."""

    def __init__(self, unit: str) -> None:
        super().__init__(0, unit=unit, off=True)

    def check(self, value: Any) -> Any:
        """Settle "off" as 0.0."""
        number = super().check(value)
        return 0.0 if number is None else number


class MemoryLimit(Number):
    """How much memory a process may take: bytes, or up to 1 a part of what there is."""

    #: An interpreter with a server and no app takes more; below it a number is one of megabytes, or a slip.
    LEAST = 16 * 1024 * 1024

    def __init__(self) -> None:
        super().__init__(0, unit="bytes", above=True, off=True)

    @property
    def expects(self) -> str:
        """Both ways to say it, and an example, since people think in megabytes."""
        return (
            f"a number of bytes of at least {self.LEAST} (512 MiB are {512 * 1024 * 1024}), or a part above 0 and at "
            'most 1, or "off"'
        )

    def _within(self, number: Any) -> Any:
        if 1 < number < self.LEAST:
            raise self._refuse("no worker can live with so little")
        return super()._within(number)


class Whole(Number):
    """A whole number."""

    noun = "a whole number"

    def check(self, value: Any) -> Any:
        """Take an int, not a bool and not a float."""
        if self._means_off(value):
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._refuse()
        return self._within(value)

    def parse(self, text: str) -> Any:
        """Read decimal digits."""
        if self._means_off(text):
            return None
        try:
            number = int(text)
        except ValueError:
            raise self._refuse() from None
        return self.check(number)


class WholeOrAuto(Whole):
    """A whole number, or "auto" for the program to work one out from other settings."""

    @property
    def expects(self) -> str:
        """The number, and the word."""
        return f'{super().expects}, or "auto"'

    def check(self, value: Any) -> Any:
        """Take the word in any case."""
        if isinstance(value, str) and value.strip().lower() == "auto":
            return "auto"
        return super().check(value)

    def parse(self, text: str) -> Any:
        """Read decimal digits, too."""
        return super().parse(text) if text.strip().isdecimal() else self.check(text)


class WorkerCount(Kind):
    """How many worker processes: a number, "auto", or a range within which the supervisor scales."""

    metavar = "N"
    expects = 'a whole number of at least 0, "auto", or a range such as "2..8"'

    def check(self, value: Any) -> Any:
        """Settle as an int, as "auto", or as "MIN..MAX" with 1 <= MIN < MAX."""
        if isinstance(value, str):
            return self._check_text(value.strip().lower())
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._refuse()
        return value

    def parse(self, text: str) -> Any:
        """Read digits, too."""
        digits = text.strip()
        return self.check(int(digits) if digits.isascii() and digits.isdigit() else text)

    def _check_text(self, text: str) -> Any:
        if text == "auto":
            return text
        low, dots, high = text.partition("..")
        if not dots or not (low + high).isascii() or not low.isdigit() or not high.isdigit():
            raise self._refuse()
        if not 1 <= int(low) <= int(high):
            raise self._refuse("the range must begin at 1 or more and not end below its beginning")
        return f"{int(low)}..{int(high)}"


class Umask(Kind):
    """Permission bits: text is octal, as in a shell; a number in a file is what its language says."""

    metavar = "OCTAL"
    expects = "permission bits between 0 and 0o777, as text in octal such as 007 or 0o7"

    def check(self, value: Any) -> Any:
        """Settle as an int or None."""
        if isinstance(value, str):
            return self.parse(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self._refuse()
        if value is not None and not 0 <= value <= 0o777:
            raise self._refuse()
        return value

    def parse(self, text: str) -> Any:
        """Read octal digits."""
        if not text:
            return None
        try:
            return self.check(int(text, 8))
        except ValueError:
            raise self._refuse() from None

    def to_toml(self, value: Any) -> str | None:
        """Write it as octal, which is how people read it."""
        return '""' if value is None else f"0o{value:o}"


class Account(Kind):
    """A user or group, by number or by name; settles as the number."""

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self.metavar = f"{noun.upper()}|ID"

    @property
    def expects(self) -> str:
        """A name that exists here, or a number."""
        return f"a {self.noun} id or the name of a {self.noun} of this machine"

    def check(self, value: Any) -> Any:
        """Look names up."""
        if value is None or value == "":
            return None
        if isinstance(value, str):
            return int(value) if value.isascii() and value.isdigit() else self._look_up(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._refuse()
        return value

    def to_toml(self, value: Any) -> str | None:
        """Write None as the empty string."""
        return '""' if value is None else as_toml(value)

    def _look_up(self, name: str) -> int:
        # grp and pwd exist on Unix only; so do the sockets that they are for.
        try:
            if self.noun == "group":
                import grp

                return grp.getgrnam(name).gr_gid
            import pwd

            return pwd.getpwnam(name).pw_uid
        except (ImportError, KeyError):
            raise self._refuse(f"there is no {self.noun} {name!r}") from None


def as_toml(value: Any) -> str | None:
    """Write plain values; None for what TOML cannot say (a logger, a None inside a table)."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            return None  # bytes of a path that are no UTF-8
        # JSON's escapes are a subset of TOML's, but JSON leaves DEL as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        items = [as_toml(item) for item in value]
        return None if None in items else "[" + ", ".join(map(str, items)) + "]"
    if isinstance(value, Mapping):
        pairs = [(as_toml(str(key)), as_toml(item)) for key, item in value.items()]
        return (
            None
            if any(item is None for _, item in pairs)
            else "{" + ", ".join(f"{k} = {v}" for k, v in pairs) + "}"
        )
    return None
