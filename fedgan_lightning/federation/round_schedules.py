"""Hyper-parameters that are functions of the round: learning rates, local steps, an algorithm's mu, a temperature.

The server evaluates them and sends the values with every task, so that a client need not know how many rounds there
are. What a name means:

===================== ===================================================================================
``local_steps``       local steps K, rounded to a whole number of at least 1
``learning_rate``     factor on all learning rates of clients
``learning_rate.NET`` factor on those of the network NET
``algorithm.NAME``    hyper-parameter NAME of the algorithm, one of its ``scheduled``, such as FedProx's ``mu``
any other             a number of the module by its dotted path: a buffer without dimensions, such as
                      ``generator.temperature``, or an attribute, such as ``penalties.0.gamma``
===================== ===================================================================================
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.sampling import round_half_up
from fedgan_lightning.options import checked

LOCAL_STEPS, LEARNING_RATE, ALGORITHM, MODULE = "local_steps", "learning_rate", "algorithm", "module"


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


def target_of(name: str) -> tuple[str, str]:
    """Return what a hyper-parameter belongs to, and its name there; an empty one for local steps and all rates."""
    head, _, rest = name.partition(".")
    if name == LOCAL_STEPS or head == LEARNING_RATE or (head == ALGORITHM and rest):
        return head, rest
    return MODULE, name


def refuse_server_rates(names: Collection[str], *, who: str) -> None:
    """Refuse schedules of rates of a generator that the server trains, which clients alone would follow.

    Raises:
        ConfigurationError: If there are any.
    """
    wrong = [name for name in names if name in (LEARNING_RATE, f"{LEARNING_RATE}.generator")]
    if wrong:
        raise ConfigurationError(
            message(
                f"under {who} the generator's learning rate is the server's",
                received=f"federation.schedules.{wrong[0]}",
                fix=f"schedule {LEARNING_RATE}.discriminator, and set server.scheduler for the generator",
            )
        )


def check_names(
    schedules: Mapping[str, RoundSchedule], *, module: nn.Module, scheduled: frozenset[str], has_epochs: bool
) -> None:
    """Refuse schedules of what there is not.

    Args:
        schedules: By name.
        module: The clients'.
        scheduled: Hyper-parameters of the algorithm that may change.
        has_epochs: Whether local work is counted in epochs.

    Raises:
        ConfigurationError: If a name is no hyper-parameter.
    """
    if has_epochs and LOCAL_STEPS in schedules:
        raise ConfigurationError(
            message(
                "local work must be counted in steps or in epochs",
                received=f"federation.local_epochs beside a schedule of {LOCAL_STEPS}",
                fix="take one of the two out",
            )
        )
    for name in schedules:
        kind, rest = target_of(name)
        known = {LOCAL_STEPS: {""}, LEARNING_RATE: {"", *dict(module.named_children())}, ALGORITHM: scheduled}
        found = rest in known[kind] if kind in known else _number_at(module, name) is not None
        if not found or name.endswith("."):
            own = ", ".join(f"{ALGORITHM}.{one}" for one in sorted(scheduled)) or "nothing of this algorithm"
            raise ConfigurationError(
                message(
                    f"federation.schedules must name {LOCAL_STEPS}, {LEARNING_RATE}, {own}, or a module's number",
                    received=name or "an empty name",
                    fix="write the dotted path of a number of the module, such as generator.temperature",
                )
            )


def steps_of(schedules: Mapping[str, RoundSchedule], round: int, rounds: int) -> dict[str, int]:
    """Return the fields of a task about local steps: those of this round, at least 1, before it and in all.

    Without a schedule of theirs there are none.
    """
    if LOCAL_STEPS not in schedules:
        return {}
    values = (schedules[LOCAL_STEPS].value(own, rounds) for own in range(max(rounds, round + 1)))
    steps = [max(1, round_half_up(value)) for value in values]
    return {"steps": steps[round], "before": sum(steps[:round]), "total": sum(steps)}


def rates_of(hyperparameters: Mapping[str, float]) -> dict[str, float]:
    """Return factors on learning rates by network; under an empty name that on all of them."""
    targets = {target_of(name): value for name, value in hyperparameters.items()}
    return {network: value for (kind, network), value in targets.items() if kind == LEARNING_RATE}


def most_steps(federation: Any) -> int | None:
    """Return the most local steps of a round in a configuration, whatever its schedule says of single rounds."""
    rounds = range(federation.rounds)
    scheduled = [steps_of(federation.schedules, own, federation.rounds).get("steps", 0) for own in rounds]
    return max(scheduled, default=0) or federation.local_steps


def set_hyperparameters(module: nn.Module, values: Mapping[str, float]) -> None:
    """Set numbers of a module, or of a stack's, by their dotted paths; other hyper-parameters are not its business."""
    for name, value in values.items():
        if target_of(name)[0] != MODULE:
            continue
        *path, last = name.split(".")
        owner = _walk(module, path)
        current = getattr(owner, last)
        if isinstance(current, Tensor):
            with torch.no_grad():
                current.fill_(value)
        else:
            setattr(owner, last, round_half_up(value) if isinstance(current, int) else float(value))


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
