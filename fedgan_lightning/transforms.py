"""Transforms of updates between client and aggregator, and what one is written against."""

from __future__ import annotations

from fedgan_lightning.federation.transforms import (
    QSGD,
    BFloat16,
    ClipUpdates,
    Int8,
    LogMoments,
    PowerSGD,
    PrivateUpdates,
    RandomSparse,
    SignCompression,
    TopK,
    UpdateCodec,
)
from fedgan_lightning.protocol import (
    UpdateEntry,
)
from fedgan_lightning.update_transform import (
    RoundFacts,
    UpdateTransform,
)
