"""Whether a client's discriminator has unlearned the classes that the client does not hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.func import functional_call

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.orchestrator import FederatedOrchestrator
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.gan.steps import split_heads
from fedgan_lightning.hooks import completed_rounds
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import ClientUpdate, RoundInfo, State
from fedgan_lightning.seeding import make_generator

PREFIX = "discriminator."


class HeldAbsentGap(L.Callback):
    """Logs ``gap/held_minus_absent``: mean logit of clients' discriminators on held classes minus on absent ones.

    After its local steps each client's discriminator looks at held-out real samples: those of classes that the client
    holds, and those of classes that it does not. Both are real; a large gap says that the client has come to take
    unknown classes for fakes, and pushes the generator away from what others hold. Samples are the test split's, as the
    server has it, so nothing is asked of clients. Clients that hold all classes do not count.

    Args:
        every_n_rounds: Rounds between looks.
        num_samples: Held-out samples to look at, at most.

    Attributes:
        latest: The last value; ``None`` before the first look, or where every client holds every class.
    """

    @checked(every_n_rounds="[1, inf)", num_samples="[1, inf)")
    def __init__(self, *, every_n_rounds: int = 10, num_samples: int = 1000) -> None:
        self.every_n_rounds, self.num_samples = every_n_rounds, num_samples
        self.latest: float | None = None
        self._x, self._y = torch.empty(0), torch.empty(0)
        self._held: list[Tensor] = []
        self._sums = torch.zeros(2)  # sum of gaps, number of clients

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        model = getattr(pl_module, "model", None)
        if stage != "fit":
            return
        if not hasattr(model, "discriminator") or getattr(data, "num_classes", 0) < 2:
            raise ConfigurationError(
                message(
                    "HeldAbsentGap must have a discriminator and labelled data",
                    received=f"{type(model).__name__}, {getattr(data, 'num_classes', 0)} classes",
                    fix="take it out of trainer.callbacks",
                )
            )
        orchestrator = next((c for c in trainer.callbacks if isinstance(c, FederatedOrchestrator)), None)  # type: ignore[attr-defined]
        if getattr(orchestrator, "secure", None) is not None:
            raise ConfigurationError(
                message(
                    "HeldAbsentGap must see single updates",
                    received="secure aggregation, which hides them",
                    fix="take it out of trainer.callbacks",
                )
            )
        test = data.test_samples
        chosen = torch.randperm(len(test), generator=make_generator(0, "gap"))[: self.num_samples]
        self._x, self._y = test.take(chosen)
        self._held = [torch.from_numpy(row > 0) for row in data.label_counts()]

    def on_round_start(self, trainer: L.Trainer, server: ServerModule, info: RoundInfo) -> None:
        """Forget the round before."""
        self._sums = torch.zeros(2)

    def on_client_end(self, trainer: L.Trainer, server: ServerModule, update: ClientUpdate) -> None:
        """Look through a discriminator that travels: where the round began, plus the client's update."""
        if self._is_due(trainer) and server.policy.sync["discriminator"] == "average":
            start = server.model.state_dict()
            own = {n: start[n] + delta.to(start[n].device) for n, delta in update.delta.items() if n.startswith(PREFIX)}
            self._look(server, update.client_id, own)

    def on_round_end(self, trainer: L.Trainer, server: ServerModule, info: RoundInfo, metrics: Any) -> None:
        """Look through discriminators that stay on clients, and log."""
        if info.round % self.every_n_rounds != self.every_n_rounds - 1:
            return
        if server.policy.is_private("discriminator"):
            orchestrator = next(c for c in trainer.callbacks if isinstance(c, FederatedOrchestrator))  # type: ignore[attr-defined]
            for client_id in info.cohort:
                own = orchestrator.store.read(client_id)
                self._look(server, client_id, {n: v for n, v in own.items() if n.startswith(PREFIX)})
            total, count = self._sums.tolist()
        else:
            total, count = trainer.strategy.reduce(self._sums.to(server.device), reduce_op="sum").tolist()
        if count:
            self.latest = total / count
            for logger in trainer.loggers:
                logger.log_metrics({"gap/held_minus_absent": self.latest}, step=info.round + 1)

    def _is_due(self, trainer: L.Trainer) -> bool:
        return completed_rounds(trainer) % self.every_n_rounds == self.every_n_rounds - 1

    @torch.no_grad()
    def _look(self, server: ServerModule, client_id: int, entries: State) -> None:
        held = self._held[client_id][self._y]
        if not entries or bool(held.all()) or not bool(held.any()):
            return
        logits = self._logits(server.model.discriminator, entries, server.device)
        self._sums += torch.tensor([float(logits[held].mean() - logits[~held].mean()), 1.0])

    def _logits(self, discriminator: Any, entries: Mapping[str, Tensor], device: torch.device) -> Tensor:
        dtype = next(discriminator.parameters()).dtype
        values = {name.removeprefix(PREFIX): value.to(device) for name, value in entries.items()}
        inputs = (self._x.to(device, dtype), self._y.to(device))
        mode = discriminator.training
        try:
            logits, _ = split_heads(functional_call(discriminator.eval(), values, inputs))
        finally:
            discriminator.train(mode)
        return logits.flatten(1).mean(1).float().cpu()
