"""Rounds that do not wait for all clients, and how long clients take in virtual time."""

from __future__ import annotations

from fedgan_lightning.federation.asynchronous import (
    Asynchronous,
)
from fedgan_lightning.federation.durations import (
    Durations,
    FixedDurations,
    LogNormalDurations,
    TraceDurations,
)
