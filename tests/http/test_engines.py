"""Which engine is taken, and what is particular about the one of gunicorn_h1c; the rules are in `test_engine_…`."""

from __future__ import annotations

import os
import re
import sys

import pytest

from tests.http.feeding import ENGINES, head, make_engine, make_limits, run
from trioserve.errors import ConfigError, RequestRefused
from trioserve.http.engine import Engine
from trioserve.http.engines import factory

PACKAGES = {"h1c": "gunicorn_h1c, 0.6.10 or later", "httptools": "httptools"}

needs_h1c = pytest.mark.skipif(
    "h1c" not in ENGINES and os.environ.get("REQUIRE_TOOLS") != "1",
    reason="gunicorn_h1c is not installed: pip install gunicorn_h1c",
)


def chosen(kind: str, **limits: int) -> str:
    return type(factory(kind, make_limits(**limits), raw_names=False)()).__name__  # type: ignore[arg-type]


@needs_h1c
def test_the_fastest_engine_is_here() -> None:
    assert ENGINES == ("h1c", "httptools", "h11")


@needs_h1c
def test_auto_takes_the_fastest_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen("auto") == "H1cEngine"
    monkeypatch.setitem(sys.modules, "trioserve.http.h1c_engine", None)  # as if it could not be imported
    assert chosen("auto") == "HttptoolsEngine"
    monkeypatch.setitem(sys.modules, "trioserve.http.httptools_engine", None)
    assert chosen("auto") == "H11Engine"


@pytest.mark.parametrize("kind", PACKAGES)
def test_what_is_asked_for_by_name_has_to_be_installed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"trioserve.http.{kind}_engine", None)
    with pytest.raises(
        ConfigError, match=f'^http_engine = "{kind}" needs the package {PACKAGES[kind]}; install'
    ):
        chosen(kind)


@needs_h1c
@pytest.mark.parametrize(
    ("lenient", "strict_form"), [(rb"(?<!\r)\n", b"\r\n"), (rb"\r\n ", b" ")], ids=["bare LF", "folded line"]
)
def test_a_parser_that_lets_requests_be_split_is_not_taken(
    lenient: bytes, strict_form: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gunicorn_h1c

    strict = gunicorn_h1c.parse_request_fast

    def lax(data: bytes) -> object:
        return strict(re.sub(lenient, strict_form, data))

    monkeypatch.setattr(gunicorn_h1c, "parse_request_fast", lax)
    monkeypatch.delitem(sys.modules, "trioserve.http.h1c_engine")
    assert chosen("auto") == "HttptoolsEngine"
    with pytest.raises(ConfigError, match=r"needs the package gunicorn_h1c, 0\.6\.10 or later; install"):
        chosen("h1c")


def test_auto_takes_an_engine_that_takes_as_many_fields_as_are_allowed() -> None:
    fields = [f"X-{number}: {number}" for number in range(299)]
    assert chosen("auto", header_count=256) == ("H1cEngine" if "h1c" in ENGINES else "HttptoolsEngine")
    assert chosen("auto", header_count=300) == "HttptoolsEngine"
    engine = factory("auto", make_limits(header_count=300), raw_names=False)()
    assert engine.receive_head(head("GET / HTTP/1.1", *fields))
    assert len(engine.headers) == 300


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("raw_names", [False, True])
def test_what_is_allowed_does_not_depend_on_the_limits_of_the_parser(kind: str, raw_names: bool) -> None:
    # Those of gunicorn_h1c by itself: 8190 bytes of a line or a field, and 100 fields.
    fields = [f"X-{number}: {'x' * 30_000 * (number == 7)}" for number in range(255)]
    data = head(f"GET /{'p' * 8191} HTTP/1.1", *fields)
    found = run(kind, data, raw_names=raw_names, header_count=256)
    assert found.refused is None
    assert [len(message.headers) for message in found.messages] == [256]
    name = b"X-7" if raw_names else b"x-7"
    assert (name, b"x" * 30_000) in found.messages[0].headers
    assert run(kind, head("GET / HTTP/1.1", *fields, "Y: z"), header_count=256).refused == 431


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("behind", [b"", b"x: y\r\n" * 200])
def test_what_is_logged_of_a_refused_head(kind: str, behind: bytes) -> None:
    engine = make_engine(kind)
    assert engine.receive_head(head("POST /before HTTP/1.1", "Content-Length: 0") + b"GET")
    assert engine.leftover == b"GET"
    assert engine.receive_head(head("GET /before HTTP/1.1"))
    assert engine.leftover == b""
    with pytest.raises(RequestRefused, match="no Host field") as caught:
        engine.receive_head(b"GET /p HTTP/1.1\r\n\r\n" + behind)
    assert caught.value.status == 400
    assert caught.value.__context__ is None
    assert engine.request_facts() == ("GET", b"/p", "1.1", [], 0)


@needs_h1c
def test_a_parser_that_is_too_old_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    import gunicorn_h1c

    monkeypatch.setattr(gunicorn_h1c, "HttpRequest", object)
    monkeypatch.delitem(sys.modules, "trioserve.http.h1c_engine")
    assert chosen("auto") == "HttptoolsEngine"


@needs_h1c
@pytest.mark.parametrize("raw_names", [False, True])
@pytest.mark.parametrize("behind", [b"", b"GET /next HTTP/1.1\r\n"])
def test_an_ordinary_head_is_read_in_one_call(
    raw_names: bool, behind: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("h1c", raw_names=raw_names)
    monkeypatch.setattr(Engine, "begin_head", lambda *_: pytest.fail("read the long way"))
    data = head("GET /a?b HTTP/1.0", "X-Y:  z ")
    assert engine.receive_head(data + behind)
    assert (engine.method, engine.target, engine.version) == ("GET", b"/a?b", "1.0")
    assert engine.headers[-1] == (b"X-Y" if raw_names else b"x-y", b"z")
    assert engine.leftover == behind


@needs_h1c
@pytest.mark.parametrize(
    "first", ["get / HTTP/1.1", "M-SEARCH / HTTP/1.1", "OPTIONS * HTTP/1.1", "GET http://a/b HTTP/1.1"]
)
def test_what_the_parser_dislikes_does_not_stay_behind(first: str) -> None:
    engine = make_engine("h1c")
    for _ in range(2):
        assert engine.receive_head(head(first, "X: long"))
        assert engine.receive_head(head("GET /short HTTP/1.1", "X: short"))
        assert (engine.target, engine.headers[-1]) == (b"/short", (b"x", b"short"))
