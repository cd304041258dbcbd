"""The workloads of the speed comparison, and the hand-written loop that everything is compared with.

All engines do the same: FedGAN with the non-saturating loss and fresh Adam 2e-4 (.5, .999) on every client and round.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fedgan_lightning import GAN, FederatedDataModule
from fedgan_lightning.data.samples import Samples
from fedgan_lightning.data.sources import Source
from fedgan_lightning.networks import DCGANDiscriminator, DCGANGenerator, MLPDiscriminator, MLPGenerator

#: Minibatches that a client holds.
BATCHES_HELD = 4


@dataclass(frozen=True)
class Workload:
    """One row of the table."""

    title: str
    clients: int
    steps: int
    batch_size: int
    sample_shape: tuple[int, ...]
    networks: Callable[[], tuple[nn.Module, nn.Module]]

    @property
    def client_steps(self) -> int:
        return self.clients * self.steps


def mlp(latent: int, hidden: tuple[int, ...], shape: tuple[int, ...], output: str) -> Callable[[], Any]:
    def make() -> tuple[nn.Module, nn.Module]:
        generator = MLPGenerator(latent, shape, hidden=hidden, output=output)  # type: ignore[arg-type]
        return generator, MLPDiscriminator(shape, hidden=hidden[::-1])

    return make


def dcgan() -> tuple[nn.Module, nn.Module]:
    return DCGANGenerator(28, 1, latent_dim=64, width=32), DCGANDiscriminator(28, 1, width=32)


PIXELS = (1, 28, 28)
WORKLOADS = {
    "ring64": Workload("ring-8 MLP, 64 x 20, batch 64", 64, 20, 64, (2,), mlp(16, (64, 64), (2,), "linear")),
    "ring256": Workload("ring-8 MLP, 256 x 10, batch 32", 256, 10, 32, (2,), mlp(16, (64, 64), (2,), "linear")),
    "digits": Workload("digits MLP, 64 x 10, batch 64", 64, 10, 64, (1, 8, 8), mlp(64, (128, 128), (1, 8, 8), "tanh")),
    "mnist": Workload(
        "MNIST MLP, 16 x 16, batch 64", 16, 16, 64, (1, 28, 28), mlp(64, (256, 512), (1, 28, 28), "tanh")
    ),
    "dcgan": Workload("DCGAN 28 px, 8 x 10, batch 64", 8, 10, 64, (1, 28, 28), dcgan),
}


class Noise(Source):
    """Random samples of a shape: speed does not depend on what they show."""

    def __init__(self, sample_shape: tuple[int, ...], num_samples: int) -> None:
        self.sample_shape, self.num_samples, self.class_names = sample_shape, num_samples, ()

    def load(self, split: Any) -> Samples:
        generator = torch.Generator().manual_seed(0)
        if len(self.sample_shape) == 3:
            x = torch.randint(256, (self.num_samples, *self.sample_shape), generator=generator).to(torch.uint8)
        else:
            x = torch.randn(self.num_samples, *self.sample_shape, generator=generator)
        return Samples(x=x)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=2e-4, betas=(0.5, 0.999), fused=True)


def data(workload: Workload) -> FederatedDataModule:
    held = workload.clients * workload.batch_size * BATCHES_HELD
    return FederatedDataModule(
        Noise(workload.sample_shape, held), num_clients=workload.clients, batch_size=workload.batch_size
    )


def gan(workload: Workload) -> GAN:
    torch.manual_seed(0)
    return GAN(*workload.networks(), generator_optimizer=adam, discriminator_optimizer=adam)


class PlainLoop:
    """What a careful person writes without any framework: one client after the other, in place, nothing else.

    Float batches lie ready in memory; discriminator gradients are not computed in generator steps.
    """

    def __init__(self, workload: Workload) -> None:
        torch.manual_seed(0)
        self.workload = workload
        self.generator, self.discriminator = workload.networks()
        self.both = nn.ModuleList([self.generator, self.discriminator])
        self.state = copy.deepcopy(self.both.state_dict())
        held = (workload.clients, BATCHES_HELD, workload.batch_size, *workload.sample_shape)
        self.batches = torch.rand(held) * 2 - 1 if math.prod(held) < 5e7 else torch.rand(1, *held[1:]).expand(held)

    def client(self, batches: Tensor, steps: int) -> None:
        """Train the resident pair for ``steps``."""
        generator, discriminator = self.generator, self.discriminator
        latent, count = int(generator.latent_dim), batches.shape[1]  # type: ignore[arg-type]
        opt_g, opt_d = adam(generator.parameters()), adam(discriminator.parameters())
        for step in range(steps):
            x = batches[step % BATCHES_HELD]
            with torch.no_grad():
                fake = generator(torch.randn(count, latent))
            loss = softplus(-discriminator(x)).mean() + softplus(discriminator(fake)).mean()
            opt_d.zero_grad()
            loss.backward()
            opt_d.step()
            discriminator.requires_grad_(False)
            loss = softplus(-discriminator(generator(torch.randn(count, latent)))).mean()
            opt_g.zero_grad()
            loss.backward()
            opt_g.step()
            discriminator.requires_grad_(True)

    def round(self) -> None:
        """Train all clients from the same state, and average."""
        sums: dict[str, Tensor] = {}
        for client in range(self.workload.clients):
            self.both.load_state_dict(self.state)
            self.client(self.batches[client], self.workload.steps)
            for name, value in self.both.state_dict().items():
                if name in sums:
                    sums[name] += value
                else:
                    sums[name] = value.clone()
        self.state = {name: value / self.workload.clients for name, value in sums.items()}
