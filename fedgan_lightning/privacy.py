"""Differential privacy for clients and for records, what it costs, and how it is audited."""

from __future__ import annotations

from fedgan_lightning.dp.accounting import (
    Release,
    epsilon_of,
    most_releases,
    noise_for,
)
from fedgan_lightning.dp.audits.statistics import (
    canary_estimate,
    one_run_bound,
)
from fedgan_lightning.federation.client_privacy import (
    ClientLevelPrivacy,
)
from fedgan_lightning.gan.example_privacy import (
    ExampleLevelPrivacy,
)
