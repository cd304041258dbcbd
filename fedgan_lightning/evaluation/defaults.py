"""What is measured unless somebody says otherwise."""

from __future__ import annotations

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.data.sources import Interactions
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
from fedgan_lightning.gan.inpainting_mask import InpaintingMask


def default_metrics(data: FederatedDataModule, *, condition: object | None = None) -> list[Metric]:
    """Return what suits the data: modes where known, rankings of items, BLEU for text, scores for series, FID and more
    for images, else Wasserstein; and of generators that complete pictures how well they do, with holes as in training.

    Args:
        data: The clients'.
        condition: What the generator is told beside noise, if anything.
    """
    if isinstance(condition, InpaintingMask):
        return [Completion(condition)]
    if hasattr(data.source, "centres"):
        return [ModeCoverage()]
    if isinstance(data.source, Interactions):
        return [RankingQuality()]
    if vocabulary_of(data) is not None:
        return [HeldOutLikelihood(), BLEU(), SelfBLEU()]
    if len(data.sample_shape) == 2:
        series: list[Metric] = [SlicedWasserstein(), ProfileCentroids(), DiscriminativeScore(), PredictiveScore()]
        return series
    if len(data.sample_shape) != 3:
        return [SlicedWasserstein()]
    found: list[Metric] = [FrechetDistance()]
    found += [ClientDistances()] if data.has_client_sums else []
    found += [KernelDistance(), PrecisionRecall(), Memorisation(), MembershipInference()]
    if data.num_classes > 1:
        found += [ClassCoverage(), ClassBreakdown(), ClassifierScore(), SyntheticTraining(), IntraClassDistance()]
    return found
