"""Fréchet distance between real and generated features, exact over clients.

The states of torchmetrics' FID are sums: sum f, sum f f^T, n. Clients send these; adding them gives the distance of the
pooled data to 1e-14. The mean of the clients' own distances does not, and ranks models wrongly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from fedgan_lightning.errors import SampleSizeError, message
from fedgan_lightning.evaluation.features import FrozenNet


@dataclass(frozen=True)
class FeatureSums:
    """All that a Fréchet distance needs to know of a set of samples; adds up over clients.

    Attributes:
        total: sum f, (d,) float64.
        outer: sum f f^T, (d, d) float64.
        count: n.
    """

    total: Tensor
    outer: Tensor
    count: int

    def __add__(self, other: FeatureSums) -> FeatureSums:
        return FeatureSums(
            total=self.total + other.total, outer=self.outer + other.outer, count=self.count + other.count
        )


@torch.no_grad()
def feature_sums(net: FrozenNet, batches: Iterable[Tensor]) -> FeatureSums:
    """Return the sums of the features of all samples in ``batches``; runs where the samples live."""
    metric = FrechetInceptionDistance(feature=net, sync_on_compute=False)
    device = next((parameter.device for parameter in net.parameters()), torch.device("cpu"))
    metric = metric.to(device)
    for batch in batches:
        metric.update(batch.to(device, torch.float32), real=True)
    return FeatureSums(
        total=metric.real_features_sum.cpu(),
        outer=metric.real_features_cov_sum.cpu(),
        count=int(metric.real_features_num_samples),
    )


def frechet_distance(real: FeatureSums, fake: FeatureSums) -> float:
    """Return ||mu_r - mu_f||^2 + tr(S_r + S_f - 2 (S_r S_f)^1/2). Heusel et al. 2017, equation 6.

    Raises:
        SampleSizeError: If a side has fewer than two samples, which have no covariance.
    """
    if min(real.count, fake.count) < 2:
        raise SampleSizeError(
            message(
                "a Fréchet distance must have at least two samples on both sides",
                received=f"{real.count} real, {fake.count} to compare with",
                fix="raise evaluation.num_samples, or the number of real samples",
            )
        )
    metric = FrechetInceptionDistance(feature=_Width(len(real.total)), sync_on_compute=False)
    for side, sums in (("real", real), ("fake", fake)):
        setattr(metric, f"{side}_features_sum", sums.total)
        setattr(metric, f"{side}_features_cov_sum", sums.outer)
        setattr(metric, f"{side}_features_num_samples", torch.tensor(sums.count))
    metric.orig_dtype = torch.float64
    metric._update_count = 1  # it has been updated, elsewhere
    return float(metric.compute())


class _Width(torch.nn.Module):
    """A stand-in that says how many features there are: the sums are already made."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
