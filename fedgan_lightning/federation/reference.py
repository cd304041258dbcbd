"""What a client's update must look like, from what the server knows itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fedgan_lightning import states
from fedgan_lightning.federation import optimizer_state
from fedgan_lightning.federation.local import ClientContext, client_copy
from fedgan_lightning.protocol import State


def expected_update(context: ClientContext, state: State) -> dict[str, State]:
    """Return ``delta`` and ``extras`` as clients that are sent ``state`` answer: entries, shapes and dtypes."""
    policy = context.policy
    buffers = states.encode_statistics({name: state[name] for name in policy.shared_buffers}, policy.entries)
    moments = optimizer_state.only_moments(state)
    if not moments and "average" in policy.optimizer_state.values():
        moments = _first_moments(context)
    return {"delta": {name: state[name] for name in policy.shared_parameters}, "extras": {**buffers, **moments}}


def _first_moments(context: ClientContext) -> dict[str, Tensor]:
    """Return the moments that optimizers have after one step, here one on zero gradients."""
    client = client_copy(context.model, context.policy)
    optimizers = list(_optimizers(client.configure_optimizers()))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return optimizer_state.collect(client, optimizers, context.policy.optimizer_state)["average"]


def _optimizers(configured: Any) -> list[Optimizer]:
    """Return the optimizers in whatever form ``configure_optimizers`` gave them."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, dict):
        return _optimizers(configured["optimizer"])
    if isinstance(configured, tuple) and len(configured) == 2 and isinstance(configured[0], (list, tuple)):
        return _optimizers(configured[0])  # optimizers and schedules
    return [own for item in configured or () for own in _optimizers(item)]
