"""Kernel distance between real and generated features, exact over clients.

The cubic kernel is an inner product of third powers, k(a, b) = (a.b / d + 1)^3 = <u u u, v v v>, u = (a / sqrt d, 1).
Clients send the sum of their third powers; the distance between the unions follows from these sums without a single
pair of samples. The sum has (d + 1)^3 entries: 2 MB for 64 features, which is why more than 64 are refused. A sixth of
them are different, and travel: 383 kB.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, SampleSizeError, message
from fedgan_lightning.protocol import State

#: Above this many features the sums are larger than the features they stand for.
MOST_FEATURES = 64


@dataclass(frozen=True)
class KernelSums:
    """All that a cubic kernel distance needs to know of a set of samples; adds up over clients.

    Attributes:
        third: sum u u u, (d + 1, d + 1, d + 1) float64.
        own: sum k(f, f).
        count: n.
    """

    third: Tensor
    own: float
    count: int

    def __add__(self, other: KernelSums) -> KernelSums:
        return KernelSums(third=self.third + other.third, own=self.own + other.own, count=self.count + other.count)

    def to_state(self) -> dict[str, Tensor]:
        """Return them as tensors that add up, too: of the third powers, which are symmetric, each entry once."""
        distinct = self.third[_ascending(len(self.third)).unbind(1)]
        own = torch.tensor(self.own, dtype=torch.float64)
        return {"third": distinct, "own": own, "count": torch.tensor(self.count)}

    @classmethod
    def of_state(cls, state: State) -> KernelSums:
        """Undo :meth:`to_state`."""
        width = _width(len(state["third"]))
        places = _ascending(width)
        third = torch.zeros(width, width, width, dtype=torch.float64)
        for order in itertools.permutations(range(3)):
            third[places[:, list(order)].unbind(1)] = state["third"].double()
        return cls(third=third, own=float(state["own"]), count=int(state["count"]))


def num_distinct(num_features: int) -> int:
    """Return how many different entries the sum of third powers of so many features has."""
    return math.comb(num_features + 3, 3)


def _width(distinct: int) -> int:
    return next(width for width in itertools.count() if num_distinct(width - 1) >= distinct)


def _ascending(width: int) -> Tensor:
    """Return all places (i, j, k) with i <= j <= k < width, one a row."""
    i, j, k = (torch.arange(width).view(shape) for shape in ((-1, 1, 1), (1, -1, 1), (1, 1, -1)))
    return ((i <= j) & (j <= k)).nonzero()


@torch.no_grad()
def kernel_sums(batches: Iterable[Tensor], *, num_features: int) -> KernelSums:
    """Return the sums over all features in ``batches``, (N, d) each; runs where the samples live.

    Raises:
        ConfigurationError: If there are more than 64 features.
    """
    if num_features > MOST_FEATURES:
        raise ConfigurationError(
            message(
                f"the exact kernel distance over clients must have at most {MOST_FEATURES} features",
                received=num_features,
                fix="use ClassifierFeatures or PixelFeatures",
            )
        )
    width = num_features + 1
    third, own, count = torch.zeros(width * width, width, dtype=torch.float64), 0.0, 0
    for batch in batches:
        for part in batch.double().cpu().split(500):
            u = torch.cat([part / num_features**0.5, torch.ones(len(part), 1, dtype=torch.float64)], dim=1)
            pairs = (u.unsqueeze(2) * u.unsqueeze(1)).flatten(1)
            third += pairs.T @ u
            own += float(u.square().sum(1).pow(3).sum())
            count += len(part)
    return KernelSums(third=third.view(width, width, width), own=own, count=count)


def kernel_distance(real: KernelSums, fake: KernelSums) -> float:
    """Return the unbiased squared maximum mean discrepancy under (a.b / d + 1)^3.

    sum_{i != j} k(r_i, r_j) / (n (n - 1)) + the same for fakes - 2 sum_ij k(r_i, f_j) / (n m); it is negative by chance
    where the distributions agree. Source: Binkowski et al. 2018, section 4.

    Raises:
        SampleSizeError: If a side has fewer than two samples.
    """
    if min(real.count, fake.count) < 2:
        raise SampleSizeError(
            message(
                "a kernel distance must have at least two samples on both sides",
                received=f"{real.count} real, {fake.count} to compare with",
                fix="raise evaluation.num_samples, or the number of real samples",
            )
        )
    within = [
        (float((side.third * side.third).sum()) - side.own) / (side.count * (side.count - 1)) for side in (real, fake)
    ]
    between = float((real.third * fake.third).sum()) / (real.count * fake.count)
    return within[0] + within[1] - 2 * between
