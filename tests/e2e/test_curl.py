"""curl as it comes: each flag that changes what goes over the wire, against both engines.

One server for each engine serves all tests of this file: they only ever ask it for things.
"""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .process import PATIENCE, REPOSITORY, RUNNING_ON, clean_environment, require_tool, trioserve_command

MEGABYTE = 1024 * 1024


@dataclass
class Server:
    address: str
    unix_socket: Path

    @property
    def url(self) -> str:
        return f"http://{self.address}"


@contextlib.contextmanager
def running(*flags: str, binds: int) -> Iterator[list[str]]:
    """The server for all tests of a file; the addresses of so many binds that are not unix sockets."""
    with subprocess.Popen(
        trioserve_command(*flags, "tests.e2e.apps:app"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
        cwd=REPOSITORY,
    ) as process:
        try:
            assert process.stderr is not None
            addresses: list[str] = []
            while len(addresses) < binds:
                line = process.stderr.readline()
                assert line, "it has ended before it served"
                if found := RUNNING_ON.search(line):
                    addresses.append(found.group(1))
            yield addresses
            process.terminate()
            _, errors = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, errors
            assert "ERROR" not in errors
        finally:
            process.kill()


@pytest.fixture(scope="module", params=["httptools", "h11"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    require_tool("curl")
    unix_socket = tmp_path_factory.mktemp("curl") / "app.sock"
    binds = ("--bind", "127.0.0.1:0", "--bind", f"unix:{unix_socket}")
    # Whoever is refused has as long as a busy machine may need to send what he has begun.
    limit = ("--max-body-size", str(8 * MEGABYTE), "--linger-timeout", "60")
    with running(*binds, *limit, "--http-engine", request.param, binds=1) as [address]:
        yield Server(address, unix_socket)


def curl(*arguments: str, fails: bool = False) -> tuple[str, str]:
    """The body, and what curl tells of the conversation (`> ` sent, `< ` received), in lower case."""
    command = ["curl", "--silent", "--show-error", "--verbose", "--max-time", "20", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (process.returncode != 0) == fails, process.stderr
    return process.stdout, process.stderr.lower()


def file_of(size: int, folder: Path) -> str:
    path = folder / "upload"
    path.write_bytes(b"x" * size)
    return f"@{path}"


def test_http_1_1_keeps_the_connection_for_several_requests(server):
    body, talk = curl(f"{server.url}/", f"{server.url}/describe", f"{server.url}/")
    assert body.startswith("helloGET /describe")
    assert body.endswith("hello")
    assert talk.count("< http/1.1 200") == 3
    assert len(re.findall(r"re-?using existing (http: )?connection", talk)) == 2


def test_http_1_0_is_answered_and_closed(server):
    body, talk = curl("--http1.0", f"{server.url}/describe")
    assert body.splitlines()[0] == "GET /describe  1.0"
    assert "< http/1.1 200" in talk
    assert "< connection: close" in talk
    # What has no length ends with the connection there: no chunks for HTTP/1.0.
    body, talk = curl("--http1.0", f"{server.url}/large?3")
    assert len(body) == 3 * MEGABYTE
    assert "transfer-encoding" not in talk


EXPECT = ("--header", "Expect: 100-continue")


def test_expect_100_continue_is_answered_when_the_app_reads(server, tmp_path):
    body, talk = curl(*EXPECT, "--data-binary", file_of(2 * MEGABYTE, tmp_path), f"{server.url}/count")
    assert body == str(2 * MEGABYTE)
    assert "< http/1.1 100 continue" in talk


def test_an_app_that_answers_without_reading_never_asks_for_the_body(server, tmp_path):
    body, talk = curl(*EXPECT, "--data-binary", file_of(2 * MEGABYTE, tmp_path), f"{server.url}/")
    assert body == "hello"
    assert "< http/1.1 100" not in talk
    assert "< connection: close" in talk


def test_chunked_uploads_arrive_whole(server, tmp_path):
    chunked = ("--header", "Transfer-Encoding: chunked", "--header", "Expect:")
    body, _talk = curl(*chunked, "--data-binary", file_of(3 * MEGABYTE, tmp_path), f"{server.url}/count")
    assert body == str(3 * MEGABYTE)


def test_a_body_over_the_limit_is_refused_with_413_that_curl_can_read(server, tmp_path):
    upload = file_of(9 * MEGABYTE, tmp_path)
    _body, talk = curl("--header", "Expect:", "--data-binary", upload, f"{server.url}/count")
    assert "< http/1.1 413" in talk


def test_an_offer_of_http2_is_ignored_and_the_request_served_as_http_1_1(server):
    body, talk = curl("--http2", f"{server.url}/describe")
    assert "> upgrade: h2c" in talk
    assert "< http/1.1 200" in talk
    assert "< http/1.1 101" not in talk
    assert body.splitlines()[0] == "GET /describe  1.1"


def test_http2_prior_knowledge_is_refused_in_words_that_name_the_version(server):
    curl("--http2-prior-knowledge", f"{server.url}/", fails=True)
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as sock:
        sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
        assert sock.recv(1000).startswith(b"HTTP/1.1 505 ")


def test_head_has_the_headers_of_get_and_no_body(server):
    # curl hangs, or complains, where bytes follow the head.
    body, talk = curl("--head", f"{server.url}/", f"{server.url}/large?3", f"{server.url}/")
    assert body.count("HTTP/1.1 200") == 3
    assert talk.count("content-length: 5") == 2
    assert "hello" not in body


def test_a_range_is_the_apps_business_and_passes_both_ways(server):
    body, talk = curl("--range", "2-4", f"{server.url}/range")
    assert body == "cde"
    assert "< http/1.1 206 partial content" in talk
    assert "< content-range: bytes 2-4/26" in talk


def test_paths_reach_the_app_as_they_were_sent(server):
    target = "/a/../describe/./%2e%2E/x%2Fy;p=1?q=%20&r=/../"
    body, talk = curl("--path-as-is", f"{server.url}{target}")
    assert f"> get {target.lower()} http/1.1" in talk
    assert body == "hello", "the app sees no /describe: dots are not resolved"
    body, _talk = curl("--path-as-is", f"{server.url}/describe?q=%20&r=/../;s")
    assert body.splitlines()[0] == "GET /describe q=%20&r=/../;s 1.1"


def test_a_client_that_goes_through_a_proxy_sends_absolute_form(server):
    body, talk = curl("--proxy", server.url, "http://elsewhere.example/describe?x=1")
    assert "> get http://elsewhere.example/describe?x=1 http/1.1" in talk
    assert body.splitlines()[:2] == ["GET /describe x=1 1.1", "host: elsewhere.example"]


def test_connect_is_refused_with_501(server):
    _body, talk = curl("--proxytunnel", "--proxy", server.url, "http://elsewhere.example/", fails=True)
    assert "< http/1.1 501" in talk


def test_options_star_reaches_the_app(server):
    body, talk = curl("--request", "OPTIONS", "--request-target", "*", f"{server.url}/")
    assert "> options * http/1.1" in talk
    assert "< http/1.1 200" in talk
    assert body == "hello"


def test_unix_sockets_are_reached(server):
    body, _talk = curl("--unix-socket", str(server.unix_socket), "http://anything/")
    assert body == "hello"


def test_multipart_forms_arrive(server, tmp_path):
    form = ("--form", f"file={file_of(100_000, tmp_path)}", "--form", "field=value")
    body, talk = curl(*form, f"{server.url}/count")
    sent = int(talk.partition("> content-length: ")[2].split()[0])
    assert int(body) == sent > 100_000
