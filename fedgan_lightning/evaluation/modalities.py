"""Modalities: one object per kind of samples says what measures them, how they are drawn, and how they are stored.

A source names the class of its modality, and so may a condition of the generator; without a name the shape of samples
decides. Somebody else's modality is a subclass of :class:`Modality` under any class path.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.data.samples import to_bytes
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.evaluation.audit import MembershipInference
from fedgan_lightning.evaluation.completion import Completion
from fedgan_lightning.evaluation.downstream_tasks import Memorisation, SyntheticTraining
from fedgan_lightning.evaluation.fidelity import ClassifierScore, IntraClassDistance, KernelDistance, PrecisionRecall
from fedgan_lightning.evaluation.metrics import (
    ClassCoverage,
    FrechetDistance,
    Metric,
    ModeCoverage,
    SlicedWasserstein,
)
from fedgan_lightning.evaluation.per_class import ClassBreakdown, ClientDistances
from fedgan_lightning.evaluation.ranking import RankingQuality
from fedgan_lightning.evaluation.series import DiscriminativeScore, PredictiveScore, ProfileCentroids
from fedgan_lightning.evaluation.text import BLEU, HeldOutLikelihood, SelfBLEU, vocabulary_of
from fedgan_lightning.seeding import make_generator
from fedgan_lightning.visuals import pictures

#: Point -> D's belief that it is real.
Belief = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class View:
    """How samples are shown.

    Attributes:
        columns: Images per row.
        rows: Rows, where there are no classes.
        num_points: Points of a scatter plot.
        seed: Decides which real samples stand beside generated ones.
        title: What stands above.
        belief: What the discriminator makes of points of the plane, where that can be drawn.
    """

    columns: int = 10
    rows: int = 8
    num_points: int = 2000
    seed: int = 0
    title: str = ""
    belief: Belief | None = None


class Modality:
    """Samples of which no more is known than that they are vectors: points, of which two coordinates are drawn."""

    #: Whether ``predict`` draws the very samples that it stores, each of them; else as many as a picture shows.
    draws_stored = False

    def default_metrics(self, data: FederatedDataModule, condition: Any = None) -> list[Metric]:
        """Return what measures such samples unless somebody says otherwise.

        Args:
            data: The clients'.
            condition: What the generator gets beside noise, if anything.
        """
        return [SlicedWasserstein()]

    def num_shown(self, data: FederatedDataModule, view: View) -> int:
        """Return how many samples a picture shows."""
        return view.num_points

    def labels_shown(self, data: FederatedDataModule, view: View) -> Tensor | None:
        """Return the classes of the samples in a picture; ``None`` for any."""
        return None

    def render(self, samples: Tensor, data: FederatedDataModule, view: View) -> pictures.Picture:
        """Return a picture of generated samples (N, ...), on the CPU."""
        real = data.train_samples.x.flatten(1)[:, :2]
        chosen = torch.randperm(len(real), generator=make_generator(view.seed, "scatter"))[: view.num_points]
        points = samples.flatten(1)[:, :2]
        return pictures.scatter(points.double(), real[chosen].double(), title=view.title, belief=view.belief)

    def lines(self, samples: Tensor, data: FederatedDataModule) -> list[str] | None:
        """Return samples as lines of text; ``None`` of most."""
        return None

    def stored(self, samples: Tensor, data: FederatedDataModule) -> Tensor:
        """Return samples as ``predict`` writes them."""
        return samples


class KnownModes(Modality):
    """Points around modes that are known: rings and grids of Gaussians."""

    def default_metrics(self, data: FederatedDataModule, condition: Any = None) -> list[Metric]:
        return [ModeCoverage()]


class Images(Modality):
    """Pictures (C, H, W) in [-1, 1]; one class per row where there are classes."""

    draws_stored = True

    def default_metrics(self, data: FederatedDataModule, condition: Any = None) -> list[Metric]:
        found: list[Metric] = [FrechetDistance()]
        found += [ClientDistances()] if data.has_client_sums else []
        found += [KernelDistance(), PrecisionRecall(), Memorisation(), MembershipInference()]
        if data.num_classes > 1:
            found += [ClassCoverage(), ClassBreakdown(), ClassifierScore(), SyntheticTraining(), IntraClassDistance()]
        return found

    def num_shown(self, data: FederatedDataModule, view: View) -> int:
        return view.columns * (data.num_classes or view.rows)

    def labels_shown(self, data: FederatedDataModule, view: View) -> Tensor | None:
        return torch.arange(data.num_classes).repeat_interleave(view.columns) if data.num_classes else None

    def render(self, samples: Tensor, data: FederatedDataModule, view: View) -> pictures.Picture:
        return pictures.grid(samples, columns=view.columns)

    def stored(self, samples: Tensor, data: FederatedDataModule) -> Tensor:
        return to_bytes(samples) if data.train_samples.is_image else samples.float()


class CompletedImages(Images):
    """Pictures of which a part is given: what counts is how well they are completed."""

    def default_metrics(self, data: FederatedDataModule, condition: Any = None) -> list[Metric]:
        return [Completion(condition)]


class Series(Modality):
    """Series (variables, time)."""

    def default_metrics(self, data: FederatedDataModule, condition: Any = None) -> list[Metric]:
        return [SlicedWasserstein(), ProfileCentroids(), DiscriminativeScore(), PredictiveScore()]

    def num_shown(self, data: FederatedDataModule, view: View) -> int:
        return pictures.SERIES_SHOWN

    def render(self, samples: Tensor, data: FederatedDataModule, view: View) -> pictures.Picture:
        order = torch.randperm(len(data.train_samples), generator=make_generator(view.seed, "series"))
        samples = samples[: pictures.SERIES_SHOWN]
        return pictures.series(samples, data.train_samples.x[order[: len(samples)]], title=view.title)


class Text(Modality):
    """Sentences of word ids (T,), over a vocabulary that the clients have made."""

    def default_metrics(self, data: FederatedDataModule, condition: Any = None) -> list[Metric]:
        return [HeldOutLikelihood(), BLEU(), SelfBLEU()]

    def num_shown(self, data: FederatedDataModule, view: View) -> int:
        return view.columns * view.rows

    def render(self, samples: Tensor, data: FederatedDataModule, view: View) -> pictures.Picture:
        return pictures.page(self.lines(samples[: view.columns * view.rows], data), title=view.title)

    def lines(self, samples: Tensor, data: FederatedDataModule) -> list[str]:
        vocabulary = vocabulary_of(data)
        assert vocabulary is not None
        return vocabulary.write(samples)


class Interactions(Modality):
    """What users have done with items: rows of 0 and 1."""

    def default_metrics(self, data: FederatedDataModule, condition: Any = None) -> list[Metric]:
        return [RankingQuality()]


#: By the number of dimensions of a sample, where nobody names a modality.
BY_DIMENSIONS: dict[int, type[Modality]] = {2: Series, 3: Images}


def modality_of(data: FederatedDataModule, condition: object | None = None) -> Modality:
    """Return the modality of data, or of what a generator makes under ``condition``.

    Raises:
        ConfigurationError: If a source or condition names what is no modality.
    """
    named = getattr(condition, "modality", None) or getattr(data.source, "modality", None)
    if named is None:
        return BY_DIMENSIONS.get(len(data.sample_shape), Modality)()
    home, _, name = named.rpartition(".")
    try:
        found = getattr(importlib.import_module(home), name)()
        if not isinstance(found, Modality):
            raise TypeError(f"a {type(found).__name__}")
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        owner = type(condition if getattr(condition, "modality", None) else data.source).__name__
        raise ConfigurationError(
            message(
                f"{owner}.modality must be the class path of a Modality",
                received=f"{named} ({error})",
                fix="write one such as fedgan_lightning.evaluation.modalities.Images",
            )
        ) from error
    return found


def default_metrics(data: FederatedDataModule, *, condition: object | None = None) -> list[Metric]:
    """Return what measures these data unless somebody says otherwise."""
    return modality_of(data, condition).default_metrics(data, condition)
