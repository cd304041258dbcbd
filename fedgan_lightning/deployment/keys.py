"""Certificates and node keys, for trials and for consortia without an authority of their own.

They come from the ``cryptography`` package, which Flower brings. Private keys can be read by their owner alone.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedgan_lightning.files import replacing

VALID_DAYS = 365
#: What a machine calls itself.
LOCAL = ("localhost", "127.0.0.1")


def make_authority(folder: Path, *, hosts: Sequence[str]) -> None:
    """Write ``ca.crt`` and ``ca.key``, and ``server.crt`` and ``server.key`` for these names and addresses."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    folder.mkdir(parents=True, exist_ok=True)
    authority, name = ec.generate_private_key(ec.SECP384R1()), _named("fedgan authority")
    own = _unsigned(name, authority, issuer=name)
    own = own.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    usage = {"digital_signature": True, "key_cert_sign": True, "crl_sign": True}
    others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only")
    usage |= dict.fromkeys((*others, "decipher_only"), False)
    own = own.add_extension(x509.KeyUsage(**usage), critical=True)
    identifier = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    own = own.add_extension(identifier, critical=False)
    _write(folder / "ca.key", _pem(authority))
    (folder / "ca.crt").write_bytes(_certificate(own.sign(authority, hashes.SHA384())))
    _issue(folder / "server", name=hosts[0], hosts=hosts, uses=[ExtendedKeyUsageOID.SERVER_AUTH], authority=folder)


def make_site_certificate(path: Path, *, authority: Path) -> None:
    """Write a site's certificate and its key beside its node key ``path``, as ``.tls.crt`` and ``.tls.key``.

    The site's proxy shows it to the server's, and to the site's SuperNode: it names this machine, too.

    Args:
        path: The site's node key; its name is the certificate's.
        authority: Folder with ``ca.crt`` and ``ca.key``.
    """
    from cryptography.x509.oid import ExtendedKeyUsageOID

    uses = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    _issue(path.with_name(f"{path.name}.tls"), name=path.name, hosts=LOCAL, uses=uses, authority=authority)


def make_node_key(path: Path) -> None:
    """Write a SuperNode's private key (EC P-384, OpenSSH) to ``path``, and the public one beside it, as ``.pub``."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH
    _write(path, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_suffix(".pub").write_bytes(public + b"\n")


def _named(text: str) -> Any:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _unsigned(subject: Any, key: Any, *, issuer: Any) -> Any:
    """Return a certificate without extensions, to be signed by its issuer."""
    from cryptography import x509

    found = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer)
    found = found.public_key(key.public_key()).serial_number(x509.random_serial_number())
    now = datetime.datetime.now(datetime.timezone.utc)
    start, end = now - datetime.timedelta(minutes=5), now + datetime.timedelta(days=VALID_DAYS)
    return found.not_valid_before(start).not_valid_after(end)


def _issue(path: Path, *, name: str, hosts: Sequence[str], uses: Sequence[Any], authority: Path) -> None:
    """Write ``path``.key and ``path``.crt, signed by the authority in a folder."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    signer: Any = serialization.load_pem_private_key((authority / "ca.key").read_bytes(), password=None)
    issuer = x509.load_pem_x509_certificate((authority / "ca.crt").read_bytes()).subject
    key = ec.generate_private_key(ec.SECP384R1())
    signed = _unsigned(_named(name), key, issuer=issuer)
    alternatives = x509.SubjectAlternativeName([_alternative(host) for host in hosts])
    signed = signed.add_extension(alternatives, critical=False)
    signed = signed.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    # Without this a server's certificate would pass as a client's.
    signed = signed.add_extension(x509.ExtendedKeyUsage(list(uses)), critical=False)
    link = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    signed = signed.add_extension(link, critical=False)
    _write(path.with_name(f"{path.name}.key"), _pem(key))
    path.with_name(f"{path.name}.crt").write_bytes(_certificate(signed.sign(signer, hashes.SHA384())))


def _write(path: Path, data: bytes) -> None:
    with replacing(path, mode=0o600) as file:
        file.write(data)


def _pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    form = serialization.PrivateFormat.PKCS8
    data: bytes = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    return data


def _certificate(certificate: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    data: bytes = certificate.public_bytes(serialization.Encoding.PEM)
    return data


def _alternative(host: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
