"""Optimizer moments as flat tensors by parameter name, so that they can be kept, averaged and sent.

Names read ``optimizer/INDEX/PARAMETER/KEY``. Numbers that are not tensors become zero-dimensional ones.

torch counts the steps of most optimizers on the CPU, wherever the parameters are. Such numbers travel with the moments,
on the device, and are read and waited for on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, ReduceLROnPlateau

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation import namespaces
from fedgan_lightning.federation.namespaces import MOMENTS
from fedgan_lightning.protocol import State

Key = TypeVar("Key")
#: Metrics under this prefix are the positions of learning-rate schedules; reports of clients take them out.
SCHEDULE = "schedule/"
#: Numbers of torch's optimizers that count steps, or follow from the count: NAdam's product, ASGD's rates.
OF_STEPS = frozenset({"step", "mu_product", "eta", "mu"})
#: Positions of a schedule that are remembered: clients may differ under local epochs.
MOST_POSITIONS = 64


def is_optimizer_entry(name: str) -> bool:
    """Whether a name belongs to optimizer moments rather than to the module."""
    return name.startswith(MOMENTS)


def only_moments(state: State) -> dict[str, Tensor]:
    """Return the entries that are optimizer moments."""
    return {name: value for name, value in state.items() if is_optimizer_entry(name)}


def is_shared_number(name: str, value: Tensor) -> bool:
    """Whether an entry is one number for all clients of a stack: an optimizer's count of steps, or what follows it."""
    return is_optimizer_entry(name) and value.dim() == 0 and name.rpartition("/")[2] in OF_STEPS


def signature(moments: State) -> tuple[tuple[str, float | None], ...]:
    """Return what clients must have in common to be stacked: which moments they have, and their step counts."""
    return tuple(
        (name, float(value) if is_shared_number(name, value) else None) for name, value in sorted(moments.items())
    )


def together(numbers: Mapping[Key, Tensor], device: torch.device) -> dict[Key, Tensor]:
    """Return numbers, zero-dimensional tensors, on ``device``: by one copy for all, since each is waited for."""
    found = dict(numbers)
    away: dict[tuple[torch.device, torch.dtype], list[Key]] = {}
    for name, value in numbers.items():
        if value.device != device:
            away.setdefault((value.device, value.dtype), []).append(name)
    for names in away.values():
        found |= zip(names, torch.stack([numbers[name] for name in names]).to(device).unbind())
    return found


def with_counts_on_cpu(moments: State) -> dict[str, Tensor]:
    """Return moments with the step counts on the CPU, where :func:`signature` and optimizers read them."""
    counts = {name: value for name, value in moments.items() if is_shared_number(name, value)}
    return {**moments, **together(counts, torch.device("cpu"))}


def has_moments(optimizer: Optimizer) -> bool:
    """Whether what an optimizer keeps are tensors and numbers by parameter; histories of LBFGS are lists, and reset."""
    return all(
        value is None or isinstance(value, (Tensor, int, float))
        for state in optimizer.state.values()
        for value in state.values()
    )


def collect(
    module: nn.Module, optimizers: Sequence[Optimizer], policy: Mapping[str, str]
) -> dict[str, dict[str, Tensor]]:
    """Return copies of the moments, under ``average`` and ``keep``; those of parameters with another policy are left.

    All are on the device of the module, also those that the optimizers keep on the CPU.

    Args:
        module: Whose parameters they belong to.
        optimizers: Where they are.
        policy: What becomes of moments, by parameter.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found: dict[str, dict[str, Tensor]] = {"average": {}, "keep": {}}
    for index, optimizer in enumerate(optimizers):
        if not has_moments(optimizer):
            continue
        for parameter, state in optimizer.state.items():
            name = names.get(id(parameter))
            if name is None:
                continue  # of a parameter that the module does not register: it is nobody's but the client's
            chosen = found.get(policy[name])
            if chosen is None:
                continue
            for key, value in state.items():
                if value is not None:
                    # A count keeps its digits; other numbers come back from an optimizer in its parameter's dtype.
                    dtype = torch.float64 if key == "step" else parameter.dtype
                    tensor = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=dtype)
                    chosen[f"{MOMENTS}{index}/{name}/{key}"] = tensor.detach().clone()
    device = next(module.parameters()).device
    return {
        policy: {**moments, **together({n: v for n, v in moments.items() if not v.dim()}, device)}
        for policy, moments in found.items()
    }


def rows(moments: State, *, first: int, stop: int) -> dict[str, Tensor]:
    """Return the moments of clients ``first`` to ``stop`` of a stack, each with a leading dimension of clients."""
    return {
        name: value.expand(stop - first).clone() if is_shared_number(name, value) else value[first:stop]
        for name, value in moments.items()
    }


def keep_first(optimizer: Optimizer, count: int) -> None:
    """Cut the moments of stacked parameters down to the first ``count`` clients."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                state[key] = value[:count].clone()


def laid_out_like(parameter: Tensor, moment: Tensor) -> Tensor:
    """Return a moment in the memory layout of its parameter: fused optimizers take both as flat memory."""
    if moment.shape != parameter.shape or moment.stride() == parameter.stride():
        return moment
    return torch.empty_like(parameter, dtype=moment.dtype, device=moment.device).copy_(moment)


def restore(module: nn.Module, optimizers: Sequence[Optimizer], moments: State) -> None:
    """Load moments into fresh optimizers; parameters without moments start afresh.

    Step counts lie on the CPU afterwards, or on the device where an optimizer is fused or capturable: torch takes them
    as they are, and would wait for the device at every step of every parameter otherwise.
    """
    if not moments:
        return
    by_parameter: dict[tuple[int, str], dict[str, Tensor]] = {}
    for entry, value in with_counts_on_cpu(moments).items():
        number, name, key = namespaces.of_moment(entry)
        # Copied: optimizers load tensors as they are, and would train on moments that belong to all clients.
        by_parameter.setdefault((int(number), name), {})[key] = value.clone()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for index, optimizer in enumerate(optimizers):
        packed: dict[str, Any] = optimizer.state_dict()
        places = ((own, group) for group in optimizer.param_groups for own in group["params"])
        on_device: dict[torch.device, dict[int, Tensor]] = {}
        for position, (parameter, group) in enumerate(places):
            state = by_parameter.get((index, names.get(id(parameter), "")))
            if state is not None:
                packed["state"][position] = {key: laid_out_like(parameter, value) for key, value in state.items()}
                if "step" in state and (group.get("fused") or group.get("capturable")):
                    on_device.setdefault(parameter.device, {})[position] = state["step"]
        for device, counts in on_device.items():
            for position, count in together(counts, device).items():
                packed["state"][position]["step"] = count
        optimizer.load_state_dict(packed)
        for position, parameter in enumerate(own for group in optimizer.param_groups for own in group["params"]):
            for key, value in packed["state"].get(position, {}).items():
                if key in OF_STEPS - {"step"} and isinstance(value, Tensor) and not value.dim():
                    loaded = optimizer.state[parameter]  # in the parameter's dtype, which holds fewer digits
                    loaded[key] = value.to(loaded[key].device)


class ScheduleClock:
    """Puts fresh learning-rate schedules where earlier rounds left them.

    Clients are stateless as to schedules: the task says how many steps each schedule has taken. Replaying them is
    exact for any schedule; the last positions are remembered, so a round replays its own steps, once for all clients.
    What a client sets by hand is its own, and is remembered by nobody.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], dict[int, dict[str, Any]]] = {}

    def forward(self, schedulers: Sequence[Any], positions: Sequence[int], *, max_steps: int = -1) -> None:
        """Advance ``schedulers``, just constructed, to ``positions``.

        Args:
            schedulers: The schedules.
            positions: Steps that each has taken.
            max_steps: Steps of the client's whole run, on which a schedule's form may depend.
        """
        for index, (scheduler, position) in enumerate(zip(schedulers, positions)):
            if isinstance(scheduler, ReduceLROnPlateau):
                continue  # it follows a metric, and every client keeps its own
            known = self._known.setdefault((index, max_steps), {})
            nearest = max((own for own in known if own <= position), default=None)
            if nearest is not None and nearest > position_of(scheduler):
                scheduler.load_state_dict(_plain(known[nearest]["scheduler"]))
                for group, settings in zip(scheduler.optimizer.param_groups, known[nearest]["groups"]):
                    group.update(settings)
            while position_of(scheduler) < position:
                scheduler.optimizer._opt_called = True  # the steps were taken in earlier rounds; torch would warn
                scheduler.step()
            if position not in known:
                groups = [{k: v for k, v in own.items() if k != "params"} for own in scheduler.optimizer.param_groups]
                known[position] = {"scheduler": _plain(scheduler.state_dict()), "groups": groups}
                for stale in sorted(known)[:-MOST_POSITIONS]:
                    del known[stale]

    def positions(self, schedulers: Sequence[Any]) -> dict[str, float]:
        """Return where the schedules are, as metrics of an update."""
        return {f"{SCHEDULE}{index}": float(position_of(item)) for index, item in enumerate(schedulers)}


def position_of(scheduler: Any) -> int:
    """Return the steps that a schedule has taken.

    Raises:
        ConfigurationError: If it does not count them.
    """
    if isinstance(scheduler, ChainedScheduler):
        return position_of(scheduler._schedulers[0])
    if not hasattr(scheduler, "last_epoch"):
        raise ConfigurationError(
            message(
                "a federation must have schedules that count their steps",
                received=type(scheduler).__name__,
                fix="use SequentialLR, or one schedule",
            )
        )
    return int(scheduler.last_epoch)


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, list) else value for key, value in state.items()}


def optimizers_in(configured: Any) -> list[Optimizer]:
    """Return the optimizers in whatever form ``configure_optimizers`` gave them."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, dict):
        return optimizers_in(configured["optimizer"])
    if isinstance(configured, tuple) and len(configured) == 2 and isinstance(configured[0], (list, tuple)):
        return optimizers_in(configured[0])  # optimizers and schedules
    return [own for item in configured or () for own in optimizers_in(item)]


def stacked(values: Sequence[State]) -> dict[str, Tensor]:
    """Return tensors with a leading dimension of clients; numbers that all share (step counts) without it.

    A tensor that is the same object for all clients is repeated, not collected.

    Raises:
        ValueError: If clients have different entries.
    """
    found = {}
    for name, first in values[0].items():
        own = [state[name] for state in values]
        if is_shared_number(name, first):
            found[name] = first
        elif all(value is first for value in own):
            found[name] = first.unsqueeze(0).repeat(len(values), *([1] * first.dim()))
        else:
            found[name] = torch.stack([value.to(first.device) for value in own])
    return found
