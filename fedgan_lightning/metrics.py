"""Metrics of the evaluation, and the features that they are computed in."""

from __future__ import annotations

from fedgan_lightning.evaluation.attacks import (
    MembershipAttacks,
)
from fedgan_lightning.evaluation.audit import (
    MembershipInference,
)
from fedgan_lightning.evaluation.completion import (
    Completion,
)
from fedgan_lightning.evaluation.downstream_tasks import (
    ClientAugmentation,
    Memorisation,
    SyntheticTraining,
)
from fedgan_lightning.evaluation.features import (
    ClassifierFeatures,
    FeatureNet,
    FileFeatures,
    InceptionFeatures,
    ModuleFeatures,
    PixelFeatures,
)
from fedgan_lightning.evaluation.federated_queries import (
    FederatedQuery,
)
from fedgan_lightning.evaluation.fidelity import (
    ClassifierScore,
    IntraClassDistance,
    KernelDistance,
    PrecisionRecall,
)
from fedgan_lightning.evaluation.metrics import (
    ClassCoverage,
    FrechetDistance,
    Metric,
    ModeCoverage,
    SlicedWasserstein,
)
from fedgan_lightning.evaluation.modalities import (
    Modality,
)
from fedgan_lightning.evaluation.per_class import (
    ClassBreakdown,
    ClientDistances,
)
from fedgan_lightning.evaluation.ranking import (
    RankingQuality,
)
from fedgan_lightning.evaluation.series import (
    DiscriminativeScore,
    PredictiveScore,
    ProfileCentroids,
)
from fedgan_lightning.evaluation.text import (
    BLEU,
    HeldOutLikelihood,
    SelfBLEU,
)
