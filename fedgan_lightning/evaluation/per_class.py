"""What one number hides: values by class and by client."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.evaluation.features import ClassifierFeatures, FeatureNet, FileFeatures, FrozenNet
from fedgan_lightning.evaluation.federated_queries import CHUNK, FeatureMoments, FederatedQuery
from fedgan_lightning.evaluation.fid import FeatureSums, feature_sums, frechet_distance
from fedgan_lightning.evaluation.metrics import Metric, client_sums, network, networks
from fedgan_lightning.options import checked

#: Above this number of clients only the extremes are reported.
MOST_CLIENTS = 50


class ClassBreakdown(Metric):
    """How often each class is made, and how often it is made when asked for, by a classifier.

    Reports ``class_share/NAME``, in [0, 1], beside ``class_share_of_union/NAME``; with requested classes also
    ``class_recognised/NAME``, the share of samples of that class that the classifier puts there.

    Args:
        features: The classifier.
    """

    test_only = True

    @checked()
    def __init__(self, features: ClassifierFeatures | FileFeatures | None = None) -> None:
        self.features = features if features is not None else ClassifierFeatures()
        self.net: FrozenNet | None = None
        self.names: list[str] = []

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        self.net = network(self.features, data).to(device)
        self.names = [str(name) for name in data.class_names] or [str(label) for label in range(data.num_classes)]
        counts = data.label_counts().sum(0)
        return {f"class_share_of_union/{name}": n / counts.sum() for name, n in zip(self.names, counts.tolist())}

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        assert self.net is not None
        guessed = torch.cat([self.net.classify(chunk) for chunk in samples.split(CHUNK)])
        values = {f"class_share/{name}": float((guessed == i).float().mean()) for i, name in enumerate(self.names)}
        if labels is not None:
            for i, name in enumerate(self.names):
                asked = guessed[labels.cpu() == i]
                if len(asked):
                    values[f"class_recognised/{name}"] = float((asked == i).float().mean())
        return values


class ClientDistances(Metric):
    """The Fréchet distance of all generated samples to each client's own data: ``client_fid/NUMBER``.

    It shows whom the generator serves. With classes divided among clients it is large for everybody, since each client
    holds a part of what is generated; its mean is not the distance to the pooled data, and ranks models wrongly. Above
    50 clients only ``client_fid_median`` and ``client_fid_largest`` are reported.

    Args:
        features: Feature network; default the small classifier for labelled data, else pixels.
    """

    test_only = True

    @checked()
    def __init__(self, features: FeatureNet | None = None) -> None:
        self.features = features
        self.net: FrozenNet | None = None
        self.clients: list[FeatureSums] = []

    def queries(self, data: FederatedDataModule, *, sent: bool = False) -> list[FederatedQuery]:
        return [FeatureMoments(net) for net in networks(self.features, data, sent=sent)]

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        if not data.has_client_sums:
            raise ConfigurationError(
                message(
                    "ClientDistances must have sums of features client by client",
                    received="secure aggregation, which hides them",
                    fix="take it out of evaluation.metrics",
                )
            )
        self.net = network(self.features, data).to(device)
        self.clients = list(client_sums(data, self.net))
        return {}

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        assert self.net is not None
        fake = feature_sums(self.net, samples.split(CHUNK))
        found = {k: frechet_distance(own, fake) for k, own in enumerate(self.clients) if own.count > 1}
        if len(self.clients) <= MOST_CLIENTS:
            return {f"client_fid/{k}": value for k, value in found.items()}
        if not found:
            return {}
        values = torch.tensor(list(found.values()))
        return {"client_fid_median": float(values.median()), "client_fid_largest": float(values.max())}
