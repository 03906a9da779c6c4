"""The record that declares one setting.

Made only in the tables `settings_server.py` and `settings_http.py`; read by `Config`, the command line, the
loaders and the README's table, so that a setting is written down once.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypercorn.config

from trioserve.config.values import MASK, Kind

ENVIRONMENT_PREFIX = "TRIOSERVE_"


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: what it is called, what it takes, what it does, and why its default is what it is."""

    name: str
    kind: Kind
    default: Any
    help: str  # what it does
    reason: str  # why this default, or why it is not served
    flags: tuple[str, ...] = ()  # hypercorn's where it has them; empty: `--` and the name
    deprecated_flags: tuple[str, ...] = ()
    topic: str = ""
    refused: str = ""  # why a value other than the default is refused, and what to do instead
    refused_when: Callable[[Any], bool] | None = None  # which values; None: all but the default
    refused_in_library: bool = True  # False: `serve()` ignores it with a warning, as hypercorn's does
    command_only: bool = False  # for processes: `serve()` ignores it with a warning
    without_effect: str = ""  # why a value other than the default changes nothing (yet)
    secret: bool = False
    positional: bool = False  # an argument of the command, not a flag
    write_only: bool = False  # hypercorn's `cert_reqs`: an old spelling that sets another setting

    @property
    def unit(self) -> str:
        """The unit of the value: "s", "bytes", "bytes/s", or nothing."""
        return self.kind.unit

    @property
    def source(self) -> str:
        """Whose setting it is: "hypercorn" or "trioserve"."""
        theirs = hypercorn.config.Config
        known = hasattr(theirs, self.name) or self.name in theirs.__annotations__
        return "hypercorn" if known else "trioserve"

    @property
    def option_strings(self) -> tuple[str, ...]:
        """The flags of the command line, none for what text cannot say."""
        if self.positional or not self.kind.from_text:
            return ()
        if self.flags or self.deprecated_flags:
            return self.flags
        return ("--" + self.name.replace("_", "-"),)

    @property
    def main_flag(self) -> str:
        """The flag to name in messages; the setting itself where it has none."""
        long = [flag for flag in self.option_strings + self.deprecated_flags if flag.startswith("--")]
        return long[0] if long else self.name

    def fresh_default(self) -> Any:
        """The default, a list or table of its own for each caller."""
        return copy.copy(self.default)

    def is_refused(self, value: Any) -> bool:
        """Whether this value asks for something that is not served."""
        if not self.refused:
            return False
        return self.refused_when(value) if self.refused_when is not None else value != self.default

    def show(self, value: Any) -> str:
        """The value as people write it, for help, tables and messages; secrets are masked."""
        if self.secret and value is not None:
            return MASK
        if value is None:
            return "off" if getattr(self.kind, "off", False) else "not set"
        if isinstance(value, bool):
            return "on" if value else "off"
        if isinstance(value, float):
            return f"{value:g}"
        if isinstance(value, list):
            return ", ".join(map(str, value)) or "none"
        if isinstance(value, dict) and self.kind.is_list:
            return ", ".join(f"{name}={item}" for name, item in value.items()) or "none"
        if isinstance(value, type):
            return f"{value.__module__}:{value.__qualname__}"
        return str(value) or "none"


def under(topic: str, *settings: Setting) -> tuple[Setting, ...]:
    """Put settings under the heading that help and README show them under."""
    return tuple(dataclasses.replace(setting, topic=topic) for setting in settings)
