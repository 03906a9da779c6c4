"""The command as a process: it starts, says where, serves, cleans up, and ends with the code that tells why."""

from __future__ import annotations

import signal
import socket
import stat
from pathlib import Path

import pytest

import trioserve

from .process import (
    REPOSITORY,
    connect,
    run_to_end,
    serve_command,
    start_process,
    trioserve_command,
    wait_in_file,
)

APP = "tests.e2e.apps:app"

ANY_PORT = ("--bind", "127.0.0.1:0")


# -- starting and stopping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("hub", ["epoll", "portable"])
@pytest.mark.parametrize("engine", ["httptools", "h11"])
async def test_a_process_serves_and_ends_with_0_on_sigterm(engine, hub):
    async with serve_command(APP, "--http-engine", engine, "--hub", hub) as server:
        response = await server.get()
        assert (response.status, response.body) == (200, b"hello")
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
    assert server.stdout.text.split() == ["lifespan.startup", "lifespan.shutdown"]
    assert "Traceback" not in server.stderr.text


async def test_the_pid_file_holds_the_pid_while_serving_and_is_gone_afterwards(tmp_path):
    pid_path = tmp_path / "server.pid"
    async with serve_command(APP, "--pid", str(pid_path)) as server:
        assert pid_path.read_text() == f"{server.pid}\n"
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
    assert list(tmp_path.iterdir()) == []


async def test_the_pid_file_is_gone_after_a_failed_start_too(tmp_path):
    command = trioserve_command(
        *ANY_PORT, "--pid", str(tmp_path / "server.pid"), "tests.e2e.apps:startup_fails"
    )
    assert (await run_to_end(*command)).returncode == 3
    assert list(tmp_path.iterdir()) == []


async def test_a_unix_socket_gets_its_permissions_and_is_removed_at_the_end(tmp_path):
    path = tmp_path / "app.sock"
    async with serve_command(APP, "--umask", "007", bind=f"unix:{path}") as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o770
        assert (await server.get()).body == b"hello"
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
    assert not path.exists()


async def test_an_inherited_socket_is_served_and_its_queue_outlives_the_server():
    """What a service manager's socket activation does: nobody is turned away while the server changes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        address = "{}:{}".format(*listener.getsockname())
        for _ in range(2):
            async with connect(address) as client:
                async with serve_command(APP, bind=f"fd://{fd}", pass_fds=[fd]) as server:
                    assert (await client.get()).body == b"hello"
                    server.send_signal(signal.SIGTERM)
                    assert await server.wait() == 0


async def test_one_process_serves_several_addresses(tmp_path):
    unix = f"unix:{tmp_path}/app.sock"
    async with serve_command(APP, "--bind", unix) as server:
        assert (await server.get()).body == b"hello"
        async with connect(unix) as client:
            assert (await client.get()).body == b"hello"


async def test_settings_come_from_file_then_environment_then_flags(tmp_path):
    config = tmp_path / "server.toml"
    config.write_text('root_path = "/file"\nkeep_alive_max_requests = 1\nmax_target_size = 100\n')
    async with serve_command(
        APP,
        *("--config", str(config), "--max-target-size", "300"),
        env={"TRIOSERVE_MAX_TARGET_SIZE": "200", "TRIOSERVE_KEEP_ALIVE_MAX_REQUESTS": "2"},
    ) as server:
        assert (await server.get("/" + "x" * 250)).status == 200
        assert (await server.get("/" + "x" * 300)).status == 414
        async with server.connect() as client:
            assert (await client.get()).header("connection") is None
            assert (await client.get()).header("connection") == "close"


async def test_an_app_is_found_by_its_file_and_by_a_factory(tmp_path):
    (tmp_path / "service.py").write_text(
        "from tests.e2e.apps import app\n\ndef make():\n    return app\n", encoding="utf-8"
    )
    for application, *flags in (
        [f"{tmp_path}/service.py:app"],
        [f"asgi:{tmp_path}/service.py:make()"],
        [f"{tmp_path}/service.py:make", "--factory"],
    ):
        async with serve_command(application, *flags) as server:
            assert (await server.get()).body == b"hello"


# -- ending before it serves --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        ([], 2, "no application given"),
        (["--workerz", "3", APP], 2, "did you mean --workers?"),
        (["--graceful-timeout", "soon", APP], 2, "--graceful-timeout"),
        ([*ANY_PORT, "--startup-timeout", "0.1", "tests.e2e.apps:startup_hangs"], 3, "startup_timeout"),
        ([*ANY_PORT, "tests.e2e.apps:startup_fails"], 3, "no database"),
        ([*ANY_PORT, "tests.e2e.nowhere:app"], 4, "tests.e2e.nowhere"),
        ([*ANY_PORT, "tests.e2e.apps:ap"], 4, "app"),
        (["--bind", "unix:/nonexistent/app.sock", APP], 71, "/nonexistent/app.sock"),
        (["--config", "/nonexistent.toml", APP], 78, "/nonexistent.toml"),
        ([*ANY_PORT, "--access-logfile", "/nonexistent/log", APP], 78, "/nonexistent/log"),
        ([*ANY_PORT, "--contain-error", "builtins.NoSuchError", APP], 78, "NoSuchError"),
    ],
)
async def test_what_keeps_it_from_serving_is_told_in_the_exit_code_and_one_message(arguments, code, said):
    process = await run_to_end(*trioserve_command(*arguments))
    assert process.returncode == code, process.stderr.text
    assert said in process.stderr.text
    assert "Traceback" not in process.stderr.text
    assert "Running on" not in process.stderr.text


async def test_an_address_in_use_ends_with_71_and_names_the_address():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = await run_to_end(*trioserve_command("--bind", address, APP))
    assert process.returncode == 71
    assert address in process.stderr.text
    assert "in use" in process.stderr.text


async def test_an_unknown_key_in_a_config_names_the_file_and_the_right_spelling(tmp_path):
    config = tmp_path / "server.toml"
    config.write_text("gracefull_timeout = 3\n")
    process = await run_to_end(*trioserve_command("--config", str(config), APP))
    assert process.returncode == 78
    assert str(config) in process.stderr.text
    assert "did you mean graceful_timeout?" in process.stderr.text


async def test_an_app_that_fails_to_import_shows_its_traceback_and_ends_with_4(tmp_path):
    (tmp_path / "broken.py").write_text("import json\nsettings = json.loads('{')\n")
    process = await run_to_end(*trioserve_command(f"{tmp_path}/broken.py:app"))
    assert process.returncode == 4
    assert "JSONDecodeError" in process.stderr.text
    assert "broken.py" in process.stderr.text
    assert "importlib" not in process.stderr.text, "only the app's frames help its author"


async def test_a_startup_that_raises_shows_its_traceback_where_lifespan_is_on(tmp_path):
    (tmp_path / "service.py").write_text(
        "async def app(scope, receive, send):\n    await receive()\n    raise LookupError('no such table')\n"
    )
    command = trioserve_command(*ANY_PORT, "--lifespan", "on", f"{tmp_path}/service.py:app")
    process = await run_to_end(*command)
    assert process.returncode == 3
    assert "LookupError: no such table" in process.stderr.text


async def test_a_drain_without_end_is_not_asked_of_a_lifespan_that_hangs():
    """Startup was complete, so shutdown is asked for; it gets its time and no more, and the exit code is still 0."""
    async with serve_command("tests.e2e.apps:shutdown_hangs", "--shutdown-timeout", "0.1") as server:
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
    assert "lifespan shutdown took longer than 0.1 s" in server.stderr.text


# -- what it says of itself ---------------------------------------------------------------------------------


async def test_version_names_the_versions_a_bug_report_needs():
    process = await run_to_end(*trioserve_command("--version"))
    assert process.returncode == 0
    assert process.stdout.text.startswith(f"trioserve {trioserve.__version__} (trio ")


async def test_printed_config_starts_the_same_server_again(tmp_path):
    flags = ("--keep-alive", "7", "--bind", "127.0.0.1:0", "--server-name", "testserver")
    printed = await run_to_end(*trioserve_command("--print-config", *flags))
    assert printed.returncode == 0
    config = tmp_path / "printed.toml"
    config.write_text(printed.stdout.text)
    assert "keep_alive_timeout = 7" in printed.stdout.text
    checked = await run_to_end(*trioserve_command("--check-config", "--config", str(config)))
    assert (checked.returncode, checked.stdout.text) == (0, "configuration is valid\n")
    async with serve_command(APP, "--config", str(config), bind=None) as server:
        assert (await server.get()).status == 200
        assert (await server.get("/", [("host", "elsewhere")])).status == 404


async def test_a_logger_configuration_sends_the_error_log_to_its_file(tmp_path):
    log = tmp_path / "service.log"
    config = tmp_path / "logging.ini"
    config.write_text(
        "[loggers]\nkeys=root,error\n[handlers]\nkeys=file\n[formatters]\nkeys=\n"
        "[logger_root]\nlevel=INFO\nhandlers=\n"
        "[logger_error]\nlevel=INFO\nhandlers=file\nqualname=hypercorn.error\npropagate=0\n"
        f"[handler_file]\nclass=FileHandler\nargs=({str(log)!r},)\n"
    )
    command = trioserve_command(*ANY_PORT, "--log-config", str(config), APP)
    async with start_process(*command, cwd=REPOSITORY) as server:
        server.address = (await wait_in_file(log, r"Running on http://(\S+) ")).group(1)
        assert (await server.get()).body == b"hello"
    assert "draining: SIGTERM; 0 requests in flight\n" in Path(log).read_text()
    assert server.stderr.text == ""
