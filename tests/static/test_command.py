"""`trioserve static DIR` and `--static /assets=DIR`: for somebody who has a directory and no app."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import trioserve
from tests.e2e.process import run_to_end, serve_command, start_process, trioserve_command
from trioserve.asgi.load import code_directories, load_app
from trioserve.cli import configure, main
from trioserve.config import Config
from trioserve.config.settings import BY_NAME
from trioserve.errors import EXIT_APP_NOT_FOUND, EXIT_CONFIG, EXIT_OK, EXIT_USAGE
from trioserve.static import command
from trioserve.static.command import application_path, describe, glance

from .asking import LARGE, put


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("TRIOSERVE_")]:
        monkeypatch.delenv(variable)


def app_of(*argv: str) -> Any:
    """The app that a worker would make."""
    config, _ = configure(["static", *argv], {"TRIOSERVE_APPLICATION_PATH": "other:app"})
    app = load_app(config.application_path, factory=config.factory).app
    app.close()
    return app


def test_the_directory_and_its_options_reach_the_worker(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = app_of(str(site))
    assert app.directory == str(site)
    assert app.options.listing
    app = app_of(
        "--no-listing", "--index", "a.html", "--index", "b.html", "--not-found", "404.html", str(site),
        "--max-age", "5", "--dotfiles", "--symlinks", "never", "--frozen", "--bind", "127.0.0.1:0",
        "--use-as-dictionary", "app.*.js=/app.*.js?v=*", "--use-as-dictionary", "it's=/\"odd\"",
    )  # fmt: skip
    options = app.options
    assert (options.listing, options.index, options.not_found) == (False, ("a.html", "b.html"), "404.html")
    assert (options.max_age, options.dotfiles, options.symlinks, options.frozen) == (5, True, "never", True)
    assert options.use_as_dictionary == (
        ("app.*.js", b'match="/app.*.js?v=*"'),
        ("it's", b'match="/\\"odd\\""'),
    )
    single = app_of("--spa", str(site)).options
    assert single.use_as_dictionary is None
    assert (single.spa, single.listing) == ("index.html", False)
    assert app_of("--spa", "--listing", str(site)).options.listing
    monkeypatch.chdir(site)
    assert app_of().directory == str(site)
    odd = put(site / 'it\'s "odd"' / "x.txt", b"").parent
    assert app_of(str(odd)).directory == str(odd)


def test_loading_it_leaves_the_import_path_alone(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in a directory that is served, or was started from, is no code."""
    import sys

    monkeypatch.chdir(site)
    before = sys.path.copy()
    app_of(".")
    assert sys.path == before


def test_a_reload_is_not_about_the_files_that_are_served(site: Path) -> None:
    path = application_path(str(site), {"listing": True})
    assert code_directories(path) == [Path(trioserve.__file__).parent]


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["nowhere"], EXIT_APP_NOT_FOUND, "nothing to serve: 'nowhere' does not exist"),
        (["plain.txt"], EXIT_APP_NOT_FOUND, "nothing to serve: 'plain.txt' is no directory"),
        ([".", "docs"], EXIT_USAGE, "only one directory can be served, but there is also 'docs'"),
        ([".", "--lisitng"], EXIT_USAGE, "unknown flag --lisitng; did you mean --listing?"),
        ([".", "--max-age", "x"], EXIT_USAGE, "'x': expected a whole number of seconds of at least 0"),
        (
            [".", "--max-age", "-1"],
            EXIT_USAGE,
            "argument --max-age: '-1': expected a whole number of seconds of at least 0",
        ),
        (
            [".", "--symlinks", "all"],
            EXIT_USAGE,
            "argument --symlinks: 'all': expected one of beneath, never, follow",
        ),
        ([".", "--not-found", "../x"], EXIT_CONFIG, "--not-found = '../x'"),
        (
            [".", "--use-as-dictionary", "app.*.js"],
            EXIT_USAGE,
            "argument --use-as-dictionary: 'app.*.js': expected the pattern of files and that of the URLs",
        ),
        (
            [".", "--use-as-dictionary", "*.js=/(a|b).js"],
            EXIT_CONFIG,
            "--use-as-dictionary = [('*.js', '/(a|b).js')]: '/(a|b).js': regular expressions are not allowed",
        ),
        ([".", "--static", "/x=nowhere"], EXIT_CONFIG, "there is no directory"),
        (["--help"], EXIT_OK, ""),
        ([".", "--check-config"], EXIT_OK, ""),
        ([".", "--check-config", "--wsgi-threads", "4"], EXIT_OK, ""),
    ],
)
def test_what_is_wrong_ends_with_a_message(
    site: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    code: int,
    text: str,
) -> None:
    monkeypatch.chdir(site)
    assert main(["static", *argv]) == code
    out, error = capsys.readouterr()
    assert text in error
    assert "Traceback" not in error
    if argv == ["--help"]:
        assert out.startswith("usage: trioserve static [flags] [DIR]\n")
        assert "--listing, --no-listing" in out
        assert "--use-as-dictionary FILES=URLS" in out
        assert "--bind" in out
        assert not [name for name in command.OF_OTHER_APPS if BY_NAME[name].main_flag in out]


def test_a_directory_that_may_not_be_entered_is_told_so(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trioserve.errors import AppNotFound, ConfigError

    def refuse(*_: Any, **__: Any) -> None:
        raise ConfigError("static directory 'x' cannot be opened: Permission denied")

    monkeypatch.setattr(command, "make_app", refuse)
    with pytest.raises(AppNotFound, match="nothing to serve: static directory 'x' cannot be opened"):
        application_path(str(site), {})


def test_a_directory_that_can_be_opened_but_not_entered_is_told_so(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may enter all of them, so the answer of the kernel is given here."""
    from trioserve.errors import AppNotFound

    asked: list[tuple[Any, int]] = []

    def no_access(path: Any, mode: int) -> bool:
        asked.append((path, mode))
        return False

    monkeypatch.setattr(command.os, "access", no_access)
    with pytest.raises(AppNotFound, match=f"nothing to serve: this user may not enter {site}"):
        application_path(str(site), {})
    assert asked == [(str(site), os.X_OK)]


# -- what a person is told -----------------------------------------------------------------------------------


def test_a_person_is_told_what_is_served_and_where(site: Path) -> None:
    put(site / "app.js.br", b"x")
    config = Config.from_mapping(
        bind=["127.0.0.1:8000", "0.0.0.0:81", "[::1]:82", "host", "127.0.0.1:0", "unix:/x"]
    )
    options = {"listing": True, "not_found": "404.html"}
    urls = (
        "http://127.0.0.1:8000/, http://localhost:81/ (and this machine's other addresses), http://[::1]:82/, "
        "http://host:8000/"
    )
    assert describe(str(site), options, config).splitlines() == [
        f"Serving {site}",
        f"  at        {urls}",
        "  files     9 in 3 directories; and 1 precompressed (.br, .zst, .gz)",
        "  index     index.html",
        "  listing   on, for directories without an index",
        "  dotfiles  hidden",
        "  not found 404.html (which is not there yet)",
    ]
    put(site / "404.html", b"gone")
    assert describe(str(site), options, config).endswith("  not found 404.html")
    text = describe(
        str(site / "bare"), {"spa": "index.html", "dotfiles": True}, Config.from_mapping(bind="unix:/x")
    )
    assert text.splitlines()[1:] == [
        "  at        see below",
        "  files     1",
        "  index     index.html (there is none at the top)",
        "  listing   off",
        "  dotfiles  served",
        "  spa       index.html for places that are no files (which is not there yet)",
    ]
    assert describe(str(site), {"spa": "index.html"}, config).endswith(
        "index.html for places that are no files"
    )


@pytest.mark.parametrize(
    ("settings", "urls"),
    [
        ({"bind": ":81"}, "http://localhost:81/ (and this machine's other addresses)"),
        (
            {"bind": ["::1", "[::1]", "[::]:81"]},
            "http://[::1]:8000/, http://[::1]:8000/, http://localhost:81/ (and",
        ),
        ({"bind": "host:443", "certfile": "c.pem"}, "https://host:443/"),
        (
            {"bind": "host:443", "insecure_bind": "host:80", "certfile": "c.pem"},
            "https://host:443/, http://host:80/",
        ),
        ({"bind": "host:443", "insecure_bind": "host:80"}, "http://host:443/"),
    ],
)
def test_the_address_is_one_that_a_browser_takes(site: Path, settings: dict[str, Any], urls: str) -> None:
    line = describe(str(site), {}, Config.from_mapping(settings)).splitlines()[1]
    assert line.startswith(f"  at        {urls}")
    assert line.count("://") == urls.count("://")


def test_the_first_look_is_bounded(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(50):
        put(site / "many" / f"{number}.txt", b"")
    monkeypatch.setattr(command, "_MOST_FILES", 20)
    found = glance(str(site), dotfiles=False)
    assert not found.whole
    assert 20 < found.files < 50
    assert "more than " in describe(str(site), {}, Config())
    (site / "loop").symlink_to(site)
    assert glance(str(site / "docs"), dotfiles=True).files == 2
    assert glance(str(site / "nowhere"), dotfiles=False).files == 0


# -- real processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["0", "2"])
async def test_a_directory_is_served_by_a_command(site: Path, workers: str) -> None:
    argv = trioserve_command("static", str(site), "--bind", "127.0.0.1:0", "--workers", workers)
    async with start_process(*argv, "--use-as-dictionary", "large.*=/docs/*") as server:
        await server.wait_running()
        assert f"Serving {site}\n" in server.stdout.text
        large = await server.get("/large.bin")
        assert (large.body, large.header("use-as-dictionary")) == (LARGE, 'match="/docs/*"')
        listed = await server.get("/bare/")
        assert b"one.txt" in listed.body
        assert (await server.get("/.env")).status == 404
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
    assert "Traceback" not in server.stderr.text


@pytest.mark.parametrize("preload", [(), ("--preload",)])
async def test_code_that_is_served_is_not_run(site: Path, preload: tuple[str, ...]) -> None:
    """Started in the directory that is served, where names of the standard library may lie."""
    for name in ("base64", "html", "trioserve", "sitecustomize"):
        put(site / f"{name}.py", b"open('was-run', 'w').close()\nraise SystemExit(9)\n")
    launcher = (
        "import runpy, sys; sys.argv[0] = 'trioserve'; runpy.run_module('trioserve', run_name='__main__')"
    )
    command = (
        sys.executable,
        "-P",
        "-c",
        launcher,
        "static",
        "--bind",
        "127.0.0.1:0",
        "--workers",
        "1",
        *preload,
    )
    async with start_process(*command, cwd=site) as process:
        await process.wait_running()
        assert (await process.get("/plain.txt")).body == b"0123456789"
    assert not (site / "was-run").exists()


async def test_directories_are_served_beside_an_app(site: Path) -> None:
    mounts = ("--static", f"/s={site}", "--static", f"/d={site}/docs")
    async with serve_command("tests.e2e.apps:app", *mounts, workers=2) as server:
        assert (await server.get("/s/large.bin")).body == LARGE
        assert (await server.get("/d/")).body == b"<h1>docs</h1>\n"
        assert (await server.get("/")).body == b"hello"
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reloaded: generation 2")
        assert (await server.get("/s/plain.txt")).body == b"0123456789"


async def test_a_bad_directory_is_a_message_and_an_exit_code(tmp_path: Path) -> None:
    done = await run_to_end(*trioserve_command("static", str(tmp_path / "nowhere")))
    assert done.returncode == EXIT_APP_NOT_FOUND
    assert done.stderr.text.startswith("trioserve: nothing to serve: ")
    assert len(done.stderr.text.splitlines()) == 1
