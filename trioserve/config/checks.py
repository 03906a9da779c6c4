"""What only shows in a whole `Config`: combinations that cannot be, wishes that are refused, and advice.

Called by `Config.validate` and `Config.advice`. `resolve_exceptions` is for the worker, once the app's code
can be imported.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from trioserve.config.places import find_place_problems
from trioserve.config.provenance import Origin
from trioserve.config.settings import BY_NAME, SETTINGS
from trioserve.config.settings_http import H1C_MOST_FIELDS
from trioserve.config.settings_server import CAN_SUPERVISE
from trioserve.config.text_values import import_named
from trioserve.config.tls_context import find_tls_problems, find_tls_remarks
from trioserve.errors import ConfigError

if TYPE_CHECKING:
    from trioserve.config.config import Config

Advice = tuple[int, str]

# How binds begin that nobody reaches from another machine, as far as one can see.
_LOCAL = ("127.", "localhost", "[::1]", "unix:", "fd://")


def warning(text: str) -> Advice:
    """Advice at WARNING."""
    return logging.WARNING, text


def find_problems(config: Config, *, library: bool) -> list[str]:
    """Everything that makes this configuration impossible to serve, one line each."""
    problems = [*_wrong_values(config), *_refused(config, library=library), *_contradictions(config)]
    if not problems:
        problems += find_tls_problems(config)
    return problems if library else [*problems, *_is_nowhere(config), *_is_reloadable(config)]


def _wrong_values(config: Config) -> Iterator[str]:
    # Assignments were checked; class attributes, lists changed in place and derived values were not.
    for setting in SETTINGS:
        if setting.write_only:
            continue
        value = getattr(config, setting.name)
        try:
            setting.kind.check(value)
        except ValueError as error:
            yield f"{config.source_of(setting.name).describe(setting.name, value, setting)}: {error}"


def _refused(config: Config, *, library: bool) -> Iterator[str]:
    for setting in SETTINGS:
        if setting.write_only or (library and not setting.refused_in_library):
            continue
        value = getattr(config, setting.name)
        if setting.is_refused(value):
            described = config.source_of(setting.name).describe(setting.name, value, setting)
            yield f"{described}: {setting.refused}"


def _contradictions(config: Config) -> Iterator[str]:
    worker_class = config.source_of("worker_class")
    if config.worker_class != "trio" and worker_class.origin not in (Origin.FILE, Origin.HYPERCORN):
        described = worker_class.describe("worker_class", config.worker_class)
        yield f"{described}: trioserve always runs trio: remove it, or say trio"
    target = config.source_of("max_target_size")
    if config.max_target_size > config.max_head_size and target.origin is not Origin.DEFAULT:
        yield (
            f"{target.describe('max_target_size', config.max_target_size)}: a target is part of the head, "
            f"so it cannot be "
            f"larger than max_head_size = {config.max_head_size} ({config.source_of('max_head_size')})"
        )
    count = config.max_header_count
    if config.http_engine == "h1c" and count > H1C_MOST_FIELDS:
        yield (
            f"{config.source_of('http_engine').describe('http_engine', 'h1c')}: it takes up to {H1C_MOST_FIELDS} "
            f"fields, and max_header_count = {count} ({config.source_of('max_header_count')}) allows more: lower it, "
            "or say auto"
        )
    warn, kill = config.block_warn, config.block_kill
    if warn is not None and kill is not None and kill <= warn:
        yield (
            f"{config.source_of('block_kill').describe('block_kill', kill)}: a blocked loop is warned of before the "
            f"process is ended, so it must be longer than block_warn = {warn:g} ({config.source_of('block_warn')}), "
            "or one of them off"
        )
    yield from _missing_directories(config)
    yield from find_place_problems(config)
    yield from _bound_twice(config)
    both = [name for name in config.contain_errors if name in config.fatal_errors]
    if both:
        yield f"contain_errors and fatal_errors both name {both[0]!r}: an error can be one or the other"


def _bound_twice(config: Config) -> Iterator[str]:
    known: dict[str, tuple[str, str]] = {}
    for name in ("bind", "insecure_bind") if config.ssl_enabled else ("bind",):
        binds = getattr(config, name)
        for bind in binds:
            if bind.endswith(":0"):
                continue  # the kernel chooses another port each time
            # Through links, as /var/run is one: the second would take the place of the first one's file.
            place = os.path.realpath(bind[5:]) if bind.startswith("unix:") else bind
            where, other = known.setdefault(place, (name, bind))
            if (where, other) == (name, bind) and binds.count(bind) == 1:
                continue
            described = config.source_of(name).describe(name, binds)
            if where != name:
                where = f"{where} ({config.source_of(where)}), where TLS is spoken,"
                yield f"{described}: {bind} is in {where} as well: remove it from one of them"
            elif other != bind:
                yield f"{described}: {other} and {bind} are the same: remove one of them"
            else:
                yield f"{described}: {bind} is named more than once: remove all but one"
                break


def _missing_directories(config: Config) -> Iterator[str]:
    for mount in config.static_mounts:
        directory = mount.partition("=")[2]
        if not os.path.isdir(directory):  # noqa: PTH112 - as text, as it was given
            described = config.source_of("static_mounts").describe("static_mounts", mount)
            yield f"{described}: there is no directory {directory}: make it, or correct the path"


def _is_nowhere(config: Config) -> Iterator[str]:
    if not config.bind and not (config.ssl_enabled and config.insecure_bind):
        described = config.source_of("bind").describe("bind", config.bind)
        yield f"{described}: nobody could connect: give an address, or leave it out for the default"


def _is_reloadable(config: Config) -> Iterator[str]:
    described = config.source_of("use_reloader").describe("use_reloader", config.use_reloader)
    if config.use_reloader and not CAN_SUPERVISE:
        yield f"{described}: a supervisor replaces the workers when files change, and that needs Linux: remove it"
    elif config.use_reloader and config.workers == 0:
        workers = config.source_of("workers")
        yield (
            f"{described}: a supervisor replaces the workers when files change, and workers = 0 ({workers}) has none: "
            "serve with --workers 1, or without --reload"
        )
    if config.use_reloader and importlib.util.find_spec("watchfiles") is None:
        yield f"{described}: watching files needs the package watchfiles: pip install 'trioserve[reload]'"


def _develops(config: Config) -> Iterator[Advice]:
    if not config.use_reloader:
        return
    policy = config.source_of("on_app_error")
    if policy.origin is Origin.DERIVED:
        yield logging.INFO, f"on_app_error is {config.on_app_error}, taken from {policy.detail}"
    public = [bind for bind in config.bind if not bind.startswith(_LOCAL)]
    if public:
        yield warning(
            f"use_reloader: whoever can connect to {public[0]} is shown the app's source when it fails"
        )


# What only a supervisor does.
_SUPERVISED = ("preload", "worker_timeout", "max_requests", "max_lifetime", "max_rss")


def find_advice(config: Config, *, library: bool) -> list[Advice]:
    """What is accepted but does not do what one might think."""
    found = [(logging.INFO, text) for text in _without_effect(config)]
    found += [warning(text) for text in _surprises(config, library=library)]
    found += [
        (logging.ERROR if severe else logging.WARNING, text) for severe, text in find_tls_remarks(config)
    ]
    return found if library else [*found, *_develops(config)]


def _without_effect(config: Config) -> Iterator[str]:
    for setting in SETTINGS:
        value = None if setting.write_only else getattr(config, setting.name)
        if setting.without_effect and value != setting.default:
            described = config.source_of(setting.name).describe(setting.name, value, setting)
            yield f"{described} has no effect: {setting.without_effect}"
    if config.max_concurrent_requests is None:
        for name in ("request_queue_size", "request_queue_timeout"):
            if getattr(config, name) != BY_NAME[name].default:
                yield f"{config.source_of(name).place(name)} has no effect without max_concurrent_requests"
    timeout = "websocket_ping_timeout"
    if config.websocket_ping_interval is None and config.websocket_ping_timeout != BY_NAME[timeout].default:
        yield f"{config.source_of(timeout).place(timeout)} has no effect without websocket_ping_interval"
    head = config.source_of("max_head_size")
    if head.origin is Origin.DERIVED:
        yield f"max_head_size is {config.max_head_size}, taken from {head.detail}"


def _surprises(config: Config, *, library: bool) -> Iterator[str]:
    if config.worker_class != "trio":
        described = config.source_of("worker_class").describe("worker_class", config.worker_class)
        yield f"{described} is ignored: trioserve always runs trio"
    if config.logconfig is not None and config.logconfig_dict is not None:
        yield "logconfig_dict is ignored because logconfig is given"
    if config.workers == 0 and not library:
        for name in _SUPERVISED:
            if (value := getattr(config, name)) != BY_NAME[name].default:
                shown = f"{config.source_of(name).place(name)} = {BY_NAME[name].show(value)}"
                yield f"{shown} has no effect with workers = 0: it needs the supervisor (workers = 1 or more)"
    if library:
        for setting in SETTINGS:
            ignored = setting.command_only or not setting.refused_in_library
            if (
                ignored
                and not setting.write_only
                and (value := getattr(config, setting.name)) != setting.default
            ):
                yield f"{setting.name} = {setting.show(value)} is ignored by serve(): it is for the command"


def find_supervised(config: Config) -> Iterator[Advice]:
    """What is asked of the supervisor, for who serves without one whatever `workers` says: `trioserve.run`."""
    # That there is none is what `workers = 0` means, and one worker is what there is.
    for name in ("workers", "use_reloader", *_SUPERVISED):
        if (value := getattr(config, name)) not in (BY_NAME[name].default, 0):
            shown = f"{config.source_of(name).place(name)} = {BY_NAME[name].show(value)}"
            yield warning(
                f"{shown} has no effect: trioserve.run() serves in this process, and it needs the supervisor; "
                "start the app with the command trioserve"
            )


def resolve_exceptions(
    names: Iterable[str | type[BaseException]], setting: str = "contain_errors"
) -> tuple[type[BaseException], ...]:
    """Import the exception classes that `contain_errors` or `fatal_errors` names.

    Call it once the app's directory is on `sys.path`. `ConfigError` says which name is wrong, and how.
    """
    classes: list[type[BaseException]] = []
    for name in names:
        try:
            # A bare name is a builtin's; "package.Class" is taken as a dotted path.
            found = import_named(name) if isinstance(name, str) else name
        except ValueError as error:
            raise ConfigError(f"{setting}: {error}") from error
        if not isinstance(found, type) or not issubclass(found, BaseException):
            raise ConfigError(f"{setting}: {name!r} is {type(found).__name__}, not an exception class")
        classes.append(found)
    return tuple(classes)
