"""A moving average that the server keeps of a network, for modules that keep none themselves."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.options import checked


class ServerAverage(L.Callback):
    """Moves a network of the global module towards another after every round: target += (1 - decay) (source - target).

    Set ``federation.sync`` of the target to ``server``, so that it does not travel.

    Args:
        source: The network that clients train, by its name in the module.
        target: The network that the average lies in, of the same form.
        decay: Share of the average that stays.

    Raises:
        ConfigurationError: If the module has no such networks, or they differ in form.
    """

    @checked("ServerAverage", decay="[0, 1)")
    def __init__(self, *, source: str, target: str, decay: float = 0.9) -> None:
        self.source, self.target, self.decay = source, target, decay

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, ServerModule):
            raise ConfigurationError(
                message(
                    "ServerAverage must be a callback of a federation's server",
                    received=f"a Trainer of {type(pl_module).__name__}",
                    fix="take it out, or fit a ServerModule",
                )
            )
        placements = {own for n, own in pl_module.policy.placements.items() if n.startswith(f"{self.target}.")}
        if placements - {"server"}:
            raise ConfigurationError(
                message(
                    "the target of ServerAverage must stay at the server",
                    received=f"federation.sync.{self.target}: {min(placements)}",
                    fix=f"set federation.sync.{self.target} to server",
                )
            )
        parts = dict(pl_module.model.named_modules())
        forms = []
        for option, name in (("source", self.source), ("target", self.target)):
            if name not in parts:
                raise ConfigurationError(
                    message(
                        f"{option} of ServerAverage must name a network of {type(pl_module.model).__name__}",
                        received=name,
                        fix="write its dotted path",
                    )
                )
            forms.append({key: value.shape for key, value in parts[name].state_dict().items()})
        if forms[0] != forms[1]:
            raise ConfigurationError(
                message(
                    "source and target of ServerAverage must have the same entries",
                    received=f"{self.source} and {self.target}, which differ",
                    fix="make the target a copy of the source",
                )
            )

    @torch.no_grad()
    def on_round_end(self, trainer: L.Trainer, server: ServerModule, info: Any, metrics: Any) -> None:
        """Move the average by a round."""
        parts = dict(server.model.named_modules())
        mine = parts[self.source].state_dict()
        for name, value in parts[self.target].state_dict().items():
            if value.is_floating_point():
                value.lerp_(mine[name].to(value), 1 - self.decay)
            else:
                value.copy_(mine[name])
