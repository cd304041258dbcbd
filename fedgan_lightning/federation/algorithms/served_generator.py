"""The server trains the generator, clients train the discriminator."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.optim import Optimizer

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.algorithm import FederatedAlgorithm
from fedgan_lightning.federation.client_update import Visit
from fedgan_lightning.federation.generator_options import check_options
from fedgan_lightning.federation.generator_step import step_generator
from fedgan_lightning.federation.policy import Policy
from fedgan_lightning.federation.round_schedules import refuse_server_rates
from fedgan_lightning.federation.rules import RoundRules
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import Aggregate, Aggregator
from fedgan_lightning.seeding import make_generator


class ServedGenerator(FederatedAlgorithm):
    """Clients train D for K steps against the G that they were sent; the server averages D, then trains G for n steps.

    The generator never sees a gradient of a client's: it learns from the averaged discriminator alone, on noise. It is
    DP-FedAvg-GAN without clipping and noise. Source: Augenstein, McMahan, Ramage, Ramaswamy, Kairouz, Chen, Mathews,
    Agueera y Arcas 2020, algorithm 2.

    Place the generator with ``sync: {generator: served}``. The server's steps of G use the module's own generator
    optimizer, whose state is in the checkpoint under the name ``generator``.

    Args:
        generator_steps: Steps n of G after every round.
        num_samples: Samples of each step; their noise follows from the federation's seed and the round.
    """

    trains = frozenset({"served"})

    @checked(generator_steps="[1, inf)", num_samples="[1, inf)")
    def __init__(self, *, generator_steps: int = 1, num_samples: int = 64) -> None:
        self.generator_steps, self.num_samples = generator_steps, num_samples

    def check(self, *, policy: Policy, aggregator: Aggregator, rules: RoundRules) -> None:
        super().check(policy=policy, aggregator=aggregator, rules=rules)
        if policy.sync.get("generator") != "served":
            raise ConfigurationError(
                message(
                    "ServedGenerator must have the generator at the server",
                    received=f"sync.generator: {policy.sync.get('generator')}",
                    fix="set federation.sync to {generator: served}",
                )
            )

    def check_schedules(self, names: Collection[str]) -> None:
        refuse_server_rates(names, who=type(self).__name__)

    def work(self, visit: Visit) -> None:
        visit.fit_discriminator()

    def server_optimizers(self, server: ServerModule) -> dict[str, Optimizer]:
        model: Any = server.model
        if not hasattr(model, "generator_loss") or not hasattr(model, "generator_optimizer"):
            raise ConfigurationError(
                message(
                    "ServedGenerator must have a module with generator_loss and generator_optimizer",
                    received=f"{type(model).__name__} without them",
                    fix="add them (see fedgan_lightning.gan.abilities), or use another algorithm",
                )
            )
        check_options(model, who="ServedGenerator")
        if hasattr(model, "check_needs_no_reals"):
            model.check_needs_no_reals()
        return {"generator": model.generator_optimizer(model.generator.parameters())}

    def server_step(self, server: ServerModule, total: Aggregate) -> None:
        super().server_step(server, total)
        model: Any = server.model
        parameters = list(model.generator.parameters())
        noise = make_generator(server.seed, "served generator", server.rounds_completed)
        training = model.training
        model.train()
        for _ in range(self.generator_steps):
            loss = model.generator_loss(self.num_samples, generator=noise)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            step_generator(server, gradients)
        model.train(training)
