"""The temperature of Gumbel-softmax, lowered from round to round by the server."""

from __future__ import annotations

from typing import Literal

import lightning as L
import torch
from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.options import checked


class TemperatureSchedule(L.Callback):
    """Sets the buffer ``temperature`` of the global generator before every round; it travels to clients with the state.

    With share t = round / (rounds - 1): exponential start (end / start)^t, linear start + (end - start) t. The outer
    Trainer's rounds count, so a run that is extended has a slower schedule from there on. Source: Nie et al. 2019
    (RelGAN), section 3.3, where 1 / temperature grows exponentially to 100 or 1000.

    Args:
        start: Temperature of the first round, > 0.
        end: Temperature of the last round, > 0.
        kind: ``exponential`` or ``linear``.

    Raises:
        ConfigurationError: If a temperature is not positive; on setup if the generator has none, or if buffers do not
            travel.
    """

    @checked(start="(0, inf)", end="(0, inf)")
    def __init__(
        self, *, start: float = 1.0, end: float = 0.01, kind: Literal["exponential", "linear"] = "exponential"
    ) -> None:
        self.start, self.end, self.kind = float(start), float(end), kind

    def temperature(self, round: int, rounds: int) -> float:
        """Return the temperature of ``round``, counted from 0, of ``rounds``."""
        share = min(round / max(rounds - 1, 1), 1.0)
        if self.kind == "linear":
            return self.start + (self.end - self.start) * share
        return float(self.start * (self.end / self.start) ** share)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        _buffer(pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set it: an epoch of the outer Trainer is a round."""
        buffer, now = _buffer(pl_module), self.temperature(trainer.global_step, trainer.max_steps)
        assert isinstance(pl_module, ServerModule)
        if "generator.temperature" not in pl_module.policy.shared_buffers:
            raise ConfigurationError(
                message(
                    "the temperature reaches clients as a shared buffer of an averaged generator",
                    received="federation.buffers or federation.sync that keep it from them",
                    fix="set buffers: merge, and the generator's sync to average",
                )
            )
        with torch.no_grad():
            buffer.fill_(now)
        for logger in trainer.loggers:
            logger.log_metrics({"round/temperature": now}, step=trainer.global_step)


def _buffer(module: L.LightningModule) -> Tensor:
    """Return the generator's temperature on the server."""
    model = module.model if isinstance(module, ServerModule) else None
    found = getattr(getattr(model, "generator", None), "temperature", None)
    if not isinstance(found, Tensor):
        raise ConfigurationError(
            message(
                "TemperatureSchedule sets the buffer temperature of a federated generator",
                received=f"{type(getattr(model, 'generator', model or module)).__name__} without one",
                fix="use TextGenerator, or leave the callback out",
            )
        )
    return found
