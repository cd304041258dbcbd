"""One federation of real processes over TLS, one without, at the same time; their wires are recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedgan_lightning.deployment import launch
from tests.conftest import ROOT
from tests.deployment.processes import (
    CONFIG,
    Relay,
    answers,
    nginx,
    open_site_command,
    open_superlink,
    server_proxy,
    site_proxy,
    wait_for,
)

SITES = 2
#: Two rounds: what the first one makes travels in the second.
OPTIONS = [
    *("--data.num_clients", str(SITES), "--federation.rounds", "2", "--federation.local_steps", "5"),
    *("--model.generator.init_args.hidden", "[64, 64]", "--model.discriminator.init_args.hidden", "[64, 64]"),
    *("--evaluation.metrics", "[{class_path: FrechetDistance}]", "--evaluation.num_samples", "100"),
    *("--pictures.every_n_rounds", "2", "--evaluation.every_n_rounds", "2"),
]


@dataclass(frozen=True)
class Recorded:
    """A federation that came to its end.

    Attributes:
        run_dir: Directory of the run.
        code: What the run ended with.
        wires: What passed between sites and server: streams by section of the way.
        seen_by_server_proxy: Its log, where there is one.
    """

    run_dir: Path
    code: int
    wires: dict[str, list[bytes]]
    seen_by_server_proxy: str


@pytest.fixture(scope="package")
def as_installed() -> Iterator[None]:
    """Processes find the package where this one did, and use one thread each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="package")
def federations(tmp_path_factory, as_installed) -> tuple[Recorded, Recorded]:
    """The same federation as the documentation has it (TLS, node keys, proxies where there is nginx), and in the open."""
    with ThreadPoolExecutor() as threads:
        running = [threads.submit(run, tmp_path_factory.mktemp(run.__name__)) for run in (closed, in_the_open)]
        return running[0].result(), running[1].result()


def closed(home: Path) -> Recorded:
    keys, port, log = home / "keys", launch.free_port(), home / "server-proxy" / "fedgan.log"
    assert launch.main(["keys", str(keys), "--sites", str(SITES), "--host", "fedgan.example.org"]) == 0
    with launch._processes() as started, contextlib.ExitStack() as relays:
        started.append(launch.superlink(home, keys=keys, host="127.0.0.1", port=port))
        wires = {"to the SuperLink": opened(relays, port)}
        doors = [wires["to the SuperLink"].port] * SITES
        if nginx() is not None:
            ports = [launch.free_port() for _ in range(1 + SITES)]
            started.append(server_proxy(log.parent, keys=keys, superlink=doors[0], port=ports[0]))
            wires["between the proxies"] = between = opened(relays, ports[0])
            for number in range(SITES):
                own = {"number": number, "server": between.port, "port": ports[1 + number]}
                started.append(site_proxy(home / f"site-proxy{number}", keys=keys, **own))
            near = [opened(relays, port) for port in ports[1:]]
            wires |= {f"at site {number}": relay for number, relay in enumerate(near)}
            doors = [relay.port for relay in near]
        launch._await(port, keys, started[0])
        launch._register(home, keys, port)
        for number, door in enumerate(doors):
            node = {"client-id": number, "state": str(home / f"site{number}")}
            own = {"ca": keys / "ca.crt", "key": keys / f"site{number}", "tls": keys / f"site{number}.tls"}
            command = launch.supernode(superlink=f"localhost:{door}", port=launch.free_port(), node=node, **own)
            started.append(launch._start(command, home / f"site{number}", log="log"))
        code = launch._run(home, CONFIG, home / "run", OPTIONS)
    return Recorded(home / "run", code, copied(wires), log.read_text() if log.exists() else "")


def in_the_open(home: Path) -> Recorded:
    port = launch.free_port()
    with launch._processes() as started, contextlib.ExitStack() as relays:
        started.append(open_superlink(home, port=port))
        wires = {"to the SuperLink": opened(relays, port)}
        assert wait_for(lambda: answers(port), seconds=launch.START_SECONDS), (home / "superlink.log").read_text()
        for number in range(SITES):
            command = open_site_command(number, port=wires["to the SuperLink"].port, home=home)
            started.append(launch._start(command, home / f"site{number}", log="log"))
        code = launch._run(home, CONFIG, home / "run", OPTIONS)
    return Recorded(home / "run", code, copied(wires), "")


def opened(relays: contextlib.ExitStack, port: int) -> Relay:
    relay = Relay(port)
    relays.callback(relay.close)
    return relay


def copied(wires: dict[str, Relay]) -> dict[str, list[bytes]]:
    return {name: [bytes(stream) for stream in relay.streams] for name, relay in wires.items()}
