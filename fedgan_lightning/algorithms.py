"""Federated algorithms, and what one is written against."""

from __future__ import annotations

from fedgan_lightning.federation.algorithm import (
    FederatedAlgorithm,
)
from fedgan_lightning.federation.algorithms import (
    F2A,
    F2U,
    IFLGAN,
    MDGAN,
    UAGAN,
    FedGAN,
    FedProx,
    MeanDiscriminator,
    Scaffold,
    ServedGenerator,
)
from fedgan_lightning.federation.client_update import (
    Visit,
)
from fedgan_lightning.federation.feedback.algorithm import (
    FeedbackAlgorithm,
)
from fedgan_lightning.federation.feedback.ensemble import (
    EnsembleFeedback,
)
from fedgan_lightning.protocol import (
    UpdateEntry,
)
