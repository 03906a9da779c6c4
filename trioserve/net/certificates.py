"""The certificates of a worker: a context for each, chosen by the name that the client asks for, and read anew.

Made by the worker, or by the process that owns itself; the listener has its sockets wrapped here. A reload swaps all of
them at once: connections that are open keep what they were opened with, and whoever comes next gets the new ones.
Nothing here waits, but it reads files.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass

from trioserve.config import Config
from trioserve.config.tls_context import KTLS_OPTION, create_context, sni_files
from trioserve.errors import ConfigError
from trioserve.net.hub import Hub
from trioserve.net.ktls import KtlsTransport
from trioserve.net.tls import TlsTransport
from trioserve.net.tls_info import TlsObject, TlsSocket
from trioserve.net.tls_records import RecordTransport, TlsBuffers


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What was read at one time."""

    default: ssl.SSLContext
    by_host: dict[str, ssl.SSLContext]
    ktls: bool

    def find(self, host: str) -> ssl.SSLContext:
        """The context for a host name: its own, that of its domain, or the default."""
        name = host.lower().rstrip(".")
        found = self.by_host.get(name)
        if found is None:
            # A wildcard stands for one label (RFC 6125 section 6.4.3).
            found = self.by_host.get(f"*.{name.partition('.')[2]}", self.default)
        return found

    def choose(self, sock: ssl.SSLObject | ssl.SSLSocket, host: str | None, _: ssl.SSLContext) -> None:
        """Called by OpenSSL in the middle of a handshake. Must not raise."""
        if host is not None and isinstance(sock, TlsObject | TlsSocket):
            sock.server_name = host
            chosen = self.find(host)
            if chosen is not self.default:
                sock.context = chosen


class Certificates:
    """All that `config` names.

    Raises:
        ConfigError: a file cannot be used; says which and why.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._loaded = _load(config)
        self._buffers = TlsBuffers()

    def __repr__(self) -> str:
        hosts = ", ".join(self._loaded.by_host)
        return f"<Certificates {self._config.certfile}{f' and for {hosts}' if hosts else ''}>"

    def wrap(self, sock: socket.socket, hub: Hub) -> TlsTransport:
        """The transport of a connection that is to speak TLS. The handshake is still to come.

        Raises:
            OSError: it is not connected any more.
        """
        context = self._loaded.default
        if self._loaded.ktls:
            # Who has left already is found out now: wrapping would fail half way, and leave a socket behind.
            sock.getpeername()
            # Another object with the descriptor of the old one.
            wrapped = context.wrap_socket(
                sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False
            )
            assert isinstance(wrapped, TlsSocket)
            return KtlsTransport(wrapped, hub.watch(wrapped))
        buffers = self._buffers
        tls = context.wrap_bio(buffers.incoming, buffers.outgoing, server_side=True)
        assert isinstance(tls, TlsObject)
        return RecordTransport(sock, hub.watch(sock), tls, buffers)

    def reload(self) -> None:
        """Read all files again.

        Raises:
            ConfigError: one cannot be used; then all stays as it is.
        """
        self._loaded = _load(self._config)


def _load(config: Config) -> _Loaded:
    default = config.create_ssl_context()
    if default is None:
        raise ConfigError("certfile is not set, so there is no TLS to serve with")
    sni = sni_files(config.sni_certificates)
    by_host = {host: create_context(config, files) for host, files in sni.items()}
    loaded = _Loaded(default, by_host, bool(default.options & KTLS_OPTION))
    default.sslobject_class = TlsObject
    default.sslsocket_class = TlsSocket
    if sni:
        default.sni_callback = loaded.choose
    return loaded
