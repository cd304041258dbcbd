"""Fidelity and diversity by nearest neighbours, as pure functions of features.

What is exact in a federation: recall of the union (the server sends its fakes and their radii, a client answers with a
count), and distances to the nearest real (a client answers with minima). Precision, density and coverage need radii of
the pooled reals; the server computes them against a set of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows of a distance matrix that are in memory at a time.
BLOCK = 1000


def radii(points: Tensor, *, k: int) -> Tensor:
    """Return the distance (N,) of every point (N, d) to its k-th nearest other point; infinite where there is none."""
    if len(points) <= k:
        return torch.full((len(points),), torch.inf, dtype=points.dtype)
    parts = [torch.cdist(block, points).kthvalue(k + 1, dim=1).values for block in points.split(BLOCK)]
    return torch.cat(parts)  # a point is its own nearest: hence k + 1


def count_covered(reals: Tensor, fakes: Tensor, fake_radii: Tensor) -> int:
    """Return how many reals (N, d) lie within the ball of any fake; adds up over clients."""
    return sum(int((torch.cdist(block, fakes) <= fake_radii).any(1).sum()) for block in reals.split(BLOCK))


def nearest(queries: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return distance and index (N,) of the nearest point of every query; the union's is the minimum over clients."""
    found = [torch.cdist(block, points).min(dim=1) for block in queries.split(BLOCK)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def precision_recall(reals: Tensor, fakes: Tensor, *, k: int = 5) -> dict[str, float]:
    """Return precision, recall, density and coverage of fakes (M, d) against reals (N, d).

    Balls reach to the k-th neighbour within a set. Precision: share of fakes in any real ball; recall: share of reals
    in any fake ball; density: real balls around a fake, in the mean, over k; coverage: share of reals whose nearest
    fake lies in their ball. Sources: Kynkaanniemi et al. 2019, equations 1 to 3; Naeem et al. 2020, equations 3 and 4.

    Args:
        reals: Features of real samples, more than k.
        fakes: Features of generated samples, more than k.
        k: Neighbours.
    """
    real_radii, fake_radii = radii(reals, k=k), radii(fakes, k=k)
    inside, balls = 0, 0
    for block in fakes.split(BLOCK):
        within = torch.cdist(block, reals) <= real_radii
        inside += int(within.any(1).sum())
        balls += int(within.sum())
    distances, _ = nearest(reals, fakes)
    return {
        "precision": inside / len(fakes),
        "recall": count_covered(reals, fakes, fake_radii) / len(reals),
        "density": balls / (k * len(fakes)),
        "coverage": float((distances <= real_radii).double().mean()),
    }
