"""``python -m fedgan_lightning deploy ROLE``: keys, kits, the server, a site, or all of it on one machine for a trial.

Every role starts Flower's own programs, and nginx in front of them where asked; nothing here listens or encrypts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

from fedgan_lightning.claim import check_unclaimed, claimed
from fedgan_lightning.deployment import kits, membership, options_of, programs, proxy, status
from fedgan_lightning.deployment.supernode_supervisor import keep_running, kept
from fedgan_lightning.documents import check_settings_file
from fedgan_lightning.errors import ConfigurationError, message


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}. See: python -m fedgan_lightning deploy --help")


def main(arguments: Sequence[str]) -> int:
    """Run a role; return the exit code."""
    parser = _Parser(prog="python -m fedgan_lightning deploy", description=__doc__)
    options_of.add_roles(parser.add_subparsers(dest="role", required=True, parser_class=_Parser))
    options, others = parser.parse_known_args(arguments)
    named = getattr(options, "site", None) or []
    files = (getattr(options, "config", None), getattr(options, "data", None))
    for path in filter(None, (*files, *(named if isinstance(named, list) else [named]))):
        programs.check_file(path)
        check_settings_file(path)
    if others and options.role not in ("server", "trial"):
        parser.error(f"unknown options {' '.join(others)}")
    if options.role not in ("status", "kit"):
        _check_flower()
    with _private():
        return int(ROLES[options.role](options, others) or 0)


@contextmanager
def _private() -> Iterator[None]:
    """Let what a role writes be readable by its owner alone, whatever the shell's umask."""
    before = os.umask(programs.PRIVATE)
    try:
        yield
    finally:
        os.umask(before)


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
        f"{options.folder}: siteN, siteN.tls.crt and siteN.tls.key go to site N with ca.crt and ca.crl (deploy kit); "
        "siteN.pub, server.crt and server.key to the server, ca.key into a safe; keep *.crt, *.pub and ca.crl"
    )


def _kit(options: argparse.Namespace, others: list[str]) -> None:
    programs.check_address(options.server)
    told = {"server": options.server, "config": options.config, "policy": options.policy}
    for path in kits.write_kits(options.folder, options.out, clients=options.client_id, **told):
        print(f"{path}: holds private keys; give it to its site by a safe way, and delete it here")


def _expel(options: argparse.Namespace, others: list[str]) -> None:
    for path in membership.expel(options.folder, options.client_id):
        print(f"wrote {path}")
    if (options.home / "config.toml").exists():
        gone = membership.unregister(options.home, options.folder, options.port)
        print(f"node {', '.join(gone)} is not let in any more" if gone else "no SuperLink knew the site")
    print("give the new ca.crl to the server's proxy, if there is one, and nginx -s reload")


def _status(options: argparse.Namespace, others: list[str]) -> None:
    print("\n".join(status.lines(status.read(options.run_dir))))


def _site(options: argparse.Namespace, others: list[str]) -> int:
    """Keep a SuperNode running, or try what it needs."""
    from fedgan_lightning.deployment.keys import check_valid

    options_of.take_kit(options)
    programs.check_address(options.superlink)
    if options.client_id < 0:
        fix = "give each site its number, from 0 on"
        raise ConfigurationError(message("--client-id must be at least 0", received=options.client_id, fix=fix))
    own = () if options.tls is None else programs.pair(options.tls)
    for path in filter(None, (options.ca, options.key, options.config, options.site, options.policy, *own)):
        programs.check_file(path)
    for path in (options.ca, *own[:1]):
        check_valid(path)
    _limit(options)
    with ExitStack() as stack:
        if options.through is not None:
            _start_site_proxy(options, stack)
        if options.check:
            return _check(options, tls=own or None)
        node = {"client-id": options.client_id, "config": options.config, "state": options.state, "key": options.key}
        node |= {name: getattr(options, name) for name in ("site", "policy", "members")}
        command = programs.supernode(
            superlink=options.superlink,
            ca=options.ca,
            key=options.key,
            port=options.port,
            tls=options.tls,
            node={n: str(v.resolve()) if isinstance(v, Path) else v for n, v in node.items() if v is not None},
        )
        first = stack.enter_context(programs.quick_clientapp(options.state))
        return keep_running(command, environment=programs.environment(options.state, first=first))


def _limit(options: argparse.Namespace) -> None:
    """Let what this process starts see one GPU, and use so many threads; both are the site's to say."""
    if options.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = options.gpu
    if options.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)


def _start_site_proxy(options: argparse.Namespace, stack: ExitStack) -> None:
    """Start nginx, which shows the site's certificate to the server's, and let the SuperNode name it."""
    port, crl = programs.free_port(), options.ca.with_name("ca.crl")
    for path in (crl, *programs.pair(options.tls)):
        programs.check_file(path)
    changed = proxy.site_changes(ca=options.ca, crl=crl, tls=options.tls, server=options.through, port=port)
    started = stack.enter_context(programs.processes())
    started.append(proxy.start("nginx-site.conf", options.state / "proxy", changed=changed, port=port))
    options.superlink = f"localhost:{port}"


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
        policy=options.policy,
        members=options.members,
    )
    return 0


def _server(options: argparse.Namespace, others: list[str]) -> int:
    from fedgan_lightning.deployment.server_check import check_server

    check_unclaimed(options.run_dir)
    if options.data is not None:
        others = ["--config", str(options.data.resolve()), *others]
    facts = check_server(options.config, options.run_dir, others, keys=options.keys, has_data=options.data is not None)
    print("\n".join(facts), flush=True)
    if options.check:
        programs.await_port(options.host, options.port, seconds=0.0)
        print("ready: the same command without --check starts the server")
        return 0
    told: dict[str, str | bool] = {"keys": str(options.keys.resolve()), "server-data": options.data is not None}
    told |= {} if options.prometheus is None else {"prometheus": str(options.prometheus.resolve())}
    with claimed(options.home), programs.processes() as started:
        started.append(programs.superlink(options.home, keys=options.keys, host=options.host, port=options.port))
        programs.await_superlink(options.port, options.keys, started[-1])
        programs.end_old_runs(options.home, options.keys, options.port)
        programs.register(options.home, options.keys, options.port)
        membership.unregister(options.home, options.keys, options.port)
        told["owners"] = str(programs.owners(options.home, options.keys).resolve())
        if options.proxy is not None:
            changed = proxy.server_changes(keys=options.keys, superlink=options.port, port=options.proxy)
            started.append(proxy.start("nginx.conf", options.home / "proxy", changed=changed, port=options.proxy))
        return programs.run_app(options.home, options.config, options.run_dir, others, told=told)


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
            told: dict[str, str | bool] = {"server-data": not options.site}  # where sites have own data, it has none
            told["owners"] = str(programs.owners(home, keys).resolve())
            return programs.run_app(home, options.config, options.run_dir, others, told=told)


def _start_sites(
    options: argparse.Namespace,
    *,
    home: Path,
    keys: Path,
    port: int,
    first: Path,
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


#: What each role does.
ROLES = {"keys": _keys, "kit": _kit, "server": _server, "site": _site, "trial": _trial, "expel": _expel}
ROLES |= {"status": _status}
