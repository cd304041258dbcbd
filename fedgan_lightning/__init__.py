"""Train GANs over data that must not move: federated GANs on PyTorch Lightning.

Names are loaded when they are first used, so that ``import fedgan_lightning`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fedgan_lightning.version import __version__

if TYPE_CHECKING:
    from fedgan_lightning.api import Federation
    from fedgan_lightning.checkpoints import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint
    from fedgan_lightning.data.datamodule import FederatedDataModule
    from fedgan_lightning.data.partition import (
        IID,
        ClassesPerClient,
        ClassLists,
        ClassMixes,
        Dirichlet,
        FeatureShift,
        Natural,
        Partition,
        QuantitySkew,
    )
    from fedgan_lightning.data.samples import Samples
    from fedgan_lightning.data.sources import (
        CelebA,
        CSVProfiles,
        Digits,
        Grid,
        ImageFolder,
        Interactions,
        MedMNIST,
        MedMNISTFile,
        Ring,
        Segments,
        Source,
        SwissRoll,
        TextFile,
        TorchvisionImages,
    )
    from fedgan_lightning.data.vocabulary import Vocabulary
    from fedgan_lightning.errors import (
        CheckpointError,
        ClientError,
        ConfigurationError,
        DataError,
        FedGANError,
        QuorumError,
        UpdateError,
    )
    from fedgan_lightning.evaluation.audit import MembershipInference
    from fedgan_lightning.evaluation.callback import Evaluation
    from fedgan_lightning.evaluation.class_gap import HeldAbsentGap
    from fedgan_lightning.evaluation.completion import Completion
    from fedgan_lightning.evaluation.downstream_tasks import ClientAugmentation, Memorisation, SyntheticTraining
    from fedgan_lightning.evaluation.features import (
        ClassifierFeatures,
        FeatureNet,
        InceptionFeatures,
        ModuleFeatures,
        PixelFeatures,
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
    from fedgan_lightning.evaluation.per_class import ClassBreakdown, ClientDistances
    from fedgan_lightning.evaluation.ranking import RankingQuality
    from fedgan_lightning.evaluation.series import DiscriminativeScore, PredictiveScore, ProfileCentroids
    from fedgan_lightning.evaluation.text import BLEU, HeldOutLikelihood, SelfBLEU
    from fedgan_lightning.federation.aggregation import WeightedMean
    from fedgan_lightning.federation.executors import (
        AutoExecutor,
        AutotunedExecutor,
        FaultyExecutor,
        SequentialExecutor,
        VectorizedExecutor,
    )
    from fedgan_lightning.federation.orchestrator import FederatedOrchestrator
    from fedgan_lightning.federation.robust import (
        CoordinateMedian,
        GeometricMedian,
        Krum,
        NearestNeighborMixing,
        TrimmedMean,
    )
    from fedgan_lightning.federation.rules import RoundRules, UpdateValidator
    from fedgan_lightning.federation.sampling import (
        AllClients,
        AvailableClients,
        FractionOfClients,
        PoissonSampling,
        SelectedClients,
    )
    from fedgan_lightning.federation.secure import SecureAggregation
    from fedgan_lightning.federation.server import ServerModule
    from fedgan_lightning.federation.temperature import TemperatureSchedule
    from fedgan_lightning.federation.warm_start import StartFrom
    from fedgan_lightning.gan.augment import Augmentation, LeCam
    from fedgan_lightning.gan.cfgan_condition import CFGANCondition
    from fedgan_lightning.gan.conditions import Codec, Condition
    from fedgan_lightning.gan.editing import Projection, direction, edited, interpolate, project
    from fedgan_lightning.gan.inpainting_mask import InpaintingMask
    from fedgan_lightning.gan.module import GAN
    from fedgan_lightning.gan.networks import (
        ACGANDiscriminator,
        ACGANGenerator,
        CFGANDiscriminator,
        CFGANGenerator,
        DCGANDiscriminator,
        DCGANGenerator,
        InpaintingGenerator,
        MLPDiscriminator,
        MLPGenerator,
        PatchDiscriminator,
        ProfileDiscriminator,
        ProfileGenerator,
        R3GANDiscriminator,
        R3GANGenerator,
        ResNetDiscriminator,
        ResNetGenerator,
        TextDiscriminator,
        TextGenerator,
    )
    from fedgan_lightning.gan.objectives import (
        AdversarialLoss,
        Hinge,
        LeastSquares,
        Minimax,
        NonSaturating,
        RelativisticPairing,
        Wasserstein,
    )
    from fedgan_lightning.gan.penalties import R1, R2, GradientPenalty, Penalty
    from fedgan_lightning.gan.text import LanguageModel, OneHot
    from fedgan_lightning.protocol import (
        Aggregator,
        ClientFailure,
        ClientSampler,
        ClientTask,
        ClientUpdate,
        Executor,
        Participant,
        UpdateSum,
    )
    from fedgan_lightning.visuals.completion import CompletionPictures
    from fedgan_lightning.visuals.inspection import Inspection
    from fedgan_lightning.visuals.recommendations import Recommendations
    from fedgan_lightning.visuals.samples import SamplePictures

_HOMES = {
    "fedgan_lightning.api": ["Federation"],
    "fedgan_lightning.checkpoints": ["AtomicCheckpointIO", "BestCheckpoint", "LastCheckpoint"],
    "fedgan_lightning.data.datamodule": ["FederatedDataModule"],
    "fedgan_lightning.data.partition": [
        "IID",
        "ClassLists",
        "ClassMixes",
        "ClassesPerClient",
        "Dirichlet",
        "FeatureShift",
        "Natural",
        "Partition",
        "QuantitySkew",
    ],
    "fedgan_lightning.data.samples": ["Samples"],
    "fedgan_lightning.data.sources": [
        "CSVProfiles",
        "CelebA",
        "Digits",
        "Grid",
        "ImageFolder",
        "Interactions",
        "MedMNIST",
        "MedMNISTFile",
        "Ring",
        "Segments",
        "Source",
        "SwissRoll",
        "TextFile",
        "TorchvisionImages",
    ],
    "fedgan_lightning.data.vocabulary": ["Vocabulary"],
    "fedgan_lightning.errors": [
        "CheckpointError",
        "ClientError",
        "ConfigurationError",
        "DataError",
        "FedGANError",
        "QuorumError",
        "UpdateError",
    ],
    "fedgan_lightning.evaluation.audit": ["MembershipInference"],
    "fedgan_lightning.evaluation.per_class": ["ClassBreakdown", "ClientDistances"],
    "fedgan_lightning.evaluation.callback": ["Evaluation"],
    "fedgan_lightning.evaluation.completion": ["Completion"],
    "fedgan_lightning.evaluation.features": [
        "ClassifierFeatures",
        "FeatureNet",
        "InceptionFeatures",
        "ModuleFeatures",
        "PixelFeatures",
    ],
    "fedgan_lightning.evaluation.fidelity": [
        "ClassifierScore",
        "IntraClassDistance",
        "KernelDistance",
        "PrecisionRecall",
    ],
    "fedgan_lightning.evaluation.class_gap": ["HeldAbsentGap"],
    "fedgan_lightning.evaluation.ranking": ["RankingQuality"],
    "fedgan_lightning.evaluation.series": ["DiscriminativeScore", "PredictiveScore", "ProfileCentroids"],
    "fedgan_lightning.evaluation.text": ["BLEU", "HeldOutLikelihood", "SelfBLEU"],
    "fedgan_lightning.evaluation.downstream_tasks": ["ClientAugmentation", "Memorisation", "SyntheticTraining"],
    "fedgan_lightning.evaluation.metrics": [
        "ClassCoverage",
        "FrechetDistance",
        "Metric",
        "ModeCoverage",
        "SlicedWasserstein",
    ],
    "fedgan_lightning.federation.aggregation": ["WeightedMean"],
    "fedgan_lightning.federation.executors": [
        "AutoExecutor",
        "AutotunedExecutor",
        "FaultyExecutor",
        "SequentialExecutor",
        "VectorizedExecutor",
    ],
    "fedgan_lightning.federation.orchestrator": ["FederatedOrchestrator"],
    "fedgan_lightning.federation.robust": [
        "CoordinateMedian",
        "GeometricMedian",
        "Krum",
        "NearestNeighborMixing",
        "TrimmedMean",
    ],
    "fedgan_lightning.federation.rules": ["RoundRules", "UpdateValidator"],
    "fedgan_lightning.federation.secure": ["SecureAggregation"],
    "fedgan_lightning.federation.sampling": [
        "AllClients",
        "AvailableClients",
        "FractionOfClients",
        "PoissonSampling",
        "SelectedClients",
    ],
    "fedgan_lightning.federation.server": ["ServerModule"],
    "fedgan_lightning.federation.temperature": ["TemperatureSchedule"],
    "fedgan_lightning.federation.warm_start": ["StartFrom"],
    "fedgan_lightning.gan.augment": ["Augmentation", "LeCam"],
    "fedgan_lightning.gan.conditions": ["Codec", "Condition"],
    "fedgan_lightning.gan.editing": ["Projection", "direction", "edited", "interpolate", "project"],
    "fedgan_lightning.gan.inpainting_mask": ["InpaintingMask"],
    "fedgan_lightning.gan.module": ["GAN"],
    "fedgan_lightning.gan.networks": [
        "ACGANDiscriminator",
        "ACGANGenerator",
        "CFGANDiscriminator",
        "CFGANGenerator",
        "DCGANDiscriminator",
        "DCGANGenerator",
        "InpaintingGenerator",
        "MLPDiscriminator",
        "MLPGenerator",
        "PatchDiscriminator",
        "ProfileDiscriminator",
        "ProfileGenerator",
        "R3GANDiscriminator",
        "R3GANGenerator",
        "ResNetDiscriminator",
        "ResNetGenerator",
        "TextDiscriminator",
        "TextGenerator",
    ],
    "fedgan_lightning.gan.objectives": [
        "AdversarialLoss",
        "Hinge",
        "LeastSquares",
        "Minimax",
        "NonSaturating",
        "RelativisticPairing",
        "Wasserstein",
    ],
    "fedgan_lightning.gan.penalties": ["R1", "R2", "GradientPenalty", "Penalty"],
    "fedgan_lightning.gan.cfgan_condition": ["CFGANCondition"],
    "fedgan_lightning.gan.text": ["LanguageModel", "OneHot"],
    "fedgan_lightning.protocol": [
        "Aggregator",
        "ClientFailure",
        "ClientSampler",
        "ClientTask",
        "ClientUpdate",
        "Executor",
        "Participant",
        "UpdateSum",
    ],
    "fedgan_lightning.visuals.completion": ["CompletionPictures"],
    "fedgan_lightning.visuals.inspection": ["Inspection"],
    "fedgan_lightning.visuals.recommendations": ["Recommendations"],
    "fedgan_lightning.visuals.samples": ["SamplePictures"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])


__all__ = [
    "AdversarialLoss", "Minimax", "NonSaturating", "LeastSquares", "Wasserstein", "Hinge", "RelativisticPairing",
    "Penalty", "R1", "R2", "GradientPenalty", "Augmentation", "LeCam", "Codec", "Condition",
    "GAN", "MLPGenerator", "MLPDiscriminator", "DCGANGenerator", "DCGANDiscriminator", "ACGANGenerator",
    "ACGANDiscriminator", "ResNetGenerator", "ResNetDiscriminator", "R3GANGenerator", "R3GANDiscriminator",
    "ProfileGenerator", "ProfileDiscriminator", "CFGANGenerator", "CFGANDiscriminator", "CFGANCondition",
    "TextGenerator",
    "TextDiscriminator", "LanguageModel", "OneHot",
    "InpaintingMask", "InpaintingGenerator", "PatchDiscriminator", "Completion", "CompletionPictures",
    "Projection", "project", "interpolate", "direction", "edited",
    "FederatedDataModule", "Samples", "Source", "Digits", "TorchvisionImages", "CelebA", "ImageFolder", "MedMNIST",
    "MedMNISTFile", "Ring", "Grid", "SwissRoll", "Segments", "CSVProfiles", "Interactions", "TextFile", "Vocabulary",
    "Partition", "IID", "Dirichlet", "ClassesPerClient", "ClassLists", "ClassMixes", "QuantitySkew", "Natural",
    "FeatureShift",
    "Federation", "FederatedOrchestrator", "ServerModule", "AutoExecutor", "AutotunedExecutor", "SequentialExecutor",
    "VectorizedExecutor", "FaultyExecutor", "RoundRules", "UpdateValidator", "SecureAggregation", "StartFrom",
    "TemperatureSchedule",
    "WeightedMean", "CoordinateMedian", "TrimmedMean", "Krum", "GeometricMedian", "NearestNeighborMixing",
    "AllClients", "AvailableClients", "FractionOfClients", "PoissonSampling", "SelectedClients",
    "Aggregator", "ClientSampler", "ClientTask", "ClientUpdate", "ClientFailure", "Participant",
    "UpdateSum", "Executor",
    "Evaluation", "Metric", "FrechetDistance", "ClassCoverage", "ModeCoverage", "SlicedWasserstein",
    "KernelDistance", "PrecisionRecall", "ClassifierScore", "IntraClassDistance", "SyntheticTraining", "Memorisation",
    "ClassBreakdown", "ClientDistances", "HeldAbsentGap", "ClientAugmentation", "MembershipInference",
    "ProfileCentroids", "DiscriminativeScore", "PredictiveScore", "RankingQuality", "BLEU", "SelfBLEU",
    "HeldOutLikelihood",
    "FeatureNet", "ClassifierFeatures", "PixelFeatures", "InceptionFeatures", "ModuleFeatures",
    "SamplePictures", "Inspection", "Recommendations", "AtomicCheckpointIO", "BestCheckpoint", "LastCheckpoint",
    "FedGANError", "ConfigurationError", "DataError", "CheckpointError", "UpdateError", "ClientError",
    "QuorumError",
    "__version__",
]  # fmt: skip
