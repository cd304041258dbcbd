"""What each rule makes of unlike clients: the share of a class that all have, beside one that each has alone.

    python -m benchmarks.signature                       # every rule, three seeds
    python -m benchmarks.signature --rules UA-GAN F2U --seeds 0

Ten clients hold one kind of digit each, and as many digits of any kind with inverted pixels, which all have: half of
the mixture. With optimal discriminators a rule has one optimum, whose share of the common class is known (the tabular
test of tests/unit/test_feedback_rules.py). Samples are told apart by the sign of their mean pixel.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from fedgan_lightning import (
    GAN,
    Evaluation,
    FederatedDataModule,
    Federation,
    LastCheckpoint,
    SamplePictures,
    VectorizedExecutor,
)
from fedgan_lightning.algorithms import F2A, F2U, MDGAN, UAGAN, FedGAN, MeanDiscriminator
from fedgan_lightning.data.in_memory import ItemsSource
from fedgan_lightning.losses import R1, Minimax
from fedgan_lightning.networks import MLPDiscriminator, MLPGenerator
from fedgan_lightning.partitions import GivenIndices
from fedgan_lightning.sources import Digits, Samples

CLIENTS, EACH, BATCH = 10, 85, 32
FEEDBACK = {"generator": "server", "discriminator": "local"}
#: By rule its algorithm, placement, and the share that optimal discriminators give; FedGAN has no such optimum.
RULES = {
    "UA-GAN": (partial(UAGAN, num_samples=BATCH), FEEDBACK, 0.5),
    "MD-GAN": (partial(MDGAN, num_batches=1, num_samples=BATCH), FEEDBACK, 0.9311),
    "F2U": (partial(F2U, num_samples=BATCH), FEEDBACK, 1 / 11),
    "F2A": (partial(F2A, num_samples=BATCH), FEEDBACK, None),
    "mean of discriminators": (partial(MeanDiscriminator, num_samples=BATCH), FEEDBACK, 1.0),
    "FedGAN, K = 1": (FedGAN, {}, None),
}


def data(seed: int) -> FederatedDataModule:
    """Return ten clients with ``EACH`` digits of one kind and as many inverted ones of any kind."""
    digits = Digits().load("train")
    assert digits.y is not None
    order = torch.randperm(len(digits.y), generator=torch.Generator().manual_seed(seed))
    x, y = digits.x[order], digits.y[order]
    highest = int(x.max())
    parts, held, first = [], [], 0
    for kind in range(CLIENTS):
        own = x[y == kind][:EACH]
        inverted = highest - x[kind * EACH : (kind + 1) * EACH]
        parts += [own, inverted]
        held.append(range(first, first + len(own) + len(inverted)))
        first += len(own) + len(inverted)
    samples = Samples(torch.cat(parts))
    source = ItemsSource(samples, samples)
    return FederatedDataModule(source, partition=GivenIndices(held), num_clients=CLIENTS, batch_size=BATCH, seed=seed)


def gan(seed: int) -> GAN:
    """Return an unconditional GAN with the loss under which the optima are known."""
    torch.manual_seed(seed)
    slow, fast = (partial(torch.optim.Adam, lr=rate, betas=(0.0, 0.99)) for rate in (5e-4, 1e-3))
    return GAN(
        MLPGenerator(16, (1, 8, 8), hidden=(128, 128)),
        MLPDiscriminator((1, 8, 8), hidden=(128, 128)),
        loss=Minimax(),
        penalties=[R1(1.0)],
        generator_optimizer=slow,
        discriminator_optimizer=fast,
        ema_half_life_images=5000,
    )


def share(rule: str, *, seed: int, steps: int, local_steps: int) -> float:
    """Return the share of samples of the common class after so many generator steps."""
    make, sync, _ = RULES[rule]
    model = gan(seed)
    with tempfile.TemporaryDirectory() as folder:
        Federation(
            model,
            data(seed),
            rounds=steps,
            local_steps=1 if rule.startswith("FedGAN") else local_steps,
            algorithm=make(),
            sync=sync,
            executor=VectorizedExecutor(),
            evaluation=Evaluation(every_n_rounds=10**6, metrics=[]),
            pictures=SamplePictures(every_n_rounds=10**6),
            checkpoint=LastCheckpoint(every_n_rounds=10**6),
            run_dir=Path(folder) / "run",
            seed=seed,
            trainer={"accelerator": "cpu", "enable_progress_bar": False},
        ).fit()
        samples = model.sample(5000, generator=torch.Generator().manual_seed(seed))
    return float((samples.flatten(1).mean(1) > 0).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000, help="generator steps")
    parser.add_argument("--local_steps", type=int, default=2, help="steps of the discriminators for each of them")
    parser.add_argument("--out", default="runs/signature.json", help="where single runs are written, and found again")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    known = json.loads(out.read_text()) if out.exists() else {}
    for seed in arguments.seeds:
        for rule in arguments.rules:
            key = f"{rule}, seed {seed}, {arguments.steps} steps, L = {arguments.local_steps}"
            if key not in known:
                started = time.perf_counter()
                options = {"steps": arguments.steps, "local_steps": arguments.local_steps}
                known[key] = share(rule, seed=seed, **options)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(known, indent=2))
                print(f"{key}: {known[key]:.3f} ({time.perf_counter() - started:.0f} s)", file=sys.stderr, flush=True)
    print("| rule | share of the common class | predicted | seeds |\n|---|---|---|---|")
    for rule, (_, _, predicted) in RULES.items():
        ends = f"{arguments.steps} steps, L = {arguments.local_steps}"
        found = [known[key] for s in arguments.seeds if (key := f"{rule}, seed {s}, {ends}") in known]
        if found:
            spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
            expected = "" if predicted is None else f"{predicted:.3f}"
            print(f"| {rule} | {statistics.mean(found):.3f}{spread} | {expected} | {len(found)} |")


if __name__ == "__main__":
    main()
