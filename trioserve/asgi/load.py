"""Finding the app: from `module:attribute` to an ASGI callable.

Called by the worker before it listens (`load_app`, then `wrap_app`), and by `serve()` (`wrap_app` only). All
of it is synchronous and runs the app's own import code. A path that leads nowhere raises `AppNotFound`, which
says what was looked for, where, and what is there; an exception of the app's code is its `__cause__`, with
only the app's frames in the traceback.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import math
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Literal, cast

from trioserve.asgi.wsgi import WSGIApp
from trioserve.config import Config
from trioserve.errors import AppNotFound
from trioserve.structure.context import ASGIApp, Receive, Scope, Send

Mode = Literal["asgi", "wsgi"]

_DEFAULT_ATTRIBUTE = "app"

# Apps of the package itself, such as that of `trioserve static`.
_OUR_OWN = "trioserve."


@dataclass(frozen=True, slots=True)
class LoadedApp:
    """An app as its author wrote it, how it wants to be called, and the path it was found under."""

    app: Any
    mode: Mode
    name: str


def load_app(path: str, *, factory: bool = False) -> LoadedApp:
    """Import the app that `path` names.

    Args:
        path: `module`, `module:attribute.path`, `module:factory("literal", n=1)`, or the same with a file
            `x.py` for the module; `asgi:` or `wsgi:` in front says how to call it. The working directory, or
            the file's, becomes `sys.path[0]`.
        factory: call what the path names, without arguments, for the app.
    """
    mode, place, expression = _split(path)
    module = _import(path, place)
    app = _evaluate(path, module, expression)
    if factory:
        app = _call(path, app, (), {})
        if inspect.iscoroutine(app):
            app.close()
            raise _failed(path, "the factory is async, but the app must exist before trio runs")
    if not callable(app):
        raise _failed(path, f"{expression} is {_a(type(app).__name__)}, which cannot be called")
    return LoadedApp(app, mode or _detect(path, app), path)


def wrap_app(app: Any, mode: Mode | None, config: Config) -> ASGIApp:
    """The ASGI 3 callable for an app; an ASGI 3 app is returned as it is, so that it costs nothing more."""
    if (mode or detect_mode(app)) == "wsgi":
        return WSGIApp(app, config.wsgi_max_body_size, config.wsgi_threads)
    return _from_asgi2(app) if _is_asgi2(app) else cast("ASGIApp", app)


# -- the path -----------------------------------------------------------------------------------------------


def _split(path: str) -> tuple[Mode | None, str, str]:
    head, _, call = path.partition("(")  # colons inside a call's arguments are not ours
    parts = head.split(":")
    mode: Mode | None = None
    # As in hypercorn, "wsgi:app" is the attribute app of a module called wsgi.
    if len(parts) == 3 and parts[0] in ("asgi", "wsgi"):
        mode = cast("Mode", parts.pop(0))
    if len(parts) > 2:
        raise _failed(path, "expected module:attribute, optionally with asgi: or wsgi: in front")
    place = parts[0]
    expression = parts[1] + path[len(head) :] if len(parts) == 2 else _DEFAULT_ATTRIBUTE
    if not place.strip() or not expression.strip() or (call and len(parts) == 1):
        raise _failed(path, "expected module:attribute, for example myapp.main:app")
    return mode, place, expression.strip()


# -- the module ---------------------------------------------------------------------------------------------


def code_directories(path: str) -> list[Path]:
    """Where the code of the app that `path` names is expected, without importing any of it.

    The directory that becomes `sys.path[0]`, and that of its package if it is installed from elsewhere.
    """
    _, place, _ = _split(path)
    location = _locate(path, place)
    if place.startswith(_OUR_OWN):
        return [Path(__file__).resolve().parent.parent]
    found = [location.parent]
    if location.suffix != ".py":
        package = location.name.partition(".")[0]
        spec = PathFinder.find_spec(package, [str(location.parent), *sys.path])
        # A plain module does not say how much of its directory is the app's.
        homes = [Path(home).resolve() for home in (spec and spec.submodule_search_locations) or ()]
        found += [home for home in homes if not home.is_relative_to(location.parent)]
    return found


def _import(path: str, place: str) -> ModuleType:
    location = _locate(path, place)
    directory = str(location.parent)
    is_file = location.suffix == ".py"
    name = location.stem if is_file else location.name
    if is_file and not location.is_file():
        raise _failed(path, f"there is no file {location}{_nearest_module(location.parent, name)}")
    # An app of our own needs nothing from the working directory, which may be one of files to serve.
    if sys.path[:1] != [directory] and not name.startswith(_OUR_OWN):
        sys.path.insert(0, directory)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise _import_failed(path, name, directory, error) from error
    if is_file and not _is_at(module, location):
        where = getattr(module, "__file__", None) or "built into Python"
        raise _failed(
            path, f"another module called {name!r} was imported before ({where}): rename {location}"
        )
    return module


def _locate(path: str, place: str) -> Path:
    try:
        return Path(place).resolve()
    except OSError as error:
        raise _failed(path, f"the working directory is gone: {error.strerror}") from None


def _import_failed(path: str, name: str, directory: str, error: Exception) -> AppNotFound:
    own = _own_frames(error.__traceback__)
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if own is None and missing is not None and (name == missing or name.startswith(f"{missing}.")):
        # The app's code did not get to run: it is the app itself that is missing.
        error.__traceback__ = None
        folder = Path(directory, *name.split(".")[:-1]) if name != missing or "." in name else Path(directory)
        return _failed(
            path,
            f"there is no module {missing!r} in {directory}, nor elsewhere on sys.path"
            f"{_dotted_attribute(path, missing) or _nearest_module(folder, name.rpartition('.')[2])}",
        )
    error.__traceback__ = own
    return _failed(path, f"importing {name!r} failed at {_spot(error)}: {_summary(error)}")


def _dotted_attribute(path: str, missing: str) -> str:
    """The hint for a dot where the colon should be, as in "myapp.main.app"; "" if it is not that."""
    # The importing has got as far as to the module above the missing one.
    parent, _, attribute = missing.rpartition(".")
    there = vars(sys.modules[parent]) if ":" not in path and parent in sys.modules else {}
    is_package = "__path__" in there
    if attribute not in there and (is_package or _DEFAULT_ATTRIBUTE not in there):
        return ""
    # In front there may be a directory, and behind it attributes of the attribute.
    before, found, after = path.rpartition(f"{parent}.{attribute}")
    wanted = f"{attribute}{after}" if attribute in there else _DEFAULT_ATTRIBUTE
    return f"; did you mean {f'{before}{parent}:{wanted}'!r}?" if found else ""


def _nearest_module(folder: Path, name: str) -> str:
    if not folder.is_dir():
        return ""
    found = {entry.stem for entry in folder.glob("*.py")}
    found |= {entry.parent.name for entry in folder.glob("*/__init__.py")}
    return _what_is_there("modules", sorted(found - {"__init__"}), name)


def _is_at(module: ModuleType, location: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == location


# -- the attribute ------------------------------------------------------------------------------------------


def _evaluate(path: str, module: ModuleType, expression: str) -> Any:
    """Follow names, attributes, and calls with literal arguments; hypercorn evaluates any Python here."""
    try:
        tree = ast.parse(expression, mode="eval").body
    except SyntaxError as error:
        raise _failed(path, f"{expression!r} is not an attribute: {error.msg}") from None
    return _follow(path, module, tree)


def _follow(path: str, module: ModuleType, node: ast.expr) -> Any:
    match node:
        case ast.Name(id=name):
            return _attribute(path, module, f"module {module.__name__!r} ({_file_of(module)})", name)
        case ast.Attribute(value=inner, attr=name):
            return _attribute(path, _follow(path, module, inner), repr(ast.unparse(inner)), name)
        case ast.Call(func=inner, args=args, keywords=keywords):
            callee = _follow(path, module, inner)
            positional = tuple(_literal(path, arg) for arg in args)
            named = {keyword.arg: _literal(path, keyword.value) for keyword in keywords if keyword.arg}
            if len(named) != len(keywords):
                raise _unsupported(path, node)
            return _call(path, callee, positional, named)
        case _:
            raise _unsupported(path, node)


def _attribute(path: str, owner: Any, described: str, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        public = sorted(
            key for key in dir(owner) if not key.startswith("_") and callable(getattr(owner, key, None))
        )
        if isinstance(owner, ModuleType):
            # What it merely imported is seldom the app: show what it defines, and objects of any origin.
            public = [key for key in public if _defined_in(owner, getattr(owner, key))] or public
        there = _what_is_there("callables", public, name)
        raise _failed(path, f"{described} has no attribute {name!r}{there}") from None


def _defined_in(module: ModuleType, value: Any) -> bool:
    if not inspect.isclass(value) and not inspect.isroutine(value):
        return True
    return getattr(value, "__module__", None) == module.__name__


def _literal(path: str, node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise _unsupported(path, node) from None


def _unsupported(path: str, node: ast.expr) -> AppNotFound:
    return _failed(
        path,
        f"{ast.unparse(node)!r} is neither an attribute path nor a call with literal arguments; "
        "put it into a module and name the result",
    )


def _call(path: str, callee: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not callable(callee):
        raise _failed(path, f"the factory is {_a(type(callee).__name__)}, which cannot be called")
    try:
        return callee(*args, **kwargs)
    except Exception as error:
        own = _own_frames(error.__traceback__)
        if own is None and isinstance(error, TypeError):
            raise _failed(path, f"the factory cannot be called like this: {error}") from None
        error.__traceback__ = own
        raise _failed(path, f"the factory failed at {_spot(error)}: {_summary(error)}") from error


# -- how to call it -----------------------------------------------------------------------------------------


def detect_mode(app: Any) -> Mode:
    """Whether an app wants to be called as ASGI or as WSGI; `AppNotFound` when it does not show."""
    return _detect(_describe(app), app)


def _detect(path: str, app: Any) -> Mode:
    # By what the app takes: being a coroutine function alone would miss partials and decorated apps.
    required, accepted = _positional(app)
    if _is_async(app):
        if required <= 3 <= accepted:
            return "asgi"
        if accepted == 0:
            raise _unclear(path, "it is async and takes no arguments; a factory has to be a plain function")
    elif _is_asgi2(app) or _is_asgi3_in_disguise(app, required):
        return "asgi"
    elif required == 2:
        return "wsgi"
    elif required == 0 and accepted < 2:
        raise _unclear(path, "it needs no arguments: if it makes the app, give --factory")
    raise _unclear(path, "an ASGI app takes scope, receive and send, a WSGI app environ and start_response")


def _unclear(path: str, why: str) -> AppNotFound:
    return AppNotFound(
        f"cannot tell whether {path!r} is an ASGI or a WSGI app: {why}. "
        "Say which with asgi: or wsgi: in front, as in asgi:myapp.main:app"
    )


def _is_async(app: Any) -> bool:
    app = _unwrap(app)
    if inspect.isclass(app):
        return False
    return inspect.iscoroutinefunction(app) or _has_async_call(app)


def _has_async_call(app: Any) -> bool:
    return inspect.iscoroutinefunction(getattr(app, "__call__", None))  # noqa: B004 (its kind)


def _is_asgi2(app: Any) -> bool:
    """ASGI 2: called with the scope alone, for an instance that is awaited with receive and send."""
    if _is_async(app):
        return False
    target = _unwrap(app)
    required, _ = _positional(app)
    if inspect.isclass(target):
        return required == 1 and _has_async_call(target)
    return required == 1 and _parameters(app)[0].name == "scope"


def _is_asgi3_in_disguise(app: Any, required: int) -> bool:
    """A plain function that returns a coroutine, or a class whose instances are awaited."""
    return required == 3 and (not inspect.isclass(app) or hasattr(app, "__await__"))


def _from_asgi2(app: Callable[[Scope], Callable[[Receive, Send], Any]]) -> ASGIApp:
    async def asgi3(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope)(receive, send)

    return asgi3


def _unwrap(app: Any) -> Any:
    while isinstance(app, functools.partial):
        app = app.func
    return app


def _parameters(app: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(app).parameters.values())
    except (TypeError, ValueError):
        # A callable written in C may not tell: it might take anything.
        return [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]


def _positional(app: Any) -> tuple[int, float]:
    """How many positional arguments the app needs, and how many it takes."""
    required, accepted = 0, 0.0
    for parameter in _parameters(app):
        if parameter.kind is parameter.VAR_POSITIONAL:
            accepted = math.inf
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            accepted += 1
            required += parameter.default is parameter.empty
    return required, accepted


# -- words for messages -------------------------------------------------------------------------------------


def _own_frames(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without this file and the import machinery: what is left is the app's."""
    frames = []
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file != __file__ and file != importlib.__file__ and not file.startswith("<frozen importlib"):
            frames.append(trace)
        trace = trace.tb_next
    own: TracebackType | None = None
    for entry in reversed(frames):
        own = TracebackType(own, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return own


def _spot(error: BaseException) -> str:
    """File and line of the app's innermost frame, of its own code rather than a library's if possible."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    spots = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    libraries = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib"))
    own = [spot for spot in spots if not spot[0].startswith((*libraries, "<frozen"))]
    file, line = (own or spots or [("an unknown place", 0)])[-1]
    return f"{file}:{line}"


def _summary(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _failed(path: str, why: str) -> AppNotFound:
    return AppNotFound(f"cannot load {path!r}: {why}")


def _what_is_there(noun: str, names: list[str], wanted: str) -> str:
    near = get_close_matches(wanted, names, len(names) or 1, 0.5)
    listed = [*near, *(name for name in names if name not in near)]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} ({noun} there: {', '.join(listed[:12]) or 'none'}{', …' if len(listed) > 12 else ''})"


def _file_of(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or "no file"


def _describe(app: Any) -> str:
    return getattr(app, "__qualname__", None) or repr(app)


def _a(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
