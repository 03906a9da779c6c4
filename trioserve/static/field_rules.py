"""What a file's response says besides its validators: type, caching, whether it is to be saved.

`variants.py` asks once for each file that it opens, so nothing here is in the way of a request. Pure.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from urllib.parse import quote

from trioserve.asgi.media_types import content_type
from trioserve.static.options import StaticOptions

# A name that changes with its contents: its body may be kept for a year, and not even be asked for again. Nothing says
# `public`: it would have shared caches keep what was sent to a request with a password (RFC 9111 section 3.5).
IMMUTABLE = b"max-age=31536000, immutable"

# Pages name the hashed files: with an old page come old assets, or none.
ASK_FIRST = b"no-cache"

_HASH = re.compile(r"[0-9A-Za-z]{8,64}")
_HEX = re.compile(r"[0-9a-f]+|[0-9A-F]+")
_CHANGES = re.compile(r"(?<=[0-9])[A-Za-z]|(?<=[A-Za-z])[0-9]|(?<=[a-z])[A-Z]|(?<=[A-Z])[a-z]")

# Between digits, capitals and small letters: in 8 random characters there are 4 or 5, and 6 in 10 of their neighbours
# differ; words with a version in them (`MP3Converter`, `WIN32X64`) have 1 to 3, or are long.
_LEAST_CHANGES = 4
# In hexadecimal digits, where 8 have 3 or 4: words and dates have 1 (`cafe2023`, `20240115b`), and so has one hash of 8
# digits in 14, of 12 in 90, which is asked for again each minute.
_LEAST_HEX_CHANGES = 2
_LEAST_PART = 0.4


class FieldRules:
    """The options that depend on a file's path, made ready."""

    def __init__(self, options: StaticOptions) -> None:
        self._types = options.content_types
        self._download = [_matcher(pattern) for pattern in options.download]
        rules = options.cache_control
        if isinstance(rules, str):
            rules = (("*", rules),)
        self._cache_rules = [(_matcher(pattern), value.encode("ascii")) for pattern, value in rules or ()]
        self._max_age = b"max-age=%d" % options.max_age
        dictionaries = options.use_as_dictionary or ()
        self._dictionaries = [(_matcher(pattern), value) for pattern, value in dictionaries]
        self._headers = options.headers

    def content_type(self, relative: bytes) -> bytes:
        """The value of Content-Type."""
        return content_type(relative, self._types)

    def cache_control(self, relative: bytes) -> bytes:
        """The value of Cache-Control; b"" if there is to be none."""
        path = _text(relative)
        for matches, value in self._cache_rules:
            if matches(path):
                return value
        if is_hashed(path.rpartition("/")[2]):
            return IMMUTABLE
        if self.content_type(relative).startswith(b"text/html"):
            return ASK_FIRST
        return self._max_age

    def others(self, relative: bytes) -> Sequence[tuple[bytes, bytes]]:
        """Content-Disposition and Use-As-Dictionary where they are asked for, and the operator's own fields."""
        path = _text(relative)
        fields = []
        if any(matches(path) for matches in self._download):
            fields.append((b"content-disposition", attachment(relative.rpartition(b"/")[2])))
        dictionary = next((value for matches, value in self._dictionaries if matches(path)), None)
        if dictionary is not None:
            fields.append((b"use-as-dictionary", dictionary))
        return [*fields, *self._headers]


def _text(relative: bytes) -> str:
    return relative.decode("utf-8", "surrogateescape")


def _matcher(pattern: str) -> Callable[[str], bool]:
    expression = re.compile(fnmatch.translate(pattern.removeprefix("/")))
    if "/" in pattern:
        return lambda path: expression.match(path) is not None
    return lambda path: expression.match(path.rpartition("/")[2]) is not None


def is_hashed(name: str) -> bool:
    """Whether a build tool has put a hash of the contents into this name."""
    return without_hash(name) is not None


def without_hash(name: str) -> str | None:
    """The name, with a `*` for the hash of the contents that a build tool has put into it; None if there is none.

    A guess that must not be wrong: who takes a date or a word for a hash has browsers keep an old file for a year. A
    hash has letters and digits, and changes between digits, capitals and small letters about as often as chance does.
    """
    parts = name.split(".")
    # `name.<hash>.css`, `name-<hash>.js`, `name.<hash>.min.js`, `name.<hash>.js.map`; never the whole name.
    for place, part in enumerate(parts[-3:-1], max(len(parts) - 3, 0)):
        before, _, last = part.replace("_", "-").rpartition("-")
        if (place or before) and _is_hash(last):
            parts[place] = part.removesuffix(last) + "*"
            return ".".join(parts)
    return None


def _is_hash(text: str) -> bool:
    if not _HASH.fullmatch(text) or text.isdigit() or text.isalpha():
        return False
    changes = len(_CHANGES.findall(text))
    if _HEX.fullmatch(text):
        return changes >= _LEAST_HEX_CHANGES
    return changes >= max(_LEAST_CHANGES, _LEAST_PART * len(text))


# What stands for itself in a quoted-string, and is understood by all browsers (RFC 6266 appendix D).
_PLAIN = re.compile(rb"[ !#$&'()+,\-.0-9:;<=>@A-Z\[\]^_`a-z{|}~]+")

# RFC 8187: attr-char.
_ATTRIBUTE_SAFE = "!#$&+-.^_`|~"


def attachment(name: bytes) -> bytes:
    """Content-Disposition that has browsers save the file under its name (RFC 6266).

    A name of plain ASCII is given once; any other twice, for those who know `filename*` (RFC 8187) and for the rest.
    """
    if _PLAIN.fullmatch(name):
        return b'attachment; filename="%b"' % name
    text = name.decode("utf-8", "replace")
    plain = re.sub(r'[^ -~]|["\\%*]', "_", text).encode("ascii")
    coded = quote(text, safe=_ATTRIBUTE_SAFE).encode("ascii")
    return b"attachment; filename=\"%b\"; filename*=UTF-8''%b" % (plain, coded)
