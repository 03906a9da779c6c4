"""Make a certificate for developing, and say what to do with it.

    python -m examples.https [DIRECTORY] [NAME ...]

Needs `pip install trustme`. Names are what browsers will ask for: localhost, 127.0.0.1 and ::1 unless others are given.
The authority that has signed the certificates is not kept: nobody, you included, can sign anything else with it, so
trusting it is trusting these files. The keys are readable by you alone; keep them out of repositories.
"""

from __future__ import annotations

import datetime as dt
import os
import sys
from pathlib import Path

import trustme

from examples.https import OUT

NAMES = ("localhost", "127.0.0.1", "::1")
CLIENT = "developer@localhost"

# Apple's systems accept no server's certificate for much longer.
VALID = dt.timedelta(days=365)


def main(arguments: list[str]) -> int:
    """Write the files and print how to use them."""
    folder = Path(arguments[0]) if arguments else OUT
    write_certificates(folder, arguments[1:] or NAMES)
    print(HOW_TO.format(folder=folder, ca=folder / "ca.pem"))
    return 0


def write_certificates(folder: Path, names: list[str] | tuple[str, ...] = NAMES) -> None:
    """An authority's certificate, and a certificate with its key for the server and for a client."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA(organization_name="trioserve development")
    (folder / "ca.pem").write_bytes(authority.cert_pem.bytes())
    today = dt.datetime.now(dt.UTC)
    for file, identities in (("server", names), ("client", (CLIENT,))):
        issued = authority.issue_cert(
            *identities,
            common_name=identities[0],
            organization_name="trioserve development",
            not_before=today - dt.timedelta(days=1),
            not_after=today + VALID,
        )
        chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
        (folder / f"{file}.pem").write_bytes(chain)
        write_key(folder / f"{file}.key", issued.private_key_pem.bytes())


def write_key(path: Path, pem: bytes) -> None:
    """As a new file that was never readable by others, not even for a moment."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)


HOW_TO = """\
Written to {folder}: ca.pem, server.pem, server.key, client.pem, client.key

Serve:
    trioserve --bind 127.0.0.1:8443 --certfile {folder}/server.pem --keyfile {folder}/server.key examples.https.app:app
Ask:
    curl --cacert {ca} https://127.0.0.1:8443/

Browsers must be told to trust {ca}:
    Firefox         Settings, Privacy & Security, View Certificates, Authorities, Import
    Chrome, Linux   certutil -d sql:$HOME/.pki/nssdb -A -t C,, -n trioserve -i {ca}
    macOS           security add-trusted-cert -k ~/Library/Keychains/login.keychain-db {ca}
    Windows         certutil -user -addstore Root {ca}

Ask clients for certificates too, with --ca-certs {ca} --verify-mode CERT_REQUIRED, and show one:
    curl --cacert {ca} --cert {folder}/client.pem --key {folder}/client.key https://127.0.0.1:8443/"""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
