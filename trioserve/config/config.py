"""`Config`: hypercorn's configuration class, with trioserve's settings, and a check on each assignment.

Made by the command line (`sources.load_config`), or by a program that calls `serve()`; read by every tier. A
wrong name or value raises `ConfigError` where it is assigned; what only shows in the whole (combinations,
things not served yet) is for `validate()`, which `serve()` and the command call before anything is opened.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from typing import Any, Literal, Self

import hypercorn.config

from trioserve.config import checks, files
from trioserve.config.places import find_place_problems
from trioserve.config.provenance import CODE, DEFAULT, Origin, Source
from trioserve.config.settings import BY_NAME, SETTINGS, did_you_mean
from trioserve.config.tls_context import CertificateFiles, create_context, default_files, speaks_tls
from trioserve.errors import ConfigError

# Methods that a subclass of hypercorn's Config may have changed, and that nobody would call on the copy.
_OVERRIDABLE = ("create_sockets", "create_ssl_context", "log", "response_headers")


class Config(hypercorn.config.Config):
    """Every setting as an attribute; defaults, units and reasons are in `trioserve.config.SETTINGS`.

    Takes hypercorn's ways of filling it: attributes, `from_mapping`, `from_toml`, `from_pyfile`,
    `from_object`, subclassing.
    """

    accept_batch: int
    block_kill: float | None
    block_warn: float | None
    contain_errors: list[str | type[BaseException]]
    control: str | None
    crash_dir: str | None
    debug_extension: bool
    disconnect_grace: float | None
    exit_when_idle: float | None
    factory: bool
    fatal_errors: list[str | type[BaseException]]
    first_byte_timeout: float | None
    h2_connection_window: int | Literal["auto"]
    h2_stream_window: int
    h2c: bool
    hard_exit_after: float | None
    http2_engine: Literal["own", "h2"]
    http_engine: Literal["auto", "h1c", "httptools", "h11"]
    hub: Literal["auto", "epoll", "portable"]
    ktls: bool
    lifespan: Literal["auto", "on", "off"]
    linger_timeout: float
    max_body_size: int | None
    max_concurrent_requests: int | None
    max_connections: int | None
    max_head_size: int
    max_header_count: int
    max_lifetime: float | None
    max_rss: float | None
    max_target_size: int
    on_app_error: Literal["replace", "contain", "crash"]
    pre_drain_delay: float
    preload: bool
    request_body_min_rate: float
    request_body_min_rate_grace: float
    request_body_timeout: float | None
    request_head_timeout: float | None
    request_queue_size: int
    request_queue_timeout: float
    request_timeout: float | None
    response_write_timeout: float | None
    sni_certificates: dict[str, CertificateFiles]
    static_mounts: list[str]
    websocket_close_timeout: float
    websocket_compression: Literal["off", "on", "contextless"]
    websocket_ping_timeout: float | None
    worker_timeout: float | None
    wsgi_threads: int

    _sources: dict[str, Source]
    _advice: list[checks.Advice]
    _file_path: str | None = None

    def __init__(self) -> None:
        self._sources, self._advice = {}, []
        for setting in SETTINGS:
            if isinstance(setting.default, list | dict):
                object.__setattr__(self, setting.name, setting.fresh_default())
        for name, value, owner in _class_attributes(type(self)):
            self.assign(name, value, Source(Origin.CODE, f"class {owner.__qualname__}"))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, value in vars(cls).items():
            if name not in BY_NAME and files.is_plain_setting(name, value):
                source = Source(Origin.CODE, f"class {cls.__qualname__}")
                raise ConfigError(f"{source.describe(name, value)}: unknown setting{did_you_mean(name)}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or (name not in BY_NAME and hasattr(type(self), name)):
            object.__setattr__(self, name, value)
        else:
            self.assign(name, value, CODE)

    def __repr__(self) -> str:
        shown = (
            f"{setting.name}={setting.show(value)}"
            for setting in SETTINGS
            if not setting.write_only and (value := getattr(self, setting.name)) != setting.default
        )
        return f"<{type(self).__name__} {', '.join(shown) or 'all default'}>"

    # -- setting values ----------------------------------------------------------------------------------

    def assign(self, name: str, value: Any, source: Source) -> None:
        """Check one value and take it, remembering where it came from; `ConfigError` names all of that."""
        setting = BY_NAME.get(name)
        if setting is None:
            raise ConfigError(f"{source.describe(name, value)}: unknown setting{did_you_mean(name)}")
        try:
            settled = setting.kind.check(value)
        except ValueError as error:
            raise ConfigError(f"{source.describe(name, value, setting)}: {error}") from error
        if setting.write_only and source.origin is not Origin.CODE:
            # hypercorn's setter would warn a second time, and lose the source.
            self.assign("verify_mode", settled, source)
            return
        object.__setattr__(self, name, settled)
        self._sources[name] = source
        if name == "h11_max_incomplete_size" and self._may_derive("max_head_size"):
            object.__setattr__(self, "max_head_size", settled)
            self._sources["max_head_size"] = Source(Origin.DERIVED, f"{name} ({source})")

    def update(self, values: Mapping[str, Any], source: Source) -> None:
        """Assign several values of one source; the error lists all that are wrong, not only the first."""
        problems = []
        for name, value in values.items():
            try:
                self.assign(name, value, source)
            except ConfigError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))

    def _may_derive(self, name: str) -> bool:
        return self.source_of(name).origin in (Origin.DEFAULT, Origin.DERIVED)

    def source_of(self, name: str) -> Source:
        """Where the value of a setting came from."""
        known = self._sources.get(name)
        if known is not None:
            return known
        # A list that was changed in place was never assigned.
        setting = BY_NAME[name]
        changed = not setting.write_only and getattr(self, name) != setting.default
        return CODE if changed else DEFAULT

    @property
    def file_path(self) -> str | None:
        """The file that the command has read settings from, None without one; no setting itself."""
        return self._file_path

    # -- from one process to another ---------------------------------------------------------------------

    def given(self) -> dict[str, tuple[Any, Source]]:
        """Every setting that was given a value, with its source; what `restored` takes."""
        return {
            setting.name: (getattr(self, setting.name), source)
            for setting in SETTINGS
            if not setting.write_only and (source := self.source_of(setting.name)) != DEFAULT
        }

    @classmethod
    def restored(cls, given: Mapping[str, tuple[Any, Source]]) -> Config:
        """The same settings as where `given` was called; they were checked there."""
        config = Config()
        for name, (value, source) in given.items():
            object.__setattr__(config, name, value)
            config._sources[name] = source
        return config

    # -- hypercorn's loaders, with checks ----------------------------------------------------------------

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any] | None = None, **kwargs: Any) -> Self:
        """Take settings from a mapping, from keyword arguments, or both (the latter win)."""
        config = cls()
        config.update({**(mapping or {}), **kwargs}, Source(Origin.CODE, "mapping"))
        return config

    @classmethod
    def from_toml(cls, filename: files.FilePath) -> Self:
        """Take settings from the top level of a TOML file."""
        config = cls()
        config.update(files.read_toml(filename), Source(Origin.FILE, os.fsdecode(filename)))
        return config

    @classmethod
    def from_pyfile(cls, filename: files.FilePath) -> Self:
        """Run a Python file and take the settings it defines; see `files` for which names count."""
        config = cls()
        config._take(files.run_pyfile(filename), Source(Origin.FILE, os.fsdecode(filename)))
        return config

    @classmethod
    def from_object(cls, instance: object | str) -> Self:
        """Take settings from the attributes of an object, or of what "module" or "module.object" names."""
        label = instance if isinstance(instance, str) else f"object {type(instance).__qualname__}"
        if isinstance(instance, str):
            instance = files.import_object(instance)
        if isinstance(instance, type) and issubclass(instance, hypercorn.config.Config):
            instance = instance()
        if isinstance(instance, hypercorn.config.Config):
            return cls.from_hypercorn(instance)
        config = cls()
        config._take(instance, Source(Origin.FILE, label))
        return config

    def _take(self, found: object, source: Source) -> None:
        self.update(files.plain_attributes(found), source)
        for name, meant in files.shouted_settings(found):
            text = f"{source.place(name)} is not read: settings are written in lower case ({meant})"
            self._advice.append(checks.warning(text))

    @classmethod
    def from_hypercorn(cls, config: hypercorn.config.Config) -> Self:
        """Copy a hypercorn Config and its subclass's attributes; a trioserve Config is returned as it is.

        What it leaves at hypercorn's default stays at *hypercorn's* default, so that `graceful_timeout` is 3
        s as its owner expects. A name that is no setting is only warned of: hypercorn takes any.
        """
        if isinstance(config, cls):
            return config
        own = cls()
        own._log = config._log
        source = Source(Origin.HYPERCORN)
        own.assign("graceful_timeout", config.graceful_timeout, source)
        given = {name: getattr(config, name) for name in files.given_to_hypercorn(config)}
        own.update({name: value for name, value in given.items() if name in BY_NAME}, source)
        for name in sorted(given.keys() - BY_NAME.keys()):
            own._advice.append(checks.warning(f"hypercorn Config: {name} is no setting{did_you_mean(name)}"))
        for name in _OVERRIDABLE:
            if getattr(type(config), name) is not getattr(hypercorn.config.Config, name):
                place = f"{type(config).__qualname__}.{name}"
                text = f"{place} is not called: derive from trioserve.Config to change it"
                own._advice.append(checks.warning(text))
        return own

    # -- the whole ---------------------------------------------------------------------------------------

    def validate(self, *, library: bool = False) -> None:
        """Raise `ConfigError` listing every value, combination and wish that cannot be served.

        Args:
            library: called by `serve()` inside somebody's program, where what concerns processes (`workers`,
                `use_reloader`) is ignored with a warning, as hypercorn does.
        """
        problems = checks.find_problems(self, library=library)
        if problems:
            raise ConfigError("\n".join(problems))

    def check_places(self) -> None:
        """Raise `ConfigError` for what this process may not write; `validate` does, but root may write anywhere."""
        problems = list(find_place_problems(self))
        if problems:
            raise ConfigError("\n".join(problems))

    def advice(self, *, library: bool = False) -> list[checks.Advice]:
        """What the operator should know though it is no error: (logging level, text), for the error log."""
        return self._advice + checks.find_advice(self, library=library)

    def advise_of_supervisor(self) -> None:
        """Have `advice` name what needs a supervisor: there will be none, whatever `workers` says."""
        self._advice += checks.find_supervised(self)

    # -- TLS ---------------------------------------------------------------------------------------------

    @property
    def ssl_enabled(self) -> bool:
        """`bind` is served with TLS: there is a `certfile`, which may have the key in it."""
        return speaks_tls(self)

    def create_ssl_context(self) -> ssl.SSLContext | None:
        """The context for all whom `sni_certificates` has none for; None without TLS.

        hypercorn's, but Python's hardened options are kept. A subclass may change what it makes: call this first.

        Raises:
            ConfigError: a file cannot be used; says which and why.
        """
        return create_context(self, default_files(self)) if self.ssl_enabled else None

    def response_headers(self, protocol: str) -> list[tuple[bytes, bytes]]:
        """Date, Server and Alt-Svc as the settings ask for; `Server` says trioserve."""
        return [
            (name, b"trioserve" if name == b"server" else value)
            for name, value in super().response_headers(protocol)
        ]


def _class_attributes(cls: type) -> list[tuple[str, Any, type]]:
    """The settings that subclasses define in their bodies, the most derived last."""
    ours = (Config, hypercorn.config.Config, object)
    return [
        (name, value, owner)
        for owner in reversed(cls.__mro__)
        if owner not in ours
        for name, value in vars(owner).items()
        if name in BY_NAME and not isinstance(value, property)
    ]


for _setting in SETTINGS:
    # Plain class attributes, as hypercorn has them: reading one costs no Python call.
    if not isinstance(vars(hypercorn.config.Config).get(_setting.name), property):
        setattr(Config, _setting.name, _setting.default)
