"""Who vouches for whom: the certificates of a consortium, and what each may be used for."""

from __future__ import annotations

import stat

import pytest

pytest.importorskip("cryptography", reason="comes with the extra 'flower'")

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedgan_lightning.__main__ import main
from fedgan_lightning.deployment import programs


@pytest.fixture
def keys(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "program", lambda name: name)
    assert main(["federation", "keys", str(tmp_path / "keys"), "--sites", "2", "--host", "fedgan.example.org"]) == 0
    return tmp_path / "keys"


def certificate(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


def names_and_uses(found):
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uses = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    return {*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))}, set(uses)


def test_the_server_is_known_by_its_name_and_on_its_own_machine_and_is_no_client(keys):
    server = certificate(keys / "server.crt")
    server.verify_directly_issued_by(certificate(keys / "ca.crt"))
    expected = {"fedgan.example.org", "localhost", "127.0.0.1"}
    assert names_and_uses(server) == (expected, {ExtendedKeyUsageOID.SERVER_AUTH})


def test_every_site_has_a_certificate_of_its_own(keys):
    found = [certificate(keys / f"site{number}.tls.crt") for number in range(2)]
    assert found[0].public_key() != found[1].public_key()
    for number, own in enumerate(found):
        own.verify_directly_issued_by(certificate(keys / "ca.crt"))
        assert own.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == f"site{number}"
        uses = {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
        assert names_and_uses(own) == ({"localhost", "127.0.0.1"}, uses)


def test_private_keys_are_readable_by_their_owner_alone(keys):
    private = {path.name for path in keys.iterdir() if path.suffix not in (".crt", ".pub")}
    assert private == {"ca.key", "server.key", "site0", "site1", "site0.tls.key", "site1.tls.key"}
    assert {stat.S_IMODE((keys / name).stat().st_mode) for name in private} == {0o600}


def test_a_site_with_a_certificate_uses_tls_among_its_own_processes_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(programs, "program", lambda name: name)
    told = {
        "superlink": "localhost:8443",
        "ca": tmp_path / "ca.crt",
        "key": tmp_path / "site0",
        "port": 9094,
        "node": {},
    }
    command = programs.supernode(**told, tls=tmp_path / "site0.tls")
    options = dict(zip(command[1::2], command[2::2]))
    assert options["--ssl-certfile"] == str(tmp_path / "site0.tls.crt")
    assert options["--ssl-keyfile"] == str(tmp_path / "site0.tls.key")
    assert options["--ssl-ca-certfile"] == str(tmp_path / "ca.crt")
    assert "--ssl-certfile" not in programs.supernode(**told)
    for name in ("ca.crt", "site0", "config.yaml"):
        (tmp_path / name).touch()
    site = ["--superlink", "h:1", "--ca", "ca.crt", "--key", "site0", "--client-id", "0", "--config", "config.yaml"]
    assert main(["federation", "site", *site, "--tls", "site0.tls"]) == 2
    assert "files that are named exist; received site0.tls.crt" in capsys.readouterr().err
