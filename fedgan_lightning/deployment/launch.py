"""``python -m fedgan_lightning federation ROLE``: keys, the server, a site, or all of it on one machine for a trial.

Every role starts Flower's own programs; nothing here listens or encrypts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fedgan_lightning.deployment import warm
from fedgan_lightning.deployment.supervise import end_with_parent, keep_running
from fedgan_lightning.errors import ConfigurationError, message

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
#: Seconds for the SuperLink to start, and for the port of its predecessor to be free.
START_SECONDS, PORT_SECONDS = 60.0, 20.0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}. See: python -m fedgan_lightning federation --help")


def main(arguments: Sequence[str]) -> int:
    """Run a role; return the exit code."""
    parser = _Parser(prog="python -m fedgan_lightning federation", description=__doc__)
    roles = parser.add_subparsers(dest="role", required=True, parser_class=_Parser)
    keys = roles.add_parser("keys", help="make a certificate authority, a server certificate and node keys")
    keys.add_argument("folder", type=Path)
    keys.add_argument("--sites", type=int, required=True)
    keys.add_argument("--host", nargs="+", default=["localhost", "127.0.0.1"], help="names of the server")
    server = roles.add_parser("server", help="SuperLink and run; continues a run that was cut off")
    _shared(server)
    server.add_argument("--keys", type=Path, required=True, help="ca.crt, server.crt, server.key, and *.pub of sites")
    server.add_argument("--home", type=Path, default=Path("federation"), help="database and logs of the SuperLink")
    server.add_argument("--host", default="127.0.0.1", help="where the SuperLink listens")
    server.add_argument("--port", type=int, default=8000)
    site = roles.add_parser("site", help="a SuperNode: stays, and does what the federation asks")
    site.add_argument("--superlink", required=True, metavar="HOST:PORT")
    site.add_argument("--ca", type=Path, required=True, help="certificate of the server's authority")
    site.add_argument("--key", type=Path, required=True, help="private key of this site")
    site.add_argument("--client-id", type=int, required=True)
    site.add_argument("--config", type=Path, required=True, help="configuration, the same everywhere")
    site.add_argument("--site", type=Path, help="what differs here: the source, the accelerator")
    site.add_argument("--state", type=Path, default=Path("site"), help="folder for private state")
    site.add_argument("--port", type=int, default=9094, help="port on this machine, for Flower's own processes")
    site.add_argument("--tls", type=Path, help="FILE.crt and FILE.key of this site: TLS between these processes, too")
    trial = roles.add_parser("trial", help="a server and its sites as processes of this machine")
    _shared(trial)
    trial.add_argument("--sites", type=int, required=True)
    trial.add_argument("--site", type=Path, nargs="*", default=[], help="what differs at each site, in order")
    trial.add_argument("--home", type=Path, default=Path("federation"), help="keys, databases and logs")
    options, others = parser.parse_known_args(arguments)
    if others and options.role not in ("server", "trial"):
        parser.error(f"unknown options {' '.join(others)}")
    _check_flower()
    return int({"keys": _keys, "server": _server, "site": _site, "trial": _trial}[options.role](options, others) or 0)


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="configuration; further options are those of fit")
    parser.add_argument("--run_dir", type=Path, required=True, help="directory of the run")


def _check_flower() -> None:
    if program("flower-superlink") is None:
        raise ConfigurationError(
            message(
                "a federation between machines runs on Flower",
                received="an environment without it",
                fix="pip install 'fedgan-lightning[flower]' (Python 3.11 or later)",
            )
        )


def program(name: str) -> str | None:
    """Return the path of a program of this environment."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


# ---------------------------------------------------------------------- roles


def _keys(options: argparse.Namespace, others: list[str]) -> None:
    from fedgan_lightning.deployment.keys import LOCAL, make_authority, make_node_key, make_site_certificate

    # The server's own commands, and a proxy on the same machine, reach the SuperLink under a local name.
    make_authority(options.folder, hosts=list(dict.fromkeys([*options.host, *LOCAL])))
    for number in range(options.sites):
        make_node_key(options.folder / f"site{number}")
        make_site_certificate(options.folder / f"site{number}", authority=options.folder)
    print(
        f"wrote {options.folder}: ca.crt, siteN, siteN.tls.crt and siteN.tls.key go to site N; "
        "siteN.pub, server.crt and server.key stay at the server, ca.key in a safe"
    )


def _site(options: argparse.Namespace, others: list[str]) -> int:
    """Keep a SuperNode running."""
    own = () if options.tls is None else _pair(options.tls)
    for path in filter(None, (options.ca, options.key, options.config, options.site, *own)):
        _check_file(path)
    command = supernode(
        superlink=options.superlink,
        ca=options.ca,
        key=options.key,
        port=options.port,
        tls=options.tls,
        node={
            "client-id": options.client_id,
            "config": str(options.config.resolve()),
            "state": str(options.state.resolve()),
            **({"site": str(options.site.resolve())} if options.site else {}),
        },
    )
    with quick_clientapp(options.state) as first:
        return keep_running(command, environment=_environment(options.state, first=first))


def _server(options: argparse.Namespace, others: list[str]) -> int:
    with _processes() as started:
        started.append(superlink(options.home, keys=options.keys, host=options.host, port=options.port))
        _await(options.port, options.keys, started[-1])
        _end_old_runs(options.home, options.keys, options.port)
        _register(options.home, options.keys, options.port)
        return _run(options.home, options.config, options.run_dir, others)


def _trial(options: argparse.Namespace, others: list[str]) -> int:
    home: Path = options.home.resolve()
    _check_file(options.config)
    keys = home / "keys"
    if not (keys / "ca.crt").exists():
        _keys(argparse.Namespace(folder=keys, sites=options.sites, host=["localhost", "127.0.0.1"]), [])
    port = free_port()
    others = [*others, "--data.num_clients", str(options.sites)]
    with quick_clientapp(home) as first, _processes() as started:
        started.append(superlink(home, keys=keys, host="127.0.0.1", port=port))
        _await(port, keys, started[-1])
        _end_old_runs(home, keys, port)
        _register(home, keys, port)
        for number in range(options.sites):
            overlay = options.site[number] if number < len(options.site) else None
            node = {"client-id": number, "state": str(home / f"site{number}")}
            node |= {"site": str(overlay.resolve())} if overlay else {}
            command = supernode(
                superlink=f"127.0.0.1:{port}",
                ca=keys / "ca.crt",
                key=keys / f"site{number}",
                port=free_port(),
                node=node,
                tls=keys / f"site{number}.tls",
            )
            started.append(_start(command, home / f"site{number}", log="supernode.log", first=first))
        return _run(home, options.config, options.run_dir, others)


# ---------------------------------------------------------------------- Flower's programs


def superlink(home: Path, *, keys: Path, host: str, port: int) -> subprocess.Popen:
    """Start a SuperLink with TLS, node authentication and a database."""
    for name in ("ca.crt", "server.crt", "server.key"):
        _check_file(keys / name)
    _await_port(host, port)
    home.mkdir(parents=True, exist_ok=True)
    command = [
        *(str(program("flower-superlink")), "--host", host, "--port", str(port)),
        *("--ssl-ca-certfile", str(keys / "ca.crt"), "--ssl-certfile", str(keys / "server.crt")),
        *("--ssl-keyfile", str(keys / "server.key"), "--enable-supernode-auth"),
        *("--database", str((home / "superlink.db").resolve()), "--disable-runtime-dependency-installation"),
    ]
    return _start(command, home, log="superlink.log")


def supernode(
    *, superlink: str, ca: Path, key: Path, port: int, node: dict[str, Any], tls: Path | None = None
) -> list[str]:
    """Return the command of a SuperNode.

    Args:
        superlink: Where the SuperLink, or the proxy in front of it, listens.
        ca: Certificate of the authority.
        key: The site's private key.
        port: Port of this machine for Flower's own processes at the site.
        node: What its ClientApp is told.
        tls: Certificate and key, without ``.crt`` and ``.key``, for that port; without, what passes there is readable
            to whoever may capture this machine's loopback traffic.
    """
    told = " ".join(
        f"{name}={value}" if isinstance(value, int) else f'{name}="{value}"' for name, value in node.items()
    )
    command = [
        *(str(program("flower-supernode")), "--superlink", superlink, "--root-certificates", str(ca)),
        *("--auth-supernode-private-key", str(key), "--port", str(port), "--node-config", told),
    ]
    if tls is not None:
        certificate, private = _pair(tls)
        command += ["--ssl-ca-certfile", str(ca), "--ssl-certfile", str(certificate), "--ssl-keyfile", str(private)]
    return command


def _pair(tls: Path) -> tuple[Path, Path]:
    """Return the certificate and the key that go by this name."""
    return tls.with_name(f"{tls.name}.crt"), tls.with_name(f"{tls.name}.key")


def _connect(home: Path, keys: Path, port: int) -> None:
    """Tell Flower's command line where the SuperLink is."""
    text = f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{port}"\n'
    (home / "config.toml").write_text(f'{text}root-certificates = "{(keys / "ca.crt").resolve()}"\n')


def _flwr(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(program("flwr")), *arguments]
    return subprocess.run(command, env=_environment(home), capture_output=True, text=True, check=False)


def _end_old_runs(home: Path, keys: Path, port: int) -> None:
    """End the runs that a killed server left in the database.

    A SuperLink starts a run that it was killed with once more if it had not begun, and two servers would write one run
    directory.
    """
    _connect(home, keys, port)
    listed = _flwr(home, "list", "own", "--format", "json").stdout
    runs = json.loads(listed).get("runs", []) if listed.strip() else []
    for run in runs:
        if not str(run["status"]).startswith("finished"):
            _flwr(home, "stop", str(run["run-id"]), "own")


def _register(home: Path, keys: Path, port: int) -> None:
    """Tell the SuperLink which sites may come; those that it knows already are no error."""
    _connect(home, keys, port)
    for path in sorted(keys.glob("*.pub")):
        done = _flwr(home, "supernode", "register", str(path), "own")
        if done.returncode and "already" not in (done.stdout + done.stderr):
            raise ConfigurationError(
                message(
                    "a site's key can be registered", received=f"{path}: {done.stdout}{done.stderr}", fix="see above"
                )
            )


def _run(home: Path, config: Path, run_dir: Path, others: Sequence[str]) -> int:
    """Run the federation; return 0 if it came to its end."""
    options = [*others, "--run_dir", str(run_dir.resolve()), "--trainer.enable_progress_bar", "false"]
    told = f"config={json.dumps(str(config.resolve()))} options={json.dumps(shlex.join(options))}"
    command = [str(program("flwr")), "run", str(APP), "own", "--stream", "--run-config", told]
    subprocess.run(command, env=_environment(home), check=False, preexec_fn=end_with_parent(signal.SIGKILL))
    with contextlib.suppress(OSError, ValueError):
        status = json.loads((run_dir / "summary.json").read_text())["status"]
        print(f"{run_dir}: {status}")
        return 0 if status == "finished" else 1
    return 1


def _await(port: int, keys: Path, process: subprocess.Popen) -> None:
    """Return when the SuperLink answers."""
    import ssl

    context = ssl.create_default_context(cafile=str(keys / "ca.crt"))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"https://127.0.0.1:{port}/health", context=context, timeout=2)
            return
        time.sleep(0.3)
    raise ConfigurationError(
        message(
            "the SuperLink starts", received=f"no answer on port {port}", fix="read superlink.log, try another --port"
        )
    )


def _await_port(host: str, port: int) -> None:
    """Return when nobody listens on a port: what is left of a server that was killed takes a moment to end.

    A second server would otherwise take the first one's SuperLink for its own, and run the federation twice.
    """
    deadline = time.monotonic() + PORT_SECONDS
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
                            "one server listens on a port",
                            received=f"{host}:{port} ({error.strerror or error})",
                            fix="end the one that runs there, or choose another --port",
                        )
                    ) from error
        time.sleep(0.3)


@contextlib.contextmanager
def _processes() -> Iterator[list[subprocess.Popen]]:
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


def _start(command: Sequence[str], home: Path, *, log: str, first: Path | None = None) -> subprocess.Popen:
    home.mkdir(parents=True, exist_ok=True)
    with (home / log).open("ab") as file:
        return subprocess.Popen(
            list(command),
            env=_environment(home, first=first),
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=end_with_parent(signal.SIGKILL),  # asked to end, a SuperLink waits for its connections
        )


def quick_clientapp(home: Path) -> contextlib.AbstractContextManager[Path | None]:
    """Give the folder with a ``flwr-clientapp`` that need not import anything; see ``warm.py``."""
    return warm.opened(str(program(warm.PROGRAM)), environment=_environment(home))


def _environment(home: Path, *, first: Path | None = None) -> dict[str, str]:
    """Return the environment of Flower's programs; those in the folder ``first`` take precedence."""
    folders = [*filter(None, [first]), Path(sys.executable).parent, os.environ.get("PATH", "")]
    path = os.pathsep.join(map(str, folders))
    return {**PACE, **os.environ, **QUIET, "FLWR_HOME": str(Path(home).resolve()), "PATH": path}


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigurationError(message("files that are named exist", received=path, fix="check the path"))


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
