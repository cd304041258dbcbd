"""Whether synthetic samples are of use, and whether they are copies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.data.samples import ClientSamples, Samples, to_bytes
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.evaluation import neighbours
from fedgan_lightning.evaluation.features import Classifier, FeatureNet, FrozenNet, PixelFeatures, train_classifier
from fedgan_lightning.evaluation.federated_queries import CHUNK, chunks
from fedgan_lightning.evaluation.fidelity import extracted
from fedgan_lightning.evaluation.metrics import Metric, clients_of, everything, network, seen_by_clients
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import isolated_rng, make_generator


class SyntheticTraining(Metric):
    """Accuracy and AUC on the real test split of a classifier trained on generated samples alone: ``tstr_accuracy``
    and ``tstr_auc``, in [0, 1].

    Beside them stand ``trtr_accuracy`` and ``trtr_auc``: the same classifier trained on as many real samples. The AUC
    is the mean over classes of each against the rest. Source: Ravuri and Vinyals 2019 (classification accuracy score).

    Args:
        epochs: Passes over the samples.
        seed: Seed of the classifier's initial weights and minibatches.
    """

    needs_server_samples = True
    test_only = True

    @checked(epochs="[1, inf)", seed="[0, inf)")
    def __init__(self, *, epochs: int = 8, seed: int = 0) -> None:
        self.epochs, self.seed = epochs, seed
        self.train: Samples | None = None
        self.test: Samples | None = None
        self.num_classes = 0

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        if data.num_classes < 2 or data.test_samples.y is None:
            raise ConfigurationError(
                message("SyntheticTraining must have labelled data", received="no labels", fix="leave it out")
            )
        self.test, self.train, self.num_classes = data.test_samples, data.train_samples, data.num_classes
        return {}

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        if labels is None:
            return {}
        assert self.train is not None
        assert self.train.y is not None
        assert self.test is not None
        chosen = torch.randperm(len(self.train), generator=make_generator(self.seed, "tstr"))[: len(samples)]
        real = Samples(x=self.train.x[chosen], y=self.train.y[chosen])
        values: dict[str, float] = {}
        for name, own in (("tstr", stored(samples, labels, is_image=self.train.is_image)), ("trtr", real)):
            options = {"num_classes": self.num_classes, "epochs": self.epochs, "seed": self.seed}
            values[f"{name}_accuracy"], values[f"{name}_auc"] = classified(own, everything(self.test), **options)
        return values


class ClientAugmentation(Metric):
    """What generated samples do for a client's own classifier: its AUC on the test split, with and without them.

    Reports ``auc_own_data/NUMBER`` for a classifier trained on the client's samples, and ``auc_with_synthetic/NUMBER``
    for one trained on these and generated ones, for as many steps; the test split is seen as the client sees the world.
    Both are means over ``repeats`` classifiers.

    Args:
        clients: Which clients; default the one with fewest samples.
        steps: Training steps, of 64 samples.
        repeats: Classifiers, which differ in initial weights and order.
        ratio: Most generated samples per sample of the client.
        seed: Seed of the first.
    """

    test_only = True
    needs_client_samples = True

    @checked(clients="[0, inf)", steps="[1, inf)", repeats="[1, inf)", ratio="(0, inf)", seed="[0, inf)")
    def __init__(
        self,
        *,
        clients: Sequence[int] | None = None,
        steps: int = 400,
        repeats: int = 3,
        ratio: float = 4.0,
        seed: int = 0,
    ) -> None:
        self.clients, self.steps, self.repeats = None if clients is None else list(clients), steps, repeats
        self.ratio, self.seed = ratio, seed
        self.own: dict[int, tuple[Samples, ClientSamples]] = {}
        self.is_image, self.num_classes = True, 0

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        if data.num_classes < 2 or data.test_samples.y is None:
            raise ConfigurationError(
                message("ClientAugmentation must have labelled data", received="no labels", fix="leave it out")
            )
        self.is_image, self.num_classes = data.train_samples.is_image, data.num_classes
        smallest = min(range(data.num_clients), key=data.num_examples)
        for client_id in [smallest] if self.clients is None else self.clients:
            if not 0 <= client_id < data.num_clients:
                raise ConfigurationError(
                    message(
                        f"ClientAugmentation must name clients 0 to {data.num_clients - 1}",
                        received=client_id,
                        fix="change its clients",
                    )
                )
            view = data.client_samples(client_id)
            own = stored(*view.take(torch.arange(len(view))), is_image=self.is_image)
            self.own[client_id] = own, replace(everything(data.test_samples), shift=view.shift)
        return {f"auc_own_data/{k}": self._auc(own, test) for k, (own, test) in self.own.items()}

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        if labels is None:
            return {}
        values = {}
        for client_id, (own, test) in self.own.items():
            count = min(len(samples), round(self.ratio * len(own)))
            made = stored(samples[:count], labels[:count], is_image=self.is_image)
            assert own.y is not None
            assert made.y is not None
            both = Samples(x=torch.cat([own.x, made.x]), y=torch.cat([own.y, made.y]))
            values[f"auc_with_synthetic/{client_id}"] = self._auc(both, test)
        return values

    def _auc(self, samples: Samples, test: ClientSamples) -> float:
        epochs = max(1, round(self.steps * 64 / len(samples)))
        found = [
            classified(samples, test, num_classes=self.num_classes, epochs=epochs, seed=self.seed + number)[1]
            for number in range(self.repeats)
        ]
        return sum(found) / len(found)


def stored(x: Tensor, y: Tensor, *, is_image: bool) -> Samples:
    """Return samples in [-1, 1] with their labels as a data set; images become bytes."""
    x = x.cpu()
    return Samples(x=to_bytes(x) if is_image else x, y=y.cpu())


def classified(
    samples: Samples, test: ClientSamples, *, num_classes: int, epochs: int, seed: int
) -> tuple[float, float]:
    """Return accuracy and AUC on ``test`` of a classifier trained on ``samples``."""
    # Trainer.test forbids gradients, and what was made there cannot take part in any: hence the copy.
    with isolated_rng(seed), torch.inference_mode(False), torch.enable_grad():
        net = Classifier(tuple(samples.x.shape[1:]), num_classes, is_image=samples.is_image)
        assert samples.y is not None
        copied = Samples(x=samples.x.clone(), y=samples.y.clone())
        train_classifier(net, copied, epochs=epochs, seed=seed)
    net.eval()
    with torch.no_grad():
        parts = [(net(x.float())[1].softmax(1), y) for x, y in test.chunks(CHUNK)]
    beliefs, labels = torch.cat([belief for belief, _ in parts]), torch.cat([y for _, y in parts])
    accuracy = float((beliefs.argmax(1) == labels).float().mean())
    return accuracy, auroc(beliefs, labels)


def auroc(beliefs: Tensor, labels: Tensor) -> float:
    """Return the area under the ROC curve, one class against the others, in the mean over classes.

    Classes of which there are no samples, or nothing but samples, have no curve and do not count. NaN if none has.

    Args:
        beliefs: Probabilities (N, classes).
        labels: Classes (N,).
    """
    counts = labels.bincount(minlength=beliefs.shape[1]).tolist()
    known = [label for label, count in enumerate(counts) if 0 < count < len(labels)]
    areas = [float(binary_auroc(beliefs[:, label], (labels == label).long())) for label in known]
    return sum(areas) / len(areas) if areas else math.nan


class Memorisation(Metric):
    """Whether generated samples are nearer to training data than unseen reals are, measured where the data lives.

    ``nearest_distance_ratio`` is the median distance of a generated sample to its nearest training sample, over the
    same of the test split, seen as clients see the world: far below 1 means copies. ``authenticity_within_clients`` is
    the share of generated samples that are farther from their nearest real than that real is from its nearest other
    real *of the same client*; the union's neighbours are not known anywhere, so it is an approximation, and too small.
    Source: Alaa et al. 2022, section 4.3.

    Args:
        features: Feature network; default pixels.
    """

    test_only = True
    needs_client_samples = True

    @checked()
    def __init__(self, features: FeatureNet | None = None) -> None:
        self.features = features or PixelFeatures()
        self.net: FrozenNet | None = None
        self.clients: list[Tensor] = []
        self.reach: list[Tensor] = []
        self.usual = 0.0

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        self.net = network(self.features, data).to(device)
        self.clients = [self._features(chunks(view)) for view in clients_of(data)]
        self.reach = [neighbours.radii(own, k=1) for own in self.clients]
        held_out = self._features(x for view in seen_by_clients(data) for x in chunks(view))
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
