"""Who vouches for whom: the certificates of a consortium, and what each may be used for."""

from __future__ import annotations

import stat

import pytest

pytest.importorskip("cryptography", reason="comes with the extra 'flower'")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedgan_lightning.__main__ import main
from fedgan_lightning.deployment import keys as making
from fedgan_lightning.deployment import programs
from fedgan_lightning.errors import ConfigurationError


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


# ---------------------------------------------------------------------- a year later


def again(keys, *, sites):
    return main(["federation", "keys", str(keys), "--sites", str(sites), "--host", "fedgan.example.org"])


def test_the_same_command_renews_certificates_and_keeps_the_authority_and_node_keys(keys, capsys):
    before = {path.name: path.read_bytes() for path in keys.iterdir()}
    assert again(keys, sites=3) == 0
    after = {path.name: path.read_bytes() for path in keys.iterdir()}
    assert {name for name in before if before[name] == after[name]} == {
        *("ca.crt", "ca.key", "site0", "site0.pub", "site1", "site1.pub")
    }
    assert after.keys() - before.keys() == {"site2", "site2.pub", "site2.tls.crt", "site2.tls.key"}
    for name in ("server", "site0.tls", "site1.tls", "site2.tls"):
        found = certificate(keys / f"{name}.crt")
        found.verify_directly_issued_by(certificate(keys / "ca.crt"))
        own = serialization.load_pem_private_key(after[f"{name}.key"], password=None)
        assert own.public_key() == found.public_key(), "key and certificate belong together"
    text = capsys.readouterr().out
    assert "kept: ca, site0, site1\n" in text
    assert "renewed: server, site0.tls, site1.tls\n" in text


def test_an_authority_whose_key_is_in_a_safe_signs_nothing(keys, capsys):
    (keys / "ca.key").rename(keys.parent / "safe")
    before = {path.name: path.read_bytes() for path in keys.iterdir()}
    assert again(keys, sites=3) == 2
    assert "received " + str(keys) + " without ca.key. Fix: bring it from its safe" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in keys.iterdir()} == before


def test_a_site_with_keys_of_its_own_gets_a_certificate_for_its_request(keys, capsys):
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "the server, really")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name)
    more = x509.SubjectAlternativeName([x509.DNSName("fedgan.example.org")])
    request = request.add_extension(more, critical=False).sign(key, hashes.SHA384())
    (keys / "site2.csr").write_bytes(request.public_bytes(serialization.Encoding.PEM))
    for number in (2, 3):
        (keys / f"site{number}.pub").write_bytes((keys / "site0.pub").read_bytes())
    assert again(keys, sites=4) == 0
    found = certificate(keys / "site2.tls.crt")
    found.verify_directly_issued_by(certificate(keys / "ca.crt"))
    assert found.public_key() == key.public_key()
    assert names_and_uses(found)[0] == {"localhost", "127.0.0.1"}, "whatever the request says"
    assert found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "site2"
    assert not {"site2", "site2.tls.key", "site3", "site3.tls.crt"} & {path.name for path in keys.iterdir()}
    assert "left to the site: site3.tls\n" in capsys.readouterr().out


def test_a_request_of_somebody_without_its_key_is_refused(keys, capsys):
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "site0")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name)
    signed = request.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA384())
    forged = bytearray(signed.public_bytes(serialization.Encoding.DER))
    forged[-1] ^= 1  # the end of the signature
    found = x509.load_der_x509_csr(bytes(forged))
    (keys / "site0.csr").write_bytes(found.public_bytes(serialization.Encoding.PEM))
    assert again(keys, sites=1) == 2
    assert "a request is signed with its own key; received" in capsys.readouterr().err


def test_a_certificate_that_has_ended_is_refused_and_one_that_is_about_to_is_named(keys, monkeypatch, caplog):
    making.check_valid(keys / "server.crt")
    assert not caplog.text
    monkeypatch.setattr(making, "VALID_DAYS", 29)
    assert again(keys, sites=2) == 0
    making.check_valid(keys / "server.crt")
    assert "server.crt ends on 2" in caplog.text
    monkeypatch.setattr(making, "VALID_DAYS", -1e-3)  # a minute and a half ago
    assert again(keys, sites=2) == 0
    with pytest.raises(ConfigurationError, match=r"certificates are valid; received .*server.crt, which ended on 2"):
        programs.superlink(keys.parent / "home", keys=keys, host="127.0.0.1", port=0)


def test_an_authority_that_has_ended_signs_nothing_and_outlives_what_it_signs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(programs, "program", lambda name: name)
    monkeypatch.setattr(making, "AUTHORITY_DAYS", 100)
    assert again(tmp_path, sites=1) == 0
    ends = [certificate(tmp_path / f"{name}.crt").not_valid_after_utc for name in ("server", "site0.tls", "ca")]
    assert ends[0] == ends[1] == ends[2]
    monkeypatch.setattr(making, "AUTHORITY_DAYS", -1e-3)
    making.make_authority(tmp_path)
    assert again(tmp_path, sites=1) == 2
    assert "an authority is valid; received" in capsys.readouterr().err
