"""What servers and clients with TLS show, and who has signed it: made by trustme, once per run of the tests."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certificates:
    """Files in PEM.

    Attributes:
        ca: the authority that signed all of them.
        certfile, keyfile: for localhost and 127.0.0.1; ECDSA on P-256.
        rsa_certfile, rsa_keyfile: the same with RSA, 2048 bits.
        client: certificate and key of a client, in one file.
    """

    ca: Path
    certfile: Path
    keyfile: Path
    rsa_certfile: Path
    rsa_keyfile: Path
    client: Path

    @property
    def flags(self) -> tuple[str, ...]:
        """For the command line of a server."""
        return ("--certfile", str(self.certfile), "--keyfile", str(self.keyfile))


def make_certificates(folder: Path) -> Certificates:
    names = ("ca", "cert", "key", "rsa-cert", "rsa-key", "client")
    found = Certificates(*(folder / f"{name}.pem" for name in names))
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(found.ca))
    # As long as authorities issue them for: scanners look at that, too.
    now = dt.datetime.now(dt.UTC)
    validity = {
        "not_before": now - dt.timedelta(days=1),
        "not_after": now + dt.timedelta(days=90),
    }
    for kind, certfile, keyfile in (
        (trustme.KeyType.ECDSA, found.certfile, found.keyfile),
        (trustme.KeyType.RSA, found.rsa_certfile, found.rsa_keyfile),
    ):
        server = ca.issue_cert("localhost", "127.0.0.1", common_name="localhost", key_type=kind, **validity)
        certfile.write_bytes(b"".join(pem.bytes() for pem in server.cert_chain_pems))
        server.private_key_pem.write_to_path(str(keyfile))
    client = ca.issue_cert("client@example.org", common_name="client", **validity)
    client.private_key_and_cert_chain_pem.write_to_path(str(found.client))
    return found
