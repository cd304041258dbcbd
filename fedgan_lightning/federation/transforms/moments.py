"""Optimizer moments for the price of a byte a number: squares by their logarithms, means of gradients not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fedgan_lightning.federation.namespaces import MOMENTS, of_moment
from fedgan_lightning.federation.transforms.codec import Forms, Section, UpdateCodec
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import UpdateEntry
from fedgan_lightning.update_transform import RoundFacts

#: Means of squares, and of what else is not negative.
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf")
#: Means of gradients: they are short, with beta1 = .5 after a handful of steps.
MEANS = ("exp_avg",)
CODES, SCALE, NOTHING = "codes", "scale", "nothing"
#: Octaves below the largest number that codes reach; what is smaller is sent as that.
OCTAVES = 32.0


class LogMoments(UpdateCodec):
    """Sends a mean of squares as round((log2 max v - log2 v) 254 / 32) in one byte, and no means of gradients.

    A number is off by 4.5 % at most, and zero stays zero, so that squares stay squares. Clients begin with a mean of
    gradients of zero, whose own beginning Adam does not correct for, as it goes by the step count. Other moments, such
    as the momentum of SGD, and step counts pass as they are.

    Args:
        down: Whether the server sends averaged moments in the same code.
    """

    allowed: ClassVar[tuple[Section, ...]] = ("moments",)

    @checked()
    def __init__(self, *, down: bool = True) -> None:
        super().__init__(sections=("moments",), down=down)

    def forms(self, entry: UpdateEntry) -> Forms:
        wide = torch.float64 if entry.dtype == torch.float64 else torch.float32
        return {CODES: (entry.shape, torch.uint8), SCALE: ((), wide)}

    def _forms(self, name: str, entry: UpdateEntry) -> Forms:
        key = of_moment(name)[2] if name.startswith(MOMENTS) else ""
        if key in MEANS and entry.shape and entry.dtype.is_floating_point:
            return {NOTHING: ((0,), torch.uint8)}
        return super()._forms(name, entry) if key in SQUARES else {}

    def encode(self, value: Tensor, *, name: str, facts: RoundFacts, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if of_moment(name)[2] in MEANS:
            return {NOTHING: torch.zeros(0, dtype=torch.uint8, device=value.device)}
        wide = value.to(torch.float64 if value.dtype == torch.float64 else torch.float32)
        top = wide.max().clamp(min=0)
        below = (top.double().log2() - wide.double().log2()) * (254 / OCTAVES)
        codes = torch.where(wide > 0, below.round().clamp(0, 254) + 1, 0.0)
        return {CODES: codes.to(torch.uint8), SCALE: top}

    def restore(self, codes: Mapping[str, Tensor], entry: UpdateEntry, *, name: str, facts: RoundFacts) -> Tensor:
        if NOTHING in codes:
            return torch.zeros(entry.shape, dtype=entry.dtype, device=codes[NOTHING].device)
        steps, top = codes[CODES].double(), codes[SCALE].double()
        return torch.where(steps > 0, top * torch.exp2((1 - steps) * (OCTAVES / 254)), 0.0).to(entry.dtype)
