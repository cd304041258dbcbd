"""Codes with a few bits for every number: bfloat16, stochastic integers, QSGD."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fedgan_lightning.federation.transforms.codec import Down, Forms, Section, UpdateCodec, draws, wide
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import UpdateEntry
from fedgan_lightning.update_transform import RoundFacts

CODES, SCALE = "codes", "scale"


class BFloat16(UpdateCodec):
    """Sends every number in bfloat16: 2 bytes, relative error at most 2^-8, and the range of float32.

    Squares stay squares, so that optimizer moments and statistics may be sent so, too.

    Args:
        sections: Some of ``updates``, ``moments`` and ``buffers``.
        error_feedback: Whether clients keep what rounding took.
        down: Whether the server sends the same sections so, too, the networks' parameters for ``updates``; with
            ``only`` clients do not, so that another code can stand beside this one.
    """

    allowed: ClassVar[tuple[Section, ...]] = ("updates", "moments", "buffers")

    @checked()
    def __init__(
        self,
        *,
        sections: Sequence[Section] = ("updates", "moments"),
        error_feedback: bool = False,
        down: Down = False,
    ) -> None:
        super().__init__(sections=sections, error_feedback=error_feedback, down=down)

    def forms(self, entry: UpdateEntry) -> Forms:
        return {} if entry.dtype == torch.bfloat16 else {CODES: (entry.shape, torch.bfloat16)}

    def encode(self, value: Tensor, *, name: str, facts: RoundFacts, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {CODES: value.to(torch.bfloat16)}

    def restore(self, codes: Mapping[str, Tensor], entry: UpdateEntry, *, name: str, facts: RoundFacts) -> Tensor:
        return codes[CODES].to(entry.dtype)


class Int8(UpdateCodec):
    """Sends round(v / s) as one byte with s = max |v| / 127 for every entry, up or down at random: no bias.

    E C(v) = v, and |C(v) - v| < s; without ``stochastic`` the nearest integer, |C(v) - v| <= s / 2, with a bias that
    error feedback takes away. A number takes 1 byte in place of 4, an entry 4 or 8 bytes more.
    Source: quantisation with a linear grid, as in Reisizadeh, Mokhtari, Hassani, Jadbabaie, Pedarsani 2020 (FedPAQ).

    Args:
        stochastic: Whether rounding is drawn.
        error_feedback: Whether clients keep what rounding took.
    """

    @checked()
    def __init__(self, *, stochastic: bool = True, error_feedback: bool = False) -> None:
        super().__init__(error_feedback=error_feedback)
        self.stochastic = stochastic

    def forms(self, entry: UpdateEntry) -> Forms:
        return {CODES: (entry.shape, torch.int8), SCALE: ((), wide(entry.dtype))}

    def encode(self, value: Tensor, *, name: str, facts: RoundFacts, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scale = value.abs().max().to(wide(value.dtype)) / 127
        parts = value.to(scale.dtype) / scale.clamp(min=torch.finfo(scale.dtype).tiny)
        rounded = _up_or_down(parts, draws(name, facts)) if self.stochastic else parts.round()
        return {CODES: rounded.clamp(-127, 127).to(torch.int8), SCALE: scale}

    def restore(self, codes: Mapping[str, Tensor], entry: UpdateEntry, *, name: str, facts: RoundFacts) -> Tensor:
        return (codes[CODES].to(codes[SCALE].dtype) * codes[SCALE]).to(entry.dtype)


class QSGD(UpdateCodec):
    """Sends sign(v) |v| xi / s with xi / s next to |v_i| / |v|, up or down at random: no bias, whatever the number s.

    E |C(v) - v|^2 <= min(d / s^2, sqrt(d) / s) |v|^2. A number takes ceil(log2(2 s + 1)) bits, in whole bytes together;
    an entry 4 or 8 bytes more. Source: Alistarh, Grubic, Li, Tomioka, Vojnovic 2017, section 3.1, with codes of one
    width in place of Elias's.

    Args:
        levels: s, in [1, 127].
        error_feedback: Whether clients keep what rounding took.
    """

    @checked(levels="[1, 127]")
    def __init__(self, *, levels: int = 7, error_feedback: bool = False) -> None:
        super().__init__(error_feedback=error_feedback)
        self.levels = levels

    @property
    def bits(self) -> int:
        """Bits of one number."""
        return math.ceil(math.log2(2 * self.levels + 1))

    def forms(self, entry: UpdateEntry) -> Forms:
        size = math.prod(entry.shape)
        return {CODES: ((-(-size * self.bits // 8),), torch.uint8), SCALE: ((), wide(entry.dtype))}

    def encode(self, value: Tensor, *, name: str, facts: RoundFacts, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        norm = torch.linalg.vector_norm(value.to(wide(value.dtype)))
        parts = value.flatten().to(norm.dtype) / norm.clamp(min=torch.finfo(norm.dtype).tiny) * self.levels
        steps = _up_or_down(parts, draws(name, facts)).clamp(-self.levels, self.levels).long() + self.levels
        return {CODES: packed_bits(steps, bits=self.bits), SCALE: norm}

    def restore(self, codes: Mapping[str, Tensor], entry: UpdateEntry, *, name: str, facts: RoundFacts) -> Tensor:
        steps = unpacked_bits(codes[CODES], bits=self.bits, count=math.prod(entry.shape)) - self.levels
        steps = steps.clamp(-self.levels, self.levels)  # a code that no client forms must not be longer than |v|
        return (steps.to(codes[SCALE].dtype) * (codes[SCALE] / self.levels)).to(entry.dtype).reshape(entry.shape)


def packed_bits(numbers: Tensor, *, bits: int) -> Tensor:
    """Return numbers in [0, 2^bits) in as few bytes as hold them, the first bit first."""
    places = torch.arange(bits, device=numbers.device)
    stream = (numbers.unsqueeze(1) >> places & 1).flatten()
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    return (stream << torch.arange(8, device=numbers.device)).sum(1).to(torch.uint8)


def unpacked_bits(packed: Tensor, *, bits: int, count: int) -> Tensor:
    """Return ``count`` numbers from the bytes of :func:`packed_bits`, as int64."""
    stream = (packed.long().unsqueeze(1) >> torch.arange(8, device=packed.device) & 1).flatten()[: count * bits]
    return (stream.view(count, bits) << torch.arange(bits, device=packed.device)).sum(1)


def _up_or_down(values: Tensor, source: torch.Generator) -> Tensor:
    """Return integers next to ``values``, whose mean over draws is that."""
    uniform = torch.rand(values.shape, generator=source, dtype=torch.float64).to(values.device)
    return (values.double() + uniform).floor().to(values.dtype)
