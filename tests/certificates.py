"""What servers and clients with TLS show, and who has signed it: made by trustme, once per run of the tests."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtensionOID, NameOID


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


def write_latin_1_client(folder: Path) -> tuple[str, str]:
    """A client whose e-mail address is in Latin-1, as old authorities have signed it: files of authority and client.

    Neither trustme nor cryptography would write such an address, so the extension is spelled out.
    """
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    key_id = x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key())
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Old authority")])
    now = dt.datetime.now(dt.UTC)

    def builder(subject: x509.Name, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder(authority, subject, public_key, x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=90))
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_id), critical=False
            )
        )

    usage = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "encipher_only", "decipher_only"), False,
    )  # fmt: skip
    address = "m\u00fcller@example.org".encode("latin-1")
    email = b"\x81" + bytes([len(address)]) + address  # rfc822Name, in a SEQUENCE
    names = x509.UnrecognizedExtension(
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME, b"\x30" + bytes([len(email)]) + email
    )
    signed = [
        builder(authority, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
        .add_extension(key_id, critical=False)
        .sign(authority_key, hashes.SHA256()),
        builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "client")]), key.public_key())
        .add_extension(names, critical=False)
        .sign(authority_key, hashes.SHA256()),
    ]
    files = [folder / "old-authority.pem", folder / "latin-1-client.pem"]
    for file, certificate in zip(files, signed, strict=True):
        file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    with files[1].open("ab") as file:
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
    return str(files[0]), str(files[1])
