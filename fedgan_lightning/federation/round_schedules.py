"""Hyper-parameters that are functions of the round: learning rates, local steps, an algorithm's mu, a temperature.

The server evaluates them and sends the values with every task, so that a client need not know how many rounds there
are. What a name means:

===================== ===================================================================================
``local_steps``       local steps K, rounded to a whole number of at least 1
``learning_rate``     factor on all learning rates of clients
``learning_rate.NET`` factor on those of the network NET
``algorithm.NAME``    hyper-parameter NAME of the federation's algorithm, such as FedProx's ``mu``
any other             a number of the module by its dotted path: a buffer without dimensions, such as
                      ``generator.temperature``, or an attribute, such as ``penalties.0.gamma``
===================== ===================================================================================
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.options import checked

LOCAL_STEPS, LEARNING_RATE, OF_ALGORITHM = "local_steps", "learning_rate", "algorithm."


class RoundSchedule(ABC):
    """A number as a function of the round."""

    @abstractmethod
    def value(self, round: int, rounds: int) -> float:
        """Return the number for ``round``, counted from 0, of ``rounds``."""


class LinearRounds(RoundSchedule):
    """start + (end - start) t, with t = round / (rounds - 1).

    Args:
        start: Value of the first round.
        end: Value of the last round.
    """

    @checked()
    def __init__(self, *, start: float, end: float) -> None:
        self.start, self.end = float(start), float(end)

    def value(self, round: int, rounds: int) -> float:
        return self.start + (self.end - self.start) * _share(round, rounds)


class ExponentialRounds(RoundSchedule):
    """start (end / start)^t, with t = round / (rounds - 1); both ends are positive.

    For a temperature this is RelGAN's schedule (Nie et al. 2019, section 3.3), where 1 / temperature grows
    exponentially.

    Args:
        start: Value of the first round.
        end: Value of the last round.
    """

    @checked(start="(0, inf)", end="(0, inf)")
    def __init__(self, *, start: float = 1.0, end: float = 0.01) -> None:
        self.start, self.end = float(start), float(end)

    def value(self, round: int, rounds: int) -> float:
        return float(self.start * (self.end / self.start) ** _share(round, rounds))


class CosineRounds(RoundSchedule):
    """end + (start - end) (1 + cos(pi t)) / 2, with t = round / (rounds - 1).

    Args:
        start: Value of the first round.
        end: Value of the last round.
    """

    @checked()
    def __init__(self, *, start: float = 1.0, end: float = 0.0) -> None:
        self.start, self.end = float(start), float(end)

    def value(self, round: int, rounds: int) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * _share(round, rounds))) / 2


class StepRounds(RoundSchedule):
    """Constant between steps: the value of the last step at or before the round.

    Args:
        values: Value by the round from which on it counts; round 0 among them.

    Raises:
        ConfigurationError: If round 0 has no value.
    """

    @checked()
    def __init__(self, values: dict[int, float]) -> None:
        if 0 not in values or min(values) < 0:
            raise ConfigurationError(
                message("StepRounds.values must name rounds from 0 on", received=sorted(values), fix="add round 0")
            )
        self.values = {int(round): float(value) for round, value in sorted(values.items())}

    def value(self, round: int, rounds: int) -> float:
        return next(value for step, value in reversed(self.values.items()) if step <= round)


def _share(round: int, rounds: int) -> float:
    """Return how much of the run is over, from 0 in the first round to 1 in the last."""
    return min(round / max(rounds - 1, 1), 1.0)


def check_names(schedules: Mapping[str, RoundSchedule], *, module: nn.Module, algorithm: object) -> None:
    """Refuse schedules of what there is not.

    Raises:
        ConfigurationError: If a name is no hyper-parameter.
    """
    for name in schedules:
        if name in (LOCAL_STEPS, LEARNING_RATE):
            continue
        if name.startswith(OF_ALGORITHM):
            found = isinstance(getattr(algorithm, name.removeprefix(OF_ALGORITHM), None), (int, float))
        elif name.startswith(f"{LEARNING_RATE}."):
            found = name.removeprefix(f"{LEARNING_RATE}.") in dict(module.named_children())
        else:
            found = _number_at(module, name) is not None
        if not found:
            raise ConfigurationError(
                message(
                    f"federation.schedules must name {LOCAL_STEPS}, {LEARNING_RATE}, algorithm.X or a module's number",
                    received=name,
                    fix="write the dotted path of a number of the module, such as generator.temperature",
                )
            )


def local_steps_of(schedule: RoundSchedule, round: int, rounds: int) -> int:
    """Return the local steps of a round, at least 1."""
    return max(1, int(schedule.value(round, rounds) + 0.5))


def set_hyperparameters(module: nn.Module, values: Mapping[str, float]) -> None:
    """Set numbers of a module, or of a stack's, by their dotted paths; other hyper-parameters are not its business."""
    for name, value in values.items():
        if name == LOCAL_STEPS or name.split(".")[0] in (LEARNING_RATE, "algorithm"):
            continue
        *path, last = name.split(".")
        owner = _walk(module, path)
        current = getattr(owner, last)
        if isinstance(current, Tensor):
            with torch.no_grad():
                current.fill_(value)
        else:
            setattr(owner, last, type(current)(value))


def _number_at(module: nn.Module, name: str) -> Any:
    try:
        *path, last = name.split(".")
        found = getattr(_walk(module, path), last)
    except (AttributeError, IndexError, ValueError, TypeError):
        return None
    if isinstance(found, Tensor):
        return found if not found.dim() and not isinstance(found, nn.Parameter) else None
    return found if isinstance(found, (int, float)) and not isinstance(found, bool) else None


def _walk(owner: Any, path: Sequence[str]) -> Any:
    for part in path:
        owner = owner[int(part)] if isinstance(owner, Sequence) else getattr(owner, part)
    return owner
