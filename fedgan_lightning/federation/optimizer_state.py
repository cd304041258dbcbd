"""Optimizer moments as flat tensors by parameter name, so that they can be kept, averaged and sent.

Names read ``optimizer/INDEX/PARAMETER/KEY``. Numbers that are not tensors become zero-dimensional ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.protocol import State
from fedgan_lightning.states import network_of

PREFIX = "optimizer/"


def is_optimizer_entry(name: str) -> bool:
    """Whether a name belongs to optimizer moments rather than to the module."""
    return name.startswith(PREFIX)


def only_moments(state: State) -> dict[str, Tensor]:
    """Return the entries that are optimizer moments."""
    return {name: value for name, value in state.items() if is_optimizer_entry(name)}


def without_moments(state: State) -> dict[str, Tensor]:
    """Return the entries that belong to the module."""
    return {name: value for name, value in state.items() if not is_optimizer_entry(name)}


def network_of_entry(name: str) -> str:
    """Return the network whose moment an entry is."""
    return network_of(name.split("/")[2])


def is_shared_number(name: str, value: Tensor) -> bool:
    """Whether an entry is one number for all clients of a stack: the step count of an optimizer."""
    return is_optimizer_entry(name) and value.dim() == 0 and name.endswith("/step")


def signature(moments: State) -> tuple[tuple[str, float | None], ...]:
    """Return what clients must have in common to be stacked: which moments they have, and their step counts."""
    return tuple(
        (name, float(value) if is_shared_number(name, value) else None) for name, value in sorted(moments.items())
    )


def collect(module: nn.Module, optimizers: Sequence[Optimizer], wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Return copies of all moments of parameters whose names are ``wanted``."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = {}
    for index, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state.items():
            name = names[id(parameter)]
            if not wanted(name):
                continue
            for key, value in state.items():
                if value is not None:
                    tensor = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
                    found[f"{PREFIX}{index}/{name}/{key}"] = tensor.detach().clone()
    return found


def collect_stacked(module: nn.Module, optimizers: Sequence[Optimizer], *, first: int) -> dict[str, Tensor]:
    """Return all moments of clients ``first`` and later of a stacked module, with a leading dimension of clients."""
    count = len(next(module.parameters())) - first
    found = {}
    for name, value in collect(module, optimizers, lambda _: True).items():
        found[name] = value.expand(count).clone() if is_shared_number(name, value) else value[first:]
    return found


def keep_first(optimizer: Optimizer, count: int) -> None:
    """Cut the moments of stacked parameters down to the first ``count`` clients."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                state[key] = value[:count].clone()


def restore(module: nn.Module, optimizers: Sequence[Optimizer], moments: State) -> None:
    """Load moments into fresh optimizers; parameters without moments start afresh."""
    if not moments:
        return
    by_parameter: dict[tuple[int, str], dict[str, Tensor]] = {}
    for entry, value in moments.items():
        _, position, name, key = entry.split("/")
        # Copied: optimizers load tensors as they are, and would train on moments that belong to all clients.
        by_parameter.setdefault((int(position), name), {})[key] = value.clone()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for index, optimizer in enumerate(optimizers):
        ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        packed: dict[str, Any] = optimizer.state_dict()
        packed["state"] = {
            position: dict(by_parameter[index, names[id(parameter)]])
            for position, parameter in enumerate(ordered)
            if (index, names[id(parameter)]) in by_parameter
        }
        optimizer.load_state_dict(packed)


class ScheduleClock:
    """Puts fresh learning-rate schedules where earlier rounds left them.

    Clients are stateless as to schedules: the task says how many steps each schedule has taken. Replaying them is
    exact for any schedule; the last positions are remembered, so a round replays nothing.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], dict[str, Any]] = {}

    def forward(self, schedulers: Sequence[Any], positions: Sequence[int]) -> None:
        """Advance ``schedulers``, just constructed, to ``positions``."""
        for index, (scheduler, position) in enumerate(zip(schedulers, positions)):
            known = self._known.get((index, position))
            if known is not None:
                scheduler.load_state_dict(known["scheduler"])
                for group, settings in zip(scheduler.optimizer.param_groups, known["groups"]):
                    group.update(settings)
                continue
            while position_of(scheduler) < position:
                scheduler.optimizer._opt_called = True  # the steps were taken in earlier rounds; torch would warn
                scheduler.step()
            self.remember(index, scheduler)

    def remember(self, index: int, scheduler: Any) -> int:
        """Remember where a schedule is; return its position."""
        position = position_of(scheduler)
        if (index, position) in self._known:
            return position
        stale = [key for key in self._known if key[0] == index]
        for key in stale[:-1]:  # two positions suffice: where a round starts and where it ends
            del self._known[key]
        groups = [{k: v for k, v in group.items() if k != "params"} for group in scheduler.optimizer.param_groups]
        self._known[index, position] = {"scheduler": _plain(scheduler.state_dict()), "groups": groups}
        return position


def position_of(scheduler: Any) -> int:
    """Return the steps that a schedule has taken.

    Raises:
        ConfigurationError: If it does not count them.
    """
    if not hasattr(scheduler, "last_epoch"):
        raise ConfigurationError(
            message(
                "a federation continues schedules that count their steps",
                received=type(scheduler).__name__,
                fix="use SequentialLR, or one schedule",
            )
        )
    return int(scheduler.last_epoch)


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, list) else value for key, value in state.items()}
