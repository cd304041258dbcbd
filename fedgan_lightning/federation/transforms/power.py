"""PowerSGD: a matrix as the product of two thin ones."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedgan_lightning.federation.transforms.codec import Forms, UpdateCodec, draws, wide
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import UpdateEntry
from fedgan_lightning.update_transform import RoundFacts

LEFT, RIGHT, START = "left", "right", "start"


class PowerSGD(UpdateCodec):
    """Sends P and Q with C(M) = P Q^T of rank r for every entry M (n, m): P = orthonormal(M Q), Q = M^T P.

    One step of power iteration a round, from the Q of the round before; r (n + m) numbers in place of n m. An entry
    with more dimensions is a matrix of its first one against the rest; vectors, and what would not get smaller, pass as
    they are. Source: Vogels, Karimireddy, Jaggi 2019, algorithm 1.

    Args:
        rank: r, at least 1.
        error_feedback: Whether clients keep M - P Q^T for later rounds, as published.
    """

    @checked(rank="[1, inf)")
    def __init__(self, *, rank: int = 2, error_feedback: bool = True) -> None:
        super().__init__(error_feedback=error_feedback)
        self.rank = rank

    def forms(self, entry: UpdateEntry) -> Forms:
        if len(entry.shape) < 2:
            return {}
        n, m = entry.shape[0], math.prod(entry.shape[1:])
        if self.rank * (n + m) >= n * m:
            return {}
        return {LEFT: ((n, self.rank), entry.dtype), RIGHT: ((m, self.rank), entry.dtype)}

    def kept(self, entry: UpdateEntry) -> dict[str, Tensor]:
        forms = self.forms(entry)
        return {START: torch.zeros(forms[RIGHT][0], dtype=entry.dtype)} if forms else {}

    def next_state(self, codes: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {START: codes[RIGHT]}

    def encode(self, value: Tensor, *, name: str, facts: RoundFacts, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        matrix = value.flatten(1).to(wide(value.dtype))  # torch factors no matrices in half precision
        q = state[START].to(matrix) if START in state else None
        if q is None or not bool(q.any()):  # a newcomer, or after a round without a change
            shape = (matrix.shape[1], self.rank)
            q = torch.randn(shape, generator=draws(name, facts), dtype=torch.float64).to(matrix)
        p, _ = torch.linalg.qr(matrix @ q)
        return {LEFT: p.to(value.dtype), RIGHT: (matrix.mT @ p).to(value.dtype)}

    def restore(self, codes: Mapping[str, Tensor], entry: UpdateEntry, *, name: str, facts: RoundFacts) -> Tensor:
        left, right = (codes[part].to(wide(entry.dtype)) for part in (LEFT, RIGHT))
        return (left @ right.mT).to(entry.dtype).reshape(entry.shape)
