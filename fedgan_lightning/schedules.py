"""Hyper-parameters that are functions of the round."""

from __future__ import annotations

from fedgan_lightning.federation.round_schedules import (
    CosineRounds,
    ExponentialRounds,
    LinearRounds,
    RoundSchedule,
    StepRounds,
)
