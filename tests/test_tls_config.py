"""Certificates that cannot be served are told by name at the start, with what to do; and what is served is sound."""

from __future__ import annotations

import logging
import os
import ssl
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from tests.net.tls_sockets import Shop
from trioserve.cli import main
from trioserve.config import Config
from trioserve.config.certificate_times import validity
from trioserve.config.sources import config_as_toml
from trioserve.config.tls_context import (
    CertificateFiles,
    find_certificate_remarks,
    find_tls_problems,
    sni_files,
    why_no_ktls,
)
from trioserve.errors import EXIT_CONFIG, EXIT_OK, ConfigError


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def encrypt(keyfile: str, password: str) -> None:
    key = load_pem_private_key(Path(keyfile).read_bytes(), None)
    encryption = BestAvailableEncryption(password.encode())
    Path(keyfile).write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))


def problems(**settings: Any) -> str:
    return "\n".join(find_tls_problems(Config.from_mapping(settings)))


# -- files ---------------------------------------------------------------------------------------------------


def test_a_certificate_and_its_key_are_served(shop: Shop) -> None:
    certfile, keyfile = shop.issue("localhost")
    assert problems(certfile=certfile, keyfile=keyfile) == ""


def test_both_may_be_in_one_file(shop: Shop) -> None:
    certfile, keyfile = shop.issue("localhost")
    both = shop.directory / "both.pem"
    both.write_text(Path(keyfile).read_text() + Path(certfile).read_text())
    config = Config.from_mapping(certfile=both)
    config.validate()
    assert config.ssl_enabled
    assert config.create_ssl_context() is not None


def test_a_certfile_without_a_key_is_no_plain_http(shop: Shop) -> None:
    """hypercorn serves plain HTTP then, without a word."""
    certfile, _ = shop.issue("localhost")
    assert problems(certfile=certfile).endswith("there is no private key in it; give its file as keyfile")


def test_what_is_wrong_with_files_is_told_by_name(shop: Shop, tmp_path: Path) -> None:
    certfile, keyfile = shop.issue("localhost")
    _, other_key = shop.issue("other")
    nothing = tmp_path / "nothing"
    nothing.write_text("no PEM\n")
    missing = str(tmp_path / "missing.pem")
    for settings, text in (
        (
            {"certfile": missing, "keyfile": keyfile},
            f"certfile {missing}: it cannot be read (No such file or",
        ),
        (
            {"certfile": certfile, "keyfile": missing},
            f"keyfile {missing}: it cannot be read (No such file or",
        ),
        (
            {"certfile": certfile, "keyfile": other_key},
            f"keyfile {other_key}: the key does not belong to the",
        ),
        ({"certfile": nothing, "keyfile": keyfile}, f"certfile {nothing}: there is no certificate in it"),
        ({"certfile": certfile, "keyfile": nothing}, f"keyfile {nothing}: there is no private key in it"),
        ({"certfile": certfile, "keyfile": keyfile, "ca_certs": missing}, f"ca_certs {missing}: it cannot"),
        ({"certfile": certfile, "keyfile": keyfile, "ca_certs": nothing}, f"ca_certs {nothing}: there is no"),
        (
            {"certfile": certfile, "keyfile": keyfile, "ciphers": "NONSENSE"},
            "ciphers = NONSENSE: OpenSSL knows",
        ),
        (
            {"certfile": certfile, "keyfile": keyfile, "verify_mode": "CERT_REQUIRED"},
            "whose certificates are to be believed? Give a file with the authorities as ca_certs",
        ),
        (
            {"certfile": certfile, "keyfile": keyfile, "sni_certificates": {"a.example": missing}},
            f"mapping: sni_certificates: certfile {missing}: it cannot be read",
        ),
        (
            {"certfile": certfile, "keyfile": keyfile, "bind": ["a:1"], "insecure_bind": ["a:1"]},
            "bind and insecure_bind both name 'a:1'",
        ),
    ):
        said = problems(**settings)
        assert text in said
        assert "\n" not in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_key_that_may_not_be_read(shop: Shop) -> None:
    certfile, keyfile = shop.issue("localhost")
    Path(keyfile).chmod(0)
    assert f"it cannot be read by user {os.geteuid()}" in problems(certfile=certfile, keyfile=keyfile)


def test_an_encrypted_key_needs_its_password(shop: Shop, capfd: pytest.CaptureFixture[str]) -> None:
    """And OpenSSL does not ask for it at the terminal."""
    certfile, keyfile = shop.issue("localhost")
    encrypt(keyfile, "right")
    files = {"certfile": certfile, "keyfile": keyfile}
    assert "the key is encrypted; give its password as keyfile_password" in problems(**files)
    assert "keyfile_password is not the password of this key" in problems(**files, keyfile_password="wrong")
    assert problems(**files, keyfile_password="right") == ""
    table = {"a.example": {**files, "keyfile_password": "right"}}
    plain = shop.issue("plain")
    assert problems(certfile=plain[0], keyfile=plain[1], sni_certificates=table) == ""
    assert capfd.readouterr() == ("", "")


def test_a_password_is_in_no_message(shop: Shop) -> None:
    certfile, keyfile = shop.issue("localhost")
    encrypt(keyfile, "right")
    config = Config.from_mapping(
        certfile=certfile,
        keyfile=keyfile,
        keyfile_password="hunter2",
        sni_certificates={
            "a.example": {"certfile": certfile, "keyfile": keyfile, "keyfile_password": "hunter3"}
        },
    )
    shown = repr(config) + config_as_toml(config) + "\n".join(find_tls_problems(config))
    shown += "\n".join(find_tls_problems(Config.from_mapping(keyfile_password="hunter4")))
    assert "hunter" not in shown


# -- times ---------------------------------------------------------------------------------------------------


def issue_until(shop: Shop, until: datetime) -> str:
    made = shop.authority.issue_cert("localhost", not_after=until, not_before=until - timedelta(days=90))
    path = shop.directory / "timed.pem"
    path.write_bytes(made.private_key_and_cert_chain_pem.bytes())
    return str(path)


@pytest.mark.parametrize(
    ("left", "severe", "text"),
    [
        (timedelta(days=-1), True, "has expired at"),
        (timedelta(days=91), True, "is not valid before"),
        (timedelta(days=3), False, "expires at"),
    ],
)
def test_a_certificate_out_of_time_is_served_and_said(
    shop: Shop, left: timedelta, severe: bool, text: str
) -> None:
    now = datetime.now(UTC)
    config = Config.from_mapping(certfile=issue_until(shop, now + left))
    config.validate()
    levels = [level for level, said in config.advice() if text in said]
    assert levels == [logging.ERROR if severe else logging.WARNING]


def test_a_certificate_in_its_time_is_no_news(shop: Shop) -> None:
    now = datetime.now(UTC)
    config = Config.from_mapping(certfile=issue_until(shop, now + timedelta(days=60)))
    assert list(find_certificate_remarks(config)) == []
    assert [severe for severe, _ in find_certificate_remarks(config, lambda: now + timedelta(days=59))] == [
        False
    ]


def test_times_are_read_from_both_encodings(shop: Shop) -> None:
    """UTCTime up to 2049, GeneralizedTime from 2050 on (RFC 5280 section 4.1.2.5)."""
    for until in (datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC), datetime(2050, 1, 1, tzinfo=UTC)):
        made = trustme.CA().issue_cert(
            "localhost", not_before=datetime(1999, 5, 4, tzinfo=UTC), not_after=until
        )
        der = ssl.PEM_cert_to_DER_cert(made.cert_chain_pems[0].bytes().decode())
        assert validity(der) == (datetime(1999, 5, 4, tzinfo=UTC), until)


@pytest.mark.parametrize(
    "der", [b"", b"\x30", b"\x30\x03\x30\x01\x02", b"\x30\x84\xff\xff\xff\xff", bytes(100)]
)
def test_what_is_no_certificate_has_no_times(der: bytes) -> None:
    with pytest.raises(ValueError):
        validity(der)


# -- the context ---------------------------------------------------------------------------------------------


def test_pythons_hardened_options_are_kept(shop: Shop) -> None:
    """hypercorn overwrites them."""
    certfile, keyfile = shop.issue("localhost")
    context = Config.from_mapping(certfile=certfile, keyfile=keyfile).create_ssl_context()
    assert context is not None
    kept = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).options
    assert context.options & kept == kept
    for option in (ssl.OP_NO_COMPRESSION, ssl.OP_NO_RENEGOTIATION, ssl.OP_CIPHER_SERVER_PREFERENCE):
        assert context.options & option
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    names = {cipher["name"] for cipher in context.get_ciphers() if cipher["protocol"] == "TLSv1.2"}
    assert names
    assert all(name.startswith("ECDHE-") and "GCM" in name for name in names)


def test_no_context_without_a_certificate() -> None:
    assert Config().create_ssl_context() is None
    assert not Config().ssl_enabled


def test_settings_for_clients_are_taken_over(shop: Shop) -> None:
    certfile, keyfile = shop.issue("localhost")
    config = Config.from_mapping(
        certfile=certfile,
        keyfile=keyfile,
        ca_certs=certfile,
        verify_mode="CERT_OPTIONAL",
        verify_flags="VERIFY_X509_STRICT",
    )
    context = config.create_ssl_context()
    assert context is not None
    assert context.verify_mode == ssl.CERT_OPTIONAL
    assert context.verify_flags == ssl.VERIFY_X509_STRICT


def test_ca_certs_alone_ask_nobody(shop: Shop) -> None:
    certfile, keyfile = shop.issue("localhost")
    config = Config.from_mapping(certfile=certfile, keyfile=keyfile, ca_certs=certfile)
    assert any("ca_certs has no effect without verify_mode" in text for _, text in config.advice())


def test_what_is_not_served_is_not_offered(shop: Shop) -> None:
    certfile, keyfile = shop.issue("localhost")
    config = Config.from_mapping(certfile=certfile, keyfile=keyfile, alpn_protocols=["spdy/3"])
    config.validate()
    assert any("spdy/3 is not served, so it is not offered" in text for _, text in config.advice())


def test_why_there_is_no_ktls_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_no_ktls() == "" or "kernel" in why_no_ktls()
    monkeypatch.setattr(ssl, "OPENSSL_VERSION_INFO", (1, 1, 1, 11, 15))
    assert "OpenSSL 3" in why_no_ktls()


# -- sni_certificates ----------------------------------------------------------------------------------------


def test_a_table_of_certificates_has_several_forms() -> None:
    expected = {
        "*.example.com": CertificateFiles("c", "k"),
        "xn--bcher-kva.example": CertificateFiles("both", None),
    }
    for table in (
        {"*.Example.com": {"certfile": "c", "keyfile": "k"}, "bücher.example.": "both"},
        ["*.example.com=c,k", "bücher.example=both"],
        expected,
    ):
        assert sni_files(table) == expected
        assert Config.from_mapping(sni_certificates=table).sni_certificates == expected


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (5, "neither a table nor a list"),
        ({"": "c"}, "no host name"),
        ({"*": "c"}, "no host name"),
        ({"a.*.example": "c"}, "no host name"),
        ({"a b": "c"}, "no host name"),
        ({5: "c"}, "no host name"),
        ({"a": {}}, "names no certfile"),
        ({"a": {"certfile": 5}}, "must be text"),
        ({"a": {"certfile": "c", "key": "k"}}, "has 'key'; there are certfile, keyfile, keyfile_password"),
        ({"a": 5}, "needs a table"),
        (["a"], "is not HOST=CERT,KEY"),
        ([5], "is int"),
        (["a=c", "A=d"], "a is given twice"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(table: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_mapping(sni_certificates=table)
    assert text in str(caught.value)


def test_a_table_can_be_given_by_flags_and_environment(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    certfile, keyfile = shop.issue("localhost")
    flags = ["--certfile", certfile, "--keyfile", keyfile]
    twice = [f"--sni-certificate={host}={certfile},{keyfile}" for host in ("a.example", "*.b.example")]
    assert main([*flags, *twice, "--print-config", "x:app"]) == EXIT_OK
    assert f'{{"a.example" = {{"certfile" = "{certfile}"' in capsys.readouterr().out
    monkeypatch.setenv("TRIOSERVE_SNI_CERTIFICATES", f"a.example={certfile},{keyfile};b.example={certfile}")
    assert main([*flags, "--check-config", "x:app"]) == EXIT_CONFIG
    assert f"certfile {certfile}: there is no private key in it" in capsys.readouterr().err


def test_tables_are_nobodys_default() -> None:
    Config().sni_certificates["a"] = CertificateFiles("c")
    assert Config().sni_certificates == {}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a b=c.pem,k.pem,S3,CRET;S3=CRET", "'a b=c.pem,k.pem,***;***'"),
        ("a b=c.pem;x=y,z,S3CRET", "'a b=c.pem;x=y,z,***'"),
        ("S3CRET", "'***'"),
        (["a b=c.pem,k.pem,S3CRET", 5], "['a b=c.pem,k.pem,***', 5]"),
        (
            {"a b": {"certfile": "c.pem", "keyfile_pasword": "S3CRET"}},
            "{'a b': {'certfile': 'c.pem', 'keyfile_pasword': '***'}}",
        ),
        ({"a b": {"certfile": ["S3CRET"]}, "c": ["S3CRET"], "d": "d.pem"},
         "{'a b': {'certfile': '***'}, 'c': '***', 'd': 'd.pem'}"),
        (b"S3CRET", "'***'"),
        (5, "5"),
    ],
)  # fmt: skip
def test_a_message_shows_hosts_and_paths_but_no_password(value: Any, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_mapping(sni_certificates=value)
    assert str(caught.value).startswith(
        f"mapping: sni_certificates = {shown} ({type(value).__name__}): expected"
    )
    assert "CRET" not in str(caught.value)


def test_a_printed_configuration_has_no_password_that_could_be_tried() -> None:
    table = {"a": CertificateFiles("c", "k", "S3CRET"), "b": CertificateFiles("c")}
    (line,) = [
        x for x in config_as_toml(Config.from_mapping(sni_certificates=table)).splitlines() if "sni_" in x
    ]
    assert line.startswith(
        '# sni_certificates = {"a" = {"certfile" = "c", "keyfile" = "k", "keyfile_password" = "***"}'
    )
    assert line.endswith("; masked")


# -- the command ---------------------------------------------------------------------------------------------


def test_check_config_looks_at_certificates(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    certfile, keyfile = shop.issue("localhost")
    assert main(["--certfile", certfile, "--keyfile", keyfile, "--check-config", "x:app"]) == EXIT_OK
    Path(keyfile).write_text("")
    assert main(["--certfile", certfile, "--keyfile", keyfile, "--check-config", "x:app"]) == EXIT_CONFIG
    assert f"command line: --keyfile {keyfile}: there is no private key in it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sni-certificate", "bad host!=c.pem,k.pem,S3CRET"],
        ["--sni-certificate", "S3CRET"],
        ["-c", "c.toml"],
    ],
)
def test_no_password_gets_into_a_message(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text(
        'ssl_keyfile_password = "S3CRET"\nkeyfile_pasword = "S3CRET"\n[sni_certificates."bad host!"]\n'
        'certfile = "c.pem"\nkeyfile_password = "S3CRET"\n'
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        sys.exit(main([*arguments, "--check-config", "m:a"]))
    assert ended.value.code != 0
    said = capsys.readouterr()
    assert "S3CRET" not in said.out + said.err
    assert said.err
