"""What a handshake has led to, as apps are told: numbers of versions and cipher suites, and names in certificates.

Called by `worker/handshake.py` once for a connection. Nothing here waits.
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_VERSIONS = {"TLSv1": 0x0301, "TLSv1.1": 0x0302, "TLSv1.2": 0x0303, "TLSv1.3": 0x0304}

# RFC 4514 section 3; what is not among them is written as OpenSSL calls it.
_SHORT = {
    "commonName": "CN", "localityName": "L", "stateOrProvinceName": "ST", "organizationName": "O",
    "organizationalUnitName": "OU", "countryName": "C", "streetAddress": "STREET", "domainComponent": "DC",
    "userId": "UID",
}  # fmt: skip


class TlsObject(ssl.SSLObject):
    """The state of one connection in OpenSSL, which remembers which certificate it was asked for.

    Attributes:
        server_name: what the client asked for (SNI), where anybody wanted to know.
    """

    server_name: str | None = None


class TlsSocket(ssl.SSLSocket):
    """The same on a descriptor of its own (`ktls.py`)."""

    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class TlsInfo:
    """What a handshake has led to; what ASGI's `tls` extension tells an app.

    Attributes:
        version: such as "TLSv1.3".
        cipher_suite: its number with IANA, or None.
        alpn: the protocol agreed on, or None.
        server_name: as the client has sent it, where there are several certificates to choose from; otherwise None.
        server_cert: the certificate that was shown, in PEM; None where it is not known.
        client_cert_chain: the client's certificate and those it was verified by, in PEM; empty without one.
        client_cert_name: its subject (RFC 4514); None without one, and where it says what Python cannot decode.
        client_cert_error: always None: whoever shows a certificate that cannot be verified is not served.
    """

    version: str
    cipher_suite: int | None
    alpn: str | None
    server_name: str | None = None
    server_cert: str | None = None
    client_cert_chain: tuple[str, ...] = ()
    client_cert_name: str | None = None
    client_cert_error: str | None = None

    def extension(self) -> dict[object, object]:
        """`scope["extensions"]["tls"]` for one request (https://asgi.readthedocs.io/en/latest/specs/tls.html)."""
        return {
            "server_cert": self.server_cert,
            "client_cert_chain": list(self.client_cert_chain),
            "client_cert_name": self.client_cert_name,
            "client_cert_error": self.client_cert_error,
            "tls_version": _VERSIONS.get(self.version),
            "cipher_suite": self.cipher_suite,
        }


def tls_info(tls: TlsObject | TlsSocket) -> TlsInfo:
    """What has been agreed on, after a handshake."""
    cipher = tls.cipher()
    version = tls.version() or ""
    chain: tuple[str, ...] = ()
    name = None
    if getattr(tls.context, "asks_clients", True):
        chain = _client_chain(tls)
        name = _client_name(tls) if chain else None
    return TlsInfo(
        version=version,
        cipher_suite=None if cipher is None else cipher_number(cipher[0]),
        alpn=tls.selected_alpn_protocol(),
        server_name=tls.server_name,
        server_cert=getattr(tls.context, "own_certificate", None),
        client_cert_chain=chain,
        client_cert_name=name,
    )


def _client_chain(tls: TlsObject | TlsSocket) -> tuple[str, ...]:
    """The verified chain where Python can tell it (3.13), otherwise the client's own certificate.

    A session that is resumed holds the certificate only: nothing was verified anew, and the chain is empty.
    """
    own = tls.getpeercert(binary_form=True)
    if own is None:
        return ()
    verified = getattr(tls, "get_verified_chain", None)
    found = (verified() if verified is not None else []) or [own]
    return tuple(ssl.DER_cert_to_PEM_cert(der) for der in found)


def _client_name(tls: TlsObject | TlsSocket) -> str | None:
    """The subject of the client's certificate; None where Python cannot read it.

    Python decodes all that a certificate says, names and addresses as strict UTF-8. An authority that we trust may
    have signed something else, such as an e-mail address in Latin-1, and what a certificate says is never our fault.
    """
    try:
        found = tls.getpeercert()
    except Exception:
        return None
    return distinguished_name(found or {})


def distinguished_name(certificate: Mapping[str, Any]) -> str | None:
    """The subject of what `SSLObject.getpeercert()` gives, as RFC 4514 writes it: the last part first."""
    subject = certificate.get("subject")
    if not subject:
        return None
    return ",".join(
        "+".join(f"{_SHORT.get(name, name)}={_escaped(value)}" for name, value in relative)
        for relative in reversed(subject)
    )


def _escaped(value: str) -> str:
    text = "".join(f"\\{char}" if char in ',+"\\<>;' else char for char in value).replace("\0", "\\00")
    if text.startswith(("#", " ")):
        text = f"\\{text}"
    if text.endswith(" ") and len(value) > 1:
        text = f"{text[:-1]}\\ "
    return text


def cipher_number(name: str) -> int | None:
    """The number of a cipher suite with IANA, by OpenSSL's name for it."""
    return _numbers().get(name)


@functools.cache
def _numbers() -> dict[str, int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("ALL:COMPLEMENTOFALL:@SECLEVEL=0")
    # OpenSSL counts them as 0x03000000 and the two bytes of the number.
    return {cipher["name"]: cipher["id"] & 0xFFFF for cipher in context.get_ciphers()}
