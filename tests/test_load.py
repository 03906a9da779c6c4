"""Finding the app, telling ASGI from WSGI, and WSGI apps driven through ASGI's callables."""

from __future__ import annotations

import contextvars
import functools
import io
import logging
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flask
import pytest
import trio
import trio.testing
from starlette.applications import Starlette

from trioserve.asgi import wsgi
from trioserve.asgi.load import LoadedApp, detect_mode, load_app, wrap_app
from trioserve.asgi.wsgi import WSGIApp, build_environ
from trioserve.config import Config
from trioserve.errors import AppNotFound, ClientDisconnected, UnexpectedMessage

from .threads import no_more_threads

Message = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory for app modules, which leaves nothing imported and no path behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


APP = "async def app(scope, receive, send): ...\n"


def write(folder: Path, name: str, text: str = APP) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_a_working_directory_that_is_gone_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = folder / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(
        AppNotFound, match=r"^cannot load 'main_mod:app': the working directory is gone: No such file"
    ):
        load_app("main_mod:app")


# -- paths --------------------------------------------------------------------------------------------------

MAIN = """
from pathlib import Path
class Box: pass
box = Box(); box.inner = Box()
async def app(scope, receive, send): ...
async def other(scope, receive, send): ...
def wsgi_app(environ, start_response): return []
box.inner.app = other
def create_app(name="app", *, which=None):
    return {"app": app, "other": other}[which or name]
def make_box(): return box
registry = {"other": other}
"""


@pytest.mark.parametrize(
    ("path", "name", "mode"),
    [
        ("main_mod", "app", "asgi"),
        ("main_mod:app", "app", "asgi"),
        ("main_mod: other ", "other", "asgi"),
        ("main_mod:box.inner.app", "other", "asgi"),
        ("main_mod:create_app()", "app", "asgi"),
        ("main_mod:create_app('other')", "other", "asgi"),
        ("main_mod:create_app(which='other')", "other", "asgi"),
        ("asgi:main_mod:create_app('other')", "other", "asgi"),
        ("main_mod:make_box().inner.app", "other", "asgi"),
        ("main_mod:wsgi_app", "wsgi_app", "wsgi"),
        ("wsgi:main_mod:wsgi_app", "wsgi_app", "wsgi"),
        ("asgi:main_mod:wsgi_app", "wsgi_app", "asgi"),
        ("main_mod.py:app", "app", "asgi"),
        ("./main_mod.py", "app", "asgi"),
        ("sub/deep_mod:app", "app", "asgi"),
        ("sub/deep_mod.py:app", "app", "asgi"),
        ("sub/pkg_x.inner_x:app", "app", "asgi"),
        ("sub/pkg_x", "app", "asgi"),
    ],
)
def test_an_app_is_found(folder: Path, path: str, name: str, mode: str) -> None:
    write(folder, "main_mod.py", MAIN)
    write(folder, "sub/deep_mod.py")
    write(folder, "sub/pkg_x/__init__.py")
    write(folder, "sub/pkg_x/inner_x.py")
    loaded = load_app(path)
    assert (loaded.app.__name__, loaded.mode, loaded.name) == (name, mode, path)
    assert sys.path[0] == str(folder / "sub" if path.startswith("sub") else folder)


def test_the_conventional_module_names_of_frameworks_are_no_prefixes(folder: Path) -> None:
    write(folder, "asgi.py", "async def application(scope, receive, send): ...\n")
    write(folder, "wsgi.py", "def application(environ, start_response): return []\n")
    assert load_app("asgi:application").mode == "asgi"
    assert load_app("wsgi:application").mode == "wsgi"
    assert load_app("wsgi:wsgi:application").mode == "wsgi"


def test_an_absolute_file_is_found_from_anywhere(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = write(tmp_path_factory.mktemp("elsewhere"), "far_mod.py")
    assert load_app(f"{file}:app").mode == "asgi"


def test_the_search_path_does_not_grow(folder: Path) -> None:
    write(folder, "main_mod.py", MAIN)
    load_app("main_mod")
    before = list(sys.path)
    load_app("main_mod:other")
    assert sys.path == before


def test_a_factory_is_called(folder: Path) -> None:
    write(folder, "main_mod.py", MAIN)
    assert load_app("main_mod:create_app", factory=True).app.__name__ == "app"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("", "expected module:attribute, for example"),
        (":app", "expected module:attribute, for example"),
        ("main_mod:", "expected module:attribute, for example"),
        ("create_app()", "expected module:attribute, for example"),
        ("http:main_mod:app", "optionally with asgi: or wsgi: in front"),
        ("mian_mod:app",
         "in {folder}, nor elsewhere on sys.path; did you mean 'main_mod'? (modules there: main_mod, pkg_x)"),
        ("pkg_x.inner:app", "nor elsewhere on sys.path; did you mean 'inner_x'?"),
        ("main_mod.inner:app", "there is no module 'main_mod.inner'"),
        ("nowhere_pkg.inner:app", "there is no module 'nowhere_pkg' in {folder}"),
        ("main_mod.other", "on sys.path; did you mean 'main_mod:other'?"),
        ("./main_mod.box.inner", "on sys.path; did you mean './main_mod:box.inner'?"),
        ("main_mod.zzzz", "on sys.path; did you mean 'main_mod:app'?"),
        ("pkg_x.inner_x.app", "on sys.path; did you mean 'pkg_x.inner_x:app'?"),
        ("pkg_x.inner", "on sys.path; did you mean 'inner_x'? (modules there: inner_x, empty)"),
        ("mian_mod.py:app", "there is no file {folder}/mian_mod.py; did you mean 'main_mod'?"),
        ("missing/mod_x:app", "there is no module 'mod_x' in {folder}/missing, nor elsewhere on sys.path"),
        ("main_mod:ap",
         "({folder}/main_mod.py) has no attribute 'ap'; did you mean 'app'? (callables there: app, "),
        ("main_mod:zzzz", "'zzzz' (callables there: Box, app, create_app, make_box, other, wsgi_app)"),
        ("main_mod:box.outer.app", "'box' has no attribute 'outer'"),
        ("main_mod:box", "box is a Box, which cannot be called"),
        ("main_mod:registry['other']", "\"registry['other']\" is neither an attribute path nor"),
        ("main_mod:create_app(app)", "'app' is neither"),
        ("main_mod:create_app(**{})", "is neither"),
        ("main_mod:app app", "is not an attribute"),
        ("main_mod:box()", "the factory is a Box, which cannot be called"),
        ("main_mod:create_app(1, 2, 3)", "the factory cannot be called like this: create_app() takes"),
        ("main_mod:create_app('nope')", "the factory failed at {folder}/main_mod.py:10: KeyError: 'nope'"),
        ("empty_mod:app", "has no attribute 'app' (callables there: none)"),
        ("json.py:app", "there is no file {folder}/json.py"),
    ],
)  # fmt: skip
def test_a_path_to_nowhere_says_what_was_looked_for_and_what_is_there(
    folder: Path, path: str, text: str
) -> None:
    write(folder, "main_mod.py", MAIN)
    write(folder, "pkg_x/__init__.py")
    write(folder, "pkg_x/inner_x.py")
    write(folder, "pkg_x/empty.py")
    if "empty" in path:
        write(folder, "empty_mod.py", "")
    with pytest.raises(AppNotFound) as caught:
        load_app(path)
    assert str(caught.value).startswith(f"cannot load {path!r}: ")
    assert text.format(folder=folder) in str(caught.value)


def test_a_file_that_is_shadowed_by_an_imported_module_is_refused(folder: Path) -> None:
    file = write(folder, "json.py")
    with pytest.raises(
        AppNotFound, match=f"another module called 'json' was imported before .*: rename {file}"
    ):
        load_app("json.py:app")


def test_an_async_factory_is_refused(folder: Path) -> None:
    write(folder, "main_mod.py", "async def make(): ...\n")
    with pytest.raises(AppNotFound, match="the factory is async"):
        load_app("main_mod:make", factory=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nowhere_at_all\n", "failing.py:1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("import failing.inner\n", "failing.py:1: ModuleNotFoundError: No module named 'failing.inner'"),
        ("x = 1\ndef f(): raise ImportError\nf()\n", "failing.py:2: ImportError"),
        ("import json\njson.loads('{')\n", "failing.py:2: JSONDecodeError"),
        ("def f(:\n", "failing.py:1: SyntaxError"),
        ("from helper_mod import boom\nboom()\n", "helper_mod.py:2: ZeroDivisionError"),
    ],
)
def test_an_import_that_fails_inside_names_the_innermost_line_of_the_app(
    folder: Path, text: str, message: str
) -> None:
    write(folder, "failing.py", text)
    write(folder, "helper_mod.py", "def boom():\n    1 / 0\n")
    with pytest.raises(AppNotFound) as caught:
        load_app("failing:app")
    assert f"importing 'failing' failed at {folder}/{message}" in str(caught.value)
    files = {frame.filename for frame in traceback.extract_tb(caught.value.__cause__.__traceback__)}
    assert not any("importlib" in file or "asgi/load.py" in file for file in files)


@pytest.mark.parametrize("ending", ["SystemExit(3)", "KeyboardInterrupt"])
def test_what_ends_the_process_goes_through(folder: Path, ending: str) -> None:
    write(folder, "ending_mod.py", f"raise {ending}\n")
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        load_app("ending_mod")


# -- modes --------------------------------------------------------------------------------------------------


async def asgi3(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "called", "with": scope})


async def asgi3_any(*args: Any) -> None: ...


async def asgi3_more(scope: Any, receive: Any, send: Any, extra: Any = None) -> None: ...


def returns_coroutine(scope: Any, receive: Any, send: Any) -> Any:
    return asgi3(scope, receive, send)


@functools.wraps(asgi3)
def decorated(*args: Any, **kwargs: Any) -> Any:
    return asgi3(*args, **kwargs)


class Asgi3Object:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...


class Asgi3Awaitable:
    def __init__(self, scope: Any, receive: Any, send: Any) -> None: ...

    def __await__(self) -> Any:
        yield


class Asgi2Class:
    def __init__(self, scope: Any) -> None:
        self.scope = scope

    async def __call__(self, receive: Any, send: Any) -> None:
        await send({"type": "called", "with": self.scope})


def asgi2_function(scope: Any) -> Any:
    return Asgi2Class(scope)


def wsgi_function(environ: Any, start_response: Any) -> Any:
    return []


class WsgiObject:
    def __call__(self, environ: Any, start_response: Any) -> Any: ...


class WsgiClass:
    def __init__(self, environ: Any, start_response: Any) -> None: ...


def with_extra(extra: Any, environ: Any, start_response: Any) -> Any: ...


@pytest.mark.parametrize(
    ("app", "mode"),
    [
        (asgi3, "asgi"),
        (asgi3_any, "asgi"),
        (asgi3_more, "asgi"),
        (returns_coroutine, "asgi"),
        (decorated, "asgi"),
        (Asgi3Object(), "asgi"),
        (Asgi3Object().__call__, "asgi"),
        (Asgi3Awaitable, "asgi"),
        (functools.partial(asgi3_more, extra=1), "asgi"),
        (functools.partial(functools.partial(Asgi3Object())), "asgi"),
        (Starlette(), "asgi"),
        (Asgi2Class, "asgi"),
        (asgi2_function, "asgi"),
        (wsgi_function, "wsgi"),
        (WsgiObject(), "wsgi"),
        (WsgiClass, "wsgi"),
        (functools.partial(with_extra, 1), "wsgi"),
        (flask.Flask("x"), "wsgi"),
    ],
)
def test_the_mode_is_told_from_what_the_app_takes(app: Any, mode: str) -> None:
    assert detect_mode(app) == mode


async def async_no_arguments() -> None: ...


async def async_two_arguments(a: Any, b: Any) -> None: ...


def factory() -> Any: ...


def optional_factory(settings: Any = None) -> Any: ...


def anything(*args: Any) -> Any: ...


def one_argument(path: Any) -> Any: ...


class NotAwaitable:
    def __init__(self, scope: Any, receive: Any, send: Any) -> None: ...


@pytest.mark.parametrize(
    ("app", "text"),
    [
        (async_no_arguments, "a factory has to be a plain function"),
        (
            async_two_arguments,
            "an ASGI app takes scope, receive and send, a WSGI app environ and start_response",
        ),
        (factory, "if it makes the app, give --factory"),
        (optional_factory, "if it makes the app, give --factory"),
        (Asgi3Object, "if it makes the app, give --factory"),
        (anything, "an ASGI app takes"),
        (one_argument, "an ASGI app takes"),
        (NotAwaitable, "an ASGI app takes"),
        (dict, "an ASGI app takes"),
        (object(), "an ASGI app takes"),
    ],
)
def test_an_app_that_could_be_either_is_asked_about(app: Any, text: str) -> None:
    with pytest.raises(AppNotFound) as caught:
        detect_mode(app)
    assert str(caught.value).startswith("cannot tell whether ")
    assert text in str(caught.value)
    assert str(caught.value).endswith("as in asgi:myapp.main:app")


def test_an_asgi3_app_is_not_wrapped() -> None:
    assert wrap_app(asgi3, None, Config()) is asgi3
    assert wrap_app(returns_coroutine, "asgi", Config()) is returns_coroutine


@pytest.mark.parametrize("app", [Asgi2Class, asgi2_function])
async def test_an_asgi2_app_is_called_with_the_scope_first(app: Any) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await wrap_app(app, None, Config())({"type": "x"}, None, send)
    assert sent == [{"type": "called", "with": {"type": "x"}}]


def test_a_wsgi_app_gets_the_configured_limits() -> None:
    wrapped = wrap_app(wsgi_function, None, Config.from_mapping(wsgi_threads=3, wsgi_max_body_size=5))
    assert isinstance(wrapped, WSGIApp)
    assert wrapped.max_body_size == 5
    assert repr(wrapped).endswith(", 0 of 3 threads busy>")


def test_a_loaded_app_is_a_plain_record() -> None:
    assert LoadedApp(asgi3, "asgi", "x") == LoadedApp(asgi3, "asgi", "x")


# -- WSGI ---------------------------------------------------------------------------------------------------


def scope_of(method: str = "GET", path: str = "/", **more: Any) -> Message:
    return {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "client": ("192.0.2.1", 5000),
        "server": ("127.0.0.1", 8000),
        **more,
    }


class Exchange:
    """The two callables of a request, with its body given and its response kept."""

    def __init__(self, *body: bytes, disconnected: bool = False) -> None:
        self._incoming = [
            {"type": "http.request", "body": part, "more_body": index < len(body) - 1 or disconnected}
            for index, part in enumerate(body or (b"",))
        ]
        if disconnected:
            self._incoming.append({"type": "http.disconnect"})
        self.sent: list[Message] = []
        self.received = 0
        self.task: Any = None

    async def receive(self) -> Message:
        self.received += 1
        return self._incoming.pop(0)

    async def send(self, message: Message) -> None:
        await trio.lowlevel.checkpoint()
        self.task = trio.lowlevel.current_task()
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def body(self) -> bytes:
        assert [message["type"] for message in self.sent[1:]] == ["http.response.body"] * (len(self.sent) - 1)
        assert [message.get("more_body", False) for message in self.sent[1:]] == [True] * (
            len(self.sent) - 2
        ) + [False]
        return b"".join(message["body"] for message in self.sent[1:])


async def call(app: Any, scope: Message | None = None, *body: bytes, **options: Any) -> Exchange:
    exchange = Exchange(*body)
    await WSGIApp(app, options.get("limit", 100), options.get("threads", 5))(
        scope or scope_of(), exchange.receive, exchange.send
    )
    return exchange


def flask_app() -> flask.Flask:
    app = flask.Flask("tests")

    @app.route("/hello")
    def hello() -> str:
        return "hello"

    @app.route("/empty")
    def empty() -> tuple[str, int]:
        return "", 204

    @app.route("/echo/<path:rest>", methods=["POST"])
    def echo(rest: str) -> flask.Response:
        request = flask.request
        return flask.jsonify(
            rest=rest,
            body=request.get_data(as_text=True),
            args=request.args,
            cookies=request.cookies,
            url=request.url,
        )

    @app.route("/stream")
    def stream() -> flask.Response:
        return flask.Response(part for part in ("a", "", "b"))

    return app


async def test_flask_answers() -> None:
    exchange = await call(flask_app(), scope_of(path="/hello"))
    assert (exchange.status, exchange.body) == (200, b"hello")
    assert exchange.headers[b"content-length"] == b"5"
    assert len(exchange.sent) == 2, "the length is known, so the first part is the last"
    assert exchange.task is trio.lowlevel.current_task()


@pytest.mark.parametrize(
    ("method", "path", "status"), [("HEAD", "/hello", 200), ("GET", "/empty", 204), ("GET", "/no", 404)]
)
async def test_flask_answers_without_a_body_too(method: str, path: str, status: int) -> None:
    exchange = await call(flask_app(), scope_of(method, path))
    assert exchange.status == status
    assert (exchange.body == b"") == (status != 404)


async def test_flask_streams() -> None:
    exchange = await call(flask_app(), scope_of(path="/stream"))
    assert [message.get("body") for message in exchange.sent] == [None, b"a", b"b", b""]


@pytest.mark.parametrize("headers", [[(b"content-length", b"6")], [(b"transfer-encoding", b"chunked")]])
async def test_flask_reads_the_request(headers: list[tuple[bytes, bytes]]) -> None:
    scope = scope_of(
        "POST",
        "/api/echo/caf\xe9",
        root_path="/api",
        query_string=b"q=1%202",
        headers=[*headers, (b"host", b"example.org"), (b"cookie", b"a=1"), (b"cookie", b"b=2")],
    )
    exchange = await call(flask_app(), scope, b"ab", b"", b"cdef")
    assert flask.json.loads(exchange.body) == {
        "rest": "caf\xe9",
        "body": "abcdef",
        "args": {"q": "1 2"},
        "cookies": {"a": "1", "b": "2"},
        "url": "http://example.org/api/echo/caf\xe9?q=1%202",
    }


def shows_body(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [environ["wsgi.input"].read()]


async def test_a_body_may_be_as_large_as_the_limit() -> None:
    assert (await call(shows_body, None, b"12", b"345", limit=5)).body == b"12345"


@pytest.mark.parametrize(("headers", "reads"), [([(b"content-length", b"6")], 0), ([], 2)])
async def test_a_larger_body_is_413(headers: list[tuple[bytes, bytes]], reads: int) -> None:
    exchange = await call(shows_body, scope_of(headers=headers), b"12", b"3456", b"7", limit=5)
    assert (exchange.status, exchange.body, exchange.received) == (413, b"", reads)


async def test_a_client_that_leaves_within_its_body_never_reaches_the_app() -> None:
    exchange = Exchange(b"half", disconnected=True)
    with pytest.raises(ClientDisconnected):
        await WSGIApp(shows_body, 100, 1)(scope_of(), exchange.receive, exchange.send)
    assert exchange.sent == []


@pytest.mark.parametrize(
    ("root_path", "path", "status"),
    [("/api", "/api", 200), ("/api", "/api/x", 200), ("/api", "/apix", 404), ("/api", "/", 404)],
)
async def test_a_path_outside_root_path_is_404(root_path: str, path: str, status: int) -> None:
    assert (await call(shows_body, scope_of(path=path, root_path=root_path))).status == status


def test_environ_has_what_pep_3333_asks_for() -> None:
    scope = scope_of(
        path="/a b",
        query_string=b"x=\xff",
        scheme="https",
        headers=[
            (b"Content-Type", b"text/plain"),
            (b"x-one", b"1"),
            (b"x-one", b"2"),
            (b"x_one", b"spoof"),
            (b"proxy", b"evil"),
            (b"transfer-encoding", b"chunked"),
        ],
    )
    environ = build_environ(scope, b"body")
    assert environ is not None
    read = environ.pop("wsgi.input").read()
    assert (read, environ.pop("wsgi.errors")) == (b"body", sys.stderr)
    assert environ == {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": "/a b",
        "QUERY_STRING": "x=\xff",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "8000",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "192.0.2.1",
        "REMOTE_PORT": "5000",
        "CONTENT_TYPE": "text/plain",
        "CONTENT_LENGTH": "4",
        "HTTP_X_ONE": "1,2",
        "wsgi.version": (1, 0),
        "wsgi.file_wrapper": wsgi.FileWrapper,
        "wsgi.url_scheme": "https",
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"server": ("/run/x.sock", None), "client": None}, ("localhost", "80", None)),
        (
            {"server": ("/run/x.sock", None), "scheme": "https", "client": ("", None)},
            ("localhost", "443", ""),
        ),
        ({"server": None}, ("localhost", "80", "192.0.2.1")),
    ],
)
def test_environ_names_a_server_even_on_a_unix_socket(more: Message, expected: tuple[Any, ...]) -> None:
    environ = build_environ(scope_of(**more), b"")
    assert environ is not None
    assert (environ["SERVER_NAME"], environ["SERVER_PORT"], environ.get("REMOTE_ADDR")) == expected
    assert "CONTENT_LENGTH" not in environ


@pytest.mark.parametrize(
    ("path", "raw_path", "info"),
    [
        ("/\xe9", b"/%C3%A9", "/\xc3\xa9"),
        ("/\ufffd", b"/%FF", "/\xff"),
        ("/changed\ufffd", b"/%FF", "/changed\xef\xbf\xbd"),
        ("/\udcff", b"/x", "/?"),
    ],
)
def test_path_info_carries_the_bytes_of_the_path(path: str, raw_path: bytes, info: str) -> None:
    environ = build_environ(scope_of() | {"path": path, "raw_path": raw_path}, b"")
    assert environ is not None
    assert environ["PATH_INFO"] == info


class Body:
    """An iterable that says when it is closed."""

    def __init__(self, *parts: bytes | Exception) -> None:
        self.parts = parts
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        for part in self.parts:
            if isinstance(part, Exception):
                raise part
            yield part

    def close(self) -> None:
        self.closed += 1


def starting(body: Any, *start: Any) -> Callable[[Any, Any], Any]:
    def app(environ: Any, start_response: Any) -> Any:
        start_response(*(start or ("200 OK", [])))
        return body

    return app


async def test_the_iterable_is_closed_once() -> None:
    body = Body(b"a", b"b")
    assert (await call(starting(body))).body == b"ab"
    assert body.closed == 1


async def test_an_error_of_the_app_comes_out_as_it_was_raised() -> None:
    body = Body(b"a", ValueError("mine"))
    exchange = Exchange()
    with pytest.raises(ValueError, match="mine"):
        await WSGIApp(starting(body), 100, 1)(scope_of(), exchange.receive, exchange.send)
    assert body.closed == 1
    assert [message["type"] for message in exchange.sent] == ["http.response.start", "http.response.body"]


@pytest.mark.parametrize("parts", [[], [b"x"]])
async def test_a_body_without_start_response_is_misuse(parts: list[bytes]) -> None:
    with pytest.raises(UnexpectedMessage, match="without calling start_response"):
        await call(lambda environ, start_response: parts)


async def test_start_response_follows_pep_3333() -> None:
    def twice(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        start_response("200 OK", [])

    with pytest.raises(UnexpectedMessage, match="twice"):
        await call(twice)

    def replaced(environ: Any, start_response: Any) -> Any:
        start_response("200", [("X-A", "1")])
        try:
            raise ValueError
        except ValueError:
            start_response("500 Oops", [("X-B", "\xe9")], sys.exc_info())
        return [b"", b"sorry"]

    exchange = await call(replaced)
    assert (exchange.status, exchange.headers, exchange.body) == (500, {b"x-b": b"\xe9"}, b"sorry")

    def too_late(environ: Any, start_response: Any) -> Any:
        write = start_response("200 OK", [])
        write(b"written")
        try:
            raise ValueError("late")
        except ValueError:
            start_response("500 Oops", [], sys.exc_info())

    with pytest.raises(ValueError, match="late"):
        await call(too_late)


async def test_write_is_served() -> None:
    def app(environ: Any, start_response: Any) -> Any:
        write = start_response("200 OK", [])
        write(b"a")
        return [b"b"]

    assert (await call(app)).body == b"ab"


@pytest.mark.parametrize(
    ("length", "parts", "sent"),
    [
        ("3", [b"12", b"345", b"6"], [b"12", b"3"]),
        ("3", [b"12345"], [b"123"]),
        ("3", [b"123", b"", b"4"], [b"123"]),
        ("0", [b"1"], [b""]),
    ],
)
async def test_no_more_is_sent_than_the_content_length_says(
    caplog: pytest.LogCaptureFixture, length: str, parts: list[bytes], sent: list[bytes]
) -> None:
    # PEP 3333: the server stops iterating. A file that is downloaded while it grows is the usual case.
    body = Body(*parts, ValueError("asked for more"))
    exchange = await call(starting(body, "200 OK", [("Content-Length", length)]))
    assert [message["body"] for message in exchange.sent[1:]] == sent
    assert exchange.body == b"".join(sent)
    assert body.closed == 1
    assert f"more than its Content-Length of {length} bytes" in caplog.text


async def test_an_app_runs_to_its_end_behind_its_last_byte() -> None:
    ended = []

    def body() -> Iterator[bytes]:
        yield b"123"
        ended.append(True)

    assert (await call(starting(body(), "200 OK", [("Content-Length", "3")]))).body == b"123"
    assert ended


# -- WSGI: files --------------------------------------------------------------------------------------------

LARGE = bytes(range(256)) * 1024


def file_app(path: Path) -> flask.Flask:
    app = flask.Flask("tests")

    @app.route("/file")
    def file() -> flask.Response:
        return flask.send_file(path, conditional=True)

    return app


async def test_a_file_is_sent_in_large_parts_and_closed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(LARGE)
    with (tmp_path / "x").open("rb") as file:

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", [])
            return environ["wsgi.file_wrapper"](file, 4096)

        exchange = await call(app)
        assert file.closed
    assert exchange.body == LARGE
    assert len(exchange.sent) == 1 + len(LARGE) // 65536 + 1


async def test_flask_sends_files_this_way(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(LARGE)
    exchange = await call(file_app(tmp_path / "x"), scope_of(path="/file"))
    assert exchange.body == LARGE
    assert len(exchange.sent) == 1 + len(LARGE) // 65536


async def test_flask_sends_a_range_from_where_it_begins(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "x").write_bytes(LARGE)
    reads: list[int] = []
    monkeypatch.setattr(wsgi.FileWrapper, "seek", lambda self, at: reads.append(at) or self.file.seek(at))
    scope = scope_of(path="/file", headers=[(b"range", b"bytes=200001-200005")])
    exchange = await call(file_app(tmp_path / "x"), scope)
    assert (exchange.status, exchange.body) == (206, LARGE[200001:200006])
    assert reads == [200001]


async def test_a_pipe_is_read_as_the_app_says() -> None:
    # A larger read would wait for what comes later.
    reading, writing = os.pipe()
    os.write(writing, b"abcdef")
    os.close(writing)

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return environ["wsgi.file_wrapper"](os.fdopen(reading, "rb", buffering=0), 4)

    exchange = await call(app)
    assert [message["body"] for message in exchange.sent[1:]] == [b"abcd", b"ef", b""]


async def test_a_file_may_be_anything_that_reads() -> None:
    class Reads:
        def __init__(self) -> None:
            self.parts = [b"ab", b"c", b""]

        def read(self, size: int) -> bytes:
            assert size == 8192
            return self.parts.pop(0)

    for file, position in ((Reads(), None), (io.BytesIO(b"abc"), 0)):
        wrapper = wsgi.FileWrapper(file)
        assert (wrapper.seekable(), wrapper.tell()) == (position is not None, position)
        assert (await call(starting(wrapper))).body == b"abc"


async def test_a_failed_send_is_raised_in_the_app_and_comes_out() -> None:
    body = Body(b"a", b"b")

    async def send(message: Message) -> None:
        raise ClientDisconnected("gone")

    with pytest.raises(ClientDisconnected, match="gone"):
        await WSGIApp(starting(body), 100, 1)(scope_of(), Exchange().receive, send)
    assert body.closed == 1


async def test_context_variables_reach_the_thread() -> None:
    variable: contextvars.ContextVar[bytes] = contextvars.ContextVar("variable")
    variable.set(b"here")

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return [variable.get()]

    assert (await call(app)).body == b"here"


async def test_lifespan_and_websocket() -> None:
    app = WSGIApp(wsgi_function, 1, 1)
    events = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent: list[Message] = []

    async def receive() -> Message:
        return events.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "lifespan"}, receive, send)
    await app({"type": "websocket"}, receive, send)
    await app({"type": "something"}, receive, send)
    assert [message["type"] for message in sent] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
        "websocket.close",
    ]


# -- WSGI in threads ----------------------------------------------------------------------------------------


class Gate:
    """An app that says when it is running, and waits until it may go on."""

    def __init__(self) -> None:
        self.running: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.may_go_on = threading.Event()
        self.error: BaseException | None = None
        self.fails = False
        self.done = threading.Event()

    def __call__(self, environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        self.running.put(threading.get_ident())
        assert self.may_go_on.wait(30)
        try:
            if self.fails:
                raise ValueError("after the fact")
            yield b"x"
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.done.set()

    async def wait_running(self) -> int:
        return await trio.to_thread.run_sync(self.running.get)


async def wait_idle(app: WSGIApp) -> None:
    while app._limiter.borrowed_tokens:
        await trio.lowlevel.checkpoint()


async def test_no_more_requests_run_than_there_are_threads() -> None:
    gate = Gate()
    app = WSGIApp(gate, 100, 2)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            exchanges = [Exchange() for _ in range(4)]
            for exchange in exchanges:
                nursery.start_soon(app, scope_of(), exchange.receive, exchange.send)
            await gate.wait_running()
            await gate.wait_running()
            await trio.testing.wait_all_tasks_blocked()
            assert gate.running.empty()
            assert "2 of 2 threads busy" in repr(app)
            gate.may_go_on.set()
        await wait_idle(app)
    assert [exchange.body for exchange in exchanges] == [b"x"] * 4


async def test_a_thread_that_cannot_be_started_keeps_no_place() -> None:
    gate = Gate()
    app = WSGIApp(gate, 100, 1000)
    refused = trio.Event()

    async def request() -> None:
        exchange = Exchange()
        try:
            await app(scope_of(), exchange.receive, exchange.send)
        except RuntimeError:
            refused.set()

    with trio.fail_after(30), no_more_threads():
        async with trio.open_nursery() as nursery:
            # Those that trio has kept from other tests are used up first.
            while not refused.is_set():
                nursery.start_soon(request)
                await trio.testing.wait_all_tasks_blocked()
            gate.may_go_on.set()
        await wait_idle(app)


async def test_a_cancelled_request_ends_at_once_and_its_thread_later() -> None:
    gate = Gate()
    app = WSGIApp(gate, 100, 1)
    exchange = Exchange()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(app, scope_of(), exchange.receive, exchange.send)
            await gate.wait_running()
            nursery.cancel_scope.cancel()
        assert "1 of 1 threads busy" in repr(app)
        gate.may_go_on.set()
        await wait_idle(app)
    assert exchange.sent == []
    assert gate.done.is_set()


async def test_what_an_abandoned_app_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    gate.fails = True
    app = WSGIApp(gate, 100, 1)
    exchange = Exchange()
    with trio.fail_after(30), caplog.at_level(logging.ERROR, "trioserve.wsgi"):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(app, scope_of(), exchange.receive, exchange.send)
            await gate.wait_running()
            nursery.cancel_scope.cancel()
        gate.may_go_on.set()
        await wait_idle(app)
    [record] = caplog.records
    assert record.getMessage() == "a WSGI app failed after its request had been cancelled"
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)


async def test_a_cancelled_send_frees_the_thread() -> None:
    seen: list[BaseException] = []
    sending = trio.Event()

    class Watching(Body):
        def close(self) -> None:
            seen.append(sys.exception())  # type: ignore[arg-type]

    async def send(message: Message) -> None:
        sending.set()
        await trio.sleep_forever()

    app = WSGIApp(starting(Watching(b"a")), 100, 1)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(app, scope_of(), Exchange().receive, send)
            await sending.wait()
            nursery.cancel_scope.cancel()
        await wait_idle(app)
    [error] = seen
    assert isinstance(error, ClientDisconnected)
    assert "cancelled while the WSGI app was running" in str(error)


def test_a_thread_may_outlive_the_run() -> None:
    gate = Gate()

    async def serve() -> None:
        async with trio.open_nursery() as nursery:
            exchange = Exchange()
            nursery.start_soon(WSGIApp(gate, 100, 1), scope_of(), exchange.receive, exchange.send)
            await gate.wait_running()
            nursery.cancel_scope.cancel()

    trio.run(serve)
    gate.may_go_on.set()
    assert gate.done.wait(30)
