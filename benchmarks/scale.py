"""Whether a large population costs more than a small one: peak memory and time per round, at one cohort and data set.

    python -m benchmarks.scale                       # 100 and 10 000 clients, cohorts of 100
    python -m benchmarks.scale --optimizer_state keep --client_state disk

Each population runs in a process of its own, the two taking turns.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import torch

from benchmarks.bare import bare_trainer
from benchmarks.speed import TakeTurns, fixed, quiet
from benchmarks.workloads import adam
from fedgan_lightning import GAN, FederatedDataModule, FederatedOrchestrator, ServerModule
from fedgan_lightning.networks import MLPDiscriminator, MLPGenerator
from fedgan_lightning.provenance import described
from fedgan_lightning.samplers import FractionOfClients
from fedgan_lightning.sources import Ring

COHORT, BATCH, SAMPLES = 100, 32, 400_000


def child(population: int, rounds: int, optimizer_state: str, client_state: Any) -> None:
    """Run one population; print its figures."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    networks = MLPGenerator(16, (2,), hidden=(64, 64), output="linear"), MLPDiscriminator((2,), hidden=(64, 64))
    data = FederatedDataModule(Ring(num_samples=SAMPLES), num_clients=population, batch_size=BATCH)
    orchestrator = FederatedOrchestrator(
        rounds=rounds,
        local_steps=10,
        clients=FractionOfClients(COHORT / population),
        executor=fixed(COHORT, 1),
        optimizer_state=optimizer_state,
        client_state=client_state,
    )
    turns = TakeTurns(None)
    with tempfile.TemporaryDirectory() as folder:
        gan = GAN(*networks, generator_optimizer=adam, discriminator_optimizer=adam)
        bare_trainer(orchestrator, turns, default_root_dir=folder).fit(ServerModule(gan), datamodule=data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"MiB": peak, "seconds": statistics.median(turns.seconds[2:])}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--populations", type=int, nargs=2, default=[100, 10_000])
    parser.add_argument("--rounds", type=int, default=22)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--optimizer_state", default="average")
    parser.add_argument("--client_state", default="memory", choices=["memory", "disk"])
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet()
    if arguments.child:
        child(arguments.child, arguments.rounds, arguments.optimizer_state, arguments.client_state)
        return
    found: dict[int, list[dict[str, float]]] = {population: [] for population in arguments.populations}
    own = ["--rounds", str(arguments.rounds), "--optimizer_state", arguments.optimizer_state]
    own += ["--client_state", arguments.client_state]
    for _ in range(arguments.repeats):
        for population, runs in found.items():
            command = [sys.executable, "-m", "benchmarks.scale", "--child", str(population), *own]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append(json.loads(run.stdout.splitlines()[-1]))
    print(f"{described()}\n")
    print("| clients | peak memory, MiB | s/round |\n|---|---|---|")
    medians = {
        population: {key: statistics.median(run[key] for run in runs) for key in ("MiB", "seconds")}
        for population, runs in found.items()
    }
    for population, values in medians.items():
        print(f"| {population} | {values['MiB']:.0f} | {values['seconds']:.3f} |")
    small, large = (medians[population] for population in arguments.populations)
    print(f"| ratio | {large['MiB'] / small['MiB']:.2f} | {large['seconds'] / small['seconds']:.2f} |")


if __name__ == "__main__":
    main()
