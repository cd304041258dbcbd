"""Optimizer moments for a few bits a number: squares by their logarithms, means of gradients beside their squares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.namespaces import MOMENTS, of_moment
from fedgan_lightning.federation.transforms.codec import Down, Forms, Section, UpdateCodec, draws, wide
from fedgan_lightning.federation.transforms.dense import packed_bits, unpacked_bits
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import State, UpdateEntry
from fedgan_lightning.update_transform import RoundFacts

#: Means of squares, and what else is not negative.
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "exp_inf")
#: Means of gradients, by the squares that bound them.
MEASURES = {"exp_avg": "exp_avg_sq", "grad_avg": "square_avg"}
CODES, SCALE = "codes", "scale"
#: Octaves below the largest square, and below the largest m / sqrt(v), that codes reach.
OCTAVES, MEAN_OCTAVES = 24.0, 7.0
#: What a decoded mean stays below its bound by, so that rounding to float32 does not bring it above.
MARGIN = 1.0 - 1e-6

ZERO_IS_SENT = "zero has a code of its own, so that a sign alone has none; set 0, which sends no means, or 2"


class LogMoments(UpdateCodec):
    """Sends squares on a grid of logarithms, over 24 octaves down from the largest, and means m as m / sqrt(v).

    The grid of squares is the same for all clients in all rounds; that of m / sqrt(v) begins at the largest of a
    tensor. Numbers go to one of their two neighbours at random, so that the mean over draws is the number itself:
    rounded to the nearest, a square that moves by less than half a step a round would never move. Zero stays zero,
    squares stay squares, and m is never further from zero than v allows. Other moments, such as the momentum of SGD and
    means without a mean of squares (Adamax), and step counts pass as they are.

    With 5 and 4 bits Adam's moments cost 9/32 of what the parameters cost, in place of twice as much.

    Args:
        bits: Of a square, in [3, 8].
        mean_bits: Of m / sqrt(v), in [2, 8]; 0 has clients begin with m = 0.
        down: Whether the server sends averaged moments in the same code; with ``only`` clients do not.
    """

    allowed: ClassVar[tuple[Section, ...]] = ("moments",)

    @checked(bits="[3, 8]", mean_bits="[0, 8]")
    def __init__(self, *, bits: int = 5, mean_bits: int = 4, down: Down = True) -> None:
        super().__init__(sections=("moments",), down=down)
        if mean_bits == 1:
            raise ConfigurationError(
                message("LogMoments.mean_bits must be 0 or in [2, 8]", received=1, fix=ZERO_IS_SENT)
            )
        self.bits, self.mean_bits = bits, mean_bits

    # ------------------------------------------------------------------ one entry

    def forms(self, entry: UpdateEntry) -> Forms:
        return {CODES: (_bytes(entry, self.bits), torch.uint8), SCALE: ((), wide(entry.dtype))}

    def _forms(self, name: str, entry: UpdateEntry, entries: Mapping[str, UpdateEntry]) -> Forms:
        if not self.takes(name, entry):
            return {}
        if _square_of(name) in entries:
            codes: Forms = {CODES: (_bytes(entry, self.mean_bits), torch.uint8)}
            return {**codes, SCALE: ((), wide(entry.dtype))} if self.mean_bits else codes
        return self.forms(entry) if of_moment(name)[2] in SQUARES else {}

    def encode(self, value: Tensor, *, name: str, facts: RoundFacts, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        flat, is_mean = value.flatten().double(), of_moment(name)[2] in MEASURES
        if is_mean and not self.mean_bits:
            return {CODES: torch.zeros(0, dtype=torch.uint8, device=value.device)}
        if not is_mean:
            top = self._top(flat).to(wide(value.dtype))
            places = _places(flat, top, step=self.step, count=self.most, zero_below=False, name=name, facts=facts)
            codes = torch.where(flat > 0, places + 1, 0)
            return {CODES: packed_bits(codes, bits=self.bits), SCALE: top}
        top, half = flat.abs().max().to(wide(value.dtype)), self.half
        size, step = flat.abs().clamp(max=top.double()), self.mean_step
        places = _places(size, top, step=step, count=half, zero_below=True, name=name, facts=facts)
        codes = torch.where(places < half, places + 1 + torch.where(flat < 0, half, 0), 0)
        return {CODES: packed_bits(codes, bits=self.mean_bits), SCALE: top}

    def _top(self, value: Tensor) -> Tensor:
        """Return the largest number of the grid that is needed: a whole number of steps from 1.

        A grid that began at the largest square itself would be another one in every round and for every client, and
        squares that stand still would be drawn anew every time.
        """
        largest = value.max()
        steps = (largest.clamp(min=1e-300).log2() / self.step - 1e-4).ceil()
        return torch.where(largest > 0, torch.exp2(steps * self.step), 0.0)

    def restore(self, codes: Mapping[str, Tensor], entry: UpdateEntry, *, name: str, facts: RoundFacts) -> Tensor:
        size, is_mean = int(torch.Size(entry.shape).numel()), of_moment(name)[2] in MEASURES
        if is_mean and not self.mean_bits:
            return torch.zeros(entry.shape, dtype=entry.dtype, device=codes[CODES].device)
        top, numbers = codes[SCALE].double(), unpacked_bits(codes[CODES], bits=self._bits(is_mean), count=size)
        if is_mean:
            numbers, half = numbers.clamp(0, 2 * self.half), self.half
            sizes = top * torch.exp2(-((numbers - 1) % half).double() * self.mean_step)
            found = torch.where(numbers > half, -sizes, sizes)
        else:
            found = top * torch.exp2((1 - numbers).double() * self.step)
        return torch.where(numbers > 0, found, 0.0 * top).to(entry.dtype).reshape(entry.shape)

    def _bits(self, is_mean: bool) -> int:
        return self.mean_bits if is_mean else self.bits

    @property
    def most(self) -> int:
        """Steps of the grid below the largest number: one code is for zero."""
        return int(2**self.bits - 2)

    @property
    def step(self) -> float:
        """Octaves between two numbers of the grid."""
        return OCTAVES / self.most

    @property
    def half(self) -> int:
        """Magnitudes of m / sqrt(v) that have a code: one with either sign, and one code for zero."""
        return int(2 ** (self.mean_bits - 1) - 1)

    @property
    def mean_step(self) -> float:
        """Octaves between two of them. Equal distances would give small ones, as most are, the noise of large ones."""
        return min(1.0, MEAN_OCTAVES / self.half)

    # ------------------------------------------------------------------ means beside their squares

    def client(
        self, update: State, *, entries: Mapping[str, UpdateEntry], private: State, facts: RoundFacts
    ) -> tuple[State, State]:
        values = dict(update)
        for name in self._means(update, entries):
            square = _square_of(name)
            codes = self.encode(update[square], name=square, facts=facts, state={})
            known = self.restore(codes, entries[square], name=square, facts=facts)
            bound = _ratio(update[name], update[square]).abs().max()  # what v allows m, whatever becomes of v
            values[name] = _ratio(update[name], known).clamp(-bound, bound) * MARGIN
        return super().client(values, entries=entries, private=private, facts=facts)

    def decode(self, update: State, *, entries: Mapping[str, UpdateEntry], facts: RoundFacts) -> State:
        found = dict(super().decode(update, entries=entries, facts=facts))
        for name in self._means(found, entries):
            found[name] = found[name] * found[_square_of(name)].sqrt()
        return found

    def _means(self, state: State, entries: Mapping[str, UpdateEntry]) -> list[str]:
        """Return the means of a state whose squares are in it, too."""
        wanted = (name for name in entries if self.mean_bits and self.takes(name, entries[name]))
        return [name for name in wanted if name in state and _square_of(name) in state]


def _square_of(name: str) -> str:
    """Return the name of the square that bounds a mean of gradients; empty for what is none."""
    key = of_moment(name)[2] if name.startswith(MOMENTS) else ""
    return f"{name.removesuffix(key)}{MEASURES[key]}" if key in MEASURES else ""


def _ratio(mean: Tensor, square: Tensor) -> Tensor:
    return torch.where(square > 0, mean / square.clamp(min=1e-38).sqrt(), 0.0 * mean)


def _places(
    values: Tensor, top: Tensor, *, step: float, count: int, zero_below: bool, name: str, facts: RoundFacts
) -> Tensor:
    """Return places on the grid top 2^(-step k), k = 0 to ``count``, drawn from two neighbours, right on average.

    Args:
        values: Numbers that are not negative, in float64.
        top: The largest number of the grid.
        step: Octaves between two numbers.
        count: The last place.
        zero_below: Whether the last place stands for zero.
        name: Of the entry.
        facts: The round, with the seed of the draws.
    """
    largest = top.double()
    lower = ((largest.log2() - values.log2()) / step).ceil().clamp(0, count)  # the grid's number at or below it
    below, above = largest * torch.exp2(-lower * step), largest * torch.exp2(-(lower - 1).clamp(min=0) * step)
    if zero_below:
        below = torch.where(lower < count, below, 0.0)
    chance = ((values - below) / (above - below).clamp(min=1e-300)).clamp(0, 1)
    uniform = torch.rand(values.shape, generator=draws(name, facts), dtype=torch.float64)
    found = (lower - (uniform.to(values.device) < chance).double()).clamp(min=0)
    return torch.where(values > 0, found, float(count)).long()


def _bytes(entry: UpdateEntry, bits: int) -> tuple[int, ...]:
    return (-(-int(torch.Size(entry.shape).numel()) * bits // 8),)
