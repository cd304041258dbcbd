"""Entries of a client's module that nobody trains, and whether that is true."""

from __future__ import annotations

import lightning as L
import torch

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.policy import Policy


class Constants:
    """Entries that nobody trains, and a look at whether that is true.

    Args:
        module: The clients' module.
        policy: Says which they are.
    """

    def __init__(self, module: L.LightningModule, policy: Policy) -> None:
        state = module.state_dict()
        self._values = {name: (state[name], state[name].detach().clone()) for name in policy.constants if name in state}

    def check(self) -> None:
        """Refuse training that has changed one: it would be lost with the round.

        Raises:
            ConfigurationError: If one has changed.
        """
        for name, (value, before) in self._values.items():
            if not torch.equal(value, before.to(value.device)):
                part = name.rpartition(".")[0] or name
                raise ConfigurationError(
                    message(
                        "what training changes must be trained, or have a placement",
                        received=f"{name}, which has no gradient when the run begins",
                        fix=f"set federation.sync.{part} to average, local (every client its own), or server",
                    )
                )
