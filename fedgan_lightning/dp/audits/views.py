"""What a server has of an update: as it is, clipped, clipped and noised, or masked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedgan_lightning.options import Interval, check
from fedgan_lightning.seeding import make_generator

#: Parameters' gradients, or an update, by name.
Gradient = dict[str, Tensor]
#: What a server may have of an update, from most to least.
VIEWS = ("raw", "clipped", "noised", "masked")
#: Where the numbers of a protection lie.
PROTECTION_RANGES: tuple[tuple[str, Any, str], ...] = (
    ("clip", float, "(0, inf)"),
    ("noise_multiplier", float, "[0, inf)"),
    ("max_update", float, "(0, inf)"),
    ("seed", int, "[0, inf)"),
)
#: The ring of secure aggregation: integers modulo 2^32, and steps in the largest absolute entry of an update.
RING, STEPS = 2**32, 2.0**30


@dataclass(frozen=True)
class Protection:
    """What is done to an update before the server has it.

    Attributes:
        clip: Largest L2 norm C over all parameters.
        noise_multiplier: z: Gaussian noise of standard deviation z C on every entry, after clipping.
        max_update: Largest absolute entry that masking encodes, in the ring of secure aggregation.
        seed: Seed of noise and masks, which an attack on real protection would not know.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    clip: float = 1.0
    noise_multiplier: float = 1.0
    max_update: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind, interval in PROTECTION_RANGES:
            check(f"{name} of Protection", getattr(self, name), kind, within=Interval(interval))


def clipped(gradient: Mapping[str, Tensor], *, clip: float) -> Gradient:
    """Return an update of norm C at most: g min(1, C / |g|), |g| over all entries. A zero update stays one.

    Args:
        gradient: By name.
        clip: C, above 0.
    """
    factor = min(1.0, clip / max(norm_of(gradient), 1e-30))
    return {name: own * factor for name, own in gradient.items()}


def noised(gradient: Mapping[str, Tensor], *, deviation: float, generator: torch.Generator) -> Gradient:
    """Return an update with independent N(0, deviation^2) on every entry.

    Args:
        gradient: By name, on the CPU.
        deviation: Standard deviation; z C in differential privacy.
        generator: Source of the noise.
    """
    return {
        name: own + deviation * torch.randn(own.shape, generator=generator, dtype=own.dtype)
        for name, own in gradient.items()
    }


def masked(gradient: Mapping[str, Tensor], *, max_update: float, generator: torch.Generator) -> Gradient:
    """Return what a server decodes of a single masked update: uniform numbers, whatever the update was.

    Entries become integers, round(g 2^30 / max_update), and a uniform mask is added modulo 2^32, as in secure
    aggregation (Bonawitz et al. 2017). Only in a sum over all clients do masks cancel.

    Args:
        gradient: By name, on the CPU, entries of at most ``max_update``; larger ones are cut.
        max_update: Largest absolute entry.
        generator: Source of the masks.
    """
    step, found = max_update / STEPS, {}
    for name, own in gradient.items():
        whole = (own.double().clamp(-max_update, max_update) / step).round().long()
        shown = (whole + torch.randint(RING, own.shape, generator=generator)) % RING
        signed = torch.where(shown >= RING // 2, shown - RING, shown)
        found[name] = (signed.double() * step).to(own.dtype)
    return found


def views(gradient: Mapping[str, Tensor], protection: Protection, *, index: int = 0) -> dict[str, Gradient]:
    """Return what a server has of an update by :data:`VIEWS`; ``noised`` is clipped before, ``masked`` is neither.

    Args:
        gradient: By name, on the CPU.
        protection: Clip, noise and masks.
        index: Number of the update: each has noise and masks of its own.
    """
    cut = clipped(gradient, clip=protection.clip)
    noise, masks = (make_generator(protection.seed, purpose, index) for purpose in ("audit noise", "audit masks"))
    deviation = protection.noise_multiplier * protection.clip
    return {
        "raw": dict(gradient),
        "clipped": cut,
        "noised": noised(cut, deviation=deviation, generator=noise),
        "masked": masked(gradient, max_update=protection.max_update, generator=masks),
    }


def norm_of(gradient: Mapping[str, Tensor]) -> float:
    """Return the L2 norm of an update over all its entries."""
    return float(torch.stack([own.double().square().sum() for own in gradient.values()]).sum().sqrt())
