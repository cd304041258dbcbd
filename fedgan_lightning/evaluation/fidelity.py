"""Metrics beside the Fréchet distance: kernel distance, precision and recall, classifier score, distances by class."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.errors import ConfigurationError, SampleSizeError, message
from fedgan_lightning.evaluation import neighbours
from fedgan_lightning.evaluation.features import ClassifierFeatures, FeatureNet, FrozenNet, PixelFeatures
from fedgan_lightning.evaluation.federated_queries import (
    CHUNK,
    ROUNDING,
    FederatedQuery,
    QueryContext,
    chunks,
    net_of,
    summed,
)
from fedgan_lightning.evaluation.fid import FeatureSums, feature_sums, frechet_distance
from fedgan_lightning.evaluation.kernel import MOST_FEATURES, KernelSums, kernel_distance, kernel_sums, num_distinct
from fedgan_lightning.evaluation.metrics import (
    Metric,
    check_reals,
    clients_of,
    everything,
    is_enough,
    network,
    networks,
)
from fedgan_lightning.evaluation.portable import to_facts
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import State


def extracted(net: FrozenNet, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the features (N, d) of every batch, on the CPU."""
    device = next((parameter.device for parameter in net.parameters()), torch.device("cpu"))
    for batch in batches:
        with torch.no_grad():
            yield net(batch.to(device, torch.float32)).cpu()


class ThirdPowers(FederatedQuery):
    """Sums of third powers of features: what a cubic kernel distance is made of.

    Args:
        net: The feature network, of at most 64 features.
    """

    kind = "third powers"

    def __init__(self, net: FrozenNet) -> None:
        self.net = net

    def facts(self) -> dict[str, Any]:
        return to_facts(self.net)[0]

    def state(self) -> dict[str, Tensor]:
        return to_facts(self.net)[1]

    @classmethod
    def read(cls, facts: Mapping[str, Any], state: State, context: QueryContext) -> ThirdPowers:
        return cls(net_of(facts, state, context))

    def answer(self, context: QueryContext) -> dict[str, Tensor]:
        features = extracted(self.net, chunks(context.view))
        return kernel_sums(features, num_features=self.net.num_features).to_state()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"third": (num_distinct(self.net.num_features),), "own": ()}

    def least(self) -> int:
        """A sum of third powers of up to about d^2 / 6 vectors tells them, in general (Chiantini et al. 2017): it has
        d (d + 1) (d + 2) / 6 numbers, and each of them d.
        """
        return (self.net.num_features + 1) * (self.net.num_features + 2) // 6 + 1

    def objection(self, answer: State, *, count: int) -> str | None:
        """With u = (f / sqrt d, 1) every |u_i u_j u_k| <= |u|^6, the last u u u is 1, and |u| >= 1."""
        third, own = answer["third"].double(), float(answer["own"])
        if abs(float(third[-1]) - count) > ROUNDING * count or own < count * (1 - ROUNDING):
            return "third powers of another number of samples"
        return (
            "third powers that are larger than their squares allow"
            if float(third.abs().max()) > own * (1 + ROUNDING)
            else None
        )


class KernelDistance(Metric):
    """KID of all samples against the union of all clients' data, exact from sums that add up over clients.

    Reports ``kid``, ``kid_test`` against the test split, and once ``kid_floor`` between these two. Unlike the Fréchet
    distance it is unbiased: its expectation does not depend on the number of samples.

    Args:
        features: Feature network of at most 64 features; default the small classifier for labelled data, else pixels,
            averaged down to as many.
    """

    @checked()
    def __init__(self, features: FeatureNet | None = None) -> None:
        self.features = features
        self.net: FrozenNet | None = None
        self.real: KernelSums | None = None
        self.held_out: KernelSums | None = None

    def _sums(self, batches: Iterable[Tensor]) -> KernelSums:
        assert self.net is not None
        return kernel_sums(extracted(self.net, batches), num_features=self.net.num_features)

    def queries(self, data: FederatedDataModule, *, sent: bool = False) -> list[FederatedQuery]:
        return [ThirdPowers(net) for net in networks(self.features, data, sent=sent, pixels=self._pixels(data))]

    def _pixels(self, data: FederatedDataModule) -> PixelFeatures:
        return PixelFeatures(side=math.isqrt(MOST_FEATURES // data.sample_shape[0]))

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        self.net = network(self.features, data, pixels=self._pixels(data)).to(device)
        self.real = KernelSums.of_state(summed(data, ThirdPowers(self.net)))
        check_reals(self.real.count, of="KernelDistance")
        self.held_out = None
        if not is_enough(data.test_samples, for_what="kid_floor and kid_test"):
            return {"kid_num_reals": self.real.count}
        self.held_out = self._sums(chunks(everything(data.test_samples)))
        return {"kid_floor": kernel_distance(self.real, self.held_out), "kid_num_reals": self.real.count}

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        assert self.real is not None
        fake = self._sums(samples.split(CHUNK))
        sides = {"kid": self.real, "kid_test": self.held_out}
        return {name: kernel_distance(side, fake) for name, side in sides.items() if side is not None}


class PrecisionRecall(Metric):
    """Recall of the union of all clients, exact, and precision, recall, density and coverage of the test split.

    ``recall`` needs counts from clients only. The other three would need the pooled reals' own neighbours, so they are
    measured where the server has reals of its own: ``precision_test``, ``recall_test``, ``density_test`` and
    ``coverage_test``. See :func:`fedgan_lightning.evaluation.neighbours.precision_recall`.

    Args:
        features: Feature network; default the small classifier for labelled data, else pixels.
        k: Neighbours; 5 as Naeem et al. 2020, 3 as Kynkaanniemi et al. 2019.
    """

    test_only = True
    needs_client_samples = True

    @checked(k="[1, inf)")
    def __init__(self, features: FeatureNet | None = None, *, k: int = 5) -> None:
        self.features, self.k = features, k
        self.net: FrozenNet | None = None
        self.clients: list[Tensor] = []
        self.held_out = torch.empty(0)

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        self.net = network(self.features, data).to(device)
        self.clients = [torch.cat(list(self._features(chunks(view)))) for view in clients_of(data)]
        self.held_out = torch.cat(list(self._features(chunks(everything(data.test_samples)))))
        if len(self.held_out) <= self.k:
            raise SampleSizeError(
                message(
                    "PrecisionRecall must have more than k test samples",
                    received=f"{len(self.held_out)} in the test split, k={self.k}",
                    fix="lower k, raise the source's test_fraction, or add samples",
                )
            )
        return {"recall_num_reals": sum(map(len, self.clients)), "recall_k": self.k}

    def _features(self, batches: Iterable[Tensor]) -> Iterable[Tensor]:
        assert self.net is not None
        return extracted(self.net, batches)

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        if len(samples) <= self.k:
            raise ConfigurationError(
                message("PrecisionRecall must have more than k samples", received=len(samples), fix="raise num_samples")
            )
        fakes = torch.cat(list(self._features(samples.split(CHUNK))))
        reach = neighbours.radii(fakes, k=self.k)
        covered = sum(neighbours.count_covered(own, fakes, reach) for own in self.clients)
        held_out = neighbours.precision_recall(self.held_out, fakes, k=self.k)
        return {
            "recall": covered / sum(map(len, self.clients)),
            **{f"{name}_test": value for name, value in held_out.items()},
        }


class ClassifierScore(Metric):
    """The form of the Inception Score on the small classifier: ``classifier_score`` = exp(H(E p) - E H(p)).

    p are the classifier's probabilities of a generated sample; at best it is the number of classes. It looks at
    generated samples alone, so that nothing has to be asked of clients. Source: Salimans et al. 2016, section 4.

    Args:
        features: The classifier.
    """

    @checked()
    def __init__(self, features: ClassifierFeatures | None = None) -> None:
        self.features = features if features is not None else ClassifierFeatures()
        self.net: FrozenNet | None = None

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        self.net = network(self.features, data).to(device)
        if not is_enough(data.test_samples, for_what="classifier_score_of_reals", least=1):
            return {}
        return {"classifier_score_of_reals": self._score(chunks(everything(data.test_samples)))}

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        return {"classifier_score": self._score(samples.split(CHUNK))}

    @torch.no_grad()
    def _score(self, batches: Iterable[Tensor]) -> float:
        assert self.net is not None
        device = next(self.net.parameters()).device
        total, entropies, count = torch.zeros(()), 0.0, 0
        for batch in batches:
            logs = self.net.logits(batch.to(device, torch.float32)).double().log_softmax(1).cpu()
            total = total + logs.exp().sum(0)
            entropies -= float((logs.exp() * logs).sum())
            count += len(logs)
        mean = total / count
        return float(torch.exp(-(mean * mean.clamp_min(1e-300).log()).sum() - entropies / count))


class IntraClassDistance(Metric):
    """Mean over classes of the Fréchet distance within a class, ``intra_fid``; the classes asked for are believed.

    It sees a generator that makes every class but mixes them up. With few samples of a class it is mostly bias: compare
    it with ``intra_fid_floor``, real against real.

    Args:
        features: Feature network; default the small classifier.
    """

    test_only = True
    needs_client_samples = True  # a class of which a client holds one sample would tell that sample's features

    @checked()
    def __init__(self, features: FeatureNet | None = None) -> None:
        self.features = features
        self.net: FrozenNet | None = None
        self.real: dict[int, FeatureSums] = {}

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        if data.num_classes < 2:
            raise ConfigurationError(
                message("IntraClassDistance must have labelled data", received="no labels", fix="leave it out")
            )
        self.net = network(self.features, data).to(device)
        self.real = {}
        for view in clients_of(data):
            for x, y in view.chunks(CHUNK):
                self._add(self.real, x, y)
        held_out: dict[int, FeatureSums] = {}
        for x, y in everything(data.test_samples).chunks(CHUNK):
            self._add(held_out, x, y)
        floor = _mean_distance(self.real, held_out)
        if floor is None:
            raise SampleSizeError(
                message(
                    "IntraClassDistance must have a class with two samples in both splits",
                    received="none",
                    fix="raise the source's test_fraction, or add samples",
                )
            )
        return {"intra_fid_floor": floor}

    def _add(self, sums: dict[int, FeatureSums], x: Tensor, y: Tensor) -> None:
        assert self.net is not None
        for label in y.unique().tolist():
            mine = feature_sums(self.net, [x[y == label]])
            sums[label] = sums[label] + mine if label in sums else mine

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        if labels is None:
            return {}
        fake: dict[int, FeatureSums] = {}
        self._add(fake, samples, labels.to(samples.device))
        distance = _mean_distance(self.real, fake)
        return {} if distance is None else {"intra_fid": distance}


def _mean_distance(real: dict[int, FeatureSums], other: dict[int, FeatureSums]) -> float | None:
    """Return the mean over the classes that have two samples on both sides; ``None`` where there is none."""
    common = [label for label in real if label in other and min(real[label].count, other[label].count) > 1]
    distances = [frechet_distance(real[label], other[label]) for label in common]
    return sum(distances) / len(distances) if distances else None
