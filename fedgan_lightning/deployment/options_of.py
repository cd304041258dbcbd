"""Options of ``deploy``, by role."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fedgan_lightning.deployment import kits, programs
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.files import expanded, write_text


def add_roles(roles: Any) -> None:
    """Add a parser for every role to the subparsers of ``deploy``."""
    _add_consortium(roles)
    _add_server(roles)
    _add_site(roles)
    trial = roles.add_parser("trial", help="a server and its sites as processes of this machine")
    _shared(trial)
    trial.add_argument("--sites", type=int, required=True)
    trial.add_argument("--site", type=expanded, nargs="*", default=[], help="what differs at each site, in order")
    trial.add_argument("--home", type=expanded, default="federation", help="keys, databases and logs")


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=expanded, required=True, help="configuration; more options are those of fit")
    parser.add_argument("--run_dir", type=expanded, required=True, help="directory of the run")


def _add_consortium(roles: Any) -> None:
    keys = roles.add_parser(
        "keys", help="make a certificate authority, a server certificate and node keys, or renew certificates"
    )
    keys.add_argument("folder", type=expanded)
    keys.add_argument("--sites", type=int, required=True)
    keys.add_argument("--host", nargs="+", default=[], help="names of the server; by default those that it has")
    kit = roles.add_parser("kit", help="write a startup kit for every site: siteN.zip")
    kit.add_argument("folder", type=expanded, help="what deploy keys made")
    kit.add_argument("--server", required=True, metavar="HOST:PORT", help="the server's proxy, as sites reach it")
    kit.add_argument("--config", type=expanded, required=True, help="configuration, the same everywhere")
    kit.add_argument("--policy", type=expanded, help="what sites answer, for a start; each may change its own")
    kit.add_argument("--client-id", type=int, nargs="+", default=[], help="for these sites; by default for all")
    kit.add_argument("--out", type=expanded, default="kits", help="folder for the kits")
    out = roles.add_parser("expel", help="take a site out: its key, its certificate, its place at the SuperLink")
    out.add_argument("folder", type=expanded, help="the server's keys, or the authority's")
    out.add_argument("--client-id", type=int, required=True)
    out.add_argument("--home", type=expanded, default="federation", help="that of the server, where it runs")
    out.add_argument("--port", type=int, default=8000, help="that of the server")
    state = roles.add_parser("status", help="who is connected, the last round, the last error")
    state.add_argument("--run_dir", type=expanded, required=True)


def _add_server(roles: Any) -> None:
    server = roles.add_parser("server", help="SuperLink and run; continues a run that was cut off")
    _shared(server)
    server.add_argument("--keys", type=expanded, required=True, help="ca.crt, server.crt, server.key, *.pub of sites")
    server.add_argument("--home", type=expanded, default="federation", help="database and logs of the SuperLink")
    server.add_argument("--host", default="127.0.0.1", help="where the SuperLink listens")
    server.add_argument("--port", type=int, default=8000)
    server.add_argument("--proxy", type=int, metavar="PORT", help="start nginx there: what sites reach")
    server.add_argument("--data", type=expanded, help="settings of samples of the server's own, if it has any")
    server.add_argument("--prometheus", type=expanded, metavar="FILE", help="figures, for a textfile collector")
    server.add_argument("--check", action="store_true", help="try settings, keys and ports, and start nothing")


def _add_site(roles: Any) -> None:
    site = roles.add_parser("site", help="a SuperNode: stays, and does what the federation asks")
    site.add_argument("--kit", type=expanded, help="startup kit, zip or folder: all of what follows but the data")
    site.add_argument("--superlink", metavar="HOST:PORT", help="the SuperLink, or a proxy in front of it")
    site.add_argument("--through", metavar="HOST:PORT", help="start nginx here, which shows --tls to this one")
    site.add_argument("--ca", type=expanded, help="certificate of the server's authority")
    site.add_argument("--key", type=expanded, help="private key of this site")
    site.add_argument("--client-id", type=int)
    site.add_argument("--config", type=expanded, help="configuration, the same everywhere")
    site.add_argument("--site", type=expanded, help="what differs here: the source, the accelerator")
    site.add_argument("--root", type=expanded, help="folder of this site's data: data.source.root in place of --site")
    site.add_argument("--policy", type=expanded, help="what this site answers; default that of one that trusts nobody")
    site.add_argument("--members", type=expanded, help="folder with siteN.pub of all: keys of secure aggregation count")
    site.add_argument("--state", type=expanded, help="folder for private state, memory and record; default ./site")
    site.add_argument("--port", type=int, default=9094, help="port on this machine, for Flower's own processes")
    site.add_argument("--tls", type=expanded, help="FILE.crt and FILE.key of this site: TLS between these, too")
    site.add_argument("--gpu", help="number of the GPU to use, as CUDA_VISIBLE_DEVICES has it")
    site.add_argument("--threads", type=int, help="CPU threads to use")
    site.add_argument("--check", action="store_true", help="try data, model, keys and connection, and take no part")


def take_kit(options: argparse.Namespace) -> None:
    """Complete a site's options by those of its kit, and refuse what is missing.

    Raises:
        ConfigurationError: If there is no such kit, or something that a site needs is not named.
    """
    if options.kit is not None:
        folder, facts = kits.opened(options.kit)
        known = {"ca": "ca.crt", "key": "key", "config": "config.yaml", "policy": "policy.yaml", "members": "members"}
        known |= {"tls": "tls", "state": "state"} | ({} if options.root else {"site": "site.yaml"})
        for name, file in known.items():
            setattr(options, name, getattr(options, name) or folder / file)
        if options.client_id is None:
            options.client_id = facts["client_id"]
        if options.superlink is None:
            options.through = options.through or facts["server"]
    options.state = options.state or expanded("site")
    if options.through is not None:
        programs.check_address(options.through)
        options.superlink = options.superlink or options.through
    needed = ("superlink", "ca", "key", "client_id", "config", *(("tls",) if options.through else ()))
    if missing := [f"--{name.replace('_', '-')}" for name in needed if getattr(options, name) is None]:
        raise ConfigurationError(
            message("a site must name --kit, or all of a kit's parts", received=f"none of {missing}", fix="write them")
        )
    if options.root is not None:
        options.site = _settings_of_root(options.root, options.state)


def _settings_of_root(root: Path, state: Path) -> Path:
    """Return a file of settings that says where a site's data are."""
    if not root.exists():
        raise ConfigurationError(message("--root must name this site's data", received=root, fix="check the path"))
    path = state / "root.yaml"
    write_text(path, f"data:\n  source:\n    init_args:\n      root: {json.dumps(str(root.resolve()))}\n")
    return path
