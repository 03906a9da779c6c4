"""The working directory by its name: where that is a link to a release, a reload goes where it leads by then.

A process is in a directory and not at a name, and so is all that it starts. `supervisor.py` makes one
`WorkingDirectory` and enters it for each reload and upgrade.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from trioserve.errors import ConfigError


class WorkingDirectory:
    """Where the process was started, by the name that the shell has for it ($PWD), else by what it is called now."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.name = _name_of_here(environment.get("PWD", ""))

    def __repr__(self) -> str:
        return f"<WorkingDirectory {self.name}>"

    @contextmanager
    def entered(self) -> Iterator[Callable[[], None]]:
        """Be in the directory that has the name now; afterwards in the one before, unless what is yielded was called.

        Raises:
            ConfigError: it cannot be entered; nothing has changed.
        """
        if self.name is None:
            yield lambda: None
            return
        before = os.open(".", os.O_PATH | os.O_CLOEXEC)  # also where its name is gone
        try:
            try:
                os.chdir(self.name)
            except OSError as error:
                raise ConfigError(
                    f"the working directory {self.name} cannot be entered: {error.strerror}"
                ) from error
            stays = False

            def stay() -> None:
                nonlocal stays
                stays = True

            try:
                yield stay
            finally:
                if not stays:
                    os.fchdir(before)
        finally:
            os.close(before)


def _name_of_here(known: str) -> str | None:
    if not os.access(".", os.X_OK):
        return None  # root's, before it became somebody else: nothing can be meant by what lies here
    with suppress(OSError):
        if Path(known).is_absolute() and Path(known).samefile("."):
            return known
    with suppress(OSError):  # somebody has removed it
        return str(Path.cwd())
    return None
