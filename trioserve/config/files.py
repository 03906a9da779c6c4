"""Reading configuration files and objects: from TOML, Python files and Python modules to names and values.

Called by `Config`'s loaders. Every failure is a `ConfigError` that names the file, and the line where there
is one. Which names of a Python file count: the settings, and any other plain lower-case value, which is then
an unknown setting. Names that start with `_`, in capitals, and modules, classes, functions and other objects
are helpers of the file.
"""

from __future__ import annotations

import codecs
import importlib
import importlib.util
import os
import sys
import tomllib
import traceback
from pathlib import Path
from typing import Any

import hypercorn.config

from trioserve.config.settings import BY_NAME
from trioserve.errors import ConfigError

FilePath = bytes | str | os.PathLike[str] | os.PathLike[bytes]

# What editors put in front of a text, and a parser takes for a part of it.
_MARKS = {codecs.BOM_UTF8: "UTF-8", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}

_PLAIN = (bool, int, float, str, bytes, list, tuple, dict, set, type(None))


def read_toml(filename: FilePath) -> dict[str, Any]:
    """The top level of a TOML file."""
    path = os.fsdecode(filename)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            raise ConfigError(
                f"{path}: begins with the byte order mark of {encoding} ({mark.hex(' ')}), and TOML has none: save the "
                "file as UTF-8 without one"
            )
    try:
        found = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        hint = f"; for a Python file give file:{path}" if path.endswith(".py") else ""
        raise ConfigError(f"{path}: not valid TOML: {error}{hint}") from error
    for name, value in found.items():
        if name not in BY_NAME and (misplaced := _find_settings(name, value)):
            table, names = misplaced
            raise ConfigError(
                f"{path}: [{table}] with {', '.join(names)}: settings stand at the top level of the file, in no table: "
                f"put them there, and remove [{table}]"
            )
    return found


def _find_settings(table: str, value: object) -> tuple[str, list[str]] | None:
    """The first table that has settings in it, and their names: this one, or one below it."""
    if not isinstance(value, dict):
        return None
    if names := [name for name in value if name in BY_NAME]:
        return table, names
    below = (_find_settings(f"{table}.{name}", inner) for name, inner in value.items())
    return next(filter(None, below), None)


def run_pyfile(filename: FilePath) -> object:
    """Run a Python file and return its module, which is not put into `sys.modules`."""
    path = os.fsdecode(filename)
    spec = importlib.util.spec_from_loader(
        "trioserve_config_file", importlib.machinery.SourceFileLoader("trioserve_config_file", path)
    )
    if spec is None or spec.loader is None:  # pragma: no cover (a loader was given)
        raise ConfigError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except OSError as error:
        if error.filename != path:
            raise _raised(path, error) from error
        raise _unreadable(path, error) from error
    except Exception as error:
        raise _raised(path, error) from error
    return module


def forget_module(name: str) -> None:
    """Have `import_object` read the module of this "module" or "module.object" again; what it imports is not."""
    rest = ""
    while name and name not in sys.modules:
        name, _, rest = name.rpartition(".")
    module = sys.modules.get(name)
    # A package whose module has yet to be imported is not what was read.
    if not rest or not hasattr(module, "__path__") or hasattr(module, rest):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
    if "" not in sys.path and (here := str(Path.cwd())) in sys.path[1:]:
        # Behind the directory of another release, where that was the working directory meanwhile.
        sys.path.remove(here)


def import_object(name: str) -> object:
    """What "module" or "module.object" names; the working directory is searched too, for console scripts."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    parent, _, attribute = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise _raised(f"python:{name}", error) from error
        missing = error.name
    except Exception as error:
        raise _raised(f"python:{name}", error) from error
    if not parent or missing != name:
        raise ConfigError(f"python:{name}: no module named {missing!r} in {here} or elsewhere on sys.path")
    module = import_object(parent)
    if not hasattr(module, attribute):
        raise ConfigError(f"python:{name}: module {parent!r} has no attribute {attribute!r}")
    found: object = getattr(module, attribute)
    return found


def plain_attributes(found: object) -> dict[str, Any]:
    """The settings of a module or object, and the plain values that look like one."""
    attributes = {name: getattr(found, name) for name in dir(found) if not name.startswith("_")}
    return {
        name: value for name, value in attributes.items() if name in BY_NAME or is_plain_setting(name, value)
    }


def is_plain_setting(name: str, value: object) -> bool:
    """Whether a name and its value can only be meant as a setting."""
    return not name.startswith("_") and name == name.lower() and type(value) in _PLAIN


def shouted_settings(found: object) -> list[tuple[str, str]]:
    """Names in capitals that would be settings in lower case, and those settings."""
    return [(name, name.lower()) for name in dir(found) if name != name.lower() and name.lower() in BY_NAME]


def given_to_hypercorn(config: hypercorn.config.Config) -> set[str]:
    """The public names that the owner of a hypercorn Config has set, on it or in a subclass."""
    base = hypercorn.config.Config
    names = set(vars(config))
    for owner in type(config).__mro__:
        if not issubclass(base, owner):
            names |= {
                name
                for name, value in vars(owner).items()
                if name in BY_NAME or is_plain_setting(name, value)
            }
    # Properties keep what was set under `_name`.
    properties = {f"_{name}": name for name, value in vars(base).items() if isinstance(value, property)}
    return {properties.get(name, name) for name in names} - {"log"} - {n for n in names if n.startswith("_")}


def _unreadable(path: str, error: OSError) -> ConfigError:
    return ConfigError(f"{path}: cannot read the configuration file: {error.strerror or error}")


def _raised(label: str, error: Exception) -> ConfigError:
    if isinstance(error, SyntaxError):
        return ConfigError(f"{label}: {error.filename}:{error.lineno}: {error.msg}")
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    return ConfigError(f"{label}: {where}{type(error).__name__}: {error}")
