"""The command: from arguments to a `Config`, and from there to a worker.

Called by `__main__.py`. The flags, their help and their checks are made
from `trioserve.config.SETTINGS`; nothing about a setting is written here. Whatever goes wrong before a worker
runs ends with one message on stderr and the exit code of its error (2 usage, 4 app not found, 78
configuration), never with a traceback of ours.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from trioserve import signals
from trioserve.config import SETTINGS, Config, Setting, load_config
from trioserve.config.settings import default_with_unit, nearest_setting, setting_elsewhere
from trioserve.config.settings_server import CAN_SUPERVISE
from trioserve.config.sources import CONFIG_VARIABLE, config_as_toml
from trioserve.config.values import MASK
from trioserve.errors import EXIT_OK, EXIT_SIGINT, OutputFailed, TrioserveError, UsageError
from trioserve.observe.command_line import CommandParser, say
from trioserve.observe.process import explain

Wish = Literal["serve", "print", "check"]

# What a report of a bug has to name, and what else if it is there.
_PACKAGES = ("trio", "h11", "httptools", "hypercorn")
_EXTRA_PACKAGES = ("gunicorn_h1c",)
_EXAMPLE = "for example: trioserve --bind 0.0.0.0:8000 myapp.main:app"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        run = _prepare(sys.argv[1:] if argv is None else argv)
        # With its modules imported, there is something to clean up.
        signals.interrupts_raise()
        return run()
    except TrioserveError as error:
        explain(error)
        return error.exit_code
    except KeyboardInterrupt:  # while the app is imported; later on it is a signal among others
        return EXIT_SIGINT
    except SystemExit as exit_:  # --help and --version, which argparse ends with
        if exit_.code is None or isinstance(exit_.code, int):
            return exit_.code or EXIT_OK
        raise


def _prepare(argv: Sequence[str]) -> Callable[[], int]:
    """Do what takes no server, and return the rest, which returns the exit code."""
    if argv and argv[0] == "ctl":
        from trioserve.supervisor.ctl import run_ctl

        return lambda: run_ctl(argv[1:])
    if argv and argv[0] == "precompress":
        from trioserve.static.precompress import run_precompress

        return lambda: run_precompress(argv[1:])
    config, wish = configure(argv, os.environ)
    if wish == "print":
        say(config_as_toml(config).rstrip("\n"))
    config.validate()
    if wish == "print":
        return lambda: EXIT_OK
    if wish == "check":
        # What is wrong with a value by itself, but shows only to who uses it.
        from trioserve.net.bind import check_binds
        from trioserve.observe.logs import check_logs

        check_logs(config)
        check_binds(config)
        for level, text in config.advice():
            say(f"{logging.getLevelName(level).lower()}: {text}", sys.stderr)
        say("configuration is valid")
        return lambda: EXIT_OK
    if not config.application_path:
        raise UsageError(f"no application given; {_EXAMPLE}")
    if _is_static(argv):
        from trioserve.static.command import describe

        with suppress(OutputFailed):  # it serves all the same
            say(describe(*_static_arguments(argv[1:])[:2], config))
    signals.overlook(signals.STRAYS)
    if config.workers != 0 and CAN_SUPERVISE:
        from trioserve.supervisor.supervisor import run_supervisor

        return lambda: run_supervisor(config, config.application_path, lambda: configure(argv, os.environ)[0])
    # The worker pulls in the protocols: not wanted for --help, nor when the configuration is wrong.
    from trioserve.worker.command import run_command

    return lambda: run_command(config, config.application_path)


def configure(argv: Sequence[str], environment: Mapping[str, str]) -> tuple[Config, Wish]:
    """What the arguments, the environment and the configuration file say, and what is to be done with it."""
    flags = _static_arguments(argv[1:])[2] if _is_static(argv) else _parse(argv, build_parser())
    path = flags.pop("config", None)
    wish: Wish = flags.pop("wish", "serve")
    return load_config(flags, environment, path), wish


# -- arguments ----------------------------------------------------------------------------------------------


def _is_static(argv: Sequence[str]) -> bool:
    return bool(argv) and argv[0] == "static"


def _static_arguments(argv: Sequence[str]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The directory and its options, and the flags of the server; among those the app that serves it."""
    from trioserve.static import command

    flags = _parse(argv, build_parser("directory"))
    directory = flags.get("application_path", ".")
    options = command.take_options(flags)
    # A file or the environment may name an app, but what is served is said here.
    flags |= {"application_path": command.application_path(directory, options), "factory": False}
    return directory, options, flags


def _parse(argv: Sequence[str], parser: _Parser) -> dict[str, Any]:
    flags = vars(parser.parse(argv))
    if flags.get("application_path") is None:
        flags.pop("application_path", None)
    return flags


def build_parser(noun: Literal["application", "directory"] = "application") -> _Parser:
    """The parser of the command line, written from the table of settings; `noun` is what is served."""
    of_app = noun == "application"
    parser = _Parser(
        prog="trioserve" if of_app else "trioserve static",
        usage="trioserve [flags] module:app" if of_app else "trioserve static [flags] [DIR]",
        description=(
            "Serve an ASGI or WSGI application on trio." if of_app else "Serve the files of a directory."
        ),
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    parser.noun = noun
    parser.surplus = f"only one {noun} can be served, but there is also {{!r}}"
    _add_command_flags(parser)
    unmentioned: frozenset[str] = frozenset()
    if not of_app:
        from trioserve.static.command import OF_OTHER_APPS, add_flags

        add_flags(parser)
        unmentioned = OF_OTHER_APPS
    for topic, settings in itertools.groupby(SETTINGS, key=lambda setting: setting.topic):
        group = parser.add_argument_group(topic)
        for setting in settings:
            if not setting.positional:
                _add_flags(group, setting, None if setting.name in unmentioned else _help(setting))
    return parser


class _Parser(CommandParser):
    noun = "application"

    def nearest_flag(self, wanted: str) -> str | None:
        """Names of settings count too, and the flags of other servers."""
        bare = wanted.lstrip("-")
        # What another server calls just so is no slip of the fingers, whatever it looks like (--host, --statsd-host).
        name = setting_elsewhere(bare)
        if name is None and (near := super().nearest_flag(wanted)):
            return near
        name = name or nearest_setting(bare)
        return next((setting.main_flag for setting in SETTINGS if setting.name == name), None)


_OPERANDS = {
    "application": "module:attribute, module (then the attribute is app), path/file.py:attribute, or "
    "module:factory(), optionally with asgi: or wsgi: in front",
    "directory": "what to serve (default .)",
}


def _add_command_flags(parser: _Parser) -> None:
    # None, not SUPPRESS: argparse gives an absent optional positional its default in any case.
    parser.add_argument(
        "application_path", nargs="?", default=None, metavar=parser.noun, help=_OPERANDS[parser.noun]
    )
    group = parser.add_argument_group("Command")
    group.add_argument(
        "-c",
        "--config",
        metavar="SOURCE",
        help="configuration: file.toml, file:file.py or python:module[.object] "
        f"(environment: {CONFIG_VARIABLE})",
    )
    group.add_argument(
        "--check-config",
        dest="wish",
        action="store_const",
        const="check",
        help="check the configuration without loading the app, and exit",
    )
    group.add_argument(
        "--print-config",
        dest="wish",
        action="store_const",
        const="print",
        help="print all settings and where each came from, as TOML, and exit",
    )
    group.add_argument("--version", action=_Version, nargs=0, help="print versions and exit")
    group.add_argument("-h", "--help", action="help", help="show this text and exit")


def _add_flags(group: argparse._ArgumentGroup, setting: Setting, text: str | None) -> None:
    """`text` is what --help says of the setting; None: it does not."""
    if setting.kind.is_switch:
        options: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    else:
        options = {"type": _converter(setting), "metavar": setting.kind.metavar.replace("%", "%%")}
        if setting.kind.is_list:
            options["action"] = "append"
    if setting.option_strings:
        group.add_argument(
            *setting.option_strings, dest=setting.name, help=text or argparse.SUPPRESS, **options
        )
    if setting.deprecated_flags:
        # Only hypercorn's cert_reqs has no flag but an old one.
        now = setting.option_strings[0] if setting.option_strings else "--verify-mode"
        group.add_argument(
            *setting.deprecated_flags,
            action=_Deprecated,
            dest=setting.name,
            const=now,
            help=f"deprecated: use {now}",
            **options,
        )


class _Deprecated(argparse.Action):
    """Take the value, and say what the flag is called now (`const`)."""

    def __call__(self, _: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        with suppress(OutputFailed):
            say(f"trioserve: warning: {option_string} is deprecated, use {self.const}", sys.stderr)
        setattr(namespace, self.dest, values)


class _Version(argparse.Action):
    """Print the versions that a bug report needs."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        say(_versions())
        parser.exit()


def _converter(setting: Setting) -> Any:
    def convert(text: str) -> Any:
        try:
            return setting.kind.parse_flag(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"{MASK if setting.secret else repr(setting.kind.masked(text))}: {error}"
            ) from error

    return convert


def _help(setting: Setting) -> str:
    notes = [f"default {default_with_unit(setting)}"]
    if "--" + setting.name.replace("_", "-") not in setting.option_strings:
        notes.insert(0, f"setting {setting.name}")
    if setting.refused and setting.refused_when is None:
        notes[-1] = f"refused: {setting.refused}"
    elif setting.without_effect:
        notes.append(f"no effect: {setting.without_effect}")
    return f"{setting.help} ({'; '.join(notes)})".replace("%", "%%")


def _epilog() -> str:
    textless = [s.name for s in SETTINGS if not s.option_strings + s.deprecated_flags]
    return (
        "To ask or command a running server (status, workers, scale, reload, ...): trioserve ctl --help\n"
        "To serve a directory: trioserve static --help. To compress its files first: trioserve precompress --help\n"
        "\n"
        "Each source overrides the one before: configuration file, environment (TRIOSERVE_ and the name\n"
        "of the setting in capitals; lists with commas), flags. Durations are seconds, sizes are bytes.\n"
        f"Settings without a flag: {', '.join(textless)}.\n"
        "Exit codes: 0 stopped, 2 usage, 3 could not start, 4 app not found, 71 socket, 75 to be replaced\n"
        "after an error of the app, 78 configuration."
    )


def _versions() -> str:
    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    import trioserve

    python = f"{platform.python_implementation()} {platform.python_version()}"
    parts = [f"{package} {of(package) or 'absent'}" for package in _PACKAGES]
    parts += [f"{package} {found}" for package in _EXTRA_PACKAGES if (found := of(package))]
    return f"trioserve {trioserve.__version__} ({', '.join(parts)}; {python} on {platform.system()})"
