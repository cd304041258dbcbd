"""The generator's step at the server: one for all algorithms that take it there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.server import ServerModule


def step_generator(server: ServerModule, gradients: Sequence[Tensor | None]) -> None:
    """Step the module's generator at the server, clipped as the module says.

    Args:
        server: Holds the module and the optimizer called ``generator``.
        gradients: One for each parameter of the generator; ``None`` for one that had no part.

    Raises:
        ConfigurationError: If one is not finite.
    """
    model: Any = server.model
    found = [own for own in gradients if own is not None]
    if not all(bool(torch.isfinite(own).all()) for own in found):
        raise ConfigurationError(
            message(
                "the generator's gradient must be finite",
                received=f"one that is not, in round {server.rounds_completed}",
                fix="lower learning rates, add a penalty such as R1, or clip the discriminators' updates",
            )
        )
    most = getattr(model, "clip_gradient_norm", None)
    if most is not None and found:  # as torch.nn.utils.clip_grad_norm_ does
        factor = (most / (torch.nn.utils.get_total_norm(found) + 1e-6)).clamp(max=1.0)
        gradients = [None if own is None else own * factor for own in gradients]
    server.step("generator", list(model.generator.parameters()), gradients)
