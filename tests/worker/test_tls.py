"""A worker that speaks TLS: handshakes in time and in turn, certificates by name, of clients, and read anew."""

from __future__ import annotations

import itertools
import os
import select
import shutil
import socket
import ssl
import struct
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from tests.certificates import write_latin_1_client
from tests.net.tls_sockets import VERSIONS, Shop, new_keys
from trioserve import StaticFiles
from trioserve.config import Config
from trioserve.errors import ConfigError
from trioserve.net.certificates import Certificates
from trioserve.net.ktls import KtlsTransport
from trioserve.net.tls_records import SILENT_RECORDS, RecordTransport
from trioserve.static import sendfile
from trioserve.testing import RawClient, connect, development_certificate, serving, tls_client
from trioserve.worker.handshake import HandshakeTurns


async def hello(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        return
    body = f"{scope['scheme']} {scope['extensions'].get('tls', {}).get('client_cert_name')}".encode()
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]}
    )
    await send({"type": "http.response.body", "body": body})


def scope_keeper(kept: list[Any]) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            kept.append(scope)
        await hello(scope, receive, send)

    return app


async def until(condition: Any) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.001)


# -- handshakes ----------------------------------------------------------------------------------------------


async def test_who_resets_at_once_is_no_lack_of_room(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(hello, tls=True) as server:
        port = int(server.addresses[0].rpartition(":")[2])
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        async with server.connect() as client:
            assert (await client.get("/")).status == 200
        context = server.worker.context
        await until(lambda: context.counters.peer_gone + context.counters.handshakes_failed >= 20)
        assert context.counters.accept_pauses == 0
    assert "cannot accept" not in caplog.text


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01"])
async def test_a_client_that_takes_its_time_is_closed(hub: str, sent: bytes, autojump_clock: Any) -> None:
    async with serving(hello, tls=True, hub=hub, ssl_handshake_timeout=7) as server:
        async with server.connect_plainly() as client:
            await client.send(sent)
            began = trio.current_time()
            assert await client.receive_all() == b""
            assert 7 <= trio.current_time() - began < 8
        await server.wait_idle()
        counters = server.worker.context.counters
        assert counters.late == {"tls_handshake": 1}
        assert counters.handshakes == 0


async def test_the_first_byte_is_waited_for_from_the_handshake_on(autojump_clock: Any) -> None:
    async with serving(hello, tls=True, first_byte_timeout=5, ssl_handshake_timeout=7) as server:
        client = server.connect()
        await trio.sleep(4)
        await client.handshake()
        began = trio.current_time()
        assert await client.receive_all() == b""
        assert 5 <= trio.current_time() - began < 6
        client.close()
        assert server.worker.context.counters.late == {"first_byte": 1}


async def test_a_drain_gives_a_handshake_a_moment(autojump_clock: Any) -> None:
    """One whose request is about to come is served, and nobody holds up the end by saying nothing."""
    async with serving(hello, tls=True, graceful_timeout=30) as server:
        async with server.connect_plainly() as silent:
            await trio.sleep(0.1)
            client = server.connect()
            await trio.sleep(0.1)
            began = trio.current_time()
            server.worker.drain.begin("test")
            await client.handshake()
            assert (await client.get("/")).status == 200
            client.close()
            assert await silent.receive_all() == b""
            assert trio.current_time() - began < 2


@pytest.mark.parametrize("sent", [b"\x00" * 50, b"\x16\x03\x01\x00\x05hello", b"", b"\x16\x03"])
async def test_garbage_is_counted_and_quiet(hub: str, sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(hello, tls=True, hub=hub) as server:
        async with server.connect_plainly() as client:
            await client.send(sent)
            client.send_eof()
            assert b"HTTP" not in await client.receive_all()
        await server.wait_idle()
        assert server.worker.context.counters.handshakes_failed == 1
        assert (await server.get("/")).status == 200
    assert [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")] == []


async def test_plain_http_is_told_that_this_is_tls(hub: str) -> None:
    async with serving(hello, tls=True, hub=hub) as server:
        async with server.connect_plainly() as client:
            response = await client.request("POST", "/", [("content-length", "100000")], b"x" * 100_000)
            assert response.status == 400
            assert b"HTTPS" in response.body
            assert await client.receive_all() == b""
        await server.wait_idle()
        assert server.worker.context.counters.handshakes_failed == 1


async def test_a_crowd_takes_turns(hub: str) -> None:
    """All are served, and a request on an open connection does not wait for the whole crowd."""
    async with serving(hello, tls=True, hub=hub) as server, server.connect() as first:
        done = 0

        async def one() -> None:
            nonlocal done
            async with server.connect() as client:
                assert (await client.get("/")).status == 200
                done += 1

        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(one)
            await until(lambda: server.worker.context.counters.handshakes > 5)
            assert (await first.get("/")).status == 200
            assert done < 100
        assert server.worker.context.counters.handshakes == 101


async def test_a_crowd_takes_turns_in_whatever_parts_it_speaks(hub: str) -> None:
    """Greetings of two packets, as browsers send them now: the rest of all of them comes at the same time."""
    context = development_certificate().client_context()
    async with serving(hello, tls=True, hub=hub) as server:
        with ExitStack() as stack:
            answers = select.poll()
            rests = []
            for _ in range(60):
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
                out = ssl.MemoryBIO()
                with pytest.raises(ssl.SSLWantReadError):
                    context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost").do_handshake()
                sock.sendall(out.read(100))
                rests.append((sock, out.read()))
                answers.register(sock, select.POLLIN)
            await trio.testing.wait_all_tasks_blocked(0.05)
            for sock, rest in rests:
                sock.sendall(rest)
            answered = [0]
            while answered[-1] < 60:
                await trio.lowlevel.checkpoint()
                answered.append(len(answers.poll(0)))
            assert max(after - before for before, after in itertools.pairwise(answered)) <= 16


@pytest.mark.slow
async def test_a_thousand_handshakes_leave_nothing_behind(hub: str) -> None:
    async with serving(hello, tls=True, hub=hub, first_byte_timeout=60) as server:

        async def some() -> None:
            for number in range(100):
                client = server.connect()
                await client.handshake()
                if number % 3:
                    assert (await client.get("/")).status == 200
                client.reset() if number % 2 else client.close()

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(some)
        await server.wait_idle()
        counters = server.worker.context.counters
        assert counters.handshakes + counters.handshakes_failed == 1000


async def test_turns_are_given_to_all_who_wait_even_if_some_give_up() -> None:
    turns = HandshakeTurns()
    served: list[int] = []

    async def take(number: int, patience: float) -> None:
        with trio.move_on_after(patience):
            await turns.take()
            served.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(30):
            nursery.start_soon(take, number, 0 if number % 5 == 4 else 10)
        await trio.testing.wait_all_tasks_blocked()
        assert len(served) <= 4
        nursery.start_soon(turns.run)
        await until(lambda: len(served) >= 24 - 1)
        await turns.take()
        nursery.cancel_scope.cancel()
    assert len(served) == len(set(served)) >= 24


# -- records without data ------------------------------------------------------------------------------------


async def test_a_client_that_sends_new_keys_and_nothing_else_is_ended_and_counted(
    hub: str, caplog: pytest.LogCaptureFixture
) -> None:
    """However many have come, others are served before more than a few of them have been read."""
    caplog.set_level("DEBUG")
    async with (
        serving(hello, tls=True, hub=hub) as server,
        server.connect() as flooder,
        server.connect() as other,
    ):
        assert (await flooder.get("/")).status == 200
        assert (await other.get("/")).status == 200
        records = new_keys(flooder.sock, 3000)  # type: ignore[arg-type]
        (connection, _) = sorted(server.worker.context.connections, key=lambda each: each.id)
        transport = connection.transport
        assert isinstance(transport, RecordTransport)
        steps: list[int] = []
        real = transport._read
        transport._read = lambda size: steps.append(size) or real(size)  # type: ignore[assignment, method-assign, misc]
        with suppress(BlockingIOError, ConnectionError):
            while records:
                records = records[socket.socket.send(flooder.sock, records) :]
        assert (await other.get("/")).status == 200
        with trio.fail_after(30), suppress(ssl.SSLError, OSError):
            while await flooder.receive():
                pass
        await until(lambda: server.worker.context.counters.refused["tls"] == 1)
        assert len(steps) <= SILENT_RECORDS + 1
        assert (await other.get("/")).status == 200
        assert len(server.worker.context.connections) == 1
    assert "refused: TLS: 33 records in a row without data" in caplog.text
    assert [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")] == []


async def test_such_a_client_does_not_wait_for_its_answer(hub: str) -> None:
    """The app is told, too, if it has not answered yet."""
    told = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            assert (await receive())["type"] == "http.request"
            assert (await receive())["type"] == "http.disconnect"
            told.set()

    async with serving(app, tls=True, hub=hub) as server, server.connect() as client:
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: any(each.exchange for each in server.worker.context.connections))
        socket.socket.send(client.sock, new_keys(client.sock, 40, both=False))  # type: ignore[arg-type]
        with trio.fail_after(30):
            await told.wait()
        await server.wait_idle()
        assert server.worker.context.counters.refused["tls"] == 1


@pytest.mark.parametrize("ktls", [False, True])
async def test_new_keys_between_requests_are_fine(hub: str, ktls: bool) -> None:
    async with serving(hello, tls=True, hub=hub, ktls=ktls) as server, server.connect() as client:
        for _ in range(8):
            socket.socket.send(client.sock, new_keys(client.sock, 10))  # type: ignore[arg-type]
            assert (await client.get("/")).status == 200
        assert server.worker.context.counters.refused["tls"] == 0


async def test_what_is_no_tls_any_more_is_counted(hub: str, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(hello, tls=True, hub=hub) as server, server.connect() as client:
        assert (await client.get("/")).status == 200
        socket.socket.send(client.sock, b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises((ssl.SSLError, OSError, EOFError)):
            await client.get("/")
        await server.wait_idle()
        assert server.worker.context.counters.refused["tls"] == 1


# -- what apps see -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_the_scope_tells_of_the_connection(hub: str, version: str) -> None:
    made = development_certificate()
    context = made.client_context()
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    scopes: list[Any] = []
    async with serving(scope_keeper(scopes), tls=context, hub=hub) as server, server.connect() as client:
        assert server.addresses == [f"https://127.0.0.1:{server.port}"]
        assert (await client.get("/")).body == b"https None"
        await client.get("/")
        (connection,) = server.worker.context.connections
        assert connection.tls is not None
        assert connection.tls.alpn is None
        name, _, _ = client.sock.cipher()  # type: ignore[attr-defined]
    first, second = scopes
    tls = first["extensions"]["tls"]
    assert tls.pop("server_cert") in Path(made.certfile).read_text()
    suites = {
        "TLS_AES_256_GCM_SHA384": 0x1302,
        "ECDHE-ECDSA-AES256-GCM-SHA384": 0xC02C,
        "ECDHE-ECDSA-AES128-GCM-SHA256": 0xC02B,
    }
    assert tls == {
        "client_cert_chain": [],
        "client_cert_name": None,
        "client_cert_error": None,
        "tls_version": 0x0303 if version == "TLSv1_2" else 0x0304,
        "cipher_suite": suites[name],
    }
    assert second["extensions"]["tls"] is not tls


async def test_a_plain_scope_has_no_tls() -> None:
    scopes: list[Any] = []
    async with serving(scope_keeper(scopes)) as server:
        assert (await server.get("/")).body == b"http None"
    assert "tls" not in scopes[0]["extensions"]


async def test_http_1_1_is_agreed_on_with_who_asks() -> None:
    context = development_certificate().client_context()
    context.set_alpn_protocols(["spdy/3", "http/1.1"])
    async with serving(hello, tls=context, alpn_protocols=["http/1.1"]) as server, server.connect() as client:
        assert client.sock.selected_alpn_protocol() == "http/1.1"  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["CERT_REQUIRED", "CERT_OPTIONAL"])
async def test_a_client_with_a_certificate_is_known(mode: str) -> None:
    made = development_certificate()
    scopes: list[Any] = []
    async with serving(
        scope_keeper(scopes),
        tls=made.client_context(with_certificate=True),
        verify_mode=mode,
        ca_certs=made.authority,
    ) as server:
        assert (await server.get("/")).status == 200
    tls = scopes[0]["extensions"]["tls"]
    assert tls["client_cert_name"].startswith("CN=client,")
    assert tls["client_cert_chain"][0] in Path(made.client).read_text()
    assert tls["client_cert_error"] is None


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_a_client_is_known_in_a_resumed_session_too(version: str) -> None:
    made = development_certificate()
    context = made.client_context(with_certificate=True)
    context.minimum_version = context.maximum_version = VERSIONS[version]
    scopes: list[Any] = []

    async with serving(
        scope_keeper(scopes), tls=context, verify_mode="CERT_REQUIRED", ca_certs=made.authority
    ) as server:
        session = None
        for _ in range(2):
            sock = socket.create_connection(("127.0.0.1", server.port))
            sock.setblocking(False)
            wrapped = context.wrap_socket(
                sock, server_hostname="localhost", do_handshake_on_connect=False, session=session
            )
            async with RawClient(wrapped) as client:
                assert (await client.get("/")).status == 200
                resumed, session = session is not None, wrapped.session
                assert wrapped.session_reused is resumed
    first, second = (scope["extensions"]["tls"] for scope in scopes)
    assert second["client_cert_name"] == first["client_cert_name"] is not None
    assert second["client_cert_chain"][:1] == first["client_cert_chain"][:1] != []


async def test_a_certificate_that_python_cannot_decode_is_not_our_fault(tmp_path: Path) -> None:
    """Its authority is trusted, and has signed an e-mail address in Latin-1."""
    made = development_certificate()
    authority, client = write_latin_1_client(tmp_path)
    context = made.client_context()
    context.load_cert_chain(client)
    scopes: list[Any] = []
    async with serving(
        scope_keeper(scopes), tls=context, verify_mode="CERT_REQUIRED", ca_certs=authority
    ) as server:
        assert (await server.get("/")).status == 200
    tls = scopes[0]["extensions"]["tls"]
    assert tls["client_cert_name"] is None
    assert tls["client_cert_chain"][0] in Path(client).read_text()


async def test_a_client_without_a_certificate_may_or_may_not_come() -> None:
    made = development_certificate()
    async with serving(hello, tls=True, verify_mode="CERT_OPTIONAL", ca_certs=made.authority) as server:
        assert (await server.get("/")).body == b"https None"
    async with serving(hello, tls=True, verify_mode="CERT_REQUIRED", ca_certs=made.authority) as server:
        with pytest.raises((ssl.SSLError, OSError, EOFError)):
            await server.get("/")
        await server.wait_idle()
        assert server.worker.context.counters.handshakes_failed == 1
        assert server.worker.context.requests_served == 0


async def test_a_client_with_a_strangers_certificate_is_turned_away(tmp_path: Path) -> None:
    made = development_certificate()
    stranger = trustme.CA().issue_cert("someone@example.org")
    stranger.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "stranger.pem"))
    context = made.client_context()
    context.load_cert_chain(tmp_path / "stranger.pem")
    async with serving(hello, tls=context, verify_mode="CERT_OPTIONAL", ca_certs=made.authority) as server:
        with pytest.raises((ssl.SSLError, OSError, EOFError)):
            await server.get("/")
        await server.wait_idle()
        assert server.worker.context.counters.handshakes_failed == 1


async def test_old_versions_are_turned_away() -> None:
    context = development_certificate().client_context()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    async with serving(hello, tls=context) as server:
        with pytest.raises(ssl.SSLError):
            async with server.connect():
                pass
        await server.wait_idle()
        assert server.worker.context.counters.handshakes_failed == 1


# -- certificates by name ------------------------------------------------------------------------------------


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


async def names_shown(address: str, context: ssl.SSLContext, host: str) -> set[str]:
    async with connect(address, client=tls_client(context, host)) as client:
        assert (await client.get("/")).status == 200
        assert isinstance(client.sock, ssl.SSLSocket)
        found = client.sock.getpeercert()
        assert found is not None
        return {value for _, value in found["subjectAltName"]}  # type: ignore[misc]


async def test_each_name_gets_its_certificate(shop: Shop) -> None:
    certfile, keyfile = shop.issue("localhost", "a.b.example.com", "other.example.org")
    wild, single = shop.issue("*.example.com"), shop.issue("www.example.com")
    async with serving(
        hello,
        certfile=certfile,
        keyfile=keyfile,
        sni_certificates={
            "*.example.com": {"certfile": wild[0], "keyfile": wild[1]},
            "WWW.Example.com": {"certfile": single[0], "keyfile": single[1]},
        },
    ) as server:
        address, context = server.addresses[0], shop.context()
        assert await names_shown(address, context, "localhost") >= {"localhost"}
        assert await names_shown(address, context, "www.example.com") == {"www.example.com"}
        assert await names_shown(address, context, "api.example.com") == {"*.example.com"}
        # One label, and no more (RFC 6125 section 6.4.3).
        assert await names_shown(address, context, "a.b.example.com") >= {"localhost"}
        assert await names_shown(address, context, "other.example.org") >= {"localhost"}


async def test_the_scope_has_the_certificate_that_was_shown(shop: Shop) -> None:
    certfile, keyfile = shop.issue("localhost")
    other = shop.issue("www.example.com")
    scopes: list[Any] = []
    async with serving(
        scope_keeper(scopes),
        certfile=certfile,
        keyfile=keyfile,
        sni_certificates=[f"www.example.com={','.join(other)}"],
    ) as server:
        async with connect(
            server.addresses[0], client=tls_client(shop.context(), "www.example.com")
        ) as client:
            await client.get("/")
            (connection,) = server.worker.context.connections
            assert connection.tls is not None
            assert connection.tls.server_name == "www.example.com"
    assert scopes[0]["extensions"]["tls"]["server_cert"] in Path(other[0]).read_text()


# -- certificates read anew ----------------------------------------------------------------------------------


async def test_a_reload_swaps_certificates_under_open_connections(shop: Shop) -> None:
    certfile, keyfile = shop.issue("localhost")
    async with serving(hello, certfile=certfile, keyfile=keyfile) as server:
        address, context = server.addresses[0], shop.context()
        async with connect(address, client=tls_client(context)) as kept:
            before = kept.sock.getpeercert(True)  # type: ignore[attr-defined]
            shop.issue("localhost", "new.example.com")
            assert server.worker.reload_certificates() == ""
            assert (await kept.get("/")).status == 200
            assert await names_shown(address, context, "localhost") == {"localhost", "new.example.com"}
            assert (await kept.get("/")).status == 200
            assert kept.sock.getpeercert(True) == before  # type: ignore[attr-defined]


@pytest.mark.parametrize("damage", ["missing", "mismatched", "empty"])
async def test_a_reload_of_bad_files_keeps_the_old_certificates(
    shop: Shop, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    certfile, keyfile = shop.issue("localhost")
    async with serving(hello, certfile=certfile, keyfile=keyfile) as server:
        if damage == "missing":
            Path(certfile).unlink()
        elif damage == "empty":
            Path(certfile).write_bytes(b"")
        else:
            shutil.copy(shop.issue("other")[1], keyfile)
        error = server.worker.reload_certificates()
        assert certfile in error
        assert error in caplog.text
        assert await names_shown(server.addresses[0], shop.context(), "localhost") == {"localhost"}


async def test_a_plain_worker_has_no_certificates_to_reload() -> None:
    async with serving(hello) as server:
        assert server.worker.certificates is None
        assert server.worker.reload_certificates() != ""


def test_certificates_need_a_certfile() -> None:
    with pytest.raises(ConfigError, match="certfile"):
        Certificates(Config())


# -- plain HTTP beside it ------------------------------------------------------------------------------------


async def test_insecure_binds_speak_plain_http() -> None:
    async with serving(hello, tls=True, insecure_bind=["localhost:0"]) as server:
        secure, plain, *_ = server.addresses
        assert secure.startswith("https://")
        assert plain.startswith("http://")
        assert (await server.get("/")).body == b"https None"
        async with connect(plain) as client:
            assert (await client.get("/")).body == b"http None"


async def test_insecure_binds_are_not_bound_without_tls(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(hello, insecure_bind=["127.0.0.1:0"]) as server:
        assert len(server.addresses) == 1
    assert "insecure_bind has no effect" in caplog.text


async def test_a_unix_socket_speaks_tls_too(tmp_path: Path) -> None:
    async with serving(hello, tls=True, bind=[f"unix:{tmp_path / 'socket'}"]) as server:
        assert server.addresses == [f"unix:{tmp_path / 'socket'}"]
        assert (await server.get("/")).body == b"https None"


# -- files ---------------------------------------------------------------------------------------------------


class Reads:
    """Counts what is read of files at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.largest = 0
        for place, name in ((os, "pread"), (sendfile, "read_resident")):
            monkeypatch.setattr(place, name, self._counting(getattr(place, name)))

    def _counting(self, read: Any) -> Any:
        def counting(fd: int, offset_or_size: int, *rest: int) -> Any:
            data = read(fd, offset_or_size, *rest)
            self.largest = max(self.largest, len(data or b""))
            return data

        return counting


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


async def test_a_large_file_goes_by_bounded_reads(hub: str, tmp_path: Path, reads: Reads) -> None:
    data = os.urandom(8 * 1024 * 1024)
    (tmp_path / "file").write_bytes(data)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.pathsend", "path": str(tmp_path / "file")})

    async with (
        serving(app, tls=True, hub=hub) as server,
        server.connect() as client,
        server.connect() as other,
    ):
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        head = await client.receive_until(b"\r\n\r\n")
        # Another one is served in the middle of it.
        (first, *_) = sorted(server.worker.context.connections, key=lambda connection: connection.id)
        assert first.exchange is not None
        await other.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await other.receive_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        other.reset()
        assert await client.receive_all() == data
        assert not client.ragged
        assert f"content-length: {len(data)}".encode() in head or b"chunked" in head
    assert 0 < reads.largest <= 128 * 1024


# -- kernel TLS ----------------------------------------------------------------------------------------------


async def test_asking_for_ktls_where_there_is_none_is_said_and_works(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trioserve.config.tls_context.why_no_ktls", lambda: "the kernel has no TLS")
    async with serving(hello, tls=True, ktls=True) as server:
        assert (await server.get("/")).status == 200
    assert caplog.text.count("ktls: the kernel has no TLS") == 1


async def test_where_the_kernel_encrypts_it_sends_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is made of a stub here that says it does, and puts a file on the wire in the clear."""
    monkeypatch.setattr("trioserve.net.ktls.kernel_encrypts", lambda _sock: True)
    (tmp_path / "file").write_bytes(b"in the clear")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send(
                {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"12")]}
            )
            await send({"type": "http.response.pathsend", "path": str(tmp_path / "file")})

    async with serving(app, tls=True, ktls=True) as server, server.connect() as client:
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        await client.receive_until(b"\r\n\r\n")
        raw = b""
        with trio.fail_after(30):
            while b"in the clear" not in raw:
                try:
                    raw += socket.socket.recv(client.sock, 100)
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(client.sock)
        client.reset()


async def test_where_the_kernel_encrypts_known_files_follow_their_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above; the head is encrypted all the same."""
    monkeypatch.setattr("trioserve.net.ktls.kernel_encrypts", lambda _sock: True)
    (tmp_path / "file").write_bytes(b"in the clear")
    files = StaticFiles(tmp_path, small_file=0)
    async with serving(files, lifespan="off") as server:
        assert (await server.get("/file")).status == 200
    begun: list[int] = []
    monkeypatch.setattr(
        KtlsTransport,
        "sendfile_nowait",
        lambda self, fd, offset, count: (
            begun.append(count) or os.sendfile(self.sock.fileno(), fd, offset, count)
        ),
    )
    async with serving(files, tls=True, ktls=True, lifespan="off") as server, server.connect() as client:
        await client.send(b"GET /file HTTP/1.1\r\nHost: a\r\n\r\n")
        head = await client.receive_until(b"\r\n\r\n")
        assert b"content-length: 12" in head
        raw = b""
        with trio.fail_after(30):
            while b"in the clear" not in raw:
                try:
                    raw += socket.socket.recv(client.sock, 100)
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(client.sock)
        client.reset()
    assert begun == [12]
