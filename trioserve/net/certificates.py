"""The certificates of a worker: a context for each, chosen by the name that the client asks for, and read anew.

Made by the worker, or by the process that owns itself; the listener wraps sockets with `context`. A reload swaps all of
them at once: connections that are open keep what they were opened with, and whoever comes next gets the new ones.
Nothing here waits, but it reads files.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass

from trioserve.config import Config
from trioserve.config.tls_context import create_context, sni_files
from trioserve.errors import ConfigError
from trioserve.net.tls_info import TlsSocket


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What was read at one time."""

    default: ssl.SSLContext
    by_host: dict[str, ssl.SSLContext]

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
        if host is not None and isinstance(sock, TlsSocket):
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

    def __repr__(self) -> str:
        hosts = ", ".join(self._loaded.by_host)
        return f"<Certificates {self._config.certfile}{f' and for {hosts}' if hosts else ''}>"

    def wrap(self, sock: socket.socket) -> ssl.SSLSocket:
        """A socket that is to speak TLS; takes over its descriptor. The handshake is still to come.

        Raises:
            OSError: it is not connected any more; the descriptor is closed then.
        """
        return self._loaded.default.wrap_socket(
            sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )

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
    loaded = _Loaded(default, {host: create_context(config, files) for host, files in sni.items()})
    default.sslsocket_class = TlsSocket
    if sni:
        default.sni_callback = loaded.choose
    return loaded
