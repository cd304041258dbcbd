"""Samplers: which clients take part in a round."""

from __future__ import annotations

from fedgan_lightning.federation.label_balance import (
    BalancedClients,
)
from fedgan_lightning.federation.sampling import (
    AllClients,
    AvailableClients,
    FractionOfClients,
    PoissonSampling,
    SelectedClients,
)
from fedgan_lightning.protocol import (
    ClientSampler,
)
