"""What becomes of a process when its app fails: the answer, the drain, the report, the exit code."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat

import pytest
import trio

from .apps import SECRET
from .process import held_request, serve_command, start_process, trioserve_command, wait_listening

APP = "tests.e2e.apps:app"

CONTAIN = ("--on-app-error", "contain")


# -- the table ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, status, code, row",
    [
        ("/raise", 500, 75, "A1"),
        ("/fatal", 500, 75, "A6"),
        ("/exit", 503, 7, "X1"),
        ("/interrupt", 503, 130, "X2"),
        ("/memory", 503, 83, "M1"),
    ],
)
async def test_what_the_app_raises_decides_the_answer_and_the_exit_code(path, status, code, row):
    async with serve_command(APP) as server:
        response = await server.get(path)
        assert (response.status, response.header("connection")) == (status, "close")
        assert await server.wait() == code
    assert [(report["row"], report["nth"]) for report in server.reports()] == [(row, 1)]


async def test_a_nursery_that_the_app_leaves_open_ends_the_process_with_70():
    async with serve_command(APP) as server:
        assert (await server.get("/leak")).status == 500
        assert await server.wait() == 70
    assert server.reports()[0]["row"] == "B1"
    assert "lifespan shutdown is skipped" in server.stderr.text


@pytest.mark.slow
async def test_a_broken_trio_ends_after_a_short_drain_with_a_report_and_70():
    async with serve_command(APP, "--graceful-timeout", "3600") as server:
        # trio cancels everything; the request gets the grace of a process whose state cannot be trusted.
        assert (await server.get("/break-trio")).status == 503
        assert await server.wait() == 70
    assert [report["row"] for report in server.reports()] == ["S2"]
    assert '"message": "in a system task"' in json.dumps(server.reports()[0])


async def test_replace_drains_before_it_ends_so_that_other_requests_finish():
    async with serve_command(APP) as server:
        async with held_request(server) as other:
            assert (await server.get("/raise")).status == 500
            await server.stderr.wait_for(r"draining: .*\(A1\); 1 requests in flight")
            assert server.returncode is None
            await other.send(b"!")
            assert (await other.read_response("POST")).body == b"done!"
        assert await server.wait() == 75
    assert server.stdout.text.endswith("lifespan.shutdown\n")


async def test_contain_answers_500_and_serves_on():
    async with serve_command(APP, *CONTAIN) as server:
        for _ in range(3):
            assert (await server.get("/raise")).status == 500
        assert (await server.get()).status == 200
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
    # The same error again is counted, not written down in full each time.
    assert [(report["row"], report["verdict"]) for report in server.reports()] == [("A1", "contain")]


async def test_a_contained_class_of_errors_serves_on_whatever_the_policy_is():
    async with serve_command(APP, "--contain-error", "LookupError") as server:
        assert (await server.get("/raise")).status == 500
        assert (await server.get()).status == 200
    assert [report["row"] for report in server.reports()] == ["A7"]


async def test_a_fatal_class_of_errors_ends_the_process_although_errors_are_contained():
    async with serve_command(APP, *CONTAIN, "--fatal-error", "LookupError") as server:
        assert (await server.get("/raise")).status == 500
        assert await server.wait() == 75
    assert [report["row"] for report in server.reports()] == ["A6"]


async def test_crash_ends_without_waiting_for_other_requests():
    async with serve_command(APP, "--on-app-error", "crash") as server, held_request(server) as other:
        assert (await server.get("/raise")).status == 500
        assert (await other.read_response("POST")).status == 503
        assert await server.wait() == 75


async def test_an_error_in_the_middle_of_a_response_shows_as_truncation():
    async with serve_command(APP, *CONTAIN) as server:
        response = await server.get("/raise-late")
        assert (response.status, response.body, response.complete) == (200, b"half", False)
    assert [report["row"] for report in server.reports()] == ["A2"]


async def test_a_lifespan_task_that_dies_while_serving_ends_the_process():
    async with serve_command("tests.e2e.apps:lifespan_dies") as server:
        assert (await server.get()).status == 200
        assert await server.wait() == 75
    assert [report["row"] for report in server.reports()] == ["L3"]


async def test_an_exit_code_of_0_cannot_hide_that_the_app_has_ended_the_server(tmp_path):
    (tmp_path / "quits.py").write_text("import sys\nasync def app(scope, receive, send):\n    sys.exit(0)\n")
    async with serve_command(f"{tmp_path}/quits.py:app", "--lifespan", "off") as server:
        assert (await server.get()).status == 503
        assert await server.wait() == 75


# -- the hard exit ------------------------------------------------------------------------------------------

SOON = ("--graceful-timeout", "0.1", "--shutdown-timeout", "0.1", "--hard-exit-after", "0.1")


@pytest.mark.slow
async def test_an_app_that_eats_its_cancellation_is_ended_by_the_watchdog():
    async with serve_command(APP, *SOON) as server, held_request(server, "/stubborn"):
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 82
    (report,) = server.reports()
    assert report["row"] == "H2"
    assert "SIGTERM" in report["summary"]
    assert "cut: POST /stubborn" in server.stderr.text


@pytest.mark.slow
async def test_an_app_that_blocks_the_loop_while_draining_is_ended_by_the_watchdog_which_shows_where():
    async with serve_command(APP, *SOON) as server, held_request(server, "/block") as client:
        server.send_signal(signal.SIGTERM)
        await server.stderr.wait_for("draining")
        await client.send(b"!")
        assert await server.wait() == 82
    (report,) = server.reports()
    main_thread = next(thread for thread in report["threads"] if thread["name"] == "MainThread")
    assert "_block" in [frame["function"] for frame in main_thread["frames"]]


# -- the report ---------------------------------------------------------------------------------------------


async def test_the_report_is_one_json_line_on_stderr_and_a_private_file_in_crash_dir(tmp_path):
    folder = tmp_path / "crashes"
    async with serve_command(APP, "--crash-dir", str(folder)) as server:
        await server.get("/raise")
        assert await server.wait() == 75
    (path,) = folder.iterdir()
    (report,) = server.reports()
    assert json.loads(path.read_text()) == report
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert report["pid"] == server.pid
    assert report["verdict"] == "replace"
    assert report["request"]["path"] == "/raise"
    assert report["request"]["response_state"] == "none"
    frames = report["error"]["frames"]
    assert (frames[-1]["function"], frames[-1]["file"].endswith("tests/e2e/apps.py")) == ("_raise", True)


async def test_no_secret_of_a_request_or_the_environment_is_written_anywhere(tmp_path):
    access = tmp_path / "access.log"
    flags = ("--crash-dir", str(tmp_path / "crashes"), "--access-logfile", str(access))
    async with serve_command(APP, *flags, env={"DATABASE_PASSWORD": SECRET}) as server:
        async with server.connect() as client:
            headers = [
                ("authorization", f"Bearer {SECRET}"),
                ("cookie", f"session={SECRET}"),
                ("x-key", SECRET),
            ]
            response = await client.request("POST", f"/raise?token={SECRET}", headers, SECRET.encode())
            assert response.status == 500
            assert SECRET.encode() not in response.body
        assert await server.wait() == 75
    (path,) = (tmp_path / "crashes").iterdir()
    (report,) = server.reports()
    assert "authorization" in report["request"]["header_names"], "names help, values do not"
    for place, text in {
        "stdout": server.stdout.text,
        "stderr": server.stderr.text,
        "report": path.read_text(),
        "access log": access.read_text(),
    }.items():
        assert SECRET not in text, place


async def test_a_crash_dir_that_cannot_be_written_costs_only_the_file(tmp_path):
    async with serve_command(APP, "--crash-dir", str(tmp_path / "file")) as server:
        (tmp_path / "file").touch()
        assert (await server.get("/raise")).status == 500
        assert await server.wait() == 75
    assert len(server.reports()) == 1
    assert f"cannot write a crash report to {tmp_path}/file" in server.stderr.text


async def test_errors_of_many_requests_at_once_end_in_one_drain_and_exit():
    async with serve_command(APP) as server:
        statuses = []

        async def get():
            try:
                statuses.append((await server.get("/raise")).status)
            except (OSError, EOFError):
                statuses.append(0)  # it came after the listener had closed

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(get)
        assert await server.wait() == 75
    assert statuses.count(500) >= 1
    assert set(statuses) <= {500, 503, 0}
    assert server.stderr.text.count("INFO] draining:") == 1


async def test_the_error_log_shows_the_traceback_once_with_the_verdict():
    async with serve_command(APP, *CONTAIN) as server:
        await server.get("/raise?query")
        await server.stderr.wait_for("LookupError: nothing for 7 bytes")
    told = "the app raised before it had responded in GET /raise on connection 1; row A1, serving on"
    assert server.stderr.text.count(told) == 1


# -- the other end of the machine ---------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_stderr_that_nobody_reads_does_not_stop_the_server(tmp_path):
    """A report is longer than this pipe: the fault must still end in an answer, and the server go on."""
    address = f"unix:{tmp_path}/app.sock"
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    try:
        async with start_process(
            *trioserve_command("--bind", address, *CONTAIN, APP), stderr=writer
        ) as server:
            server.address = address
            await wait_listening(address)
            for path in ("/raise", "/raise-late", "/raise"):
                assert (await server.get(path)).status in (200, 500)
            assert (await server.get()).body == b"hello"
            server.send_signal(signal.SIGTERM)
            assert await server.wait() == 0
    finally:
        os.close(reader)
        os.close(writer)
