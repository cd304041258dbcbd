"""Certificates and node keys, for trials and for consortia without an authority of their own.

They come from the ``cryptography`` package, which Flower brings. Private keys can be read by their owner alone.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import ipaddress
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedgan_lightning.deployment.expelled import expelled_from, numbers_in
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.files import replacing

logger = logging.getLogger("fedgan_lightning")

#: For how long an authority is valid, and what it signs.
AUTHORITY_DAYS, VALID_DAYS = 3650, 365
#: A warning says so where a certificate ends so soon.
NOTICE_DAYS = 30
#: What a machine calls itself.
LOCAL = ("localhost", "127.0.0.1")
#: List of certificates that do not count, beside the authority.
REVOKED = "ca.crl"
#: So much earlier than now a certificate begins: clocks differ.
EARLIER = datetime.timedelta(minutes=5)
#: Fewest bits of a site's own key: elliptic curves, RSA.
CURVE_BITS, RSA_BITS = 256, 2048


def prepare(folder: Path, *, sites: int, hosts: Sequence[str] = ()) -> dict[str, str]:
    """Write what a federation needs; keys that are there stay, and their certificates are renewed.

    A renewed certificate is for the same key: nothing secret travels a second time, and besides the authority renewal
    needs but certificates and public keys. A site that makes its own keys gives ``siteN.pub`` and a request,
    ``siteN.csr``, of which only the public key is used; with the first alone it gets no certificate.

    Args:
        folder: Where it all lies.
        sites: Number of sites; others that the folder knows are renewed, too. Those that were expelled get nothing.
        hosts: Names and addresses of the server; without any those of its certificate, else of this machine alone.

    Returns:
        ``made``, ``renewed``, ``kept`` or ``left to the site``, by file name without ending.

    Raises:
        ConfigurationError: If something is not there that belongs to what is, the authority has ended, or a file is not
            what its name says. Nothing is written then.
    """
    numbers = {*range(sites), *numbers_in(folder)} - {*expelled_from(folder)}
    paths = [folder / f"site{number}" for number in sorted(numbers)]
    done = {"ca": "kept" if (folder / "ca.crt").exists() or (folder / "ca.key").exists() else "made"}
    if done["ca"] == "kept":
        _authority_in(folder)
        check_valid(folder / "ca.crt")
    server, keys = _known_key(folder / "server"), {path: _key_of_site(path) for path in paths}
    names = hosts or _hosts_of(folder / "server.crt") or LOCAL
    # Whatever could be refused has been.
    if done["ca"] == "made":
        make_authority(folder)
    if not (folder / REVOKED).exists():
        revoke(folder)
    done["server"] = "renewed" if (folder / "server.crt").exists() else "made"
    make_server_certificate(folder, hosts=names, public=server)
    for path, public in keys.items():
        tls, is_known = _tls(path), path.with_suffix(".pub").exists()
        done[path.name] = "kept" if is_known or path.exists() else "made"
        if public is None and is_known and not path.exists():
            done[tls.name] = "left to the site"
            continue
        if not is_known:
            make_node_key(path)
        done[tls.name] = "renewed" if _with(tls, "crt").exists() else "made"
        make_site_certificate(path, authority=folder, public=public)
    return done


def make_authority(folder: Path) -> None:
    """Write ``ca.crt`` and ``ca.key``."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

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
    _write(folder / "ca.crt", _certificate(own.sign(authority, hashes.SHA384())), is_secret=False)


def revoke(folder: Path, certificate: Path | None = None) -> None:
    """Write ``ca.crl``, the list of certificates that do not count any more, with one more; without one, as it is.

    It stays valid as long as the authority: nginx refuses everybody where a list has ended.

    Args:
        folder: Where the authority is.
        certificate: What is to be revoked.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    signer, issuer = _authority_in(folder)
    made = x509.CertificateRevocationListBuilder().issuer_name(issuer.subject)
    made = made.last_update(_now() - EARLIER).next_update(issuer.not_valid_after_utc)
    path = folder / REVOKED
    for known in read_pem(path, x509.load_pem_x509_crl) if path.exists() else ():
        made = made.add_revoked_certificate(known)
    if certificate is not None:
        entry = x509.RevokedCertificateBuilder().revocation_date(_now())
        number = read_pem(certificate, x509.load_pem_x509_certificate).serial_number
        made = made.add_revoked_certificate(entry.serial_number(number).build())
    _write(path, _certificate(made.sign(signer, hashes.SHA384())), is_secret=False)


def make_server_certificate(folder: Path, *, hosts: Sequence[str], public: Any = None) -> None:
    """Write ``server.crt`` for these names and addresses, signed by the authority in the folder.

    Args:
        folder: Where the authority is.
        hosts: What the server is called.
        public: Its key, which stays where it is; without one ``server.key`` is written.
    """
    from cryptography.x509.oid import ExtendedKeyUsageOID

    uses = [ExtendedKeyUsageOID.SERVER_AUTH]
    _issue(folder / "server", name=hosts[0], hosts=hosts, uses=uses, authority=folder, public=public)


def make_site_certificate(path: Path, *, authority: Path, public: Any = None) -> None:
    """Write a site's certificate beside its node key ``path``, as ``.tls.crt``.

    The site's proxy shows it to the server's, and to the site's SuperNode: it names this machine, too.

    Args:
        path: The site's node key; its name is the certificate's.
        authority: Folder with ``ca.crt`` and ``ca.key``.
        public: The certificate's key, which stays where it is; without one it is written, as ``.tls.key``.
    """
    from cryptography.x509.oid import ExtendedKeyUsageOID

    uses = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    _issue(_tls(path), name=path.name, hosts=LOCAL, uses=uses, authority=authority, public=public)


def make_node_key(path: Path) -> None:
    """Write a SuperNode's private key (EC P-384, OpenSSH) to ``path`` unless it is there, and the public one beside it,
    as ``.pub``.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if not path.exists():
        key, form = ec.generate_private_key(ec.SECP384R1()), serialization.PrivateFormat.OpenSSH
        _write(path, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    _write(path.with_suffix(".pub"), _public_half(path) + b"\n", is_secret=False)


def fingerprint(path: Path) -> str:
    """Return the SHA-256 fingerprint of a node key, as ``ssh-keygen -l`` writes it.

    Args:
        path: The private key.

    Raises:
        ConfigurationError: If it is none.
    """
    blob = base64.b64decode(_public_half(path).split()[1])
    return f"SHA256:{base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip('=')}"


def _public_half(path: Path) -> bytes:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = read_pem(path, lambda data: serialization.load_ssh_private_key(data, password=None))
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigurationError(
            message("node keys of Flower must be on elliptic curves", received=path, fix="ssh-keygen -t ecdsa -b 384")
        )
    public: bytes = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return public


def check_valid(path: Path) -> None:
    """Refuse a certificate that has ended, or has not begun, and warn of one that is about to end.

    Raises:
        ConfigurationError: If it has, has not, or is none.
    """
    from cryptography import x509

    found = read_pem(path, x509.load_pem_x509_certificate)
    end, is_authority = found.not_valid_after_utc, found.issuer == found.subject
    fix = "the consortium renews it with deploy keys, where the authority's key is"
    if is_authority:
        fix = "the consortium makes another authority with deploy keys, in an empty folder, and gives it to all"
    if end < _now():
        raise ConfigurationError(
            message("certificates must be valid", received=f"{path}, which ended on {end:%Y-%m-%d}", fix=fix)
        )
    if (begin := found.not_valid_before_utc) > _now():
        raise ConfigurationError(
            message(
                "certificates must be valid by this machine's clock",
                received=f"{path}, which begins on {begin:%Y-%m-%d %H:%M} UTC; here it is {_now():%Y-%m-%d %H:%M} UTC",
                fix="set the clock (timedatectl set-ntp true), or wait",
            )
        )
    if end < _now() + datetime.timedelta(days=NOTICE_DAYS):
        logger.warning(f"{path} ends on {end:%Y-%m-%d}: {fix}")


# ---------------------------------------------------------------------- what is there


def _key_of_site(path: Path) -> Any:
    """Return the public key of a site's certificate: that of its request, else that which it has; ``None`` without."""
    from cryptography import x509

    request = path.with_suffix(".csr")
    if not request.exists():
        return _known_key(_tls(path))
    if not path.with_suffix(".pub").exists():
        raise ConfigurationError(
            message(
                "a site that makes its own keys must give both public ones",
                received=f"{request} without {path.name}.pub",
                fix="ask the site for it",
            )
        )
    found = read_pem(request, x509.load_pem_x509_csr)
    if not found.is_signature_valid:
        raise ConfigurationError(
            message("a request must be signed with its own key", received=request, fix="ask the site to make it again")
        )
    return _strong(found.public_key(), request)


def _strong(public: Any, path: Path) -> Any:
    from cryptography.hazmat.primitives.asymmetric import rsa

    bits = getattr(public, "key_size", CURVE_BITS)  # some curves have but one size
    if bits < (RSA_BITS if isinstance(public, rsa.RSAPublicKey) else CURVE_BITS):
        raise ConfigurationError(
            message(
                f"keys must have {CURVE_BITS} bits on a curve, {RSA_BITS} with RSA",
                received=f"{bits} in {path}",
                fix="ask the site for another request",
            )
        )
    return public


def _known_key(path: Path) -> Any:
    """Return the public key of ``path``.crt or else ``path``.key, ``None`` without either."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    if _with(path, "crt").exists():
        return read_pem(_with(path, "crt"), x509.load_pem_x509_certificate).public_key()
    if _with(path, "key").exists():  # what was killed between the two
        return read_pem(
            _with(path, "key"), lambda data: serialization.load_pem_private_key(data, password=None)
        ).public_key()
    return None


def _hosts_of(path: Path) -> list[str]:
    """Return the names and addresses of a certificate; nothing without one."""
    from cryptography import x509

    if not path.exists():
        return []
    found = read_pem(path, x509.load_pem_x509_certificate).extensions
    return [str(own.value) for own in found.get_extension_for_class(x509.SubjectAlternativeName).value]


def _authority_in(folder: Path) -> tuple[Any, Any]:
    """Return the key and the certificate of the authority in a folder."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    for here, missing in (("ca.crt", "ca.key"), ("ca.key", "ca.crt")):
        if not (folder / missing).exists():
            raise ConfigurationError(
                message(
                    "an authority must have its key and its certificate",
                    received=f"{folder} with {here} and without {missing}",
                    fix=f"bring {missing} from where it is kept, and take ca.key away again afterwards",
                )
            )
    certificate = read_pem(folder / "ca.crt", x509.load_pem_x509_certificate)
    key = read_pem(folder / "ca.key", lambda data: serialization.load_pem_private_key(data, password=None))
    if key.public_key() != certificate.public_key():
        raise ConfigurationError(
            message(
                "an authority's key and certificate must belong together",
                received=f"ca.key and ca.crt of two authorities in {folder}",
                fix="bring the key of the certificate that the sites have",
            )
        )
    return key, certificate


def read_pem(path: Path, reader: Callable[[bytes], Any]) -> Any:
    """Return what a file holds.

    Raises:
        ConfigurationError: If it holds something else.
    """
    try:
        return reader(path.read_bytes())
    except (ValueError, TypeError, OSError) as error:
        raise ConfigurationError(
            message(
                "keys, certificates and requests must be PEM files",
                received=f"{path} ({error})",
                fix="ask for it again",
            )
        ) from error


# ---------------------------------------------------------------------- what is made


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _tls(path: Path) -> Path:
    return path.with_name(f"{path.name}.tls")


def _with(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{ending}")


def _named(text: str) -> Any:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _unsigned(subject: Any, public: Any, *, issuer: Any, end: datetime.datetime) -> Any:
    """Return a certificate without extensions, to be signed by its issuer."""
    from cryptography import x509

    found = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer)
    found = found.public_key(public).serial_number(x509.random_serial_number())
    return found.not_valid_before(_now() - EARLIER).not_valid_after(end)


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
        _write(_with(path, "key"), _pem(key))
    _write(_with(path, "crt"), _certificate(signed.sign(signer, hashes.SHA384())), is_secret=False)


def _write(path: Path, data: bytes, *, is_secret: bool = True) -> None:
    with replacing(path, mode=0o600 if is_secret else 0o644) as file:
        file.write(data)


def _pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    form = serialization.PrivateFormat.PKCS8
    data: bytes = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    return data


def _certificate(certificate: Any) -> bytes:
    """Return a certificate, or a list of revoked ones, as PEM."""
    from cryptography.hazmat.primitives import serialization

    data: bytes = certificate.public_bytes(serialization.Encoding.PEM)
    return data


def _alternative(host: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
