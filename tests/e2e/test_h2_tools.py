"""HTTP/2 and TLS as other programs speak them: h2load, nghttp, curl, httpx; nginx and HAProxy in front.

One server for each HTTP/2 engine serves most tests of this file, over TLS and in the clear.
"""

from __future__ import annotations

import re
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.certificates import Certificates
from trioserve.testing import RawClient, connect

from .process import PATIENCE, require_tool, serve_command
from .test_curl import EXPECT, MEGABYTE, curl, file_of, running
from .test_proxies import APP, run_haproxy, run_nginx, send_chunked


@dataclass
class Server:
    """Attributes: https, http: its URLs, the second for HTTP/2 with prior knowledge. certificates: its own."""

    https: str
    http: str
    certificates: Certificates

    def url(self, scheme: str, path: str = "/") -> str:
        return (self.https if scheme == "https" else self.http) + path


@pytest.fixture(scope="module", params=["h2", "own"])
def server(request: pytest.FixtureRequest, certificates: Certificates) -> Iterator[Server]:
    binds = ("--bind", "127.0.0.1:0", "--insecure-bind", "127.0.0.2:0", "--h2c")
    flags = (*certificates.flags, "--max-body-size", str(8 * MEGABYTE), "--http2-engine", request.param)
    with running(*binds, *flags, binds=2) as addresses:
        secure, plain = addresses
        yield Server(f"https://{secure.replace('127.0.0.1', 'localhost')}", f"http://{plain}", certificates)


schemes = pytest.mark.parametrize("scheme", ["https", "http"])


def tool(name: str, *arguments: str) -> str:
    """What a program has to say; it must have succeeded."""
    done = subprocess.run([require_tool(name), *arguments], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# -- h2load -------------------------------------------------------------------------------------------------------


def load(*arguments: str, requests: int = 1000) -> str:
    """What h2load says, all of whose requests have been answered with 2xx."""
    told = tool("h2load", "-n", str(requests), *arguments)
    assert f"{requests} done, {requests} succeeded, 0 failed, 0 errored, 0 timeout" in told
    assert f"status codes: {requests} 2xx, 0 3xx, 0 4xx, 0 5xx" in told
    return told


@schemes
def test_h2load_sees_no_error_on_many_streams(server: Server, scheme: str) -> None:
    told = load("-c", "8", "-m", "16", server.url(scheme))
    assert ("Application protocol: h2\n" in told) == (scheme == "https")


@schemes
def test_h2load_uploads_through_small_windows(server: Server, scheme: str, tmp_path: Path) -> None:
    """It sends ahead no more than it is let, and takes 4 KiB of a response at a time."""
    upload = file_of(200_000, tmp_path).removeprefix("@")
    load(
        "-c", "2", "-m", "10", "-w", "12", "-W", "14", "-d", upload, server.url(scheme, "/echo"), requests=40
    )


def test_h2load_downloads_many_large_bodies_at_once(server: Server) -> None:
    told = load("-c", "2", "-m", "20", server.url("https", "/large?1"), requests=40)
    assert f"({40 * MEGABYTE}) data" in told


def test_h2load_speaks_http_1_1_over_tls(server: Server) -> None:
    told = load("--h1", "-c", "8", server.url("https"))
    assert "Application protocol: http/1.1\n" in told


# -- nghttp -------------------------------------------------------------------------------------------------------


def frames(*arguments: str) -> str:
    """The conversation, frame by frame, without clock."""
    return re.sub(r"^\[ *[\d.]+\] ", "", tool("nghttp", "-v", "--timeout=20", *arguments), flags=re.MULTILINE)


@schemes
def test_the_settings_say_what_is_offered(server: Server, scheme: str) -> None:
    told = frames(server.url(scheme))
    ours = told[told.index("recv SETTINGS frame") :].partition("\n[")[0]
    settings = dict(re.findall(r"\(0x(\w\w)\):(\d+)\]", ours.partition("send ")[0]))
    assert settings["03"] == "100", "MAX_CONCURRENT_STREAMS"
    assert settings["08"] == "1", "ENABLE_CONNECT_PROTOCOL: WebSocket"
    assert settings["09"] == "1", "NO_RFC7540_PRIORITIES"
    assert settings["06"] == "65536", "MAX_HEADER_LIST_SIZE"
    assert settings.get("02", "0") == "0", "ENABLE_PUSH"
    assert "recv (stream_id=13) :status: 200" in told
    assert "hello" in told
    assert "RST_STREAM" not in told
    assert "error_code=NO_ERROR" in told


@schemes
def test_a_response_may_have_trailers(server: Server, scheme: str) -> None:
    told = frames("-H", "te: trailers", server.url(scheme, "/trailers"))
    received = told[told.index("recv (stream_id=13) :status: 200") :]
    assert re.findall(r" again|recv \(stream_id=13\) x-sum: 11|; END_STREAM", received) == [
        " again",
        "recv (stream_id=13) x-sum: 11",
        "; END_STREAM",
    ]


@schemes
def test_early_hints_come_before_the_response(server: Server, scheme: str) -> None:
    told = frames(server.url(scheme, "/hints"))
    received = re.findall(r"recv \(stream_id=13\) (:status: \d+|link: \S+)", told)
    assert received == [
        ":status: 103",
        "link: </style.css>;",
        ":status: 103",
        "link: </app.js>;",
        ":status: 200",
    ]


def test_a_request_may_have_trailers_padding_and_many_fields(server: Server, tmp_path: Path) -> None:
    upload = file_of(300_000, tmp_path).removeprefix("@")
    told = frames(
        "--trailer", "x-sum: 7", "-b", "64", "--continuation", "-d", upload, server.url("https", "/count")
    )
    assert "recv (stream_id=13) :status: 200" in told
    assert re.search("^300000", told, re.MULTILINE)


def test_an_upload_without_a_length_that_waits_for_100(server: Server, tmp_path: Path) -> None:
    upload = file_of(50_000, tmp_path).removeprefix("@")
    told = frames("--expect-continue", "--no-content-length", "-d", upload, server.url("https", "/count"))
    assert re.findall(r":status: \d+", told) == [":status: 100", ":status: 200"]
    assert re.search("^50000", told, re.MULTILINE)


@pytest.mark.parametrize(
    "priority",
    [("-H", "priority: u=0, i"), ("-p", "256"), ("--no-rfc7540-pri", "-H", "priority: u=9, junk;;")],
)
def test_priorities_of_either_kind_are_taken(server: Server, priority: tuple[str, ...]) -> None:
    told = frames("-n", "-m", "10", *priority, server.url("https", "/large?1"))
    assert len(re.findall(r"recv \(stream_id=\d+\) :status: 200", told)) == 10
    assert "RST_STREAM" not in told


def test_a_slow_start_with_tiny_windows_ends_well(server: Server) -> None:
    told = frames("-n", "-w", "8", "-W", "9", server.url("https", "/range"))
    assert "recv (stream_id=13) :status: 200" in told
    assert "RST_STREAM" not in told


@schemes
@pytest.mark.parametrize(("path", "megabytes", "status"), [("/", 5, 200), ("/count", 9, 413)])
def test_an_answer_before_the_end_of_the_body_is_whole_and_the_rest_is_not_wanted(
    server: Server, scheme: str, path: str, megabytes: int, status: int, tmp_path: Path
) -> None:
    """RFC 9113 section 8.1. (curl 7.88 does not see such an answer, from nginx neither.)"""
    upload = file_of(megabytes * MEGABYTE, tmp_path).removeprefix("@")
    told = frames("-n", "-m", "2", "-d", upload, server.url(scheme, path))
    for stream in (13, 15):
        assert f"recv (stream_id={stream}) :status: {status}" in told
        assert re.search(
            rf"recv RST_STREAM frame <length=4, flags=0x00, stream_id={stream}>\n +\(error_code=NO_ERROR",
            told,
        )
    assert "recv GOAWAY" not in told


# -- curl ---------------------------------------------------------------------------------------------------------


def secure(server: Server, *arguments: str, fails: bool = False) -> tuple[str, str]:
    return curl("--cacert", str(server.certificates.ca), *arguments, fails=fails)


def test_alpn_chooses_http_2_and_falls_back_to_http_1_1(server: Server) -> None:
    url = server.url("https", "/describe")
    for flags, version in (("--http2",), "2"), (("--http1.1",), "1.1"), (("--no-alpn", "--http1.1"), "1.1"):
        body, talk = secure(server, *flags, url)
        assert f"< http/{version} 200" in talk
        assert body.splitlines()[0] == f"GET /describe  {version}"
        assert "ssl certificate verify ok" in talk


def test_http_1_0_is_served_over_tls(server: Server) -> None:
    body, talk = secure(server, "--http1.0", server.url("https", "/large?3"))
    assert len(body) == 3 * MEGABYTE
    assert "< connection: close" in talk
    # The end of the body is the end of the connection: without close_notify curl would call it cut off.
    assert "< http/1.1 200" in talk


def test_http_2_with_prior_knowledge(server: Server) -> None:
    body, talk = curl("--http2-prior-knowledge", server.url("http", "/describe"))
    assert "< http/2 200" in talk
    assert body.splitlines()[:2] == ["GET /describe  2", f"host: {server.http.removeprefix('http://')}"]
    # HTTP/1.1 goes on being served beside it.
    assert "< http/1.1 200" in curl(server.url("http"))[1]


@pytest.mark.parametrize(
    ("flags", "version"), [(("--tls-max", "1.2"), "tlsv1.2"), (("--tlsv1.3",), "tlsv1.3")]
)
def test_both_versions_of_tls_carry_both_of_http(
    server: Server, flags: tuple[str, ...], version: str
) -> None:
    for http in ("2", "1.1"):
        _body, talk = secure(server, f"--http{http}", *flags, server.url("https"))
        assert f"ssl connection using {version}" in talk
        assert f"< http/{http} 200" in talk


def test_older_versions_of_tls_are_turned_away(server: Server) -> None:
    _body, talk = secure(
        server, "--tls-max", "1.1", "--ciphers", "ALL:@SECLEVEL=0", server.url("https"), fails=True
    )
    assert "protocol version" in talk


def test_a_certificate_that_curl_does_not_know_ends_the_handshake_and_nothing_else(server: Server) -> None:
    curl(server.url("https"), fails=True)
    assert secure(server, server.url("https"))[0] == "hello"


def test_plain_http_on_the_port_for_tls_is_told_so(server: Server) -> None:
    _body, talk = curl(server.https.replace("https://", "http://") + "/")
    assert "< http/1.1 400" in talk
    assert "https" in _body.lower() or "tls" in _body.lower()


def test_uploads_and_downloads_over_http_2(server: Server, tmp_path: Path) -> None:
    upload = file_of(5 * MEGABYTE, tmp_path)
    body, talk = secure(server, "--data-binary", upload, server.url("https", "/count"))
    assert ("< http/2 200" in talk, body) == (True, str(5 * MEGABYTE))
    body, _talk = secure(server, server.url("https", "/large?5"))
    assert len(body) == 5 * MEGABYTE
    body, _talk = secure(server, "--upload-file", upload.removeprefix("@"), server.url("https", "/count"))
    assert body == str(5 * MEGABYTE)


def test_expect_100_continue_is_answered_over_http_2(server: Server, tmp_path: Path) -> None:
    body, talk = secure(
        server, *EXPECT, "--data-binary", file_of(100_000, tmp_path), server.url("https", "/count")
    )
    assert body == "100000"
    assert "< http/2 100" in talk


def test_several_requests_share_a_connection_at_once(server: Server) -> None:
    urls = [server.url("https", path) for path in ("/large?2", "/", "/describe", "/hints")]
    outputs = [flag for _ in urls for flag in ("--output", "/dev/null")]
    _body, talk = secure(server, "--parallel", *outputs, *urls)
    assert talk.count("< http/2 200") == 4
    assert talk.count("ssl connection using") == 1


def test_early_hints_and_trailers_as_curl_sees_them(server: Server) -> None:
    _body, talk = secure(server, server.url("https", "/hints"))
    assert talk.index("< http/2 103") < talk.index("link: </app.js>") < talk.index("< http/2 200")
    _body, talk = secure(server, "--header", "TE: trailers", server.url("https", "/trailers"))
    assert talk.index("< http/2 200") < talk.index("< x-sum: 11")


def test_head_ranges_and_paths_are_the_same_over_http_2(server: Server) -> None:
    body, _talk = secure(server, "--head", server.url("https"), server.url("https", "/large?3"))
    assert body.count("HTTP/2 200") == 2
    assert "hello" not in body
    body, talk = secure(server, "--range", "2-4", server.url("https", "/range"))
    assert (body, "< http/2 206" in talk) == ("cde", True)
    body, _talk = secure(server, "--path-as-is", server.url("https", "/describe?q=%20&r=/../;s"))
    assert body.splitlines()[0] == "GET /describe q=%20&r=/../;s 2"


def test_what_http_2_forbids_in_a_head_is_not_sent(server: Server) -> None:
    _body, talk = secure(server, server.url("https"))
    received = [line.removeprefix("< ") for line in talk.splitlines() if line.startswith("< ")]
    names = {line.partition(":")[0] for line in received}
    assert not names & {"connection", "keep-alive", "transfer-encoding", "upgrade", "proxy-connection"}
    assert {"date", "server", "content-type"} <= names


@pytest.mark.parametrize("engine", ["h2", "own"])
async def test_client_certificates_are_asked_for_checked_and_shown_to_the_app(
    certificates: Certificates, engine: str
) -> None:
    asked = ("--ca-certs", str(certificates.ca), "--verify-mode", "CERT_REQUIRED", "--http2-engine", engine)
    async with serve_command(APP, *certificates.flags, *asked) as server:
        url = f"https://localhost:{server.port}/tls"
        trusted = ("--cacert", str(certificates.ca))
        for flags, version in ((), "TLSv1.3"), (("--tls-max", "1.2"), "TLSv1.2"), (("--http1.1",), "TLSv1.3"):
            body, _talk = curl(*trusted, *flags, "--cert", str(certificates.client), url)
            told = dict(line.split(": ", 1) for line in body.splitlines())
            assert int(told["tls_version"]) == {"TLSv1.2": 0x0303, "TLSv1.3": 0x0304}[version]
            assert "CN=client" in told["client_cert_name"]
            assert told["client_cert_error"] == "None"
            assert told["client_cert_chain"] == "1"
        curl(*trusted, url, fails=True)
    assert server.reports() == []
    assert "ERROR" not in server.stderr.text


# -- httpx --------------------------------------------------------------------------------------------------------


async def test_httpx_speaks_both_versions_of_http_on_trio(server: Server) -> None:
    context = ssl.create_default_context(cafile=str(server.certificates.ca))
    for http2 in (True, False):
        async with httpx.AsyncClient(http2=http2, verify=context, base_url=server.https) as client:
            for _ in range(3):
                response = await client.post("/echo", content=b"x" * 300_000)
                assert (response.status_code, response.content) == (200, b"x" * 300_000)
                assert response.http_version == ("HTTP/2" if http2 else "HTTP/1.1")


# -- behind proxies -------------------------------------------------------------------------------------------------


async def ask_for_much(client: RawClient, version: bytes) -> None:
    """What a proxy has to hand on: small and large, both ways, with and without a length."""
    for _ in range(5):
        response = await client.get("/describe")
        assert response.body.splitlines()[0] == b"GET /describe  " + version
    assert (await client.request("POST", "/count", body=b"x" * 2 * MEGABYTE)).body == b"%d" % (2 * MEGABYTE)
    await send_chunked(client, "/count", [b"x" * 1000] * 30)
    assert (await client.read_response("POST")).body == b"30000"
    response = await client.get("/large?2")
    assert (len(response.body), response.complete) == (2 * MEGABYTE, True)
    assert (await client.get("/", method="HEAD")).body == b""


async def test_nginx_speaks_tls_to_us(certificates: Certificates, tmp_path: Path) -> None:
    checks = f"""
        proxy_ssl_verify on; proxy_ssl_trusted_certificate {certificates.ca}; proxy_ssl_name localhost;
        proxy_ssl_server_name on; proxy_ssl_certificate {certificates.client};
        proxy_ssl_certificate_key {certificates.client};
    """
    asked = ("--ca-certs", str(certificates.ca), "--verify-mode", "CERT_REQUIRED")
    async with serve_command(APP, *certificates.flags, *asked) as server:
        nginx = run_nginx(tmp_path, server.address, settings=checks, scheme="https")
        async with nginx as address, connect(address) as client:
            await ask_for_much(client, b"1.1")
    assert server.reports() == []


@pytest.mark.parametrize("engine", ["h2", "own"])
@pytest.mark.parametrize("options", ["alpn h2", "alpn http/1.1", "proto h2"])
async def test_haproxy_speaks_http_2_or_tls_to_us(
    certificates: Certificates, tmp_path: Path, options: str, engine: str
) -> None:
    # Without TLS there is no ALPN: it has to be known that we speak HTTP/2.
    flags = (*(certificates.flags if "alpn" in options else ("--h2c",)), "--http2-engine", engine)
    line = f"ssl verify required ca-file {certificates.ca} sni str(localhost) {options}"
    async with serve_command(APP, *flags) as server:
        haproxy = run_haproxy(tmp_path, server.address, server=line if "alpn" in options else options)
        async with haproxy as address, connect(address) as client:
            await ask_for_much(client, b"2" if "h2" in options else b"1.1")
    assert server.reports() == []
    assert "ERROR" not in server.stderr.text


@pytest.mark.parametrize("engine", ["h2", "own"])
async def test_a_client_that_leaves_haproxy_ends_its_stream_and_no_other(tmp_path: Path, engine: str) -> None:
    flags = ("--h2c", "--http2-engine", engine, "--disconnect-grace", "0.2")
    async with serve_command(APP, *flags) as server:
        haproxy = run_haproxy(tmp_path, server.address, backend="option abortonclose", server="proto h2")
        async with haproxy as address, connect(address) as stays:
            await stays.send(b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\n")
            await stays.receive_until(b"tick")
            async with connect(address) as leaves:
                await leaves.send(b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\n")
                await leaves.receive_until(b"tick")
            await server.stdout.wait_for("stream ended by (Cancelled|ClientDisconnected)")
            await stays.receive_until(b"tick")
            assert server.stdout.text.count("stream ended by") == 1
    assert server.reports() == []
