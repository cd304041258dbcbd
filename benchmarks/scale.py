"""Whether a large population costs more than a small one: peak memory and time per round, at one cohort and data set.

    python -m benchmarks.scale                       # 100 and 10 000 clients, cohorts of 100
    python -m benchmarks.scale --optimizer_state keep

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

import torch

from benchmarks.speed import TakeTurns, fixed, quiet
from benchmarks.workloads import adam
from fedgan_lightning import (
    GAN,
    FederatedDataModule,
    FederatedOrchestrator,
    FractionOfClients,
    MLPDiscriminator,
    MLPGenerator,
    Ring,
    ServerModule,
)

COHORT, BATCH, SAMPLES = 100, 32, 400_000


def child(population: int, rounds: int, optimizer_state: str) -> None:
    """Run one population; print its figures."""
    import lightning as L

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
    )
    turns = TakeTurns(None)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            callbacks=[orchestrator, turns],
            default_root_dir=folder,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(
            ServerModule(GAN(*networks, generator_optimizer=adam, discriminator_optimizer=adam)), datamodule=data
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"MiB": peak, "seconds": statistics.median(turns.seconds[2:])}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--populations", type=int, nargs=2, default=[100, 10_000])
    parser.add_argument("--rounds", type=int, default=22)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--optimizer_state", default="average")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet()
    if arguments.child:
        child(arguments.child, arguments.rounds, arguments.optimizer_state)
        return
    found: dict[int, list[dict[str, float]]] = {population: [] for population in arguments.populations}
    own = ["--rounds", str(arguments.rounds), "--optimizer_state", arguments.optimizer_state]
    for _ in range(arguments.repeats):
        for population, runs in found.items():
            command = [sys.executable, "-m", "benchmarks.scale", "--child", str(population), *own]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append(json.loads(run.stdout.splitlines()[-1]))
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
