"""Who vouches for whom: the certificates of a consortium, and what each may be used for."""

from __future__ import annotations

import stat

import pytest

pytest.importorskip("cryptography", reason="comes with the extra 'flower'")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedgan_lightning.__main__ import main
from fedgan_lightning.deployment import keys as making
from fedgan_lightning.deployment import programs
from fedgan_lightning.errors import ConfigurationError


@pytest.fixture
def keys(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "program", lambda name: name)
    assert main(["deploy", "keys", str(tmp_path / "keys"), "--sites", "2", "--host", "fedgan.example.org"]) == 0
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
    private = {path.name for path in keys.iterdir() if path.suffix not in (".crt", ".pub", ".crl")}
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
        (tmp_path / name).write_text("model: {}" if name == "config.yaml" else "")
    site = ["--superlink", "h:1", "--ca", "ca.crt", "--key", "site0", "--client-id", "0", "--config", "config.yaml"]
    assert main(["deploy", "site", *site, "--tls", "site0.tls"]) == 2
    assert f"files that are named must exist; got {tmp_path / 'site0.tls.crt'}" in capsys.readouterr().err


# ---------------------------------------------------------------------- a year later


def again(keys, *, sites, hosts=()):
    return main(["deploy", "keys", str(keys), "--sites", str(sites), *(["--host", *hosts] if hosts else [])])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def forget(keys, *patterns):
    for pattern in patterns:
        for path in keys.glob(pattern):
            path.unlink()


def request_of(key, *, name="site2", host="localhost"):
    found = x509.CertificateSigningRequestBuilder()
    found = found.subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
    more = x509.SubjectAlternativeName([x509.DNSName(host)])
    return found.add_extension(more, critical=False).sign(key, hashes.SHA256())


def pem(found):
    return found.public_bytes(serialization.Encoding.PEM)


def test_the_same_command_renews_certificates_and_keeps_every_key(keys, capsys):
    before = contents(keys)
    assert again(keys, sites=3) == 0
    after = contents(keys)
    renewed = {f"{name}.crt" for name in ("server", "site0.tls", "site1.tls")}
    assert {name for name in before if before[name] != after[name]} == renewed
    assert after.keys() - before.keys() == {"site2", "site2.pub", "site2.tls.crt", "site2.tls.key"}
    for name in ("server", "site0.tls", "site1.tls", "site2.tls"):
        found = certificate(keys / f"{name}.crt")
        found.verify_directly_issued_by(certificate(keys / "ca.crt"))
        own = serialization.load_pem_private_key(after[f"{name}.key"], password=None)
        assert own.public_key() == found.public_key(), "key and certificate belong together"
    assert "fedgan.example.org" in names_and_uses(certificate(keys / "server.crt"))[0], "nobody named it again"
    text = capsys.readouterr().out
    assert "kept: ca, site0, site1\n" in text
    assert "renewed: server, site0.tls, site1.tls\n" in text
    assert again(keys, sites=1, hosts=["other.example.org"]) == 0
    assert names_and_uses(certificate(keys / "server.crt"))[0] == {"other.example.org", "localhost", "127.0.0.1"}
    assert (keys / "site2.tls.crt").read_bytes() != after["site2.tls.crt"], "sites that are known are renewed, too"


def test_renewal_needs_no_secret_but_the_authority_s(keys):
    forget(keys, "site?", "*.tls.key", "server.key")
    before = contents(keys)
    assert again(keys, sites=2) == 0
    after = contents(keys)
    assert after.keys() == before.keys(), "no private key was made"
    for name in ("server", "site0.tls", "site1.tls"):
        old, new = (x509.load_pem_x509_certificate(held[f"{name}.crt"]) for held in (before, after))
        assert old.serial_number != new.serial_number
        assert old.public_key() == new.public_key()


def test_what_was_killed_half_way_is_completed(keys):
    forget(keys, "site0.tls.*", "site1.tls.crt", "site1.pub", "server.crt")
    before = contents(keys)
    assert again(keys, sites=2) == 0
    after = contents(keys)
    assert all(after[name] == before[name] for name in ("site0", "site1", "site1.tls.key", "server.key", "ca.key"))
    for name in ("site0.tls", "site1.tls", "server"):
        own = serialization.load_pem_private_key(after[f"{name}.key"], password=None)
        assert own.public_key() == certificate(keys / f"{name}.crt").public_key()
    node = serialization.load_ssh_private_key(after["site1"], password=None)
    assert serialization.load_ssh_public_key(after["site1.pub"]).public_numbers() == node.public_key().public_numbers()


@pytest.mark.parametrize(("missing", "here"), [("ca.key", "ca.crt"), ("ca.crt", "ca.key")])
def test_half_an_authority_signs_nothing(missing, here, keys, capsys):
    (keys / missing).rename(keys.parent / "safe")
    before = contents(keys)
    assert again(keys, sites=3) == 2
    assert f"got {keys} with {here} and without {missing}. Bring {missing}" in capsys.readouterr().err
    assert contents(keys) == before


def test_the_key_of_another_authority_signs_nothing(keys, capsys):
    making.make_authority(keys.parent / "other")
    (keys / "ca.key").write_bytes((keys.parent / "other" / "ca.key").read_bytes())
    before = contents(keys)
    assert again(keys, sites=2) == 2
    assert "an authority's key and certificate must belong together" in capsys.readouterr().err
    assert contents(keys) == before


def test_a_site_with_keys_of_its_own_gets_a_certificate_for_its_request(keys, capsys):
    key = ec.generate_private_key(ec.SECP384R1())
    (keys / "site2.csr").write_bytes(pem(request_of(key, name="the server, really", host="fedgan.example.org")))
    for number in (2, 3):
        (keys / f"site{number}.pub").write_bytes((keys / "site0.pub").read_bytes())
    assert again(keys, sites=4) == 0
    found = certificate(keys / "site2.tls.crt")
    found.verify_directly_issued_by(certificate(keys / "ca.crt"))
    assert found.public_key() == key.public_key()
    assert names_and_uses(found)[0] == {"localhost", "127.0.0.1"}, "whatever the request says"
    assert found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "site2"
    assert not {"site2", "site2.tls.key", "site3", "site3.tls.crt"} & set(contents(keys))
    assert "left to the site: site3.tls\n" in capsys.readouterr().out
    (keys / "site2.csr").unlink()
    assert again(keys, sites=4) == 0
    assert certificate(keys / "site2.tls.crt").public_key() == key.public_key(), "a year later, too"


def forged():
    found = request_of(ec.generate_private_key(ec.SECP384R1())).public_bytes(serialization.Encoding.DER)
    return pem(x509.load_der_x509_csr(found[:-1] + bytes([found[-1] ^ 1])))  # the end of the signature


@pytest.mark.parametrize(
    ("request_", "has_node_key", "rule"),
    [
        (forged, True, "a request must be signed with its own key"),
        (lambda: b"no request", True, "keys, certificates and requests must be PEM files"),
        (lambda: pem(request_of(rsa.generate_private_key(65537, 1024))), True, "got 1024 in"),
        (lambda: pem(request_of(ec.generate_private_key(ec.SECP192R1()))), True, "got 192 in"),
        (lambda: pem(request_of(ec.generate_private_key(ec.SECP384R1()))), False, "without site2.pub"),
    ],
)
def test_a_request_that_must_not_be_signed_changes_nothing(request_, has_node_key, rule, keys, capsys):
    (keys / "site2.csr").write_bytes(request_())
    if has_node_key:
        (keys / "site2.pub").write_bytes((keys / "site0.pub").read_bytes())
    before = contents(keys)
    assert again(keys, sites=3) == 2
    assert rule in capsys.readouterr().err
    assert contents(keys) == before


def test_a_certificate_that_has_ended_is_refused_and_one_that_is_about_to_is_named(keys, monkeypatch, caplog):
    making.check_valid(keys / "server.crt")
    assert not caplog.text
    monkeypatch.setattr(making, "VALID_DAYS", 29)
    assert again(keys, sites=2) == 0
    making.check_valid(keys / "server.crt")
    assert "server.crt ends on 2" in caplog.text
    monkeypatch.setattr(making, "VALID_DAYS", -1e-3)  # a minute and a half ago
    assert again(keys, sites=2) == 0
    with pytest.raises(ConfigurationError, match=r"certificates must be valid; got .*server.crt, which ended on 2"):
        programs.superlink(keys.parent / "home", keys=keys, host="127.0.0.1", port=0)
    (keys / "server.crt").write_text("none")
    with pytest.raises(ConfigurationError, match=r"PEM files; got .*server.crt"):
        making.check_valid(keys / "server.crt")


def test_an_authority_that_has_ended_signs_nothing_and_outlives_what_it_signs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(programs, "program", lambda name: name)
    monkeypatch.setattr(making, "AUTHORITY_DAYS", 100)
    assert again(tmp_path, sites=1) == 0
    ends = [certificate(tmp_path / f"{name}.crt").not_valid_after_utc for name in ("server", "site0.tls", "ca")]
    assert ends[0] == ends[1] == ends[2]
    monkeypatch.setattr(making, "AUTHORITY_DAYS", -1e-3)
    making.make_authority(tmp_path)
    assert again(tmp_path, sites=1) == 2
    assert "ca.crt, which ended on 2" in (text := capsys.readouterr().err)
    assert "makes another authority with deploy keys, in an empty folder" in text
