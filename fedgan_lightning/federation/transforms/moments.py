"""Optimizer moments for half a byte a number: squares by their logarithms, means of gradients beside their squares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

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
#: Largest m / sqrt(v) that is sent.
MOST = 1.5


class LogMoments(UpdateCodec):
    """Sends squares on a grid of logarithms, 24 octaves down from the largest one, and means m as m / sqrt(v).

    Numbers go to one of their two neighbours at random, so that the mean over draws of a square is the square itself:
    rounded to the nearest, one that moves by less than half a step a round would never move. Zero stays zero, and
    squares stay squares. Other moments, such as the momentum of SGD and means without a mean of squares (Adamax), and
    step counts pass as they are.

    With 4 bits for either, Adam's moments cost a quarter of what the parameters cost, in place of twice as much.

    Args:
        bits: Of a square: 4 or 8.
        means: ``coded`` sends m / sqrt(v) in 4 bits, cut to within 1.5; ``drop`` has clients begin with m = 0.
        down: Whether the server sends averaged moments in the same code.
    """

    allowed: ClassVar[tuple[Section, ...]] = ("moments",)

    @checked()
    def __init__(
        self, *, bits: Literal[4, 8] = 4, means: Literal["coded", "drop"] = "coded", down: bool = True
    ) -> None:
        super().__init__(sections=("moments",), down=down)
        self.bits, self.means = bits, means

    # ------------------------------------------------------------------ one entry

    def forms(self, entry: UpdateEntry) -> Forms:
        return {CODES: (_bytes(entry, self.bits), torch.uint8), SCALE: ((), _wide(entry.dtype))}

    def _forms(self, name: str, entry: UpdateEntry, entries: Mapping[str, UpdateEntry]) -> Forms:
        key = of_moment(name)[2] if name.startswith(MOMENTS) else ""
        if key == MEAN and entry.shape and entry.dtype.is_floating_point and _square_of(name) in entries:
            return {CODES: (_bytes(entry, 4) if self.means == "coded" else (0,), torch.uint8)}
        return super()._forms(name, entry, entries) if key in SQUARES else {}

    def encode(self, value: Tensor, *, name: str, facts: RoundFacts, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if of_moment(name)[2] == MEAN:
            if self.means == "drop":
                return {CODES: torch.zeros(0, dtype=torch.uint8, device=value.device)}
            steps = (value.flatten().double() / MOST).clamp(-1, 1) * 7 + 7
            return {CODES: packed_bits(_drawn(steps, name, facts).clamp(0, 14).long(), bits=4)}
        top, flat = value.max().to(_wide(value.dtype)).clamp(min=0), value.flatten().double()
        exact = (top.double().log2() - flat.log2()) / self.step
        lower = exact.ceil().clamp(0, self.most)  # the grid's number at or below it
        above = torch.exp2(-(lower - 1).clamp(min=0) * self.step) * top.double()
        below = torch.exp2(-lower * self.step) * top.double()
        chance = ((flat - below) / (above - below).clamp(min=1e-300)).clamp(0, 1)
        goes_up = torch.rand(flat.shape, generator=draws(name, facts), dtype=torch.float64).to(flat.device) < chance
        codes = torch.where(flat > 0, (lower - goes_up.double()).clamp(min=0) + 1, 0.0)
        return {CODES: packed_bits(codes.long(), bits=self.bits), SCALE: top}

    def restore(self, codes: Mapping[str, Tensor], entry: UpdateEntry, *, name: str, facts: RoundFacts) -> Tensor:
        size = int(torch.Size(entry.shape).numel())
        if SCALE in codes:
            steps = unpacked_bits(codes[CODES], bits=self.bits, count=size).double()
            found = torch.where(steps > 0, codes[SCALE].double() * torch.exp2((1 - steps) * self.step), 0.0)
        elif self.means == "drop":
            found = torch.zeros(size, dtype=torch.float64, device=codes[CODES].device)
        else:
            found = (unpacked_bits(codes[CODES], bits=4, count=size).clamp(0, 14).double() - 7) * (MOST / 7)
        return found.to(entry.dtype).reshape(entry.shape)

    @property
    def most(self) -> int:
        """Steps of the grid below the largest number: one code is for zero."""
        return int(2**self.bits - 2)

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
        wanted = (name for name in entries if self.means == "coded" and name.endswith(f"/{MEAN}"))
        return [name for name in wanted if name in state and _square_of(name) in state and entries[name].shape]


def _square_of(mean: str) -> str:
    return f"{mean.removesuffix(MEAN)}{MEASURE}"


def _drawn(values: Tensor, name: str, facts: RoundFacts) -> Tensor:
    uniform = torch.rand(values.shape, generator=draws(name, facts), dtype=torch.float64).to(values.device)
    return (values + uniform).floor()


def _bytes(entry: UpdateEntry, bits: int) -> tuple[int, ...]:
    return (-(-int(torch.Size(entry.shape).numel()) * bits // 8),)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
