"""What happens around every step of a client's optimizers: another rate for a round, an algorithm's correction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.algorithm import FederatedAlgorithm
from fedgan_lightning.federation.client_update import Visit
from fedgan_lightning.federation.optimizer_state import ScheduleClock, restore
from fedgan_lightning.federation.round_schedules import rates_of
from fedgan_lightning.federation.round_trainer import schedulers_of
from fedgan_lightning.states import network_of


def begin(visit: Visit, trainer: L.Trainer, clock: ScheduleClock) -> None:
    """Prepare the optimizers of a visit's Trainer: moments, positions of schedules, and hooks around every step."""
    restore(visit.module, trainer.optimizers, visit.moments)
    clock.forward(schedulers_of(trainer), visit.positions, max_steps=visit.clock.max_steps)
    visit.optimizers = list(trainer.optimizers)
    visit.context.algorithm.check_optimizers(visit.optimizers)
    StepHooks(visit).attach()


class StepHooks:
    """Changes gradients for an algorithm, and learning rates for a round, around every step of the client's optimizers.

    It hangs on torch's own hooks, so that steps of raw optimizers pass through it as well as Lightning's. A step is
    given a closure by Lightning in which all other hooks and clipping happen; gradients are changed after that.

    Args:
        visit: Whose steps.
    """

    def __init__(self, visit: Visit) -> None:
        self.visit, self.algorithm = visit, visit.context.algorithm
        self.rates = rates_of(visit.tasks[0].hyperparameters)
        self._names: dict[int, str] = {}
        self._before: list[float | Tensor] = []

    def attach(self) -> None:
        """Hang on the optimizers of the visit, if there is anything to do."""
        if not self.rates and not self.algorithm.sees_steps:
            return
        self._names = {id(parameter): name for name, parameter in self.visit.module.named_parameters()}
        for optimizer in self.visit.optimizers:
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)

    def _before_step(self, optimizer: Optimizer, arguments: Any, options: Any) -> Any:
        self._before = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self._factor(group)
        closure = options.get("closure", arguments[1] if len(arguments) > 1 else None)
        if closure is None:
            self._change(optimizer)
            return None

        def changed() -> Any:
            found = closure()
            self._change(optimizer)
            return found

        return arguments[:1], {**options, "closure": changed}

    def _factor(self, group: Mapping[str, Any]) -> float:
        if not self.rates or not group["params"]:
            return 1.0
        network = network_of(self._names.get(id(group["params"][0]), ""))
        return self.rates.get("", 1.0) * self.rates.get(network, 1.0)

    @torch.no_grad()
    def _change(self, optimizer: Optimizer) -> None:
        """Hand the gradients of a step to the algorithm, and count the step."""
        gradients: dict[str, Tensor] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = self._names.get(id(parameter))
                if name is not None and parameter.grad is not None:
                    gradients[name] = parameter.grad
                    self.visit.path[name] = self.visit.path.get(name, 0.0) + float(group["lr"])
        if self.algorithm.sees_steps:
            self.algorithm.before_step(self.visit, gradients)

    def _after_step(self, optimizer: Optimizer, arguments: Any, options: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._before):
            group["lr"] = rate


def check_has_trained(algorithm: FederatedAlgorithm, has_trained: bool) -> None:
    """Refuse an algorithm whose work does not train: its clients would answer with what they were sent.

    Raises:
        ConfigurationError: If it did not.
    """
    if not has_trained:
        raise ConfigurationError(
            message(
                "an algorithm's work must call visit.fit exactly once",
                received=f"{type(algorithm).__name__}, which does not call it",
                fix="call visit.fit() in work",
            )
        )
