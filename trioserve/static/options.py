"""The options of `StaticFiles`: what may be given, checked where it is given.

`handler.py` makes one `StaticOptions` from its keyword arguments; `field_rules.py`, `variants.py` and `file_cache.py`
read it. Whatever is wrong raises `ConfigError` at construction, with the name, the value and what to do. Pure.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypedDict, get_args
from urllib.parse import quote

from trioserve.errors import ConfigError
from trioserve.static.codings import SUFFIXES
from trioserve.static.dictionaries import use_as_dictionary
from trioserve.static.request_path import PathRefused, parse_request_path
from trioserve.static.walk import SymlinkPolicy
from trioserve.structure.context import ASGIApp

# What one file may be answered with, and who may see it, is decided here; each default with its reason.


class StaticKeywords(TypedDict, total=False):
    """The keyword arguments of `StaticFiles`, for type checkers; `StaticOptions` says what they do."""

    index: Sequence[str] | str
    listing: bool
    spa: str | None
    not_found: str | None
    fallthrough: ASGIApp | None
    codings: Sequence[str] | str
    use_as_dictionary: Sequence[tuple[str, str] | tuple[str, str, str]] | None
    symlinks: SymlinkPolicy
    dotfiles: bool
    forbidden: Literal[403, 404]
    cache_control: str | Sequence[tuple[str, str]] | None
    max_age: int
    headers: Mapping[str, str] | Iterable[tuple[str | bytes, str | bytes]]
    content_types: Mapping[str, str] | None
    download: Sequence[str] | str
    max_ranges: int
    revalidate: float
    frozen: bool
    cache_files: int
    cache_bytes: int
    small_file: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticOptions:
    """How a directory is served.

    Attributes:
        index: names that stand for a directory, the first that exists.
        listing: directories without an index are listed, as HTML or JSON by Accept. Off: names are nobody's business.
        spa: a page below the root, sent with 200 where there is nothing, to who accepts HTML and asks for a name
            without an extension. None: there is no such page.
        not_found: a page below the root that is the body of each 404. None: two words of text.
        fallthrough: an ASGI app that gets the requests for which nothing is here. None: they get 404.
        codings: which precompressed siblings are looked for, the preferred first.
        use_as_dictionary: (pattern, URL pattern) or (pattern, URL pattern, id) rules, of which the first that matches a
            file has browsers keep it, and offer it when they ask for such a URL; siblings that were made with it
            (`.dcz`) are then sent. None: there are no such siblings. An empty list: dictionaries come from elsewhere.
        symlinks: which are followed: those that stay "beneath" the root, "never" any, or "follow" all of them.
        dotfiles: names that begin with a dot are served; `.well-known` is in any case.
        forbidden: the status for what may not be read. 404: who may not see a file need not know that it exists.
        cache_control: one value for all, or (pattern, value) rules of which the first that matches holds. None, or no
            match: names with a hash for good, HTML never without asking, the rest for `max_age`. "" sends no field.
        max_age: seconds. 60: a change is seen within a minute, and a page view asks for each asset once.
        headers: sent with what is found here: 200, 206, listings.
        content_types: type by extension (".glb") or by whole name, before the table.
        download: patterns of what browsers are to save rather than show.
        max_ranges: in one request; more are answered with the whole file.
        revalidate: seconds after which an open file is looked at again. 1: a change is seen at once, as people see it.
        frozen: files never change while the server runs, and are not looked at again.
        cache_files: open files that are kept. All mounts share a quarter of the process's descriptors; those that were
            there before another one was made give back what is its own when they next look at a file.
        cache_bytes: memory for the contents of small files. Those in demand are held twice, once ready to be sent.
        small_file: bytes up to which a file is kept in memory. 16 KiB: one write for head and body beats two calls.

    Patterns are as in a shell, over the path below the root, or over the name alone if they have no slash.
    """

    index: tuple[str, ...] = ("index.html",)
    listing: bool = False
    spa: str | None = None
    not_found: str | None = None
    fallthrough: ASGIApp | None = None
    codings: tuple[bytes, ...] = tuple(SUFFIXES)
    use_as_dictionary: tuple[tuple[str, bytes], ...] | None = None
    symlinks: SymlinkPolicy = "beneath"
    dotfiles: bool = False
    forbidden: Literal[403, 404] = 404
    cache_control: str | tuple[tuple[str, str], ...] | None = None
    max_age: int = 60
    headers: tuple[tuple[bytes, bytes], ...] = ()
    content_types: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    download: tuple[str, ...] = ()
    max_ranges: int = 16
    revalidate: float = 1.0
    frozen: bool = False
    cache_files: int = 1000
    cache_bytes: int = 32 * 1024 * 1024
    small_file: int = 16 * 1024

    @classmethod
    def checked(cls, given: Mapping[str, Any]) -> Self:
        """The options as a caller gave them, settled.

        Raises:
            ConfigError: one is unknown or wrong, or two contradict each other.
        """
        settled = {}
        for name, value in given.items():
            if name not in _CHECKS:
                raise ConfigError(f"StaticFiles: {name} is no option{_did_you_mean(name)}")
            try:
                settled[name] = _CHECKS[name](value)
            except (ValueError, TypeError) as error:
                raise ConfigError(f"StaticFiles: {name} = {value!r:.200}: {error}") from None
        options = cls(**settled)
        if options.fallthrough is not None and options.not_found is not None:
            raise ConfigError(
                "StaticFiles: fallthrough and not_found both answer what is not here: give one of them"
            )
        if options.small_file > options.cache_bytes:
            raise ConfigError(
                f"StaticFiles: small_file = {options.small_file}: no such file fits into cache_bytes = "
                f"{options.cache_bytes}: raise that, or lower this"
            )
        return options


def _did_you_mean(name: str) -> str:
    near = difflib.get_close_matches(name, _CHECKS, 1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(_CHECKS)}"


# -- checks: the settled value, or ValueError ----------------------------------------------------------------


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected True or False")
    return value


def _whole(minimum: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"expected a whole number of at least {minimum}")
        return value

    return check


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(
            "expected a number of seconds of at least 0; for files that never change give frozen=True"
        )
    return float(value)


def _choice(*choices: Any) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value not in choices:
            raise ValueError(f"choose one of {', '.join(map(repr, choices))}")
        return value

    return check


def _page(value: Any) -> str | None:
    """A file below the root."""
    if value is None:
        return None
    if not isinstance(value, str) or not value or value.startswith("/") or value.endswith("/"):
        raise ValueError('expected the path of a file below the directory, such as "index.html"')
    try:
        parse_request_path(b"/" + quote(value).encode("ascii"), dotfiles=True)
    except PathRefused as refused:
        raise ValueError(
            f"expected the path of a file below the directory; in this one is {refused.reason}"
        ) from None
    return value


def _texts(value: Any) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(item, str) and item for item in items):
        raise ValueError("expected a list of text")
    return items


def _names(value: Any) -> tuple[str, ...]:
    names = _texts(value)
    for name in names:
        if "/" in name or _page(name) is None:
            raise ValueError(f'{name!r} is not the name of a file; expected names such as "index.html"')
    return names


def _codings(value: Any) -> tuple[bytes, ...]:
    codings = tuple(name.encode("latin-1", "replace") for name in _texts(value))
    wrong = [coding for coding in codings if coding not in SUFFIXES]
    if wrong or len(set(codings)) < len(codings):
        raise ValueError(f"choose from {', '.join(coding.decode() for coding in SUFFIXES)}, each once")
    return codings


def _use_as_dictionary(value: Any) -> tuple[tuple[str, bytes], ...] | None:
    if value is None:
        return None
    rules = () if isinstance(value, str) else tuple(value)
    if isinstance(value, str) or not all(
        isinstance(rule, tuple | list) and len(rule) in (2, 3) and isinstance(rule[0], str) and rule[0]
        for rule in rules
    ):
        raise ValueError('expected pairs of pattern and URL pattern such as ("app.*.js", "/assets/app.*.js")')
    return tuple((pattern, use_as_dictionary(*rest)) for pattern, *rest in rules)


def _app(value: Any) -> Any:
    if value is not None and not callable(value):
        raise ValueError("expected an ASGI application")
    return value


# RFC 9110 section 5.5, without the obsolete bytes from 0x80 up: these values are ours to write.
_VALUE = re.compile(r"[\x21-\x7e](?:[\t\x20-\x7e]*[\x21-\x7e])?")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

# Fields that have an option.
_OPTIONS = {"cache-control": "cache_control", "use-as-dictionary": "use_as_dictionary"}

# What the handler says itself, and what is the server's to say.
_OURS = frozenset(
    {
        "accept-ranges", "allow", "connection", "content-disposition", "content-encoding", "content-length",
        "content-location", "content-range", "content-type", "date", "etag", "keep-alive", "last-modified", "te",
        "trailer", "transfer-encoding", "upgrade",
    }
)  # fmt: skip


def _field_value(value: Any) -> str:
    if not isinstance(value, str) or (value and not _VALUE.fullmatch(value)):
        raise ValueError(f"{value!r} cannot be the value of a header field")
    return value


def _cache_control(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value and _field_value(value)
    rules = tuple(value)
    for rule in rules:
        if (
            not isinstance(rule, tuple | list)
            or len(rule) != 2
            or not isinstance(rule[0], str)
            or not rule[0]
        ):
            raise ValueError('expected text, or pairs of pattern and value such as ("*.pdf", "private")')
        _field_value(rule[1])
    return tuple((pattern, text) for pattern, text in rules)


def _headers(value: Any) -> tuple[tuple[bytes, bytes], ...]:
    pairs = tuple(value.items()) if isinstance(value, Mapping) else tuple(value)
    settled = []
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError("expected pairs of name and value")
        name, text = (item.decode("latin-1") if isinstance(item, bytes) else item for item in pair)
        if not isinstance(name, str) or not _TOKEN.fullmatch(name):
            raise ValueError(f"{name!r} cannot be the name of a header field")
        if name.lower() in _OURS:
            raise ValueError(f"{name} is set by the handler or by the server: leave it out")
        if name.lower() in _OPTIONS:
            raise ValueError(f"give {name} as {_OPTIONS[name.lower()]}")
        settled.append((name.lower().encode("ascii"), _field_value(text).encode("ascii")))
    return tuple(settled)


def _content_types(value: Any) -> dict[str, bytes]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError('expected a mapping such as {".glb": "model/gltf-binary"}')
    settled = {}
    for name, text in value.items():
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"{name!r} is neither an extension with its dot nor the name of a file")
        text = text.decode("latin-1") if isinstance(text, bytes) else text
        if "/" not in (text if isinstance(text, str) else ""):
            raise ValueError(f"{text!r} is no media type")
        settled[name.lower()] = _field_value(text).encode("ascii")
    return settled


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "index": _names,
    "listing": _switch,
    "spa": _page,
    "not_found": _page,
    "fallthrough": _app,
    "codings": _codings,
    "use_as_dictionary": _use_as_dictionary,
    "symlinks": _choice(*get_args(SymlinkPolicy)),
    "dotfiles": _switch,
    "forbidden": _choice(403, 404),
    "cache_control": _cache_control,
    "max_age": _whole(0),
    "headers": _headers,
    "content_types": _content_types,
    "download": _texts,
    "max_ranges": _whole(1),
    "revalidate": _seconds,
    "frozen": _switch,
    "cache_files": _whole(1),
    "cache_bytes": _whole(0),
    "small_file": _whole(0),
}
