"""A federation of real processes, whose wires are recorded; for the tests of the proxies and of what a wire shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedgan_lightning.deployment import launch, programs
from tests.conftest import ROOT
from tests.deployment.processes import (
    CONFIG,
    Listener,
    OpeningRelay,
    Relay,
    may_listen,
    nginx,
    server_proxy,
    site_proxy,
)

SITES = 2
#: Two rounds: what the first one makes travels in the second.
OPTIONS = [
    *("--data.num_clients", str(SITES), "--federation.rounds", "2", "--federation.local_steps", "5"),
    *("--model.generator.init_args.hidden", "[64, 64]", "--model.discriminator.init_args.hidden", "[64, 64]"),
    *(
        "--evaluation.metrics",
        "[{class_path: FrechetDistance, init_args: {features: PixelFeatures}}]",
        "--evaluation.num_samples",
        "100",
    ),
    *("--pictures.every_n_rounds", "2", "--evaluation.every_n_rounds", "2"),
]


@dataclass(frozen=True)
class Recorded:
    """A federation that came to its end; its SuperLink, and the proxy in front of it, are still there.

    Attributes:
        home: Where its keys, its logs and its run directory ``run`` lie.
        code: What the run ended with.
        superlink: Port of the SuperLink.
        proxy: Port of its proxy, where there is nginx.
        wires: What passed between sites and server, and where this process may listen among the processes of each site:
            streams by section of the way.
        opened: What passed on the last section, without TLS.
        seen: The log of the server's proxy, where there is nginx.
    """

    home: Path
    code: int
    superlink: int
    proxy: int
    wires: dict[str, list[bytes]]
    opened: list[bytes]
    seen: str


@pytest.fixture(scope="package")
def as_installed() -> Iterator[None]:
    """Processes find the package where this one did, and use one thread each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="package")
def federation(tmp_path_factory, as_installed) -> Iterator[Recorded]:
    """A federation as the documentation has it: TLS, node keys, and proxies where there is nginx."""
    home = tmp_path_factory.mktemp("federation")
    keys, port, proxy = home / "keys", programs.free_port(), programs.free_port()
    assert launch.main(["keys", str(keys), "--sites", str(SITES), "--host", "fedgan.example.org"]) == 0
    with programs.processes() as started, contextlib.ExitStack() as relays:
        started.append(programs.superlink(home, keys=keys, host="127.0.0.1", port=port))
        opened = relays.enter_context(contextlib.closing(OpeningRelay(port, keys=keys)))
        wires = {"to the SuperLink": relays.enter_context(contextlib.closing(Relay(opened.port)))}
        if nginx() is not None:
            started.append(
                server_proxy(home / "proxy", keys=keys, superlink=wires["to the SuperLink"].port, port=proxy)
            )
            wires["between the proxies"] = relays.enter_context(contextlib.closing(Relay(proxy)))
        programs.await_superlink(port, keys, started[0])
        programs.register(home, keys, port)
        with programs.quick_clientapp(home) as first, programs.processes() as sites:
            for number in range(SITES):
                start_site(number, home, sites=sites, relays=relays, wires=wires, first=first)
            code = programs.run_app(home, CONFIG, home / "run", OPTIONS)
            seen = (home / "proxy" / "fedgan.log").read_text() if nginx() is not None else ""
        copies = {name: copied(relay) for name, relay in wires.items()}
        yield Recorded(home, code, port, proxy, copies, copied(opened), seen)


def start_site(number: int, home: Path, *, sites, relays, wires, first) -> None:
    """Start a SuperNode and, where there is nginx, its proxy, with a recording relay between them."""
    keys, door = home / "keys", wires["to the SuperLink"].port
    if nginx() is not None:
        own = {"number": number, "server": wires["between the proxies"].port, "port": programs.free_port()}
        sites.append(site_proxy(home / f"proxy{number}", keys=keys, **own))
        wires[f"at site {number}"] = relays.enter_context(contextlib.closing(Relay(own["port"])))
        door = wires[f"at site {number}"].port
    node = {"client-id": number, "state": str(home / f"site{number}")}
    own = {"ca": keys / "ca.crt", "key": keys / f"site{number}", "tls": keys / f"site{number}.tls", "node": node}
    port = programs.free_port()
    if may_listen():
        wires[f"among the processes of site {number}"] = relays.enter_context(contextlib.closing(Listener(port)))
    command = programs.supernode(superlink=f"localhost:{door}", port=port, **own)
    sites.append(programs.start(command, home / f"site{number}", log="log", first=first))


def copied(wire: Relay | Listener) -> list[bytes]:
    return [bytes(stream) for stream in wire.streams]
