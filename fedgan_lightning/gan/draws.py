"""All randomness of one step of a network, drawn at once from one generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """What is drawn for one step of a network.

    Attributes:
        z: Latents (N, latent_dim).
        y: Labels to generate (N,), or conditions (N, ...).
        mix: Uniform numbers (N,), where a penalty interpolates.
        augment: Uniform numbers (2, N, k) for real and for generated samples, where they are augmented.
        condition: Uniform numbers (N, k) from which conditions are made, where there are any.
    """

    z: Tensor
    y: Tensor
    mix: Tensor | None = None
    augment: Tensor | None = None
    condition: Tensor | None = None

    @property
    def sides(self) -> tuple[Tensor | None, Tensor | None]:
        """The augmentation's numbers for real and for generated samples."""
        if self.augment is None:
            return None, None
        real, fake = self.augment.unbind(-3)
        return real, fake


def draw_step_noise(
    y: Tensor,
    *,
    latents: Callable[..., Tensor],
    latent_dim: int,
    fake_labels: str,
    num_classes: int,
    num_augment: int | None,
    num_condition: int | None,
    mix: bool,
    dtype: torch.dtype,
    generator: torch.Generator | None,
) -> Draws:
    """Return what one step needs, for as many samples as there are real ones.

    Args:
        y: Labels (N,) of the real samples.
        latents: Draws z: the method ``draw`` of a prior.
        latent_dim: Dimension of z.
        fake_labels: ``held`` takes ``y``, ``balanced`` draws from the classes in ``y``, ``all`` from all classes.
        num_classes: All classes; 0 where there are none.
        num_augment: Numbers per sample of an augmentation; ``None`` without one.
        num_condition: Numbers per sample of a condition; ``None`` without one.
        mix: Whether a penalty needs mixing weights (N,).
        dtype: Floating type of latents and weights.
        generator: Source of randomness on the device of ``y``; default the device's global generator.
    """
    count, device = len(y), y.device
    weights = torch.rand(count, generator=generator, device=device, dtype=dtype) if mix else None
    z = latents(count, latent_dim, generator=generator, device=device, dtype=dtype)
    if fake_labels != "held" and num_classes:
        y = _labels(y, among=num_classes, held_only=fake_labels == "balanced", generator=generator)
    where: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
    u = None if num_augment is None else torch.rand(2, count, num_augment, **where)
    condition = None if num_condition is None else torch.rand(count, num_condition, **where)
    return Draws(z=z, y=y, mix=weights, augment=u, condition=condition)


def _labels(y: Tensor, *, among: int, held_only: bool, generator: torch.Generator | None) -> Tensor:
    """Return as many labels as ``y`` has, drawn uniformly from all classes, or from those that are in ``y``.

    How many of these there are is not asked, since a device would have to be waited for.
    """
    if not held_only:
        return torch.randint(among, y.shape, device=y.device, generator=generator)
    upto = (y.unsqueeze(1) == torch.arange(among, device=y.device)).any(0).long().cumsum(0)  # how many up to each class
    places = torch.randint(2**32 - 1, y.shape, device=y.device, generator=generator) % upto[-1]
    return torch.searchsorted(upto, places, right=True)
