"""FedGAN's 2-D system with exact expectations: (theta, psi) at the sync instant, through orchestrator and executor.

    python -m benchmarks.toy2d [--steps-fast 3000 --steps-slow 12000]
    python -m benchmarks.toy2d --algorithm Scaffold [--executor vectorized] [--sizes 1 2 4 1 1]

FedGAN is compared with an independent computation in NumPy of the same system, and with the stationary values of 60 000
steps; FedProx (mu = 1) and Scaffold with their own stationary points.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from benchmarks.bare import bare_trainer
from fedgan_lightning import (
    GAN,
    FederatedDataModule,
    FederatedOrchestrator,
    SequentialExecutor,
    ServerModule,
    VectorizedExecutor,
)
from fedgan_lightning.federation import algorithms
from fedgan_lightning.federation.algorithms import FedProx
from fedgan_lightning.gan.networks import QuadraticDiscriminator, ScaleGenerator
from fedgan_lightning.gan.objectives import Minimax
from fedgan_lightning.gan.priors import MidpointNodes
from fedgan_lightning.partitions import Natural
from fedgan_lightning.provenance import described
from fedgan_lightning.sources import Segments

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


#: The same of other algorithms at learning rate .1: FedProx with mu = 1, Scaffold.
STATIONARY_OF = {
    "FedProx": {1: (1.0, 0.0), 5: (0.99592, -0.00045), 20: (0.98680, -0.00459), 50: (0.98198, -0.00763)},
    "Scaffold": {1: (1.0, 0.0), 5: (1.0, 0.0), 20: (1.0, 0.0), 50: (1.0, 0.0)},
}
#: Steps to those points. FedProx with K = 50 goes on to (.98210, -.00762), which it reaches after 10 000.
STEPS_OF = {"FedProx": 5000, "Scaffold": 8000}
#: K = 1 with N = 1, 2, 4, 1, 1 of 40 samples: what every K should reach.
UNEQUAL = (0.7917, 0.0)


def reference(
    local_steps: int, rate: float, steps: int, *, mu: float = 0.0, controls: bool = False, sizes=(1, 1, 1, 1, 1)
) -> tuple[float, float]:
    """Return (theta, psi) after ``steps`` simultaneous steps of five clients, averaged every ``local_steps``.

    Args:
        local_steps: K.
        rate: Learning rate.
        steps: Local steps in all.
        mu: FedProx's weight.
        controls: Whether clients are corrected by SCAFFOLD's controls.
        sizes: N_k over 40.
    """
    z = -1 + 0.01 * (np.arange(200) + 0.5)
    x, share = z.reshape(5, 40), np.array(sizes, dtype=float)[:, None] / sum(sizes)
    theta, psi = np.full((5, 1), 0.3), np.full((5, 1), 1.0)
    starts, own = (theta, psi), [np.zeros((5, 1)), np.zeros((5, 1))]
    for step in range(1, steps + 1):
        fake = 1 / (1 + np.exp(-psi * theta**2 * z**2))
        g = (x**2 / (1 + np.exp(psi * x**2))).mean(1, keepdims=True) - (theta**2 * z**2 * fake).mean(1, keepdims=True)
        h = (2 * psi * theta * z**2 * fake).mean(1, keepdims=True)
        g, h = g - mu * (psi - starts[1]), h - mu * (theta - starts[0])
        if controls:  # of ascent directions: theta's, psi's
            h, g = (d + (share * c).sum() - c for d, c in zip((h, g), own))
        psi, theta = psi + rate * g, theta + rate * h
        if step % local_steps == 0:
            if controls:
                moved = [(now - then) / (local_steps * rate) for now, then in zip((theta, psi), starts)]
                own = [c - (share * c).sum() + m for c, m in zip(own, moved)]
            psi, theta = (np.full((5, 1), (share * own_value).sum()) for own_value in (psi, theta))
            starts = (theta, psi)
    return float(theta[0, 0]), float(psi[0, 0])


def federated(
    local_steps: int,
    rate: float,
    steps: int,
    *,
    algorithm: str = "FedGAN",
    executor: str = "sequential",
    sizes: tuple[int, ...] = (1, 1, 1, 1, 1),
    transforms: tuple = (),
    sampler: object = None,
) -> tuple[float, float]:
    """Return (theta, psi) after ``steps`` local steps of five clients through the framework."""
    gan, _, _ = run(
        local_steps, rate, steps, algorithm=algorithm, executor=executor, sizes=sizes, transforms=transforms,
        sampler=sampler,
    )  # fmt: skip
    return float(gan.generator.theta.detach()), float(gan.discriminator.psi.detach())


def run(
    local_steps: int,
    rate: float,
    steps: int,
    *,
    algorithm,
    executor,
    sizes=(1, 1, 1, 1, 1),
    transforms=(),
    sampler=None,
):
    """Train, and return the GAN, the server and the orchestrator."""

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
    data = Sized(Segments(), partition=Natural("segment"), num_clients=5, batch_size=40)
    data.sizes = sizes
    chosen = {"FedProx": lambda: FedProx(mu=1.0)}.get(algorithm, getattr(algorithms, algorithm))()
    orchestrator = FederatedOrchestrator(
        rounds=steps // local_steps,
        local_steps=local_steps,
        algorithm=chosen,
        transforms=list(transforms),
        clients=sampler,
        executor={"sequential": SequentialExecutor, "vectorized": VectorizedExecutor}[executor](),
    )
    server = ServerModule(gan)
    bare_trainer(orchestrator, precision="64-true").fit(server, datamodule=data)
    return gan, server, orchestrator


class Sized(FederatedDataModule):
    """Counts every sample of a client several times: N_k differ, and minibatches do not."""

    sizes: tuple[int, ...] = ()

    def num_examples(self, client_id: int) -> int:
        return super().num_examples(client_id) * self.sizes[client_id]


def other(options: argparse.Namespace) -> None:
    """Print the stationary points of another algorithm beside those expected."""
    sizes, steps = tuple(options.sizes), options.steps_fast or STEPS_OF[options.algorithm]
    print(f"{described()}\n\n| K | executor | theta | psi | error | seconds |\n|---|---|---|---|---|---|")
    for local_steps in options.local_steps:
        expected = STATIONARY_OF[options.algorithm][local_steps]
        if len(set(sizes)) > 1:
            expected = UNEQUAL
        for executor in options.executor:
            started = time.perf_counter()
            found = federated(local_steps, 0.1, steps, algorithm=options.algorithm, executor=executor, sizes=sizes)
            error = max(abs(a - b) for a, b in zip(found, expected))
            row = f"| {local_steps} | {executor} | {found[0]:.7f} | {found[1]:.7f} | {error:.1e}"
            print(f"{row} | {time.perf_counter() - started:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--steps-fast", type=int, help="local steps at learning rate .1; by default what the table needs"
    )
    parser.add_argument("--steps-slow", type=int, default=12_000, help="local steps at learning rate .02")
    parser.add_argument("--algorithm", default="FedGAN", choices=["FedGAN", *STATIONARY_OF])
    parser.add_argument("--executor", nargs="+", default=["sequential", "vectorized"])
    parser.add_argument("--local-steps", type=int, nargs="+", default=[1, 5, 20, 50], choices=[1, 5, 20, 50], help="K")
    parser.add_argument("--sizes", type=int, nargs=5, default=[1, 1, 1, 1, 1], help="N_k over 40, of each client")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.algorithm != "FedGAN":
        other(options)
        return
    print(f"{described()}\n")
    print("| K | lr | steps | theta | psi | error to the table | error to NumPy at the same step | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for (local_steps, rate), table in sorted(STATIONARY.items(), key=lambda item: (-item[0][1], -item[0][0])):
        steps = (options.steps_fast or 3000) if rate == 0.1 else options.steps_slow
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
