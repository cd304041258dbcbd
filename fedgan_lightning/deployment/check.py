"""``deploy site --check``: data, settings, keys and the way to the server, tried before a site joins.

Nothing is sent but an empty request that nobody signed, and nothing is kept but what the source itself downloads.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Any

from fedgan_lightning.deployment.keys import fingerprint, read_pem
from fedgan_lightning.deployment.programs import await_port
from fedgan_lightning.deployment.site import Site
from fedgan_lightning.deployment.site_policy import SitePolicy
from fedgan_lightning.errors import ConfigurationError, FedGANError, message

#: Seconds for the SuperLink, or the proxy in front of it, to answer.
TIMEOUT = 10.0
#: A path that proxies let through, and what Flower answers there to a request without a site's signature.
FLEET_PATH, UNSIGNED = "/v1/fleet/pull-messages", 401
#: What other answers mean.
WHY = {
    400: "the server's proxy takes no certificate but those of its authority: see nginx at the site",
    403: "the proxy lets ten paths through: take the server's configuration, nginx.conf, from the package",
    **dict.fromkeys((502, 503, 504), "a proxy does not reach what is behind it, or its certificate: see nginx's log"),
}


def check(
    config: Path,
    *,
    own: Path | None,
    client_id: int,
    state: Path,
    superlink: str,
    ca: Path,
    key: Path,
    port: int,
    tls: tuple[Path, Path] | None = None,
    policy: Path | None = None,
    members: Path | None = None,
) -> None:
    """Try data, model, keys and connection of a site, and print what came of each.

    Args:
        config: The federation's configuration file.
        own: What differs at this site.
        client_id: Its number in the federation.
        state: Folder for its private state.
        superlink: HOST:PORT.
        ca: Certificate of the authority.
        key: Private key of the node.
        port: Of this machine, for its own processes.
        tls: Certificate and key for these.
        policy: What the site answers.
        members: Public keys of all sites.

    Raises:
        ConfigurationError: For the first thing that is not right.
        UpdateError: If a step of training gives values that are not finite.
    """
    print(f"site {client_id}")
    _say("key", f"{fingerprint(key)}, as ssh-keygen -lf of the .pub file that the server has")
    if tls is not None:
        _check_pair(*tls, authority=ca)
    _check_writable(state)
    await_port("127.0.0.1", port, seconds=0.0)
    site = _built(config, own=own, client_id=client_id, state=state, policy=policy)
    facts = site.facts()
    names = site.whole.class_names or ["samples"]
    counts = ", ".join(f"{name} {count:,}" for name, count in zip(names, facts["label_counts"]) if count)
    _say("samples", f"{facts['num_examples']:,} ({counts}): the server learns these numbers")
    rehearsal = site.rehearse()
    down, up = (sum(sizes.values()) / 1e6 for sizes in (rehearsal.bytes_down, rehearsal.bytes_up))
    _say("one step", f"{rehearsal.seconds:.2f} s on {rehearsal.device}, of a model that is not trained yet")
    _say("a round", f"about {down:.2f} MB down and {up:.2f} MB up, beside sums for metrics")
    _say("test split", f"{site.num_test:,} samples are held out by the source, and not trained on")
    _say("answers", site.told())
    if budget := site.budget.told():
        _say("privacy", budget)
    _say("members", _members(members, site.client_id))
    _say("settings", f"{facts['digest']}: server and sites must have the same")
    _reach(superlink, ca)
    _say("connection", f"Flower answers behind {superlink}, which has a certificate of {ca}")
    print("ready: the same command without --check takes part")


def _say(what: str, found: str) -> None:
    print(f"  {what:<12}{found}")


def _reach(superlink: str, ca: Path) -> None:
    """Send a request that nobody signed, the way Flower's programs send theirs, and see that Flower turns it away.

    Raises:
        ConfigurationError: If it does not come so far.
    """
    import httpx  # with the proxies of the environment, as Flower

    url = f"https://{superlink}{FLEET_PATH}"
    try:
        with httpx.Client(verify=ssl.create_default_context(cafile=str(ca)), timeout=TIMEOUT) as client:
            answer = client.post(url, content=b"", headers={"content-type": "application/protobuf"})
    except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            rule = f"the SuperLink, or a site's own proxy, must have a certificate of {ca} for its name"
            fix = "ask the consortium for its ca.crt, or for a certificate with this name (deploy keys --host)"
        else:
            rule = "a site must reach the SuperLink, or a proxy in front of it, over TLS"
            fix = "see whether the server runs, then address, firewall and proxy"
        raise ConfigurationError(message(rule, received=f"{superlink}: {error}", fix=fix)) from error
    if answer.status_code != UNSIGNED or b"SuperNode" not in answer.content:
        fix = "see docs/deployment.md, and whether the server runs Flower 1.41 or 1.42"
        raise ConfigurationError(
            message(
                "a SuperLink must answer what is sent to it",
                received=f"{answer.status_code} from {superlink}",
                fix=WHY.get(answer.status_code, fix),
            )
        )


def _check_writable(folder: Path) -> None:
    there = next(own for own in (folder.absolute(), *folder.absolute().parents) if own.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        fix = "choose another, or who may write there"
        raise ConfigurationError(message("the --state folder of a site must be writable", received=folder, fix=fix))


def _members(members: Path | None, client_id: int) -> str:
    if members is None:
        return "keys of other sites are believed as the server passes them on (--members)"
    known = sorted(path.stem for path in members.glob("site*.pub"))
    return f"{len(known)} sites' keys are checked: {', '.join(known)}"


def _built(config: Path, *, own: Path | None, client_id: int, state: Path, policy: Path | None) -> Site:
    """Return the site; whatever its settings make other libraries say becomes one line."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        rules = SitePolicy() if policy is None else SitePolicy.read(policy)
        own_file = str(own) if own else None
        return Site.of(str(config), own=own_file, client_id=client_id, state_dir=state, policy=rules)
    except FedGANError:
        raise
    except (MisconfigurationException, ValueError, IndexError, OSError) as error:
        raise ConfigurationError(
            message(
                "the settings of a site must build it",
                received=f"{type(error).__name__}: {' '.join(str(error).split())}",
                fix=f"see {config}, and {own}" if own else f"see {config}, and --client-id",
            )
        ) from error


def _check_pair(certificate: Path, private: Path, *, authority: Path) -> None:
    """Refuse a certificate that is not the authority's, and a key that is not the certificate's.

    Raises:
        ConfigurationError: If it is so, or a file is something else.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization

    found = read_pem(certificate, x509.load_pem_x509_certificate)
    key: Any = read_pem(private, lambda data: serialization.load_pem_private_key(data, password=None))
    if key.public_key() != found.public_key():
        raise ConfigurationError(
            message(
                "a certificate and its key must belong together",
                received=f"{certificate} and {private}",
                fix="take both from the same deploy keys",
            )
        )
    try:
        found.verify_directly_issued_by(read_pem(authority, x509.load_pem_x509_certificate))
    except (InvalidSignature, ValueError, TypeError) as error:
        raise ConfigurationError(
            message(
                "a site's certificate must be of the federation's authority",
                received=f"{certificate}, which {authority} did not sign",
                fix="ask the consortium for the two that belong together",
            )
        ) from error
