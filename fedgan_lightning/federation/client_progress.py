"""How far a client has come, where that is its own: steps under local epochs, and schedules that follow a metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fedgan_lightning.federation import namespaces
from fedgan_lightning.federation.client_update import Visit
from fedgan_lightning.federation.plain_state import decode, encode
from fedgan_lightning.federation.sampling import round_half_up
from fedgan_lightning.protocol import State


def own_clock(visit: Visit) -> None:
    """Let a visit begin where its client has come to itself: under local epochs clients take unequal steps.

    A client that was not asked for a while has come as far as its minibatches: the rest follows in proportion.
    """
    kept = namespaces.inside(namespaces.CLOCK, visit.stored)
    if not kept:
        return
    minibatches, steps, *positions = (float(value) for value in kept["counts"].tolist())
    share = visit.clock.minibatches / minibatches if minibatches else 1.0
    visit.clock = replace(visit.clock, global_step=round_half_up(steps * share))
    if visit.clock.minibatches == minibatches:
        visit.positions = tuple(int(position) for position in positions)


def counts(visit: Visit, steps: int, positions: Sequence[float]) -> dict[str, Tensor]:
    """Return how far a client has come after this round; nothing where the server knows it.

    Args:
        visit: The round.
        steps: Steps of its optimizers in it.
        positions: Steps that its schedules have taken in all.
    """
    if visit.tasks[0].epochs is None:
        return {}
    minibatches = visit.clock.minibatches + visit.infos[0].num_steps
    found = [float(minibatches), float(visit.clock.global_step + steps), *positions]
    return {f"{namespaces.CLOCK}counts": torch.tensor(found, dtype=torch.float64)}


def plateaus(schedulers: Sequence[Any]) -> dict[str, Tensor]:
    """Return what a client keeps of schedules that follow a metric: their state, and the rates that they set."""
    found: dict[str, Tensor] = {}
    for index, scheduler in enumerate(schedulers):
        if isinstance(scheduler, ReduceLROnPlateau):
            rates = [group["lr"] for group in scheduler.optimizer.param_groups]
            value = encode([scheduler.state_dict(), rates], what=type(scheduler).__name__)
            found |= namespaces.under(f"{namespaces.PLATEAU}{index}/", value)
    return found


def restore_plateaus(schedulers: Sequence[Any], private: State) -> None:
    """Give schedules that follow a metric what the client has kept of them."""
    for index, scheduler in enumerate(schedulers):
        kept = namespaces.inside(f"{namespaces.PLATEAU}{index}/", private)
        if kept and isinstance(scheduler, ReduceLROnPlateau):
            state, rates = decode(kept, None)
            scheduler.load_state_dict(state)
            for group, rate in zip(scheduler.optimizer.param_groups, rates):
                group["lr"] = rate
