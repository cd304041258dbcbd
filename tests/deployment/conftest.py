"""A federation of real processes, whose wires are recorded; for the tests of the proxies and of what a wire shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedgan_lightning.deployment import launch
from tests.conftest import ROOT
from tests.deployment.processes import CONFIG, OpeningRelay, Relay, nginx, server_proxy, site_proxy

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
    """A federation that came to its end.

    Attributes:
        home: Where its logs and its run directory ``run`` lie.
        code: What the run ended with.
        wires: What passed between sites and server: streams by section of the way.
        opened: What passed on the last section, without TLS.
    """

    home: Path
    code: int
    wires: dict[str, list[bytes]]
    opened: list[bytes]


@pytest.fixture(scope="package")
def as_installed() -> Iterator[None]:
    """Processes find the package where this one did, and use one thread each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="package")
def federation(tmp_path_factory, as_installed) -> Recorded:
    """A federation as the documentation has it: TLS, node keys, and proxies where there is nginx."""
    home = tmp_path_factory.mktemp("federation")
    keys, port = home / "keys", launch.free_port()
    assert launch.main(["keys", str(keys), "--sites", str(SITES), "--host", "fedgan.example.org"]) == 0
    with launch._processes() as started, contextlib.ExitStack() as relays:
        started.append(launch.superlink(home, keys=keys, host="127.0.0.1", port=port))
        opened = relays.enter_context(contextlib.closing(OpeningRelay(port, keys=keys)))
        wires = {"to the SuperLink": relays.enter_context(contextlib.closing(Relay(opened.port)))}
        doors = [wires["to the SuperLink"].port] * SITES
        if nginx() is not None:
            doors = through_proxies(home, doors[0], keys=keys, started=started, relays=relays, wires=wires)
        launch._await(port, keys, started[0])
        launch._register(home, keys, port)
        for number, door in enumerate(doors):
            node = {"client-id": number, "state": str(home / f"site{number}")}
            own = {"ca": keys / "ca.crt", "key": keys / f"site{number}", "tls": keys / f"site{number}.tls"}
            command = launch.supernode(superlink=f"localhost:{door}", port=launch.free_port(), node=node, **own)
            started.append(launch._start(command, home / f"site{number}", log="log"))
        code = launch._run(home, CONFIG, home / "run", OPTIONS)
    return Recorded(home, code, {name: copied(relay) for name, relay in wires.items()}, copied(opened))


def through_proxies(home: Path, door: int, *, keys: Path, started, relays, wires) -> list[int]:
    """Start the proxies, with recording relays before and between them; return where the SuperNodes knock."""
    server, *near = (launch.free_port() for _ in range(1 + SITES))
    started.append(server_proxy(home / "server-proxy", keys=keys, superlink=door, port=server))
    wires["between the proxies"] = between = relays.enter_context(contextlib.closing(Relay(server)))
    for number, port in enumerate(near):
        own = {"number": number, "server": between.port, "port": port}
        started.append(site_proxy(home / f"site-proxy{number}", keys=keys, **own))
        wires[f"at site {number}"] = relays.enter_context(contextlib.closing(Relay(port)))
    return [wires[f"at site {number}"].port for number in range(SITES)]


def copied(relay: Relay) -> list[bytes]:
    return [bytes(stream) for stream in relay.streams]
