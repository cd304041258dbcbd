"""Entries of a client's module that nobody trains, and whether that is true."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.policy import Policy


class Constants:
    """Entries that nobody trains, and a look at whether that is true.

    Args:
        module: The clients' module.
        policy: Says which they are.
    """

    def __init__(self, module: L.LightningModule, policy: Policy) -> None:
        self.module, state = module, module.state_dict()
        self._before = {name: state[name].detach().clone() for name in policy.constants if name in state}
        self._names = self._known()

    def check(self) -> None:
        """Refuse training that has changed one, or made something new: both would be lost with the round.

        Raises:
            ConfigurationError: If it has.
        """
        state = self.module.state_dict() if self._before else {}
        for name, before in self._before.items():
            if name not in state or not _is_same(state[name].to(before.device), before):
                raise ConfigurationError(
                    message(
                        "what training changes must be trained, or have a placement",
                        received=f"{name}, which nobody trains when the run begins",
                        fix=f"set federation.sync.{name} to average, or to local (every client its own)",
                    )
                )
        if made := sorted(self._known() - self._names):
            raise ConfigurationError(
                message(
                    "networks must be there before the first round, to be sent and averaged",
                    received=f"{made[0]}, which training made",
                    fix="make it in __init__, setup or configure_model",
                )
            )

    def _known(self) -> set[str]:
        names = {name for name, _ in self.module.named_modules()}
        return names | {name for name, _ in self.module.named_parameters()}


def _is_same(now: Tensor, before: Tensor) -> bool:
    """Whether two tensors are equal, where NaN is equal to itself, and sparse ones are what they stand for."""
    if now.layout is not torch.strided:
        now, before = now.to_dense(), before.to_dense()
    return torch.equal(now, before) or (
        now.shape == before.shape and bool(((now == before) | ((now != now) & (before != before))).all())
    )
