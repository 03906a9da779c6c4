"""`trioserve static [DIR]`: a directory served without a line of code.

`cli.py` adds `add_flags` to the flags of the server, and serves what `application_path` returns: a call of `make_app`
with literals, which each worker process makes by itself, as it would load any app. `describe` is what a person at the
terminal is told. All of it blocks, for a bounded time, before anything is served.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from trioserve.config import Config
from trioserve.config.values import Whole
from trioserve.errors import AppNotFound, ConfigError
from trioserve.net.bind import split_host_port
from trioserve.static.codings import SUFFIXES
from trioserve.static.handler import StaticFiles
from trioserve.static.walk import SymlinkPolicy

# What `describe` looks at, at the most: a look, not an inventory.
_MOST_FILES = 10_000
_MOST_SECONDS = 0.5

_DEFAULT_INDEX = "index.html"

# Flags whose value is an option of `StaticFiles`.
_OPTIONS = (
    "listing", "spa", "not_found", "max_age", "dotfiles", "symlinks", "frozen", "index", "use_as_dictionary",
)  # fmt: skip
_PREFIX = "static_"

#: Settings of the server that mean nothing for files; they are taken, but --help is long enough without them.
OF_OTHER_APPS = frozenset({
    "debug_extension", "factory", "lifespan", "startup_timeout", "websocket_close_timeout", "websocket_compression",
    "websocket_max_message_size", "websocket_ping_interval", "websocket_ping_timeout", "wsgi_max_body_size",
    "wsgi_threads",
})  # fmt: skip


def make_app(directory: str, **options: Any) -> StaticFiles:
    """The app that a worker serves."""
    return StaticFiles(directory, **options)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that only this command has; none of them has a default here."""
    group = parser.add_argument_group("Static files")

    def add(flag: str, text: str, **details: Any) -> None:
        name = _PREFIX + flag.removeprefix("--").replace("-", "_")
        group.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=text, **details)

    switch = argparse.BooleanOptionalAction
    add("--listing", "list directories that have no index page (default on)", action=switch)
    add(
        "--index",
        f"name of index pages; repeatable (default {_DEFAULT_INDEX})",
        action="append",
        metavar="NAME",
    )
    add(
        "--spa",
        f"single-page app: {_DEFAULT_INDEX} of the directory for places that are no files; no listing, unless "
        "--listing is there as well (default off)",
        action="store_const",
        const=_DEFAULT_INDEX,
    )
    add("--not-found", "page for what is not there, below the directory (default none)", metavar="PAGE")
    add(
        "--max-age",
        "how long browsers keep a file without asking (default 60 s)",
        type=_seconds,
        metavar="SECONDS",
    )
    add("--dotfiles", "serve names that begin with a dot (default off)", action=switch)
    add(
        "--symlinks",
        "links that are followed: beneath (those that stay inside), never, follow (all) (default beneath)",
        choices=get_args(SymlinkPolicy),
        metavar="POLICY",
    )
    add("--frozen", "files never change while the server runs (default off)", action=switch)
    add(
        "--use-as-dictionary",
        "browsers keep FILES, a pattern, as compression dictionaries for URLS, a URL pattern, and are sent the "
        "siblings that trioserve precompress --dictionary made: 'app.*.js=/app.*.js'; repeatable (default none)",
        action="append",
        type=_dictionary_rule,
        metavar="FILES=URLS",
    )


def _seconds(text: str) -> Any:
    try:
        return Whole(0, unit="s").parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def _dictionary_rule(text: str) -> tuple[str, str]:
    files, _, urls = text.partition("=")
    if not files or not urls:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected the pattern of files and that of the URLs that they are for, such as "
            "'app.*.js=/app.*.js'"
        )
    return files, urls


def take_options(flags: dict[str, Any]) -> dict[str, Any]:
    """Take this command's flags out of what was parsed."""
    found = {name: flags.pop(_PREFIX + name) for name in _OPTIONS if _PREFIX + name in flags}
    found.setdefault("listing", "spa" not in found)
    return found


def application_path(directory: str, options: Mapping[str, Any]) -> str:
    """The path under which `asgi/load.py` finds the app.

    Raises:
        AppNotFound: there is no such directory, or it cannot be read.
        ConfigError: an option is wrong.
    """
    if not os.path.isdir(directory):  # noqa: PTH112 - as text, as it was given
        what = "is no directory" if os.path.exists(directory) else "does not exist"  # noqa: PTH110
        raise AppNotFound(f"nothing to serve: {directory!r} {what}; for example: trioserve static .")
    place = os.path.abspath(directory)  # noqa: PTH100 - links stay as they are
    if not os.access(place, os.X_OK):
        # It could be opened, and each request would be answered 404.
        raise AppNotFound(
            f"nothing to serve: this user may not enter {place}: chmod o+x it, or be another user"
        )
    try:
        make_app(place, **options).close()
    except ConfigError as error:
        if "cannot be opened" in str(error):
            raise AppNotFound(f"nothing to serve: {error}") from None
        raise ConfigError(_in_flags(str(error))) from None
    arguments = [repr(place), *(f"{name}={value!r}" for name, value in options.items())]
    return f"trioserve.static.command:make_app({', '.join(arguments)})"


def _in_flags(message: str) -> str:
    """What `StaticFiles` says of an option, said of the flag."""
    for name in _OPTIONS:
        message = message.replace(f"StaticFiles: {name} = ", f"--{name.replace('_', '-')} = ")
    return message


# -- what a person is told -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Glance:
    """What a first look at a directory found; `whole` if that is all there is."""

    files: int = 0
    directories: int = 0
    siblings: int = 0
    whole: bool = True


def glance(directory: str, *, dotfiles: bool) -> Glance:
    """Count what lies in a directory, as far as one gets in a moment; links are not followed."""
    found = Glance()
    deadline = time.monotonic() + _MOST_SECONDS
    suffixes = tuple(os.fsdecode(suffix) for suffix in SUFFIXES.values())
    for names, is_root in _walk(directory, dotfiles):
        found.directories += not is_root
        found.files += len(names)
        found.siblings += sum(name.endswith(suffixes) and name.rpartition(".")[0] in names for name in names)
        if found.files > _MOST_FILES or time.monotonic() > deadline:
            found.whole = False
            break
    return found


def _walk(directory: str, dotfiles: bool) -> Iterator[tuple[set[str], bool]]:
    pending = [directory]
    while pending:
        place = pending.pop()
        names: set[str] = set()
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.name.startswith(".") and not dotfiles:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        names.add(entry.name)
                    if len(names) > _MOST_FILES:
                        break
        except OSError:
            continue  # not ours to read
        yield names, place == directory


def describe(directory: str, options: Mapping[str, Any], config: Config) -> str:
    """What is served, where, and how, in a few lines."""
    found = glance(directory, dotfiles=options.get("dotfiles", False))
    more = "" if found.whole else "more than "
    files = f"{more}{found.files - found.siblings:,}"
    if found.directories:
        files += f" in {found.directories + 1:,} directories"
    if found.siblings:
        files += f"; and {found.siblings:,} precompressed (.br, .zst, .gz)"
    index = options.get("index") or [_DEFAULT_INDEX]

    def is_there(name: str) -> bool:
        return os.path.isfile(os.path.join(directory, name))  # noqa: PTH113, PTH118

    has_index = any(is_there(name) for name in index)
    missing = " (which is not there yet)"
    rows = [
        ("at", ", ".join(_urls(config)) or "see below"),
        ("files", files),
        ("index", ", ".join(index) + ("" if has_index else " (there is none at the top)")),
        ("listing", "on, for directories without an index" if options.get("listing") else "off"),
        ("dotfiles", "served" if options.get("dotfiles") else "hidden"),
    ]
    if "spa" in options:
        page = options["spa"]
        rows.append(("spa", f"{page} for places that are no files{'' if is_there(page) else missing}"))
    if "not_found" in options:
        page = options["not_found"]
        rows.append(("not found", f"{page}{'' if is_there(page) else missing}"))
    lines = [f"Serving {os.path.realpath(directory)}"]
    lines += [f"  {name:<9} {text}" for name, text in rows]
    return "\n".join(lines).encode("utf-8", "replace").decode("utf-8")


def _urls(config: Config) -> list[str]:
    """Where it can be visited, as far as that is known before a socket is bound."""
    tls = config.ssl_enabled
    binds = [("https" if tls else "http", bind) for bind in config.bind]
    binds += [("http", bind) for bind in config.insecure_bind if tls]
    found = []
    for scheme, bind in binds:
        if bind.startswith(("unix:", "fd://")):
            continue
        host, port = split_host_port(bind)
        if not port:
            continue
        if host in ("", "0.0.0.0", "::"):  # noqa: S104 - compared, not bound
            found.append(f"{scheme}://localhost:{port}/ (and this machine's other addresses)")
        else:
            found.append(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/")
    return found
