"""What is measured unless somebody says otherwise."""

from __future__ import annotations

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.evaluation.breakdown import ClassBreakdown, ClientDistances
from fedgan_lightning.evaluation.fidelity import ClassifierScore, IntraClassDistance, KernelDistance, PrecisionRecall
from fedgan_lightning.evaluation.metrics import ClassCoverage, FrechetDistance, Metric, ModeCoverage, SlicedWasserstein
from fedgan_lightning.evaluation.utility import Memorisation, SyntheticTraining


def default_metrics(data: FederatedDataModule) -> list[Metric]:
    """Return the metrics that suit the data: modes where known, FID and more for images, else sliced Wasserstein."""
    if hasattr(data.source, "centres"):
        return [ModeCoverage()]
    if len(data.sample_shape) != 3:
        return [SlicedWasserstein()]
    found: list[Metric] = [FrechetDistance(), KernelDistance(), PrecisionRecall(), Memorisation(), ClientDistances()]
    if data.num_classes > 1:
        found += [ClassCoverage(), ClassBreakdown(), ClassifierScore(), IntraClassDistance(), SyntheticTraining()]
    return found
