"""TLS in real processes: through supervisors, forks, upgrades and socket activation; certificates read anew."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.net.tls_sockets import Shop
from trioserve.testing import RawClient, connect, tls_client

from .process import (
    ServerProcess,
    require_tool,
    run_to_end,
    serve_command,
    start_process,
    trioserve_command,
)

APP = "tests.e2e.apps:app"

pytestmark = pytest.mark.slow


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def flags(shop: Shop, *names: str) -> list[str]:
    certfile, keyfile = shop.issue(*(names or ("localhost",)))
    return ["--certfile", certfile, "--keyfile", keyfile]


@asynccontextmanager
async def connected(shop: Shop, address: str, host: str = "localhost") -> AsyncIterator[RawClient]:
    async with connect(address, client=tls_client(shop.context(), host)) as client:
        yield client


def names_of(client: RawClient) -> set[str]:
    assert isinstance(client.sock, ssl.SSLSocket)
    found = client.sock.getpeercert()
    assert found is not None
    return {value for _, value in found["subjectAltName"]}  # type: ignore[misc]


async def ctl(path: Path, *arguments: str) -> ServerProcess:
    return await run_to_end(*trioserve_command("ctl", *arguments, "--control", str(path)))


# -- the start -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["0", "2"])
async def test_bad_files_end_the_start_with_78(shop: Shop, workers: str) -> None:
    certfile, keyfile = shop.issue("localhost")
    other = shop.issue("other")[1]
    for keys, text in (
        (
            ["--keyfile", other],
            f"command line: --keyfile {other}: the key does not belong to the certificate",
        ),
        ([], "there is no private key in it"),
        (["--keyfile", f"{keyfile}x"], "it cannot be read"),
    ):
        server = await run_to_end(
            *trioserve_command(
                "--bind", "127.0.0.1:0", "--workers", workers, "--certfile", certfile, *keys, APP
            )
        )
        assert server.returncode == 78
        assert text in server.stderr.text
        assert "Traceback" not in server.stderr.text


@pytest.mark.parametrize("options", [["--workers", "0"], ["--workers", "2"], ["--workers", "2", "--preload"]])
async def test_both_kinds_of_addresses_are_served(shop: Shop, tmp_path: Path, options: list[str]) -> None:
    plain = tmp_path / "plain.sock"
    async with serve_command(
        APP, *flags(shop), "--insecure-bind", f"unix:{plain}", *options, workers=None
    ) as server:
        assert f"Running on https://{server.address} " in server.stderr.text
        for _ in range(4):
            async with connected(shop, server.address) as client:
                assert (await client.get("/")).status == 200
            async with connect(f"unix:{plain}") as client:
                assert (await client.get("/")).status == 200
        assert (await server.get("/")).status == 400


async def test_sockets_of_the_service_manager_speak_tls_or_are_called_insecure(shop: Shop) -> None:
    require_tool("true")
    with socket.create_server(("127.0.0.1", 0)) as secure, socket.create_server(("127.0.0.1", 0)) as plain:
        for workers in ("0", "2"):
            command = trioserve_command("--workers", workers, *flags(shop), APP)
            # Where the two sockets are to be, there may be one of them already.
            high = [fcntl.fcntl(sock, fcntl.F_DUPFD, 60) for sock in (secure, plain)]
            script = (
                "import os, sys\n"
                "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='2', LISTEN_FDNAMES='web:insecure')\n"
                f"os.dup2({high[0]}, 3); os.dup2({high[1]}, 4)\n"
                "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
            )
            try:
                async with start_process(sys.executable, "-c", script, *command[1:], pass_fds=high) as server:
                    await server.wait_running()
                    async with connected(shop, f"127.0.0.1:{secure.getsockname()[1]}") as client:
                        assert (await client.get("/")).status == 200
                    async with connect(f"127.0.0.1:{plain.getsockname()[1]}") as client:
                        assert (await client.get("/")).status == 200
                    assert f"insecure (http://127.0.0.1:{plain.getsockname()[1]})" in server.stderr.text
            finally:
                for number in high:
                    os.close(number)


# -- certificates read anew ----------------------------------------------------------------------------------


async def test_sighup_without_a_supervisor_swaps_certificates_in_place(shop: Shop) -> None:
    async with (
        serve_command(APP, *flags(shop), "--keep-alive", "600") as server,
        connected(shop, server.address) as kept,
    ):
        assert (await kept.get("/")).status == 200
        shop.issue("localhost", "new.example.com")
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("certificates are reloaded")
        async with connected(shop, server.address) as client:
            assert "new.example.com" in names_of(client)
        assert (await kept.get("/")).status == 200
        Path(shop.issue("localhost")[1]).write_text("")
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for(
            "certificates are not reloaded, serving on with the old ones: .*no private key"
        )
        async with connected(shop, server.address) as client:
            assert "new.example.com" in names_of(client)
        assert (await kept.get("/")).status == 200


async def test_sighup_with_a_supervisor_rolls_and_a_bad_file_stops_it(shop: Shop) -> None:
    async with serve_command(APP, *flags(shop), workers=1) as server:
        shop.issue("localhost", "new.example.com")
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reloaded: generation 2")
        async with connected(shop, server.address) as client:
            assert "new.example.com" in names_of(client)
        _, keyfile = shop.issue("localhost")
        before = Path(keyfile).read_text()
        Path(keyfile).write_text("")
        server.send_signal(signal.SIGHUP)
        await server.stderr.wait_for("reload failed, serving on as before: .*there is no private key in it")
        async with connected(shop, server.address) as client:
            assert "new.example.com" in names_of(client)
        Path(keyfile).write_text(before)


async def test_ctl_certificates_drops_no_connection(shop: Shop, tmp_path: Path) -> None:
    control = tmp_path / "control.sock"
    more = ("--control", str(control), "--keep-alive", "600")
    async with serve_command(APP, *flags(shop), *more, workers=2) as server:
        async with connected(shop, server.address) as kept:
            assert (await kept.get("/")).status == 200
            shop.issue("localhost", "new.example.com")
            done = await ctl(control, "certificates")
            assert done.returncode == 0, done.stderr.text
            assert "certificates: done" in done.stdout.text
            for _ in range(6):
                async with connected(shop, server.address) as client:
                    assert "new.example.com" in names_of(client)
            assert (await kept.get("/")).status == 200
            Path(shop.issue("localhost")[1]).write_text("")
            refused = await ctl(control, "certificates")
            assert refused.returncode == 1
            assert "serving on with the old ones" in refused.stderr.text
            assert "no private key in it" in refused.stderr.text
            assert (await kept.get("/")).status == 200


async def test_ctl_certificates_without_tls_is_refused(tmp_path: Path) -> None:
    control = tmp_path / "control.sock"
    async with serve_command(APP, "--control", str(control), workers=1):
        refused = await ctl(control, "certificates")
        assert refused.returncode == 1
        assert "there is no TLS here" in refused.stderr.text


async def test_an_upgrade_keeps_what_each_address_speaks(shop: Shop, tmp_path: Path) -> None:
    plain, pid = tmp_path / "plain.sock", tmp_path / "pid"
    async with serve_command(
        APP, *flags(shop), "--insecure-bind", f"unix:{plain}", "--pid", str(pid), workers=1
    ) as server:
        server.send_signal(signal.SIGUSR2)
        found = await server.stderr.wait_for(r"the new supervisor \(pid (\d+)\) is ready")
        await server.stderr.wait_for(r"\] stopped")
        async with connected(shop, server.address) as client:
            assert (await client.get("/")).status == 200
        async with connect(f"unix:{plain}") as client:
            assert (await client.get("/")).status == 200
        os.kill(int(found.group(1)), signal.SIGTERM)
        assert await server.wait() == 0


# -- others' clients -----------------------------------------------------------------------------------------


async def test_openssl_updates_its_keys_in_the_middle(shop: Shop) -> None:
    """`K` has s_client ask for new keys both ways, between two requests on one connection."""
    openssl = require_tool("openssl")
    async with serve_command(APP, *flags(shop)) as server:
        process = await trio.lowlevel.open_process(
            [
                openssl,
                "s_client",
                "-connect",
                server.address,
                "-servername",
                "localhost",
                "-tls1_3",
                "-quiet",
            ][:-1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        request = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
        text = b""
        with trio.fail_after(20):
            await process.stdin.send_all(request)
            while b"HTTP/1.1 200" not in text:
                text += await process.stdout.receive_some()
            await process.stdin.send_all(b"K\n")
            while b"KEYUPDATE" not in text:
                text += await process.stdout.receive_some()
            await trio.sleep(0.2)  # a line that begins with K is a command only if it is read by itself
            await process.stdin.send_all(request)
            while text.count(b"HTTP/1.1 200") < 2:
                text += await process.stdout.receive_some()
        process.kill()
        await process.wait()
