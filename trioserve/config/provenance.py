"""Where a setting's value came from, for messages and `--print-config`. Pure."""

from __future__ import annotations

import enum
import reprlib
from dataclasses import dataclass
from typing import Any

from trioserve.config.setting import ENVIRONMENT_PREFIX, Setting
from trioserve.config.values import MASK

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 100


class Origin(enum.Enum):
    """The kinds of source."""

    DEFAULT = "default"
    FILE = "file"
    ENVIRONMENT = "environment"
    FLAG = "flag"
    CODE = "code"  # an assignment, a mapping, a subclass
    HYPERCORN = "hypercorn Config"
    DERIVED = "from"  # another setting stands in for this one


@dataclass(frozen=True, slots=True)
class Source:
    """One source: its kind, and the file, variable, flag or setting it is."""

    origin: Origin
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.origin.value} {self.detail}".strip()

    def place(self, name: str) -> str:
        """Where a reader finds this setting, as the start of a message."""
        match self.origin:
            case Origin.ENVIRONMENT:
                return f"environment: {ENVIRONMENT_PREFIX}{name.upper()}"
            case Origin.FLAG:
                return f"command line: {self.detail or name}"
            case Origin.FILE:
                return f"{self.detail}: {name}"
            case Origin.HYPERCORN:
                return f"{self}: {name}"
            case Origin.DERIVED:
                return f"{name} ({self})"
            case _:
                return f"{self.detail or 'Config'}: {name}"

    def describe(self, name: str, value: Any, setting: Setting | None = None) -> str:
        """Place, value and type, as the start of a message; secrets are masked."""
        # What is refused may be a secret under a name that is misspelled, or hold one that was to be told apart.
        hidden = setting.secret if setting is not None else "pas" in name.lower()
        if isinstance(value, enum.Enum) and not hidden:
            return f"{self.place(name)} = {value.name}"
        masked = value if setting is None else setting.kind.masked(value)
        shown = MASK if hidden else _shorten.repr(masked)
        return f"{self.place(name)} = {shown} ({type(value).__name__})"


DEFAULT = Source(Origin.DEFAULT)
CODE = Source(Origin.CODE)
