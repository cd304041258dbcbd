"""Codes that send few of an entry's numbers: the largest, or some at random."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fedgan_lightning.federation.transforms.codec import Forms, UpdateCodec, draws, share_of
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import UpdateEntry
from fedgan_lightning.update_transform import RoundFacts

VALUES, PLACES, MASK, SEED = "values", "places", "mask", "seed"


class TopK(UpdateCodec):
    """Sends the k largest numbers of every entry and where they stand; biased, so that clients keep the rest.

    |C(v) - v|^2 <= (1 - k / d) |v|^2. Places take 4 bytes each, or one bit of every number where that is less (k > d /
    32). Source: Stich, Cordonnier, Jaggi 2018, definition 2.1; error feedback as in Karimireddy et al. 2019.

    Args:
        share: k / d, in (0, 1]; an entry sends one number at least.
        error_feedback: Whether clients keep the rest for later rounds.
    """

    numbers: ClassVar[tuple[str, ...]] = (VALUES,)

    @checked(share="(0, 1]")
    def __init__(self, *, share: float = 0.01, error_feedback: bool = True) -> None:
        super().__init__(error_feedback=error_feedback)
        self.share = float(share)

    def forms(self, entry: UpdateEntry) -> Forms:
        size = math.prod(entry.shape)
        count = share_of(size, self.share)
        if count == size:
            return {}
        where = (
            {MASK: ((-(-size // 8),), torch.uint8)} if _fits_mask(size, count) else {PLACES: ((count,), torch.int32)}
        )
        return {VALUES: ((count,), entry.dtype), **where}

    def encode(self, value: Tensor, *, name: str, facts: RoundFacts, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        flat = value.flatten()
        count = share_of(len(flat), self.share)
        places = flat.abs().topk(count).indices.sort().values
        if not _fits_mask(len(flat), count):
            return {VALUES: flat[places], PLACES: places.to(torch.int32)}
        chosen = torch.zeros(-(-len(flat) // 8) * 8, dtype=torch.long, device=flat.device)
        chosen[places] = 1
        bits = (chosen.view(-1, 8) << torch.arange(8, device=flat.device)).sum(1).to(torch.uint8)
        return {VALUES: flat[places], MASK: bits}

    def restore(self, codes: Mapping[str, Tensor], entry: UpdateEntry, *, name: str, facts: RoundFacts) -> Tensor:
        size, values = math.prod(entry.shape), codes[VALUES]
        if PLACES in codes:
            places = codes[PLACES].long()
        else:
            bits = codes[MASK].long().unsqueeze(1) >> torch.arange(8, device=values.device) & 1
            places = bits.flatten()[:size].nonzero().flatten()
        return scattered(values, places, entry)


class RandomSparse(UpdateCodec):
    """Sends k numbers of every entry, drawn anew every round, times d / k: no bias.

    E |C(v) - v|^2 = (d / k - 1) |v|^2. Places follow from a seed. By default every client draws its own, of 8 bytes an
    entry; with ``shared`` all clients of a round send the same places, which follow from the round, so that codes add
    up, and masks of secure aggregation go with them. With error feedback numbers are sent as they are, without d / k.
    Source: Stich, Cordonnier, Jaggi 2018, definition 2.1 (rand_k), with the factor that takes the bias away.

    Args:
        share: k / d, in (0, 1].
        shared: Whether all clients of a round send the same places.
        error_feedback: Whether clients keep the rest.
    """

    numbers: ClassVar[tuple[str, ...]] = (VALUES,)

    @checked(share="(0, 1]")
    def __init__(self, *, share: float = 0.1, shared: bool = False, error_feedback: bool = False) -> None:
        super().__init__(error_feedback=error_feedback)
        self.share, self.shared = float(share), shared
        self.is_linear = shared  # with places of their own codes do not add up

    def forms(self, entry: UpdateEntry) -> Forms:
        size = math.prod(entry.shape)
        count = share_of(size, self.share)
        if count == size:
            return {}
        return {VALUES: ((count,), entry.dtype)} | ({} if self.shared else {SEED: ((), torch.int64)})

    def encode(self, value: Tensor, *, name: str, facts: RoundFacts, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        flat = value.flatten()
        count, source = share_of(len(flat), self.share), draws(name, facts, shared=self.shared)
        seed = 0 if self.shared else int(torch.randint(2**53, (), generator=source))
        places = self._places(len(flat), count, name=name, facts=facts, seed=seed).to(flat.device)
        values = flat[places] * (1.0 if self.error_feedback else len(flat) / count)
        return {VALUES: values} | ({} if self.shared else {SEED: torch.tensor(seed)})

    def restore(self, codes: Mapping[str, Tensor], entry: UpdateEntry, *, name: str, facts: RoundFacts) -> Tensor:
        values, seed = codes[VALUES], 0 if self.shared else int(codes[SEED])
        places = self._places(math.prod(entry.shape), len(values), name=name, facts=facts, seed=seed)
        return scattered(values, places.to(values.device), entry)

    def _places(self, size: int, count: int, *, name: str, facts: RoundFacts, seed: int) -> Tensor:
        source = draws(name, facts, shared=True) if self.shared else torch.Generator().manual_seed(seed % 2**62)
        return torch.randperm(size, generator=source)[:count].sort().values


def scattered(values: Tensor, places: Tensor, entry: UpdateEntry) -> Tensor:
    """Return an entry with these values in these places, and zeros elsewhere; other places are left out."""
    size = math.prod(entry.shape)
    count = min(len(values), len(places))
    places, values = places[:count], values[:count]
    inside = (places >= 0) & (places < size)
    found = torch.zeros(size, dtype=entry.dtype, device=values.device)
    found[places[inside]] = values[inside].to(entry.dtype)
    return found.reshape(entry.shape)


def _fits_mask(size: int, count: int) -> bool:
    """Whether a bit for every number takes less than the places of those that are sent."""
    return -(-size // 8) < 4 * count
