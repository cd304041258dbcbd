"""Optimizer moments for a few bits a number: squares by their logarithms, means of gradients beside their squares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.namespaces import MOMENTS, of_moment
from fedgan_lightning.federation.transforms.codec import Forms, Section, UpdateCodec, draws
from fedgan_lightning.federation.transforms.dense import packed_bits, unpacked_bits
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import State, UpdateEntry
from fedgan_lightning.update_transform import RoundFacts

#: Means of squares, and what else is not negative.
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "exp_inf")
#: Means of gradients, by the squares that they are measured with.
MEAN, MEASURE = "exp_avg", "exp_avg_sq"
CODES, SCALE = "codes", "scale"
#: Octaves below the largest square that codes reach; what is smaller is sent as that.
OCTAVES = 24.0
ZERO_IS_SENT = "zero has a code of its own, so that a sign alone has none; set 0, which sends no means, or 2"


class LogMoments(UpdateCodec):
    """Sends squares on a grid of logarithms, over 24 octaves down from the largest, and means m as m / sqrt(v).

    The grid is the same for all clients in all rounds. Numbers go to one of their two neighbours at random, so that the
    mean over draws of a square is the square itself: rounded to the nearest, one that moves by less than half a step a
    round would never move. Zero stays zero, and squares stay squares. Other
    moments, such as the momentum of SGD and means without a mean of squares (Adamax), and step counts pass as they are.

    With 5 and 4 bits Adam's moments cost 9/32 of what the parameters cost, in place of twice as much.

    Args:
        bits: Of a square, in [3, 8].
        mean_bits: Of m / sqrt(v), whose magnitudes halve from one code to the next, in [2, 8]; with 4 they lie between
            1/16 and 4. 0 has clients begin with m = 0.
        down: Whether the server sends averaged moments in the same code.
    """

    allowed: ClassVar[tuple[Section, ...]] = ("moments",)

    @checked(bits="[3, 8]", mean_bits="[0, 8]")
    def __init__(self, *, bits: int = 5, mean_bits: int = 4, down: bool = True) -> None:
        super().__init__(sections=("moments",), down=down)
        if mean_bits == 1:
            raise ConfigurationError(
                message("LogMoments.mean_bits must be 0 or in [2, 8]", received=1, fix=ZERO_IS_SENT)
            )
        self.bits, self.mean_bits = bits, mean_bits

    # ------------------------------------------------------------------ one entry

    def forms(self, entry: UpdateEntry) -> Forms:
        return {CODES: (_bytes(entry, self.bits), torch.uint8), SCALE: ((), _wide(entry.dtype))}

    def _forms(self, name: str, entry: UpdateEntry, entries: Mapping[str, UpdateEntry]) -> Forms:
        key = of_moment(name)[2] if name.startswith(MOMENTS) else ""
        if key == MEAN and entry.shape and entry.dtype.is_floating_point and _square_of(name) in entries:
            return {CODES: (_bytes(entry, self.mean_bits), torch.uint8)}
        return super()._forms(name, entry, entries) if key in SQUARES else {}

    def encode(self, value: Tensor, *, name: str, facts: RoundFacts, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if of_moment(name)[2] == MEAN:
            if not self.mean_bits:
                return {CODES: torch.zeros(0, dtype=torch.uint8, device=value.device)}
            return {CODES: packed_bits(self._signed(value.flatten().double(), name, facts), bits=self.mean_bits)}
        top, flat = self._top(value), value.flatten().double()
        exact = (top.double().log2() - flat.log2()) / self.step
        lower = exact.ceil().clamp(0, self.most)  # the grid's number at or below it
        above = torch.exp2(-(lower - 1).clamp(min=0) * self.step) * top.double()
        below = torch.exp2(-lower * self.step) * top.double()
        up = _goes_up(flat, below, above, name, facts)
        codes = torch.where(flat > 0, (lower - up).clamp(min=0) + 1, 0.0)
        return {CODES: packed_bits(codes.long(), bits=self.bits), SCALE: top}

    def _signed(self, value: Tensor, name: str, facts: RoundFacts) -> Tensor:
        """Return codes of m / sqrt(v): 0 for zero, from the largest down for positive numbers, then for negative ones.

        Magnitudes halve from one code to the next. A grid of equal steps would have the noise of its large numbers for
        the small ones, too, which most are once learning rates have fallen.
        """
        size = value.abs().clamp(max=self.largest)
        lower = (math.log2(self.largest) - size.log2()).ceil().clamp(0, self.half)  # half itself stands for zero
        below = torch.where(lower < self.half, self.largest * torch.exp2(-lower), 0.0)
        above = self.largest * torch.exp2(-(lower - 1).clamp(min=0))
        place = (lower - _goes_up(size, below, above, name, facts)).clamp(min=0)
        codes = place + 1 + torch.where(value < 0, float(self.half), 0.0)
        return torch.where(place < self.half, codes, 0.0).long()

    def _top(self, value: Tensor) -> Tensor:
        """Return the largest number of the grid that is needed: a whole number of steps from 1.

        A grid that began at the largest square itself would be another one in every round and for every client, and
        squares that stand still would be drawn anew every time.
        """
        largest = value.max().double()
        steps = (largest.clamp(min=1e-300).log2() / self.step - 1e-4).ceil()
        top = torch.exp2(steps * self.step).to(_wide(value.dtype))
        return torch.where(largest > 0, top, 0.0).to(_wide(value.dtype))

    def restore(self, codes: Mapping[str, Tensor], entry: UpdateEntry, *, name: str, facts: RoundFacts) -> Tensor:
        size = int(torch.Size(entry.shape).numel())
        if SCALE in codes:
            steps = unpacked_bits(codes[CODES], bits=self.bits, count=size).double()
            found = torch.where(steps > 0, codes[SCALE].double() * torch.exp2((1 - steps) * self.step), 0.0)
        elif not self.mean_bits:
            found = torch.zeros(size, dtype=torch.float64, device=codes[CODES].device)
        else:
            numbers = unpacked_bits(codes[CODES], bits=self.mean_bits, count=size).clamp(0, 2 * self.half).double()
            sizes = self.largest * torch.exp2(-((numbers - 1) % self.half))
            found = torch.where(numbers > 0, torch.where(numbers > self.half, -sizes, sizes), 0.0)
        return found.to(entry.dtype).reshape(entry.shape)

    @property
    def most(self) -> int:
        """Steps of the grid below the largest number: one code is for zero."""
        return int(2**self.bits - 2)

    @property
    def half(self) -> int:
        """Magnitudes of m / sqrt(v) that have a code: one with either sign, and one code for zero."""
        return int(2 ** (self.mean_bits - 1) - 1)

    @property
    def largest(self) -> float:
        """The largest of them: half of all lie above 1/2, or nearly."""
        return float(2.0 ** ((self.half - 3) // 2))

    @property
    def step(self) -> float:
        """Octaves between two numbers of the grid."""
        return OCTAVES / self.most

    # ------------------------------------------------------------------ means beside their squares

    def client(
        self, update: State, *, entries: Mapping[str, UpdateEntry], private: State, facts: RoundFacts
    ) -> tuple[State, State]:
        values = dict(update)
        for name in self._means(update, entries):
            square = _square_of(name)
            codes = self.encode(update[square], name=square, facts=facts, state={})
            known = self.restore(codes, entries[square], name=square, facts=facts)
            values[name] = torch.where(known > 0, update[name] / known.clamp(min=1e-38).sqrt(), 0.0)
        return super().client(values, entries=entries, private=private, facts=facts)

    def decode(self, update: State, *, entries: Mapping[str, UpdateEntry], facts: RoundFacts) -> State:
        found = dict(super().decode(update, entries=entries, facts=facts))
        for name in self._means(found, entries):
            found[name] = found[name] * found[_square_of(name)].sqrt()
        return found

    def _means(self, state: State, entries: Mapping[str, UpdateEntry]) -> list[str]:
        """Return the means of a state whose squares are in it, too."""
        wanted = (name for name in entries if self.mean_bits and name.endswith(f"/{MEAN}"))
        return [name for name in wanted if name in state and _square_of(name) in state and entries[name].shape]


def _square_of(mean: str) -> str:
    return f"{mean.removesuffix(MEAN)}{MEASURE}"


def _goes_up(values: Tensor, below: Tensor, above: Tensor, name: str, facts: RoundFacts) -> Tensor:
    """Return 1 where a number goes to its upper neighbour, else 0, so that the mean over draws is the number."""
    chance = ((values - below) / (above - below).clamp(min=1e-300)).clamp(0, 1)
    uniform = torch.rand(values.shape, generator=draws(name, facts), dtype=torch.float64)
    return (uniform.to(values.device) < chance).double()


def _bytes(entry: UpdateEntry, bits: int) -> tuple[int, ...]:
    return (-(-int(torch.Size(entry.shape).numel()) * bits // 8),)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
