"""What :class:`~fedgan_lightning.evaluation.callback.Evaluation` measures: a few small objects with one interface."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.data.samples import ClientSamples, SampleForm, Samples
from fedgan_lightning.errors import ConfigurationError, SampleSizeError, message
from fedgan_lightning.evaluation import modes
from fedgan_lightning.evaluation.features import ClassifierFeatures, FeatureNet, FileFeatures, FrozenNet, PixelFeatures
from fedgan_lightning.evaluation.federated_queries import CHUNK, FeatureMoments, FederatedQuery, answers, chunks
from fedgan_lightning.evaluation.fid import FeatureSums, feature_sums, frechet_distance
from fedgan_lightning.evaluation.portable import sums_of_state
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import make_generator

logger = logging.getLogger("fedgan_lightning")


class Metric(ABC):
    """A measure of generated samples against the clients' data.

    Attributes:
        test_only: Whether it takes so long that it belongs to the full evaluation, which ``test`` makes.
        needs_client_samples: Whether it looks at clients' samples one by one, and does with no sums over them (see
            :mod:`fedgan_lightning.evaluation.federated_queries`); it is left out where they are elsewhere.
        needs_server_samples: Whether it compares with samples that the server itself has; it is left out where it has
            none.
        larger_is_better: Which of its values are; of all others smaller ones are better.
        networks: Networks that ``inspect`` reads, of which the server must have the clients' weights.
    """

    test_only: ClassVar[bool] = False
    needs_client_samples: ClassVar[bool] = False
    needs_server_samples: ClassVar[bool] = False
    larger_is_better: ClassVar[tuple[str, ...]] = ()
    networks: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        """Look at the real data once; return facts for the report, such as the floor.

        Raises:
            ConfigurationError: If the data has not what the metric needs.
        """

    def queries(self, data: FederatedDataModule, *, sent: bool = False) -> list[FederatedQuery]:
        """Return what it asks clients about their samples, as a client's own settings have it; by default nothing.

        Clients answer these queries and no others.

        Args:
            data: The client's.
            sent: Whether networks count whose weights come with the query.
        """
        return []

    @abstractmethod
    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        """Return values by name for generated samples (N, ...), and the classes asked for (N,) if there were any."""

    def inspect(self, model: nn.Module) -> dict[str, float]:
        """Return values by name that are read off the global module itself; none by default."""
        return {}


class FrechetDistance(Metric):
    """FID of generated samples against the union of all clients' data, from sums that add up over clients.

    Reports ``fid`` against the clients' data as they see it, ``fid_test`` against the test split that no client holds,
    and once ``fid_floor``, the distance between these two: real against real, at the sample counts that are reported
    with it. A test split of a single sample has no covariance: the last two are left out then.

    Args:
        features: Feature network; default the small classifier for labelled data, else pixels.
        max_reals: Use at most so many real samples of each client; ``None`` uses all.
    """

    @checked(max_reals="[2, inf)")
    def __init__(self, features: FeatureNet | None = None, *, max_reals: int | None = None) -> None:
        self.features, self.max_reals = features, max_reals
        self.net: FrozenNet | None = None
        self.real: FeatureSums | None = None
        self.held_out: FeatureSums | None = None

    def queries(self, data: FederatedDataModule, *, sent: bool = False) -> list[FederatedQuery]:
        return [FeatureMoments(net, limit=self.max_reals) for net in networks(self.features, data, sent=sent)]

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        self.net = network(self.features, data).to(device)
        self.real = None  # of another data set, if this is not its first
        for mine in client_sums(data, self.net, limit=self.max_reals):
            self.real = mine if self.real is None else self.real + mine
        assert self.real is not None
        check_reals(self.real.count, of="FrechetDistance")
        self.held_out = None
        floor: dict[str, Any] = {}
        if is_enough(data.test_samples, for_what="fid_floor and fid_test"):
            self.held_out = feature_sums(self.net, chunks(everything(data.test_samples)))
            floor = {
                "fid_floor": frechet_distance(self.real, self.held_out),
                "fid_floor_num_samples": self.held_out.count,
            }
        return {
            **floor,
            "fid_num_reals": self.real.count,
            "fid_features": f"{self.net.name} (d={self.net.num_features})",
            "fid_features_hash": self.net.digest,
        }

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        assert self.net is not None
        assert self.real is not None
        fake = feature_sums(self.net, samples.split(CHUNK))
        sides = {"fid": self.real, "fid_test": self.held_out}
        return {name: frechet_distance(side, fake) for name, side in sides.items() if side is not None}


class ClassCoverage(Metric):
    """How many classes the generator makes, by a classifier: ``classes`` and ``class_distance``.

    A class counts if its share of the generated samples is at least a tenth of its share of the union. The distance is
    total variation between the two class histograms, in [0, 1]. With requested classes, ``class_accuracy`` is the share
    of samples that the classifier puts into the class asked for.

    Args:
        features: The classifier; its accuracy on the test split, if there is one, is ``classifier_accuracy``.
    """

    larger_is_better = ("classes", "class_accuracy")

    @checked()
    def __init__(self, features: ClassifierFeatures | FileFeatures | None = None) -> None:
        self.features = features if features is not None else ClassifierFeatures()
        self.net: FrozenNet | None = None
        self.shares = torch.empty(0)

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        self.net = network(self.features, data).to(device)
        counts = torch.from_numpy(data.label_counts()).double().sum(0)
        self.shares = counts / counts.sum()
        test = data.test_samples
        if not is_enough(test, for_what="classifier_accuracy", least=1):
            return {}
        guessed = torch.cat([self.net.classify(x) for x in chunks(everything(test))])
        assert test.y is not None
        return {"classifier_accuracy": float((guessed == test.y).float().mean())}

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        assert self.net is not None
        guessed = torch.cat([self.net.classify(chunk) for chunk in samples.split(CHUNK)])
        shares = torch.bincount(guessed, minlength=len(self.shares)).double() / len(guessed)
        values = {
            "classes": float(((shares >= 0.1 * self.shares) & (self.shares > 0)).sum()),
            "class_distance": float(0.5 * (shares - self.shares).abs().sum()),
        }
        if labels is not None:
            values["class_accuracy"] = float((guessed == labels.cpu()).float().mean())
        return values


class ModeCoverage(Metric):
    """Modes covered, share of high-quality samples, balance, and spread within modes, where Gaussian modes are known.

    See :func:`fedgan_lightning.evaluation.modes.mode_statistics`.
    """

    larger_is_better = ("modes", "high_quality", "mode_spread")  # what fails is a spread below that of the data

    def __init__(self) -> None:
        self.centres, self.sigma = torch.empty(0), 0.0

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        source = data.source
        if not hasattr(source, "centres"):
            raise ConfigurationError(
                message(
                    "ModeCoverage must have a source with known modes",
                    received=type(source).__name__,
                    fix="use SlicedWasserstein or FrechetDistance",
                )
            )
        self.centres, self.sigma = source.centres, float(source.sigma)  # type: ignore[attr-defined]
        if not is_enough(data.test_samples, for_what="statistics of real samples", least=1):
            return {"num_modes": len(self.centres)}
        real = modes.mode_statistics(data.test_samples.x, centres=self.centres, sigma=self.sigma)
        of_reals = {f"{name}_of_reals": real[name] for name in ("high_quality", "mode_spread")}
        return {"num_modes": len(self.centres), **of_reals}

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        return modes.mode_statistics(samples.cpu(), centres=self.centres, sigma=self.sigma)


class SlicedWasserstein(Metric):
    """Sliced 1-Wasserstein distance to the held-out real samples, for low-dimensional data; floor from real against
    real.

    Args:
        num_projections: Random directions, drawn once with a fixed seed.
    """

    needs_server_samples = True

    @checked(num_projections="[1, inf)")
    def __init__(self, num_projections: int = 100) -> None:
        self.num_projections = num_projections
        self.real = self.directions = torch.empty(0)

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        self.real = _points(data.test_samples)
        directions = torch.randn(self.real.shape[1], self.num_projections, generator=make_generator(0, "directions"))
        self.directions = torch.nn.functional.normalize(directions.double(), dim=0)
        train = _points(data.train_samples)
        subset = train[torch.randperm(len(train), generator=make_generator(0, "floor"))[: len(self.real)]]
        return {"sliced_wasserstein_floor": modes.sliced_wasserstein(subset, self.real, self.directions)}

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        fake = samples.cpu().double().flatten(1)
        return {"sliced_wasserstein": modes.sliced_wasserstein(fake, self.real, self.directions)}


class ScalarParameters(Metric):
    """The values of all single-number parameters, as ``parameters/NAME``: for systems small enough to watch."""

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        return {}

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        return {}

    def inspect(self, model: nn.Module) -> dict[str, float]:
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.numel() == 1}
        return {f"parameters/{name.rsplit('.', 1)[-1]}": float(parameter.detach()) for name, parameter in named.items()}


def _points(samples: Samples) -> Tensor:
    """Return samples as rows of numbers in the generator's units: images are kept as bytes."""
    return torch.cat([x.double().flatten(1) for x in chunks(everything(samples))])


def is_enough(test: Samples, *, for_what: str, least: int = 2) -> bool:
    """Return whether a test split is large enough, and say what is left out if it is not.

    Args:
        test: The split.
        for_what: What needs it, for the message.
        least: Samples that it needs.
    """
    if len(test) < least and isinstance(test, SampleForm):
        logger.info(f"{for_what} are left out: the server has no samples of its own")
    elif len(test) < least:
        logger.warning(
            f"{for_what} are left out: the test split has {len(test)} of the {least} samples that they need. "
            "Raise the source's test_fraction, or add samples"
        )
    return len(test) >= least


def check_reals(count: int, *, of: str, least: int = 2, split: str = "training") -> None:
    """Refuse a split with too few samples.

    Raises:
        SampleSizeError: If there are fewer than ``least``.
    """
    if count < least:
        raise SampleSizeError(
            message(
                f"{of} must have at least {least} samples in the {split} split",
                received=count,
                fix=f"{'raise' if split == 'test' else 'lower'} the source's test_fraction, or add samples",
            )
        )


def network(
    features: FeatureNet | None, data: FederatedDataModule, *, pixels: PixelFeatures | None = None
) -> FrozenNet:
    """Return the feature network for these data; by default the small classifier, where there are labelled samples to
    train it on, else pixels.

    Args:
        features: What was asked for.
        data: The server's.
        pixels: Which pixels, by default.
    """
    trains = data.num_classes > 1 and len(data.train_samples) > 0
    found = features or (ClassifierFeatures() if trains else pixels or PixelFeatures())
    return found.build(data.train_samples, num_classes=data.num_classes)


def networks(
    features: FeatureNet | None, data: FederatedDataModule, *, sent: bool, pixels: PixelFeatures | None = None
) -> list[FrozenNet]:
    """Return the networks that a client with these settings may be asked about.

    Args:
        features: What its settings say.
        data: Its own.
        sent: Whether the weights of the small classifier may come with a query; who sends them can choose them so that
            sums tell single samples.
        pixels: Which pixels, by default.
    """
    classifies = sent and data.num_classes > 1
    asked = [pixels or PixelFeatures(), *([ClassifierFeatures()] if classifies else [])]
    found: list[FrozenNet] = []
    for own in asked if features is None else [features]:
        if not isinstance(own, ClassifierFeatures):
            found.append(own.build(data.train_samples, num_classes=data.num_classes))
        elif classifies:
            found.append(own.untrained(data.train_samples, num_classes=data.num_classes))
    return found


def client_sums(data: FederatedDataModule, net: FrozenNet, *, limit: int | None = None) -> Iterator[FeatureSums]:
    """Yield the sums of each client's features, computed where its samples are."""
    yield from map(sums_of_state, answers(data, FeatureMoments(net, limit=limit)))


def clients_of(data: FederatedDataModule) -> list[ClientSamples]:
    """Return a view of every client's samples."""
    return [data.client_samples(client_id) for client_id in range(data.num_clients)]


def everything(samples: Samples) -> ClientSamples:
    """Return a view of all samples."""
    return ClientSamples(samples=samples, indices=torch.arange(len(samples)))


def seen_by_clients(data: FederatedDataModule) -> list[ClientSamples]:
    """Return the test split as clients would see it: whole, or divided among their shifts in proportion to N_k."""
    test, views = everything(data.test_samples), clients_of(data)
    if all(view.shift is None for view in views):
        return [test]
    order = torch.randperm(len(test), generator=make_generator(data.seed, "test split by shift"))
    sizes = torch.tensor([len(view) for view in views], dtype=torch.float64)
    ends = (sizes.cumsum(0) / sizes.sum() * len(test)).round().long().tolist()
    parts = [order[start:end].sort().values for start, end in zip([0, *ends], ends)]
    return [replace(test, indices=part, shift=view.shift) for part, view in zip(parts, views) if len(part)]
