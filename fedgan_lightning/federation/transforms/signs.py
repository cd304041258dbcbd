"""Compression of updates to one bit per number, with error feedback."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedgan_lightning.federation.transforms.codec import Forms, UpdateCodec
from fedgan_lightning.federation.transforms.dense import packed_bits, unpacked_bits
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import UpdateEntry
from fedgan_lightning.update_transform import RoundFacts

SIGNS, SCALE = "signs", "scale"


class SignCompression(UpdateCodec):
    """Sends sign(v + e) and mean |v + e| for every vector v of an update, and keeps e+ = v + e - decoded.

    A number takes one bit in place of 32; each entry adds a scale of four or eight bytes. With error feedback what one
    round loses the next one brings. Source: Karimireddy, Rebjock, Stich, Jaggi 2019, algorithm 2 (EF-signSGD).

    Args:
        error_feedback: Whether e is kept on the client; without it every round starts from e = 0.
    """

    @checked()
    def __init__(self, *, error_feedback: bool = True) -> None:
        super().__init__(error_feedback=error_feedback)

    def forms(self, entry: UpdateEntry) -> Forms:
        size = math.prod(entry.shape)
        return {SIGNS: ((-(-size // 8),), torch.uint8), SCALE: ((), entry.dtype)}

    def encode(self, value: Tensor, *, name: str, facts: RoundFacts, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        bits = (value.flatten() >= 0).long()  # zero counts as positive
        return {SIGNS: packed_bits(bits, bits=1), SCALE: value.abs().mean()}

    def restore(self, codes: Mapping[str, Tensor], entry: UpdateEntry, *, name: str, facts: RoundFacts) -> Tensor:
        bits, scale = unpacked_bits(codes[SIGNS], bits=1, count=math.prod(entry.shape)), codes[SCALE]
        return torch.where(bits.bool(), scale, -scale).reshape(entry.shape)
