"""The settings of TLS, each with its default and the reason for it. What they mean together: `tls_context.py`."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trioserve.config.setting import Setting, under
from trioserve.config.text_values import Binds, EnumMember, Text, TextList
from trioserve.config.tls_context import CertificateFiles, sni_files
from trioserve.config.values import MASK, Kind, Seconds, Switch, as_toml


class SniCertificates(Kind):
    """Certificates by host name: a table, or a list of HOST=CERT,KEY."""

    metavar = "HOST=CERT,KEY"
    is_list = True
    expects = (
        "a table of host names, or *. and a domain, each with certfile, keyfile and keyfile_password; as text "
        'HOST=CERT,KEY such as "*.example.com=wild.pem,wild.key"'
    )

    def check(self, value: Any) -> Any:
        """Settle as a dict of `CertificateFiles`."""
        try:
            return sni_files({} if value is None else value)
        except ValueError as error:
            raise self._refuse(str(error)) from None

    def parse(self, text: str) -> Any:
        """Split at semicolons: there are commas inside."""
        return self.check([item for part in text.split(";") if (item := part.strip())])

    def parse_flag(self, text: str) -> Any:
        """One occurrence is one host."""
        self.check([text])
        return text

    def masked(self, value: Any) -> Any:
        """Show hosts and paths; whatever else is there, under whatever name, may be meant as a password."""
        if isinstance(value, Mapping):
            return {host: _mask_files(files) for host, files in value.items()}
        if isinstance(value, list | tuple):
            return [self.masked(item) for item in value]
        if isinstance(value, str):
            # Behind a password a semicolon may be part of it.
            entry, semicolon, rest = value.partition(";")
            shown = _mask_entry(entry)
            if not semicolon:
                return shown
            return f"{shown};{MASK if MASK in shown else self.masked(rest)}"
        return value if isinstance(value, int | float | None) else MASK

    def to_toml(self, value: Mapping[str, CertificateFiles]) -> str | None:
        """Write tables."""
        return as_toml(
            {
                host: {"certfile": files.certfile}
                | ({} if files.keyfile is None else {"keyfile": files.keyfile})
                | ({} if files.keyfile_password is None else {"keyfile_password": files.keyfile_password})
                for host, files in sni_files(value).items()
            }
        )


def _mask_files(files: Any) -> Any:
    if isinstance(files, CertificateFiles):
        return files if files.keyfile_password is None else replace(files, keyfile_password=MASK)
    if isinstance(files, Mapping):
        paths = ("certfile", "keyfile")
        return {
            name: item if name in paths and isinstance(item, str) else MASK for name, item in files.items()
        }
    return _mask_third(files) if isinstance(files, str) else MASK


def _mask_entry(text: str) -> str:
    host, equals, files = text.partition("=")
    return f"{host}={_mask_third(files)}" if equals else MASK


def _mask_third(files: str) -> str:
    fields = files.split(",", 2)
    return ",".join([*fields[:2], MASK] if len(fields) > 2 else fields)


TLS = under(
    "TLS",
    Setting(
        "certfile",
        Text(optional=True, metavar="PATH"),
        None,
        help="Certificate chain in PEM, the server's own first; every bind then speaks TLS",
        reason="not set: plain HTTP, as in hypercorn",
    ),
    Setting(
        "keyfile",
        Text(optional=True, metavar="PATH"),
        None,
        help="Private key of the certificate in PEM",
        reason="not set: it may be in certfile, too",
    ),
    Setting(
        "keyfile_password",
        Text(optional=True),
        None,
        help="Password of the private key, should it be encrypted",
        reason="not set. In the environment or a file others do not see it, as a flag they do",
        secret=True,
    ),
    Setting(
        "sni_certificates",
        SniCertificates(),
        {},
        help="Further certificates by the host name that a client asks for, *.example.com included; repeatable",
        reason="none: one certificate can have many names",
        flags=("--sni-certificate",),
    ),
    Setting(
        "insecure_bind",
        Binds(),
        [],
        help="Address for plain HTTP beside TLS, for redirects and health checks; repeatable",
        reason="none, as in hypercorn",
    ),
    Setting(
        "quic_bind",
        Binds(),
        [],
        help="Address for HTTP/3",
        reason="none",
        refused="HTTP/3 is not served yet: remove it and offer HTTP/3 in a proxy in front",
    ),
    Setting(
        "ca_certs",
        Text(optional=True, metavar="PATH"),
        None,
        help="Authorities that client certificates must come from, in PEM",
        reason="not set: clients are not asked for one",
    ),
    Setting(
        "verify_mode",
        EnumMember(ssl.VerifyMode),
        None,
        help="Whether clients must (CERT_REQUIRED) or may (CERT_OPTIONAL) show a certificate; a false one is refused",
        reason="not set: CERT_NONE",
    ),
    Setting(
        "verify_flags",
        EnumMember(ssl.VerifyFlags),
        None,
        help="How client certificates are checked, such as VERIFY_CRL_CHECK_LEAF",
        reason="not set: Python's own",
    ),
    Setting(
        "cert_reqs",
        EnumMember(ssl.VerifyMode),
        None,
        help="Old spelling of verify_mode",
        reason="not set",
        deprecated_flags=("--cert-reqs",),
        write_only=True,
    ),
    Setting(
        "ciphers",
        Text(),
        "ECDHE+AESGCM",
        help="Ciphers for TLS 1.2, as OpenSSL spells them; those of TLS 1.3 are fixed",
        reason="hypercorn's value: forward secrecy and authenticated encryption only, as HTTP/2 asks",
    ),
    Setting(
        "alpn_protocols",
        TextList("NAME"),
        ["h2", "http/1.1"],
        help="Protocols offered during the handshake, the preferred first",
        reason="hypercorn's value; what is not served is not offered",
        flags=("--alpn-protocol",),
    ),
    Setting(
        "ssl_handshake_timeout",
        Seconds(above=True),
        10.0,
        help="Longest TLS handshake; else the connection is closed",
        reason="two round trips and a signature; hypercorn's 60 let whoever says nothing stay a minute",
    ),
    Setting(
        "ktls",
        Switch(),
        False,
        help="Have the kernel encrypt what is sent (Linux with the tls module, OpenSSL 3), so that it can send files "
        "by itself; where it cannot, the log says so",
        reason="off: faster for large files only, and no faster for small answers",
    ),
)
