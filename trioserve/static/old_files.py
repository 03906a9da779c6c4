"""What was served before, to be the dictionaries of what is served now: `trioserve precompress --dictionary OLD`.

Used by `precompress.py`, which is a plain blocking program: its main thread finds the old file for each new one, and
the threads read it when they compress. Old trees are opened as the new one is, so that no link leads out of them.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trioserve.errors import ConfigError, UsageError
from trioserve.static.confine import ConfinedRoot
from trioserve.static.field_rules import without_hash
from trioserve.static.sibling_encoders import LARGEST_DICTIONARY
from trioserve.static.sibling_writer import Source, Tree
from trioserve.static.text import name_as_text, size_as_text


@dataclass(frozen=True, slots=True)
class OldFile:
    """A file that clients may have.

    Attributes:
        path: below the root.
        digest: its SHA-256, by which clients name it.
    """

    root: ConfinedRoot
    path: bytes
    size: int
    digest: bytes

    def read(self) -> bytes:
        """Its contents.

        Raises:
            OSError, NotServed: it cannot be read, or is not what it was.
        """
        content = _read(self.root, self.path)
        if hashlib.sha256(content).digest() != self.digest:
            raise OSError(errno.ESTALE, "its dictionary changed meanwhile; run this again")
        return content


class OldFiles:
    """What one `--dictionary` names.

    Attributes:
        text: as it was given.
        problems: (path, reason) of what could not be looked at.
        found: there was a dictionary in it.
    """

    def __init__(self, text: str) -> None:
        """`text` is DIR, FILE or FILE=PATTERN.

        Raises:
            UsageError: there is no such thing.
        """
        self.text = text
        self.problems: list[tuple[bytes, str]] = []
        self.found = False
        self._known: dict[bytes, OldFile] = {}
        self._too_large: set[bytes] = set()
        name, pattern = text, ""
        if "=" in text and not Path(text).exists():
            name, _, pattern = text.rpartition("=")
        path = Path(name)
        try:
            if path.is_file():
                # Where it lies: a link may lead anywhere.
                real = path.resolve()
                self._root = ConfinedRoot(real.parent)
                self._choose = _for_file(path.name, os.fsencode(real.name), pattern)
                return
            if name == text != "" and path.is_dir():
                self._root = ConfinedRoot(path)
                tree = Tree(self._root, matcher([]))
                self._choose = _for_tree(list(tree.sources()))
                self.problems = tree.problems
                return
        except ConfigError as error:
            raise UsageError(f"--dictionary: {error}") from None
        raise UsageError(
            f"--dictionary: there is no file or directory {name_as_text(text)!r}; give what was served before"
        )

    def find(self, root: ConfinedRoot, source: Source) -> OldFile | None:
        """The old file that is to be the dictionary of `source`, below `root`.

        None if there is none, if it is too large, which is a problem then, and if it is the same: who has that needs no
        other.

        Raises:
            OSError, NotServed: one of them cannot be read.
        """
        path = self._choose(source.path)
        if path is None or path in self._too_large:
            return None
        old = self._known.get(path)
        if old is None:
            with os.fdopen(self._root.open(path).fd, "rb") as file:
                if os.fstat(file.fileno()).st_size > LARGEST_DICTIONARY:
                    self._too_large.add(path)
                    most = size_as_text(LARGEST_DICTIONARY)
                    self.problems.append((path, f"too large for a dictionary, which has up to {most}"))
                    return None
                content = file.read()
            old = OldFile(self._root, path, len(content), hashlib.sha256(content).digest())
            self._known[path] = old
        if old.size == source.size and hashlib.sha256(_read(root, source.path)).digest() == old.digest:
            return None
        if not old.size:
            return None
        self.found = True
        return old

    def close(self) -> None:
        """Give back the descriptor."""
        self._root.close()


def _read(root: ConfinedRoot, path: bytes) -> bytes:
    with os.fdopen(root.open(path).fd, "rb") as file:
        return file.read()


def _for_tree(sources: Sequence[Source]) -> Callable[[bytes], bytes | None]:
    """To each new path the same old one, or the one that only has another hash in it."""
    paths = {source.path for source in sources}
    # Where several releases lie in one tree, the last one is what most people have.
    patterns = {
        _pattern(source.path): source.path for source in sorted(sources, key=lambda one: one.mtime_ns)
    }
    return lambda path: path if path in paths else patterns.get(_pattern(path))


def _for_file(given: str, name: bytes, pattern: str) -> Callable[[bytes], bytes | None]:
    """To each new path that matches, or that has the same name but for a hash in it, this one file."""
    like = _pattern(os.fsencode(given))
    is_meant = matcher([pattern]) if pattern else lambda path: _pattern(path.rpartition(b"/")[2]) == like
    return lambda path: name if is_meant(path) else None


def _pattern(path: bytes) -> bytes:
    """The path with a `*` for the hash in its name, which changes with each release."""
    directory, slash, name = path.rpartition(b"/")
    text = os.fsdecode(name)
    return directory + slash + os.fsencode(without_hash(text) or text)


def matcher(patterns: Sequence[str]) -> Callable[[bytes], bool]:
    """Whether a path below a directory matches one of the patterns: its name, or all of it by one with a slash."""
    # As in .gitignore: a slash, other than at the end, makes it a path.
    bare = [(pattern.strip("/"), "/" in pattern.rstrip("/")) for pattern in patterns]
    names = [os.fsencode(pattern) for pattern, is_path in bare if not is_path]
    paths = [os.fsencode(pattern) for pattern, is_path in bare if is_path]

    def matches(path: bytes) -> bool:
        name = path.rpartition(b"/")[2]
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in names) or any(
            fnmatch.fnmatchcase(path, pattern) for pattern in paths
        )

    return matches
