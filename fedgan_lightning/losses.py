"""Adversarial losses, penalties, and what else changes the discriminator's loss."""

from __future__ import annotations

from fedgan_lightning.gan.augment import (
    Augmentation,
    LeCam,
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
from fedgan_lightning.gan.penalties import (
    R1,
    R2,
    GradientPenalty,
    Penalty,
)
