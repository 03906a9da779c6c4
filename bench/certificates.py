"""The certificate that servers with TLS show, and what a client needs to believe it.

Called by `process.py` and the load clients. Made once per run, by trustme, in a directory that goes with the run:
ECDSA on P-256, signed by an authority of its own.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path

_NAMES = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Certificate:
    """Files in PEM: the chain that a server shows, its private key (PKCS #8), and the authority that signed."""

    chain: Path
    key: Path
    authority: Path


@functools.cache
def make_certificate() -> Certificate:
    """The certificate of this run."""
    # Only who measures TLS needs them.
    import trustme
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        load_pem_private_key,
    )

    directory = Path(tempfile.mkdtemp(prefix="bench-certificate-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    certificate = Certificate(directory / "chain.pem", directory / "key.pem", directory / "authority.pem")
    authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
    issued = authority.issue_cert(*_NAMES, key_type=trustme.KeyType.ECDSA)
    certificate.chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    # trustme writes the older form of a key, which granian does not take.
    key = load_pem_private_key(issued.private_key_pem.bytes(), password=None)
    certificate.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    authority.cert_pem.write_to_path(str(certificate.authority))
    return certificate


@functools.cache
def client_context() -> ssl.SSLContext:
    """A context that believes the authority of this run, and nobody else."""
    context = ssl.create_default_context(cafile=str(make_certificate().authority))
    context.set_alpn_protocols(["http/1.1"])
    return context
