"""The options of `StaticFiles`: what is taken, and in which words the rest is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from trioserve import ConfigError, StaticFiles
from trioserve.static.options import StaticKeywords, StaticOptions

WRONG: list[tuple[str, Any, str]] = [
    ("indx", "x", "indx is no option; did you mean index?"),
    ("qqqqqqq", 1, "there are index, listing, spa"),
    ("index", "docs/index.html", "is not the name of a file"),
    ("index", [""], "expected a list of text"),
    ("index", 5, "index = 5"),
    ("index", [".."], "in this one is a dot segment"),
    ("listing", "yes", "expected True or False"),
    ("listing", 1, "expected True or False"),
    ("spa", True, 'such as "index.html"'),
    ("spa", "/index.html", "below the directory"),
    ("spa", "../x.html", "a dot segment"),
    ("spa", "a//b", "an empty segment"),
    ("not_found", "errors/", "below the directory"),
    ("fallthrough", "app", "expected an ASGI application"),
    ("codings", ["deflate"], "choose from br, zstd, gzip, each once"),
    ("codings", ["br", "br"], "each once"),
    ("codings", 1, "codings = 1"),
    ("use_as_dictionary", "/app.*.js", "expected pairs of pattern and URL pattern"),
    ("use_as_dictionary", ["/app.*.js"], "expected pairs"),
    ("use_as_dictionary", [("app.*.js",)], "expected pairs"),
    ("use_as_dictionary", [("a", "/a", "b", "c")], "expected pairs"),
    ("use_as_dictionary", [("", "/a")], "expected pairs"),
    ("use_as_dictionary", [("a", "")], "'' is no URL pattern; expected one such as"),
    ("use_as_dictionary", [("a", "/ä")], "is no URL pattern"),
    ("use_as_dictionary", [("a", "/a\n")], "is no URL pattern"),
    ("use_as_dictionary", [("a", 5)], "5 is no URL pattern"),
    ("use_as_dictionary", [("a", "/(a|b).js")], "regular expressions are not allowed"),
    ("use_as_dictionary", [("a", "/a", "x" * 1025)], "an id has up to 1,024 characters"),
    ("use_as_dictionary", [("a", "/a", "\n")], "characters of ASCII"),
    ("use_as_dictionary", 5, "use_as_dictionary = 5"),
    ("symlinks", "some", "choose one of 'beneath', 'never', 'follow'"),
    ("dotfiles", None, "expected True or False"),
    ("forbidden", 401, "choose one of 403, 404"),
    ("cache_control", "a\r\nb", "cannot be the value of a header field"),
    ("cache_control", ["*.pdf"], "pairs of pattern and value"),
    ("cache_control", [("*.pdf", 5)], "5 cannot be the value"),
    ("cache_control", [("", "x")], "pairs of pattern"),
    ("cache_control", 5, "cache_control = 5"),
    ("max_age", -1, "a whole number of at least 0"),
    ("max_age", 1.5, "a whole number"),
    ("max_age", True, "a whole number"),
    ("headers", [("a b", "c")], "cannot be the name of a header field"),
    ("headers", [(5, "c")], "cannot be the name"),
    ("headers", {"x": "a\nb"}, "cannot be the value"),
    ("headers", {"ETag": "x"}, "ETag is set by the handler or by the server: leave it out"),
    ("headers", {"Cache-Control": "x"}, "give Cache-Control as cache_control"),
    ("headers", {"Use-As-Dictionary": "x"}, "give Use-As-Dictionary as use_as_dictionary"),
    ("headers", ["x"], "pairs of name and value"),
    ("content_types", {".x": "text"}, "'text' is no media type"),
    ("content_types", {"a/b": "text/x"}, "neither an extension"),
    ("content_types", [".x"], "expected a mapping"),
    ("download", [""], "expected a list of text"),
    ("max_ranges", 0, "at least 1"),
    ("revalidate", -1, "of at least 0; for files that never change give frozen=True"),
    ("revalidate", float("inf"), "frozen=True"),
    ("revalidate", "1", "a number of seconds"),
    ("frozen", 1, "expected True or False"),
    ("cache_files", 0, "at least 1"),
    ("cache_bytes", -1, "at least 0"),
    ("small_file", -1, "at least 0"),
]


@pytest.mark.parametrize(("name", "value", "text"), WRONG)
def test_what_is_wrong_is_refused_with_name_value_and_advice(
    site: Path, name: str, value: Any, text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        StaticFiles(site, **{name: value})
    assert str(caught.value).startswith(f"StaticFiles: {name} ")
    assert text in str(caught.value)


def test_contradictions_are_refused(site: Path) -> None:
    async def app(*_: Any) -> None: ...

    with pytest.raises(ConfigError, match="fallthrough and not_found both"):
        StaticFiles(site, fallthrough=app, not_found="404.html")
    with pytest.raises(ConfigError, match="no such file fits into cache_bytes = 100"):
        StaticFiles(site, cache_bytes=100)


def test_what_is_right_is_settled() -> None:
    options = StaticOptions.checked(
        {
            "index": "home.html",
            "codings": ["gzip"],
            "headers": [(b"X-A", b"1"), ("x-b", "")],
            "content_types": {".GLB": b"model/x", "readme": "text/x"},
            "download": "*.zip",
            "cache_control": [["*", "x"]],
            "revalidate": 0,
            "spa": "shell/app.html",
            "not_found": None,
        }
    )
    assert options.index == ("home.html",)
    assert options.codings == (b"gzip",)
    assert options.headers == ((b"x-a", b"1"), (b"x-b", b""))
    assert options.content_types == {".glb": b"model/x", "readme": b"text/x"}
    assert options.download == ("*.zip",)
    assert options.cache_control == (("*", "x"),)
    assert options.revalidate == 0.0
    assert options.spa == "shell/app.html"


def test_types_defaults_and_checks_name_the_same_options() -> None:
    names = {field.name for field in dataclasses.fields(StaticOptions)}
    assert set(StaticKeywords.__annotations__) == names
    default = StaticOptions()
    plain = {name: getattr(default, name) for name in names - {"codings"}}
    assert StaticOptions.checked(plain) == default
    assert StaticOptions.checked({"codings": ["br", "zstd", "gzip"]}) == default
