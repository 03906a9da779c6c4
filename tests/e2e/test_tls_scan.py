"""sslyze, a TLS scanner, finds no weakness in the defaults, whichever kind of key the certificate has."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.certificates import Certificates

from .process import run_to_end, serve_command

#: What sslyze has against us by Mozilla's "intermediate" rules, and why it may. Each must be found: what is no longer
#: found needs no excuse.
EXPLAINED = {
    # The authority is the tests' own, and trustme marks the names of a certificate as critical.
    "certificate_path_validation": r"Certificate path validation failed for CN=localhost,.*",
    # Stronger than those on Mozilla's list, and slower: a server takes them only from a client that has no other.
    # Python cannot set the list before 3.15.
    "tls_curves": r"TLS curves \{('X448'|'secp521r1'|, )+\} are supported, but should be rejected\.",
}


@pytest.mark.slow
@pytest.mark.parametrize("key", ["ECDSA", "RSA"])
async def test_a_scanner_finds_no_weakness(key: str, certificates: Certificates, tmp_path: Path) -> None:
    files = (certificates.certfile, certificates.keyfile)
    if key == "RSA":
        files = (certificates.rsa_certfile, certificates.rsa_keyfile)
    report = tmp_path / "report.json"
    async with serve_command(
        "tests.e2e.apps:app", "--certfile", str(files[0]), "--keyfile", str(files[1])
    ) as server:
        scan = await run_to_end(
            *(sys.executable, "-m", "sslyze", server.address.replace("127.0.0.1", "localhost")),
            *("--mozilla_config", "intermediate", "--json_out", str(report)),
            *("--certinfo", "--certinfo_ca_file", str(certificates.ca)),
            *("--sslv2", "--sslv3", "--tlsv1", "--tlsv1_1", "--tlsv1_2", "--tlsv1_3", "--elliptic_curves"),
            *("--compression", "--fallback", "--heartbleed", "--openssl_ccs", "--robot", "--ems"),
            *("--reneg", "--resum", "--early_data"),
        )
    # Its many attempts are the peer's faults: they are not worth an error, let alone a report.
    assert server.reports() == []
    assert "ERROR" not in server.stderr.text

    found = dict(
        re.findall(r"^ +\* (\w+): (.*)$", scan.stdout.text.partition("COMPLIANCE AGAINST")[2], re.MULTILINE)
    )
    assert set(found) == set(EXPLAINED), (found, scan.stdout.text)
    assert all(re.fullmatch(EXPLAINED[name], text) for name, text in found.items()), found

    attempts = json.loads(report.read_text())["server_scan_results"][0]["scan_result"]
    left_out = {"http_headers"}
    assert {name for name, attempt in attempts.items() if attempt["status"] != "COMPLETED"} == left_out
    results = {name: attempt["result"] for name, attempt in attempts.items() if name not in left_out}
    versions = {name for name, result in results.items() if result.get("is_tls_version_supported")}
    assert versions == {"tls_1_2_cipher_suites", "tls_1_3_cipher_suites"}
    for accepted in results["tls_1_2_cipher_suites"]["accepted_cipher_suites"]:
        # Forward secrecy and authenticated encryption.
        assert re.match(r"TLS_ECDHE_\w+_WITH_(AES_\d+_GCM|CHACHA20)_", accepted["cipher_suite"]["name"]), (
            accepted
        )
    assert results["session_renegotiation"]["is_vulnerable_to_client_renegotiation_dos"] is False
    # A request in early data can be replayed.
    assert results["tls_1_3_early_data"]["supports_early_data"] is False
    [certificate] = results["certificate_info"]["certificate_deployments"]
    assert certificate["received_chain_has_valid_order"] is True
