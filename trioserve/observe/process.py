"""What the process shows of itself to the machine: the pid file, and why it could not start.

Used by `worker/command.py` around the life of a process. A process that is killed, or that the watchdog ends,
leaves its file behind; the next one replaces it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from trioserve.errors import AppNotFound, ConfigError, LifespanFailed, TrioserveError, UsageError


def explain(error: TrioserveError) -> None:
    """Say on stderr why the process cannot go on: one message, and what the app raised if it was the app."""
    cause = error.__cause__
    if isinstance(error, AppNotFound | LifespanFailed) and cause is not None:
        # What the app raised is what its author needs to see.
        traceback.print_exception(cause, file=sys.stderr)
    lines = str(error).splitlines()
    if isinstance(error, UsageError):
        lines.append(f"try {error.command} --help")
    with contextlib.suppress(OSError):  # the exit code is all that is left then
        for line in lines:
            print(f"trioserve: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def pid_file(path: str | None) -> Iterator[None]:
    """Keep the process id in a file; nobody reads half of one, and a successor's file is left alone.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None:
        yield
        return
    own = f"{os.getpid()}\n"
    try:
        target = Path(path).absolute()  # at the end the working directory may be another one
        _write_whole(target, own)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"pid_path = {path!r}: cannot write the pid file: {reason}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if target.read_text(encoding="ascii", errors="replace") == own:
                target.unlink()


def _write_whole(target: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
        # mkstemp makes it private, but whoever reads it may run as somebody else.
        temporary.chmod(0o644)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
