"""FedGAN's 2-D system with exact expectations: (theta, psi) at the sync instant, through orchestrator and executor.

    python -m benchmarks.toy2d [--steps-fast 3000 --steps-slow 12000]

Compared with an independent computation in NumPy of the same system, and with the stationary values of 60 000 steps.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from benchmarks.bare import bare_trainer
from fedgan_lightning import GAN, FederatedDataModule, FederatedOrchestrator, Natural, Segments, ServerModule
from fedgan_lightning.gan.networks import QuadraticDiscriminator, ScaleGenerator
from fedgan_lightning.gan.objectives import Minimax
from fedgan_lightning.gan.priors import MidpointNodes
from fedgan_lightning.provenance import described

#: Stationary (theta, psi), simultaneous updates, 60 000 steps, NumPy float64.
STATIONARY = {
    (1, 0.1): (1.00000, 0.00000),
    (5, 0.1): (0.99590, -0.00049),
    (20, 0.1): (0.98310, -0.01214),
    (50, 0.1): (0.96582, -0.09344),
    (1, 0.02): (1.00000, 0.00000),
    (5, 0.02): (0.99916, -0.00002),
    (20, 0.02): (0.99610, -0.00039),
    (50, 0.02): (0.99045, -0.00279),
}


def reference(local_steps: int, rate: float, steps: int) -> tuple[float, float]:
    """Return (theta, psi) after ``steps`` simultaneous steps of five clients, averaged every ``local_steps``."""
    z = -1 + 0.01 * (np.arange(200) + 0.5)
    x = z.reshape(5, 40)
    theta, psi = np.full((5, 1), 0.3), np.full((5, 1), 1.0)
    for step in range(1, steps + 1):
        fake = 1 / (1 + np.exp(-psi * theta**2 * z**2))
        g = (x**2 / (1 + np.exp(psi * x**2))).mean(1, keepdims=True) - (theta**2 * z**2 * fake).mean(1, keepdims=True)
        h = (2 * psi * theta * z**2 * fake).mean(1, keepdims=True)
        psi, theta = psi + rate * g, theta + rate * h
        if step % local_steps == 0:
            psi, theta = np.full((5, 1), psi.mean()), np.full((5, 1), theta.mean())
    return float(theta[0, 0]), float(psi[0, 0])


def federated(local_steps: int, rate: float, steps: int) -> tuple[float, float]:
    """The same through the framework."""

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=rate)

    gan = GAN(
        ScaleGenerator(0.3),
        QuadraticDiscriminator(1.0),
        loss=Minimax(),
        updates="simultaneous",
        prior=MidpointNodes(200),
        generator_optimizer=sgd,
        discriminator_optimizer=sgd,
    )
    data = FederatedDataModule(Segments(), partition=Natural("segment"), num_clients=5, batch_size=40)
    orchestrator = FederatedOrchestrator(rounds=steps // local_steps, local_steps=local_steps)
    trainer = bare_trainer(orchestrator, precision="64-true")
    trainer.fit(ServerModule(gan), datamodule=data)
    return float(gan.generator.theta.detach()), float(gan.discriminator.psi.detach())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps-fast", type=int, default=3000, help="local steps at learning rate .1")
    parser.add_argument("--steps-slow", type=int, default=12_000, help="local steps at learning rate .02")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{described()}\n")
    print("| K | lr | steps | theta | psi | error to the table | error to NumPy at the same step | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for (local_steps, rate), table in sorted(STATIONARY.items(), key=lambda item: (-item[0][1], -item[0][0])):
        steps = options.steps_fast if rate == 0.1 else options.steps_slow
        started = time.perf_counter()
        found = federated(local_steps, rate, steps)
        seconds = time.perf_counter() - started
        exact = reference(local_steps, rate, steps)
        errors = [max(abs(a - b) for a, b in zip(found, other)) for other in (table, exact)]
        print(
            f"| {local_steps} | {rate} | {steps} | {found[0]:.5f} | {found[1]:.5f} | {errors[0]:.1e} | {errors[1]:.1e}"
            f" | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
