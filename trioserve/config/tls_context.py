"""From the settings of TLS to `ssl.SSLContext`s, and what is wrong with the files that they name.

Called by `Config.create_ssl_context`, by `checks.py` when a configuration is validated, and by `net/certificates.py`,
which serves with them and reads them anew. Reads files; nothing here waits for anything else.

A certificate that has expired is an error in the log and not of the start: a worker that is replaced at night must
come up, and clients that look would otherwise see no server at all instead of an old certificate.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from trioserve.config.certificate_times import validity
from trioserve.config.provenance import Origin
from trioserve.errors import ConfigError

if TYPE_CHECKING:
    from trioserve.config.config import Config

# What can be agreed on with ALPN, in our order of preference; what else is asked for is not offered.
SERVED_PROTOCOLS = ("h2", "http/1.1")

# Let the kernel encrypt. Its name came with Python 3.12; its value is OpenSSL's (3.0 and later).
KTLS_OPTION: int = getattr(ssl, "OP_ENABLE_KTLS", 1 << 3)

# setsockopt(2): the protocol to put upon TCP (linux/tcp.h).
_TCP_ULP = 31

# As long before its end a certificate should have been renewed by whatever renews it.
_SOON = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """One certificate chain and its key, in PEM.

    Attributes:
        keyfile: None where the key is in `certfile`, too.
        keyfile_password: None where the key is not encrypted.
    """

    certfile: str
    keyfile: str | None = None
    keyfile_password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.certfile if self.keyfile is None else f"{self.certfile},{self.keyfile}"


def sni_files(table: object) -> dict[str, CertificateFiles]:
    """`sni_certificates` in its settled form: by host name in lower case, or `*.` and a domain.

    Raises:
        ValueError: says what is wrong with it.
    """
    items: Iterable[tuple[object, object]]
    if isinstance(table, Mapping):
        items = table.items()
    elif isinstance(table, Iterable) and not isinstance(table, bytes):
        items = [_split_text(item) for item in ([table] if isinstance(table, str) else table)]
    else:
        raise ValueError("it is neither a table nor a list")
    found: dict[str, CertificateFiles] = {}
    for host, files in items:
        name = _host_name(host)
        if name in found:
            raise ValueError(f"{name} is given twice")
        found[name] = _settled_files(name, files)
    return found


def _split_text(item: object) -> tuple[str, object]:
    if not isinstance(item, str):
        raise ValueError(f"{item!r} is {type(item).__name__}")
    host, equals, files = item.partition("=")
    if not equals:
        raise ValueError("an entry is not HOST=CERT,KEY")  # it may hold a password
    return host, dict(zip(_FIELDS, files.split(",", 2), strict=False))


_FIELDS = ("certfile", "keyfile", "keyfile_password")


def _settled_files(host: str, files: object) -> CertificateFiles:
    if isinstance(files, CertificateFiles):
        return files
    if isinstance(files, str | os.PathLike):
        files = {"certfile": files}
    if not isinstance(files, Mapping):
        raise ValueError(f"{host} needs a table with certfile and keyfile")
    unknown = sorted(str(name) for name in files if name not in _FIELDS)
    if unknown:
        raise ValueError(f"{host} has {unknown[0]!r}; there are {', '.join(_FIELDS)}")
    values: dict[str, str | None] = {}
    for name in _FIELDS:
        value = files.get(name)
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} of {host} must be text")
        values[name] = value or None
    if values["certfile"] is None:
        raise ValueError(f"{host} names no certfile")
    return CertificateFiles(values["certfile"], values["keyfile"], values["keyfile_password"])


def _host_name(host: object) -> str:
    if not isinstance(host, str):
        raise ValueError(f"{host!r} is no host name")
    name = host.strip().lower().rstrip(".")
    try:
        # What a client sends is in ASCII (RFC 6066 section 3).
        name = name if name.isascii() else name.encode("idna").decode("ascii")
    except UnicodeError:
        raise ValueError(f"{host!r} is no host name") from None
    labels = name.removeprefix("*.").split(".")
    if (
        not all(labels)
        or "*" in name.removeprefix("*.")
        or not all(c.isalnum() or c in "-_." for c in "".join(labels))
    ):
        raise ValueError(f"{host!r} is no host name, nor *. and a domain")
    return name


def speaks_tls(config: Config) -> bool:
    """Whether `bind` is served with TLS."""
    return config.certfile is not None


def default_files(config: Config) -> CertificateFiles:
    """The certificate for all whom `sni_certificates` has none for."""
    assert config.certfile is not None
    return CertificateFiles(config.certfile, config.keyfile, config.keyfile_password)


def create_context(config: Config, files: CertificateFiles) -> ssl.SSLContext:
    """A context that shows this certificate, with all other settings of TLS.

    Raises:
        ConfigError: a file cannot be used; says which and why.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Added to Python's own, which hypercorn's replace. A renegotiation is work that only the client asks for.
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    # A FIN without close_notify is the end of what the client sends, and no reason to refuse it our answer: whether it
    # has sent all it meant to is for the framing of HTTP to say.
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    # One ticket for a later session instead of OpenSSL's two, as Go has it: each costs a tenth of the handshake.
    context.num_tickets = 1
    if config.ktls and ssl.OPENSSL_VERSION_INFO >= (3, 0):
        context.options |= KTLS_OPTION
    try:
        context.set_ciphers(config.ciphers)
    except ssl.SSLError:
        raise ConfigError(
            f"ciphers = {config.ciphers}: OpenSSL knows no such ciphers (openssl ciphers -v)"
        ) from None
    protocols = [name for name in config.alpn_protocols if name in SERVED_PROTOCOLS]
    if protocols:
        context.set_alpn_protocols(protocols)
    _load_chain(context, files)
    # For ASGI's tls extension: OpenSSL has it, but Python gives no way to ask for it.
    try:
        vars(context)["own_certificate"] = first_certificate(files.certfile)
    except OSError as error:
        raise ConfigError(f"certfile = {files.certfile} cannot be read: {error.strerror}") from None
    if config.ca_certs is not None:
        _load_authorities(context, config.ca_certs)
    if config.verify_mode is not None:
        context.verify_mode = config.verify_mode
    if config.verify_flags is not None:
        context.verify_flags = config.verify_flags
    # Asked of each connection: the context's own attributes make an enum of the answer each time.
    vars(context)["asks_clients"] = context.verify_mode != ssl.CERT_NONE
    return context


def _load_chain(context: ssl.SSLContext, files: CertificateFiles) -> None:
    asked = False

    def password() -> str:
        # Always given: without it OpenSSL would ask at the terminal, and wait.
        nonlocal asked
        asked = True
        return files.keyfile_password or ""

    _check_readable(files.certfile, "certfile")
    if files.keyfile is not None:
        _check_readable(files.keyfile, "keyfile")
    try:
        context.load_cert_chain(files.certfile, files.keyfile, password)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(_explain(files, error, asked)) from None


def _explain(files: CertificateFiles, error: Exception, asked: bool) -> str:
    """What is wrong with a pair of files, for whoever has to mend it."""
    key = files.keyfile or files.certfile
    if asked:
        if files.keyfile_password is None:
            return f"keyfile {key}: the key is encrypted; give its password as keyfile_password"
        return f"keyfile {key}: keyfile_password is not the password of this key"
    reason = getattr(error, "reason", None) or ""
    if reason == "KEY_VALUES_MISMATCH":
        return f"keyfile {key}: the key does not belong to the certificate in {files.certfile}"
    if reason in ("EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"):
        words = reason.lower().replace("_", " ")
        return f"certfile {files.certfile}: OpenSSL finds it too weak ({words}); make a new one"
    if not _has_block(files.certfile, "CERTIFICATE"):
        return f"certfile {files.certfile}: there is no certificate in it; it must be PEM (-----BEGIN CERTIFICATE-----)"
    if not _has_block(key, "PRIVATE KEY"):
        if files.keyfile is None:
            return f"certfile {key}: there is no private key in it; give its file as keyfile"
        return f"keyfile {key}: there is no private key in it; it must be PEM (-----BEGIN PRIVATE KEY-----)"
    return f"certfile {files.certfile}, keyfile {key}: OpenSSL cannot read them ({reason or error})"


def _load_authorities(context: ssl.SSLContext, path: str) -> None:
    _check_readable(path, "ca_certs")
    try:
        context.load_verify_locations(path)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"ca_certs {path}: there is no certificate in it that OpenSSL can read ({error})"
        ) from None


def _check_readable(path: str, setting: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        who = f" by user {os.geteuid()}" if isinstance(error, PermissionError) else ""
        raise ConfigError(f"{setting} {path}: it cannot be read{who} ({error.strerror})") from None


def _has_block(path: str, kind: str) -> bool:
    try:
        text = Path(path).read_text("latin-1")
    except OSError:
        return False
    return any(line.startswith("-----BEGIN ") and kind in line for line in text.splitlines())


def first_certificate(path: str) -> str | None:
    """The certificate of a chain that is the server's own, in PEM; None if there is none."""
    text = Path(path).read_text("latin-1")
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    start = text.find(begin)
    stop = text.find(end, start)
    return None if start < 0 or stop < 0 else f"{text[start : stop + len(end)]}\n"


# -- all of them ---------------------------------------------------------------------------------------------


def all_files(config: Config) -> Iterator[CertificateFiles]:
    """Of every certificate that is served."""
    if speaks_tls(config):
        yield default_files(config)
        yield from sni_files(config.sni_certificates).values()


def find_tls_problems(config: Config) -> Iterator[str]:
    """What makes it impossible to serve these settings, one line each."""
    if not speaks_tls(config):
        # Serving plain HTTP where TLS was meant would be a hole.
        for name in (
            "keyfile",
            "keyfile_password",
            "ca_certs",
            "verify_mode",
            "verify_flags",
            "sni_certificates",
        ):
            if value := getattr(config, name):
                shown = "***" if name == "keyfile_password" else f"{value}"
                where = config.source_of(name).place(name)
                yield f"{where} = {shown}: TLS needs certfile, too; without it plain HTTP would be served"
        return
    both = [bind for bind in config.insecure_bind if bind in config.bind]
    if both:
        yield f"bind and insecure_bind both name {both[0]!r}: an address speaks TLS or plain HTTP, not both"
    if config.verify_mode not in (None, ssl.CERT_NONE) and config.ca_certs is None:
        described = config.source_of("verify_mode").describe("verify_mode", config.verify_mode)
        yield f"{described}: whose certificates are to be believed? Give a file with the authorities as ca_certs"
    for files in dict.fromkeys(all_files(config)):
        try:
            create_context(config, files)
        except ConfigError as error:
            yield _with_place(config, files, str(error))


def _with_place(config: Config, files: CertificateFiles, text: str) -> str:
    """Where the setting was given that a message begins with."""
    name, _, rest = text.partition(" ")
    if name in ("certfile", "keyfile") and files != default_files(config):
        return f"{config.source_of('sni_certificates').place('sni_certificates')}: {text}"
    return f"{config.source_of(name).place(name)} {rest}"


def find_tls_remarks(config: Config, now: Callable[[], datetime] | None = None) -> Iterator[tuple[bool, str]]:
    """What the operator should know though it is served: (whether it is an error, text)."""
    if not speaks_tls(config):
        if config.insecure_bind:
            yield False, "insecure_bind has no effect without certfile: bind is served without TLS then"
        return
    left_out = [name for name in config.alpn_protocols if name not in SERVED_PROTOCOLS]
    if left_out and config.source_of("alpn_protocols").origin is not Origin.DEFAULT:
        yield False, f"alpn_protocols: {', '.join(left_out)} is not served, so it is not offered"
    if config.ca_certs is not None and config.verify_mode in (None, ssl.CERT_NONE):
        yield False, "ca_certs has no effect without verify_mode: no client is asked for a certificate"
    if config.ktls and (reason := why_no_ktls()):
        yield False, f"ktls: {reason}; encrypting in this process instead, and files are read to be sent"
    yield from find_certificate_remarks(config, now)


def find_certificate_remarks(
    config: Config, now: Callable[[], datetime] | None = None
) -> Iterator[tuple[bool, str]]:
    """The part of it that time brings: (whether it is an error, text)."""
    moment = datetime.now(UTC) if now is None else now()
    for files in dict.fromkeys(all_files(config)):
        yield from _about_times(files.certfile, moment)


def _about_times(path: str, now: datetime) -> Iterator[tuple[bool, str]]:
    try:
        pem = first_certificate(path)
        if pem is None:
            return
        begin, end = validity(ssl.PEM_cert_to_DER_cert(pem))
    except (OSError, ValueError):
        return  # whoever serves it says what is wrong
    if now >= end:
        yield (
            True,
            f"certfile {path}: the certificate has expired at {end:%Y-%m-%d %H:%M} UTC; clients will refuse it",
        )
    elif now < begin:
        yield (
            True,
            f"certfile {path}: the certificate is not valid before {begin:%Y-%m-%d %H:%M} UTC; is the clock right?",
        )
    elif end - now < min(_SOON, (end - begin) / 10):
        yield False, f"certfile {path}: the certificate expires at {end:%Y-%m-%d %H:%M} UTC; renew it"


def why_no_ktls() -> str:
    """Why this system cannot have the kernel encrypt, or "" if it may be able to."""
    if ssl.OPENSSL_VERSION_INFO < (3, 0):
        return f"{ssl.OPENSSL_VERSION} cannot hand its keys to the kernel; OpenSSL 3 can"
    if not hasattr(os, "sendfile"):
        return "this system has no sendfile(2)"
    with socket.socket() as probe:
        try:
            # A socket that is not connected cannot be told either way, but the order of the complaints tells.
            probe.setsockopt(socket.IPPROTO_TCP, _TCP_ULP, b"tls")
        except FileNotFoundError:
            return "the kernel has no TLS; if there is a module, load it with: modprobe tls"
        except OSError:
            return ""
    return ""
