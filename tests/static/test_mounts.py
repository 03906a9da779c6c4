"""Directories beside an app: whole segments, the longest prefix, everything else for the app."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trioserve import Config, ConfigError
from trioserve.config import load_config
from trioserve.http.quick import find_quick
from trioserve.static.mounts import StaticMounts
from trioserve.testing import no_leaks, serving

from .asking import LARGE, ask, put


async def echo(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    await send({"type": "http.response.start", "status": 299, "headers": []})
    await send({"type": "http.response.body", "body": scope["raw_path"]})


@pytest.fixture
def trees(tmp_path: Path) -> Path:
    for name in ("assets", "inner", "sp ace"):
        put(tmp_path / name / "who.txt", name.encode())
        put(tmp_path / name / "index.html", b"index of " + name.encode())
    put(tmp_path / "assets" / "large.bin", LARGE)
    put(tmp_path / "assets" / "deep" / "only.txt", b"outer")
    return tmp_path


def mounts_of(trees: Path) -> list[str]:
    return [f"/assets={trees}/assets", f"/assets/deep={trees}/inner", f"/sp ace={trees}/sp ace"]


CASES = [
    ("/assets/who.txt", 200, b"assets"),
    ("/assets/large.bin", 200, LARGE),
    ("/assets/deep/who.txt", 200, b"inner"),
    ("/assets/deep/only.txt", 404, b"404 Not Found\n"),
    ("/assets/nothing", 404, b"404 Not Found\n"),
    ("/assets/", 200, b"index of assets"),
    ("/assets", 308, b""),
    ("/assets/deep", 308, b""),
    ("/%61ssets/who.txt", 200, b"assets"),
    ("/assets/%64eep/who.txt", 200, b"inner"),
    ("/sp%20ace/who.txt", 200, b"sp ace"),
    # The app's. A prefix in another guise is no prefix. [CVE-2025-27610, CVE-2026-34785]
    ("/", 299, b"/"),
    ("/assets-old/who.txt", 299, b"/assets-old/who.txt"),
    ("/assets.env", 299, b"/assets.env"),
    ("/assets%2Fwho.txt", 299, b"/assets%2Fwho.txt"),
    ("/ASSETS/who.txt", 299, b"/ASSETS/who.txt"),
    ("//assets/who.txt", 299, b"//assets/who.txt"),
    ("/api/assets/who.txt", 299, b"/api/assets/who.txt"),
    # Not to be had through the mount.
    ("/assets/../sp%20ace/who.txt", 404, b"404 Not Found\n"),
    ("/assets/%2e%2e/inner/who.txt", 404, b"404 Not Found\n"),
]


@pytest.mark.modes("tls", "http2")
@pytest.mark.parametrize("root_path", ["", "/app"])
async def test_each_request_goes_where_it_belongs(trees: Path, engine: str, root_path: str) -> None:
    """With `root_path` both behind a proxy that removes it and behind one that does not."""
    settings: Any = {"static_mounts": mounts_of(trees), "root_path": root_path, "http_engine": engine}
    async with no_leaks():
        async with serving(echo, **settings) as server, server.connect() as client:
            for before in {"", root_path}:
                for _ in range(2):
                    for target, status, body in CASES:
                        response = await client.get(before + target)
                        assert response.status == status, (before, target)
                        expected = before.encode() + body if status == 299 else body
                        assert response.body == expected, (before, target)
            redirect = await client.get(f"{root_path}/assets/deep?q")
            assert redirect.header("location") == "./deep/?q"


async def test_the_quick_way_leads_to_the_same_mount(trees: Path) -> None:
    mounts = StaticMounts(echo, mounts_of(trees))
    for root_path in ("", "/app"):
        for target, status, body in CASES:
            raw_path = root_path.encode() + target.encode()
            assert mounts.quick_answer("GET", raw_path, {}, root_path) is None
            await ask(mounts, raw_path.decode(), root_path=root_path)
            answer = mounts.quick_answer("GET", raw_path, {}, root_path)
            # An encoded prefix is left to the long way.
            expected = status == 200 and (root_path != "" or target.startswith("/assets"))
            assert (answer is not None) == expected, target
            if answer is not None and answer.file is None:
                assert answer.body == body
    mounts.close()


@pytest.mark.modes("http2")
@pytest.mark.parametrize("root_path", ["", "/app"])
async def test_the_only_directory_is_asked_directly(trees: Path, root_path: str) -> None:
    settings: dict[str, Any] = {"static_mounts": [f"/assets={trees}/assets"], "root_path": root_path}
    async with serving(echo, lifespan="off", **settings) as server, server.connect() as client:
        app = server.worker.context.app
        assert isinstance(app, StaticMounts)
        found = find_quick(app, root_path)
        assert found is not None
        quick_answer, below = found
        for _ in range(3):
            for target, body in (("/assets/who.txt", b"assets"), ("/%61ssets/who.txt", b"assets")):
                response = await client.get(root_path + target)
                assert (response.status, response.body) == (200, body)
                answer = quick_answer("GET", (root_path + target).encode(), {}, below)
                assert answer is not None
                assert answer.body == body
            for target in ("/who.txt", "/assets-old/who.txt", "/assets%2Fwho.txt"):
                assert (await client.get(root_path + target)).status == 299
                assert quick_answer("GET", (root_path + target).encode(), {}, below) is None
            assert (await client.get(root_path + "/assets/nothing")).status == 404


def test_who_is_in_front_of_a_directory_is_not_passed_by(trees: Path) -> None:
    mounts = StaticMounts(echo, mounts_of(trees))

    class Guard:
        def __getattr__(self, name: str) -> Any:
            return getattr(mounts, name)

    assert find_quick(Guard(), "") is None
    assert find_quick(echo, "") is None
    assert find_quick(mounts, "/app") == (mounts.quick_answer, "/app")
    mounts.close()


@pytest.mark.modes("tls", "http2")
async def test_server_names_hold_for_mounts_too(trees: Path) -> None:
    settings: Any = {"static_mounts": mounts_of(trees), "server_names": ["right"]}
    async with serving(echo, **settings) as server:
        assert (await server.get("/assets/who.txt", [("host", "right")])).status == 200
        assert (await server.get("/assets/who.txt", [("host", "wrong")])).body == b""


async def test_it_says_what_it_serves_and_closes_what_it_opened(trees: Path) -> None:
    async with no_leaks():
        mounts = StaticMounts(echo, mounts_of(trees)[:2])
        assert repr(mounts) == f"<StaticMounts /assets/deep={trees}/inner, /assets={trees}/assets>"
        assert (await ask(mounts, "/assets/large.bin")).body == LARGE
        mounts.close()
        with pytest.raises(ConfigError):
            StaticMounts(echo, [*mounts_of(trees), "/x=/nowhere"])


# -- the setting ---------------------------------------------------------------------------------------------


def test_mounts_are_settled(trees: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trees)
    monkeypatch.setenv("HOME", str(trees))
    config = Config.from_mapping(static_mounts=["/a/=assets", "/b/c=~/inner", "/d=x=y"])
    assert config.static_mounts == [f"/a={trees}/assets", f"/b/c={trees}/inner", f"/d={trees}/x=y"]
    assert Config.from_mapping(static_mounts="/a=assets").static_mounts == [f"/a={trees}/assets"]


def test_mounts_come_from_every_source(trees: Path) -> None:
    file = trees / "c.toml"
    file.write_text(f'static_mounts = ["/a={trees}/assets"]\n')
    assert load_config({}, {}, str(file)).static_mounts == [f"/a={trees}/assets"]
    environment = {"TRIOSERVE_STATIC_MOUNTS": f"/a={trees}/assets,/b={trees}/inner"}
    assert load_config({}, environment).static_mounts == [f"/a={trees}/assets", f"/b={trees}/inner"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("assets", "'assets' has no such prefix"),
        ("assets=x", "has no such prefix"),
        ("=x", "has no such prefix"),
        ("/=x", "to serve a directory at / give: trioserve static DIR"),
        ("//a=x", "has no such prefix"),
        ("/a//b=x", "has no such prefix"),
        ("/a/../b=x", "has no such prefix"),
        ("/a%20b=x", "has no such prefix"),
        ("/a?b=x", "has no such prefix"),
        ("/a\n=x", "has no such prefix"),
        ("/a=", "names no directory"),
        ("/a", "names no directory"),
        (["/a=x", "/a/=y"], "/a is given twice"),
        ([5], "5 is int"),
    ],
)
def test_what_is_no_mount_is_refused(value: Any, text: str) -> None:
    with pytest.raises(ConfigError, match="expected a list of /prefix=DIR") as caught:
        Config.from_mapping(static_mounts=value)
    assert text in str(caught.value)


def test_a_directory_that_is_missing_is_an_error_of_the_start(trees: Path) -> None:
    config = Config.from_mapping(static_mounts=[f"/a={trees}/assets", f"/b={trees}/nowhere"])
    with pytest.raises(
        ConfigError, match=rf"static_mounts = .*there is no directory {trees}/nowhere: make it"
    ):
        config.validate()
