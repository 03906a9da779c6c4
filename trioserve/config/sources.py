"""Putting a `Config` together from its sources: file, then environment, then flags; and showing the result.

Called by the command line.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from trioserve.config import files
from trioserve.config.config import Config
from trioserve.config.provenance import Origin, Source
from trioserve.config.setting import ENVIRONMENT_PREFIX
from trioserve.config.settings import BY_NAME, SETTINGS, did_you_mean
from trioserve.config.values import MASK
from trioserve.errors import ConfigError

# Names the file, so it can be no setting of one.
CONFIG_VARIABLE = ENVIRONMENT_PREFIX + "CONFIG"

# What our own processes tell each other begins so, and is nobody's setting.
_BETWEEN_PROCESSES = ENVIRONMENT_PREFIX + "_"


def load_config(
    flags: Mapping[str, Any], environment: Mapping[str, str], config_path: str | None = None
) -> Config:
    """The configuration of a command.

    Args:
        flags: setting names and the values that the command line gave them; they win over all else.
        environment: `TRIOSERVE_<SETTING>` variables win over the file; `TRIOSERVE_CONFIG` names the file when
            `config_path` does not. Other names are not looked at.
        config_path: `x.toml`, `file:x.py` or `python:module[.object]`.
    """
    path = config_path or environment.get(CONFIG_VARIABLE)
    config = read_config(path)
    config._file_path = None if not path or path.startswith("python:") else path.removeprefix("file:")
    problems = _apply_environment(config, environment)
    if problems:
        raise ConfigError("\n".join(problems))
    for name, value in flags.items():
        label = BY_NAME[name].main_flag if name in BY_NAME else name
        config.assign(name, value, Source(Origin.FLAG, label))
    if config.use_reloader and config.source_of("on_app_error").origin is Origin.DEFAULT:
        # Whoever writes the app makes it fail all the time, and wants the next answer at once.
        derived = Source(Origin.DERIVED, f"use_reloader ({config.source_of('use_reloader')})")
        config.assign("on_app_error", "contain", derived)
    return config


def read_config(path: str | None) -> Config:
    """The file's part of a configuration; all defaults without a file."""
    if not path:
        return Config()
    if path.startswith("python:"):
        name = path.removeprefix("python:")
        files.forget_module(name)
        return Config.from_object(name)
    if path.startswith("file:"):
        return Config.from_pyfile(path.removeprefix("file:"))
    return Config.from_toml(path)


def _apply_environment(config: Config, environment: Mapping[str, str]) -> list[str]:
    problems = []
    for variable, text in sorted(environment.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable == CONFIG_VARIABLE:
            continue
        if variable.startswith(_BETWEEN_PROCESSES):
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        setting = BY_NAME.get(name)
        source = Source(Origin.ENVIRONMENT, variable)
        if setting is None:
            hint = did_you_mean(name, ENVIRONMENT_PREFIX)
            problems.append(f"{source.describe(name, text)}: unknown setting{hint}")
        elif not setting.kind.from_text:
            problems.append(
                f"{source.place(name)}: cannot be given as text: put it into a configuration file"
            )
        else:
            try:
                config.assign(name, setting.kind.parse(text), source)
            except ValueError as error:
                problems.append(f"{source.describe(name, text, setting)}: {error}")
    return problems


def config_as_toml(config: Config) -> str:
    """Every value in force with its source, as a file that `--config` takes; secrets are masked."""
    lines: list[str] = []
    for topic, settings in itertools.groupby(SETTINGS, key=lambda setting: setting.topic):
        lines += ["", f"# {topic}"]
        for setting in settings:
            if setting.write_only:
                continue
            value = getattr(config, setting.name)
            source = str(config.source_of(setting.name)).replace("\n", " ")
            masked = MASK if setting.secret and value is not None else setting.kind.masked(value)
            toml = setting.kind.to_toml(masked)
            if masked != value:
                # As a comment: given back, it would be tried as the password.
                lines.append(f"# {setting.name} = {toml}  # {source}; masked")
            elif toml is None:
                lines.append(f"# {setting.name}: {setting.show(value)}  # {source}; TOML cannot say it")
            else:
                lines.append(f"{setting.name} = {toml}  # {source}")
    return "\n".join(lines[1:]) + "\n"
