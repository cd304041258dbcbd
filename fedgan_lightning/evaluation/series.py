"""Metrics of the time-series literature: centroids of profiles, discriminative and predictive scores."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.errors import ConfigurationError, SampleSizeError, message
from fedgan_lightning.evaluation.metrics import Metric, check_reals
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import isolated_rng, make_generator


class ProfileCentroids(Metric):
    """Distance between the centroids of generated and of held-out profiles: ``centroid_distance``.

    Both sets are divided by k-means; centroids are matched one to one so that the sum of their distances is least, and
    the mean root-mean-square difference of matched ones is reported, with ``centroid_distance_floor`` for training
    against held-out profiles. FedGAN's paper shows the same nine centroids and compares by eye (Rasouli et al. 2020,
    figure 5).

    Args:
        k: Centroids.
    """

    needs_server_samples = True

    @checked(k="[1, inf)")
    def __init__(self, k: int = 9) -> None:
        self.k = k
        self.real = torch.empty(0)

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        held_out, train = data.test_samples.x.flatten(1), data.train_samples.x.flatten(1)
        for split, rows in (("test", held_out), ("training", train)):
            if len(rows) < self.k:
                raise SampleSizeError(
                    message(
                        f"{self.k} centroids must have as many {split} samples",
                        received=len(rows),
                        fix="lower k, change the source's test_fraction, or add samples",
                    )
                )
        self.real = centroids(held_out, self.k)
        subset = torch.randperm(len(train), generator=make_generator(0, "centroids"))[: len(held_out)]
        return {"centroid_distance_floor": matched_distance(centroids(train[subset], self.k), self.real)}

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        if len(samples) < self.k:
            raise ConfigurationError(
                message(
                    f"{self.k} centroids must have as many generated samples",
                    received=len(samples),
                    fix="raise evaluation.num_samples, or lower k",
                )
            )
        fake = centroids(samples.cpu().flatten(1), self.k)
        return {"centroid_distance": matched_distance(fake, self.real)}


class DiscriminativeScore(Metric):
    """|accuracy - 1/2| of a recurrent classifier between real and generated series: ``discriminative_score`` in
    [0, 1/2], 0 at best.

    It is trained and tested on disjoint halves. Source: Yoon et al. 2019 (TimeGAN), section 5.

    Args:
        steps: Training steps.
        seed: Seed of the classifier.
    """

    needs_server_samples = True
    test_only = True

    @checked(steps="[1, inf)", seed="[0, inf)")
    def __init__(self, *, steps: int = 500, seed: int = 0) -> None:
        self.steps, self.seed = steps, seed
        self.real = torch.empty(0)

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        check_reals(len(data.test_samples), of="DiscriminativeScore", split="test")
        check_reals(len(data.train_samples), of="DiscriminativeScore")
        self.real = _sequences(data.test_samples.x)
        train = _sequences(data.train_samples.x)
        chosen = torch.randperm(len(train), generator=make_generator(self.seed, "floor"))[: len(self.real)]
        return {"discriminative_score_floor": self._score(train[chosen])}

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        return {"discriminative_score": self._score(_sequences(samples.cpu())[: len(self.real)])}

    def _score(self, fake: Tensor) -> float:
        count = min(len(fake), len(self.real))
        generator = make_generator(self.seed, "halves")
        (fit_real, test_real), (fit_fake, test_fake) = (
            values[torch.randperm(len(values), generator=generator)[:count]].tensor_split(2)
            for values in (self.real, fake)
        )
        x, y = torch.cat([fit_real, fit_fake]), torch.cat([torch.ones(len(fit_real)), torch.zeros(len(fit_fake))])
        lossy = nn.functional.binary_cross_entropy_with_logits
        net = fitted(x, lambda net, rows: lossy(net(x[rows])[:, -1, 0], y[rows]), steps=self.steps, seed=self.seed)
        with torch.no_grad():
            right = int((net(test_real)[:, -1, 0] > 0).sum()) + int((net(test_fake)[:, -1, 0] <= 0).sum())
        return abs(right / (len(test_real) + len(test_fake)) - 0.5)


class PredictiveScore(Metric):
    """Mean absolute error on held-out series of a recurrent net trained on generated ones to tell the next value.

    Reports ``predictive_error`` beside ``predictive_error_of_reals``, the same net trained on as many real series.
    Source: Yoon et al. 2019 (TimeGAN), section 5.

    Args:
        steps: Training steps.
        seed: Seed of the net.
    """

    needs_server_samples = True
    test_only = True

    @checked(steps="[1, inf)", seed="[0, inf)")
    def __init__(self, *, steps: int = 500, seed: int = 0) -> None:
        self.steps, self.seed = steps, seed
        self.real = self.train = torch.empty(0)

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        self.real, self.train = _sequences(data.test_samples.x), _sequences(data.train_samples.x)
        return {}

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        fake = _sequences(samples.cpu())
        chosen = torch.randperm(len(self.train), generator=make_generator(self.seed, "reals"))[: len(fake)]
        real = self.train[chosen]
        return {"predictive_error": self._error(fake), "predictive_error_of_reals": self._error(real)}

    def _error(self, x: Tensor) -> float:
        def loss(net: nn.Module, rows: Tensor) -> Tensor:
            error: Tensor = (net(x[rows, :-1]) - x[rows, 1:]).abs().mean()
            return error

        net = fitted(x, loss, steps=self.steps, seed=self.seed, outputs=x.shape[2])
        with torch.no_grad():
            return float((net(self.real[:, :-1]) - self.real[:, 1:]).abs().mean())


class Recurrent(nn.Module):
    """(N, T, c) -> (N, T, outputs) through a GRU.

    Args:
        channels: c.
        outputs: Numbers per point of time.
        hidden: Width of the GRU.
    """

    def __init__(self, channels: int, *, outputs: int, hidden: int = 24) -> None:
        super().__init__()
        self.memory, self.head = nn.GRU(channels, hidden, batch_first=True), nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map series (N, T, c) to (N, T, outputs)."""
        out: Tensor = self.head(self.memory(x)[0])
        return out


def fitted(
    x: Tensor, loss: Callable[[nn.Module, Tensor], Tensor], *, steps: int, seed: int, outputs: int = 1
) -> nn.Module:
    """Return a recurrent net trained on minibatches of 64 rows of ``x``; Adam 3e-3."""
    generator = make_generator(seed, "recurrent batches")
    with isolated_rng(seed), torch.inference_mode(False), torch.enable_grad():
        net = Recurrent(x.shape[2], outputs=outputs)
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(steps):
            value = loss(net, torch.randint(len(x), (64,), generator=generator))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return net.eval()


def centroids(profiles: Tensor, k: int) -> Tensor:
    """Return the k centroids (k, d) of profiles (N, d), the largest cluster first."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():  # a generator that makes few different profiles has fewer clusters
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(n_clusters=k, n_init=4, random_state=0).fit(profiles.double().numpy())
    sizes = torch.bincount(torch.from_numpy(found.labels_).long(), minlength=k)
    return torch.from_numpy(found.cluster_centers_)[sizes.argsort(descending=True, stable=True)]


def matched_distance(first: Tensor, second: Tensor) -> float:
    """Return the mean root-mean-square difference of centroids (k, d), matched so that it is least."""
    from scipy.optimize import linear_sum_assignment

    apart = torch.cdist(first, second) / first.shape[1] ** 0.5
    rows, columns = linear_sum_assignment(apart.numpy())
    return float(apart[rows, columns].mean())


def _sequences(x: Tensor) -> Tensor:
    """Return series (N, c, T) as (N, T, c) that may take part in training, whatever mode they were made in."""
    with torch.inference_mode(False):
        return x.float().transpose(1, 2).contiguous().clone()
