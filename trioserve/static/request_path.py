r"""The path of a request as names of files, or why it is none: the filter before any call to the file system.

The static handler calls `parse_request_path` with the path below its mount; what comes out is the one view of the path
that everything after it uses (cache key, cache rules, variants, opening), since two views of one path are how filters
are walked round. Percent-encoding is decoded once; what is still encoded after that is a literal name. Pure, never
waits.

    refused                              because
    `%2F`, `\`, `%5C`                    they are separators to somebody: a proxy, the app, Windows
    NUL, control bytes, invalid UTF-8    no ordinary name has them; they cut or forge what others read
    `.` and `..`, encoded or not         clients resolve them before they send; what is left is an attempt
    `//`                                 `//host` is another site to a browser, and rules by prefix miss `//admin`
    names that begin with a dot          `.env`, `.git`, editors' files; `.well-known` is meant to be public (RFC 8615)
    names and paths that are too long    no file system can hold them
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from urllib.parse import unquote_to_bytes

# NAME_MAX of every common file system, and Linux's PATH_MAX: with its leading slash counted, a path of that many bytes
# still fits without it, NUL included.
MAX_NAME = 255
MAX_PATH = 4096

# Paths that are remembered: a site's hot files and then some. Long ones are not, so that the memory of a worker under a
# scan stays bounded: 0.5 kB for an ordinary path, 2.3 kB for the worst (many short names), so at most 5 MB.
_REMEMBERED = 2048
_REMEMBERED_LENGTH = 128

_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_ENCODED_SEPARATOR = re.compile(rb"%(?:2[Ff]|5[Cc])")
# Characters that end the path of a URL: unencoded they cannot be part of it.
_NOT_PATH = re.compile(rb"[?#]")
_FORBIDDEN = re.compile(rb"[\x00-\x1f\x7f\\]")

# What a name must not be on Windows: streams, short names, wildcards, the devices that exist in every directory, and
# trailing dots and spaces, which it drops.
_ON_WINDOWS = os.name == "nt"
_WINDOWS_CHARACTERS = re.compile(rb'[:~<>"|?*]|[. ]\Z')
_WINDOWS_DEVICE = re.compile(
    rb"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)(?:[0-9]|\xc2[\xb9\xb2\xb3])) *(?:\.|\Z)", re.IGNORECASE
)


class PathRefused(Exception):
    """The path can name no file that is served. `reason` is for logs; the client gets the same answer for all."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class RequestPath:
    """A path that is safe to join below a directory.

    Attributes:
        segments: the decoded names, none of them empty, `.` or `..`.
        directory: it ended with a slash, or is the root itself.
        relative: the names joined by slashes, without one at either end; `b""` for the root.
    """

    segments: tuple[bytes, ...]
    directory: bool
    relative: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Joined once: it is the key of the file cache, and paths are remembered.
        object.__setattr__(self, "relative", b"/".join(self.segments))

    @property
    def name(self) -> bytes:
        """The last name; `b""` for the root."""
        return self.segments[-1] if self.segments else b""


def parse_request_path(raw_path: bytes, *, dotfiles: bool = False) -> RequestPath:
    """Decode and check the path below the mount.

    Args:
        raw_path: as the client sent it, percent-encoded, without the query; begins with a slash or is empty.
        dotfiles: names that begin with a dot are served too.

    Raises:
        PathRefused: it can name no file that is served.
    """
    if len(raw_path) <= _REMEMBERED_LENGTH:
        return _parse_and_remember(raw_path, dotfiles)
    return _parse(raw_path, dotfiles)


def can_be_asked_for(name: bytes, *, dotfiles: bool = False) -> bool:
    """Whether a request can name a file or directory that is called so; for lists of what is there."""
    try:
        _check_bytes(name)
        _check_segment(name, dotfiles)
    except PathRefused:
        return False
    return True


def _parse(raw_path: bytes, dotfiles: bool) -> RequestPath:
    # Every byte may be encoded as three.
    if len(raw_path) > 3 * MAX_PATH:
        raise PathRefused(f"the path is longer than {MAX_PATH} bytes")
    if not raw_path.startswith(b"/") and raw_path:
        raise PathRefused("the path does not begin with a slash")
    if _NOT_PATH.search(raw_path):
        raise PathRefused("an unencoded '?' or '#'")
    path = _decode(raw_path) if b"%" in raw_path else raw_path
    if len(path) > MAX_PATH:
        raise PathRefused(f"the path is longer than {MAX_PATH} bytes")
    _check_bytes(path)
    segments = path.split(b"/")[1:]
    directory = not segments or not segments[-1]
    if directory:
        del segments[-1:]
    for place, segment in enumerate(segments):
        _check_segment(segment, dotfiles or (place == 0 and segment == b".well-known"))
    return RequestPath(tuple(segments), directory)


# Refusals are exceptions, which are not remembered: a scan for what does not exist pushes nothing out.
_parse_and_remember = lru_cache(maxsize=_REMEMBERED)(_parse)


def _decode(raw_path: bytes) -> bytes:
    if _BAD_ESCAPE.search(raw_path):
        raise PathRefused("a '%' without two hexadecimal digits after it")
    # Only here can an encoded slash be told from a real one.
    if _ENCODED_SEPARATOR.search(raw_path):
        raise PathRefused("an encoded slash or backslash")
    return unquote_to_bytes(raw_path)


def _check_bytes(path: bytes) -> None:
    """Raises also on invalid UTF-8: overlong forms and surrogates too, so no byte has a second spelling."""
    if _FORBIDDEN.search(path):
        raise PathRefused("a control byte or a backslash")
    if not path.isascii():
        try:
            path.decode()
        except UnicodeDecodeError:
            raise PathRefused("invalid UTF-8") from None


def _check_segment(segment: bytes, dotfiles: bool) -> None:
    if not segment:
        raise PathRefused("an empty segment")
    if len(segment) > MAX_NAME:
        raise PathRefused(f"a segment is longer than {MAX_NAME} bytes")
    if segment[0] == 0x2E:  # a dot
        if segment in {b".", b".."}:
            raise PathRefused("a dot segment")
        if not dotfiles:
            raise PathRefused("a name that begins with a dot")
    if _ON_WINDOWS and (_WINDOWS_CHARACTERS.search(segment) or _WINDOWS_DEVICE.match(segment)):
        raise PathRefused("a name that Windows reads as something else")
