"""`trioserve ctl`: finds the one server, says plainly what came of it, and ends with a code a script can use."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from tests.e2e.process import run_to_end, start_process, trioserve_command
from tests.supervisor.control_server import CRASH, FakeServer, serving
from trioserve.cli import main
from trioserve.errors import EXIT_OK, EXIT_USAGE
from trioserve.supervisor import control, ctl
from trioserve.supervisor.ctl import EXIT_REFUSED, EXIT_UNAVAILABLE, build_ctl_parser
from trioserve.supervisor.ctl_tables import as_text, in_words


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where servers are looked for."""
    directory = tmp_path / "run" / "trioserve"
    directory.mkdir(parents=True)
    monkeypatch.setattr(control, "SYSTEM_DIRECTORY", directory)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/no/such")
    monkeypatch.delenv("TRIOSERVE_CONTROL", raising=False)
    return directory


@pytest.fixture
async def server(directory: Path) -> AsyncIterator[FakeServer]:
    async with serving(directory / "77.sock") as server:
        yield server


async def run(*argv: str) -> int:
    """The command, as a person types it; it blocks, so it gets a thread."""
    return await trio.to_thread.run_sync(main, ["ctl", *argv])


# -- for people ----------------------------------------------------------------------------------------------


async def test_status_is_readable(server, capsys):
    assert await run("status") == EXIT_OK
    assert capsys.readouterr().out == (
        f"trioserve 9.8.7, pid {os.getpid()}\n"
        "  state        running, up 3 h 12 min\n"
        "  degraded     no\n"
        "  application  shop.main:app\n"
        "  addresses    http://127.0.0.1:8000, unix:/run/shop.sock\n"
        "  workers      2 of 2 ready, 1 starting\n"
        "  generation   1\n"
        "  restarts     crashed 1, recycled 4\n"
        "  requests     1,234,567, 3 in flight\n"
        "  connections  64\n"
    )


async def test_workers_are_a_table(server, capsys):
    assert await run("workers") == EXIT_OK
    assert capsys.readouterr().out == (
        "ID   PID  STATE    GEN         AGE  REQUESTS  IN FLIGHT  CONNECTIONS    MEMORY   CPU  HEARTBEAT"
        "  LEAVING BECAUSE\n"
        " 1  4001  tainted    1  1 min 10 s    12,345          1           32  50.0 MiB     -  0.4 s ago"
        "  tainted: KeyError\n"
        " 2  4002  ready      1  2 min 20 s    24,690          1           32  50.0 MiB  12 %  0.4 s ago\n"
    )


async def test_crashes_are_a_table_and_a_report_an_outline(server, capsys):
    assert await run("crashes") == EXIT_OK
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split() == ["ID", "TIME", "WORKER", "PID", "CLASS", "EXIT", "SUMMARY"]
    assert line.index("native crash") == heading.index("CLASS")
    assert line.endswith("killed by signal 11 (SIGSEGV)")
    assert await run("crashes", str(CRASH["id"])) == EXIT_OK
    text = capsys.readouterr().out
    assert text.startswith(f"id: {CRASH['id']}\n")
    assert text.endswith(
        "threads:\n  -\n    name: MainThread\n    frames:\n      a.py:1 f\n      b.py:2 g\nerror: none\n"
    )


async def test_orders_are_carried_out_and_said_to_be_done(server, capsys):
    assert await run("scale", "4") == EXIT_OK
    assert capsys.readouterr().out == "scale: done\nfrom: 2\nto: 4\n"
    assert await run("recycle", "2") == EXIT_OK
    assert capsys.readouterr().out == "recycle: done\nrecycled:\n  2\n"
    assert await run("recycle") == EXIT_OK
    assert server.ids == [4, 5]
    server.gate.set()
    assert await run("reload") == EXIT_OK
    assert server.generation == 2
    assert await run("drain") == EXIT_OK
    assert server.state == "draining"
    assert await run("stop") == EXIT_OK
    assert server.state == "stopping"


async def test_a_long_command_is_waited_for(server, capsys):
    codes = []

    async def reload() -> None:
        codes.append(await run("reload"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reload)
        await server.waiting.wait()
        assert codes == []
        server.gate.set()
    assert codes == [EXIT_OK]


async def test_a_person_at_a_terminal_is_told_what_is_waited_for(server, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            trio.from_thread.run_sync(server.gate.set)
            return super().write(text)

    terminal = Terminal()
    monkeypatch.setattr(ctl, "_SILENCE", 0.05)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert await run("reload") == EXIT_OK
    assert terminal.getvalue() == "waiting for the server; Ctrl-C ends the waiting, not the command\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"),
        (-3, "0.0 s"),
        (0.42, "0.4 s"),
        (9.94, "9.9 s"),
        (10.6, "10 s"),
        (59.9, "59 s"),
        (60, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (86399, "23 h 59 min"),
        (90000, "1 d 1 h"),
        (None, "-"),
        ("x", "-"),
    ],
)
def test_ages_are_in_words(seconds, words):
    assert in_words(seconds) == words


def test_large_memory_is_in_larger_units():
    assert "1.50 GiB" in as_text("workers", [{"rss": 1.5 * 1024**3}])


@pytest.mark.parametrize(
    ("command", "result"),
    [
        ("status", {}),
        ("status", {"workers": 3, "restarts": 2, "addresses": None}),
        ("status", None),
        ("workers", [{}]),
        ("workers", [3, {"id": None, "age": "old", "rss": "much", "cpu": "all", "last_heartbeat": []}]),
        ("workers", {"a": 1}),
        ("crashes", [{}]),
        ("scale", 3),
        ("scale", None),
    ],
)
def test_a_server_of_another_version_is_shown_as_far_as_it_goes(command, result):
    assert as_text(command, result)


def test_nothing_is_said_to_be_nothing():
    assert as_text("workers", []) == "no workers"
    assert as_text("crashes", []) == "no crashes"
    assert as_text("stop", {}) == "stop: done"
    assert "restarts     none\n" in as_text("status", {"restarts": {"crashed": 0}})


def test_what_a_server_says_cannot_move_the_cursor():
    text = as_text(
        "status", {"application": "\x1b[2J\r\n\udcff", "degraded": "\x07 bad", "addresses": ["\x9b1m"]}
    )
    text += as_text("workers", [{"reason": "\x1b]0;title\x07"}]) + as_text(
        "crashes", {"\x1b": ["\x1b", {"\n": "\r"}]}
    )
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "?[2J???" in text


def test_an_outline_has_an_end():
    deep: list[object] = []
    for _ in range(200):
        deep = [deep, 1]
    assert "..." in as_text("crashes", {"deep": deep})


# -- for programs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--json", "workers"], ["workers", "--json"]])
async def test_json_is_the_result_as_it_is(server, argv, capsys):
    assert await run(*argv) == EXIT_OK
    assert json.loads(capsys.readouterr().out) == server.workers()


async def test_a_refusal_is_on_stderr_with_its_code(server, capsys):
    for argv in (["scale", "99"], ["scale", "99", "--json"]):
        assert await run(*argv) == EXIT_REFUSED
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err == "trioserve: scale: 99 workers: give a number from 1 to 16\n"


async def test_a_failing_server_is_told_like_a_refusal(server, capsys):
    server.broken = RuntimeError("no luck")
    assert await run("status") == EXIT_REFUSED
    assert "status failed: RuntimeError: no luck (the server's log has more)" in capsys.readouterr().err


async def test_a_reader_that_stops_reading_is_no_error(server, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert await run("status") == EXIT_OK


# -- finding the server --------------------------------------------------------------------------------------


def stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


async def test_the_only_live_one_is_found_among_what_is_dead(server, directory, capsys):
    stale(directory / "5.sock")
    (directory / "6.sock").write_text("no socket")
    (directory / "README").write_text("hello")
    assert await run("scale", "3") == EXIT_OK
    assert server.wanted == 3


async def test_no_server_is_69_and_says_where_was_looked(directory, capsys):
    stale(directory / "5.sock")
    assert await run("status") == EXIT_UNAVAILABLE
    first, second = capsys.readouterr().err.splitlines()
    looked = " and ".join(map(str, control.control_directories()))
    assert str(directory) in looked
    assert first == f"trioserve: no running server found; looked for control sockets in {looked}"
    assert "give its --control PATH" in second


async def test_a_missing_directory_is_no_server_either(directory, capsys):
    directory.rmdir()
    assert await run("status") == EXIT_UNAVAILABLE
    error = capsys.readouterr().err
    assert str(directory) in error
    assert "/no/such/trioserve" in error


async def test_several_servers_are_listed_to_choose_from(server, directory, capsys):
    async with serving(directory / "78.sock"):
        assert await run("scale", "9") == EXIT_USAGE
        told = capsys.readouterr().err.splitlines()
        assert told == [
            "trioserve: several servers are running; choose one with --control PATH:",
            f"trioserve:   {directory}/77.sock  pid {os.getpid()}  shop.main:app",
            f"trioserve:   {directory}/78.sock  pid {os.getpid()}  shop.main:app",
        ]
        assert server.wanted == 2
        assert await run("scale", "9", "--control", str(directory / "77.sock")) == EXIT_OK
        assert server.wanted == 9


async def test_one_of_several_that_cannot_be_asked_is_listed_without_details(server, directory, capsys):
    server.broken = RuntimeError("no luck")
    async with serving(directory / "78.sock"):
        assert await run("status") == EXIT_USAGE
        assert f"{directory}/77.sock\n" in capsys.readouterr().err


async def test_the_environment_may_name_it_as_it_does_for_the_server(server, directory, monkeypatch, capsys):
    async with serving(directory.parent / "mine.sock") as mine:
        monkeypatch.setenv("TRIOSERVE_CONTROL", str(directory.parent / "mine.sock"))
        assert await run("scale", "5") == EXIT_OK
        assert (mine.wanted, server.wanted) == (5, 2)
        monkeypatch.setenv("TRIOSERVE_CONTROL", "auto")
        assert await run("scale", "6") == EXIT_OK
        assert (mine.wanted, server.wanted) == (5, 6)
        monkeypatch.setenv("TRIOSERVE_CONTROL", "off")
        assert await run("scale", "7") == EXIT_UNAVAILABLE
        assert "TRIOSERVE_CONTROL is off here" in capsys.readouterr().err
        assert await run("--control", str(directory / "77.sock"), "scale", "7") == EXIT_OK
        assert (mine.wanted, server.wanted) == (5, 7)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("none.sock", "there is no such file"),
        ("stale.sock", "nobody listens there; its server has ended"),
        ("file", "nobody listens there; its server has ended"),
        ("x" * 200, "AF_UNIX path too long"),
    ],
)
async def test_a_given_path_where_nobody_answers_is_explained(directory, name, why, capsys):
    stale(directory / "stale.sock")
    (directory / "file").write_text("")
    assert await run("status", "--control", str(directory / name)) == EXIT_UNAVAILABLE
    assert capsys.readouterr().err == f"trioserve: no server answers on {directory / name}: {why}\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else for a moment")
def test_a_socket_of_another_user_is_named_with_its_owner(directory, capsys):
    for parent in [*directory.parents, directory]:
        if parent.stat().st_mode & 0o055 != 0o055:
            parent.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "5.sock"))
        listener.listen()
        (directory / "5.sock").chmod(0o600)
        os.seteuid(65534)
        try:
            assert main(["ctl", "status"]) == EXIT_UNAVAILABLE
            told = f"{directory / '5.sock'} belongs to user root: run this as that user, or as root"
            assert told in capsys.readouterr().err
            assert main(["ctl", "status", "--control", str(directory / "5.sock")]) == EXIT_UNAVAILABLE
            assert "it belongs to user root: run this as that user, or as root" in capsys.readouterr().err
        finally:
            os.seteuid(0)
        directory.chmod(0o700)
        os.seteuid(65534)
        try:
            assert main(["ctl", "status"]) == EXIT_UNAVAILABLE
            assert f"{directory} belongs to user root: run this" in capsys.readouterr().err
        finally:
            os.seteuid(0)


# -- servers that are none -----------------------------------------------------------------------------------


@contextmanager
def impostor(path: Path, answer: bytes | None) -> Iterator[None]:
    """Something that answers the first connection so, and closes it; None: it never does."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            if answer is None:
                done.wait(10)
            else:
                connection.recv(65536)
                connection.sendall(answer)

    done = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(10)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "has closed the connection without an answer"),
        (b"hello\n", "does not answer as trioserve does"),
        (b'{"ok":1}\n', "does not answer as trioserve does"),
        (b"[]\n", "does not answer as trioserve does"),
        (b"[" * 100_000 + b"\n", "does not answer as trioserve does"),
        (b'{"ok":true,"res', "does not answer as trioserve does"),
    ],
    ids=lambda answer: repr(answer[:12]),
)
def test_an_answer_that_is_none_is_69(directory, answer, why, capsys):
    with impostor(directory / "5.sock", answer):
        assert main(["ctl", "status"]) == EXIT_UNAVAILABLE
    assert why in capsys.readouterr().err


def test_a_server_that_turns_us_away_without_listening_is_understood():
    ours, peer = socket.socketpair()
    with ours:
        with peer:
            peer.sendall(b'{"ok":false,"error":"too many"}\n')
        assert ctl._converse(ours, {"command": "status"}, 5) == {"ok": False, "error": "too many"}


def test_a_server_that_does_not_answer_a_question_is_given_up(directory, monkeypatch, capsys):
    monkeypatch.setattr(ctl, "_PATIENCE", 0.1)
    with impostor(directory / "5.sock", None):
        assert main(["ctl", "status"]) == EXIT_UNAVAILABLE
    assert "the server has not answered within 0.1 s; it may be stopped or stuck" in capsys.readouterr().err


# -- usage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "why", "help_"),
    [
        ([], "arguments are required: COMMAND", "trioserve ctl --help"),
        (["stauts"], "'stauts': expected one of status, workers, ", "trioserve ctl --help"),
        (["stauts"], "did you mean status?", "trioserve ctl --help"),
        (["scale"], "arguments are required: N", "trioserve ctl scale --help"),
        (["scale", "four"], "'four' is not a whole number, such as 4", "trioserve ctl scale --help"),
        (["scale", "-1"], "'-1' is not a whole number", "trioserve ctl scale --help"),
        (["scale", "٣"], "is not a whole number", "trioserve ctl scale --help"),
        (["recycle", "all"], "'all' is not a whole number", "trioserve ctl recycle --help"),
        (["status", "--jso"], "unknown flag --jso; did you mean --json?", "trioserve ctl --help"),
        (["status", "now"], "there is no place for 'now'", "trioserve ctl --help"),
    ],
)
def test_a_usage_error_exits_2_and_points_to_the_help(argv, why, help_, capsys):
    assert main(["ctl", *argv]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert why in error
    assert f"\ntrioserve: try {help_}" in error


def test_the_help_explains_each_command_and_gives_examples(capsys):
    assert main(["ctl", "--help"]) == EXIT_OK
    text = capsys.readouterr().out
    for command in control._COMMANDS:
        assert f"\n    {command} " in text
        assert main(["ctl", command, "--help"]) == EXIT_OK
        assert f"usage: trioserve ctl {command} " in capsys.readouterr().out
    assert "trioserve ctl scale 4" in text
    assert "69 no server answers" in text
    assert "TRIOSERVE_CONTROL" in text


def test_client_and_server_know_the_same_commands():
    (commands,) = [action for action in build_ctl_parser()._actions if action.dest == "command"]
    assert commands.choices is not None
    assert set(commands.choices) == control._COMMANDS.keys()


def test_the_servers_help_mentions_it(capsys):
    assert main(["--help"]) == EXIT_OK
    assert "trioserve ctl --help" in capsys.readouterr().out


# -- as a process --------------------------------------------------------------------------------------------


async def test_the_command_as_a_process(server, directory):
    path = str(directory / "77.sock")
    done = await run_to_end(*trioserve_command("ctl", "status", "--json"), env={"TRIOSERVE_CONTROL": path})
    assert (done.returncode, done.stderr.text) == (EXIT_OK, "")
    assert json.loads(done.stdout.text) == server.status()
    done = await run_to_end(*trioserve_command("ctl", "scale", "99", "--control", path))
    assert (done.returncode, done.stdout.text) == (EXIT_REFUSED, "")
    assert done.stderr.text == "trioserve: scale: 99 workers: give a number from 1 to 16\n"


async def test_ctrl_c_ends_the_waiting_and_not_the_command(server, directory):
    command = trioserve_command("ctl", "reload", "--control", str(directory / "77.sock"))
    async with start_process(*command) as process:
        await server.waiting.wait()
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
        assert process.stderr.text == ""
    server.gate.set()
    with trio.fail_after(30):
        while server.generation == 1:
            await trio.sleep(0.01)
