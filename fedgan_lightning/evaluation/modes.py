"""Quality of low-dimensional samples, as pure functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: A sample is of high quality within this many standard deviations of its nearest mode.
HIGH_QUALITY_SIGMAS = 3.0


def mode_statistics(samples: Tensor, *, centres: Tensor, sigma: float) -> dict[str, float]:
    """Return modes covered, share of high-quality samples, divergence of the mode histogram, and spread in the modes.

    A sample belongs to its nearest mode; it is of high quality within 3 sigma of it; a mode is covered by one such
    sample. The Jensen-Shannon divergence, in nats within [0, log 2], compares the high-quality samples' histogram with
    the uniform one, and is log 2 where there are none. Source: Lin et al. 2018 (PacGAN), section 4.1.

    The first three are at their best for one point in every mode. ``mode_spread`` is not: sqrt(sum_k sum_i |x_i -
    m_k|^2 / (d sum_k (n_k - 1))) / sigma, over the high-quality samples x_i of mode k with mean m_k. Samples of the
    modes have .97, since the cut at 3 sigma takes the rest (in the plane); a point in each has 0.

    Args:
        samples: (N, d).
        centres: (k, d).
        sigma: Standard deviation of every mode.
    """
    distances, nearest = torch.cdist(samples.double(), centres.double()).min(dim=1)
    good = distances <= HIGH_QUALITY_SIGMAS * sigma
    counts = torch.bincount(nearest[good], minlength=len(centres)).double()
    uniform = torch.full_like(counts, 1 / len(centres))
    shares = counts / counts.sum().clamp_min(1)
    mixture = 0.5 * (shares + uniform)
    divergence = 0.5 * (_relative_entropy(shares, mixture) + _relative_entropy(uniform, mixture))
    if not good.any():  # no distribution at all: half of log 2 would be better than a collapsed one
        divergence = torch.tensor(math.log(2.0))
    return {
        "modes": float((counts > 0).sum()),
        "high_quality": float(good.double().mean()),
        "mode_divergence": float(divergence),
        "mode_spread": _spread(samples[good].double(), nearest[good], counts) / sigma,
    }


def _spread(samples: Tensor, mode: Tensor, counts: Tensor) -> float:
    """Return the standard deviation of a coordinate within modes, pooled over them; 0 where no mode has two samples."""
    freedom = float((counts - 1).clamp_min(0).sum()) * samples.shape[1]
    means = torch.zeros(len(counts), samples.shape[1], dtype=samples.dtype).index_add(0, mode, samples)
    deviations = samples - (means / counts.clamp_min(1).unsqueeze(1))[mode]
    return float((deviations.square().sum() / freedom).sqrt()) if freedom else 0.0


def sliced_wasserstein(first: Tensor, second: Tensor, directions: Tensor) -> float:
    """Return the mean over directions of the 1-Wasserstein distance between projections.

    Args:
        first: (N, d).
        second: (M, d).
        directions: (d, k) unit vectors.
    """
    levels = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    ones, others = (quantiles(part.double() @ directions.double(), levels) for part in (first, second))
    return float((ones - others).abs().mean())


def quantiles(values: Tensor, levels: Tensor) -> Tensor:
    """Return the quantiles (L, k) of the columns of ``values`` (N, k), linear between neighbours.

    They are those of ``torch.quantile``, which takes at most 16 million numbers.
    """
    ranks = levels.double() * (len(values) - 1)
    below = ranks.floor()
    rows = values.sort(dim=0).values
    return torch.lerp(rows[below.long()], rows[ranks.ceil().long()], (ranks - below).to(values.dtype).unsqueeze(1))


def _relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p / q.clamp_min(1e-300)).clamp_min(1e-300).log(), torch.zeros_like(p)).sum()
