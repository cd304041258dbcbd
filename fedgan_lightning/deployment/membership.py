"""The life of a consortium: who is in, who is expelled, whose certificates do not count any more."""

from __future__ import annotations

from pathlib import Path

from fedgan_lightning.deployment import programs
from fedgan_lightning.deployment.expelled import EXPELLED, expelled
from fedgan_lightning.deployment.keys import REVOKED, revoke
from fedgan_lightning.errors import ConfigurationError, message


def expel(keys: Path, client_id: int) -> list[Path]:
    """Take a site's key and certificate out of a folder, and revoke the certificate where the authority's key is.

    Args:
        keys: The server's folder, or the authority's.
        client_id: The site.

    Returns:
        What was moved or written.

    Raises:
        ConfigurationError: If the folder does not know the site.
    """
    name = f"site{client_id}"
    own = [
        path for ending in ("", ".pub", ".csr", ".tls.crt", ".tls.key") if (path := keys / f"{name}{ending}").exists()
    ]
    if not own:
        fix = "see which siteN.pub there are"
        raise ConfigurationError(message("a site must be known to be expelled", received=f"{name} in {keys}", fix=fix))
    certificate = keys / f"{name}.tls.crt"
    done: list[Path] = []
    if certificate.exists() and (keys / "ca.key").exists():
        revoke(keys, certificate)
        done.append(keys / REVOKED)
    (keys / EXPELLED).mkdir(mode=0o700, exist_ok=True)
    for path in own:
        path.replace(keys / EXPELLED / path.name)
        done.append(keys / EXPELLED / path.name)
    return done


def unregister(home: Path, keys: Path, port: int) -> list[str]:
    """Tell a SuperLink that runs to let in none of the sites that were expelled; return their nodes.

    Args:
        home: Flower's folder, which says where the SuperLink is.
        keys: The server's keys.
        port: The SuperLink's.
    """
    programs.connect(home, keys, port)
    known = programs.nodes(home)
    wrong = [known[own] for path in expelled(keys) if (own := programs.blob(path)) in known]
    for node in wrong:
        programs.flwr(home, "supernode", "unregister", node, "own")
    return wrong
