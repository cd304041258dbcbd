"""``federation site --check``: everything that can fail at a site, tried before it joins.

Nothing is sent but an empty request that nobody signed, and nothing is kept.
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
from collections.abc import Sequence
from pathlib import Path

from fedgan_lightning.deployment.keys import fingerprint
from fedgan_lightning.deployment.programs import host_and_port
from fedgan_lightning.deployment.site import Site
from fedgan_lightning.errors import ConfigurationError, message

#: Seconds for the SuperLink, or the proxy in front of it, to answer.
TIMEOUT = 10.0
#: A path that proxies let through, and what Flower answers there to a request without a site's signature.
PATH, UNSIGNED = "/v1/fleet/pull-messages", 401
#: What other answers mean.
WHY = {
    400: "the server's proxy takes no certificate but those of its authority: see nginx at the site",
    403: "the proxy lets ten paths through: take the server's configuration from docs/nginx.conf",
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
    tls: Sequence[Path] = (),
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
        tls: Certificate and key for this machine's own processes.

    Raises:
        ConfigurationError: For the first thing that is not right.
        UpdateError: If a step of training gives values that are not finite.
    """
    print(f"site {client_id}")
    _say("key", f"{fingerprint(key)}, as ssh-keygen -lf of the .pub file that the server has")
    if tls:
        _check_pair(*tls)
    site = Site.of(str(config), own=str(own) if own else None, client_id=client_id, state_dir=state)
    facts = site.facts()
    names = site.whole.class_names or ["samples"]
    counts = ", ".join(f"{name} {count:,}" for name, count in zip(names, facts["label_counts"]) if count)
    _say("samples", f"{facts['num_examples']:,} ({counts}): these numbers are told")
    rehearsal = site.rehearse()
    down, up = (sum(sizes.values()) / 1e6 for sizes in (rehearsal.bytes_down, rehearsal.bytes_up))
    _say("one step", f"{rehearsal.seconds:.2f} s on {rehearsal.device}, of a model that is not trained yet")
    _say("a round", f"about {down:.2f} MB down and {up:.2f} MB up, beside sums for metrics")
    _say("settings", f"{facts['digest']}: server and sites must have the same")
    _reach(superlink, ca)
    _say("connection", f"Flower answers behind {superlink}, which has a certificate of {ca}")
    print("ready: the same command without --check takes part")


def _say(what: str, found: str) -> None:
    print(f"  {what:<12}{found}")


def _reach(superlink: str, ca: Path) -> None:
    """Send a request that nobody signed, and see that it is Flower that turns it away.

    Raises:
        ConfigurationError: If it does not come so far.
    """
    host, port = host_and_port(superlink)
    context = ssl.create_default_context(cafile=str(ca))
    link = http.client.HTTPSConnection(host, port, context=context, timeout=TIMEOUT)
    try:
        with contextlib.closing(link):
            link.request("POST", PATH, body=b"", headers={"content-type": "application/protobuf"})
            status = link.getresponse().status
    except ssl.SSLCertVerificationError as error:
        raise ConfigurationError(
            message(
                f"the SuperLink, or a site's own proxy, has a certificate of {ca} for its name",
                received=f"{superlink}: {error.verify_message}",
                fix="ask the consortium for its ca.crt, or for a certificate with this name (federation keys --host)",
            )
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise ConfigurationError(
            message(
                "a site reaches the SuperLink, or a proxy in front of it, over TLS",
                received=f"{superlink}: {getattr(error, 'strerror', None) or error}",
                fix="see whether the server runs, then address, firewall and proxy",
            )
        ) from error
    if status != UNSIGNED:
        raise ConfigurationError(
            message(
                "a SuperLink answers what is sent to it",
                received=f"{status} from {superlink}",
                fix=WHY.get(status, "see docs/deployment.md, and whether the server runs Flower 1.41 or 1.42"),
            )
        )


def _check_pair(certificate: Path, private: Path) -> None:
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, private)
    except ssl.SSLError as error:
        raise ConfigurationError(
            message(
                "a certificate and its key belong together",
                received=f"{certificate} and {private} ({error.reason or error})",
                fix="take both from the same federation keys",
            )
        ) from error
