"""The kinds of value that are text, lists of text, or named objects. See `values.py`."""

from __future__ import annotations

import difflib
import enum
import importlib
import logging
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import hypercorn.logging

from trioserve.config.values import Kind, as_toml


class Text(Kind):
    """A string; with `optional`, None and the empty string both mean "not set" and settle as None."""

    def __init__(self, *, optional: bool = False, metavar: str = "TEXT") -> None:
        self.optional = optional
        self.metavar = metavar

    @property
    def expects(self) -> str:
        """Text, or a path."""
        return ("a path" if self.metavar == "PATH" else "text") + (' ("" for none)' if self.optional else "")

    def check(self, value: Any) -> Any:
        """Take paths too where a path is meant."""
        if self.metavar == "PATH" and isinstance(value, os.PathLike):
            value = os.fspath(value)
        if self.optional and (value is None or value == ""):
            return None
        if not isinstance(value, str):
            raise self._refuse()
        if "\0" in value:
            raise self._refuse("it may not contain a NUL character")
        return value

    def to_toml(self, value: Any) -> str | None:
        """Write None as the empty string."""
        return '""' if value is None else as_toml(value)


class LogTarget(Text):
    """A path, "-" for the standard stream, nothing, or (from Python) a `logging.Logger`."""

    def __init__(self) -> None:
        super().__init__(optional=True, metavar="PATH")

    expects = 'a path, "-" for the standard stream, "" for none, or a logging.Logger'

    def check(self, value: Any) -> Any:
        """Let a logger through as it is."""
        return value if isinstance(value, logging.Logger) else super().check(value)


class AutoPath(Text):
    """A path, "auto" for the program to choose one, or "off", which settles as None."""

    off = True

    def __init__(self) -> None:
        super().__init__(metavar="PATH")

    expects = 'a path, "auto" or "off"'

    def check(self, value: Any) -> Any:
        """Take the words in any case; a file that is called so can be written ./auto."""
        value = super().check("off" if value is None else value)
        word = value.strip().lower()
        if not word:
            raise self._refuse()
        return {"auto": "auto", "off": None, "none": None}.get(word, value)

    def to_toml(self, value: Any) -> str | None:
        """Write None as "off"."""
        return as_toml("off" if value is None else value)


class HostPort(Text):
    """`host:port`, IPv6 in brackets, or nothing. Whether there is such a host shows when it is looked up."""

    def __init__(self) -> None:
        super().__init__(optional=True, metavar="HOST:PORT")

    expects = 'host:port, such as "127.0.0.1:8125" or "[::1]:8125"'

    def check(self, value: Any) -> Any:
        """Split at the last colon."""
        value = super().check(value)
        if value is not None:
            host, _, port = value.rpartition(":")
            literal = host.startswith("[") and host.endswith("]")
            if not literal and (":" in host or not _can_be_a_name(host)):
                raise self._refuse(f"{host!r} is no name of a host")
            if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
                raise self._refuse()
        return value


class Choice(Kind):
    """One of a few words."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.metavar = "|".join(words)

    @property
    def expects(self) -> str:
        """The words."""
        return "one of " + ", ".join(self.words)

    def check(self, value: Any) -> Any:
        """Take the word in any case."""
        if not isinstance(value, str):
            raise self._refuse()
        word = value.strip().lower()
        if word not in self.words:
            near = difflib.get_close_matches(word, self.words, 1)
            raise self._refuse(f"did you mean {near[0]}?" if near else "")
        return word


class LogLevel(Kind):
    """The name of a logging level, in any case, those that the program added included."""

    metavar = "LEVEL"

    @property
    def expects(self) -> str:
        """The levels."""
        return "a logging level: " + ", ".join(sorted(logging.getLevelNamesMapping()))

    def check(self, value: Any) -> Any:
        """Keep the spelling: hypercorn's loggers upper-case it themselves."""
        if not isinstance(value, str) or value.upper() not in logging.getLevelNamesMapping():
            raise self._refuse()
        return value


class TextList(Kind):
    """A list of strings; one bare string is a list of one, as for hypercorn's binds."""

    is_list = True

    def __init__(self, metavar: str = "TEXT", *, pattern: str = "", expects: str = "a list of text") -> None:
        self.metavar = metavar
        self.pattern = re.compile(pattern) if pattern else None
        self._expects = expects

    @property
    def expects(self) -> str:
        """What each item must be."""
        return self._expects

    def check(self, value: Any) -> Any:
        """Settle as a list of its own, so that nobody changes the default of others."""
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, Iterable) or isinstance(items, Mapping | bytes):
            raise self._refuse()
        return [self.check_item(item) for item in items]

    def check_item(self, item: Any) -> Any:
        """One item."""
        if not isinstance(item, str):
            raise self._refuse(f"{item!r} is {type(item).__name__}")
        if self.pattern is not None and not self.pattern.fullmatch(item):
            raise self._refuse(f"{item!r} is not")
        return item

    def parse(self, text: str) -> Any:
        """Split at commas."""
        return self.check([item for part in text.split(",") if (item := part.strip())])

    def parse_flag(self, text: str) -> Any:
        """One occurrence is one item, commas and all."""
        return self.check_item(text)


class Binds(TextList):
    """Addresses to listen on, in hypercorn's spellings; only the spelling is checked here."""

    def __init__(self) -> None:
        super().__init__("ADDRESS", expects="host:port, host, [v6]:port, :port, unix:path or fd://number")

    def check_item(self, item: Any) -> Any:
        """Refuse what hypercorn would take for a host name with port 8000."""
        super().check_item(item)
        if item.startswith("unix:"):
            good = len(item) > len("unix:") and "\0" not in item
        elif item.startswith("fd://"):
            good = _is_number(item[len("fd://") :])
        elif _has_wrong_brackets(item):
            raise self._refuse(f"{item!r} is not: an IPv6 address stands whole in brackets, as in [::1]:8000")
        else:
            host, colon, port = item.rpartition(":")
            bare = not colon or item.endswith("]") or (":" in host and "[" not in host)
            good = bool(item.strip()) if bare else _is_number(port) and int(port) < 65536
        if not good:
            raise self._refuse(f"{item!r} is not")
        return item


def _has_wrong_brackets(bind: str) -> bool:
    address = bind.rpartition("://")[2]  # of a scheme that is none of ours something else is said
    if "[" not in address and "]" not in address:
        return False
    return re.fullmatch(r"\[[^][]+\](:[^][]*)?", address) is None


class StaticMounts(TextList):
    """Directories to serve, each as "/prefix=DIR"; whether they exist is for `checks.py`."""

    def __init__(self) -> None:
        super().__init__("/PREFIX=DIR", expects='a list of /prefix=DIR such as "/assets=public/assets"')

    def check(self, value: Any) -> Any:
        """Refuse a prefix that is given twice."""
        items: list[str] = super().check(value)
        prefixes = [item.partition("=")[0] for item in items]
        twice = next((prefix for prefix in prefixes if prefixes.count(prefix) > 1), None)
        if twice is not None:
            raise self._refuse(f"{twice} is given twice")
        return items

    def check_item(self, item: Any) -> Any:
        """Settle without a slash at the prefix's end, and with an absolute path: an app may change the directory."""
        super().check_item(item)
        prefix, _, directory = item.partition("=")
        if prefix == "/":
            raise self._refuse("to serve a directory at / give: trioserve static DIR")
        names = prefix.removesuffix("/").split("/")
        plain = prefix.isprintable() and not set(prefix) & set("%?#\\")
        if names[0] or len(names) < 2 or not plain or not {"", ".", ".."}.isdisjoint(names[1:]):
            raise self._refuse(f"{item!r} has no such prefix")
        if not directory:
            raise self._refuse(f"{item!r} names no directory")
        path = os.path.abspath(os.path.expanduser(directory))  # noqa: PTH100, PTH111 - links stay as they are
        return f"{'/'.join(names)}={path}"


class ErrorClasses(TextList):
    """Exception classes: "module:Class", a bare name for builtins, or (from Python) the class itself."""

    def __init__(self) -> None:
        # Only the spelling: the app's code, which may hold the class, cannot be imported yet.
        super().__init__(
            "MODULE:CLASS",
            pattern=r"(?:[^\W\d][\w.]*:)?[^\W\d][\w.]*",
            expects='a list of exceptions such as "ValueError" or "myapp.errors:Overloaded"',
        )

    def check(self, value: Any) -> Any:
        """A single class is a list of one."""
        return super().check([value] if isinstance(value, type) else value)

    def check_item(self, item: Any) -> Any:
        """Let exception classes through."""
        if isinstance(item, type) and issubclass(item, BaseException):
            return item
        return super().check_item(item)

    def to_toml(self, value: Any) -> str | None:
        """Write classes by name."""
        return as_toml(
            [
                x if isinstance(x, str) else f"{x.__module__}:{x.__qualname__}".removeprefix("builtins:")
                for x in value
            ]
        )


class Table(Kind):
    """A dictionary or nothing; files and Python only."""

    from_text = False
    expects = "a table (dict)"

    def check(self, value: Any) -> Any:
        """Settle as a dict or None."""
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self._refuse()
        return dict(value)


class LoggerClass(Kind):
    """A class with the contract of `hypercorn.logging.Logger`, itself or as "module:Class"."""

    metavar = "MODULE:CLASS"
    expects = 'a class derived from hypercorn.logging.Logger, or its name as "module:Class"'

    def check(self, value: Any) -> Any:
        """Import the class when it is given by name."""
        if isinstance(value, str):
            value = import_named(value)
        if not isinstance(value, type) or not issubclass(value, hypercorn.logging.Logger):
            raise self._refuse()
        return value

    def to_toml(self, value: Any) -> str | None:
        """Write the name."""
        return as_toml(f"{value.__module__}:{value.__qualname__}")


class EnumMember(Kind):
    """A member of an enum by itself, name or number; None when not set."""

    metavar = "NAME"

    def __init__(self, members: type[enum.Enum]) -> None:
        self.members = members

    @property
    def expects(self) -> str:
        """The enum's names."""
        return f"a name of {self.members.__name__}: " + ", ".join(self.members.__members__)

    def check(self, value: Any) -> Any:
        """Settle as the member."""
        if value is None or value == "":
            return None
        if isinstance(value, self.members):
            return value
        if isinstance(value, str) and value in self.members.__members__:
            return self.members[value]
        try:
            return self.members(int(value))
        except (ValueError, TypeError):
            raise self._refuse() from None

    def to_toml(self, value: Any) -> str | None:
        """Write the name, or the number of a combination that has none."""
        if value is None:
            return '""'
        return as_toml(value.name if value.name in self.members.__members__ else int(value.value))


def import_named(spelling: str) -> Any:
    """The object that "module:attribute" or "module.attribute" names, a bare name being a builtin's.

    Raises `ValueError` saying which part is missing; what the module itself raises while being imported goes
    through as its own error inside that message.
    """
    module_name, _, attribute = spelling.partition(":") if ":" in spelling else spelling.rpartition(".")
    module_name = module_name or "builtins"
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise ValueError(f"{spelling!r}: {error}") from error
    except Exception as error:
        raise ValueError(f"{spelling!r}: importing {module_name!r} failed: {error!r}") from error
    return found


def _can_be_a_name(host: str) -> bool:
    try:
        host.encode("idna")
    except UnicodeError:  # which whoever looks it up would get: a label that is empty or too long
        return False
    return True


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
