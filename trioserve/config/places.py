"""The files and directories that settings name: whether this process may write there. Nothing is made or opened.

Called by `checks.py` when a configuration is validated, and by `Config.check_places` once a process is no longer root.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trioserve.config.config import Config


def find_place_problems(config: Config) -> Iterator[str]:
    """What cannot be written, one line each."""
    for name, reason in _unusable(config):
        described = config.source_of(name).describe(name, getattr(config, name))
        yield f"{described} cannot be written: {reason}"


def _unusable(config: Config) -> Iterator[tuple[str, str]]:
    if config.crash_dir is not None and (reason := _why_no_directory(Path(config.crash_dir))):
        yield "crash_dir", reason
    if config.pid_path is not None and (reason := _why_no_file(Path(config.pid_path), replaced=True)):
        yield "pid_path", reason
    if config.logconfig is not None or config.logconfig_dict is not None:
        return  # it may have the lines go elsewhere
    for name in ("accesslog", "errorlog"):
        target = getattr(config, name)
        if isinstance(target, str) and target != "-" and (reason := _why_no_file(Path(target))):
            yield name, reason


def _why_no_directory(path: Path) -> str:
    """Why no file can be made in a directory, which is itself made with its parents where it is missing."""
    for place in (path.absolute(), *path.absolute().parents):
        if os.path.lexists(place):
            return _why_closed(place)
    return ""  # pragma: no cover (the root is always there)


def _why_no_file(path: Path, *, replaced: bool = False) -> str:
    """Why a file cannot be written, or with `replaced` be put in the place of the one that is there."""
    target = path.absolute() if replaced else Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return _why_closed(target.parent)
    except OSError as error:
        return f"{target}: {error.strerror}"
    if stat.S_ISDIR(mode):
        return f"{target} is a directory"
    if replaced:
        return _why_closed(target.parent)
    return "" if os.access(target, os.W_OK) else f"{target}: {os.strerror(errno.EACCES)}"


def _why_closed(directory: Path) -> str:
    try:
        mode = directory.stat().st_mode
    except FileNotFoundError:
        return f"there is no directory {directory}: make it, or correct the path"
    except OSError as error:
        return f"{directory}: {error.strerror}"
    if not stat.S_ISDIR(mode):
        return f"{directory} is no directory"
    if not os.access(directory, os.W_OK | os.X_OK):
        return f"{directory}: {os.strerror(errno.EACCES)}"
    return ""
