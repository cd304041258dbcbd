"""Certificates and node keys, for trials and for consortia without an authority of their own.

They come from the ``cryptography`` package, which Flower brings. Private keys can be read by their owner alone.
"""

from __future__ import annotations

import datetime
import ipaddress
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.files import replacing

logger = logging.getLogger("fedgan_lightning")

#: For how long an authority is valid, and what it signs.
AUTHORITY_DAYS, VALID_DAYS = 3650, 365
#: Who starts with a certificate that ends so soon is told.
NOTICE_DAYS = 30
#: What a machine calls itself.
LOCAL = ("localhost", "127.0.0.1")


def prepare(folder: Path, *, sites: int, hosts: Sequence[str]) -> dict[str, str]:
    """Write what a federation needs; an authority and node keys that are there stay, certificates are renewed.

    A site that has made its own keys gives ``siteN.pub`` and a request, ``siteN.csr``, of which only the public key is
    used. One that has given the first alone gets no certificate.

    Args:
        folder: Where it all lies.
        sites: Number of sites.
        hosts: Names and addresses of the server.

    Returns:
        ``made``, ``renewed``, ``kept`` or ``left to the site``, by file name without ending.

    Raises:
        ConfigurationError: If the authority's key is elsewhere, its certificate has ended, or a request is not signed.
    """
    done = {"ca": "kept" if (folder / "ca.crt").exists() else "made"}
    if done["ca"] == "made":
        make_authority(folder)
    done["server"] = _state_of(folder / "server.crt")
    make_server_certificate(folder, hosts=hosts)
    for path in (folder / f"site{number}" for number in range(sites)):
        tls, request = path.with_name(f"{path.name}.tls"), path.with_suffix(".csr")
        is_known = path.with_suffix(".pub").exists()
        done[path.name] = "kept" if is_known else "made"
        if not is_known:
            make_node_key(path)
        if is_known and not request.exists() and not tls.with_name(f"{tls.name}.crt").exists():
            done[tls.name] = "left to the site"
            continue
        done[tls.name] = _state_of(tls.with_name(f"{tls.name}.crt"))
        make_site_certificate(path, authority=folder, request=request if request.exists() else None)
    return done


def make_authority(folder: Path) -> None:
    """Write ``ca.crt`` and ``ca.key``."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    folder.mkdir(parents=True, exist_ok=True)
    authority, name = ec.generate_private_key(ec.SECP384R1()), _named("fedgan authority")
    own = _unsigned(name, authority.public_key(), issuer=name, end=_now() + datetime.timedelta(days=AUTHORITY_DAYS))
    own = own.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    usage = {"digital_signature": True, "key_cert_sign": True, "crl_sign": True}
    others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only")
    usage |= dict.fromkeys((*others, "decipher_only"), False)
    own = own.add_extension(x509.KeyUsage(**usage), critical=True)
    identifier = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    own = own.add_extension(identifier, critical=False)
    _write(folder / "ca.key", _pem(authority))
    (folder / "ca.crt").write_bytes(_certificate(own.sign(authority, hashes.SHA384())))


def make_server_certificate(folder: Path, *, hosts: Sequence[str]) -> None:
    """Write ``server.crt`` and ``server.key`` for these names and addresses, signed by the authority in the folder."""
    from cryptography.x509.oid import ExtendedKeyUsageOID

    _issue(folder / "server", name=hosts[0], hosts=hosts, uses=[ExtendedKeyUsageOID.SERVER_AUTH], authority=folder)


def make_site_certificate(path: Path, *, authority: Path, request: Path | None = None) -> None:
    """Write a site's certificate and its key beside its node key ``path``, as ``.tls.crt`` and ``.tls.key``.

    The site's proxy shows it to the server's, and to the site's SuperNode: it names this machine, too.

    Args:
        path: The site's node key; its name is the certificate's.
        authority: Folder with ``ca.crt`` and ``ca.key``.
        request: The request of a site that keeps the key to itself; no key is written then.

    Raises:
        ConfigurationError: If whoever wrote the request does not have its key, or the authority's is not here.
    """
    from cryptography.x509.oid import ExtendedKeyUsageOID

    uses = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    public = None if request is None else _requested_by(request)
    tls = path.with_name(f"{path.name}.tls")
    _issue(tls, name=path.name, hosts=LOCAL, uses=uses, authority=authority, public=public)


def check_valid(path: Path) -> None:
    """Refuse a certificate that has ended, and warn of one that is about to.

    Raises:
        ConfigurationError: If it has ended.
    """
    from cryptography import x509

    end = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    fix = "renew it: federation keys, with the same arguments as before"
    if end < _now():
        raise ConfigurationError(
            message("certificates are valid", received=f"{path}, which ended on {end:%Y-%m-%d}", fix=fix)
        )
    if end < _now() + datetime.timedelta(days=NOTICE_DAYS):
        logger.warning(f"{path} ends on {end:%Y-%m-%d}; {fix}")


def _state_of(path: Path) -> str:
    return "renewed" if path.exists() else "made"


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


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


def _unsigned(subject: Any, public: Any, *, issuer: Any, end: datetime.datetime) -> Any:
    """Return a certificate without extensions, to be signed by its issuer."""
    from cryptography import x509

    found = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer)
    found = found.public_key(public).serial_number(x509.random_serial_number())
    return found.not_valid_before(_now() - datetime.timedelta(minutes=5)).not_valid_after(end)


def _issue(
    path: Path, *, name: str, hosts: Sequence[str], uses: Sequence[Any], authority: Path, public: Any = None
) -> None:
    """Write ``path``.crt, signed by the authority in a folder, and ``path``.key unless a public key is given."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    signer, issuer = _authority_in(authority)
    key = ec.generate_private_key(ec.SECP384R1()) if public is None else None
    public = public if key is None else key.public_key()
    end = min(_now() + datetime.timedelta(days=VALID_DAYS), issuer.not_valid_after_utc)
    signed = _unsigned(_named(name), public, issuer=issuer.subject, end=end)
    alternatives = x509.SubjectAlternativeName([_alternative(host) for host in hosts])
    signed = signed.add_extension(alternatives, critical=False)
    signed = signed.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    # Without this a server's certificate would pass as a client's.
    signed = signed.add_extension(x509.ExtendedKeyUsage(list(uses)), critical=False)
    link = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    signed = signed.add_extension(link, critical=False)
    if key is not None:
        _write(path.with_name(f"{path.name}.key"), _pem(key))
    path.with_name(f"{path.name}.crt").write_bytes(_certificate(signed.sign(signer, hashes.SHA384())))


def _requested_by(path: Path) -> Any:
    """Return the public key of a request."""
    from cryptography import x509

    request = x509.load_pem_x509_csr(path.read_bytes())
    if not request.is_signature_valid:
        raise ConfigurationError(
            message("a request is signed with its own key", received=path, fix="ask the site to make it again")
        )
    return request.public_key()


def _authority_in(folder: Path) -> tuple[Any, Any]:
    """Return the key and the certificate of the authority in a folder."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    if not (folder / "ca.key").exists():
        raise ConfigurationError(
            message(
                "certificates are signed with the authority's key",
                received=f"{folder} without ca.key",
                fix="bring it from its safe, and take it back afterwards",
            )
        )
    certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    if certificate.not_valid_after_utc < _now():
        raise ConfigurationError(
            message(
                "an authority is valid",
                received=f"{folder / 'ca.crt'}, which ended on {certificate.not_valid_after_utc:%Y-%m-%d}",
                fix="make another in an empty folder, and give its ca.crt to all",
            )
        )
    return serialization.load_pem_private_key((folder / "ca.key").read_bytes(), password=None), certificate


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
