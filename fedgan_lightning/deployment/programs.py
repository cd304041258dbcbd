"""Flower's own programs, started and ended: the SuperLink, SuperNodes, and its command line."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedgan_lightning.deployment import forkserver
from fedgan_lightning.deployment.expelled import numbers_in
from fedgan_lightning.deployment.supernode_supervisor import end_with_parent
from fedgan_lightning.errors import ConfigurationError, message

logger = logging.getLogger("fedgan_lightning")

#: File of a server's folder with the SuperLink's numbers of sites.
NODES = "nodes.json"
APP = Path(__file__).parent / "app"
#: No telemetry, no look for updates, no installation of packages at run time.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
#: How often Flower looks for a task to start a process for, in seconds; its own default is one.
PACE = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
#: What others on this machine may read of what a program writes: nothing. Databases hold updates in the clear.
PRIVATE = 0o077
#: A log that has become so long is kept aside when its program starts again, and so many are kept.
MOST_LOG_BYTES, MOST_LOGS = 10 << 20, 5
#: Seconds for the SuperLink to start, and for the port of its predecessor to be free.
START_SECONDS, PORT_SECONDS = 180.0, 20.0


def program(name: str) -> str | None:
    """Return the path of a program of this environment."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def superlink(home: Path, *, keys: Path, host: str, port: int) -> subprocess.Popen:
    """Start a SuperLink with TLS, node authentication and a database."""
    from fedgan_lightning.deployment.keys import check_valid

    for name in ("ca.crt", "server.crt", "server.key"):
        check_file(keys / name)
    for name in ("ca.crt", "server.crt"):
        check_valid(keys / name)
    await_port(host, port)
    home.mkdir(parents=True, exist_ok=True)
    command = [
        *(str(program("flower-superlink")), "--host", host, "--port", str(port)),
        *("--ssl-ca-certfile", str(keys / "ca.crt"), "--ssl-certfile", str(keys / "server.crt")),
        *("--ssl-keyfile", str(keys / "server.key"), "--enable-supernode-auth"),
        *("--database", str((home / "superlink.db").resolve()), "--disable-runtime-dependency-installation"),
    ]
    return start(command, home, log="superlink.log")


def supernode(
    *, superlink: str, ca: Path, key: Path, port: int, node: dict[str, Any], tls: Path | None = None
) -> list[str]:
    """Return the command of a SuperNode.

    Args:
        superlink: Where the SuperLink, or the proxy in front of it, listens.
        ca: Certificate of the authority.
        key: The site's private key.
        port: Port of this machine for Flower's own processes at the site.
        node: Configuration of its ClientApp.
        tls: Certificate and key, without ``.crt`` and ``.key``, for that port; without, what passes there is readable
            to whoever may capture this machine's loopback traffic.
    """
    node_config = " ".join(
        f"{name}={value}" if isinstance(value, int) else f'{name}="{value}"' for name, value in node.items()
    )
    command = [
        *(str(program("flower-supernode")), "--superlink", superlink, "--root-certificates", str(ca)),
        *("--auth-supernode-private-key", str(key), "--port", str(port), "--node-config", node_config),
    ]
    if tls is not None:
        certificate, private = pair(tls)
        command += ["--ssl-ca-certfile", str(ca), "--ssl-certfile", str(certificate), "--ssl-keyfile", str(private)]
    return command


def pair(tls: Path) -> tuple[Path, Path]:
    """Return the certificate and the key that go by this name."""
    return tls.with_name(f"{tls.name}.crt"), tls.with_name(f"{tls.name}.key")


def connect(home: Path, keys: Path | None, port: int) -> None:
    """Tell Flower's command line where the SuperLink is, and with which authority if it has a certificate."""
    text = f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{port}"\n'
    trust = "insecure = true" if keys is None else f'root-certificates = "{(keys / "ca.crt").resolve()}"'
    (home / "config.toml").write_text(f"{text}{trust}\n")


def flwr(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Flower's command line to its end."""
    command = [str(program("flwr")), *arguments]
    return subprocess.run(command, env=environment(home), capture_output=True, text=True, check=False, umask=PRIVATE)


def end_old_runs(home: Path, keys: Path, port: int) -> None:
    """End the runs that a killed server left in the database.

    A SuperLink starts a run that it was killed with once more if it had not begun, and two servers would write one run
    directory.
    """
    connect(home, keys, port)
    listed = flwr(home, "list", "own", "--format", "json").stdout
    runs = json.loads(listed).get("runs", []) if listed.strip() else []
    for run in runs:
        if not str(run["status"]).startswith("finished"):
            flwr(home, "stop", str(run["run-id"]), "own")


def register(home: Path, keys: Path, port: int) -> None:
    """Tell the SuperLink which sites may come, and note their nodes; those that it knows already are no error."""
    connect(home, keys, port)
    known = nodes(home)
    for path in sorted(keys.glob("*.pub")):
        done = flwr(home, "supernode", "register", str(path), "own", "--format", "json")
        said = done.stdout + done.stderr
        if (found := re.search(r'"node-id":\s*"?(\d+)', said)) is not None:
            known[blob(path)] = found[1]
        elif "already" not in said:
            raise ConfigurationError(
                message(
                    "a site's key must be fit to be registered",
                    received=f"{path}: {said}",
                    fix="see above",
                )
            )
    (home / NODES).write_text(json.dumps(known))


def owners(home: Path, keys: Path) -> Path:
    """Write which client each of the SuperLink's nodes is, by its key, for the process that runs the rounds."""
    known, path = nodes(home), home / "owners.json"
    own = {known[key]: number for number in numbers_in(keys) if (key := blob(keys / f"site{number}.pub")) in known}
    path.write_text(json.dumps(own))
    return path


def nodes(home: Path) -> dict[str, str]:
    """Return the SuperLink's numbers of sites, by :func:`blob`, as far as :func:`register` has noted them."""
    with contextlib.suppress(OSError, ValueError):
        known = json.loads((home / NODES).read_text())
        return {str(key): str(own) for key, own in known.items()} if isinstance(known, dict) else {}
    return {}


def blob(path: Path) -> str:
    """Return the key itself of a public key file of OpenSSH's."""
    parts = path.read_text().split()
    return parts[1] if len(parts) > 1 else ""


def run_app(
    home: Path,
    config: Path,
    run_dir: Path,
    others: Sequence[str],
    *,
    engine: Sequence[str] = (),
    told: Mapping[str, str | bool] | None = None,
) -> int:
    """Run the federation; return 0 if it came to its end.

    Args:
        home: Flower's folder, which says where the SuperLink is.
        config: The configuration.
        run_dir: Where the run is written.
        others: Options beside these.
        engine: Arguments of ``flwr run`` for its simulation engine, such as the number of SuperNodes.
        told: What else the app's server is told; see ``app/pyproject.toml``.
    """
    options = [*others, "--run_dir", str(run_dir.resolve()), "--trainer.enable_progress_bar", "false"]
    settings = {"config": str(config.resolve()), "options": shlex.join(options), **(told or {})}
    run_config = " ".join(f"{name}={json.dumps(value)}" for name, value in settings.items())
    command = [str(program("flwr")), "run", str(APP), "own", "--stream", *engine, "--run-config", run_config]
    ending = end_with_parent(signal.SIGKILL)
    subprocess.run(command, env=environment(home), check=False, preexec_fn=ending, umask=PRIVATE)
    with contextlib.suppress(OSError, ValueError):
        status = json.loads((run_dir / "summary.json").read_text())["status"]
        print(f"{run_dir}: {status}")
        return 0 if status == "finished" else 1
    return 1


def await_superlink(port: int, keys: Path | None, process: subprocess.Popen) -> None:
    """Return when the SuperLink answers, by TLS if there is a folder with its certificate's authority.

    Raises:
        ConfigurationError: If it ends, or does not answer within three minutes: a busy machine takes its time.
    """
    import ssl

    context = None if keys is None else ssl.create_default_context(cafile=str(keys / "ca.crt"))
    address = f"http{'' if keys is None else 's'}://127.0.0.1:{port}/health"
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(address, context=context, timeout=2)
            return
        time.sleep(0.3)
    raise ConfigurationError(
        message(
            "the SuperLink must start",
            received=f"no answer on port {port}",
            fix="read superlink.log, try another --port",
        )
    )


def await_port(host: str, port: int, *, seconds: float | None = None) -> None:
    """Return when nobody listens on a port: what is left of a server that was killed takes a moment to end.

    A second server would otherwise take the first one's SuperLink for its own, and run the federation twice.
    """
    deadline = time.monotonic() + (PORT_SECONDS if seconds is None else seconds)
    while True:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ConfigurationError(
                        message(
                            "a port must have one server that listens",
                            received=f"{host}:{port} ({error.strerror or error})",
                            fix="end the one that runs there, or choose another --port",
                        )
                    ) from error
        time.sleep(0.3)


@contextlib.contextmanager
def processes() -> Iterator[list[subprocess.Popen]]:
    """Give a list for processes, all of which end with the body, with their children."""
    started: list[subprocess.Popen] = []
    try:
        yield started
    finally:
        for process in reversed(started):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def watched(started: Mapping[Path, subprocess.Popen]) -> Iterator[None]:
    """Say of every process that ends before the body where it said why.

    Args:
        started: Processes by their log.
    """
    over = threading.Event()

    def watch() -> None:
        left = dict(started)
        while left and not over.wait(1.0):
            for log in [log for log, process in left.items() if process.poll() is not None]:
                logger.warning(f"a process ended ({left.pop(log).returncode}); {log} says why")

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


def start(
    command: Sequence[str], home: Path, *, log: str, first: Path | None = None, ending: int = signal.SIGKILL
) -> subprocess.Popen:
    """Start a program that ends with this process, and writes to a log.

    Args:
        command: The program and its arguments.
        home: Flower's folder, and that of the log.
        log: Name of the log, which is continued.
        first: Folder whose programs take precedence.
        ending: Signal that it is sent when this process ends; asked to end, a SuperLink waits for its connections.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    rotate(home / log)
    with (home / log).open("ab") as file:
        return subprocess.Popen(
            list(command),
            env=environment(home, first=first),
            stdout=file,
            stderr=file,
            start_new_session=True,
            umask=PRIVATE,
            preexec_fn=end_with_parent(ending),
        )


def rotate(log: Path) -> None:
    """Keep a long log as ``.1``, and what was that as ``.2``, before a program goes on with a new one."""
    if log.exists() and log.stat().st_size > MOST_LOG_BYTES:
        for number in range(MOST_LOGS - 1, 0, -1):
            older = log.with_name(f"{log.name}.{number}")
            if older.exists():
                older.replace(log.with_name(f"{log.name}.{number + 1}"))
        log.replace(log.with_name(f"{log.name}.1"))


def quick_clientapp(home: Path) -> contextlib.AbstractContextManager[Path]:
    """Give the folder with a ``flwr-clientapp`` that runs what is installed; see ``forkserver.py``."""
    return forkserver.opened(environment=environment(home))


def environment(home: Path, *, first: Path | None = None) -> dict[str, str]:
    """Return the environment of Flower's programs; those in the folder ``first`` take precedence."""
    folders = [*filter(None, [first]), Path(sys.executable).parent, os.environ.get("PATH", "")]
    path = os.pathsep.join(map(str, folders))
    return {**PACE, **os.environ, **QUIET, "FLWR_HOME": str(Path(home).resolve()), "PATH": path}


def check_file(path: Path) -> None:
    """Refuse a path without a file.

    Raises:
        ConfigurationError: If there is none.
    """
    if not path.is_file():
        raise ConfigurationError(message("files that are named must exist", received=path, fix="check the path"))


def check_address(address: str) -> None:
    """Refuse what is not HOST:PORT; an IPv6 address has brackets.

    Raises:
        ConfigurationError: If one is missing, or the port is none.
    """
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigurationError(
            message("a SuperLink must be named HOST:PORT", received=address, fix="write localhost:8000")
        )


def free_port() -> int:
    """Return a port of this machine that nobody listens on.

    It lies below those that systems give away by themselves (from 32768 on), and is drawn anew for everybody who asks:
    whoever is told of it can take his time.
    """
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", 20_000 + secrets.randbelow(12_768)))
            return int(probe.getsockname()[1])
