"""How far two sets of samples are from each other, by kernels: a number that a client computes of its own."""

from __future__ import annotations

import torch
from torch import Tensor

#: Widths of the Gaussian kernels, as multiples of the median squared distance.
WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
#: No two sets are further apart: every kernel has values in (0, 1].
LARGEST = 2**0.5


def maximum_mean_discrepancy(first: Tensor, second: Tensor) -> Tensor:
    """Return MMD = sqrt(mean k(x, x') + mean k(y, y') - 2 mean k(x, y)), the mean over five Gaussian kernels.

    k(a, b) = exp(-|a - b|^2 / (s m)) for s = 1/4, 1/2, 1, 2, 4, and m the median of the squared distances among
    ``first``, those of a sample to itself left out. Means are over all pairs, so that the number is 0 for equal sets
    and at most sqrt(2). Source: Gretton, Borgwardt, Rasch, Schoelkopf, Smola 2012, equation 5.

    Args:
        first: Samples (n, ...), at least two; their spread sets the widths.
        second: Samples (m, ...) of the same shape.
    """
    x, y = (own.detach().flatten(1).double() for own in (first, second))
    within, other, between = (torch.cdist(a, b).square() for a, b in ((x, x), (y, y), (x, y)))
    pairs = within[~torch.eye(len(x), dtype=torch.bool, device=x.device)]
    middle = pairs.median().clamp(min=torch.finfo(torch.float64).tiny)
    square = x.new_zeros(())
    for width in WIDTHS:
        means = [torch.exp(-own / (width * middle)).mean() for own in (within, other, between)]
        square = square + (means[0] + means[1] - 2 * means[2]) / len(WIDTHS)
    return square.clamp(min=0.0).sqrt()
