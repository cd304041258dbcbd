"""Whether synthetic samples are of use, and whether they are copies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.data.samples import Samples
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.evaluation import neighbours
from fedgan_lightning.evaluation.features import Classifier, FeatureNet, FrozenNet, PixelFeatures, train_classifier
from fedgan_lightning.evaluation.fidelity import extracted
from fedgan_lightning.evaluation.metrics import CHUNK, Metric, chunks, clients_of, everything
from fedgan_lightning.seeding import isolated_rng, make_generator


class SyntheticTraining(Metric):
    """Accuracy on the real test split of a classifier trained on generated samples alone: ``tstr_accuracy``.

    Beside it stands ``trtr_accuracy``, once: the same classifier trained on as many real samples. Source: Ravuri and
    Vinyals 2019 (classification accuracy score).

    Args:
        epochs: Passes over the samples.
        seed: Seed of the classifier's initial weights and minibatches.
    """

    full = True

    def __init__(self, *, epochs: int = 8, seed: int = 0) -> None:
        self.epochs, self.seed = epochs, seed
        self.train: Samples | None = None
        self.test: Samples | None = None
        self.num_classes = 0

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        if data.num_classes < 2 or data.test_samples.y is None:
            raise ConfigurationError(
                message("SyntheticTraining needs labelled data", received="no labels", fix="leave it out")
            )
        self.test, self.train, self.num_classes = data.test_samples, data.train_samples, data.num_classes
        return {}

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        if labels is None:
            return {}
        assert self.train is not None
        assert self.train.y is not None
        x = ((samples + 1) * 127.5).round().clamp(0, 255).to(torch.uint8) if self.train.is_image else samples
        chosen = torch.randperm(len(self.train), generator=make_generator(self.seed, "tstr"))[: len(samples)]
        real = Samples(x=self.train.x[chosen], y=self.train.y[chosen])
        return {
            "tstr_accuracy": self._accuracy(Samples(x=x.cpu(), y=labels.cpu())),
            "trtr_accuracy": self._accuracy(real),
        }

    def _accuracy(self, samples: Samples) -> float:
        assert self.test is not None
        # Trainer.test forbids gradients, and what was made there cannot take part in any: hence the copy.
        with isolated_rng(self.seed), torch.inference_mode(False), torch.enable_grad():
            net = Classifier(tuple(samples.x.shape[1:]), self.num_classes, is_image=samples.is_image)
            assert samples.y is not None
            copied = Samples(x=samples.x.clone(), y=samples.y.clone())
            train_classifier(net, copied, epochs=self.epochs, seed=self.seed)
        net.eval()
        right = 0
        with torch.no_grad():
            for x, y in everything(self.test).chunks(CHUNK):
                right += int((net(x.float())[1].argmax(1) == y).sum())
        return right / len(self.test)


class Memorisation(Metric):
    """Whether generated samples are nearer to training data than unseen reals are, measured where the data lives.

    ``nearest_distance_ratio`` is the median distance of a generated sample to its nearest training sample, over the
    same of the test split: far below 1 means copies. ``authenticity_within_clients`` is the share of generated samples
    that are farther from their nearest real than that real is from its nearest other real *of the same client*; the
    union's neighbours are not known anywhere, so it is an approximation, and too small. Source: Alaa et al. 2022,
    section 4.3.

    Args:
        features: Feature network; default pixels.
    """

    full = True

    def __init__(self, features: FeatureNet | None = None) -> None:
        self.features = features or PixelFeatures()
        self.net: FrozenNet | None = None
        self.clients: list[Tensor] = []
        self.reach: list[Tensor] = []
        self.usual = 0.0

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        self.net = self.features.build(data.train_samples, num_classes=data.num_classes).to(device)
        self.clients = [self._features(chunks(view)) for view in clients_of(data)]
        self.reach = [neighbours.radii(own, k=1) for own in self.clients]
        held_out = self._features(chunks(everything(data.test_samples)))
        self.usual = float(self._nearest(held_out)[0].median())
        return {"nearest_distance_of_reals": self.usual}

    def _features(self, batches: Iterable[Tensor]) -> Tensor:
        assert self.net is not None
        return torch.cat(list(extracted(self.net, batches)))

    def _nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return distance to the nearest real of all clients, and that real's distance to its nearest neighbour."""
        answers = []
        for own, reach in zip(self.clients, self.reach):
            distances, indices = neighbours.nearest(queries, own)
            answers.append((distances, reach[indices]))
        distances = torch.stack([answer[0] for answer in answers])
        best = distances.argmin(0, keepdim=True)
        reach = torch.stack([answer[1] for answer in answers])
        return distances.gather(0, best)[0], reach.gather(0, best)[0]

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        distances, reach = self._nearest(self._features(samples.split(CHUNK)))
        return {
            "nearest_distance_ratio": float(distances.median()) / max(self.usual, 1e-12),
            "authenticity_within_clients": float((distances > reach).double().mean()),
        }
