"""Connected sockets that speak TLS, and clients that do with it what few clients do."""

from __future__ import annotations

import _ssl
import ctypes
import os
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import trio
import trustme

from tests.net.sockets import running_hub, tcp_pair
from trioserve.config import Config
from trioserve.net.certificates import Certificates
from trioserve.net.tls import TlsTransport, handshake, wait_hello
from trioserve.testing import RawClient, development_certificate

# Bytes that the kernel may hold, each way. Much smaller, and loopback waits for delayed acknowledgements.
SMALL = 64 * 1024

VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


def certificates(**settings: object) -> Certificates:
    """As a worker makes them."""
    made = development_certificate()
    return Certificates(Config.from_mapping(certfile=made.certfile, keyfile=made.keyfile, **settings))


def client_context(version: str = "1.3") -> ssl.SSLContext:
    context = development_certificate().client_context()
    context.minimum_version = context.maximum_version = VERSIONS[version]
    return context


@asynccontextmanager
async def tls_pair(
    hub: str, server: Certificates, version: str = "1.3", buffers: int | None = None
) -> AsyncIterator[tuple[TlsTransport, RawClient]]:
    """Our end and a client's, hands shaken; with `buffers`, the kernel holds only so many bytes each way."""
    with tcp_pair() as (ours, peer):
        peer.setblocking(False)
        if buffers is not None:
            for sock in (ours, peer):
                for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                    sock.setsockopt(socket.SOL_SOCKET, option, buffers)
        client = RawClient(
            client_context(version).wrap_socket(
                peer, server_hostname="localhost", do_handshake_on_connect=False, suppress_ragged_eofs=False
            )
        )
        async with running_hub(hub) as running:
            transport = server.wrap(ours, running)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(client.handshake)
                    await wait_hello(transport)
                    await handshake(transport, trio.lowlevel.checkpoint)
                yield transport, client
            finally:
                if not transport.watch.closed:
                    transport.close()
                client.close()


async def receive_all_of(client: Any, size: int) -> bytes:
    """So many bytes of what a client is sent."""
    found = b""
    while len(found) < size:
        part = await client.receive()
        assert part, f"the stream ended {size - len(found)} bytes early"
        found += part
    return found


class OpenSSL:
    """What Python has no method for, asked of OpenSSL itself."""

    # The library that Python's own module was linked with.
    _library = ctypes.CDLL(_ssl.__file__)

    def __init__(self, sock: ssl.SSLSocket) -> None:
        # struct PySSLSocket: the head of every object, the socket, then the SSL.
        place = id(sock._sslobj) + object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p)  # type: ignore[attr-defined]
        self._ssl = ctypes.c_void_p.from_address(place)
        self._sock = sock

    def update_keys(self, *, both: bool = True) -> None:
        """Have new keys from the next record on, and with `both` ask the same of the peer (RFC 8446 section 4.6.3)."""
        assert self._library.SSL_key_update(self._ssl, 1 if both else 0) == 1

    def send_new_keys(self, *, both: bool = True) -> None:
        """What `update_keys` does, at once, in a record that holds nothing else."""
        self.update_keys(both=both)
        self._sock.do_handshake()

    def renegotiate(self) -> None:
        """Begin another handshake (TLS 1.2)."""
        assert self._library.SSL_renegotiate(self._ssl) == 1
        with suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            self._sock.do_handshake()


@contextmanager
def off_the_wire(sock: ssl.SSLSocket) -> Iterator[socket.socket]:
    """What a client writes comes here instead: its descriptor is that of a pair meanwhile."""
    ours, other = socket.socketpair()
    with ours, other:
        ours.setblocking(False)
        kept = os.dup(sock.fileno())
        try:
            os.dup2(ours.fileno(), sock.fileno())
            yield other
        finally:
            os.dup2(kept, sock.fileno())
            os.close(kept)


def sealed(sock: ssl.SSLSocket, data: bytes | None) -> bytes:
    """A record as the client would send it next; None: its close_notify."""
    with off_the_wire(sock) as wire:
        if data is None:
            with suppress(ssl.SSLError, BlockingIOError):
                sock._sslobj.shutdown()  # type: ignore[attr-defined]
        else:
            sock.send(data)
        return wire.recv(65536)


def new_keys(sock: ssl.SSLSocket, count: int, *, both: bool = True) -> bytes:
    """Records that hold nothing but the news of another key; with `both` we are to change ours each time."""
    openssl = OpenSSL(sock)
    with off_the_wire(sock) as wire:
        records = b""
        for _ in range(count):
            openssl.send_new_keys(both=both)
            records += wire.recv(65536)
        return records


class Shop:
    """Certificates for several names, by one authority."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = trustme.CA()

    def issue(self, *names: str) -> tuple[str, str]:
        """Files for a certificate; the first name is what they are called."""
        place = self.directory / names[0].replace("*", "_")
        made = self.authority.issue_cert(*names)
        made.private_key_pem.write_to_path(f"{place}.key")
        Path(f"{place}.pem").write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))
        return f"{place}.pem", f"{place}.key"

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context
