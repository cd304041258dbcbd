"""Federated algorithms, and what one is written against."""

from __future__ import annotations

from fedgan_lightning.federation.algorithm import (
    FederatedAlgorithm,
)
from fedgan_lightning.federation.algorithms import (
    FedGAN,
    FedProx,
    Scaffold,
    ServedGenerator,
)
from fedgan_lightning.federation.client_update import (
    Visit,
)
from fedgan_lightning.protocol import (
    UpdateEntry,
)
