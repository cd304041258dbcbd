"""``python -m fedgan_lightning deploy ROLE``: keys, the server, a site, or all of it on one machine for a trial.

Every role starts Flower's own programs; nothing here listens or encrypts.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fedgan_lightning.claim import check_unclaimed
from fedgan_lightning.deployment import programs
from fedgan_lightning.deployment.supernode_supervisor import keep_running, kept
from fedgan_lightning.documents import check_settings_file
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.files import expanded


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}. See: python -m fedgan_lightning deploy --help")


def main(arguments: Sequence[str]) -> int:
    """Run a role; return the exit code."""
    parser = _Parser(prog="python -m fedgan_lightning deploy", description=__doc__)
    roles = parser.add_subparsers(dest="role", required=True, parser_class=_Parser)
    keys = roles.add_parser(
        "keys", help="make a certificate authority, a server certificate and node keys, or renew certificates"
    )
    keys.add_argument("folder", type=expanded)
    keys.add_argument("--sites", type=int, required=True)
    keys.add_argument("--host", nargs="+", default=[], help="names of the server; by default those that it has")
    server = roles.add_parser("server", help="SuperLink and run; continues a run that was cut off")
    _shared(server)
    server.add_argument("--keys", type=expanded, required=True, help="ca.crt, server.crt, server.key, *.pub of sites")
    server.add_argument("--home", type=expanded, default="federation", help="database and logs of the SuperLink")
    server.add_argument("--host", default="127.0.0.1", help="where the SuperLink listens")
    server.add_argument("--port", type=int, default=8000)
    site = roles.add_parser("site", help="a SuperNode: stays, and does what the federation asks")
    site.add_argument("--superlink", required=True, metavar="HOST:PORT")
    site.add_argument("--ca", type=expanded, required=True, help="certificate of the server's authority")
    site.add_argument("--key", type=expanded, required=True, help="private key of this site")
    site.add_argument("--client-id", type=int, required=True)
    site.add_argument("--config", type=expanded, required=True, help="configuration, the same everywhere")
    site.add_argument("--site", type=expanded, help="what differs here: the source, the accelerator")
    site.add_argument("--state", type=expanded, default="site", help="folder for private state")
    site.add_argument("--port", type=int, default=9094, help="port on this machine, for Flower's own processes")
    site.add_argument("--tls", type=expanded, help="FILE.crt and FILE.key of this site: TLS between these, too")
    site.add_argument("--check", action="store_true", help="try data, model, keys and connection, and take no part")
    trial = roles.add_parser("trial", help="a server and its sites as processes of this machine")
    _shared(trial)
    trial.add_argument("--sites", type=int, required=True)
    trial.add_argument("--site", type=expanded, nargs="*", default=[], help="what differs at each site, in order")
    trial.add_argument("--home", type=expanded, default="federation", help="keys, databases and logs")
    options, others = parser.parse_known_args(arguments)
    named = getattr(options, "site", None) or []
    for path in filter(None, (getattr(options, "config", None), *(named if isinstance(named, list) else [named]))):
        programs.check_file(path)
        check_settings_file(path)
    if others and options.role not in ("server", "trial"):
        parser.error(f"unknown options {' '.join(others)}")
    _check_flower()
    return int({"keys": _keys, "server": _server, "site": _site, "trial": _trial}[options.role](options, others) or 0)


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=expanded, required=True, help="configuration; more options are those of fit")
    parser.add_argument("--run_dir", type=expanded, required=True, help="directory of the run")


def _check_flower() -> None:
    if programs.program("flower-superlink") is None:
        raise ConfigurationError(
            message(
                "Flower must be installed for a federation between machines",
                received="an environment without it",
                fix="run pip install 'fedgan-lightning[flower]' (Python 3.11 or later)",
            )
        )


# ---------------------------------------------------------------------- roles


def _keys(options: argparse.Namespace, others: list[str]) -> None:
    from fedgan_lightning.deployment.keys import LOCAL, prepare

    # The server's own commands, and a proxy on the same machine, reach the SuperLink under a local name.
    hosts = list(dict.fromkeys([*options.host, *LOCAL])) if options.host else []
    done = prepare(options.folder, sites=options.sites, hosts=hosts)
    for word in dict.fromkeys(done.values()):
        print(f"{word}: {', '.join(name for name, own in done.items() if own == word)}")
    print(
        f"{options.folder}: ca.crt, siteN, siteN.tls.crt and siteN.tls.key go to site N; "
        "siteN.pub, server.crt and server.key to the server, ca.key into a safe; keep *.crt and *.pub for renewal"
    )


def _site(options: argparse.Namespace, others: list[str]) -> int:
    """Keep a SuperNode running, or try what it needs."""
    from fedgan_lightning.deployment.keys import check_valid

    programs.check_address(options.superlink)
    if options.client_id < 0:
        fix = "give each site its number, from 0 on"
        raise ConfigurationError(message("--client-id must be at least 0", received=options.client_id, fix=fix))
    own = () if options.tls is None else programs.pair(options.tls)
    for path in filter(None, (options.ca, options.key, options.config, options.site, *own)):
        programs.check_file(path)
    for path in (options.ca, *own[:1]):
        check_valid(path)
    if options.check:
        return _check(options, tls=own or None)
    command = programs.supernode(
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
    with programs.quick_clientapp(options.state) as first:
        return keep_running(command, environment=programs.environment(options.state, first=first))


def _check(options: argparse.Namespace, *, tls: tuple[Path, Path] | None) -> int:
    from fedgan_lightning.deployment.check import check

    check(
        options.config,
        own=options.site,
        client_id=options.client_id,
        state=options.state,
        superlink=options.superlink,
        ca=options.ca,
        key=options.key,
        port=options.port,
        tls=tls,
    )
    return 0


def _server(options: argparse.Namespace, others: list[str]) -> int:
    check_unclaimed(options.run_dir)
    with programs.processes() as started:
        started.append(programs.superlink(options.home, keys=options.keys, host=options.host, port=options.port))
        programs.await_superlink(options.port, options.keys, started[-1])
        programs.end_old_runs(options.home, options.keys, options.port)
        programs.register(options.home, options.keys, options.port)
        return programs.run_app(options.home, options.config, options.run_dir, others)


def _trial(options: argparse.Namespace, others: list[str]) -> int:
    home: Path = options.home.resolve()
    check_unclaimed(options.run_dir)
    keys = home / "keys"
    _keys(argparse.Namespace(folder=keys, sites=options.sites, host=[]), [])
    port = programs.free_port()
    others = [*others, "--data.num_clients", str(options.sites)]
    with programs.quick_clientapp(home) as first, programs.processes() as started:
        started.append(programs.superlink(home, keys=keys, host="127.0.0.1", port=port))
        programs.await_superlink(port, keys, started[-1])
        programs.end_old_runs(home, keys, port)
        programs.register(home, keys, port)
        sites = _start_sites(options, home=home, keys=keys, port=port, first=first, started=started)
        with programs.watched(sites):
            return programs.run_app(home, options.config, options.run_dir, others)


def _start_sites(
    options: argparse.Namespace,
    *,
    home: Path,
    keys: Path,
    port: int,
    first: Path | None,
    started: list[subprocess.Popen],
) -> dict[Path, subprocess.Popen]:
    """Start the sites of a trial, each kept by a process of its own, and list these; return them by their logs."""
    sites: dict[Path, subprocess.Popen] = {}
    for number in range(options.sites):
        own = home / f"site{number}"
        node = {"client-id": number, "state": str(own)}
        node |= {"site": str(options.site[number].resolve())} if number < len(options.site) else {}
        command = programs.supernode(
            superlink=f"127.0.0.1:{port}",
            ca=keys / "ca.crt",
            key=keys / f"site{number}",
            port=programs.free_port(),
            node=node,
            tls=keys / f"site{number}.tls",
        )
        started.append(programs.start(kept(command), own, log="supernode.log", first=first))
        sites[own / "supernode.log"] = started[-1]
    return sites
